"""The probe command: the feature cache, the choice of settings, the results on disk, and mistakes."""

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
from simmim_jax.data.sources.folder import Folder
from simmim_jax.errors import BusyError, CheckpointError, ConfigError, DataError, NonFiniteError
from simmim_jax.evals import probes
from simmim_jax.files import lock_folder
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run
from simmim_jax.tools.probe import __main__ as probe
from simmim_jax.tools.probe import feature_cache, methods, plot, probing, results, sets
from simmim_jax.tools.probe.feature_cache import FeatureCache, Pass, open_cache

QUICK = ("--data=digits", "--limit=160", "--epochs=2", "--seeds=2", "--shots=1,50", "--fractions=0.2",
         "--neighbors=5,10", "--learning-rates=0.1,0.3", "--weight-decays=0", "--regularizations=0.1,0.01",
         "--C=0.1,1")  # fmt: skip


def tool(*arguments):
    """Run the command in this process."""
    probe.run([str(argument) for argument in arguments])


def error_line(*arguments, kind=ConfigError) -> str:
    """Return the error of the command."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A workdir of an untrained ViT with two blocks and a class token, for gray images."""
    folder = tmp_path_factory.mktemp("probed") / "workdir"
    options = {"width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "class_token": True}
    shapes = jax.eval_shape(tiny_encoder(**options).init, jax.random.key(0), jnp.zeros((1, 16, 16, 1)))["params"]
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(0, 0.2, x.shape).astype(x.dtype), shapes)
    config = {"encoder": {"name": "vit", "size": "ti", **options}, "image_size": [16, 16], "mean": [0.3], "std": [0.4]}
    checkpoint.write_params(str(folder), {"encoder": params}, config)
    return folder


def make_folder(root, images):
    """Write a folder of images: {"train/a": 3, ...} are the counts."""
    rng = np.random.default_rng(0)
    for name, count in images.items():
        (root / name).mkdir(parents=True)
        for n in range(count):
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / name / f"{n}.png")
    return root


def read_results(folder):
    return json.loads((folder / "results.json").read_text())


QUICKEST = ("patches", ("ridge",), {"ridge": 1})
SLOW = ("all", probe.METHODS, {"linear": 1, "logistic": 3, "ridge": 1, "knn": 4})


@pytest.mark.parametrize(("pool", "only", "rows_of"), [QUICKEST, pytest.param(*SLOW, marks=pytest.mark.slow)])
def test_every_method_block_and_pooling_has_a_row_and_validation_chooses(
    tmp_path, workdir, capsys, pool, only, rows_of
):
    tool(workdir, tmp_path, f"--pool={pool}", *QUICK, f"--only={','.join(only)}")
    pools, few = ("patches", "class_token", "both") if pool == "all" else (pool,), "fewshot" in only
    out = capsys.readouterr().out
    found = read_results(tmp_path)
    with open(tmp_path / "results.csv") as file:
        assert [row["method"] for row in csv.DictReader(file)] == [row["method"] for row in found["rows"]]
    kinds = {(row["images"], row["setting"]) for row in found["rows"] if row["method"] == "knn"}
    assert not few or {("all", "k 5"), ("all", "k 10"), ("1 per class", "k 1")} <= kinds
    assert ("no draws of 50 per class" in out) == few
    for method, count in rows_of.items():
        of_method = [row for row in found["rows"] if row["method"] == method]
        assert len(of_method) == count * 3 * len(pools)
        assert {(row["block"], row["pool"]) for row in of_method} == {(b, p) for b in (1, 2, 0) for p in pools}
        for images in {row["images"] for row in of_method}:
            same = [row for row in of_method if row["images"] == images]
            (chosen,) = [row for row in same if row["chosen"]]
            assert chosen["validation_top1"] == max(row["validation_top1"] for row in same)
            assert {(row["block"], row["pool"]) for row in same if row["paper"]} == {(1, "patches")}
    assert {row["images"] for row in found["rows"] if row["edge"]} == {"all"}  # both of two settings are edges
    assert {line.split(",")[0] for line in found["edges"]} == set(rows_of) & {"linear", "logistic", "ridge"}
    assert "".join(f"{line}\n" for line in found["edges"]) in out
    assert (found["crop_fraction"], found["interpolation"]) == (1.0, "bicubic")
    drawn = [row for row in found["rows"] if row["images"] == "1 per class"]
    assert all(row["top1_min"] <= row["top1"] <= row["top1_max"] and row["train_images"] == 10 for row in drawn)
    assert "paper: block 1 of 2" in out
    assert Image.open(tmp_path / "blocks.png").size == (700 * (1 + few), len(pools) * 380)


