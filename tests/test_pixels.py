"""Samples of other types than 8 bits, and other bands than gray and RGB: from files to the loss, in their own type."""

import contextlib
import io
import logging
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile
from PIL import Image
from tiny import fast_jit, random_params, tiny_encoder, tiny_objective

from simmim_jax import data
from simmim_jax.config import IMAGENET_MEAN, load
from simmim_jax.data import rasters
from simmim_jax.data.decode import BadImage, Samples, decode
from simmim_jax.data.label_maps import exif_orientation
from simmim_jax.data.pixels import Pixels, to_unit
from simmim_jax.data.sample import PERCENTILES, PixelOptions, check_pixels, find_pixels, resolve_pixels
from simmim_jax.data.transforms import resize
from simmim_jax.errors import ConfigError, DataError
from simmim_jax.experiment import make_experiment
from simmim_jax.interop import stablehlo
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import from_patches, normalize
from simmim_jax.objectives.simmim import masked_l1
from simmim_jax.runs.finished import load_run
from simmim_jax.tools.embed import __main__ as embed
from simmim_jax.tools.embed.embeddings import read_embeddings
from simmim_jax.tools.prepare import __main__ as prepare
from simmim_jax.train import train

BANDS = tuple(f"B{n:02d}" for n in range(1, 13))
RNG = np.random.default_rng(0)


def scene(seed: int, bands: int = 12, high: int = 4000, size=(36, 40)) -> np.ndarray:
    """A smooth uint16 image."""
    coarse = np.random.default_rng(seed).integers(200, high, (5, 5, bands)).astype(np.float32)
    return np.rint(np.clip(resize(coarse, size, "bicubic"), 0, high)).astype(np.uint16)


def gdal(names=(), nodata=None) -> dict:
    items = "".join(
        f'<Item name="DESCRIPTION" sample="{n}" role="description">{name}</Item>' for n, name in enumerate(names)
    )
    tags = [(42112, 2, 0, f"<GDALMetadata>{items}</GDALMetadata>", True)] if names else []
    return {"extratags": tags + ([(42113, 2, 0, str(nodata), True)] if nodata is not None else [])}


