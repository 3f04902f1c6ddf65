"""Training batches: the position in the data is the step.

The chain is source -> shuffle -> repeat -> random map -> this process's slice -> batch -> start -> prefetch. The random
map comes before the slice, so the images of step s and their augmentations are the same for any number of processes,
workers and threads. Every random number is a function of (seed, position), so starting at step s needs no stored state.
A checkpoint stores only the `fingerprint`, because grain accepts a changed data set without complaint.

Shapes: b images in one process's batch, h height, w width, c channels.
"""

import functools
import math
import os
import weakref
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np
from absl import logging

from simmim_jax.data.augment import make_augment
from simmim_jax.data.decode import MAX_PIXELS, BadImage, EmptyImage, Picture, Samples, decode
from simmim_jax.data.label_maps import LabelMapSpec, check_pair, read_random_crop
from simmim_jax.data.transforms import INTERPOLATIONS, random_flip, random_resized_crop
from simmim_jax.data.workers import WatchedBatches, check_main, init_worker, let_grain_run_without_flags
from simmim_jax.errors import ConfigError, DataError

ON_ERROR = ("replace", "raise")  # policies for a bad image
BAD_IMAGES_FIX = "repair or remove the files, or set data.on_error=replace and a higher data.max_bad_fraction"
MAX_SUBSTITUTES = 64  # images tried in place of a bad one before the whole data set is considered bad


