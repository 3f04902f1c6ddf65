"""Sources: the laws that hold for every one, detection of the kind, splits, and what is held out."""

import gzip
import hashlib
import json
import os
import pickle
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
from source_files import (
    EXTENSIONS,
    SHARDED,
    everything,
    labels,
    names,
    samples,
    shades,
    write_images,
    write_source,
    write_split,
    write_tar,
)
from tiny_tfds import TinyShades

from simmim_jax.data import SOURCES, make_source, share_images
from simmim_jax.data.sources import Source, files
from simmim_jax.data.sources.parts import Part
from simmim_jax.data.sources.splits import _expand_braces
from simmim_jax.errors import ConfigError, DataError

FILES = ["folder", *SHARDED, "auto"]  # sources that read `path`


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def make(kind: str, root: Path, split="train", count=7):
    """A source of each kind. A new entry of SOURCES that reads `path` needs a form in `source_files.write_source`."""
    if kind not in (*FILES, "tfds"):
        return make_source(kind, split=split)
    if kind == "tfds":
        if not root.exists():
            TinyShades(data_dir=str(root), file_format="array_record").download_and_prepare()
        return make_source("tfds", name="tiny_shades", data_dir=str(root), split="test" if split == "val" else split)
    form = "tar" if kind == "auto" else kind
    path = root / ("all.txt" if form == "list" else "")
    path = str(path) if root.exists() else write_source(form, root, range(count))
    return make_source(kind, path=path, split=split, heldout_fraction=0.3)


# --- laws


@pytest.fixture(scope="module", params=list(SOURCES))
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def source(kind, tmp_path_factory):
    return make(kind, tmp_path_factory.mktemp("source") / kind)


def test_source_follows_the_protocol(source):
    assert isinstance(source, Source)
    assert isinstance(source.classes, tuple)
    assert str(len(source)) in source.describe()
    with pytest.raises(IndexError):
        source[len(source)]


def test_records_have_image_label_and_the_name_of_their_index(source):
    for i in range(min(len(source), 20)):
        record = source[i]
        assert set(record) == {"image", "label", "name"}
        assert isinstance(record["image"], bytes) or record["image"].dtype == np.uint8
        assert 0 <= record["label"] < len(source.classes) if source.classes else record["label"] == -1
        assert record["name"] == source.name(i)


def test_pickled_source_reads_the_same_records_in_many_threads(source):
    source[0]  # opens files
    copy, found = pickle.loads(pickle.dumps(source)), {}
    assert (len(copy), copy.classes) == (len(source), source.classes)
    assert copy.fingerprint() == source.fingerprint()
    orders = [np.random.default_rng(seed).permutation(min(len(source), 20)).tolist() for seed in range(4)]
    threads = [threading.Thread(target=lambda o=o: found.update({i: copy[i] for i in o})) for o in orders]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for i in orders[0]:
        assert np.array_equal(found[i]["image"], source[i]["image"])
        assert (found[i]["label"], found[i]["name"]) == (source[i]["label"], source[i]["name"])


def test_fingerprint_is_json_is_repeatable_and_differs_between_splits(kind, tmp_path):
    first, again, other = (make(kind, tmp_path / "data", split) for split in ("train", "train", "val"))
    assert names(first) == names(again)
    assert first.fingerprint() == again.fingerprint() == json.loads(json.dumps(first.fingerprint()))
    assert first.fingerprint() != other.fingerprint()
    assert share_images(first, again)
    assert not share_images(first, other)


@pytest.mark.parametrize("kind", FILES)
def test_moved_data_keeps_its_fingerprint_and_changed_data_does_not(kind, tmp_path):
    before = make(kind, tmp_path / "one").fingerprint()
    (tmp_path / "one").rename(tmp_path / "two")
    assert make(kind, tmp_path / "two").fingerprint() == before
    form = "tar" if kind == "auto" else kind
    found = [before]
    for name, numbers in {"other": [*range(6), 9], "more": range(8)}.items():
        write_source(form, tmp_path / name, numbers)
        found.append(make(kind, tmp_path / name).fingerprint())
    if kind != "folder":  # which is sorted by name
        write_source(form, tmp_path / "order", [1, 0, *range(2, 7)])
        found.append(make(kind, tmp_path / "order").fingerprint())
    assert len({json.dumps(each) for each in found}) == len(found)


@pytest.mark.parametrize("kind", FILES)
def test_held_out_part_and_training_part_are_a_partition(kind, tmp_path):
    train, held_out = (make(kind, tmp_path / "data", split, count=11) for split in ("train", "val"))
    assert sorted(shades(train) + shades(held_out)) == list(range(11))
    assert len(held_out) > 0
    assert train.classes == held_out.classes


