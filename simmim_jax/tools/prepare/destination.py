"""Folders that prepare writes: their plan, their manifest, and whether they are undamaged.

An unfinished folder has a plan, `.prepare.json`, with every decision that a resumed run must repeat. A finished folder
has a manifest, written last. `shards` writes the files in between.
"""

import contextlib
import csv
import dataclasses
import fnmatch
import hashlib
import io
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from simmim_jax.data import prepared
from simmim_jax.data.decode import BadImage
from simmim_jax.data.pixels import Pixels
from simmim_jax.data.prepared import HEAD, MANIFEST, PLAN, SHARD
from simmim_jax.errors import ConfigError, DataError, differences
from simmim_jax.files import lock_folder, read_json, write_json
from simmim_jax.tools.prepare.shards import (
    Settings,
    Statistics,
    Task,
    disk_errors,
    file_hash,
    make_tasks,
    read_statistics,
    remove_hidden,
    shrink,
    write_bytes,
)

LOCK, LOCKS, REFUSED, SIDECARS = ".prepare.lock", ".prepare*.lock", "refused.csv", ".part-*.json"
SHARD_BYTES, MAX_SHARDS = 256 * 2**20, 1024
SMALL_SHARDS, MIN_IMAGES = 16, 500  # small data sets: at most 16 shards, with at least 500 images each
MAX_CLASSES = 1_000_000  # if labels have no names
SAMPLES = 32  # images from which the size of all is estimated
FIX = "give another DEST, or remove this file"


class Job(NamedTuple):
    """One of several processes that write disjoint shards of the same DEST: each `processes`-th shard."""

    process: int
    processes: int


@dataclasses.dataclass
class Plan:
    """What a folder will hold. `manifest` is {} until it is finished, `shards` 0 until it is decided."""

    folder: str
    source: dict
    settings: Settings
    classes: list[str]
    pixels: Pixels
    shards: int = 0
    manifest: dict = dataclasses.field(default_factory=dict)
    overwrite: bool = False

    def content(self) -> dict:
        """What plan and manifest have in common."""
        pixels = {name: x for name, x in self.pixels.as_record().items() if name == "pixels"}
        common = {"source": self.source, "settings": self.settings.as_json(), "classes": self.classes}
        return HEAD | common | pixels


def check_paths(source: str, dest: str) -> None:
    """Refuse a DEST that is SOURCE, inside of it or around it, or a folder of other files."""
    ends = os.path.realpath(source), os.path.realpath(dest)
    if source and os.path.exists(source) and os.path.commonpath(ends) in ends:
        raise ConfigError("SOURCE and DEST are the same, or one is inside the other", dest, "give another DEST")
    if os.path.exists(dest) and not os.path.isdir(dest):
        raise ConfigError("a file instead of a folder", dest, "give another DEST")
    if not os.path.isdir(dest):
        return
    folders = prepared_folders(dest)
    if dest in folders:
        raise ConfigError("the folder of one split", dest, "give its parent folder as DEST")
    for path in (os.path.join(dest, name) for name in sorted(_names(dest)) if not folders):
        if fnmatch.fnmatch(os.path.basename(path), LOCKS):
            continue
        # a run that was killed early leaves folders with nothing but partial files
        if not os.path.isdir(path) or not all(name.endswith(".partial") for name in _names(path)):
            raise _foreign_error(dest, path)


@contextlib.contextmanager
def lock(dest: str, job: Job | None = None) -> Iterator[None]:
    """Hold DEST, or the part of a job. Raises BusyError if another process holds the same, or any part of DEST."""
    own = LOCK if job is None else f".prepare-{job.process}-of-{job.processes}.lock"
    with disk_errors(dest):
        os.makedirs(dest, exist_ok=True)
        open(os.path.join(dest, own), "a").close()
    with contextlib.ExitStack() as held:
        for name in sorted(fnmatch.filter(_names(dest), LOCKS)) if job is None else (own,):
            held.enter_context(lock_folder(Path(dest), name, "DEST is in use"))
        yield
        if job is None:
            for name in fnmatch.filter(_names(dest), ".prepare-*.lock"):
                Path(dest, name).unlink(missing_ok=True)


