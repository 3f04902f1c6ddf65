"""One training step as a pure function: (state, batch, key) -> (state, metrics). Knows no model, data or config."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Int32, Key, PyTree, UInt32


@struct.dataclass
class TrainState:
    """Everything that changes from step to step, and nothing else. All of it is sharded and checkpointed.

    step: number of updates done, int32 []. params: float32. opt_state: state of the optimizer.
    ema: exponential moving average of the parameters, or None if a recipe has none.
    """

    step: PyTree
    params: PyTree
    opt_state: PyTree
    ema: PyTree = None


def init_state(
    key: Key[Array, ""], *, init: Callable, tx: optax.GradientTransformation, ema_decay: int | float = 0.0
) -> TrainState:
    """The state at step 0. If `ema_decay` is above 0, it has an average, which starts at the parameters."""
    params = init(key)
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(step=jnp.zeros((), jnp.int32), params=params, opt_state=tx.init(params), ema=ema)


def mean_grads(params: PyTree, batch: dict, key: Key[Array, ""], *, loss_fn: Callable, microbatches: int = 1):
    """(loss, metrics, grads), each the mean over the batch, computed in `microbatches` equal parts in sequence.

    Part m takes every `microbatches`-th image, starting from the m-th. Each part is then sharded like the whole batch,
    and no image moves between devices.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if microbatches == 1:
        (loss, metrics), grads = value_and_grad(params, batch, key, True)
        return loss, metrics, grads

    def part(total, microbatch):
        return jax.tree.map(jnp.add, total, value_and_grad(params, microbatch, key, True)), None

    parts = jax.tree.map(lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch)
    shapes = jax.eval_shape(lambda: value_and_grad(params, jax.tree.map(lambda x: x[0], parts), key, True))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    ((loss, metrics), grads), _ = jax.lax.scan(part, zeros, parts)
    return jax.tree.map(lambda x: x / microbatches, (loss, metrics, grads))


def hash_samples(index: UInt32[Array, " b"], batch_index: Int32[Array, " b"]) -> UInt32[Array, ""]:
    """A 32-bit hash of the images in a batch and their positions, the same for any split over devices.

    index: each image's index in its source. batch_index: each image's index in the global batch. The result is the sum
    of the hashed pairs (the finalizer of MurmurHash3, Appleby 2011), so the order of the rows does not matter.
    """
    bits = index * np.uint32(0x9E3779B1) + batch_index.astype(jnp.uint32) * np.uint32(0x85EBCA77)
    bits = (bits ^ (bits >> 16)) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> 13)) * np.uint32(0xC2B2AE35)
    return (bits ^ (bits >> 16)).sum(dtype=jnp.uint32)


def write_over(params: PyTree, part: PyTree) -> PyTree:
    """`params` with some arrays replaced by those of `part`, a tree with a subset of its paths."""
    if not isinstance(params, dict):
        return part
    return {name: write_over(value, part[name]) if name in part else value for name, value in params.items()}


def train_step(
    state: TrainState,
    batch: dict,
    key: Key[Array, ""],
    *,
    loss_fn: Callable,
    tx: optax.GradientTransformationExtraArgs,
    prepare: Callable[[dict], dict] = lambda batch: batch,
    microbatches: int = 1,
    ema_decay: int | float = 0.0,
) -> tuple[TrainState, dict]:
    """One update, and its metrics: "loss", "grad_norm" (before clipping), those of `loss_fn`, and "skipped".

    The key of the step is `key` folded with `state.step`. No random state is stored, and a resumed run draws the same
    numbers. New running statistics in the metrics' "batch_stats" replace those in the parameters. A step whose loss or
    gradient is not finite changes neither parameters nor moments, and reports "skipped" = 1.

    prepare: applied to the whole batch before it is split into microbatches (see `Objective.prepare`).
    ema_decay: weight of the old average at each update.
    """
    key = jax.random.fold_in(key, state.step)
    batch = prepare(batch)
    loss, metrics, grads = mean_grads(state.params, batch, key, loss_fn=loss_fn, microbatches=microbatches)
    grad_norm = optax.tree.norm(grads)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)

    updates, opt_state = tx.update(grads, state.opt_state, state.params, step=state.step)
    params = write_over(optax.apply_updates(state.params, updates), metrics.pop("batch_stats", {}))
    ema = None if state.ema is None else optax.incremental_update(params, state.ema, 1.0 - ema_decay)
    new = state.replace(params=params, opt_state=opt_state, ema=ema)
    new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
    metrics = {"loss": loss, "grad_norm": grad_norm, **metrics, "skipped": 1.0 - finite}
    return new.replace(step=state.step + 1), metrics
