"""The folder OUT.parts: finished parts of an export, from which an interrupted command continues.

`manifest.json` records what the parts are made from. `part-N.parquet` has the rows of `part_size` records. A part is
written completely or not at all, and so is OUT.
"""

import itertools
import json
import math
import shutil
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from simmim_jax.errors import ConfigError, DataError, NonFiniteError
from simmim_jax.files import write_atomically
from simmim_jax.tools import images
from simmim_jax.tools.cli import Progress
from simmim_jax.tools.embed.embeddings import JOINERS, KEY, Rows, make_table

MAX_PART_ROWS, MAX_PART_BYTES = 1024, 2**25
MAX_FLOAT16 = 65520  # smallest number that rounds to infinity


class LeftOut(NamedTuple):
    """An image that could not be read."""

    index: int
    name: str


class View:
    """Records of a source: `count` of them, evenly spaced, from number `start` on."""

    def __init__(self, source, count: int, start: int):
        self.source, self.count, self.start, self.classes = source, count, start, source.classes

    def index(self, i: int) -> int:
        """Return the index of record `i` in the source."""
        return (self.start + i) * len(self.source) // self.count

    def __len__(self) -> int:
        return self.count - self.start

    def __getitem__(self, i: int) -> dict:
        return self.source[self.index(i)]

    def name(self, i: int) -> str:
        return self.source.name(self.index(i))

    def describe(self) -> str:
        return self.source.describe()


