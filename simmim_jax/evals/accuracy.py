"""Top-1 and top-5 accuracy of a classifier over a whole held-out set, exact for any batch size.

Shape letters: b images of a batch, n labeled images of the pass, c classes.
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.evals.features import count_untrained

TOP = 5


class Answers(NamedTuple):
    """A classifier's answers for n labeled images.

    batch_index: of the image in the pass. rank: of the true class among the logits, 0 for the highest.
    predicted: the class with the highest logit; another class if the true one only ties with it.
    confidence: the probability of `predicted`, 0..1.
    """

    batch_index: Int[np.ndarray, " n"]
    label: Int[np.ndarray, " n"]
    rank: Int[np.ndarray, " n"]
    predicted: Int[np.ndarray, " n"]
    confidence: Float[np.ndarray, " n"]


def read_answers(out: dict) -> tuple[Answers, Bool[np.ndarray, " b"]]:
    """(the answers for the valid, labeled images of a batch, which images these are).

    out: "logits" [b, c], "label", "valid" and, if it matters, "batch_index" [b]. Raises NonFiniteError, and DataError
    for a label of c or more.
    """
    use = out["valid"] & (out["label"] >= 0)
    logits, label = np.asarray(out["logits"][use], np.float64), out["label"][use]
    if not np.isfinite(logits).all():
        raise NonFiniteError("logits are not finite", "evaluation", "lower the learning rate, in a new --workdir")
    if label.max(initial=-1) >= logits.shape[1]:
        what = f"label {label.max()} for a classifier of {logits.shape[1]} classes"
        raise DataError(what, "evaluation", "give images of the classes that it knows")
    true = np.take_along_axis(logits, label[:, None], axis=1)
    rank = (logits >= true).sum(axis=1) - 1
    others = logits.copy()
    np.put_along_axis(others, label[:, None], -np.inf, axis=1)
    predicted = np.where(rank == 0, label, others.argmax(axis=1))
    highest = logits.max(axis=1, keepdims=True)
    confidence = 1 / np.exp(logits - highest).sum(axis=1)  # `predicted` has the highest logit, also in a tie
    batch_index = out["batch_index"][use] if "batch_index" in out else np.arange(len(use))[use]
    return Answers(batch_index, label, rank, predicted, confidence), use


def join(parts: Iterable[Answers]) -> Answers:
    """All answers, one after another. Raises DataError if there are none."""
    parts = list(parts)
    if not sum(len(part.label) for part in parts):
        raise DataError("no image is readable and has a class", "evaluation", "see the messages above")
    return Answers(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def top(answers: Answers, num_classes: int) -> dict[str, float]:
    """ "top1" and, for more than five classes, "top5" in 0..1, and "images", their number."""
    metrics = {"top1": float((answers.rank < 1).mean()), "images": float(len(answers.rank))}
    return metrics | ({"top5": float((answers.rank < TOP).mean())} if num_classes > TOP else {})


def make_accuracy(
    *, predict: Callable, heldout: Iterable[dict], trained: Bool[np.ndarray, " c"] | None = None
) -> Callable:
    """The evaluator of accuracy. Metrics: those of `top` and of `count_untrained`. Raises NonFiniteError.

    predict(params, batch) -> {"logits" [b, c], "label" [b], "valid" [b]}. A true class that only ties with another one
    counts as an error. trained: whether each class has training images; None: unknown.
    """

    def run(state) -> dict[str, float]:
        parts, num_classes = [], 0
        for batch in heldout:
            out = predict(state.params, batch)
            parts.append(read_answers(out)[0])
            num_classes = out["logits"].shape[1]
        answers = join(parts)
        return top(answers, num_classes) | count_untrained(trained, answers.label)

    return run
