"""The images that a tool evaluates on: what the run held out of its own, and of others the part for that."""

import argparse
import glob
import os
import re
import sys
from collections.abc import Callable

from simmim_jax.data.sources import KINDS
from simmim_jax.data.sources.folder import split_folders
from simmim_jax.data.sources.splits import EVALUATION, existing_part
from simmim_jax.data.sources.tfds import prepared_directory
from simmim_jax.errors import DataError
from simmim_jax.runs import checkpoint, finished
from simmim_jax.runs.finished import Run
from simmim_jax.tools.cli import add_context

OTHERS = "give others as --data"  # where a run held out nothing
TFDS_PARTS = ("validation", "test")  # of a TFDS data set, to evaluate on


def open_heldout(model: Run, options: argparse.Namespace, make: Callable, to_train_on: Callable, *, own: bool):
    """The source of the images that `options`, of the tool `evaluate`, mean.

    Of the run's own images the held-out part; of others that which --split names, else the part for evaluation, else,
    of a folder or file without parts, all. Warns of images that the run may have been trained on. Raises DataError
    where there is a part, and it cannot be read, and where there are images to train on alone.

    Args:
      make: (split=...) -> the source of a part, of which nothing is held out where the images are not the run's own.
      to_train_on: (source) -> whether all the images that there are, those of a folder or file, are a part to train on.
      own: whether the images are the run's own.
    """
    path = options.data
    if own or options.split:
        with add_context(OTHERS) if own else add_context():
            source = make(split=options.split or model.config.get("data", {}).get("heldout_split", "validation"))
        kept, found = checkpoint.read_fingerprints(model.folder).get("heldout"), source.fingerprint()
        if own and kept and kept != found and kept.get("split") == found.get("split"):
            print(f"warning: {source.describe()}: not what the run held out: the data have changed since, or are "
                  "others, and it may have been trained on some of these", file=sys.stderr)  # fmt: skip
        return source
    prepared = path.startswith("tfds:") or prepared_directory(path)
    first, second = TFDS_PARTS if prepared else ("validation", "train")
    try:
        return make(split=first)
    except DataError as error:
        absent = error.what.endswith(f"has no split {first!r}") if prepared else "heldout_fraction" in error.where
        if not absent:
            raise
    source = make(split=second)
    if not prepared and to_train_on(source):
        raise DataError("images to train on, and none to evaluate on", path, finished.ALL_THE_SAME)
    if seen := finished.seen_in_training(model, source):
        print(f"warning: {seen}", file=sys.stderr)
    return source


def has_parts(path: str) -> bool:
    """Whether there is a part to train on, or an empty one to evaluate on, by the rules of `data.sources.splits`."""
    if "{split}" in path or {"train", *EVALUATION} & split_folders(path).keys():
        return True
    names = []
    if not os.path.exists(path):  # wildcards
        root, pattern = existing_part(path)
        names = [pattern, *glob.glob(pattern, root_dir=root, recursive=True)]
    for folder in (path, os.path.join(path, "data")):
        names += os.listdir(folder) if os.path.isdir(folder) else []
    shards = tuple(extension for extensions in KINDS for extension in extensions)
    return any("train" in re.split(r"[^a-z0-9]+", name.lower()) for name in names
               if name.lower().endswith(shards))  # fmt: skip
