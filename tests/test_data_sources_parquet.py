"""Parquet: columns of images and labels, cached row groups, and damaged files."""

import random
import re
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from source_files import everything, labels, png, shade_of, shades, write_parquet

from simmim_jax.data import make_source
from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources import parquet
from simmim_jax.errors import DataError, UserError


def write_table(file, **columns) -> None:
    pq.write_table(pa.table(columns), file, row_group_size=2)


def test_layout_of_hugging_face_is_read(tmp_path):
    for name, numbers in {"train-00000-of-00002": range(5), "train-00001-of-00002": range(5, 8), "test": [10]}.items():
        write_parquet(tmp_path / "data" / f"{name}.parquet", numbers, classes=("ant", "bee", "cat"))
    (tmp_path / "README.md").write_text("a card")
    source = make_source("auto", path=str(tmp_path))
    assert shades(source) == list(range(8))
    assert source.classes == ("ant", "bee", "cat")
    assert source.name(6) == "data/train-00001-of-00002.parquet/1"
    assert shades(make_source("auto", path=str(tmp_path), split="validation")) == [10]


@pytest.mark.parametrize(
    ("name", "kind", "label"),
    [("image", pa.binary(), "label"), ("img", pa.large_binary(), "fine_label"), ("jpg", pa.binary(), "cls"),
     ("anything", pa.binary(), None)],
)  # fmt: skip
def test_columns_of_image_and_label_are_found(name, kind, label, tmp_path):
    columns = {"id": ["x", "y"], name: pa.array([png(1), png(2)], kind), "score": [0.5, 0.6]}
    if label:
        columns[label] = pa.array([4, 1], pa.int32())
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", write_statistics=name != "img")
    source = everything("parquet", tmp_path)
    assert shades(source) == [1, 2]
    assert labels(source) == ([4, 1] if label else [-1, -1])
    assert source.classes == (("0", "1", "2", "3", "4") if label else ())


