"""Windows of a token map, as Swin and Swin V2 attend within them.

Shape letters: b images, i and j the map, m windows of one image, n tokens of one window, d width, w side of a window.
Source: models/swin_transformer.py of microsoft/SimMIM and microsoft/Swin-Transformer; for maps that windows do not
tile, swin_transformer.py of Swin-Transformer-Object-Detection.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

MASKED = -100.0  # added to the logits of tokens that are no neighbors; the official number, not minus infinity


def window_and_shift(grid: tuple[int, int], window: int, shifted: bool) -> tuple[int, int]:
    """(side, shift) of the windows on a map of `grid` tokens: half a window's shift, where `shifted`.

    A map no larger than a window, on its shorter side, shrinks the window to that side and is not shifted.
    """
    if min(grid) <= window:
        return min(grid), 0
    return window, window // 2 if shifted else 0


def stage_grids(image_size: tuple[int, int], patch_size: int, stages: int) -> list[tuple[int, int]]:
    """The map of each stage, in tokens: the first one token per patch, and each later one half of that, rounded up."""
    grids = [tuple(size // patch_size for size in image_size)]
    for _ in range(stages - 1):
        grids.append(tuple(-(-side // 2) for side in grids[-1]))
    return grids


def stage_windows(image_size: tuple[int, int], patch_size: int, stages: int, window: int) -> tuple[int, ...]:
    """The side of each stage's windows, in tokens."""
    return tuple(window_and_shift(grid, window, False)[0] for grid in stage_grids(image_size, patch_size, stages))


def pad_to_multiple(x: Float[Array, "b i j d"], side: int) -> Float[Array, "b ip jp d"]:
    """Zeros below and to the right, up to the next multiple of `side`."""
    below, right = -x.shape[1] % side, -x.shape[2] % side
    return jnp.pad(x, ((0, 0), (0, below), (0, right), (0, 0))) if below or right else x


def split_windows(x: Float[Array, "b i j d"], side: int) -> Float[Array, "b m n d"]:
    """The windows of `side` x `side` tokens that tile the map, row by row."""
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
    """What to add to the logits in windows of a map rolled by `shift`: 0 between tokens that were neighbors before the
    roll, `MASKED` between others."""

    def regions(size):  # along one axis: what stayed together, and the last window's part on either side of the seam
        return np.repeat([0, 1, 2], [size - side, side - shift, shift])

    region = 3 * regions(grid[0])[:, None] + regions(grid[1])[None, :]  # i j
    tiles = region.reshape(grid[0] // side, side, grid[1] // side, side).swapaxes(1, 2).reshape(-1, side * side)
    return np.where(tiles[:, :, None] == tiles[:, None, :], 0.0, MASKED).astype(np.float32)


def quarters(x: Float[Array, "b i j d"]) -> Float[Array, "b k l 4*d"]:
    """The four tokens of each 2 x 2 square side by side: top left, bottom left, top right, bottom right."""
    x = pad_to_multiple(x, 2)
    return jnp.concatenate([x[:, row::2, column::2] for column in (0, 1) for row in (0, 1)], axis=-1)
