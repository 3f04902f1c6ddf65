"""Decoding: encoded bytes, or the pixels that a data set stores, to 8-bit pixels.

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

import numpy as np
import simplejpeg
from absl import logging
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, features

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
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width

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
        logging.warning("left out of the evaluation: %s: %s", source.name(index), error)
    reported.add(index)


class Picture:
    """An image of which only the header has been read. `height` and `width` are the size that `read` returns.

    Colors are converted by Pillow's `convert`, as in torchvision's loader: alpha is dropped without compositing, gray
    is repeated, palettes and CMYK are looked up. 16-bit gray is scaled to 8 bits (`convert` would clip it). EXIF
    orientation is applied. An animation yields its first frame. Images with other than 1 or 3 channels are never
    converted.

    Args:
      image: the bytes of a file, or uint8 or uint16 pixels [h, w] or [h, w, c].
      channels: number of channels that `read` returns.
      max_pixels: the largest h * w, checked against the header before any pixel is allocated. Above 178,956,970 pixels
        Pillow itself refuses.

    Raises:
      BadImage: the image cannot be decoded. `read` may raise it too.
    """

    def __init__(self, image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS):
        self._channels = channels
        with _as_bad_image():
            if isinstance(image, np.ndarray):
                self._pixels = _from_array(image, channels, max_pixels)
            else:
                self._file = _open(image, max_pixels)
                # The header of such a JPEG is enough for now: `read` may need only a fraction of the pixels.
                lazy = self._file.format in ("JPEG", "MPO") and self._file.mode in ("L", "RGB") and channels in MODES
                self._pixels = None if lazy else _from_file(self._file, channels)
            if self._pixels is None:
                self._jpeg, self._orientation = image, self._file.getexif().get(ExifTags.Base.Orientation, 1)
                size = self._file.size if self._orientation in TRANSPOSED else self._file.size[::-1]
            else:
                size = self._pixels.shape[:2]
        self.height, self.width = size

    def read(self, reduce: int = 1) -> UInt8[np.ndarray, "h w c"]:
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


def decode(image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS) -> UInt8[np.ndarray, "h w c"]:
    """All pixels of an image, read by a `Picture` with these arguments."""
    return Picture(image, channels, max_pixels).read()


@contextlib.contextmanager
def _as_bad_image() -> Iterator[None]:
    """Turn any exception into BadImage: on untrusted bytes, parsers raise all kinds of them."""
    try:
        yield
    except (BadImage, MemoryError):  # a lack of memory is not the image's fault
        raise
    except Exception as error:
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error


def _open(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"is none of {', '.join(FORMATS)}, or its start is damaged") from error
    _check_size(picture.height, picture.width, max_pixels)
    return picture


def _from_file(picture: Image.Image, channels: int) -> np.ndarray:
    picture.load()
    with contextlib.suppress(Exception):  # damaged EXIF raises anything, but the pixels are good
        ImageOps.exif_transpose(picture, in_place=True)
    picture.info.pop("transparency", None)  # dropped like all alpha; `convert` would warn about it
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
    """Convert gray to RGB or RGB to gray."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.atleast_3d(np.asarray(picture.convert(MODES[channels])))


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize == 2 else pixels


def _checked(pixels: np.ndarray, channels: int) -> np.ndarray:
    if pixels.shape[2] != channels:
        raise BadImage(f"has {pixels.shape[2]} channels, expected {channels}")
    return pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"has {height} x {width} pixels, more than max_pixels={max_pixels}")


def rotate_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation, 1 to 8. Other values have no effect."""
    if orientation in TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels
