"""Where things live: the mesh of devices, and the placement of state and batches on it."""

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from simmim_jax.errors import ConfigError

BATCH_AXES = ("data", "fsdp")
SMALL = 2**16  # leaves below this many elements are replicated: sharding them costs more than it saves


def make_mesh(data: int = -1, fsdp: int = 1) -> Mesh:
    """All devices as a (data, fsdp) mesh; -1 takes the rest, and where both are -1, `fsdp` takes all.

    Batches are split over both axes; parameters and moments over `fsdp` (1: replicated). Raises ConfigError if it does
    not come out even.
    """
    count = jax.device_count()
    sizes = [1 if data == fsdp == -1 else data, fsdp]
    if -1 in sizes and max(sizes) > 0:
        sizes[sizes.index(-1)] = count // max(sizes)
    if min(sizes) < 1 or sizes[0] * sizes[1] != count:
        divisors = [n for n in range(1, count + 1) if count % n == 0]
        raise ConfigError(
            f"a mesh of data={data}, fsdp={fsdp} on {count} devices", "mesh",
            f"give one of them a divisor of {count} ({', '.join(map(str, divisors))}) and the other -1",
        )  # fmt: skip
    return jax.make_mesh(sizes, BATCH_AXES, axis_types=(AxisType.Auto,) * 2)


def check_batch_size(where: str, batch_size: int, devices: int, microbatches: int = 1) -> None:
    """Raise ConfigError, with the nearest sizes that work, unless every microbatch splits evenly over the devices."""
    unit = devices * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"try {below} or {below + unit}" if below > 0 else f"try {unit}"
        parts = f"{devices} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise ConfigError(f"{where} {batch_size} not divisible by {parts}", where, near)


def place(state: PyTree, mesh: Mesh) -> PyTree:
    """An abstract state with a sharding for each leaf: its largest dimension that `fsdp` divides, or replicated.

    Moments have their parameter's shape, so they are placed as it is.
    """
    ways = mesh.shape["fsdp"]

    def place_leaf(leaf) -> jax.ShapeDtypeStruct:
        spec = [None] * len(leaf.shape)
        divisible = [n for n, size in enumerate(leaf.shape) if size % ways == 0]
        if ways > 1 and divisible and np.prod(leaf.shape) >= SMALL:
            spec[max(divisible, key=lambda n: leaf.shape[n])] = "fsdp"
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.map(place_leaf, state)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images split over all devices along the first dimension."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def to_global(batch: dict, mesh: Mesh) -> dict:
    """This process's numpy batch as its part of the global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
