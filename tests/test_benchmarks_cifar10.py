"""benchmarks/cifar10.py and cifar10_peer.py: the runs are comparable, and the report has what was run."""

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from bench import FOLDER, load_program

from simmim_jax import data, optim
from simmim_jax.compiled import make_state
from simmim_jax.config import load, to_dict
from simmim_jax.errors import CheckpointError, ConfigError, DataError
from simmim_jax.experiment import encoder_record, make_experiment, resolve_encoder, with_settings
from simmim_jax.models import make_encoder
from simmim_jax.objectives.features import make_all_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.objectives.simmim import make_forward, masked_l1
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import load_run
from simmim_jax.runs.records import read_rows
from simmim_jax.train_step import TrainState, train_step

ROOT = FOLDER.parent
SMALL = {
    "encoder.width": 32,
    "encoder.depth": 1,
    "encoder.num_heads": (2,),
    "probe_block": 1,
    "batch_size": 8,
    "steps": 6,
    "eval_images": 16,
}
FLAGS = ["--config=configs/digits_vit_tiny.py", "--config.encoder.num_heads=2"]
FLAGS += [f"--config.{name}={value}" for name, value in SMALL.items() if name != "encoder.num_heads"]


@pytest.fixture(scope="module")
def cifar10():
    return load_program("cifar10")


@pytest.fixture(scope="module")
def peer():
    return load_program("cifar10_peer")


@pytest.fixture
def config():
    return with_settings(load(str(ROOT / "configs/digits_vit_tiny.py")), SMALL | {"optim.warmup_epochs": 0.02})


def test_peer_has_the_images_masks_and_rate_of_our_step(peer, config):
    step, settings, experiment = 3, peer.make_settings(config), make_experiment(config)
    encoder, objective, step_key = experiment.encoder, experiment.objective, experiment.keys.step
    batch = next(data.make_batches(experiment.source, experiment.batches, start_step=step, loading=experiment.loading))
    theirs = next(settings.batches(step))
    assert all(np.array_equal(batch[name], theirs[name]) for name in batch)
    assert settings.rates[step] == pytest.approx(float(experiment.schedule(step)), rel=1e-6)

    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), experiment.state.params
    )

    @jax.jit
    def loss_of_our_step(params, batch):
        def loss_fn(params, *rest):
            return objective.loss_fn(jax.lax.stop_gradient(params), *rest)  # no backward pass to compile

        tx = optax.with_extra_args_support(optax.identity())
        state = TrainState(step=jnp.int32(step), params=params, opt_state=tx.init(params))
        return train_step(state, batch, step_key, loss_fn=loss_fn, tx=tx)[1]["loss"]

    @jax.jit
    def loss_under(params, image, mask):
        images = normalize(image, tuple(config.mean), tuple(config.std))
        _, prediction, _ = make_forward(encoder, channels=1)(params, images, mask, step_key, False)
        hidden = jnp.repeat(jnp.repeat(mask, encoder.patch_size, 1), encoder.patch_size, 2)
        return masked_l1(prediction, images, hidden, encoder.feature_stride)

    ours = loss_of_our_step(params, {name: batch[name] for name in ("image", "label", "batch_index")})
    same, next_step = (loss_under(params, batch["image"], settings.masks(theirs, n)) for n in (step, step + 1))
    assert float(same) == pytest.approx(float(ours), rel=1e-6)
    assert float(next_step) != pytest.approx(float(ours), rel=1e-3)


def test_decayed_parameters_of_the_peer_are_of_the_same_kinds_as_ours(peer, config):
    decays, layer = peer.make_settings(config).decays, "vit.layers.0"
    decayed = [
        "vit.embeddings.mask_token", "vit.embeddings.patch_embeddings.projection.weight",
        f"{layer}.attention.q_proj.weight", f"{layer}.attention.o_proj.weight", f"{layer}.mlp.fc1.weight",
        "decoder.0.weight",
    ]  # fmt: skip
    not_decayed = [
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "decoder.0.bias", "vit.layernorm.weight",
        "vit.embeddings.patch_embeddings.projection.bias", f"{layer}.attention.k_proj.bias",
        f"{layer}.layernorm_before.weight", f"{layer}.layernorm_after.bias", f"{layer}.mlp.fc2.bias",
    ]  # fmt: skip
    assert [name for name in decayed + not_decayed if decays(name)] == decayed


