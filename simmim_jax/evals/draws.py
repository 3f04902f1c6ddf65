"""Which images a probe is fitted to: by class, and by a seed, so that the same ones are drawn everywhere.

Labels are int [m]; those drawn are indices into them, sorted. No JAX.
"""

import numpy as np
from jaxtyping import Int


def split_by_class(
    labels: Int[np.ndarray, " m"], fraction: int | float, seed: int
) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " q"]]:
    """(the rest, about `fraction` of the images of each class): every class of two images or more is in both parts.

    A class of one image is in the rest.
    """
    held = _drawn(labels, lambda count: min(max(1, round(fraction * count)), count - 1), seed)
    return np.setdiff1d(np.arange(len(labels)), held), held


def draw_per_class(labels: Int[np.ndarray, " m"], count: int, seed: int) -> Int[np.ndarray, " p"]:
    """`count` images of each class; of a class with fewer, all."""
    return _drawn(labels, lambda there: min(count, there), seed)


def draw_fraction(labels: Int[np.ndarray, " m"], fraction: int | float, seed: int) -> Int[np.ndarray, " p"]:
    """About `fraction` of the images of each class, and at least one."""
    return _drawn(labels, lambda there: max(1, round(fraction * there)), seed)


def _drawn(labels, size, seed: int) -> Int[np.ndarray, " p"]:
    rng = np.random.default_rng(seed)
    drawn = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        drawn.append(rng.permutation(own)[: size(len(own))])
    return np.sort(np.concatenate(drawn))


def spread(values: list[float]) -> dict[str, float]:
    """Mean, sample deviation (0 of a single value), least and greatest."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": deviation, "least": min(values), "greatest": max(values)}
