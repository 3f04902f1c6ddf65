"""The device mesh, and the sharding of state and batches on it."""

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
MIN_FSDP_SIZE = 2**16  # elements; smaller arrays are not split over `fsdp`, because communication costs more

# (end of a parameter's path, dimension that `tensor` splits): attention heads and MLP hidden units, as in Megatron-LM
# (Shoeybi et al. 2019, arXiv 1909.08053, section 3). Other parameters are replicated over the axis.
# Optimizer moments and the EMA have the same paths, so they are sharded like their parameters.
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
    """All devices as a (data, fsdp, tensor) mesh.

    A size of -1 stands for all remaining devices; if two sizes are -1, the first becomes 1. Batches are split over
    `data` and `fsdp`. Parameters, moments and the EMA are split over `fsdp`, and those of attention and MLP also over
    `tensor`. Devices of a `tensor` group are adjacent. Raises ConfigError if the product of the sizes is not the number
    of devices.
    """
    count, sizes = jax.device_count(), [data, fsdp, tensor]
    while sizes.count(-1) > 1:
        sizes[sizes.index(-1)] = 1
    given = math.prod(size for size in sizes if size != -1)
    if -1 in sizes and given > 0:
        sizes[sizes.index(-1)] = count // given
    if min(sizes) < 1 or math.prod(sizes) != count:
        what = f"a mesh of data={data}, fsdp={fsdp}, tensor={tensor} on {count} devices"
        fitting = ", ".join(map(str, divisors(count)))
        raise ConfigError(what, "mesh", f"give fsdp and tensor divisors of {count} ({fitting}), and data -1")
    types = (AxisType.Auto,) * 3
    devices = sorted(jax.devices(), key=lambda device: (getattr(device, "slice_index", 0), device.id))
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if slices == 1:
        return jax.make_mesh(sizes, AXES, axis_types=types)
    if devices[0].platform == "tpu" and sizes[0] % slices == 0:  # `data` over slices, the other axes within each
        within = (sizes[0] // slices, *sizes[1:])
        return Mesh(mesh_utils.create_hybrid_device_mesh(within, (slices, 1, 1), devices), AXES, axis_types=types)
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=types)


def divisors(count: int) -> list[int]:
    return [n for n in range(1, count + 1) if count % n == 0]


def num_batch_shards(mesh: Mesh) -> int:
    """The number of parts that a batch is split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch_size(where: str, batch_size: int, num_shards: int, microbatches: int = 1) -> None:
    """Raise ConfigError, with the nearest valid sizes, unless every microbatch splits into `num_shards` parts."""
    check_minimum(where, batch_size, 1)
    unit = num_shards * microbatches
    if batch_size % unit:
        below = batch_size // unit * unit
        near = f"try {below} or {below + unit}" if below > 0 else f"try {unit}"
        parts = f"{num_shards} devices" + (f" x {microbatches} microbatches" if microbatches > 1 else "")
        raise ConfigError(f"{where} {batch_size} not divisible by {parts}", where, near)


def check_tensor(state: PyTree, mesh: Mesh) -> None:
    """Raise ConfigError, with the valid sizes, unless the size of `tensor` divides all dimensions that it splits."""
    ways = mesh.shape["tensor"]
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(state)]
    sizes = {path: leaf.shape[n] for path, leaf in leaves if (n := _tensor_dimension(path)) is not None}
    if ways > 1 and not any("attn" in path.split("/") for path in sizes):
        raise ConfigError(f"tensor={ways} for an encoder without attention", "mesh.tensor", "give mesh.fsdp instead")
    bad = [(path, size) for path, size in sizes.items() if size % ways]
    if ways > 1 and bad:
        path, size = bad[0]
        fitting = [n for n in divisors(mesh.size) if all(size % n == 0 for size in sizes.values())]
        fix = f"give {' or '.join(map(str, fitting))}"
        raise ConfigError(f"tensor={ways} does not divide the {size} of {path}", "mesh.tensor", fix)


def shard_state(state: PyTree, mesh: Mesh, scanned_layers: tuple[str, ...] = ()) -> PyTree:
    """Give each leaf of an abstract state a sharding.

    `TENSOR` lists the dimensions that are split over `tensor`. The largest other dimension that `fsdp` divides is split
    over `fsdp`. Everything else is replicated. scanned_layers: names of subtrees whose leaves have the blocks along the
    first axis; this axis is scanned and not split.
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
        if fsdp > 1 and free and math.prod(shape[int(scanned) :]) >= MIN_FSDP_SIZE:
            spec[max(free, key=lambda n: shape[n])] = "fsdp"
        return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree_util.tree_map_with_path(place_leaf, state)


def _tensor_dimension(path: str) -> int | None:
    return next((dimension for rule, dimension in TENSOR if re.search(rf"(^|/){rule}$", path)), None)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch: the first dimension over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def along_batch(x: Array) -> Array:
    """Constrain `x` to be sharded like a batch on the mesh of `jax.set_mesh`; without a mesh, return `x`.

    Constrain each block's output. Otherwise XLA may shard activations like the FSDP weights and communicate activations
    instead of weights, which it does in a scan.
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
    """(index, count) of the part of each batch that this process loads.

    Processes that share a `tensor` group load the same part. Raises ConfigError if two processes would share some, but
    not all, of their rows on this mesh.
    """
    rows = {process: set() for process in range(jax.process_count())}
    for device, (part,) in batch_sharding(mesh).devices_indices_map((num_batch_shards(mesh),)).items():
        rows[device.process_index].add(part.indices(num_batch_shards(mesh))[0])
    parts = sorted({tuple(sorted(rows_of)) for rows_of in rows.values()})
    if sum(map(len, parts)) != num_batch_shards(mesh):
        what = f"a mesh of {dict(mesh.shape)} on {jax.process_count()} processes"
        raise ConfigError(what, "mesh.tensor", f"give a divisor of a process's {jax.local_device_count()} devices")
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def to_global(batch: dict, mesh: Mesh) -> dict:
    """Turn this process's numpy batch into its part of global arrays on the devices."""
    sharding = batch_sharding(mesh)
    with jax.transfer_guard_host_to_device("allow"):  # with several processes, JAX counts this transfer as implicit
        return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}
