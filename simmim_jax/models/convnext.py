"""ConvNeXt, version 1.

Shape letters: b images, y x pixels, i j the token grid, k l a feature map, d channels.
Source: Liu et al. 2022, arXiv 2201.03545; facebookresearch/ConvNeXt models/convnext.py.

Masking. The first convolution is 4x4 with stride 4, so tokens do not overlap. The mask token replaces them between
`embed` and `trunk`, as in SimMIM's Swin, and no masked pixel has influence on a feature. Use mask patches of 32 pixels,
the feature stride, as for Swin.

This is SimMIM unchanged. A dense convolution also computes at masked positions, so the literature differs: A2MIM (Li et
al. 2022, arXiv 2205.13943) fills masked pixels with the mean color and adds its learned token to a later feature map.
SparK (Tian et al. 2023, arXiv 2301.03580) and ConvNeXt V2 (Woo et al. 2023, arXiv 2301.00808) compute only at visible
positions, by sparse convolutions. ConvNeXt V2 also adds global response normalization, which is not implemented here.
"""

import re

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simmim_jax.models.blocks import Blocks, Drop, drop_path, drops, run_blocks
from simmim_jax.models.encoder import Encoder
from simmim_jax.models.layers import MAX_TRUNCATION, LayerNorm, LayerScale, Mlp, patch_convolution, truncated_normal

SIZES = {
    "t": {"depths": (3, 3, 9, 3), "widths": (96, 192, 384, 768)},
    "s": {"depths": (3, 3, 27, 3), "widths": (96, 192, 384, 768)},
    "b": {"depths": (3, 3, 27, 3), "widths": (128, 256, 512, 1024)},
    "l": {"depths": (3, 3, 27, 3), "widths": (192, 384, 768, 1536)},
}


class Downsample(nn.Module):
    """LayerNorm, and a 2x2 convolution of stride 2 to `width` channels, between two stages."""

    width: int
    norm_epsilon: float
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k1 l1 d1"]) -> Float[Array, "b k2 l2 d2"]:
        convolution = patch_convolution(self.width, 2, self.dtype, self.init_truncation, name="conv")
        return convolution(LayerNorm(self.norm_epsilon, name="norm")(x)).astype(jnp.float32)


class Block(nn.Module):
    """A depthwise 7x7 convolution, LayerNorm and an MLP, in one residual branch."""

    layer_scale: float
    norm_epsilon: float
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k l d"], drop: Drop | None) -> Float[Array, "b k l d"]:
        width = x.shape[-1]
        branch = nn.Conv(
            width,
            (7, 7),
            padding=3,
            feature_group_count=width,
            dtype=self.dtype,
            kernel_init=truncated_normal(self.init_truncation),
            name="conv",
        )(x)
        branch = LayerNorm(self.norm_epsilon, name="norm")(branch.astype(jnp.float32))
        branch = Mlp(4 * width, self.init_truncation, dtype=self.dtype, name="mlp")(branch)
        if self.layer_scale:
            branch = LayerScale(self.layer_scale, name="scale")(branch)
        return x + drop_path(branch, drop, 0)


class ConvNeXt(Encoder):
    """A ConvNeXt (contract: `simmim_jax.models`).

    The last map is not normalized: a classifier normalizes after pooling (`fc_norm`).

    depths, widths: blocks and channels of each of the four stages.
    layer_scale: initial value of LayerScale; 0 disables it.
    """

    depths: tuple[int, ...] = (3, 3, 9, 3)
    widths: tuple[int, ...] = (96, 192, 384, 768)
    layer_scale: float = 1e-6
    drop_path: float = 0.0
    norm_epsilon: float = 1e-6
    init_truncation: float = MAX_TRUNCATION
    remat: str = "none"
    scan: bool = False
    dtype: str = "float32"

    token_stride, feature_stride = 4, 32
    fc_norm = True

    def check(self) -> None:
        super().check()
        self.check_stages("depths", "widths", count=4)
        self.check_minimum("layer_scale")

    @property
    def scanned_layers(self) -> dict[str, tuple[str, ...]]:
        return {f"stage_{stage}_blocks": self._blocks(stage) for stage in range(4)} if self.scan else {}

    def _blocks(self, stage: int) -> tuple[str, ...]:
        return tuple(f"stage_{stage}_block_{n}" for n in range(self.depths[stage]))

    def layer_id(self, path: str) -> int:
        """Each block is one layer, as for a ViT. Downsampling counts with the next block.

        (Official ConvNeXt groups its blocks into 12 layers.)
        """
        if place := re.match(r"stage_(\d+)_(?:down|block_(\d+))/", path):
            stage, number = (int(group or 0) for group in place.groups())
            return sum(self.depths[:stage]) + number + 1
        return 0 if path.startswith("patch_") else self.depth + 1

    def setup(self):
        self.patch_embed = patch_convolution(self.widths[0], 4, self.dtype, self.init_truncation)
        self.patch_norm = LayerNorm(self.norm_epsilon)

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d"]:
        """One token per 4x4 pixels: their linear map, normalized."""
        return self.patch_norm(self.patch_embed(images).astype(jnp.float32))

    @nn.compact
    def trunk(
        self, tokens: Float[Array, "b i j d1"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l d2"]:
        """The map of the last stage, not normalized. Each block's output is sown as `intermediates/blocks`."""
        x = tokens
        drop = drops(self, train, batch_index, x)
        key = self.make_rng("params") if self.is_initializing() else None
        block = Block(self.layer_scale, self.norm_epsilon, self.init_truncation, self.dtype, parent=None)
        for stage, width in enumerate(self.widths):
            if stage > 0:
                name = f"stage_{stage}_down"
                x = Downsample(width, self.norm_epsilon, self.init_truncation, self.dtype, name=name)(x)
            scanned = (f"stage_{stage}_blocks",) if self.scan else ()
            blocks = Blocks((block,), self._blocks(stage), sum(self.depths[:stage]), scanned)
            x = run_blocks(self, x, blocks, key=key, drop=drop)
        return x
