"""Shards: a contiguous range of a source becomes one ArrayRecord file, in several processes, and can be checked later.

A shard is there whole or not at all: it grows as a hidden `.partial`, is renamed when it is on the disk, and then its
`Statistics` follow in a hidden sidecar. A shard with a sidecar is done, whoever was killed when. What is in a shard
is a function of the source, the range and the settings alone, so that a resumed folder equals an unbroken one.

Letters of shapes: h height, w width, c channels.
"""

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing import connection
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import ExifTags, Image

from simmim_jax.data.decode import FORMATS, BadImage, decode
from simmim_jax.data.transforms import resize
from simmim_jax.data.workers import init_worker
from simmim_jax.errors import DataError, UserError

OPTIONS = "group_size:1,uncompressed"  # of ArrayRecord: a record is read alone, and a JPEG is compressed already
KEPT_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # a phone's MPO is a JPEG with further ones behind it
MODES = {1: ("L",), 3: ("RGB", "L")}  # of files that keep their bytes, by channels
LONGEST_JPEG = 65500  # pixels of a side, libjpeg's
TOLD_EVERY = 0.25  # seconds between two messages of a worker
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
            made.bytes, made.sha256 = os.path.getsize(partial), hash_of(partial, sync=True)
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


def hash_of(path: str, *, sync: bool = False) -> str:
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
