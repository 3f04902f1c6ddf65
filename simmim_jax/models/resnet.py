"""ResNet with bottleneck blocks: the v1.5 layout of torchvision and timm, whose stride sits on the 3x3 convolution.

Shape letters: b images, y x pixels, k l a feature map, c channels, d the feature width.
Source: He et al. 2015, arXiv 1512.03385; the names of the layers in torchvision and timm (`layer1.0.conv2`) are
`stage_0_block_0/conv2` here.

How a ResNet is masked. Its stem is a 7x7 convolution of stride 2: no group of its outputs belongs to one square of the
image, so a token put in after it would come too late, with hidden pixels already in the visible outputs beside them. So
`embed` is the identity, a token is a pixel, and a hidden pixel becomes the learned token, one value for each channel,
before any convolution sees it: exact, and the same SimMIM as for a transformer. Pixels are normalized, so a token that
starts near zero starts near the mean color.

The SimMIM paper pretrains a ResNet-50x4 in an appendix, but the released code has no ResNet to follow. Others chose
otherwise: A2MIM (Li et al. 2022, arXiv 2205.13943) fills hidden pixels with the mean color and adds a learned token to
a feature map further up; SparK (Tian et al. 2023, arXiv 2301.03580) and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808)
leave hidden places out by sparse convolutions. Here the network sees dense images with filled squares, and batch norm's
running statistics are those of such images, until fine-tuning has moved them.
"""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError
from simmim_jax.models.blocks import REMAT, Drop, drop_of, drop_path, drops, remat_options
from simmim_jax.models.encoder import Encoder

SIZES = {
    "50": {"depths": (3, 4, 6, 3), "width": 64},
    "101": {"depths": (3, 4, 23, 3), "width": 64},
    "50x4": {"depths": (3, 4, 6, 3), "width": 256},
}

EXPANSION = 4  # a block's output channels for each of its inner ones


def convolution(channels: int, size: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """A convolution without bias, padded by half its odd size on every side, with He initialization by fan out."""
    initial = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        channels, (size, size), stride, size // 2, use_bias=False, dtype=dtype, kernel_init=initial, name=name
    )


class BatchNorm(nn.Module):
    """Batch normalization in float32, over all axes but the last (Ioffe and Szegedy 2015, arXiv 1502.03167).

    While `train` is true it normalizes by the mean and the biased variance of the batch: under `jit` over a mesh the
    whole batch, whatever the number of devices; but of each microbatch by itself, so that their number changes the
    update, as of no other layer here. Otherwise it does by the running ones, the parameters "mean" and "var",
    which have no gradient. What training makes of these, (1 - momentum) * old + momentum * new with an unbiased
    variance, as PyTorch counts, goes to the collection "batch_stats" where that is mutable.
    """

    epsilon: float
    momentum: float
    initial_scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b ... c"], train: bool) -> Float[Array, "b ... c"]:
        channels = x.shape[-1:]
        scale = self.param("scale", nn.initializers.constant(self.initial_scale), channels)
        bias = self.param("bias", nn.initializers.zeros, channels)
        running = {
            "mean": jax.lax.stop_gradient(self.param("mean", nn.initializers.zeros, channels)),
            "var": jax.lax.stop_gradient(self.param("var", nn.initializers.ones, channels)),
        }
        x = x.astype(jnp.float32)
        if train:
            axes = tuple(range(x.ndim - 1))
            mean = x.mean(axes)
            var = jnp.square(x - mean).mean(axes)
            if self.is_mutable_collection("batch_stats") and not self.is_initializing():
                count = x.size // x.shape[-1]
                batch = {"mean": mean, "var": var * (count / max(count - 1, 1))}
                for name, old in running.items():
                    new = (1.0 - self.momentum) * old + self.momentum * jax.lax.stop_gradient(batch[name])
                    self.put_variable("batch_stats", name, new)
        else:
            mean, var = running["mean"], running["var"]
        return (x - mean) * (jax.lax.rsqrt(var + self.epsilon) * scale) + bias


