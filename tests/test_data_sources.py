"""What lies where: splits that never share an image, errors that say what to do, and nothing that hangs."""

import concurrent.futures
import gzip
import hashlib
import io
import json
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from pathlib import Path

import absl.logging
import msgpack
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from google.protobuf.message import DecodeError
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tiny_tfds import CLASSES, TinyShades

from simmim_jax.data import make_source
from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources import files, list_file, tar
from simmim_jax.data.sources import folder as folder_module
from simmim_jax.data.sources import names as names_module
from simmim_jax.data.sources import parquet as parquet_module
from simmim_jax.data.sources.splits import Part, _without_braces
from simmim_jax.errors import ConfigError, DataError, UserError


def write(root, *names, shade=0) -> str:
    for name in names:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return str(root)


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def folder(path, split="train", **options):
    return make_source("folder", path=str(path), split=split, **options)


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def write_tar(file, members: dict[str, bytes] | list[tuple[str, bytes]], mtime=0, **options) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), mtime
            archive.addfile(info, io.BytesIO(data))
    return str(file)


def samples(*shades, label=True) -> dict[str, bytes]:
    """Members of a WebDataset shard."""
    members = {}
    for shade in shades:
        members |= {f"{shade:04}.cls": str(shade % 3).encode()} if label else {}
        members |= {f"{shade:04}.png": png(shade)}
    return members


def write_parquet(file, shades, *, names=("a", "b", "c"), labels=None, group=2, **columns) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(shade), "path": f"{shade}.png"} for shade in shades]
    labels = [shade % 3 for shade in shades] if labels is None else labels
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())} | columns)
    if names:
        features = {"label": {"names": list(names), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=group)
    return str(file)


def write_records(file, records: list[bytes], options="group_size:1,uncompressed") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def write_prepared(root, *shards: list[int], classes=("a", "b", "c"), channels=3) -> str:
    """A folder as simmim_jax.tools.prepare writes it, of one shard for each list of shades."""
    listed = []
    for number, shades in enumerate(shards):
        file = root / f"part-{number:05}-of-{len(shards):05}.array_record"
        records = [{"image": png(s), "label": s % 3 if classes else -1, "name": f"x/{s}.png"} for s in shades]
        if channels not in (1, 3):
            for record, shade in zip(records, shades, strict=True):
                record |= {"image": bytes([shade] * 6 * channels), "shape": [2, 3, channels]}
        write_records(file, [msgpack.packb(record, use_bin_type=True) for record in records])
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        listed.append({"file": file.name, "count": len(shades), "bytes": file.stat().st_size, "sha256": digest})
    manifest = {
        "format": "simmim_jax.prepared", "version": 1, "source": {"described": "x", "fingerprint": {}}, "settings": {},
        "count": sum(map(len, shards)), "classes": list(classes), "channels": channels, "mean": [0.5] * channels,
        "std": [0.2] * channels, "bytes": sum(each["bytes"] for each in listed), "shards": listed,
        "refused": 0, "made": {},
    }  # fmt: skip
    (root / "manifest.json").write_text(json.dumps(manifest))
    return str(root)


def write_any(kind: str, root, shades) -> str:
    """The same images, as each kind has them; the path."""
    if kind == "folder":
        for shade in shades:
            write(root, f"{'abc'[shade % 3]}/{shade:04}.png", shade=shade)
    elif kind == "list":
        write(root, *(f"{shade:04}.png" for shade in shades))
        for shade in shades:
            write(root, f"{shade:04}.png", shade=shade)
        (root / "all.txt").write_text("".join(f"{shade:04}.png\t{shade % 3}\n" for shade in shades))
        return str(root / "all.txt")
    elif kind == "tar":
        write_tar(root / "0.tar", samples(*shades[:3]))
        write_tar(root / "1.tar", samples(*shades[3:]))
    elif kind == "parquet":
        write_parquet(root / "0.parquet", shades[:3])
        write_parquet(root / "1.parquet", shades[3:])
    elif kind == "array_record":
        write_prepared(root, list(shades[:3]), list(shades[3:]))
    return str(root)


SHARDED = ["list", "tar", "parquet", "array_record"]


def shade_of(record: dict) -> int:
    return int(np.asarray(Image.open(io.BytesIO(record["image"])))[0, 0, 0])


def shades_of(source) -> list[int]:
    return [shade_of(source[i]) for i in range(len(source))]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder of the test's own."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    TinyShades(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


# --- every source


@pytest.mark.parametrize("kind", ["digits", "tfds", "folder", *SHARDED, "tfds folder"])
def test_a_source_gives_the_same_records_after_pickling(kind, tmp_path, tfds_dir):
    if kind == "tfds folder":
        source = make_source("tfds", path=f"{tfds_dir}/tiny_shades")
    elif kind == "tfds":
        source = make_source("tfds", name="tiny_shades", data_dir=tfds_dir)
    else:
        source = make_source(kind, path=write_any(kind, tmp_path, range(7)), heldout_fraction=0.0)
    source[0]  # whatever it opens is open
    other = pickle.loads(pickle.dumps(source))
    assert len(other) == len(source)
    assert other.classes == source.classes
    for i in (0, len(source) - 1):
        ours, theirs = source[i], other[i]
        assert np.array_equal(ours.pop("image"), theirs.pop("image"))
        assert ours == theirs
        assert ours["name"] == source.name(i)
        assert 0 <= ours["label"] < len(source.classes)
    assert other.fingerprint() == source.fingerprint() == json.loads(json.dumps(source.fingerprint()))
    assert str(len(source)) in source.describe()


def test_an_unknown_source_is_refused_with_the_nearest_name():
    with pytest.raises(
        ConfigError,
        match=r"unknown source 'digit'.*mean digits.*array_record, auto, digits, folder, list, parquet, tar, tfds",
    ):
        make_source("digit")


# --- digits


def test_digits_are_split_once_and_for_ever_with_every_class_on_both_sides():
    train, test = make_source("digits"), make_source("digits", split="val")
    assert (len(train), len(test)) == (1437, 360)
    assert not set(names(train)) & set(names(test))
    for source in (train, test):
        assert min(np.bincount(source.labels, minlength=10)) > len(source) / 16
        assert source[0]["image"].shape == (8, 8, 1)
        assert source.images.dtype == np.uint8
        assert source.images.max() == 255
    order = np.concatenate([train.order, test.order]).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == "7f71e362ae545c77"
    with pytest.raises(ConfigError, match="no split 'dev'"):
        make_source("digits", split="dev")


# --- folders: what belongs


def test_a_folder_by_class_is_labeled_by_its_first_directories_in_the_order_of_names(tmp_path):
    write(tmp_path, "dog/b.PNG", "dog/deep/er/a.jpeg", "cat/x y é 猫.png", "cat/Z.JPG")
    source = folder(tmp_path, heldout_fraction=0.0)
    assert names(source) == ["cat/Z.JPG", "cat/x y é 猫.png", "dog/b.PNG", "dog/deep/er/a.jpeg"]
    assert source.classes == ("cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["a/1.png", "b/2.png", "3.png"], ["images/1.png", "images/2.png"]]
)
def test_a_folder_that_is_not_all_by_class_is_unlabeled(files, tmp_path):
    source = folder(write(tmp_path, *files), heldout_fraction=0.0)
    assert names(source) == sorted(files)
    assert source.classes == ()
    assert source[0]["label"] == -1


def test_only_images_that_are_not_hidden_count(tmp_path):
    write(tmp_path, "1.png", ".2.png", ".git/3.png", "._4.jpg", "x.jpg/5.png")  # the last is in a directory named x.jpg
    (tmp_path / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "6.png")  # to open it would hang
    assert names(folder(tmp_path, heldout_fraction=0.0)) == ["1.png", "x.jpg/5.png"]


def test_links_are_followed_and_loops_and_dead_links_are_not(tmp_path):
    write(tmp_path / "data", "a/1.png", "b/2.png")
    write(tmp_path / "far", "3.png")
    (tmp_path / "data" / "c").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "a" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "b" / "again").symlink_to(tmp_path / "data" / "a")
    for name in ("self.png", "self"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "data" / name)
    (tmp_path / "data" / "b" / "dead.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "data" / "b" / "live.png").symlink_to(tmp_path / "far" / "3.png")
    assert names(folder(tmp_path / "data", heldout_fraction=0.0)) == ["a/1.png", "b/2.png", "b/live.png", "c/3.png"]


def test_the_index_of_many_files_is_small(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i:06}.png").touch()
    assert len(pickle.dumps(folder(tmp_path, heldout_fraction=0.0))) < 1000 * (len("000000.png") + 8 + 4) + 1000


# --- folders: splits


def test_held_out_images_are_never_trained_on_and_never_change_sides(tmp_path):
    first = [f"{label}/{i}.png" for label in "ab" for i in range(100)]
    write(tmp_path, *first)
    train, held_out = folder(tmp_path), folder(tmp_path, "val")
    assert sorted(names(train) + names(held_out)) == sorted(first)
    assert 8 <= len(held_out) <= 34  # 20 and 3.3 standard deviations
    assert train.classes == held_out.classes == ("a", "b")
    write(tmp_path, *(f"c/{i}.png" for i in range(100)))
    assert set(names(train)) < set(names(folder(tmp_path)))
    assert set(names(held_out)) < set(names(folder(tmp_path, "test")))
    assert set(names(held_out)) < set(names(folder(tmp_path, "val", heldout_fraction=0.2)))


def test_the_held_out_side_is_the_same_on_every_machine(tmp_path):
    write(tmp_path, *(f"{i}.png" for i in range(40)))
    assert names(folder(tmp_path, "val")) == ["0.png", "33.png", "6.png", "8.png"]


@pytest.mark.parametrize("name", ["val", "valid", "validation", "test"])
@pytest.mark.parametrize("asked", ["val", "test"])
def test_a_split_of_its_own_is_used_whatever_it_is_called(name, asked, tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", f"{name}/b/3.png", f"{name}/c/4.png")
    train, evaluation = folder(tmp_path), folder(tmp_path, asked)
    assert names(train) == ["a/1.png", "b/2.png"]
    assert names(evaluation) == ["b/3.png", "c/4.png"]
    assert train.classes == evaluation.classes == ("a", "b", "c")
    assert [evaluation[i]["label"] for i in range(2)] == [1, 2]


def test_of_two_evaluation_splits_each_is_its_own(tmp_path):
    write(tmp_path, "train/1.png", "val/2.png", "test/3.png")
    assert [names(folder(tmp_path, split)) for split in ("train", "val", "test")] == [["1.png"], ["2.png"], ["3.png"]]


def test_without_an_evaluation_split_one_is_held_out_of_train(tmp_path):
    write(tmp_path, *(f"train/{i}.png" for i in range(40)), "extra/x.png")
    train, held_out = folder(tmp_path), folder(tmp_path, "val")
    assert len(train) + len(held_out) == 40
    assert not set(names(train)) & set(names(held_out))


def test_any_folder_can_be_named_as_a_split(tmp_path):
    write(tmp_path, "train2017/1.png", "unlabeled2017/2.png")
    assert names(folder(tmp_path, "unlabeled2017")) == ["2.png"]
    with pytest.raises(ConfigError, match="did you mean train2017"):
        folder(tmp_path, "train2018")


def test_evaluation_images_are_not_trained_on_for_want_of_a_train_folder(tmp_path):
    write(tmp_path, "val/1.png", "other/2.png")
    with pytest.raises(DataError, match="has val/ but no train/"):
        folder(tmp_path)
    assert names(folder(tmp_path, "val")) == ["1.png"]


@pytest.mark.parametrize("evaluation", ["Val", "TEST", "Validation"])
def test_a_split_is_known_whatever_the_case_of_its_name(evaluation, tmp_path):
    write(tmp_path, "Train/a/1.png", "Train/b/2.png", f"{evaluation}/b/3.png", f"{evaluation}/c/4.png")
    for path in (tmp_path, tmp_path / "{split}"):
        for kind in ("auto", "folder"):
            assert names(make_source(kind, path=str(path))) == ["a/1.png", "b/2.png"]
            source = make_source(kind, path=str(path), split=evaluation.lower())
            assert names(source) == ["b/3.png", "c/4.png"]
            assert source.classes == ("a", "b", "c")
    write(tmp_path, "train/a/5.png")
    assert names(folder(tmp_path)) == ["a/5.png"]


@pytest.mark.parametrize(
    ("train", "evaluation"),
    [("train2017", "val2017"), ("training", "testing"), ("Training", "valid"), ("trainset", "testset"),
     ("train-1", "eval"), ("train_images", "test_images")],
)  # fmt: skip
@pytest.mark.parametrize("below", ["", "images/", "x/y"])
def test_folders_that_look_like_both_sides_are_not_taken_for_classes(train, evaluation, below, tmp_path):
    below = {"x/y": tmp_path / "x", "images/": tmp_path / "images", "": tmp_path}[below]
    write(below, f"{train}/1.png", f"{evaluation}/2.png")
    write(tmp_path, "other/3.png")
    says = rf"has ({train}/ and {evaluation}/, which look like|{evaluation}/ but no train/)"
    for kind in ("auto", "folder"):
        with pytest.raises(DataError, match=says):
            make_source(kind, path=str(tmp_path))
        if evaluation != "valid":
            with pytest.raises(DataError, match=rf"{says}.*point data\.path at .*{train}"):
                make_source(kind, path=str(tmp_path), split="val")
    assert names(folder(below / train, heldout_fraction=0.0)) == ["1.png"]
    assert names(folder(below, train)) == ["1.png"]


@pytest.mark.parametrize("files", [["images/train/1.png", "images/val/2.png"], ["cats/train/1.png", "cats/val/2.png",
                                   "dogs/train/3.png", "dogs/val/4.png"]])  # fmt: skip
def test_splits_one_level_down_are_not_trained_on_together(files, tmp_path):
    for root in (tmp_path, tmp_path / "train"):
        first = root / files[0].split("/")[0]
        says = rf"{first} has train/ and val/, which look like.*point data\.path at {first}"
        with pytest.raises(DataError, match=says):
            folder(write(root, *files) and tmp_path)
        assert names(folder(first)) == ["1.png"]


def test_classes_of_which_one_looks_like_a_split_are_classes(tmp_path):
    write(tmp_path, "testing/1.png", "training wheels/2.png", "cats/val/3.png", "dogs/train/4.png", "trains/5.png")
    source = folder(tmp_path, heldout_fraction=0.0)
    assert source.classes == ("cats", "dogs", "testing", "training wheels", "trains")


def test_a_folder_may_be_named_with_the_split_in_its_path(tmp_path):
    write(tmp_path, "x/train/images/1.png", "x/val/images/2.png", "x/extra/images/3.png")
    for kind in ("auto", "folder"):
        path = str(tmp_path / "x" / "{split}" / "images")
        sources = [make_source(kind, path=path, split=split) for split in ("train", "test", "extra")]
        assert [names(source) for source in sources] == [["1.png"], ["2.png"], ["3.png"]]
    with pytest.raises(DataError, match=r"/y/\{split\} is not a folder"):
        folder(tmp_path / "y" / "{split}")
    shutil.rmtree(tmp_path / "x" / "train")
    with pytest.raises(DataError, match="has val/ but no train/"):
        folder(tmp_path / "x" / "{split}")


def test_links_that_lead_nowhere_are_told_once_with_their_number(tmp_path, caplog):
    write(tmp_path, "a/1.png", "b/2.png")
    assert len(folder(tmp_path)) + len(folder(tmp_path, "val")) == 2
    assert not caplog.records
    for name in ("a/3.png", "b/4.png", "c"):
        (tmp_path / name).symlink_to(tmp_path / "gone")
    assert len(folder(tmp_path)) + len(folder(tmp_path, "val")) == 2
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path}: 3 links lead nowhere and are left out, the first being {tmp_path}" in caplog.text


# --- folders: errors


def test_an_empty_folder_is_refused_with_the_one_beside_it_that_has_images(tmp_path):
    write(tmp_path / "x", "images/1.png", "images/2.png")
    (tmp_path / "x" / "annotations").mkdir()
    says = r"/x/annotations has 0 images - looked for \.jpg.* - did you mean .*/x/images \(2 images\)\?"
    with pytest.raises(DataError, match=says):
        folder(tmp_path / "x" / "annotations")


def test_a_missing_folder_is_refused_with_the_nearest_that_exists(tmp_path):
    write(tmp_path / "images", "1.png")
    with pytest.raises(DataError, match=r"did you mean .*/images\?"):
        folder(tmp_path / "imges")
    with pytest.raises(DataError, match=r"is there, but it has no zzz"):
        folder(tmp_path / "images" / "zzz" / "deeper")
    with pytest.raises(DataError, match=r"1\.png is a file: did you mean .*/images\?"):
        folder(tmp_path / "images" / "1.png")
    with pytest.raises(ConfigError, match=r"data\.path is empty"):
        folder("")


def test_one_image_can_be_trained_on_but_not_held_out(tmp_path):
    write(tmp_path, "1.png")
    assert len(folder(tmp_path)) == 1
    with pytest.raises(DataError, match=r"0 of its 1 images in split 'val' - data\.heldout_fraction=0\.1"):
        folder(tmp_path, "val")


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_fraction_is_a_fraction(fraction, tmp_path):
    with pytest.raises(ConfigError, match="heldout_fraction"):
        folder(tmp_path, heldout_fraction=fraction)


def test_a_changed_folder_changes_the_fingerprint_and_a_moved_one_does_not(tmp_path):
    write(tmp_path / "one", "ab.png", "c.png")
    before = folder(tmp_path / "one", heldout_fraction=0.0).fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert folder(tmp_path / "two", heldout_fraction=0.0).fingerprint() == before
    (tmp_path / "two" / "c.png").rename(tmp_path / "two" / "d.png")
    renamed = folder(tmp_path / "two", heldout_fraction=0.0).fingerprint()
    write(tmp_path / "two", "e.png")
    added = folder(tmp_path / "two", heldout_fraction=0.0).fingerprint()
    assert len({json.dumps(each) for each in (before, renamed, added)}) == 3


@pytest.mark.parametrize("count", [3, 2500])
def test_other_files_under_the_same_names_change_the_fingerprint_of_a_folder(count, tmp_path, monkeypatch):
    for i in range(count):
        (tmp_path / f"{i:04}.png").write_bytes(b"x" * i)
    source, asked = folder(tmp_path, heldout_fraction=0.0), []
    stat = os.stat
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda *args, **options: asked.append(args) or stat(*args, **options))
        before = source.fingerprint()
    assert len(asked) == min(count, 1000)
    os.utime(tmp_path / "0000.png", (0, 0))
    assert source.fingerprint() == before
    for i in range(count):
        (tmp_path / f"{i:04}.png").write_bytes(b"y" * (count - i))
    assert folder(tmp_path, heldout_fraction=0.0).fingerprint() != before


