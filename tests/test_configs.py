"""Every config of configs/: it loads, its model has shapes, and it says what it must."""

import math
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from simmim_jax.config import load, pretrain_config, refuse_change, to_dict
from simmim_jax.errors import ConfigError
from simmim_jax.flags import _unset_encoder_fields
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.optim import make_optimizer

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def parameters(config):
    of_a_run = {} if config.encoder.name else {"name": "vit", "size": "s"}  # which a config may leave to its init_from
    encoder = make_encoder(**{**config.encoder, **of_a_run, "scan": True})  # one block is traced for all
    objective = make_objective(
        encoder=encoder, image_size=config.image_size, mean=config.mean, std=config.std, **config.objective
    )
    return jax.eval_shape(objective.init, jax.random.key(0))


@pytest.fixture(autouse=True)
def from_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_builds_its_model_and_its_optimizer(name):
    config = load(f"configs/{name}.py")
    parameters(config)
    make_optimizer(steps=10, steps_per_epoch=5, layer_id=lambda path: 0, depth=1, **config.optim)
    to_dict(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_command_hardware_time_and_result(name):
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m simmim_jax.main --config configs/{name}.py" in text
    assert "Hardware:" in text
    assert re.search("not yet run|measured", text)


IN_STEPS = {0: 2e-6, 1: 2e-6, 3126: 2e-6 + (4e-4 - 2e-6) / 2, 6251: 4e-4, 437_500: 4e-4, 437_501: 4e-5, 499_999: 4e-5}
# The cosine runs from step 0 on: at the end of the warm-up, step 6250 of 62,500, it stands at 0.976 of the peak.
IN_A_COSINE = {0: 4e-6, 1: 4e-6, 6250: 4e-6 + (8e-4 - 4e-6) * 6249 / 6250, 62_500: 4e-5}
IN_A_COSINE |= {6251: 4e-5 + (8e-4 - 4e-5) * (1 + math.cos(math.pi / 10)) / 2}


@pytest.mark.parametrize(
    ("name", "epochs", "image", "window", "drop_path", "norm_window", "parameters_of_all", "rates"),
    [
        ("swin_b_100ep", 100, 192, 6, 0.0, 0, 89_874_104, IN_A_COSINE),
        ("swin_b_800ep", 800, 192, 6, 0.0, 0, 89_874_104, IN_STEPS),
        ("swin_l_800ep", 800, 192, 12, 0.0, 0, 199_881_204, IN_STEPS),
        # decoder 1024 * 3072 + 3072 and mask token 128 on the backbone's 86.9 M
        ("swinv2_b_800ep", 800, 192, 12, 0.1, 47, 86_893_816 + 3_148_800 + 128, IN_STEPS),
        # decoder 768 * 768 + 768, mask token 768, on the encoder that test_vit.py counts
        ("vit_b_800ep", 800, 224, None, 0.1, 0, 85_665_360 + 768 * 768 + 768 + 768, IN_STEPS),
    ],
)
def test_an_official_recipe(name, epochs, image, window, drop_path, norm_window, parameters_of_all, rates):
    """Against the yaml files and config.py of microsoft/SimMIM d3e29bc and microsoft/Swin-Transformer f82860b."""
    config = load(f"configs/simmim_{name}.py")
    assert sum(x.size for x in jax.tree.leaves(parameters(config))) == parameters_of_all
    encoder = make_encoder(**config.encoder)
    assert (config.epochs, config.batch_size, config.image_size) == (epochs, 2048, (image, image))
    assert (getattr(encoder, "window", None), encoder.drop_path) == (window, drop_path)
    objective = config.objective
    assert (objective.mask_patch_size, objective.mask_ratio, objective.norm_window) == (32, 0.6, norm_window)
    _, rate = make_optimizer(steps=epochs * 625, steps_per_epoch=625, **config.optim)
    np.testing.assert_allclose([float(rate(step)) for step in rates], list(rates.values()), rtol=2e-5)
    optim, data, is_vit = config.optim, config.data, name.startswith("vit")
    assert (optim.name, optim.betas, optim.epsilon, optim.grad_clip_norm) == ("adamw", (0.9, 0.999), 1e-8, 5.0)
    assert (optim.weight_decay, optim.decay_mask_token, optim.decay_bias_tables) == (0.05, is_vit, is_vit)
    assert (data.crop_scale, data.crop_ratio, data.flip) == ((0.67, 1.0), (3 / 4, 4 / 3), 0.5)
    assert data.interpolation == "bilinear"


# after 20 epochs of 625 steps the cosine over all 100 stands at 0.905 of the peak
AT_THE_END_OF_THE_WARM_UP = 1e-6 + (5e-3 - 1e-6) * (1 + math.cos(math.pi * 0.2)) / 2


@pytest.mark.parametrize(
    ("name", "image", "window", "layer_decay", "drop_path", "after_warm_up"),
    [
        ("swin_b_finetune.py", 224, 7, 0.8, 0.1, AT_THE_END_OF_THE_WARM_UP),
        ("swin_b_finetune.py:100ep", 224, 7, 0.9, 0.1, AT_THE_END_OF_THE_WARM_UP),
        ("swin_b_finetune.py:100ep_192", 192, 6, 0.9, 0.1, AT_THE_END_OF_THE_WARM_UP),
        ("swin_l_finetune.py", 224, 14, 0.7, 0.2, AT_THE_END_OF_THE_WARM_UP),
        ("swinv2_b_finetune.py", 224, 14, 0.75, 0.1, 5e-3),
        ("vit_b_finetune.py", 224, None, 0.65, 0.1, AT_THE_END_OF_THE_WARM_UP),
    ],
)
def test_an_official_fine_tuning(name, image, window, layer_decay, drop_path, after_warm_up):
    """Against the yaml files, config.py, data_finetune.py and main_finetune.py of the same commits."""
    config = load(f"configs/simmim_{name}")
    encoder, objective, data, optim = config.encoder, config.objective, config.data, config.optim
    assert (config.epochs, config.batch_size, config.image_size) == (100, 2048, (image, image))
    assert (encoder.window, encoder.drop_path, optim.layer_decay) == (window, drop_path, layer_decay)
    _, rate = make_optimizer(steps=62_500, steps_per_epoch=625, **optim, layer_id=lambda path: 0, depth=1)
    rates = [float(rate(step)) for step in (0, 12_501, 62_500)]
    np.testing.assert_allclose(rates, [1e-6, after_warm_up, 1e-6], rtol=2e-5)
    assert (optim.name, optim.betas, optim.epsilon, optim.grad_clip_norm, optim.weight_decay) == (
        "adamw", (0.9, 0.999), 1e-8, 5.0, 0.05,
    )  # fmt: skip
    assert (data.crop_scale, data.flip, data.interpolation) == ((0.08, 1.0), 0.5, "bicubic")
    assert (data.augment, data.color_jitter, data.crop_fraction) == ("rand-m9-mstd0.5-inc1", 0.0, 0.875)
    mixing = [
        objective[name] for name in ("mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode", "reprob")
    ]
    assert mixing == [0.8, 1.0, 1.0, 0.5, "batch", 0.25]
    assert objective.mixup_group == 128  # images of one of their processes
    assert (objective.label_smoothing, objective.num_classes, config.ema_decay) == (0.1, 1000, 0.0)
    is_vit = name.startswith("vit")
    assert objective.head_init_scale == (0.001 if is_vit else 1.0)
    assert (encoder.relative_position, encoder.final_norm) == (("per_block", False) if is_vit else (None, None))


def test_the_learning_rate_follows_the_batch():
    config = pretrain_config()
    config.batch_size = 1024
    assert config.optim.learning_rate == pytest.approx(2e-4)
    config.base_learning_rate = 3e-4
    assert config.optim.learning_rate == pytest.approx(6e-4)
    assert config.optim.warmup_learning_rate == pytest.approx(1e-6)


def test_an_override_moves_what_follows_from_it_and_nothing_else():
    config = pretrain_config()
    config.microbatches = 4
    assert config.eval_batch_size == 512
    config.eval_batch_size = 16
    assert (config.batch_size, config.microbatches) == (2048, 4)
    config.image_size = (96, 64)


@pytest.mark.parametrize("name", ["vit", "swin"])
def test_an_encoder_that_a_config_leaves_open_is_named_without_losing_what_the_config_sets(name):
    config = load("configs/folder_finetune.py:vit")
    config.encoder.name = name
    _unset_encoder_fields(config, load("configs/folder_finetune.py:vit"), ["--config.encoder.name=vit"])
    assert (config.encoder.relative_position, config.encoder.final_norm) == ("per_block", False)


def test_an_encoder_that_is_that_of_init_from_has_no_size_of_the_config(capsys):
    config, file = (load("configs/simmim_vit_b_finetune.py") for _ in range(2))
    config.encoder.name = ""
    _unset_encoder_fields(config, file, ["--config.encoder.name="])
    assert config.encoder.size is None
    assert "encoder of init_from: ignoring" in capsys.readouterr().out


def test_only_fields_that_change_no_parameter_may_change():
    saved, config = to_dict(pretrain_config()), pretrain_config()
    config.data.workers, config.log_every, config.mesh.fsdp = 7, 1, -1
    refuse_change(saved, to_dict(config), "here")
    config.optim.grad_clip_norm = 1.0
    with pytest.raises(ConfigError, match=r"optim.grad_clip_norm: saved 5.0, now 1.0"):
        refuse_change(saved, to_dict(config), "here")
