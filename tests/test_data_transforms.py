"""Crops and resizing: torchvision's distribution, Pillow's pixels, any size and number of channels."""

import io
import math

import numpy as np
import pytest
from PIL import Image

from simmim_jax.data.decode import Picture
from simmim_jax.data.transforms import _random_box, random_flip, random_resized_crop, resize, resize_and_center_crop


def photograph(height, width) -> Image.Image:
    """Soft shapes, and hard edges at which filters overshoot."""
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(64, 192, (8, 8, 3), dtype=np.uint8)).resize((width, height), 3)
    hard = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8).repeat(-(-height // 5), 0).repeat(-(-width // 7), 1)
    edges = np.arange(width) % 64 < 20
    return Image.fromarray(np.where(edges[:, None], hard[:height, :width], np.asarray(soft)))


def picture(image: Image.Image | np.ndarray) -> Picture:
    pixels = np.atleast_3d(np.asarray(image))
    return Picture(pixels, pixels.shape[2])


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def test_random_boxes_are_inside_the_image_with_valid_area_and_ratio():
    rng = np.random.default_rng(0)
    for _ in range(500):
        left, top, right, bottom = _random_box(rng, 400, 300, (0.2, 0.8), (3 / 4, 4 / 3))
        assert 0 <= left < right <= 400
        assert 0 <= top < bottom <= 300
        assert 0.195 < (right - left) * (bottom - top) / 120_000 < 0.805  # the sides are rounded
        assert 0.74 < (right - left) / (bottom - top) < 1.35


def test_areas_and_log_ratios_of_random_boxes_are_uniform():
    rng = np.random.default_rng(0)
    boxes = np.array([_random_box(rng, 1000, 1000, (0.1, 0.5), (1 / 2, 2)) for _ in range(4000)])
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    # Every draw fits, so these are the raw draws. 0.03 is five standard errors of a quantile.
    assert np.allclose(np.quantile(width * height / 1e6, [0.25, 0.5, 0.75]), [0.2, 0.3, 0.4], atol=0.03)
    quartiles = np.quantile(np.log2(width / height), [0.25, 0.5, 0.75])
    assert np.allclose(quartiles, [-0.5, 0, 0.5], atol=0.1)
    where = boxes[:, 0] / (1000 - width)
    assert np.allclose(np.quantile(where, [0.25, 0.5, 0.75]), [0.25, 0.5, 0.75], atol=0.05)


@pytest.mark.parametrize(
    ("width", "height", "box"),
    [
        (5000, 1, (2499, 0, 2500, 1)),
        (1, 5000, (0, 2499, 1, 2500)),
        (900, 300, (250, 0, 650, 300)),
        (1, 1, (0, 0, 1, 1)),
    ],
)
def test_extreme_shape_gets_the_largest_centered_box(width, height, box):
    class Never:  # draws an area that never fits
        def uniform(self, low, high):
            return 50.0

    assert _random_box(Never(), width, height, (0.67, 1), (3 / 4, 4 / 3)) == box


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (37, 53)])
@pytest.mark.parametrize("size", [(16, 16), (8, 24)])
def test_every_shape_can_be_cropped_to_every_size(shape, size):
    for channels in (1, 3, 5):
        pixels = np.zeros((*shape, channels), np.uint8)
        image = picture(pixels)
        for crop in (random_resized_crop(image, np.random.default_rng(0), size), resize_and_center_crop(image, size)):
            assert crop.shape == (*size, channels)
            assert crop.dtype == np.uint8


def test_image_at_its_own_size_is_unchanged():
    image = photograph(20, 30)
    assert np.array_equal(resize_and_center_crop(picture(image), (20, 30)), np.asarray(image))
    whole = random_resized_crop(picture(image), np.random.default_rng(0), (20, 30), scale=(1.0, 1.0), ratio=(1.5, 1.5))
    assert np.array_equal(whole, np.asarray(image))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (256, 256), (100, 90)])
def test_center_crop_equals_resize_then_crop(height, width, interpolation):
    image = photograph(height, width)
    short = min(height, width)
    resized = image.resize(  # torchvision: Resize(256), CenterCrop(224)
        (int(256 * width / short), int(256 * height / short)), getattr(Image.Resampling, interpolation.upper())
    )
    left, top = round((resized.width - 224) / 2), round((resized.height - 224) / 2)
    expected = np.asarray(resized.crop((left, top, left + 224, top + 224))).astype(int)
    crop = resize_and_center_crop(picture(image), (224, 224), crop_fraction=0.875, interpolation=interpolation).astype(
        int
    )
    # Pillow may filter the columns first: one rounding to 8 bits differs, and bicubic may amplify it to 2.
    assert np.abs(crop - expected).max() <= 2


