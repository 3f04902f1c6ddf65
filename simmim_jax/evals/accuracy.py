"""Top-1 and top-5 accuracy of a classifier over a whole held-out set, exact for any batch size."""

from collections.abc import Callable, Iterable

import numpy as np


def make_accuracy(*, predict: Callable, heldout: Iterable[dict]):
    """predict(params, batch) -> {"logits" [b, n]}; `heldout` yields batches with "image", "label" and "valid".

    Metrics: "top1" and "top5" in 0..1 (top5 only where there are more than five classes), and "images", how many.
    """

    def run(state) -> dict[str, float]:
        ranks = []  # of the right class among the logits, 0 for the highest
        for batch in heldout:
            logits = np.asarray(predict(state.params, batch)["logits"])
            right = np.take_along_axis(logits, np.maximum(batch["label"], 0)[:, None], axis=1)
            ranks.append((logits > right).sum(axis=1)[batch["valid"] & (batch["label"] >= 0)])
        ranks = np.concatenate(ranks)
        metrics = {"top1": float((ranks < 1).mean()), "images": float(len(ranks))}
        return metrics | ({"top5": float((ranks < 5).mean())} if logits.shape[1] > 5 else {})

    return run
