"""What the images of a data set are, by a sample of them: `resolve_pixels`, `check_pixels`."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD
from simmim_jax.data.decode import (
    MAX_PIXELS,
    BadImage,
    Header,
    Samples,
    decode,
    missing_values,
    read_header,
    select_bands,
)
from simmim_jax.data.pixels import Pixels, to_unit
from simmim_jax.data.sources.parts import FileSource
from simmim_jax.errors import ConfigError, DataError, warn_once

SAMPLED = 64  # images that are looked at to find what they are
CHECKED = 8  # images that are looked at to check what they are
MAX_VALUES = 2**16  # pixels of each of them that are counted
PERCENTILES = (0.1, 99.9)  # of the sampled values of a band: its value range
PHOTOGRAPH = Header(3, 0, "uint8")
MIN_LEVELS = 64  # of 256, below which a value range is probably wrong


class PixelOptions(NamedTuple):
    """What the user asks for. Empty fields are found in the images.

    value_range: low, high for all bands, or for each band in turn.
    channels: number of channels, if `mean` does not give it; 0: that of the images.
    """

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    value_range: tuple[float, ...] = ()
    bands: tuple[str, ...] = ()
    nodata: int | float | None = None
    max_nodata: int | float = 1.0
    channels: int = 0


def resolve_pixels(
    source, options: PixelOptions, saved: dict, max_pixels: int = MAX_PIXELS
) -> tuple[Pixels, list[str]]:
    """(the pixels of a run, remarks of one line each): those that are saved, else those of the images.

    source: the training images, or None. saved: the config.json of the run that is resumed or started from, or {}.
    Raises DataError if the images are others than those that were saved.
    """
    if isinstance(source, FileSource) and source.pixels:
        options = options._replace(bands=_numbers(options.bands, source.pixels))  # raw records do not name their bands
        saved = saved or source.pixels
    known = Pixels.from_record(saved, options.max_nodata) if saved.get("mean") else None
    if known and options.value_range and not saved.get("pixels"):  # 8-bit weights for other images
        options = options._replace(mean=options.mean or known.mean, std=options.std or known.std)
        known = None
    if not known and source is None:
        samples = Samples(nodata=options.nodata, max_nodata=options.max_nodata, bands=options.bands)
        return Pixels(samples, options.mean or IMAGENET_MEAN, options.std or IMAGENET_STD), []
    if not known:
        return find_pixels(source, options, max_pixels)
    given = {name: getattr(options, name) for name in ("bands", "nodata") if getattr(options, name) not in ((), None)}
    if options.bands and len(options.bands) != known.channels:
        known = _select(known, options.bands)
    known = known._replace(
        samples=known.samples._replace(**given), mean=options.mean or known.mean, std=options.std or known.std
    )
    if options.value_range:
        known = known._replace(value_range=_given_ranges(options.value_range, known.channels))
    if source is None:
        return known, []
    check_pixels(known, source, max_pixels)
    remarks = [f"pixels: {known.describe()}, as they were saved"] if "pixels" in known.as_record() else []
    headers, _ = sample_headers(source, max_pixels, CHECKED)
    return known, remarks + _conversions(headers, known.channels, options)


def _numbers(bands: tuple[str, ...], record: dict) -> tuple[str, ...]:
    """Names of bands as numbers from 1, by the names in a manifest."""
    names = (record.get("pixels") or {}).get("names", ())
    return tuple(str(names.index(band) + 1) if band in names else band for band in bands)


def _select(pixels: Pixels, bands: tuple[str, ...]) -> Pixels:
    """The pixels of some of their bands. Raises ConfigError."""
    header = Header(pixels.channels, 0, pixels.samples.dtype, pixels.samples.names)
    try:
        order = select_bands(header, Samples(bands=bands))
    except BadImage as error:
        raise ConfigError(f"the data set {error}", "data.bands", "give names or numbers from 1") from error
    samples = pixels.samples._replace(names=tuple(pixels.samples.names[n] for n in order if pixels.samples.names))
    mean, std = (tuple(values[n] for n in order) for values in (pixels.mean, pixels.std))
    return Pixels(samples, mean, std, tuple(pixels.value_range[n] for n in order if pixels.value_range))


def find_pixels(source, options: PixelOptions, max_pixels: int = MAX_PIXELS) -> tuple[Pixels, list[str]]:
    """(the pixels of a data set, remarks on them, each of one line), by `SAMPLED` evenly spaced images.

    The type and the number of channels are the commonest of these images. Without `options.value_range`, 8-bit samples
    have 0 to 255, and the range of other bands is between the `PERCENTILES` of their values. Without `options.mean`,
    8-bit RGB has ImageNet's mean and deviation, and others have those of the images. Pixels without data are left out.

    Raises ConfigError for a number of channels or bands that the images do not have, DataError if none can be decoded.
    """
    headers, fault = sample_headers(source, max_pixels)
    if not headers:  # the run reports why no image can be read
        samples = Samples(max_nodata=options.max_nodata)
        return Pixels(samples, options.mean or IMAGENET_MEAN, options.std or IMAGENET_STD), []
    dtype = _commonest(header.dtype for header in headers.values())
    same = {i: header for i, header in headers.items() if header.dtype == dtype}
    samples = Samples(dtype, options.bands, (), _find_nodata(same, dtype, options.nodata), options.max_nodata)
    channels, found = _count_channels(same, samples, options, source)
    samples = samples._replace(names=_find_names(same, samples, channels))
    others = {i: why for i, header in headers.items() if (why := _misfit(header, samples, channels))}
    headers = {i: header for i, header in same.items() if i not in others}
    remarks = _conversions(headers, channels, options)
    for i in [*others][:1]:
        what = f"{len(others)} of {len(headers) + len(others)} sampled images are not like the others and count as bad"
        remarks.append(f"{what}: {source.name(i)} {others[i]}")
    is_photograph = dtype == "uint8" and not options.value_range
    if is_photograph and channels == 3 and found in (1, 3):
        return Pixels(samples, options.mean or IMAGENET_MEAN, options.std or IMAGENET_STD), remarks
    if is_photograph and options.mean and options.std:
        return Pixels(samples, options.mean, options.std), remarks
    images = _read_sample(source, headers, samples, channels, max_pixels)
    if not images:
        what = f"none of {len(headers)} sampled images can be read as {dtype} with {channels} channel(s)"
        raise DataError(what, source.describe(), fault or "see data.bands, data.nodata and data.max_nodata")
    ranges, how = (), ""
    if options.value_range:
        ranges = _given_ranges(options.value_range, channels)
    elif not is_photograph:
        ranges = _percentile_ranges(images, samples.missing)
        how = f" (the {PERCENTILES[0]} and {PERCENTILES[1]} percentiles of {len(images)} images; to change it, give "
        how += "--config.data.value_range=LOW,HIGH)"
    pixels, levels = _measure(images, Pixels(samples, (0.0,) * channels, (1.0,) * channels, ranges), options)
    remarks.insert(0, f"pixels: {pixels.describe()}{how}")
    if ranges and dtype != "float32" and levels < MIN_LEVELS:
        low, high = (int(end([end(image) for image in images])) for end in (np.min, np.max))
        what = f"the value range leaves only {levels} of 256 levels of the images, whose values are {low} to {high}"
        remarks.append(f"{what}: give --config.data.value_range={low},{high}" if options.value_range else what)
    return pixels, remarks


def _find_nodata(headers: dict[int, Header], dtype: str, given: int | float | None) -> int | float | None:
    """The value of pixels without data: the given one, else that of the files; None if `dtype` cannot hold it."""
    found = {header.nodata for header in headers.values()} - {None}
    value = found.pop() if given is None and len(found) == 1 else given
    if value is None or dtype == "float32":
        return None if value is None or np.isnan(value) else float(value)
    bounds = np.iinfo(dtype)
    return int(value) if float(value).is_integer() and bounds.min <= value <= bounds.max else None


def _find_names(headers: dict[int, Header], samples: Samples, channels: int) -> tuple[str, ...]:
    """The commonest names of the bands that are read; () if they have none."""
    names = _commonest(header.names for header in headers.values())
    if names and samples.bands:
        order = select_bands(next(header for header in headers.values() if header.names == names), samples)
        names = tuple(names[n] for n in order if n < len(names))
    return names if len(names) == channels else ()


def _measure(images: list[np.ndarray], pixels: Pixels, options: PixelOptions) -> tuple[Pixels, int]:
    """(the pixels with the mean and deviation of the images, or those given; levels of 256 that some band uses)."""
    values = np.concatenate([to_unit(image, pixels.scale, np.nan).reshape(-1, pixels.channels) for image in images])
    bands = [band[~np.isnan(band)].astype(np.float64) for band in values.T]
    mean = tuple(round(float(band.mean()), 6) if band.size else 0.0 for band in bands)
    std = tuple((round(float(band.std()), 6) if band.size else 0) or 1.0 for band in bands)
    levels = max(len(np.unique(np.round(255 * band))) for band in bands)
    return pixels._replace(mean=options.mean or mean, std=options.std or std), levels


def sample_headers(source, max_pixels: int = MAX_PIXELS, count: int = SAMPLED) -> tuple[dict[int, Header], str]:
    """({index: header} of evenly spaced images that can be read, the fault of the last other one).

    If each costs the reading of many, and the first few are RGB photographs, the others are not looked at.
    """
    headers, fault, names = {}, "", ()
    if isinstance(source, FileSource):  # the manifest has the names of all records
        names = tuple((source.pixels.get("pixels") or {}).get("names", ()))
    indices = dict.fromkeys(n * len(source) // each for each in (CHECKED, count) for n in range(each))
    for tried, i in enumerate(indices):
        if tried == CHECKED and getattr(source, "reads_groups", False) and set(headers.values()) == {PHOTOGRAPH}:
            break
        try:
            header = read_header(source[i]["image"], max_pixels)
            headers[i] = header._replace(names=header.names or names)
        except (BadImage, OSError) as error:
            fault = f"{source.name(i)}: {error}"
    return headers, fault


def check_pixels(pixels: Pixels, source, max_pixels: int = MAX_PIXELS, count: int = CHECKED) -> None:
    """Raise DataError if none of a few evenly spaced images is what a model was trained on, with the first reason."""
    headers, _ = sample_headers(source, max_pixels, count)
    if pixels.samples.names and headers and not any(header.names for header in headers.values()):
        wanted = ", ".join(pixels.samples.names)
        warn_once(f"{source.describe()}: the files name no bands; they must be {wanted}, in this order")
    reasons = {i: _misfit(header, pixels.samples, pixels.channels) for i, header in headers.items()}
    if reasons and all(reasons.values()):
        index, reason = next(iter(reasons.items()))
        fix = "give images like those that the model was trained on"
        if "order" in reason:
            fix = f"write the bands in this order (gdal_translate -b), or select them by name with data.bands; {fix}"
        raise DataError(f"{source.name(index)} {reason}", source.describe(), fix)


def _misfit(header: Header, samples: Samples, channels: int) -> str:
    """Why an image cannot be read as `samples`; "" if it can."""
    if header.dtype != samples.dtype:
        return f"has {header.dtype} samples, expected {samples.dtype}"
    try:
        bands = select_bands(header, samples)
    except BadImage as error:
        return str(error)
    counts = {len(bands)} if bands else {header.channels, header.channels + header.alpha}
    convertible = not bands and {header.channels, channels} == {1, 3}
    if channels in counts or convertible:
        return ""
    return f"has {min(counts)} channels, expected {channels}"


def _commonest(values):
    return Counter(values).most_common(1)[0][0]


def _count_channels(headers: dict[int, Header], samples: Samples, options: PixelOptions, source) -> tuple[int, int]:
    """(the number of channels to read, that of the files or of the selected bands)."""
    if options.bands:
        for i, header in headers.items():
            try:
                select_bands(header, samples)
            except BadImage as error:
                raise ConfigError(f"{source.name(i)} {error}", "data.bands", "give names or numbers from 1") from error
        found = len(options.bands)
    else:
        found = _commonest(header.channels for header in headers.values())
        if found == 1 and any(header.channels == 3 for header in headers.values()):
            found = 3
    counts = {"mean": len(options.mean), "std": len(options.std), "channels": options.channels}
    for name, count in counts.items():
        with_alpha = not options.bands and any(header.channels + header.alpha == count for header in headers.values())
        if count and count != found and {count, found} != {1, 3} and not with_alpha:
            raise ConfigError(
                f"{name} is for {count} channel(s), and the images have {found}",
                source.describe(),
                f"give {found}, or none to use those of the images: '--config.mean=()' '--config.std=()'",
            )
    return next(filter(None, counts.values()), found), found


def _conversions(headers: dict[int, Header], channels: int, options: PixelOptions) -> list[str]:
    """What is changed or left out of the sampled images."""
    gray = sum(header.channels == 1 for header in headers.values())
    alpha = sum(header.alpha for header in headers.values())
    remarks, count, of_sampled = [], len(headers), f"of {len(headers)} sampled images"
    if options.bands:
        total = _commonest(header.channels + header.alpha for header in headers.values())
        return [f"bands {','.join(options.bands)} of {total} are read"] if len(options.bands) < total else []
    if channels == 1 and gray < count:
        why = "mean has 1 number: for color give 3" if options.mean else "for color set --config.mean and --config.std"
        remarks.append(f"{count - gray} {of_sampled} are in color and are converted to gray ({why})")
    if channels == 3 and gray:
        remarks.append(f"{gray} {of_sampled} are gray and are read as RGB")
    read = sum(header.alpha for header in headers.values() if header.channels + header.alpha == channels)
    if alpha > read:
        remarks.append(f"{alpha - read} {of_sampled} have an alpha channel, which is not read (data.bands selects it)")
    for unread, number in Counter(header.unread for header in headers.values() if header.unread).most_common(1):
        remarks.append(f"{number} {of_sampled} hold more that is not read: {unread}")
    return remarks


def _read_sample(source, headers: dict, samples: Samples, channels: int, max_pixels: int) -> list[np.ndarray]:
    """Some pixels of each sampled image that can be read, evenly spaced in rows and columns."""
    images = []
    for i in headers:
        with contextlib.suppress(BadImage, OSError):
            pixels = decode(source[i]["image"], channels, max_pixels, samples)
            every = int(np.ceil(np.sqrt(pixels.shape[0] * pixels.shape[1] / MAX_VALUES)))
            images.append(pixels[::every, ::every].copy())
    return images


def _given_ranges(value_range: Sequence[int | float], channels: int) -> tuple[tuple[float, float], ...]:
    """(low, high) of each channel, from one pair for all or from one pair for each. Raises ConfigError."""
    pairs = tuple(zip(map(float, value_range[::2]), map(float, value_range[1::2]), strict=False))
    if len(value_range) not in (2, 2 * channels) or any(low >= high for low, high in pairs):
        what = f"value_range={tuple(value_range)} for {channels} channel(s)"
        fix = f"give LOW,HIGH for all bands, or {2 * channels} numbers: LOW,HIGH of each band in turn"
        raise ConfigError(what, "data.value_range", fix)
    return pairs * (channels // len(pairs))


def _percentile_ranges(images: list[np.ndarray], missing: int | float | None) -> tuple[tuple[float, float], ...]:
    """(low, high) of each channel: percentiles of its values in the images, without missing ones."""
    ranges = []
    for channel in range(images[0].shape[2]):
        values = np.concatenate([image[..., channel].ravel() for image in images])
        if missing is not None:
            values = values[~missing_values(values, missing)]
        low, high = map(float, np.percentile(values, PERCENTILES) if values.size else (0, 1))
        ranges.append((low, high if high > low else low + 1))
    return tuple(ranges)
