"""The probe tool from its command line: features on the disk, what chooses, what is written, and every mistake."""

import csv
import json
import os
import re
import signal
import subprocess
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import command, run
from tiny import tiny_encoder

from simmim_jax.data import make_source, share_images
from simmim_jax.errors import BusyError, CheckpointError, ConfigError, DataError, NonFiniteError
from simmim_jax.evals import feature_cache, probes
from simmim_jax.evals.feature_cache import FeatureCache, Pass, open_cache
from simmim_jax.files import lock_folder
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run
from simmim_jax.tools.probe import __main__ as probe
from simmim_jax.tools.probe import probing

PROBE = ("-m", "simmim_jax.tools.probe")
QUICK = ("--data=digits", "--limit=160", "--epochs=2", "--seeds=2", "--shots=1,50", "--fractions=0.2",
         "--neighbors=5,10", "--learning-rates=0.1,0.3", "--weight-decays=0", "--regularizations=0.1,0.01",
         "--inverse-regularizations=0.1,1")  # fmt: skip


def tool(*arguments):
    """The tool in this process."""
    probe.run([str(argument) for argument in arguments])


def told(*arguments, kind=ConfigError) -> str:
    """The one line of the tool's error."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of an untrained ViT of two blocks with a class token, of gray images."""
    return write_workdir(tmp_path_factory.mktemp("probed") / "workdir", seed=0)


def write_workdir(folder, seed):
    options = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "class_token": True}
    encoder = tiny_encoder(**options)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    config = {"encoder": {"name": "vit", "size": "ti", **options}, "image_size": [16, 16], "mean": [0.3], "std": [0.4]}
    checkpoint.write_params(str(folder), {"encoder": params}, config)
    return folder


def folder_of(root, images):
    """A folder of images: {"train/a": 3, ...}, so many in each."""
    rng = np.random.default_rng(0)
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / name / f"{n}.png")
    return root


QUICKEST = ("patches", ("ridge",), {"ridge": 1})
SLOW = ("all", probe.METHODS, {"linear": 1, "logistic": 3, "ridge": 1, "knn": 4})


