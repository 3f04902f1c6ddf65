"""From a decoded image to one of the size that the model takes: numpy, one image at a time, no JAX.

What torchvision makes of Pillow images: Pillow's filters, antialiased, run by the SIMD code of cykooz_resizer in
Pillow's order, across before down. Bilinear differs from Pillow's own by at most 1 of 255, in about one value of a
hundred; bicubic and lanczos by a little more where they overshoot; a large JPEG that is decoded at a fraction by up to
20 (bounds: tests/test_data_transforms.py; on photographs: benchmarks/input.py --process_max-difference).

Letters of shapes: h height, w width, c channels. Sizes are (height, width) in pixels.
"""

import math
import threading

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from jaxtyping import UInt8

from simmim_jax.data.decode import Picture

INTERPOLATIONS = {
    "nearest": ResizeAlg.nearest(),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # the cubic that Pillow and torchvision have, a = -0.5
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
}
# how far a filter reaches, in pixels of the image that it reads or that it gives, whichever are larger
REACH = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 3}
PIXELS = {1: PixelType.U8, 2: PixelType.U8x2, 3: PixelType.U8x3, 4: PixelType.U8x4}
# A JPEG is decoded at a half, a quarter or an eighth where what is kept of it has yet so many times the pixels, in each
# direction, that are wanted in the end: the filter then has the last word on them.
SPARE = 1.5

_own = threading.local()  # a Resizer has buffers, which threads must not share


def random_resized_crop(
    picture: Picture,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "h w c"]:
    """A random part of the image, resized to `size`.

    Source: torchvision's RandomResizedCrop, whose distribution this is; the defaults are SimMIM's (paper, section 4.1).

    Args:
      scale: bounds of the part's area, as fractions of the image's.
      ratio: bounds of the part's width / height, drawn uniformly in its logarithm.
    """
    box = _random_box(rng, picture.width, picture.height, scale, ratio)
    pixels, (left, top, right, bottom) = _read(picture, box, size, interpolation)
    rows, columns = slice(math.floor(top), math.ceil(bottom)), slice(math.floor(left), math.ceil(right))
    # cut first, as torchvision does: the filter must not see what lies outside
    box = left - columns.start, top - rows.start, right - columns.start, bottom - rows.start
    return resize(pixels[rows, columns], size, interpolation, box)


def random_flip(
    image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator, probability: float
) -> UInt8[np.ndarray, "h w c"]:
    """The image, mirrored left to right with this probability."""
    if rng.random() >= probability:
        return image
    flipped = np.empty_like(image)
    for channel in range(image.shape[2]):  # one by one: four times as quick as copying the mirrored view of all
        flipped[..., channel] = image[:, ::-1, channel]
    return flipped


def resize_and_center_crop(
    picture: Picture,
    size: tuple[int, int],
    crop_fraction: float = 1.0,
    interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "h w c"]:
    """The center of the image: resized until it just covers `size / crop_fraction`, then cropped to `size`.

    Source: torchvision's Resize and CenterCrop, to the rounding; 0.875 is the usual resize to 256 for a crop of 224.
    Only the part that is kept is computed, so that an image of 1 x 5000 costs no more than another.
    """
    width, height = picture.width, picture.height
    cover = [math.floor(side / crop_fraction) for side in size]
    if cover[0] * width >= cover[1] * height:  # the height just covers; the width, scaled along, overlaps
        resized = cover[0], max(size[1], int(cover[0] * width / height))
    else:
        resized = max(size[0], int(cover[1] * height / width)), cover[1]
    top, left = (round((whole - kept) / 2) for whole, kept in zip(resized, size, strict=True))
    down, across = height / resized[0], width / resized[1]
    right, bottom = min((left + size[1]) * across, width), min((top + size[0]) * down, height)
    pixels, box = _read(picture, (left * across, top * down, right, bottom), size, interpolation)
    return resize(pixels, size, interpolation, box)


def resize(
    pixels: UInt8[np.ndarray, "height width c"],
    size: tuple[int, int],
    interpolation: str = "bicubic",
    box: tuple[int | float, int | float, int | float, int | float] | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    """The pixels, or the part of them within `box` (left, top, right, bottom), filtered down or up to `size`.

    The filter sees what lies just outside of the box.
    """
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    rows = _seen(top, bottom, size[0], pixels.shape[0], interpolation)
    columns = _seen(left, right, size[1], pixels.shape[1], interpolation)
    pixels = pixels[rows, columns]
    across = CropBox(left - columns.start, 0, right - left, len(pixels))
    down = CropBox(0, top - rows.start, size[1], bottom - top)
    planes = [_filtered(part, size, interpolation, across, down) for part in _parts(pixels)]
    return planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)


def _filtered(pixels, size, interpolation, across: CropBox, down: CropBox) -> np.ndarray:
    if not hasattr(_own, "resizer"):
        _own.resizer = Resizer()
    height, width, channels = pixels.shape
    kind, how = PIXELS[channels], INTERPOLATIONS[interpolation]
    whole = ImageData(width, height, kind, pixels.tobytes())
    narrow, small = ImageData(size[1], height, kind), ImageData(size[1], size[0], kind)
    _own.resizer.resize(whole, narrow, ResizeOptions(resize_alg=how, crop_box=across, use_alpha=False))
    _own.resizer.resize(narrow, small, ResizeOptions(resize_alg=how, crop_box=down, use_alpha=False))
    return np.frombuffer(small.get_buffer(), np.uint8).reshape(*size, channels)


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    """The pixels, if as many channels can be filtered at once, else channel by channel."""
    return [pixels] if pixels.shape[2] in PIXELS else np.split(pixels, pixels.shape[2], axis=2)


def _seen(low: int | float, high: int | float, wanted: int, there: int, interpolation: str) -> slice:
    """Rows or columns that the filter looks at."""
    reach = REACH[interpolation] * max(1.0, (high - low) / wanted) + 1
    return slice(max(0, math.floor(low - reach)), min(there, math.ceil(high + reach)))


def _random_box(rng, width, height, scale, ratio) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: of ten tries the first that fits, else the largest centerd box of an allowed ratio."""
    for _ in range(10):
        area = height * width * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top, left = int(rng.integers(height - h + 1)), int(rng.integers(width - w + 1))
            return left, top, left + w, top + h
    aspect = min(max(width / height, ratio[0]), ratio[1])
    w, h = min(width, max(1, round(height * aspect))), min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _read(picture: Picture, box: tuple, size: tuple[int, int], interpolation: str) -> tuple[np.ndarray, tuple]:
    """The pixels of a picture, in no more detail than `size` needs of the box, and the box in these pixels."""
    enough = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    reduce = next((n for n in (8, 4, 2) if interpolation != "nearest" and enough >= SPARE * n), 1)
    pixels = picture.read(reduce)
    if pixels.shape[:2] == (picture.height, picture.width):
        return pixels, box
    return pixels, tuple(side / reduce for side in box)
