"""Each recipe of configs/ loads, builds its model and documents itself; official recipes have official numbers."""

import ast
import copy
import dataclasses
import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from simmim_jax.config import FIXED, FREE, WHOLE, defaults, flat, load, pretrain_config, refuse_change, to_dict
from simmim_jax.errors import ConfigError
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.optim import make_optimizer

ROOT = Path(__file__).parent.parent
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
OPTIMIZER = {  # of all official recipes (config.py of microsoft/SimMIM)
    "name": "adamw", "betas": (0.9, 0.999), "epsilon": 1e-8, "grad_clip_norm": 5.0, "weight_decay": 0.05,
    "lr_step_offset": 1,
}  # fmt: skip


@pytest.fixture(autouse=True)
def in_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def parameters(config):
    """Shapes of a recipe's parameters. Recipes for any encoder get a small one."""
    encoder = {**config.encoder} if config.encoder.name else {**config.encoder, "name": "vit", "size": "s"}
    objective = make_objective(
        encoder=make_encoder(**encoder | {"scan": True}), image_size=config.image_size, mean=config.mean,
        std=config.std, **config.objective,
    )  # fmt: skip
    return jax.eval_shape(objective.init, jax.random.key(0))


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_builds_its_model_and_optimizer_and_documents_itself(name):
    config = load(f"configs/{name}.py")
    if config.encoder.name.startswith("swin"):  # the official recipes below are built at their depth
        config.encoder.depths = (1, 1, 1, 1)
    assert parameters(config)
    make_optimizer(steps=10, steps_per_epoch=5, layer_id=lambda path: 0, depth=1, **config.optim)
    text = (ROOT / "configs" / f"{name}.py").read_text()
    docstring = text.split('"""')[1]
    assert f"python -m simmim_jax.main --config configs/{name}.py" in docstring
    assert "Hardware:" in docstring
    assert re.search("not yet run|measured", docstring)
    imports = {node.module for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
    assert imports <= {"ml_collections", "simmim_jax.config"}  # a recipe reads no other recipe


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
    assert {*FREE, *FIXED} - fields == {"classes", "imported"}  # which a run adds to its config.json


MULTISTEP = {0: 2e-6, 1: 2e-6, 3126: 2e-6 + (4e-4 - 2e-6) / 2, 6251: 4e-4, 437_500: 4e-4, 437_501: 4e-5, 499_999: 4e-5}
# The cosine runs from step 0 on: at the end of the warm-up, step 6250 of 62,500, it stands at 0.976 of the peak.
COSINE = {0: 4e-6, 1: 4e-6, 6250: 4e-6 + (8e-4 - 4e-6) * 6249 / 6250, 62_500: 4e-5}
COSINE |= {6251: 4e-5 + (8e-4 - 4e-5) * (1 + math.cos(math.pi / 10)) / 2}


@pytest.mark.parametrize(
    ("name", "epochs", "image", "window", "drop_path", "norm_window", "num_parameters", "rates"),
    [
        ("swin_b_100ep", 100, 192, 6, 0.0, 0, 89_874_104, COSINE),
        ("swin_b_800ep", 800, 192, 6, 0.0, 0, 89_874_104, MULTISTEP),
        ("swin_l_800ep", 800, 192, 12, 0.0, 0, 199_881_204, MULTISTEP),
        # decoder 1024 * 3072 + 3072 and mask token 128 on the backbone's 86.9 M
        ("swinv2_b_800ep", 800, 192, 12, 0.1, 47, 86_893_816 + 3_148_800 + 128, MULTISTEP),
        # decoder 768 * 768 + 768, mask token 768, on the encoder that test_vit.py counts
        ("vit_b_800ep", 800, 224, None, 0.1, 0, 85_665_360 + 768 * 768 + 768 + 768, MULTISTEP),
    ],
)
def test_pretraining_recipe_is_the_official_one(
    name, epochs, image, window, drop_path, norm_window, num_parameters, rates
):
    """Compared with the yaml files and config.py of microsoft/SimMIM d3e29bc and microsoft/Swin-Transformer f82860b."""
    config = load(f"configs/simmim_{name}.py")
    assert sum(x.size for x in jax.tree.leaves(parameters(config))) == num_parameters
    encoder, objective, optim, data = config.encoder, config.objective, config.optim, config.data
    assert (config.epochs, config.batch_size, config.image_size) == (epochs, 2048, (image, image))
    assert (encoder.window, encoder.drop_path) == (window, drop_path)
    assert (objective.mask_patch_size, objective.mask_ratio, objective.norm_window) == (32, 0.6, norm_window)
    _, rate = make_optimizer(steps=epochs * 625, steps_per_epoch=625, **optim)
    np.testing.assert_allclose([float(rate(step)) for step in rates], list(rates.values()), rtol=2e-5)
    is_vit = name.startswith("vit")
    assert {field: optim[field] for field in OPTIMIZER} == OPTIMIZER
    assert (optim.decay_mask_token, optim.decay_bias_tables) == (is_vit, is_vit)
    assert (data.crop_scale, data.crop_ratio, data.flip) == ((0.67, 1.0), (3 / 4, 4 / 3), 0.5)
    assert data.interpolation == "bilinear"


# after 20 epochs of 625 steps the cosine over all 100 epochs stands at 0.905 of the peak
AFTER_WARM_UP = 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * 0.2)) / 2