@pytest.mark.parametrize(("pool", "only", "rows_of"), [QUICKEST, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_every_method_block_and_pooling_has_a_row_and_validation_images_choose(
    tmp_path, workdir, capsys, pool, only, rows_of
):
    tool(workdir, tmp_path, f"--pool={pool}", *QUICK, f"--only={','.join(only)}")
    pools, few = ("patches", "class_token", "both") if pool == "all" else (pool,), "fewshot" in only
    out = capsys.readouterr().out
    with open(tmp_path / "results.csv") as file:
        rows = list(csv.DictReader(file))
    said = json.loads((tmp_path / "results.json").read_text())
    assert [row["method"] for row in rows] == [row["method"] for row in said["rows"]]
    kinds = {(row["images"], row["setting"]) for row in said["rows"] if row["method"] == "knn"}
    assert not few or {("all", "5 neighbors"), ("all", "10 neighbors"), ("1 per class", "1 neighbor")} <= kinds
    assert ("no draws of 50 per class" in out) == few
    for method, count in rows_of.items():
        of_method = [row for row in said["rows"] if row["method"] == method]
        assert len(of_method) == count * 3 * len(pools)
        assert {(row["block"], row["pool"]) for row in of_method} == {
            (block, pool) for block in (1, 2, 0) for pool in pools
        }
        for images in {row["images"] for row in of_method}:
            same = [row for row in of_method if row["images"] == images]
            (chosen,) = [row for row in same if row["chosen"]]
            assert chosen["validation_top1"] == max(row["validation_top1"] for row in same)
            assert {(row["block"], row["pool"]) for row in same if row["paper"]} == {(1, "patches")}
    assert said["edges"]  # of two settings either is an end
    assert {row["images"] for row in said["rows"] if row["edge"]} == {"all"}
    assert {line.split(",")[0] for line in said["edges"]} == set(rows_of) & {"linear", "logistic", "ridge"}
    assert "".join(f"{line}\n" for line in said["edges"]) in out
    assert (said["crop_fraction"], said["interpolation"]) == (1.0, "bicubic")
    assert "16 pixels, crop 1, bicubic" in out
    drawn = [row for row in said["rows"] if row["images"] == "1 per class"]
    assert all(row["top1_least"] <= row["top1"] <= row["top1_greatest"] and row["train_images"] == 10 for row in drawn)
    assert "paper: block 1 of 2, mean of patch tokens" in out
    assert Image.open(tmp_path / "blocks.png").size == (700 * (1 + few), len(pools) * 380)


def made_up(params, batch):
    """Features of three blocks without a model."""
    pixels = batch["image"].reshape(len(batch["image"]), -1)[:, 40:44].astype(np.float32)
    return batch | {f"block_{n}": pixels for n in range(3)}


@pytest.mark.slow
def test_features_are_read_again_where_nothing_changed_and_made_anew_where_something_did(
    tmp_path, workdir, capsys, monkeypatch
):
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: made_up)
    quick = ("--data=digits", "--limit=64", "--only=ridge")

    def extracted(run, *more):
        tool(run, tmp_path / "out", *quick, *more)
        out = capsys.readouterr().out
        assert ("are there already" in out) != ("features: train" in out)
        return "features: train" in out

    assert extracted(workdir, "--blocks=2")
    assert not extracted(workdir, "--blocks=2", "--seed=1", "--interpolation=bicubic")  # the run's
    assert extracted(workdir, "--blocks=2", "--interpolation=nearest")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["interpolation"] == "nearest"
    assert extracted(workdir)  # the other blocks, of which none is there
    assert extracted(write_workdir(tmp_path / "other", seed=1), "--blocks=1")
    assert not extracted(workdir, "--blocks=1,0", "--only=knn")


def images_of(count, width=3, batch_size=8, stop_at=None, label=None):
    """(a Pass over made-up images, an extract whose features say which image a row is); it breaks off at a batch."""

    def batches(start):
        for n in range(start, -(-count // batch_size)):
            if n == stop_at:
                raise KeyboardInterrupt
            batch_index = np.arange(n * batch_size, (n + 1) * batch_size)
            labels = np.where(batch_index == 5, -1, batch_index % 4) if label is None else label
            yield {"batch_index": batch_index, "valid": (batch_index < count) & (batch_index != 7), "label": labels}

    def extract(batch):
        rows = np.repeat(batch["batch_index"][:, None], width, axis=1).astype(np.float32)
        return batch | {"block_1": rows, "block_2": -rows}

    return Pass(count, batch_size, batches), extract


def test_an_extraction_that_was_killed_goes_on_and_no_half_of_one_is_taken_for_a_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FLUSH", 0.0)
    said = []
    whole, extract = images_of(43)
    for stop_at, blocks in ((3, [1, 2]), (5, [2, 1])):
        cut, _ = images_of(43, stop_at=stop_at)
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, {"a": 1}, {"train": whole, "test": cut}, extract, blocks, say=said.append)
        assert not list(tmp_path.glob("*/meta.json"))
    assert "features: test goes on at image 24 of 43" in said
    cache = open_cache(tmp_path, {"a": 1}, {"train": whole, "test": whole}, extract, [1, 2], say=said.append)
    assert said[-2:] == ["features: test goes on at image 40 of 43", said[-1]]
    for split in ("train", "test"):
        expected = np.where(np.arange(43) == 7, 0, np.arange(43))  # unreadable: nothing, without a label
        np.testing.assert_array_equal(cache.features(split, 2), -np.repeat(expected[:, None], 3, axis=1))
        labels = cache.labels(split)
        assert np.flatnonzero(labels < 0).tolist() == [5, 7]
        assert (labels[8:] == np.arange(8, 43) % 4).all()
    assert [path.name for path in tmp_path.iterdir()] == [cache.folder.name]
    damaged = cache.folder / "train_block_01.npy"
    damaged.write_bytes(damaged.read_bytes()[:200])
    open_cache(tmp_path, {"a": 1}, {"train": whole, "test": whole}, extract, [2], say=said.append)
    assert said[-1].startswith("features: test 43/43")
    small = open_cache(tmp_path, {"a": 1}, {"train": whole, "test": whole}, extract, [2], "float16", said.append)
    assert small.folder != cache.folder
    assert small.features("train", 2).dtype == np.float16
    open_cache(tmp_path, {"a": 1}, {"train": whole, "test": whole}, extract, [2], say=said.append)
    assert said[-1].startswith("features: 1 blocks are there already")


@pytest.mark.parametrize("batch_size", [5, 8, 64])
def test_an_extraction_goes_on_with_batches_of_another_size_and_with_other_blocks_is_said_to_be_discarded(
    tmp_path, monkeypatch, batch_size
):
    monkeypatch.setattr(feature_cache, "FLUSH", 0.0)
    cut, extract = images_of(43, batch_size=4, stop_at=3)
    whole, _ = images_of(43, batch_size=batch_size)
    say = print
    for identity in ({"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, identity, {"train": cut}, extract, [1], say=say)
    later = lambda batch: batch | {"block_1": extract(batch)["block_1"] + 100}  # noqa: E731
    said = []
    cache = open_cache(tmp_path, {"a": 1}, {"train": whole}, later, [1], say=said.append)
    assert said[0] == "features: train goes on at image 12 of 43"
    expected = np.arange(43) + np.where(np.arange(43) < 12, 0, 100)
    expected[7] = 0
    np.testing.assert_array_equal(cache.features("train", 1)[:, 0], expected)
    assert np.flatnonzero(cache.labels("train") < 0).tolist() == [5, 7]
    assert json.loads((cache.folder / "meta.json").read_text())["bad"] == {"train": 1}  # the seventh, once
    open_cache(tmp_path, {"a": 2}, {"train": whole}, extract, [1, 2], say=said.append)
    assert "is of blocks 1: it is discarded, and all is read anew" in "".join(said)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_between_the_renames_that_add_blocks_costs_nothing(tmp_path, monkeypatch, damaged):
    whole, extract = images_of(43)
    passes, said = {"train": whole, "test": whole}, []
    replace, state = Path.replace, {"left": 99}

    def replace_until_killed(path, target):
        if path.suffix == ".npy" or "meta.json" in path.name:
            state["left"] -= 1
            if state["left"] < 0:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_until_killed)
    for n in range(5):  # two files of labels, two of features, meta.json
        before = open_cache(tmp_path, {"n": n}, passes, extract, [1], say=said.append)
        if damaged:
            (before.folder / "test_block_01.npy").write_bytes(b"")
        state["left"] = n
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, {"n": n}, passes, extract, [1, 2][damaged:], say=said.append)
        state["left"] = 99
        cache = open_cache(tmp_path, {"n": n}, passes, extract, [1, 2][damaged:], say=said.append)
        assert "goes on" not in "".join(said)  # all had been read
        for split in passes:
            assert np.flatnonzero(cache.labels(split) < 0).tolist() == [5, 7]
            for block, sign in ((1, 1), (2, -1))[damaged:]:
                np.testing.assert_array_equal(cache.features(split, block)[8:, 0], sign * np.arange(8, 43))
        assert not list(tmp_path.glob("*.partial"))
    assert ("are damaged" in "".join(said)) == damaged


@pytest.mark.parametrize("labels_first", [False, True])
def test_features_that_replace_some_with_many_bad_images_are_never_mixed_with_these(
    tmp_path, monkeypatch, labels_first
):
    whole, extract = images_of(43)
    lost = lambda batch: extract(batch | {"valid": (batch["batch_index"] >= 30) | (batch["batch_index"] == 7)})  # noqa: E731
    lax = partial(open_cache, tmp_path, {}, {"train": whole}, blocks=[1], max_bad_fraction=0.9, say=[].append)
    lax(lost)
    glob, replace, moved = Path.glob, Path.replace, []

    def replace_once(path, target):
        if path.suffix == ".npy":
            if moved:
                raise KeyboardInterrupt
            moved.append(path)
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "glob", lambda path, pattern: sorted(glob(path, pattern), reverse=labels_first))
        patch.setattr(Path, "replace", replace_once)
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, {}, {"train": whole}, extract, [1], say=[].append)
    cache = lax(extract)
    labeled = np.flatnonzero(cache.labels("train") >= 0)
    np.testing.assert_array_equal(cache.features("train", 1)[labeled, 0], labeled)


