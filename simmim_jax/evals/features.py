"""Pooled features of two labelled sets, extracted once for all the evaluators that read them."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from simmim_jax.errors import NonFiniteError


class Features(NamedTuple):
    train: Float[np.ndarray, "m d"]
    train_labels: Int[np.ndarray, " m"]
    heldout: Float[np.ndarray, "n d"]
    heldout_labels: Int[np.ndarray, " n"]


def make_feature_reader(*, extract: Callable, train: Iterable[dict], heldout: Iterable[dict]) -> Callable:
    """A function state -> Features that works once for each step.

    extract(params, batch) -> {"features" [b, d], "label" [b], "valid" [b]}.
    """
    newest: dict[int, Features] = {}

    def read(state) -> Features:
        step = int(state.step)
        if step not in newest:
            newest.clear()
            newest[step] = Features(*_collect(extract, state.params, train), *_collect(extract, state.params, heldout))
        return newest[step]

    return read


def _collect(extract: Callable, params, batches: Iterable[dict]):
    """Features and labels of the valid, labelled images of `batches`."""
    features, labels = [], []
    for batch in batches:
        out = extract(params, batch)
        use = out["valid"] & (out["label"] >= 0)
        features.append(out["features"][use])
        labels.append(out["label"][use])
    features = np.concatenate(features)
    if not np.isfinite(features).all():
        raise NonFiniteError(
            "features are not finite", "evaluation", "look at config.mean, config.std and the learning rate"
        )
    return features, np.concatenate(labels)
