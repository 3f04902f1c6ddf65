"""Label maps: the layout of folders, the values in files, and the crops shared with images."""

import io
import json
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps

from simmim_jax.data import (
    BatchSpec,
    CenterCrop,
    LabelMapSpec,
    Loading,
    SegmentationSet,
    fingerprint,
    make_batches,
    make_label_map_source,
)
from simmim_jax.data.decode import ANY, BadImage
from simmim_jax.data.label_maps import distort_photometrically, read_map, read_pair, read_random_crop
from simmim_jax.data.sources.label_maps import LabelMapTfds
from simmim_jax.errors import ConfigError, DataError

CLASSES = 6
PLAIN = {"num_classes": CLASSES, "short_side": -1, "scale": (1.0, 1.0), "most_of_one": 1.0, "photometric": False}


def stored(pixels, kind="PNG", **options):
    file = io.BytesIO()
    (pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)).save(file, kind, **options)
    return file.getvalue()


def write_pair(images, maps, stem, seed=0, shape=(20, 24), extension="png"):
    """A random map, and a picture that shows each class as a gray of its own."""
    rng = np.random.default_rng(seed)
    truth = np.kron(rng.integers(0, CLASSES, (5, 6)), np.ones((4, 4), int)).astype(np.uint8)[: shape[0], : shape[1]]
    for folder, pixels, end in ((images, truth[..., None].repeat(3, axis=2) * 40, extension), (maps, truth, "png")):
        (folder / stem).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{stem}.{end}")


def write_folder(root, count=6):
    for split, many in (("train", count), ("val", 2)):
        for n in range(many):
            write_pair(root / "images" / split, root / "masks" / split, f"{n}", seed=n)
    return root


def source_of(path, split="train", **options):
    return make_label_map_source("auto", path=str(path), split=split, **{"heldout_fraction": 0.25, **options})


def take(batches, count):
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def batches_of(source, *, maps=(), loading=None, **options):
    label_maps = LabelMapSpec(**{**PLAIN, **dict(maps)})
    spec = BatchSpec(**{"batch_size": 4, "seed": 0, "image_size": (16, 16), "label_maps": label_maps, **options})
    return make_batches(source, spec, loading=Loading(**(loading or {})))


@pytest.mark.parametrize(
    ("images", "maps", "splits"),
    [
        ("images/{}", "masks/{}", ("train", "val")),
        ("images/{}", "annotations/{}", ("training", "validation")),
        ("{}/images", "{}/masks", ("train", "test")),
        ("{}/Images", "{}/Labels", ("Train", "Val")),
        ("img/{}", "labels/{}", ("train", "valid")),
    ],
)
def test_folder_layouts(tmp_path, images, maps, splits):
    for number, split in enumerate(splits):
        for n in range(3 - number):
            write_pair(tmp_path / images.format(split), tmp_path / maps.format(split), f"of/{n}", n, extension="jpg")
    train, heldout = source_of(tmp_path), source_of(tmp_path, "validation")
    assert (len(train), len(heldout)) == (3, 2)
    assert train.name(1) == "of/1.jpg"
    record = train[1]
    assert record["label"] == -1
    assert Image.open(io.BytesIO(record["image"])).size == Image.open(io.BytesIO(record["map"])).size
    assert train.fingerprint() != heldout.fingerprint()
    json.dumps(train.fingerprint())


@pytest.mark.parametrize("folder", ["", "train"])
def test_folder_without_evaluation_split_holds_a_part_out(tmp_path, folder):
    for n in range(20):
        write_pair(tmp_path / "images" / folder, tmp_path / "masks" / folder, str(n), n)
    train, heldout = source_of(tmp_path), source_of(tmp_path, "val")
    names = [[each.name(n) for n in range(len(each))] for each in (train, heldout)]
    assert sorted(names[0] + names[1]) == sorted(f"{n}.png" for n in range(20))
    assert names[1]
    for each in (train, heldout):
        for n in range(len(each)):
            shown = np.asarray(Image.open(io.BytesIO(each[n]["image"])))[..., 0]
            assert (shown == 40 * np.asarray(Image.open(io.BytesIO(each[n]["map"])))).all()