def tiff(pixels: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    if pixels.ndim == 3:
        options = {"photometric": "minisblack", "planarconfig": "contig"} | options
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Images:
    """A source of these images."""

    classes = ()

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return {"image": self.images[i], "label": -1, "name": str(i)}

    def name(self, i):
        return str(i)

    def describe(self):
        return f"{len(self)} images"

    def fingerprint(self):
        return {"source": "images", "split": "train"}


# --- decoding


@pytest.mark.parametrize(
    "options",
    [
        {}, {"compression": "lzw", "predictor": True}, {"compression": "deflate", "tile": (16, 16)},
        {"compression": "zstd"}, {"planarconfig": "separate"}, {"bigtiff": True},
        {"byteorder": ">"}, {"ome": True}, {"imagej": True}, {"plain": True},
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("dtype", "bands"), [("uint8", 13), ("uint16", 4), ("int16", 2), ("float32", 12)])
def test_tiff_of_any_dialect_has_the_samples_of_its_file(options, dtype, bands):
    pixels = (scene(1, bands) - 1000).astype(dtype) if dtype == "int16" else (scene(1, bands) % 251).astype(dtype)
    stored, options = pixels, dict(options)
    if options.get("ome") or options.get("imagej") or options.get("planarconfig") == "separate":
        stored = np.moveaxis(pixels, 2, 0)
    if options.get("ome") or options.get("imagej"):
        options |= {"metadata": {"axes": "CYX"}, "planarconfig": None}
    if options.pop("plain", False):  # as a user writes an array: one page for each element of its first axis
        for array in (pixels, np.moveaxis(pixels, 2, 0)):
            file = io.BytesIO()
            tifffile.imwrite(file, array, photometric="minisblack")
            assert np.array_equal(decode(file.getvalue(), bands), pixels)
        return
    if dtype == "int16" and options.get("imagej"):
        pytest.skip("ImageJ has no int16")
    found = decode(tiff(stored, **options), bands)
    assert found.dtype == dtype
    assert np.array_equal(found, pixels)


def test_eight_bit_tiff_has_the_samples_of_pillow():
    picture = Image.fromarray(RNG.integers(0, 256, (9, 7, 3), np.uint8))
    for mode, channels in (("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("1", 1), ("CMYK", 3)):
        file = io.BytesIO()
        picture.convert(mode).save(file, "TIFF")
        expected = picture.convert(mode).convert("L" if channels == 1 else "RGB")
        assert np.array_equal(decode(file.getvalue(), channels), np.atleast_3d(np.asarray(expected)))
    pixels = np.asarray(picture)
    for options in ({"compression": "zstd"}, {"compression": "lzw", "predictor": True}, {"bigtiff": True}):
        assert np.array_equal(decode(tiff(pixels, photometric="rgb", **options), 3), pixels)
        planar = tiff(np.moveaxis(pixels, 2, 0), photometric="rgb", planarconfig="separate", **options)
        assert np.array_equal(decode(planar, 3), pixels)


def test_orientation_of_16_bits_is_applied_and_found(caplog):
    pixels = scene(1, 12)
    turned = tiff(pixels, extratags=[(274, 3, 1, 6, True)])
    assert np.array_equal(decode(turned, 12), np.rot90(pixels, -1))  # EXIF 2.3: 6 is a quarter turn
    assert exif_orientation(turned) == 6
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16, np.float32])
def test_numpy_files_keep_their_type_and_may_have_the_channels_first(dtype):
    pixels = scene(2, 5).astype(dtype)
    for array in (pixels, np.moveaxis(pixels, 2, 0)):
        for save, options in ((np.save, {"arr": array}), (np.savez, {"image": array, "other": array[:1]})):
            file = io.BytesIO()
            save(file, **options)
            assert decode(file.getvalue(), 5).dtype == dtype
            assert np.array_equal(decode(file.getvalue(), 5), pixels)
    with pytest.raises(BadImage, match="uint16.*expected uint8" if dtype == np.uint16 else "expected"):
        decode(pixels, 5, samples=Samples("uint8" if dtype != np.uint8 else "uint16"))
    assert decode(np.full((2, 2), 2.5), 1).dtype == np.float32
    pickled = io.BytesIO()
    np.save(pickled, np.array([[{}]], object), allow_pickle=True)
    with pytest.raises(BadImage):
        decode(pickled.getvalue(), 1)


def test_folders_and_lists_of_arrays_are_read_and_arrays_next_to_pictures_are_not(tmp_path):
    for n in range(4):
        np.save(tmp_path / f"{n}.npy", scene(n, 3))
    (tmp_path / "list.txt").write_text("0.npy\n3.npy\n")
    folder = data.make_source("auto", path=str(tmp_path), heldout_fraction=0.0)
    listed = data.make_source("auto", path=str(tmp_path / "list.txt"), heldout_fraction=0.0)
    assert [folder.name(n) for n in range(len(folder))] == [f"{n}.npy" for n in range(4)]
    assert len(listed) == 2
    assert np.array_equal(decode(listed[1]["image"], 3), scene(3, 3))
    (tmp_path / "4.png").write_bytes(png(np.zeros((4, 4, 3), np.uint8)))
    assert len(data.make_source("auto", path=str(tmp_path), heldout_fraction=0.0)) == 1


def test_color_png_of_sixteen_bits_keeps_its_values():
    imagecodecs = pytest.importorskip("imagecodecs")
    for channels in (1, 3):
        pixels = scene(3, channels)
        assert np.array_equal(decode(imagecodecs.png_encode(pixels.squeeze()), channels), pixels)
    with_alpha = np.concatenate([scene(3, 3), scene(4, 1)], axis=2)
    assert np.array_equal(decode(imagecodecs.png_encode(with_alpha), 3), with_alpha[..., :3])


def test_dicom_has_its_rescaled_values():
    pydicom = pytest.importorskip("pydicom")
    stored, meta = scene(5, 1)[..., 0], pydicom.dataset.FileMetaDataset()
    meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = pydicom.uid.CTImageStorage, "1.2.3"
    file = pydicom.Dataset()
    file.file_meta, file.PixelData = meta, stored.tobytes()
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *stored.shape, 1, "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, 12, 11, 0
    for slope, intercept, dtype in ((1, -1024, np.int16), (0.5, 0, np.float32)):
        file.RescaleSlope, file.RescaleIntercept = slope, intercept
        out = io.BytesIO()
        file.save_as(out, enforce_file_format=True)
        found = decode(out.getvalue(), 1)[..., 0]
        assert found.dtype == dtype
        assert np.array_equal(found, stored.astype(float) * slope + intercept)


def test_missing_package_for_dicom_is_one_line_with_its_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydicom", None)
    rasters._pydicom.cache_clear()
    with pytest.raises(DataError, match="pip install pydicom"):
        find_pixels(Images([b"\0" * 128 + b"DICM"]), PixelOptions())
    rasters._pydicom.cache_clear()


def test_damaged_rasters_are_bad_images():
    file = io.BytesIO()
    np.save(file, scene(1, 3))
    originals = [tiff(scene(1, 4)), tiff(scene(1, 3), compression="lzw"), png(scene(1, 1)[..., 0]), file.getvalue()]
    for original in originals:
        for _ in range(60):
            damaged = bytearray(original)
            for at in RNG.integers(0, min(len(damaged), 400), 3):
                damaged[at] = RNG.integers(256)
            for content in (bytes(damaged), original[: RNG.integers(len(original))]):
                with contextlib.suppress(BadImage):
                    assert decode(content, 4, 10**6).size


# --- bands


def test_bands_are_read_by_name_or_by_number():
    pixels = scene(1)
    for bands in (("B04", "B03", "B02"), ("4", "3", "2")):
        samples = Samples("uint16", bands)
        assert np.array_equal(decode(tiff(pixels, **gdal(BANDS)), 3, samples=samples), pixels[..., [3, 2, 1]])
    permuted = tiff(pixels[..., ::-1], **gdal(BANDS[::-1]))
    assert np.array_equal(decode(permuted, 3, samples=Samples("uint16", ("B04", "B03", "B02"))), pixels[..., [3, 2, 1]])


def test_permuted_and_missing_bands_are_refused_by_name():
    model = find_pixels(Images([tiff(scene(n), **gdal(BANDS)) for n in range(3)]), PixelOptions())[0]
    assert model.samples.names == BANDS
    check_pixels(model, Images([tiff(scene(9), **gdal(BANDS))]))
    renamed = (*BANDS[:7], "SCL", *BANDS[8:])
    for names, word in ((BANDS[::-1], "order"), (renamed, "'B08'")):
        other = tiff(scene(9), **gdal(names))
        with pytest.raises(DataError, match=word):
            check_pixels(model, Images([other]))
        with pytest.raises(BadImage, match=word):
            decode(other, 12, samples=model.samples)
    with pytest.raises(DataError, match="4 channels, expected 12"):
        check_pixels(model, Images([tiff(scene(9, 4))]))


# --- what a data set is


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.float32])
def test_value_range_mean_and_std_are_those_of_the_images(dtype):
    images = [(scene(n, 3).astype(np.int64) - 500 * (dtype != np.uint16)).astype(dtype) for n in range(5)]
    pixels, remarks = find_pixels(Images([tiff(image) for image in images]), PixelOptions())
    values = np.concatenate([image.reshape(-1, 3) for image in images])
    assert pixels.samples.dtype == np.dtype(dtype).name
    assert pixels.value_range == tuple(tuple(pair) for pair in np.percentile(values, PERCENTILES, axis=0).T.tolist())
    low, high = np.array(pixels.value_range).T
    unit = np.clip((values - low) / (high - low), 0, 1)
    np.testing.assert_allclose(pixels.mean, unit.mean(0), atol=1e-6)  # 6 digits are kept
    np.testing.assert_allclose(pixels.std, unit.std(0), atol=1e-6)
    assert "value_range" in remarks[0]
    assert Pixels.from_record(pixels.as_record()) == pixels