def test_a_few_shot_fraction_is_drawn_of_all_training_images_from_those_that_do_not_validate():
    labels = np.repeat(np.arange(2), 100)
    options = probe.parse(["RUN", "OUT", "--fractions=0.5", "--shots="])
    fit = np.setdiff1d(np.arange(200), np.arange(0, 200, 10))
    ((name, drawn),) = probing.plans_of(labels, fit, options)
    assert name == "50 %"
    assert np.bincount(labels[fit[drawn[0]]]).tolist() == [50, 50]
    assert len({tuple(indices) for indices in drawn}) == options.seeds == 5


def test_features_are_extracted_where_a_system_cannot_take_room_on_the_disk_beforehand(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    whole, extract = images_of(8)
    cache = open_cache(tmp_path, {}, {"train": whole}, extract, [1])
    np.testing.assert_array_equal(cache.features("train", 1)[:7, 0], np.arange(7))


def test_images_that_a_disk_lost_for_a_while_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FLUSH", 0.0)
    whole, extract = images_of(200)

    def lost(batch):
        return extract(batch | {"valid": batch["valid"] & (batch["batch_index"] < 100)})

    with pytest.raises(DataError, match="5 of the first 104 images cannot be read - the train images"):
        open_cache(tmp_path, {}, {"train": whole}, lost, [1])
    assert not list(tmp_path.glob("*/meta.json"))
    said = []
    few = open_cache(tmp_path, {}, {"train": whole}, extract, [1], say=said.append)
    assert said[0] == "features: train goes on at image 96 of 200"
    assert np.flatnonzero(few.labels("train") < 0).tolist() == [5, 7]
    mended = lambda batch: extract(batch | {"valid": batch["batch_index"] < 200})  # noqa: E731
    more = open_cache(tmp_path, {}, {"train": whole}, mended, [1, 2], say=said.append)
    assert np.flatnonzero(more.labels("train") < 0).tolist() == [5, 7]  # of 7, block 1 is not there
    many = open_cache(tmp_path, {"b": 1}, {"train": whole}, lost, [1], max_bad_fraction=0.6, say=said.append)
    assert (many.labels("train") < 0).sum() == 102
    with pytest.raises(DataError, match="5 of the first 104"):  # what was let pass then is not now
        open_cache(tmp_path, {"b": 1}, {"train": whole}, lost, [1], say=said.append)


def test_features_that_are_not_finite_are_refused_and_say_whether_the_type_is_too_small(tmp_path):
    whole, _ = images_of(8)
    for value, fix in ((np.nan, "diverged"), (1e6, "--dtype=float32")):
        extract = lambda batch, value=value: batch | {"block_1": np.full((8, 2), value, np.float32)}  # noqa: E731
        with pytest.raises(NonFiniteError, match=fix):
            open_cache(tmp_path, {}, {"train": whole}, extract, [1], dtype="float16")
    assert not list(tmp_path.glob("*/meta.json"))


@pytest.mark.slow
def test_the_test_images_choose_nothing_and_images_without_a_label_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {split: rng.normal(size=(90, 6)).astype(np.float32) for split in ("train", "test")}
    labels = {split: rng.integers(-1, 5, 90) for split in arrays}
    source = SimpleNamespace(classes=tuple("abcde"), describe=lambda: "images")
    options = probe.parse(["RUN", "OUT", *QUICK, "--fractions=0.3"])

    def rows(test_labels):
        for split, of in (("train", labels["train"]), ("test", test_labels)):
            np.save(tmp_path / f"{split}_labels.npy", of)
        cache = FeatureCache(tmp_path)
        sets = probing.labeled(cache, {"train": source, "test": source}, options)
        assert len(sets["train"]) == (labels["train"] >= 0).sum()
        block = probing.Block(
            *(arrays[split][sets[split]] for split in arrays), (np.zeros(6, np.float32), np.ones(6, np.float32))
        )
        return [
            *probing.linear_rows({1: block}, sets, options).values(), *probing.logistic_rows(block, sets, options),
            *probing.ridge_rows(block, sets, options), *probing.knn_rows(block, sets, options),
            *probing.few_shot_rows(block, sets, options),
        ]  # fmt: skip

    own, other = rows(labels["test"]), rows(np.where(labels["test"] < 0, -1, (labels["test"] + 1) % 5))
    chosen = [[(row["method"], row["setting"], row["validation_top1"]) for row in each] for each in (own, other)]
    assert chosen[0] == chosen[1]
    assert [row["top1"] for row in own] != [row["top1"] for row in other]
    assert {row["test_images"] for row in own} == {int((labels["test"] >= 0).sum())}


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a",), "the following arguments are required: OUT - command line"),
        (("a", "b", "c"), "unknown argument 'c' - command line"),
        (("a", "b", "--crop-fraction=1.5"), "--crop-fraction=1.5 - command line - give one above 0, up to 1"),
        (("a", "b", "--regularizations=0"), "regularizations is 0.0 - --regularizations - give a number above 0"),
        (("a", "b", "--max-bad-fraction=2"), "--max-bad-fraction=2 - command line - give one of 0 to 1"),
        (("a", "b", "--blcks=1"), "unknown argument '--blcks=1' - command line - did you mean --blocks"),
        (("a", "b", "--pool=token"), "unknown pool 'token'"),
        (("a", "b", "--only=linear,kn"), "unknown probe 'kn' - did you mean knn"),
        (("a", "b", "--only="), "--only= leaves no probe"),
        (("a", "b", "--dtype=float8"), "unknown dtype 'float8'"),
        (("a", "b", "--blocks=one"), "--blocks=one - command line - give whole numbers"),
        (("a", "b", "--seeds=0"), "seeds is 0"),
        (("a", "b", "--seeds=1,2"), "--seeds=1,2 - command line - give one number"),
        (("a", "b", "--temperature=0"), "temperature is 0.0"),
        (("a", "b", "--temperature=nan"), "temperature is nan"),
        (("a", "b", "--fractions=1.5"), "--fractions=1.5 - command line - give numbers below 1"),
        (("a", "b", "--validation-fraction=1"), "--validation-fraction=1"),
        (("a", "b", "--fractions=0.95"), "--fractions=0.95 and --validation-fraction=0.1 are more than all images"),
        (("a", "b", "--seed=18446744073709551616"), "18446744073709551616 - command line - give a number of 0 to"),
        (("a", "b", "--learning-rates=inf"), "--learning-rates=inf - command line - give finite numbers"),
        (("a", "b", "--neighbors="), "--neighbors is empty"),
        (("a", "b", "--image-size=1,2,3"), "--image-size=1,2,3 - command line - give height,width"),
    ],
)
def test_mistakes_on_the_command_line_are_told_in_one_line(arguments, line):
    message = told(*arguments)
    assert line in message
    assert "\n" not in message


