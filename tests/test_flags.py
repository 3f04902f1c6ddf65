"""Command line -> config: mistakes are reported with the nearest right thing, and every field's origin is known."""

import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags
from runs import run

from simmim_jax import flags, main
from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder

DIGITS = "--config=configs/digits_vit_tiny.py"


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)


def parse(*argv):
    """(config, argv) of a command line."""
    values, argv = absl_flags.FlagValues(), ["main", *map(str, argv)]
    flags.define_run_flags(values)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # ml_collections looks for the fields there
        flags.parse_flags(argv, flag_values=values)
    return values.config, argv


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--config.optim.larning_rate=1", "did you mean optim.learning_rate"),
        ("--config.batch_sise=8", "did you mean batch_size"),
        ("--config.optm.name=sgd", "did you mean optim.name"),
        ("--config.objective.ratio=0.5", "did you mean objective.mask_ratio"),
        ("--config.encoder.heads=3", "did you mean encoder.num_heads"),
        ("--config.image_size=x,32", "image_size.* - give numbers"),
        ("--config.optim.betas=0.9,b", "betas.* - give numbers"),
        ("--config.maxtokeep=3", "did you mean max_to_keep"),
        ("--config.objective.zzz=3", "unknown field objective.zzz"),
        ("--config.batch_size=1e3", "1e3.* - give a whole number, like 64"),
        ("--config.data.flip=often", "often.* - give a number, like 0.0"),
        ("--config.encoder=5", "--config.encoder.name=value"),
        ("--workdirr=x", "workdir"),
        ("surplus", "surplus"),
    ],
)
def test_mistake_in_a_flag_is_reported_with_the_nearest_right_thing(argument, message):
    with pytest.raises(ConfigError, match=message):
        parse(DIGITS, "--workdir=x", argument)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digit_vit_tiny.py", "--workdir=x"], "did you mean configs/digits_vit_tiny.py"),
        (["--config=configs", "--workdir=x"], "no such config file"),
        (["--workdir=x"], "no config given"),
        ([DIGITS], "no workdir given"),
        (["--config=configs/cifar10_vit_tiny.py:fodler", "--workdir=x"], "'fodler'.*folder"),
    ],
)
def test_missing_config_workdir_and_unknown_argument_are_reported(arguments, message):
    with pytest.raises(ConfigError, match=message):
        parse(*arguments)


@pytest.mark.parametrize(("body", "error"), [("return 1 / 0", "ZeroDivisionError"), ("return (", "SyntaxError")])
def test_error_in_a_recipe_is_reported_in_one_line(tmp_path, body, error):
    recipe = tmp_path / "broken.py"
    recipe.write_text(f"def get_config():\n    {body}\n")
    with pytest.raises(ConfigError, match=error):
        parse(f"--config={recipe}", "--workdir=x")


def test_mistakes_help_and_an_open_encoder_need_no_jax():
    open_encoder = ("--config=configs/folder_finetune.py", "--print_config")
    for arguments, code, output in (
        ((DIGITS, "--workdir=x", "--config.lr=1"), 2, "ERROR[config]"),
        (("--help",), 1, "--workdir"),  # absl's exit code
        (open_encoder, 0, "encoder.name"),
    ):
        done = run(*arguments, script=("-X", "importtime", "-m", "simmim_jax.main"))
        assert done.returncode == code, done.stderr
        assert output in done.stdout + done.stderr
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert "ml_collections" in imported
        assert not imported & {"jax", "flax", "orbax", "grain"}


@pytest.mark.parametrize(
    ("recipe", "argument", "num_heads"),
    [("digits_vit_tiny", "4", 4), ("digits_vit_tiny", "(2,)", 2), ("simmim_swin_b_800ep", "1,1,2,2", (1, 1, 2, 2))],
)
def test_num_heads_is_one_number_or_one_per_stage(recipe, argument, num_heads):
    config, _ = parse(f"--config=configs/{recipe}.py", "--workdir=x", f"--config.encoder.num_heads={argument}")
    assert make_encoder(**config.encoder).num_heads == num_heads


def test_other_encoder_on_the_command_line_drops_the_recipes_encoder_fields(capsys):
    vit = "--config=configs/simmim_vit_b_finetune.py"
    config, _ = parse(vit, "--workdir=x", "--config.encoder.name=swin", "--config.encoder.mlp_ratio=2.0")
    assert (config.encoder.size, config.encoder.dtype, config.encoder.mlp_ratio) == ("b", "bfloat16", 2.0)
    assert config.encoder.relative_position is None
    assert "relative_position" in capsys.readouterr().out
    config, _ = parse(vit, "--workdir=x", "--config.encoder.name=")
    assert config.encoder.size is None
    config, _ = parse("--config=configs/folder_finetune.py:vit", "--workdir=x", "--config.encoder.name=vit")
    assert config.encoder.relative_position == "per_block"  # of a recipe for any encoder


def test_print_config_shows_every_field_with_value_and_origin():
    config, argv = parse(DIGITS, "--print_config", "--config.batch_size=32", "--config.encoder.num_heads", "2")
    rows = {}
    for line in flags.describe_config(config, argv, main.encoder_fields(config, None)).splitlines():
        name, value, origin = line.split(maxsplit=2)
        rows[name] = (value, origin)
    for name, value, origin in (
        ("batch_size", "32", "flag"),
        ("eval_batch_size", "32", "flag"),  # follows from batch_size
        ("encoder.num_heads", "2,", "flag"),
        ("encoder.width", "96", "recipe"),
        ("encoder.layer_scale", "0.1", "vit b"),
        ("image_size", "32,32", "recipe"),
        ("evals.knn.k", "20", "recipe"),
        ("objective.mask_ratio", "0.6", "default"),
        ("data.path", '""', "default"),
    ):
        assert rows[name] == (value, origin), name
    fields = {name for name, _ in flags.flat(flags.to_dict(config)) if not name.startswith("encoder.")}
    assert fields <= rows.keys()
    assert {"encoder.window", "encoder.widths"}.isdisjoint(rows)  # not of this encoder
