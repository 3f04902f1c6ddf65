"""Prepared folders: what each is to become, what it has become, and whether it is still that.

A folder under way holds a plan, `.prepare.json`, in which everything is decided that a resumed run must not decide
anew; a finished one a manifest, written last. `shards` writes what lies between.
"""

import contextlib
import csv
import dataclasses
import fcntl
import io
import json
import math
import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from simmim_jax.data.decode import BadImage
from simmim_jax.errors import BusyError, ConfigError, DataError
from simmim_jax.tools.prepare.shards import (
    Statistics,
    Task,
    hash_of,
    make_tasks,
    read_statistics,
    remove_hidden,
    shrink,
    told_of_disk,
    write_json,
    write_whole,
)

HEAD = {"format": "simmim_jax.prepared", "version": 1}
LOCK, PLAN, MANIFEST, SIDECARS = ".prepare.lock", ".prepare.json", "manifest.json", ".part-*.json"
PLANNED = ("source", "settings", "classes", "shards")
SHARD_BYTES, MAX_SHARDS = 256 * 2**20, 1024
FEW_SHARDS, FEW_IMAGES = 16, 500  # of small data: up to so many shards, of no fewer images each
MAX_CLASSES = 1_000_000  # where labels come without names
SAMPLES = 32  # images that tell how large all will be
SHARD = re.compile(r"part-\d{5,}-of-\d{5,}\.array_record")


@dataclasses.dataclass
class Plan:
    """What a folder is to become: of which source, by which settings; `manifest` is {} until it has."""

    folder: str
    source: dict
    settings: dict
    classes: list[str]
    shards: int = 0  # 0: not decided yet
    manifest: dict = dataclasses.field(default_factory=dict)
    overwrite: bool = False


def check_places(source: str, dest: str) -> None:
    """Refuse a DEST that is SOURCE, or lies in it or around it, or is somebody's folder of other things."""
    ends = os.path.realpath(source), os.path.realpath(dest)
    if source and os.path.exists(source) and os.path.commonpath(ends) in ends:
        raise ConfigError("SOURCE and DEST are the same, or one lies in the other", dest, "give another DEST")
    if os.path.exists(dest) and not os.path.isdir(dest):
        raise ConfigError("a file, where a folder should be", dest, "give another DEST")
    if not os.path.isdir(dest):
        return
    folders = prepared_folders(dest)
    if dest in folders:
        raise ConfigError("it is the folder of one split", dest, "give the folder that it lies in as DEST")
    for path in (os.path.join(dest, name) for name in sorted(_names(dest) - {LOCK}) if not folders):
        # a run that was killed at its very beginning leaves no more than this
        if not os.path.isdir(path) or not all(name.endswith(".partial") for name in _names(path)):
            raise _not_ours(dest, path)


@contextlib.contextmanager
def held(dest: str) -> Iterator[None]:
    """Hold DEST for this process; the lock dies with it. Raises BusyError if another process holds it."""
    with told_of_disk(dest):
        os.makedirs(dest, exist_ok=True)
        lock = open(os.path.join(dest, LOCK), "a+")  # noqa: SIM115
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise BusyError("DEST is in use", f"{dest} by {owner}", "wait for it, or give another DEST") from None
        with told_of_disk(dest):
            lock.truncate(0)
            lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
            lock.flush()
        yield


def prepared_folders(dest: str) -> list[str]:
    """The folders that `prepare` has begun or finished: `dest`, or those in it."""
    folders = [dest, *(os.path.join(dest, name) for name in sorted(_names(dest)))]
    return [folder for folder in folders if {PLAN, MANIFEST} & _names(folder)]


def check_numbering(dest: str, classes: list[str], *, beside: set[str]) -> None:
    """Refuse classes by which a label would mean another one than in the splits of `dest`, save those `beside`."""
    for folder in prepared_folders(dest):
        theirs = (read_manifest(folder) or read_plan(folder))["classes"]
        common = min(len(theirs), len(classes))
        if os.path.basename(folder) not in beside and theirs[:common] != classes[:common]:
            what = f"a label would mean another class than in {folder}"
            raise ConfigError(what, dest, "prepare all splits in one run, with --split=A,B and --overwrite")


