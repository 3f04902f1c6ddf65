"""Crops and resizing of one image on the host, in numpy.

The result is that of torchvision on Pillow images. The filters are Pillow's, with antialiasing, run by the SIMD code of
cykooz_resizer in Pillow's order: horizontal, then vertical. Compared with Pillow, bilinear differs by at most 1 of 255
in about 1 % of the values, bicubic and lanczos by a little more next to hard edges, and a large JPEG that is decoded at
reduced size by up to 20. tests/test_data_transforms.py has the bounds; `benchmarks/input.py --max-difference` measures
them on photographs.

Shapes: h height, w width, c channels. Sizes are (height, width) in pixels.
"""

import math
import threading

import numpy as np
from cykooz_resizer import CropBox, FilterType, ImageData, PixelType, ResizeAlg, ResizeOptions, Resizer
from jaxtyping import Num

from simmim_jax.data.decode import Picture, missing_values

INTERPOLATIONS = {
    "nearest": ResizeAlg.nearest(),
    "bilinear": ResizeAlg.convolution(FilterType.bilinear),
    "bicubic": ResizeAlg.convolution(FilterType.catmull_rom),  # the cubic of Pillow and torchvision, a = -0.5
    "lanczos": ResizeAlg.convolution(FilterType.lanczos3),
}
# Radius of each filter, in pixels of the input or the output, the larger of the two.
RADIUS = {"nearest": 0, "bilinear": 1, "bicubic": 2, "lanczos": 3}
MAX_CHANNELS = 4
PIXELS = {  # by the type of the samples: types of 1 to 4 channels
    "uint8": (PixelType.U8, PixelType.U8x2, PixelType.U8x3, PixelType.U8x4),
    "float32": (PixelType.F32, PixelType.F32x2, PixelType.F32x3, PixelType.F32x4),
}
# A JPEG is decoded at 1/2, 1/4 or 1/8 of its size if that still leaves this many times the output's pixels on each
# side, so that the filter decides the result.
MIN_REDUCED_SCALE = 1.5

_local = threading.local()  # a Resizer has buffers, which threads must not share


