"""Features of every block of an encoder on disk, extracted in one pass over the images.

    FOLDER/<key>/meta.json                        written last; lists the complete blocks
                 {train,test}_block_NN.npy        [m, d]
                 {train,test}_labels.npy          int32 [m]; -1 for an image without label, or an unreadable one
    FOLDER/<key>.partial/                         an extraction in progress; continues after a kill at any batch size

The key is a hash of everything that decides the numbers. Row i is image i of the pass. Arrays are memory-mapped:
ImageNet's 1.28 million images x 12 blocks x 768 numbers x 4 bytes are 47 GB (half of that as float16), and a reader
holds one block in memory. Only a small fraction of images may be unreadable, so that a disk that was away for a while
does not leave features with gaps.
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

FLUSH_SECONDS = 20.0  # between the points from which a killed extraction continues


class Pass(NamedTuple):
    """One pass over `count` images. batches(n): its batches from batch n on, all of batch_size, the last one padded."""

    count: int
    batch_size: int
    batches: Callable[[int], Iterable[dict]]


class FeatureCache(NamedTuple):
    folder: Path

    def labels(self, split: str) -> Int[np.ndarray, " m"]:
        return np.load(self.folder / f"{split}_labels.npy")

    def features(self, split: str, block: int) -> Float[np.ndarray, "m d"]:
        """Return the memory-mapped features."""
        return np.load(self.folder / file_name(split, block), mmap_mode="r")

    @property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())


class Partial(NamedTuple):
    """An extraction in progress. images, unreadable: counts per split, as progress.json has them on disk."""

    folder: Path
    blocks: list[int]
    images: dict[str, int]
    unreadable: dict[str, int]

    def save(self) -> None:
        state = {"blocks": self.blocks, "images": self.images, "unreadable": self.unreadable}
        write_atomically(self.folder / "progress.json", json.dumps(state))


def file_name(split: str, block: int) -> str:
    return f"{split}_block_{block:02}.npy"


def cache_key(identity: dict) -> str:
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
    """Return the cache of `identity` in `folder`. Extract the blocks that it lacks from `passes`.

    Caches of other identities stay. Raises NonFiniteError, DataError if more than `max_bad_fraction` of the images of
    a pass are unreadable, and OSError if the disk is full.

    Args:
      identity: JSON of everything that decides the numbers.
      extract: batch -> {"block_N" [b, d] for each block, "label", "batch_index", "valid" [b]}.
    """
    final = Path(folder) / cache_key(identity | {"dtype": dtype})
    counts = {split: images.count for split, images in passes.items()}
    max_bad = {split: math.ceil(max_bad_fraction * count) for split, count in counts.items()}
    complete, unreadable = _complete_blocks(final, counts, max_bad)
    missing = sorted(block for block in blocks if block not in complete)
    if not missing:
        log(f"features: reusing {len(blocks)} blocks in {final}")
        return FeatureCache(final)
    if not complete and (final / "meta.json").exists():
        log(f"features: {final} is damaged or lacks more images than allowed; reading all images again")
    partial = _open_partial(final.with_name(f"{final.name}.partial"), missing, log)
    for split, images in passes.items():
        _extract(partial, split, images, extract, np.dtype(dtype), log, max_bad[split])
        if complete:  # a row is labeled only if all its blocks are there
            path = partial.folder / f"{split}_labels.npy"
            if path.exists():  # otherwise it was merged and moved before a kill
                labels = np.load(path, mmap_mode="r+")
                labels[np.load(final / path.name) < 0] = -1
                labels.flush()
            partial.unreadable[split] = max(partial.unreadable[split], unreadable[split])
    final.mkdir(parents=True, exist_ok=True)
    if not complete:  # otherwise the old meta.json would describe a mixture of old and new files
        (final / "meta.json").unlink(missing_ok=True)
    for path in partial.folder.glob("*.npy"):
        path.replace(final / path.name)
    meta = {
        "blocks": sorted({*complete, *missing}),
        "counts": counts,
        "unreadable": partial.unreadable,
        "dtype": dtype,
        "identity": identity,
    }
    write_atomically(final / "meta.json", json.dumps(meta, indent=2) + "\n")
    shutil.rmtree(partial.folder)
    return FeatureCache(final)


def _complete_blocks(final: Path, counts: dict[str, int], max_bad: dict[str, int]) -> tuple[list[int], dict[str, int]]:
    """Return (the complete blocks, the unreadable images of each split).

    Blocks count if meta.json lists them, all files have the right length, and at most `max_bad` images were unreadable.
    """
    try:
        meta = json.loads((final / "meta.json").read_text())
        blocks, unreadable = meta["blocks"], meta["unreadable"]
        if any(unreadable[split] > most for split, most in max_bad.items()):
            return [], {}
        for split, count in counts.items():
            for name in (f"{split}_labels.npy", *(file_name(split, block) for block in blocks)):
                if len(np.load(final / name, mmap_mode="r")) != count:
                    return [], {}
    except (OSError, ValueError, KeyError, EOFError):  # EOFError: an empty file
        return [], {}
    return blocks, unreadable


def _open_partial(folder: Path, blocks: list[int], log: Callable[[str], None]) -> Partial:
    """Continue the extraction in `folder`, or start a new one if it was of other blocks."""
    try:
        progress = json.loads((folder / "progress.json").read_text())
        if progress["blocks"] == blocks:
            return Partial(folder, blocks, progress["images"], progress["unreadable"])
    except (OSError, ValueError, KeyError):
        pass
    if any(folder.glob("*.npy")):
        log(f"features: discarding the unfinished extraction {folder}: it is damaged, or of other blocks")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return Partial(folder, blocks, {}, {})


def _extract(
    partial: Partial, split: str, images: Pass, extract: Callable, dtype: np.dtype, log: Callable, max_bad: int
) -> None:
    """Fill the files of one split, from the first image that is not on disk yet. Update `partial`.

    Raises DataError for more than `max_bad` unreadable images. The images since the last flush are then read again.
    """
    names = {f"block_{block}": file_name(split, block) for block in partial.blocks} | {"label": f"{split}_labels.npy"}
    start = partial.images.get(split, 0)
    if start == images.count:
        return
    files: dict[str, np.memmap] = {}
    if start:
        log(f"features: {split} continues at image {start} of {images.count}")
        files = {name: np.lib.format.open_memmap(partial.folder / file, mode="r+") for name, file in names.items()}
    begin = flushed = time.monotonic()
    unreadable = partial.unreadable.get(split, 0)
    first = start // images.batch_size
    for n, batch in enumerate(images.batches(first), first):
        read = min((n + 1) * images.batch_size, images.count)
        out = extract(batch)
        if not files:
            for name, file in names.items():
                shape = (images.count, *out[name].shape[1:])
                kind = np.dtype(np.int32) if name == "label" else dtype
                files[name] = _allocate(partial.folder / file, shape, kind)
            files["label"][:] = -1
        index = out["batch_index"]
        new = (index >= start) & (index < images.count)  # the first batch may begin before `start`
        use = new & out["valid"]
        unreadable += int((new & ~out["valid"]).sum())
        if unreadable > max_bad:
            what, fix = f"{unreadable} of the first {read} images are unreadable", "raise --max-bad-fraction"
            raise DataError(what, f"the {split} images", f"fix the files and run again, or {fix}")
        for name, file in files.items():
            with np.errstate(over="ignore"):  # an overflow is an error below
                rows = out[name][use].astype(file.dtype)
            if not np.isfinite(rows).all():
                overflow = np.isfinite(out[name][use]).all()
                fix = "give --dtype=float32" if overflow else "check mean and std of the run, and whether it diverged"
                raise NonFiniteError(f"features are not finite as {file.dtype}", f"{name} of the {split} images", fix)
            file[index[use]] = rows
        now = time.monotonic()
        if read == images.count or now - flushed > FLUSH_SECONDS:
            for file in files.values():
                file.flush()
            partial.images[split], partial.unreadable[split] = read, unreadable
            partial.save()
            rate = (read - start) / max(now - begin, 1e-9)
            log(f"features: {split} {read}/{images.count} images, {rate:.0f} images/s")
            flushed = now


def _allocate(path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    """Return a new memory-mapped .npy file with its disk space reserved. Without that, a full disk means SIGBUS.

    macOS has no posix_fallocate and reserves nothing.
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