def test_missing_maps_and_folders_are_named(tmp_path):
    write_folder(tmp_path)
    os.remove(tmp_path / "masks" / "train" / "2.png")
    with pytest.raises(DataError, match=r"1 of 6 images have no map, like 2.png"):
        source_of(tmp_path)
    (tmp_path / "masks" / "val").rename(tmp_path / "masks" / "other")
    with pytest.raises(DataError, match="val has no"):
        source_of(tmp_path, "val")
    with pytest.raises(DataError, match="give images/train"):
        source_of(tmp_path / "images")
    with pytest.raises(DataError, match="is not a folder"):
        source_of(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"data\.path"):
        source_of("")
    with pytest.raises(ConfigError, match="no label maps"):
        make_label_map_source("digits", path="", heldout_fraction=0.1)


def test_split_without_maps_is_an_error_only_if_it_is_requested(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "images" / "test").mkdir()
    assert [len(source_of(tmp_path, split)) for split in ("train", "val", "validation")] == [6, 2, 2]
    with pytest.raises(DataError, match="test has no"):
        source_of(tmp_path, "test")
    (tmp_path / "masks" / "val").rename(tmp_path / "masks" / "other")
    assert len(source_of(tmp_path, "train")) < 6  # a part is held out, for no other images are there
    with pytest.raises(DataError, match="val has no"):
        source_of(tmp_path, "validation")


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_map_of_stored_or_upright_pixels_is_turned_like_its_image(orientation, kind):
    truth = np.random.default_rng(0).integers(0, CLASSES, (2, 3)).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    image = stored((truth * 40)[..., None].repeat(3, axis=2), kind, exif=exif)
    shown = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(stored(truth, exif=exif)))))
    for drawn in (truth, shown):
        record = {"image": image, "map": stored(np.ascontiguousarray(drawn))}
        if orientation in (2, 3, 4):
            with pytest.raises(BadImage, match=f"EXIF orientation {orientation}"):
                read_pair(record, LabelMapSpec(CLASSES), 3, 10_000)
            continue
        picture, label_map = read_pair(record, LabelMapSpec(CLASSES), 3, 10_000)
        np.testing.assert_array_equal(label_map, shown)
        assert np.abs(picture.read()[..., 0] / 40 - label_map).max() < 0.2
    square = {"image": stored(np.zeros((8, 8, 3), np.uint8), kind, exif=exif), "map": np.zeros((8, 8), np.uint8)}
    if orientation == 1:
        read_pair(square, LabelMapSpec(CLASSES), 3, 10_000)
    else:
        with pytest.raises(BadImage, match="or the upright"):
            read_pair(square, LabelMapSpec(CLASSES), 3, 10_000)


@pytest.mark.parametrize("kind", ["L", "P", "I;16", "TIFF", "GIF", "gray of 4 bits", "pixels"])
def test_values_are_kept_for_every_file_format(kind):
    truth = np.random.default_rng(0).integers(0, CLASSES, (9, 7)).astype(np.uint8)
    if kind == "P":
        picture = Image.fromarray(truth).convert("P")
        picture.putdata(truth.ravel().tolist())
        picture.putpalette([200, 0, 0, 0, 200, 0] * 128)
        file = stored(picture)
    elif kind == "I;16":
        file = stored(truth.astype(np.uint16))
    elif kind == "gray of 4 bits":
        file = gray_png_of_4_bits(truth)
    elif kind == "pixels":
        file = truth[..., None]
    else:
        file = stored(truth, "PNG" if kind == "L" else kind)
    read = read_map(file, LabelMapSpec(**PLAIN))
    assert read.dtype == np.uint8
    np.testing.assert_array_equal(read, truth)