@pytest.mark.parametrize(
    ("column", "kind"),
    [("label", pa.string()), ("Label", pa.large_string()), ("CLASS", pa.dictionary(pa.int32(), pa.string()))],
)
def test_strings_are_class_names_of_both_splits(column, kind, tmp_path):
    def write(file, images, values):
        label = pa.array(values, pa.string()).cast(kind)
        write_table(tmp_path / file, image=pa.array([png(shade) for shade in images]), **{column: label})

    write("train-0.parquet", [1, 2, 3], ["dog", "ant", "dog"])
    write("train-1.parquet", [4], ["é 猫"])
    write("val.parquet", [5], ["bee"])
    train, val = (make_source("parquet", path=str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ("ant", "bee", "dog", "é 猫")
    assert (labels(train), labels(val)) == ([2, 0, 2, 3], [1])
    before = train.fingerprint()
    write("val.parquet", [5], ["cat"])  # changes what the numbers mean
    assert make_source("parquet", path=str(tmp_path)).fingerprint() != before
    write("train-1.parquet", [4], [None])
    with pytest.raises(DataError, match=rf"train-1\.parquet .* without a label.*'{column}'"):
        make_source("parquet", path=str(tmp_path))
    write("val.parquet", [5], [None])
    assert make_source("parquet", path=str(tmp_path), split="val")[0]["label"] == -1


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [([True, False, True], pa.bool_(), "bool"), ([0.0, 1.0, 2.0], pa.float64(), "double"),
     ([[0], [1], [2]], pa.list_(pa.int64()), "list"), (["a", "b", "c"], pa.string(), "more than 2")],
)  # fmt: skip
def test_other_label_columns_are_not_used_with_one_warning(values, kind, says, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(parquet, "MAX_NAMES", 2)  # more are captions
    write_table(tmp_path / "a.parquet", image=[png(1), png(2), png(3)], label=pa.array(values, kind))
    for split in ("train", "val"):
        source = make_source("parquet", path=str(tmp_path), split=split)
        assert (source.classes, source[0]["label"]) == ((), -1)
    assert len(caplog.records) == 1
    assert re.search(rf"column 'label' is not used: .*{says}", caplog.text)


def test_row_without_bytes_is_a_bad_image(tmp_path):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = [{"bytes": None, "path": "x.png"}, None, {"bytes": png(3), "path": None}]
    write_table(tmp_path / "a.parquet", image=pa.array(images, kind))
    source = everything("parquet", tmp_path)
    for i in (0, 1):
        with pytest.raises(BadImage):
            source[i]
    assert shade_of(source[2]) == 3


@pytest.mark.parametrize("statistics", [True, False])
def test_labels_that_are_not_classes_are_refused(statistics, tmp_path):
    for values, says in {
        (0, None, 1): "1 rows without a label.*'label', row group 0", (0, 3, 1): "labels from 0 to 3",
        (0, -1, 1): "labels from -1 to 1",
    }.items():  # fmt: skip
        write_parquet(tmp_path / "a.parquet", range(3), labels=list(values))
        table = pq.read_table(tmp_path / "a.parquet")
        pq.write_table(table, tmp_path / "a.parquet", write_statistics=statistics)
        with pytest.raises(DataError, match=says):
            make_source("parquet", path=str(tmp_path))
    write_parquet(tmp_path / "a.parquet", range(3), labels=[-1, -1, -1])  # an unlabeled test set
    source = everything("parquet", tmp_path)
    assert (source.classes, source[1]["label"]) == ((), -1)


def test_other_files_are_refused(tmp_path):
    def refused(says):
        with pytest.raises(DataError, match=says):
            make_source("parquet", path=str(tmp_path))

    write_table(tmp_path / "a.parquet", text=["a"], n=[1])
    refused(r"has 0 image columns.*text \(string\), n \(int64\)")
    write_table(tmp_path / "a.parquet", one=[b"a"], two=[b"b"])
    refused(r"has 2 image columns, and none named image")
    write_parquet(tmp_path / "a.parquet", [1])
    pq.write_table(pq.read_table(tmp_path / "a.parquet").slice(1), tmp_path / "a.parquet")
    refused("has 0 images")
    write_parquet(tmp_path / "a.parquet", [1, 2])
    write_parquet(tmp_path / "b.parquet", [1, 2], classes=("x", "y", "z"))
    refused(r"b\.parquet has other classes than .*a\.parquet")
    write_table(tmp_path / "b.parquet", jpg=[b"a"])
    refused(r"b\.parquet has other columns than .*a\.parquet")


def test_damaged_file_is_refused_or_has_bad_images(tmp_path):
    file = tmp_path / "a.parquet"
    whole = Path(write_parquet(file, range(40), group=4)).read_bytes()
    for damage in (b"", b"PAR1", whole[:-1], whole[: len(whole) // 2], whole[4:]):
        file.write_bytes(damage)
        with pytest.raises(DataError, match=r"a\.parquet is not a complete Parquet file"):
            make_source("parquet", path=str(tmp_path))
    rng, faults = random.Random(0), 0
    for _ in range(40):
        start = rng.randrange(len(whole) - 8)
        file.write_bytes(whole[:start] + rng.randbytes(6) + whole[start + 6 :])
        try:
            source = everything("parquet", tmp_path)
        except UserError:
            faults += 1
            continue
        for i in range(0, len(source), 4):
            try:
                assert source[i]["name"] == source.name(i)
            except (BadImage, OSError):
                faults += 1
    assert faults > 0


def test_cache_of_row_groups_is_bounded_for_many_threads(tmp_path, monkeypatch):
    write_parquet(tmp_path / "a.parquet", range(100), group=5)
    write_parquet(tmp_path / "b.parquet", range(100, 200), group=7)
    monkeypatch.setattr(parquet, "CACHE", 3000)
    source, errors, rng = everything("parquet", tmp_path), [], np.random.default_rng(0)

    def read(order):
        errors.extend(i for i in order if shade_of(source[int(i)]) != i)
        errors.extend([source.cache_bytes] if source.cache_bytes > 3000 else [])

    threads = [threading.Thread(target=read, args=(rng.integers(0, 200, 100),)) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not errors
    assert 1 <= len(source.cache) < 20


def test_large_row_groups_are_warned_of_once(tmp_path, caplog):
    for group, warnings in ((100, 0), (201, 1)):
        write_parquet(tmp_path / "a.parquet", [1] * 201, group=group)
        make_source("parquet", path=str(tmp_path))
        assert len(caplog.records) == warnings
    assert "201 images" in caplog.text
