"""Shards: a contiguous range of a source becomes one ArrayRecord file, in several processes, and can be checked later.

A shard is there whole or not at all: it grows as a hidden `.partial`, is renamed when it is on the disk, and then its
`Statistics` follow in a hidden sidecar. A shard with a sidecar is done, whoever was killed when. What is in a shard
is a function of the source, the range and the settings alone, so that a resumed folder equals an unbroken one.

Letters of shapes: h height, w width, c channels.
"""

import contextlib
import csv
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib import metadata
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import ExifTags, Image

from simmim_jax.data.decode import FORMATS, BadImage, decode
from simmim_jax.data.transforms import resize
from simmim_jax.data.workers import init_worker
from simmim_jax.errors import BusyError, ConfigError, DataError, UserError

HEAD = {"format": "simmim_jax.prepared", "version": 1}
LOCK, PLAN, MANIFEST, SIDECARS = ".prepare.lock", ".prepare.json", "manifest.json", ".part-*.json"
PLANNED = ("source", "settings", "classes", "shards")
OPTIONS = "group_size:1,uncompressed"  # of ArrayRecord: a record is read alone, and a JPEG is compressed already
KEPT_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # a phone's MPO is a JPEG with further ones behind it
MODES = {1: ("L",), 3: ("RGB", "L")}  # of files that keep their bytes, by channels
LONGEST_JPEG = 65500  # pixels of a side, libjpeg's
SHARD_BYTES, MOST_SHARDS = 256 * 2**20, 1024
FEW_SHARDS, FEW_IMAGES = 16, 500  # of small data: up to so many shards, of no fewer images each
MOST_CLASSES = 1_000_000  # where labels come without names
SAMPLES = 32  # images that tell how large all will be
TOLD_EVERY = 0.25  # seconds between two messages of a worker
SHARD = re.compile(r"part-\d{5,}-of-\d{5,}\.array_record")
SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclasses.dataclass(frozen=True)
class Task:
    """The records [start, stop) of a source, and the file that they go to."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass
class Statistics:
    """What a shard holds: `sums` and `squares` are per channel, exact, of all its `pixels` on the scale 0..255."""

    count: int = 0
    bytes: int = 0
    sha256: str = ""
    source_bytes: int = 0
    kept: int = 0
    largest_label: int = -1
    pixels: int = 0
    sums: list[int] = dataclasses.field(default_factory=list)
    squares: list[int] = dataclasses.field(default_factory=list)
    refused: list[list[str]] = dataclasses.field(default_factory=list)  # [name, reason]


def make_tasks(folder: str, count: int, shards: int) -> list[Task]:
    """So many shards of `folder`, as equal as can be, that cover `count` records in their order."""
    bounds = [shard * count // shards for shard in range(shards + 1)]
    names = (f"part-{shard:05d}-of-{shards:05d}.array_record" for shard in range(shards))
    return [
        Task(os.path.join(folder, name), *bound) for name, bound in zip(names, itertools.pairwise(bounds), strict=True)
    ]


# --- one image


def shrink(
    image: bytes | np.ndarray, *, short_side: int, quality: int, subsampling: str, channels: int, max_pixels: int
) -> tuple[dict, np.ndarray]:
    """What is stored of an image, {"image": bytes} or {"image": raw bytes, "shape": [h, w, c]}, and uint8 [h, w, c].

    The shorter side becomes `short_side` where it is longer (0: never), by antialiased bicubic. A JPEG, PNG or WebP
    that is as wanted already keeps its bytes; what is made anew is a JPEG, or, where no JPEG is that long, a PNG.
    Channels other than 1 and 3 are stored raw. Raises BadImage.
    """
    pixels = decode(image, channels, max_pixels)
    height, width = pixels.shape[:2]
    is_small = not 0 < short_side < min(height, width)
    if is_small and isinstance(image, bytes) and _may_keep(image, channels):
        return {"image": image}, pixels
    if not is_small:
        scale = short_side / min(height, width)
        pixels = resize(pixels, (max(1, round(height * scale)), max(1, round(width * scale))))
    if channels not in MODES:
        return {"image": pixels.tobytes(), "shape": list(pixels.shape)}, pixels
    picture, file = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), io.BytesIO()
    if max(picture.size) > LONGEST_JPEG:
        picture.save(file, "PNG")
    else:
        # Pillow, for simplejpeg at the same quality is 2 % faster end to end, with more error in as many bytes
        picture.save(file, "JPEG", quality=quality, subsampling={"420": "4:2:0", "444": "4:4:4"}[subsampling])
    return {"image": file.getvalue()}, pixels


def _may_keep(data: bytes, channels: int) -> bool:
    """Whether the bytes, which have been decoded, are of a format, mode and orientation that need no change."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.format not in KEPT_FORMATS or picture.mode not in MODES.get(channels, ()):
        return False
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        return False
    return picture.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """How often each value occurs in each channel: int64 [c, 256]."""
    # Pillow counts several times as fast as numpy
    planes = [pixels] if pixels.shape[2] == 3 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    return np.concatenate([Image.fromarray(plane).histogram() for plane in planes]).reshape(-1, 256)