def test_flags_are_taken_with_hyphens_and_with_underscores():
    ways = [probe.parse(["RUN", "OUT", flag]) for flag in ("--image-size=16,32", "--image_size=16,32")]
    assert ways[0] == ways[1]
    assert ways[0].image_size == (16, 32)
    assert probe.parse(["RUN", "OUT", "--fractions=0.1", "--validation-fraction=0.9"]).fractions == (0.1,)
    assert probe.parse(["RUN", "OUT", "--validation-fraction=0.95", "--only=knn"]).only == ("knn",)


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path, workdir):
    out = tmp_path / "out"
    assert "no such folder" in told(tmp_path / "nowhere", out, kind=CheckpointError)
    assert "no checkpoint" in told(tmp_path, out, kind=CheckpointError)
    assert "the run says of none" in told(workdir, out, kind=DataError)
    assert "block 3 of an encoder of 2 blocks - --blocks" in told(workdir, out, "--data=digits", "--blocks=3")
    assert "'cubic'" in told(workdir, out, "--data=digits", "--interpolation=cubic")
    same = ("--data=digits", "--train-split=test")
    assert "split 'test' to fit to and to report on" in told(workdir, out, *same)
    renamed = ("--data=digits", "--train-split=val")
    assert "to report on are the same, or some are" in told(workdir, out, *renamed)
    one = folder_of(tmp_path / "one", {"train/a": 4, "test/a": 2})
    assert "a probe needs two" in told(workdir, out, f"--data={one}", kind=DataError)
    other = folder_of(tmp_path / "other", {"train/a": 4, "train/b": 4, "test/c": 2, "test/d": 2})
    assert "no class has training and test images" in told(workdir, out, f"--data={other}", kind=DataError)
    single = folder_of(tmp_path / "single", {"train/a": 1, "train/b": 1, "test/a": 2, "test/b": 2})
    assert "none to choose settings by" in told(workdir, out, f"--data={single}", "--only=ridge", kind=DataError)
    with lock_folder(out):
        assert "OUT is in use" in told(workdir, out, "--data=digits", kind=BusyError)
    (tmp_path / "file").write_text("")
    assert "cannot read or write: File exists" in told(workdir, tmp_path / "file", "--data=digits")


