"""Images with a label map each: which folders and files belong together.

Records have "map" next to "image": the bytes of a file, or pixels. `data.label_maps` decodes and crops them.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

from simmim_jax.data.sources.folder import Folder, make_folder
from simmim_jax.data.sources.listing import folders, is_file, nearest_folder
from simmim_jax.data.sources.names import Names
from simmim_jax.data.sources.splits import EVALUATION
from simmim_jax.data.sources.tfds import Tfds, make_tfds, prepared_directory
from simmim_jax.errors import ConfigError, DataError

IMAGES = ("images", "image", "imgs", "img")
MAPS = ("annotations", "annotation", "masks", "mask", "labels", "label_maps", "segmentations")
TRAINING = ("train", "training")
VALIDATION = tuple(name for name in EVALUATION if name != "test")
EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # lossless formats
LAYOUT = "give images/train/a.jpg with masks/train/a.png (or annotations/, labels/), or train/images with train/masks"
KINDS = ("auto", "folder", "tfds")
FEATURES = ("annotation", "segmentation_mask", "label_map")  # names of label maps in TFDS data sets


def make_label_map_source(
    source: str, *, path: str = "", name: str = "", data_dir: str = "", split: str = "train", heldout_fraction: float
):
    """Make the source of one split whose records have "map" next to "image".

    Layouts of a folder, where <split> is train, training, or any name of the evaluation split:
      images/<split> and annotations/<split>, masks/<split> or labels/<split>;
      <split>/images and <split>/masks;
      images/ and masks/, of which a part is held out.
    A map has the name of its image except for the extension. classes.txt may list the names of the classes, one a line.
    In a TFDS data set, the map is the feature `annotation` or `segmentation_mask`, or the only other image.

    Raises:
      ConfigError: the source has no maps.
      DataError: folders or maps are missing.
    """
    if source not in KINDS:
        raise ConfigError(f"source {source!r} has no label maps", "data.source", f"choose one of {', '.join(KINDS)}")
    prepared = path and prepared_directory(os.path.abspath(os.path.expanduser(path)))
    if source == "tfds" or (source == "auto" and (prepared or not path) and name + path):
        return LabelMapTfds(make_tfds(name=name, data_dir=data_dir, split=split, path=path))
    if not path:
        raise ConfigError("data.path is empty", "data.path", LAYOUT)
    path = os.path.abspath(os.path.expanduser(path))
    if not os.path.isdir(path):
        raise DataError(f"{path} is not a folder", "data.path", nearest_folder(path))
    found = _find_pairs(path)
    same = next((names for names in (TRAINING, VALIDATION) if split in names), (split,))
    missing = [found.without_maps[side] for side in same if side in found.without_maps]
    if missing and not any(side in found.pairs for side in same):
        raise DataError(f"{missing[0].images} has no {missing[0].maps}", path, LAYOUT)
    names = TRAINING if split == "train" else (split, *EVALUATION) if split in EVALUATION else (split,)
    own = next((found.pairs[side] for side in names if side in found.pairs), None)
    has_evaluation = any(side in found.pairs for side in EVALUATION)
    train = next((found.pairs[side] for side in TRAINING if side in found.pairs), found.unsplit)
    if own and (split != "train" or has_evaluation):
        pair, part, fraction = own, "train", 0.0  # the whole folder
    elif train and split in ("train", *EVALUATION) and not (split == "train" and has_evaluation):
        pair, part, fraction = train, split, heldout_fraction
    else:
        has = f"it has {', '.join(sorted(found.pairs) or folders(path)[:6]) or 'no folders'}"
        raise DataError(f"{path} has no images with maps of split {split!r}", has, LAYOUT)
    images = make_folder(path=pair.images, split=part, heldout_fraction=fraction)
    return MappedFolder(images, pair.maps, _read_classes(path), split)


class _Pair(NamedTuple):
    """A folder of images and the folder of their maps."""

    images: str
    maps: str


class _Layout(NamedTuple):
    """The folders of images and maps below a path."""

    pairs: dict[str, _Pair]  # by split, in lower case
    unsplit: _Pair | None  # if the folders are not divided into splits
    without_maps: dict[str, _Pair]  # splits whose folder of maps does not exist


def _find_pairs(path: str) -> _Layout:
    pairs, without_maps = {}, {}
    for name in folders(path):
        pair = _pair_in(os.path.join(path, name))
        if pair and _is_split(name):
            pairs[name.casefold()] = pair
    both = _pair_in(path)
    if not both:
        return _Layout(pairs, None, {})
    sides = {name.casefold(): name for name in folders(both.images) if _is_split(name)}
    for side, name in sides.items():
        map_side = next((each for each in folders(both.maps) if each.casefold() == side), None)
        found = without_maps if map_side is None else pairs
        found[side] = _Pair(os.path.join(both.images, name), os.path.join(both.maps, map_side or name))
    return _Layout(pairs, None if sides else both, without_maps)


def _is_split(name: str) -> bool:
    return name.casefold() in (*TRAINING, *EVALUATION)


def _pair_in(folder: str) -> _Pair | None:
    found = {name.casefold(): os.path.join(folder, name) for name in folders(folder)}
    images, maps = (next((found[name] for name in names if name in found), None) for names in (IMAGES, MAPS))
    return _Pair(images, maps) if images and maps else None


def _read_classes(path: str) -> tuple[str, ...]:
    """The lines of classes.txt; () if it does not exist."""
    file_name = os.path.join(path, "classes.txt")
    try:
        with open(file_name, encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        raise DataError(f"{file_name} cannot be read", str(error), "give a text file, one name per line") from error


class MappedFolder:
    """The images of a folder, each with its map in another folder."""

    def __init__(self, images: Folder, map_root: str, classes: tuple[str, ...], split: str):
        self.images, self.map_root, self.classes, self.split = images, map_root, classes, split
        by_stem = {os.path.splitext(name)[0]: name for name in _maps_below(map_root)}
        missing, maps = [], []
        for name in images.names:
            found = by_stem.get(os.path.splitext(name)[0])
            (missing if found is None else maps).append(name if found is None else found)
        if missing:
            what = f"{len(missing)} of {len(images)} images have no map, like {', '.join(missing[:3])}"
            raise DataError(what, f"{images.root}, {map_root}", "add the maps, index PNGs, or remove the images")
        self.maps = Names(maps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        record = self.images[i]
        with open(os.path.join(self.map_root, self.maps[i]), "rb") as file:
            return record | {"map": file.read(), "label": -1}

    def name(self, i: int) -> str:
        return self.images.name(i)

    def describe(self) -> str:
        return f"{self.images.root} with maps in {self.map_root} ({len(self)} images)"

    def fingerprint(self) -> dict:
        maps = {"map_names_sha256": self.maps.digest(), "map_sizes_sha256": self.maps.digest_sizes(self.map_root)}
        return self.images.fingerprint() | maps | {"source": "label_maps", "split": self.split}


def _maps_below(root: str, below: str = "") -> Iterator[str]:
    """Names of the maps below `root`, relative to it, without hidden ones."""
    folder = os.path.join(root, below)
    try:
        with os.scandir(folder) as listing:
            files = [entry.name for entry in listing if not entry.name.startswith(".") and is_file(entry)]
    except OSError as error:
        raise DataError(f"{folder} cannot be read", error.strerror or "", "repair it, or change data.path") from error
    yield from (below + name for name in sorted(files) if name.lower().endswith(EXTENSIONS))
    for name in folders(folder):
        yield from _maps_below(root, f"{below}{name}/")


class LabelMapTfds:
    """The images of a TFDS data set, each with its map from another feature of the record."""

    def __init__(self, images: Tfds):
        others = [name for name in images.images if name != images.image]
        known = [name for name in FEATURES if name in others]
        if not known and len(others) != 1:
            what = f"{images.full_name} has {len(others)} images other than {images.image!r}, and none is a known map"
            raise DataError(what, f"maps are named {', '.join(FEATURES)}", "choose another data.name")
        self.images, self.map, self.classes = images, (known or others)[0], ()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, i: int) -> dict:
        record = self.images.record(i)
        return {"image": record[self.images.image], "map": record[self.map], "label": -1, "name": self.name(i)}

    def name(self, i: int) -> str:
        return self.images.name(i)

    def describe(self) -> str:
        return f"{self.images.describe()} with maps in {self.map!r}"

    def fingerprint(self) -> dict:
        return self.images.fingerprint() | {"source": "label_maps", "map": self.map}
