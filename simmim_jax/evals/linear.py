"""Linear-probe accuracy of frozen features: logistic regression on features standardized over the training images."""

from collections.abc import Callable

import numpy as np
from absl import logging

from simmim_jax.errors import check_minimum
from simmim_jax.evals import probes


def make_linear(*, features: Callable, C: int | float = 1.0, iterations: int = 1000):
    """features(state) -> `evals.features.Features`. Metric: "linear", top-1 accuracy on the held-out set in 0..1.

    Where the training images are of one class, there is no metric, and one warning on the log.
    C: scikit-learn's C. iterations: of L-BFGS, at most.
    """
    check_minimum("evals.linear.C", C, 0, strict=True)
    check_minimum("evals.linear.iterations", iterations, 1)

    def run(state) -> dict[str, float]:
        x = features(state)
        if len(set(x.train_labels.tolist())) < 2:
            what = "no linear probe: its %d training images are of one class; set eval_images higher"
            logging.log_first_n(logging.WARNING, what, 1, len(x.train))
            return {}
        classes = int(max(x.train_labels.max(), x.heldout_labels.max())) + 1
        standard = probes.statistics(x.train)
        classifier = probes.logistic_path(
            probes.standardize(x.train, *standard), x.train_labels, np.float32([C]),
            classes=classes, iterations=iterations,
        )  # fmt: skip
        ranks = probes.ranks(probes.standardize(x.heldout, *standard), x.heldout_labels, classifier)
        return {"linear": probes.accuracies(ranks[:, 0], classes)["top1"]}

    return run
