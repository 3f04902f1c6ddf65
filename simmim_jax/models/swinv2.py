"""Swin Transformer V2 as in official SimMIM (Liu et al. 2022, arXiv 2111.09883).

Differences from Swin:

    - Norms come after each branch, and their scales start at zero.
    - Attention logits are cosines of query and key, divided by a learned temperature.
    - A small network computes the bias from the logarithm of a displacement, so a model can change its window size.
    - Patch merging normalizes after its linear map.

Shape letters: b images, i and j the token map, m windows of one image, n tokens of one window, d width, h heads, w side
of a window. Source: models/swin_transformer_v2.py of microsoft/Swin-Transformer.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from simmim_jax.errors import ConfigError
from simmim_jax.models import swin
from simmim_jax.models.attention import QueryKeyValue, attend_by_xla
from simmim_jax.models.blocks import Drop, drop_path
from simmim_jax.models.layers import LayerNorm, Linear, Mlp, relative_position_index, truncated_normal
from simmim_jax.models.swin import in_windows, with_mask
from simmim_jax.models.windows import quarters, stage_windows

DEPTHS = (2, 2, 18, 2)
SIZES = {
    "t": {"width": 96, "depths": (2, 2, 6, 2), "num_heads": (3, 6, 12, 24)},
    "s": {"width": 96, "depths": DEPTHS, "num_heads": (3, 6, 12, 24)},
    "b": {"width": 128, "depths": DEPTHS, "num_heads": (4, 8, 16, 32)},
    "l": {"width": 192, "depths": DEPTHS, "num_heads": (6, 12, 24, 48)},
    "h": {"width": 352, "depths": DEPTHS, "num_heads": (11, 22, 44, 88)},
    "giant": {"width": 448, "depths": DEPTHS, "num_heads": (14, 28, 56, 112)},
}


def log_displacements(side: int, pretrained_window: int) -> Float[np.ndarray, "r 2"]:
    """The logarithmic displacement (rows, columns) for each row of a window's bias table, r = (2 * side - 1)**2.

    A displacement is divided by the largest one in a window of side `pretrained_window` (0: `side`), times 8, then
    sign * log2(1 + magnitude) / log2(8). The paper's equation 5, with the official scale.
    """
    steps = np.arange(1 - side, side, dtype=np.float32)
    steps *= np.float32(8) / max((pretrained_window or side) - 1, 1)
    steps = np.sign(steps) * np.log2(np.abs(steps) + 1) / np.float32(np.log2(8))
    return np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1).reshape(-1, 2)


class ContinuousPositionBias(nn.Module):
    """The bias of each displacement and head, between 0 and 16, from two linear layers with a ReLU in between."""

    num_heads: int
    pretrained_window: int
    init_truncation: float

    @nn.compact
    def __call__(self, side: int) -> Float[Array, "h n n"]:
        initial = truncated_normal(self.init_truncation)
        x = nn.relu(nn.Dense(512, kernel_init=initial, name="fc1")(log_displacements(side, self.pretrained_window)))
        table = nn.Dense(self.num_heads, use_bias=False, kernel_init=initial, name="fc2")(x)
        index = relative_position_index((side, side), class_token=False)
        return 16 * nn.sigmoid(table[index].transpose(2, 0, 1))


class WindowAttention(nn.Module):
    """Scaled cosine attention within windows, with biases on queries and values only."""

    num_heads: int
    qkv_bias: str
    pretrained_window: int
    recompute: bool
    init_truncation: float
    dtype: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "b m n d"], side: int, mask: Float[Array, "m n n"] | None
    ) -> Float[Array, "b m n d"]:
        initial, head_width = truncated_normal(self.init_truncation), x.shape[-1] // self.num_heads
        query, key, value = QueryKeyValue(self.num_heads, False, self.dtype, initial, name="qkv")(x)
        if self.qkv_bias == "qv":
            query += self.param("q_bias", nn.initializers.zeros, (self.num_heads, head_width)).astype(query.dtype)
            value += self.param("v_bias", nn.initializers.zeros, (self.num_heads, head_width)).astype(value.dtype)
        scale = self.param("logit_scale", nn.initializers.constant(np.log(10.0)), (self.num_heads,))
        query, key = (unit_length(x.astype(jnp.float32)) for x in (query, key))
        query *= jnp.exp(jnp.minimum(scale, np.log(100.0)))[:, None]
        bias = ContinuousPositionBias(self.num_heads, self.pretrained_window, self.init_truncation, name="cpb")(side)
        query, key, bias = query.astype(self.dtype), key.astype(self.dtype), with_mask(bias, mask)
        out = attend_by_xla(query, key, value, bias, scale=1.0, recompute=self.recompute)
        out = Linear(x.shape[-1], self.dtype, initial, axes=2, name="proj")(out)
        return out.astype(jnp.float32)


def unit_length(x: Float[Array, "... c"]) -> Float[Array, "... c"]:
    """Each vector divided by its length, which is at least 1e-12 (PyTorch's `normalize`)."""
    squared = (x * x).sum(axis=-1, keepdims=True)
    long = squared > 1e-24  # the square root has no gradient at zero
    return x / jnp.where(long, jnp.sqrt(jnp.where(long, squared, 1.0)), 1e-12)


class Block(swin.Block):
    """Window attention and MLP, each followed by a norm whose scale starts at zero, and stochastic depth."""

    pretrained_window: int

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"], drop: Drop | None) -> Float[Array, "b i j d"]:
        attention = WindowAttention(
            num_heads=self.num_heads,
            qkv_bias=self.qkv_bias,
            pretrained_window=self.pretrained_window,
            recompute=self.recompute,
            init_truncation=self.init_truncation,
            dtype=self.dtype,
            name="attn",
        )
        branch = in_windows(attention, x, self.window, self.shifted)
        branch = LayerNorm(self.norm_epsilon, 0.0, name="norm1")(branch)
        x += drop_path(branch, drop, 0)
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.init_truncation, dtype=self.dtype, name="mlp")
        branch = LayerNorm(self.norm_epsilon, 0.0, name="norm2")(mlp(x))
        return x + drop_path(branch, drop, 1)


