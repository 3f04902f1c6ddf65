"""What lies where: splits that never share an image, errors that say what to do, and nothing that hangs."""

import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_tfds import CLASSES, TinyShades

from simmim_jax.data import make_source
from simmim_jax.errors import ConfigError, DataError


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


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    TinyShades(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


# --- every source


@pytest.mark.parametrize("kind", ["digits", "folder", "tfds"])
def test_a_source_gives_the_same_records_after_pickling(kind, tmp_path, tfds_dir):
    write(tmp_path, "a/1.png", "b/2.png", "b/3.png")
    source = make_source(kind, path=str(tmp_path), name="tiny_shades", data_dir=tfds_dir, heldout_fraction=0.0)
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
    with pytest.raises(ConfigError, match=r"unknown source 'digit'.*did you mean digits.*digits, folder, tfds"):
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


def test_a_folder_by_class_is_labelled_by_its_first_directories_in_the_order_of_names(tmp_path):
    write(tmp_path, "dog/b.PNG", "dog/deep/er/a.jpeg", "cat/x y é 猫.png", "cat/Z.JPG")
    source = folder(tmp_path, heldout_fraction=0.0)
    assert names(source) == ["cat/Z.JPG", "cat/x y é 猫.png", "dog/b.PNG", "dog/deep/er/a.jpeg"]
    assert source.classes == ("cat", "dog")
    assert [source[i]["label"] for i in range(4)] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["a/1.png", "b/2.png", "3.png"], ["images/1.png", "images/2.png"]]
)
def test_a_folder_that_is_not_all_by_class_is_unlabelled(files, tmp_path):
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


# --- TFDS


def test_tfds_is_read_as_it_was_written_without_tensorflow(tfds_dir):
    program = f"""
import sys
from simmim_jax.data import make_source
from simmim_jax.data.decode import decode
source = make_source("tfds", name="tiny_shades", data_dir={tfds_dir!r})
record = source[3]
print(len(source), source.classes, record["label"], record["name"], decode(record["image"], 3).size)
assert "tensorflow" not in sys.modules and "tiny_tfds" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"8 {CLASSES} 1 tiny_shades/1.0.0/train/3 (5, 6)\n"
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
