"""ResNet with bottleneck blocks in the v1.5 layout of torchvision and timm: the 3x3 convolution has the stride.

Shape letters: b images, y x pixels, k l a feature map, c channels, d the feature width.
Source: He et al. 2015, arXiv 1512.03385; the names of the layers in torchvision and timm (`layer1.0.conv2`) are
`stage_0_block_0/conv2` here.

Masking. The stem is a 7x7 convolution of stride 2, so its outputs near a mask patch already contain masked pixels. A
mask token placed after the stem would come too late. Therefore `embed` is the identity and a token is a pixel: the
mask token, one value per channel, replaces masked pixels before any convolution. Pixels are normalized, so a mask
token that starts near zero starts near the mean color.

The SimMIM paper pretrains a ResNet-50x4 in an appendix; the released code has no ResNet. Other methods: A2MIM (Li et
al. 2022, arXiv 2205.13943) fills masked pixels with the mean color and adds a learned token to a later feature map.
SparK (Tian et al. 2023, arXiv 2301.03580) and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) skip masked positions by
sparse convolutions. Here, pretraining gives batch norm the running statistics of images with filled patches;
fine-tuning updates them.
"""

import itertools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError
from simmim_jax.models.blocks import Drop, block_drop, drop_path, drops, remat_options
from simmim_jax.models.encoder import Encoder
from simmim_jax.models.layers import MAX_TRUNCATION

SIZES = {
    "50": {"depths": (3, 4, 6, 3), "width": 64},
    "101": {"depths": (3, 4, 23, 3), "width": 64},
    "50x4": {"depths": (3, 4, 6, 3), "width": 256},
}

EXPANSION = 4  # output channels of a block per inner channel


def convolution(channels: int, size: int, stride: int, dtype: str, name: str) -> nn.Conv:
    """A convolution without bias, padded by half its odd size, with He initialization by fan out."""
    initial = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
    return nn.Conv(
        channels, (size, size), stride, size // 2, use_bias=False, dtype=dtype, kernel_init=initial, name=name
    )


class BatchNorm(nn.Module):
    """Batch normalization in float32, over all axes but the last (Ioffe and Szegedy 2015, arXiv 1502.03167).

    While `train` is true, it normalizes by the mean and biased variance of the batch. Under `jit` over a mesh this is
    the whole batch, for any number of devices. Each microbatch has its own statistics, so, unlike for any other layer,
    the number of microbatches changes the update.

    Otherwise it normalizes by the running statistics, the parameters "mean" and "var", which have no gradient. Training
    puts their new values into the collection "batch_stats" if it is mutable: (1 - momentum) * old + momentum * new,
    with an unbiased variance, as in PyTorch.
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

    The last norm's scale starts at zero, so a block without a shortcut convolution starts as the identity (Goyal et al.
    2017, arXiv 1706.02677; timm's default).
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
    """A ResNet (contract: `simmim_jax.models`).

    depths: blocks in each of the four stages.
    width: channels of the stem. The stages' blocks have 1, 2, 4 and 8 times as many inner channels, and 4 times those
        at their output.
    norm_epsilon, norm_momentum: as in PyTorch: momentum is the weight of the new statistics.
    init_truncation: for the mask token only; kernels are not cut.
    """

    depths: tuple[int, ...] = (3, 4, 6, 3)
    width: int = 64
    drop_path: float = 0.0
    norm_epsilon: float = 1e-5
    norm_momentum: float = 0.1
    init_truncation: float = MAX_TRUNCATION
    remat: str = "none"
    dtype: str = "float32"

    token_stride, feature_stride = 1, 32

    def check(self) -> None:
        super().check()
        self.check_stages("depths", count=4)
        self.check_minimum("width", minimum=1)
        if not 0 < self.norm_momentum <= 1:
            raise ConfigError(f"norm_momentum {self.norm_momentum} is not in (0, 1]", "encoder.norm_momentum")

    def layer_id(self, path: str) -> int:
        """Each block is one layer, as for a ViT."""
        if block := re.match(r"stage_(\d+)_block_(\d+)/", path):
            stage, number = map(int, block.groups())
            return sum(self.depths[:stage]) + number + 1
        return 0 if path.startswith("stem_") else self.depth + 1

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b y x c"]:
        """The images: a token is a pixel."""
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
        # `train` is positional, because remat traces keyword arguments.
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
                x = block(x, train, block_drop(drop, next(number)))
                self.sow("intermediates", "blocks", x)
        return x
