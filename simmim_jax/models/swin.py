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

from simmim_jax.errors import ConfigError, check_minimum
from simmim_jax.models.layers import (
    DropPath,
    Encoder,
    Mlp,
    PatchEmbed,
    RelativePositionBias,
    check_choices,
    check_heads,
    drop_path_rates,
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
    "t": {"width": 96, "depths": (2, 2, 6, 2), "stage_heads": (3, 6, 12, 24)},
    "s": {"width": 96, "depths": (2, 2, 18, 2), "stage_heads": (3, 6, 12, 24)},
    "b": {"width": 128, "depths": (2, 2, 18, 2), "stage_heads": (4, 8, 16, 32)},
    "l": {"width": 192, "depths": (2, 2, 18, 2), "stage_heads": (6, 12, 24, 48)},
}


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each displacement and head."""

    heads: int
    qkv_bias: str
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m n d"], side: int, mask: Float[Array, "m n n"] | None
    ) -> Float[Array, "b m n d"]:
        width, head_width = x.shape[-1], x.shape[-1] // self.heads
        initial = truncated_normal(self.init_truncation)
        qkv = nn.DenseGeneral(
            (3, self.heads, head_width),
            use_bias=self.qkv_bias == "qkv",
            dtype=self.dtype,
            kernel_init=initial,
            name="qkv",
        )(x)  # b m n 3 h d/h
        query, key, value = (qkv[..., part, :, :] for part in range(3))
        logits = jnp.einsum(
            "bmqhc,bmkhc->bmhqk", query * head_width**-0.5, key, preferred_element_type=jnp.float32
        )  # b m h n n
        logits += RelativePositionBias(self.heads, initializer=initial, name="rel_pos_bias")((side, side))
        x = attend(logits, mask, value)
        return project(x, width, self.init_truncation, self.dtype)


def attend(
    logits: Float[Array, "b m h n n"], mask: Float[Array, "m n n"] | None, value: Float[Array, "b m n h c"]
) -> Float[Array, "b m n h c"]:
    """The softmax of the float32 logits in each window, applied to the values."""
    if mask is not None:
        logits += mask[:, None]
    weights = nn.softmax(logits).astype(value.dtype)
    return jnp.einsum("bmhqk,bmkhc->bmqhc", weights, value)


def project(x: Float[Array, "b m n h c"], width: int, init_truncation: float, dtype: str) -> Float[Array, "b m n d"]:
    """The last linear map of attention, from all heads; "proj" of the module that calls this."""
    initial = truncated_normal(init_truncation)
    return nn.DenseGeneral(width, axis=(-2, -1), dtype=dtype, kernel_init=initial, name="proj")(x).astype(jnp.float32)


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

    heads: int
    window: int
    shifted: bool
    mlp_ratio: float
    qkv_bias: str
    drop_path: float
    norm_epsilon: float
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b i j d"], train: bool, position: Int[Array, " b"] | None
    ) -> Float[Array, "b i j d"]:
        attention = WindowAttention(self.heads, self.qkv_bias, self.init_truncation, self.dtype, name="attn")
        branch = in_windows(attention, layer_norm(self.norm_epsilon, "norm1")(x), self.window, self.shifted)
        x += DropPath(self.drop_path, name="drop_attn")(branch, train, position)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.init_truncation, dtype=self.dtype, name="mlp")
        branch = mlp(layer_norm(self.norm_epsilon, "norm2")(x))
        return x + DropPath(self.drop_path, name="drop_mlp")(branch, train, position)


class PatchMerging(nn.Module):
    """Four tokens to one of twice the width: LayerNorm of the four, then a linear map without bias."""

    norm_epsilon: float
    init_truncation: float
    dtype: str

    def reduce(self, x: Float[Array, "b k l c"]) -> Float[Array, "b k l d"]:
        """The linear map, from all four tokens to half of their width."""
        initial = truncated_normal(self.init_truncation)
        width = x.shape[-1] // 2
        reduction = nn.Dense(width, use_bias=False, dtype=self.dtype, kernel_init=initial, name="reduction")
        return reduction(x).astype(jnp.float32)

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"]) -> Float[Array, "b k l 2*d"]:
        return self.reduce(layer_norm(self.norm_epsilon, "norm")(quarters(x)))


class Swin(Encoder):
    """A Swin Transformer under the encoder contract (see `simmim_jax.models`).

    width: of the first stage; each later stage doubles it. depths, stage_heads: blocks and heads of each stage.
    window: side of the attention windows in tokens; every second block shifts them by half. A stage whose map is no
        larger than that has one window of the map's shorter side, and no shift; maps that windows do not tile are
        padded.
    patch_size: side of a patch in pixels; the features' stride is that times 2 for each stage after the first.
    absolute_position: "none" or "learned". patch_norm: LayerNorm after the patch embedding.
    qkv_bias: "qkv" or "none". drop_path: rate of stochastic depth in the last block; linear from 0 in the first.
    init_truncation: cut of the initial normal in standard deviations (official: an absolute 2, which is 100 of them).
    remat: recompute each block's activations in the backward pass. dtype: of the matmuls, "float32" or "bfloat16".
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    stage_heads: tuple[int, ...] = (3, 6, 12, 24)
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
    remat: bool = False
    dtype: str = "float32"

    # Constants, not fields: no annotations, so that Linen leaves them alone.
    CHOICES = {  # noqa: RUF012
        "absolute_position": ("none", "learned"),
        "qkv_bias": ("qkv", "none"),
        "dtype": ("float32", "bfloat16"),
    }
    BLOCK, MERGING, DECAYED_TOO = Block, PatchMerging, ()

    def check(self) -> None:
        """Refuse sizes and options that cannot work, before anything is compiled. Raises ConfigError."""
        check_choices(self, self.CHOICES)
        for field in ("width", "window", "patch_size"):
            check_minimum(f"encoder.{field}", getattr(self, field), 1)
        numbers = (*self.depths, *self.stage_heads)
        whole = all(isinstance(number, int) for number in numbers) and min(numbers, default=0) > 0
        if not whole or len(self.depths) != len(self.stage_heads):
            raise ConfigError(
                f"depths {self.depths} and stage_heads {self.stage_heads}", "encoder.depths, encoder.stage_heads",
                "give one number above 0 per stage for each, like 2,2,6,2 and 3,6,12,24",
            )  # fmt: skip
        for stage, heads in enumerate(self.stage_heads):
            check_heads(self.width * 2**stage, heads, "encoder.stage_heads")
        for field in ("mlp_ratio", "init_truncation", "norm_epsilon"):
            check_minimum(f"encoder.{field}", getattr(self, field), 0, strict=True)

    @property
    def depth(self) -> int:
        return sum(self.depths)

    @property
    def pool_norm(self) -> bool:
        return not self.final_norm

    @property
    def token_stride(self) -> int:
        return self.patch_size

    @property
    def feature_stride(self) -> int:
        return self.patch_size * 2 ** (len(self.depths) - 1)

    def layer_of(self, path: str) -> int:
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
        return {"heads": self.stage_heads[stage], "window": self.window}

    def setup(self):
        self.patch_embed = PatchEmbed(self.width, self.patch_size, self.dtype)
        if self.patch_norm:
            self.patch_norm_layer = layer_norm(self.norm_epsilon, "patch_norm")

    def embed(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d"]:
        """One token for each patch: a linear map of its normalised pixels, and a LayerNorm."""
        tokens = self.patch_embed(images)
        return self.patch_norm_layer(tokens) if self.patch_norm else tokens

    @nn.compact
    def trunk(
        self, tokens: Float[Array, "b i j d"], train: bool = False, position: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l e"]:
        """The last stage's map. Each block's output is sown as `intermediates/blocks`, before merging and norm."""
        x, initial = tokens, truncated_normal(self.init_truncation)
        if self.absolute_position == "learned":
            _, i, j, d = x.shape
            x += self.param("pos_embed", initial, (i * j, d)).reshape(i, j, d)
        rates = iter(drop_path_rates(self.drop_path, self.depth))
        # `train` goes by position: remat traces keyword arguments.
        block_class = nn.remat(self.BLOCK, static_argnums=(2,)) if self.remat else self.BLOCK
        for stage, depth in enumerate(self.depths):
            for n in range(depth):
                block = block_class(
                    shifted=n % 2 == 1,
                    mlp_ratio=self.mlp_ratio,
                    qkv_bias=self.qkv_bias,
                    drop_path=next(rates),
                    norm_epsilon=self.norm_epsilon,
                    init_truncation=self.init_truncation,
                    dtype=self.dtype,
                    name=f"stage_{stage}_block_{n}",
                    **self.of_stage(stage),
                )
                x = block(x, train, position)
                self.sow("intermediates", "blocks", x)
            if stage < len(self.depths) - 1:
                x = self.MERGING(self.norm_epsilon, self.init_truncation, self.dtype, name=f"stage_{stage}_merge")(x)
        return layer_norm(self.norm_epsilon, "norm")(x) if self.final_norm else x
