"""tools/plan: its numbers follow from the config and the machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from simmim_jax import memory
from simmim_jax.config import finetune_config, linear_config, pretrain_config
from simmim_jax.errors import ConfigError
from simmim_jax.experiment import make_experiment, with_settings
from simmim_jax.runtime.costs import devices
from simmim_jax.tools import plan

ROOT = Path(__file__).resolve().parents[1]
TINY = {
    "image_size": (32, 32), "batch_size": 64, "epochs": 2.0, "encoder.name": "vit", "encoder.size": "ti",
    "encoder.width": 64, "encoder.depth": 1, "encoder.num_heads": (4,), "encoder.patch_size": 8,
    "encoder.relative_position": "none", "encoder.absolute_position": "learned",
}  # fmt: skip
MACHINE = {"devices": 8, "kind": "h100", "images": 640}


def tiny(make=pretrain_config, **settings):
    own = {"objective.mask_patch_size": 16} if make is pretrain_config else {"objective.num_classes": 10}
    return with_settings(make(), TINY | own | settings)


@pytest.fixture(scope="module")
def numbers():
    """The numbers of the tiny config. Nothing is executed for them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax.stages.Compiled, "__call__", lambda *_: pytest.fail("a compiled program was run"))
        return plan.plan(tiny(), **MACHINE)


def test_step_time_is_the_longer_of_compute_and_communication(numbers):
    peak = 8 * devices.KINDS["h100"].float32 * 0.45
    assert numbers["compute_seconds"] == pytest.approx(numbers["flops_per_step"] / peak, rel=1e-12)
    assert numbers["step_seconds"] == max(numbers["compute_seconds"], numbers["communication_seconds"])
    assert numbers["communication_seconds"] == pytest.approx(sum(each["seconds"] for each in numbers["collectives"]))
    assert numbers["images_per_second"] == pytest.approx(64 / numbers["step_seconds"])
    assert (numbers["steps"], numbers["steps_per_epoch"]) == (20, 10)
    assert numbers["hours"] * 3600 == pytest.approx(20 * numbers["step_seconds"])


def test_state_is_parameters_and_two_moments(numbers):
    assert 12 * numbers["parameters"] <= numbers["state_bytes"] <= 12 * numbers["parameters"] + 64
    assert numbers["memory_bytes"] > numbers["state_bytes"]
    assert numbers["fits"]
    assert "tried" not in numbers


def test_gradients_are_all_reduced_once(numbers):
    summed = sum(each["size"] for each in numbers["collectives"])
    assert 4 * numbers["parameters"] <= summed <= 4 * numbers["parameters"] + 256  # plus metrics
    assert {(each["kind"], each["group"]) for each in numbers["collectives"]} == {("all-reduce", 8)}


@pytest.mark.slow
def test_bfloat16_doubles_the_peak_and_hosts_share_the_reading(numbers):
    half = plan.plan(tiny(**{"encoder.dtype": "bfloat16"}), **MACHINE, devices_per_host=2)
    assert half["peak_flops"] == 2 * numbers["peak_flops"]
    assert half["flops_per_step"] == numbers["flops_per_step"]
    assert half["images_per_second_per_host"] == pytest.approx(half["images_per_second"] / 4)


@pytest.fixture
def needed(monkeypatch):
    """Nothing is compiled: a step needs 64 bytes by its microbatches, a quarter with remat, a half with fsdp."""
    monkeypatch.setattr(memory, "compile_to_measure", lambda experiment: experiment)

    def bytes_of_step(experiment) -> int:
        remat, fsdp = experiment.encoder.remat == "full", experiment.mesh.shape["fsdp"] > 1
        return 64 // experiment.microbatches // (4 if remat else 1) // (2 if fsdp else 1)

    monkeypatch.setattr(devices, "memory", bytes_of_step)


REMAT, FSDP, BOTH = {"encoder.remat": "full"}, {"mesh.fsdp": -1}, {"encoder.remat": "full", "mesh.fsdp": -1}


@pytest.mark.parametrize(
    ("available", "tried"),
    [
        (16, [(REMAT, 16), (FSDP, 32), ({"microbatches": 2}, 32), ({"microbatches": 4}, 16)]),
        (6, [(REMAT, 16), (FSDP, 32), ({"microbatches": 2}, 32), ({"microbatches": 4}, 16), ({"microbatches": 8}, 8),
             (BOTH, 8), ({**BOTH, "microbatches": 2}, 4)]),
    ],
)  # fmt: skip
def test_settings_are_tried_alone_and_then_together(needed, available, tried):
    found = list(memory.try_settings(make_experiment(tiny(), images=640), available))
    assert [(each["settings"], each["memory_bytes"]) for each in found] == tried
    assert all(each["fits"] == (each["memory_bytes"] <= available) for each in found)