@pytest.mark.parametrize(("name", "value"), [("objective.norm_window", 47), ("optim.layer_decay", 0.8)])
def test_feature_that_the_peer_does_not_have_is_refused(peer, config, name, value):
    with pytest.raises(ConfigError, match=f"the peer has no {name}="):
        peer.make_settings(with_settings(config, {name: value}))


def test_peer_is_evaluated_when_and_on_images_as_ours(peer, config, monkeypatch):
    monkeypatch.setattr(data, "make_epoch", lambda source, crop, **options: (crop, options["loading"]))
    config.data.crop_fraction, config.data.on_error, config.data.max_pixels = 0.5, "raise", 999
    config.eval_every = 4
    settings = peer.make_settings(config)
    crop, loading = settings.heldout
    assert (crop.crop_fraction, crop.max_pixels, loading.on_error) == (0.5, 999, "raise")
    assert settings.evaluation_every == 4


def test_missing_pytorch_is_one_line(peer, config, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no torch and transformers - .*benchmarks/requirements.txt"):
        peer.pretrain(config, str(tmp_path / "peer"))
    assert not (tmp_path / "peer").exists()


def make_run(folder: Path, config, rows: list[dict], **summary) -> None:
    folder.mkdir(parents=True)
    options = resolve_encoder(config, "")
    record = {"encoder": encoder_record(make_encoder(**options), options)}
    (folder / "config.json").write_text(json.dumps(to_dict(config) | record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary)) if summary else None


def loss_rows(steps, loss: float) -> list[dict]:
    return [{"step": step, "loss": loss / step, "samples": f"{step:08x}"} for step in steps]


@pytest.fixture
def runs(tmp_path, config):
    """Two finished pretraining runs, and a probe and fine-tuning of one."""
    make_run(
        tmp_path / "ours", config, loss_rows(range(2, 41, 2), 1.0), step=40, masked_loss=0.5, start={"masked_loss": 1.0}
    )
    make_run(
        tmp_path / "peer", config, loss_rows(range(1, 41), 3.0), step=40, masked_loss=0.6, start={"masked_loss": 0.9}
    )
    row = {"method": "linear", "images": "all", "pool": "patches", "block": 3, "paper": True, "chosen": False}
    row |= {"validation_top1": 0.4, "top1": 0.41, "top1_std": None}
    of_few = row | {"method": "logistic", "images": "1 %", "chosen": True, "block": 0, "top1": 0.3, "top1_std": 0.02}
    rows = [row, row | {"block": 2, "paper": False, "chosen": True, "top1": 0.452}, of_few, row | {"paper": False}]
    (tmp_path / "probe_ours").mkdir()
    (tmp_path / "probe_ours" / "results.json").write_text(
        json.dumps({"rows": rows, "step": 40, "options": {"limit": 0}, "options_by_method": {}})
    )
    accuracies = [{"step": step, "top1": step / 100, "top5": 1.0} for step in (0, 10, 61)]
    make_run(tmp_path / "finetune_ours", config, [], step=61, top1=0.61, top5=1.0, images=100.0)
    (tmp_path / "finetune_ours" / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in accuracies))
    return tmp_path


def test_report_has_the_results_and_marks_the_missing_ones(cifar10, runs, capsys):
    cifar10.main(["report", f"--runs={runs}", f"--out={runs}/made/cifar10.json"])
    text = (runs / "made" / "cifar10.json").read_text()
    report = json.loads(text)
    assert str(runs) not in text
    assert report["losses"]["step"] == list(range(2, 41, 2))  # steps of both runs
    assert report["losses"]["peer"][0] == 1.5
    cells = {}
    for line in cifar10.table(report).splitlines():
        name, *rest = (cell.strip() for cell in line.strip("|").split("|"))
        cells[name] = rest
    no = "not yet run"
    assert cells["encoder"][1:3] == ["linear probe", "linear, paper's block"]
    assert cells["ours"] == ["0.500", "45.2 (block 2)", "41.0 (block 3)", no, "30.0 ± 2.0 (output)", no, "61.0"]
    assert cells["random weights"] == ["1.000", *[no] * 6]
    assert cells["transformers"] == ["0.600", *[no] * 6]
    assert cifar10.table(report) in capsys.readouterr().out
    assert (runs / "made" / "cifar10.png").exists()