def prepared_folders(dest: str) -> list[str]:
    """The finished and unfinished folders: `dest`, or those in it."""
    folders = [dest, *(os.path.join(dest, name) for name in sorted(_names(dest)))]
    return [folder for folder in folders if {PLAN, MANIFEST} & _names(folder)]


def check_classes(dest: str, classes: list[str], *, splits: set[str]) -> None:
    """Refuse classes by which a label would mean another class than in the other splits of `dest` than `splits`."""
    for folder in prepared_folders(dest):
        theirs = (read_manifest(folder) or read_plan(folder))["classes"]
        common = min(len(theirs), len(classes))
        if os.path.basename(folder) not in splits and theirs[:common] != classes[:common]:
            what = f"a label would mean another class than in {folder}"
            raise ConfigError(what, dest, "prepare all splits in one run, with --split=A,B and --overwrite")


def make_plan(
    folder: str,
    source,
    *,
    classes: list[str],
    settings: Settings,
    pixels: Pixels,
    shards: int | None,
    overwrite: bool,
) -> Plan:
    """The plan of `folder`, which continues what is in it unless `overwrite` is set.

    Raises:
      ConfigError: the folder has other files, or was begun with another source or other settings.
      DataError: it was finished and is damaged.
    """
    described = {"described": source.describe(), "fingerprint": source.fingerprint()}
    plan = Plan(folder, described, settings, classes, pixels, min(shards or 0, len(source)), overwrite=overwrite)
    names, manifest = _names(folder), read_manifest(folder)
    found = manifest or read_plan(folder)
    visible = {name for name in names if not name.startswith(".")}
    foreign = {name for name in visible - {MANIFEST, REFUSED} if not SHARD.fullmatch(name)}
    if (visible and not found) or (foreign and overwrite):
        raise _foreign_error(folder, min(foreign or visible))
    if not found or overwrite:
        return plan
    count = len(manifest["shards"]) if manifest else found["shards"]
    now = _compared(plan.content(), plan.shards or count)
    if not plan.classes:  # known only at the end
        now["classes"] = _compared(found, count)["classes"]
    if differences(found["source"]["fingerprint"], described["fingerprint"]):
        then, here = found["source"]["described"], described["described"]
        what = f"{'finished' if manifest else 'begun'} with another SOURCE: {then}, now {here}"
        if then == here:
            what = f"the files of SOURCE have changed since: {here}"
        raise ConfigError(what, folder, "give the first SOURCE, or another DEST, or --overwrite")
    if changed := differences(_compared(found, count), now):
        what = f"{'finished' if manifest else 'begun'} with another SOURCE or other settings: {changed}"
        raise ConfigError(what, folder, "repeat the first command, or give another DEST or --overwrite")
    for shard in manifest.get("shards", ()):
        if fault := shard_fault(folder, shard, by_size=True):
            raise DataError(f"finished, and damaged since: {fault}", folder, "give --overwrite to prepare it again")
    return dataclasses.replace(plan, shards=count, manifest=manifest)


def _compared(content: dict, shards: int) -> dict:
    """What a plan or manifest must have in common with a command that continues it."""
    digest = hashlib.sha256("\0".join(content["classes"]).encode(errors="surrogateescape")).hexdigest()[:8]
    classes = f"{len(content['classes'])} (SHA-256 {digest})"
    others = {"shards": shards, "classes": classes, "pixels": content.get("pixels")}
    return content["source"]["fingerprint"] | content["settings"] | others