# --- TFDS


def test_tfds_is_read_as_it_was_written_without_tensorflow(tfds_dir):
    program = f"""
import sys
import numpy
from simmim_jax.data import make_source
from simmim_jax.data.decode import decode
source = make_source("tfds", name="tiny_shades", data_dir={tfds_dir!r})
record = source[3]
print(len(source), source.classes, record["label"], record["name"], numpy.asarray(decode(record["image"], 3)).shape)
assert "tensorflow" not in sys.modules and "tiny_tfds" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"8 {CLASSES} 1 tiny_shades/1.0.0/train/3 (6, 5, 3)\n"
    assert done.stderr == ""


def test_tfds_slices_are_parts_of_the_split(tfds_dir):
    def images(split):
        source = make_source("tfds", name="tiny_shades", data_dir=tfds_dir, split=split)
        return [source[i]["image"] for i in range(len(source))]

    whole = images("train")
    assert images("train[:75%]") + images("train[75%:]") == whole
    assert images("train[:2]+test") == whole[:2] + images("test")


@pytest.mark.parametrize("split", ["val", "tra[:3]", "train[:x]"])
def test_an_unknown_tfds_split_is_refused_with_those_there_are(split, tfds_dir):
    with pytest.raises(DataError, match=r"no split .* - splits: test \(4\), train \(8\)"):
        make_source("tfds", name="tiny_shades", data_dir=tfds_dir, split=split)


def test_an_unprepared_tfds_data_set_is_refused_at_once_and_without_a_network(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    start = time.monotonic()
    for name in ("cifar10", "imagenet2012"):
        command = f"pip install tensorflow-cpu && tfds build {name} --file_format=array_record --data_dir={tmp_path}"
        with pytest.raises(DataError, match=rf"{name} is not prepared - looked in {tmp_path}.*{command}"):
            make_source("tfds", name=name, data_dir=str(tmp_path))
    assert time.monotonic() - start < 5
    assert not caplog.records


def test_an_unknown_tfds_data_set_is_refused_with_the_nearest(tfds_dir):
    with pytest.raises(DataError, match=r"no data set 'cifar01'.*did you mean cifar10"):
        make_source("tfds", name="cifar01", data_dir=tfds_dir)
    with pytest.raises(DataError, match="did you mean tiny_shades"):
        make_source("tfds", name="tiny_shade", data_dir=tfds_dir)
    with pytest.raises(ConfigError, match=r"data\.name is empty"):
        make_source("tfds")


def test_a_tfds_data_set_prepared_in_another_format_is_refused(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / "copy")
    info = next((tmp_path / "copy").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"cannot open 'tiny_shades'.*(?i:tfrecord).*--file_format=array_record"):
        make_source("tfds", name="tiny_shades", data_dir=str(tmp_path / "copy"))


def test_a_tfds_data_set_is_the_same_by_its_folder_as_by_its_name(tfds_dir):
    by_name = make_source("tfds", name="tiny_shades", data_dir=tfds_dir, split="test")
    for path in (f"{tfds_dir}/tiny_shades", f"{tfds_dir}/tiny_shades/1.0.0"):
        by_path = make_source("auto", path=path, split="test")
        assert by_path.fingerprint() == by_name.fingerprint()
        assert [by_path[i] for i in range(4)] == [by_name[i] for i in range(4)]
    with pytest.raises(DataError, match="no prepared TFDS data set"):
        make_source("tfds", path=tfds_dir)
    with pytest.raises(DataError, match=r"no split 'val' - splits: test \(4\), train \(8\)"):
        make_source("auto", path=f"{tfds_dir}/tiny_shades", split="val")


def test_a_damaged_tfds_folder_is_told_in_a_line(tfds_dir, tmp_path):
    shutil.copytree(f"{tfds_dir}/tiny_shades", tmp_path / "copy")
    (tmp_path / "copy" / "1.0.0" / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="TFDS cannot open the data set"):
        make_source("auto", path=str(tmp_path / "copy"))


def test_a_damaged_tfds_record_is_a_bad_image(tfds_dir, tmp_path):
    shutil.copytree(f"{tfds_dir}/tiny_shades", tmp_path / "copy")
    (shard,) = (tmp_path / "copy").rglob("*train*array_record*")
    data = bytearray(shard.read_bytes())
    whole = make_source("auto", path=str(tmp_path / "copy"))
    before, records = whole.fingerprint(), [whole[i] for i in range(8)]
    data[100:104] = b"oops"
    shard.write_bytes(data)
    source, bad = make_source("auto", path=str(tmp_path / "copy")), 0
    for i in range(8):
        try:
            assert source[i] == records[i]
        except BadImage:
            bad += 1
    assert bad
    with pytest.raises(IndexError):
        source[8]
    shard.write_bytes(data[:-1])
    assert make_source("auto", path=str(tmp_path / "copy")).fingerprint() != before
    shard.unlink()
    with pytest.raises(DataError, match=r"array_record-00000-of-00001 cannot be read"):
        make_source("auto", path=str(tmp_path / "copy")).fingerprint()


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError, DecodeError])
def test_whatever_a_tfds_record_raises_is_a_bad_image(error, tfds_dir):
    source = make_source("tfds", name="tiny_shades", data_dir=tfds_dir)

    class Records:
        def __getitem__(self, i):
            raise error("broken")

    source.records = Records()
    with pytest.raises(BadImage, match="its record is damaged: broken"):
        source[0]


def test_tfds_shards_with_other_records_have_another_fingerprint(tfds_dir, tmp_path):
    shutil.copytree(f"{tfds_dir}/tiny_shades", tmp_path / "copy")
    train, test = (make_source("auto", path=str(tmp_path / "copy"), split=split) for split in ("train", "test"))
    before = train.fingerprint(), test.fingerprint()
    (shard,) = (tmp_path / "copy").rglob("*train*array_record*")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert train.fingerprint() != before[0]
    assert test.fingerprint() == before[1]


# --- auto


def test_lists_beside_the_images_that_they_list_are_told(tmp_path, caplog):
    write(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    (tmp_path / "classes.txt").write_text("cat\n")
    make_source("auto", path=str(tmp_path))
    assert not caplog.records
    (tmp_path / "train_map.txt").write_text("images/1.png\t0\n")
    (tmp_path / "val_map.txt").write_text("images/2.png\t0\n")
    make_source("auto", path=str(tmp_path))
    make_source("auto", path=str(tmp_path), split="val")
    assert len(caplog.records) == 1
    assert "not those in train_map.txt, val_map.txt" in caplog.text
    template = caplog.text.strip().rpartition("set data.path=")[2]
    assert names(make_source("auto", path=template)) == ["images/1.png"]
    assert names(make_source("auto", path=template, split="val")) == ["images/2.png"]


@pytest.mark.parametrize("kind", ["folder", *SHARDED])
def test_auto_takes_a_path_for_what_it_is(kind, tmp_path):
    path = write_any(kind, tmp_path, range(7))
    source = make_source("auto", path=path, heldout_fraction=0.0)
    assert source.fingerprint() == make_source(kind, path=path, heldout_fraction=0.0).fingerprint()
    assert shades_of(source) == ([0, 3, 6, 1, 4, 2, 5] if kind == "folder" else list(range(7)))
    assert [source[i]["label"] for i in range(7)] == [shade % 3 for shade in shades_of(source)]


@pytest.mark.parametrize("kind", ["folder", *SHARDED[1:]])
@pytest.mark.parametrize("layout", ["{split}", "data/{split}"])
def test_auto_looks_into_the_folder_of_the_split(kind, layout, tmp_path):
    for split, shades in (("train", range(6)), ("test", range(10, 14))):
        write_any(kind, tmp_path / layout.format(split=split), shades)
    for split, count in (("train", 6), ("val", 4)):
        path = tmp_path if layout == "{split}" else tmp_path / "data"
        source = make_source("auto", path=str(path), split=split)
        assert type(source) is type(make_source(kind, path=str(path), split=split))
        assert len(source) == count
        if kind != "folder":
            assert len(make_source("auto", path=str(tmp_path / layout), split=split)) == count


def test_auto_is_not_misled_by_archives_beside_images(tmp_path):
    write(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    write_tar(tmp_path / "train_images.tar", samples(1))
    (tmp_path / "train" / "manifest.json").write_text('{"name": "a web page"}')
    assert names(make_source("auto", path=str(tmp_path))) == ["a/1.png", "b/2.png"]
    assert names(make_source("auto", path=str(tmp_path), split="val")) == ["a/3.png"]
    (tmp_path / "train" / "a" / "notes.parquet").touch()
    assert type(make_source("auto", path=str(tmp_path))).__name__ == "Folder"


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("s-{000..002}.tar", 9), ("s-{000,002}.tar", 6), ("s-*.tar", 9), ("s-00[12].tar", 6), ("{s,t}-000.tar", 6)],
)
def test_shards_are_named_by_wildcards_and_braces(pattern, count, tmp_path):
    for number, name in enumerate(["s-000", "s-001", "s-002", "t-000"]):
        write_tar(tmp_path / f"{name}.tar", samples(*range(3 * number, 3 * number + 3)))
    source = make_source("auto", path=str(tmp_path / pattern), heldout_fraction=0.0)
    assert len(source) == count
    assert shades_of(source) == sorted(shades_of(source))


@pytest.mark.parametrize("pattern", ["train-*.tar", "train-{0..1}.tar", "{split}-*.tar", "**/train-?.tar"])
def test_wildcards_below_a_folder_with_brackets_in_its_name_are_found(pattern, tmp_path):
    root = tmp_path / "[y] z{1,2}" / "a*"
    for number in range(2):
        write_tar(root / f"train-{number}.tar", samples(number))
    for kind in ("auto", "tar"):
        source = make_source(kind, path=str(root / pattern), heldout_fraction=0.0)
        assert names(source) == ["train-0.tar/0000.png", "train-1.tar/0001.png"]


def test_braces_are_those_of_bash():
    assert _without_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert _without_braces("{1..3}{x,y}") == ["1x", "1y", "2x", "2y", "3x", "3y"]
    assert _without_braces("{9..11}") == ["9", "10", "11"]
    assert _without_braces("{3..1}") == ["3", "2", "1"]
    assert _without_braces("a{}b{c}") == ["a{}b{c}"]
    for bomb in ("{0..99999999999999}", "{0..9999}{0..9999}", "{a,b}" * 40):
        with pytest.raises(ConfigError, match=r"names .* files"):
            _without_braces(bomb)


def test_a_path_that_is_nothing_is_told_with_what_it_may_be(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path and data\.name are empty.*a \.txt list, \.tar"):
        make_source("auto")
    write_tar(tmp_path / "shard.tar", samples(1))
    (tmp_path / "a.tfrecord").touch()
    with pytest.raises(DataError, match=r"shad\.tar does not exist.*did you mean .*/shard\.tar"):
        make_source("auto", path=str(tmp_path / "shad.tar"))
    with pytest.raises(DataError, match=r"shad does not exist.*did you mean"):
        make_source("auto", path=str(tmp_path / "shad"))
    with pytest.raises(DataError, match=r"a\.tfrecord is of no kind that is known.*\.parquet"):
        make_source("auto", path=str(tmp_path / "a.tfrecord"))
    with pytest.raises(DataError, match=r"1 files are missing, the first being .*-1\.tar"):
        make_source("auto", path=str(tmp_path / "shard{,-1}.tar"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has 0 images"):
        make_source("auto", path=str(tmp_path / "empty"))
    for kind in SHARDED:
        with pytest.raises(ConfigError, match=rf"data\.path is empty - data\.source={kind}"):
            make_source(kind)
        with pytest.raises(DataError, match=rf"no files of data\.source={kind}"):
            make_source(kind, path=str(tmp_path / "empty"))
        with pytest.raises(DataError, match="does not exist"):
            make_source(kind, path=str(tmp_path / "nowhere"))


@pytest.mark.parametrize("extension", [".tar.gz", ".tgz", ".tar.zst"])
@pytest.mark.parametrize("given", ["file", "folder", "pattern"])
def test_compressed_tars_are_refused_with_the_command_to_decompress_them(extension, given, tmp_path):
    file = tmp_path / f"a b{extension}"
    file.write_bytes(gzip.compress(b"x"))
    path = {"file": file, "folder": tmp_path, "pattern": tmp_path / f"a*{extension}"}[given]
    command = "zstd -d" if extension == ".tar.zst" else "gunzip"
    for kind in ("auto", "tar") if given == "file" else ("tar",):
        with pytest.raises(DataError, match=rf"random access needs plain tar.*{command} '.*/a b{extension}'"):
            make_source(kind, path=str(path))


# --- splits of lists and shards


def write_split(kind: str, root, layout: str, split: str, shades) -> None:
    """Files of one split, in a folder of its name or with it in their own."""
    extension = {"list": "txt", "tar": "tar", "parquet": "parquet", "array_record": "array_record"}[kind]
    file = root / layout.format(split=split, extension=extension)
    if kind == "list":
        file.parent.mkdir(parents=True, exist_ok=True)
        for shade in shades:
            write(file.parent, f"{shade:04}.png", shade=shade)
        file.write_text("".join(f"{shade:04}.png {shade % 3}\n" for shade in shades))
    elif kind == "tar":
        write_tar(file, samples(*shades))
    elif kind == "parquet":
        write_parquet(file, shades)
    else:
        write_records(file, [png(shade) for shade in shades])


LAYOUTS = ["{split}/0.{extension}", "set-{split}-00000.{extension}", "{split}_map.{extension}", "{split}.{extension}"]


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["val", "validation"])
def test_a_split_is_found_by_folder_or_by_word(kind, layout, name, tmp_path):
    write_split(kind, tmp_path, layout, "train", range(5))
    write_split(kind, tmp_path, layout, name, range(100, 104))
    for asked, expected in (("train", list(range(5))), ("val", list(range(100, 104))), ("test", list(range(100, 104)))):
        source = make_source(kind, path=str(tmp_path), split=asked)
        assert shades_of(source) == expected
        extension = {"list": "txt"}.get(kind, kind)
        template = str(tmp_path / layout.replace("{extension}", extension))
        assert shades_of(make_source(kind, path=template, split=asked)) == expected
        if layout.startswith("set-"):
            assert shades_of(make_source(kind, path=str(tmp_path / f"set-*.{extension}"), split=asked)) == expected


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("layout", [*LAYOUTS, "data/{split}-0.{extension}"])
def test_files_to_evaluate_on_are_never_trained_on(kind, layout, tmp_path):
    write_split(kind, tmp_path, layout, "val", range(4))
    with pytest.raises(DataError, match="has val but no train"):
        make_source(kind, path=str(tmp_path))
    assert shades_of(make_source(kind, path=str(tmp_path), split="test")) == list(range(4))
    write_split(kind, tmp_path, "other.{extension}", "", range(4))
    with pytest.raises(DataError, match="has val but no train"):
        make_source(kind, path=str(tmp_path)) if "data" not in layout else make_source(
            kind, path=str(tmp_path / "data")
        )
    write_split(kind, tmp_path, "both_train_val.{extension}", "", range(4))
    with pytest.raises(DataError, match="named as of train and as of val"):
        make_source(kind, path=str(tmp_path))


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_files_to_train_on_alone_a_part_is_held_out(kind, layout, tmp_path):
    write_split(kind, tmp_path, layout, "train", range(20))
    write_split(kind, tmp_path, layout, "extra", range(100, 104))
    template = str(tmp_path / layout.replace("{extension}", {"list": "txt"}.get(kind, kind)))
    for path in (str(tmp_path), template):
        train, held_out = (shades_of(make_source(kind, path=path, split=split)) for split in ("train", "test"))
        assert held_out == [0, 10]
        assert sorted(train + held_out) == list(range(20))
        assert shades_of(make_source(kind, path=path, split="extra")) == list(range(100, 104))


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize(
    ("train", "evaluation"), [("train0", "val0"), ("trainset-0", "testset-0"), ("training", "x-testing")]
)
def test_files_that_look_like_both_sides_are_not_mixed(kind, train, evaluation, tmp_path):
    for split, shades in ((train, range(3)), (evaluation, range(10, 13))):
        write_split(kind, tmp_path, "{split}.{extension}", split, shades)
    for path in (tmp_path, tmp_path / "*"):
        for split in ("train", "val"):
            with pytest.raises(DataError, match=rf"has {train}\.\w+ and {evaluation}\.\w+, which look like"):
                make_source(kind, path=str(path), split=split)
    source = make_source(kind, path=str(tmp_path / f"{train}.*"), heldout_fraction=0.0)
    assert shades_of(source) == list(range(3))


@pytest.mark.parametrize("kind", SHARDED[1:])
def test_shards_in_a_folder_of_the_split_are_known_whatever_its_case(kind, tmp_path):
    write_split(kind, tmp_path, "{split}/0.{extension}", "Train", range(3))
    write_split(kind, tmp_path, "{split}/0.{extension}", "Test", range(10, 13))
    for path in (tmp_path, tmp_path / "{split}"):
        assert shades_of(make_source("auto", path=str(path))) == [0, 1, 2]
        assert shades_of(make_source("auto", path=str(path), split="val")) == [10, 11, 12]


@pytest.mark.parametrize("kind", SHARDED[1:])
def test_shards_that_are_left_out_are_told(kind, tmp_path, caplog):
    write_split(kind, tmp_path, "{split}.{extension}", "a", range(20))
    read = lambda: [len(make_source(kind, path=str(tmp_path), split=split)) for split in ("train", "val")]  # noqa: E731
    assert read() == [18, 2]
    assert not caplog.records
    write_split(kind, tmp_path / "more", "{split}.{extension}", "b", range(3))
    assert read() == [18, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}: files in 1 sub-folders are left out, the first being more/: "
        f"to take all, set data.path={tmp_path}/**/*.{kind}"
    ]
    assert len(make_source(kind, path=f"{tmp_path}/**/*.{kind}", heldout_fraction=0.0)) == 23
    shutil.rmtree(tmp_path / "more")
    caplog.clear()
    (tmp_path / "val").mkdir()
    assert read() == [18, 2]
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path}/val has no files of data.source={kind}: what is evaluated on is held out of the files to train on"
    ]
    caplog.clear()
    (tmp_path / "val").rmdir()
    (tmp_path / f"b.{kind}.gz").touch()
    assert read() == [18, 2]
    assert len(caplog.records) == 1
    assert f"1 compressed files beside those that are read are left out, the first being b.{kind}.gz" in caplog.text


def test_a_file_is_not_trained_on_and_evaluated_on_by_one_pattern(tmp_path):
    for name in ("set-train.tar", "set-train-val.tar"):
        write_tar(tmp_path / name, samples(1, 2))
    with pytest.raises(DataError, match=r"set-train-val\.tar is of train and of val"):
        make_source("tar", path=str(tmp_path / "set-*{split}*.tar"))


@pytest.mark.parametrize("kind", SHARDED)
def test_any_word_can_be_a_split_and_words_are_whole(kind, tmp_path):
    for split in ("training", "unlabeled", "x2train"):
        write_split(kind, tmp_path, "{split}.{extension}", split, range(5))
    assert len(make_source(kind, path=str(tmp_path), split="unlabeled")) == 5
    assert len(make_source(kind, path=str(tmp_path), split="train", heldout_fraction=0.0)) == 15
    with pytest.raises(ConfigError, match="has no 'unlabeled'"):
        make_source(kind, path=str(tmp_path), split="unlabeled")


@pytest.mark.parametrize("kind", SHARDED)
@pytest.mark.parametrize("count", [2, 3, 9, 10, 11, 31])
@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5])
def test_what_is_held_out_is_disjoint_from_training_and_both_are_all(kind, count, fraction, tmp_path):
    path = write_any(kind, tmp_path, range(count)) if count > 3 else write_any("list", tmp_path, range(count))
    kind = kind if count > 3 else "list"
    train, held_out = (make_source(kind, path=path, split=s, heldout_fraction=fraction) for s in ("train", "val"))
    ours, theirs = shades_of(train), shades_of(held_out)
    assert sorted(ours + theirs) == list(range(count))
    assert theirs == list(range(0, count, round(1 / fraction)))
    assert ours == sorted(ours)
    assert [train.name(i) for i in range(len(train))] == [train[i]["name"] for i in range(len(train))]
    assert train.fingerprint() != held_out.fingerprint()
    assert train.classes == held_out.classes
    assert pickle.loads(pickle.dumps(train))[len(train) - 1] == train[len(train) - 1]
    with pytest.raises(IndexError):
        train[len(train)]


def test_the_held_out_part_of_any_size_is_a_partition():
    class Numbers(list):
        path, split, classes = "x", "train", ()

        def __getitem__(self, i):
            return {"label": super().__getitem__(i)}

    for count in (1, 2, 5, 20, 21, 99):
        for every in (1, 2, 3, 7, 50, 1000):
            parts = [Part(Numbers(range(count)), every, held_out) for held_out in (True, False)]
            held_out, rest = ([part[i]["label"] for i in range(len(part))] for part in parts)
            assert sorted(held_out + rest) == list(range(count))
            assert len(held_out) == (0 if count == 1 else -(-count // every))


@pytest.mark.parametrize("fraction", [0.51, 0.6, 2 / 3, 0.7, 0.75, 0.9, 0.99])
def test_more_than_half_may_be_held_out_and_is_as_much_as_was_asked_for(fraction, tmp_path):
    (tmp_path / "all.txt").write_text("".join(f"{i}.png\n" for i in range(1000)))
    write(tmp_path, "0.png")
    path = str(tmp_path / "all.txt")
    train, held_out = (make_source("list", path=path, split=s, heldout_fraction=fraction) for s in ("train", "val"))
    assert abs(len(held_out) - 1000 * fraction) < 1
    assert sorted(names(train) + names(held_out)) == sorted(f"{i}.png" for i in range(1000))
    assert names(train) == sorted(names(train), key=lambda name: int(name[:-4]))
    assert json.loads(json.dumps(train.fingerprint())) == train.fingerprint() != held_out.fingerprint()


@pytest.mark.parametrize("kind", SHARDED)
def test_a_part_that_is_empty_is_refused(kind, tmp_path):
    path = write_any(kind, tmp_path, range(5))
    with pytest.raises(DataError, match=r"0 of its 5 images in split 'val' - data\.heldout_fraction=0\.0"):
        make_source(kind, path=path, split="val", heldout_fraction=0.0)
    with pytest.raises(DataError, match=r"0 of its 5 images in split 'train' - data\.heldout_fraction=0\.9"):
        make_source(kind, path=path, split="train", heldout_fraction=0.9)


@pytest.mark.parametrize("kind", SHARDED)
def test_moved_data_keep_their_fingerprint_and_changed_data_do_not(kind, tmp_path):
    def made(root, split="train"):
        path = root / "all.txt" if kind == "list" else root
        return json.dumps(make_source(kind, path=str(path), split=split).fingerprint())

    write_any(kind, tmp_path / "one", range(8))
    before = made(tmp_path / "one")
    (tmp_path / "one").rename(tmp_path / "two")
    assert made(tmp_path / "two") == before
    write_any(kind, tmp_path / "three", [*range(7), 9])
    write_any(kind, tmp_path / "four", range(9))
    write_any(kind, tmp_path / "five", [1, 0, *range(2, 8)])
    made_of = [before, *(made(tmp_path / name) for name in ("three", "four", "five")), made(tmp_path / "two", "val")]
    assert len(set(made_of)) == 5


# --- lists


def listed(root, text: bytes | str, **options):
    root.mkdir(exist_ok=True)
    (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return make_source("list", path=str(root / "list.txt"), **{"heldout_fraction": 0.0} | options)


def test_a_line_is_a_path_and_perhaps_a_label(tmp_path):
    write(tmp_path, "a.png", "b c.JPG", "d.png e/f, g.tiff", "x é 猫.webp")
    lines = ["a.png\t3", "b c.JPG 0", "", "# a comment.png 5", "d.png e/f, g.tiff,1", "   ", "x é 猫.webp \t 2  "]
    source = listed(tmp_path, "\n".join(lines))
    assert names(source) == ["a.png", "b c.JPG", "d.png e/f, g.tiff", "x é 猫.webp"]
    assert [source[i]["label"] for i in range(4)] == [3, 0, 1, 2]
    assert source.classes == ("0", "1", "2", "3")
    assert source[2]["image"] == (tmp_path / "d.png e/f, g.tiff").read_bytes()
    records = [source[i] for i in range(4)]
    other = listed(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as Windows writes it
    assert [other[i] for i in range(4)] == records
    assert other.fingerprint() == source.fingerprint()


def test_labels_may_be_names_of_classes_or_missing(tmp_path):
    write(tmp_path, "a.png", "b.png", "c.png")
    source = listed(tmp_path, "a.png,tabby cat\nb.png , 7\nc.png\tdog\n")
    assert source.classes == ("7", "dog", "tabby cat")
    assert [source[i]["label"] for i in range(3)] == [2, 0, 1]
    assert pickle.loads(pickle.dumps(source))[0] == source[0]
    source = listed(tmp_path, "a.png\nb.png ,\nc.png \n")
    assert source.classes == ()
    assert [source[i]["label"] for i in range(3)] == [-1, -1, -1]


def test_names_that_are_not_utf8_are_read(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write(tmp_path, name)
    source = listed(tmp_path, b"caf\xe9.png 0\n")
    assert source[0]["name"] == name
    assert source[0]["image"]


def test_classes_are_those_of_both_splits(tmp_path):
    write(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "train.txt").write_text("1.png cat\n2.png emu\n")
    (tmp_path / "val.txt").write_text("3.png dog\n")
    train, val = (make_source("list", path=str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog", "emu")
    assert [train[1]["label"], val[0]["label"]] == [2, 1]
    before = train.fingerprint()
    (tmp_path / "val.txt").write_text("3.png ant\n")  # which renumbers those of the other
    assert make_source("list", path=str(tmp_path)).fingerprint() != before
    for text, says in (("3.png", "has no labels"), ("3.png 5", "has numbers for labels")):
        (tmp_path / "val.txt").write_text(text)
        with pytest.raises(DataError, match=says):
            make_source("list", path=str(tmp_path))


def test_paths_are_relative_to_the_list_or_its_splits_folder_or_data_dir(tmp_path):
    write(tmp_path / "train", "n01/1.png")
    write(tmp_path / "val", "2.png")
    write(tmp_path / "far" / "train", "3.png")
    (tmp_path / "train_map.txt").write_text("n01/1.png\t0\n")
    (tmp_path / "val_map.txt").write_text("2.png\t0\n")
    assert make_source("list", path=str(tmp_path))[0]["image"]
    assert make_source("list", path=str(tmp_path), split="validation")[0]["image"]
    (tmp_path / "train_map.txt").write_text("3.png\t0\n")
    assert make_source("list", path=str(tmp_path), data_dir=str(tmp_path / "far" / "{split}"))[0]["image"]
    assert make_source("list", path=str(tmp_path), data_dir=str(tmp_path / "far" / "train"))[0]["image"]
    (tmp_path / "train_map.txt").write_text(f"{tmp_path}/val/2.png\n")
    (tmp_path / "val_map.txt").unlink()
    source = make_source("list", path=str(tmp_path), heldout_fraction=0.0, data_dir="/nowhere")
    assert source[0]["name"] == f"{tmp_path}/val/2.png"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.png 1\nnotes.txt 2\n", r"'notes\.txt 2' is not the path of an image - .*list\.txt, line 2"),
        ("path,label\na.png,1\n", r"'path,label' is not the path of an image - .*line 1 - .*heading with #"),
        ('a.png 1\n"b.png",2\n', r"line 2"),
        ("a.png,,1\n", r"line 1"),
        ("a.png 1\n\n# x\nb.png\n", r"line 4 has no label, and line 1 has one"),
        ("a.png\nb.png 1\n", r"line 1 has no label, and line 2 has one"),
        ("a.png,0,640\n", r"'0,640' is not the label of an image - .*list\.txt, line 1 - .*without a comma"),
        ("a.png cat\na.png dog, small\n", r"'dog, small' is not the label of an image - .*line 2"),
        ("a.png 1\na.png 0 # good one\n", r"'0 # good one' is not the label of an image - .*line 2"),
        ("a.png cat # good one\n", r"'cat # good one' is not the label of an image - .*line 1"),
        ("# x\na.png 0.0\na.png 1.0\na.png 10.0\n", r"'0\.0' is not the label of an image - .*line 2 - give integers"),
        ("a.png 1\na.png -1\n", r"label -1 - .*list\.txt, line 2 - number the classes from 0"),
        ("a.png 1\na.png 99999999999999999999999999\n", r"label 9999.*line 2"),
        ("a.png\nb/../../x.png\n", r"'b/\.\./\.\./x\.png' leaves the folder of the images - .*line 2"),
        ("a.png\n..\n", r"line 2"),
        ("../a.png\n", r"line 1 - remove the \.\."),
        ("zzz.png 0\n", r"zzz\.png does not exist - .*list\.txt, line 1, looked in .*set data\.data_dir"),
        ("# x\n/zzz/z.png 0\n", r"/zzz/z\.png does not exist - .*line 2 - correct the paths"),
        ("", r"list\.txt lists 0 images"),
        ("# nothing\n\n", r"lists 0 images"),
        ("a.png\nb\0.png\n", r"zero bytes in it - .*line 2"),
        ("a.png\n" + 70_000 * "x", r"a line of more than 65536 bytes - .*at byte 6"),
        (b"\xff\xfea\0.\0", r"is UTF-16"),
        (os.urandom(2000).replace(b"\n", b""), r"."),
    ],
)
def test_a_list_that_is_wrong_is_told_with_the_line(text, says, tmp_path):
    write(tmp_path, "a.png")
    with pytest.raises(DataError, match=says):
        listed(tmp_path, text)


def test_of_a_list_only_the_first_image_is_looked_for_and_no_pipe_is_opened(tmp_path):
    write(tmp_path, "a.png")
    os.mkfifo(tmp_path / "p.png")
    (tmp_path / "x").mkdir()
    source = listed(tmp_path, "a.png\nmissing.png\np.png\nx/../a.png\n")
    with pytest.raises(FileNotFoundError):
        source[1]
    with pytest.raises(BadImage, match="not a file"):
        source[2]
    assert source[3]["image"] == source[0]["image"]


def test_a_list_is_read_right_at_the_edges_of_what_is_kept_of_it(tmp_path, monkeypatch):
    write(tmp_path, "a.png")
    rng = random.Random(0)
    for block in (64, 1000, 2**22):
        monkeypatch.setattr(list_file, "BLOCK", block)
        lines, expected = [], []
        for i in range(500):
            lines += rng.choice([[], [], ["", "# x"], ["#" * 100]])
            expected.append(f"{i}{'x' * rng.randrange(30)}.png" if i else "a.png")
            lines.append(expected[-1] + " 1")
        for text in ("\n".join(lines), "\r\n".join([*lines, ""])):
            assert names(listed(tmp_path, text)) == expected


@pytest.mark.parametrize("read_before", [True, False])
def test_a_list_that_changes_under_a_run_is_refused(read_before, tmp_path):
    write(tmp_path, "a.png")
    source = listed(tmp_path, "a.png\na.png\n")
    if read_before:
        source[0]
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(DataError, match="has changed since the run began"):
        source[1]


# --- tar files


def test_a_sample_is_what_shares_its_name_up_to_the_first_dot(tmp_path):
    members = {
        "x/1.json": b'{"label": 4, "caption": "x"}', "x/1.png": png(1), "x/1.second.jpg": b"no", "x/1.txt": b"words",
        "x.d/2.JPG": png(2), "x.d/2.json": b'{"label": 0}', "._3.png": b"of a Mac", ".git/4.png": b"hidden",
        "./5.cls": b" 2\n", "./5.json": b'{"label": 1}', "./5.png": png(5), "notes.txt": b"",
        "long" * 60 + ".png": png(7),
        "long" * 60 + ".cls": b"3", "é 猫\n.png": png(8), "é 猫\n.cls": b"0",
    }  # fmt: skip
    expected = ["x/1.png", "x.d/2.JPG", "./5.png", "long" * 60 + ".png", "é 猫\n.png"]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        file = write_tar(tmp_path / f"{number}.tar", members, format=form)
        source = make_source("tar", path=file, heldout_fraction=0.0)
        assert names(source) == [f"{number}.tar/{name}" for name in expected]
        assert [source[i]["label"] for i in range(5)] == [4, 0, 2, 3, 0]
        assert shades_of(source) == [1, 2, 5, 7, 8]
        assert source.classes == ("0", "1", "2", "3", "4")


def test_links_and_devices_in_a_tar_are_passed_over(tmp_path):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"{kind.decode()}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        info = tarfile.TarInfo("real.png")
        info.size = len(png(1))
        archive.addfile(info, io.BytesIO(png(1)))
    assert names(make_source("tar", path=str(file), heldout_fraction=0.0)) == ["a.tar/real.png"]


def test_a_key_that_comes_back_in_a_tar_is_another_sample(tmp_path):
    first, again = samples(1, 2), {"0001.cls": b"2", "0001.png": png(8), "0002.cls": b"0", "0002.png": png(9)}
    twice = [(f"0003.{kind}", data) for n in (3, 4) for kind, data in (("png", png(n)), ("cls", b"%d" % (n - 3)))]
    file = write_tar(tmp_path / "a.tar", [*first.items(), *again.items(), *twice])
    source = make_source("tar", path=file, heldout_fraction=0.0)
    assert shades_of(source) == [1, 2, 8, 9, 3, 4]
    assert [source[i]["label"] for i in range(6)] == [1, 2, 2, 0, 0, 1]


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([f"v1.0_{n:03}.png" for n in range(8)], {f"v1.0_{n:03}.png": -1 for n in range(8)}),
        (["v1.0_1.cls", "v1.0_1.png", "v1.0_2.cls", "v1.0_2.png"], {"v1.0_1.png": 0, "v1.0_2.png": 2}),
        (["0.gif", "0.png"], {"0.gif": -1, "0.png": -1}),
        (["0.depth.png", "0.png", "1.depth.png", "1.png"], {"0.png": -1, "1.png": -1}),
        (["0.depth.png", "0.png", "0.cls", "0.gif"], {"0.png": 2}),
        (["0.left.png", "0.right.png", "0.cls", "1.left.png", "1.cls"], {"0.left.png": 2, "1.left.png": 4}),
    ],
)
def test_the_image_of_a_sample_is_the_one_that_has_its_name_and_names_with_dots_are_samples(
    members, expected, tmp_path, caplog
):
    data = [(name, b"%d" % n if name.endswith("cls") else png(n)) for n, name in enumerate(members)]
    source = make_source("tar", path=write_tar(tmp_path / "a.tar", data), heldout_fraction=0.0)
    assert {source.name(i).removeprefix("a.tar/"): source[i]["label"] for i in range(len(source))} == expected
    assert shades_of(source) == [members.index(name) for name in expected]
    over = [name for name in members if name not in expected and not name.endswith("cls")]
    says = f"{len(over)} images beside another one of their sample (the first 'a.tar/{over[0]}')" if over else ""
    assert [says in record.getMessage() for record in caplog.records] == [True] * bool(over)


def test_tars_joined_by_cat_are_read_to_the_end_of_the_last(tmp_path, caplog):
    parts = [Path(write_tar(tmp_path / f"{n}.tar", samples(n, n + 1))).read_bytes() for n in (1, 3, 5)]
    (tmp_path / "all").mkdir()
    file = tmp_path / "all" / "c.tar"
    file.write_bytes(parts[0] + parts[1] + bytes(2**20) + parts[2])
    source = make_source("tar", path=str(file), heldout_fraction=0.0)
    assert shades_of(source) == [1, 2, 3, 4, 5, 6]
    assert [source[i]["label"] for i in range(6)] == [1, 2, 0, 1, 2, 0]
    assert not caplog.records
    file.write_bytes(parts[0] + b"no header" * 100)
    with pytest.raises(DataError, match=rf"c\.tar is truncated or damaged at byte {len(parts[0])} - no header"):
        make_source("tar", path=str(file))


def test_a_hard_link_in_a_tar_is_the_image_that_it_leads_to(tmp_path, caplog):
    file = tmp_path / "a.tar"
    with tarfile.open(file, "w") as archive:
        for name, data in samples(1, 2).items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in {"3.cls": "0002.cls", "3.png": "0001.png", "4.cls": "3.cls", "4.png": "3.png"}.items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.LNKTYPE, target
            archive.addfile(info)
    source = make_source("tar", path=str(file), heldout_fraction=0.0)
    assert names(source) == [f"a.tar/{name}.png" for name in ("0001", "0002", 3, 4)]
    assert shades_of(source) == [1, 2, 1, 1]
    assert [source[i]["label"] for i in range(4)] == [1, 2, 2, 2]
    assert not caplog.records


def test_what_is_passed_over_in_tars_is_counted_in_one_warning_each_time(tmp_path, caplog):
    for shard in "ab":
        with tarfile.open(write_tar(tmp_path / f"{shard}.tar", {"9.cls": b"1"} | samples(1)), "a") as archive:
            for number in range(2):
                info = tarfile.TarInfo(f"{number}\n.png")
                info.type, info.linkname = tarfile.SYMTYPE, "0001.png"
                archive.addfile(info)
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        assert shades_of(make_source("tar", path=str(tmp_path), heldout_fraction=0.0)) == [1, 1]
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert "4 images that are links or devices (the first 'a.tar/0\\n.png')" in record.getMessage()
        assert "2 labels that no image stands beside (the first 'a.tar/9.cls')" in record.getMessage()


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.png": b"x", "1.cls": b"cat"}, r"label 'cat' is not the number of a class - .*'1\.cls'"),
        ({"1.png": b"x", "1.cls": b"-1"}, r"label '-1'"),
        ({"1.png": b"x", "1.cls": b"9" * 30}, r"label '9+'"),
        ({"1.png": b"x", "1.json": b'{"label": 99999999}'}, r"label 99999999 is not"),
        ({"1.png": b"x", "1.json": b"{"}, r"JSON that cannot be read - .*'1\.json'"),
        ({"1.png": b"x", "1.json": b"[" * 100_000}, r"JSON that cannot be read"),
        ({"1.png": b"x", "1.cls": b"0", "2.png": b"y"}, r"1 of 2 images have a label, and a\.tar/2\.png has none"),
        ({"1.txt": b"x"}, r"a\.tar has 0 images - looked for \.jpg"),
    ],
)
def test_a_tar_that_is_wrong_is_told_with_the_member(members, says, tmp_path):
    with pytest.raises(DataError, match=says):
        make_source("tar", path=write_tar(tmp_path / "a.tar", members))


def test_a_truncated_shard_is_named_with_the_place_wherever_it_was_cut(tmp_path, caplog):
    whole = Path(write_tar(tmp_path / "whole.tar", samples(1, 2, 3))).read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole)
    ends = make_source("tar", path=str(tmp_path / "cut.tar"), heldout_fraction=0.0)
    last = int(ends.offsets.array[-1] + ends.sizes.array[-1])
    for cut in (0, 1, 100, 511, 513, 600, 1500, 2000, 4000, last - 1):
        (tmp_path / "cut.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar.*(truncated or damaged.* at byte|after byte) \d|has 0 images"):
            make_source("tar", path=str(tmp_path / "cut.tar"))
    assert not caplog.records
    (tmp_path / "cut.tar").write_bytes(whole[: -(-last // 512) * 512])  # nothing is missing but the mark of the end
    assert len(make_source("tar", path=str(tmp_path / "cut.tar"), heldout_fraction=0.0)) == 3
    assert "no end mark" in caplog.text
    (tmp_path / "cut.tar").write_bytes(whole[:1024] + b"x" * 512 + whole[1024:])
    with pytest.raises(DataError, match="truncated or damaged"):
        make_source("tar", path=str(tmp_path / "cut.tar"))
    (tmp_path / "cut.tar").write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="is compressed, and random access needs plain tar"):
        make_source("tar", path=str(tmp_path / "cut.tar"))


def test_a_tar_of_anybodys_bytes_is_told_in_a_line_and_never_hangs(tmp_path):
    whole = bytearray(
        Path(write_tar(tmp_path / "whole.tar", samples(*range(4)), format=tarfile.PAX_FORMAT)).read_bytes()
    )
    rng = random.Random(0)
    told = 0
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            start = rng.randrange(len(damaged) // 512) * 512 + rng.choice([0, 100, 124, 156, 257, rng.randrange(512)])
            damaged[start : start + 12] = rng.randbytes(12)
        (tmp_path / "damaged.tar").write_bytes(damaged)
        try:
            source = make_source("tar", path=str(tmp_path / "damaged.tar"), heldout_fraction=0.0)
            assert all(source[i]["name"] == source.name(i) for i in range(len(source)))
        except UserError:
            told += 1
    assert told > 50
    # a size below zero leads back to where it stands
    info = tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT)
    loop = bytearray(info)
    loop[124:136] = b"\xff" * 10 + b"\xfe\x00"
    loop[148:156] = b" " * 8
    loop[148:156] = b"%06o\0 " % sum(loop)
    (tmp_path / "damaged.tar").write_bytes(bytes(loop) + bytes(1024))
    with pytest.raises(DataError, match="truncated or damaged"):
        make_source("tar", path=str(tmp_path / "damaged.tar"))


def test_the_index_of_a_shard_is_kept_and_made_anew_when_it_is_of_no_use(tmp_path, cache, monkeypatch):
    file, made = write_tar(tmp_path / "a.tar", samples(1, 2, 3)), []
    read_headers = tar._read_headers
    monkeypatch.setattr(tar, "_read_headers", lambda *args: made.append(args) or read_headers(*args))

    def source():
        return make_source("tar", path=file, heldout_fraction=0.0)

    first = source()
    assert len(made) == 1
    (kept,) = (cache / "simmim_jax" / "tar").iterdir()
    assert source().fingerprint() == first.fingerprint()
    assert len(made) == 1
    for damage in (b"", b"no npz", kept.read_bytes()[:100], pickle.dumps({"a": 1})):
        kept.write_bytes(damage)
        assert [source()[i] for i in range(3)] == [first[i] for i in range(3)]
    assert len(made) == 5
    with np.load(kept) as arrays:
        np.savez(kept, **{name: arrays[name] for name in arrays} | {"offsets": np.array([0, 10**9, 7])})
    assert [source()[i] for i in range(3)] == [first[i] for i in range(3)]
    assert len(made) == 6
    write_tar(tmp_path / "a.tar", samples(4, 5, 6, 7))
    assert shades_of(source()) == [4, 5, 6, 7]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.tar"))  # in which no folder can be made
    assert shades_of(source()) == [4, 5, 6, 7]


@pytest.mark.parametrize("told_by", ["the file system", "the bytes alone"])
@pytest.mark.parametrize("written", ["in place", "beside"])
def test_a_shard_rewritten_with_the_same_size_and_time_is_indexed_anew(told_by, written, tmp_path, monkeypatch):
    if told_by == "the bytes alone":
        monkeypatch.setattr(tar, "_identity", lambda status: (status.st_size, status.st_mtime_ns))
    file = tmp_path / "a.tar"
    write_tar(file, samples(1, 2, 3))
    before = os.stat(file)
    assert names(make_source("tar", path=str(file), heldout_fraction=0.0))[0] == "a.tar/0001.png"
    other = Path(write_tar(tmp_path / "other", samples(5, 6, 7)))
    if written == "in place":
        file.write_bytes(other.read_bytes())
    else:
        os.replace(other, file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(file).st_size, os.stat(file).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    source = make_source("tar", path=str(file), heldout_fraction=0.0)
    assert names(source) == [f"a.tar/000{n}.png" for n in (5, 6, 7)]
    assert [source[i]["label"] for i in range(3)] == [2, 0, 1]


def test_the_fingerprint_of_tars_tells_other_pixels_and_not_other_times_at_three_reads_a_shard(tmp_path, monkeypatch):
    def source():
        return make_source("tar", path=str(tmp_path), heldout_fraction=0.0)

    rng = np.random.default_rng(0)
    for shard in "ab":
        members = {f"{n}.png": rng.bytes(20_000) for n in range(5)}
        write_tar(tmp_path / f"{shard}.tar", members)
    first = source()
    before = first.fingerprint()
    reads, pread = [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    assert source().fingerprint() == before
    assert len(reads) <= 2 * 3
    write_tar(tmp_path / "b.tar", members, mtime=7)
    assert source().fingerprint() == before
    with open(tmp_path / "b.tar", "r+b") as file:
        for offset in first.offsets.array[5:]:
            file.seek(int(offset))
            file.write(rng.bytes(20_000))
    assert source().fingerprint()["index_sha256"] == before["index_sha256"]
    assert source().fingerprint() != before


def test_a_file_is_closed_without_a_word_when_its_module_is_gone_before_it(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    opened, said = files.File(str(tmp_path / "a"), files.stat_file(str(tmp_path / "a"))), []
    descriptor = opened.descriptor
    monkeypatch.setattr(sys, "unraisablehook", said.append)
    monkeypatch.setattr(files, "os", None)  # as Python leaves it when it exits
    del opened
    assert not said
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_shard_that_is_cut_or_changed_under_a_run_gives_no_other_images(tmp_path):
    source = make_source("tar", path=write_tar(tmp_path / "a.tar", samples(1, 2, 3)), heldout_fraction=0.0)
    source[0]
    os.truncate(tmp_path / "a.tar", 2000)
    with pytest.raises(DataError, match="has changed since the run began"):
        source[2]
    with pytest.raises(DataError, match="has changed since the run began"):
        pickle.loads(pickle.dumps(source))[0]


def test_more_shards_are_read_than_files_are_held_open(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "OPEN", 3)
    for number in range(12):
        write_tar(tmp_path / f"{number:02}.tar", samples(number))
    source = make_source("tar", path=str(tmp_path), heldout_fraction=0.0)
    before = len(os.listdir("/proc/self/fd"))
    errors, rng = [], np.random.default_rng(0)

    def read(order):
        errors.extend(i for i in order if shade_of(source[int(i)]) != i)

    threads = [threading.Thread(target=read, args=(rng.integers(0, 12, 200),)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert len(os.listdir("/proc/self/fd")) <= before + 3


# --- Parquet


def test_parquet_is_read_as_hugging_face_writes_it(tmp_path):
    write_parquet(tmp_path / "data" / "train-00000-of-00002.parquet", range(5), names=("ant", "bee", "cat"))
    write_parquet(tmp_path / "data" / "train-00001-of-00002.parquet", range(5, 8), names=("ant", "bee", "cat"))
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", range(10, 12), names=("ant", "bee", "cat"))
    (tmp_path / "README.md").write_text("a card")
    source = make_source("auto", path=str(tmp_path))
    assert shades_of(source) == list(range(8))
    assert source.classes == ("ant", "bee", "cat")
    assert [source[i]["label"] for i in range(8)] == [i % 3 for i in range(8)]
    assert source.name(6) == "data/train-00001-of-00002.parquet/1"
    assert shades_of(make_source("auto", path=str(tmp_path), split="validation")) == [10, 11]


@pytest.mark.parametrize("name", ["image", "img", "jpg", "anything"])
@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary()])
@pytest.mark.parametrize("label", ["label", "fine_label", "cls", None])
def test_the_columns_of_image_and_label_are_found(name, kind, label, tmp_path):
    columns = {"id": ["x", "y"], name: pa.array([png(1), png(2)], kind), "score": [0.5, 0.6]}
    if label:
        columns[label] = pa.array([4, 1], pa.int32())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_statistics=name != "img")
    source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
    assert shades_of(source) == [1, 2]
    assert [source[i]["label"] for i in range(2)] == ([4, 1] if label else [-1, -1])
    assert source.classes == (("0", "1", "2", "3", "4") if label else ())


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
@pytest.mark.parametrize("column", ["label", "Label", "CLASS"])
def test_labels_of_strings_are_the_names_of_the_classes_of_both_splits(kind, column, tmp_path):
    def put(file, shades, labels):
        label = pa.array(labels, pa.string()).cast(kind)
        table = pa.table({"image": pa.array([png(shade) for shade in shades]), column: label})
        pq.write_table(table, tmp_path / file, row_group_size=2)

    put("train-0.parquet", [1, 2, 3], ["dog", "ant", "dog"])
    put("train-1.parquet", [4], ["é 猫"])
    put("val.parquet", [5], ["bee"])
    train, val = (make_source("parquet", path=str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ("ant", "bee", "dog", "é 猫")
    assert [train[i]["label"] for i in range(4)] == [2, 0, 2, 3]
    assert val[0]["label"] == 1
    assert pickle.loads(pickle.dumps(train))[3] == train[3]
    before = train.fingerprint()
    put("val.parquet", [5], ["cat"])  # after which the numbers mean others
    assert make_source("parquet", path=str(tmp_path)).fingerprint() != before
    put("train-1.parquet", [4], [None])
    with pytest.raises(DataError, match=rf"train-1\.parquet has rows without a label - column '{column}'"):
        make_source("parquet", path=str(tmp_path))
    put("val.parquet", [5], [None])
    assert make_source("parquet", path=str(tmp_path), split="val")[0]["label"] == -1


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ([True, False], pa.bool_(), "bool"),
        ([0.0, 1.0], pa.float64(), "double"),
        ([[0], [1]], pa.list_(pa.int64()), "list"),
    ],
)
def test_labels_of_other_types_are_not_used_and_that_is_told_once(values, kind, says, tmp_path, caplog):
    for name in ("a", "b"):
        table = pa.table({"image": [png(1), png(2)], "label": pa.array(values, kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    source = make_source("parquet", path=str(tmp_path))
    make_source("parquet", path=str(tmp_path), split="val")
    assert source.classes == ()
    assert source[0]["label"] == -1
    assert len(caplog.records) == 1
    assert re.search(rf"column 'label' is of type {says}.*, not used", caplog.text)


def test_a_column_of_captions_is_no_label(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(parquet_module, "MAX_NAMES", 2)
    table = pa.table({"image": [png(1), png(2), png(3)], "label": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "a.parquet")
    source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
    assert [source.classes, source[0]["label"]] == [(), -1]
    assert "column 'label' has more than 2 different texts, not used" in caplog.text


def test_a_row_without_bytes_is_a_bad_image(tmp_path):
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "x.png"}, None, {"bytes": png(3), "path": None}], image)
    pq.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
    for i in (0, 1):
        with pytest.raises(BadImage, match="no bytes"):
            source[i]
    assert shade_of(source[2]) == 3
    assert source.classes == ()


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
    ("labels", "says"),
    [
        ([0, None, 1], r"1 rows without a label - column 'label', row group 0"),
        ([0, 3, 1], r"labels from 0 to 3 - .* - number the classes from 0 to 2"),
        ([0, -1, 1], r"labels from -1 to 1"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels, says, statistics, tmp_path):
    write_parquet(tmp_path / "a.parquet", range(3), labels=labels)
    table = pq.read_table(tmp_path / "a.parquet")
    pq.write_table(table, tmp_path / "a.parquet", write_statistics=statistics)
    with pytest.raises(DataError, match=says):
        make_source("parquet", path=str(tmp_path))


def test_a_test_set_whose_labels_are_all_minus_one_is_unlabeled(tmp_path):
    write_parquet(tmp_path / "a.parquet", range(3), labels=[-1, -1, -1])
    source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
    assert source.classes == ()
    assert source[1]["label"] == -1


def test_parquet_files_that_are_no_images_are_refused(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has 0 columns of images.* - columns: text \(string\), n \(int64\)"):
        make_source("parquet", path=str(tmp_path))
    pq.write_table(pa.table({"one": [b"a"], "two": [b"b"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has 2 columns of images, and none named image or img"):
        make_source("parquet", path=str(tmp_path))
    write_parquet(tmp_path / "a.parquet", [1])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(1), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has 0 images"):
        make_source("parquet", path=str(tmp_path))
    write_parquet(tmp_path / "a.parquet", [1, 2])
    write_parquet(tmp_path / "b.parquet", [1, 2], names=("x", "y", "z"))
    with pytest.raises(DataError, match=r"b\.parquet has other classes than .*a\.parquet"):
        make_source("parquet", path=str(tmp_path))
    pq.write_table(pa.table({"jpg": [b"a"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b\.parquet has other columns than .*a\.parquet"):
        make_source("parquet", path=str(tmp_path))


def test_damaged_parquet_is_told_or_is_a_bad_image(tmp_path):
    whole = Path(write_parquet(tmp_path / "a.parquet", range(40), group=4)).read_bytes()
    rng, told, bad = random.Random(0), 0, 0
    for damage in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], whole[4:]):
        (tmp_path / "a.parquet").write_bytes(damage)
        with pytest.raises(DataError, match=r"a\.parquet is no whole Parquet file"):
            make_source("parquet", path=str(tmp_path))
    for _ in range(40):
        start = rng.randrange(len(whole) - 8)
        (tmp_path / "a.parquet").write_bytes(whole[:start] + rng.randbytes(6) + whole[start + 6 :])
        try:
            source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
        except UserError:
            told += 1
            continue
        for i in range(0, len(source), 4):
            try:
                assert source[i]["name"] == source.name(i)
            except (BadImage, OSError):
                bad += 1
    assert told + bad > 0


def test_row_groups_are_kept_within_bounds_and_threads_read_them_right(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", range(100), group=5)
    write_parquet(tmp_path / "b.parquet", range(100, 200), group=7)
    monkeypatch.setattr(parquet_module, "KEPT", 3000)
    source = make_source("parquet", path=str(tmp_path), heldout_fraction=0.0)
    errors, rng = [], np.random.default_rng(0)

    def read(order):
        errors.extend(i for i in order if shade_of(source[int(i)]) != i)
        errors.extend([source.kept_bytes] if source.kept_bytes > 3000 else [])

    threads = [threading.Thread(target=read, args=(rng.integers(0, 200, 100),)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert 1 <= len(source.kept) < 20


def test_large_row_groups_are_warned_of_once(tmp_path, caplog):
    write_parquet(tmp_path / "a.parquet", [1] * 201, group=201)
    make_source("parquet", path=str(tmp_path))
    assert len(caplog.records) == 1
    assert "has 201 images" in caplog.text
    assert "simmim_jax.tools.prepare" in caplog.text
    caplog.clear()
    write_parquet(tmp_path / "a.parquet", [1] * 201, group=100)
    make_source("parquet", path=str(tmp_path))
    assert not caplog.records


# --- ArrayRecord


def test_prepared_shards_are_read_with_the_names_that_images_had(tmp_path):
    write_prepared(tmp_path / "train", [1, 2], [3], [4, 5, 6])
    write_prepared(tmp_path / "validation", [7, 8])
    source = make_source("auto", path=str(tmp_path))
    assert names(source) == [f"x/{shade}.png" for shade in range(1, 7)]
    assert shades_of(source) == list(range(1, 7))
    assert [source[i]["label"] for i in range(6)] == [1, 2, 0, 1, 2, 0]
    assert source.classes == ("a", "b", "c")
    assert shades_of(make_source("auto", path=str(tmp_path), split="test")) == [7, 8]
    assert shades_of(make_source("auto", path=str(tmp_path / "train"), heldout_fraction=0.0)) == list(range(1, 7))


def test_no_prepared_shard_is_opened_before_it_is_read(tmp_path, monkeypatch):
    write_prepared(tmp_path, [1, 2], [3, 4])
    (tmp_path / "part-00001-of-00002.array_record").write_bytes(
        bytes((tmp_path / "part-00001-of-00002.array_record").stat().st_size)
    )
    source = make_source("array_record", path=str(tmp_path), heldout_fraction=0.0)
    assert len(source) == 4
    assert shade_of(source[1]) == 2
    with pytest.raises(DataError, match=r"part-00001-of-00002\.array_record is truncated or damaged"):
        source[2]


def test_images_of_other_channels_are_arrays(tmp_path):
    source = make_source("auto", path=write_prepared(tmp_path, [1, 2], channels=4), heldout_fraction=0.0)
    assert source[1]["image"].shape == (2, 3, 4)
    assert source[1]["image"].dtype == np.uint8
    assert (source[1]["image"] == 2).all()


def test_prepared_folders_that_are_not_whole_are_refused_at_once(tmp_path):
    write_prepared(tmp_path, [1, 2], [3])
    shard = tmp_path / "part-00001-of-00002.array_record"
    data, manifest = shard.read_bytes(), json.loads((tmp_path / "manifest.json").read_text())
    shard.write_bytes(data[:-1])
    with pytest.raises(DataError, match=r"part-00001-of-00002\.array_record has \d+ bytes.*simmim_jax\.tools\.prepare"):
        make_source("array_record", path=str(tmp_path))
    shard.unlink()
    with pytest.raises(DataError, match=r"part-00001-of-00002\.array_record is missing.*simmim_jax\.tools\.prepare"):
        make_source("array_record", path=str(tmp_path))
    shard.write_bytes(data)
    for change, says in [
        ({"version": 2}, r"has version 2, and this program knows 1"),
        ({"count": 5}, r"manifest\.json is damaged"),
        ({"classes": None}, r"manifest\.json is damaged"),
        (
            {"shards": [{"file": "../x.array_record", "count": 3, "bytes": 1, "sha256": ""}]},
            r"manifest\.json is damaged",
        ),
        ({"shards": [], "count": 0}, r"has 0 images"),
    ]:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | change))
        with pytest.raises(DataError, match=says):
            make_source("array_record", path=str(tmp_path))
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
        make_source("array_record", path=str(tmp_path))
    (tmp_path / "manifest.json").unlink()
    with pytest.raises(DataError, match=r"is unfinished: it has no manifest\.json"):
        make_source("auto", path=str(tmp_path))


def test_a_damaged_record_is_a_bad_image_and_the_others_are_read(tmp_path):
    write_prepared(tmp_path, list(range(30)))
    shard = tmp_path / "part-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    at = data.index(png(17)) + 20
    data[at : at + 4] = b"oops"
    shard.write_bytes(data)
    source = make_source("array_record", path=str(tmp_path), heldout_fraction=0.0)
    with pytest.raises(BadImage, match="mismatch"):
        source[17]
    assert source.name(17) == "part-00000-of-00001.array_record/17"
    assert [shade_of(source[i]) for i in range(30) if i != 17] == [i for i in range(30) if i != 17]


def test_records_that_are_anybodys_are_bad_images(tmp_path):
    record = {"image": b"x", "label": 0, "name": "x"}
    bad = [
        b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"image": b"x"}), msgpack.packb(record | {"label": 3}),
        msgpack.packb(record | {"label": "a"}), msgpack.packb(record | {"image": "text"}), msgpack.packb(record)[:-1],
        msgpack.packb(record | {"shape": [2, 2, 9]}), msgpack.packb(record | {"shape": "x"}), b"\x91" * 10_000,
    ]  # fmt: skip
    write_prepared(tmp_path, list(range(len(bad))))
    shard = Path(write_records(tmp_path / "part-00000-of-00001.array_record", bad))
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = shard.stat().st_size
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    source = make_source("array_record", path=str(tmp_path), heldout_fraction=0.0)
    for i in range(len(bad)):
        with pytest.raises(BadImage, match="its record"):
            source[i]


def test_shards_of_others_are_images_or_examples(tmp_path, tfds_dir):
    write_records(tmp_path / "images" / "0.arrayrecord", [png(1), png(2)])
    source = make_source("auto", path=str(tmp_path / "images"), heldout_fraction=0.0)
    assert shades_of(source) == [1, 2]
    assert source[1]["name"] == source.name(1) == "0.arrayrecord/1"
    assert source[1]["label"] == -1

    records = []
    for shade in (3, 4):
        example = tf_example_pb2.Example()
        example.features.feature["image/encoded"].bytes_list.value.append(png(shade))
        example.features.feature["image/class/label"].int64_list.value.append(shade)
        records.append(example.SerializeToString())
    records += [b"\xff\xff", tf_example_pb2.Example().SerializeToString()]
    write_records(tmp_path / "examples" / "0.array_record", records)
    source = make_source("auto", path=str(tmp_path / "examples"), heldout_fraction=0.0)
    assert [(shade_of(source[i]), source[i]["label"]) for i in (0, 1)] == [(3, 3), (4, 4)]
    for i in (2, 3):
        with pytest.raises(BadImage, match="no encoded image"):
            source[i]
    # the shards of TFDS alone, without what it says of them
    for file in Path(tfds_dir).rglob("*train*array_record*"):
        (tmp_path / "of_tfds").mkdir(exist_ok=True)
        shutil.copy(file, tmp_path / "of_tfds" / "train.array_record")
    source = make_source("array_record", path=str(tmp_path / "of_tfds"), heldout_fraction=0.0)
    assert len(source) == 8
    assert source[3]["label"] == 1


def test_shards_of_others_that_are_no_images_are_refused(tmp_path):
    write_records(tmp_path / "0.array_record", [b"\xff\xff words"])
    with pytest.raises(DataError, match=r"the first record has no image - it is no tf\.train\.Example either"):
        make_source("array_record", path=str(tmp_path))
    example = tf_example_pb2.Example()
    example.features.feature["text"].bytes_list.value.append(b"words")
    write_records(tmp_path / "0.array_record", [example.SerializeToString()])
    with pytest.raises(DataError, match=r"the first record has no image - features: text"):
        make_source("array_record", path=str(tmp_path))
    write_records(tmp_path / "0.array_record", [])
    with pytest.raises(DataError, match="has 0 images"):
        make_source("array_record", path=str(tmp_path))
    for data in (b"", b"x" * 100, os.urandom(200_000)):
        (tmp_path / "0.array_record").write_bytes(data)
        with pytest.raises(DataError, match=r"0\.array_record is truncated or damaged"):
            make_source("array_record", path=str(tmp_path))


def test_records_in_groups_are_warned_of(tmp_path, caplog):
    write_records(tmp_path / "0.array_record", [png(1), png(2)], options="group_size:10")
    assert shades_of(make_source("array_record", path=str(tmp_path), heldout_fraction=0.0)) == [1, 2]
    assert "in groups" in caplog.text


def test_array_records_are_read_right_by_many_threads(tmp_path):
    path = write_prepared(tmp_path, *(list(range(k, k + 20)) for k in range(0, 200, 20)))
    source = make_source("array_record", path=path, heldout_fraction=0.0)
    errors, rng = [], np.random.default_rng(0)

    def read(order):
        errors.extend(i for i in order if shade_of(source[int(i)]) != i)

    threads = [threading.Thread(target=read, args=(rng.integers(0, 200, 200),)) for _ in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors


# --- many names


@pytest.mark.parametrize("limit", [0, 100, 2**20])
def test_names_are_the_same_in_memory_and_on_disk(limit, tmp_path, monkeypatch):
    monkeypatch.setattr(names_module, "LIMIT", limit)
    monkeypatch.setattr(names_module, "CHUNK", 7)
    expected = [f"{i}é\n{'x' * (i % 5)}" for i in range(100)] + [os.fsdecode(b"\xff\xfe")]
    made = names_module.Names(expected)
    keep = np.arange(101) % 3 == 0
    again = pickle.loads(pickle.dumps(made))
    for each in (made, again, pickle.loads(pickle.dumps(again))):
        assert list(each) == [each[i] for i in range(101)] == expected
        assert list(each.take(keep)) == expected[::3]
        assert each.digest() == made.digest()
    whole = b"".join(map(os.fsencode, expected))
    ends = np.cumsum([len(os.fsencode(name)) for name in expected], dtype=np.int64)
    assert made.digest() == hashlib.sha256(whole + ends.tobytes()).hexdigest()  # as it always was
    assert list(names_module.Names([])) == []


def test_an_index_on_disk_leaves_no_file_behind_and_travels_to_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(names_module, "LIMIT", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    write(tmp_path / "images", *(f"{i}.png" for i in range(100)))
    source = folder(tmp_path / "images", heldout_fraction=0.0)
    assert os.listdir(tmp_path / "temporary") == []
    program = (
        "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s.name(99), len(s), len(s[50]['image']) > 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(source), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["99.png", "100", "True"]
    state = source.names.ends.__getstate__()
    with pytest.raises(DataError, match="the index of the images is gone"):
        names_module.Column.__new__(names_module.Column).__setstate__(state | {"path": "/proc/1/fd/99999"})


def test_a_full_disk_is_told_with_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(names_module, "LIMIT", 10)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match=r"index of the images cannot be written.*set TMPDIR"):
        names_module.Names(str(i) for i in range(100))


@pytest.mark.parametrize("part", [1, 2, 7, 1000])
def test_a_folder_is_in_the_order_of_its_names_however_it_is_walked(part, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "PART", part)
    rng = random.Random(part)
    letters = ["a", "A", "-", ".b", "0", "é", "猫", "\n", "!", "z", os.fsdecode(b"\xff"), "\ue000"]
    files = set()
    for _ in range(60):
        folders = ["a" + "".join(rng.choices(letters, k=rng.randrange(3))) for _ in range(rng.randrange(4))]
        files.add("/".join([*folders, "a" + "".join(rng.choices(letters, k=2)) + ".png"]))
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).touch()
    assert names(folder(tmp_path / "x", heldout_fraction=0.0)) == sorted(files)


def test_of_two_links_to_a_directory_the_first_by_name_is_taken_as_ever(tmp_path):
    write(tmp_path / "far", "1.png", "sub/2.png")
    root = tmp_path / "root"
    write(root, "m/0.png")
    (root / "a-b").symlink_to(tmp_path / "far")
    (root / "a").symlink_to(tmp_path / "far" / "sub")
    (root / "m" / "again").symlink_to(tmp_path / "far")
    assert names(folder(root, heldout_fraction=0.0)) == ["a-b/1.png", "a/2.png", "m/0.png"]


def test_a_prepare_that_is_not_at_its_end_is_no_data(tmp_path):
    write(tmp_path, "train/1.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".prepare.json").write_text("{}")
    for source in ("auto", "array_record"):
        with pytest.raises(DataError, match=r"/val is not prepared to its end - data\.path - run the same"):
            make_source(source, path=str(tmp_path))


def test_a_list_of_classes_whose_names_begin_with_digits_is_taken(tmp_path):
    write(tmp_path, "1.png", "2.png")
    (tmp_path / "list.txt").write_text("1.png 002.Laysan_Albatross\n2.png 001.Black_footed_Albatross\n")
    source = make_source("list", path=str(tmp_path / "list.txt"), heldout_fraction=0.0)
    assert source.classes == ("001.Black_footed_Albatross", "002.Laysan_Albatross")
    assert [source[i]["label"] for i in range(2)] == [1, 0]


def test_opening_a_tfds_data_set_in_several_threads_silences_nobody_for_good(tfds_dir, caplog):
    def open_one(_):
        return make_source("tfds", name="tiny_shades", data_dir=tfds_dir)[0]["label"]

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(open_one, range(32))) == {
            make_source("tfds", name="tiny_shades", data_dir=tfds_dir)[0]["label"]
        }
    assert not caplog.records
    absl.logging.warning("still heard")
    assert [record.message for record in caplog.records] == ["still heard"]
