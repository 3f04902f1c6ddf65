"""benchmarks/: wrong flags are one line, the README shows the results; step.py counts right and runs."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import jax.extend
import jax.numpy as jnp
import pytest
from bench import FOLDER, load_program

from simmim_jax import optim
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective

# (family, size, our side, image, parameters of transformers' ...ForMaskedImageModeling)
SAME_AS_THE_PEER = [
    ("vit", "b", "plain", 224, 86_390_016),
    ("cifar", "", "plain", 32, 2_701_104),
    ("swin", "t", "official", 192, 29_875_194),
]


@pytest.fixture(scope="module")
def bench():
    return load_program("step")


def sides_model(bench, family: str, size: str, side: str, image: int) -> tuple:
    """(objective of one of our sides, its abstract parameters, the shape for the peer)."""
    of_family = bench.FAMILIES[family]
    encoder = make_encoder(of_family.encoder, size or None, **of_family.ours[side] | of_family.fitted(image))
    pixels = {"image_size": (image, image), "mean": bench.MEAN, "std": bench.STD}
    objective = make_objective("simmim", encoder, mask_patch_size=of_family.block, **pixels)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    return objective, params, {name: getattr(encoder, name) for name in of_family.shape}


@pytest.mark.parametrize(("family", "size", "side", "image", "parameters"), SAME_AS_THE_PEER)
def test_our_side_has_as_many_parameters_as_the_peer(bench, family, size, side, image, parameters):
    _, params, _ = sides_model(bench, family, size, side, image)
    assert sum(x.size for x in jax.tree.leaves(params)) == parameters


@pytest.mark.slow
def test_as_many_parameters_of_the_peers_swin_decay_as_of_ours(bench):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    _, params, shape = sides_model(bench, "swin", "t", "official", 192)
    with torch.device("meta"):
        _, groups = bench.peer_model(transformers, "swin", 192, shape)
    theirs = {group["weight_decay"]: sum(x.numel() for x in group["params"]) for group in groups}
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(optim.decayed(params, optim.make_is_decayed())), strict=True)
    decayed = sum(x.size for x, decays in pairs if decays)
    parameters = next(row[-1] for row in SAME_AS_THE_PEER if row[:2] == ("swin", "t"))
    assert theirs == {0.0: parameters - decayed, bench.WEIGHT_DECAY: decayed}


def matmul_flops(jaxpr) -> int:
    """Multiplications and additions in the matmuls and convolutions of a traced function, including its calls."""
    contracted = {  # terms of each sum, from the shape of the right operand
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
    [("vit", "ti", "plain", 224), pytest.param("swin", "t", "official", 192, marks=pytest.mark.slow)],
)
def test_counted_flops_are_those_of_the_matmuls_except_for_the_gradient_of_the_images(bench, family, size, side, image):
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
def test_size_without_a_family_is_a_vit(bench, model, found):
    assert bench.family_and_size(model) == found


def test_ratios_are_medians_of_ratios_within_a_round(bench):
    def rounds(*seconds):
        return [{"step_seconds": t, "matmul_flops_per_second": 100.0} for t in seconds]

    peers = {"eager": rounds(2.0, 2.0, 12.0), "compile": rounds(3.0, 4.0, 4.0)}
    row = bench.summarize(rounds(1.0, 2.0, 4.0), peers, batch=8, flops=80)
    assert row["times_each"] == {"eager": [1.0, 2.0, 3.0], "compile": [1.0, 2.0, 3.0]}
    assert (row["images_per_second"], row["of_matmul"]) == (4.0, 0.4)
    faster = bench.summarize(rounds(1.0), {"eager": rounds(3.0), "compile": rounds(2.0)}, batch=8, flops=80)
    assert faster["times_peer"] == [2.0, 2.0, 2.0]
    assert bench.summarize(rounds(1.0), {}, batch=8, flops=80)["times_peer"] is None


# --- all programs


@pytest.fixture(scope="module")
def programs():
    return {name: load_program(name) for name in ("step", "scaling", "compile_time", "input", "decode", "swinv2_drift")}


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("step", "--peer=none --models=swim_t", "vit, swin, cifar"),
        ("step", "--peer=none --models=vit_s,swin_t --ours=plain", "swin_t has no side plain: give official"),
        ("step", "--peer=none --ours=plain,oficial", "no side oficial"),
        ("step", "--peer=eager,compiled", "no peer compiled"),
        ("scaling", "--models=vitt_b", "vit, swin"),
        ("scaling", "--placements=fsdpp", "no placement fsdpp"),
        ("scaling", "--devices=8,0", "--devices=8,0"),
        ("compile_time", "--models=swin_t", "no model 'swin_t'"),
        ("compile_time", "--scan=maybe", "--scan=maybe"),
        ("compile_time", "--depths=12,x", "--depths"),
        ("swinv2_drift", "--steps=0", "--steps"),
        ("input", "--path=. --peer=tensorflow", "tensorflow"),
        ("input", "--path=/no/such/folder --peer=none", "--path=/no/such/folder"),
        ("input", "--path=. --shards-path=/none --peer=none", "--shards-path=/none"),
        ("input", "--path=. --cores=4096 --peer=none", "--cores=4096"),
        ("input", "--path=. --rounds=0 --peer=none", "--rounds"),
        ("decode", "--path=/no/such/folder", "--path=/no/such/folder"),
        ("decode", "--path=", "--path="),
        ("decode", "--path=. --shards-path=/none", "--shards-path=/none"),
        ("decode", "--path=. --images=0", "--images"),
    ],
)
def test_wrong_flag_is_one_line(programs, capsys, name, flags, message):
    with pytest.raises(SystemExit) as stop:
        programs[name].main(flags.split())
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert message in line


def test_missing_peer_is_one_line(programs, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        programs["step"].main([])
    assert stop.value.code == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "torch" in line
    assert "--peer=none" in line


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/*/*.json")), ids=lambda path: path.stem)
def test_readme_shows_the_measured_tables(programs, path):
    report, readme = json.loads(path.read_text()), (FOLDER / "README.md").read_text()
    kind = next((name for name in (*programs, "cifar10") if path.stem.startswith(name)), None)
    if kind is None:
        pytest.skip("this file has no table")
    program = programs.get(kind) or load_program(kind)
    make = {"step": lambda: [program.table(report["rows"])], "input": lambda: program.tables(report)}
    make["decode"] = make["input"]
    tables = make.get(kind, lambda: [program.table(report)])()
    assert tables
    assert all(table in readme for table in tables)


@pytest.mark.slow
def test_swin_v2_is_as_far_from_float64_as_pytorch(programs, tmp_path):
    pytest.importorskip("torch")
    programs["swinv2_drift"].main(["--steps=2", "--seeds=1", f"--out={tmp_path / 'drift.json'}"])
    report = json.loads((tmp_path / "drift.json").read_text())
    assert report["golden_errors"]["loss"] < 1e-6
    assert report["golden_errors"]["gradients"] < 1e-4
    for (row,) in report["rows"].values():  # float32 rounding, times 3 or 1e-4, because Adam amplifies it by chance
        assert row["jax32"] < max(3 * row["torch32"], 3 * row["rounded64"], 1e-4)


# --- step.py in its own process


@pytest.mark.slow
def test_step_measures_without_a_peer(tmp_path):
    model, image, side, out = "cifar", 16, "plain", tmp_path / "step.json"
    settings = {"remat": "dots", "scan": True, "attention": "xla", "microbatches": 2}
    flags = f"--models={model} --dtypes=float32 --ours={side} --peer=none --batch=4 --rounds=1 --seconds=0.01"
    flags += "".join(f" --{name}" if value is True else f" --{name}={value}" for name, value in settings.items())
    quickly_compiled = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    environment = os.environ | {"XLA_FLAGS": f"{quickly_compiled} --xla_force_host_platform_device_count=2"}
    command = [sys.executable, FOLDER / "step.py", *flags.split(), f"--image={image}", f"--out={out}"]
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
