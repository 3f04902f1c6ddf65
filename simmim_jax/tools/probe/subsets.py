"""Subsets of the training images, drawn per class and by a seed. The same seed draws the same images everywhere.

Labels are int [m]. The functions return sorted indices into them. No JAX.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Int


def split_by_class(
    labels: Int[np.ndarray, " m"], fraction: int | float, seed: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " q"]]:
    """Return (the rest, about `fraction` of the images of each class).

    A class with two images or more is in both parts. A class with one image is in the rest.
    """
    drawn = _draw(labels, lambda _, count: min(max(1, round(fraction * count)), count - 1), seed)
    return np.setdiff1d(np.arange(len(labels)), drawn), drawn


def draw_per_class(labels: Int[np.ndarray, " m"], count: int, seed: int) -> Int[np.ndarray, " p"]:
    """Draw `count` images of each class, or all images of a smaller class."""
    return _draw(labels, lambda _, available: min(count, available), seed)


def draw_fraction(
    labels: Int[np.ndarray, " m"], fraction: int | float, seed: int, *, all_labels: Int[np.ndarray, " q"]
) -> Int[np.ndarray, " p"]:
    """Draw, for each class, `fraction` of its images in `all_labels`: at least one, at most those in `labels`."""
    counts = np.bincount(all_labels)
    return _draw(labels, lambda label, available: min(available, max(1, round(fraction * counts[label]))), seed)


def _draw(labels: Int[np.ndarray, " m"], size: Callable[[int, int], int], seed: int) -> Int[np.ndarray, " p"]:
    """Draw `size(label, number of its images)` images of each class."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    drawn = []
    for label, indices in zip(classes, np.split(order, starts[1:]), strict=True):
        drawn.append(rng.permutation(indices)[: size(label, len(indices))])
    return np.sort(np.concatenate(drawn))
