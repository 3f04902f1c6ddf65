"""python split_run.py OUT CASES [COORDINATOR PROCESSES PROCESS]: twenty steps on digits for each case.

CASES: JSON, name -> {"mesh": ..., "encoder": ...}. Process 0 writes the losses of each case, and the hashes of each
step's samples and masks, to OUT.
"""

import json
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tiny import tiny_encoder, tiny_objective

from simmim_jax import data
from simmim_jax.compiled import step_with_counts, to_device
from simmim_jax.masking import make_masks
from simmim_jax.optim import make_optimizer
from simmim_jax.runtime import processes, sharding
from simmim_jax.runtime.compilation import compile_step
from simmim_jax.train_step import init_state

STEPS, BATCH = 20, 32
PIXELS = {"image_size": (32, 32), "mean": (0.3,), "std": (0.4,)}
MASKS = {"mask": "random", "token_stride": 8, "mask_patch_size": 16, "mask_ratio": 0.5, "image_size": (32, 32)}


def run(mesh: dict, encoder: dict) -> dict:
    key = jax.random.key(0)
    mesh = sharding.make_mesh(**mesh)
    encoder = tiny_encoder(width=128, num_heads=4, drop_path=0.2, **encoder)
    objective = tiny_objective(encoder, **PIXELS)
    tx, _ = make_optimizer(
        "sgd",
        steps=STEPS,
        steps_per_epoch=STEPS,
        schedule="constant",
        learning_rate=0.05,
        scanned_layers=encoder.scanned_layers,
    )
    make_state = partial(init_state, init=objective.init, tx=tx)
    abstract = sharding.shard_state(jax.eval_shape(make_state, key), mesh, tuple(encoder.scanned_layers))
    state = jax.jit(make_state, out_shardings=sharding.shardings(abstract))(key)
    everywhere = sharding.replicated(mesh)
    key = jax.jit(lambda key: key, out_shardings=everywhere)(key)
    spec = data.BatchSpec(batch_size=BATCH, seed=0, image_size=(32, 32), channels=1)
    shard = data.Shard(*sharding.batch_shard(mesh))
    batches = data.make_batches(data.make_source("digits"), spec, shard=shard, loading=data.Loading(threads=1))

    def step(state, batch, key):
        mask = make_masks(**MASKS)(jax.random.fold_in(key, state.step), batch["batch_index"])
        weights = jnp.arange(1, 2 * mask[0].size, 2, dtype=jnp.uint32).reshape(mask[0].shape)
        hashes = (mask * weights).sum(axis=(1, 2), dtype=jnp.uint32) * (2 * batch["batch_index"].astype(jnp.uint32) + 1)
        state, values = step_with_counts(state, batch, key, loss_fn=objective.loss_fn, tx=tx)
        return state, values | {"masks": hashes.sum(dtype=jnp.uint32)}

    found, compiled = {"loss": [], "samples": [], "masks": []}, None
    for _ in range(STEPS):
        batch = to_device(next(batches), 0, mesh)
        compiled = compiled or compile_step(step, abstract, jax.eval_shape(lambda batch=batch: batch), key, mesh)
        state, values = compiled(state, batch, key)
        for name, numbers in found.items():
            numbers.append(np.asarray(values[name]).item())
    batches.close()
    return found


if __name__ == "__main__":
    out, cases, *peers = sys.argv[1:]
    if peers:
        processes.join(peers[0], int(peers[1]), int(peers[2]))
    found = {name: run(**case) for name, case in json.loads(cases).items()}
    if processes.is_process_0():
        Path(out).write_text(json.dumps(found))
