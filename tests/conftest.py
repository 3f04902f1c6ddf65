"""Eight simulated devices for every test, float32 matmuls in full, and shape checks on every annotated function."""

import json
import os
import signal
import tempfile
import threading
from pathlib import Path

# Most of a test's time is compilation. Without LLVM's optimizations it takes a third less; XLA's own passes (fusion,
# sharding, layout, donation) all run.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
FLAGS += " --xla_llvm_disable_expensive_passes=true"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS", "cpu")
# What a shell runs in its background ignores this signal, and so would the runs that tests send it to.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)

# One cache of compiled programs for the whole session: most of a small run's time is compilation. pytest's two workers
# have it from the process that starts them.
if "PYTEST_XDIST_WORKER" not in os.environ:
    CACHE = tempfile.TemporaryDirectory(prefix="simmim_jax_tests_")
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", CACHE.name)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import numpy as np
import pytest
from jaxtyping import install_import_hook

# The hook must be in place before anything of ours is imported, so that beartype sees every annotated function.
install_import_hook("simmim_jax", "beartype.beartype")

jax.config.update("jax_default_matmul_precision", "highest")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden():
    """A function: the reference arrays of a name, as a dict."""

    def load(name: str) -> dict[str, np.ndarray]:
        arrays = {}
        for path in GOLDEN.glob(f"{name}.*npz"):  # of large ones, the parameters have a file of their own
            with np.load(path) as part:
                arrays |= part
        return arrays

    return load


@pytest.fixture
def golden_json():
    """A function: the content of a reference JSON file."""
    return lambda name: json.loads((GOLDEN / f"{name}.json").read_text())
