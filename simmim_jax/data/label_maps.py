"""Label maps: decoding, and the random crop shared with the image.

A map is an index PNG (or TIFF, BMP, GIF) of the size of its image. The value of a pixel is its class. Ignored pixels
get the largest value of the dtype, and readers of batches ignore all values not below `num_classes`. A pair that
cannot be used is a bad image (`simmim_jax.data.decode`).

If the image has an EXIF orientation, its map may show either the stored or the upright pixels. If only one of them has
the size of the map, the map is read that way, and turned upright if necessary. If both have it, the pair is a bad
image, because the labels might be upside down.

Shapes: h height, w width, c channels. Sizes are (height, width) in pixels.
"""

import contextlib
import functools
import io
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt, UInt8
from PIL import ExifTags, Image

from simmim_jax.data.decode import ANY, MAX_PIXELS, BadImage, Picture, Samples
from simmim_jax.data.decode import FORMATS as IMAGE_FORMATS
from simmim_jax.data.rasters import TRANSPOSED, open_raster, rotate_upright
from simmim_jax.data.transforms import resize
from simmim_jax.errors import ConfigError, DataError, check_minimum

FORMATS = ("PNG", "TIFF", "BMP", "GIF")  # lossless
MAX_TRIES = 10  # random crops drawn in search of one that `most_of_one` allows
MAX_ASPECT = 4  # ratio of sides above which an image is scaled by its longer side
CHECKED, MAX_CHECKED = 8, 256  # maps checked before a run; the second if the first show at most one class
GRAY_STEPS = {2: 85, 4: 17}  # by bits per pixel: Pillow spreads the values of such gray PNGs over 0..255


class WrongLabel(BadImage):
    """A map with a value that is not a class. Usually a mistake in the config."""


class LabelMapSpec(NamedTuple):
    """How maps are read and random crops are drawn.

    num_classes: labels are 0 to num_classes - 1.
    ignore: the value of pixels without a class in the file.
    reduce_zero_label: in the file 0 has no class, and the other values are the class + 1, as in ADE20K.
    short_side: images are scaled to this shorter side in pixels; 0: the crop's shorter side; -1: not scaled.
    scale: bounds of a random factor on top of that.
    most_of_one: largest fraction of a crop that one class should have.
    photometric: random brightness, contrast, saturation and hue.
    fill: stored value of padded pixels by channel.
    channel: the channel that has the class, for maps with several; -1: such maps are bad images.
    """

    num_classes: int
    ignore: int = 255
    reduce_zero_label: bool = False
    short_side: int = 0
    scale: tuple[float, float] = (0.5, 2.0)
    most_of_one: float = 0.75
    photometric: bool = True
    fill: tuple[int | float, ...] = (124, 116, 104)
    channel: int = -1

    def check(self) -> None:
        """Raise ConfigError for values that cannot work."""
        where = "objective.num_classes"
        if self.num_classes < 2:
            raise ConfigError(f"num_classes is {self.num_classes}", where, "give the number of classes, 2 or more")
        if len(self.scale) != 2 or not 0 < self.scale[0] <= self.scale[1]:
            raise ConfigError(f"scale {self.scale}", "data.maps.scale", "give two numbers above 0, like 0.5,2")
        if not 0 < self.most_of_one <= 1:
            raise ConfigError(f"most_of_one {self.most_of_one} is not in (0, 1]", "data.maps.most_of_one")
        check_minimum("data.maps.short_side", self.short_side, -1)
        if self.num_classes > 2**16 - 2:
            raise ConfigError(f"num_classes {self.num_classes}", where, "give at most 65534")
        if 0 <= self.ignore - self.reduce_zero_label < self.num_classes:
            what = f"ignore {self.ignore} is one of the {self.num_classes} classes"
            raise ConfigError(what, "data.maps.ignore", "give a value that no class has, like 65535")

    def as_json(self) -> dict:
        """The fields by name, with lists instead of tuples."""
        return {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}

    @property
    def dtype(self) -> np.dtype:
        """The dtype of maps in batches."""
        return np.dtype(np.uint8 if self.num_classes <= 254 else np.uint16)

    @property
    def ignored(self) -> int:
        """The value of ignored pixels in batches."""
        return np.iinfo(self.dtype).max


# --- decoding


def read_map(stored: bytes | np.ndarray, maps: LabelMapSpec, max_pixels: int = MAX_PIXELS) -> UInt[np.ndarray, "h w"]:
    """The class of each pixel as `maps.dtype`, with `maps.ignored` for pixels without a class.

    stored: a file with one value per pixel (gray, palette or 16 bits), or pixels [h, w] or [h, w, 1].
    Raises BadImage, and its subclass WrongLabel for a value that is not a class.
    """
    raw = _read_values(stored, maps, max_pixels)
    classes = _table(maps.num_classes, maps.ignore, maps.reduce_zero_label, maps.ignored, raw.dtype.name)[raw]
    wrong = classes == maps.ignored - 1
    if wrong.any():
        raise WrongLabel(f"its map has the value {raw[wrong].max()}, which is none of {maps.num_classes} classes")
    return classes


