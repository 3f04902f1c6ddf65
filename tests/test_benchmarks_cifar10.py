"""benchmarks/cifar10.py and cifar10_peer.py: that like is compared with like, and that the report says what was run."""

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

from simmim_jax import data, optim, train
from simmim_jax.config import load, to_dict
from simmim_jax.errors import CheckpointError, ConfigError, DataError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.features import make_all_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.objectives.simmim import make_forward, masked_l1
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import load_run
from simmim_jax.runs.records import read_rows
from simmim_jax.train_step import TrainState, train_step

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks"
SMALL = {
    "encoder.width": 32,
    "encoder.depth": 1,
    "encoder.num_heads": 2,
    "probe_block": 1,
    "batch_size": 8,
    "steps": 6,
    "eval_images": 16,
}
FLAGS = ["--config=configs/digits_vit_tiny.py", *(f"--config.{name}={value}" for name, value in SMALL.items())]


def load_program(name: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FOLDER)  # as when it is run
        spec = importlib.util.spec_from_file_location(f"bench_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cifar10():
    return load_program("cifar10")


@pytest.fixture(scope="module")
def peer():
    return load_program("cifar10_peer")


@pytest.fixture
def config():
    return train.with_settings(load(str(ROOT / "configs/digits_vit_tiny.py")), SMALL | {"optim.warmup_epochs": 0.02})


def objective_of(config):
    encoder = make_encoder(**train.resolve_encoder(config, ""))
    pixels = {"image_size": tuple(config.image_size), "mean": config.mean, "std": config.std}
    return encoder, make_objective(encoder=encoder, **pixels, **config.objective)


def test_the_peer_has_the_images_masks_and_rate_of_our_step(peer, config):
    step, settings = 3, peer.settings_of(config)
    encoder, objective = objective_of(config)
    source, _ = train.make_sources(config)
    batch_spec, loading = train.batch_options(config)
    _, schedule = train.make_tx(config, encoder, *train.run_length(config, len(source)))
    _, step_key, _ = train.make_keys(config.seed)
    batch = next(data.make_batches(source, batch_spec, start_step=step, loading=loading))
    theirs = next(settings.batches(step))
    assert all(np.array_equal(batch[name], theirs[name]) for name in batch)
    assert settings.rates[step] == pytest.approx(float(schedule(step)), rel=1e-6)

    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, step_key)
    params = jax.tree.map(lambda x: jnp.asarray(0.1 * rng.standard_normal(x.shape, np.float32)), shapes)

    @jax.jit
    def loss_of_our_step(params, batch):
        def loss_fn(params, *rest):
            return objective.loss_fn(jax.lax.stop_gradient(params), *rest)  # without a backward pass to compile

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
    here, next_one = (loss_under(params, batch["image"], settings.masks(theirs, n)) for n in (step, step + 1))
    assert float(here) == pytest.approx(float(ours), rel=1e-6)
    assert float(next_one) != pytest.approx(float(ours), rel=1e-3)


def test_norms_biases_class_token_and_positions_of_the_peer_do_not_decay_and_its_mask_token_does_as_ours(peer, config):
    decays, layer = peer.settings_of(config).decays, "vit.layers.0"
    decayed = [
        "vit.embeddings.mask_token", "vit.embeddings.patch_embeddings.projection.weight",
        f"{layer}.attention.q_proj.weight", f"{layer}.attention.o_proj.weight", f"{layer}.mlp.fc1.weight",
        "decoder.0.weight",
    ]  # fmt: skip
    spared = [
        "vit.embeddings.cls_token", "vit.embeddings.position_embeddings", "decoder.0.bias", "vit.layernorm.weight",
        "vit.embeddings.patch_embeddings.projection.bias", f"{layer}.attention.k_proj.bias",
        f"{layer}.layernorm_before.weight", f"{layer}.layernorm_after.bias", f"{layer}.mlp.fc2.bias",
    ]  # fmt: skip
    assert [name for name in decayed + spared if decays(name)] == decayed
    config.optim.decay_mask_token = False
    assert not peer.settings_of(config).decays("vit.embeddings.mask_token")


