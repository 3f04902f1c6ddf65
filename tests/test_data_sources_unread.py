"""What `data.path` has that is not read is named in one line, and a split that may be a class is refused."""

import os

import pytest
from source_files import everything, names, png, samples, write_images, write_parquet, write_split, write_tar

from simmim_jax.data import make_source, one_report
from simmim_jax.errors import DataError, warn_once


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    warn_once.cache_clear()


@pytest.fixture
def lines(caplog):
    """A function: the lines that were logged while both sources of a run were opened."""

    def read(path, kind="auto", splits=("train", "val")) -> list[str]:
        caplog.clear()
        with one_report():
            for split in splits:
                make_source(kind, path=str(path), split=split, heldout_fraction=0.3)
        return [record.getMessage() for record in caplog.records]

    return read


@pytest.mark.parametrize("root", ["", "train"])
@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("a/1.HEIC", ".heic files"), ("b/deep/2.ppm", ".ppm files"), ("a/x.jpg_large", ".jpg_large files"),
        ("b/photos.zip", "archives"), ("a/more.tar", ".tar files"), ("b/labels.parquet", ".parquet files"),
        ("@eaDir/1.png", "hidden and thumbnail folders (@eaDir/"), ("a/@eaDir/1.png", "thumbnail folders (a/@eaDir/"),
        ("__MACOSX/a/1.png", "__MACOSX/"), ("b/.thumbnails/1.png", "b/.thumbnails/"), ("a/.1.png", "hidden images"),
        ("a/1", "images without an ending (a/1"), ("c/notes.txt", "folders without images (c/"),
    ],
)  # fmt: skip
def test_whatever_is_not_read_is_named_in_one_line(root, file, named, tmp_path, lines):
    write_images(tmp_path / root, "a/1.png", "a/2.png", "b/3.png", "b/4.png", "b/5.png", file)
    (line,) = lines(tmp_path)
    assert line.startswith(f"{tmp_path / root}: not read: 1 ")
    assert named in line
    source = everything("auto", tmp_path)
    assert (len(source), source.classes) == (5, ("a", "b"))


def test_nothing_is_reported_of_what_is_all_read(tmp_path, lines):
    files = [f"{side}/{label}/{n}.png" for side in ("train", "val") for label in "ab" for n in range(3)]
    write_images(tmp_path, *files, "train/a/._0.png")  # the last one is no image, but metadata of macOS
    for name in ("README.md", "train/labels.json", "train/a/caption.txt", ".DS_Store"):
        (tmp_path / name).write_text("{}")
    assert lines(tmp_path) == []


def test_what_is_next_to_splits_is_named_in_the_same_line(tmp_path, lines):
    write_images(tmp_path, "train/a/1.png", "train/b/2.png", "val/a/3.png", "val/b/4.png", "val/b/5.heic")
    write_images(tmp_path, "unlabeled/6.png", "7.png", "more/deep/8.png", "empty/notes.md")
    (tmp_path / "all.zip").touch()
    (line,) = lines(tmp_path)
    for named in ("2 folders (more/, unlabeled/)", "(7.png)", "(all.zip", "(val/b/5.heic"):
        assert named in line
    assert "empty" not in line


@pytest.mark.parametrize(
    ("classes", "split"),
    [(("bus", "car"), "train"), (("bus",), "Train"), (("control",), "test"), (("0", "1"), "test"),
     (("autobús", "машина"), "train"), (("plane/747", "boat/747"), "train/747")],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["auto", "folder"])
def test_split_that_may_be_a_class_is_refused_with_both_readings(kind, classes, split, tmp_path):
    write_images(tmp_path, *(f"{name}/{n}.png" for name in (*classes, split) for n in range(3)))
    first, split = min(name.split("/")[0] for name in classes), split.split("/")[0]
    for side in ("train", "val"):
        with pytest.raises(DataError, match=f"{split}/ .*{first}.* for a class, .*; for a split, "):
            make_source(kind, path=str(tmp_path), split=side)
    # both ways out work
    assert len(everything(kind, tmp_path / split)) == 3
    (tmp_path / "all").mkdir()
    for name in os.listdir(tmp_path):
        if name != "all":
            os.rename(tmp_path / name, tmp_path / "all" / name)
    (tmp_path / "all").rename(tmp_path / "train")
    assert len(everything(kind, tmp_path).classes) == len(classes) + 1


