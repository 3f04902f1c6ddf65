"""What a run keeps in its workdir beside checkpoints and records: LOCK, config.json, versions.json.

One run at a time holds a workdir, and no other than the run that began in it goes on there.
"""

import contextlib
import json
import platform
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from simmim_jax.runs import checkpoint, records
from simmim_jax.runtime import processes
from simmim_jax.files import lock_folder, read_json, read_text, write_atomically
from simmim_jax.config import refuse_change
from simmim_jax.errors import ConfigError

SHARED_SOON = 60  # seconds within which other hosts see a file that the first has written


@contextlib.contextmanager
def hold(config: dict, workdir: str) -> Iterator[None]:
    """Hold `workdir`, made where it is missing, for this config, and write the config down in it."""
    if not workdir:
        raise ConfigError("no workdir", "--workdir", "give a folder for the run, like runs/mine")
    folder = Path(workdir)

    def take(held: contextlib.ExitStack) -> str:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(lock_folder(Path(workdir)))
            saved = read_json(folder / "config.json")
            if saved.get("objective", {}).get("name") == "none":  # imported without a head
                fix = f"give it as --config.init_from={workdir}, and another --workdir"
                raise ConfigError("this workdir holds an encoder alone, no run to go on with", workdir, fix)
            if saved and checkpoint.has_steps(workdir):  # else there is nothing yet to go on from
                refuse_change(saved, config, workdir)
            origin = {"imported": saved["imported"]} if "imported" in saved else {}  # stays known when a run goes on
            write_atomically(folder / "config.json", json.dumps({**config, **origin}, indent=2) + "\n")
        except OSError as error:
            raise ConfigError(
                f"cannot use this workdir: {error.strerror}", workdir, "give another --workdir"
            ) from error

        return read_text(folder / "LOCK")

    with contextlib.ExitStack() as held:
        owner = processes.on_process_0(lambda: take(held))
        deadline = time.monotonic() + SHARED_SOON
        while (found := read_text(folder / "LOCK")) != owner and time.monotonic() < deadline:
            time.sleep(0.5)
        processes.check_same(found, "not the same folder on all hosts", workdir, "give one that all hosts share")
        of_hosts = {"data": dict.fromkeys(("path", "data_dir", "workers", "threads", "prefetch"), "")}
        same = {**config, **{name: {**config.get(name, {}), **fields} for name, fields in of_hosts.items()}}
        processes.check_same(
            json.dumps([same, versions()], sort_keys=True), "the config, or a package's version", "all hosts",
            "start all with the same command and environment",
        )  # fmt: skip
        yield


def versions() -> dict[str, str]:
    """The versions of what decides a run's numbers."""
    packages = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "pillow", "simplejpeg")
    packages += ("cykooz-resizer",)
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}


def write_versions(workdir: str) -> None:
    """What runs in `workdir`, in versions.json."""
    write_atomically(Path(workdir) / "versions.json", json.dumps(versions(), indent=2) + "\n")
