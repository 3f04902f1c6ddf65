"""What a user's mistake gets: one line, an exit code of its kind, no traceback, nothing lost, and soon."""

import re
import sys

import pytest
from PIL import Image
from runs import DIGITS, ROOT, run

FOLDER = "--config=configs/folder_vit_small.py"
SMALL = ("--config.image_size=32,32", "--config.encoder.size=ti", "--config.encoder.depth=1", "--config.batch_size=4")
SMALL += ("--config.data.heldout_fraction=0.1",)


def told(*arguments, code, **options) -> str:
    """The one line that a run ends with, after the promises about it are checked."""
    done = run(*arguments, **options)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert re.match(r"ERROR\[\w+\] .+ - .+", lines[-1]), done.stderr
    return lines[-1]


@pytest.fixture
def images(tmp_path):
    """A folder of ten pictures without classes."""
    folder = tmp_path / "images"
    folder.mkdir()
    for n in range(10):
        Image.new("RGB", (40, 40), (20 * n, 0, 90)).save(folder / f"{n}.png")
    return folder


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.optim.larning_rate=1", "unknown field optim.larning_rate - .*did you mean optim.learning_rate"),
        ("--config.batch_sise=8", "unknown field batch_sise - .*did you mean batch_size"),
        ("--config.encoder.dept=2", "did you mean encoder.depth"),
        ("--config.batch_size=1e3", r"--config.batch_size=1e3.* - give a int, like 64"),
        ("--config.data.flip=often", r"--config.data.flip=often.* - give a float, like 0.0"),
        ("--config.encoder=5", "set its fields one by one: --config.encoder.absolute_position=value"),
        ("--workdirr=x", "Did you mean: workdir"),
        ("surplus", "unexpected argument 'surplus'"),
        ("--config.image_size=32", r"image_size \(32,\).* - give height,width"),
        ("--config.objective.mask_ratio=1.5", "ratio 1.5 is not between 0 and 1 - objective.mask_ratio"),
        ("--config.objective.mask_ratio=0.0", "ratio 0.0 is not between 0 and 1"),
        ("--config.objective.mask_patch_size=7", "7 is no multiple of .* 4 - objective.mask_patch_size - try 4 or 8"),
        ("--config.image_size=36,36", "36 is no multiple of .* 8 - image height - try 32 or 40"),
        ("--config.encoder.name=vitt", "unknown encoder 'vitt' - did you mean vit"),
        ("--config.encoder.size=xl", "unknown size of vit 'xl' - .*choose one of b, h, l, s, ti"),
        ("--config.objective.name=simmin", "unknown objective 'simmin' - did you mean simmim"),
        ("--config.optim.schedule=cos", "unknown schedule 'cos'"),
        ("--config.mean=0.5,0.5", "mean .* and std .* - mean, std"),
        ("--config.steps=-1", "steps is -1 - steps - give a number of at least 0"),
        ("--config.epochs=nan", "epochs is nan"),
        ("--config.epochs=0.0", "a run of 0 steps"),
        ("--config.microbatches=0", "microbatches is 0"),
        ("--config.eval_images=-4", "eval_images is -4"),
        ("--config.eval_every=-2", "eval_every is -2"),
        ("--config.max_to_keep=0", "keep is 0"),
        ("--config.optim.grad_clip_norm=-5.0", "clip is -5.0 - optim.grad_clip_norm"),
        ("--config.optim.betas=(0.9,0.99,0.5)", "betas .* - optim.betas - give two numbers"),
        ("--config.data.crop_scale=(0.5,)", "crop_scale.* two numbers"),
        ("--config.encoder.mlp_ratio=-1.0", "mlp_ratio is -1.0"),
        ("--config.objective.name=classify", "unknown classify objective option 'mask_patch_size'"),
        ("--workdir=", "no workdir"),
    ],
)
def test_a_bad_field_is_told_before_anything_is_written(tmp_path, flag, message):
    assert re.search(message, told(*DIGITS[:1], "--workdir", tmp_path / "run", flag, code=2))
    assert not (tmp_path / "run").exists()


def test_a_misspelt_field_is_told_without_importing_jax(tmp_path):
    script = ("-X", "importtime", "-m", "simmim_jax.main")
    done = run(*DIGITS[:1], "--workdir", tmp_path, "--config.lr=1", script=script)
    assert done.returncode == 2
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "ml_collections" in imported
    assert not imported & {"jax", "flax", "orbax", "grain"}


def test_missing_and_broken_configs_are_told(tmp_path):
    assert "did you mean configs/digits_vit_tiny.py" in told(
        "--config=configs/digit_vit_tiny.py", "--workdir=x", code=2
    )
    assert "no config given" in told("--workdir=x", code=2)
    assert "no such config file" in told("--config=configs", "--workdir=x", code=2)
    assert "no workdir given" in told(*DIGITS[:1], code=2)
    broken = tmp_path / "broken.py"
    broken.write_text("def get_config():\n    return 1 / 0\n")
    assert "ZeroDivisionError" in told("--config", broken, "--workdir=x", code=2)
    broken.write_text("def get_config(:\n")
    assert "SyntaxError" in told("--config", broken, "--workdir=x", code=2)
    assert "unknown argument 'fodler'" in told("--config=configs/cifar10_vit_tiny.py:fodler", "--workdir=x", code=2)


def test_help_needs_no_config():
    done = run("--help")
    assert "--config" in done.stdout
    assert "--workdir" in done.stdout


def test_a_batch_that_the_devices_do_not_divide_is_refused_with_those_that_do(tmp_path):
    line = told(*DIGITS, "--config.batch_size=100", "--workdir", tmp_path, code=2, devices=8)
    assert "batch_size 100 not divisible by 8 devices" in line
    assert "try 96 or 104" in line


