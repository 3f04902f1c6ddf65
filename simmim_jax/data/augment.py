"""RandAugment and color jitter of one image on the host.

RandAugment (Cubuk et al. 2019, arXiv 1909.13719) follows `rand_augment_transform` of timm 1.0.31, which the official
fine-tuning uses (data_finetune.py, "rand-m9-mstd0.5-inc1"). It draws operations, applies each with a probability, and
draws the magnitude of each around m, on a scale of 10. Color jitter follows torchvision's ColorJitter, without hue.

Each operation is Pillow's, so the pixels are equal to timm's.

Shapes: h height, w width, c channels, 1 or 3.
"""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from simmim_jax.errors import ConfigError, check_minimum, choose

EXAMPLE = "rand-m9-mstd0.5-inc1"
RESAMPLING = {  # filters of Pillow that can rotate and shear
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)  # of color jitter

Argument = int | float | None
Strength = Callable[[int | float, np.random.Generator], Argument]


# --- strengths: (level, rng) -> argument of the operation, where level = magnitude / 10


def _constant(level: int | float, rng: np.random.Generator) -> None:
    """No argument."""


def _random_sign(amount: int | float, rng: np.random.Generator) -> int | float:
    return -amount if rng.random() < 0.5 else amount


def _around_zero(max_amount: float) -> Strength:
    return lambda level, rng: _random_sign(level * max_amount, rng)


def _enhanced(level: int | float, rng: np.random.Generator) -> float:
    return level * 1.8 + 0.1


def _enhanced_increasing(level: int | float, rng: np.random.Generator) -> float:
    return max(0.1, 1.0 + _random_sign(level * 0.9, rng))


def _between(low: float, high: float) -> Strength:
    return lambda level, rng: max(low, min(high, low + (high - low) * level))


# --- operations: (image, argument) -> image. Geometric operations also take options of Pillow's `transform`


def _enhance(enhancer) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, factor: enhancer(image).enhance(factor)


def _posterize(image: Image.Image, bits: int) -> Image.Image:
    if bits < 1:  # black, as before Pillow 13, which refuses it: 2.3 % of the draws of m9-mstd0.5
        return Image.new(image.mode, image.size)
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _solarize_add(image: Image.Image, added: int) -> Image.Image:
    table = [min(255, value + added) if value < 128 else value for value in range(256)]
    return image.point(table * len(image.getbands()))


def _affine(coefficients: Callable) -> Callable:
    """An operation that takes each pixel from (a x + b y + c, d x + e y + f)."""

    def transform(image: Image.Image, amount: float, **options) -> Image.Image:
        return image.transform(image.size, Image.Transform.AFFINE, coefficients(amount, *image.size), **options)

    return transform


def _rotate(image: Image.Image, degrees: float, **options) -> Image.Image:
    return image.rotate(degrees, **options)


GEOMETRIC: dict[str, tuple[Strength, Callable]] = {
    "Rotate": (_around_zero(30.0), _rotate),
    "ShearX": (_around_zero(0.3), _affine(lambda amount, width, height: (1, amount, 0, 0, 1, 0))),
    "ShearY": (_around_zero(0.3), _affine(lambda amount, width, height: (1, 0, 0, amount, 1, 0))),
    "TranslateXRel": (_around_zero(0.45), _affine(lambda amount, width, height: (1, 0, amount * width, 0, 1, 0))),
    "TranslateYRel": (_around_zero(0.45), _affine(lambda amount, width, height: (1, 0, 0, 0, 1, amount * height))),
}
COLOR: dict[str, tuple[Strength, Callable]] = {
    "AutoContrast": (_constant, lambda image, _: ImageOps.autocontrast(image)),
    "Equalize": (_constant, lambda image, _: ImageOps.equalize(image)),
    "Invert": (_constant, lambda image, _: ImageOps.invert(image)),
    "Posterize": (lambda level, rng: int(level * 4), _posterize),
    "PosterizeIncreasing": (lambda level, rng: 4 - int(level * 4), _posterize),
    "Solarize": (lambda level, rng: min(256, int(level * 256)), ImageOps.solarize),
    "SolarizeIncreasing": (lambda level, rng: 256 - min(256, int(level * 256)), ImageOps.solarize),
    "SolarizeAdd": (lambda level, rng: min(128, int(level * 110)), _solarize_add),
    "Color": (_enhanced, _enhance(ImageEnhance.Color)),
    "ColorIncreasing": (_enhanced_increasing, _enhance(ImageEnhance.Color)),
    "Contrast": (_enhanced, _enhance(ImageEnhance.Contrast)),
    "ContrastIncreasing": (_enhanced_increasing, _enhance(ImageEnhance.Contrast)),
    "Brightness": (_enhanced, _enhance(ImageEnhance.Brightness)),
    "BrightnessIncreasing": (_enhanced_increasing, _enhance(ImageEnhance.Brightness)),
    "Sharpness": (_enhanced, _enhance(ImageEnhance.Sharpness)),
    "SharpnessIncreasing": (_enhanced_increasing, _enhance(ImageEnhance.Sharpness)),
    "Desaturate": (_between(0.5, 1.0), lambda image, amount: ImageEnhance.Color(image).enhance(1.0 - amount)),
    "GaussianBlur": (_between(0.1, 2.0), lambda image, radius: image.filter(ImageFilter.GaussianBlur(radius))),
}
OPERATIONS = COLOR | GEOMETRIC

