"""The device side of an `Experiment`: the state at step 0, the compiled step, and batches on the devices."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from simmim_jax import optim
from simmim_jax.experiment import Experiment
from simmim_jax.runtime import sharding
from simmim_jax.runtime.compilation import compile_step
from simmim_jax.runtime.costs import flops
from simmim_jax.train_step import TrainState, hash_samples, init_state, train_step


def make_state(experiment: Experiment) -> TrainState:
    """The state at step 0, created with its sharding."""
    make = partial(init_state, init=experiment.objective.init, tx=experiment.tx, ema_decay=experiment.ema_decay)
    return jax.jit(make, out_shardings=sharding.shardings(experiment.state))(experiment.keys.init)


def compile_train_step(experiment: Experiment) -> Callable:
    """(state, batch, key) -> (state, metrics), compiled ahead of time for the shapes and shardings of a run."""
    step = partial(
        step_with_counts,
        loss_fn=_loss_fn(experiment),
        prepare=experiment.objective.prepare,
        tx=experiment.tx,
        microbatches=experiment.microbatches,
        ema_decay=experiment.ema_decay,
    )
    return compile_step(step, experiment.state, abstract_batch(experiment), experiment.keys.step, experiment.mesh)


def step_flops(experiment: Experiment) -> int:
    """FLOPs of the matmuls and convolutions of a step, on all devices, without recomputation."""
    batch = jax.eval_shape(experiment.objective.prepare, abstract_batch(experiment))
    return flops.step_flops(_loss_fn(experiment), experiment.state.params, batch, experiment.keys.step)


def _loss_fn(experiment: Experiment) -> Callable:
    return optim.freeze(experiment.objective.loss_fn, experiment.is_frozen, experiment.encoder.scanned_layers)


def step_with_counts(state: TrainState, batch: dict, key: Key[Array, ""], **options) -> tuple[TrainState, dict]:
    """`train_step` with three more metrics: a hash of the samples, the number of bad images, and the largest signal."""
    counted = {name: batch[name] for name in ("index", "replaced", "stop")}
    state, metrics = train_step(state, {k: x for k, x in batch.items() if k not in counted}, key, **options)
    return state, metrics | {
        "samples": hash_samples(counted["index"], batch["batch_index"]),
        "bad_images": counted["replaced"].sum(dtype=np.int32),
        "stop": counted["stop"].max(),
    }


def abstract_batch(experiment: Experiment) -> dict:
    """Shapes and types of a global batch on the devices."""
    rows = (experiment.batches.batch_size,)
    entries = experiment.batches.arrays() | {"index": (rows, np.uint32), "stop": (rows, np.int32)}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in entries.items()}


def to_device(batch: dict, signal: int, mesh: Mesh) -> dict:
    """Turn this process's batch into its part of the global arrays. signal: number of a received signal, or 0.

    JAX has no 64-bit integers by default: the index of an image is reduced modulo 2**32.
    """
    extra = {"index": batch["index"].astype(np.uint32), "stop": np.full(batch["label"].shape, signal, np.int32)}
    return sharding.to_global(batch | extra, mesh)