def test_a_class_without_images_in_one_part_is_told_and_probed_without(tmp_path, workdir, capsys, monkeypatch):
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: made_up)
    lacking = os.fsdecode(b"lacking\xff")  # no UTF-8
    images = folder_of(tmp_path / lacking, {"train/a": 12, "train/b": 12, "test/a": 3, "test/b": 3, "test/c\udcff": 2})
    tool(workdir, tmp_path / "out", f"--data={images}", "--only=knn", "--neighbors=3", "--blocks=1")
    assert "classes without train images (1): c\\xff\n" in capsys.readouterr().out
    text = (tmp_path / "out" / "results.json").read_text()
    assert "\\udc" not in text
    said = json.loads(text)
    assert said["options"]["data"] == str(tmp_path / "lacking\\xff")
    assert said["classes"] == 3
    assert {row["test_images"] for row in said["rows"]} == {8}
    assert all(row["top1"] <= 6 / 8 and row["top5"] is None for row in said["rows"])


FOREIGN = "not the results of a probe"


@pytest.mark.parametrize(
    ("name", "text", "line"),
    [
        ("results.csv", "model,img_size,top1\nvit_b,224,80\n", "a file with other columns than a probe's"),
        ("results.csv", "", "a file with other columns than a probe's"),
        ("results.json", "[1, 2]", FOREIGN),
        ("results.json", '{"top1": 1}', FOREIGN),
        ("results.json", '{"options": {}, "rows": [{"method": "knn"}]}', FOREIGN),
        ("results.json", '{"options": {}, "rows": 3}', FOREIGN),
        ("results.json", "no JSON", FOREIGN),
    ],
)
def test_a_file_of_somebody_else_is_refused_before_anything_is_read_and_stays(tmp_path, name, text, line):
    (tmp_path / name).write_text(text)
    assert f"{line} - {tmp_path / name} - give another OUT" in told("RUN", tmp_path)
    assert (tmp_path / name).read_text() == text