# --- sets of operations to draw from

PLAIN = ("AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color", "Contrast",
         "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")  # fmt: skip
WITH_INCREASING = ("Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness")
INCREASING = tuple(f"{name}Increasing" if name in WITH_INCREASING else name for name in PLAIN)
THREE = ("SolarizeIncreasing", "Desaturate", "GaussianBlur")  # DeiT III, arXiv 2204.07118
WEIGHTS = {  # by the name after "t": relative probability of each operation
    "weights": {
        "Rotate": 3, "ShearX": 2, "ShearY": 2, "TranslateXRel": 1, "TranslateYRel": 1, "ColorIncreasing": 0.25,
        "SharpnessIncreasing": 0.25, "AutoContrast": 0.25, "SolarizeIncreasing": 0.05, "SolarizeAdd": 0.05,
        "ContrastIncreasing": 0.05, "BrightnessIncreasing": 0.05, "Equalize": 0.05, "PosterizeIncreasing": 0.05,
        "Invert": 0.05,
    },
    "3aw": {
        "SolarizeIncreasing": 6, "Desaturate": 6, "GaussianBlur": 6, "Rotate": 3, "ShearX": 2, "ShearY": 2,
        "PosterizeIncreasing": 1, "AutoContrast": 1, "ColorIncreasing": 1, "SharpnessIncreasing": 1,
        "ContrastIncreasing": 1, "BrightnessIncreasing": 1, "Equalize": 1, "Invert": 1,
    },
}  # fmt: skip
SETS = ("3a", *WEIGHTS)


class RandAugment(NamedTuple):
    """The parsed form of a string like "rand-m9-mstd0.5-inc1".

    magnitude: mean of the magnitudes.
    deviation: standard deviation of the magnitudes; infinite: uniform between 0 and `magnitude`.
    max_magnitude: upper bound of the magnitudes.
    layers: operations drawn for an image.
    probability: probability of applying a drawn operation.
    weights: probability of drawing each operation, without repetition; None: uniform, with repetition.
    """

    operations: tuple[str, ...]
    magnitude: int = 10
    deviation: float = 0.0
    max_magnitude: int = 10
    layers: int = 2
    probability: float = 0.5
    weights: tuple[float, ...] | None = None


def make_augment(
    augment: str, *, color_jitter: int | float, mean: tuple[int | float, ...], interpolation: str
) -> Callable[[UInt8[np.ndarray, "h w c"], np.random.Generator], UInt8[np.ndarray, "h w c"]] | None:
    """A function (image, rng) -> augmented image; None if there is nothing to do.

    Args:
      augment: RandAugment string for `parse`; empty: none.
      color_jitter: largest relative change of brightness, contrast and saturation, applied in random order; 0: none.
        timm's recipes use 0.4, and combine it only with the three-operation RandAugment (t3a, t3aw).
      mean: channel means, 0..1. Pixels from outside of the image have this color.
      interpolation: filter of the geometric operations, one of `RESAMPLING`.

    Raises ConfigError for an invalid string, or for images that are neither gray nor RGB.
    """
    check_minimum("data.color_jitter", color_jitter, 0)
    if not augment and not color_jitter:
        return None
    if len(mean) not in (1, 3):
        fix = "set data.augment='' and data.color_jitter=0: Pillow's operations are for 1 or 3 channels"
        raise ConfigError(f"images of {len(mean)} channels cannot be augmented", "data.augment", fix)
    if not augment:
        return functools.partial(_color_jitter, strength=color_jitter)
    policy = parse(augment)
    if color_jitter and "t3a" not in augment:
        what = f"color_jitter={color_jitter} and RandAugment together"
        fix = "set it to 0 (timm combines them only with t3a), or data.augment to ''"
        raise ConfigError(what, "data.color_jitter", fix)
    if not set(GEOMETRIC).isdisjoint(policy.operations) and interpolation not in RESAMPLING:
        fix = f"choose one of {', '.join(RESAMPLING)}, or set data.augment=''"
        raise ConfigError(f"{interpolation} cannot rotate images", "data.interpolation", fix)
    fill = tuple(min(255, max(0, round(255 * value))) for value in mean)
    geometric_options = {"resample": RESAMPLING.get(interpolation), "fillcolor": fill if len(fill) == 3 else fill[0]}
    jitter = functools.partial(_color_jitter, strength=color_jitter) if color_jitter else None
    return functools.partial(_rand_augment, policy=policy, geometric_options=geometric_options, jitter=jitter)


