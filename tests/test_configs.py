"""Every config of configs/: it loads, its model has shapes, and it says what it must."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from simmim_jax.config import digest, load, pretrain_config, refuse_change
from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.optim import make_optimizer

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))


def parameters(config):
    encoder = make_encoder(**config.encoder)
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
    make_optimizer(steps=10, steps_per_epoch=5, **config.optim)
    digest(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_says_command_hardware_time_and_result(name):
    text = (ROOT / "configs" / f"{name}.py").read_text().split('"""')[1]
    assert f"python -m simmim_jax.main --config configs/{name}.py" in text
    assert "Hardware:" in text
    assert re.search("not yet run|measured", text)


def test_the_official_vit_b_recipe():
    """Against simmim_pretrain__vit_base__img224__800ep.yaml and config.py of microsoft/SimMIM d3e29bc."""
    config = load("configs/simmim_vit_b_800ep.py")
    # decoder 768 * 768 + 768, mask token 768, on the encoder that test_vit.py counts
    assert sum(x.size for x in jax.tree.leaves(parameters(config))) == 85_665_360 + 768 * 768 + 768 + 768
    _, rate = make_optimizer(steps=800 * 625, steps_per_epoch=625, **config.optim)
    expected = {
        0: 2e-6,
        1: 2e-6,
        3126: 2e-6 + (4e-4 - 2e-6) / 2,
        6251: 4e-4,
        437_500: 4e-4,
        437_501: 4e-5,
        499_999: 4e-5,
    }
    np.testing.assert_allclose([float(rate(step)) for step in expected], list(expected.values()), rtol=1e-5)
    assert (config.objective.block_size, config.objective.ratio, config.encoder.drop_path) == (32, 0.6, 0.1)
    assert (config.optim.weight_decay, config.optim.clip, config.optim.betas) == (0.05, 5.0, (0.9, 0.999))


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
    assert config.data.image_size == (96, 64)


def test_only_fields_that_change_no_parameter_may_change():
    saved, config = digest(pretrain_config()), pretrain_config()
    config.data.workers, config.log_every, config.mesh.fsdp = 7, 1, -1
    refuse_change(saved, digest(config), "here")
    config.optim.clip = 1.0
    with pytest.raises(ConfigError, match=r"optim.clip: 5.0 there, 1.0 now"):
        refuse_change(saved, digest(config), "here")
