"""Decoding: any file becomes an image with the requested channels, or a BadImage with a reason."""

import io
import resource
import zlib

import numpy as np
import pytest
from PIL import Image

from simmim_jax.data.decode import FORMATS, BadImage, Picture, decode


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
        ("RGB", "BMP"), ("RGB", "TIFF"), ("CMYK", "TIFF"), ("YCbCr", "JPEG"),
        *([("RGB", "AVIF")] if "AVIF" in FORMATS else []),
    ],
)  # fmt: skip
def test_each_mode_becomes_gray_or_rgb(mode, form, channels):
    decoded = decode(encoded(ramp(mode), form), channels)
    assert decoded.shape == (7, 9, channels)
    if mode != "1":  # the others hold the ramp itself; 12 covers JPEG's rounding
        error = np.abs(decoded.mean(axis=-1) - np.asarray(ramp("L"), float))
        assert error.max() <= 12


def test_sixteen_bits_keep_their_values():
    pixels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    for image in (encoded(Image.fromarray(pixels)), pixels):
        assert decode(image, 1).dtype == np.uint16
        assert decode(image, 1)[..., 0].tolist() == pixels.tolist()
        assert (decode(image, 3) == pixels[..., None]).all()


def test_alpha_is_dropped_and_not_composited():
    assert decode(encoded(Image.new("RGBA", (1, 1), (200, 100, 50, 0))), 3).tolist() == [[[200, 100, 50]]]
    palette = Image.new("P", (1, 1), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert decode(encoded(palette, transparency=b"\xff\x00"), 3).tolist() == [[[9, 8, 7]]]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation, form):
    upright = (
        (np.arange(6, dtype=np.uint8).reshape(2, 3) * 40).repeat(8, 0).repeat(8, 1)
    )  # each value fills a JPEG block
    # The stored image by orientation (EXIF 2.3, table of Orientation).
    stored = {1: upright, 2: upright[:, ::-1], 3: upright[::-1, ::-1], 4: upright[::-1], 5: upright.T,
              6: upright.T[::-1], 7: upright.T[::-1, ::-1], 8: upright.T[:, ::-1]}[orientation]  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Picture(encoded(Image.fromarray(np.ascontiguousarray(stored)), form, exif=exif), 1)
    assert (image.height, image.width) == (16, 24)
    assert np.abs(image.read()[..., 0].astype(int) - upright).max() <= 1
    if form == "JPEG":
        assert np.abs(image.read(8)[..., 0].astype(int) - upright[::8, ::8]).max() <= 1


@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"garbage", b"Exif\0\0II*\0\xff\xff\xff\x7f"])
def test_damaged_exif_is_ignored(exif):
    for form in ("JPEG", "PNG", "WEBP"):
        assert decode(encoded(ramp("RGB"), form, exif=exif), 3).shape == (7, 9, 3)


def test_animation_decodes_to_its_first_frame():
    frames = [Image.new("L", (4, 4), value) for value in (10, 200)]
    assert decode(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), 1)[0, 0, 0] == 10


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1)])
def test_extreme_shapes_decode(size):
    assert decode(encoded(Image.new("L", size)), 3).shape == (*size[::-1], 3)


JPEG = encoded(ramp("RGB", (64, 64)), "JPEG")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is empty"),
        (JPEG[: len(JPEG) // 2], "(?i)truncated"),
        (JPEG[:2], "none of JPEG"),
        (b"<!DOCTYPE html><title>404</title>", "none of JPEG"),
        (encoded(ramp("RGB"))[:-30], "truncated|broken|CRC|bad"),
        (encoded(ramp("RGB"), "PPM"), "none of JPEG"),  # Pillow could read it, but it is not in FORMATS
        (np.zeros((2, 2, 3), np.complex64), "complex64"),
        (np.zeros((0, 2, 3), np.uint8), "array"),
    ],
)  # fmt: skip
def test_image_that_does_not_decode_completely_is_bad(data, reason):
    with pytest.raises(BadImage, match=reason):
        decode(data, 3)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("side", "form"), [(10_000, "PNG"), (15_000, "GIF"), (15_000, "WEBP")])
def test_decompression_bomb_is_refused_before_memory_is_allocated(side, form):
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