def _read_values(stored: bytes | np.ndarray, maps: LabelMapSpec, max_pixels: int) -> UInt[np.ndarray, "h w"]:
    """The values of a map as they are in the file."""
    raw = stored if isinstance(stored, np.ndarray) else _decode_map(stored, max_pixels, maps.channel >= 0)
    if raw.ndim == 3 and (raw.shape[2] == 1 or 0 <= maps.channel < raw.shape[2]):
        raw = raw[..., max(maps.channel, 0)]
    if raw.ndim != 2 or raw.dtype not in (np.uint8, np.uint16) or not raw.size:
        raise BadImage(f"its map is {raw.dtype}{list(raw.shape)}, not uint8 or uint16 [h, w]")
    return raw


@functools.cache
def _table(num_classes: int, ignore: int, reduce_zero_label: bool, ignored: int, raw_dtype: str) -> np.ndarray:
    """The class of each possible value: `ignored` for none, and one less for a wrong value."""
    first, values = int(reduce_zero_label), np.iinfo(raw_dtype).max + 1
    table = np.full(values, ignored - 1, np.min_scalar_type(ignored))
    table[first : first + num_classes] = np.arange(num_classes)[: values - first]
    table[[value for value in (ignore, *range(first)) if value < values]] = ignored
    return table


def _decode_map(file: bytes, max_pixels: int, allow_colors: bool) -> np.ndarray:
    try:
        picture = Image.open(io.BytesIO(file), formats=FORMATS)
        if picture.width * picture.height > max_pixels:
            raise BadImage(f"its map has {picture.height} x {picture.width} pixels, more than max_pixels={max_pixels}")
        picture.load()
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # the bytes are untrusted, and parsers raise exceptions of any type
        raise BadImage(f"its map is no {', '.join(FORMATS)} file, or damaged") from error
    if picture.mode == "I":  # 16-bit values in 32 bits
        pixels = np.asarray(picture)
        if pixels.min() < 0 or pixels.max() > np.iinfo(np.uint16).max:
            raise BadImage("its map has 32-bit values")
        return pixels.astype(np.uint16)
    if allow_colors and picture.mode in ("RGB", "RGBA"):
        return np.asarray(picture)
    if picture.mode not in ("1", "L", "P") and not picture.mode.startswith("I;16"):
        raise BadImage(f"its map has colors (mode {picture.mode}), not one index per pixel")
    pixels = np.asarray(picture).astype(np.uint16 if picture.mode.startswith("I") else np.uint8)
    is_gray_png = picture.format == "PNG" and file[25:26] == b"\0"
    step = GRAY_STEPS.get(file[24]) if is_gray_png else None
    return pixels // step if step else pixels


def read_pair(
    record: dict, maps: LabelMapSpec, channels: int, max_pixels: int, samples: Samples = ANY
) -> tuple[Picture, np.ndarray]:
    """The image and the map of a record, both upright.

    Raises BadImage, also if their sizes differ or the orientation of the map is ambiguous.
    """
    picture = Picture(record["image"], channels, max_pixels, samples)
    label_map = read_map(record["map"], maps, max_pixels)
    shape, orientation = (picture.height, picture.width), exif_orientation(record["image"])
    fits_stored = label_map.shape == (shape[::-1] if orientation in TRANSPOSED else shape)
    if orientation != 1 and fits_stored and label_map.shape == shape:
        what = "its map may show the stored or the upright pixels"
        raise BadImage(f"{what} (EXIF orientation {orientation} of the image)")
    if orientation != 1 and fits_stored:
        label_map = rotate_upright(label_map, orientation)
    if label_map.shape != shape:
        map_size, image_size = (f"{h} x {w}" for h, w in (label_map.shape, shape))
        raise BadImage(f"its map has {map_size} pixels, and the image {image_size}")
    return picture, label_map


def exif_orientation(image: bytes | np.ndarray) -> int:
    """The EXIF orientation of an image file, 1 to 8; 1 if it has none or it cannot be read."""
    found = 1
    if isinstance(image, bytes):
        with contextlib.suppress(Exception):  # parsers of damaged EXIF raise exceptions of any type
            if raster := open_raster(image):
                return raster.orientation
            found = Image.open(io.BytesIO(image), formats=IMAGE_FORMATS).getexif().get(ExifTags.Base.Orientation, 1)
    return found if found in range(1, 9) else 1


def check_pair(record: dict, maps: LabelMapSpec, channels: int, max_pixels: int, samples: Samples) -> None:
    """Raise BadImage unless image and map decode completely and fit together."""
    read_pair(record, maps, channels, max_pixels, samples)[0].read()