def test_images_with_names_of_classes_and_without_labels_are_told_before_they_are_read(tmp_path, monkeypatch):
    class Images(list):
        classes, describe = ("a", "b"), staticmethod(lambda: "a test set")

    sources = {"train": Images([{"label": 0}] * 3), "test": Images([{"label": -1}] * 2)}
    monkeypatch.setattr(probing, "open_source", lambda trained, path, split: sources[split])
    trained = Run({}, {}, None, tmp_path, (16, 16))
    with pytest.raises(DataError, match=r"images without labels, .* - a test set - give .* as another --test-split"):
        probing.open_sources(trained, probe.parse(["RUN", "OUT", "--data=DIR"]))


@pytest.mark.parametrize(
    ("best", "tried", "told"),
    [
        ((10,), (0.1, 1, 10), "rate 10 is the highest that was tried: try --rates=10,100,1000"),
        ((1e-8, 1e-8), (1.0, 1e-7, 1e-8), "rate 1e-08 is the lowest that was tried: try --rates=1e-08,1e-09,1e-10"),
        ((1,), (0.1, 1, 10), ""),
        ((0.1, 1), (0.1, 1, 10), ""),  # equally good
        ((1,), (1,), ""),
    ],
)
def test_a_setting_at_the_end_of_what_was_tried_is_told_with_what_to_try_then(best, tried, told):
    assert probing.edge_of("rate", best, tried, "--rates") == told


def test_the_fit_to_all_images_begins_at_the_classifier_that_was_chosen():
    begun = []

    def fit_path(x, labels, strengths, start):
        begun.append(start)
        weights = np.stack([np.full((2, 2), [strength, -strength], np.float32) for strength in strengths])
        return probes.Linear(weights, np.zeros((len(strengths), 2), np.float32))

    x, labels = np.float32([[1, 1], [1, 2], [-1, -1], [-2, -1]]), np.array([0, 0, 1, 1])
    sets = {"fit": np.arange(3), "validation": np.array([3]), "train_labels": labels, "test_labels": labels,
            "train": labels, "test": labels, "classes": 2}  # fmt: skip
    block = probing.Block(x, x, (np.zeros(2, np.float32), np.ones(2, np.float32)))
    row = probing.path_row("logistic", "C", "--cs", fit_path, (-1.0, 2.0, 3.0), block, sets)
    assert row["setting"] == "C 2"  # of equals the first
    assert begun[0] is None
    assert begun[1].weights.tolist() == [[2, -2], [2, -2]]
    assert row["top1"] == 1


@pytest.fixture
def probe_made_up(tmp_path, workdir, monkeypatch):
    """Probes digits by features without a model; gives the rows of OUT."""
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: made_up)
    monkeypatch.setattr(probing, "draw_curves", lambda panels, ticks: np.zeros((8, 8, 3), np.uint8))

    def probed(*more):
        tool(workdir, tmp_path, "--data=digits", "--limit=64", "--neighbors=5", *more)
        return json.loads((tmp_path / "results.json").read_text())["rows"]

    return probed


def test_results_are_written_after_each_block_and_are_not_computed_again(tmp_path, probe_made_up, monkeypatch, capsys):
    computed = []

    def rows_of(block, sets, options, method):
        computed.append(method)
        if len(computed) == 2:
            raise KeyboardInterrupt
        yield probing.whole_row(method, sets, "best", 0.5, np.arange(len(sets["test"])), time.monotonic())

    monkeypatch.setattr(probing, "knn_rows", partial(rows_of, method="knn"))
    monkeypatch.setattr(probing, "ridge_rows", partial(rows_of, method="ridge"))
    with pytest.raises(KeyboardInterrupt):
        probe_made_up("--only=knn")
    assert [row["block"] for row in json.loads((tmp_path / "results.json").read_text())["rows"]] == [1]
    assert [row["block"] for row in probe_made_up("--only=knn")] == [1, 2, 0]
    assert computed == ["knn"] * 4  # of blocks 1 and 2, and then of blocks 2 and 0
    both = probe_made_up("--only=ridge", "--blocks=1,2")
    assert [(row["method"], row["block"]) for row in both] == [
        ("ridge", 1), ("knn", 1), ("ridge", 2), ("knn", 2), ("knn", 0),
    ]  # fmt: skip
    assert sum(row["chosen"] for row in both) == 2
    assert computed == ["knn"] * 4 + ["ridge"] * 2
    capsys.readouterr()
    assert len(probe_made_up("--only=knn", "--temperature=0.5")) == 5
    assert "3 earlier results are of other weights, images or options" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "earlier_1" / "results.json").read_text())["rows"]) == 5
    assert (tmp_path / "earlier_1" / "blocks.png").exists()


