"""Where images lie: random access to records by index, that survives being pickled into worker processes.

A source has a length; `source[i]`, a record {"image": bytes or uint8 [h, w, c], "label": int, -1 where there is none,
"name": str}; `source.name(i)`, the name alone, without reading; `classes`, the names of the labels, empty where there
are none; `describe()`, for messages; and `fingerprint()`, which changes whenever the records or their order do.
"""

import difflib
import functools
import hashlib
import logging
import os
from collections.abc import Iterator

import numpy as np

from simmim_jax.errors import ConfigError, DataError, nearest_of

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
EVALUATION = ("val", "valid", "validation", "test")  # one thing, by four names


def make_source(
    source: str,
    *,
    path: str = "",
    name: str = "",
    data_dir: str = "",
    split: str = "train",
    heldout_fraction: float = 0.1,
) -> "Digits | Folder | Tfds":
    """The records of one split of a data set.

    Args:
      source: `digits`: scikit-learn's 1,797 hand-written digits, there without a download. `folder`: any folder of
        images, flat or by class (`make_folder`). `tfds`: a prepared TensorFlow Datasets data set.
      path: of the folder.
      name, data_dir: of the TFDS data set, and of the directory that it was prepared in; "" is TFDS's own.
      split: "train", or a part to evaluate on: val, valid, validation, test. For TFDS any split or slice of it.
      heldout_fraction: what is kept from training of a folder that has no split for evaluation.

    Raises:
      ConfigError: for a source or split that does not exist.
      DataError: where there are no such images.
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}", "data.source", nearest_of(source, SOURCES))
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction={heldout_fraction}", "data.heldout_fraction", "must be in [0, 1)")
    return SOURCES[source](path=path, name=name, data_dir=data_dir, split=split, heldout_fraction=heldout_fraction)


def make_digits(*, split: str, **_) -> "Digits":
    """The digits of one split: "train", or "test" by any of its names."""
    if split not in ("train", *EVALUATION):
        raise ConfigError(f"digits has no split {split!r}", "data.split", "choose one of train, test")
    return Digits("train" if split == "train" else "test")


def make_folder(*, path: str, split: str, heldout_fraction: float, **_) -> "Folder":
    """The images below `path` that belong to `split`, in the order of their names.

    `path/<split>` is taken where it exists, an evaluation split by any of its names. Otherwise the images to evaluate
    on are a fixed part (of `path/train`, if there is one), drawn by a hash of the name: no file changes sides when
    others come or go (but in a folder so small that the part would be no image, where it is one). The class is the
    first directory below that root; a folder with images outside of such directories, or with only one, is unlabelled.
    Links are followed, no directory is visited twice, and hidden names are skipped.
    """
    if not path:
        raise ConfigError("data.path is empty", "data.source=folder", "set data.path to a folder of images")
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(path):
        raise DataError(f"{path} is not a folder", "data.path", _nearest_folder(path))
    folders = _folders(path)
    evaluation = [side for side in EVALUATION if side in folders]
    if split in EVALUATION:
        own = next((side for side in (split, *evaluation) if side in folders), "")
    else:
        own = split if split in folders else ""
        if split != "train" and not own:
            raise ConfigError(
                f"{path} has no {split!r}", "data.split", nearest_of(split, {"train", "val", *folders[:10]})
            )
        if not own and evaluation:
            fix = "name the images to train on train/, or point data.path one level down"
            raise DataError(f"{path} has {evaluation[0]}/ but no train/", "data.path", fix)

    root = os.path.join(path, own or "train") if own or "train" in folders else path
    names = sorted(_walk(root))
    if not names:
        raise DataError(f"{root} has 0 images", f"looked for {' '.join(EXTENSIONS)}", _nearest_images(root))
    standard = "train" in folders and split in ("train", *EVALUATION)
    others = [os.path.join(path, side) for side in ("train", *evaluation) if standard and side != own]
    classes, labels = _classes(names, others)
    if (split in EVALUATION and not own) or (split == "train" and not evaluation):
        held_out = _held_out(names, heldout_fraction)
        keep = np.flatnonzero(held_out == (split != "train"))
        if not len(keep):
            what = f"{root} has 0 of its {len(names)} images in split {split!r}"
            raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
        names, labels = [names[i] for i in keep], labels[keep]
    return Folder(root, split, names, labels, classes)


def make_tfds(*, name: str, data_dir: str, split: str, **_) -> "Tfds":
    """One split, or slice of one, of a TFDS data set that has been prepared. Never downloads."""
    if not name:
        raise ConfigError("data.name is empty", "data.source=tfds", "set data.name to a data set, such as imagenet2012")
    return Tfds(name, os.path.expanduser(data_dir), split)


SOURCES = {"digits": make_digits, "folder": make_folder, "tfds": make_tfds}


class Digits:
    """scikit-learn's digits: 8 x 8 grey, 1,437 to train on and 360 to test on, drawn once and for ever."""

    def __init__(self, split: str):
        from sklearn.datasets import load_digits

        digits = load_digits()
        # the file is cyclic in the class; RandomState's stream is frozen, where default_rng's may change with numpy
        order = np.random.RandomState(0).permutation(len(digits.images))
        self.split, self.order = split, order[:1437] if split == "train" else order[1437:]
        self.images = np.round(digits.images[self.order] * (255 / 16)).astype(np.uint8)[..., None]  # n h w 1
        self.labels = digits.target[self.order]
        self.classes = tuple(str(label) for label in digits.target_names)

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, i: int) -> dict:
        return {"image": self.images[i], "label": int(self.labels[i]), "name": self.name(i)}

    def name(self, i: int) -> str:
        return f"digits/{self.order[i]}"

    def describe(self) -> str:
        return f"digits, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        digest = hashlib.sha256(self.images.tobytes() + self.labels.astype(np.int32).tobytes()).hexdigest()
        return {"source": "digits", "split": self.split, "count": len(self), "images_sha256": digest}


