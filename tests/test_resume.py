"""Whatever stops a run, the same command finishes it with the same bits."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from runs import DIGITS, assert_same_run, rows, run, run_until

from simmim_jax.files import lock_folder


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The workdir of a finished run that nothing interrupted, on one device."""
    workdir = tmp_path_factory.mktemp("unbroken")
    done = run(*DIGITS, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_run_killed_in_a_save_ends_with_the_same_bits(tmp_path, unbroken, devices):
    if devices > 1:  # sums over devices have another order: a run is compared with one on as many
        unbroken = tmp_path / "unbroken"
        assert run(*DIGITS, "--workdir", unbroken, devices=devices).returncode == 0
    flags = (*DIGITS, "--workdir", tmp_path / "run")
    assert run_until("save:15", "SIGKILL", *flags, devices=devices).returncode == -signal.SIGKILL
    done = run(*flags, devices=devices)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", unbroken)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """The workdir of a run that SIGTERM stopped at step 13, with checkpoints 10 and 13."""
    workdir = tmp_path_factory.mktemp("stopped")
    done = run_until("step:13", "SIGTERM", *DIGITS, "--workdir", workdir)
    assert done.returncode == 143, done.stderr
    assert "step 13 is saved" in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    return workdir


def copy(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "run")


def test_run_stopped_by_sigterm_resumes_with_the_same_bits(tmp_path, stopped, unbroken):
    workdir = copy(stopped, tmp_path)
    resumed = run(*DIGITS, "--workdir", workdir)
    assert resumed.stdout.startswith("resuming at step 13 of 24"), resumed.stderr
    assert_same_run(workdir, unbroken)


@pytest.mark.slow
def test_sigint_exits_with_its_own_code(tmp_path):
    assert run_until("step:13", "SIGINT", *DIGITS, "--workdir", tmp_path).returncode == 130


@pytest.mark.slow
@pytest.mark.parametrize("when", ["evaluation:8", "compile:0"])
def test_signal_at_any_phase_loses_nothing(tmp_path, unbroken, when):
    flags = (*DIGITS, "--workdir", tmp_path)
    stopped = run_until(when, "SIGTERM", *flags)
    assert stopped.returncode == 143, stopped.stderr
    newest = max((int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")), default=0)
    assert newest == int(when.split(":")[1])
    assert (f"step {newest} is saved" if newest else "no step to save") in stopped.stderr.splitlines()[-1]
    assert run(*flags).returncode == 0
    assert_same_run(tmp_path, unbroken)


def test_finished_run_does_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    again = run(*DIGITS, "--workdir", unbroken)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"config.json", "LOCK"}


def test_every_step_is_recorded_once(unbroken):
    assert [row["step"] for row in rows(unbroken)] == list(range(1, 25))
    assert [row["step"] for row in rows(unbroken, "evaluations")] == [0, 8, 16, 24]


@pytest.mark.slow
def test_workers_may_change_on_resume(tmp_path, unbroken):
    flags = (*DIGITS, "--workdir", tmp_path)
    assert run_until("step:13", "SIGTERM", *flags, "--config.data.workers=1").returncode == 143
    assert run(*flags, "--config.data.threads=1").returncode == 0
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
def test_checkpoint_of_eight_devices_resumes_on_two_with_fsdp(tmp_path):
    wide = (*DIGITS, "--config.encoder.width=128", "--config.steps=14")  # so wide that fsdp splits something
    assert run(*wide, "--workdir", tmp_path / "one").returncode == 0
    flags = (*wide, "--workdir", tmp_path / "many")
    assert run_until("step:7", "SIGTERM", *flags, devices=8).returncode == 143
    done = run(*flags, "--config.mesh.fsdp=-1", devices=2)
    assert done.returncode == 0, done.stderr
    losses = [[row["loss"] for row in rows(tmp_path / name)] for name in ("many", "one")]
    # Adam turns rounding of the first steps' tiny gradients into differences of its own size; they stay below a
    # percent.
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=1e-6)
    np.testing.assert_allclose(*losses, rtol=1e-2)


def test_damaged_checkpoint_is_set_aside_and_the_run_resumes_from_the_one_before(tmp_path, stopped, unbroken):
    workdir = copy(stopped, tmp_path)
    flip_a_bit(workdir / "checkpoints" / "13" / "params")
    resumed = run(*DIGITS, "--workdir", workdir)
    assert resumed.stdout.startswith("resuming at step 10 of 24"), resumed.stderr
    assert "is damaged" in resumed.stderr
    assert [path.name.split("-")[0] for path in (workdir / "damaged").iterdir()] == ["13"]
    assert_same_run(workdir, unbroken)


def test_run_without_an_undamaged_checkpoint_is_refused(tmp_path, stopped):
    workdir = copy(stopped, tmp_path)
    for step in ("10", "13"):
        shutil.rmtree(workdir / "checkpoints" / step / "opt_state" / "d")
    refused = run(*DIGITS, "--workdir", workdir)
    assert refused.returncode == 5
    assert refused.stderr.splitlines()[-1].startswith("ERROR[checkpoint] all 2 checkpoints are damaged")
    assert len(list((workdir / "damaged").iterdir())) == 2


def test_locked_workdir_is_refused(tmp_path):
    with lock_folder(tmp_path):
        second = run(*DIGITS, "--workdir", tmp_path)
    assert second.returncode == 75
    assert second.stderr.splitlines()[-1].startswith("ERROR[busy]")
    assert f"pid {os.getpid()}" in second.stderr


@pytest.mark.slow
def test_run_killed_at_many_places_ends_with_the_same_bits(tmp_path, unbroken):
    flags = (*DIGITS, "--workdir", tmp_path)
    places = ["evaluation:0", "step:1", "save:5", "evaluation:8", "step:8", "save:10", "evaluation:16", "save:24"]
    for when in places:
        assert run_until(when, "SIGKILL", *flags).returncode == -signal.SIGKILL, when
    assert run(*flags).returncode == 0
    assert_same_run(tmp_path, unbroken)


def flip_a_bit(folder) -> None:
    """In the middle of the largest data file below `folder`."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_metadata_is_json(unbroken):
    meta = json.loads((unbroken / "checkpoints" / "24" / "meta" / "metadata").read_text())
    assert meta["step"] == 24
    assert meta["data"]["batch_size"] == 128
    assert set(json.loads((unbroken / "versions.json").read_text())) >= {"jax", "flax", "python"}