def test_only_results_of_a_probe_that_is_asked_for_with_other_options_are_moved_aside(
    tmp_path, probe_made_up, monkeypatch, capsys
):
    computed = []

    def rows_of(block, sets, options, method):
        computed.append(method)
        yield probing.whole_row(method, sets, "best", 0.5, np.arange(len(sets["test"])), time.monotonic())

    for method in ("knn", "ridge", "logistic"):
        monkeypatch.setattr(probing, f"{method}_rows", partial(rows_of, method=method))

    def computed_by(*options):
        computed.clear()
        rows = probe_made_up("--blocks=1", *options)
        assert len({row["method"] for row in rows}) == len(rows)
        return [row["method"] for row in rows], list(computed)

    knn = ("--only=knn", "--temperature=0.5", "--seed=1")
    assert computed_by(*knn) == (["knn"], ["knn"])
    assert computed_by("--only=ridge") == (["ridge", "knn"], ["ridge"])  # of the default temperature and seed
    assert computed_by(*knn) == (["ridge", "knn"], [])  # what decided it, the call between has kept
    assert computed_by("--only=logistic", "--seed=2") == (["logistic", "ridge", "knn"], ["logistic"])
    assert "earlier" not in capsys.readouterr().out
    assert not (tmp_path / "earlier_1").exists()
    said = json.loads((tmp_path / "results.json").read_text())
    assert said["options_of"] == {
        "knn": {"seed": 1, "validation_fraction": 0.1, "neighbors": [5], "temperature": 0.5},
        "logistic": {"seed": 2, "validation_fraction": 0.1, "inverse_regularizations": [10.0**n for n in range(-4, 5)]},
        "ridge": {"seed": 0, "validation_fraction": 0.1, "regularizations": [10.0**-n for n in range(9)]},
    }  # fmt: skip
    assert computed_by("--only=knn", "--seed=1") == (["logistic", "ridge", "knn"], ["knn"])
    assert "1 earlier results are of other weights, images or options" in capsys.readouterr().out
    said = json.loads((tmp_path / "results.json").read_text())
    few = said["rows"][0] | {"images": "1 %"}
    del said["options_of"]  # as earlier versions wrote it, whose few-shot draws were of fewer images
    (tmp_path / "results.json").write_text(json.dumps(said | {"rows": [*said["rows"], few]}))
    assert computed_by("--only=ridge", "--seed=1") == (["logistic", "ridge", "knn"], [])
    assert "1 earlier results are of other" in capsys.readouterr().out


def test_the_line_of_a_block_tells_the_neighbors_that_the_validation_images_choose(capsys):
    rows = [
        {"block": 1, "pool": "patches", "method": "knn", "images": "all", "seconds": 1.0,
         "validation_top1": validation, "top1": test}
        for validation, test in ((0.3, 0.6), (0.4, 0.5), (0.2, 0.7))
    ]  # fmt: skip
    probing.tell(rows)
    assert "knn 50.0" in capsys.readouterr().out


@pytest.mark.slow
def test_a_linear_probe_that_diverges_is_told_and_costs_no_other_result(tmp_path, probe_made_up, capsys):
    options = ("--blocks=1", "--learning-rates=1e38", "--weight-decays=1e10", "--epochs=1")
    linear, knn = probe_made_up("--only=linear,knn", *options)
    assert (linear["top1"], linear["validation_top1"], linear["chosen"]) == (None, None, False)
    assert knn["chosen"]
    assert knn["top1"] > 0
    out = capsys.readouterr().out
    assert "give lower --learning-rates" in out
    assert "block 1, patches: linear diverged, knn " in out
    assert "diverged everywhere" in out


def test_few_shot_without_a_draw_and_without_another_probe_is_refused(probe_made_up):
    with pytest.raises(DataError, match="no few-shot draw is left"):
        probe_made_up("--only=fewshot", "--shots=1000", "--fractions=", "--blocks=1")


def test_a_device_without_enough_memory_is_told_in_one_line_and_other_errors_are_not(tmp_path, monkeypatch):
    def fail(options, what="RESOURCE_EXHAUSTED: Out of memory while trying to allocate 5 bytes"):
        raise jax.errors.JaxRuntimeError(what)

    monkeypatch.setattr(probing, "probe", fail)
    assert "not enough memory" in told("RUN", tmp_path, kind=DataError)
    monkeypatch.setattr(probing, "probe", lambda options: fail(options, "INTERNAL: of our own"))
    with pytest.raises(jax.errors.JaxRuntimeError):
        tool("RUN", tmp_path)