class Folder:
    """Image files below `root`, by name: two arrays and one string of bytes, quick to pickle at a million files."""

    def __init__(self, root: str, split: str, names: list[str], labels: np.ndarray, classes: tuple[str, ...]):
        encoded = [os.fsencode(name) for name in names]
        self.root, self.split, self.labels, self.classes = root, split, labels, classes
        self.names, self.ends = b"".join(encoded), np.cumsum([len(name) for name in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> dict:
        name = self.name(i)
        with open(os.path.join(self.root, name), "rb") as file:
            return {"image": file.read(), "label": int(self.labels[i]), "name": name}

    def name(self, i: int) -> str:
        return os.fsdecode(self.names[self.ends[i - 1] if i else 0 : self.ends[i]])

    def describe(self) -> str:
        return f"{self.root}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        digest = hashlib.sha256(self.names + self.ends.tobytes()).hexdigest()
        return {"source": "folder", "split": self.split, "count": len(self), "names_sha256": digest}


class Tfds:
    """A split of a prepared TFDS data set, read from its ArrayRecord files without TensorFlow."""

    def __init__(self, name: str, data_dir: str, split: str):
        import tensorflow_datasets as tfds

        self.dataset, self.data_dir, self.split = name, data_dir, split
        info = _make_tfds_builder(name, data_dir).info
        try:
            self.count = info.splits[split].num_examples
        except (KeyError, ValueError, AssertionError) as error:
            splits = ", ".join(f"{key} ({value.num_examples})" for key, value in sorted(info.splits.items()))
            fix = "set data.split to one of them, or to a slice like train[:90%]"
            raise DataError(f"{name} has no split {split!r}", f"splits: {splits}", fix) from error
        self.images = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.Image)]
        labels = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
        if "image" not in self.images and len(self.images) != 1:
            what = f"{info.full_name} has {len(self.images)} image features, and none named 'image'"
            raise DataError(what, f"features: {', '.join(info.features)}", "choose another data.name")
        if not self.count:
            raise DataError(f"{info.full_name} has 0 images", f"split {split!r}", "set data.split to a larger one")
        self.full_name = info.full_name
        self.image = "image" if "image" in self.images else self.images[0]
        self.label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
        self.classes = tuple(info.features[self.label].names) if self.label else ()

    @functools.cached_property
    def records(self):
        import tensorflow_datasets as tfds

        decoders = {key: tfds.decode.SkipDecoding() for key in self.images}
        return _make_tfds_builder(self.dataset, self.data_dir).as_data_source(self.split, decoders=decoders)

    def __getstate__(self) -> dict:  # open files do not travel: each process opens its own
        return {key: value for key, value in self.__dict__.items() if key != "records"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        record = self.records[i]
        label = int(record[self.label]) if self.label else -1
        return {"image": record[self.image], "label": label, "name": self.name(i)}

    def name(self, i: int) -> str:
        return f"{self.full_name}/{self.split}/{i}"

    def describe(self) -> str:
        return f"{self.full_name}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        return {"source": "tfds", "name": self.full_name, "split": self.split, "count": len(self)}


def _make_tfds_builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    fix = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
    fix = f"set data.data_dir to where it is, or prepare it once: pip install tensorflow-cpu && {fix}"
    absl = logging.getLogger("absl")
    level = absl.level
    absl.setLevel(logging.ERROR)  # it warns of every folder that it looks into
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if builder.is_prepared():
            return builder
    except tfds.core.DatasetNotFoundError as error:
        known = [*_folders(data_dir), *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else "see tensorflow_datasets.list_builders()"
        raise DataError(f"TFDS has no data set {name!r}", f"data_dir={data_dir!r}", meant) from error
    except Exception as error:  # a bad version, config or file format: TFDS asserts, and raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rpartition('": ')[2][:200]
        raise DataError(f"TFDS cannot open {name!r}", f"data_dir={data_dir!r}: {reason}", fix) from error
    finally:
        absl.setLevel(level)
    raise DataError(f"{name} is not prepared", f"looked in {builder.data_dir}", fix)


def _walk(root: str) -> Iterator[str]:
    """Names of the images below `root`, relative to it, in no order."""
    seen, folders, links = set(), [""], []
    while folders or links:
        # links last and by name, so that of two ways to a directory the same one is taken on every disk
        folder = folders.pop() if folders else links.pop(links.index(min(links)))
        where = os.path.join(root, folder)
        try:
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(where) as listing:
                entries = list(listing)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DataError(f"{where} cannot be read", reason, "mend it, or move it out of data.path") from error
        for entry in entries:
            if entry.name.startswith("."):
                continue
            name = f"{folder}/{entry.name}" if folder else entry.name
            if _is_folder(entry):
                (links if entry.is_symlink() else folders).append(name)
            elif entry.name.lower().endswith(EXTENSIONS) and _is_file(entry):
                yield name


def _classes(names: list[str], others: list[str]) -> tuple[tuple[str, ...], np.ndarray]:
    """Class names, of these images and those below the `others`, and a label (int32) for each of these."""
    firsts = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    found = set(firsts)
    for other in others:
        found |= {folder for folder in _folders(other) if folder in found or _has_images(os.path.join(other, folder))}
    if "" in found or len(found) < 2:
        return (), np.full(len(names), -1, np.int32)
    classes = tuple(sorted(found))
    number = {name: i for i, name in enumerate(classes)}
    return classes, np.array([number[first] for first in firsts], np.int32)


def _held_out(names: list[str], fraction: float) -> np.ndarray:
    """Whether each image is held out: those with hashes below the fraction, and of several images at least one."""
    hashes = [int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") for name in names]
    bound = fraction * 2**64
    if fraction > 0 and len(names) > 1:
        bound = max(bound, min(hashes) + 1)
    return np.array([value < bound for value in hashes])


def _has_images(folder: str) -> bool:
    return next(_walk(folder), None) is not None


def _folders(path: str) -> list[str]:
    """Names of the directories directly in `path`, sorted; none if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return sorted(entry.name for entry in listing if not entry.name.startswith(".") and _is_folder(entry))
    except OSError:
        return []


def _is_folder(entry: os.DirEntry) -> bool:
    # an entry knows without asking the disk, unless it is a link; of a link to itself it raises, where os.path says no
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _is_file(entry: os.DirEntry) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def _nearest_folder(path: str) -> str:
    """What to do about a path that is no folder, by the last part of it that is one."""
    parent, missing = path, ""
    while not os.path.isdir(parent):
        parent, missing = os.path.split(parent)
    if os.path.exists(os.path.join(parent, missing)):
        return f"{missing} is a file: did you mean {parent}?"
    near = difflib.get_close_matches(missing, _folders(parent), n=1)
    return f"did you mean {os.path.join(parent, near[0])}?" if near else f"{parent} is there, but it has no {missing}"


def _nearest_images(path: str) -> str:
    """What to do about a folder without images: the one beside it, of the likeliest name, that has some."""
    parent, own = os.path.split(path)
    if os.path.dirname(parent) == parent:  # beside /data lie /proc and /sys
        return "point data.path at a folder of images"
    beside = sorted(_folders(parent), key=lambda name: -difflib.SequenceMatcher(None, name, own).ratio())
    for folder in (os.path.join(parent, name) for name in beside[:20] if name != own):
        # a glance before a walk: beside it may lie a home directory's worth of other things
        glance = [folder, *(os.path.join(folder, name) for name in _folders(folder)[:3])]
        if any(name.lower().endswith(EXTENSIONS) for place in glance for name in os.listdir(place)):
            return f"did you mean {folder} ({sum(1 for _ in _walk(folder))} images)?"
    return "point data.path at a folder of images"
