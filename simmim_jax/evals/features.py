"""Model outputs on all devices, and features of two labeled sets that several evaluators share."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.runtime import sharding

PASSED_ON = ("label", "batch_index", "valid")  # batch entries that the outputs keep


def jit_on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """Compile `function` (params, batch) -> dict for batches that are sharded over `mesh`.

    The result takes (params, this process's numpy batch) and returns the outputs of `function` and the batch's "label",
    "batch_index" and "valid", for the images of all processes, as numpy arrays.
    """
    jitted = jax.jit(
        lambda params, batch: function(params, batch) | {name: batch[name] for name in PASSED_ON},
        out_shardings=sharding.replicated(mesh),
    )

    def run(params, batch: dict) -> dict:
        with jax.set_mesh(mesh):
            inputs = {name: batch[name] for name in ("image", *PASSED_ON)}
            return jax.device_get(jitted(params, sharding.to_global(inputs, mesh)))

    return run


class Features(NamedTuple):
    train: Float[np.ndarray, "m d"]
    train_labels: Int[np.ndarray, " m"]
    heldout: Float[np.ndarray, "n d"]
    heldout_labels: Int[np.ndarray, " n"]


def count_untrained(trained: Bool[np.ndarray, " c"] | None, labels: Int[np.ndarray, " n"]) -> dict[str, float]:
    """The number of held-out images whose class has no training image, as a metric; {} if there are none.

    trained: whether each class has training images; classes beyond have none. None: unknown.
    """
    if trained is None:
        return {}
    count = int((~np.isin(labels, np.flatnonzero(trained))).sum())
    return {"untrained_class_images": float(count)} if count else {}


def make_feature_reader(*, extract: Callable, train: Iterable[dict], heldout: Iterable[dict]) -> Callable:
    """Make a function state -> Features that extracts them once per step.

    extract: (params, batch) -> {"features" [b, d], "label" [b], "valid" [b]}. The function raises NonFiniteError, and
    DataError if no image of a set has a label.
    """
    newest: dict[int, Features] = {}  # by step; at most one entry

    def read(state) -> Features:
        step = int(state.step)
        if step not in newest:
            newest.clear()
            newest[step] = Features(
                *_collect("training", extract, state.params, train),
                *_collect("held-out", extract, state.params, heldout),
            )
        return newest[step]

    return read


def _collect(images: str, extract: Callable, params, batches: Iterable[dict]):
    """Return features and labels of the valid, labeled images."""
    features, labels = [], []
    for batch in batches:
        out = extract(params, batch)
        use = out["valid"] & (out["label"] >= 0)
        features.append(out["features"][use])
        labels.append(out["label"][use])
    if not any(map(len, labels)):
        fix = "give a split with labels, or set config.online_probes to False and remove both from config.evals"
        raise DataError(f"no {images} image with a label could be read", "evaluators knn and linear", fix)
    features = np.concatenate(features)
    if not np.isfinite(features).all():
        fix = "check config.mean, config.std and the learning rate"
        raise NonFiniteError("features are not finite", "evaluation", fix)
    return features, np.concatenate(labels)
