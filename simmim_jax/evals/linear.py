"""Linear-probe accuracy of frozen features: logistic regression on features standardised over the training images."""

from collections.abc import Callable

from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from simmim_jax.errors import ConfigError, check_minimum


def make_linear(*, features: Callable, inverse_regularisation: float = 1.0, iterations: int = 1000):
    """features(state) -> `evals.features.Features`. Metric: "linear", top-1 accuracy on the held-out set in 0..1.

    inverse_regularisation: scikit-learn's C. iterations: of L-BFGS, at most.
    """
    check_minimum("evals.linear.inverse_regularisation", inverse_regularisation, 0, strict=True)
    check_minimum("evals.linear.iterations", iterations, 1)

    def run(state) -> dict[str, float]:
        x = features(state)
        if len(set(x.train_labels.tolist())) < 2:
            raise ConfigError(
                f"{len(x.train)} images of one class to train a probe", "eval_images", "give more, or 0 for all"
            )
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=inverse_regularisation, max_iter=iterations))
        probe.fit(x.train, x.train_labels)
        return {"linear": float(probe.score(x.heldout, x.heldout_labels))}

    return run
