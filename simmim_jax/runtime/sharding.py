"""Where things live: the mesh of devices, and the placement of state and batches on it."""

import math
import re
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PyTree

from simmim_jax.errors import ConfigError, check_minimum
from simmim_jax.runtime.scanning import path_name

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")
SMALL = 2**16  # leaves below this many elements are not split over `fsdp`: that costs more than it saves

# Which dimension of a parameter `tensor` splits, from the last on: heads of attention, hidden units of an MLP. What
# comes out of a block is summed over them. All else is whole on each device of the axis (Shoeybi et al. 2019, arXiv
# 1909.08053, section 3). By the end of its path, so that moments and averages go where their parameter goes.
TENSOR = (
    (r"attn/qkv/kernel", -2),
    (r"attn/qkv/bias", -2),
    (r"attn/[qv]_bias", -2),
    (r"attn/proj/kernel", -3),
    (r"mlp/fc1/kernel", -1),
    (r"mlp/fc1/bias", -1),
    (r"mlp/fc2/kernel", -2),
    (r"rel_pos_bias/table", -1),
    (r"attn/logit_scale", -1),
    (r"cpb/fc2/kernel", -1),
)


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """All devices as a (data, fsdp, tensor) mesh; -1 takes the rest, and where two are -1, the later one takes it.

    Batches are split over `data` and `fsdp`; parameters, moments and averages over `fsdp` (1: not) and, those of
    attention and MLP, over `tensor`. The devices of one `tensor` group are neighbors. Raises ConfigError if it does
    not come out even.
    """
    count, sizes = jax.device_count(), [data, fsdp, tensor]
    while sizes.count(-1) > 1:
        sizes[sizes.index(-1)] = 1
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and given > 0:
        sizes[sizes.index(-1)] = count // given
    if min(sizes) < 1 or math.prod(sizes) != count:
        raise ConfigError(
            f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} on {count} devices", "mesh",
            f"give fsdp and tensor divisors of {count} ({', '.join(map(str, divisors(count)))}), and data -1",
        )  # fmt: skip
    types = (AxisType.Auto,) * 3
    devices = sorted(jax.devices(), key=lambda device: (getattr(device, "slice_index", 0), device.id))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types)
    if devices[0].platform == "tpu" and sizes[0] % slices == 0:  # `data` over the slices, the rest within each
        within = (sizes[0] // slices, *sizes[1:])
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices), AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def num_batch_shards(mesh: Mesh) -> int:
    """Into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(where: str, batch_size: int, ways: int, microbatches: int = 1) -> None:
    """Raise ConfigError, with the nearest sizes that work, unless every microbatch splits evenly `ways` ways."""
    check_minimum(where, batch_size, 1)
    unit = ways * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"try {below} or {below + unit}" if below > 0 else f"try {unit}"
        parts = f"{ways} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise ConfigError(f"{where} {batch_size} not divisible by {parts}", where, near)


def check_tensor(state: PyTree, mesh: Mesh) -> None:
    """Raise ConfigError, with the sizes that work, unless `tensor` divides what it splits of an abstract state."""
    ways = mesh.shape["tensor"]
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    sizes = {path: leaf.shape[n] for path, leaf in leaves if (n := _tensor_dimension(path)) is not None}
    if ways > 1 and not any("attn" in path.split("/") for path in sizes):
        raise ConfigError(f"tensor={ways} for an encoder without attention", "mesh.tensor", "give mesh.fsdp instead")
    bad = [(path, size) for path, size in sizes.items() if size % ways]
    if ways > 1 and bad:
        path, size = bad[0]
        fitting = [n for n in divisors(mesh.size) if all(size % n == 0 for size in sizes.values())]
        raise ConfigError(
            f"tensor={ways} does not divide the {size} of {path}", "mesh.tensor", f"give {_any_of(fitting)}"
        )


def _any_of(numbers: list[int]) -> str:
    return " or ".join(map(str, numbers))


def shard_state(state: PyTree, mesh: Mesh, scanned_layers: tuple[str, ...] = ()) -> PyTree:
    """An abstract state with a sharding for each leaf: over `tensor` by `TENSOR`, over `fsdp` along the largest
    dimension that it divides, else replicated.

    scanned_layers: names of subtrees whose leaves have a first axis of blocks, which is scanned and therefore not split.
    Moments and averages have the path and shape of their parameter below them, so they are placed as it is.
    """
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]

    def place_leaf(key_path, leaf) -> jax.ShapeDtypeStruct:
        path, shape = path_name(key_path), leaf.shape
        spec: list[str | None] = [None] * len(shape)
        scanned = not set(scanned_layers).isdisjoint(path.split("/"))
        dimension = _tensor_dimension(path)
        if tensor > 1 and dimension is not None:
            spec[dimension] = "tensor"
        free = [n for n in range(int(scanned), len(shape)) if spec[n] is None and shape[n] % fsdp == 0]
        if fsdp > 1 and free and math.prod(shape[int(scanned) :]) >= SMALL:
            spec[max(free, key=lambda n: shape[n])] = "fsdp"
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place_leaf, state)


def _tensor_dimension(path: str) -> int | None:
    return next((dimension for rule, dimension in TENSOR if re.search(rf"(^|/){rule}$", path)), None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Images split along the first dimension, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def along_batch(x: Array) -> Array:
    """`x` held to be split along its first dimension as a batch is, on the mesh of `jax.set_mesh`; without one, `x`.

    Said of what each block gives: else XLA may split a map as the weights are that `fsdp` splits, and send maps, which
    are larger, from device to device in place of weights. In a scan it does.
    """
    known = set(BATCH_AXES) <= set(jax.sharding.get_abstract_mesh().axis_names)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES)) if known else x


def shardings(abstract: PyTree) -> PyTree:
    """The sharding of each leaf of an abstract tree."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def convert(function: Callable[[PyTree], PyTree], tree: PyTree, abstract: PyTree) -> PyTree:
    """`function(tree)`, sharded as `abstract`; the tree itself if it has that structure already."""
    if jax.tree.structure(tree) == jax.tree.structure(abstract):
        return tree
    return jax.jit(function, out_shardings=shardings(abstract))(tree)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_shard(mesh: Mesh) -> tuple[int, int]:
    """(which part of each batch this process brings, of how many).

    Each process brings another part, but where one `tensor` group reaches over several processes: these bring the same.
    Raises ConfigError for a mesh where they would share a part of their rows alone.
    """
    rows = {process: set() for process in range(jax.process_count())}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((num_batch_shards(mesh),)).items():
        rows[device.process_index].add(part.indices(num_batch_shards(mesh))[0])
    shares = sorted({tuple(sorted(parts)) for parts in rows.values()})
    if sum(map(len, shares)) != num_batch_shards(mesh):
        raise ConfigError(
            f"a mesh of {dict(mesh.shape)} on {jax.process_count()} processes", "mesh.tensor",
            f"give a divisor of a process's {jax.local_device_count()} devices",
        )  # fmt: skip
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def to_global(batch: dict, mesh: Mesh) -> dict:
    """This process's numpy batch as its part of the global arrays on the devices."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