@pytest.mark.parametrize(("asked", "every"), [(-1, 0), (0, 0), (4, 4)])
def test_the_peer_evaluates_as_often_as_the_config_says(peer, config, asked, every):
    config.eval_every = asked  # -1: so often as a run can afford, and this one is short
    assert peer.settings_of(config).evaluation_every == every


@pytest.mark.parametrize(
    ("name", "value"), [
        ("objective.norm_window", 47), ("optim.layer_decay", 0.8), ("optim.frozen_layers", 1), ("microbatches", 2),
    ],
)  # fmt: skip
def test_what_the_peer_does_not_have_is_refused(peer, config, name, value):
    with pytest.raises(ConfigError, match=f"the peer has no {name}="):
        peer.settings_of(train.with_settings(config, {name: value}))


def test_the_peer_is_evaluated_on_images_that_are_read_as_ours(peer, config, monkeypatch):
    monkeypatch.setattr(data, "make_epoch", lambda source, crop, **options: (crop, options["loading"]))
    config.data.crop_fraction, config.data.on_error, config.data.max_pixels = 0.5, "raise", 999
    crop, loading = peer.settings_of(config).heldout
    assert (crop.crop_fraction, crop.max_pixels, loading.on_error) == (0.5, 999, "raise")


def test_a_missing_pytorch_is_one_line_that_says_what_to_do(peer, config, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no torch and transformers - .*benchmarks/requirements.txt"):
        peer.pretrain(config, str(tmp_path / "peer"))
    assert not (tmp_path / "peer").exists()


def make_run(folder: Path, config, rows: list[dict], **summary) -> None:
    folder.mkdir(parents=True)
    encoder, _ = objective_of(config)
    record = {"encoder": train.encoder_record(encoder, train.resolve_encoder(config, ""))}
    (folder / "config.json").write_text(json.dumps(to_dict(config) | record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summary)) if summary else None


def loss_rows(steps, loss: float) -> list[dict]:
    return [{"step": step, "loss": loss / step, "samples": f"{step:08x}"} for step in steps]


@pytest.fixture
def runs(tmp_path, config):
    """Two finished pretraining runs, a probe of one and its fine-tuning."""
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
        json.dumps({"rows": rows, "step": 40, "options": {"limit": 0}})
    )
    accuracies = [{"step": step, "top1": step / 100, "top5": 1.0} for step in (0, 10, 61)]
    make_run(tmp_path / "finetune_ours", config, [], step=61, top1=0.61, top5=1.0, images=100.0)
    (tmp_path / "finetune_ours" / "evaluations.jsonl").write_text("".join(json.dumps(r) + "\n" for r in accuracies))
    return tmp_path


def test_the_report_holds_what_was_run_and_says_of_the_rest_that_it_was_not(cifar10, runs, capsys):
    cifar10.main(["report", f"--runs={runs}", f"--out={runs}/made/cifar10.json"])
    text = (runs / "made" / "cifar10.json").read_text()
    report = json.loads(text)
    assert str(runs) not in text
    assert report["losses"]["step"] == list(range(2, 41, 2))  # those that both have
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


def test_a_report_of_several_seeds_has_their_mean_and_deviation(cifar10, runs, capsys):
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
    for change, says in (({"seed": 0}, "two pretraining runs of one seed"), ({"epochs": 7.0}, "epochs")):
        for name in ("ours", "peer"):
            (seeds[2] / name / "config.json").write_text(json.dumps(other | change))
        with pytest.raises(ConfigError, match=says):
            cifar10.main(arguments)
    with pytest.raises(ConfigError, match="several --runs"):
        cifar10.main(["probe", *arguments[1:]])


def test_runs_that_saw_other_images_are_not_compared(cifar10, runs):
    rows = loss_rows(range(1, 41), 3.0)
    rows[9]["samples"] = "ffffffff"
    (runs / "peer" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="other images at step 10"):
        cifar10.compare(runs / "ours", runs / "peer")


@pytest.mark.parametrize("field", ["base_learning_rate", "encoder.width"])
def test_runs_of_other_settings_are_not_compared(cifar10, runs, config, field):
    other = train.with_settings(config, {field: 2 * train.to_dict(config).get(field, 32)})
    (runs / "peer" / "config.json").write_text(json.dumps(to_dict(other)))
    with pytest.raises(ConfigError, match=field):
        cifar10.compare(runs / "ours", runs / "peer")


