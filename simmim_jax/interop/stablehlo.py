"""An encoder as a StableHLO program, by `jax.export`. It runs without our code, for any batch size.

`jax.export.deserialize(file).call(images)` maps images [b, y, x, c] of the type that the model was trained on to
float32 features [b, k, l, d]. The weights and the scaling and normalization of the images are part of the program.
"""

from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import CheckpointError
from simmim_jax.objectives.pixels import normalize

PLATFORMS = ("cpu", "cuda", "tpu")
MAX_BYTES = 2**31 - 2**24  # of weights: the file format counts in signed 32-bit integers


def serialize(
    encoder: nn.Module,
    params: dict,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None = None,
) -> bytes:
    """The program for images of `image_size`, on CPUs, GPUs (CUDA) and TPUs. params: those of the encoder.

    Raises CheckpointError if the weights are too large for the file format.
    """
    size = sum(x.nbytes for x in jax.tree.leaves(params))
    if size > MAX_BYTES:
        raise CheckpointError(f"{size / 2**30:.1f} GiB of weights", "", "a StableHLO file holds less than 2 GiB")
    params = jax.tree.map(jnp.asarray, params)

    def simmim_jax_features(images):  # the file contains this name, and `is_ours` looks for it
        return encoder.apply({"params": params}, normalize(images, mean, std, scale))

    (batch,) = jax.export.symbolic_shape("b")
    images = jax.ShapeDtypeStruct((batch, *image_size, len(mean)), scale.dtype if scale else jnp.uint8)
    return bytes(jax.export.export(jax.jit(simmim_jax_features), platforms=PLATFORMS)(images).serialize())


def is_ours(path: Path) -> bool:
    """Whether `serialize` made this file."""
    try:
        return jax.export.deserialize(bytearray(path.read_bytes())).fun_name == "simmim_jax_features"
    except Exception:  # anything that the readers of the format raise for other bytes
        return False