def test_photographs_have_the_numbers_of_imagenet_and_no_remark():
    photographs = Images([png(RNG.integers(0, 256, (9, 9, 3), np.uint8)) for _ in range(3)])
    pixels, remarks = find_pixels(photographs, PixelOptions())
    assert pixels == Pixels() == Pixels.from_record({"mean": IMAGENET_MEAN, "std": pixels.std})
    assert not remarks
    assert pixels.scale is None


@pytest.mark.parametrize(
    ("image", "options", "word"),
    [
        (RNG.integers(0, 256, (9, 9, 3), np.uint8), {"mean": (0.5,), "std": (0.5,)}, "gray"),
        (RNG.integers(0, 256, (9, 9), np.uint8), {"mean": IMAGENET_MEAN}, "RGB"),
        (RNG.integers(0, 256, (9, 9, 4), np.uint8), {}, "alpha"),
    ],
)
def test_conversion_of_channels_is_reported(image, options, word):
    remarks = find_pixels(Images([png(image)] * 3), PixelOptions(**options))[1]
    assert len(remarks) == 1
    assert word in remarks[0]


def test_further_pages_are_reported():
    stack = np.stack([scene(n, 1)[..., 0] for n in range(4)])
    pixels, remarks = find_pixels(
        Images([tiff(stack, metadata=None, photometric="minisblack", planarconfig=None)]), PixelOptions()
    )
    assert pixels.channels == 1
    assert any("3 further pages" in remark for remark in remarks)


