"""Folders of images: classes, splits, links, and the order of names."""

import os
import pickle
import random
import shutil

import pytest
from source_files import EXTENSIONS, everything, labels, names, write_images, write_split

from simmim_jax.data import decode, make_source, share_images
from simmim_jax.data.sources import folder as folder_module
from simmim_jax.data.sources.classes import order_classes
from simmim_jax.errors import ConfigError, DataError, warn_once


@pytest.fixture(autouse=True)
def _log_again():
    warn_once.cache_clear()


def folder(path, split="train", **options):
    return make_source("folder", path=str(path), split=split, **options)


# --- names and classes


def test_class_is_the_first_directory_in_the_order_of_names(tmp_path):
    write_images(tmp_path, "dog/b.PNG", "dog/deep/er/a.jpeg", "cat/x y é 猫.png", "cat/Z.JPG")
    source = everything("folder", tmp_path)
    assert names(source) == ["cat/Z.JPG", "cat/x y é 猫.png", "dog/b.PNG", "dog/deep/er/a.jpeg"]
    assert source.classes == ("cat", "dog")
    assert labels(source) == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "files", [["1.png", "2.png"], ["a/1.png", "b/2.png", "3.png"], ["images/1.png", "images/2.png"]]
)
def test_folder_that_is_not_entirely_by_class_is_unlabeled(files, tmp_path):
    source = everything("folder", write_images(tmp_path, *files))
    assert names(source) == sorted(files)
    assert (source.classes, source[0]["label"]) == ((), -1)


def test_every_ending_of_a_supported_format_is_read(tmp_path):
    files = [f"{n}{ending}" for n, ending in enumerate(decode.EXTENSIONS)] + ["x.JFIF", "y.Jpe"]
    source = everything("folder", write_images(tmp_path, *files))
    assert names(source) == sorted(files)
    assert {".jpe", ".jfif"} < set(decode.EXTENSIONS)
    (tmp_path / "all.txt").write_text("".join(f"{name} 0\n" for name in files))
    assert names(everything("list", tmp_path / "all.txt")) == files


def test_hidden_files_and_other_files_are_skipped(tmp_path):
    write_images(tmp_path, "1.png", ".2.png", ".git/3.png", "._4.jpg", "x.jpg/5.png")  # a directory named x.jpg
    (tmp_path / "notes.txt").write_text("no image")
    os.mkfifo(tmp_path / "6.png")  # opening it would hang
    assert names(everything("folder", tmp_path)) == ["1.png", "x.jpg/5.png"]


def test_links_are_followed_once_and_broken_ones_are_warned_of_once(tmp_path, caplog):
    data = tmp_path / "data"
    write_images(data, "a/1.png", "b/2.png")
    write_images(tmp_path / "far", "3.png")
    (data / "c").symlink_to(tmp_path / "far")
    (data / "a" / "up").symlink_to(data)
    (data / "b" / "again").symlink_to(data / "a")
    (data / "b" / "live.png").symlink_to(tmp_path / "far" / "3.png")
    assert names(everything("folder", data)) == ["a/1.png", "b/2.png", "b/live.png", "c/3.png"]
    assert not caplog.records
    for name, target in {"self.png": "self.png", "self": "self", "b/broken.png": "nowhere.png"}.items():
        (data / name).symlink_to(data / target)
    for split in ("train", "val"):
        folder(data, split, heldout_fraction=0.5)
    assert names(everything("folder", data)) == ["a/1.png", "b/2.png", "b/live.png", "c/3.png"]
    assert len(caplog.records) == 1
    assert f"{data}: not read: 3 broken links" in caplog.text


def test_of_two_links_to_a_directory_the_first_by_name_is_used(tmp_path):
    write_images(tmp_path / "far", "1.png", "sub/2.png")
    root = tmp_path / "root"
    write_images(root, "m/0.png")
    (root / "a-b").symlink_to(tmp_path / "far")
    (root / "a").symlink_to(tmp_path / "far" / "sub")
    (root / "m" / "again").symlink_to(tmp_path / "far")
    assert names(everything("folder", root)) == ["a-b/1.png", "a/2.png", "m/0.png"]


