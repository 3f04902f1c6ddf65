"""Shards: a contiguous range of a source becomes one ArrayRecord file, in several processes.

A shard exists completely or not at all. It grows as a hidden `.partial`, is renamed when it is on the disk, and then
its `Statistics` follow in a hidden sidecar. A shard with a sidecar is finished, even if a process is killed later. The
bytes of a shard are a function of the source, the range and the settings only, so a resumed folder equals an unbroken
one.

The pool of processes is not `concurrent.futures`: that can neither name the worker that died and its signal, nor kill
workers, nor report progress without a queue whose lock a killed worker may hold.

Shapes: h height, w width, c channels.
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
from typing import NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import ExifTags, Image

from simmim_jax.data.decode import FORMATS, BadImage, Samples, decode
from simmim_jax.data.prepared import pack_record
from simmim_jax.data.rasters import PNG_SIGNATURE, open_raster
from simmim_jax.data.transforms import resize
from simmim_jax.data.workers import init_worker
from simmim_jax.errors import DataError, UserError
from simmim_jax.files import write_atomically

OPTIONS = "group_size:1,uncompressed"  # of ArrayRecord: each record is read separately, and JPEGs are compressed
KEPT_FORMATS = ("JPEG", "MPO", "PNG", "WEBP")  # an MPO of a phone is a JPEG followed by others
MODES = {1: ("L",), 3: ("RGB", "L")}  # of 8-bit files that keep their bytes, by channels
SIXTEEN_BITS = ("I;16", "I;16B")  # of gray files
SUBSAMPLING = {"420": "4:2:0", "444": "4:4:4"}
MAX_JPEG_SIDE = 65500  # pixels, a limit of libjpeg
REPORT_PERIOD = 0.25  # seconds between two messages of a worker
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Report = Callable[[int, list], None]  # (number of further records, [name, reason] of the refused ones among them)


class Settings(NamedTuple):
    """What decides the bytes of a stored image.

    short_side: pixels of the shorter side of larger images; 0: never resized.
    quality, subsampling: of JPEG.
    max_pixels: images with more pixels are bad images.
    samples: what each image must have, apart from the number of channels.
    """

    short_side: int
    quality: int
    subsampling: str
    channels: int
    max_pixels: int
    samples: Samples = Samples()

    def as_json(self) -> dict:
        """The fields that plans and manifests have as "settings"; `samples` is in their "pixels"."""
        return {name: value for name, value in self._asdict().items() if name != "samples"}


class Task(NamedTuple):
    """The records [start, stop) of a source, and the shard for them."""

    path: str
    start: int
    stop: int


@dataclasses.dataclass
class Statistics:
    """The content of a shard.

    `sums` and `squares` are exact, per channel, over all `pixels` with values 0..255; [] for others than 8-bit images.
    """

    count: int = 0
    bytes: int = 0
    sha256: str = ""
    source_bytes: int = 0
    kept: int = 0  # images whose file bytes did not change
    max_label: int = -1
    pixels: int = 0
    sums: list[int] = dataclasses.field(default_factory=list)
    squares: list[int] = dataclasses.field(default_factory=list)
    refused: list[list[str]] = dataclasses.field(default_factory=list)  # [name, reason]


def make_tasks(folder: str, count: int, shards: int) -> list[Task]:
    """Divide `count` records into shards of nearly equal size, in order."""
    bounds = [shard * count // shards for shard in range(shards + 1)]
    names = (f"part-{shard:05d}-of-{shards:05d}.array_record" for shard in range(shards))
    ranges = zip(names, itertools.pairwise(bounds), strict=True)
    return [Task(os.path.join(folder, name), *bound) for name, bound in ranges]


# --- one image


def shrink(image: bytes | np.ndarray, settings: Settings) -> tuple[dict, np.ndarray]:
    """({"image": file bytes} or {"image": raw bytes, "shape": [h, w, c], "dtype"}, the pixels [h, w, c]).

    The shorter side becomes `short_side` if it is longer, by antialiased bicubic. A JPEG, PNG or WebP that needs no
    change keeps its bytes. Others become a JPEG, or a PNG if they are too long for a JPEG. Images of other than 8
    bits, or other than 1 or 3 channels, are stored raw. Raises BadImage.
    """
    channels, samples = settings.channels, settings.samples
    pixels = decode(image, channels, settings.max_pixels, samples)
    height, width = pixels.shape[:2]
    is_small = not 0 < settings.short_side < min(height, width)
    is_file = isinstance(image, bytes) and not samples.bands
    if is_small and is_file and _may_keep(image, MODES.get(channels, ()) if samples.dtype == "uint8" else SIXTEEN_BITS):
        return {"image": image}, pixels
    if not is_small:
        scale = settings.short_side / min(height, width)
        size = max(1, round(height * scale)), max(1, round(width * scale))
        pixels = resize(pixels, size, missing=samples.missing)
    if channels not in MODES or samples.dtype != "uint8":
        dtype = {} if samples.dtype == "uint8" else {"dtype": samples.dtype}
        return {"image": pixels.tobytes(), "shape": list(pixels.shape), **dtype}, pixels
    picture, file = Image.fromarray(pixels[:, :, 0] if channels == 1 else pixels), io.BytesIO()
    if max(picture.size) > MAX_JPEG_SIDE:
        picture.save(file, "PNG")
    else:
        # not simplejpeg: it saves 2 % of the total time, and has a larger error for the same number of bytes
        picture.save(file, "JPEG", quality=settings.quality, subsampling=SUBSAMPLING[settings.subsampling])
    return {"image": file.getvalue()}, pixels


def _may_keep(data: bytes, modes: tuple[str, ...]) -> bool:
    """Whether decodable bytes need no change of format, mode or orientation."""
    if not modes or (open_raster(data) and not data.startswith(PNG_SIGNATURE)):
        return False
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.format not in KEPT_FORMATS or picture.mode not in modes:
        return False
    if picture.format != "MPO" and getattr(picture, "n_frames", 1) > 1:
        return False
    return picture.getexif().get(ExifTags.Base.Orientation, 1) == 1


def _histograms(pixels: np.ndarray) -> np.ndarray:
    """The number of pixels with each value by channel: int64 [c, 256]."""
    # Pillow counts several times faster than numpy
    planes = [pixels] if pixels.shape[2] == 3 else np.ascontiguousarray(np.moveaxis(pixels, 2, 0))
    return np.concatenate([Image.fromarray(plane).histogram() for plane in planes]).reshape(-1, 256)


# --- one shard


def write_shard(source, task: Task, settings: Settings, labels: list[int], report: Report) -> None:
    """Write a shard and its sidecar.

    Args:
      labels: the new label of each label of the source; empty if labels do not change.
      report: called at intervals. If it raises, the shard is not written.

    Raises DataError if the shard cannot be written, or the source raises it.
    """
    partial = _hidden(task.path, f"{os.getpid()}.partial")
    made, levels = Statistics(), np.zeros((settings.channels, 256), np.int64)
    reported, reported_refused, last_report = task.start, 0, time.monotonic()
    with disk_errors(task.path):
        writer = ArrayRecordWriter(os.fsencode(partial), OPTIONS)
    try:
        for i in range(task.start, task.stop):
            try:
                with warnings.catch_warnings(category=UserWarning, action="ignore"):  # of Pillow for tolerated faults
                    record = source[i]
                    stored, pixels = shrink(record["image"], settings)
            except (BadImage, OSError) as error:
                made.refused.append([source.name(i), _reason(error)])
            else:
                label = int(record["label"])
                label = labels[label] if labels and label >= 0 else label
                with disk_errors(task.path):
                    writer.write(pack_record(stored | {"label": label, "name": record["name"]}))
                made.count += 1
                made.max_label = max(made.max_label, label)
                made.kept += stored["image"] is record["image"]
                made.source_bytes += memoryview(record["image"]).nbytes
                made.pixels += pixels.shape[0] * pixels.shape[1]
                if pixels.dtype == np.uint8:
                    levels += _histograms(pixels)
            if time.monotonic() > last_report + REPORT_PERIOD or i + 1 == task.stop:
                report(i + 1 - reported, made.refused[reported_refused:])
                reported, reported_refused, last_report = i + 1, len(made.refused), time.monotonic()
        if settings.samples.dtype == "uint8":
            values = np.arange(256)
            made.sums, made.squares = (levels @ values).tolist(), (levels @ values**2).tolist()
        with disk_errors(task.path):
            writer.close()  # a full disk is reported here at the latest
            made.bytes, made.sha256 = os.path.getsize(partial), file_hash(partial, sync=True)
            os.replace(partial, task.path)
        write_bytes(_hidden(task.path, "json"), json.dumps(dataclasses.asdict(made)).encode())
    finally:
        with contextlib.suppress(RuntimeError):
            writer.close()
        Path(partial).unlink(missing_ok=True)


def read_statistics(task: Task) -> Statistics | None:
    """The statistics of a finished shard, else None."""
    try:
        made = Statistics(**json.loads(Path(_hidden(task.path, "json")).read_bytes()))
        return made if os.path.getsize(task.path) == made.bytes else None
    except (OSError, ValueError, TypeError):
        return None


def _hidden(path: str, suffix: str) -> str:
    """The path of a hidden file for `path`, in the same folder."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name.lstrip('.')}.{suffix}")