class Block(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with batch norm, added to the input before the last ReLU.

    The last norm's scale starts at zero, so that a block without a shortcut convolution starts as the identity (Goyal
    et al. 2017, arXiv 1706.02677; timm's default).
    """

    channels: int
    stride: int
    norm_epsilon: float
    norm_momentum: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k1 l1 c"], train: bool, drop: Drop | None) -> Float[Array, "b k2 l2 d"]:
        def norm(name, initial_scale=1.0):
            return BatchNorm(self.norm_epsilon, self.norm_momentum, initial_scale, name=name)

        width = self.channels * EXPANSION
        branch = convolution(self.channels, 1, 1, self.dtype, "conv1")(x)
        branch = nn.relu(norm("norm1")(branch, train))
        branch = convolution(self.channels, 3, self.stride, self.dtype, "conv2")(branch)
        branch = nn.relu(norm("norm2")(branch, train))
        branch = convolution(width, 1, 1, self.dtype, "conv3")(branch)
        branch = norm("norm3", 0.0)(branch, train)
        if self.stride > 1 or x.shape[-1] != width:
            x = convolution(width, 1, self.stride, self.dtype, "shortcut_conv")(x)
            x = norm("shortcut_norm")(x, train)
        return nn.relu(x + drop_path(branch, drop, 0))


class ResNet(Encoder):
    """A ResNet under the encoder contract (see `simmim_jax.models`); how it is masked, and why so, stands above.

    depths: number of blocks in each of the four stages.
    width: channels of the stem; a stage's blocks have 1, 2, 4 and 8 times as many inside, and 4 times those outside.
    drop_path: rate of stochastic depth in the last block; it grows linearly from 0 in the first.
    norm_epsilon, norm_momentum: of batch norm, as PyTorch means them: momentum is the share of the new.
    init_truncation: cut of the mask token's initial normal, in standard deviations; no kernel's normal is cut.
    remat: what the backward pass computes again: "none"; "full", all but each block's input; "dots", all but those and
        the convolutions.
    dtype: of the convolutions, "float32" or "bfloat16".
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    drop_path: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    init_truncation: float = 100.0
    remat: str = "none"
    dtype: str = "float32"

    CHOICES = {"remat": REMAT, "dtype": ("float32", "bfloat16")}  # noqa: RUF012 - a constant, not a field: see `ViT.CHOICES`

    def check(self) -> None:
        super().check()
        if len(self.depths) != 4 or not all(isinstance(number, int) and number > 0 for number in self.depths):
            raise ConfigError(f"depths is {self.depths}", "encoder.depths", "give four numbers above 0, one a stage")
        self.check_minimum("width", minimum=1)
        if not 0 < self.norm_momentum <= 1:
            raise ConfigError(f"norm_momentum {self.norm_momentum} is not in (0, 1]", "encoder.norm_momentum")
        self.check_minimum("init_truncation", "norm_epsilon", strict=True)

    @property
    def token_stride(self) -> int:
        return 1

    @property
    def feature_stride(self) -> int:
        return 32

    @property
    def depth(self) -> int:
        return sum(self.depths)

    def layer_id(self, path: str) -> int:
        """The layer of a parameter, for layer-wise learning rates: each block is one, as for a ViT."""
        if block := re.match(r"stage_(\d+)_block_(\d+)/", path):
            stage, number = map(int, block.groups())
            return sum(self.depths[:stage]) + number + 1
        return 0 if path.startswith("stem_") else self.depth + 1

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """The images themselves: a token is a pixel."""
        return images

    @nn.compact
    def trunk(
        self, tokens: Float[Array, "b y x c"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l d"]:
        """The map of the last stage, not pooled. Each block's output is sown as `intermediates/blocks`."""
        x = convolution(self.width, 7, 2, self.dtype, "stem_conv")(tokens)
        x = nn.relu(BatchNorm(self.norm_epsilon, self.norm_momentum, name="stem_norm")(x, train))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))

        drop, number = drops(self, train, batch_index, x), itertools.count()
        # `train` goes by batch_index: remat traces keyword arguments.
        recomputed = self.remat != "none"
        block_class = nn.remat(Block, static_argnums=(2,), **remat_options(self.remat)) if recomputed else Block
        for stage, blocks in enumerate(self.depths):
            for n in range(blocks):
                block = block_class(
                    channels=self.width * 2**stage,
                    stride=2 if stage > 0 and n == 0 else 1,
                    norm_epsilon=self.norm_epsilon,
                    norm_momentum=self.norm_momentum,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{n}",
                )
                x = block(x, train, drop_of(drop, next(number)))
                self.sow("intermediates", "blocks", x)
        return x
