"""Linear-probe accuracy of frozen features: logistic regression on features standardized over the training images."""

from collections.abc import Callable

import numpy as np
from absl import logging

from simmim_jax.errors import check_minimum
from simmim_jax.evals import probes
from simmim_jax.evals.features import count_untrained


def make_linear(*, features: Callable, C: int | float = 1.0, iterations: int = 1000) -> Callable:
    """Make the linear-probe evaluator. Metrics: "linear", top-1 accuracy on the held-out images in 0..1, and
    `count_untrained`.

    If all training images are of one class, there is no metric, and one warning in the log.

    features: state -> `evals.features.Features`. C: inverse regularization, as in scikit-learn. iterations: maximum for
    L-BFGS.
    """
    check_minimum("evals.linear.C", C, 0, strict=True)
    check_minimum("evals.linear.iterations", iterations, 1)

    def run(state) -> dict[str, float]:
        x = features(state)
        if len(set(x.train_labels.tolist())) < 2:
            warning = "no linear probe: its %d training images are of one class; raise eval_images"
            logging.log_first_n(logging.WARNING, warning, 1, len(x.train))
            return {}
        classes = int(max(x.train_labels.max(), x.heldout_labels.max())) + 1
        statistics = probes.statistics(x.train)
        train = probes.standardize(x.train, *statistics)
        classifier = probes.logistic_path(
            train, x.train_labels, np.float32([C]), classes=classes, iterations=iterations
        )
        ranks = probes.ranks(probes.standardize(x.heldout, *statistics), x.heldout_labels, classifier)
        untrained = count_untrained(np.bincount(x.train_labels) > 0, x.heldout_labels)
        return {"linear": probes.accuracies(ranks[:, 0], classes)["top1"]} | untrained

    return run
