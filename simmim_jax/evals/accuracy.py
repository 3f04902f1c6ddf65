"""Top-1 and top-5 accuracy of a classifier over a whole held-out set, exact for any batch size."""

from collections.abc import Callable, Iterable

import numpy as np

from simmim_jax.errors import NonFiniteError


def make_accuracy(*, predict: Callable, heldout: Iterable[dict]):
    """predict(params, batch) -> {"logits" [b, n], "label" [b], "valid" [b]}.

    Metrics: "top1" and "top5" in 0..1 (top5 only where there are more than five classes), and "images", how many. A
    class that only ties with another does not count as found before it. Raises NonFiniteError.
    """

    def run(state) -> dict[str, float]:
        ranks = []  # of the right class among the logits, 0 for the highest
        for batch in heldout:
            out = predict(state.params, batch)
            use = out["valid"] & (out["label"] >= 0)
            logits, labels = out["logits"][use], out["label"][use]
            if not np.isfinite(logits).all():
                raise NonFiniteError(
                    "logits are not finite", "evaluation", "lower the learning rate, in a new --workdir"
                )
            right = np.take_along_axis(logits, labels[:, None], axis=1)
            ranks.append((logits >= right).sum(axis=1) - 1)
        ranks = np.concatenate(ranks)
        metrics = {"top1": float((ranks < 1).mean()), "images": float(len(ranks))}
        return metrics | ({"top5": float((ranks < 5).mean())} if logits.shape[1] > 5 else {})

    return run
