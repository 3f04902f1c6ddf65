"""A user's mistake ends a run with one line and an exit code of its kind, before anything is lost.

Runs are in this process, as `simmim_jax.main` starts them; a few are processes of their own, for what only those show.
"""

import json
import os
import re
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
from absl import flags as absl_flags
from PIL import Image
from runs import DIGITS, ROOT, command, run

from simmim_jax import flags, main
from simmim_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError

RECIPE = DIGITS[0]
SHORT = (*DIGITS, "--config.steps=1", "--config.eval_every=0", "--config.evals={}", "--config.online_probes=false")
FOLDER = (
    "--config=configs/folder_vit_small.py", "--config.image_size=32,32", "--config.encoder.size=ti",
    "--config.encoder.depth=1", "--config.batch_size=8", "--config.data.heldout_fraction=0.1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def start(*argv) -> None:
    """`python -m simmim_jax.main` with these arguments, in this process."""
    values, argv = absl_flags.FlagValues(), ["simmim_jax.main", *map(str, argv)]
    absl_flags.DEFINE_integer("verbosity", -1, "", flag_values=values)
    flags.define_run_flags(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(main, "flags", SimpleNamespace(FLAGS=values))
        main.main(flags.parse_flags(argv, flag_values=values))


def refusal(error, *argv) -> str:
    """The line that a run ends with."""
    with pytest.raises(error) as raised:
        start(*argv)
    assert re.fullmatch(rf"ERROR\[{error.kind}\] .+ - .+", str(raised.value))
    return str(raised.value)


def folder_of_images(folder, count: int):
    folder.mkdir(parents=True)
    for n in range(count):
        Image.new("RGB", (40, 40), (20 * n, 0, 90)).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a finished run of one step."""
    workdir = tmp_path_factory.mktemp("finished")
    done = run(*SHORT, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.image_size=32", "image_size.* - give height,width"),
        ("--config.objective.mask_ratio=1.5", "1.5.* - objective.mask_ratio"),
        ("--config.objective.mask_ratio=0.0", "0.0.* - objective.mask_ratio"),
        ("--config.objective.mask_patch_size=7", "7 .* 4 - objective.mask_patch_size - try 4 or 8"),
        ("--config.image_size=36,36", "36 .* 8 - .* - try 32 or 40"),
        ("--config.encoder.name=vitt", "did you mean vit"),
        ("--config.encoder.size=xl", "'xl'.*b, h, l, s, ti"),
        ("--config.objective.name=simmin", "did you mean simmim"),
        ("--config.objective.name=classify", "option 'mask"),
        ("--config.optim.schedule=cos", "'cos'"),
        ("--config.mean=0.5,0.5", "mean.*std"),
        ("--config.epochs=nan", "epochs.*nan"),
        ("--config.epochs=0.0", "0 steps"),
        ("--config.microbatches=0", "microbatches.*0"),
        ("--config.eval_every=-2", "eval_every.*-2"),
        ("--config.max_to_keep=0", "max_to_keep.*0"),
        ("--config.optim.grad_clip_norm=-5.0", "-5.0 - optim.grad_clip_norm"),
        ("--config.encoder.mlp_ratio=-1.0", "mlp_ratio.*-1.0"),
        ("--config.batch_size=100", "100.* 8 devices.*96 or 104"),
        ("--workdir=", "workdir"),
    ],
)
def test_bad_value_is_refused_before_anything_is_written(tmp_path, flag, message):
    assert re.search(message, refusal(ConfigError, RECIPE, "--workdir", tmp_path / "run", flag))
    assert not list(tmp_path.rglob("checkpoints"))


def test_missing_empty_small_and_unlabeled_folders_are_refused(tmp_path):
    images = folder_of_images(tmp_path / "images", 10)
    (tmp_path / "empty").mkdir()
    run_in = (*FOLDER, "--workdir", tmp_path / "run", "--config.data.path")
    assert "imagez" in refusal(DataError, *run_in, tmp_path / "imagez")
    assert "0 images" in refusal(DataError, *run_in, tmp_path / "empty")
    assert "500" in refusal(DataError, *run_in, images, "--config.batch_size=500")
    probes = ("--config=configs/folder_vit_small.py:probes", *FOLDER[1:], "--config.probe_block=1")
    assert "classes" in refusal(ConfigError, *probes, "--workdir", tmp_path / "run", "--config.data.path", images)
    linear = ("--config=configs/cifar10_linear.py:folder", "--config.data.heldout_fraction=0.3")
    assert "classes" in refusal(DataError, *linear, "--workdir", tmp_path / "run", "--config.data.path", images)


def test_held_out_images_must_have_the_training_classes(tmp_path):
    for name in ("a", "b"):
        folder_of_images(tmp_path / "data" / "train" / name, 5)
    folder_of_images(tmp_path / "data" / "val", 10)
    probes = ("--config=configs/folder_vit_small.py:probes", *FOLDER[1:], "--config.probe_block=1")
    probes += ("--config.data.path", tmp_path / "data")
    assert re.search("no classes.* 2", refusal(DataError, *probes, "--workdir", tmp_path / "run"))


def test_unknown_and_unprepared_datasets_are_refused(tmp_path):
    tfds = ("--config=configs/cifar10_vit_tiny.py", "--workdir", tmp_path / "run", "--config.data.data_dir", tmp_path)
    assert "tfds build cifar10 --file_format=array_record" in refusal(DataError, *tfds)
    assert "did you mean cifar10" in refusal(DataError, *tfds, "--config.data.name=cifar11")
    assert "did you mean folder" in refusal(ConfigError, *tfds, "--config.data.source=foldr")


def test_wrong_class_count_is_refused_with_the_right_one(tmp_path):
    linear = ("--config=configs/digits_linear.py", "--config.objective.num_classes=7", "--workdir", tmp_path / "run")
    assert "--config.objective.num_classes=10" in refusal(ConfigError, *linear)


def test_workdir_of_another_config_is_refused_with_the_difference(finished):
    line = refusal(
        ConfigError, *SHORT, "--workdir", finished, "--config.objective.mask_ratio=0.5", "--config.encoder.depth=3"
    )
    assert "encoder.depth: 2 saved, 3 now" in line
    assert "objective.mask_ratio: 0.6 saved, 0.5 now" in line
    start(*SHORT, "--workdir", finished, "--config.log_every=7", "--config.data.threads=1")


def test_workdir_of_an_earlier_version_is_refused(finished, tmp_path):
    os.symlink(finished / "checkpoints", tmp_path / "checkpoints")
    config = json.loads((finished / "config.json").read_text())
    config["objective"]["block_size"] = config["objective"].pop("mask_patch_size")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "objective.block_size" in refusal(ConfigError, *SHORT, "--workdir", tmp_path)


def test_encoder_of_another_model_is_refused_with_the_difference(finished, tmp_path):
    linear = ("--config=configs/digits_linear.py", "--workdir", tmp_path / "linear", "--config.init_from")
    line = refusal(CheckpointError, *linear, finished)
    assert re.search(r"encoder\.width: 32 .* 96 ", line)
    same = (finished, *(flag for flag in DIGITS if "encoder" in flag), "--config.objective.block=2")
    assert "encoder.absolute_position" in refusal(
        CheckpointError, *linear, *same, "--config.encoder.absolute_position=none"
    )
    assert re.search(r"std: \[0.376\].*\[0.3\]", refusal(CheckpointError, *linear, *same, "--config.std=0.3,"))
    assert "nowhere" in refusal(CheckpointError, *linear, tmp_path / "nowhere")
    assert "checkpoint" in refusal(CheckpointError, *linear, ROOT / "tests")


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    assert "workdir" in refusal(ConfigError, *DIGITS, "--workdir", tmp_path / "file")


@pytest.mark.parametrize(
    ("error", "flag", "decisive"),
    [
        (ConfigError, "--config.optim.betas=(0.9,0.99,0.5)", "optim.betas"),
        (NonFiniteError, "--config.optim.learning_rate=1e38", "4 steps"),
    ],
)
def test_failed_process_prints_one_line_and_exits_with_the_code_of_its_kind(tmp_path, error, flag, decisive):
    done = run(*DIGITS, "--workdir", tmp_path, "--config.evals={}", "--config.online_probes=false", flag)
    assert done.returncode == error.exit_code
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith(f"ERROR[{error.kind}]")
    assert decisive in line
    assert not list((tmp_path / "checkpoints").glob("[0-9]*"))  # no step without an update is saved


def test_closed_pipe_and_ctrl_c_end_a_process_quietly(tmp_path):
    fields = ("--config=configs/folder_finetune.py", "--print_config")
    line, keywords = command(*fields)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
    waiting = tmp_path / "waiting.py"
    waiting.write_text("import time\nprint('ready', flush=True)\ntime.sleep(600)\n")
    line, keywords = command(f"--config={waiting}", "--workdir", tmp_path / "run")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **keywords) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130
