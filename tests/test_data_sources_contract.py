"""The same images and labels in every kind of source: the same samples, classes and reports."""

import re

import pytest
from source_files import shade_of, write_labeled
from tiny_tfds import TinySplits

from simmim_jax.data import compare_classes, make_source, one_report, share_images, untrained_classes
from simmim_jax.errors import DataError, warn_once

KINDS = ["folder", "list", "tar", "parquet", "array_record", "tfds"]
TRAIN = [(shade, "abc"[shade % 3]) for shade in range(12)]


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    warn_once.cache_clear()


@pytest.fixture(params=KINDS)
def opened(request, tmp_path, caplog):
    """A function: {split: [(shade, label or ""), ...]} -> (training source, held-out source, the lines logged)."""

    def open_both(splits: dict) -> tuple:
        options = write_labeled(request.param, tmp_path / "data", splits)
        heldout = next(split for split in splits if split not in ("train", "unlabeled"))
        if request.param == "tfds":
            TinySplits.SPLITS = {"validation" if split == "val" else split: x for split, x in splits.items()}
            TinySplits.NAMES = sorted({label for records in splits.values() for _, label in records if label})
            TinySplits(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
            options = {"source": "tfds", "name": "tiny_splits", "data_dir": str(tmp_path)}
            heldout = "validation" if heldout == "val" else heldout
        caplog.clear()
        with one_report():
            sources = [make_source(**options, split=split) for split in ("train", heldout)]
        return *sources, [record.getMessage() for record in caplog.records]

    return open_both


def samples(source) -> list[tuple[int, str]]:
    records = [source[i] for i in range(len(source))]
    return sorted((shade_of(r), source.classes[r["label"]] if r["label"] >= 0 else "") for r in records)


def test_every_source_has_the_same_samples_labels_and_reports(opened, caplog):
    splits = {"train": TRAIN, "val": [(20, "a"), (21, "d"), (22, "c")], "unlabeled": [(30, ""), (31, "")]}
    train, val, lines = opened(splits)
    assert (samples(train), samples(val)) == (TRAIN, sorted(splits["val"]))
    assert train.classes == val.classes == ("a", "b", "c", "d")
    (line,) = lines  # one line names what is not read
    assert re.search(r"not read: [12] [^;]*unlabeled[^;]*$", line)
    assert untrained_classes(train) == ["d"]
    assert not share_images(train, val)
    assert share_images(train, train)
    caplog.clear()
    compare_classes(train, val, required=True)
    expected = "'d' has held-out but no training images, so that every answer for them is wrong; "
    assert caplog.text.strip().endswith(f"{expected}'b' has training but no held-out images")


def test_every_source_reads_an_unlabeled_test_set_and_says_so(opened):
    train, test, lines = opened({"train": TRAIN, "test": [(40, ""), (41, "")]})
    assert (samples(train), samples(test)) == (TRAIN, [(40, ""), (41, "")])
    assert (train.classes, test.classes) == (("a", "b", "c"), ())
    assert test.unlabeled
    assert len(lines) <= 1


def test_every_source_orders_numbers_as_numbers(opened):
    records = [(shade, str(shade % 12)) for shade in range(24)]
    train, val, lines = opened({"train": records, "val": [(30, "10"), (31, "2"), (32, "11")]})
    if train.fingerprint()["source"] != "tfds" and "array_record" not in train.fingerprint()["source"]:
        assert train.classes == tuple(map(str, range(12)))
    assert (samples(train), samples(val)) == (records, [(30, "10"), (31, "2"), (32, "11")])
    assert lines == []


def test_every_source_names_classes_that_differ_in_case(opened, caplog):
    train, val, _ = opened({"train": TRAIN, "val": [(60, "A"), (61, "b"), (62, "c")]})
    compare_classes(train, val, required=True)
    assert "'A' has held-out but no training images" in caplog.text
    assert "'A' and 'a' look like the same class" in caplog.text


def test_every_source_refuses_classes_of_which_none_is_on_both_sides(opened):
    train, val, _ = opened({"train": TRAIN, "val": [(50, "Cat"), (51, "Dog")]})
    compare_classes(train, val, required=False)
    with pytest.raises(DataError, match="no class has training and held-out images"):
        compare_classes(train, val, required=True)
