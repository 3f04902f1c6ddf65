"""Files whose samples Pillow would change or refuse: TIFF by samples, NumPy arrays, DICOM, and PNG with 16 bits.

A raster has samples of one type, h x w x c. 8-bit, 16-bit and float32 samples keep their type. bool becomes 0 and 255,
int8 becomes int16, and all other numbers become float32. In float32, pixels without data are NaN.

Shapes: h height, w width, c channels.
"""

import contextlib
import functools
import html
import io
import logging
import re
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import imagecodecs
import numpy as np
import tifffile
from jaxtyping import Num
from PIL import Image

from simmim_jax.errors import DataError

SAMPLE_TYPES = ("uint8", "uint16", "int16", "float32")
ARRAY_EXTENSIONS = (".npy", ".npz", ".dcm", ".dicom")  # files that Pillow does not read
TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
PNG_SIGNATURE, NPY_SIGNATURE, ZIP_SIGNATURE = b"\x89PNG\r\n\x1a\n", b"\x93NUMPY", b"PK\x03\x04"
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
MIN_IS_WHITE, MIN_IS_BLACK, RGB, PALETTE, SEPARATED, YCBCR = 0, 1, 2, 3, 5, 6  # TIFF's PhotometricInterpretation
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
ALPHA = (1, 2)  # TIFF's ExtraSamples
GDAL_METADATA, GDAL_NODATA, ORIENTATION = 42112, 42113, 274  # tags of TIFF
PNG_CHANNELS = {0: (1, 0), 2: (3, 0), 3: (3, 0), 4: (1, 1), 6: (3, 1)}  # by color type: channels, and alpha
INSTALL_DICOM = "pip install pydicom"

ONE_THREAD = {"maxworkers": 1}  # of tifffile: batches are decoded in parallel already
PILLOW_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)  # none, CCITT, LZW, JPEG, Deflate, PackBits

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # a bad image has its reason in its own message


class Raster(NamedTuple):
    """The header of an image, and a function that reads its samples.

    channels: without alpha. alpha: 1 if an alpha channel follows, else 0.
    dtype: one of SAMPLE_TYPES.
    load: () -> samples [h, w, channels + alpha], already in `dtype`.
    names: of the channels; () if the file has none.
    nodata: the value of pixels without data, or None.
    unread: what else the file holds, like "2 further pages".
    orientation: the EXIF orientation of the file, 1 to 8, which `load` applies.
    """

    height: int
    width: int
    channels: int
    dtype: str
    load: Callable[[], Num[np.ndarray, "h w c"]]
    alpha: int = 0
    names: tuple[str, ...] = ()
    nodata: float | None = None
    unread: str = ""
    orientation: int = 1


def open_raster(data: bytes) -> Raster | None:
    """The raster in a file; None for other files, such as 8-bit TIFF and PNG, which Pillow reads.

    Raises ValueError and others for a file that cannot be read, DataError if a package is missing.
    """
    if data.startswith(TIFF_SIGNATURES):
        return _open_tiff(data)
    if data.startswith(PNG_SIGNATURE) and data[24:25] == b"\x10":
        return _open_png(data)
    if data.startswith(NPY_SIGNATURE):
        return _open_npy(data)
    if data.startswith(ZIP_SIGNATURE):
        return _open_npz(data)
    return _open_dicom(data) if data[128:132] == b"DICM" else None


def from_array(pixels: np.ndarray) -> Raster:
    """A raster of an array [h, w] or [h, w, c]."""
    shape = pixels.shape
    if len(shape) not in (2, 3) or not all(shape):
        raise ValueError(f"is an array {pixels.dtype}{list(shape)}, not [h, w] or [h, w, c]")
    return Raster(*shape[:2], (*shape, 1)[2], sample_type(pixels.dtype), lambda: _as_samples(pixels))


def sample_type(dtype: np.dtype) -> str:
    """The type in which samples of `dtype` are processed. Raises ValueError for anything but real numbers."""
    if dtype.kind not in "biuf":
        raise ValueError(f"has samples of type {dtype}, not numbers")
    return {"bool": "uint8", "int8": "int16"}.get(dtype.name, dtype.name if dtype.name in SAMPLE_TYPES else "float32")


def _as_samples(pixels: np.ndarray, nodata: float | None = None) -> np.ndarray:
    """[h, w, c] in the type of `sample_type`. In float32, `nodata` and infinite values become NaN."""
    if pixels.dtype == bool:
        pixels = pixels * np.uint8(255)
    missing = pixels == nodata if nodata is not None and pixels.dtype.kind == "f" else None
    pixels = np.atleast_3d(pixels).astype(sample_type(pixels.dtype), copy=False)
    if pixels.dtype != np.float32:
        return pixels
    invalid = ~np.isfinite(pixels) if missing is None else ~np.isfinite(pixels) | np.atleast_3d(missing)
    return np.where(invalid, np.float32(np.nan), pixels) if invalid.any() else pixels