def check_maps(source, maps: LabelMapSpec, channels: int, max_pixels: int = MAX_PIXELS, samples: Samples = ANY) -> None:
    """Check a few evenly spaced records and the class names before a run.

    Raises:
      ConfigError: the number of class names is not `num_classes`.
      DataError: no checked record can be used, a map has a value that is not a class, or all maps show at most one
        class. In the last case, more records are checked first.
    """
    maps.check()
    if source.classes and len(source.classes) != maps.num_classes:
        what = f"num_classes is {maps.num_classes}, classes.txt has {len(source.classes)} names"
        fix = f"give --config.objective.num_classes={len(source.classes)}"
        raise ConfigError(what, source.describe(), fix)
    indices = dict.fromkeys(n * len(source) // count for count in (CHECKED, MAX_CHECKED) for n in range(count))
    faults, used, pixels = [], [], np.zeros(maps.ignored + 1, np.int64)  # pixels: their number by class
    for checked, i in enumerate(indices):
        if checked >= CHECKED and (not used or np.count_nonzero(pixels[:-1]) > 1):
            break
        try:
            label_map = read_pair(source[i], maps, channels, max_pixels, samples)[1]
        except (BadImage, OSError) as error:
            faults.append(f"{source.name(i)}: {error}")
            if isinstance(error, WrongLabel):
                fix = "give --config.objective.num_classes, data.maps.ignore or data.maps.reduce_zero_label that fit"
                raise DataError(faults[-1], source.describe(), fix) from error
        else:
            used.append(i)
            pixels += np.bincount(label_map.ravel(), minlength=len(pixels))
    if not used:
        fix = "give index maps of the size of their images"
        raise DataError(f"none of {len(faults)} images can be used, like {faults[0]}", source.describe(), fix)
    if np.count_nonzero(pixels[:-1]) < 2:
        stored = (_read_values(source[i]["map"], maps, max_pixels) for i in used)
        values = sorted({value for raw in stored for value in np.unique(raw).tolist()})
        what = f"at most one class in {len(used)} maps: their values are {', '.join(map(str, values[:8]))}"
        what += f", and {pixels[-1]} of {pixels.sum()} pixels are ignored"
        fix = "in masks of 0 and 255 write 1 for 255; else set data.maps.ignore or data.maps.reduce_zero_label"
        raise DataError(what, source.describe(), f"{fix}, or add images")


# --- training: random crops


def read_random_crop(
    record: dict,
    rng: np.random.Generator,
    *,
    size: tuple[int, int],
    maps: LabelMapSpec,
    flip: float,
    interpolation: str,
    decoding: tuple[int, int, Samples],
) -> dict[str, np.ndarray]:
    """{"image": [h, w, c] as stored, "label_map": `maps.dtype` [h, w]}: the same random crop of both, of `size`.

    They are scaled at random, cropped, flipped with probability `flip`, and padded at the bottom and the right if they
    are smaller. Up to ten crops are drawn, until no class has more than `most_of_one` of the pixels with a class.
    decoding: channels, max_pixels and samples of a `Picture`.
    Source: Resize, RandomCrop, RandomFlip, PhotoMetricDistortion and Pad of mmsegmentation, as in BEiT's configs.
    """
    picture, label_map = read_pair(record, maps, *decoding)
    factor = scale_factor(label_map.shape, size, maps.short_side) * rng.uniform(*maps.scale)
    resized = [max(1, round(side * factor)) for side in label_map.shape]
    window = tuple(min(sides) for sides in zip(size, resized, strict=True))
    step = [whole / side for whole, side in zip(label_map.shape, resized, strict=True)]
    for _ in range(MAX_TRIES):
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
    image = resize(picture.read(), window, interpolation, box, missing=picture.missing)
    if rng.random() < flip:
        image, labels = image[:, ::-1], labels[:, ::-1]
    if maps.photometric:
        image = distort_photometrically(np.ascontiguousarray(image), rng)
    padded_image = np.empty((*size, image.shape[2]), image.dtype)
    padded_image[:] = np.asarray(maps.fill, image.dtype)
    padded_map = np.full(size, maps.ignored, maps.dtype)
    padded_image[: window[0], : window[1]], padded_map[: window[0], : window[1]] = image, labels
    return {"image": padded_image, "label_map": padded_map}


def scale_factor(shape: tuple[int, int], size: tuple[int, int], short_side: int) -> float:
    """The factor by which an image is scaled before the crop of `size` (see `LabelMapSpec.short_side`)."""
    if short_side < 0:
        return 1.0
    short = short_side or min(size)
    return min(short / min(shape), MAX_ASPECT * short / max(shape))


def distort_photometrically(image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w c"]:
    """Change brightness, contrast, saturation and hue, each with probability 1/2.

    Brightness changes by up to 32 of 255, contrast and saturation by a factor of 0.5 to 1.5, hue by up to 36 degrees.
    Contrast comes before saturation and hue or after them. Only RGB images have saturation and hue.
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
            colors[..., 0] += np.uint8(round(hue * 256 / 180) % 256)  # hue is a circle: uint8 wraps around
            image = np.asarray(Image.fromarray(colors, "HSV").convert("RGB"))
    return image if early else contrast(image)
