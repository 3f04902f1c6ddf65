"""Each recipe of configs/ loads, builds its model and documents itself; official recipes have official numbers."""

import ast
import copy
import dataclasses
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from simmim_jax.config import (
    FIXED,
    FREE,
    IMAGENET_MEAN,
    IMAGENET_STD,
    WHOLE,
    defaults,
    flat,
    load,
    pretrain_config,
    refuse_change,
    to_dict,
)
from simmim_jax.errors import ConfigError
from simmim_jax.experiment import fill_in
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.optim import make_optimizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parameters(config):
    """Shapes of a recipe's parameters. Recipes for any encoder get a small one, and open fields a value."""
    if not config.encoder.name:
        config.encoder.name, config.encoder.size = "vit", "s"
    config = fill_in(config, "", images=10_000, classes=10, on_cpu=False)
    encoder = {**config.encoder}
    objective = make_objective(
        encoder=make_encoder(**encoder | {"scan": True}), image_size=config.image_size,
        mean=config.mean or IMAGENET_MEAN, std=config.std or IMAGENET_STD, **config.objective,
    )  # fmt: skip
    return jax.eval_shape(objective.init, jax.random.key(0))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_its_model_and_optimizer_and_documents_itself(name):
    config = load(f"configs/{name}.py")
    if config.encoder.name.startswith("swin"):  # the official recipes below are built at their depth
        config.encoder.depths = (1, 1, 1, 1)
    assert parameters(config)
    config = fill_in(config, "", images=10_000, classes=10, on_cpu=False)
    make_optimizer(steps=10, steps_per_epoch=5, layer_id=lambda path: 0, depth=1, **config.optim)
    text = (ROOT / "configs" / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"python -m simmim_jax.main --config configs/{name}.py" in docstring
    assert "Hardware:" in docstring
    assert re.search("not yet run|measured", docstring)
    imports = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imports <= {
        "ml_collections",
        "ml_collections.config_dict",
        "simmim_jax.config",
    }  # a recipe reads no other recipe


@pytest.mark.parametrize("name", [*RECIPES, "folder_segment:upernet"])
def test_each_field_is_either_free_or_fixed(name):
    file, _, argument = name.partition(":")
    config = load(f"configs/{file}.py:{argument}" if argument else f"configs/{file}.py")
    fields = {field for field, _ in flat(to_dict(config), whole=WHOLE)}
    encoder_class, _ = ENCODERS[config.encoder.name or "vit"]
    fields |= {f"encoder.{field.name}" for field in dataclasses.fields(encoder_class)} - {"encoder.parent"}
    for field in fields:
        assert (field in FREE) + (field in FIXED) == 1, field
    assert len({*FREE, *FIXED}) == len(FREE) + len(FIXED)


def test_each_listed_field_exists():
    configs = [*(load(f"configs/{name}.py") for name in RECIPES), load("configs/folder_segment.py:upernet")]
    fields = {field for config in configs for field, _ in flat(to_dict(config), whole=WHOLE)}
    added_by_runs = {"classes", "imported", "phases", "pixels", "untrained_classes"}
    assert {*FREE, *FIXED} - fields == added_by_runs


RECIPE_OF = {  # official yaml file: our recipe, and fields that make it that of the Swin repository
    "simmim/simmim_pretrain__swin_base__img192_window6__100ep": ("swin_b_100ep.py", {}),
    "simmim/simmim_pretrain__swin_base__img192_window6__800ep": ("swin_b_800ep.py", {}),
    "simmim/simmim_pretrain__swin_large__img192_window12__800ep": ("swin_l_800ep.py", {}),
    "simmim/simmim_pretrain__vit_base__img224__800ep": ("vit_b_800ep.py", {}),
    "simmim/simmim_finetune__swin_base__img192_window6__100ep": ("swin_b_finetune.py:100ep_192", {}),
    "simmim/simmim_finetune__swin_base__img224_window7__100ep": ("swin_b_finetune.py:100ep", {}),
    "simmim/simmim_finetune__swin_base__img224_window7__800ep": ("swin_b_finetune.py", {}),
    "simmim/simmim_finetune__swin_large__img224_window14__800ep": ("swin_l_finetune.py", {}),
    "simmim/simmim_finetune__vit_base__img224__800ep": ("vit_b_finetune.py", {}),
    "swin_transformer/simmim_pretrain__swin_base__img192_window6__800ep": ("swin_b_800ep.py", {}),
    "swin_transformer/simmim_pretrain__swinv2_base__img192_window12__800ep": ("swinv2_b_800ep.py", {}),
    "swin_transformer/simmim_finetune__swin_base__img224_window7__800ep": (
        "swin_b_finetune.py", {"optim.schedule": "cosine"},
    ),
    "swin_transformer/simmim_finetune__swinv2_base__img224_window14__800ep": ("swinv2_b_finetune.py", {}),
}  # fmt: skip


def official_fields(official: dict) -> dict:
    """Our fields and their values in a config of the official code, whose rates are those of a batch of 2048."""
    data, model, train = official["DATA"], official["MODEL"], official["TRAIN"]
    optimizer, schedule, network = train["OPTIMIZER"], train["LR_SCHEDULER"], model[model["TYPE"].upper()]
    fields = {
        "image_size": (data["IMG_SIZE"],) * 2,
        "epochs": train["EPOCHS"],
        "batch_size": 16 * data["BATCH_SIZE"],
        "optim.name": optimizer["NAME"],
        "optim.betas": tuple(optimizer["BETAS"]),
        "optim.epsilon": optimizer["EPS"],
        "optim.learning_rate": train["BASE_LR"],
        "optim.warmup_learning_rate": train["WARMUP_LR"],
        "optim.min_learning_rate": train["MIN_LR"],
        "optim.warmup_epochs": train["WARMUP_EPOCHS"],
        "optim.milestones": tuple(schedule["MULTISTEPS"]),
        "optim.gamma": schedule["GAMMA"],
        "optim.weight_decay": train["WEIGHT_DECAY"],
        "optim.layer_decay": train["LAYER_DECAY"],
        "optim.grad_clip_norm": train["CLIP_GRAD"],
        "encoder.name": model["TYPE"],
        "encoder.drop_path": model["DROP_PATH_RATE"],
        "encoder.width": network["EMBED_DIM"],
        "encoder.patch_size": network["PATCH_SIZE"],
        "encoder.mlp_ratio": network["MLP_RATIO"],
        "encoder.qkv_bias": {True: "qkv" if model["TYPE"] == "swin" else "qv", False: "none"}[network["QKV_BIAS"]],
    }
    if model["TYPE"] == "vit":
        table = "shared" if network["USE_SHARED_RPB"] else "per_block" if network["USE_RPB"] else "none"
        return fields | {
            "encoder.depth": network["DEPTH"],
            "encoder.num_heads": network["NUM_HEADS"],
            "encoder.layer_scale": network["INIT_VALUES"],
            "encoder.absolute_position": "learned" if network["USE_APE"] else "none",
            "encoder.relative_position": table,
            "encoder.final_norm": not network["USE_MEAN_POOLING"],
        }
    return fields | {
        "encoder.depths": tuple(network["DEPTHS"]),
        "encoder.num_heads": tuple(network["NUM_HEADS"]),
        "encoder.window": network["WINDOW_SIZE"],
        "encoder.absolute_position": "learned" if network["APE"] else "none",
        "encoder.patch_norm": network["PATCH_NORM"],
    }


def official_objective(official: dict, is_pretraining: bool) -> dict:
    """The same for the fields of the objective and the data."""
    data, model, augmentation = official["DATA"], official["MODEL"], official["AUG"]
    if is_pretraining:
        window = model.get("SIMMIM", {}).get("NORM_TARGET", {"ENABLE": False})
        return {
            "objective.mask_patch_size": data["MASK_PATCH_SIZE"],
            "objective.mask_ratio": data["MASK_RATIO"],
            "objective.norm_window": window["PATCH_SIZE"] if window["ENABLE"] else 0,
        }
    fields = {f"objective.{name}": augmentation[name.upper()] for name in ("mixup", "cutmix", "reprob", "remode")}
    fields |= {f"objective.{name}": augmentation[name.upper()] for name in ("mixup_prob", "mixup_mode", "recount")}
    return fields | {
        "objective.mixup_switch_prob": augmentation["MIXUP_SWITCH_PROB"],
        "objective.mixup_group": data["BATCH_SIZE"],
        "objective.label_smoothing": model["LABEL_SMOOTHING"],
        "objective.num_classes": model["NUM_CLASSES"],
        "data.interpolation": data["INTERPOLATION"],
        "data.augment": augmentation["AUTO_AUGMENT"],
    }


def test_each_official_file_has_a_recipe(golden_json):
    assert golden_json("official_recipes").keys() == RECIPE_OF.keys()
    used = {file.partition(".")[0] for file, _ in RECIPE_OF.values()}
    assert used == {name.removeprefix("simmim_") for name in RECIPES if name.startswith("simmim_")}


@pytest.mark.parametrize("name", RECIPE_OF)
def test_official_recipe_has_the_official_numbers_and_rates(golden_json, name):
    """Those of the yaml files, and the rates that the official scheduler sets (tests/golden/README.md)."""
    golden, (file, changed) = golden_json("official_recipes")[name], RECIPE_OF[name]
    config, official = load(f"configs/simmim_{file}"), golden["config"]
    config.update_from_flattened_dict(changed)
    expected = official_fields(official) | official_objective(official, "pretrain" in name)
    ours = dict(flat(to_dict(config)))
    ours |= {f"encoder.{field}": value for field, value in make_encoder(**config.encoder).options().items()}
    ours = {field: tuple(ours[field]) if isinstance(ours[field], list) else ours[field] for field in expected}
    assert ours == {field: pytest.approx(x) if isinstance(x, float) else x for field, x in expected.items()}

    steps_per_epoch = golden["steps_per_epoch"]
    steps = {"schedule": config.optim.schedule, "steps": int(config.epochs) * steps_per_epoch}
    _, rate = make_optimizer(
        steps_per_epoch=steps_per_epoch, layer_id=lambda path: 0, depth=1, **{**config.optim, **steps}
    )
    # The official loop sets the rate of step n after step n - 1.
    rates = {0 if n == "initial" else int(n) + 1: x for n, x in golden["rate_after_step_update"].items()}
    np.testing.assert_allclose([float(rate(step)) for step in rates], list(rates.values()), rtol=2e-5)  # float32


@pytest.mark.parametrize(
    ("name", "num_parameters"),
    [
        ("swin_b_100ep", 89_874_104),
        ("swin_l_800ep", 199_881_204),
        # decoder 1024 * 3072 + 3072 and mask token 128 on the backbone's 86.9 M
        ("swinv2_b_800ep", 86_893_816 + 3_148_800 + 128),
        # decoder 768 * 768 + 768, mask token 768, on the encoder that test_vit.py counts
        ("vit_b_800ep", 85_665_360 + 768 * 768 + 768 + 768),
    ],
)
def test_pretraining_recipe_has_the_official_number_of_parameters(name, num_parameters):
    config = load(f"configs/simmim_{name}.py")
    assert sum(x.size for x in jax.tree.leaves(parameters(config))) == num_parameters


@pytest.mark.parametrize("name", sorted({file for file, _ in RECIPE_OF.values()}))
def test_official_recipe_has_the_crops_of_the_official_loader(name):
    """data_simmim.py and data_finetune.py; no yaml file sets these."""
    config = load(f"configs/simmim_{name}")
    data, objective, encoder = config.data, config.objective, config.encoder
    assert (data.crop_ratio, data.flip, data.color_jitter, config.ema_decay) == ((3 / 4, 4 / 3), 0.5, 0.0, 0.0)
    if "finetune" not in name:
        assert (data.crop_scale, data.interpolation) == ((0.67, 1.0), "bilinear")
        return
    assert (data.crop_scale, data.crop_fraction) == ((0.08, 1.0), 0.875)
    assert objective.head_init_scale == (0.001 if encoder.name == "vit" else 1.0)


def test_references_follow_and_do_not_lead():
    config = pretrain_config()
    config.batch_size = 1024
    assert config.optim.learning_rate == pytest.approx(2e-4)
    assert config.optim.warmup_learning_rate == pytest.approx(1e-6)
    config.base_learning_rate, config.microbatches = 3e-4, 4
    assert config.optim.learning_rate == pytest.approx(6e-4)
    assert config.eval_batch_size == 256
    config.eval_batch_size = 16
    assert (config.batch_size, config.microbatches) == (1024, 4)


def test_resuming_may_change_free_fields_only():
    config = pretrain_config()
    saved = to_dict(config)
    config.data.workers, config.log_every, config.mesh.fsdp, config.evals = 7, 1, -1, {"knn": {"k": 3}}
    refuse_change(saved, to_dict(config), "here")
    config.optim.grad_clip_norm = 1.0
    with pytest.raises(ConfigError, match=r"optim.grad_clip_norm: 5.0 saved, 1.0 now"):
        refuse_change(saved, to_dict(config), "here")


def test_fields_of_another_version_are_refused_by_name():
    saved = to_dict(pretrain_config())
    old, new = copy.deepcopy(saved), copy.deepcopy(saved)
    old["objective"]["block_size"] = old["objective"].pop("mask_patch_size")
    with pytest.raises(ConfigError, match=r"does not know: objective\.block_size") as refusal:
        refuse_change(old, saved, "here")
    assert "\n" not in str(refusal.value)
    new["objective"]["sharpness"] = 2.0  # a field that this version lacks
    with pytest.raises(ConfigError, match="sharpness"):
        refuse_change(saved, new, "here")
    with pytest.raises(ConfigError, match="sharpness"):
        refuse_change(new, saved, "here")


def test_imported_model_leaves_all_other_fields_open():
    config = to_dict(pretrain_config())
    refuse_change({"imported": {"format": "official"}, "mean": config["mean"]}, config, "here")
    with pytest.raises(ConfigError, match="mean"):
        refuse_change({"imported": {"format": "official"}, "mean": [0.5]}, config, "here")


def test_defaults_are_those_of_the_objective():
    assert to_dict(defaults(load("configs/folder_vit_small.py"))) == to_dict(pretrain_config())
    assert defaults(load("configs/folder_finetune.py")).objective.label_smoothing == 0.0
    assert defaults(load("configs/folder_segment.py")).objective.channels == 512
