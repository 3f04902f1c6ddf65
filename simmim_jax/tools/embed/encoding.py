"""Embeddings of batches of images, computed by the encoder of a run.

Shape letters: b images, d embedding width, k l token grid.
"""

from argparse import Namespace
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from simmim_jax.evals.features import jit_on_mesh
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.runs.finished import Run
from simmim_jax.runtime import sharding
from simmim_jax.tools import images


def make_embedding(run: Run, options: Namespace) -> Callable:
    """Return a function (encoder params, batch) -> {"embedding": float32 [b, d], or [b, k, l, d] for a map}."""
    if options.pool != "map":
        features = make_features(run.encoder, **run.normalization, block=options.block, pool=options.pool)

    def embedding(params, batch):
        if options.pool == "map":
            pixels = normalize(batch["image"], **run.normalization)
            x, sown = run.encoder.apply({"params": params}, pixels, mutable=["intermediates"])
            x = sown["intermediates"]["blocks"][options.block - 1] if options.block else x
        else:
            x, _ = features(params, batch["image"])
        x = x.astype(jnp.float32)
        if options.normalize:
            x /= jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return {"embedding": x}

    return embedding


def embedding_shape(run: Run, options: Namespace) -> tuple[int, ...]:
    """Return the shape of one embedding: [d], or [k, l, d] for a map."""
    image = jax.ShapeDtypeStruct((1, *run.image_size, run.channels), run.pixels.samples.dtype)
    out = jax.eval_shape(make_embedding(run, options), run.params["encoder"], {"image": image})
    return out["embedding"].shape[1:]


def embed_batches(run: Run, options: Namespace, view, mesh: Mesh) -> Iterator[tuple[np.ndarray, ...]]:
    """Yield (index in `view`, valid, label, embedding) for each batch, as arrays with leading dimension b."""
    run_batch = jit_on_mesh(make_embedding(run, options), mesh)
    params = jax.device_put(run.params["encoder"], sharding.replicated(mesh))
    crop = images.make_crop(run, options.crop_fraction, options.interpolation)
    for batch in images.make_pass(view, crop, mesh, batch_size=options.batch_size, threads=options.threads):
        out = run_batch(params, batch)
        count = max(0, len(view) - int(out["batch_index"][0]))  # drops the padding of the last batch
        yield tuple(out[name][:count] for name in ("batch_index", "valid", "label", "embedding"))
