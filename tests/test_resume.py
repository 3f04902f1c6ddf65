"""A run that no fault can lose: whatever stops it, the same command ends with the same bits."""

import json
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
from runs import DIGITS, assert_same_run, command, rows, run, run_until


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory):
    """The workdir of a finished run that nothing interrupted, on one device."""
    workdir = tmp_path_factory.mktemp("unbroken")
    done = run(*DIGITS, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.parametrize("devices", [1, pytest.param(8, marks=pytest.mark.slow)])
def test_a_run_killed_twice_in_an_epoch_and_across_its_end_ends_with_the_same_bits(tmp_path, unbroken, devices):
    if devices > 1:  # sums over devices have another order: a run is compared with one on as many
        unbroken = tmp_path / "unbroken"
        assert run(*DIGITS, "--workdir", unbroken, devices=devices).returncode == 0
    flags = (*DIGITS, "--workdir", tmp_path / "run")
    for when in ("step:3", "step:8", "save:15"):
        assert run_until(when, "SIGKILL", *flags, devices=devices).returncode == -signal.SIGKILL
    done = run(*flags, devices=devices)
    assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", unbroken)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), pytest.param("SIGINT", 130, marks=pytest.mark.slow)])
def test_a_signal_finishes_the_step_saves_and_exits_with_its_code(tmp_path, unbroken, name, code):
    flags = (*DIGITS, "--workdir", tmp_path)
    stopped = run_until("step:13", name, *flags)
    assert stopped.returncode == code, stopped.stderr
    assert "step 13 is saved" in stopped.stderr.splitlines()[-1]
    assert "Traceback" not in stopped.stderr
    resumed = run(*flags)
    assert resumed.stdout.startswith("resuming at step 13 of 24"), resumed.stderr
    assert_same_run(tmp_path, unbroken)


@pytest.mark.parametrize("when", ["compile:0", pytest.param("evaluation:0", marks=pytest.mark.slow), "evaluation:8"])
def test_a_signal_at_any_phase_loses_nothing(tmp_path, unbroken, when):
    flags = (*DIGITS, "--workdir", tmp_path)
    stopped = run_until(when, "SIGTERM", *flags)
    assert stopped.returncode == 143, stopped.stderr
    newest = max((int(path.name) for path in (tmp_path / "checkpoints").glob("[0-9]*")), default=0)
    assert newest == int(when.split(":")[1])
    assert (f"step {newest} is saved" if newest else "no step to save") in stopped.stderr.splitlines()[-1]
    assert run(*flags).returncode == 0
    assert_same_run(tmp_path, unbroken)


def test_a_finished_run_says_so_and_does_nothing(unbroken):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    again = run(*DIGITS, "--workdir", unbroken)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert {path.name for path in before if before[path] != after[path]} <= {"config.json", "LOCK"}


def test_every_step_is_written_once(unbroken):
    assert [row["step"] for row in rows(unbroken)] == list(range(1, 25))
    assert [row["step"] for row in rows(unbroken, "evaluations")] == [0, 8, 16, 24]


@pytest.mark.slow
def test_workers_may_change_between_two_runs_of_a_workdir(tmp_path, unbroken):
    flags = (*DIGITS, "--workdir", tmp_path)
    assert run_until("step:13", "SIGTERM", *flags, "--config.data.workers=1").returncode == 143
    assert run(*flags, "--config.data.threads=1").returncode == 0
    assert_same_run(tmp_path, unbroken)


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_goes_on_on_two_with_fsdp(tmp_path):
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


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_goes_on(tmp_path, unbroken):
    flags = (*DIGITS, "--workdir", tmp_path)
    assert run_until("step:13", "SIGTERM", *flags).returncode == 143
    flip_a_bit(tmp_path / "checkpoints" / "13" / "params")
    resumed = run(*flags)
    assert resumed.stdout.startswith("resuming at step 10 of 24"), resumed.stderr
    assert "is damaged" in resumed.stderr
    assert [path.name.split("-")[0] for path in (tmp_path / "damaged").iterdir()] == ["13"]
    assert_same_run(tmp_path, unbroken)


def test_with_no_whole_checkpoint_the_run_is_refused(tmp_path):
    flags = (*DIGITS, "--workdir", tmp_path)
    assert run_until("step:7", "SIGTERM", *flags).returncode == 143
    for step in ("5", "7"):
        shutil.rmtree(tmp_path / "checkpoints" / step / "opt_state" / "d")
    refused = run(*flags)
    assert refused.returncode == 5
    assert refused.stderr.splitlines()[-1].startswith("ERROR[checkpoint] all 2 checkpoints are damaged")
    assert len(list((tmp_path / "damaged").iterdir())) == 2


def test_two_runs_cannot_share_a_workdir(tmp_path):
    line, keywords = command(*DIGITS, "--config.steps=100000", "--workdir", tmp_path)
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **keywords) as first:
        try:
            deadline = time.monotonic() + 60
            while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline:
                time.sleep(0.2)
            second = run(*DIGITS, "--config.steps=100000", "--workdir", tmp_path)
        finally:
            first.kill()
    assert second.returncode == 75
    assert second.stderr.startswith("ERROR[busy] workdir is in use")
    assert f"pid {first.pid}" in second.stderr


@pytest.mark.slow
def test_a_run_killed_at_many_places_ends_with_the_same_bits(tmp_path, unbroken):
    flags = (*DIGITS, "--workdir", tmp_path)
    places = [
        "evaluation:0",
        "step:1",
        "save:5",
        "step:6",
        "step:7",
        "evaluation:8",
        "save:10",
        "step:11",
        "step:12",
        "save:15",
    ]
    places += ["evaluation:16", "step:19", "save:20", "step:22", "save:24", "evaluation:24"]
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
