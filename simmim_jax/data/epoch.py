"""Evaluation batches: one pass over a source, in order, without randomness.

Shapes: b images in one process's batch, h height, w width, c channels.
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import grain
import numpy as np

from simmim_jax.data.batches import BAD_IMAGES_FIX, Loading, Shard, check_image_options, check_option
from simmim_jax.data.decode import MAX_PIXELS, BadImage, Picture, Samples, leave_out
from simmim_jax.data.transforms import resize_and_center_crop
from simmim_jax.errors import DataError


class CenterCrop(NamedTuple):
    """How an evaluated image is read.

    image_size: (height, width) of the crop in pixels.
    crop_fraction: fraction of the resized image's side that the crop keeps (`transforms.resize_and_center_crop`).
    max_pixels: images with more pixels are bad images.
    samples: what each image must have, apart from the number of channels. Others are bad images.
    """

    image_size: tuple[int, int]
    channels: int = 3
    crop_fraction: int | float = 1.0
    interpolation: str = "bilinear"
    max_pixels: int = MAX_PIXELS
    samples: Samples = Samples()


def make_epoch(
    source,
    crop: CenterCrop,
    *,
    batch_size: int,
    limit: int = 0,
    shard: Shard = Shard(),  # noqa: B008
    loading: Loading = Loading(max_bad_fraction=1.0),  # noqa: B008
    process_max: Callable[[int], int] = int,
) -> "Epoch":
    """Each image once, in order, center-cropped. All batches are full, and each shard has the same number of them.

    A batch is {"image": `crop.samples.dtype` [b, h, w, c], "label": int32 [b], "index": int64 [b], "batch_index": int32
    [b], "valid": bool [b]}. "batch_index" counts through the whole pass. An image that does not decode is zero and not
    valid. So are the images that fill the last batch; their label and index are -1.

    Args:
      batch_size: images over all shards.
      limit: number of records, evenly spread over the source; 0 for all.
      loading: `workers` and `prefetch` have no effect. If more than `max_bad_fraction` of the records cannot be read,
        the pass ends with DataError.
      process_max: maximum of a number over all processes, so that a DataError ends all of them.
    """
    check_image_options(batch_size, crop.image_size, crop.interpolation)
    shard.check(batch_size)
    check_option(0 < crop.crop_fraction <= 1, "data.crop_fraction", crop.crop_fraction, "must be in (0, 1]")
    check_option(limit >= 0, "limit", limit, "must be 0 or more")
    count = min(limit or len(source), len(source))
    load = functools.partial(_load_or_blank, source=source, crop=crop, reported=set(), on_error=loading.on_error)

    def load_row(batch_index: int) -> dict:
        index = batch_index * len(source) // count if batch_index < count else -1
        return load(index) | {"batch_index": np.int32(batch_index)}

    def check_missing(missing: int) -> None:
        if loading.max_bad_fraction == 1 or not process_max(missing):
            return
        bad = sum(process_max(missing if n == shard.index else 0) for n in range(shard.count))
        if bad > math.ceil(loading.max_bad_fraction * count):
            what = f"{bad} of {count} images to evaluate on cannot be read: they are listed above"
            raise DataError(what, source.describe(), BAD_IMAGES_FIX)

    rows = grain.MapDataset.range(-(-count // batch_size) * batch_size).map(load_row)[shard.index :: shard.count]
    return Epoch(rows.batch(batch_size // shard.count), loading.threads, check_missing)


class Epoch:
    """One pass over a source, which can be repeated. Its end calls `check_missing` with the number of bad images."""

    def __init__(self, dataset: grain.MapDataset, threads: int, check_missing: Callable[[int], None]):
        self.dataset, self.options = dataset, grain.ReadOptions(threads, 2 * threads)
        self.check_missing = check_missing

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        missing = 0
        for batch in self.dataset.to_iter_dataset(self.options):
            missing += int(((batch["index"] >= 0) & ~batch["valid"]).sum())
            yield batch
        self.check_missing(missing)


def _load_or_blank(index: int, *, source, crop: CenterCrop, reported: set, on_error: str) -> dict:
    image, label = None, -1
    if index >= 0:
        try:
            record = source[index]
            picture = Picture(record["image"], crop.channels, crop.max_pixels, crop.samples)
            image = resize_and_center_crop(picture, crop.image_size, crop.crop_fraction, crop.interpolation)
            label = record["label"]
        except (BadImage, OSError) as error:
            leave_out(source, index, error, reported=reported, allowed=on_error == "replace")
    valid = np.bool_(image is not None)
    image = image if valid else np.zeros((*crop.image_size, crop.channels), crop.samples.dtype)
    return {"image": image, "label": np.int32(label), "index": np.int64(index), "valid": valid}
