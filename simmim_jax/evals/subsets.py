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
    held = _drawn(labels, lambda _, count: min(max(1, round(fraction * count)), count - 1), seed)
    return np.setdiff1d(np.arange(len(labels)), held), held


def draw_per_class(labels: Int[np.ndarray, " m"], count: int, seed: int) -> Int[np.ndarray, " p"]:
    """`count` images of each class; of a class with fewer, all."""
    return _drawn(labels, lambda _, there: min(count, there), seed)


def draw_fraction(
    labels: Int[np.ndarray, " m"], fraction: int | float, seed: int, *, of: Int[np.ndarray, " q"]
) -> Int[np.ndarray, " p"]:
    """Of each class `fraction` of the images that it has in `of`, labels too, and at least one; at most those here."""
    counts = np.bincount(of)
    return _drawn(labels, lambda label, there: min(there, max(1, round(fraction * counts[label]))), seed)


def _drawn(labels, size, seed: int) -> Int[np.ndarray, " p"]:
    """size(label, how many images have it) -> how many of these are drawn."""
    rng = np.random.default_rng(seed)
    order = np.argsort(labels, kind="stable")
    classes, starts = np.unique(labels[order], return_index=True)
    drawn = []
    for label, own in zip(classes, np.split(order, starts[1:]), strict=True):
        drawn.append(rng.permutation(own)[: size(label, len(own))])
    return np.sort(np.concatenate(drawn))


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean, sample deviation (None of a single value), least and process_max."""
    deviation = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": deviation, "least": min(values), "process_max": max(values)}
