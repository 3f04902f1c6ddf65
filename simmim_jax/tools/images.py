"""The images that a finished run is shown: its own training or held-out images, or others."""

import argparse
import contextlib
import glob
import math
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from jax.sharding import Mesh

from simmim_jax import data
from simmim_jax.data.decode import MAX_PIXELS, BadImage
from simmim_jax.data.sources import KINDS
from simmim_jax.data.sources.classes import differs_from_text_order
from simmim_jax.data.sources.folder import Folder, split_folders
from simmim_jax.data.sources.label_maps import IMAGES, MAPS
from simmim_jax.data.sources.splits import EVALUATION, WILDCARDS, existing_part
from simmim_jax.data.sources.tfds import prepared_directory
from simmim_jax.errors import DataError, UserError
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run, format_size
from simmim_jax.runtime import sharding
from simmim_jax.tools.cli import add_context

MAX_THREADS = 16  # cap on decoder threads by default
MAX_COMPARED = 100  # images of equal names whose bytes are compared
ALL_THE_SAME = "give --split=train to evaluate on these, or other images as --data"
OTHERS = "give others as --data"
TFDS_PARTS = ("validation", "test")  # of a TFDS data set, to evaluate on
SOURCE_FIELDS = ("source", "path", "name", "data_dir", "heldout_fraction")  # of config.data, for `data.make_source`


class Files:
    """A source of image files, given by their paths."""

    classes = ()

    def __init__(self, paths: list[str]):
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict:
        return {"image": Path(self.paths[i]).read_bytes(), "label": -1, "name": self.paths[i]}

    def name(self, i: int) -> str:
        return self.paths[i]

    def describe(self) -> str:
        return f"{len(self)} files"


# --- where the images are


def open_source(run: Run, path: str, split: str, heldout_fraction: float = 0.1):
    """The images of `path`: a data.path, "digits", "tfds:NAME", or "" for the run's own.

    The run's own images are divided as in the run, also if they are given by their path. Raises DataError also for
    label maps that would be read as images.
    """
    source = data.make_source(split=split, **source_options(run, path, heldout_fraction))
    refuse_label_maps(source)
    data.check_pixels(run.pixels, source)
    return source


def source_options(run: Run, path: str, heldout_fraction: float = 0.1, *, as_divided: bool = True) -> dict:
    """The arguments of `data.make_source` for `open_source`, except the split.

    as_divided: False to apply `heldout_fraction` also to the run's own images, if their path is given.
    Raises DataError if the run's config names no images, or names them by a path that does not exist from here.
    """
    own = run.config.get("data", {})
    if path and not (as_divided and is_own(run, path)):
        tfds, digits = path.startswith("tfds:"), path == "digits" and not os.path.exists("digits")
        return {
            "source": "tfds" if tfds else "digits" if digits else "auto",
            "path": "" if tfds or digits else path,
            "name": path.removeprefix("tfds:") if tfds else "",
            "data_dir": own.get("data_dir", "") if tfds else "",
            "heldout_fraction": heldout_fraction,
        }
    if own.keys() >= set(SOURCE_FIELDS):
        _refuse_missing(own["path"])
        return {name: own[name] for name in SOURCE_FIELDS}
    raise DataError("no images given, and the run's config names none", str(run.folder), "give a folder of images")


def _refuse_missing(path: str) -> None:
    """Raise DataError for a relative path that does not exist in the current folder."""
    fixed = WILDCARDS.split(path)[0]  # the part before {split} and the like
    exists = os.path.exists(path) or (fixed != path and os.path.isdir(os.path.dirname(fixed) or "."))
    if path and not exists and not os.path.isabs(os.path.expanduser(path)):
        what = f"the run's images were in {path!r}, relative to the folder where it was started; they are not here"
        raise DataError(what, os.getcwd(), "give them (--data=DIR), or run this where the run was started")


def is_own(run: Run, path: str) -> bool:
    """Whether `path` is the data.path of the run."""
    own = run.config.get("data", {})
    if not path or not own.get("path") or not own.keys() >= set(SOURCE_FIELDS):
        return False
    return len({os.path.realpath(os.path.expanduser(each)) for each in (path, own["path"])}) == 1


def open_training_images(run: Run):
    """The images that the run was trained on, as its config names them."""
    make = data.make_label_map_source if "label_map" in run.needs else data.make_source
    with data.one_report(log=False):
        return make(split=run.config.get("data", {}).get("split", "train"), **source_options(run, ""))


def follow_images(run: Run, path: str) -> Run:
    """The run with `path` as its data.path, if its training images are there now; else the run unchanged.

    Compares with the fingerprint in the checkpoint, which does not depend on the path if the run divided its images.
    """
    own, saved = run.config.get("data", {}), checkpoint.read_fingerprints(run.folder).get("source")
    if not path or not own.get("path") or own.get("heldout_fraction", 0) == 0 or not saved or is_own(run, path):
        return run
    moved = run._replace(config=run.config | {"data": own | {"path": path}})
    with contextlib.suppress(UserError):
        if open_training_images(moved).fingerprint() == saved:
            return moved
    return run