class BatchSpec(NamedTuple):
    """Everything that decides which pixels are in the batch of a step.

    batch_size: images over all processes.
    image_size: (height, width) of the crops in pixels.
    crop_scale, crop_ratio: bounds of the random crop's area and aspect ratio (`transforms.random_resized_crop`).
    flip: probability of a horizontal flip.
    augment, color_jitter, mean: augmentation after crop and flip, and the channel means, 0..1, that fill pixels from
      outside of the image (`augment.make_augment`).
    label_maps: how label maps are read and crops drawn, for a source with label maps. Replaces crop_scale, crop_ratio,
      augment and color_jitter.
    max_pixels: images with more pixels are bad images.
    samples: what each image must have, apart from the number of channels. Others are bad images.
    """

    batch_size: int
    seed: int
    image_size: tuple[int, int]
    channels: int = 3
    crop_scale: tuple[float, float] = (0.67, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    interpolation: str = "bilinear"
    augment: str = ""
    color_jitter: int | float = 0.0
    mean: tuple[int | float, ...] = ()
    label_maps: LabelMapSpec | None = None
    max_pixels: int = MAX_PIXELS
    samples: Samples = Samples()

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        check_image_options(self.batch_size, self.image_size, self.interpolation)
        check_option(0 <= self.seed < 2**32, "seed", self.seed, "must be in [0, 2**32)")
        for name, (low, high) in {"crop_scale": (0, 1), "crop_ratio": (0, math.inf)}.items():
            value = getattr(self, name)
            check_option(len(value) == 2, f"data.{name}", value, "must be two numbers, (low, high)")
            fix = f"must be (low, high) with {low} < low <= high" + (f" <= {high}" if high == 1 else "")
            check_option(low < value[0] <= value[1] <= high, f"data.{name}", value, fix)
        check_option(0 <= self.flip <= 1, "data.flip", self.flip, "must be in [0, 1]")
        if self.augment or self.color_jitter:
            fix = f"must have {self.channels} numbers, one for each channel"
            check_option(len(self.mean) == self.channels, "mean", self.mean, fix)
            of_type = f"data.augment or data.color_jitter with {self.samples.dtype} images"
            if self.samples.dtype != "uint8":
                raise ConfigError(
                    of_type, "data.augment", "set data.augment='' and data.color_jitter=0: they need 8 bits"
                )
        self.make_augment()
        if self.label_maps:
            self.label_maps.check()
            if self.label_maps.photometric and self.samples.dtype != "uint8":
                what = f"data.maps.photometric with {self.samples.dtype} images"
                raise ConfigError(what, "data.maps.photometric", "set it to false: it needs 8 bits")
            fix = "must be empty for images with label maps"
            check_option(not self.augment and not self.color_jitter, "data.augment", self.augment, fix)

    def make_augment(self) -> Callable | None:
        """The augmentation after crop and flip, if any."""
        return make_augment(
            self.augment, color_jitter=self.color_jitter, mean=self.mean, interpolation=self.interpolation
        )

    def arrays(self) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
        """Name, shape and dtype of each entry of a global batch.

        - image: the crops, `samples.dtype` [batch_size, h, w, c].
        - label: class number, int32 [batch_size].
        - index: the image's number in the source, int64 [batch_size].
        - replaced: whether the image stands in for a bad one, bool [batch_size].
        - batch_index: the image's row in the global batch, int32 [batch_size].
        - label_map, with `label_maps` only: class of each pixel, uint8 or uint16 [batch_size, h, w].
        """
        rows, crops = (self.batch_size,), (self.batch_size, *self.image_size, self.channels)
        entries = {"image": (crops, self.samples.dtype), "label": (rows, np.int32), "index": (rows, np.int64)}
        entries |= {"replaced": (rows, np.bool_), "batch_index": (rows, np.int32)}
        if self.label_maps:
            entries["label_map"] = (crops[:3], self.label_maps.dtype)
        return {name: (shape, np.dtype(dtype)) for name, (shape, dtype) in entries.items()}


class Loading(NamedTuple):
    """How batches are computed. Never decides which pixels are in them.

    workers: decoder processes; 0: decode in this process.
    threads: decoder threads in each process; 0: decode in the caller's thread.
    prefetch: batches that wait in each process.
    on_error: "replace": another image takes the place of a bad one. "raise": the first bad image ends the run.
    max_bad_fraction: fraction of the images, rounded up, that may be bad before the data are refused.
    """

    workers: int = 0
    threads: int = 2
    prefetch: int = 2
    on_error: str = "replace"
    max_bad_fraction: int | float = 0.01

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        for name, low in {"workers": 0, "threads": 0, "prefetch": 1}.items():
            value = getattr(self, name)
            check_option(value >= low, f"data.{name}", value, f"must be {low} or more")
        fix = f"must be one of {', '.join(ON_ERROR)}"
        check_option(self.on_error in ON_ERROR, "data.on_error", self.on_error, fix)
        fraction = self.max_bad_fraction
        check_option(0 <= fraction <= 1, "data.max_bad_fraction", fraction, "must be in [0, 1]")


class Shard(NamedTuple):
    """This process's part of each batch: shard `index` of `count`. It has rows index, index + count, ..."""

    index: int = 0
    count: int = 1

    def check(self, batch_size: int) -> None:
        """Raise ConfigError unless the batch divides into these shards."""
        check_option(0 <= self.index < self.count, "shard", tuple(self), "must be (index, count) with index < count")
        fix = f"must be a multiple of the {self.count} processes, like {max(batch_size // self.count, 1) * self.count}"
        check_option(batch_size % self.count == 0, "batch_size", batch_size, fix)


def make_batches(
    source,
    spec: BatchSpec,
    *,
    start_step: int = 0,
    shard: Shard = Shard(),  # noqa: B008
    loading: Loading = Loading(),  # noqa: B008
) -> Iterator[dict[str, np.ndarray]]:
    """This process's batches from `start_step` on, without end.

    Each has the entries of `BatchSpec.arrays`, with b = batch_size / shard.count rows. An epoch is a permutation of the
    source; batches continue across the end of an epoch.

    A bad image is replaced by another image, which is a function of the bad image's index only, and logged once.

    Raises:
      ConfigError: at once, for values that cannot work.
      DataError: at once, for a source smaller than a batch; later, if a worker dies twice, or for too many bad images.
        The latter only with a single shard: several processes must stop together, so their caller counts.
    """
    check_batches(source, spec, loading)
    shard.check(spec.batch_size)
    check_option(start_step >= 0, "start_step", start_step, "must be 0 or more")
    read = functools.partial(_read_image, spec=spec, augment=spec.make_augment())
    check = functools.partial(_check_image, spec=spec)
    if spec.label_maps:
        decoding = (spec.channels, spec.max_pixels, spec.samples)
        how = {"size": spec.image_size, "flip": spec.flip, "interpolation": spec.interpolation}
        read = functools.partial(read_random_crop, maps=spec.label_maps, decoding=decoding, **how)
        check = functools.partial(
            check_pair,
            maps=spec.label_maps,
            channels=spec.channels,
            max_pixels=spec.max_pixels,
            samples=spec.samples,
        )
    load = functools.partial(_load_or_substitute, source=source, read=read)
    # Hash the seed: grain's epoch e of seed s is its epoch 0 of seed s + e, but two seeds must share nothing.
    shuffle_seed, map_seed = (int(word) for word in np.random.SeedSequence(spec.seed).generate_state(2))
    dataset = (
        grain.MapDataset.range(len(source))
        .shuffle(shuffle_seed)
        .repeat()
        .random_map(load, seed=map_seed)[shard.index :: shard.count]
        .batch(spec.batch_size // shard.count, drop_remainder=True)
    )
    options = grain.ReadOptions(loading.threads, max(loading.prefetch, loading.threads))
    if loading.workers:
        check_main()
        let_grain_run_without_flags()

    def open_at(step: int) -> Iterator[dict]:
        batches = dataset[step:].to_iter_dataset(options)
        if loading.workers:
            processes = grain.MultiprocessingOptions(loading.workers, per_worker_buffer_size=loading.prefetch)
            batches = batches.mp_prefetch(processes, functools.partial(init_worker, main=os.getpid()))
        return iter(batches)

    watched = WatchedBatches(open_at, start_step)
    rows = np.arange(shard.index, spec.batch_size, shard.count, dtype=np.int32)
    batches = _count_bad(watched, source, check, max_bad_images(source, loading), rows, refuse=shard.count == 1)
    weakref.finalize(batches, watched.close)  # also at exit, while workers can still be ended quietly
    return batches


def check_batches(source, spec: BatchSpec, loading: Loading) -> None:
    """Raise what `make_batches` raises at once, without opening anything."""
    spec.check()
    loading.check()
    if spec.batch_size > len(source):
        what = f"a batch of {spec.batch_size} is larger than the data"
        raise DataError(what, source.describe(), f"set batch_size to {len(source)} or less, or add images")


def fingerprint(source, spec: BatchSpec) -> dict:
    """The source and all options that decide the samples of `make_batches` at a step, as JSON."""
    fields = {name: list(x) if isinstance(x, tuple) else x for name, x in spec._asdict().items()}
    fields["label_maps"] = spec.label_maps and spec.label_maps.as_json()
    fields["samples"] = spec.samples.as_json()
    unused = {name for name in ("augment", "color_jitter", "label_maps", "samples") if not fields[name]}
    unused |= {"mean"} if not spec.augment else set()
    return {"source": source.fingerprint(), **{name: x for name, x in fields.items() if name not in unused}}


def max_bad_images(source, loading: Loading) -> int:
    """Number of bad images in an epoch that a run accepts."""
    return math.ceil(loading.max_bad_fraction * len(source)) if loading.on_error == "replace" else 0


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def advice(source, *, workers: int) -> str:
    """Recommended change if a device waits for images that `workers` processes decode."""
    changes = []
    if workers < cores() - 1:
        changes.append(f"set --config.data.workers={cores() - 1} (now {workers}, with {cores()} cores)")
    if source.fingerprint()["source"] not in ("digits", "array_record", "label_maps"):
        changes.append("prepare the images once (python -m simmim_jax.tools.prepare SOURCE DEST) and train from DEST")
    return ", or ".join(changes) or f"all {cores()} cores decode already: use a host with more cores, or smaller images"


def check_image_options(batch_size: int, image_size: tuple[int, int], interpolation: str) -> None:
    """Raise ConfigError for values that cannot work in training or evaluation."""
    check_option(batch_size >= 1, "batch_size", batch_size, "must be 1 or more")
    valid = len(image_size) == 2 and min(image_size) >= 1
    check_option(valid, "image_size", image_size, "must be (height, width) in pixels")
    fix = f"must be one of {', '.join(INTERPOLATIONS)}"
    check_option(interpolation in INTERPOLATIONS, "data.interpolation", interpolation, fix)


def check_option(valid: bool, field: str, value, fix: str) -> None:
    """Raise ConfigError for the config field unless its value is valid."""
    if not valid:
        raise ConfigError(f"{field.removeprefix('data.')}={value!r}", field, fix)


def _read_image(record: dict, rng: np.random.Generator, *, spec: BatchSpec, augment: Callable | None) -> dict:
    picture = Picture(record["image"], spec.channels, spec.max_pixels, spec.samples)
    image = random_resized_crop(picture, rng, spec.image_size, spec.crop_scale, spec.crop_ratio, spec.interpolation)
    image = random_flip(image, rng, spec.flip)
    return {"image": augment(image, rng) if augment else image}


def _check_image(record: dict, *, spec: BatchSpec) -> None:
    decode(record["image"], spec.channels, spec.max_pixels, spec.samples)


def _load_or_substitute(index: int, rng: np.random.Generator, *, source, read) -> dict:
    """The record or a substitute for it. "bad_index": -1, the index of a bad image, or -2 - that of an empty one."""
    stride, bad = _stride(len(source)), -1
    for attempt in range(min(MAX_SUBSTITUTES, len(source))):
        used = (index + attempt * stride) % len(source)
        try:
            record = source[used]
            arrays = read(record, rng)
        except (BadImage, OSError) as error:
            reason = error
            if not attempt:
                bad = -2 - index if isinstance(error, EmptyImage) else index
            continue
        return {**arrays, "label": np.int32(record["label"]), "index": np.int64(used), "bad_index": np.int64(bad)}
    what = f"{attempt + 1} images in a row cannot be read, the last one is {source.name(used)}: {reason}"
    raise DataError(what, source.describe(), "check that the disk is mounted, and what the files contain")


@functools.cache
def _stride(count: int) -> int:
    """A step of about 0.618 * count, coprime to count: it reaches every record, and similar neighbors late."""
    stride = max(1, int(count * 0.618))
    while math.gcd(stride, count) != 1:
        stride += 1
    return stride


def _count_bad(
    batches: WatchedBatches, source, check, allowed: int, rows: np.ndarray, *, refuse: bool
) -> Iterator[dict]:
    """Complete the batches and log each bad image once. With `refuse`, raise DataError for more than `allowed`.

    Empty images are not bad: their number is logged when it doubles.
    """
    bad: set[int] = set()
    empty: set[int] = set()
    try:
        for batch in batches:
            bad_index, before = batch.pop("bad_index"), len(empty)
            empty |= set((-2 - bad_index[bad_index < -1]).tolist())
            if len(empty).bit_length() > before.bit_length():
                what = "%d of %d images have less data than data.max_nodata asks for and are skipped, like %s"
                logging.warning(what, len(empty), len(source), source.name(next(iter(empty))))
            for index in sorted(set(bad_index[bad_index >= 0].tolist()) - bad):
                bad.add(index)
                fault = f"{source.name(index)}: {_reason(source, index, check)}"
                logging.warning("bad image %d, of at most %d in %s: %s", len(bad), allowed, source.describe(), fault)
                if refuse and len(bad) > allowed:
                    what = f"{len(bad)} bad images, of at most {allowed}; the last: {fault}"
                    raise DataError(what, source.describe(), BAD_IMAGES_FIX)
            yield batch | {"replaced": bad_index >= 0, "batch_index": rows}
    finally:
        batches.close()


def _reason(source, index: int, check) -> str:
    try:
        check(source[index])
    except (BadImage, OSError) as error:
        return str(error)
    return "could not be read, but can be read now"