def test_wide_crop_of_a_tall_image_is_its_middle():
    rows = np.repeat(np.arange(100, dtype=np.uint8)[:, None], 50, 1)
    crop = resize_and_center_crop(picture(rows), (10, 50))
    assert crop.shape == (10, 50, 1)
    assert np.array_equal(crop[:, 0, 0], np.arange(45, 55))


def test_channels_are_resized_independently():
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 5), dtype=np.uint8)
    crops = resize_and_center_crop(picture(image), (8, 12), interpolation="bicubic")
    for channel in range(5):
        gray = resize_and_center_crop(picture(image[..., channel]), (8, 12), interpolation="bicubic")
        assert np.array_equal(crops[..., channel], gray[..., 0])


def test_flips_have_their_probability():
    image = np.arange(6, dtype=np.uint8).reshape(1, 6, 1)
    rng = np.random.default_rng(0)
    assert np.array_equal(random_flip(image, rng, 1.0), image[:, ::-1])
    assert np.array_equal(random_flip(image, rng, 0.0), image)
    flipped = sum(random_flip(image, rng, 0.25)[0, 0, 0] == 5 for _ in range(2000))
    assert 430 < flipped < 570  # 500 +- 3.6 standard deviations


# --- compared with Pillow, which torchvision resizes with

# Without overshoot the two differ by one rounding. Pillow's bicubic and lanczos weights have 22 bits, those of
# cykooz_resizer at most 16, and overshoot at hard edges amplifies the difference.
BOUNDS = {"nearest": 0, "bilinear": 1, "bicubic": 9, "lanczos": 15}


@pytest.mark.parametrize("interpolation", BOUNDS)
@pytest.mark.parametrize("shape", [(334, 500), (90, 61)])
def test_random_crop_is_within_rounding_of_pillow(interpolation, shape):
    image = photograph(*shape)
    for seed in range(4):
        crop = random_resized_crop(picture(image), np.random.default_rng(seed), (224, 192), interpolation=interpolation)
        box = _random_box(np.random.default_rng(seed), *image.size, (0.67, 1.0), (3 / 4, 4 / 3))
        expected = image.crop(box).resize((192, 224), getattr(Image.Resampling, interpolation.upper()))
        difference = np.abs(crop.astype(int) - np.asarray(expected))
        assert difference.max() <= BOUNDS[interpolation]
        assert difference.mean() < 0.05


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7])
def test_resize_of_a_box_is_within_rounding_of_pillow(channels):
    pixels = np.random.default_rng(0).integers(0, 256, (60, 80, channels), dtype=np.uint8)
    for box in [(0, 0, 80, 60), (3.25, 7.5, 61.75, 44.125)]:
        ours = resize(pixels, (24, 40), "bilinear", box)
        for channel in range(channels):
            theirs = Image.fromarray(pixels[..., channel]).resize((40, 24), Image.Resampling.BILINEAR, box=box)
            assert np.abs(ours[..., channel].astype(int) - np.asarray(theirs)).max() <= 1


@pytest.mark.parametrize("side", [300, 340, 700, 1400])
def test_large_jpeg_is_decoded_at_reduced_size(side, monkeypatch):
    data = jpeg(photograph(side, side), quality=92)
    asked = []
    read = Picture.read
    monkeypatch.setattr(Picture, "read", lambda self, reduce=1: asked.append(reduce) or read(self, reduce))
    crop = random_resized_crop(Picture(data, 3), np.random.default_rng(0), (112, 112), (1.0, 1.0), (1.0, 1.0))
    whole = np.asarray(Image.open(io.BytesIO(data)).resize((112, 112), Image.Resampling.BILINEAR)).astype(int)
    assert asked == [{300: 1, 340: 2, 700: 4, 1400: 8}[side]]  # at least 1.5 times the output remains on each side
    difference = np.abs(crop - whole)
    assert difference.max() <= (1 if side == 300 else 16)
    assert difference.mean() < 2


def test_jpeg_with_exif_orientation_is_cropped_upright():
    image = photograph(400, 600)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = jpeg(image, quality=95, exif=exif)
        upright = Picture(stored, 3)
        expected = np.asarray(
            Image.open(io.BytesIO(stored)).transpose(TURNS[orientation]) if orientation > 1 else image
        )
        assert (upright.height, upright.width) == expected.shape[:2]
        for size in [(300, 300), (100, 100)]:
            crop = resize_and_center_crop(upright, size, interpolation="bilinear").astype(int)
            whole = resize_and_center_crop(picture(expected), size, interpolation="bilinear")
            assert np.abs(crop - whole).mean() < 2
            assert math.isclose(
                crop[:9, :9].mean(), whole[:9, :9].mean(), abs_tol=3
            )  # the corner distinguishes the orientations


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose, by EXIF orientation