# --- one shard


def write_shard(source, task: Task, settings: dict, labels: list[int], tell: Callable[[int, list], None]) -> None:
    """Write a shard and its sidecar.

    Args:
      settings: the arguments of `shrink`.
      labels: what the source's labels become; empty where they stay.
      tell: called now and then with the number of further records that are done, and [name, reason] of the refused
        among them. What it raises ends the shard, unwritten.

    Raises:
      DataError: where the shard cannot be written, or the source says so.
    """
    partial = hidden(task.path, f"{os.getpid()}.partial")
    made, levels = Statistics(), np.zeros((settings["channels"], 256), np.int64)
    told, told_refused, told_at = task.start, 0, time.monotonic()
    with told_of_disk(task.path):
        writer = ArrayRecordWriter(os.fsencode(partial), OPTIONS)
    try:
        for i in range(task.start, task.stop):
            try:
                with warnings.catch_warnings(category=UserWarning, action="ignore"):  # Pillow's, of what it forgives
                    record = source[i]
                    stored, pixels = shrink(record["image"], **settings)
            except (BadImage, OSError) as error:
                made.refused.append([source.name(i), _reason(error)])
            else:
                label = int(record["label"])
                label = labels[label] if labels and label >= 0 else label
                stored |= {"label": label, "name": record["name"]}
                with told_of_disk(task.path):
                    writer.write(msgpack.packb(stored, unicode_errors="surrogateescape"))
                made.count += 1
                made.largest_label = max(made.largest_label, label)
                made.kept += stored["image"] is record["image"]
                made.source_bytes += size_of(record["image"])
                made.pixels += pixels.shape[0] * pixels.shape[1]
                levels += _histograms(pixels)
            if time.monotonic() > told_at + TOLD_EVERY or i + 1 == task.stop:
                tell(i + 1 - told, made.refused[told_refused:])
                told, told_refused, told_at = i + 1, len(made.refused), time.monotonic()
        values = np.arange(256)
        made.sums, made.squares = (levels @ values).tolist(), (levels @ values**2).tolist()
        with told_of_disk(task.path):
            writer.close()  # here, at the latest, it says that the disk is full
            made.bytes, made.sha256 = os.path.getsize(partial), _hash(partial, sync=True)
            os.replace(partial, task.path)
            write_json(hidden(task.path, "json"), dataclasses.asdict(made))
    finally:
        with contextlib.suppress(RuntimeError):
            writer.close()
        Path(partial).unlink(missing_ok=True)


def read_statistics(task: Task) -> Statistics | None:
    """Those of a shard that is done, else None."""
    try:
        made = Statistics(**json.loads(Path(hidden(task.path, "json")).read_bytes()))
        return made if os.path.getsize(task.path) == made.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def hidden(path: str, suffix: str) -> str:
    """The hidden companion of a file, beside it."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name.lstrip('.')}.{suffix}")


def write_json(path: str, content: dict) -> None:
    """Write a file that is there whole or not at all."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_whole(path: str, text: str) -> None:
    """Write a file that is there whole or not at all; bytes of a name that are no UTF-8 stay as they are."""
    partial = hidden(path, f"{os.getpid()}.partial")
    with told_of_disk(path):
        with open(partial, "w", encoding="utf-8", errors="surrogateescape", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)