# --- NumPy


def _arranged(shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]) -> Raster:
    """The raster of an array [h, w], [h, w, c] or [c, h, w]: the first axis has the channels if it is the shortest."""
    if len(shape) == 3 and shape[0] < min(shape[1:]):
        return _arranged((*shape[1:], shape[0]), dtype, lambda: np.moveaxis(load(), 0, -1))
    return from_array(np.broadcast_to(np.zeros((), dtype), shape))._replace(load=lambda: _as_samples(load()))


def _open_array(file: io.IOBase, load: Callable[[], np.ndarray]) -> Raster:
    """The raster of an array that `load` reads. file: begins with the header of .npy."""
    version = np.lib.format.read_magic(file)
    if version not in NPY_HEADERS:
        raise ValueError(f"is an .npy file of version {version}")
    shape, _, dtype = NPY_HEADERS[version](file)
    return _arranged(shape, dtype, load)


def _open_npy(data: bytes) -> Raster:
    return _open_array(io.BytesIO(data), lambda: np.load(io.BytesIO(data), allow_pickle=False))


def _open_npz(data: bytes) -> Raster:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [name for name in archive.namelist() if name.endswith(".npy")]
        name = names[0] if len(names) == 1 else "image.npy"
        if name not in names:
            raise ValueError(f"has {len(names)} arrays, and none is named image")
        with archive.open(name) as file:
            return _open_array(file, lambda: np.load(io.BytesIO(data), allow_pickle=False)[name[:-4]])


# --- PNG with 16 bits


def _open_png(data: bytes) -> Raster:
    width, height = (int.from_bytes(data[n : n + 4], "big") for n in (16, 20))
    channels, alpha = PNG_CHANNELS[data[25]]
    orientation = 1
    with contextlib.suppress(Exception):  # damaged EXIF raises anything, but the pixels are good
        orientation = Image.open(io.BytesIO(data), formats=["PNG"]).getexif().get(ORIENTATION, 1)
    if orientation in TRANSPOSED:
        height, width = width, height

    def load() -> np.ndarray:
        return rotate_upright(_as_samples(imagecodecs.png_decode(data)), orientation)

    return Raster(height, width, channels, "uint16", load, alpha, orientation=orientation)


# --- TIFF


def _open_tiff(data: bytes) -> Raster | None:
    file = tifffile.TiffFile(io.BytesIO(data))
    page, pages = file.pages[0], list(file.pages)
    tags = {code: page.tags[code].value for code in (GDAL_METADATA, GDAL_NODATA, ORIENTATION) if code in page.tags}
    if len(pages) > 1 and file.series[0].kind == "shaped" and len(file.series[0].shape) == 3:
        read = functools.partial(file.series[0].asarray, **ONE_THREAD)
        return _arranged(file.series[0].shape, page.dtype, read)  # an array, written by tifffile
    channel_pages = _channel_pages(file) if len(pages) > 1 else [page]
    if _is_plain(page) and len(channel_pages) == 1 and not {GDAL_METADATA, GDAL_NODATA} & tags.keys():
        return None
    alpha = int(bool(page.extrasamples) and int(page.extrasamples[-1]) in ALPHA and len(channel_pages) == 1)
    samples = page.samplesperpixel if len(channel_pages) == 1 else len(channel_pages)
    others = sum(not int(each.subfiletype) & 5 for each in pages) - len(channel_pages)  # 1: a reduced copy, 4: a mask
    nodata = _number(tags.get(GDAL_NODATA))
    height, width = page.imagelength, page.imagewidth
    if tags.get(ORIENTATION, 1) in TRANSPOSED:
        height, width = width, height

    def load() -> np.ndarray:
        planes = [each.asarray(**ONE_THREAD) for each in channel_pages]
        pixels = planes[0] if len(planes) == 1 else np.stack(planes, axis=-1)
        if len(planes) == 1 and page.axes.startswith("S"):
            pixels = np.moveaxis(pixels, 0, -1)
        if page.photometric == MIN_IS_WHITE and pixels.dtype.kind == "u":
            pixels = np.iinfo(pixels.dtype).max - pixels
        return rotate_upright(_as_samples(pixels, nodata), tags.get(ORIENTATION, 1))

    return Raster(
        height,
        width,
        samples - alpha,
        sample_type(np.dtype(page.dtype)),
        load,
        alpha,
        _band_names(file, tags.get(GDAL_METADATA, ""), samples - alpha),
        nodata,
        f"{others} further pages" if others > 0 else "",
        tags.get(ORIENTATION, 1),
    )