# --- the images to evaluate on


def open_heldout(run: Run, options: argparse.Namespace, make: Callable, is_training: Callable[[object], bool]):
    """The source of the images that `options` (data, split) ask to evaluate on.

    Of the run's own images, the held-out part. Of others, --split, or else the evaluation part, or else all, if a
    folder or file has no parts. Warns of images that the run may have been trained on. Raises DataError if the part
    exists but cannot be read, and if all images are for training.

    make: (split) -> the source of a part; images that are not the run's own are not divided.
    is_training: (source) -> whether the images of an undivided folder or file are a training part.
    """
    path = options.data
    own = not path or is_own(run, path)
    if own or options.split:
        with add_context(OTHERS) if own else add_context():
            source = make(split=options.split or run.config.get("data", {}).get("heldout_split", "validation"))
        saved, found = checkpoint.read_fingerprints(run.folder).get("heldout"), source.fingerprint()
        if own and saved and saved != found and saved.get("split") == found.get("split"):
            warn(f"{source.describe()}: not the images that the run held out: it may have been trained on some of them")
        if not own:
            warn_if_seen(run, source, refuse=False)
        return source
    prepared = path.startswith("tfds:") or prepared_directory(path)
    first, second = TFDS_PARTS if prepared else ("validation", "train")
    try:
        source = make(split=first)
    except DataError as error:
        absent = error.what.endswith(f"has no split {first!r}") if prepared else "heldout_fraction" in error.where
        if not absent:
            raise
        source = make(split=second)
        if not prepared and is_training(source):
            raise DataError("images to train on, and none to evaluate on", path, ALL_THE_SAME) from error
    warn_if_seen(run, source, refuse=True)
    return source


def warn_if_seen(run: Run, source, *, refuse: bool) -> None:
    """Print the warning of `seen_in_training`. refuse: raise its DataError instead of printing that too."""
    try:
        seen = seen_in_training(run, source)
    except DataError as error:
        if refuse:
            raise
        seen = error.what
    if seen:
        warn(seen)


def warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def has_parts(path: str) -> bool:
    """Whether `path` has a training part, or an empty evaluation part, by the rules of `data.sources.splits`."""
    if "{split}" in path or {"train", *EVALUATION} & split_folders(path).keys():
        return True
    names = []
    if not os.path.exists(path):  # wildcards
        root, pattern = existing_part(path)
        names = [pattern, *glob.glob(pattern, root_dir=root, recursive=True)]
    for folder in (path, os.path.join(path, "data")):
        names += os.listdir(folder) if os.path.isdir(folder) else []
    shards = tuple(extension for extensions in KINDS for extension in extensions)
    shard_names = (name.lower() for name in names if name.lower().endswith(shards))
    return any("train" in re.split(r"[^a-z0-9]+", name) for name in shard_names)


