"""Masks from a key: the heart of masked image modeling. `mask`: True means hidden.

A strategy is a small pure function of one image's key. It runs inside the compiled step, mapped over the images; each
image's key depends on the step and the image's place in the global batch alone, so that the masks are the same for any
number of devices, processes and microbatches. Shape letters: b images, i and j the token grid.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key
from scipy.ndimage import distance_transform_edt

from simmim_jax.errors import ConfigError, check_multiple, choose


def random_patches(
    key: Key[Array, ""], grid: tuple[int, int], block_tokens: int, mask_ratio: float
) -> Bool[Array, "i j"]:
    """Hide exactly ceil(mask_ratio * blocks) blocks of `block_tokens` x `block_tokens` tokens, all choices equally likely.

    Paper section 3.1, "random masking"; official data/data_simmim.py, `MaskGenerator`.
    """
    rows, columns = grid[0] // block_tokens, grid[1] // block_tokens
    order = jax.random.permutation(key, rows * columns)  # the places of a random order below the count are hidden
    hidden = (order < num_masked(rows * columns, mask_ratio)).reshape(rows, columns)
    return jnp.repeat(jnp.repeat(hidden, block_tokens, axis=0), block_tokens, axis=1)


MASKS = {"random": random_patches}


def num_masked(blocks: int, mask_ratio: float) -> int:
    """How many of `blocks` are hidden: ceil(blocks * mask_ratio) in floating point, as the official code has it."""
    return math.ceil(blocks * mask_ratio)


def make_masks(
    mask: str, *, image_size: tuple[int, int], token_stride: int, mask_patch_size: int, mask_ratio: float
) -> Callable[[Key[Array, ""], Int[Array, " b"]], Bool[Array, "b i j"]]:
    """A function (key, batch_indices) -> masks [b, i, j], one for each image at that batch_index of the global batch.

    image_size: (height, width) in pixels; both multiples of `mask_patch_size`, and `mask_patch_size` of `token_stride`.
    mask_ratio: the share of blocks to hide, in (0, 1).
    Raises ConfigError, with the nearest sizes that work.
    """
    make_mask = choose("mask", mask, MASKS)
    if not 0 < mask_ratio < 1:
        raise ConfigError(f"mask_ratio {mask_ratio} is not between 0 and 1", "objective.mask_ratio", "SimMIM's is 0.6")
    check_multiple(mask_patch_size, token_stride, "objective.mask_patch_size", "the encoder's token stride")
    for size, side in zip(image_size, ("height", "width"), strict=True):
        check_multiple(size, mask_patch_size, f"image {side}", "the mask's block size")
    grid = (image_size[0] // token_stride, image_size[1] // token_stride)
    draw = partial(make_mask, grid=grid, block_tokens=mask_patch_size // token_stride, mask_ratio=mask_ratio)

    def masks(key: Key[Array, ""], batch_indices: Int[Array, " b"]) -> Bool[Array, "b i j"]:
        return jax.vmap(lambda batch_index: draw(jax.random.fold_in(key, batch_index)))(batch_indices)

    return masks


def average_distance(hidden: Bool[np.ndarray, "y x"]) -> float:
    """The mean distance of a hidden pixel to the nearest visible one, in pixels: AvgDist (paper section 4.1.2).

    The paper finds 10 to 20 to serve best. Raises ValueError where no pixel is hidden, or none visible.
    """
    if hidden.all() or not hidden.any():
        raise ValueError("a mask that hides all or nothing has no distances")
    return float(distance_transform_edt(hidden)[hidden].mean())