@pytest.mark.parametrize("kind", [kind for kind in FILES if kind != "auto"])
def test_missing_or_empty_path_is_reported(kind, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"data\.path"):
        make_source(kind)
    for name in ("empty", "nowhere"):
        with pytest.raises(DataError, match=str(tmp_path / name)):
            make_source(kind, path=str(tmp_path / name))


@pytest.mark.parametrize("kind", SHARDED[1:])
def test_more_shards_are_read_than_may_be_open(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_OPEN", 3)
    for number in range(9):
        write_split(kind, tmp_path, "{split}.{extension}", f"{number}", [number])
    source, before = everything(kind, tmp_path), len(os.listdir("/proc/self/fd"))
    assert shades(source) == list(range(9))
    assert len(os.listdir("/proc/self/fd")) <= before + 16


def test_unknown_source_and_bad_fraction_are_refused():
    with pytest.raises(ConfigError, match=r"'digit'.*mean digits.*array_record, auto, digits"):
        make_source("digit")
    for fraction in (-0.1, 1.0):
        with pytest.raises(ConfigError, match="heldout_fraction"):
            make_source("digits", heldout_fraction=fraction)


def test_digits_have_a_fixed_split_with_every_class_on_both_sides():
    train, test = make_source("digits"), make_source("digits", split="val")
    assert (len(train), len(test)) == (1437, 360)
    assert not set(names(train)) & set(names(test))
    for source in (train, test):
        assert min(np.bincount(source.labels, minlength=10)) > len(source) / 16
        assert (source[0]["image"].shape, source.images.max()) == ((8, 8, 1), 255)
    order = np.concatenate([train.order, test.order]).astype("<i8")
    assert hashlib.sha256(order.tobytes()).hexdigest()[:16] == "7f71e362ae545c77"
    with pytest.raises(ConfigError, match="'dev'"):
        make_source("digits", split="dev")


# --- detection


@pytest.mark.parametrize("kind", ["folder", *SHARDED])
def test_auto_detects_the_kind_of_a_path(kind, tmp_path):
    path = write_source(kind, tmp_path / "data", range(7))
    assert everything("auto", path).fingerprint() == everything(kind, path).fingerprint()
    if kind != "list":
        for split, count in (("train", 5), ("test", 4)):
            write_source(kind, tmp_path / "split" / split, range(count))
        for path in (tmp_path / "split", tmp_path / "split" / "{split}"):
            assert [len(make_source("auto", path=str(path), split=split)) for split in ("train", "val")] == [5, 4]


def test_auto_prefers_images_to_archives_next_to_them(tmp_path):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png")
    write_tar(tmp_path / "train_images.tar", samples(1))
    (tmp_path / "train" / "manifest.json").write_text('{"name": "a web page"}')
    (tmp_path / "train" / "a" / "notes.parquet").touch()
    assert names(make_source("auto", path=str(tmp_path))) == ["a/1.png", "b/2.png"]
    assert names(make_source("auto", path=str(tmp_path), split="val")) == ["a/3.png"]


def test_auto_warns_of_lists_next_to_their_images(tmp_path, caplog):
    write_images(tmp_path, "images/1.png", "images/2.png", "images/3.png")
    (tmp_path / "classes.txt").write_text("cat\n")
    make_source("auto", path=str(tmp_path))
    assert not caplog.records
    for split, n in (("train", 1), ("val", 2)):
        (tmp_path / f"{split}_map.txt").write_text(f"images/{n}.png\t0\n")
    for split in ("train", "val"):
        make_source("auto", path=str(tmp_path), split=split)
    assert len(caplog.records) == 1
    template = caplog.text.strip().rpartition("set data.path=")[2].rstrip(")")
    assert names(make_source("auto", path=template)) == ["images/1.png"]
    assert names(make_source("auto", path=template, split="val")) == ["images/2.png"]


def test_path_without_a_source_is_reported_with_the_nearest(tmp_path):
    with pytest.raises(ConfigError, match=r"data\.path and data\.name"):
        make_source("auto")
    write_tar(tmp_path / "shard.tar", samples(1))
    (tmp_path / "a.tfrecord").touch()
    for name, says in {
        "shad.tar": r"did you mean .*/shard\.tar", "shad": "did you mean", "a.tfrecord": r"\.parquet",
        "shard{,-1}.tar": r"1 files are missing.*-1\.tar",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=says):
            make_source("auto", path=str(tmp_path / name))


@pytest.mark.parametrize(
    ("given", "command"), [("a b.tar.gz", "gunzip"), ("a b.tgz", "gunzip"), ("a*.tar.zst", "zstd -d"), ("", "gunzip")]
)
def test_compressed_tar_is_refused_with_the_command_to_decompress_it(given, command, tmp_path):
    name = (given or "a b.tar.gz").replace("*", " b")
    (tmp_path / name).write_bytes(gzip.compress(b"x"))
    for kind in ("tar", "auto") if " " in given else ("tar",):
        with pytest.raises(DataError, match=rf"{command} '.*/{name}'"):
            make_source(kind, path=str(tmp_path / given))


# --- files of a split


@pytest.mark.parametrize(
    ("pattern", "count"),
    [("s-{000..002}.tar", 9), ("s-{000,002}.tar", 6), ("s-*.tar", 9), ("s-00[12].tar", 6), ("{s,t}-000.tar", 6)],
)
def test_wildcards_and_braces_select_shards_in_order(pattern, count, tmp_path):
    root = tmp_path / "[y] z{1,2}" / "a*"  # names with brackets are not patterns
    for number, name in enumerate(["s-000", "s-001", "s-002", "t-000"]):
        write_tar(root / f"{name}.tar", samples(*range(3 * number, 3 * number + 3)))
    source = everything("auto", root / pattern)
    assert len(source) == count
    assert shades(source) == sorted(shades(source))


def test_braces_expand_as_in_bash():
    assert _expand_braces("a{08..11}b") == ["a08b", "a09b", "a10b", "a11b"]
    assert _expand_braces("{1..3}{x,y}") == ["1x", "1y", "2x", "2y", "3x", "3y"]
    assert _expand_braces("{9..11}") == ["9", "10", "11"]
    assert _expand_braces("{3..1}") == ["3", "2", "1"]
    assert _expand_braces("a{}b{c}") == ["a{}b{c}"]
    for bomb in ("{0..99999999999999}", "{0..9999}{0..9999}", "{a,b}" * 40):
        with pytest.raises(ConfigError, match=r"names .* files"):
            _expand_braces(bomb)


LAYOUTS = ["{split}_map.{extension}", "set-{split}-00000.{extension}", "{split}.{extension}", "{split}/0.{extension}"]
PAIRS = list(zip(SHARDED, LAYOUTS, strict=True))  # the rules for files are the same for all kinds


@pytest.mark.parametrize(("kind", "layout"), [*PAIRS, ("tar", LAYOUTS[3]), ("list", LAYOUTS[3])])
def test_split_is_found_by_folder_or_by_word(kind, layout, tmp_path):
    write_split(kind, tmp_path, layout, "train", range(5))
    write_split(kind, tmp_path, layout, "validation", range(100, 104))
    paths = [tmp_path, tmp_path / layout.replace("{extension}", EXTENSIONS[kind])]
    paths += [tmp_path / f"set-*.{EXTENSIONS[kind]}"] if layout.startswith("set") else []
    for path in paths:
        found = [shades(make_source(kind, path=str(path), split=split)) for split in ("train", "val", "test")]
        assert found == [list(range(5)), list(range(100, 104)), list(range(100, 104))]


@pytest.mark.parametrize(("kind", "layout"), [*PAIRS, ("tar", "data/{split}-0.{extension}")])
def test_evaluation_files_are_never_trained_on(kind, layout, tmp_path):
    write_split(kind, tmp_path, layout, "val", range(4))
    with pytest.raises(DataError, match="has val but no train"):
        make_source(kind, path=str(tmp_path))
    assert shades(make_source(kind, path=str(tmp_path), split="test")) == list(range(4))
    write_split(kind, tmp_path, "both_train_val.{extension}", "", range(4))
    with pytest.raises(DataError, match="train and val"):
        make_source(kind, path=str(tmp_path))


@pytest.mark.parametrize(("kind", "layout"), PAIRS)
def test_every_tenth_record_is_held_out_of_training_files(kind, layout, tmp_path):
    write_split(kind, tmp_path, layout, "train", range(20))
    write_split(kind, tmp_path, layout, "extra", range(100, 104))
    for path in (tmp_path, tmp_path / layout.replace("{extension}", EXTENSIONS[kind])):
        train, held_out, extra = (
            shades(make_source(kind, path=str(path), split=s)) for s in ("train", "test", "extra")
        )
        assert held_out == [0, 10]
        assert train == [shade for shade in range(20) if shade % 10]
        assert extra == list(range(100, 104))


@pytest.mark.parametrize(
    ("kind", "train", "evaluation"),
    [("list", "train0", "val0"), ("tar", "trainset-0", "testset-0"), ("parquet", "training", "x-testing")],
)
def test_files_that_look_like_both_sides_are_refused(kind, train, evaluation, tmp_path):
    for split in (train, evaluation):
        write_split(kind, tmp_path, "{split}.{extension}", split, range(3))
    for path in (tmp_path, tmp_path / "*"):
        for split in ("train", "val"):
            with pytest.raises(DataError, match=rf"{train}\.\w+ and {evaluation}\.\w+"):
                make_source(kind, path=str(path), split=split)
    assert len(everything(kind, tmp_path / f"{train}.*")) == 3
    for name in ("set-train.tar", "set-train-val.tar"):
        write_tar(tmp_path / name, samples(1))
    with pytest.raises(DataError, match=r"set-train-val\.tar belongs to train and to val"):
        make_source("tar", path=str(tmp_path / "set-*{split}*.tar"))


def test_case_of_a_split_does_not_matter_and_words_are_whole(tmp_path):
    write_split("tar", tmp_path / "case", "{split}/0.{extension}", "Train", range(3))
    write_split("tar", tmp_path / "case", "{split}/0.{extension}", "Test", range(10, 13))
    for path in (tmp_path / "case", tmp_path / "case" / "{split}"):
        assert shades(make_source("auto", path=str(path))) == [0, 1, 2]
        assert shades(make_source("auto", path=str(path), split="val")) == [10, 11, 12]
    for split in ("training", "unlabeled", "x2train"):
        write_split("tar", tmp_path / "words", "{split}.{extension}", split, range(5))
    assert len(make_source("tar", path=str(tmp_path / "words"), split="unlabeled")) == 5
    assert len(everything("tar", tmp_path / "words")) == 15
    with pytest.raises(ConfigError, match="has no 'labeled'"):
        make_source("tar", path=str(tmp_path / "words"), split="labeled")


def test_unread_shards_are_warned_of(tmp_path, caplog):
    def read() -> str:
        caplog.clear()
        assert [len(make_source("tar", path=str(tmp_path), split=split)) for split in ("train", "val")] == [18, 2]
        assert len(caplog.records) < 2
        return caplog.text

    write_split("tar", tmp_path, "{split}.{extension}", "a", range(20))
    assert not read()
    write_split("tar", tmp_path / "more", "{split}.{extension}", "b", range(3))
    assert f"set data.path={tmp_path}/**/*.tar" in read()
    assert len(everything("tar", f"{tmp_path}/**/*.tar")) == 23
    shutil.rmtree(tmp_path / "more")
    (tmp_path / "val").mkdir()
    assert "folders without .tar files (val/" in read()
    (tmp_path / "val").rmdir()
    (tmp_path / "b.tar.gz").touch()
    assert "archives (b.tar.gz" in read()


# --- the held-out part of any size


@pytest.mark.parametrize("fraction", [0.3, 0.5, 2 / 3, 0.99])
def test_held_out_fraction_is_as_requested(fraction, tmp_path):
    (tmp_path / "all.txt").write_text("".join(f"{i}.png\n" for i in range(300)))
    write_images(tmp_path, "0.png")
    path = str(tmp_path / "all.txt")
    train, held_out = (make_source("list", path=path, split=s, heldout_fraction=fraction) for s in ("train", "val"))
    exact = fraction if fraction >= 0.5 else 1 / round(1 / fraction)
    assert abs(len(held_out) - 300 * exact) < 1
    assert sorted(names(train) + names(held_out)) == sorted(f"{i}.png" for i in range(300))
    assert names(train) == sorted(names(train), key=lambda name: int(name[:-4]))
    with pytest.raises(IndexError):
        train.name(len(train))


def test_held_out_part_is_a_partition_for_any_count():
    class Numbers(list):
        path, split, classes = "x", "train", ()

        def __getitem__(self, i):
            return {"label": super().__getitem__(i)}

    for count in (1, 2, 5, 20, 21, 99):
        for every in (1, 2, 3, 7, 50, 1000):
            held_out, rest = (
                labels(part) for part in (Part(Numbers(range(count)), every, held_out) for held_out in (True, False))
            )
            assert sorted(held_out + rest) == list(range(count))
            assert len(held_out) == (0 if count == 1 else -(-count // every))


def test_empty_part_is_refused(tmp_path):
    path = write_source("tar", tmp_path, range(5))
    for split, fraction in (("val", 0.0), ("train", 0.9)):
        with pytest.raises(DataError, match=rf"0 of its 5 images in split '{split}'.*{fraction}"):
            make_source("tar", path=path, split=split, heldout_fraction=fraction)