def test_encoders_that_were_probed_or_fine_tuned_in_other_ways_are_not_compared(cifar10, runs, config):
    options = argparse.Namespace(runs=runs, ours=None)
    cifar10.check_same_budget(options)
    results = json.loads((runs / "probe_ours" / "results.json").read_text())
    (runs / "probe_random").mkdir()
    (runs / "probe_random" / "results.json").write_text(json.dumps(results | {"options": {"limit": 100}}))
    with pytest.raises(ConfigError, match="limit"):
        cifar10.check_same_budget(options)
    of_both = [
        results | {"options": {"limit": 0, "only": ["knn"], "epochs": 30, "threads": threads},
                   "options_by_method": {"linear": {"epochs": 100, "probe_batch_size": size}, "knn": {"temperature": 0.07}}}
        for threads, size in ((2, 1024), (16, 1024), (2, 512))
    ]  # fmt: skip
    (runs / "probe_random" / "results.json").write_text(json.dumps(of_both[0]))
    (runs / "probe_ours" / "results.json").write_text(json.dumps(of_both[1]))
    cifar10.check_same_budget(options)
    (runs / "probe_ours" / "results.json").write_text(json.dumps(of_both[2]))  # of a call before the last one
    with pytest.raises(ConfigError, match=r"linear\.probe_batch_size: saved 1024, now 512"):
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
    other = train.with_settings(config, {"epochs": 3.0, "encoder.width": 64, "init_from": "elsewhere"})
    make_run(runs / "finetune_peer", other, [], step=61, top1=0.6, top5=1.0, images=100.0)
    with pytest.raises(ConfigError, match=r"epochs: saved 40.0, now 3.0"):
        cifar10.check_same_budget(options)


def test_a_report_of_a_run_that_is_not_finished_says_so_and_takes_no_probe_of_it(cifar10, runs):
    (runs / "ours" / "summary.json").unlink()
    options = argparse.Namespace(runs=runs, ours=None)
    with pytest.raises(ConfigError, match="probed at step 40 of an unfinished run"):
        cifar10.check_same_budget(options)
    (runs / "probe_ours").rename(runs / "probe_random")
    cifar10.check_same_budget(options)
    assert cifar10.accuracy_of({"top1": None, "block": 3}) == "diverged"


def test_in_the_picture_a_lower_loss_is_lower_and_a_higher_accuracy_higher(cifar10):
    def tuned(encoder, top1):
        return {"encoder": encoder, "finetuned": {"curve": {"step": [0, 50, 100], "top1": [0.1, top1, top1]}}}

    steps = list(range(1, 101))
    losses = {"step": steps, "ours": [0.45] * 99 + [0.4], "peer": [0.8] * 99 + [0.9]}
    panels = cifar10.panels_of({"losses": losses, "rows": [tuned("ours", 0.7), tuned("random", 0.3)]})
    picture = np.asarray(cifar10.draw_panels(panels))
    assert picture.shape == (cifar10.HEIGHT, 2 * cifar10.WIDTH, 3)

    def height_of(color, column):
        wanted = [int(color[n : n + 2], 16) for n in (1, 3, 5)]
        return np.flatnonzero(np.abs(picture[:, column].astype(int) - wanted).sum(axis=1) < 90).mean()

    middle, late = cifar10.WIDTH // 2, 2 * cifar10.WIDTH - 200
    assert height_of(cifar10.COLOURS["ours"], middle) > height_of(cifar10.COLOURS["peer"], middle) + 100
    assert height_of(cifar10.COLOURS["ours"], late) < height_of(cifar10.COLOURS["random"], late) - 100


def test_the_mean_of_neighbors_keeps_a_straight_line_and_smooths_no_end(cifar10):
    x, y = cifar10.running_mean([10, 20, 30, 40, 50], [1.0, 2.0, 3.0, 4.0, 5.0], 3)
    assert x == pytest.approx([20, 30, 40])
    assert y == pytest.approx([2, 3, 4])