def test_settings_that_an_encoder_lacks_are_not_tried(needed):
    fields = dict.fromkeys((name for name in TINY if name.startswith("encoder.")), None)
    fields |= {"encoder.name": "resnet", "encoder.size": "50", "encoder.depths": (1, 1, 1, 1), "encoder.width": 16}
    made = make_experiment(tiny(**fields, **{"objective.mask_patch_size": 32}), images=640)
    assert [each["settings"] for each in memory.try_settings(made, 32)] == [FSDP, {"microbatches": 2}]


def test_tried_settings_are_printed_as_flags(numbers):
    tried = [{"settings": {"mesh.fsdp": -1, "microbatches": 4}, "memory_bytes": 3 * 2**30, "fits": True}]
    printed = [line for _, line in plan.table(numbers | {"fits": False, "tried": tried})]
    assert "--config.mesh.fsdp=-1 --config.microbatches=4: 3.0 GiB, fits" in printed


@pytest.mark.slow
def test_remat_saves_memory_without_a_scan():
    wide = {"encoder.depth": 12, "encoder.width": 192, "batch_size": 256}
    kept, again = (plan.plan(tiny(**wide, **{"encoder.remat": remat}), **MACHINE) for remat in ("none", "full"))
    assert again["memory_bytes"] - again["state_bytes"] < 0.5 * (kept["memory_bytes"] - kept["state_bytes"])
    assert again["flops_per_step"] == kept["flops_per_step"]


@pytest.mark.slow
def test_frozen_encoder_costs_a_third_and_has_no_moments():
    linear, whole = (
        plan.plan(tiny(make, **{"objective.block": 1}), **MACHINE) for make in (linear_config, finetune_config)
    )
    assert 0.3 < linear["flops_per_step"] / whole["flops_per_step"] < 0.4
    assert linear["parameters"] == pytest.approx(whole["parameters"], rel=0.01)
    assert linear["state_bytes"] < whole["state_bytes"] / 2


def test_epochs_need_the_number_of_images_but_steps_do_not():
    assert plan.make_planned(tiny(steps=7), images=0).steps == 7
    assert plan.make_planned(tiny(), images=640).steps_per_epoch == 10
    with pytest.raises(ConfigError, match="--images"):
        plan.make_planned(tiny(), images=0)


@pytest.mark.parametrize(
    ("settings", "machine", "says"),
    [
        ({}, {"kind": "h1000"}, "did you mean h100"),
        ({}, {"devices_per_host": 3}, "8 devices do not fill hosts of 3"),
        ({}, {"mfu": 1.5}, "mfu is 1.5"),
        ({}, {"images": -1}, "images is -1"),
        ({}, {"devices": 16}, "8 devices are simulated, not 16"),
        ({"batch_size": 60}, {}, "batch_size 60 not divisible by 8 devices"),
        ({"mesh.fsdp": 3}, {}, "fsdp=3"),
        ({"encoder.name": "vitt"}, {}, "unknown encoder 'vitt'"),
    ],
)
def test_impossible_machine_or_config_is_refused(settings, machine, says):
    with pytest.raises(ConfigError, match=says):
        plan.plan(tiny(**settings), **(MACHINE | machine))


def run_plan(*flags: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "simmim_jax.tools.plan", *flags]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_zero_devices_end_in_one_line():
    done = run_plan("--config=configs/digits_vit_tiny.py", "--devices=0")
    assert done.returncode == ConfigError.exit_code
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("ERROR[config] devices is 0")


@pytest.mark.slow
def test_command_plans_for_more_devices_than_exist():
    flags = ("--config=configs/digits_vit_tiny.py", "--devices=32", "--kind=tpu-v5e", "--config.probe_block=0")
    done = run_plan(*flags, "--config.encoder.depth=1", "--json")
    assert done.returncode == 0, done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["devices"], numbers["mesh"]["data"], numbers["steps"]) == (32, 32, 880)
    table = run_plan(*flags).stdout
    assert "32 x tpu-v5e, 8 per host" in table
    assert all(name in table for name in ("memory", "operations", "assumed", "estimated"))
