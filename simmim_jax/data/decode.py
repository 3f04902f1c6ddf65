"""Encoded bytes, or pixels as a data set stores them, to one 8-bit image; and what a bad image is.

A bad image is one that does not decode whole: truncated, empty, of a format or pixel type that is not taken, or larger
than `max_pixels` by its own header. What becomes of it is decided where batches are made (`simmim_jax.data`).
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps

# The parsers that bytes may reach. Pillow has forty more, and each is fed with strangers' files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 64_000_000
MODES = {1: "L", 3: "RGB"}

warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides, and says so


class BadImage(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def decode(image: bytes | np.ndarray, channels: int, max_pixels: int = MAX_PIXELS) -> Image.Image | np.ndarray:
    """The image in 8 bits with so many channels: a Pillow image of mode L or RGB, else uint8 [h, w, channels].

    Colours are converted as torchvision's loader does, by Pillow's `convert`: alpha is dropped and not composited, grey
    is repeated, palettes and CMYK are looked up. 16-bit grey is scaled to 8 bits (`convert` would clip it). EXIF
    orientation is applied; an animation gives its first frame. Other channel counts than 1 and 3 are taken as they
    are stored, never converted.

    Args:
      image: the bytes of a file, or uint8 or uint16 pixels [h, w] or [h, w, c].
      max_pixels: the largest h * w, read from the header before any pixel is allocated. Beyond 178,956,970 Pillow
        refuses by itself.

    Raises:
      BadImage: for anything that cannot be decoded so.
    """
    try:
        picture = (_from_array if isinstance(image, np.ndarray) else _from_bytes)(image, max_pixels)
        if isinstance(picture, Image.Image) and channels in MODES:
            return picture if picture.mode == MODES[channels] else picture.convert(MODES[channels])
    except (BadImage, MemoryError):  # too little memory is this machine's fault, not the image's
        raise
    except Exception as error:  # the bytes are anybody's, and Pillow's parsers raise whatever they trip over
        raise BadImage(" ".join(str(error).split())[:200] or type(error).__name__) from error
    pixels = np.atleast_3d(np.asarray(picture))
    if pixels.shape[2] != channels:
        raise BadImage(f"has {pixels.shape[2]} channels where {channels} are expected")
    return pixels


def _from_bytes(data: bytes, max_pixels: int) -> Image.Image:
    if not data:
        raise BadImage("is empty")
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        raise BadImage(f"is none of {', '.join(FORMATS)}, or damaged at its start") from error
    _check_size(picture.height, picture.width, max_pixels)
    picture.load()
    ImageOps.exif_transpose(picture, in_place=True)
    picture.info.pop("transparency", None)  # dropped like all alpha; `convert` would warn of it
    if picture.mode.startswith("I;16"):
        return Image.fromarray(_to_uint8(np.asarray(picture)))
    if picture.mode in ("I", "F"):
        raise BadImage(f"has 32-bit samples (mode {picture.mode}), which have no fixed range")
    return picture


def _from_array(pixels: np.ndarray, max_pixels: int) -> Image.Image | np.ndarray:
    if pixels.ndim not in (2, 3) or pixels.dtype not in (np.uint8, np.uint16) or not pixels.size:
        raise BadImage(f"is an array {pixels.dtype}{list(pixels.shape)}, not uint8 or uint16 [h, w, c]")
    _check_size(*pixels.shape[:2], max_pixels)
    pixels = np.atleast_3d(_to_uint8(pixels))
    if pixels.shape[2] not in MODES:
        return pixels
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def _to_uint8(pixels: np.ndarray) -> np.ndarray:
    return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize == 2 else pixels


def _check_size(height: int, width: int, max_pixels: int) -> None:
    if height * width > max_pixels:
        raise BadImage(f"has {height} x {width} pixels, more than max_pixels={max_pixels}")