def begin(plan: Plan, source, job: Job | None = None) -> tuple[list[Task], dict[Task, Statistics]]:
    """(all shards of a plan, or those of a job; the finished ones). Decides the number of shards, and writes the plan.

    All processes of a job decide the same.
    """
    with disk_errors(plan.folder):
        os.makedirs(plan.folder, exist_ok=True)
        if job is None:
            remove_hidden(plan.folder)
        if plan.overwrite:
            for name in _names(plan.folder):
                if SHARD.fullmatch(name) or name == REFUSED:
                    os.unlink(os.path.join(plan.folder, name))
            remove_hidden(plan.folder, SIDECARS)
            for name in (PLAN, MANIFEST):  # last: if this is killed, they still identify the folder
                Path(plan.folder, name).unlink(missing_ok=True)
    if not os.path.exists(os.path.join(plan.folder, PLAN)):
        plan.shards = plan.shards or _choose_shards(source, plan.settings)
        with disk_errors(plan.folder):
            write_json(Path(plan.folder, PLAN), plan.content() | {"shards": plan.shards})
    tasks = make_tasks(plan.folder, len(source), plan.shards)
    if job:
        tasks = tasks[job.process :: job.processes]
        for task in tasks:  # of a killed process
            remove_hidden(plan.folder, f".{os.path.basename(task.path)}.*.partial")
    return tasks, {task: made for task in tasks if (made := read_statistics(task))}


