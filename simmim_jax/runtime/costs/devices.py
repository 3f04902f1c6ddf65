"""Devices: published peaks, memory and links, and the memory that a compiled step needs. Bytes, and bytes/s."""

import math
import re
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import psutil
from jaxtyping import PyTree

GIB = 2**30


class Kind(NamedTuple):
    """Published numbers of one device, as JAX counts devices. `pattern` matches its whole `device_kind`."""

    pattern: str
    bfloat16: float  # FLOP/s of dense matmuls
    float32: float  # FLOP/s at JAX's default precision: TF32 on NVIDIA since Ampere, one bfloat16 pass on a TPU
    memory: int  # bytes
    bandwidth: float  # bytes/s of the memory
    link: float  # bytes/s that a device sends to devices of its host, in one direction, over all links
    network: float  # bytes/s that a device sends to other hosts, in one direction


def _nvidia(
    pattern: str,
    bfloat16: int | float,
    float32: int | float,
    memory: int,
    bandwidth: int | float,
    link: int | float,
    network: int | float = 50,
) -> Kind:
    """A Kind from TFLOP/s, GiB and GB/s. Datasheets add both directions of a link; `link` is half of that."""
    return Kind(pattern, bfloat16 * 1e12, float32 * 1e12, memory * GIB, bandwidth * 1e9, link * 1e9, network * 1e9)


def _tpu(pattern: str, bfloat16: int | float, memory: int, bandwidth: int | float, link: int | float) -> Kind:
    """Within a slice, the network is the links."""
    return _nvidia(pattern, bfloat16, bfloat16, memory, bandwidth, link, link)


# NVIDIA: datasheets, without sparsity; GeForce: the architecture's whitepaper, with float32 accumulation. `network` is
# one adapter per device as in NVIDIA DGX: 400 Gb/s since Hopper, 200 before, 100 in DGX-1. Cards that are not in a DGX
# are assumed to share 100 Gb/s among eight. V100 and T4 have no bfloat16 units: XLA computes in float32.
# TPU: docs.cloud.google.com/tpu/docs/{v5e,v5p,v6e}, whose ICI bandwidth counts both directions; v3 and v4: Jouppi et
# al. 2023 (arXiv 2304.01433, table 4). A v3 chip is two devices.
KINDS = {
    "a100-40": _nvidia("NVIDIA A100.*40GB.*", 312, 156, 40, 1555, 300, 25),
    "a100-80": _nvidia("NVIDIA A100.*80GB.*", 312, 156, 80, 2039, 300, 25),
    "b200": _nvidia("NVIDIA B200", 2250, 1100, 180, 7700, 900),
    "h100": _nvidia("NVIDIA H100 80GB HBM3", 989.4, 494.7, 80, 3350, 450),
    "h100-pcie": _nvidia("NVIDIA H100 PCIe", 756, 378, 80, 2000, 64),
    "h200": _nvidia("NVIDIA H200", 989.4, 494.7, 141, 4800, 450),
    "l4": _nvidia("NVIDIA L4", 121, 60, 24, 300, 32, 1.5625),
    "l40s": _nvidia("NVIDIA L40S", 362, 183, 48, 864, 32, 1.5625),
    "rtx4090": _nvidia("NVIDIA GeForce RTX 4090", 165.2, 82.6, 24, 1008, 32, 1.5625),
    "t4": _nvidia("Tesla T4", 8.1, 8.1, 16, 320, 16, 1.5625),
    "v100-16": _nvidia("Tesla V100-SXM.*16GB", 15.7, 15.7, 16, 900, 150, 6.25),
    "v100-32": _nvidia("Tesla V100-SXM.*32GB", 15.7, 15.7, 32, 900, 150, 6.25),
    "tpu-v3": _tpu("TPU v3", 61.5, 16, 450, 140),
    "tpu-v4": _tpu("TPU v4", 275, 32, 1200, 300),
    "tpu-v5e": _tpu("TPU v5 ?(lite|e)", 197, 16, 819, 200),
    "tpu-v5p": _tpu("TPU v5p?", 459, 95, 2765, 600),
    "tpu-v6e": _tpu("TPU v6 ?(lite|e)", 918, 32, 1638, 400),
}


def find_kind(device_kind: str) -> Kind | None:
    """The published numbers for JAX's `device_kind`; None if it is not in `KINDS`."""
    return next((kind for kind in KINDS.values() if re.fullmatch(kind.pattern, device_kind)), None)


def peak_flops(device: jax.Device, dtype: str) -> float:
    """Peak FLOP/s of a device in matmuls of `dtype`: published, or measured in about 0.2 s.

    The measurement takes the best of a few square matmuls. Simulated CPU devices share it.
    """
    if kind := find_kind(device.device_kind):
        return kind.bfloat16 if dtype == "bfloat16" else kind.float32
    on_cpu = device.platform == "cpu"
    size = 1024 if on_cpu else 4096
    square = jax.device_put(np.random.default_rng(0).random((size, size), np.float32) - 0.5, device).astype(dtype)
    multiply = jax.jit(jnp.matmul)
    multiply(square, square).block_until_ready()
    seconds = []
    while sum(seconds) < 0.1 and len(seconds) < 10:
        begun = time.perf_counter()
        multiply(square, square).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * size**3 / min(seconds) / (jax.local_device_count() if on_cpu else 1)


def memory(compiled: jax.stages.Compiled) -> int | None:
    """Bytes that a device needs for a compiled program: arguments, results, temporaries and code.

    A donated argument counts once. None if the backend does not report it.
    """
    try:
        stats = compiled.memory_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    if stats is None:
        return None
    held = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return held + stats.temp_size_in_bytes + stats.generated_code_size_in_bytes


def state_bytes(abstract: PyTree) -> int:
    """Bytes of a sharded abstract tree on one device."""
    leaves = jax.tree.leaves(abstract)
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def device_memory(device: jax.Device) -> int | None:
    """Bytes that JAX may use on a device; None if unknown. Simulated CPU devices share the free memory."""
    if limit := (device.memory_stats() or {}).get("bytes_limit"):
        return limit
    if device.platform == "cpu":
        return psutil.virtual_memory().available // jax.local_device_count()
    kind = find_kind(device.device_kind)
    return kind and kind.memory