def test_images_of_another_type_than_most_are_reported():
    images = Images([tiff(scene(n, 4)) for n in range(5)] + [tiff(scene(1, 4).astype(np.uint8)), tiff(scene(1, 7))])
    pixels, remarks = find_pixels(images, PixelOptions())
    assert (pixels.samples.dtype, pixels.channels) == ("uint16", 4)
    assert "2 of 7" in remarks[-1]
    assert "5 has uint8 samples, expected uint16" in remarks[-1]


def test_range_of_few_levels_is_reported():
    images = Images([png(scene(n, 1)[..., 0]) for n in range(3)])
    assert "levels" in find_pixels(images, PixelOptions(value_range=(0, 65535)))[1][-1]
    assert "levels" not in "".join(find_pixels(images, PixelOptions())[1])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"mean": (0.5,) * 3}, "mean is for 3.*images have 12.*mean=()"), ({"bands": ("B99",)}, "B99"),
        ({"value_range": (5, 1)}, "value_range"), ({"value_range": (0, 1, 2)}, "value_range"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit_the_images_are_refused(options, word):
    with pytest.raises(ConfigError, match=word):
        find_pixels(Images([tiff(scene(1), **gdal(BANDS))]), PixelOptions(**options))


def test_saved_pixels_are_not_estimated_again():
    images = Images([tiff(scene(n), **gdal(BANDS)) for n in range(3)])
    saved = find_pixels(images, PixelOptions())[0].as_record()
    others = Images([tiff(scene(n, high=9000), **gdal(BANDS)) for n in range(3)])
    assert resolve_pixels(others, PixelOptions(), saved)[0].as_record() == saved
    with pytest.raises(DataError, match="uint8 samples, expected uint16"):
        resolve_pixels(Images([png(np.zeros((4, 4, 3), np.uint8))]), PixelOptions(), saved)


# --- crops and batches


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_resize_of_16_bits_is_that_of_floats_within_rounding(interpolation, dtype):
    pixels = RNG.integers(0, 30_000, (33, 41, 6)).astype(dtype)
    found = resize(pixels, (20, 50), interpolation)
    exact = resize(pixels.astype(np.float32), (20, 50), interpolation)
    bounds = np.iinfo(dtype)
    assert found.dtype == dtype
    assert np.abs(found - np.clip(exact, bounds.min, bounds.max)).max() <= 0.5 + 1e-2  # of float32 sums


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32"])
def test_batches_keep_the_type_of_the_files(dtype):
    source = Images([tiff(scene(n, 5).astype(dtype)) for n in range(6)])
    samples = Samples(dtype)
    spec = data.BatchSpec(batch_size=4, seed=0, image_size=(16, 16), channels=5, mean=(0.5,) * 5, samples=samples)
    batches = data.make_batches(source, spec)
    found = [
        next(batches)["image"],
        next(iter(data.make_epoch(source, data.CenterCrop((16, 16), 5, samples=samples), batch_size=4)))["image"],
    ]
    batches.close()
    for image in found:
        assert image.dtype == dtype == spec.arrays()["image"][1]
        assert image.shape == (4, 16, 16, 5)
        assert image.max() > 256
    with pytest.raises(ConfigError, match="8 bits"):
        spec._replace(augment="rand-m9").check()
    with pytest.raises(BadImage, match="has uint8 samples"):
        decode(np.zeros((4, 4, 5), np.uint8), 5, samples=samples)


def test_images_without_data_are_skipped_and_counted(caplog):
    source = Images([tiff(np.zeros((20, 20, 2), np.uint16)) if n % 2 else tiff(scene(n, 2)) for n in range(8)])
    spec = data.BatchSpec(4, 0, (8, 8), channels=2, samples=Samples("uint16", nodata=0, max_nodata=0.5))
    with caplog.at_level(logging.WARNING):
        batches = data.make_batches(source, spec)
        found = [next(batches) for _ in range(4)]
        batches.close()
    assert all((batch["index"] % 2 == 0).all() and not batch["replaced"].any() for batch in found)
    assert "4 of 8 images have less data" in caplog.text


@pytest.mark.parametrize(("dtype", "nodata"), [(np.int16, -9999), (np.float32, np.nan)])
def test_missing_values_do_not_reach_the_values_next_to_them(dtype, nodata):
    pixels = scene(1, 3).astype(dtype)
    holes = pixels.copy()
    holes[10:14, 5:9] = nodata
    found, whole = resize(holes, (18, 20), "bicubic", missing=nodata), resize(pixels, (18, 20), "bicubic")
    missing = np.isnan(found) if np.isnan(nodata) else found == nodata
    assert 0 < missing.mean() < 0.1
    # the cubic filter also reads, with small weights, some of the missing values that bilinear does not
    assert np.abs(found[~missing].astype(float) - whole[~missing]).max() < 0.1 * whole.max()


# --- the device


def test_scale_is_the_same_on_host_and_device_and_8_bits_are_divided_by_255():
    image = RNG.integers(0, 256, (2, 8, 8, 3), np.uint8)
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    expected = (jnp.asarray(image).astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
    assert np.array_equal(normalize(jnp.asarray(image), mean, std), expected)
    pixels = Pixels(Samples("int16", nodata=-9999), mean, std, ((-100.0, 900.0), (0.0, 500.0), (5.0, 6.0)))
    image = RNG.integers(-300, 1200, (2, 8, 8, 3)).astype(np.int16)
    image[0, 0, 0, 1] = -9999
    found = normalize(jnp.asarray(image), **pixels.normalization)
    unit = to_unit(image, pixels.scale, np.nan)
    np.testing.assert_allclose(found, np.nan_to_num((unit - mean) / std), atol=1e-5)  # float32
    assert found[0, 0, 0, 1] == 0


def test_values_without_data_have_no_weight_in_the_loss():
    images, masked = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32), RNG.random((2, 8, 8)) < 0.5
    valid, prediction = RNG.random(images.shape) < 0.7, RNG.normal(size=(2, 2, 2, 48)).astype(np.float32)
    images, masked, valid, prediction = map(jnp.asarray, (images, masked, valid, prediction))
    loss, gradient = jax.value_and_grad(masked_l1)(prediction, images, masked, 4, valid)
    weight = masked[..., None] & valid
    np.testing.assert_allclose(loss, np.abs(from_patches(prediction, 4) - images)[weight].mean(), rtol=1e-5)  # + 1e-5
    assert np.array_equal(from_patches(gradient, 4) != 0, weight)
    whole = masked_l1(prediction, images, masked, 4)
    np.testing.assert_allclose(masked_l1(prediction, images, masked, 4, jnp.ones_like(valid)), whole, rtol=1e-5)


def test_missing_values_leave_loss_and_gradient_finite():
    pixels = Pixels(Samples("float32"), value_range=((0.0, 4000.0),) * 3)
    images = np.stack([scene(n, 3, size=(32, 32)) for n in range(2)]).astype(np.float32)
    images[0], images[1, :20] = np.nan, np.nan
    batch = {"image": jnp.asarray(images), "batch_index": jnp.arange(2)}
    objective = tiny_objective(**pixels.normalization)
    params = random_params(jax.eval_shape(objective.init, jax.random.key(0)))
    loss = lambda params: objective.loss_fn(params, batch, jax.random.key(1), True)[0]  # noqa: E731
    value, gradient = fast_jit(jax.value_and_grad(loss))(params)
    assert value > 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
    assert not normalize(batch["image"], **pixels.normalization)[0].any()


@pytest.mark.slow
def test_exported_program_scales_the_stored_samples():
    encoder = tiny_encoder()
    pixels = Pixels(Samples("uint16"), value_range=((100.0, 3000.0),) * 3)
    images = np.stack([scene(n, 3, size=(32, 32)) for n in range(2)])
    params = encoder.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    program = stablehlo.serialize(encoder, params, image_size=(32, 32), **pixels.normalization)
    found = jax.export.deserialize(bytearray(program)).call(images)
    pooled, _ = make_features(encoder, **pixels.normalization)(params, jnp.asarray(images))
    np.testing.assert_allclose(found.mean(axis=(1, 2)), pooled, atol=1e-4)  # float32


# --- commands


def tiny_config(path, **fields):
    c = load("configs/folder_vit_small.py")
    c.data.path, c.image_size, c.batch_size, c.eval_batch_size = str(path), (32, 32), 8, 8
    c.encoder.size, c.encoder.width, c.encoder.depth, c.encoder.num_heads = "ti", 24, 1, (2,)
    c.objective.mask_patch_size, c.online_probes = 16, False
    c.data.heldout_fraction, c.optim.warmup_epochs, c.check_memory = 0.2, 0.0, False
    for name, value in {"steps": 2, "save_every": 1, **fields}.items():
        c[name] = value
    return c


@pytest.mark.parametrize("kind", ["satellite", pytest.param("microscope", marks=pytest.mark.slow)])
def test_folder_is_pretrained_resumed_embedded_and_prepared(kind, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(12):
        content = tiff(scene(n), **gdal(BANDS)) if kind == "satellite" else png(scene(n, 1)[..., 0])
        (folder / f"{n}{'.tif' if kind == 'satellite' else '.png'}").write_bytes(content)
    workdir = str(tmp_path / "run")
    train(make_experiment(tiny_config(folder), workdir), workdir)
    found = load_run(workdir).pixels
    assert (found.samples.dtype, found.channels) == ("uint16", 12 if kind == "satellite" else 1)
    assert found.samples.names == (BANDS if kind == "satellite" else ())
    shutil.rmtree(load_run(workdir).folder)  # as if it had been stopped after step 1
    (tmp_path / "run" / "summary.json").unlink()
    train(make_experiment(tiny_config(folder), workdir), workdir)
    assert load_run(workdir).pixels == found
    assert "pixels: uint16" in capsys.readouterr().out
    embed.run([workdir, str(folder), str(tmp_path / "out.npz")])
    (vectors,) = read_embeddings(tmp_path / "out.npz")
    assert vectors.shape == (12, 24)
    assert np.ptp(vectors, axis=0).max() > 1e-3
    prepare.run([str(folder), str(tmp_path / "prepared"), "--workers=0", "--short-side=0"])
    made = make_experiment(tiny_config(tmp_path / "prepared"))
    assert made.pixels.channels == found.channels
    assert made.pixels.samples.names == found.samples.names
    record = made.source[0]
    assert np.array_equal(
        decode(record["image"], found.channels), decode((folder / record["name"]).read_bytes(), found.channels)
    )
    if kind == "satellite":
        for path in folder.glob("*"):
            path.write_bytes(tiff(scene(1), **gdal(BANDS[::-1])))
        with pytest.raises(DataError, match="B12,B11"):
            embed.run([workdir, str(folder), str(tmp_path / "permuted.npz")])
