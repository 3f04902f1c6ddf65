"""Decoding: encoded bytes, or the pixels that a data set stores, to pixels in the type in which they are stored.

The samples are uint8, uint16, int16 or float32, and are scaled on the device (`simmim_jax.data.pixels`). Pillow and
libjpeg-turbo read 8-bit pictures, `simmim_jax.data.rasters` all others.

An image is bad if it does not decode completely: truncated, empty, of an unsupported format or pixel type, or larger
than `max_pixels` according to its header. Training replaces a bad image by another one (`simmim_jax.data.batches`).
Evaluation leaves it out (`leave_out`).

Shapes: h height, w width, c channels.
"""

import contextlib
import importlib.util
import io
import itertools
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import simplejpeg
from absl import logging
from jaxtyping import Num
from PIL import ExifTags, Image, ImageOps, features

from simmim_jax.data.rasters import TRANSPOSED, Raster, from_array, open_raster, rotate_upright
from simmim_jax.errors import DataError


def _register_heif() -> bool:
    """Make Pillow read HEIC, if pillow-heif, an optional extra, is installed."""
    if not importlib.util.find_spec("pillow_heif"):
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


# Supported formats and the endings of their files. Pillow has about forty more parsers, which untrusted files must not
# reach.
ENDINGS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",), "BMP": (".bmp",),
    "TIFF": (".tif", ".tiff"), "GIF": (".gif",),
}  # fmt: skip
if features.check("avif"):
    ENDINGS["AVIF"] = (".avif",)
if _register_heif():
    ENDINGS["HEIF"] = (".heic", ".heif", ".hif")
FORMATS, EXTENSIONS = tuple(ENDINGS), tuple(itertools.chain(*ENDINGS.values()))
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB"}
GRAY_MODES, ALPHA_MODES = ("1", "L", "LA", "La"), ("LA", "La", "PA", "RGBA", "RGBa")  # of Pillow

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the pixels are still good


class BadImage(ValueError):
    """An image that cannot be used. The message is the reason in a few words."""


def leave_out(source, index: int, error: Exception, *, reported: set, allowed: bool) -> None:
    """Log a bad record of an evaluation, unless it is in `reported`. Raise DataError if bad images are not allowed."""
    if not allowed:
        fix = "repair or remove the file, or set data.on_error=replace"
        raise DataError(f"a bad image: {source.name(index)}: {error}", source.describe(), fix) from error
    if index not in reported:
        logging.warning("left out: %s: %s", source.name(index), error)
    reported.add(index)


class Samples(NamedTuple):
    """What every image of a data set must have, apart from the number of channels.

    dtype: uint8, uint16, int16 or float32; "": any.
    bands: the bands to read, by name or by number from 1, in this order; (): all, without alpha.
    names: the names of the channels that are read; () if unknown. A file with other names is a bad image.
    nodata: the value of pixels without data; None: there are none. In float32, NaN has no data either.
    max_nodata: the largest fraction of an image's values that may have no data.
    """

    dtype: str = "uint8"
    bands: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    nodata: int | float | None = None
    max_nodata: int | float = 1.0

    def as_json(self) -> dict:
        """The fields by name that are not at their default, with lists instead of tuples."""
        fields = {name: list(x) if isinstance(x, tuple) else x for name, x in self._asdict().items()}
        return {name: x for name, x in fields.items() if getattr(Samples(), name) != getattr(self, name)}

    @property
    def missing(self) -> int | float | None:
        """The value of pixels without data in a decoded image, or None."""
        return float("nan") if self.dtype == "float32" else self.nodata


ANY = Samples(dtype="")  # the type that an image has


