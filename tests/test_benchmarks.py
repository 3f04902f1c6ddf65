"""benchmarks/step.py: that it runs, counts right, and says what is missing. Never how fast anything is."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective

STEP = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
HUGGING_FACE_VIT_B = 86_390_016  # parameters of transformers' ViTForMaskedImageModeling at 224 pixels (see its README)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", STEP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def objective_of(bench, side: str, size: str, image: int):
    encoder = make_encoder("vit", size, patch_size=bench.PATCH, **bench.OURS[side])
    return make_objective("simmim", encoder, image_size=(image, image), mean=bench.MEAN, std=bench.STD)


def test_the_plain_side_has_the_parameters_of_the_peer(bench):
    params = jax.eval_shape(objective_of(bench, "plain", "b", 224).init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == HUGGING_FACE_VIT_B


@pytest.mark.parametrize(("size", "width", "depth", "image"), [("ti", 192, 12, 64), ("b", 768, 12, 224)])
def test_counted_flops_are_those_that_the_compiler_counts(bench, size, width, depth, image):
    objective = objective_of(bench, "plain", size, image)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = {"image": jax.ShapeDtypeStruct((2, image, image, 3), jnp.uint8), "label": integers, "position": integers}
    step = jax.jit(jax.value_and_grad(lambda *x: objective.loss_fn(*x, True)[0]))
    counted = step.lower(params, batch, jax.random.key(0)).cost_analysis()["flops"]
    matmuls = bench.step_flops(image, width, depth, 2)
    assert 1.0 <= counted / matmuls < 1.15  # the compiler also counts norms, GELU and softmax


def test_ratios_are_medians_of_quotients_within_a_round(bench):
    def rounds(*seconds):
        return [{"step_seconds": t, "matmul_flops_per_second": 100.0} for t in seconds]

    row = bench.summarise(rounds(1.0, 2.0, 4.0), rounds(2.0, 2.0, 12.0), batch=8, flops=80)
    assert row["times_peer"] == [1.0, 2.0, 3.0]
    assert (row["images_per_second"], row["of_matmul"]) == (4.0, 0.4)
    assert bench.summarise(rounds(1.0), [], batch=8, flops=80)["times_peer"] is None


@pytest.mark.parametrize("path", sorted(STEP.parent.glob("results/*/step*.json")), ids=lambda path: path.parent.name)
def test_the_readme_shows_what_was_measured(bench, path):
    assert bench.table(json.loads(path.read_text())["rows"]) in (STEP.parent / "README.md").read_text()


def test_a_missing_peer_is_one_line_that_says_what_to_do(bench, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        bench.main([])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "torch" in message
    assert "--peer=none" in message


def test_it_measures_without_a_peer(tmp_path):
    out = tmp_path / "step.json"
    flags = "--models=ti --dtypes=float32 --ours=plain --peer=none --batch=8 --image=32 --rounds=1 --seconds=0.01"
    done = subprocess.run([sys.executable, STEP, *flags.split(), f"--out={out}"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert {"import", "build", "compile", "first step"} == set(row["phases"])
    assert row["side"] == "plain"
    assert row["images_per_second"] > 0
    assert row["times_peer"] is None
    assert report["versions"]["jax"] == jax.__version__
    assert flags in report["command"]
    assert "| plain |" in done.stdout