def make_plan(folder: str, source, *, classes: list[str], settings: dict, shards: int | None, overwrite: bool) -> Plan:
    """What `folder` is to become, and, unless it is to be overwritten, what of it there is.

    Raises:
      ConfigError: for a folder that holds other things, or was begun from another source or with other settings.
      DataError: for one that was finished and is no longer whole.
    """
    described = {"described": source.describe(), "fingerprint": source.fingerprint()}
    plan = Plan(folder, described, settings, classes, min(shards or 0, len(source)), overwrite=overwrite)
    names, manifest = _names(folder), read_manifest(folder)
    found = manifest or read_plan(folder)
    visible = {name for name in names if not name.startswith(".")}
    foreign = {name for name in visible - {MANIFEST, "refused.csv"} if not SHARD.fullmatch(name)}
    if (visible and not found) or (foreign and overwrite):
        raise _not_ours(folder, min(foreign or visible))
    if not found or overwrite:
        return plan
    there = len(manifest["shards"]) if manifest else found["shards"]
    if differences := _differences(found, there, plan):
        what = f"{'finished' if manifest else 'begun'} otherwise: {'; '.join(differences)}"
        raise ConfigError(what, folder, "give what was given then, or another DEST, or --overwrite")
    if manifest and (faults := missing_shards(folder, manifest)):
        raise DataError(f"finished once, and damaged since: {faults[0]}", folder, "--overwrite makes it anew")
    return dataclasses.replace(plan, shards=there, manifest=manifest)


def _differences(found: dict, shards: int, plan: Plan) -> list[str]:
    then, now = found["source"], plan.source
    keys = sorted({*then["fingerprint"], *now["fingerprint"]})
    others = [key for key in keys if then["fingerprint"].get(key) != now["fingerprint"].get(key)]
    told = [f"SOURCE was {then['described']} and is {now['described']} (other {', '.join(others)})"] * bool(others)
    for key, value in plan.settings.items():
        if found["settings"].get(key) != value:
            told.append(f"{key} was {found['settings'].get(key)} and is {value}")
    if plan.classes and found["classes"] != plan.classes:
        told.append(f"there were {len(found['classes'])} classes and are {len(plan.classes)}, or others")
    if plan.shards not in (0, shards):
        told.append(f"shards was {shards} and is {plan.shards}")
    return told


def begin(plan: Plan, source) -> tuple[list[Task], dict[Task, Statistics]]:
    """All shards of a plan, and what is done of them; the number of shards is decided here, once."""
    with told_of_disk(plan.folder):
        os.makedirs(plan.folder, exist_ok=True)
        remove_hidden(plan.folder)
        if plan.overwrite:
            for name in _names(plan.folder):
                if SHARD.fullmatch(name) or name == "refused.csv":
                    os.unlink(os.path.join(plan.folder, name))
            remove_hidden(plan.folder, SIDECARS)
            for name in (PLAN, MANIFEST):  # last, for they say whose folder it is, if this is killed
                Path(plan.folder, name).unlink(missing_ok=True)
    if not os.path.exists(os.path.join(plan.folder, PLAN)):
        plan.shards = plan.shards or _suitable_shards(source, plan.settings)
        content = dataclasses.asdict(plan)
        write_json(os.path.join(plan.folder, PLAN), {key: content[key] for key in PLANNED} | HEAD)
    tasks = make_tasks(plan.folder, len(source), plan.shards)
    return tasks, {task: made for task in tasks if (made := read_statistics(task))}


