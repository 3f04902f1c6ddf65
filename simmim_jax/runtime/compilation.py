"""Compiled programs are kept between runs: the second start of a config takes seconds."""

import os
import platform
import zlib
from pathlib import Path

import jax


def keep_compiled() -> Path | None:
    """Let JAX keep what it compiles in the user's cache folder; where, or None where that cannot be written.

    JAX_COMPILATION_CACHE_DIR, or --jax_compilation_cache_dir, names another folder; empty, they switch this off.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.config.jax_compilation_cache_dir is not None:
        folder = jax.config.jax_compilation_cache_dir
        return Path(folder) if folder else None
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simmim_jax" / "xla" / _processor()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, a home that is read-only or full
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    return folder


def _processor() -> str:
    """A name of this processor's instructions: homes are shared by machines, and not all run the others' programs."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        instructions = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        instructions = platform.processor()
    return f"{platform.machine()}-{zlib.crc32(instructions.encode()):08x}"
