"""What a run has learned, taken out of its workdir and ready for use: by tools, which have no config of their own."""

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from simmim_jax import data
from simmim_jax.runs import checkpoint, pretrained
from simmim_jax.runtime import sharding
from simmim_jax.data.decode import MAX_PIXELS, BadImage
from simmim_jax.data.sources.folder import Folder
from simmim_jax.data.sources.label_maps import IMAGES, MAPS
from simmim_jax.data.sources.splits import WILDCARDS
from simmim_jax.errors import CheckpointError, ConfigError, DataError, UserError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import Objective, make_objective

MAX_THREADS = 16  # that decode images, where nobody says how many
COMPARED = 100  # images of equal names, of which the bytes are compared
CROP, SMALL = 0.875, 32  # of an import: the part of a side that a crop keeps, and pixels up to which that is all
ALL_THE_SAME = "give --split=train to evaluate on these, or other images as --data"
OF_SOURCE = ("source", "path", "name", "data_dir", "heldout_fraction")  # of config.data, which are `make_source`'s


class Run(NamedTuple):
    """A run's weights and what it says of them.

    params: nested dicts of numpy arrays, "encoder" and the heads of its objective, in blocks. config: config.json.
    folder: of the step in the run's workdir. image_size: (height, width) in pixels, that the weights are fitted to.
    """

    params: dict
    config: dict
    encoder: nn.Module
    folder: Path
    image_size: tuple[int, int]

    @property
    def normalization(self) -> dict[str, tuple[float, ...]]:
        """mean and std, a number per channel, on the scale 0..1."""
        return {name: tuple(self.config[name]) for name in ("mean", "std")}

    @property
    def channels(self) -> int:
        return len(self.config["mean"])

    @property
    def crop_fraction(self) -> int | float:
        """Of a resized image's side, that its center crop keeps: the run's.

        Of an import, 224 of 256 pixels; all of images up to 32 pixels, as official `build_transform` has both.
        """
        own = self.config.get("data", {})
        return own.get("crop_fraction", 1.0 if own or max(self.image_size) <= SMALL else CROP)

    @property
    def interpolation(self) -> str:
        return self.config.get("data", {}).get("interpolation", "bicubic")

    @property
    def step(self) -> int:
        return int(self.folder.name) if self.folder.name.isdigit() else 0


