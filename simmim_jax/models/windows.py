"""Attention windows of a token map, for Swin and Swin V2.

Shape letters: b images, i and j the map, m windows of one image, n tokens of one window, d width, w side of a window.
Source: models/swin_transformer.py of microsoft/SimMIM and microsoft/Swin-Transformer. Padding of maps that windows do
not tile: swin_transformer.py of Swin-Transformer-Object-Detection.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SHIFT_MASK_VALUE = -100.0  # added to logits between tokens that are not neighbors; official value, not -inf


def window_and_shift(grid: tuple[int, int], window: int, shifted: bool) -> tuple[int, int]:
    """(side, shift) of the windows on a map of `grid` tokens. The shift is half a window if `shifted`, else 0.

    If the map's shorter side is no larger than a window, the window shrinks to that side and there is no shift.
    """
    if min(grid) <= window:
        return min(grid), 0
    return window, window // 2 if shifted else 0


def stage_grids(image_size: tuple[int, int], patch_size: int, stages: int) -> list[tuple[int, int]]:
    """The (rows, columns) of each stage's token map. Each stage after the first halves them, rounding up."""
    grids = [tuple(size // patch_size for size in image_size)]
    for _ in range(stages - 1):
        grids.append(tuple(-(-side // 2) for side in grids[-1]))
    return grids


def stage_windows(image_size: tuple[int, int], patch_size: int, stages: int, window: int) -> tuple[int, ...]:
    """The side of each stage's windows, in tokens."""
    return tuple(window_and_shift(grid, window, False)[0] for grid in stage_grids(image_size, patch_size, stages))


def pad_to_multiple(x: Float[Array, "b i j d"], side: int) -> Float[Array, "b ip jp d"]:
    """Pad with zeros at the bottom and right, up to the next multiple of `side`."""
    below, right = -x.shape[1] % side, -x.shape[2] % side
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def split_windows(x: Float[Array, "b i j d"], side: int) -> Float[Array, "b m n d"]:
    """The windows of `side` x `side` tokens that tile the map, in row-major order."""
    b, i, j, d = x.shape
    tiles = x.reshape(b, i // side, side, j // side, side, d).swapaxes(2, 3)
    return tiles.reshape(b, (i // side) * (j // side), side * side, d)


def join_windows(windows: Float[Array, "b m n d"], grid: tuple[int, int]) -> Float[Array, "b i j d"]:
    """The inverse of `split_windows`, for a map of `grid` tokens."""
    b, _, n, d = windows.shape
    side = round(n**0.5)
    tiles = windows.reshape(b, grid[0] // side, grid[1] // side, side, side, d).swapaxes(2, 3)
    return tiles.reshape(b, *grid, d)


def shift_mask(grid: tuple[int, int], side: int, shift: int) -> Float[np.ndarray, "m n n"]:
    """The bias for the logits of a map rolled by `shift`: 0 between tokens that were neighbors before the roll, else
    `SHIFT_MASK_VALUE`.
    """

    def regions(size):  # along one axis; the seam divides the last window into regions 1 and 2
        return np.repeat([0, 1, 2], [size - side, side - shift, shift])

    region = 3 * regions(grid[0])[:, None] + regions(grid[1])[None, :]  # i j
    tiles = region.reshape(grid[0] // side, side, grid[1] // side, side).swapaxes(1, 2).reshape(-1, side * side)
    return np.where(tiles[:, :, None] == tiles[:, None, :], 0.0, SHIFT_MASK_VALUE).astype(np.float32)


def quarters(x: Float[Array, "b i j d"]) -> Float[Array, "b k l 4*d"]:
    """The four tokens of each 2 x 2 square, concatenated: top left, bottom left, top right, bottom right."""
    x = pad_to_multiple(x, 2)
    return jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