@pytest.mark.parametrize(
    ("name", "image", "window", "layer_decay", "drop_path", "after_warm_up"),
    [
        ("swin_b_finetune.py", 224, 7, 0.8, 0.1, AFTER_WARM_UP),
        ("swin_b_finetune.py:100ep", 224, 7, 0.9, 0.1, AFTER_WARM_UP),
        ("swin_b_finetune.py:100ep_192", 192, 6, 0.9, 0.1, AFTER_WARM_UP),
        ("swin_l_finetune.py", 224, 14, 0.7, 0.2, AFTER_WARM_UP),
        ("swinv2_b_finetune.py", 224, 14, 0.75, 0.1, 5e-3),
        ("vit_b_finetune.py", 224, None, 0.65, 0.1, AFTER_WARM_UP),
    ],
)
def test_fine_tuning_recipe_is_the_official_one(name, image, window, layer_decay, drop_path, after_warm_up):
    """Compared with the yaml files, config.py, data_finetune.py and main_finetune.py of the same commits."""
    config = load(f"configs/simmim_{name}")
    encoder, objective, data, optim = config.encoder, config.objective, config.data, config.optim
    assert (config.epochs, config.batch_size, config.image_size) == (100, 2048, (image, image))
    assert (encoder.window, encoder.drop_path, optim.layer_decay) == (window, drop_path, layer_decay)
    _, rate = make_optimizer(steps=62_500, steps_per_epoch=625, **optim, layer_id=lambda path: 0, depth=1)
    rates = [float(rate(step)) for step in (0, 12_501, 62_500)]
    np.testing.assert_allclose(rates, [1e-6, after_warm_up, 1e-6], rtol=2e-5)
    assert {field: optim[field] for field in OPTIMIZER} == OPTIMIZER
    assert (data.crop_scale, data.flip, data.interpolation) == ((0.08, 1.0), 0.5, "bicubic")
    assert (data.augment, data.color_jitter, data.crop_fraction) == ("rand-m9-mstd0.5-inc1", 0.0, 0.875)
    mixing = ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_group", "reprob")
    assert [objective[field] for field in mixing] == [0.8, 1.0, 1.0, 0.5, "batch", 128, 0.25]
    assert (objective.label_smoothing, objective.num_classes, config.ema_decay) == (0.1, 1000, 0.0)
    is_vit = name.startswith("vit")
    assert objective.head_init_scale == (0.001 if is_vit else 1.0)
    assert (encoder.relative_position, encoder.final_norm) == (("per_block", False) if is_vit else (None, None))


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