def test_missing_empty_and_unlabeled_folders_are_told(tmp_path, images):
    (tmp_path / "empty").mkdir()
    flags = (FOLDER, *SMALL, "--workdir", tmp_path / "run")
    assert "imagez" in told(*flags, "--config.data.path", tmp_path / "imagez", code=3)
    line = told(*flags, "--config.data.path", tmp_path / "empty", code=3)
    assert "has 0 images" in line
    assert "images" in line.split(" - ")[-1]
    assert "batch of 500 is larger" in told(*flags, "--config.data.path", images, "--config.batch_size=500", code=3)
    probes = (
        f"{FOLDER}:probes",
        *SMALL,
        "--config.probe_block=1",
        "--workdir",
        tmp_path / "run",
        "--config.data.path",
        images,
    )
    assert "knn and linear need classes" in told(*probes, code=2)
    linear = ("--config=configs/cifar10_linear.py:folder", "--config.data.heldout_fraction=0.3")
    assert "without classes" in told(*linear, "--workdir", tmp_path / "run", "--config.data.path", images, code=3)


def test_unknown_and_unprepared_datasets_are_told(tmp_path):
    flags = ("--config=configs/cifar10_vit_tiny.py", "--workdir", tmp_path / "run", "--config.data.data_dir", tmp_path)
    line = told(*flags, code=3)
    assert "cifar10" in line
    assert "tfds build cifar10 --file_format=array_record" in line
    assert "did you mean cifar10" in told(*flags, "--config.data.name=cifar11", code=3)
    assert "did you mean folder" in told(*flags, "--config.data.source=foldr", code=2)


def test_held_out_images_without_the_classes_are_told(tmp_path, images):
    for name in ("a", "b"):
        (tmp_path / "data" / "train" / name).mkdir(parents=True)
        for n in range(5):
            Image.new("RGB", (40, 40)).save(tmp_path / "data" / "train" / name / f"{n}.png")
    images.rename(tmp_path / "data" / "val")
    flags = (f"{FOLDER}:probes", *SMALL, "--config.probe_block=1", "--config.data.path", tmp_path / "data")
    line = told(*flags, "--workdir", tmp_path / "run", code=3)
    assert "the held-out images have no classes, the others 2" in line


def test_a_wrong_class_count_is_told_with_the_right_one(tmp_path):
    line = told(
        "--config=configs/digits_linear.py", "--config.objective.num_classes=7", "--workdir", tmp_path / "run", code=2
    )
    assert "--config.objective.num_classes=10" in line


def test_files_that_are_no_images_are_named_and_replaced_up_to_a_fraction(tmp_path, images):
    for n in range(2):
        (images / f"broken_{n}.jpg").write_text("<html>404</html>")
    flags = (FOLDER, *SMALL, "--config.data.path", images, "--config.steps=4")
    line = told(*flags, "--workdir", tmp_path / "strict", code=3)
    assert "broken_" in line
    done = run(*flags, "--workdir", tmp_path / "lenient", "--config.data.max_bad_fraction=0.5")
    assert done.returncode == 0, done.stderr
    assert "broken_" in done.stderr


def test_a_workdir_of_another_config_is_refused_with_the_difference(tmp_path):
    flags = (*DIGITS, "--config.steps=1", "--config.eval_every=0", "--workdir", tmp_path)
    assert run(*flags).returncode == 0
    line = told(*flags, "--config.objective.mask_ratio=0.5", "--config.encoder.depth=3", code=2)
    assert "encoder.depth: saved 2, now 3" in line
    assert "objective.mask_ratio: saved 0.6, now 0.5" in line
    assert run(*flags, "--config.log_every=7", "--config.data.threads=1").returncode == 0


def test_an_encoder_of_another_model_is_refused_with_the_difference(tmp_path):
    assert run(*DIGITS, "--config.steps=1", "--workdir", tmp_path / "run").returncode == 0
    linear = (
        "--config=configs/digits_linear.py",
        "--workdir",
        tmp_path / "linear",
        "--config.init_from",
        tmp_path / "run",
    )
    line = told(*linear, code=5)
    assert "another encoder" in line
    assert "encoder.width: 32 there, 96 here" in line
    same = (*linear, *(flag for flag in DIGITS if "encoder" in flag), "--config.objective.block=2")
    assert "encoder.absolute_position" in told(*same, "--config.encoder.absolute_position=none", code=5)
    assert "std: [0.376] there, [0.3] here" in told(*same, "--config.std=0.3,", code=5)
    (tmp_path / "run" / "config.json").unlink()
    assert "block_0/attn/proj/bias is float32[32] there and float32[96] here" in told(*linear, code=5)
    assert "no such folder" in told(*linear[:3], "--config.init_from", tmp_path / "nowhere", code=5)
    assert "no checkpoint" in told(*linear[:3], "--config.init_from", ROOT / "tests", code=5)


def test_a_workdir_that_is_a_file_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot use this workdir" in told(*DIGITS, "--workdir", tmp_path / "file", code=2)


def test_what_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    assert "ERROR[nonfinite]" in told(*DIGITS, "--workdir", tmp_path / "a", "--config.std=1e-38,", code=4)
    line = told(*DIGITS, "--workdir", tmp_path / "b", "--config.optim.learning_rate=1e38", "--config.evals={}", code=4)
    assert "4 steps in a row" in line
    assert not list((tmp_path / "b" / "checkpoints").glob("[0-9]*"))


def test_python_versions_are_those_that_we_promise():
    assert (3, 11) <= sys.version_info[:2] <= (3, 13)
