"""Swin Transformer as in official SimMIM (Liu et al. 2021, arXiv 2103.14030).

Shape letters: b images, i and j the token map, m windows of one image, n tokens of one window, d width, h heads.
Source: models/swin_transformer.py of microsoft/SimMIM.
"""

import itertools
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simmim_jax.models.attention import QueryKeyValue, attend_by_xla
from simmim_jax.models.blocks import REMAT, Blocks, Drop, drop_path, drops, run_blocks
from simmim_jax.models.encoder import Encoder
from simmim_jax.models.layers import (
    MAX_TRUNCATION,
    LayerNorm,
    Linear,
    Mlp,
    PatchEmbed,
    RelativePositionBias,
    check_heads,
    truncated_normal,
)
from simmim_jax.models.windows import (
    join_windows,
    pad_to_multiple,
    quarters,
    shift_mask,
    split_windows,
    window_and_shift,
)

SIZES = {
    "t": {"width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"width": 96, "depths": (2, 2, 18, 2), "num_heads": (3, 6, 12, 24)},
    "b": {"width": 128, "depths": (2, 2, 18, 2), "num_heads": (4, 8, 16, 32)},
    "l": {"width": 192, "depths": (2, 2, 18, 2), "num_heads": (6, 12, 24, 48)},
}


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias per displacement and head."""

    num_heads: int
    qkv_bias: str
    recompute: bool
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m n d"], side: int, mask: Float[Array, "m n n"] | None
    ) -> Float[Array, "b m n d"]:
        initial = truncated_normal(self.init_truncation)
        query, key, value = QueryKeyValue(self.num_heads, self.qkv_bias == "qkv", self.dtype, initial, name="qkv")(x)
        bias = RelativePositionBias(self.num_heads, initializer=initial, name="rel_pos_bias")((side, side))
        out = attend_by_xla(query, key, value, with_mask(bias, mask), recompute=self.recompute)
        out = Linear(x.shape[-1], self.dtype, initial, axes=2, name="proj")(out)
        return out.astype(jnp.float32)


def with_mask(
    bias: Float[Array, "h n n"], mask: Float[Array, "m n n"] | None
) -> Float[Array, "h n n"] | Float[Array, "m h n n"]:
    """The bias for the logits of every window: the bias of each head, plus the window's shift mask if there is one."""
    return bias if mask is None else bias + mask[:, None]


def in_windows(attention: Callable, x: Float[Array, "b i j d"], window: int, shifted: bool) -> Float[Array, "b i j d"]:
    """`attention` within windows of the map. A map that windows do not tile is padded; for shifted windows it is
    rolled.

    attention: a function (windows [b, m, n, d], side, shift mask or None) -> [b, m, n, d].
    """
    side, shift = window_and_shift(x.shape[1:3], window, shifted)
    padded = pad_to_multiple(x, side)
    grid, mask = padded.shape[1:3], None
    if shift:
        padded = jnp.roll(padded, (-shift, -shift), axis=(1, 2))
        mask = jnp.asarray(shift_mask(grid, side, shift))
    out = join_windows(attention(split_windows(padded, side), side, mask), grid)
    if shift:
        out = jnp.roll(out, (shift, shift), axis=(1, 2))
    return out[:, : x.shape[1], : x.shape[2]]


class Block(nn.Module):
    """Pre-norm window attention and MLP, each with stochastic depth."""

    num_heads: int
    window: int
    shifted: bool
    mlp_ratio: float
    qkv_bias: str
    recompute: bool
    norm_epsilon: float
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"], drop: Drop | None) -> Float[Array, "b i j d"]:
        attention = WindowAttention(
            self.num_heads, self.qkv_bias, self.recompute, self.init_truncation, self.dtype, name="attn"
        )
        branch = in_windows(attention, LayerNorm(self.norm_epsilon, name="norm1")(x), self.window, self.shifted)
        x += drop_path(branch, drop, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.init_truncation, dtype=self.dtype, name="mlp")
        branch = mlp(LayerNorm(self.norm_epsilon, name="norm2")(x))
        return x + drop_path(branch, drop, 1)


class PatchMerging(nn.Module):
    """Merge four tokens into one of twice the width: LayerNorm, then a linear map without bias."""

    norm_epsilon: float
    init_truncation: float
    dtype: str

    def reduce(self, x: Float[Array, "b k l c"]) -> Float[Array, "b k l d"]:
        """The linear map, from four tokens to half of their total width."""
        initial = truncated_normal(self.init_truncation)
        width = x.shape[-1] // 2
        reduction = Linear(width, self.dtype, initial, use_bias=False, name="reduction")
        return reduction(x).astype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"]) -> Float[Array, "b k l 2*d"]:
        return self.reduce(LayerNorm(self.norm_epsilon, name="norm")(quarters(x)))


class Swin(Encoder):
    """A Swin Transformer (contract: `simmim_jax.models`).

    width: channels of the first stage; each later stage doubles them.
    depths, num_heads: blocks and heads of each stage.
    window: side of the attention windows in tokens; every second block shifts them by half. If a map's shorter side is
        no larger, the window shrinks to it and there is no shift. Maps that windows do not tile are padded.
    patch_size: side of a patch in pixels. The feature stride is twice that for each stage after the first.
    absolute_position: "none" or "learned".
    patch_norm: LayerNorm after the patch embedding.
    qkv_bias: "qkv" or "none".
    remat: also "attention", as for a ViT.
    scan: each stage of two or more pairs of blocks is scanned, a plain and a shifted block per turn. Its stacks are
        like "stage_2_blocks_0" (plain) and "stage_2_blocks_1" (shifted).
    attention: "auto" or "xla", which are equal: windows are too small and too many for cuDNN's kernel.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window: int = 7
    patch_size: int = 4
    mlp_ratio: float = 4.0
    qkv_bias: str = "qkv"
    absolute_position: str = "none"
    patch_norm: bool = True
    drop_path: float = 0.0
    final_norm: bool = True
    norm_epsilon: float = 1e-5
    init_truncation: float = MAX_TRUNCATION
    remat: str = "none"
    scan: bool = False
    attention: str = "auto"
    dtype: str = "float32"

    CHOICES = {  # noqa: RUF012
        **Encoder.CHOICES,
        "absolute_position": ("none", "learned"),
        "qkv_bias": ("qkv", "none"),
        "remat": (*REMAT, "attention"),
        "attention": ("auto", "xla"),
    }
    NO_DECAY_KEYWORDS = ("table",)  # swin_transformer.py: relative_position_bias_table
    BLOCK, MERGING = Block, PatchMerging

    def check(self) -> None:
        super().check()
        self.check_minimum("width", "window", "patch_size", minimum=1)
        self.check_stages("depths", "num_heads")
        for stage, heads in enumerate(self.num_heads):
            check_heads(self.width * 2**stage, heads, "encoder.num_heads")
        self.check_minimum("mlp_ratio", strict=True)

    @property
    def fc_norm(self) -> bool:
        return not self.final_norm

    @property
    def token_stride(self) -> int:
        return self.patch_size

    @property
    def feature_stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    @property
    def scanned_layers(self) -> dict[str, tuple[str, ...]]:
        stages = [self._scanned_layers(stage) for stage in range(len(self.depths))]
        return {name: blocks for stage in stages for name, blocks in stage.items()}

    def _scanned_layers(self, stage: int) -> dict[str, tuple[str, ...]]:
        """The stacks of one stage: plain blocks and shifted blocks. A last block without a partner is in neither."""
        pairs = self.depths[stage] // 2
        if not self.scan or pairs < 2:
            return {}
        return {f"stage_{stage}_blocks_{kind}": self._blocks(stage)[kind : 2 * pairs : 2] for kind in (0, 1)}

    def _blocks(self, stage: int) -> tuple[str, ...]:
        return tuple(f"stage_{stage}_block_{n}" for n in range(self.depths[stage]))

    def layer_id(self, path: str) -> int:
        """Official `get_swin_layer`.

        Merging counts as its stage's last block. An absolute position embedding counts as "the rest", an official slip.
        """
        first_block = (0, *itertools.accumulate(self.depths))
        if block := re.match(r"stage_(\d+)_block_(\d+)/", path):
            return first_block[int(block.group(1))] + int(block.group(2)) + 1
        if merge := re.match(r"stage_(\d+)_merge/", path):
            return first_block[int(merge.group(1)) + 1]
        return 0 if path.startswith("patch_") else self.depth + 1

    def stage_options(self, stage: int) -> dict:
        """Options of the blocks that differ between stages."""
        return {"num_heads": self.num_heads[stage], "window": self.window}

    def setup(self):
        self.patch_embed = PatchEmbed(self.width, self.patch_size, self.dtype)
        if self.patch_norm:
            self.patch_norm_layer = LayerNorm(self.norm_epsilon, name="patch_norm")

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d"]:
        """One token for each patch: a linear map of its normalized pixels, and a LayerNorm."""
        tokens = self.patch_embed(images)
        return self.patch_norm_layer(tokens) if self.patch_norm else tokens

    @nn.compact
    def trunk(
        self, tokens: Float[Array, "b i j d"], train: bool = False, batch_index: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l e"]:
        """The last stage's map. Each block's output is sown as `intermediates/blocks`, before merging and norm."""
        x, initial = tokens, truncated_normal(self.init_truncation)
        if self.absolute_position == "learned":
            _, i, j, d = x.shape
            x += self.param("pos_embed", initial, (i * j, d)).reshape(i, j, d)
        drop = drops(self, train, batch_index, x)
        key = self.make_rng("params") if self.is_initializing() else None
        first = 0
        for stage, depth in enumerate(self.depths):
            modules = tuple(
                self.BLOCK(
                    shifted=shifted,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    recompute=self.remat == "attention",
                    norm_epsilon=self.norm_epsilon,
                    init_truncation=self.init_truncation,
                    dtype=self.dtype,
                    parent=None,
                    **self.stage_options(stage),
                )
                for shifted in (False, True)
            )
            names, scanned = self._blocks(stage), self._scanned_layers(stage)
            paired = sum(map(len, scanned.values()))
            if scanned:
                x = run_blocks(self, x, Blocks(modules, names[:paired], first, tuple(scanned)), key=key, drop=drop)
            x = run_blocks(self, x, Blocks(modules, names[paired:], first + paired), key=key, drop=drop)
            first += depth
            if stage < len(self.depths) - 1:
                x = self.MERGING(self.norm_epsilon, self.init_truncation, self.dtype, name=f"stage_{stage}_merge")(x)
        return LayerNorm(self.norm_epsilon, name="norm")(x) if self.final_norm else x
