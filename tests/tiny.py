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


def fast_jit(function):
    """`jax.jit` for a program that runs once: compile time matters, run time does not."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": "0"})


def random_params(shapes, seed=0):
    """Parameters of these shapes in which no branch is silent: zeros at initialization would hide mistakes.

    Kernels keep the scale of their input, and vectors are near 1. numpy draws them, because to compile an `init` takes
    seconds.
    """
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if len(leaf.shape) > 1:
            return jnp.asarray(rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.3, 1.3, leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes)


def relative_difference(a, b, floor=1e-12) -> float:
    """The largest difference between two trees, relative to each leaf's largest value, which is at least `floor`.

    By numpy, which compiles nothing for a new shape and compares arrays from different devices.
    """

    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return np.abs(x - y).max() / max(np.abs(y).max(), floor, 1e-12)

    return max(map(float, jax.tree.leaves(jax.tree.map(one, a, b))))
