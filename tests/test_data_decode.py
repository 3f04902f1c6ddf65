"""Bytes to pixels: whatever a folder may hold becomes an image of the right kind, or a BadImage that says why."""

import io
import resource
import zlib

import numpy as np
import pytest
from PIL import Image

from simmim_jax.data.decode import BadImage, decode


def encoded(image: Image.Image, form: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def ramp(mode: str, size=(9, 7)) -> Image.Image:
    return Image.linear_gradient("L").resize(size).convert(mode)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    ("mode", "form"),
    [
        ("1", "PNG"), ("L", "JPEG"), ("LA", "PNG"), ("P", "GIF"), ("RGB", "WEBP"), ("RGBA", "PNG"), ("CMYK", "JPEG"),
        ("RGB", "BMP"), ("RGB", "TIFF"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"), ("I;16", "PNG"),
    ],
)  # fmt: skip
def test_every_mode_becomes_grey_or_rgb(mode, form, channels):
    image = ramp("L").convert("I").point(lambda value: value * 257).convert("I;16") if mode == "I;16" else ramp(mode)
    decoded = decode(encoded(image, form), channels)
    assert decoded.mode == {1: "L", 3: "RGB"}[channels]
    assert decoded.size == (9, 7)
    if mode != "1":  # all else holds the ramp itself, up to JPEG's rounding
        error = np.abs(np.asarray(decoded.convert("L"), float) - np.asarray(ramp("L"), float))
        assert error.max() <= 12


def test_sixteen_bits_are_scaled_and_not_clipped():
    pixels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    assert np.asarray(decode(encoded(Image.fromarray(pixels)), 1)).tolist() == [[0, 0, 1, 128, 255]]
    assert np.asarray(decode(pixels, 1)).tolist() == [[0, 0, 1, 128, 255]]


def test_alpha_is_dropped_and_not_composited():
    assert decode(encoded(Image.new("RGBA", (1, 1), (200, 100, 50, 0))), 3).getpixel((0, 0)) == (200, 100, 50)
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode(encoded(palette, transparency=b"\xff\x00"), 3).getpixel((0, 0)) == (9, 8, 7)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    upright = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    # rows and columns of the stored image, for a viewer that turns it back (EXIF 2.3, table of Orientation)
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1]}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored)), "PNG", exif=exif)
    assert np.array_equal(np.asarray(decode(data, 1)), upright)


def test_damaged_exif_does_not_cost_the_image():
    assert decode(encoded(ramp("RGB"), "JPEG", exif=b"Exif\0\0garbage"), 3).size == (9, 7)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 1).getpixel((0, 0)) == 10


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes_decode(size):
    assert decode(encoded(Image.new("L", size)), 3).size == size


JPEG = encoded(ramp("RGB", (64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (JPEG[: len(JPEG) // 2], "(?i)truncated"),
        (JPEG[:2], "none of JPEG"),
        (b"<!DOCTYPE html><title>404</title>", "none of JPEG"),
        (encoded(ramp("RGB"))[:-30], "truncated|broken|CRC|bad"),
        (encoded(ramp("RGB"), "PPM"), "none of JPEG"),  # a format that Pillow knows, and we do not take
        (encoded(Image.new("F", (2, 2)), "TIFF"), "32-bit"),
        (np.zeros((2, 2, 3), np.float32), "float32"),
        (np.zeros((0, 2, 3), np.uint8), "array"),
    ],
)  # fmt: skip
def test_what_does_not_decode_whole_is_a_bad_image_with_a_reason(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [10_000, 15_000])
@pytest.mark.parametrize("form", ["PNG", "GIF", "WEBP"])
def test_a_bomb_is_refused_by_its_header_before_memory_is_taken(side, form):
    data = {
        "PNG": lambda: bytearray(encoded(Image.new("L", (8, 8)))),
        "GIF": lambda: bytearray(encoded(Image.new("L", (8, 8)), "GIF")),
        "WEBP": lambda: bytearray(encoded(Image.new("RGB", (8, 8)), "WEBP", lossless=True)),
    }[form]()
    if form == "PNG":
        data[16:24] = side.to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
    elif form == "GIF":
        data[6:10] = side.to_bytes(2, "little") * 2
    else:
        bits = (side - 1) | (side - 1) << 14 | (int.from_bytes(data[21:25], "little") >> 28) << 28
        data[21:25] = bits.to_bytes(4, "little")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BadImage, match="pixels"):
        decode(bytes(data), 3)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 * 1024  # kilobytes


def test_max_pixels_holds_for_arrays_too():
    assert decode(np.zeros((4, 5, 3), np.uint8), 3, max_pixels=20).size == (5, 4)
    with pytest.raises(BadImage, match="4 x 5 pixels, more than max_pixels=19"):
        decode(np.zeros((4, 5, 3), np.uint8), 3, max_pixels=19)


def test_other_channel_counts_are_taken_as_stored_and_never_converted():
    pixels = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.array_equal(decode(pixels, 5), pixels)
    assert decode(encoded(ramp("RGBA")), 4).shape == (7, 9, 4)
    with pytest.raises(BadImage, match="5 channels where 3 are expected"):
        decode(pixels, 3)
    with pytest.raises(BadImage, match="3 channels where 5 are expected"):
        decode(encoded(ramp("RGB")), 5)
