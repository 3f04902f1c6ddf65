"""Evaluation of segmentation: whole images with their label maps."""

import math
from collections.abc import Iterator

import grain
import numpy as np

from simmim_jax.data.batches import Loading
from simmim_jax.data.decode import BadImage, Picture, leave_out
from simmim_jax.data.epoch import CenterCrop
from simmim_jax.data.label_maps import LabelMapSpec, read_pair, scale_factor
from simmim_jax.data.transforms import resize


class SegmentationSet:
    """Each image of a source once, in order and uncropped, with its map. Can be iterated over repeatedly.

    A record is {"image": [h, w, c], scaled as for training but not at random; "label_map": [y, x], of the size of
    its file; "index": int}. A record without a map gets one without classes, of the size of the image. A bad image is
    logged and left out, or raises DataError if `loading.on_error` is "raise".

    `max_bad_images` is the number of bad images that `loading` allows, rounded up. The caller checks it, because only
    the caller knows the bad images of all processes.
    """

    def __init__(
        self,
        source,
        crop: CenterCrop,
        maps: LabelMapSpec,
        *,
        limit: int = 0,
        loading: Loading = Loading(max_bad_fraction=1.0),  # noqa: B008
    ):
        """crop: how images are read; they are scaled for crops of `image_size`. limit: number of images; 0 for all."""
        self.source, self.crop, self.maps, self.loading = source, crop, maps, loading
        self.classes, self.count = source.classes, min(limit or len(source), len(source))
        self.max_bad_images = math.ceil(loading.max_bad_fraction * self.count)
        self.reported = set()

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        threads = max(self.loading.threads, 1)
        dataset = grain.MapDataset.range(self.count).map(self._load)
        return iter(dataset.to_iter_dataset(grain.ReadOptions(threads, 2 * threads)))

    def _load(self, n: int) -> dict | None:
        index, crop = n * len(self.source) // self.count, self.crop
        decoding = (crop.channels, crop.max_pixels, crop.samples)
        try:
            record = self.source[index]
            if "map" in record:
                picture, label_map = read_pair(record, self.maps, *decoding)
            else:
                picture = Picture(record["image"], *decoding)
                label_map = np.full((picture.height, picture.width), self.maps.ignored, self.maps.dtype)
            pixels = picture.read()
        except (BadImage, OSError) as error:
            allowed = self.loading.on_error == "replace"
            leave_out(self.source, index, error, reported=self.reported, allowed=allowed)
            return None
        factor = scale_factor(label_map.shape, crop.image_size, self.maps.short_side)
        scaled = tuple(max(1, round(side * factor)) for side in label_map.shape)
        image = (
            pixels if scaled == label_map.shape else resize(pixels, scaled, crop.interpolation, missing=picture.missing)
        )
        return {"image": image, "label_map": label_map, "index": index}