def _is_plain(page: tifffile.TiffPage) -> bool:
    """Whether Pillow reads all samples of a page: 8 bits of gray, color or palette, and perhaps alpha."""
    bits = page.bitspersample if isinstance(page.bitspersample, tuple) else (page.bitspersample,)
    extra = tuple(map(int, page.extrasamples))
    base = {MIN_IS_WHITE: 1, MIN_IS_BLACK: 1, RGB: 3, PALETTE: 1, SEPARATED: 4, YCBCR: 3}.get(int(page.photometric))
    if int(page.sampleformat or 1) != 1 or int(page.compression) not in PILLOW_COMPRESSIONS:
        return False
    return max(bits) <= 8 and page.samplesperpixel - len(extra) == base and set(extra) <= set(ALPHA)


def _channel_pages(file: tifffile.TiffFile) -> list:
    """The pages that together are the first image: one per channel in OME and ImageJ files, else the first page."""
    series = file.series[0]
    page = series.pages[0]
    leading = series.axes[: len(series.axes) - len(page.axes)]
    if "C" not in leading or page.samplesperpixel > 1:
        return [file.pages[0]]
    shape, axis = series.shape[: len(leading)], leading.index("C")
    indices = ([n if d == axis else 0 for d in range(len(shape))] for n in range(shape[axis]))
    return [series.pages[int(np.ravel_multi_index(index, shape))] for index in indices]


def _band_names(file: tifffile.TiffFile, gdal: str, channels: int) -> tuple[str, ...]:
    """The names of the bands, by GDAL or OME; () unless each has one."""
    named = {}
    for attributes, text in re.findall(r"<Item\b([^>]*)>([^<]*)</Item>", gdal or ""):
        found = dict(re.findall(r'(\w+)="([^"]*)"', attributes))
        if found.get("name", "").upper() == "DESCRIPTION" and found.get("sample", "").isdigit():
            named[int(found["sample"])] = html.unescape(text).strip()
    if not named and file.is_ome:
        found = re.findall(r'<Channel\b[^>]*?\bName="([^"]*)"', file.ome_metadata or "")[:channels]
        named = {n: html.unescape(name) for n, name in enumerate(found)}
    names = tuple(named.get(n, "") for n in range(channels))
    return names if all(names) and len(set(names)) == channels else ()


def _number(text) -> float | None:
    """The value of GDAL's no-data tag, which is text."""
    try:
        return None if text is None else float(str(text).strip("\0 "))
    except ValueError:
        return None


def rotate_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Apply the EXIF orientation, 1 to 8. Other values have no effect."""
    if orientation in TRANSPOSED:
        pixels = pixels.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


# --- DICOM


@functools.cache
def _pydicom():
    try:
        import pydicom
    except ImportError as error:
        raise DataError("DICOM files need the package pydicom", "data.path", INSTALL_DICOM) from error
    return pydicom


def _open_dicom(data: bytes) -> Raster:
    """The first frame, with the rescale slope and intercept applied: int16 if it holds all values, else float32."""
    pydicom = _pydicom()
    header = pydicom.dcmread(io.BytesIO(data))
    if "Rows" not in header:
        raise ValueError("is a DICOM file without pixels")
    bits, signed = int(header.BitsStored), bool(header.PixelRepresentation)
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    inverted = header.get("PhotometricInterpretation") == "MONOCHROME1"
    ends = sorted((low * slope + intercept, high * slope + intercept))
    name = sample_type(np.dtype(f"{'i' if signed else 'u'}{max(1, int(header.BitsAllocated) // 8)}"))
    if (slope, intercept) != (1, 0):
        whole = slope.is_integer() and intercept.is_integer()
        name = "int16" if whole and ends[0] >= -(2**15) and ends[1] < 2**15 else "float32"
    padding = header.get("PixelPaddingValue")
    frames = int(header.get("NumberOfFrames", 1))

    def load() -> np.ndarray:
        pixels = pydicom.pixels.pixel_array(header, index=0 if frames > 1 else None)
        if inverted:
            pixels = low + high - pixels.astype(np.int64)
        if (slope, intercept) != (1, 0):
            pixels = pixels * slope + intercept
        return _as_samples(pixels.astype(name))

    return Raster(
        int(header.Rows),
        int(header.Columns),
        int(header.SamplesPerPixel),
        name,
        load,
        nodata=None if padding is None or inverted else float(padding) * slope + intercept,
        unread=f"{frames - 1} further frames" if frames > 1 else "",
    )
