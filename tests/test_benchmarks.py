"""benchmarks/step.py: that it runs, counts right, and says what is missing. Never how fast anything is."""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.extend
import jax.numpy as jnp
import pytest

from simmim_jax import optim
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective

STEP = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
# (family, size, our side, image, parameters of transformers' ...ForMaskedImageModeling)
SAME_AS_THE_PEER = [
    ("vit", "b", "plain", 224, 86_390_016),
    ("cifar", "", "plain", 32, 2_701_104),
    ("swin", "t", "official", 192, 29_875_194),
    ("swin", "b", "official", 192, 89_874_104),
]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_step", STEP)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sides_model(bench, family: str, size: str, side: str, image: int) -> tuple:
    """The objective of one of our sides, its abstract parameters, and what the peer is told of its shape."""
    of_family = bench.FAMILIES[family]
    encoder = make_encoder(of_family.encoder, size or None, **of_family.ours[side] | of_family.fitted(image))
    pixels = {"image_size": (image, image), "mean": bench.MEAN, "std": bench.STD}
    objective = make_objective("simmim", encoder, mask_patch_size=of_family.block, **pixels)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    return objective, params, {name: getattr(encoder, name) for name in of_family.shape}


@pytest.mark.parametrize(("family", "size", "side", "image", "parameters"), SAME_AS_THE_PEER)
def test_one_of_our_sides_has_the_parameters_of_the_peer(bench, family, size, side, image, parameters):
    _, params, _ = sides_model(bench, family, size, side, image)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.slow
def test_as_many_parameters_decay_of_the_peers_swin_as_of_ours(bench):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, params, shape = sides_model(bench, "swin", "t", "official", 192)
    with torch.device("meta"):
        _, groups = bench.peer_model(transformers, "swin", 192, shape)
    theirs = {group["weight_decay"]: sum(x.numel() for x in group["params"]) for group in groups}
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(optim.decayed(params, optim.NO_DECAY)), strict=True)
    decayed = sum(x.size for x, decays in pairs if decays)
    parameters = next(row[-1] for row in SAME_AS_THE_PEER if row[:2] == ("swin", "t"))
    assert theirs == {0.0: parameters - decayed, bench.WEIGHT_DECAY: decayed}


def matmul_flops(jaxpr) -> int:
    """Multiplications and additions in the matmuls and convolutions of a traced function, and of what it calls."""
    contracted = {  # the terms of each sum, by the shape of the right operand
        "dot_general": lambda shape, numbers: math.prod(shape[axis] for axis in numbers[0][1]),
        "conv_general_dilated": lambda shape, numbers: math.prod(shape) // shape[numbers.rhs_spec[0]],
    }
    total = 0
    for equation in jaxpr.eqns:
        total += sum(map(matmul_flops, jax.extend.core.jaxprs_in_params(equation.params)))
        if terms := contracted.get(equation.primitive.name):
            sums = equation.outvars[0].aval.size
            total += 2 * sums * terms(equation.invars[1].aval.shape, equation.params["dimension_numbers"])
    return total


@pytest.mark.parametrize(
    ("family", "size", "side", "image"),
    [("vit", "ti", "plain", 224), ("cifar", "", "plain", 32), ("swin", "t", "official", 192)],
)
def test_counted_flops_are_those_of_the_matmuls_but_for_the_gradient_of_the_images(bench, family, size, side, image):
    objective, params, shape = sides_model(bench, family, size, side, image)
    integers = jax.ShapeDtypeStruct((2,), jnp.int32)
    batch = {"image": jax.ShapeDtypeStruct((2, image, image, 3), jnp.uint8), "label": integers, "batch_index": integers}
    step = jax.jit(jax.value_and_grad(lambda *x: objective.loss_fn(*x, True)[0]))
    of_images = 2 * 2 * 3 * image**2 * shape["width"]
    traced = matmul_flops(step.trace(params, batch, jax.random.key(0)).jaxpr.jaxpr)
    assert traced == bench.step_flops(family, image, shape, 2) - of_images


@pytest.mark.parametrize(
    ("model", "found"),
    [("swin_t", ("swin", "t")), ("vit_s", ("vit", "s")), ("ti", ("vit", "ti")), ("cifar", ("cifar", ""))],
)
def test_a_size_alone_is_that_of_a_vit(bench, model, found):
    assert bench.family_and_size(model) == found


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--models=swim_t", "vit, swin, cifar"),
        ("--models=vit_s,swin_t --ours=plain", "swin_t has no side plain: give official"),
        ("--ours=plain,oficial", "no side oficial"),
        ("--peer=eager,compiled", "no peer compiled: give eager, compile, both, or none"),
    ],
)
def test_what_is_not_there_is_one_line(bench, capsys, flags, says):
    with pytest.raises(SystemExit) as stop:
        bench.main(["--peer=none", *flags.split()])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says in message


def test_ratios_are_medians_of_quotients_within_a_round(bench):
    def rounds(*seconds):
        return [{"step_seconds": t, "matmul_flops_per_second": 100.0} for t in seconds]

    peers = {"eager": rounds(2.0, 2.0, 12.0), "compile": rounds(3.0, 4.0, 4.0)}
    row = bench.summarize(rounds(1.0, 2.0, 4.0), peers, batch=8, flops=80)
    assert row["times_each"] == {"eager": [1.0, 2.0, 3.0], "compile": [1.0, 2.0, 3.0]}
    assert (row["images_per_second"], row["of_matmul"]) == (4.0, 0.4)
    faster = bench.summarize(rounds(1.0), {"eager": rounds(3.0), "compile": rounds(2.0)}, batch=8, flops=80)
    assert faster["times_peer"] == [2.0, 2.0, 2.0]
    assert bench.summarize(rounds(1.0), {}, batch=8, flops=80)["times_peer"] is None


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


@pytest.mark.parametrize(
    ("model", "image", "side", "settings"),
    [
        ("cifar", 16, "plain", {"remat": "dots", "scan": True, "attention": "xla", "microbatches": 2}),
        ("swin_t", 64, "official", {"microbatches": 1}),
    ],
)
@pytest.mark.slow
def test_it_measures_without_a_peer(tmp_path, model, image, side, settings):
    out = tmp_path / "step.json"
    flags = f"--models={model} --dtypes=float32 --ours={side} --peer=none --batch=4 --rounds=1 --seconds=0.01"
    flags += "".join(f" --{name}" if value is True else f" --{name}={value}" for name, value in settings.items())
    quickly_compiled = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": f"{quickly_compiled} --xla_force_host_platform_device_count=2"}
    command = [sys.executable, STEP, *flags.split(), f"--image={image}", f"--out={out}"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert {"import", "build", "compile", "first step"} == set(row["phases"])
    assert (row["model"], row["side"], row["image"], row["settings"]) == (model, side, image, settings)
    assert row["images_per_second"] > 0
    assert row["times_peer"] is None
    assert report["versions"]["jax"] == jax.__version__
    assert flags in report["command"]
    assert f"| {side} |" in done.stdout
