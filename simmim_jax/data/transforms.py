"""From a decoded image to one of the size that the model takes: numpy and Pillow, one image at a time, no JAX.

Letters of shapes: h height, w width, c channels. Sizes are (height, width) in pixels. Every filter is antialiased.
"""

import math

import numpy as np
from jaxtyping import UInt8
from PIL import Image

INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


def random_resized_crop(
    image: Image.Image | UInt8[np.ndarray, "height width c"],
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
    width, height = _width_height(image)
    return _resize(image, _random_box(rng, width, height, scale, ratio), size, interpolation)


def random_flip(
    image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator, probability: float
) -> UInt8[np.ndarray, "h w c"]:
    """The image, mirrored left to right with this probability."""
    return image[:, ::-1] if rng.random() < probability else image


def resize_and_centre_crop(
    image: Image.Image | UInt8[np.ndarray, "height width c"],
    size: tuple[int, int],
    crop_fraction: float = 1.0,
    interpolation: str = "bilinear",
) -> UInt8[np.ndarray, "h w c"]:
    """The centre of the image: resized until it just covers `size / crop_fraction`, then cropped to `size`.

    Source: torchvision's Resize and CenterCrop, to the rounding; 0.875 is the usual resize to 256 for a crop of 224.
    Only the part that is kept is computed, so that an image of 1 x 5000 costs no more than another.
    """
    width, height = _width_height(image)
    cover = [math.floor(side / crop_fraction) for side in size]
    if cover[0] * width >= cover[1] * height:  # the height just covers; the width, scaled along, overlaps
        resized = cover[0], max(size[1], int(cover[0] * width / height))
    else:
        resized = max(size[0], int(cover[1] * height / width)), cover[1]
    top, left = (round((whole - kept) / 2) for whole, kept in zip(resized, size, strict=True))
    down, across = height / resized[0], width / resized[1]
    right, bottom = min((left + size[1]) * across, width), min((top + size[0]) * down, height)
    return _resize(image, (left * across, top * down, right, bottom), size, interpolation)


def _random_box(rng, width, height, scale, ratio) -> tuple[int, int, int, int]:
    """Left, top, right, bottom: of ten tries the first that fits, else the largest centred box of an allowed ratio."""
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


def _width_height(image: Image.Image | np.ndarray) -> tuple[int, int]:
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _resize(image, box, size, interpolation) -> UInt8[np.ndarray, "h w c"]:
    if isinstance(image, np.ndarray):  # neither grey nor RGB: Pillow has no such mode, so channel by channel
        planes = [_resize(Image.fromarray(plane), box, size, interpolation) for plane in np.moveaxis(image, -1, 0)]
        return np.concatenate(planes, axis=-1)
    # with box=, the filter sees the pixels just outside at the edges, and nothing is copied first
    resized = image.resize((size[1], size[0]), INTERPOLATIONS[interpolation], box=box)
    return np.atleast_3d(np.asarray(resized))