def parse(augment: str) -> RandAugment:
    """Parse a RandAugment string of timm 1.0: "rand", then parts in any order, separated by dashes.

    - m9: magnitude, an integer (default 10).
    - mstd0.5: standard deviation of the magnitude (default 0; above 100: uniform between 0 and m).
    - mmax12: largest magnitude (default 10).
    - n2: operations drawn (default 2).
    - p0.5: probability of each (default 0.5).
    - inc1: all operations get stronger with the magnitude (default 0).
    - tweights, t3a, t3aw: other sets of operations and probabilities.

    Raises ConfigError for any other part and for a repeated one, some of which timm ignores silently.
    """
    kind, *parts = augment.split("-")
    if kind != "rand":
        raise ConfigError(f"unknown augmentation {augment!r}", "data.augment", f"write it like {EXAMPLE}")
    given: dict[str, int | float | str] = {}
    for part in parts:
        key, value = _read_part(part, augment)
        if key in given:
            raise ConfigError(f"{augment} has {key} twice", "data.augment", "remove one of them")
        given[key] = value
    operations, weights = INCREASING if given.get("inc") else PLAIN, None
    if given.get("t") == "3a":
        operations = THREE
    elif "t" in given:
        weighted = WEIGHTS[given["t"]]
        operations, weights = tuple(weighted), tuple(weight / sum(weighted.values()) for weight in weighted.values())
    deviation = float(given.get("mstd", 0.0))
    policy = RandAugment(
        operations,
        weights=weights,
        magnitude=given.get("m", 10),
        max_magnitude=given.get("mmax", 10),
        deviation=deviation if deviation <= 100 else float("inf"),
        layers=given.get("n", 2),
        probability=float(given.get("p", 0.5)),
    )
    max_layers = len(operations) if weights else 100
    _check(1 <= policy.layers <= max_layers, augment, "n", f"a number of operations from 1 to {max_layers}")
    _check(policy.max_magnitude >= 1, augment, "mmax", "a magnitude of 1 or more")
    _check(policy.probability <= 1, augment, "p", "a probability, at most 1")
    _check(given.get("inc", 0) in (0, 1), augment, "inc", "0 or 1")
    return policy


def apply(
    operation: str, image: Image.Image, magnitude: int | float, rng: np.random.Generator, geometric_options: dict
) -> Image.Image:
    """Apply an operation of `OPERATIONS` with this magnitude, 0 to 10 or more. `rng` draws the direction.

    geometric_options: `resample` and `fillcolor` of Pillow's `transform`.
    """
    strength, operate = OPERATIONS[operation]
    argument = strength(magnitude / 10, rng)
    return operate(image, argument, **geometric_options) if operation in GEOMETRIC else operate(image, argument)


def draw_magnitude(policy: RandAugment, rng: np.random.Generator) -> float:
    """A random magnitude from 0 to `policy.max_magnitude`."""
    drawn = policy.magnitude
    if policy.deviation == float("inf"):
        drawn = rng.uniform(0, drawn)
    elif policy.deviation > 0:
        drawn = rng.normal(drawn, policy.deviation)
    return float(max(0, min(drawn, policy.max_magnitude)))


def draw_operations(policy: RandAugment, rng: np.random.Generator) -> list[str]:
    """The operations to apply to one image, in order."""
    drawn = rng.choice(len(policy.operations), policy.layers, replace=policy.weights is None, p=policy.weights)
    return [policy.operations[i] for i in drawn if rng.random() < policy.probability]


def _rand_augment(
    image: UInt8[np.ndarray, "h w c"],
    rng: np.random.Generator,
    *,
    policy: RandAugment,
    geometric_options: dict,
    jitter: Callable | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    if operations := draw_operations(policy, rng):
        picture = _as_picture(image)
        for operation in operations:
            picture = apply(operation, picture, draw_magnitude(policy, rng), rng, geometric_options)
        image = np.atleast_3d(np.asarray(picture))
    return jitter(image, rng) if jitter else image


def _color_jitter(
    image: UInt8[np.ndarray, "h w c"], rng: np.random.Generator, *, strength: int | float
) -> UInt8[np.ndarray, "h w c"]:
    picture = _as_picture(image)
    for i in rng.permutation(len(ENHANCERS)):
        picture = ENHANCERS[i](picture).enhance(rng.uniform(max(0.0, 1.0 - strength), 1.0 + strength))
    return np.atleast_3d(np.asarray(picture))


def _as_picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(image if image.shape[2] == 3 else image[..., 0])


def _read_part(part: str, augment: str) -> tuple[str, int | float | str]:
    """Parse a part: "mstd0.5" is ("mstd", 0.5)."""
    if part.startswith("t"):
        return "t", choose(f"operations in {augment}:", part[1:], set(SETS))
    parts = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
    key, number = parts.groups() if parts else (part, "")
    if key not in ("m", "n", "p", "mstd", "mmax", "inc") or not number:
        fix = f"write it like {EXAMPLE}, with m, mstd, mmax, n, p, inc (each with its number) and t"
        raise ConfigError(f"{augment} has an unknown part {part!r}", "data.augment", fix)
    _check("." not in number or key in ("p", "mstd"), augment, key, "an integer")
    return key, float(number) if key in ("p", "mstd") else int(number)


def _check(valid: bool, augment: str, key: str, rule: str) -> None:
    if not valid:
        raise ConfigError(f"{augment} is invalid", "data.augment", f"{key} must be {rule}")
