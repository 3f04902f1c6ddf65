"""Images to batches: the position in the data is the step.

The chain is source -> shuffle -> repeat -> random map -> this process's slice -> batch -> start -> prefetch. The random
map comes before the slice, so that the images of step s and their augmentations are the same for any number of
processes, workers and threads. Every random number is a function of (seed, batch_index), so that to start at step s takes
no stored state. What must be stored is the `fingerprint`: grain accepts a changed data set, and yields other images.

Letters of shapes: b images in one process's batch, h height, w width, c channels. No JAX here: workers load this.
"""

import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator

import grain
import numpy as np
from absl import logging

from simmim_jax.data.augment import make_augment
from simmim_jax.data.decode import MAX_PIXELS, BadImage, Picture, decode, leave_out
from simmim_jax.data.label_maps import (
    LabelMapSpec,
    SegmentationSet,
    check_maps,
    check_pair,
    read_random_crop,
)
from simmim_jax.data.sources import SOURCES, make_source, share_images
from simmim_jax.data.sources.label_maps import make_label_map_source
from simmim_jax.data.transforms import INTERPOLATIONS, random_flip, random_resized_crop, resize_and_center_crop
from simmim_jax.data.workers import check_main, close, init_worker, let_grain_run_without_flags, watched
from simmim_jax.errors import ConfigError, DataError

__all__ = [
    "MEND", "SOURCES", "Epoch", "LabelMapSpec", "SegmentationSet", "advice", "check_batches", "check_maps", "cores", "fingerprint",
    "make_batches", "make_epoch", "make_label_map_source", "make_source", "most_bad", "share_images",
]  # fmt: skip

ON_ERROR = ("replace", "raise")  # what becomes of a bad image
MEND = "mend or remove the files, or set data.on_error=replace and data.max_bad_fraction higher"
TRIES = 64  # substitutes for one bad image, before the data as a whole are held to be bad


