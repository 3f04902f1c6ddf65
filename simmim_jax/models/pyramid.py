"""An encoder's maps at four scales, as dense heads want them; and the convolution that such heads are made of.

A hierarchical encoder has such maps: the outputs of its stages. A plain transformer has maps of one scale, of which
four are taken at a quarter, half, three quarters and the end of its depth, and scaled by learned layers.

Shape letters: b images, k l a feature map, c d channels.
Source: BEiT's semantic_segmentation/backbone/beit.py (`fpn1` to `fpn4`), which SimMIM's segmentation uses too.
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from simmim_jax.errors import ConfigError
from simmim_jax.models.layers import gelu

STRIDES = (4, 8, 16, 32)
GROUPS, CHANNELS = 32, 16  # of a group norm: at most so many groups, and at least so many channels in each


def pyramid_blocks(encoder: nn.Module, blocks: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The blocks, counted from 1, whose outputs make the pyramid of `encoder`.

    blocks: of a plain transformer, other four than those at each quarter of its depth. Raises ConfigError.
    """
    if len(encoder.stages) > 1:
        if blocks:
            raise ConfigError("an encoder with stages has its own pyramid", "objective.blocks", "leave it empty")
        return encoder.stages
    if not blocks:
        return tuple(math.ceil(encoder.depth * part / 4) for part in (1, 2, 3, 4))
    if len(blocks) != 4 or not all(1 <= n <= encoder.depth for n in blocks) or list(blocks) != sorted(blocks):
        raise ConfigError(
            f"blocks {blocks} of an encoder of {encoder.depth}", "objective.blocks",
            f"give four, in order, of 1 to {encoder.depth}, like 4,6,8,12",
        )  # fmt: skip
    return tuple(blocks)


def pyramid_factors(encoder: nn.Module) -> tuple[int | float, ...]:
    """How many times finer each level is than what the encoder gives; powers of two.

    Raises ConfigError where its patches do not come to the strides 4, 8, 16 and 32 so.
    """
    if len(encoder.stages) > 1:
        return (1,) * len(encoder.stages)
    factors = tuple(encoder.feature_stride / stride for stride in STRIDES)
    if not all(math.log2(factor).is_integer() for factor in factors):
        raise ConfigError(
            f"patches of {encoder.feature_stride} pixels make no pyramid of strides 4, 8, 16 and 32",
            "objective.head=upernet", "give --config=configs/folder_segment.py:linear, or patches of 4, 8, 16 or 32",
        )  # fmt: skip
    return factors


class ConvNormRelu(nn.Module):
    """A convolution without bias, a group norm and a ReLU. kernel: its side, odd. He initialization by fan out."""

    channels: int
    kernel: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k l c"]) -> Float[Array, "b k l d"]:
        initial = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        size = (self.kernel, self.kernel)
        x = nn.Conv(
            self.channels, size, padding=self.kernel // 2, use_bias=False, dtype=self.dtype, kernel_init=initial,
            name="conv",
        )(x)  # fmt: skip
        return nn.relu(group_norm(self.channels, "norm")(x.astype(jnp.float32)))


def group_norm(channels: int, name: str) -> nn.GroupNorm:
    """A group norm in float32, of at most 32 groups, of 16 channels or more where there are as many.

    So that it leaves something of a map of one pixel.
    """
    return nn.GroupNorm(math.gcd(GROUPS, channels // CHANNELS or 1, channels), epsilon=1e-5, name=name)


class Rescale(nn.Module):
    """One level of a plain transformer's pyramid: its map, made `factor` times finer.

    Each doubling is a transposed convolution of 2x2, with a norm and a GELU between two of them; a factor below 1 is a
    maximum over squares of 1 / factor.
    """

    factor: int | float
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k1 l1 c"]) -> Float[Array, "b k2 l2 c"]:
        if self.factor <= 1:
            side = min(round(1 / self.factor), *x.shape[1:3])
            return nn.max_pool(x, (side, side), (side, side)) if side > 1 else x
        channels, doublings = x.shape[-1], round(math.log2(self.factor))
        for n in range(doublings):
            if n:
                x = gelu(group_norm(channels, f"norm_{n}")(x))
            x = nn.ConvTranspose(channels, (2, 2), (2, 2), dtype=self.dtype, name=f"up_{n}")(x).astype(jnp.float32)
        return x