def random_resized_crop(
    picture: Picture,
    rng: np.random.Generator,
    size: tuple[int, int],
    scale: tuple[float, float] = (0.67, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    interpolation: str = "bilinear",
) -> Num[np.ndarray, "h w c"]:
    """A random crop of the image, resized to `size`.

    It has the distribution of torchvision's RandomResizedCrop. The defaults are those of SimMIM (paper, section 4.1).

    Args:
      scale: bounds of the crop's area, as fractions of the image's area.
      ratio: bounds of the crop's width / height, whose logarithm is uniform.
    """
    box = _random_box(rng, picture.width, picture.height, scale, ratio)
    pixels, (left, top, right, bottom) = _read(picture, box, size, interpolation)
    rows, columns = slice(math.floor(top), math.ceil(bottom)), slice(math.floor(left), math.ceil(right))
    # Crop first, as torchvision does: the filter must not read pixels outside of the box.
    box = left - columns.start, top - rows.start, right - columns.start, bottom - rows.start
    return resize(pixels[rows, columns], size, interpolation, box, missing=picture.missing)


def random_flip(
    image: Num[np.ndarray, "h w c"], rng: np.random.Generator, probability: float
) -> Num[np.ndarray, "h w c"]:
    """The image, flipped horizontally with this probability."""
    if rng.random() >= probability:
        return image
    flipped = np.empty_like(image)
    for channel in range(image.shape[2]):  # four times as fast as copying all channels at once
        flipped[..., channel] = image[:, ::-1, channel]
    return flipped


def resize_and_center_crop(
    picture: Picture,
    size: tuple[int, int],
    crop_fraction: float = 1.0,
    interpolation: str = "bilinear",
) -> Num[np.ndarray, "h w c"]:
    """The center of the image: resized until it just covers `size / crop_fraction`, then cropped to `size`.

    This is torchvision's Resize and CenterCrop, including the rounding. A crop_fraction of 0.875 is the usual resize to
    256 for a crop of 224. Only the pixels of the crop are computed, so an image of 1 x 5000 costs no more than others.
    """
    width, height = picture.width, picture.height
    cover = [math.floor(side / crop_fraction) for side in size]
    if cover[0] * width >= cover[1] * height:  # the height fits exactly, the width overlaps
        resized = cover[0], max(size[1], int(cover[0] * width / height))
    else:
        resized = max(size[0], int(cover[1] * height / width)), cover[1]
    top, left = (round((whole - kept) / 2) for whole, kept in zip(resized, size, strict=True))
    down, across = height / resized[0], width / resized[1]
    right, bottom = min((left + size[1]) * across, width), min((top + size[0]) * down, height)
    pixels, box = _read(picture, (left * across, top * down, right, bottom), size, interpolation)
    return resize(pixels, size, interpolation, box, missing=picture.missing)


def resize(
    pixels: Num[np.ndarray, "height width c"],
    size: tuple[int, int],
    interpolation: str = "bicubic",
    box: tuple[int | float, int | float, int | float, int | float] | None = None,
    missing: int | float | None = None,
) -> Num[np.ndarray, "h w c"]:
    """The pixels, or only those in `box` (left, top, right, bottom), resized to `size`. The type stays.

    The filter also reads pixels next to the box.

    missing: value of pixels without data, which may be NaN; None: all have data. A value that the filter computes from
      a missing one is missing.
    """
    if missing is not None and (holes := missing_values(pixels, missing)).any():
        filled = resize(np.where(holes, pixels.dtype.type(0), pixels), size, interpolation, box)
        kind = "nearest" if interpolation == "nearest" else "bilinear"  # no negative weights, which could cancel out
        return np.where(
            resize(np.where(holes, np.float32(1), 0), size, kind, box) > 0, pixels.dtype.type(missing), filled
        )
    left, top, right, bottom = box or (0, 0, pixels.shape[1], pixels.shape[0])
    rows = _support(top, bottom, size[0], pixels.shape[0], interpolation)
    columns = _support(left, right, size[1], pixels.shape[1], interpolation)
    pixels = pixels[rows, columns]
    across = CropBox(left - columns.start, 0, right - left, len(pixels))
    down = CropBox(0, top - rows.start, size[1], bottom - top)
    samples = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32)  # holds every 16-bit value exactly
    planes = [_resize_planes(part, size, interpolation, across, down) for part in _parts(samples)]
    resized = planes[0] if len(planes) == 1 else np.concatenate(planes, axis=-1)
    if resized.dtype == pixels.dtype:
        return resized
    bounds = np.iinfo(pixels.dtype)  # a cubic filter overshoots next to hard edges
    return np.clip(np.rint(resized), bounds.min, bounds.max).astype(pixels.dtype)


def _resize_planes(pixels, size, interpolation, across: CropBox, down: CropBox) -> np.ndarray:
    if not hasattr(_local, "resizer"):
        _local.resizer = Resizer()
    height, width, channels = pixels.shape
    kind, how = PIXELS[pixels.dtype.name][channels - 1], INTERPOLATIONS[interpolation]
    whole = ImageData(width, height, kind, pixels.tobytes())
    narrow, small = ImageData(size[1], height, kind), ImageData(size[1], size[0], kind)
    _local.resizer.resize(whole, narrow, ResizeOptions(resize_alg=how, crop_box=across, use_alpha=False))
    _local.resizer.resize(narrow, small, ResizeOptions(resize_alg=how, crop_box=down, use_alpha=False))
    return np.frombuffer(small.get_buffer(), pixels.dtype).reshape(*size, channels)


def _parts(pixels: np.ndarray) -> list[np.ndarray]:
    """The pixels, split into groups of up to four channels, which the resizer filters at once."""
    return np.split(pixels, range(MAX_CHANNELS, pixels.shape[2], MAX_CHANNELS), axis=2)


def _support(low: int | float, high: int | float, out_size: int, in_size: int, interpolation: str) -> slice:
    """Rows or columns that the filter reads."""
    radius = RADIUS[interpolation] * max(1.0, (high - low) / out_size) + 1
    return slice(max(0, math.floor(low - radius)), min(in_size, math.ceil(high + radius)))


def _random_box(rng, width, height, scale, ratio) -> tuple[int, int, int, int]:
    """(left, top, right, bottom): the first of ten draws that fits, or the largest centered box of a valid ratio."""
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
    """The pixels of a picture at the resolution that a crop of `size` needs, and the box in these pixels."""
    factor = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    reduce = next((n for n in (8, 4, 2) if interpolation != "nearest" and factor >= MIN_REDUCED_SCALE * n), 1)
    pixels = picture.read(reduce)
    if pixels.shape[:2] == (picture.height, picture.width):
        return pixels, box
    return pixels, tuple(side / reduce for side in box)
