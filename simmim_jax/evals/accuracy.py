"""Top-1 and top-5 accuracy of a classifier over a whole held-out set, exact for any batch size."""

from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from simmim_jax.errors import DataError, NonFiniteError

TOP = 5


class Answers(NamedTuple):
    """What a classifier says of n labeled images.

    batch_index: in the pass. rank: of the right class among the logits, 0 for the highest. predicted: the class with the
    highest logit; where the right one only ties with it, the other. confidence: its probability, 0..1.
    """

    batch_index: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]


def answers_of(out: dict) -> tuple[Answers, Bool[np.ndarray, " b"]]:
    """(the answers to the valid, labeled images of a batch, which those are).

    out: "logits" [b, c], "label", "valid" and, where positions matter, "batch_index" [b]. Raises NonFiniteError, and
    DataError for a label that is none of the c.
    """
    use = out["valid"] & (out["label"] >= 0)
    logits, label = np.asarray(out["logits"][use], np.float64), out["label"][use]
    if not np.isfinite(logits).all():
        raise NonFiniteError("logits are not finite", "evaluation", "lower the learning rate, in a new --workdir")
    if label.max(initial=-1) >= logits.shape[1]:
        raise DataError(
            f"a label {label.max()}, of a classifier of {logits.shape[1]} classes",
            "evaluation",
            "give the data it knows",
        )
    right = np.take_along_axis(logits, label[:, None], axis=1)
    rank = (logits >= right).sum(axis=1) - 1
    others = logits.copy()
    np.put_along_axis(others, label[:, None], -np.inf, axis=1)
    predicted = np.where(rank == 0, label, others.argmax(axis=1))
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)  # predicted has the highest logit, alone or beside others
    batch_index = out["batch_index"][use] if "batch_index" in out else np.arange(len(use))[use]
    return Answers(batch_index, label, rank, predicted, confidence), use


def join(parts: Iterable[Answers]) -> Answers:
    """All answers, one after another. Raises DataError if there are none."""
    parts = list(parts)
    if not sum(len(part.label) for part in parts):
        raise DataError("none of the images can be read and has a class", "evaluation", "look at what is said of each")
    return Answers(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def top(answers: Answers, classes: int) -> dict[str, float]:
    """ "top1" and "top5" in 0..1 (top5 only where there are more than five classes), and "images", how many."""
    metrics = {"top1": float((answers.rank < 1).mean()), "images": float(len(answers.rank))}
    return metrics | ({"top5": float((answers.rank < TOP).mean())} if classes > TOP else {})


def make_accuracy(*, predict: Callable, heldout: Iterable[dict]):
    """predict(params, batch) -> {"logits" [b, n], "label" [b], "valid" [b]}.

    Metrics: those of `top`. A class that only ties with another does not count as found before it. Raises
    NonFiniteError.
    """

    def run(state) -> dict[str, float]:
        classes = 0

        def parts() -> Iterator[Answers]:
            nonlocal classes
            for batch in heldout:
                out = predict(state.params, batch)
                classes = out["logits"].shape[1]
                yield answers_of(out)[0]

        return top(join(parts()), classes)

    return run
