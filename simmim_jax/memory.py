"""Check that a training step fits into device memory. If it does not, find settings that fit.

The memory of a step is reported by the compiler. It includes state, batch, activations and temporaries.
"""

import contextlib
from collections.abc import Iterator

from simmim_jax.compiled import compile_train_step
from simmim_jax.errors import ConfigError, UserError
from simmim_jax.experiment import Experiment
from simmim_jax.runtime.costs import devices
from simmim_jax.runtime.processes import log0

MAX_MICROBATCHES = 16  # largest factor on config.microbatches that is tried


def check_memory(experiment: Experiment, needed: int, available: int) -> None:
    """Log the memory that a step needs per device. If it is too much, raise ConfigError with settings that fit.

    needed, available: bytes; 0 if unknown.
    """
    if not needed or not available:
        return
    log0(f"memory: a step needs {gib(needed)} of {gib(available)} per device")
    if needed <= available:
        return
    log0("that is too much: searching for settings that fit")
    fitting = [
        " ".join(f"--config.{name}={value}" for name, value in tried["settings"].items())
        + f" ({gib(tried['memory_bytes'])})"
        for tried in try_settings(experiment, available)
        if tried["fits"]
    ]
    raise ConfigError(
        f"a step needs {gib(needed)} of each device, which has {gib(available)}",
        f"batch_size {experiment.batches.batch_size}",
        f"give {' or '.join(fitting) or 'a smaller batch'}; --config.check_memory=false tries it anyway",
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def compile_to_measure(experiment: Experiment):
    """Compile the step so that its memory, measured on a CPU, is similar to that on an accelerator.

    XLA:CPU drops the barriers that make rematerialization effective, except in a scan. A model with remat is therefore
    compiled with scanned blocks.
    """
    encoder = experiment.encoder
    if encoder.remat != "none" and not encoder.scan:
        with contextlib.suppress(ConfigError):  # if only some blocks are frozen, they cannot be scanned
            experiment = experiment.variant({"encoder.scan": True})
    return compile_train_step(experiment)


def try_settings(experiment: Experiment, available: int) -> Iterator[dict]:
    """Compile a step with settings that save memory; yield {"settings", "memory_bytes", "fits"} for each.

    Tries each setting separately: `encoder.remat`, `mesh.fsdp`, and `microbatches` doubled until the step fits. If none
    fits, combines them. available: bytes.
    """

    def attempt(settings: dict) -> dict | None:
        try:
            variant = experiment.variant(settings)
        except UserError:  # these devices or this encoder do not support it
            return None
        needed = devices.memory(compile_to_measure(variant))
        return {"settings": settings, "memory_bytes": needed, "fits": needed <= available}

    def try_microbatches(settings: dict) -> Iterator[dict]:
        factor = 2
        while factor <= MAX_MICROBATCHES:
            tried = attempt({**settings, "microbatches": factor * experiment.microbatches})
            if not tried:
                return
            yield tried
            if tried["fits"]:
                return
            factor *= 2

    mesh = experiment.record["mesh"]
    single = []
    if "scan" in experiment.encoder.options() and experiment.encoder.remat != "full":
        single.append({"encoder.remat": "full"})
    if mesh["fsdp"] == 1:
        single.append({"mesh.fsdp": -1} if mesh["data"] == -1 else {"mesh.data": -1, "mesh.fsdp": -1})
    all_tried = [tried for settings in single if (tried := attempt(settings))]
    all_tried += try_microbatches({})
    yield from all_tried
    if any(tried["fits"] for tried in all_tried):
        return
    together = {name: value for settings in single for name, value in settings.items()}
    tried = attempt(together) if len(single) > 1 else None
    if tried:
        yield tried
    if together and not (tried and tried["fits"]):
        yield from try_microbatches(together)
