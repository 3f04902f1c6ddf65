"""benchmarks/decode.py: it runs, its rows are comparable, and it reports what is missing."""

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench import load_program
from PIL import Image

from simmim_jax.data import make_source, transforms
from simmim_jax.data.decode import Picture
from simmim_jax.errors import DataError

SIZE = (64, 64)


@pytest.fixture(scope="module")
def bench():
    return load_program("decode")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Eight photographs of two classes. One is gray, one large enough to be decoded at reduced size."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("photographs")
    for n in range(8):
        (root / f"class {n // 4}").mkdir(exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).convert("L" if n == 2 else "RGB")
        small.resize((640, 481) if n == 5 else (161, 120)).save(root / f"class {n // 4}" / f"é {n}.jpg")
    return root


@pytest.fixture(scope="module")
def photographs(bench, folder):
    return bench.prepare(make(folder), 8, SIZE)


def make(folder: Path):
    return make_source("folder", path=str(folder), split="train", heldout_fraction=0.0)


def test_photographs_are_evenly_spread_over_the_source(bench, folder):
    assert [one.index for one in bench.prepare(make(folder), 4, SIZE)] == [0, 2, 4, 6]
    assert [one.index for one in bench.prepare(make(folder), 99, SIZE)] == list(range(8))


def test_parts_together_give_the_image_of_a_batch(bench, photographs):
    assert any(one.read[0].shape != one.pixels.shape for one in photographs)  # one is decoded at reduced size
    for one in photographs:
        rng = np.random.default_rng(one.index)
        whole = transforms.random_resized_crop(Picture(one.content, 3), rng, SIZE, bench.SCALE, bench.RATIO)
        np.testing.assert_array_equal(one.resized, whole)


def test_our_rows_have_the_pixels_of_pillow_and_faster_settings_do_not(bench, photographs):
    rows, missing = bench.compare(bench.decoders(), photographs, 1)
    found = {row["row"]: row for row in rows}
    assert missing.keys() | found.keys() == bench.decoders().keys()
    assert all(found[name]["greatest"] == 0 for name in ("Pillow", "simplejpeg (ours)", "simplejpeg, at a half"))
    assert found["simplejpeg, fastdct and fastupsample"]["greatest"] > 0
    rows, _ = bench.compare(bench.filters(SIZE), photographs, 1)
    assert rows[2]["row"] == "cykooz_resizer, across then down (ours)"
    assert rows[2]["greatest"] <= 1
    assert rows[2]["share_that_differs"] < rows[3]["share_that_differs"]


def test_difference_is_over_all_values_of_all_photographs(bench):
    def constant(value):
        return lambda one: np.full((one, 1, 3), value, np.uint8)

    def last_is_7(one):
        pixels = constant(250)(one)
        pixels[-1, -1, -1] = 7
        return pixels

    found = bench.difference(last_is_7, constant(250), [1, 3])
    assert found == {"greatest": 243, "mean": 2 * 243 / 12, "share_that_differs": 2 / 12}


def test_ratios_are_within_a_round_and_the_first_round_is_discarded(bench, monkeypatch):
    now, order = [0.0], []
    monkeypatch.setattr(time, "process_time", lambda: now[0])
    costs = {"Pillow": iter([9, 2, 4, 8]), "ours": iter([9, 1, 1, 8])}  # of each round, in seconds

    def row(name):
        def run(one):
            order.append(name)
            now[0] += next(costs[name])

        return run

    rows = bench.measure({name: row(name) for name in costs}, [None], rounds=3)
    assert order == ["Pillow", "ours", "ours", "Pillow"] * 2
    assert [each["milliseconds"] for each in rows] == [[2000, 4000, 8000], [1000, 1000, 8000]]
    assert rows[1]["times_first"] == [0.25, 0.5, 1.0]


def test_failing_row_is_missing_with_the_reason_and_the_others_are_measured(bench, photographs):
    def fails(one):
        raise OSError("does not take\nthis one")

    every = {"Pillow": bench.decoders()["Pillow"], "other": fails, "gray": lambda one: np.asarray(one.pillow)[..., :1]}
    rows, missing = bench.compare(every, photographs[:1], 1)
    assert [row["row"] for row in rows] == ["Pillow"]
    assert missing == {
        "other": "does not take this one",
        "gray": "has shape [120, 161, 1], the reference [120, 161, 3]",
    }


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xe0 cut short"])
def test_damaged_jpeg_is_named(bench, tmp_path, content):
    (tmp_path / "a b").mkdir()
    (tmp_path / "a b" / "x\ny.jpg").write_bytes(content)
    with pytest.raises(DataError, match=r"x\\ny\.jpg") as stop:
        bench.prepare(make(tmp_path), 1, SIZE)
    assert "\n" not in str(stop.value)


def test_unreadable_data_is_one_line(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # do not pin the test process
    with pytest.raises(SystemExit, match=r"^benchmarks/decode.py: ERROR\[data\] [^\n]*$"):
        bench.main([f"--path={tmp_path}"])


def test_other_libraries_are_optional(bench, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)  # do not pin the test process
    for module in ("cv2", "imagecodecs", "kornia_rs", "av"):
        monkeypatch.setitem(sys.modules, module, None)  # its import fails
    out, flags = tmp_path / "decode.json", ["--image=64", "--rounds=2", "--images=4"]
    bench.main([f"--path={folder}", f"--out={out}", *flags])
    report, printed = json.loads(out.read_text()), capsys.readouterr().out
    assert report["images"] == {"photographs": 4}
    assert list(report["tables"]) == ["decoder", "filter", "part, from photographs"]
    assert [len(rows) for rows in report["tables"].values()] == [5, 4, 7]
    for rows in report["tables"].values():
        assert all(len(row["rounds"]) == 2 for row in rows)
        assert rows[0]["times_first"] == [1, 1, 1]
    others = {"OpenCV", "imagecodecs", "kornia-rs", "kornia-rs, libjpeg-turbo", "PyAV"}
    others |= {"OpenCV, INTER_AREA", "OpenCV, INTER_LINEAR", "parts, from shards"}
    assert report["missing"].keys() == others
    assert all(f"not measured: {name}" in printed for name in others)
    assert " ".join(flags) in report["command"]
