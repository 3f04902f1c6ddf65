"""Weighted k-nearest-neighbour accuracy of frozen features: cosine similarity, weights exp(similarity / temperature).

The protocol of Wu et al. 2018 (arXiv 1805.01978) as DINO uses it: k = 20, temperature 0.07.
"""

from collections.abc import Callable

import numpy as np
from sklearn.neighbors import KNeighborsClassifier

from simmim_jax.errors import check_minimum


def make_knn(*, features: Callable, neighbours: int = 20, temperature: float = 0.07):
    """features(state) -> `evals.features.Features`. Metric: "knn", top-1 accuracy on the held-out set in 0..1."""
    check_minimum("evals.knn.neighbours", neighbours, 1)
    check_minimum("evals.knn.temperature", temperature, 0, strict=True)

    def run(state) -> dict[str, float]:
        x = features(state)
        classifier = KNeighborsClassifier(
            min(neighbours, len(x.train)),
            metric="cosine",
            algorithm="brute",
            weights=lambda distance: np.exp((1 - distance) / temperature),
        )
        classifier.fit(x.train, x.train_labels)
        return {"knn": float(classifier.score(x.heldout, x.heldout_labels))}

    return run