def test_report_of_several_seeds_has_mean_and_deviation(cifar10, runs, capsys):
    seeds = [runs, *(shutil.copytree(runs, runs.with_name(f"{runs.name}_{n}")) for n in (1, 2))]
    for n, folder in enumerate(seeds):
        for name in ("ours", "peer", "finetune_ours"):
            config = json.loads((folder / name / "config.json").read_text())
            (folder / name / "config.json").write_text(json.dumps(config | {"seed": n}))
        for name, field in (("ours", "masked_loss"), ("finetune_ours", "top1")):
            summary = json.loads((folder / name / "summary.json").read_text())
            (folder / name / "summary.json").write_text(json.dumps(summary | {field: summary[field] + n / 100}))
        results = json.loads((folder / "probe_ours" / "results.json").read_text())
        for row in results["rows"]:
            row["top1"] += (0, 0.01, -0.01)[n]
        results["rows"][1]["block"] = (2, 1, 2)[n]
        (folder / "probe_ours" / "results.json").write_text(json.dumps(results))
    arguments = ["report", f"--runs={','.join(map(str, seeds))}", f"--out={runs}/cifar10.json"]
    cifar10.main(arguments)
    text = (runs / "cifar10.json").read_text()
    assert str(runs.parent) not in text
    (line,) = [line for line in cifar10.table(json.loads(text)).splitlines() if " ours |" in line]
    no = "not yet run"
    assert [cell.strip() for cell in line.strip("|").split("|")][1:] == [
        "0.510 ± 0.010", "45.2 ± 1.0 (block 1, block 2)", "41.0 ± 1.0 (block 3)", no, "30.0 ± 1.0 (output)", no,
        "62.0 ± 1.0",
    ]  # fmt: skip
    assert line in capsys.readouterr().out
    other = json.loads((seeds[2] / "ours" / "config.json").read_text())
    for change, says in (({"seed": 0}, "two pretraining runs with the same seed"), ({"epochs": 7.0}, "epochs")):
        for name in ("ours", "peer"):
            (seeds[2] / name / "config.json").write_text(json.dumps(other | change))
        with pytest.raises(ConfigError, match=says):
            cifar10.main(arguments)
    with pytest.raises(ConfigError, match="several --runs"):
        cifar10.main(["probe", *arguments[1:]])


def test_runs_on_different_images_are_not_compared(cifar10, runs):
    rows = loss_rows(range(1, 41), 3.0)
    rows[9]["samples"] = "ffffffff"
    (runs / "peer" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="different images at step 10"):
        cifar10.compare(runs / "ours", runs / "peer")


@pytest.mark.parametrize("field", ["base_learning_rate", "encoder.width"])
def test_runs_with_different_settings_are_not_compared(cifar10, runs, config, field):
    other = with_settings(config, {field: 2 * to_dict(config).get(field, 32)})
    (runs / "peer" / "config.json").write_text(json.dumps(to_dict(other)))
    with pytest.raises(ConfigError, match=field):
        cifar10.compare(runs / "ours", runs / "peer")


