"""Encoded bytes, or pixels as a data set stores them, to 8-bit pixels; and what a bad image is.

A bad image is one that does not decode whole: truncated, empty, of a format or pixel type that is not taken, or larger
than `max_pixels` by its own header. In training another takes its place, which is decided where batches are made
(`simmim_jax.data`); an evaluation goes without it (`leave_out`).

Letters of shapes: h height, w width, c channels.
"""

import contextlib
import io
import warnings
from collections.abc import Iterator

import numpy as np
import simplejpeg
from absl import logging
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps

from simmim_jax.errors import DataError

# The parsers that bytes may reach. Pillow has forty more, and each is fed with strangers' files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB"}
LYING = (5, 6, 7, 8)  # EXIF orientations of images that are stored on their side

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides, and says so
warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # the pixels are what counts


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def leave_out(source, index: int, error: Exception, *, reported: set, allowed: bool) -> None:
    """Name a bad record of an evaluation on the log, once: `reported` has those that were. DataError if not allowed."""
    if not allowed:
        fix = "mend or remove the file, or set data.on_error=replace"
        raise DataError(f"a bad image: {source.name(index)}: {error}", source.describe(), fix) from error
    if index not in reported:
        logging.warning("left out of the evaluation: %s: %s", source.name(index), error)
    reported.add(index)


class Picture:
    """An image whose header alone has been read: `height` and `width` are those of what `read` gives.

    Colors are converted as torchvision's loader does, by Pillow's `convert`: alpha is dropped and not composited, gray
    is repeated, palettes and CMYK are looked up. 16-bit gray is scaled to 8 bits (`convert` would clip it). EXIF
    orientation is applied; an animation gives its first frame. Other channel counts than 1 and 3 are taken as they
    are stored, never converted.

    Args:
      image: the bytes of a file, or uint8 or uint16 pixels [h, w] or [h, w, c].
      channels: that `read` gives.
      max_pixels: the largest h * w, read from the header before any pixel is allocated. Beyond 178,956,970 Pillow
        refuses by itself.

    Raises:
      BadImage: for anything that cannot be decoded so; also from `read`.
    """

    def __init__(self, image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS):
        self._channels = channels
        with _faults_told():
            if isinstance(image, np.ndarray):
                self._pixels = _from_array(image, channels, max_pixels)
            else:
                self._file = _open(image, max_pixels)
                # of a JPEG the header tells all, and its pixels can wait until it is known how many are wanted
                lazy = self._file.format in ("JPEG", "MPO") and self._file.mode in ("L", "RGB") and channels in MODES
                self._pixels = None if lazy else _from_file(self._file, channels)
            if self._pixels is None:
                self._jpeg, self._orientation = image, self._file.getexif().get(ExifTags.Base.Orientation, 1)
                size = self._file.size if self._orientation in LYING else self._file.size[::-1]
            else:
                size = self._pixels.shape[:2]
        self.height, self.width = size

    def read(self, reduce: int = 1) -> UInt8[np.ndarray, "h w c"]:
        """All pixels; of a JPEG `reduce` (1, 2, 4 or 8) times fewer in each direction, rounded up.

        A JPEG's own transform gives these for less than the whole. Everything else comes whole.
        """
        if self._pixels is not None:
            return self._pixels
        with _faults_told():
            pixels = self._read_jpeg(reduce)
            return _from_file(self._file, self._channels) if pixels is None else _turned(pixels, self._orientation)

    def _read_jpeg(self, reduce: int) -> np.ndarray | None:
        """What libjpeg-turbo gives without Pillow in between, to the same bits; None where it has a doubt."""
        width, height = self._file.size
        colors = "GRAY" if (self._file.mode, self._channels) == ("L", 1) else "RGB"
        least = {} if reduce == 1 else {"min_height": -(-height // reduce), "min_width": -(-width // reduce)}
        try:
            if simplejpeg.decode_jpeg_header(self._jpeg, strict=False)[:2] != (height, width):
                return None
            pixels = simplejpeg.decode_jpeg(self._jpeg, colors, min_factor=reduce, **least)
            if pixels.shape[:2] != (-(-height // reduce), -(-width // reduce)):
                return None
        except ValueError:  # any warning of libjpeg's: Pillow forgives some of them, and its word counts
            return None
        return pixels if pixels.shape[2] == self._channels else _converted(pixels, self._channels)


def decode(image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w c"]:
    """All pixels of an image, as a `Picture` of these arguments reads them."""
    return Picture(image, channels, max_pixels).read()


@contextlib.contextmanager
def _faults_told() -> Iterator[None]:
    """Whatever fails inside becomes a BadImage: the bytes are anybody's, and parsers raise whatever they trip over."""
    try:
        yield
    except (BadImage, MemoryError):  # too little memory is this machine's fault, not the image's
        raise
    except Exception as error:
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"is none of {', '.join(FORMATS)}, or damaged at its start") from error
    _check_size(picture.height, picture.width, max_pixels)
    return picture


def _from_file(picture: Image.Image, channels: int) -> np.ndarray:
    picture.load()
    with contextlib.suppress(Exception):  # of damaged EXIF the parsers raise what they like, and the pixels are whole
        ImageOps.exif_transpose(picture, in_place=True)
    picture.info.pop("transparency", None)  # dropped like all alpha; `convert` would warn of it
    if picture.mode.startswith("I;16"):
        picture = Image.fromarray(_to_uint8(np.asarray(picture)))
    if picture.mode in ("I", "F"):
        raise BadImage(f"has 32-bit samples (mode {picture.mode}), which have no fixed range")
    if channels in MODES and picture.mode != MODES[channels]:
        picture = picture.convert(MODES[channels])
    return _checked(np.atleast_3d(np.asarray(picture)), channels)


def _from_array(pixels: np.ndarray, channels: int, max_pixels: int) -> np.ndarray:
    if pixels.ndim not in (2, 3) or pixels.dtype not in (np.uint8, np.uint16) or not pixels.size:
        raise BadImage(f"is an array {pixels.dtype}{list(pixels.shape)}, not uint8 or uint16 [h, w, c]")
    _check_size(*pixels.shape[:2], max_pixels)
    pixels = np.atleast_3d(_to_uint8(pixels))
    return _converted(pixels, channels) if {channels, pixels.shape[2]} == set(MODES) else _checked(pixels, channels)


def _converted(pixels: np.ndarray, channels: int) -> np.ndarray:
    """From gray to RGB, or from RGB to gray."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.atleast_3d(np.asarray(picture.convert(MODES[channels])))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize == 2 else pixels


def _checked(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] != channels:
        raise BadImage(f"has {pixels.shape[2]} channels where {channels} are expected")
    return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"has {height} x {width} pixels, more than max_pixels={max_pixels}")


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Upright, by the EXIF orientation, 1 to 8; anything else is as good as 1."""
    if orientation in LYING:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