class PatchMerging(swin.PatchMerging):
    """Merge four tokens into one of twice the width: a linear map without bias, then LayerNorm."""

    @nn.compact
    def __call__(self, x: Float[Array, "b i j d"]) -> Float[Array, "b k l 2*d"]:
        return LayerNorm(self.norm_epsilon, name="norm")(self.reduce(quarters(x)))


class SwinV2(swin.Swin):
    """A Swin Transformer V2: `swin.Swin` with other blocks.

    qkv_bias: "qv" or "none".
    pretrained_windows: side of each stage's windows in the model that this one's weights come from, like 12,12,12,6
        (official PRETRAINED_WINDOW_SIZES); (): the same as this model's.
    """

    qkv_bias: str = "qv"
    pretrained_windows: tuple[int, ...] = ()

    CHOICES = {**swin.Swin.CHOICES, "qkv_bias": ("qv", "none")}  # noqa: RUF012
    NO_DECAY_KEYWORDS = ("cpb", "logit_scale")  # swin_transformer_v2.py: cpb_mlp, logit_scale
    BLOCK, MERGING = Block, PatchMerging

    def check(self) -> None:
        super().check()
        whole = all(isinstance(side, int) and side >= 0 for side in self.pretrained_windows)
        if not whole or (self.pretrained_windows and len(self.pretrained_windows) != len(self.depths)):
            what = f"pretrained_windows {self.pretrained_windows} for {len(self.depths)} stages"
            raise ConfigError(what, "encoder.pretrained_windows", "give one number per stage, like 12,12,12,6, or none")

    def stage_options(self, stage: int) -> dict:
        pretrained = self.pretrained_windows[stage] if self.pretrained_windows else 0
        return {**super().stage_options(stage), "pretrained_window": pretrained}

    def stage_windows(self, image_size: tuple[int, int]) -> tuple[int, ...]:
        """The side of each stage's windows at this image size: `pretrained_windows` of a model that starts from it."""
        return stage_windows(image_size, self.patch_size, len(self.depths), self.window)