@contextlib.contextmanager
def told_of_disk(path: str) -> Iterator[None]:
    """Raises DataError for what keeps `path` from being written."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError, with the reason within
        reason = str(getattr(error, "strerror", None) or error).split(";")[0][:200]
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(os.path.dirname(path)).free / 2**20:.0f} MiB free)"
        fix = "make room or mend the folder: the same command goes on, and what is done stays"
        raise DataError(f"cannot write: {reason}", path, fix) from error


def size_of(image: bytes | np.ndarray) -> int:
    """Bytes of an image as a source gives it."""
    return image.nbytes if isinstance(image, np.ndarray) else len(image)


def _reason(error: Exception) -> str:
    reason = str(getattr(error, "strerror", None) or error)
    return "".join(letter if letter.isprintable() else "?" for letter in reason)  # parsers quote what they stumble on


def _hash(path: str, *, sync: bool = False) -> str:
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- many shards


def write_shards(
    source,
    tasks: list[Task],
    settings: dict,
    labels: list[int],
    *,
    workers: int,
    tell: Callable[[int, list], None],
    poll: Callable[[], None],
) -> None:
    """Write shards in so many processes, or in this one (0). Raises what ends it early, when all workers have ended.

    tell: as for `write_shard`. poll: called a few times in a second; what it raises ends all.
    """

    def tell_and_poll(count: int, refused: list) -> None:
        tell(count, refused)
        poll()

    if not workers:
        for task in tasks:
            write_shard(source, task, settings, labels, tell_and_poll)
        return
    context, workers = multiprocessing.get_context("spawn"), min(workers, len(tasks))
    waiting, busy, work = deque(tasks), {}, ForkingPickler.dumps((source, settings, labels))
    try:
        # Blocked in a worker from its birth: ^C goes to all processes of a terminal, and is answered by this one alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            for _ in range(workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
                process.start()
                theirs.close()
                busy[ours] = process, None
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        while busy:
            poll()
            for pipe in connection.wait(list(busy), timeout=TOLD_EVERY):
                process, task = busy[pipe]
                with _told_of_death(process, task):
                    message = pipe.recv()
                    if message is None and waiting:  # it asks for a shard, and at first for what they are made of
                        if not task:
                            pipe.send_bytes(work)
                        busy[pipe] = process, waiting.popleft()
                        pipe.send(busy[pipe][1])
                if isinstance(message, Exception):
                    raise message
                if message:
                    tell(*message)
                elif not waiting and busy[pipe][1] is task:
                    _end([busy.pop(pipe)])
    finally:
        _end(busy.values())


def _end(workers: Iterable[tuple]) -> None:
    for process, _ in workers:
        process.kill()  # what it has finished is on the disk
    for process, task in workers:
        process.join()
        if task:
            remove_hidden(os.path.dirname(task.path), f".*.{process.pid}.partial")


def _work(pipe, main: int) -> None:
    """A worker: shard after shard, until it is killed, or `main` is no more."""
    init_worker(0, 0, main=main)
    try:
        pipe.send(None)
        source, settings, labels = ForkingPickler.loads(pipe.recv_bytes())
        while True:
            write_shard(source, pipe.recv(), settings, labels, lambda *news: pipe.send(news))
            pipe.send(None)
    except UserError as error:
        pipe.send(error)
    except MemoryError:
        pipe.send(DataError("not enough memory", "in a worker", "set --workers or --max-pixels lower"))
    except Exception:
        pipe.send(RuntimeError(f"in a worker:\n{traceback.format_exc()}"))


@contextlib.contextmanager
def _told_of_death(process, task: Task | None) -> Iterator[None]:
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(5)
        code = process.exitcode
        name = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        fix = "likely out of memory: set --workers lower" if code == -signal.SIGKILL else "see the lines above"
        where = f"while it made {task.path}" if task else ""
        raise DataError(f"worker {process.pid} {name}", where, f"{fix}; the same command goes on") from error


def remove_hidden(folder: str, pattern: str = ".*.partial") -> None:
    """Remove what killed processes have left half written, or other hidden files of ours."""
    for path in Path(folder).glob(pattern):
        path.unlink(missing_ok=True)


# --- a folder of shards


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
    return min(MOST_SHARDS, max(1, by_size, min(FEW_SHARDS, len(source) // FEW_IMAGES)))


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
    if not plan.classes and made.largest_label >= MOST_CLASSES:
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
        if _hash(path) != shard["sha256"]:
            return f"{shard['file']}: its bytes have changed"
        reader = ArrayRecordReader(os.fsencode(path))
        count = reader.num_records()
        reader.close()
    except (OSError, RuntimeError) as error:
        return f"{shard['file']}: {getattr(error, 'strerror', None) or error}"
    return "" if count == shard["count"] else f"{shard['file']}: {count} records, where {shard['count']} were written"