@pytest.mark.parametrize("max_sorted", [1, 7, 1000])
def test_names_are_sorted_for_any_size_of_a_sorted_run(max_sorted, tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_SORTED", max_sorted)
    rng = random.Random(max_sorted)
    letters = ["a", "A", "-", ".b", "0", "é", "猫", "\n", "!", "z", os.fsdecode(b"\xff"), "\ue000"]
    files = set()
    for _ in range(60):
        directories = ["a" + "".join(rng.choices(letters, k=rng.randrange(3))) for _ in range(rng.randrange(4))]
        files.add("/".join([*directories, "a" + "".join(rng.choices(letters, k=2)) + ".png"]))
    for file in files:
        (tmp_path / "x" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "x" / file).touch()
    assert names(everything("folder", tmp_path / "x")) == sorted(files)


@pytest.mark.parametrize("count", [3, 90])
def test_fingerprint_depends_on_a_bounded_number_of_sizes_and_not_on_times(count, tmp_path, monkeypatch):
    monkeypatch.setattr("simmim_jax.data.sources.names.MAX_SIZES", 20)
    for i in range(count):
        (tmp_path / f"{i:04}.png").write_bytes(b"x" * i)
    source, calls, stat = everything("folder", tmp_path), [], os.stat
    with monkeypatch.context() as patch:
        patch.setattr("os.stat", lambda *args, **options: calls.append(args) or stat(*args, **options))
        before = source.fingerprint()
    assert len(calls) == min(count, 20)
    assert len(pickle.dumps(source)) < count * (len("0000.png") + 8) + 2000
    os.utime(tmp_path / "0000.png", (0, 0))
    assert source.fingerprint() == before
    for i in range(count):
        (tmp_path / f"{i:04}.png").write_bytes(b"y" * (count - i))
    assert everything("folder", tmp_path).fingerprint() != before


# --- splits


def test_held_out_images_never_change_sides(tmp_path):
    write_images(tmp_path, *(f"{label}/{i}.png" for label in "ab" for i in range(100)))
    train, held_out = folder(tmp_path), folder(tmp_path, "val")
    assert len(train) + len(held_out) == 200
    assert 8 <= len(held_out) <= 34  # 20 and 3.3 standard deviations
    assert train.classes == held_out.classes == ("a", "b")
    write_images(tmp_path, *(f"c/{i}.png" for i in range(100)))
    assert set(names(train)) < set(names(folder(tmp_path)))
    assert set(names(held_out)) < set(names(folder(tmp_path, "test")))
    assert set(names(held_out)) < set(names(folder(tmp_path, "val", heldout_fraction=0.2)))


def test_held_out_images_are_the_same_on_every_machine(tmp_path):
    write_images(tmp_path, *(f"train/{i}.png" for i in range(40)), "extra/x.png")
    assert names(folder(tmp_path, "val")) == ["0.png", "33.png", "6.png", "8.png"]
    assert len(folder(tmp_path)) == 36


@pytest.mark.parametrize(("name", "asked"), [("val", "test"), ("valid", "val"), ("Validation", "val"), ("TEST", "val")])
def test_evaluation_split_may_have_any_of_its_names(name, asked, tmp_path):
    write_images(tmp_path, "Train/a/1.png", "Train/b/2.png", f"{name}/b/3.png", f"{name}/c/4.png")
    for path in (tmp_path, tmp_path / "{split}"):
        for kind in ("auto", "folder"):
            train, evaluation = (make_source(kind, path=str(path), split=split) for split in ("train", asked))
            assert (names(train), names(evaluation)) == (["a/1.png", "b/2.png"], ["b/3.png", "c/4.png"])
            assert train.classes == evaluation.classes == ("a", "b", "c")
            assert labels(evaluation) == [1, 2]
    write_images(tmp_path, "train/a/5.png")  # the exact name has precedence
    assert names(folder(tmp_path)) == ["a/5.png"]


def test_each_existing_split_is_separate(tmp_path):
    write_images(tmp_path, "train/1.png", "val/2.png", "test/3.png", "unlabeled2017/4.png")
    splits = ("train", "val", "test", "unlabeled2017")
    assert [names(folder(tmp_path, split)) for split in splits] == [[f"{n}.png"] for n in (1, 2, 3, 4)]
    with pytest.raises(ConfigError, match="did you mean unlabeled2017"):
        folder(tmp_path, "unlabeled2018")


def test_split_may_be_inside_the_path(tmp_path):
    write_images(tmp_path, "x/train/images/1.png", "x/val/images/2.png", "x/extra/images/3.png")
    for kind in ("auto", "folder"):
        path = str(tmp_path / "x" / "{split}" / "images")
        found = [names(make_source(kind, path=path, split=split)) for split in ("train", "test", "extra")]
        assert found == [["1.png"], ["2.png"], ["3.png"]]
    with pytest.raises(DataError, match=r"/y/\{split\}"):
        folder(tmp_path / "y" / "{split}")
    shutil.rmtree(tmp_path / "x" / "train")
    for path in (tmp_path / "x", tmp_path / "x" / "{split}"):  # evaluation images are not trained on instead
        with pytest.raises(DataError, match="has val/ but no train/"):
            folder(path)


@pytest.mark.parametrize(
    ("train", "evaluation", "below"),
    [("train2017", "val2017", ""), ("training", "testing", "images"), ("Training", "valid", "x"),
     ("trainset", "testset", "x"), ("train-1", "eval", ""), ("train_images", "test_images", "images")],
)  # fmt: skip
def test_folders_that_look_like_both_sides_are_not_classes(train, evaluation, below, tmp_path):
    root = tmp_path / below
    write_images(root, f"{train}/1.png", f"{evaluation}/2.png")
    write_images(tmp_path, "other/3.png")
    for kind in ("auto", "folder"):
        with pytest.raises(DataError, match=rf"{evaluation}/"):
            make_source(kind, path=str(tmp_path))
        if evaluation != "valid":
            with pytest.raises(DataError, match=rf"point data\.path at .*{train}"):
                make_source(kind, path=str(tmp_path), split="val")
    assert names(everything("folder", root / train)) == ["1.png"]
    assert names(folder(root, train)) == ["1.png"]


@pytest.mark.parametrize("root", ["", "train"])
def test_splits_one_level_down_are_not_mixed(root, tmp_path):
    write_images(tmp_path / root, "cats/train/1.png", "cats/val/2.png", "dogs/train/3.png", "dogs/val/4.png")
    cats = tmp_path / root / "cats"
    with pytest.raises(DataError, match=rf"{cats} has train/ and val/.*point data\.path at {cats}"):
        folder(tmp_path)
    assert names(folder(cats)) == ["1.png"]


def test_classes_of_which_only_one_looks_like_a_split_are_classes(tmp_path):
    write_images(tmp_path, "testing/1.png", "training wheels/2.png", "cats/val/3.png", "dogs/train/4.png")
    assert everything("folder", tmp_path).classes == ("cats", "dogs", "testing", "training wheels")


# --- classes


def test_classes_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    write_images(tmp_path, *(f"{n}/1.png" for n in (0, 1, 2, 10, 11)))
    assert everything("folder", tmp_path).classes == ("0", "1", "2", "10", "11")
    assert order_classes(["10", "9", "-1", "0.5", "2.25"]) == ("-1", "0.5", "2.25", "9", "10")
    assert order_classes(["02", "2", "1"]) == ("1", "02", "2")
    assert order_classes(["10", "9", "9a"]) == ("10", "9", "9a")


def test_only_folder_is_no_class_but_its_folders_may_be(tmp_path):
    source = everything("folder", write_images(tmp_path, "PetImages/Cat/1.png", "PetImages/Dog/2.png"))
    assert source.classes == ()
    assert f"data.path={tmp_path}/PetImages" in source.unlabeled


@pytest.mark.parametrize("stray", ["figure.png", "z.JPG", "0.png"])
def test_stray_image_next_to_class_folders_is_named(stray, tmp_path, caplog):
    write_images(tmp_path, *(f"{label}/{n}.png" for label in ("cat", "dog") for n in range(5)), stray)
    source = everything("folder", tmp_path)
    assert (len(source), source.classes) == (11, ())
    assert stray in source.unlabeled
    assert len(caplog.records) == 1
    assert stray in caplog.text
    assert "cat/, dog/" in caplog.text


@pytest.mark.parametrize(
    "evaluation", [["val/images/1.png"], ["val/1.png"], ["val/images/x/1.png", "val/images/2.png"]]
)
def test_evaluation_folder_without_class_folders_is_unlabeled(evaluation, tmp_path, caplog):
    """Tiny ImageNet has its validation images in val/images/, and Kaggle has unlabeled ones in test/."""
    write_images(tmp_path, "train/n01/images/1.png", "train/n02/images/2.png", *evaluation)
    train, val = folder(tmp_path), folder(tmp_path, "val")
    assert (train.classes, val.classes) == (("n01", "n02"), ())
    assert labels(val) == [-1] * len(evaluation)
    assert "images without labels" in caplog.text
    write_images(tmp_path, "val/n02/3.png", "val/n01/4.png")
    if "val/1.png" not in evaluation:
        assert folder(tmp_path).classes == ("images", "n01", "n02")


def test_class_of_both_sides_may_be_alone_on_one(tmp_path, caplog):
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    val = folder(tmp_path, "val")
    assert (val.classes, labels(val)) == (("cat", "dog"), [1])
    assert not caplog.records


def test_class_of_another_split_that_renumbers_labels_changes_the_fingerprint(tmp_path):
    write_images(tmp_path, "train/cat/1.png", "train/dog/2.png", "val/dog/3.png")
    before = folder(tmp_path).fingerprint()
    write_images(tmp_path, "val/ant/4.png")
    assert folder(tmp_path).fingerprint() != before


# --- links that lead to the same images


@pytest.mark.parametrize("kind", ["folder", "one class", "files", "one file", "other name", "nothing"])
def test_links_between_splits_are_seen_through(kind, tmp_path):
    write_images(tmp_path, *(f"train/{label}/{n}.png" for label in "ab" for n in range(3)))
    val = tmp_path / ("val" if kind != "other name" else "test")
    if kind in ("folder", "other name"):
        val.symlink_to("train")
    else:
        write_images(val, "b/9.png")
    if kind == "one class":
        (val / "a").symlink_to(tmp_path / "train" / "a")
    for n in {"files": range(3), "one file": [1]}.get(kind, ()):
        (val / "b" / f"link{n}.png").symlink_to(tmp_path / "train" / "a" / f"{n}.png")
    assert share_images(folder(tmp_path), folder(tmp_path, "val")) == (kind != "nothing")


def test_links_inside_of_one_folder_are_seen_through(tmp_path):
    write_images(tmp_path, *(f"{n}.png" for n in range(20)))
    train, val = folder(tmp_path), folder(tmp_path, "val")
    assert not share_images(train, val)
    for n in range(20):  # most of them are on the other side
        (tmp_path / f"twin{n}.png").symlink_to(tmp_path / names(val)[0])
    assert share_images(folder(tmp_path), folder(tmp_path, "val"))


@pytest.mark.parametrize("kind", ["list", "tar", "parquet", "array_record"])
def test_links_between_shards_are_seen_through(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, shades in (("train", range(5)), ("other", range(5, 8))):
        write_split(kind, tmp_path / "far", "{split}.{extension}", split, shades)
    root = tmp_path / "data"
    root.mkdir()
    if kind == "list":
        for image in (tmp_path / "far").glob("*.png"):
            image.rename(root / image.name)
    found = []
    for val in ("other", "train"):
        for split, target in (("train", "train"), ("val", val)):
            link = root / f"{split}.{EXTENSIONS[kind]}"
            link.unlink(missing_ok=True)
            link.symlink_to(tmp_path / "far" / f"{target}.{EXTENSIONS[kind]}")
        train, held_out = (make_source(kind, path=str(root), split=split) for split in ("train", "val"))
        found.append(share_images(train, held_out))
    assert found == [False, True]


# --- errors


def test_missing_or_empty_folder_is_reported_with_the_nearest(tmp_path):
    write_images(tmp_path / "x", "images/1.png", "images/2.png")
    (tmp_path / "x" / "annotations").mkdir()
    for name, says in {
        "annotations": "has 0 images", "imges": r"did you mean .*/x/images\?",
        "images/zzz/deeper": "has no zzz", "images/1.png": r"is a file: did you mean .*/images\?",
    }.items():  # fmt: skip
        with pytest.raises(DataError, match=says):
            folder(tmp_path / "x" / name)


def test_single_image_can_be_trained_on_but_not_held_out(tmp_path):
    write_images(tmp_path, "1.png")
    assert len(folder(tmp_path)) == 1
    with pytest.raises(DataError, match=r"0 of its 1 images in split 'val' - data\.heldout_fraction=0\.1"):
        folder(tmp_path, "val")
