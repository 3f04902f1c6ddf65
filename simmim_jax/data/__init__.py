"""The input pipeline, from files to batches. Nothing here imports JAX, so that worker processes start fast.

`sources` finds and reads the records. `decode` and `transforms` turn a record into pixels. `batches` makes training
batches, starting at any step. `epoch` makes the batches of one evaluation pass.
"""

from simmim_jax.data.batches import (
    BAD_IMAGES_FIX,
    BatchSpec,
    Loading,
    Shard,
    advice,
    check_batches,
    cores,
    fingerprint,
    make_batches,
    max_bad_images,
)
from simmim_jax.data.epoch import CenterCrop, Epoch, make_epoch
from simmim_jax.data.label_maps import LabelMapSpec, check_maps
from simmim_jax.data.pixels import Pixels
from simmim_jax.data.sample import PixelOptions, check_pixels, resolve_pixels
from simmim_jax.data.segmentation_set import SegmentationSet
from simmim_jax.data.sources import SOURCES, make_source, share_images
from simmim_jax.data.sources.classes import classes_with_images, compare_classes, how_to_label, untrained_classes
from simmim_jax.data.sources.label_maps import make_label_map_source
from simmim_jax.data.sources.unread import one_report

__all__ = [
    "BAD_IMAGES_FIX",
    "SOURCES",
    "BatchSpec",
    "CenterCrop",
    "Epoch",
    "LabelMapSpec",
    "Loading",
    "PixelOptions",
    "Pixels",
    "SegmentationSet",
    "Shard",
    "advice",
    "check_batches",
    "check_maps",
    "check_pixels",
    "classes_with_images",
    "compare_classes",
    "cores",
    "fingerprint",
    "how_to_label",
    "make_batches",
    "make_epoch",
    "make_label_map_source",
    "make_source",
    "max_bad_images",
    "one_report",
    "resolve_pixels",
    "share_images",
    "untrained_classes",
]