def test_encoders_probed_or_fine_tuned_differently_are_not_compared(cifar10, runs, config):
    options = argparse.Namespace(runs=runs, ours=None)
    cifar10.check_same_budget(options)
    results = json.loads((runs / "probe_ours" / "results.json").read_text())
    (runs / "probe_random").mkdir()
    (runs / "probe_random" / "results.json").write_text(json.dumps(results | {"options": {"limit": 100}}))
    with pytest.raises(ConfigError, match="limit"):
        cifar10.check_same_budget(options)
    of_both = [
        results | {"options": {"limit": 0, "only": ["knn"], "epochs": 30, "threads": threads},
                   "options_by_method": {"linear": {"epochs": 9, "probe_batch_size": size}, "knn": {"temperature": 1}}}
        for threads, size in ((2, 1024), (16, 1024), (2, 512))
    ]  # fmt: skip
    (runs / "probe_random" / "results.json").write_text(json.dumps(of_both[0]))
    (runs / "probe_ours" / "results.json").write_text(json.dumps(of_both[1]))
    cifar10.check_same_budget(options)
    (runs / "probe_ours" / "results.json").write_text(json.dumps(of_both[2]))  # from an earlier call
    with pytest.raises(ConfigError, match=r"linear\.probe_batch_size: 1024 saved, 512 now"):
        cifar10.check_same_budget(options)
    fewer = [row | {"train_images": 450} for row in of_both[0]["rows"]]
    (runs / "probe_ours" / "results.json").write_text(json.dumps(of_both[0] | {"rows": fewer}))
    with pytest.raises(ConfigError, match="train_images"):
        cifar10.check_same_budget(options)
    for encoder in ("random", "ours"):
        (runs / f"probe_{encoder}" / "results.json").write_text(json.dumps(results))
    (runs / "probe_ours" / "results.json").write_text(json.dumps(results | {"step": 20}))
    with pytest.raises(ConfigError, match="probed at step 20 of 40"):
        cifar10.check_same_budget(options)
    (runs / "probe_ours" / "results.json").write_text(json.dumps(results))
    other = with_settings(config, {"epochs": 3.0, "encoder.width": 64, "init_from": "elsewhere"})
    make_run(runs / "finetune_peer", other, [], step=61, top1=0.6, top5=1.0, images=100.0)
    with pytest.raises(ConfigError, match=r"epochs: 40.0 saved, 3.0 now"):
        cifar10.check_same_budget(options)


def test_probe_of_an_unfinished_run_is_refused(cifar10, runs):
    (runs / "ours" / "summary.json").unlink()
    options = argparse.Namespace(runs=runs, ours=None)
    with pytest.raises(ConfigError, match="probed at step 40 of an unfinished run"):
        cifar10.check_same_budget(options)
    (runs / "probe_ours").rename(runs / "probe_random")
    cifar10.check_same_budget(options)
    assert cifar10.format_accuracy({"top1": None, "block": 3}) == "diverged"


def test_picture_has_the_losses_and_accuracies(cifar10):
    def tuned(encoder, top1):
        return {"encoder": encoder, "finetuned": {"curve": {"step": [0, 50, 100], "top1": [0.1, top1, top1]}}}

    losses = {"step": list(range(1, 101)), "ours": [0.45] * 99 + [0.4], "peer": [0.8] * 99 + [0.9]}
    figure = cifar10.draw({"losses": losses, "rows": [tuned("ours", 0.7), tuned("random", 0.3)]})
    pretraining, finetuning = figure.axes
    assert [line.get_ydata()[-1] for line in pretraining.lines] == pytest.approx([0.4, 0.425, 0.9, 0.85])
    assert [line.get_label() for line in finetuning.lines] == ["ours  70.0", "random weights  30.0"]
    assert [line.get_ydata()[-1] for line in finetuning.lines] == pytest.approx([70, 30])
    assert cifar10.draw({"losses": {"step": [], "ours": [], "peer": []}, "rows": []}) is None


@pytest.mark.slow
def test_random_weights_are_the_initial_parameters_of_the_run(cifar10, config, tmp_path):
    experiment = make_experiment(config)
    initial = jax.device_get(make_state(experiment).params)
    zeros = jax.tree.map(np.zeros_like, initial)
    checkpoint.write_params(str(tmp_path / "ours"), zeros, experiment.record)
    cifar10.write_random(str(tmp_path / "ours"), str(tmp_path / "random"))
    drawn, _ = checkpoint.read_params(str(tmp_path / "random"))
    jax.tree.map(np.testing.assert_array_equal, drawn, initial)


def test_failed_command_ends_the_program_and_is_recorded_without_paths(cifar10, tmp_path, capsys):
    options = argparse.Namespace(runs=tmp_path, images="", ours=None, python=sys.executable)
    with pytest.raises(SystemExit) as stop:
        cifar10.run("peer", [sys.executable, "-c", "raise SystemExit(5)", tmp_path / "peer"], options)
    assert stop.value.code == 5
    assert "peer ended with code 5" in capsys.readouterr().err
    (attempt,) = json.loads((tmp_path / "records" / "peer.json").read_text())
    assert attempt["command"] == "python -c 'raise SystemExit(5)' RUNS/peer"
    assert attempt["exit_code"] == 5