def seen_in_training(run: Run, source) -> str:
    """A warning if `source` has an image that the run was trained on, or if this cannot be known; else "".

    Compares paths without links, and some images of equal names for folders with or without label maps. It cannot be
    known if the run's own folder is gone and the classes are the same. Raises DataError if `source` is all of the run's
    training images.
    """
    own, saved = run.config.get("data", {}), checkpoint.read_fingerprints(run.folder).get("source", {})
    found = source.fingerprint()
    if found == saved:
        raise DataError("the run was trained on all of these images", source.describe(), ALL_THE_SAME)
    if not own.get("path"):
        return ""
    try:
        trained_on = open_training_images(run)
    except UserError:
        known = tuple(run.config.get("classes") or source.classes)
        if not _is_folder(source) or saved.get("source") != found["source"] or known != tuple(source.classes):
            return ""
        return f"the run may have been trained on some of these images: its own, {own['path']!r}, are gone"
    if data.share_images(source, trained_on):
        return f"the run was trained on some of these images: {source.describe()}"
    if not _is_folder(source) or not _is_folder(trained_on):
        return ""
    index = {source.name(i): i for i in range(len(source))}
    pairs = [(index[name], i) for i in range(len(trained_on)) if (name := trained_on.name(i)) in index]
    for i, j in pairs[:: -(-len(pairs) // MAX_COMPARED) or 1]:
        with contextlib.suppress(OSError):
            if source[i]["image"] == trained_on[j]["image"]:
                return f"the run was trained on some of these images, like {source.name(i)}"
    return ""


def _is_folder(source) -> bool:
    return isinstance(getattr(source, "images", source), Folder)


# --- labels and classes


def refuse_label_maps(source) -> None:
    """Raise DataError if the classes of `source` are a folder of images and a folder of their label maps."""
    found = {name.casefold(): name for name in source.classes}
    images, maps = (next((found[name] for name in names if name in found), "") for names in (IMAGES, MAPS))
    if images and maps:
        root = getattr(source, "root", "")
        what = f"{images} and {maps} are images and their label maps, not two classes"
        raise DataError(what, source.describe(), f"give {os.path.join(root, images)}")


def check_labels(source, flag: str) -> None:
    """Raise DataError if the images have no labels. flag: the option that chooses another part."""
    if not has_labels(source):
        fix = f"{data.how_to_label(source)}, or give labeled images with {flag} or --data"
        raise DataError("images without labels", source.describe(), fix)


def has_labels(source) -> bool:
    """Whether the first readable image has a label; True if none is readable."""
    for i in range(min(len(source), MAX_COMPARED)):
        with contextlib.suppress(BadImage, OSError):
            return source[i]["label"] >= 0
    return True


def class_names(run: Run) -> tuple[str, ...]:
    """The names of a classifier's classes, from config.json or from the run's images; () if neither has them all."""
    names = run.config.get("classes") or ()
    if not names:
        with contextlib.suppress(UserError):
            names = open_training_images(run).classes
    return tuple(names) if len(names) == run.config["objective"]["num_classes"] else ()


class Relabeled:
    """A source with the classes of a run, of which it has some: a label is the number of its name there."""

    def __init__(self, source, classes: tuple[str, ...]):
        self.source, self.classes = source, classes
        self.numbers = [classes.index(name) for name in source.classes]

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, i: int) -> dict:
        record = self.source[i]
        return record | {"label": self.numbers[record["label"]] if record["label"] >= 0 else -1}

    def name(self, i: int) -> str:
        return self.source.name(i)

    def describe(self) -> str:
        return self.source.describe()


def match_classes(known: tuple[str, ...], source):
    """The source with the run's classes, if it has only classes of these names, but not all or in another order.

    known: the run's class names, or ().
    """
    if not source.classes or source.classes == known or not set(known).issuperset(source.classes):
        return source
    print(f"{len(source.classes)} of the run's {len(known)} classes, matched by their names", flush=True)
    return Relabeled(source, known)


def warn_other_classes(known: tuple[str, ...], source) -> None:
    """Warn of the first class that has another name in `source` than in the run.

    known: the run's class names, one for each of the source's, or (). Without them, warn if the order of numbers is not
    that of text, by which torchvision and others number the classes.
    """
    if not known and differs_from_text_order(source):
        by_number, by_text = (", ".join(names[:4]) for names in (source.classes, sorted(source.classes)))
        order = f"by their numbers ({by_number}, ...), not by text as torchvision orders them ({by_text}, ...)"
        warn(f"the head has no class names: the classes of {source.describe()} are in the order {order}")
    for n, (ours, theirs) in enumerate(zip(known, source.classes, strict=True) if known and source.classes else ()):
        if ours != theirs:
            warn(f"class {n} is {ours!r} in the run and {theirs!r} in {source.describe()}: the head knows only numbers")
            return


# --- one pass over the images


def make_crop(run: Run, crop_fraction: int | float | None = None, interpolation: str = "") -> data.CenterCrop:
    """How images are resized and cropped; as in the run, if the options are None and ""."""
    return data.CenterCrop(
        image_size=run.image_size,
        channels=run.channels,
        crop_fraction=run.crop_fraction if crop_fraction is None else crop_fraction,
        interpolation=interpolation or run.interpolation,
        max_pixels=run.config.get("data", {}).get("max_pixels", MAX_PIXELS),
        samples=run.pixels.samples,
    )


def describe_crop(crop: data.CenterCrop) -> str:
    return f"{format_size(crop.image_size)} pixels, crop {crop.crop_fraction:g}, {crop.interpolation}"


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The smallest multiple of what the devices of `mesh` need that is at least `batch_size`."""
    num_shards = sharding.num_batch_shards(mesh)
    return -(-batch_size // num_shards) * num_shards


def make_pass(
    source, crop: data.CenterCrop, mesh: Mesh, *, batch_size: int = 64, limit: int = 0, threads: int | None = None
) -> data.Epoch:
    """Each image of `source` once: this process's batches. threads: see `make_loading`."""
    return data.make_epoch(
        source,
        crop,
        batch_size=round_up(batch_size, mesh),
        limit=limit,
        shard=data.Shard(*sharding.batch_shard(mesh)),
        loading=make_loading(threads),
    )


def make_loading(threads: int | None, max_bad_fraction: int | float = 1.0) -> data.Loading:
    """How images are loaded. threads: decoder threads, a batch each; None: one per core, up to 16."""
    threads = min(data.cores(), MAX_THREADS) if threads is None else threads
    return data.Loading(threads=threads, max_bad_fraction=max_bad_fraction)


def check_left_out(left_out: int, count: int, max_bad_fraction: int | float, source) -> None:
    """Raise DataError if more than this fraction of `count` images, rounded up, are left out."""
    if left_out > math.ceil(max_bad_fraction * count):
        what = f"{left_out} of {count} images cannot be read or have no class"
        raise DataError(what, source.describe(), "fix them, or set --max-bad-fraction higher")