def part_size(shape: tuple[int, ...], batch_size: int) -> int:
    """Return the records of a part: whole batches, so that a continued export has the batches of an unbroken one."""
    rows = min(MAX_PART_ROWS, MAX_PART_BYTES // (4 * math.prod(shape)))
    return max(1, rows // batch_size) * batch_size


def begin(folder: Path, made_from: dict, size: int, overwrite: bool = False) -> int:
    """Write the manifest, or compare it with `made_from`. Return the records per part, as the export began.

    overwrite: remove parts that were made from something else. Raises ConfigError or DataError.
    """
    path = folder / "manifest.json"
    if path.exists():
        try:
            manifest = json.loads(path.read_text())
            refuse_difference(manifest["made_from"], made_from, str(folder))
            return manifest["part_size"]
        except (ConfigError, DataError, ValueError, KeyError):
            if not overwrite:
                raise
        remove_parts(folder)
    if any(child.name != "LOCK" and not child.name.endswith(".partial") for child in folder.iterdir()):
        raise ConfigError("a folder that embed did not create", str(folder), "move it away, or give another OUT")
    text = json.dumps({"made_from": made_from, "part_size": size}, indent=2)
    write_atomically(path, lambda partial: partial.write_text(text + "\n"))
    return size


def refuse_difference(before: dict, now: dict, where: str) -> None:
    """Raise ConfigError, or DataError if only the images differ, if an earlier export was made from something else."""
    now = json.loads(json.dumps(now))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return
    long = {"weights": "other weights", "data": "other images", "encoder": "another encoder"}
    short = [name for name in changed if name not in long]
    values = [f"{name} {json.dumps(before.get(name))} then, {json.dumps(now.get(name))} now" for name in short]
    what = ", ".join([long[name] for name in changed if name in long] + values)
    kind = DataError if changed == ["data"] else ConfigError
    raise kind(f"made from something else: {what}", where, "give the same options, another OUT, or --overwrite")


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def finished_parts(folder: Path) -> int:
    """Return the number of complete parts, from the first on. Remove damaged parts and those after a gap."""
    for number in itertools.count():
        try:
            read_left_out(part_path(folder, number))
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError):
            break
    for path in folder.glob("part-*"):
        if path.name >= part_path(folder, number).name:
            path.unlink()
    return number


def read_left_out(path: Path) -> list[LeftOut]:
    """Return the unreadable images of a part."""
    return [LeftOut(*each) for each in json.loads(pyarrow.parquet.read_schema(path).metadata[KEY])]


def write_part(folder: Path, number: int, rows: Rows, classes: tuple[str, ...], left_out: list[LeftOut]) -> None:
    """Write part `number` atomically."""
    table = make_table(rows, classes).replace_schema_metadata({KEY: json.dumps(left_out)})
    write_atomically(part_path(folder, number), lambda partial: pyarrow.parquet.write_table(table, partial))


def write_parts(
    folder: Path, source, count: int, size: int, embed_batches: Callable, options: Namespace
) -> list[LeftOut]:
    """Write the missing parts. Return the unreadable images of all parts.

    embed_batches(view): the batches of `encoding.embed_batches`.
    """
    done = finished_parts(folder)
    left_out = [each for n in range(done) for each in read_left_out(part_path(folder, n))]
    images.check_left_out(len(left_out), count, options.max_bad_fraction, source)
    start = min(done * size, count)
    if start == count:
        return left_out
    if start:
        print(f"continuing from image {start:,} of {count:,}", file=sys.stderr)
    view, labeled = View(source, count, start), bool(source.classes) or images.has_labels(source)
    progress = Progress("embed", count, start, len(left_out))
    waiting = []  # batches of a part that is not complete yet
    try:
        for batch in embed_batches(view):
            waiting.append(batch)
            end = start + int(batch[0][-1]) + 1
            while done * size < count and end >= min((done + 1) * size, count):
                last = min((done + 1) * size, count)
                rows, faults, rest = cut(waiting, last - start, view, labeled, options.dtype)
                left_out += faults
                # before writing: a fault may pass, as of a network disk
                images.check_left_out(len(left_out), count, options.max_bad_fraction, source)
                write_part(folder, done, rows, source.classes, faults)
                progress.add(last - progress.done, len(faults))
                done, waiting = done + 1, [rest]
    finally:
        progress.close()
    return left_out


def cut(batches: list[tuple], last: int, view: View, labeled: bool, dtype: str) -> tuple:
    """Return (the rows before index `last` of the view, the unreadable images among them, the rest as one batch)."""
    arrays = [np.concatenate(columns) for columns in zip(*batches, strict=True)]
    keep = arrays[0] < last
    indices, valid, labels, embedding = (array[keep] for array in arrays)
    index = np.array([view.index(i) for i in indices.tolist()], np.int64)
    names = [view.name(i) for i in indices.tolist()]
    faults = [LeftOut(int(n), name) for n, name, good in zip(index, names, valid, strict=True) if not good]
    names = [name for name, good in zip(names, valid, strict=True) if good]
    numbers = cast(embedding[valid], dtype, names)
    rows = Rows(index[valid], names, labels[valid] if labeled else None, numbers)
    return rows, faults, tuple(array[~keep] for array in arrays)


def cast(numbers: np.ndarray, dtype: str, names: list[str]) -> np.ndarray:
    """Round to `dtype`. Raises NonFiniteError, with the name of the image, if the result is not finite."""
    largest = np.abs(numbers).max(axis=tuple(range(1, numbers.ndim)), initial=0.0)  # per image
    for name, value in zip(names, largest, strict=True):
        if not np.isfinite(value):
            raise NonFiniteError("embeddings are not finite", name, "check whether the run diverged")
        if dtype == "float16" and value >= MAX_FLOAT16:
            raise NonFiniteError("embeddings overflow float16", name, "give --normalize, or --dtype=float32")
    return numbers.astype(dtype)


def join(folder: Path, count: int, out: Path, about: dict) -> None:
    """Write OUT from `count` parts, with the metadata `about`. One part at a time is in memory."""
    paths = [part_path(folder, number) for number in range(count)]
    write_atomically(folder / "whole", lambda partial: JOINERS[out.suffix](paths, partial, about))
    (folder / "whole").replace(out)
    shutil.rmtree(folder)


def remove_parts(folder: Path) -> None:
    """Remove what an export wrote into the folder, the manifest last. Other files stay."""
    for path in [*folder.glob("*.partial"), *folder.glob("part-*"), folder / "whole", folder / "manifest.json"]:
        path.unlink(missing_ok=True)