def test_max_pixels_limits_arrays():
    assert decode(np.zeros((4, 5, 3), np.uint8), 3, max_pixels=20).shape == (4, 5, 3)
    with pytest.raises(BadImage, match=r"4 x 5 pixels.*max_pixels=19"):
        decode(np.zeros((4, 5, 3), np.uint8), 3, max_pixels=19)


def test_other_channel_counts_are_never_converted():
    pixels = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.array_equal(decode(pixels, 5), pixels)
    assert decode(encoded(ramp("RGBA")), 4).shape == (7, 9, 4)
    with pytest.raises(BadImage, match="5 channels, expected 3"):
        decode(pixels, 3)
    with pytest.raises(BadImage, match="3 channels, expected 5"):
        decode(encoded(ramp("RGB")), 5)


# --- JPEG: the fast path is equal to Pillow


def noise(mode="RGB", size=(83, 61)) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((size[0] * 2, size[1] * 2)).resize(size).convert(mode)


def with_marker(data: bytes, marker: int, body: bytes) -> bytes:
    """The file with another segment at its start."""
    return data[:2] + bytes([0xFF, marker]) + (len(body) + 2).to_bytes(2, "big") + body + data[2:]


JPEGS = {
    **{f"quality {q} {s}": {"quality": q, "subsampling": s} for q, s in ((30, "4:4:4"), (75, "4:2:2"), (98, "4:2:0"))},
    "progressive": {"progressive": True, "quality": 90},
    "optimized": {"optimize": True},
    "restarts": {"restart_marker_rows": 1},
    "stored as RGB": {"keep_rgb": True},
}


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", JPEGS.values(), ids=JPEGS.keys())
def test_jpeg_decodes_to_the_pixels_of_pillow(options, mode):
    if options.get("keep_rgb") and mode != "RGB":
        options = {}
    data = encoded(noise(mode), "JPEG", **options)
    for channels in (1, 3):
        theirs = Image.open(io.BytesIO(data)).convert({1: "L", 3: "RGB"}[channels])
        assert np.array_equal(decode(data, channels), np.atleast_3d(np.asarray(theirs)))


@pytest.mark.parametrize("size", [(83, 61), (64, 64), (8, 200)])
def test_reduced_jpeg_has_divided_sides_and_the_same_mean(size):
    data = encoded(ramp("RGB", size), "JPEG", quality=95)
    for reduce in (2, 4, 8):
        small = Picture(data, 3).read(reduce)
        assert small.shape == (-(-size[1] // reduce), -(-size[0] // reduce), 3)
        assert abs(small.mean() - decode(data, 3).mean()) < 8  # an incomplete last row weighs as much as the others


def test_other_formats_ignore_reduce():
    for image in (encoded(ramp("RGB", (64, 48))), np.zeros((48, 64, 3), np.uint8), encoded(noise("CMYK"), "JPEG")):
        assert np.array_equal(Picture(image, 3).read(4), decode(image, 3))


def test_damaged_jpegs_decode_or_fail_as_in_pillow():
    data = encoded(noise(size=(160, 120)), "JPEG")
    rng = np.random.default_rng(0)
    same = {"decoded": 0, "refused": 0}
    for _ in range(200):
        damaged = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(len(data))] = rng.integers(256)
        if rng.random() < 0.3:
            damaged = damaged[: rng.integers(len(data))]
        try:
            theirs = np.asarray(Image.open(io.BytesIO(damaged), formats=["JPEG"]).convert("RGB"))
        except Exception:  # Pillow raises many kinds
            with pytest.raises(BadImage):
                decode(bytes(damaged), 3)
            same["refused"] += 1
        else:
            assert np.array_equal(decode(bytes(damaged), 3), theirs)
            same["decoded"] += 1
    assert min(same.values()) > 30


def test_second_jpeg_header_cannot_exceed_the_checked_size():
    data = encoded(noise(), "JPEG")
    start = data.index(b"\xff\xc0")
    header = bytearray(data[start + 4 : start + 4 + 15])
    header[1:5] = (30_000).to_bytes(2, "big") * 2
    with pytest.raises(BadImage):
        decode(with_marker(data, 0xC0, bytes(header)), 3, max_pixels=100_000)