@pytest.mark.parametrize("others", [["unlabeled"], ["extra", "images"], ["masks"], ["unlabeled2017", "val2017"]])
def test_other_folders_than_classes_are_left_out_with_a_line(others, tmp_path, lines):
    write_images(tmp_path, *(f"{name}/{n}.png" for name in ("train", *others) for n in range(9)))
    (line,) = lines(tmp_path)
    assert all(f"{name}/" in line for name in others)
    assert ("name val2017/ val/" in line) == ("val2017" in others)
    assert len(everything("folder", tmp_path)) == 9


@pytest.mark.parametrize("kind", ["list", "tar", "parquet", "array_record"])
def test_shards_next_to_those_of_a_split_are_named_or_refused(kind, tmp_path, lines):
    for split in ("train", "unlabeled"):
        write_split(kind, tmp_path, "{split}-0.{extension}", split, range(9))
    (line,) = lines(tmp_path, kind)
    assert "unlabeled-0." in line
    write_split(kind, tmp_path, "{split}-0.{extension}", "bus", range(9))
    for path in (tmp_path, tmp_path / "*-0.*"):
        with pytest.raises(DataError, match=r"train-0\.\w+ .*bus-0.* for a class, .*; for a split, "):
            make_source(kind, path=str(path))
    write_split(kind, tmp_path, "{split}-0.{extension}", "val", range(3))  # then there is no doubt
    assert "bus-0." in lines(tmp_path, kind)[0]


@pytest.mark.parametrize("kind", ["tar", "parquet"])
def test_folders_of_shards_next_to_a_split_are_named_or_refused(kind, tmp_path, lines):
    for split in ("train", "unlabeled"):
        write_split(kind, tmp_path / split, "0.{extension}", "", range(9))
    assert "1 folders (unlabeled/" in lines(tmp_path)[0]
    write_split(kind, tmp_path / "bus", "0.{extension}", "", range(9))
    with pytest.raises(DataError, match="train may be a class, like bus"):
        make_source(kind, path=str(tmp_path))


def test_other_files_next_to_shards_are_named(tmp_path, lines):
    write_tar(tmp_path / "0.tar", samples(*range(9)))
    (tmp_path / "1.tar.gz").touch()
    write_images(tmp_path, "x.png")
    (line,) = lines(tmp_path, "tar")
    assert "1 archives (1.tar.gz" in line
    assert "1 images next to them (x.png" in line
    members = {"1.heic": b"", "2.png": png(2), ".3.png": png(3), "4.png": png(4)}
    write_tar(tmp_path / "in" / "0.tar", members)
    assert "1 .heic files (0.tar/1.heic" in lines(tmp_path / "in")[0]


@pytest.mark.parametrize(
    ("name", "text", "kind"),
    [
        ("train.csv", "file_name,label\n0.png,cat\n", "lists"),
        ("_classes.csv", "filename, cat, dog\n0.png, 1, 0\n", "files with several labels"),
        ("val_annotations.txt", "0.png\tn01\t0\t32\t44\t62\n", "files with several labels"),
        ("train.txt", "0.png 1 0 1\n", "files with several labels"),
        ("tags.csv", "file_name,tags\n0.png,haze primary\n", "files with several labels"),
        ("metadata.jsonl", '{"file_name": "0.png", "label": 0}\n', "files of labels"),
    ],
)
def test_files_of_labels_next_to_images_are_named(name, text, kind, tmp_path, lines):
    write_images(tmp_path, *(f"{n}.png" for n in range(9)))
    (tmp_path / name).write_text(text)
    (line,) = lines(tmp_path)
    assert f"1 {kind} ({name}: " in line