def load_run(run: str, image_size: tuple[int, int] | None = None) -> Run:
    """The newest checkpoint of the run `run`, its workdir, or the step whose folder it is.

    Of a run that keeps an average of its parameters, the average. image_size: at which it is to be used, by default
    that of the run; tables of positions are resized to it, and Swin V2 measures displacements as it did there. Raises
    CheckpointError if it does not say what it is.
    """
    folder = checkpoint.find_step(run)  # once: a run that goes on saves newer ones, and removes this
    params, config = checkpoint.read_params(str(folder))
    if "encoder" not in params or not {"encoder", "image_size", "mean", "std"} <= config.keys():
        raise CheckpointError(
            "no encoder, or no config.json that tells what it is", run, "give the workdir of a run, or a step in it"
        )
    encoder = make_encoder(**pretrained.architecture(config["encoder"]))
    before = tuple(config["image_size"])
    now = tuple(image_size or before)
    if now != before:
        stride = encoder.token_stride
        if any(side % stride for side in now):
            raise ConfigError(f"image size {now}", "image_size", f"give multiples of {stride} pixels")
        if encoder.pretrained_windows == ():
            encoder = encoder.clone(pretrained_windows=encoder.stage_windows(before))
        images = jax.ShapeDtypeStruct((1, *now, len(config["mean"])), np.float32)
        abstract = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
        grids = tuple(tuple(side // stride for side in size) for size in (before, now))
        fitted, _ = pretrained.fit({"encoder": params["encoder"]}, {"encoder": abstract}, run, grids)
        params = params | fitted
    return Run(params, config, encoder, folder, now)


def objective_of(trained: Run) -> Objective:
    """The objective that a run was trained for. Raises CheckpointError if it has none, as an imported encoder."""
    options = trained.config.get("objective") or {"name": "none"}
    if options["name"] == "none":
        raise CheckpointError(
            "an encoder alone, without a head", str(trained.folder), "give a run that was fine-tuned or probed"
        )
    return make_objective(encoder=trained.encoder, image_size=trained.image_size, **trained.normalization, **options)


def open_source(trained: Run, path: str, split: str, heldout_fraction: float = 0.1):
    """The records of `path`, as `data.make_source` takes it; or "digits"; or "tfds:NAME"; or, empty, the run's own.

    split: "train" or a part to evaluate on. The run's own images, by their path too, are divided as they were there.
    Raises DataError also for label maps that would be taken for images.
    """
    source = data.make_source(split=split, **source_options(trained, path, heldout_fraction))
    refuse_label_maps(source)
    return source


def refuse_label_maps(source) -> None:
    """Raise DataError if the classes of `source` are the folders of images and of their label maps."""
    there = {name.casefold(): name for name in source.classes}
    images, maps = (next((there[name] for name in names if name in there), "") for names in (IMAGES, MAPS))
    if images and maps:
        root = getattr(source, "root", "")
        what = f"images in {images} and their label maps in {maps}, which are no images to look at"
        raise DataError(what, source.describe(), f"give {os.path.join(root, images)} alone")


def check_labels(source, flag: str) -> None:
    """Raise DataError if its images have classes, and no labels. flag: of the tool, which chooses another part."""
    if not has_labels(source):
        raise DataError(
            "images without labels, as of a test set whose classes are kept", source.describe(),
            f"give images that have one, as another {flag} or --data",
        )  # fmt: skip


def has_labels(source) -> bool:
    """Whether its images have: all, or none. Of some that can be read the first tells; True where none can."""
    for i in range(min(len(source), COMPARED)):
        with contextlib.suppress(BadImage, OSError):
            return source[i]["label"] >= 0
    return True


def source_options(trained: Run, path: str, heldout_fraction: float = 0.1, *, as_divided: bool = True) -> dict:
    """What `open_source` gives `data.make_source`, save the split.

    Raises DataError if the run says of no images, or where they are from a folder that is not this one.
    as_divided: False to take `heldout_fraction` of the run's own images too, where their path is given.
    """
    own = trained.config.get("data", {})
    if path and not (as_divided and is_own(trained, path)):
        tfds, digits = path.startswith("tfds:"), path == "digits" and not os.path.exists("digits")
        return {
            "source": "tfds" if tfds else "digits" if digits else "auto",
            "path": "" if tfds or digits else path,
            "name": path.removeprefix("tfds:") if tfds else "",
            "data_dir": own.get("data_dir", "") if tfds else "",
            "heldout_fraction": heldout_fraction,
        }
    if own.keys() >= set(OF_SOURCE):
        _refuse_relative(own["path"])
        return {name: own[name] for name in OF_SOURCE}
    raise DataError("no images given, and the run says of none", str(trained.folder), "give a folder of images")


def _refuse_relative(path: str) -> None:
    """Raise DataError for a relative path of which nothing is there, seen from here."""
    fixed = WILDCARDS.split(path)[0]  # what stands before {split} and the like
    there = os.path.exists(path) or (fixed != path and os.path.isdir(os.path.dirname(fixed) or "."))
    if path and not there and not os.path.isabs(os.path.expanduser(path)):
        what = f"the run's images were in {path!r}, as seen from where it was started, and are not there from here"
        raise DataError(what, os.getcwd(), "give them (--data=DIR), or run this where the run was started")


def is_own(trained: Run, path: str) -> bool:
    """Whether `path` is that of the images that the run was trained on."""
    own = trained.config.get("data", {})
    if not path or not own.get("path") or not own.keys() >= set(OF_SOURCE):
        return False
    return len({os.path.realpath(os.path.expanduser(each)) for each in (path, own["path"])}) == 1


def training_images(trained: Run):
    """The records that the run was trained on, where its config says that they are."""
    segments = (trained.config.get("objective") or {}).get("name") == "segment"
    make = data.make_label_map_source if segments else data.make_source
    return make(split=trained.config.get("data", {}).get("split", "train"), **source_options(trained, ""))


def follow_images(trained: Run, path: str) -> Run:
    """The same run, of whose images `path` is the place, if what it was trained on is there now, else as it was.

    By the fingerprint in its checkpoint, which says nothing of the place, where the run divided its images itself.
    """
    own, kept = trained.config.get("data", {}), checkpoint.read_fingerprints(trained.folder).get("source")
    if not path or not own.get("path") or not own.get("heldout_fraction") or not kept or is_own(trained, path):
        return trained
    moved = trained._replace(config=trained.config | {"data": own | {"path": path}})
    with contextlib.suppress(UserError):
        if training_images(moved).fingerprint() == kept:
            return moved
    return trained


def seen_in_training(trained: Run, source) -> str:
    """Tells of an image in `source` that the run was trained on, or that this cannot be known; "" where none is found.

    Of folders, with maps or without: of images with equal names some are compared. It cannot be known where the run's
    own folder is gone, and its classes are no others. Raises DataError if they are the run's, every one of them.
    """
    own, kept = trained.config.get("data", {}), checkpoint.read_fingerprints(trained.folder).get("source", {})
    found = source.fingerprint()
    if found == kept:
        raise DataError("all of these images the run was trained on", source.describe(), ALL_THE_SAME)
    if not own.get("path") or not _is_folder(source):
        return ""
    try:
        seen = training_images(trained)
    except UserError:
        known = tuple(trained.config.get("classes") or source.classes)
        if kept.get("source") != found["source"] or known != tuple(source.classes):
            return ""
        told = "whether the run was trained on some of these images cannot be known: its own"
        return f"{told}, {own['path']!r}, are not there any more"
    if not _is_folder(seen):
        return ""
    places = {source.name(i): i for i in range(len(source))}
    both = [(places[name], i) for i in range(len(seen)) if (name := seen.name(i)) in places]
    for here, there in both[:: -(-len(both) // COMPARED) or 1]:
        with contextlib.suppress(OSError):
            if source[here]["image"] == seen[there]["image"]:
                return f"the run was trained on some of these images, like {source.name(here)}"
    return ""


def _is_folder(source) -> bool:
    return isinstance(getattr(source, "images", source), Folder)


def crop_as_asked(trained: Run, crop_fraction: int | float | None, interpolation: str) -> dict[str, int | float | str]:
    """`crop_fraction` and `interpolation`, those of `trained` where they are None and empty."""
    return {
        "crop_fraction": trained.crop_fraction if crop_fraction is None else crop_fraction,
        "interpolation": interpolation or trained.interpolation,
    }


def told_pixels(trained: Run, crop_fraction: int | float, interpolation: str) -> str:
    return f"{told_size(trained.image_size)} pixels, crop {crop_fraction:g}, {interpolation}"


def told_size(size: tuple[int, int]) -> str:
    """One number of a square, as timm has it, else two."""
    return "x".join(map(str, dict.fromkeys(size)))


def make_pass(
    trained: Run,
    source,
    mesh,
    *,
    batch_size: int = 64,
    crop_fraction: int | float | None = None,
    interpolation: str = "",
    limit: int = 0,
    threads: int | None = None,
    on_error: str = "replace",
) -> data.Epoch:
    """Each image of `source` once, as the model wants it: this process's batches (see `data.make_epoch`).

    batch_size: at least; it becomes a multiple of what the devices of `mesh` need. crop_fraction, interpolation: where
    they are None and empty, those of `trained`. threads: that decode a batch each; None: as many as cores, up to 16.
    """
    ways = sharding.num_batch_shards(mesh)
    threads = min(data.cores(), MAX_THREADS) if threads is None else threads
    return data.make_epoch(
        source,
        data.CenterCrop(
            image_size=trained.image_size,
            channels=trained.channels,
            max_pixels=trained.config.get("data", {}).get("max_pixels", MAX_PIXELS),
            **crop_as_asked(trained, crop_fraction, interpolation),
        ),
        batch_size=-(-batch_size // ways) * ways,
        limit=limit,
        shard=data.Shard(*sharding.batch_shard(mesh)),
        loading=data.Loading(threads=threads, on_error=on_error, max_bad_fraction=1.0),
    )


def class_names(trained: Run) -> tuple[str, ...]:
    """The names of a classifier's classes: of config.json, or of the run's images; () where neither knows them all."""
    names = trained.config.get("classes") or ()
    if not names:
        with contextlib.suppress(UserError):
            names = training_images(trained).classes
    return tuple(names) if len(names) == trained.config["objective"]["num_classes"] else ()


def other_class(known: tuple[str, ...], source) -> str:
    """Tells of the first class whose name in `source` is not that which the run knows; "" where all are, or have none.

    known: the names of a run's classes, as many as those of `source`, or none.
    """
    if not known or not source.classes or known == tuple(source.classes):
        return ""
    n = next(n for n, names in enumerate(zip(known, source.classes, strict=True)) if len(set(names)) > 1)
    told = f"class {n} is {known[n]!r} in the run and {source.classes[n]!r} in {source.describe()}"
    return f"{told}: the head tells classes by number"
