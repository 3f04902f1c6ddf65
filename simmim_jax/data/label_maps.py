"""Images with a label for each pixel: where they lie, how maps are read, and the random crop that both share.

A map is an index PNG (or TIFF, BMP, GIF), as large as its image: a pixel's value is its class. Values that count
nowhere become the largest of the map's type, IGNORED; whatever is not below `num_classes` is ignored by those who read
the batches. A pair that cannot be used is a bad image (`simmim_jax.data.decode`).

Of an image with an EXIF orientation a map may show the stored pixels, or the upright ones. Where only one of the two
has the map's size, that is what it shows, and the map is turned if it must be; where both have it, the pair cannot be
used, for its labels might be upside down.

Letters of shapes: h height, w width, c channels. Sizes are (height, width) in pixels. No JAX here.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
from collections.abc import Iterator
from typing import NamedTuple

import grain
import numpy as np
from jaxtyping import UInt, UInt8
from PIL import ExifTags, Image

from simmim_jax.data.decode import FORMATS as IMAGE_FORMATS
from simmim_jax.data.decode import LYING, MAX_PIXELS, BadImage, Picture, leave_out
from simmim_jax.data.sources.folder import Folder, make_folder
from simmim_jax.data.sources.listing import folders, is_file, nearest_folder
from simmim_jax.data.sources.names import Names
from simmim_jax.data.sources.splits import EVALUATION
from simmim_jax.data.sources.tfds import Tfds, make_tfds, prepared_directory
from simmim_jax.data.transforms import resize
from simmim_jax.errors import ConfigError, DataError, check_minimum

IMAGES = ("images", "image", "imgs", "img")
MAPS = ("annotations", "annotation", "masks", "mask", "labels", "label_maps", "segmentations")
TRAINING = ("train", "training")
VALIDATION = tuple(name for name in EVALUATION if name != "test")
EXTENSIONS = (".png", ".tif", ".tiff", ".bmp", ".gif")  # of files that keep each value as it is
FORMATS = ("PNG", "TIFF", "BMP", "GIF")
LAYOUT = "give images/train/a.jpg with masks/train/a.png (or annotations/, labels/), or train/images with train/masks"
KINDS = ("auto", "folder", "tfds")
TRIES = 10  # crops that are drawn until one is not nearly all of one class
LONGEST = 4  # times its shorter side that an image's longer side may be before both are scaled by the longer
GLANCE, LONG_LOOK = 8, 256  # maps that are looked at before a run begins, and where these show one class alone
STEPS_OF_GRAY = {2: 85, 4: 17}  # Pillow spreads the values of a gray PNG of so few bits over 0..255


class WrongLabel(BadImage):
    """A map with a value that is no class, which is most often a mistake in the config."""


class LabelMapSpec(NamedTuple):
    """How maps are read, and crops drawn; as `make_batches` takes it.

    num_classes: labels are 0 to that less one. ignore: the value in a file that has no class.
    reduce_zero_label: in files 0 has no class, and every other value is one too high, as in ADE20K.
    short_side: in pixels, to which images are scaled, training and evaluated; 0: the crop's shorter side; -1: not.
    scale: bounds of a random factor beside that. most_of_one: the share of a crop that one class should not exceed.
    photometric: random brightness, contrast, saturation and hue. fill: what pads an image, a number 0..255 by channel.
    channel: of maps that are stored with several, the one that is the class; -1: such maps are refused.
    """

    num_classes: int
    ignore: int = 255
    reduce_zero_label: bool = False
    short_side: int = 0
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one: float = 0.75
    photometric: bool = True
    fill: tuple[int, ...] = (124, 116, 104)
    channel: int = -1

    def check(self) -> None:
        """Refuse values that cannot work. Raises ConfigError."""
        if self.num_classes < 2:
            raise ConfigError(
                f"num_classes is {self.num_classes}", "objective.num_classes", "give the number of classes, 2 or more"
            )
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale {self.scale}", "data.maps.scale", "give two numbers above 0, like 0.5,2")
        if not 0 < self.most_of_one <= 1:
            raise ConfigError(f"most_of_one {self.most_of_one} is not in (0, 1]", "data.maps.most_of_one")
        check_minimum("data.maps.short_side", self.short_side, -1)
        if self.num_classes > 2**16 - 2:
            raise ConfigError(f"num_classes {self.num_classes}", "objective.num_classes", "give at most 65534")
        if 0 <= self.ignore - self.reduce_zero_label < self.num_classes:
            raise ConfigError(
                f"ignore {self.ignore} is one of the {self.num_classes} classes", "data.maps.ignore",
                "give a value that no class has, like 65535",
            )  # fmt: skip

    def as_json(self) -> dict:
        """The same by name, with lists for tuples."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}

    @property
    def dtype(self) -> np.dtype:
        """Of maps in batches."""
        return np.dtype(np.uint8 if self.num_classes <= 254 else np.uint16)