def write_bytes(path: str, content: bytes) -> None:
    """Write a file atomically. Raises DataError."""
    with disk_errors(path):
        write_atomically(Path(path), content)


@contextlib.contextmanager
def disk_errors(path: str) -> Iterator[None]:
    """Raise errors of writing `path` as DataError with the free space."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # ArrayRecord's writer raises RuntimeError with the reason in its text
        reason = str(getattr(error, "strerror", None) or error).split(";")[0][:200]
        with contextlib.suppress(OSError):
            reason += f" ({shutil.disk_usage(os.path.dirname(path)).free / 2**20:.0f} MiB free)"
        fix = "free some space or repair the folder: the same command continues, and finished shards stay"
        raise DataError(f"cannot write: {reason}", path, fix) from error


def _reason(error: Exception) -> str:
    reason = str(getattr(error, "strerror", None) or error)
    return "".join(letter if letter.isprintable() else "?" for letter in reason)  # parsers quote untrusted bytes


def file_hash(path: str, *, sync: bool = False) -> str:
    """SHA-256 of a file, which `sync` writes to the disk first."""
    with open(path, "rb") as file:
        if sync:
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- many shards


def write_shards(
    source,
    tasks: list[Task],
    settings: Settings,
    labels: list[int],
    *,
    workers: int,
    report: Report,
    poll: Callable[[], None],
) -> None:
    """Write shards in `workers` processes; 0: in this one. An error is raised when all workers have ended.

    poll: called several times per second. If it raises, all work ends.
    """

    def report_and_poll(count: int, refused: list) -> None:
        report(count, refused)
        poll()

    if not workers:
        for task in tasks:
            write_shard(source, task, settings, labels, report_and_poll)
        return
    waiting, busy, work = deque(tasks), {}, ForkingPickler.dumps((source, settings, labels))
    try:
        for _ in range(min(workers, len(tasks))):
            pipe, process = _start_worker()
            busy[pipe] = process, None
        while busy:
            poll()
            for pipe in connection.wait(list(busy), timeout=REPORT_PERIOD):
                process, task = busy[pipe]
                with _death_errors(process, task):
                    message = pipe.recv()
                    if message is None and waiting:  # the worker requests a shard, and at first the common arguments
                        if not task:
                            pipe.send_bytes(work)
                        busy[pipe] = process, waiting.popleft()
                        pipe.send(busy[pipe][1])
                if isinstance(message, Exception):
                    raise message
                if message:
                    report(*message)
                elif not waiting and busy[pipe][1] is task:
                    _kill([busy.pop(pipe)])
    finally:
        _kill(busy.values())


def _start_worker() -> tuple:
    """(pipe, process) of a worker in which signals are blocked from the start.

    ^C is sent to all processes of a terminal, but only the main process may handle it.
    """
    context = multiprocessing.get_context("spawn")
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return ours, process
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _kill(workers: Iterable[tuple]) -> None:
    for process, _ in workers:
        process.kill()  # finished shards are on the disk
    for process, task in workers:
        process.join()
        if task:
            remove_hidden(os.path.dirname(task.path), f".*{os.path.basename(task.path)}.*.partial")


def _work(pipe, main: int) -> None:
    """Write one shard after another, until this worker is killed, or the process `main` has ended."""
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
def _death_errors(process, task: Task | None) -> Iterator[None]:
    """Raise the broken pipe of a dead worker as DataError with its signal or exit code."""
    try:
        yield
    except (EOFError, OSError) as error:
        process.join(5)
        code = process.exitcode
        end = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"ended with exit code {code}"
        fix = "likely out of memory: set --workers lower" if code == -signal.SIGKILL else "see the lines above"
        where = f"while it wrote {task.path}" if task else ""
        raise DataError(f"worker {process.pid} {end}", where, f"{fix}; the same command continues") from error


def remove_hidden(folder: str, pattern: str = ".*.partial") -> None:
    """Remove partial files of killed processes, or other hidden files of prepare."""
    for path in Path(folder).glob(pattern):
        path.unlink(missing_ok=True)
