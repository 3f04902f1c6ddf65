"""Weighted k-NN accuracy of frozen features: cosine similarity, weights exp(similarity / temperature).

The protocol of Wu et al. 2018 (arXiv 1805.01978) as DINO uses it: k = 20, temperature 0.07.
"""

from collections.abc import Callable

import numpy as np

from simmim_jax.errors import check_minimum
from simmim_jax.evals import probes
from simmim_jax.evals.features import count_untrained


def make_knn(*, features: Callable, k: int = 20, temperature: int | float = 0.07) -> Callable:
    """Make the k-NN evaluator. Metrics: "knn", top-1 accuracy on the held-out images in 0..1, and `count_untrained`.

    features: state -> `evals.features.Features`.
    """
    check_minimum("evals.knn.k", k, 1)
    check_minimum("evals.knn.temperature", temperature, 0, strict=True)

    def run(state) -> dict[str, float]:
        x = features(state)
        classes = int(x.train_labels.max()) + 1
        voted = probes.nearest_classes(
            x.train, x.train_labels, x.heldout, classes=classes, k=(k,), temperature=temperature
        )
        untrained = count_untrained(np.bincount(x.train_labels) > 0, x.heldout_labels)
        return {"knn": float((voted[0, :, 0] == x.heldout_labels).mean())} | untrained

    return run