def gray_png_of_4_bits(pixels):
    """Pillow writes none."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape
    even = np.pad(pixels, ((0, 0), (0, width % 2)))
    lines = b"".join(b"\0" + (row[::2] << 4 | row[1::2]).tobytes() for row in even)
    header = struct.pack(">IIBBBBB", width, height, 4, 0, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def test_ignored_and_wrong_values():
    file = np.array([[0, 1, 2, 3, 255]], np.uint8)
    assert read_map(file, LabelMapSpec(4)).tolist() == [[0, 1, 2, 3, 255]]
    assert read_map(file, LabelMapSpec(3, reduce_zero_label=True)).tolist() == [[255, 0, 1, 2, 255]]
    assert read_map(file, LabelMapSpec(256, ignore=65535)).tolist() == [[0, 1, 2, 3, 255]]  # a class like any other
    assert read_map(file[:, :4], LabelMapSpec(3, ignore=3)).tolist() == [[0, 1, 2, 255]]
    many = read_map(np.array([[0, 255, 300, 65535]], np.uint16), LabelMapSpec(301, ignore=65535))
    assert (many.dtype, many.tolist()) == (np.uint16, [[0, 255, 300, 65535]])
    colored = np.stack([file, file * 0, file * 0], axis=-1)
    assert read_map(stored(colored), LabelMapSpec(4, channel=0)).tolist() == [[0, 1, 2, 3, 255]]
    for wrong, maps, what in (
        (file, LabelMapSpec(3), "value 3, which is none of 3 classes"),
        (stored(colored), LabelMapSpec(4), "colors"),
        (b"nothing", LabelMapSpec(4), "no PNG"),
        (stored(file)[:40], LabelMapSpec(4), "no PNG"),
        (stored(file, "JPEG"), LabelMapSpec(4), "no PNG"),
    ):
        with pytest.raises(BadImage, match=what):
            read_map(wrong, maps)


@pytest.mark.parametrize(
    "options",
    [
        {"num_classes": 1}, {"scale": (2.0, 1.0)}, {"scale": (0.0, 1.0)}, {"most_of_one": 0.0}, {"short_side": -2},
        {"num_classes": 256}, {"num_classes": 256, "reduce_zero_label": True}, {"num_classes": 70_000},
    ],
)  # fmt: skip
def test_invalid_options_are_refused(options):
    with pytest.raises(ConfigError):
        LabelMapSpec(**{**PLAIN, **options}).check()


def test_image_and_map_have_the_same_crop(tmp_path):
    """Each pixel's color is where it was in the picture, and so is its label."""
    row, column = np.mgrid[:20, :24]
    for n in range(4):
        for kind, pixels in (
            ("images", np.stack([10 * row, 10 * column, 0 * row], axis=-1).astype(np.uint8)),
            ("masks", (24 * row + column).astype(np.uint16)),
        ):
            (tmp_path / kind).mkdir(exist_ok=True)
            Image.fromarray(pixels).save(tmp_path / kind / f"{n}.png")
    maps = {"num_classes": 480, "ignore": 65535, "scale": (0.5, 2.0), "fill": (255, 255, 255)}
    batches = batches_of(source_of(tmp_path, heldout_fraction=0.0), maps=maps)
    sizes, mirrored = set(), set()
    for batch in take(batches, 8):
        assert (batch["label_map"].shape, batch["label_map"].dtype) == ((4, 16, 16), np.uint16)
        for image, labels in zip(batch["image"], batch["label_map"], strict=True):
            padded = labels == 65535
            assert (image[padded] == 255).all()
            inside = ~padded
            assert inside.sum() == inside[:, 0].sum() * inside[0].sum()  # the padding is below and to the right
            for channel, place in enumerate((labels // 24, labels % 24)):
                distance = np.abs(image[..., channel] / 10 - place.astype(float))[inside]
                assert distance.max() < 0.8  # half a pixel, and what a filter does at an edge
            sizes.add(int(inside.sum()))
            mirrored.add(bool(labels[0, 0] > labels[0, 1]))
    assert len(sizes) > 3
    assert mirrored == {False, True}


def test_one_class_rarely_has_nearly_all_of_a_crop():
    truth = np.zeros((40, 40), np.uint8)
    truth[:20, :20] = 1

    def share_below(most_of_one) -> float:
        """Fraction of crops in which no class has three quarters of the pixels."""
        maps = LabelMapSpec(**{**PLAIN, "most_of_one": most_of_one, "fill": (0,)})
        options = {
            "size": (16, 16),
            "maps": maps,
            "flip": 0.5,
            "interpolation": "bilinear",
            "decoding": (1, 10_000, ANY),
        }
        rng, record = np.random.default_rng(0), {"image": truth[..., None], "map": truth}
        crops = [read_random_crop(record, rng, **options)["label_map"] for _ in range(60)]
        return np.mean([0.25 < np.mean(crop) < 0.75 for crop in crops])

    assert share_below(0.75) > 2 * share_below(1.0) > 0.1


def test_fingerprint_depends_on_how_maps_are_read(tmp_path):
    source = source_of(write_folder(tmp_path))
    prints = [
        fingerprint(source, BatchSpec(4, 0, (16, 16), label_maps=maps))
        for maps in (None, LabelMapSpec(**PLAIN), LabelMapSpec(**PLAIN)._replace(reduce_zero_label=True))
    ]
    assert "label_maps" not in prints[0]
    assert prints[1] != prints[2]
    assert json.loads(json.dumps(prints)) == prints


def test_invalid_pair_is_named_and_replaced(tmp_path, caplog):
    write_folder(tmp_path)
    Image.fromarray(np.zeros((5, 5), np.uint8)).save(tmp_path / "masks" / "train" / "3.png")
    Image.fromarray(np.full((20, 24), 9, np.uint8)).save(tmp_path / "masks" / "train" / "4.png")
    source = source_of(tmp_path)
    drawn = take(batches_of(source, loading={"max_bad_fraction": 0.5}), 6)
    used = {int(index) for batch in drawn for index in batch["index"]}
    assert used == {0, 1, 2, 5}
    assert sum(batch["replaced"].sum() for batch in drawn) > 0
    assert "3.png: its map has 5 x 5 pixels, and the image 20 x 24" in caplog.text
    assert "4.png: its map has the value 9, which is none of 6 classes" in caplog.text
    with pytest.raises(DataError, match="of at most 1"):
        take(batches_of(source), 6)


def test_segmentation_set_has_each_image_once_scaled_with_its_map_unchanged(tmp_path, caplog):
    def whole(**options):
        return SegmentationSet(source, CenterCrop((10, 12)), LabelMapSpec(CLASSES), **options)

    source = source_of(write_folder(tmp_path))
    records = list(whole())
    assert [record["index"] for record in records] == list(range(6))
    assert {(record["image"].shape, record["label_map"].shape) for record in records} == {((10, 12, 3), (20, 24))}
    assert len(list(whole(limit=2))) == 2
    (tmp_path / "images" / "train" / "1.png").write_bytes(b"")
    assert len(list(whole())) == 5
    assert "1.png" in caplog.text
    assert whole(limit=5, loading=Loading(max_bad_fraction=0.3)).max_bad_images == 2
    with pytest.raises(DataError, match=r"1\.png"):
        list(whole(loading=Loading(on_error="raise")))


def test_colors_are_distorted_and_sometimes_unchanged():
    image = np.full((4, 4, 3), (120, 100, 80), np.uint8)
    drawn = np.stack([distort_photometrically(image, np.random.default_rng(n))[0, 0] for n in range(200)]).astype(int)
    unchanged = (drawn == image[0, 0]).all(axis=1).mean()
    assert 0.02 < unchanged < 0.12  # four coins: 1/16
    assert drawn.std(axis=0).min() > 15
    assert distort_photometrically(image[..., :1], np.random.default_rng(0)).shape == (4, 4, 1)


def test_tfds_maps_belong_to_their_images(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    import tiny_scenes  # which takes TFDS to import

    tiny_scenes.TinyScenes(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = make_label_map_source("tfds", name="", path=str(tmp_path / "tiny_scenes"), heldout_fraction=0.1)
    assert isinstance(source, LabelMapTfds)
    batch = take(batches_of(source, batch_size=2, image_size=(4, 4)), 1)[0]
    np.testing.assert_array_equal(batch["image"][..., 0], 40 * batch["label_map"])