def test_sigterm_is_forwarded_to_the_command(cifar10, tmp_path):
    options = argparse.Namespace(runs=tmp_path, images="", ours=None, python=sys.executable)
    program = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); os.kill(os.getppid(), 15); "
    ignored = signal.signal(signal.SIGTERM, lambda *_: None)  # if it comes too early
    try:
        with pytest.raises(SystemExit) as stop:
            cifar10.run("ours", [sys.executable, "-c", program + "time.sleep(20)"], options)
    finally:
        signal.signal(signal.SIGTERM, ignored)
    assert stop.value.code == 143


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["fintune"], "did you mean finetune"),
        (["probe", "--encoders=ours,timm"], "unknown encoder 'timm'"),
        (["--images=nowhere"], "no train/ in this folder"),
        (["--image=x"], "unrecognized arguments"),
    ],
)
def test_mistake_on_the_command_line_is_refused_before_anything_runs(cifar10, arguments, says):
    with pytest.raises(ConfigError, match=says):
        cifar10.main(arguments)


def test_stage_without_its_weights_names_the_stage_that_makes_them(cifar10, tmp_path):
    with pytest.raises(CheckpointError, match="run the stages before probe"):
        cifar10.main(["probe", f"--runs={tmp_path}"])
    with pytest.raises(CheckpointError, match="run the stage peer"):
        cifar10.main(["imported", f"--runs={tmp_path}"])


@pytest.mark.slow
def test_killed_run_of_the_peer_resumes_bit_for_bit_and_its_import_has_the_same_features(cifar10, config, tmp_path):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    flags = [*FLAGS, "--config.save_every=2", "--config.log_every=1"]

    quickly_compiled = {"XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"}

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, FOLDER / "cifar10_peer.py", *flags, f"--workdir={tmp_path}/{name}"]
        return subprocess.Popen(command, cwd=ROOT, env=os.environ | quickly_compiled)

    assert start("whole").wait(timeout=400) == 0
    killed, written = start("killed"), tmp_path / "killed" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (written.exists() and written.read_text().count("\n") >= 3):
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert start("killed").wait(timeout=400) == 0
    for name in ("metrics.jsonl", "evaluations.jsonl", "huggingface/model.safetensors"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert [row["step"] for row in read_rows(tmp_path / "whole" / "evaluations.jsonl")] == [0, 6]  # eval_every is -1

    ours = [sys.executable, "-m", "simmim_jax.main", *flags, f"--workdir={tmp_path}/ours"]
    subprocess.run(ours, cwd=ROOT, env=os.environ | quickly_compiled, check=True, timeout=400)
    assert cifar10.compare(tmp_path / "ours", tmp_path / "whole")["step"] == list(range(1, 7))  # the same samples
    rates = [
        [row["learning_rate"] for row in cifar10.read_losses(tmp_path / name).values()] for name in ("ours", "whole")
    ]
    assert rates[0] == rates[1]

    folder = tmp_path / "whole" / "huggingface"
    command = [sys.executable, "-m", "simmim_jax.tools.convert", folder, tmp_path / "imported"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=400)
    imported = load_run(str(tmp_path / "imported"))
    images = jnp.asarray(np.random.default_rng(0).integers(0, 256, (4, 32, 32, 1), dtype=np.uint8))
    features = jax.jit(make_all_features(imported.encoder, **imported.normalization))(
        imported.params["encoder"], images
    )
    model = transformers.ViTModel.from_pretrained(folder, add_pooling_layer=False).eval()
    pixels = np.array(normalize(images, tuple(config.mean), tuple(config.std))).transpose(0, 3, 1, 2)
    with torch.no_grad():
        there = model(torch.from_numpy(pixels)).last_hidden_state[:, 1:].mean(1).numpy()
    np.testing.assert_allclose(features[0], there, rtol=0, atol=1e-5)  # float32 sums in a different order

    decayed = optim.decayed(imported.params, optim.make_is_decayed(no_decay=()))
    count = sum(x.size for x, d in zip(*map(jax.tree.leaves, (imported.params, decayed)), strict=True) if d)
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    moments = state["optimizer"]["state"]
    theirs = {g["weight_decay"]: sum(moments[n]["exp_avg"].numel() for n in g["params"]) for g in groups}
    assert theirs == {0.05: count, 0.0: sum(x.size for x in jax.tree.leaves(imported.params)) - count}
