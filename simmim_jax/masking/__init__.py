"""Mask strategies: where an image is masked. True means masked.

A strategy is a pure function (key, grid, count, context) -> Bool[i, j] for one image:

    key      the image's own JAX key
    grid     (i, j), the mask patches in a column and in a row
    count    how many of them to mask, exactly
    context  what the strategy knows about the image, like a score map [i, j]; None for strategies that need nothing

It runs inside the compiled step. `make_masks` maps it over a batch and enlarges its result to the token grid. An
image's key depends only on the step and on its index in the global batch. Masks are therefore the same for any number
of devices, processes and microbatches.

To add a strategy, write one file, and add one line to `MASKS`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, Key

from simmim_jax.errors import ConfigError, check_multiple, choose
from simmim_jax.masking import random

MASKS = {"random": random.mask_random}


def num_masked(patches: int, mask_ratio: float) -> int:
    """ceil(patches * mask_ratio), rounded up from the floating-point product as in the official code."""
    return math.ceil(patches * mask_ratio)


def make_masks(
    mask: str, *, image_size: tuple[int, int], token_stride: int, mask_patch_size: int, mask_ratio: float
) -> Callable[[Key[Array, ""], Int[Array, " b"]], Bool[Array, "b i j"]]:
    """A function (key, batch_index) -> masks [b, i, j] on the token grid, one for each image.

    image_size: (height, width) in pixels, multiples of `mask_patch_size`.
    mask_patch_size: side of a mask patch in pixels, a multiple of `token_stride`.
    mask_ratio: fraction of mask patches to mask, between 0 and 1.
    Raises ConfigError for sizes that do not divide, with the nearest that do.
    """
    strategy = choose("mask", mask, MASKS)
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask_ratio {mask_ratio} is not between 0 and 1", "objective.mask_ratio", "SimMIM uses 0.6")
    check_multiple(mask_patch_size, token_stride, "objective.mask_patch_size", "the encoder's token stride")
    for size, side in zip(image_size, ("height", "width"), strict=True):
        check_multiple(size, mask_patch_size, f"image {side}", "the mask patch size")
    grid = (image_size[0] // mask_patch_size, image_size[1] // mask_patch_size)
    count, side = num_masked(math.prod(grid), mask_ratio), mask_patch_size // token_stride

    def one(key: Key[Array, ""], batch_index: Int[Array, ""]) -> Bool[Array, "i j"]:
        patches = strategy(jax.random.fold_in(key, batch_index), grid, count, None)
        return jnp.repeat(jnp.repeat(patches, side, axis=0), side, axis=1)

    return jax.vmap(one, in_axes=(None, 0))