@pytest.mark.parametrize(("low", "high"), [(0.43, 0.96), (0, 3900), (12.3, 76.0), (0.5, 0.5), (0, 16)])
def test_ticks_are_few_and_hold_all_values(cifar10, low, high):
    ticks = cifar10.ticks_of(low, high)
    assert 2 <= len(ticks) <= 8
    assert ticks[0] <= low
    assert ticks[-1] >= high


@pytest.mark.slow
def test_random_weights_are_those_that_the_run_began_with(cifar10, config, tmp_path):
    make_run(tmp_path / "ours", config, [])
    cifar10.draw(str(tmp_path / "ours"), str(tmp_path / "random"))
    drawn, _ = checkpoint.read_params(str(tmp_path / "random"))
    begun = jax.jit(train.build(config, 6, 179)["make_state"])().params
    jax.tree.map(np.testing.assert_array_equal, drawn, jax.device_get(begun))


def test_random_weights_of_no_run_are_refused(cifar10, tmp_path):
    with pytest.raises(CheckpointError, match="run the stage ours first"):
        cifar10.draw(str(tmp_path / "ours"), str(tmp_path / "random"))


def test_a_command_that_fails_ends_the_program_and_is_on_record_without_paths(cifar10, tmp_path, capsys):
    options = argparse.Namespace(runs=tmp_path, images="", ours=None, python=sys.executable)
    with pytest.raises(SystemExit) as stop:
        cifar10.run("peer", [sys.executable, "-c", "raise SystemExit(5)", tmp_path / "peer"], options)
    assert stop.value.code == 5
    assert "peer ended with code 5" in capsys.readouterr().err
    (attempt,) = json.loads((tmp_path / "records" / "peer.json").read_text())
    assert attempt["command"] == "python -c 'raise SystemExit(5)' RUNS/peer"
    assert attempt["exit_code"] == 5


def test_a_sigterm_goes_on_to_the_command_which_may_save(cifar10, tmp_path):
    options = argparse.Namespace(runs=tmp_path, images="", ours=None, python=sys.executable)
    program = "import os, signal, sys, time; signal.signal(15, lambda *_: sys.exit(143)); os.kill(os.getppid(), 15); "
    ignored = signal.signal(signal.SIGTERM, lambda *_: None)  # should it come too early
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
def test_a_mistake_on_the_command_line_is_told_before_anything_is_run(cifar10, arguments, says):
    with pytest.raises(ConfigError, match=says):
        cifar10.main(arguments)


def test_a_stage_without_the_weights_it_needs_says_which_stage_makes_them(cifar10, tmp_path):
    with pytest.raises(CheckpointError, match="run the stages before probe"):
        cifar10.main(["probe", f"--runs={tmp_path}"])
    with pytest.raises(CheckpointError, match="run the stage peer"):
        cifar10.main(["imported", f"--runs={tmp_path}"])


@pytest.mark.parametrize("path", sorted(FOLDER.glob("results/*/cifar10.json")), ids=lambda path: path.parent.name)
def test_the_readme_shows_what_was_measured(cifar10, path):
    assert cifar10.table(json.loads(path.read_text())) in (FOLDER / "README.md").read_text()


@pytest.mark.slow
def test_a_killed_run_of_the_peer_goes_on_to_the_same_bits_and_its_import_has_its_features(cifar10, config, tmp_path):
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
        [row["learning_rate"] for row in cifar10.losses_of(tmp_path / name).values()] for name in ("ours", "whole")
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
    np.testing.assert_allclose(features[0], there, rtol=0, atol=1e-5)  # float32 sums in another order

    decayed = optim.decayed(imported.params, tuple(set(optim.NO_DECAY) - {"mask_token"}))
    count = sum(x.size for x, d in zip(*map(jax.tree.leaves, (imported.params, decayed)), strict=True) if d)
    state = torch.load(tmp_path / "whole" / "checkpoint.pt", weights_only=True)
    groups = state["optimizer"]["param_groups"]
    moments = state["optimizer"]["state"]
    theirs = {g["weight_decay"]: sum(moments[n]["exp_avg"].numel() for n in g["params"]) for g in groups}
    assert theirs == {0.05: count, 0.0: sum(x.size for x in jax.tree.leaves(imported.params)) - count}
