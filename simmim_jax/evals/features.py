"""What a model makes of images, on all devices: features of two labeled sets, extracted once for all their readers."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.runtime import sharding

OF_IMAGES = ("label", "batch_index", "valid")


def jit_on_mesh(function: Callable, mesh: Mesh) -> Callable:
    """`function` (params, batch) -> dict, compiled for batches that are split over `mesh`.

    The result is called with (params, this process's numpy batch) and gives what `function` and the batch itself
    ("label", "batch_index", "valid") say of all processes' images, as numpy arrays.
    """
    jitted = jax.jit(
        lambda params, batch: function(params, batch) | {name: batch[name] for name in OF_IMAGES},
        out_shardings=sharding.replicated(mesh),
    )

    def run(params, batch: dict) -> dict:
        with jax.set_mesh(mesh):
            wanted = {name: batch[name] for name in ("image", *OF_IMAGES)}
            return jax.device_get(jitted(params, sharding.to_global(wanted, mesh)))

    return run


class Features(NamedTuple):
    train: Float[np.ndarray, "m d"]
    train_labels: Int[np.ndarray, " m"]
    heldout: Float[np.ndarray, "n d"]
    heldout_labels: Int[np.ndarray, " n"]


def make_feature_reader(*, extract: Callable, train: Iterable[dict], heldout: Iterable[dict]) -> Callable:
    """A function state -> Features that works once for each step.

    extract(params, batch) -> {"features" [b, d], "label" [b], "valid" [b]}. The function raises NonFiniteError, and
    DataError where no image of a set has a label.
    """
    newest: dict[int, Features] = {}

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
    """Features and labels of the valid, labeled images of `batches`."""
    features, labels = [], []
    for batch in batches:
        out = extract(params, batch)
        use = out["valid"] & (out["label"] >= 0)
        features.append(out["features"][use])
        labels.append(out["label"][use])
    if not any(map(len, labels)):
        raise DataError(
            f"no {images} image with a label could be read", "evaluation by knn or linear",
            "give a split with labels, or set config.online_probes to False and leave both out of config.evals",
        )  # fmt: skip
    features = np.concatenate(features)
    if not np.isfinite(features).all():
        raise NonFiniteError(
            "features are not finite", "evaluation", "look at config.mean, config.std and the learning rate"
        )
    return features, np.concatenate(labels)
