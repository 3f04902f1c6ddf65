"""Swin Transformer as official SimMIM pretrains it (Liu et al. 2021, arXiv 2103.14030).

Shape letters: b images, i and j the token map, m windows of one image, n tokens of one window, d width, h heads.
Source: models/swin_transformer.py of microsoft/SimMIM. Padding of maps that windows do not tile: see `windows`.
"""

import itertools
import re
from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError
from simmim_jax.models.attention import QueryKeyValue, attend_by_xla
from simmim_jax.models.blocks import REMAT, Drop, drop_path, drops, run_blocks
from simmim_jax.models.encoder import Encoder
from simmim_jax.models.layers import (
    Linear,
    Mlp,
    PatchEmbed,
    RelativePositionBias,
    check_heads,
    layer_norm,
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
    """Self-attention within windows, with a learned bias for each displacement and head."""

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
    """What to add to the logits of every window: its mask, where there is one, besides the bias of each head."""
    return bias if mask is None else bias + mask[:, None]


def in_windows(attention: Callable, x: Float[Array, "b i j d"], window: int, shifted: bool) -> Float[Array, "b i j d"]:
    """`attention` within windows of the map, which is padded where they do not tile it, and rolled where they shift.

    attention: a function (windows [b, m, n, d], their side, what to add to the logits or None) -> [b, m, n, d].
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
    """Pre-norm attention in windows and MLP, each with stochastic depth."""

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
        branch = in_windows(attention, layer_norm(self.norm_epsilon, "norm1")(x), self.window, self.shifted)
        x += drop_path(branch, drop, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.init_truncation, dtype=self.dtype, name="mlp")
        branch = mlp(layer_norm(self.norm_epsilon, "norm2")(x))
        return x + drop_path(branch, drop, 1)


class PatchMerging(nn.Module):
    """Four tokens to one of twice the width: LayerNorm of the four, then a linear map without bias."""

    norm_epsilon: float
    init_truncation: float
    dtype: str

    def reduce(self, x: Float[Array, "b k l c"]) -> Float[Array, "b k l d"]:
        """The linear map, from all four tokens to half of their width."""
        initial = truncated_normal(self.init_truncation)
        width = x.shape[-1] // 2
        reduction = Linear(width, self.dtype, initial, use_bias=False, name="reduction")
        return reduction(x).astype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"]) -> Float[Array, "b k l 2*d"]:
        return self.reduce(layer_norm(self.norm_epsilon, "norm")(quarters(x)))


class Swin(Encoder):
    """A Swin Transformer under the encoder contract (see `simmim_jax.models`).

    width: of the first stage; each later stage doubles it. depths, num_heads: blocks and heads of each stage.
    window: side of the attention windows in tokens; every second block shifts them by half. A stage whose map is no
        larger than that has one window of the map's shorter side, and no shift; maps that windows do not tile are
        padded.
    patch_size: side of a patch in pixels; the features' stride is that times 2 for each stage after the first.
    absolute_position: "none" or "learned". patch_norm: LayerNorm after the patch embedding.
    qkv_bias: "qkv" or "none". drop_path: rate of stochastic depth in the last block; linear from 0 in the first.
    init_truncation: cut of the initial normal in standard deviations (official: an absolute 2, which is 100 of them).
    remat: what the backward pass computes again, as of a ViT.
    scan: run the blocks of a stage with two pairs or more by `lax.scan`, each time a plain and a shifted one. Their
        parameters are then two scanned_layers, like "stage_2_blocks_0" (plain) and "stage_2_blocks_1".
    attention: "auto" or "xla", which are the same: windows are too small, and too many, for cuDNN's kernel.
    dtype: of the matmuls, "float32" or "bfloat16".
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
    init_truncation: float = 100.0
    remat: str = "none"
    scan: bool = False
    attention: str = "auto"
    dtype: str = "float32"

    # Constants, not fields: no annotations, so that Linen leaves them alone.
    CHOICES = {  # noqa: RUF012
        "absolute_position": ("none", "learned"),
        "qkv_bias": ("qkv", "none"),
        "remat": (*REMAT, "attention"),
        "attention": ("auto", "xla"),
        "dtype": ("float32", "bfloat16"),
    }
    BLOCK, MERGING = Block, PatchMerging

    def check(self) -> None:
        super().check()
        self.check_minimum("width", "window", "patch_size", minimum=1)
        numbers = (*self.depths, *self.num_heads)
        whole = all(isinstance(number, int) for number in numbers) and min(numbers, default=0) > 0
        if not whole or len(self.depths) != len(self.num_heads):
            raise ConfigError(
                f"depths {self.depths} and num_heads {self.num_heads}", "encoder.depths, encoder.num_heads",
                "give one number above 0 per stage for each, like 2,2,6,2 and 3,6,12,24",
            )  # fmt: skip
        for stage, heads in enumerate(self.num_heads):
            check_heads(self.width * 2**stage, heads, "encoder.num_heads")
        self.check_minimum("mlp_ratio", "init_truncation", "norm_epsilon", strict=True)

    @property
    def depth(self) -> int:
        return sum(self.depths)

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
        return {name: blocks for stage in range(len(self.depths)) for name, blocks in self._stacks(stage).items()}

    def _stacks(self, stage: int) -> dict[str, tuple[str, ...]]:
        """Of one stage: the plain blocks and the shifted ones, but for a last one without a partner."""
        pairs = self.depths[stage] // 2
        if not self.scan or pairs < 2:
            return {}
        return {f"stage_{stage}_blocks_{kind}": self._blocks(stage)[kind : 2 * pairs : 2] for kind in (0, 1)}

    def _blocks(self, stage: int) -> tuple[str, ...]:
        return tuple(f"stage_{stage}_block_{n}" for n in range(self.depths[stage]))

    def layer_id(self, path: str) -> int:
        """The layer of a parameter, for layer-wise learning rates: official `get_swin_layer`.

        Merging counts as the stage's last block, and an absolute position embedding, by a slip of theirs, as the rest.
        """
        first_block = (0, *itertools.accumulate(self.depths))
        if block := re.match(r"stage_(\d+)_block_(\d+)/", path):
            return first_block[int(block.group(1))] + int(block.group(2)) + 1
        if merge := re.match(r"stage_(\d+)_merge/", path):
            return first_block[int(merge.group(1)) + 1]
        return 0 if path.startswith("patch_") else self.depth + 1

    def of_stage(self, stage: int) -> dict:
        """What the blocks of one stage are given besides what all are."""
        return {"num_heads": self.num_heads[stage], "window": self.window}

    def setup(self):
        self.patch_embed = PatchEmbed(self.width, self.patch_size, self.dtype)
        if self.patch_norm:
            self.patch_norm_layer = layer_norm(self.norm_epsilon, "patch_norm")

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
            kinds = tuple(
                self.BLOCK(
                    shifted=shifted,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    recompute=self.remat == "attention",
                    norm_epsilon=self.norm_epsilon,
                    init_truncation=self.init_truncation,
                    dtype=self.dtype,
                    parent=None,
                    **self.of_stage(stage),
                )
                for shifted in (False, True)
            )
            names, scanned_layers = self._blocks(stage), self._stacks(stage)
            paired = sum(map(len, scanned_layers.values()))
            if scanned_layers:
                x = run_blocks(
                    self, x, kinds, names[:paired], first=first, scanned_layers=tuple(scanned_layers), key=key, drop=drop
                )  # fmt: skip
            x = run_blocks(self, x, kinds, names[paired:], first=first + paired, key=key, drop=drop)
            first += depth
            if stage < len(self.depths) - 1:
                x = self.MERGING(self.norm_epsilon, self.init_truncation, self.dtype, name=f"stage_{stage}_merge")(x)
        return layer_norm(self.norm_epsilon, "norm")(x) if self.final_norm else x