@pytest.mark.parametrize(
    ("files", "says"),
    [
        (["a/1.heic", "b/2.HEIC"], "2 .heic files .*pillow-heif"),
        (["x.zip"], "1 archives .x.zip"),
        (["a/x.txt"], "looked for"),
    ],
)
def test_folder_without_images_names_what_it_has_instead(files, says, tmp_path):
    write_images(tmp_path, *files)
    with pytest.raises(DataError, match=f"has 0 images - .*{says}"):
        make_source("auto", path=str(tmp_path))


def test_archives_are_refused_with_their_fix(tmp_path):
    (tmp_path / "x.zip").touch()
    with pytest.raises(DataError, match=r"x\.zip is an archive.*unpack"):
        make_source("auto", path=str(tmp_path / "x.zip"))
    write_tar(tmp_path / "all.tar", {"n01.tar": b"", "n02.tar": b""})
    with pytest.raises(DataError, match=r"has 0 images - it has 2 \.tar files"):
        make_source("auto", path=str(tmp_path / "all.tar"))


# --- img2dataset


@pytest.mark.parametrize("form", ["webdataset", "files", "parquet"])
def test_folder_of_img2dataset_is_read(form, tmp_path, lines):
    import pyarrow as pa
    import pyarrow.parquet as pq

    for shard in range(2):
        keys = [f"{shard:05}{n:04}" for n in range(5)]
        columns = {"url": ["u"] * 5, "key": keys, "caption": ["words"] * 5}
        (tmp_path / f"{shard:05}_stats.json").write_text("{}")
        if form == "parquet":
            columns["jpg"] = [png(n) for n in range(5)]
        elif form == "webdataset":
            parts = {"png": png(1), "txt": b"words", "json": b'{"key": "1", "width": 4}'}
            write_tar(
                tmp_path / f"{shard:05}.tar", {f"{key}.{end}": data for key in keys for end, data in parts.items()}
            )
        else:
            write_images(tmp_path / f"{shard:05}", *(f"{key}.png" for key in keys))
        pq.write_table(pa.table(columns), tmp_path / f"{shard:05}.parquet")
    source = everything("auto", tmp_path)
    assert (len(source), source.classes) == (10, ())
    if form != "parquet":
        with pytest.raises(DataError, match="data.source=tar" if form == "webdataset" else "only links"):
            make_source("parquet", path=str(tmp_path))


@pytest.mark.parametrize(
    ("shards", "pictures", "kind"),
    [(["0.tar", "1.tar", "2.tar"], 1, "tar"), (["0.tar"], 5, "folder"), (["0.parquet"], 1, "parquet"),
     (["0.parquet"], 4, "folder"), (["0.tar", "1.tar"], 2, "folder")],
)  # fmt: skip
def test_few_pictures_next_to_shards_or_archives_next_to_pictures_are_not_read(shards, pictures, kind, tmp_path, lines):
    write_images(tmp_path, *(f"{n}.png" for n in range(pictures)))
    for name in shards:
        (write_tar if name.endswith("tar") else write_parquet)(
            tmp_path / name, samples(*range(9)) if "tar" in name else range(9)
        )
    (line,) = lines(tmp_path, splits=["train"])
    assert ("next to them (0.png" in line) == (kind != "folder")
    assert everything("auto", tmp_path).fingerprint()["source"] == kind


def test_parquet_is_preferred_if_it_has_images(tmp_path):
    write_parquet(tmp_path / "0.parquet", range(5))
    write_tar(tmp_path / "0.tar", samples(1))
    assert len(everything("auto", tmp_path)) == 5


def test_split_folders_have_the_names_of_their_images(tmp_path):
    write_images(tmp_path, "@eaDir/1.png", "a/1.png", "b/@eaDir/2.png", "b/2.png")
    assert names(everything("auto", tmp_path)) == ["a/1.png", "b/2.png"]
