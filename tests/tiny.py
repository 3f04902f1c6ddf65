"""A model, an objective and batches small enough for a test."""

import jax
import jax.numpy as jnp
import numpy as np

from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective

PIXELS = {"image_size": (32, 32), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}


def tiny_encoder(**options):
    return make_encoder("vit", "ti", **{"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8, **options})


def tiny_objective(encoder=None, **options):
    options = {**PIXELS, "mask_patch_size": 16, "mask_ratio": 0.5, **options}
    return make_objective("simmim", encoder or tiny_encoder(), **options)


def tiny_batch(size=16, shape=(32, 32, 3), seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": jnp.asarray(rng.integers(0, 256, (size, *shape), dtype=np.uint8)),
        "label": jnp.asarray(rng.integers(0, 10, size, dtype=np.int32)),
        "batch_index": jnp.arange(size, dtype=jnp.int32),
    }


def relative_difference(a, b) -> float:
    """The largest difference between two trees, each leaf's as a share of its largest value."""

    def one(x, y):
        return float(jnp.abs(x - y).max() / jnp.maximum(jnp.abs(y).max(), 1e-12))

    return max(jax.tree.leaves(jax.tree.map(one, a, b)))
