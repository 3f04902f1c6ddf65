"""The pixels of a data set: their type, bands and value range, found once (`data.sample`) and kept with the model.

Samples are scaled from their value range to 0..1 on the device (`objectives.pixels`). `to_unit` does the same on the
host, for pictures and statistics.

Shapes: h height, w width, c channels.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num, UInt8

from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD
from simmim_jax.data.decode import Samples, missing_values

COLORS = ("red", "green", "blue")


class Scale(NamedTuple):
    """How stored samples become numbers in 0..1: (x - low) / (high - low), clipped.

    low, high: for each channel.
    missing: the value of pixels without data, which may be NaN; None: there are none.
    """

    dtype: str
    low: tuple[float, ...]
    high: tuple[float, ...]
    missing: int | float | None = None


class Pixels(NamedTuple):
    """What the images of a data set are, and how they become the encoder's input.

    samples: what each decoded image must have.
    mean, std: of each channel, on the scale 0..1.
    value_range: (low, high) of each channel in stored values; (): 0 to 255.
    """

    samples: Samples = Samples()
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    value_range: tuple[tuple[float, float], ...] = ()

    @property
    def channels(self) -> int:
        return len(self.mean)

    @property
    def scale(self) -> Scale | None:
        """None if samples are divided by 255."""
        if not self.value_range and self.samples.missing is None:
            return None
        low, high = zip(*(self.value_range or [(0.0, 255.0)] * self.channels), strict=True)
        return Scale(self.samples.dtype, low, high, self.samples.missing)

    @property
    def normalization(self) -> dict:
        """The arguments `mean`, `std` and `scale` of objectives."""
        return {"mean": self.mean, "std": self.std, "scale": self.scale}

    @property
    def shown(self) -> tuple[int, ...]:
        """The channels of a picture: red, green and blue if they have these names, else the first three."""
        names = [name.casefold() for name in self.samples.names]
        found = tuple(names.index(color) for color in COLORS if color in names)
        return found if len(found) == 3 else (0, 1, 2) if self.channels >= 3 else (0,)

    @property
    def fill(self) -> tuple[int | float, ...]:
        """The mean of each channel as a stored value, for pixels outside of an image."""
        ranges = self.value_range or ((0, 255),) * self.channels
        values = [low + mean * (high - low) for mean, (low, high) in zip(self.mean, ranges, strict=True)]
        return tuple(values if self.samples.dtype == "float32" else map(round, values))

    def display(self, image: Num[np.ndarray, "h w c"]) -> UInt8[np.ndarray, "h w _"]:
        """A picture of a stored image: one or three channels, contrast-stretched by their value range."""
        if self.scale is None:
            return image[..., self.shown] if self.channels > 3 else image
        return np.round(255 * to_unit(image, self.scale)[..., self.shown]).astype(np.uint8)

    def as_record(self) -> dict:
        """The fields of config.json and manifests; without "pixels" if the images are divided by 255."""
        samples = {"dtype": self.samples.dtype} | self.samples._replace(max_nodata=1.0).as_json()
        fields = samples | {"value_range": [list(pair) for pair in self.value_range]}
        is_plain = fields == {"dtype": "uint8", "value_range": []}
        return {"mean": list(self.mean), "std": list(self.std)} | ({} if is_plain else {"pixels": fields})

    @classmethod
    def from_record(cls, record: dict, max_nodata: int | float = 1.0) -> "Pixels":
        """The pixels of a config.json or manifest. By default, those of photographs."""
        fields = record.get("pixels") or {}
        samples = {name: fields[name] for name in Samples._fields if name in fields}
        samples = {name: tuple(x) if isinstance(x, list) else x for name, x in samples.items()}
        ranges = tuple(tuple(map(float, pair)) for pair in fields.get("value_range", ()))
        mean, std = (
            tuple(record.get(name, default)) for name, default in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD))
        )
        return cls(Samples(**samples, max_nodata=max_nodata), mean, std, ranges)

    def describe(self) -> str:
        """The type, bands and range, like "uint16, 2 channels (B03, B04), 102..3890 and 98..4012 shown as 0..1"."""
        names = f" ({', '.join(self.samples.names)})" if self.samples.names else ""
        ranges = list(dict.fromkeys(f"{low:.5g}..{high:.5g}" for low, high in self.value_range)) or ["0..255"]
        listed = f"{', '.join(ranges[:3])}{', ...' if len(ranges) > 3 else ''}"
        plural = "s" if self.channels > 1 else ""
        return f"{self.samples.dtype}, {self.channels} channel{plural}{names}, value range {listed}"

    def caption(self) -> str:
        """What a picture shows of other images than 8-bit gray or RGB; else ""."""
        if not self.value_range and self.channels in (1, 3):
            return ""
        names = self.samples.names or tuple(str(n + 1) for n in range(self.channels))
        ranges = self.value_range or ((0, 255),) * self.channels
        contrast = {f"{ranges[n][0]:.5g} to {ranges[n][1]:.5g}" for n in self.shown}
        bands = f"bands {', '.join(names[n] for n in self.shown)}; " if self.channels > 1 else ""
        return f"{bands}contrast {contrast.pop() if len(contrast) == 1 else 'by the value range of each'}"


def to_unit(image: Num[np.ndarray, "... c"], scale: Scale | None, missing: float = 0.0) -> Float[np.ndarray, "... c"]:
    """The image on the scale 0..1. Pixels without data become `missing`."""
    if scale is None:
        return image.astype(np.float32) / 255
    low, high = (np.asarray(side, np.float64) for side in (scale.low, scale.high))
    unit = np.clip((image - low) / (high - low), 0, 1)
    if scale.missing is not None:
        unit = np.where(missing_values(image, scale.missing), missing, unit)
    return unit.astype(np.float32)