def make_label_map_source(
    source: str, *, path: str = "", name: str = "", data_dir: str = "", split: str = "train", heldout_fraction: float
):
    """The records of one split, as `data.sources` has them, with "map" beside each "image": a file's bytes, or pixels.

    A folder has images/<split> and annotations/, masks/ or labels/<split>, or <split>/images and <split>/masks, or,
    without splits, images/ and masks/, of which a part is held out; a map has the name of its image but for the
    extension. <split> may be train or training, and an evaluation split any of its names. classes.txt, a name on each
    line, may lie beside them. Of a TFDS data set, the map is its feature `annotation` or `segmentation_mask`, or its
    only other image.

    Raises:
      ConfigError: for a source that has no maps.
      DataError: where folders or maps are missing.
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
    pairs, whole, without_maps = _find_pairs(path)
    asked = next((each for each in (TRAINING, VALIDATION) if split in each), (split,))
    missing = [without_maps[side] for side in asked if side in without_maps]
    if missing and not any(side in pairs for side in asked):
        raise DataError(f"{missing[0][0]} has no {missing[0][1]} beside it", path, LAYOUT)
    names = TRAINING if split == "train" else (split, *EVALUATION) if split in EVALUATION else (split,)
    own = next((pairs[side] for side in names if side in pairs), None)
    evaluated = any(side in pairs for side in EVALUATION)
    trained = next((pairs[side] for side in TRAINING if side in pairs), None)
    if own and (split != "train" or evaluated):
        images, maps, part, fraction = *own, "train", 0.0  # all that is there
    elif (trained or whole) and split in ("train", *EVALUATION) and not (split == "train" and evaluated):
        images, maps, part, fraction = *(trained or whole), split, heldout_fraction
    else:
        there = f"it has {', '.join(sorted(pairs) or folders(path)[:6]) or 'no folders'}"
        raise DataError(f"{path} has no images with maps of split {split!r}", there, LAYOUT)
    return MappedFolder(
        make_folder(path=images, split=part, heldout_fraction=fraction), maps, _read_classes(path), split
    )


def _find_pairs(
    path: str,
) -> tuple[dict[str, tuple[str, str]], tuple[str, str] | None, dict[str, tuple[str, str]]]:
    """(the folders of images and of maps of each split, those of a folder without splits, those of splits without maps,
    where the second is not there).
    """
    pairs, without_maps = {}, {}
    for name in folders(path):
        pair = _pair_in(os.path.join(path, name))
        if pair and _is_split(name):
            pairs[name.casefold()] = pair
    both = _pair_in(path)
    if not both:
        return pairs, None, {}
    images, maps = both
    sides = {name.casefold(): name for name in folders(images) if _is_split(name)}
    for side, name in sides.items():
        of_maps = next((each for each in folders(maps) if each.casefold() == side), None)
        found = without_maps if of_maps is None else pairs
        found[side] = os.path.join(images, name), os.path.join(maps, of_maps or name)
    return pairs, None if sides else both, without_maps


def _is_split(name: str) -> bool:
    return name.casefold() in (*TRAINING, *EVALUATION)


def _pair_in(folder: str) -> tuple[str, str] | None:
    """The folders of images and of maps in this one."""
    there = {name.casefold(): os.path.join(folder, name) for name in folders(folder)}
    images, maps = (next((there[name] for name in names if name in there), None) for names in (IMAGES, MAPS))
    return (images, maps) if images and maps else None


def _read_classes(path: str) -> tuple[str, ...]:
    """The lines of classes.txt; none where there is no such file."""
    try:
        with open(os.path.join(path, "classes.txt"), encoding="utf-8") as file:
            return tuple(line.strip() for line in file if line.strip())
    except FileNotFoundError:
        return ()
    except (OSError, ValueError) as error:
        where = os.path.join(path, "classes.txt")
        raise DataError(f"{where} cannot be read", str(error), "give a text file with a name on each line") from error


class MappedFolder:
    """A folder's images, each with its map in another folder."""

    def __init__(self, images: Folder, map_root: str, classes: tuple[str, ...], split: str):
        self.images, self.map_root, self.classes, self.split = images, map_root, classes, split
        there = {os.path.splitext(name)[0]: name for name in _maps_below(map_root)}
        missing, taken = [], []
        for name in images.names:
            found = there.get(os.path.splitext(name)[0])
            (missing if found is None else taken).append(name if found is None else found)
        if missing:
            what = f"{len(missing)} of {len(images)} images have no map, like {', '.join(missing[:3])}"
            raise DataError(what, f"{images.root}, {map_root}", "add the maps, index PNGs, or remove the images")
        self.maps = Names(taken)

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
        maps = {"map_names_sha256": self.maps.digest(), "map_sizes_sha256": self._sizes()}
        return self.images.fingerprint() | maps | {"source": "label_maps", "split": self.split}

    def _sizes(self) -> str:
        """Of the sizes of at most a thousand maps, in bytes: a digest."""
        count = min(len(self), 1000)
        paths = (os.path.join(self.map_root, self.maps[place * len(self) // count]) for place in range(count))
        sizes = [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
        return hashlib.sha256(repr(sizes).encode()).hexdigest()


def _maps_below(root: str, below: str = "") -> Iterator[str]:
    """The maps below `root`, relative to it; hidden names are skipped."""
    where = os.path.join(root, below)
    try:
        with os.scandir(where) as listing:
            files = [entry.name for entry in listing if not entry.name.startswith(".") and is_file(entry)]
    except OSError as error:
        raise DataError(f"{where} cannot be read", error.strerror or "", "mend it, or change data.path") from error
    yield from (below + name for name in sorted(files) if name.lower().endswith(EXTENSIONS))
    for name in folders(where):
        yield from _maps_below(root, f"{below}{name}/")


class LabelMapTfds:
    """A TFDS data set's images, each with its map out of another feature of its record."""

    FEATURES = ("annotation", "segmentation_mask", "label_map")

    def __init__(self, images: Tfds):
        others = [name for name in images.images if name != images.image]
        known = [name for name in self.FEATURES if name in others]
        if not known and len(others) != 1:
            what = f"{images.full_name} has {len(others)} images beside {images.image!r}, and none is a known map"
            raise DataError(what, f"maps are named {', '.join(self.FEATURES)}", "choose another data.name")
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


def read_map(stored: bytes | np.ndarray, maps: LabelMapSpec, max_pixels: int = MAX_PIXELS) -> UInt[np.ndarray, "h w"]:
    """The classes of an index image's pixels, in `maps.dtype`, whose largest value stands for none.

    stored: a file's bytes, of one value for each pixel (gray, palette or 16 bits), or pixels [h, w] or [h, w, 1].
    Raises BadImage, also for a label that is no class.
    """
    raw = _read_values(stored, maps, max_pixels)
    classes = _table(maps.num_classes, maps.ignore, maps.reduce_zero_label, maps.dtype.name, raw.dtype.name)[raw]
    if (classes == np.iinfo(maps.dtype).max - 1).any():
        label = int(raw[classes == np.iinfo(maps.dtype).max - 1].max())
        raise WrongLabel(f"its map has the value {label}, which is none of {maps.num_classes} classes")
    return classes


def _read_values(stored: bytes | np.ndarray, maps: LabelMapSpec, max_pixels: int) -> UInt[np.ndarray, "h w"]:
    """What a map's pixels are in its file."""
    raw = stored if isinstance(stored, np.ndarray) else _decode_map(stored, max_pixels, maps.channel >= 0)
    if raw.ndim == 3 and (raw.shape[2] == 1 or 0 <= maps.channel < raw.shape[2]):
        raw = raw[..., max(maps.channel, 0)]
    if raw.ndim != 2 or raw.dtype not in (np.uint8, np.uint16) or not raw.size:
        raise BadImage(f"its map is {raw.dtype}{list(raw.shape)}, not uint8 or uint16 [h, w]")
    return raw


@functools.cache
def _table(num_classes: int, ignore: int, reduce_zero_label: bool, to: str, of: str) -> np.ndarray:
    """The class of each value that a pixel may have: the type's largest for none, the one below for a wrong value."""
    first, values, most = int(reduce_zero_label), np.iinfo(of).max + 1, np.iinfo(to).max
    table = np.full(values, most - 1, to)
    table[first : first + num_classes] = np.arange(num_classes)[: values - first]
    table[[value for value in (ignore, *range(first)) if value < values]] = most
    return table


def _decode_map(file: bytes, max_pixels: int, colors: bool) -> np.ndarray:
    try:
        picture = Image.open(io.BytesIO(file), formats=FORMATS)
        if picture.width * picture.height > max_pixels:
            raise BadImage(f"its map has {picture.height} x {picture.width} pixels, more than max_pixels={max_pixels}")
        picture.load()
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # the bytes are anybody's, and parsers raise whatever they trip over
        raise BadImage(f"its map is no {', '.join(FORMATS)} file, or damaged") from error
    if picture.mode == "I":  # 16 bits that are kept in 32
        pixels = np.asarray(picture)
        if pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
            raise BadImage("its map has 32-bit values")
        return pixels.astype(np.uint16)
    if colors and picture.mode in ("RGB", "RGBA"):
        return np.asarray(picture)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I;16"):
        raise BadImage(f"its map has colors (mode {picture.mode}), not an index for each pixel")
    pixels = np.asarray(picture).astype(np.uint16 if picture.mode.startswith("I") else np.uint8)
    few_bits = picture.format == "PNG" and file[25:26] == b"\0" and STEPS_OF_GRAY.get(file[24])
    return pixels // few_bits if few_bits else pixels


def read_pair(record: dict, maps: LabelMapSpec, channels: int, max_pixels: int) -> tuple[Picture, np.ndarray]:
    """The image and the map of a record, upright.

    Raises BadImage, also where they differ in size, or the map may lie otherwise than the image.
    """
    picture, label_map = Picture(record["image"], channels, max_pixels), read_map(record["map"], maps, max_pixels)
    shape, orientation = (picture.height, picture.width), orientation_of(record["image"])
    fits_stored = label_map.shape == (shape[::-1] if orientation in LYING else shape)
    if orientation != 1 and fits_stored and label_map.shape == shape:
        raise BadImage(
            f"its map may be of the stored or the turned pixels (EXIF orientation {orientation} of the image)"
        )
    if orientation != 1 and fits_stored:
        label_map = upright(label_map, orientation)
    if label_map.shape != shape:
        there, here = (f"{h} x {w}" for h, w in (label_map.shape, shape))
        raise BadImage(f"its map has {there} pixels, and the image {here}")
    return picture, label_map


def orientation_of(image: bytes | np.ndarray) -> int:
    """The EXIF orientation of a file that decodes, 1 to 8; 1 where it has none, or none that can be read."""
    found = 1
    if isinstance(image, bytes):
        with contextlib.suppress(Exception):  # of damaged EXIF parsers raise what they like, and `Picture` leaves it
            found = Image.open(io.BytesIO(image), formats=IMAGE_FORMATS).getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def upright(label_map: UInt[np.ndarray, "h w"], orientation: int) -> UInt[np.ndarray, "w h"]:
    """A map that lies on its side, by one of the EXIF orientations `LYING`."""
    label_map = label_map.T
    if orientation in (7, 8):
        label_map = label_map[::-1]
    return label_map[:, ::-1] if orientation in (6, 7) else label_map


def check_pair(record: dict, maps: LabelMapSpec, channels: int, max_pixels: int) -> None:
    """Raise BadImage unless both decode whole and fit together."""
    read_pair(record, maps, channels, max_pixels)[0].read()


def check_maps(source, maps: LabelMapSpec, channels: int, max_pixels: int = MAX_PIXELS) -> None:
    """Look at a few records, spread evenly, and at the class names, before a run begins.

    Raises ConfigError where the names are not `num_classes`, and DataError where none of these records can be used, a
    map has another value than a class, or all maps have the same class everywhere, for which many are looked at.
    """
    maps.check()
    if source.classes and len(source.classes) != maps.num_classes:
        raise ConfigError(
            f"num_classes is {maps.num_classes}, classes.txt has {len(source.classes)} names",
            source.describe(), f"give --config.objective.num_classes={len(source.classes)}",
        )  # fmt: skip
    places = dict.fromkeys(n * len(source) // count for count in (GLANCE, LONG_LOOK) for n in range(count))
    faults, used, pixels = [], [], np.zeros(np.iinfo(maps.dtype).max + 1, np.int64)  # by class
    for looked_at, i in enumerate(places):
        if looked_at >= GLANCE and (not used or np.count_nonzero(pixels[:-1]) > 1):
            break
        try:
            label_map = read_pair(source[i], maps, channels, max_pixels)[1]
        except (BadImage, OSError) as error:
            faults.append(f"{source.name(i)}: {error}")
            if isinstance(error, WrongLabel):
                fix = "give --config.objective.num_classes, data.maps.ignore or data.maps.reduce_zero_label that fit"
                raise DataError(faults[-1], source.describe(), fix) from error
        else:
            used.append(i)
            pixels += np.bincount(label_map.ravel(), minlength=len(pixels))
    if not used:
        fix = "give index maps, each as large as its image"
        raise DataError(f"none of {len(faults)} images can be used, like {faults[0]}", source.describe(), fix)
    if np.count_nonzero(pixels[:-1]) < 2:
        stored = (_read_values(source[i]["map"], maps, max_pixels) for i in used)
        values = sorted({value for raw in stored for value in np.unique(raw).tolist()})
        raise DataError(
            f"at most one class in {len(used)} maps: their values are {', '.join(map(str, values[:8]))}, and "
            f"{pixels[-1]} of {pixels.sum()} pixels are ignored",
            source.describe(),
            "in masks of 0 and 255 write 1 for 255; else give data.maps.ignore or data.maps.reduce_zero_label that fit,"
            " or more images",
        )  # fmt: skip


def read_random_crop(
    record: dict,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    maps: LabelMapSpec,
    flip: float,
    interpolation: str,
    channels: int,
    max_pixels: int,
) -> dict[str, np.ndarray]:
    """{"image": uint8 [h, w, c], "label_map": `maps.dtype` [h, w]}: the same random crop of both, of `size`.

    Scaled at random, cropped, mirrored, and padded at the bottom and the right where they are smaller; of up to ten
    crops the first is taken in which no class has more than `most_of_one` of the pixels that have a class. Source:
    Resize, RandomCrop, RandomFlip, PhotoMetricDistortion and Pad of mmsegmentation, as BEiT's configs have them.
    """
    picture, label_map = read_pair(record, maps, channels, max_pixels)
    factor = fitting_factor(label_map.shape, size, maps.short_side) * rng.uniform(*maps.scale)
    resized = [max(1, round(side * factor)) for side in label_map.shape]
    window = tuple(min(sides) for sides in zip(size, resized, strict=True))
    step = [whole / side for whole, side in zip(label_map.shape, resized, strict=True)]
    for _ in range(TRIES):
        corner = [int(rng.integers(whole - part + 1)) for whole, part in zip(resized, window, strict=True)]
        rows, columns = (
            np.minimum(((first + np.arange(part) + 0.5) * each).astype(int), whole - 1)
            for first, part, each, whole in zip(corner, window, step, label_map.shape, strict=True)
        )
        labels = label_map[rows[:, None], columns]
        counts = np.bincount(labels[labels < maps.num_classes], minlength=1)
        if maps.most_of_one == 1 or (np.count_nonzero(counts) > 1 and counts.max() < maps.most_of_one * counts.sum()):
            break
    top, left = (first * each for first, each in zip(corner, step, strict=True))
    box = left, top, left + window[1] * step[1], top + window[0] * step[0]
    box = *box[:2], min(box[2], label_map.shape[1]), min(box[3], label_map.shape[0])
    image = resize(picture.read(), window, interpolation, box)
    if rng.random() < flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if maps.photometric:
        image = distort_photometrically(np.ascontiguousarray(image), rng)
    whole_image = np.empty((*size, channels), np.uint8)
    whole_image[:] = np.asarray(maps.fill, np.uint8)
    whole_map = np.full(size, np.iinfo(maps.dtype).max, maps.dtype)
    whole_image[: window[0], : window[1]], whole_map[: window[0], : window[1]] = image, labels
    return {"image": whole_image, "label_map": whole_map}


def fitting_factor(shape: tuple[int, int], size: tuple[int, int], short_side: int) -> float:
    """By what an image is scaled before it is cropped, or cut into windows: see `LabelMapSpec.short_side`."""
    if short_side < 0:
        return 1.0
    short = short_side or min(size)
    return min(short / min(shape), LONGEST * short / max(shape))


def distort_photometrically(image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
    """Each with probability a half: brightness by up to 32 of 255, contrast and saturation by 0.5 to 1.5, hue by 18 of
    180 degrees of half the circle; contrast before saturation and hue, or after. The latter two of RGB alone.

    Source: PhotoMetricDistortion of mmsegmentation.
    """

    def line(image, factor=1.0, offset=0.0):
        return np.clip(image.astype(np.float32) * factor + offset, 0, 255).astype(np.uint8)

    def contrast(image):
        return line(image, factor=rng.uniform(0.5, 1.5)) if rng.random() < 0.5 else image

    if rng.random() < 0.5:
        image = line(image, offset=rng.uniform(-32, 32))
    early = rng.random() < 0.5
    image = contrast(image) if early else image
    if image.shape[2] == 3:
        saturation = rng.uniform(0.5, 1.5) if rng.random() < 0.5 else 1.0
        hue = rng.integers(-18, 19) if rng.random() < 0.5 else 0
        if saturation != 1 or hue:
            colors = np.array(Image.fromarray(image).convert("HSV"))
            colors[..., 1] = line(colors[..., 1], factor=saturation)
            colors[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # a circle: it wraps
            image = np.asarray(Image.fromarray(colors, "HSV").convert("RGB"))
    return image if early else contrast(image)


class SegmentationSet:
    """Each image of a source once, in order, whole, with its map, as often as it is iterated over.

    Each is {"image": uint8 [h, w, c], scaled as for training but not at random; "label_map": [y, x], as large as its
    file; "index": int}. One that cannot be used is named on the log and left out, or, where `on_error` is "raise", a
    DataError. limit: so many, evenly spread; 0 for all. A record without a map has one without classes, as large as
    its image. max_bad_fraction: of these images, rounded up to `most_bad`, how many may be left out: for whoever knows
    what all processes leave out.
    """

    def __init__(
        self, source, *, size: tuple[int, int], maps: LabelMapSpec, channels: int, interpolation: str = "bilinear",
        limit: int = 0, threads: int = 2, on_error: str = "replace", max_bad_fraction: int | float = 1.0,
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        self.classes, self.count = source.classes, min(limit or len(source), len(source))
        self.maps, self.most_bad = maps, math.ceil(max_bad_fraction * self.count)
        self.threads = max(threads, 1)
        self.load = functools.partial(
            _load_whole, source=source, size=size, maps=maps, channels=channels, interpolation=interpolation,
            max_pixels=max_pixels, skips=on_error == "replace", reported=set(),
        )  # fmt: skip
        self.total = len(source)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[dict]:
        dataset = grain.MapDataset.range(self.count).map(lambda place: self.load(place * self.total // self.count))
        return iter(dataset.to_iter_dataset(grain.ReadOptions(self.threads, 2 * self.threads)))


def _load_whole(
    index: int, *, source, size, maps: LabelMapSpec, channels, interpolation, max_pixels, skips: bool, reported: set
) -> dict | None:
    try:
        record = source[index]
        if "map" in record:
            picture, label_map = read_pair(record, maps, channels, max_pixels)
        else:
            picture = Picture(record["image"], channels, max_pixels)
            label_map = np.full((picture.height, picture.width), np.iinfo(maps.dtype).max, maps.dtype)
        pixels = picture.read()
    except (BadImage, OSError) as error:
        leave_out(source, index, error, reported=reported, allowed=skips)
        return None
    factor = fitting_factor(label_map.shape, size, maps.short_side)
    scaled = tuple(max(1, round(side * factor)) for side in label_map.shape)
    image = pixels if scaled == label_map.shape else resize(pixels, scaled, interpolation)
    return {"image": image, "label_map": label_map, "index": index}
