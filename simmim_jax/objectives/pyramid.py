"""A feature pyramid of four scales from any encoder, and the convolution block of dense heads.

For a hierarchical encoder, the pyramid is the outputs of its stages. For a plain transformer, it is four blocks, by
default at a quarter, half, three quarters and the end of its depth, rescaled by learned layers.

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
MAX_GROUPS = 32  # of a group norm
MIN_GROUP_CHANNELS = 16


def pyramid_blocks(encoder: nn.Module, blocks: tuple[int, ...] = ()) -> tuple[int, ...]:
    """The blocks, counted from 1, whose outputs form the pyramid of `encoder`.

    blocks: for a plain transformer, four blocks instead of those at each quarter of its depth. Raises ConfigError.
    """
    if len(encoder.stages) > 1:
        if blocks:
            raise ConfigError("an encoder with stages has its own pyramid", "objective.blocks", "leave it empty")
        return encoder.stages
    if not blocks:
        return tuple(math.ceil(encoder.depth * part / 4) for part in (1, 2, 3, 4))
    if len(blocks) != 4 or not all(1 <= n <= encoder.depth for n in blocks) or list(blocks) != sorted(blocks):
        fix = f"give four in ascending order, 1 to {encoder.depth}, like 4,6,8,12"
        raise ConfigError(f"blocks {blocks} of an encoder of {encoder.depth} blocks", "objective.blocks", fix)
    return tuple(blocks)


def pyramid_factors(encoder: nn.Module) -> tuple[int | float, ...]:
    """The factor by which each level is finer than its block's map; powers of two.

    Raises ConfigError if the encoder's patches do not lead to strides of 4, 8, 16 and 32 pixels.
    """
    if len(encoder.stages) > 1:
        return (1,) * len(encoder.stages)
    factors = tuple(encoder.feature_stride / stride for stride in STRIDES)
    if not all(math.log2(factor).is_integer() for factor in factors):
        raise ConfigError(
            f"patches of {encoder.feature_stride} pixels cannot form a pyramid of strides 4, 8, 16 and 32",
            "objective.head=upernet",
            "give --config=configs/folder_segment.py:linear, or patches of 4, 8, 16 or 32",
        )
    return factors


class ConvNormRelu(nn.Module):
    """A convolution without bias, a group norm and a ReLU. kernel: odd side. He initialization by fan out."""

    channels: int
    kernel: int
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "b k l c"]) -> Float[Array, "b k l d"]:
        initial = jax.nn.initializers.variance_scaling(2.0, "fan_out", "normal")
        size = (self.kernel, self.kernel)
        x = nn.Conv(
            self.channels,
            size,
            padding=self.kernel // 2,
            use_bias=False,
            dtype=self.dtype,
            kernel_init=initial,
            name="conv",
        )(x)
        return nn.relu(group_norm(self.channels, "norm")(x.astype(jnp.float32)))


def group_norm(channels: int, name: str) -> nn.GroupNorm:
    """A float32 group norm of at most 32 groups, each of at least 16 channels if there are that many.

    Small groups would erase a map of one pixel.
    """
    return nn.GroupNorm(math.gcd(MAX_GROUPS, channels // MIN_GROUP_CHANNELS or 1, channels), epsilon=1e-5, name=name)


class Rescale(nn.Module):
    """One level of a plain transformer's pyramid: a block's map, made `factor` times finer.

    Each doubling is a 2x2 transposed convolution, with a norm and a GELU between two of them. A factor below 1 is a
    max pool over squares of 1 / factor.
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
