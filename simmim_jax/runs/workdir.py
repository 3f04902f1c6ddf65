"""Ownership of a workdir: its lock, config.json and versions.json.

Only one run at a time may use a workdir. Only a run with the saved config may resume in it.
"""

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from simmim_jax.config import refuse_change
from simmim_jax.errors import ConfigError, DataError, differences
from simmim_jax.files import lock_folder, read_json, read_text, write_json
from simmim_jax.runs import checkpoint
from simmim_jax.runtime import processes

MAX_SHARING_DELAY = 60  # seconds until other hosts see a file that process 0 has written
PER_HOST = ("path", "data_dir", "workers", "threads", "prefetch")  # fields of config.data that may differ between hosts


@contextlib.contextmanager
def hold(config: dict, workdir: str) -> Iterator[None]:
    """Create and lock `workdir`, and write config.json into it. Raises ConfigError and BusyError."""
    if not workdir:
        raise ConfigError("no workdir", "--workdir", "give a folder for the run, like runs/mine")
    folder = Path(workdir)

    def take(held: contextlib.ExitStack) -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(folder))
            saved = read_json(folder / "config.json")
            if saved.get("objective", {}).get("name") == "none":  # imported weights without a head
                fix = f"give it as --config.init_from={workdir}, and another --workdir"
                raise ConfigError("this workdir holds only an encoder, no run to continue", workdir, fix)
            if saved and checkpoint.has_steps(workdir):  # without a checkpoint there is nothing to resume
                refuse_change(saved, config, workdir)
            origin = {"imported": saved["imported"]} if "imported" in saved else {}  # keep where the weights came from
            write_json(folder / "config.json", {**config, **origin})
        except OSError as error:
            raise ConfigError(
                f"cannot use this workdir: {'is a file' if folder.is_file() else error.strerror}",
                workdir,
                "give another --workdir",
            ) from error
        return read_text(folder / "LOCK")

    with contextlib.ExitStack() as held:
        owner = processes.on_process_0(lambda: take(held))
        deadline = time.monotonic() + MAX_SHARING_DELAY
        while (found := read_text(folder / "LOCK")) != owner and time.monotonic() < deadline:
            time.sleep(0.5)
        processes.check_same(found, "not the same folder on all hosts", workdir, "give a folder that all hosts share")
        shared = {**config, "data": {name: x for name, x in config.get("data", {}).items() if name not in PER_HOST}}
        processes.check_same(
            json.dumps([shared, versions()], sort_keys=True),
            "the config or a package version differs",
            "all hosts",
            "start all processes with the same command and environment",
        )
        yield


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that affect the results of a run."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "simplejpeg")
    packages += ("cykooz-resizer", "tifffile", "imagecodecs")
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_versions(workdir: str) -> None:
    """Write versions.json."""
    write_json(Path(workdir) / "versions.json", versions())


def refuse_other_data(saved: dict, now: dict, workdir: str) -> None:
    """Raise DataError if the data fingerprint of a checkpoint differs from the data of this run."""
    common = saved.keys() & now.keys()
    if changed := differences(*({name: side[name] for name in common} for side in (saved, now))):
        raise DataError(f"the data has changed ({changed})", workdir, "restore it, or start in a new --workdir")