@pytest.mark.parametrize(
    ("train", "test", "shared"),
    [("train", "train[75%:]", True), ("train[:50%]", "train[50%:]", False), ("train", "test", False)],
)
def test_slices_of_tfds_that_overlap_share_images(train, test, shared):
    def sliced(split):
        places = {"train": (0, 8), "train[75%:]": (6, 2), "train[:50%]": (0, 4), "train[50%:]": (4, 4)}
        skip, take = places.get(split, (0, 4))
        part = SimpleNamespace(filename=split.split("[")[0], skip=skip, take=take)
        return SimpleNamespace(file_instructions=lambda: [part])

    assert share_images(sliced(train), sliced(test)) == shared


@pytest.mark.slow
def test_slices_of_a_real_tfds_data_set_that_overlap_share_images(tmp_path):
    from tiny_tfds import TinyShades

    TinyShades(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = partial(make_source, "tfds", name="tiny_shades", data_dir=str(tmp_path))
    assert share_images(source(split="train"), source(split="train[75%:]"))
    assert not share_images(source(split="train[:75%]"), source(split="train[75%:]"))
    assert not share_images(source(split="train"), source(split="test"))


def test_the_images_of_a_run_are_tested_on_those_that_it_was_not_trained_on(tmp_path):
    images = folder_of(tmp_path / "images", {"a": 40, "b": 40})
    own = {"source": "auto", "path": str(images), "name": "", "data_dir": "", "split": "train"}
    own |= {"heldout_split": "validation", "heldout_fraction": 0.05}
    trained = Run({}, {"data": own}, None, tmp_path, (16, 16))
    options = [probe.parse(["RUN", "OUT", f"--data={path}"]) for path in ("", f"{images}/")]
    names = []
    for each_way in options:
        sources = probing.open_sources(trained, each_way)
        names.append([{each.name(n) for n in range(len(each))} for each in sources.values()])
    assert names[0] == names[1]
    assert len(names[0][0]) + len(names[0][1]) == 80
    other = probing.open_sources(trained._replace(config={}), options[1])
    assert len(other["test"]) > len(names[0][1])


def test_folders_of_like_names_and_sizes_are_not_the_same_images(tmp_path):
    folder_of(tmp_path, {f"{part}/{name}": 1 for part in ("train", "test") for name in "ab"})
    for path in tmp_path.glob("*/*/*.png"):
        path.write_bytes(path.read_bytes().ljust(1000))
    source = partial(make_source, "folder", path=str(tmp_path))
    assert not share_images(source(split="train"), source(split="test"))
    assert share_images(source(split="validation"), source(split="test"))


@pytest.mark.slow
def test_a_kill_while_features_are_read_costs_no_more_than_what_was_not_on_the_disk(tmp_path, workdir):
    arguments = (workdir, tmp_path / "killed", "--data=digits", "--only=ridge", "--batch-size=8")
    line, keywords = command(*arguments, script=("-c", KILLED))
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, **keywords)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "features").glob("*.partial/progress.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed" / "features").glob("*/meta.json"))
    again, unbroken = (
        run(workdir, tmp_path / name, *arguments[2:], script=PROBE, timeout=120) for name in ("killed", "unbroken")
    )
    assert again.returncode == unbroken.returncode == 0, again.stderr
    assert re.search(r"train goes on at image [1-9]\d*", again.stdout)
    for name in ("features/*/*.npy", "results.csv"):
        ours, theirs = ([*sorted((tmp_path / folder).glob(name))] for folder in ("killed", "unbroken"))
        assert [path.name for path in ours] == [path.name for path in theirs] != []
        for a, b in zip(ours, theirs, strict=True):
            if a.suffix == ".npy":
                assert a.read_bytes() == b.read_bytes()


KILLED = """
import sys
from simmim_jax.evals import feature_cache
from simmim_jax.tools.probe import __main__ as probe
feature_cache.FLUSH = 0.0
probe.run(sys.argv[1:])
"""


@pytest.mark.slow
def test_the_command_line_probes_and_a_full_disk_is_told_in_one_line(tmp_path, workdir):
    done = run(workdir, tmp_path / "out", *QUICK, "--only=ridge", script=PROBE)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "ridge     all" in done.stdout
    full = run(workdir, tmp_path / "full", *QUICK, "--only=ridge", script=PROBE, file_limit=4)
    assert full.returncode == 2
    assert re.fullmatch(r"ERROR\[config\] cannot read or write: File too large - .+ - .+", full.stderr.strip())