def make_batches(
    source,
    *,
    batch_size: int,
    seed: int,
    image_size: tuple[int, int],
    channels: int = 3,
    crop_scale: tuple[float, float] = (0.67, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    interpolation: str = "bilinear",
    augment: str = "",
    color_jitter: int | float = 0.0,
    mean: tuple[int | float, ...] = (),
    maps: LabelMapSpec | None = None,
    start_step: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    on_error: str = "replace",
    max_bad_fraction: float = 0.01,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches from `start_step` on, without end.

    Each is {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int64 [b], "replaced": bool [b],
    "batch_index": int32 [b]} with b = batch_size / processes. "index" is the image's in the source, "batch_index" its place
    in the whole batch: row r of process p has r * processes + p. An epoch is a permutation of the source, and batches
    run on from one to the next.

    In place of a bad image comes another, a function of the bad one's index alone ("index" says which, "replaced" that
    it is so), and the bad one is named on the log, once.

    Args:
      batch_size: over all processes.
      crop_scale, crop_ratio: of the random crop (`transforms.random_resized_crop`).
      flip: the probability of a mirror image.
      augment, color_jitter, mean: what is done after crop and flip, and the channels' means, 0..1, that it takes
        (`augment.make_augment`).
      maps: of a source with label maps, how these are read and crops are drawn, in place of crop_scale, crop_ratio and
        what is done after the flip; a batch then has "label_map" [b, h, w], of `maps.dtype`.
      start_step: the step that the first batch is for.
      workers: processes that decode; 0 for this one. In each, `threads` make a batch each and `prefetch` batches wait.
      on_error: "replace", as above, or "raise": the first bad image ends the run.
      max_bad_fraction: of the source's images, rounded up: if more than these prove bad, the data are refused. Not
        here where there are several `processes`: each knows its own alone.

    Raises:
      ConfigError: at once, for values that cannot work.
      DataError: at once, for a source smaller than a batch; later, for too many bad images or a second dead worker.
    """
    check_batches(
        source, batch_size=batch_size, seed=seed, image_size=image_size, crop_scale=crop_scale, crop_ratio=crop_ratio,
        flip=flip, interpolation=interpolation, channels=channels, augment=augment, color_jitter=color_jitter,
        mean=mean, maps=maps, start_step=start_step, process=process, processes=processes, workers=workers,
        threads=threads, prefetch=prefetch, on_error=on_error, max_bad_fraction=max_bad_fraction,
    )  # fmt: skip
    crop = functools.partial(
        _random_crop, size=image_size, scale=crop_scale, ratio=crop_ratio, flip=flip, interpolation=interpolation,
        augment=make_augment(augment, color_jitter=color_jitter, mean=mean, interpolation=interpolation),
    )  # fmt: skip
    of_images = {"channels": channels, "max_pixels": max_pixels}
    read = functools.partial(_read_image, crop=crop, **of_images)
    check = functools.partial(_check_image, **of_images)
    if maps:
        read = functools.partial(
            read_random_crop, size=image_size, maps=maps, flip=flip, interpolation=interpolation, **of_images
        )
        check = functools.partial(check_pair, maps=maps, **of_images)
    load = functools.partial(_load_or_substitute, source=source, read=read)
    # seeds s and s + 1 must share nothing, but grain's epoch e of seed s is epoch 0 of seed s + e: hence hashed seeds
    shuffle_seed, map_seed = (int(word) for word in np.random.SeedSequence(seed).generate_state(2))
    dataset = (
        grain.MapDataset.range(len(source))
        .shuffle(shuffle_seed)
        .repeat()
        .random_map(load, seed=map_seed)[process::processes]
        .batch(batch_size // processes, drop_remainder=True)
    )
    reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(prefetch, threads))
    if workers:
        check_main()
        let_grain_run_without_flags()
        options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=prefetch)

    def open_at(step: int) -> Iterator[dict]:
        batches = dataset[step:].to_iter_dataset(reading)
        if workers:
            batches = batches.mp_prefetch(options, functools.partial(init_worker, main=os.getpid()))
        return iter(batches)

    opened = [open_at(start_step)]
    allowed = most_bad(source, on_error, max_bad_fraction)
    positions = np.arange(process, batch_size, processes, dtype=np.int32)
    batches = watched(opened, open_at, start_step)
    # of several processes one alone must not end: the others would wait for it. Their sum is for the caller to judge.
    batches = _count_bad(batches, source, check, allowed, positions, alone=processes == 1)
    weakref.finalize(batches, close, opened)  # also at exit, while what it takes to end workers quietly still exists
    return batches


def check_batches(
    source,
    *,
    batch_size: int,
    seed: int,
    image_size: tuple[int, int],
    crop_scale: tuple[float, float],
    crop_ratio: tuple[float, float],
    flip: float,
    interpolation: str,
    channels: int = 3,
    augment: str = "",
    color_jitter: int | float = 0.0,
    mean: tuple[int | float, ...] = (),
    maps: LabelMapSpec | None = None,
    start_step: int = 0,
    process: int = 0,
    processes: int = 1,
    workers: int = 0,
    threads: int = 2,
    prefetch: int = 2,
    on_error: str = "replace",
    max_bad_fraction: float = 0.0,
    **_,
) -> None:
    """Refuse arguments of `make_batches` that cannot work, as it does itself, before anything is opened."""
    _check_shapes(batch_size, processes, process, image_size, interpolation)
    _check(0 <= seed < 2**32, "seed", seed, "must be in [0, 2**32)")
    for key, value in {"crop_scale": crop_scale, "crop_ratio": crop_ratio}.items():
        _check(len(value) == 2, key, value, "must be two numbers, (low, high)")
    _check(0 < crop_scale[0] <= crop_scale[1] <= 1, "crop_scale", crop_scale, "must be (low, high) within (0, 1]")
    _check(0 < crop_ratio[0] <= crop_ratio[1], "crop_ratio", crop_ratio, "must be (low, high), above 0")
    _check(0 <= flip <= 1, "flip", flip, "must be in [0, 1]")
    _check(0 <= max_bad_fraction <= 1, "max_bad_fraction", max_bad_fraction, "must be in [0, 1]")
    if augment or color_jitter:
        _check(len(mean) == channels, "mean", mean, f"must have {channels} numbers, one for each channel")
    make_augment(augment, color_jitter=color_jitter, mean=mean, interpolation=interpolation)
    if maps:
        maps.check()
        _check(not augment and not color_jitter, "augment", augment, "must be empty where images have label maps")
    choices = ", ".join(ON_ERROR)
    _check(on_error in ON_ERROR, "on_error", on_error, f"must be one of {choices}")
    for key, value in {"start_step": start_step, "workers": workers, "threads": threads}.items():
        _check(value >= 0, key, value, "must be 0 or more")
    _check(prefetch >= 1, "prefetch", prefetch, "must be 1 or more")
    if batch_size > len(source):
        what = f"a batch of {batch_size} is larger than the data"
        raise DataError(what, source.describe(), f"set batch_size to {len(source)} or less, or add images")


def make_epoch(
    source,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int = 3,
    crop_fraction: float = 1.0,
    interpolation: str = "bilinear",
    limit: int = 0,
    process: int = 0,
    processes: int = 1,
    threads: int = 2,
    on_error: str = "replace",
    max_bad_fraction: int | float = 1.0,
    agree: Callable[[int], int] = int,
    max_pixels: int = MAX_PIXELS,
) -> "Epoch":
    """Each image once, in order, center-cropped: this process's batches, all full, and as many for every process.

    Each is {"image": uint8 [b, h, w, c], "label": int32 [b], "index": int64 [b], "batch_index": int32 [b], "valid": bool
    [b]}, where "batch_index" counts through the whole pass. The last batch is filled up with zero images (label and index
    -1) that are not valid; nor is an image that does not decode.

    Args:
      crop_fraction: the part of the resized image's side that the crop keeps (`transforms.resize_and_center_crop`).
      on_error: "replace", as above, or "raise".
      limit: so many records, evenly spread over the source; 0 for all.
      max_bad_fraction: of these records, rounded up: if more cannot be read, a pass ends with DataError.
      agree: gives the process_max of the numbers that all processes give, so that this ends them all.
    """
    _check_shapes(batch_size, processes, process, image_size, interpolation)
    _check(0 < crop_fraction <= 1, "crop_fraction", crop_fraction, "must be in (0, 1]")
    _check(limit >= 0, "limit", limit, "must be 0 or more")
    count = min(limit or len(source), len(source))
    batches = -(-count // batch_size)
    crop = functools.partial(
        resize_and_center_crop, size=image_size, crop_fraction=crop_fraction, interpolation=interpolation
    )
    blank = np.zeros((*image_size, channels), np.uint8)
    load = functools.partial(
        _load_or_blank, source=source, crop=crop, channels=channels, max_pixels=max_pixels, blank=blank,
        reported=set(), allowed=on_error == "replace",
    )  # fmt: skip

    def place(batch_index: int) -> dict:
        index = batch_index * len(source) // count if batch_index < count else -1
        return load(index) | {"batch_index": np.int32(batch_index)}

    def refuse_many(missing: int) -> None:
        if max_bad_fraction == 1 or not agree(missing):
            return
        bad = sum(agree(missing if n == process else 0) for n in range(processes))
        if bad > math.ceil(max_bad_fraction * count):
            what = f"{bad} of {count} images to evaluate on cannot be read: they are named above"
            raise DataError(what, source.describe(), MEND)

    dataset = grain.MapDataset.range(batches * batch_size).map(place)[process::processes].batch(batch_size // processes)
    return Epoch(dataset, threads, refuse_many)


class Epoch:
    """One pass over a source, any number of times. At its end `refuse_many` is told how many are missing."""

    def __init__(self, dataset: grain.MapDataset, threads: int, refuse_many: Callable[[int], None]):
        self.dataset, self.options = dataset, grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self.refuse_many = refuse_many

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        missing = 0
        for batch in self.dataset.to_iter_dataset(self.options):
            missing += int(((batch["index"] >= 0) & ~batch["valid"]).sum())
            yield batch
        self.refuse_many(missing)


def fingerprint(
    source,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int],
    channels: int = 3,
    crop_scale: tuple[float, float] = (0.67, 1.0),
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float = 0.5,
    interpolation: str = "bilinear",
    augment: str = "",
    color_jitter: int | float = 0.0,
    mean: tuple[int | float, ...] = (),
    maps: LabelMapSpec | None = None,
    max_pixels: int = MAX_PIXELS,
) -> dict:
    """What decides the samples that `make_batches` yields at a step, as JSON; not how many processes compute them."""
    augmenting = {"augment": augment, "mean": list(mean)} if augment else {}
    augmenting |= {"color_jitter": color_jitter} if color_jitter else {}
    augmenting |= {"maps": maps.as_json()} if maps else {}
    return {
        "source": source.fingerprint(),
        "seed": seed,
        "batch_size": batch_size,
        "image_size": list(image_size),
        "channels": channels,
        "crop_scale": list(crop_scale),
        "crop_ratio": list(crop_ratio),
        "flip": flip,
        "interpolation": interpolation,
        "max_pixels": max_pixels,
        **augmenting,
    }


def most_bad(source, on_error: str, max_bad_fraction: float) -> int:
    """How many images may be bad, of those of an epoch."""
    return math.ceil(max_bad_fraction * len(source)) if on_error == "replace" else 0


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def advice(source, *, workers: int) -> str:
    """What to change where a device waits for images that `workers` processes decode."""
    kind = source.fingerprint()["source"]
    changes = []
    if workers < cores() - 1:
        changes.append(f"set --config.data.workers={cores() - 1} (now {workers}, of {cores()} cores)")
    if kind not in ("digits", "array_record", "label_maps"):
        changes.append("prepare the images once (python -m simmim_jax.tools.prepare SOURCE DEST) and train from DEST")
    return ", or ".join(changes) or f"all {cores()} cores decode already: take a host with more, or smaller images"


def _random_crop(image, rng, *, size, scale, ratio, flip, interpolation, augment):
    image = random_flip(random_resized_crop(image, rng, size, scale, ratio, interpolation), rng, flip)
    return augment(image, rng) if augment else image


def _read_image(record: dict, rng: np.random.Generator, *, crop, channels: int, max_pixels: int) -> dict:
    return {"image": crop(Picture(record["image"], channels, max_pixels), rng)}


def _check_image(record: dict, *, channels: int, max_pixels: int) -> None:
    decode(record["image"], channels, max_pixels)


def _load_or_substitute(index: int, rng: np.random.Generator, *, source, read) -> dict:
    """The record, or a stand-in for it; "bad_index" is then the index asked for, else -1."""
    stride = _stride(len(source))
    for step in range(min(TRIES, len(source))):
        used = (index + step * stride) % len(source)
        try:
            record = source[used]
            arrays = read(record, rng)
        except (BadImage, OSError) as error:
            reason = error
            continue
        bad = -1 if used == index else index
        label = np.int32(record["label"])
        return {**arrays, "label": label, "index": np.int64(used), "bad_index": np.int64(bad)}
    what = f"{step + 1} images in a row cannot be read, the last being {source.name(used)}: {reason}"
    raise DataError(what, source.describe(), "see whether the disk is there, and what the files are")


def _load_or_blank(index: int, *, source, crop, channels, max_pixels, blank, reported: set, allowed: bool) -> dict:
    image, label = None, -1
    if index >= 0:
        try:
            record = source[index]
            image, label = crop(Picture(record["image"], channels, max_pixels)), record["label"]
        except (BadImage, OSError) as error:
            leave_out(source, index, error, reported=reported, allowed=allowed)
    valid = np.bool_(image is not None)
    return {"image": image if valid else blank, "label": np.int32(label), "index": np.int64(index), "valid": valid}


@functools.cache
def _stride(count: int) -> int:
    """About 0.618 of the count and coprime to it: steps that reach every record, and never soon a neighbor's."""
    stride = max(1, int(count * 0.618))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _count_bad(batches, source, check, allowed: int, positions: np.ndarray, *, alone: bool) -> Iterator[dict]:
    """The batches, and each bad image named once; where this process is `alone`, until too many are bad."""
    bad: set[int] = set()
    for batch in batches:
        asked = batch.pop("bad_index")
        for index in sorted(set(asked.tolist()) - bad - {-1}):
            bad.add(index)
            fault = f"{source.name(index)}: {_reason(source, index, check)}"
            logging.warning("bad image %d, of at most %d in %s: %s", len(bad), allowed, source.describe(), fault)
            if alone and len(bad) > allowed:
                what = f"{len(bad)} bad images, of at most {allowed}; the last: {fault}"
                raise DataError(what, source.describe(), MEND)
        yield batch | {"replaced": asked >= 0, "batch_index": positions}


def _reason(source, index: int, check) -> str:
    try:
        check(source[index])
    except (BadImage, OSError) as error:
        return str(error)
    return "could not be read, though now it can"


def _check_shapes(batch_size, processes, process, image_size, interpolation) -> None:
    _check(batch_size >= 1, "batch_size", batch_size, "must be 1 or more")
    _check(0 <= process < processes, "process", process, f"must be in [0, {processes})")
    fix = f"must divide by the {processes} processes: {batch_size // processes * processes or processes} would"
    _check(batch_size % processes == 0, "batch_size", batch_size, fix)
    _check(len(image_size) == 2 and min(image_size) >= 1, "image_size", image_size, "must be (height, width) in pixels")
    choices = ", ".join(INTERPOLATIONS)
    _check(interpolation in INTERPOLATIONS, "interpolation", interpolation, f"must be one of {choices}")


def _check(right: bool, key: str, value, fix: str) -> None:
    if not right:
        raise ConfigError(f"{key}={value!r}", f"data.{key}", fix)
