"""Pixels as objectives use them: normalized, and cut into the patches that one feature predicts.

Shape letters: b images, y x pixels, c channels, k l the patch grid, p = c * stride**2 values of one patch.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Num

from simmim_jax.data.pixels import Scale


def normalize(
    images: Num[Array, "b y x c"], mean: tuple, std: tuple, scale: Scale | None = None
) -> Float[Array, "b y x c"]:
    """float32 pixels, normalized by `mean` and `std` per channel, which are on the scale 0..1.

    scale: how stored samples become 0..1; None: they are divided by 255. Pixels without data become 0, the mean.
    """
    if scale is None:
        return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
    low, high = (jnp.asarray(side, jnp.float32) for side in (scale.low, scale.high))
    unit = jnp.clip((images.astype(jnp.float32) - low) / (high - low), 0, 1)
    normalized = (unit - jnp.asarray(mean)) / jnp.asarray(std)
    return normalized if scale.missing is None else jnp.where(has_data(images, scale), normalized, 0.0)


def has_data(images: Num[Array, "b y x c"], scale: Scale) -> Bool[Array, "b y x c"]:
    """Whether each value of stored images has data."""
    return ~jnp.isnan(images) if scale.dtype == "float32" else images != scale.missing


def denormalize(images: Float[Array, "b y x c"], mean: tuple, std: tuple) -> Float[Array, "b y x c"]:
    """The inverse of `normalize` on the scale 0..1, clipped to that range for display."""
    return jnp.clip(images * jnp.asarray(std) + jnp.asarray(mean), 0, 1)


def local_moments(
    images: Float[Array, "b y x c"], window: int
) -> tuple[Float[Array, "b y x c"], Float[Array, "b y x c"]]:
    """(mean, standard deviation) of each channel in the `window` x `window` pixels around each pixel, `window` odd.

    Pixels outside the image do not count. The variance is unbiased, clipped at 0, plus 1e-6. Official `norm_targets`
    (Swin-Transformer models/simmim.py) averages twice in two dimensions. Summing along one axis after the other costs
    `window` / 2 times less.
    """

    def sums(x):
        for axis in (1, 2):
            sizes = [window if dimension == axis else 1 for dimension in range(4)]
            x = jax.lax.reduce_window(x, 0.0, jax.lax.add, sizes, (1, 1, 1, 1), "SAME")
        return x

    count = sums(jnp.ones((1, *images.shape[1:3], 1)))
    mean = sums(images) / count
    variance = (sums(images**2) / count - mean**2) * count / (count - 1)
    return mean, jnp.sqrt(jnp.maximum(variance, 0.0) + 1e-6)


def to_patches(images: Float[Array, "b y x c"], stride: int) -> Float[Array, "b k l p"]:
    """Patches of `stride` pixels. The values of a patch are ordered by channel, then row, then column.

    PyTorch's PixelShuffle uses the same order, so official heads load unchanged.
    """
    b, y, x, c = images.shape
    patches = images.reshape(b, y // stride, stride, x // stride, stride, c)
    return patches.transpose(0, 1, 3, 5, 2, 4).reshape(b, y // stride, x // stride, c * stride**2)


def from_patches(patches: Float[Array, "b k l p"], stride: int) -> Float[Array, "b y x c"]:
    """The inverse of `to_patches`."""
    b, rows, columns, values = patches.shape
    patches = patches.reshape(b, rows, columns, values // stride**2, stride, stride)
    return patches.transpose(0, 1, 4, 2, 5, 3).reshape(b, rows * stride, columns * stride, values // stride**2)
