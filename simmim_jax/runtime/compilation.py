"""Ahead-of-time compilation of a step, and the persistent compilation cache. With it, a second start takes seconds."""

import os
import platform
import zlib
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from simmim_jax.runtime import sharding

_compiled = {"seconds": 0.0}  # in this process


def _listen(event: str, seconds: float, **_) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled["seconds"] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


def seconds() -> float:
    """The seconds that this process has spent in XLA's compiler, or reading its cache."""
    return _compiled["seconds"]


def enable_cache() -> Path | None:
    """Enable JAX's persistent compilation cache in the user's cache folder; return the folder, or None if impossible.

    JAX_COMPILATION_CACHE_DIR or --jax_compilation_cache_dir sets another folder; an empty value disables the cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        folder = jax.config.jax_compilation_cache_dir
        return Path(folder) if folder else None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simmim_jax" / "xla" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or it is read-only or full
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def compile_step(step: Callable, state: PyTree, batch: dict, key: Array, mesh: Mesh) -> Callable:
    """Compile (state, batch, key) -> (state, metrics) once for these shapes.

    The state keeps its sharding and is donated; the batch is split over the devices; metrics are replicated.
    """
    state_shardings, everywhere = sharding.shardings(state), sharding.replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(state_shardings, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(state_shardings, everywhere),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch, key).compile()


def _processor() -> str:
    """A name for this processor's instruction set. Machines with different processors may share a home folder."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        instructions = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(instructions.encode()):08x}"