class Picture:
    """An image of which only the header has been read. `height` and `width` are the size that `read` returns.

    `missing` is the value of pixels without data, or None.

    Colors are converted by Pillow's `convert`, as in torchvision's loader: alpha is dropped without compositing, gray
    is repeated, palettes and CMYK are looked up. Images with other than 1 or 3 channels are never converted. EXIF
    orientation is applied. An animation yields its first frame.

    Args:
      image: the bytes of a file, or pixels [h, w] or [h, w, c].
      channels: number of channels that `read` returns.
      max_pixels: the largest h * w, checked against the header before any pixel is allocated. Above 178,956,970 pixels
        Pillow itself refuses.
      samples: what the image must have.

    Raises:
      BadImage: the image cannot be decoded, or is another one than expected. `read` may raise it too.
    """

    def __init__(self, image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS, samples: Samples = ANY):
        self._channels, self.missing = channels, samples.missing
        with _as_bad_image():
            raster = _open_raster(image, max_pixels)
            if raster is None:
                self._file = _open(image, max_pixels)
                if samples.dtype not in ("", "uint8"):
                    raise BadImage(f"has uint8 samples, expected {samples.dtype}")
                if samples.bands:
                    raster = from_array(_from_file(self._file, _picture_header(self._file).channels))
            if raster:
                self._pixels = _from_raster(raster, channels, samples)
            else:
                # The header of such a JPEG is enough for now: `read` may need only a fraction of the pixels.
                lazy = self._file.format in ("JPEG", "MPO") and self._file.mode in ("L", "RGB") and channels in MODES
                lazy = lazy and samples.nodata is None
                self._pixels = None if lazy else _from_file(self._file, channels)
            if self._pixels is None:
                self._jpeg, self._orientation = image, self._file.getexif().get(ExifTags.Base.Orientation, 1)
                size = self._file.size if self._orientation in TRANSPOSED else self._file.size[::-1]
            else:
                _check_data(self._pixels, samples)
                size = self._pixels.shape[:2]
        self.height, self.width = size

    def read(self, reduce: int = 1) -> Num[np.ndarray, "h w c"]:
        """All pixels. A JPEG is decoded with its sides divided by `reduce` (1, 2, 4 or 8), rounded up.

        JPEG's transform makes this cheaper than a full decode. Other images ignore `reduce`.
        """
        if self._pixels is not None:
            return self._pixels
        with _as_bad_image():
            pixels = self._read_jpeg(reduce)
            return (
                _from_file(self._file, self._channels) if pixels is None else rotate_upright(pixels, self._orientation)
            )

    def _read_jpeg(self, reduce: int) -> np.ndarray | None:
        """The pixels of libjpeg-turbo, bit for bit those of Pillow but faster; None if it warns about the file."""
        width, height = self._file.size
        colors = "GRAY" if (self._file.mode, self._channels) == ("L", 1) else "RGB"
        minimum = {} if reduce == 1 else {"min_height": -(-height // reduce), "min_width": -(-width // reduce)}
        try:
            if simplejpeg.decode_jpeg_header(self._jpeg, strict=False)[:2] != (height, width):
                return None
            pixels = simplejpeg.decode_jpeg(self._jpeg, colors, min_factor=reduce, **minimum)
            if pixels.shape[:2] != (-(-height // reduce), -(-width // reduce)):
                return None
        except ValueError:  # libjpeg warned: Pillow accepts some of these files, and decides
            return None
        return pixels if pixels.shape[2] == self._channels else _converted(pixels, self._channels)


def decode(
    image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS, samples: Samples = ANY
) -> Num[np.ndarray, "h w c"]:
    """All pixels of an image, read by a `Picture` with these arguments."""
    return Picture(image, channels, max_pixels, samples).read()


class EmptyImage(BadImage):
    """An image with less data than `Samples.max_nodata` asks for."""


class Header(NamedTuple):
    """What an image holds: the fields of `rasters.Raster` with these names."""

    channels: int
    alpha: int
    dtype: str
    names: tuple[str, ...] = ()
    nodata: int | float | None = None
    unread: str = ""


def read_header(image: bytes | np.ndarray, max_pixels: int = MAX_PIXELS) -> Header:
    """What an image holds. Raises BadImage."""
    with _as_bad_image():
        raster = _open_raster(image, max_pixels)
        return (
            Header(*(getattr(raster, name) for name in Header._fields))
            if raster
            else _picture_header(_open(image, max_pixels))
        )


def _picture_header(picture: Image.Image) -> Header:
    alpha = picture.mode in ALPHA_MODES or "transparency" in picture.info
    frames = picture.format != "MPO" and getattr(picture, "is_animated", False)
    channels = 1 if picture.mode in GRAY_MODES else 3
    return Header(channels, int(alpha), "uint8", unread="further frames" if frames else "")


@contextlib.contextmanager
def _as_bad_image() -> Iterator[None]:
    """Turn any exception into BadImage: on untrusted bytes, parsers raise all kinds of them."""
    try:
        yield
    except (BadImage, DataError, MemoryError):  # a lack of memory or of a package is not the image's fault
        raise
    except Exception as error:
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _open_raster(image: bytes | np.ndarray, max_pixels: int) -> Raster | None:
    raster = from_array(image) if isinstance(image, np.ndarray) else open_raster(image)
    if raster:
        _check_size(raster.height, raster.width, max_pixels)
    return raster


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"is none of {', '.join(FORMATS)}, NumPy or DICOM, or its start is damaged") from error
    _check_size(picture.height, picture.width, max_pixels)
    return picture


def _from_file(picture: Image.Image, channels: int) -> np.ndarray:
    picture.load()
    with contextlib.suppress(Exception):  # damaged EXIF raises anything, but the pixels are good
        ImageOps.exif_transpose(picture, in_place=True)
    picture.info.pop("transparency", None)  # dropped like all alpha; `convert` would warn about it
    if channels in MODES and picture.mode != MODES[channels]:
        picture = picture.convert(MODES[channels])
    return _checked(np.atleast_3d(np.asarray(picture)), channels)


def _from_raster(raster: Raster, channels: int, samples: Samples) -> np.ndarray:
    if samples.dtype and raster.dtype != samples.dtype:
        raise BadImage(f"has {raster.dtype} samples, expected {samples.dtype}")
    bands = select_bands(raster, samples)
    convertible = not bands and {channels, raster.channels} == set(MODES)
    counts = (len(bands),) if bands else (raster.channels, raster.channels + raster.alpha)
    if channels not in counts and not convertible:  # before anything is allocated
        raise BadImage(f"has {counts[0]} channels, expected {channels}")
    pixels = raster.load()
    if pixels.shape != (raster.height, raster.width, raster.channels + raster.alpha) or not pixels.size:
        raise BadImage(f"is damaged: it has {list(pixels.shape)} samples, unlike its header")
    if bands:
        pixels = pixels[:, :, bands]
    elif channels != pixels.shape[2]:
        pixels = pixels[:, :, : raster.channels]
        pixels = _converted(pixels, channels) if convertible else pixels
    if samples.nodata is not None and pixels.dtype == np.float32:
        pixels = np.where(pixels == np.float32(samples.nodata), np.float32(np.nan), pixels)
    return np.ascontiguousarray(pixels)


def select_bands(image: Raster | Header, samples: Samples) -> list[int]:
    """The indices of `samples.bands` in an image; [] for all. Raises BadImage if bands are missing or permuted."""
    count, names = image.channels + image.alpha, image.names
    bands = []
    for band in samples.bands:
        if band in names:
            bands.append(names.index(band))
        elif band.isdigit() and 0 < int(band) <= count:
            bands.append(int(band) - 1)
        else:
            raise BadImage(f"has no band {band!r}, only {', '.join(names) or f'1 to {count}'}")
    found = tuple(names[n] for n in bands if n < len(names)) if bands else names
    if found and samples.names and found != samples.names:
        missing = [name for name in samples.names if name not in found]
        what = f"has no band {missing[0]!r}" if missing else "has its bands in another order"
        raise BadImage(f"{what}: {','.join(found)}; expected {','.join(samples.names)}")
    return bands


def _check_data(pixels: np.ndarray, samples: Samples) -> None:
    if samples.max_nodata < 1 and samples.missing is not None:
        fraction = missing_values(pixels, samples.missing).mean()
        if fraction > samples.max_nodata:
            raise EmptyImage(f"has no data in {fraction:.0%} of its pixels, more than data.max_nodata")


def missing_values(pixels: np.ndarray, nodata: int | float) -> np.ndarray:
    """Whether each value is `nodata`, which may be NaN."""
    return np.isnan(pixels) if np.isnan(nodata) else pixels == nodata


def _converted(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Convert gray to RGB or RGB to gray."""
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    if pixels.dtype != np.uint8:  # the weights of Pillow, ITU-R 601
        gray = pixels.astype(np.float32) @ np.float32([[0.299], [0.587], [0.114]])
        return gray if pixels.dtype == np.float32 else np.rint(gray).astype(pixels.dtype)
    return np.atleast_3d(np.asarray(Image.fromarray(pixels).convert(MODES[channels])))


def _checked(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] != channels:
        raise BadImage(f"has {pixels.shape[2]} channels, expected {channels}")
    return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"has {height} x {width} pixels, more than max_pixels={max_pixels}")
