"""Runs that are extended, keep their best checkpoint, or end early."""

import json

import numpy as np
import pytest
from runs import rows

from simmim_jax import train
from simmim_jax.config import load
from simmim_jax.errors import ConfigError
from simmim_jax.experiment import make_experiment, with_settings

SMALL = {
    "encoder.width": 32, "encoder.depth": 1, "encoder.num_heads": (2,), "probe_block": 1, "batch_size": 64,
    "steps": 6, "log_every": 1, "eval_images": 64, "eval_every": 2, "online_probes": False, "optim.warmup_epochs": None,
    "evals.knn": None, "evals.linear": None,
}  # fmt: skip


def run(workdir, extend=False, **settings):
    config = with_settings(load("configs/digits_vit_tiny.py"), SMALL | settings)
    for name in ("knn", "linear"):
        del config.evals[name]
    return train.train(make_experiment(config, str(workdir), extend=extend), str(workdir))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("finished")
    run(workdir)
    return workdir


def test_extended_run_keeps_its_state_and_has_a_schedule_from_there(finished):
    before = rows(finished)
    summary = run(finished, extend=True, **{"steps": 12, "base_learning_rate": 5e-3})
    after = rows(finished)
    assert after[:6] == before
    assert [row["step"] for row in after] == list(range(1, 13))
    assert summary["step"] == 12
    rates = np.array([row["learning_rate"] for row in after])
    peak = 5e-3 * 64 / 512
    assert rates[6] == pytest.approx(after[0]["learning_rate"], rel=1e-3)  # the warm-up again
    assert max(rates[6:]) == pytest.approx(peak, rel=1e-3)
    assert after[7]["loss"] < before[0]["loss"]
    phases = json.loads((finished / "config.json").read_text())["phases"]
    assert [phase["step"] for phase in phases] == [6]
    assert phases[0]["steps"] == 12
    again = run(finished, **{"steps": 12, "base_learning_rate": 5e-3})  # the same config resumes: it is finished
    assert again["step"] == 12
    with pytest.raises(ConfigError, match="already"):
        run(finished, extend=True, steps=3)
    with pytest.raises(ConfigError, match="--extend"):
        run(finished, steps=20, base_learning_rate=5e-3)
    with pytest.raises(ConfigError) as refused:
        run(finished, extend=True, **{"steps": 20, "encoder.mlp_ratio": 2.0})
    assert "--extend" not in refused.value.fix


def test_there_is_nothing_to_extend_without_a_checkpoint(tmp_path):
    with pytest.raises(ConfigError, match="extend"):
        run(tmp_path, extend=True)


def test_best_checkpoint_is_kept_and_a_run_without_progress_ends(tmp_path):
    # The loss falls for ten steps. Then the rate rises until it is useless.
    settings = {"steps": 40, "keep_best": "masked_loss", "patience": 3, "max_to_keep": 1, "optim.schedule": "multistep",
                "optim.milestones": (0.45,), "optim.gamma": 1000.0}  # fmt: skip
    summary = run(tmp_path, **settings)
    evaluations = {row["step"]: row["masked_loss"] for row in rows(tmp_path, "evaluations")}
    best = min(evaluations, key=evaluations.get)
    assert summary["step"] == max(evaluations) < 40
    assert sum(step > best for step in evaluations) == 3
    kept = {int(path.name) for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {best, summary["step"]}
    assert best > 0
    assert run(tmp_path, **settings)["step"] == summary["step"]


@pytest.mark.parametrize("settings", [{"keep_best": "lineer"}, {"patience": 2}])
def test_metric_must_exist(tmp_path, settings):
    with pytest.raises(ConfigError):
        run(tmp_path, **settings)
