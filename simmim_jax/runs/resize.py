"""Resize position tables to another window or image size.

Relative position bias tables are resized as in the official `load_pretrained` (utils.py of microsoft/SimMIM and
microsoft/Swin-Transformer), absolute position embeddings bicubically. Swin V2's continuous bias needs no resizing.
Shape letters: r rows of a table (displacements, and three for a class token), h heads, n positions, d width.
"""

import itertools
import math

import numpy as np
from jaxtyping import Float
from scipy.interpolate import RectBivariateSpline


def progression(source: int, target: int) -> Float[np.ndarray, " s"]:
    """Positions of `source` displacements on an axis of `target` displacements; both numbers are odd.

    The positions are 0, 1, 1 + q, 1 + q + q**2, ... and their negatives. q in [1.01, 1.5] is chosen by bisection, as in
    the official code, so that the last position is the last of the target, (target - 1) / 2.
    """
    reach, low, high = source // 2, 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**reach) / (1 - q) > target // 2 else (q, high)
    steps = list(itertools.accumulate(q**power for power in range(reach)))
    return np.array([-step for step in reversed(steps)] + [0.0] + steps)


def resize_bias_table(
    table: Float[np.ndarray, "r h"], source: tuple[int, int], target: tuple[int, int], extra: int = 0
) -> Float[np.ndarray, "rows h"]:
    """Resize a relative position bias table to another window size, with a bicubic spline for each head.

    source, target: (rows, columns) of tokens in the windows. The last `extra` rows of the table belong to the class
    token and do not change. Beyond the outermost displacement of the source, its value is repeated.
    """
    if source == target:
        return table
    sizes = [2 * side - 1 for side in source]  # displacements along each axis
    displacements, rest = np.split(table, [sizes[0] * sizes[1]])
    at = [progression(size, 2 * side - 1) for size, side in zip(sizes, target, strict=True)]
    wanted = [
        np.clip(np.arange(1 - side, side), places[0], places[-1]) for side, places in zip(target, at, strict=True)
    ]
    degrees = [min(3, size - 1) for size in sizes]  # 2 tokens have three displacements: a parabola
    if min(degrees) == 0:  # one token has one displacement: nothing to interpolate
        maps = [np.full([len(places) for places in wanted], values.mean()) for values in displacements.T]
    else:
        maps = [
            RectBivariateSpline(*at, values.reshape(sizes), kx=degrees[0], ky=degrees[1], s=0)(*wanted)
            for values in displacements.T.astype(np.float64)
        ]
    resized = np.stack(maps, axis=-1).reshape(-1, table.shape[1])
    return np.concatenate([resized, rest]).astype(table.dtype)


def cubic_weights(source: int, target: int) -> Float[np.ndarray, "t s"]:
    """Weights of a bicubic interpolation from `source` values to `target` values, with a = -0.75.

    Equals PyTorch's `interpolate(mode="bicubic", align_corners=False)`: no antialiasing, repeated borders.
    """
    a = -0.75
    places = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(places).astype(int) - 1
    weights = np.zeros((target, source))
    for tap in range(4):
        distance = np.abs(places - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(distance <= 1, near, far))
    return weights


def resize_positions(
    table: Float[np.ndarray, "n d"], source: tuple[int, int], target: tuple[int, int], extra: int = 0
) -> Float[np.ndarray, "m d"]:
    """Resize an absolute position embedding to another grid of patches, bicubically.

    source, target: (rows, columns) of patches. The first `extra` rows of the table belong to the class token and do not
    change.
    """
    if source == target:
        return table
    rest, patches = np.split(table, [extra])
    down, across = (cubic_weights(*sides) for sides in zip(source, target, strict=True))
    resized = np.einsum("as,bt,std->abd", down, across, patches.reshape(*source, -1).astype(np.float64))
    return np.concatenate([rest, resized.reshape(target[0] * target[1], -1)]).astype(table.dtype)


def square(rows: int, of: str) -> tuple[int, int]:
    """The sides of a square with `rows` elements. Raises ValueError if there is none. of: name of the elements."""
    side = math.isqrt(rows)
    if side**2 != rows:
        raise ValueError(f"{rows} {of} are not square, and there is no config.json with their sides")
    return side, side