def fake_features(params, batch):
    """Features of three blocks without a model."""
    pixels = batch["image"].reshape(len(batch["image"]), -1)[:, 40:44].astype(np.float32)
    return batch | {f"block_{n}": pixels for n in range(3)}


@pytest.fixture
def probe_fake(tmp_path, workdir, monkeypatch):
    """A function that probes digits without a model, and returns the rows in OUT."""
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: fake_features)
    monkeypatch.setattr(plot, "write_chart", lambda path, rows, paper: None)

    def probe_digits(*more):
        tool(workdir, tmp_path, "--data=digits", "--limit=64", "--neighbors=5", *more)
        return read_results(tmp_path)["rows"]

    return probe_digits


# --- the feature cache


def fake_pass(count, width=3, batch_size=8, stop_at=None):
    """Return (a Pass, an extract whose features are the index of the image). The pass breaks off at batch `stop_at`."""

    def batches(start):
        for n in range(start, -(-count // batch_size)):
            if n == stop_at:
                raise KeyboardInterrupt
            index = np.arange(n * batch_size, (n + 1) * batch_size)
            labels = np.where(index == 5, -1, index % 4)
            yield {"batch_index": index, "valid": (index < count) & (index != 7), "label": labels}

    def extract(batch):
        rows = np.repeat(batch["batch_index"][:, None], width, axis=1).astype(np.float32)
        return batch | {"block_1": rows, "block_2": -rows}

    return Pass(count, batch_size, batches), extract


def test_an_interrupted_extraction_continues_and_damaged_files_are_read_again(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FLUSH_SECONDS", 0.0)
    lines = []
    whole, extract = fake_pass(43)
    passes, log = {"train": whole, "test": whole}, lines.append
    for stop_at, blocks in ((3, [1, 2]), (5, [2, 1])):
        cut, _ = fake_pass(43, stop_at=stop_at)
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, {"a": 1}, {"train": whole, "test": cut}, extract, blocks, log=log)
        assert not list(tmp_path.glob("*/meta.json"))
    assert "features: test continues at image 24 of 43" in lines
    cache = open_cache(tmp_path, {"a": 1}, passes, extract, [1, 2], log=log)
    assert lines[-2] == "features: test continues at image 40 of 43"
    for split in passes:
        expected = np.where(np.arange(43) == 7, 0, np.arange(43))  # unreadable: zeros without a label
        np.testing.assert_array_equal(cache.features(split, 2), -np.repeat(expected[:, None], 3, axis=1))
        labels = cache.labels(split)
        assert np.flatnonzero(labels < 0).tolist() == [5, 7]
        assert (labels[8:] == np.arange(8, 43) % 4).all()
    assert [path.name for path in tmp_path.iterdir()] == [cache.folder.name]
    damaged = cache.folder / "train_block_01.npy"
    damaged.write_bytes(damaged.read_bytes()[:200])
    open_cache(tmp_path, {"a": 1}, passes, extract, [2], log=log)
    assert lines[-1].startswith("features: test 43/43")
    small = open_cache(tmp_path, {"a": 1}, passes, extract, [2], "float16", log)
    assert small.folder != cache.folder
    assert small.features("train", 2).dtype == np.float16
    open_cache(tmp_path, {"a": 1}, passes, extract, [2], log=log)
    assert "reusing 1 blocks" in lines[-1]


@pytest.mark.parametrize("batch_size", [5, 64])
def test_an_extraction_continues_at_another_batch_size_but_not_with_other_blocks(tmp_path, monkeypatch, batch_size):
    monkeypatch.setattr(feature_cache, "FLUSH_SECONDS", 0.0)
    cut, extract = fake_pass(43, batch_size=4, stop_at=3)
    whole, _ = fake_pass(43, batch_size=batch_size)
    for identity in ({"a": 1}, {"a": 2}):
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, identity, {"train": cut}, extract, [1])
    later = lambda batch: batch | {"block_1": extract(batch)["block_1"] + 100}  # noqa: E731
    lines = []
    cache = open_cache(tmp_path, {"a": 1}, {"train": whole}, later, [1], log=lines.append)
    assert lines[0] == "features: train continues at image 12 of 43"
    expected = np.arange(43) + np.where(np.arange(43) < 12, 0, 100)
    expected[7] = 0
    np.testing.assert_array_equal(cache.features("train", 1)[:, 0], expected)
    assert np.flatnonzero(cache.labels("train") < 0).tolist() == [5, 7]
    assert cache.meta["unreadable"] == {"train": 1}
    open_cache(tmp_path, {"a": 2}, {"train": whole}, extract, [1, 2], log=lines.append)
    assert "of other blocks" in "".join(lines)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_kill_between_the_renames_that_add_blocks_costs_nothing(tmp_path, monkeypatch, damaged):
    whole, extract = fake_pass(43)
    passes, lines = {"train": whole, "test": whole}, []
    replace, state = Path.replace, {"left": 99}

    def replace_until_killed(path, target):
        if path.suffix == ".npy" or "meta.json" in path.name:
            state["left"] -= 1
            if state["left"] < 0:
                raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", replace_until_killed)
    for n in range(5):  # two files of labels, two of features, meta.json
        before = open_cache(tmp_path, {"n": n}, passes, extract, [1], log=lines.append)
        if damaged:
            (before.folder / "test_block_01.npy").write_bytes(b"")
        state["left"] = n
        with pytest.raises(KeyboardInterrupt):
            open_cache(tmp_path, {"n": n}, passes, extract, [1, 2][damaged:], log=lines.append)
        state["left"] = 99
        cache = open_cache(tmp_path, {"n": n}, passes, extract, [1, 2][damaged:], log=lines.append)
        assert "continues" not in "".join(lines)  # all images had been read
        for split in passes:
            assert np.flatnonzero(cache.labels(split) < 0).tolist() == [5, 7]
            for block, sign in ((1, 1), (2, -1))[damaged:]:
                np.testing.assert_array_equal(cache.features(split, block)[8:, 0], sign * np.arange(8, 43))
        assert not list(tmp_path.glob("*.partial"))
    assert ("is damaged" in "".join(lines)) == damaged


@pytest.mark.parametrize("labels_first", [False, True])
def test_features_with_many_gaps_are_never_mixed_with_those_that_replace_them(tmp_path, monkeypatch, labels_first):
    whole, extract = fake_pass(43)
    gaps = lambda batch: extract(batch | {"valid": (batch["batch_index"] >= 30) | (batch["batch_index"] == 7)})  # noqa: E731
    open_lax = partial(open_cache, tmp_path, {}, {"train": whole}, blocks=[1], max_bad_fraction=0.9, log=[].append)
    open_lax(gaps)
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
            open_cache(tmp_path, {}, {"train": whole}, extract, [1], log=[].append)
    cache = open_lax(extract)
    labeled = np.flatnonzero(cache.labels("train") >= 0)
    np.testing.assert_array_equal(cache.features("train", 1)[labeled, 0], labeled)


def test_too_many_unreadable_images_are_refused_and_read_again_later(tmp_path, monkeypatch):
    monkeypatch.setattr(feature_cache, "FLUSH_SECONDS", 0.0)
    monkeypatch.delattr(os, "posix_fallocate")  # as on macOS
    whole, extract = fake_pass(200)

    def lost(batch):
        return extract(batch | {"valid": batch["valid"] & (batch["batch_index"] < 100)})

    with pytest.raises(DataError, match="5 of the first 104 images"):
        open_cache(tmp_path, {}, {"train": whole}, lost, [1])
    assert not list(tmp_path.glob("*/meta.json"))
    lines = []
    few = open_cache(tmp_path, {}, {"train": whole}, extract, [1], log=lines.append)
    assert lines[0] == "features: train continues at image 96 of 200"
    assert np.flatnonzero(few.labels("train") < 0).tolist() == [5, 7]
    fixed = lambda batch: extract(batch | {"valid": batch["batch_index"] < 200})  # noqa: E731
    more = open_cache(tmp_path, {}, {"train": whole}, fixed, [1, 2], log=lines.append)
    assert np.flatnonzero(more.labels("train") < 0).tolist() == [5, 7]  # block 1 lacks image 7
    many = open_cache(tmp_path, {"b": 1}, {"train": whole}, lost, [1], max_bad_fraction=0.6, log=lines.append)
    assert (many.labels("train") < 0).sum() == 102
    with pytest.raises(DataError, match="5 of the first 104"):  # a stricter limit applies to a complete cache too
        open_cache(tmp_path, {"b": 1}, {"train": whole}, lost, [1], log=lines.append)


def test_features_that_are_not_finite_are_refused_and_overflow_is_named(tmp_path):
    whole, _ = fake_pass(8)
    for value, fix in ((np.nan, "diverged"), (1e6, "--dtype=float32")):
        extract = lambda batch, value=value: batch | {"block_1": np.full((8, 2), value, np.float32)}  # noqa: E731
        with pytest.raises(NonFiniteError, match=fix):
            open_cache(tmp_path, {}, {"train": whole}, extract, [1], dtype="float16")
    assert not list(tmp_path.glob("*/meta.json"))


@pytest.mark.slow
def test_features_are_reused_unless_something_that_decides_them_changed(tmp_path, probe_fake, capsys):
    def extracted(*more):
        probe_fake("--only=ridge", "--overwrite", *more)
        out = capsys.readouterr().out
        assert ("reusing" in out) != ("features: train" in out)
        return "features: train" in out

    assert extracted("--blocks=2")
    assert not extracted("--blocks=2", "--seed=1", "--interpolation=bicubic")  # the run's interpolation
    assert extracted("--blocks=2", "--interpolation=nearest")
    assert read_results(tmp_path)["interpolation"] == "nearest"
    assert extracted("--blocks=1")  # a block that was not extracted


# --- sets and methods


def test_few_shot_fractions_count_all_training_images_and_never_draw_validation_images():
    labels = np.repeat(np.arange(2), 100)
    options = probe.parse(["RUN", "OUT", "--fractions=0.5", "--shots="])
    fit = np.setdiff1d(np.arange(200), np.arange(0, 200, 10))
    ((name, drawn),) = sets.make_draws(labels, fit, options)
    assert name == "50 %"
    assert np.bincount(labels[fit[drawn[0]]]).tolist() == [50, 50]
    assert len({tuple(indices) for indices in drawn}) == options.seeds == 5


@pytest.mark.slow
def test_test_images_choose_nothing_and_images_without_label_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {split: rng.normal(size=(90, 6)).astype(np.float32) for split in ("train", "test")}
    labels = {split: rng.integers(-1, 5, 90) for split in arrays}
    source = SimpleNamespace(classes=tuple("abcde"), describe=lambda: "images")
    options = probe.parse(["RUN", "OUT", *QUICK, "--fractions=0.3"])

    def rows(test_labels):
        for split, values in (("train", labels["train"]), ("test", test_labels)):
            np.save(tmp_path / f"{split}_labels.npy", values)
        parts = sets.make_sets(FeatureCache(tmp_path), {"train": source, "test": source}, options)
        assert len(parts.train) == (labels["train"] >= 0).sum()
        statistics = np.zeros(6, np.float32), np.ones(6, np.float32)
        block = methods.Block(arrays["train"][parts.train], arrays["test"][parts.test], statistics)
        return [
            *methods.linear_rows({1: block}, parts, options).values(),
            *methods.logistic_rows(block, parts, options),
            *methods.ridge_rows(block, parts, options),
            *methods.knn_rows(block, parts, options),
            *methods.few_shot_rows(block, parts, options),
        ]

    own, other = rows(labels["test"]), rows(np.where(labels["test"] < 0, -1, (labels["test"] + 1) % 5))
    chosen = [[(row["method"], row["setting"], row["validation_top1"]) for row in each] for each in (own, other)]
    assert chosen[0] == chosen[1]
    assert [row["top1"] for row in own] != [row["top1"] for row in other]
    assert {row["test_images"] for row in own} == {int((labels["test"] >= 0).sum())}


@pytest.mark.parametrize(
    ("best", "grid", "hint"),
    [
        ((10,), (0.1, 1, 10), "rate 10 is the largest value tried: try --rates=10,100,1000"),
        ((1e-8, 1e-8), (1.0, 1e-7, 1e-8), "rate 1e-08 is the smallest value tried: try --rates=1e-08,1e-09,1e-10"),
        ((1,), (0.1, 1, 10), ""),
        ((0.1, 1), (0.1, 1, 10), ""),  # a tie
        ((1,), (1,), ""),
    ],
)
def test_a_setting_at_the_edge_of_its_grid_gives_a_hint(best, grid, hint):
    assert methods.grid_edge("rate", best, grid, "--rates") == hint


def test_the_fit_to_all_images_starts_at_the_chosen_classifier():
    starts = []

    def fit_path(x, labels, values, start):
        starts.append(start)
        weights = np.stack([np.full((2, 2), [value, -value], np.float32) for value in values])
        return probes.Linear(weights, np.zeros((len(values), 2), np.float32))

    x, labels = np.float32([[1, 1], [1, 2], [-1, -1], [-2, -1]]), np.array([0, 0, 1, 1])
    parts = sets.Sets(2, labels, labels, labels, labels, np.arange(3), np.array([3]), [])
    block = methods.Block(x, x, (np.zeros(2, np.float32), np.ones(2, np.float32)))
    row = methods.path_row("logistic", fit_path, methods.Strength("C", "--C", (-1.0, 2.0, 3.0)), block, parts)
    assert row["setting"] == "C 2"  # the first of equally good ones
    assert starts[0] is None
    assert starts[1].weights.tolist() == [[2, -2], [2, -2]]
    assert row["top1"] == 1


@pytest.mark.slow
def test_a_linear_probe_that_diverges_costs_no_other_result(probe_fake, capsys):
    options = ("--blocks=1", "--learning-rates=1e38", "--weight-decays=1e10", "--epochs=1")
    linear, knn = probe_fake("--only=linear,knn", *options)
    assert (linear["top1"], linear["validation_top1"], linear["chosen"]) == (None, None, False)
    assert knn["chosen"]
    assert knn["top1"] > 0
    out = capsys.readouterr().out
    assert "--learning-rates" in out
    assert "block 1, patches: linear diverged, knn " in out


# --- results


def fake_rows(method, computed, stop_at=None):
    """Return a method that only records its call."""

    def rows(block, parts, options):
        computed.append(method)
        if len(computed) == stop_at:
            raise KeyboardInterrupt
        yield methods.make_row(method, parts, "best", 0.5, np.arange(len(parts.test)), time.monotonic())

    return rows


def test_results_are_written_after_each_block_and_not_computed_again(tmp_path, probe_fake, monkeypatch):
    computed = []
    monkeypatch.setattr(methods, "knn_rows", fake_rows("knn", computed, stop_at=2))
    monkeypatch.setattr(methods, "ridge_rows", fake_rows("ridge", computed))
    with pytest.raises(KeyboardInterrupt):
        probe_fake("--only=knn")
    assert [row["block"] for row in read_results(tmp_path)["rows"]] == [1]
    assert [row["block"] for row in probe_fake("--only=knn")] == [1, 2, 0]
    assert computed == ["knn"] * 4  # blocks 1 and 2, then blocks 2 and 0
    both = probe_fake("--only=ridge", "--blocks=1,2")
    assert [(row["method"], row["block"]) for row in both] == [
        ("ridge", 1), ("knn", 1), ("ridge", 2), ("knn", 2), ("knn", 0),
    ]  # fmt: skip
    assert sum(row["chosen"] for row in both) == 2
    assert computed == ["knn"] * 4 + ["ridge"] * 2


def test_only_rows_that_other_options_decided_need_overwrite(tmp_path, probe_fake, monkeypatch):
    computed = []
    for method in ("knn", "ridge", "logistic"):
        monkeypatch.setattr(methods, f"{method}_rows", fake_rows(method, computed))

    def probed(*options):
        computed.clear()
        return [row["method"] for row in probe_fake("--blocks=1", *options)], list(computed)

    knn = ("--only=knn", "--temperature=0.5", "--seed=1")
    assert probed(*knn) == (["knn"], ["knn"])
    assert probed("--only=ridge") == (["ridge", "knn"], ["ridge"])  # with other defaults for k-NN
    assert probed(*knn) == (["ridge", "knn"], [])
    assert probed("--only=logistic", "--seed=2") == (["logistic", "ridge", "knn"], ["logistic"])
    assert read_results(tmp_path)["options_by_method"] == {
        "knn": {"seed": 1, "validation_fraction": 0.1, "neighbors": [5], "temperature": 0.5},
        "logistic": {"seed": 2, "validation_fraction": 0.1, "C": [10.0**n for n in range(-4, 5)]},
        "ridge": {"seed": 0, "validation_fraction": 0.1, "regularizations": [10.0**-n for n in range(9)]},
    }
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(ConfigError, match=r"\(knn\).* give --overwrite"):
        probed("--only=knn", "--seed=1")
    with pytest.raises(ConfigError, match=r"\(knn, ridge, logistic\)"):  # other features decide all rows
        probed("--only=ridge", "--limit=63")
    assert (tmp_path / "results.json").read_text() == before
    assert probed("--only=knn", "--seed=1", "--overwrite") == (["logistic", "ridge", "knn"], ["knn"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("results.csv", "model,img_size,top1\nvit_b,224,80\n"),
        ("results.json", '{"options": {}, "rows": [{"method": "knn"}]}'),
        ("results.json", "no JSON"),
    ],
)
def test_results_of_others_are_refused_first_and_stay(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert f"not the results of a probe - {tmp_path / name}" in error_line("RUN", tmp_path, "--overwrite")
    assert (tmp_path / name).read_text() == text


def test_the_line_of_a_block_has_the_k_that_validation_chooses():
    row = {"block": 1, "pool": "patches", "method": "knn", "images": "all", "seconds": 1.0}
    accuracies = ((0.3, 0.6), (0.4, 0.5), (0.2, 0.7))
    rows = [row | {"validation_top1": validation, "top1": test} for validation, test in accuracies]
    assert "knn 50.0" in results.block_summary(rows)


# --- mistakes


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--pool=token", "'token'"),
        ("--only=linear,kn", "did you mean knn"),
        ("--only=", "--only="),
        ("--blocks=one", "--blocks: 'one'"),
        ("--fractions=1.5", "--fractions=1.5"),
        ("--validation-fraction=1", "--validation-fraction=1"),
        ("--fractions=0.95", "--fractions=0.95 and --validation-fraction=0.1"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(argument, line):
    assert line in error_line("a", "b", argument)


def test_flags_take_hyphens_and_underscores():
    assert probe.parse(["RUN", "OUT", "--image_size=16,32"]).image_size == (16, 32)
    assert probe.parse(["RUN", "OUT", "--fractions=0.1", "--validation-fraction=0.9"]).fractions == (0.1,)
    assert probe.parse(["RUN", "OUT", "--validation-fraction=0.95", "--only=knn"]).only == ("knn",)


def test_what_cannot_be_probed_is_refused_in_one_line(tmp_path, workdir, monkeypatch):
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: fake_features)
    out, digits = tmp_path / "out", "--data=digits"
    assert "no such folder" in error_line(tmp_path / "nowhere", out, kind=CheckpointError)
    assert "no checkpoint" in error_line(tmp_path, out, kind=CheckpointError)
    assert str(workdir) in error_line(workdir, out, kind=DataError)
    assert "block 3 of an encoder of 2 blocks" in error_line(workdir, out, digits, "--blocks=3")
    assert "'cubic'" in error_line(workdir, out, digits, "--interpolation=cubic")
    assert "'test'" in error_line(workdir, out, digits, "--train-split=test")
    assert "--test-split" in error_line(workdir, out, digits, "--train-split=val")  # another name of the same images
    no_draws = ("--only=fewshot", "--shots=1000", "--fractions=", "--blocks=1")
    assert "few-shot" in error_line(workdir, out, digits, "--limit=64", *no_draws, kind=DataError)
    one = make_folder(tmp_path / "one", {"train/a": 4, "test/a": 2})
    assert "needs two" in error_line(workdir, out, f"--data={one}", kind=DataError)
    other = make_folder(tmp_path / "other", {"train/a": 4, "train/b": 4, "test/c": 2, "test/d": 2})
    assert "no class" in error_line(workdir, out, f"--data={other}", kind=DataError)
    single = make_folder(tmp_path / "single", {"train/a": 1, "train/b": 1, "test/a": 2, "test/b": 2})
    assert "validation" in error_line(workdir, out, f"--data={single}", "--only=ridge", kind=DataError)
    with lock_folder(out):
        assert "OUT is in use" in error_line(workdir, out, digits, kind=BusyError)
    (tmp_path / "file").write_text("")
    assert "File exists" in error_line(workdir, tmp_path / "file", digits, kind=DataError)


def test_a_class_without_training_images_is_reported_and_probed_without(tmp_path, workdir, capsys, monkeypatch):
    monkeypatch.setattr(probing, "jit_on_mesh", lambda function, mesh: fake_features)
    folder = os.fsdecode(b"lacking\xff")  # not UTF-8
    counts = {"train/a": 12, "train/b": 12, "test/a": 3, "test/b": 3, "test/c\udcff": 2}
    images = make_folder(tmp_path / folder, counts)
    tool(workdir, tmp_path / "out", f"--data={images}", "--only=knn", "--neighbors=3", "--blocks=1")
    assert "classes without train images (1): c\\xff\n" in capsys.readouterr().out
    assert "\\udc" not in (tmp_path / "out" / "results.json").read_text()
    found = read_results(tmp_path / "out")
    assert found["options"]["data"] == str(tmp_path / "lacking\\xff")
    assert found["classes"] == 3
    assert {row["test_images"] for row in found["rows"]} == {8}
    assert all(row["top1"] <= 6 / 8 and row["top5"] is None for row in found["rows"])


def test_images_without_labels_are_refused_before_they_are_read(tmp_path, monkeypatch):
    make_folder(tmp_path, {f"{split}/{name}": 2 for split in ("train", "test") for name in "ab"})
    read = Folder.__getitem__
    monkeypatch.setattr(Folder, "__getitem__", lambda source, i: read(source, i) | {"label": -1})
    with pytest.raises(DataError, match=r"labels.*--train-split"):
        sets.open_sources(Run({}, {}, None, tmp_path, (16, 16)), probe.parse(["RUN", "OUT", f"--data={tmp_path}"]))


# --- sources


def test_a_run_is_tested_on_images_that_it_was_not_trained_on(tmp_path):
    images = make_folder(tmp_path / "images", {"a": 40, "b": 40})
    own = {"source": "auto", "path": str(images), "name": "", "data_dir": "", "split": "train"}
    own |= {"heldout_split": "validation", "heldout_fraction": 0.05}
    trained = Run({}, {"data": own}, None, tmp_path, (16, 16))
    options = [probe.parse(["RUN", "OUT", f"--data={path}"]) for path in ("", f"{images}/")]
    names = []
    for each_way in options:
        sources = sets.open_sources(trained, each_way)
        names.append([{each.name(n) for n in range(len(each))} for each in sources.values()])
    assert names[0] == names[1]
    assert len(names[0][0]) + len(names[0][1]) == 80
    other = sets.open_sources(trained._replace(config={}), options[1])
    assert len(other["test"]) > len(names[0][1])


def test_folders_with_equal_names_and_sizes_are_different_images(tmp_path):
    make_folder(tmp_path, {f"{part}/{name}": 1 for part in ("train", "test") for name in "ab"})
    for path in tmp_path.glob("*/*/*.png"):
        path.write_bytes(path.read_bytes().ljust(1000))
    source = partial(make_source, "folder", path=str(tmp_path))
    assert not share_images(source(split="train"), source(split="test"))
    assert share_images(source(split="validation"), source(split="test"))


# --- whole processes


KILLED = """
import sys
from simmim_jax.tools.probe import __main__ as probe, feature_cache
feature_cache.FLUSH_SECONDS = 0.0
probe.cli.start(probe.run)
"""


@pytest.mark.slow
def test_a_killed_command_continues_to_the_same_results_and_a_full_disk_is_one_line(tmp_path, workdir):
    arguments = ("--data=digits", "--limit=600", "--only=ridge", "--batch-size=8")
    line, keywords = command(workdir, tmp_path / "killed", *arguments, script=("-c", KILLED))
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL, **keywords)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "killed" / "features").glob("*.partial/progress.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not list((tmp_path / "killed" / "features").glob("*/meta.json"))
    start = partial(run, script=("-m", "simmim_jax.tools.probe"), timeout=120)
    again, unbroken = (start(workdir, tmp_path / name, *arguments) for name in ("killed", "unbroken"))
    assert again.returncode == unbroken.returncode == 0, again.stderr
    assert again.stderr == ""
    assert re.search(r"train continues at image [1-9]\d*", again.stdout)
    ours, theirs = (sorted((tmp_path / name).glob("features/*/*.npy")) for name in ("killed", "unbroken"))
    assert [path.name for path in ours] == [path.name for path in theirs] != []
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(ours, theirs, strict=True))
    full = start(workdir, tmp_path / "full", *arguments, file_limit=4)
    assert full.returncode == 3
    assert re.fullmatch(r"ERROR\[data\] cannot read or write: File too large - .+ - .+", full.stderr.strip())