def _choose_shards(source, settings: Settings) -> int:
    """The number of shards of about SHARD_BYTES, estimated from the first images; more for small data and workers."""
    sizes = []
    for i in range(min(SAMPLES, len(source))):
        with contextlib.suppress(BadImage, OSError):
            sizes.append(len(shrink(source[i]["image"], settings)[0]["image"]))
    by_size = math.ceil(len(source) * np.mean(sizes or [0]) / SHARD_BYTES)
    return min(MAX_SHARDS, max(1, by_size, min(SMALL_SHARDS, len(source) // MIN_IMAGES)))


def finish(plan: Plan, tasks: list[Task]) -> tuple[dict, Statistics]:
    """Write `refused.csv` and the manifest. Returns the manifest and the statistics of all shards together."""
    done = [read_statistics(task) for task in tasks]
    if None in done:
        raise DataError("a shard has disappeared", tasks[done.index(None)].path, "run the same command again")
    made = _add_up(done)
    described = plan.source["described"]
    if not plan.classes and made.max_label >= MAX_CLASSES:
        raise DataError(f"a label is {made.max_label}", described, "give a SOURCE with labels from 0 to classes - 1")
    if not made.count:
        name, reason = made.refused[0]
        raise DataError(f"no image can be used, the first is {name!r} ({reason})", described, "repair the images")
    table = io.StringIO()
    csv.writer(table).writerows([["name", "reason"], *made.refused])
    write_bytes(os.path.join(plan.folder, REFUSED), table.getvalue().encode(errors="surrogateescape"))
    mean, std = list(plan.pixels.mean), list(plan.pixels.std)  # of a sample of the images
    if made.sums:
        # exact integers up to here: the variance is a difference of two large numbers
        variance = [made.pixels * square - total**2 for total, square in zip(made.sums, made.squares, strict=True)]
        mean = [total / made.pixels / 255 for total in made.sums]
        std = [math.sqrt(value) / made.pixels / 255 for value in variance]
    packages = ("array_record", "pillow", "simplejpeg", "cykooz_resizer", "tifffile", "imagecodecs", "numpy")
    manifest = plan.content() | {
        "count": made.count,
        "classes": plan.classes or [str(label) for label in range(made.max_label + 1)],
        "channels": plan.settings.channels,
        "mean": mean,
        "std": std,
        "bytes": made.bytes,
        "shards": [
            {"file": os.path.basename(task.path), "count": one.count, "bytes": one.bytes, "sha256": one.sha256}
            for task, one in zip(tasks, done, strict=True)
        ],
        "refused": len(made.refused),
        "made": {
            "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "versions": {name: metadata.version(name) for name in packages},
        },
    }
    with disk_errors(plan.folder):
        write_json(Path(plan.folder, MANIFEST), manifest)
    remove_working_files(plan.folder)
    return manifest, made


def _add_up(done: list[Statistics]) -> Statistics:
    sums = {key: sum(getattr(one, key) for one in done) for key in ("count", "bytes", "source_bytes", "kept", "pixels")}
    return Statistics(
        **sums,
        sums=[sum(sums) for sums in zip(*(one.sums for one in done), strict=True)],
        squares=[sum(squares) for squares in zip(*(one.squares for one in done), strict=True)],
        refused=[fault for one in done for fault in one.refused],
        max_label=max(one.max_label for one in done),
    )


def remove_working_files(folder: str) -> None:
    """Remove the files that only an unfinished folder needs."""
    for pattern in (".*.partial", SIDECARS, PLAN):
        remove_hidden(folder, pattern)


# --- plans and manifests of earlier runs


def read_manifest(folder: str) -> dict:
    """The manifest of a finished folder; {} if there is none. Raises DataError if prepare did not write it."""
    path, manifest = Path(folder, MANIFEST), prepared.read_manifest(folder) or {}
    if path.exists():
        _check_content(
            path, manifest, bool(manifest) and all(SHARD.fullmatch(each["file"]) for each in manifest["shards"])
        )
    return manifest


def read_plan(folder: str) -> dict:
    """The plan of an unfinished folder; {} if there is none. Raises DataError if prepare did not write it."""
    path = Path(folder, PLAN)
    plan = read_json(path, DataError, FIX)
    if path.exists():
        _check_content(path, plan, HEAD.items() <= plan.items() and isinstance(plan.get("shards"), int))
    return plan


def _check_content(path: Path, content: dict, valid: bool) -> None:
    """Raise DataError unless `content` is `valid` and has what plans and manifests have in common."""
    kinds = {"source": dict, "settings": dict, "classes": list}
    valid = valid and all(isinstance(content.get(key), kind) for key, kind in kinds.items())
    if not valid or not {"described", "fingerprint"} <= content["source"].keys():
        raise DataError("not written by prepare", str(path), FIX)


def _foreign_error(folder: str, name: str) -> ConfigError:
    what = f"it has {os.path.basename(name)!r}, which prepare has not written"
    return ConfigError(what, folder, "give another DEST, empty or new")


def _names(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


# --- verification


def damaged_shards(folder: str, *, workers: int) -> list[str]:
    """Faults of a finished folder, judged by every byte, by the number of records, and by surplus files."""
    manifest = read_manifest(folder)
    with ThreadPoolExecutor(workers) as threads:  # hashing releases the GIL
        faults = [*filter(None, threads.map(lambda shard: shard_fault(folder, shard), manifest["shards"]))]
    count = sum(shard["count"] for shard in manifest["shards"])
    if count != manifest["count"]:
        faults.append(f"{MANIFEST}: {manifest['count']} images, but {count} in its shards")
    surplus = {name for name in _names(folder) if SHARD.fullmatch(name)} - {s["file"] for s in manifest["shards"]}
    return sorted(faults) + [f"{name}: not in {MANIFEST}" for name in sorted(surplus)]


def shard_fault(folder: str, shard: dict, *, by_size: bool = False) -> str:
    """The fault of a shard, or "". by_size: do not read it."""
    path = os.path.join(folder, shard["file"])
    try:
        if (size := os.path.getsize(path)) != shard["bytes"]:
            return f"{shard['file']}: {size} bytes, but {shard['bytes']} in {MANIFEST}"
        if by_size:
            return ""
        if file_hash(path) != shard["sha256"]:
            return f"{shard['file']}: its bytes have changed"
        reader = ArrayRecordReader(os.fsencode(path))
        count = reader.num_records()
        reader.close()
    except (OSError, RuntimeError) as error:
        return f"{shard['file']}: {getattr(error, 'strerror', None) or error}"
    return "" if count == shard["count"] else f"{shard['file']}: {count} records, but {shard['count']} in {MANIFEST}"