def _suitable_shards(source, settings: dict) -> int:
    """So many that each has about SHARD_BYTES, by the first images, and that small data occupy several workers too."""
    sizes = []
    for i in range(min(SAMPLES, len(source))):
        with contextlib.suppress(BadImage, OSError):
            sizes.append(len(shrink(source[i]["image"], **settings)[0]["image"]))
    by_size = math.ceil(len(source) * np.mean(sizes or [0]) / SHARD_BYTES)
    return min(MAX_SHARDS, max(1, by_size, min(FEW_SHARDS, len(source) // FEW_IMAGES)))


def finish(plan: Plan, tasks: list[Task]) -> tuple[dict, Statistics]:
    """Write `refused.csv` and the manifest, which says that all is there: the manifest, and statistics of all."""
    done = [read_statistics(task) for task in tasks]
    if None in done:
        raise DataError("a shard has vanished", tasks[done.index(None)].path, "the same command makes it again")
    channels = range(plan.settings["channels"])
    made = Statistics(
        **{key: sum(getattr(one, key) for one in done) for key in ("count", "bytes", "source_bytes", "kept", "pixels")},
        sums=[sum(one.sums[c] for one in done) for c in channels],
        squares=[sum(one.squares[c] for one in done) for c in channels],
        refused=[fault for one in done for fault in one.refused],
        largest_label=max(one.largest_label for one in done),
    )
    if not plan.classes and made.largest_label >= MAX_CLASSES:
        fix = "give a SOURCE whose labels count its classes"
        raise DataError(f"a label is {made.largest_label}", plan.source["described"], fix)
    if not made.count:
        name, reason = made.refused[0]
        raise DataError(
            f"no image can be used, the first being {name!r} ({reason})", plan.source["described"], "mend it"
        )
    table = io.StringIO()
    csv.writer(table).writerows([["name", "reason"], *made.refused])
    write_whole(os.path.join(plan.folder, "refused.csv"), table.getvalue())
    mean = [total / made.pixels / 255 for total in made.sums]
    # in whole numbers up to here: a difference of two large ones
    variance = [made.pixels * square - total**2 for total, square in zip(made.sums, made.squares, strict=True)]
    names = ("array_record", "pillow", "simplejpeg", "cykooz_resizer", "numpy")
    manifest = HEAD | {
        "source": plan.source,
        "settings": plan.settings,
        "count": made.count,
        "classes": plan.classes or [str(label) for label in range(made.largest_label + 1)],
        "channels": len(channels),
        "mean": mean,
        "std": [math.sqrt(value) / made.pixels / 255 for value in variance],
        "bytes": made.bytes,
        "shards": [
            {"file": os.path.basename(task.path), "count": one.count, "bytes": one.bytes, "sha256": one.sha256}
            for task, one in zip(tasks, done, strict=True)
        ],
        "refused": len(made.refused),
        "made": {
            "date": f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
            "versions": {name: metadata.version(name) for name in names},
        },
    }
    write_json(os.path.join(plan.folder, MANIFEST), manifest)
    leave_finished(plan.folder)
    return manifest, made


def leave_finished(folder: str) -> None:
    """Remove what only an unfinished folder needs."""
    for pattern in (".*.partial", SIDECARS, PLAN):
        remove_hidden(folder, pattern)


def read_plan(folder: str) -> dict:
    """The plan of an unfinished folder; {} where there is none. Raises DataError for one that is not ours."""
    return _read(folder, PLAN, {"source": dict, "settings": dict, "classes": list, "shards": int})


def read_manifest(folder: str) -> dict:
    """The manifest of a finished folder; {} where there is none. Raises DataError for one that is not ours."""
    return _read(folder, MANIFEST, {"source": dict, "settings": dict, "classes": list, "shards": list, "count": int})


def _read(folder: str, name: str, fields: dict[str, type]) -> dict:
    path = os.path.join(folder, name)
    try:
        content = json.loads(Path(path).read_bytes())
        if any(content[key] != value for key, value in HEAD.items()):
            raise ValueError(f"format {content['format']!r}, version {content['version']!r}")
        for key, kind in fields.items():
            if not isinstance(content[key], kind):
                raise ValueError(f"{key} is no {kind.__name__}")
        if not {"described", "fingerprint"} <= set(content["source"]):
            raise ValueError("source is not as prepare writes it")
        for shard in content["shards"] if name == MANIFEST else ():
            if not SHARD.fullmatch(shard["file"]) or not {"count", "bytes", "sha256"} <= set(shard):
                raise ValueError("a shard is not as prepare writes it")
        return content
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        what = f"not what prepare has written: {type(error).__name__}: {error}"
        raise DataError(what, path, "give another DEST, or remove this one") from error


def _names(folder: str) -> set[str]:
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


def _not_ours(folder: str, name: str) -> ConfigError:
    what = f"it holds {os.path.basename(name)!r}, which prepare has not written"
    return ConfigError(what, folder, "give another DEST, empty or new")


# --- what has become of it since


def missing_shards(folder: str, manifest: dict) -> list[str]:
    """What is wrong with shards, to judge by their sizes."""
    faults = []
    for shard in manifest["shards"]:
        try:
            size = os.path.getsize(os.path.join(folder, shard["file"]))
        except OSError as error:
            faults.append(f"{shard['file']}: {error.strerror}")
            continue
        if size != shard["bytes"]:
            faults.append(f"{shard['file']}: {size} bytes, where {shard['bytes']} were written")
    return faults


def damaged_shards(folder: str, *, workers: int) -> list[str]:
    """What is wrong with a folder, to judge by every byte, by the number of records, and by surplus files."""
    manifest = read_manifest(folder)
    if not manifest:
        return ["unfinished: the command that began it goes on"]
    faults = missing_shards(folder, manifest)
    missing = {fault.split(":")[0] for fault in faults}
    there = [shard for shard in manifest["shards"] if shard["file"] not in missing]
    with ThreadPoolExecutor(workers) as threads:  # hashing holds no lock
        faults += filter(None, threads.map(lambda shard: _damage(folder, shard), there))
    count = sum(shard["count"] for shard in manifest["shards"])
    if count != manifest["count"]:
        faults.append(f"{MANIFEST}: {manifest['count']} images, where its shards have {count}")
    surplus = {name for name in _names(folder) if SHARD.fullmatch(name)} - {s["file"] for s in manifest["shards"]}
    return sorted(faults) + [f"{name}: not in the manifest" for name in sorted(surplus)]


def _damage(folder: str, shard: dict) -> str:
    path = os.path.join(folder, shard["file"])
    try:
        if hash_of(path) != shard["sha256"]:
            return f"{shard['file']}: its bytes have changed"
        reader = ArrayRecordReader(os.fsencode(path))
        count = reader.num_records()
        reader.close()
    except (OSError, RuntimeError) as error:
        return f"{shard['file']}: {getattr(error, 'strerror', None) or error}"
    return "" if count == shard["count"] else f"{shard['file']}: {count} records, where {shard['count']} were written"
