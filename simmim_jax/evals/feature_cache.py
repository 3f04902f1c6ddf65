"""Features of every block of an encoder, on disk: extracted in one pass over the images, once for all their readers.

Layout: FOLDER/<key>/{train,test}_block_NN.npy [m, d], {train,test}_labels.npy int32 [m], meta.json. The key is a hash
of what decides the numbers. A row is the image's place in the pass; label -1: without a label, or unreadable. Arrays
are mapped, not read: ImageNet's 1.28 million images x 12 blocks x 768 numbers x 4 bytes are 47 GB there, half of it as
float16, and a reader holds one block of them in memory. What is being extracted lies in <key>.partial and goes on after
a kill, with batches of any size; meta.json, written last, says which blocks are whole. Of images that cannot be read
there may be few: what a disk that was away for a while left out must not be taken for whole.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.files import write_atomically

FLUSH = 20.0  # seconds between the places from which an extraction that was killed goes on


class Pass(NamedTuple):
    """One pass over `count` images. batches(start): from that batch on, all as large, the last filled up."""

    count: int
    batch_size: int
    batches: Callable[[int], Iterable[dict]]


class FeatureCache(NamedTuple):
    folder: Path

    def labels(self, split: str) -> Int[np.ndarray, " m"]:
        return np.load(self.folder / f"{split}_labels.npy")

    def features(self, split: str, block: int) -> Float[np.ndarray, "m d"]:
        """Mapped from the disk."""
        return np.load(self.folder / file_name(split, block), mmap_mode="r")


def file_name(split: str, block: int) -> str:
    return f"{split}_block_{block:02}.npy"


def key_of(identity: dict) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def open_cache(
    folder: str | Path,
    identity: dict,
    passes: dict[str, Pass],
    extract: Callable[[dict], dict],
    blocks: list[int],
    dtype: str = "float32",
    log: Callable[[str], None] = print,
    max_bad_fraction: int | float = 0.01,
) -> FeatureCache:
    """The cache in `folder` of what `identity`, JSON, names; blocks that it has not yet are extracted from `passes`.

    extract(batch) -> {"block_N" [b, d] for each of the blocks, "label", "batch_index", "valid" [b]}. Other identities in
    the folder stay; what does not is told by `log`. Raises NonFiniteError, DataError where more than
    `max_bad_fraction` of a pass's images cannot be read, and OSError where the disk is full.
    """
    final = Path(folder) / key_of(identity | {"dtype": dtype})
    counts = {split: each.count for split, each in passes.items()}
    allowed = {split: math.ceil(max_bad_fraction * count) for split, count in counts.items()}
    whole, bad_before = _whole(final, counts, allowed)
    missing = [block for block in blocks if block not in whole]
    if not missing:
        log(f"features: {len(blocks)} blocks are there already, in {final}")
        return FeatureCache(final)
    if not whole and (final / "meta.json").exists():
        log(f"features: those in {final} are damaged, or lack more images than are allowed to: all are read again")
    partial = final.with_name(f"{final.name}.partial")
    plan = {"blocks": sorted(missing)}
    done, bad = _progress(partial, plan, log)
    for split, each in passes.items():
        _extract(partial, plan, done, bad, split, each, extract, np.dtype(dtype), log, allowed[split])
        if whole:  # a row is there only if all its blocks are
            path = partial / f"{split}_labels.npy"
            if path.exists():  # else it is merged, and in its place, since before a kill
                labels = np.load(path, mmap_mode="r+")
                labels[np.load(final / path.name) < 0] = -1
                labels.flush()
            bad[split] = max(bad[split], bad_before[split])
    final.mkdir(parents=True, exist_ok=True)
    if not whole:  # else an earlier meta.json would vouch for a part of these, and of those before
        (final / "meta.json").unlink(missing_ok=True)
    for path in partial.glob("*.npy"):
        path.replace(final / path.name)
    meta = {"blocks": sorted({*whole, *missing}), "counts": counts, "bad": bad, "dtype": dtype, "identity": identity}
    write_atomically(final / "meta.json", json.dumps(meta, indent=2) + "\n")
    shutil.rmtree(partial)
    return FeatureCache(final)


def _whole(final: Path, counts: dict[str, int], allowed: dict[str, int]) -> tuple[list[int], dict[str, int]]:
    """(the blocks that are whole, the images of each split that could not be read).

    They are those that meta.json names, where their files are as long as they should be, and no more images than
    `allowed` could not be read.
    """
    try:
        said = json.loads((final / "meta.json").read_text())
        blocks, bad = said["blocks"], said["bad"]
        if any(bad[split] > most for split, most in allowed.items()):
            return [], {}
        for split, count in counts.items():
            for name in (f"{split}_labels.npy", *(file_name(split, block) for block in blocks)):
                if len(np.load(final / name, mmap_mode="r")) != count:
                    return [], {}
    except (OSError, ValueError, KeyError, EOFError):  # the last of a file that is empty
        return [], {}
    return blocks, bad


def _progress(partial: Path, plan: dict, log: Callable[[str], None]) -> tuple[dict[str, int], dict[str, int]]:
    """How many images of each split lie in `partial`, and how many of these could not be read.

    None where it is of another plan, and then it is emptied.
    """
    why = "does not say how far it came"
    try:
        said = json.loads((partial / "progress.json").read_text())
        if sorted(said["blocks"]) == plan["blocks"]:
            return said["images"], said["bad"]
        why = f"is of blocks {', '.join(map(str, said['blocks']))}"
    except (OSError, ValueError, KeyError):
        pass
    if any(partial.glob("*.npy")):
        log(f"features: an unfinished extraction, {partial}, {why}: it is discarded, and all is read anew")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return {}, {}


def _extract(
    partial: Path, plan: dict, done: dict, bad: dict, split: str, images: Pass, extract, dtype, log, allowed: int
) -> None:
    """Fill the files of one split, from the image on that `done` says, and count there what is on the disk.

    bad: of each split, how many images could not be read. Above `allowed` they are refused, and the images since the
    last count will be read again.
    """
    names = {f"block_{block}": file_name(split, block) for block in plan["blocks"]}
    start = done.get(split, 0)
    if start == images.count:
        return
    files: dict[str, np.memmap] = {}
    if start:
        log(f"features: {split} goes on at image {start} of {images.count}")
        files = {name: np.lib.format.open_memmap(partial / file, mode="r+") for name, file in names.items()}
        files["label"] = np.lib.format.open_memmap(partial / f"{split}_labels.npy", mode="r+")
    begin = said = time.monotonic()
    faults = bad.get(split, 0)
    first = start // images.batch_size
    for n, batch in enumerate(images.batches(first), first):
        read = min((n + 1) * images.batch_size, images.count)
        out = extract(batch)
        if not files:
            files = {
                name: _allocate(partial / file, (images.count, out[name].shape[1]), dtype)
                for name, file in names.items()
            }
            files["label"] = _allocate(partial / f"{split}_labels.npy", (images.count,), np.dtype(np.int32))
            files["label"][:] = -1
        new = (out["batch_index"] >= start) & (
            out["batch_index"] < images.count
        )  # the first batch may begin before `start`
        use = new & out["valid"]
        faults += int((new & ~out["valid"]).sum())
        if faults > allowed:
            raise DataError(
                f"{faults} of the first {read} images cannot be read",
                f"the {split} images", "mend the files or the disk and go on, or set --max-bad-fraction higher",
            )  # fmt: skip
        for name, file in files.items():
            values = out[name][use]
            with np.errstate(over="ignore"):  # what is too large is told below
                rows = values.astype(file.dtype)
            if not np.isfinite(rows).all():
                fix = "look at the run's mean and std, and whether it diverged"
                if np.isfinite(values).all():
                    fix = "give --dtype=float32"
                raise NonFiniteError(f"features are not finite as {file.dtype}", f"{name} of the {split} images", fix)
            file[out["batch_index"][use]] = rows
        now = time.monotonic()
        if read == images.count or now - said > FLUSH:
            for file in files.values():
                file.flush()
            done[split], bad[split] = read, faults
            write_atomically(partial / "progress.json", json.dumps(plan | {"images": done, "bad": bad}))
            rate = (read - start) / max(now - begin, 1e-9)
            log(f"features: {split} {read}/{images.count} images, {rate:.0f} images/s")
            said = now


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """A new .npy file, mapped, whose place on the disk is taken: writing to one that is full would be a SIGBUS.

    macOS takes none beforehand.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    if not hasattr(os, "posix_fallocate"):
        return array
    with open(path, "r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(path)) from error
    return array
