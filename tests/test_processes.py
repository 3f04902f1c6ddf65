"""Several processes are one run: the same numbers, the same step saved, and an end that says why."""

import json
import shutil
import signal
import socket
import subprocess

import numpy as np
import pytest
from runs import DIGITS, assert_same_run, command, rows, run, run_until

from simmim_jax.errors import ConfigError
from simmim_jax.runtime import processes

# SGD: Adam turns the rounding of the first steps' tiny gradients into differences of its own size.
SGD = ("--config.optim.name=sgd", "--config.optim.warmup_epochs=0.0")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


def run_pair(*lines, devices=4, timeout=900) -> list[subprocess.CompletedProcess]:
    """Two processes of `devices` each, of the command lines (arguments, script) of each, to their ends."""
    started = []
    for arguments, script in lines:
        line, keywords = command(*arguments, devices=devices, script=script)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        started.append(subprocess.Popen(line, **pipes, **keywords))
    try:
        ends = [(process, *process.communicate(timeout=timeout)) for process in started]
    finally:
        for process in started:
            process.kill()
    return [subprocess.CompletedProcess(process.args, process.returncode, *said) for process, *said in ends]


def main_pair(*arguments, when: str = "", signal_name: str = "", **options) -> list[subprocess.CompletedProcess]:
    """Two processes of one run; the second gets a signal at an exact place, if one is given (see killed_run.py)."""
    address = f"--coordinator=127.0.0.1:{free_port()}"
    lines = [((*arguments, address, "--processes=2", f"--process={n}"), ("-m", "simmim_jax.main")) for n in range(2)]
    if when:
        lines[1] = ((when, signal_name, *lines[1][0]), ("tests/killed_run.py",))
    return run_pair(*lines, **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("127.0.0.1:1", None, None), "--processes and --process not given"),
        ((None, 2, 0), "--coordinator not given"),
        (("127.0.0.1:1", 2, 2), "--process=2 of --processes=2"),
        (("here", 2, 0), "--coordinator=here"),
    ],
)
def test_incomplete_process_flags_are_refused(monkeypatch, given, message):
    for name in ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=message):
        processes.join(*given)


def test_single_process_joins_nothing(monkeypatch):
    monkeypatch.setenv("SLURM_NTASKS", "1")
    processes.join()
    processes.join("127.0.0.1:1", 1, 0)
    assert processes.is_process_0()
    assert processes.process_max(7) == 7
    assert processes.on_process_0(lambda: {"a": 1}) == {"a": 1}


@pytest.mark.slow
def test_two_processes_of_four_devices_learn_what_one_device_learns(tmp_path):
    """Sample ids and masks to the bit, losses to float32 rounding, however parameters are placed and blocks run."""
    plain = {"mesh": {}, "encoder": {}}
    cases = {
        "fsdp": {"mesh": {"fsdp": -1}, "encoder": {}},
        "tensor, remat": {"mesh": {"tensor": 4}, "encoder": {"remat": "full"}},
        "mixed, scan": {"mesh": {"fsdp": 2, "tensor": 2}, "encoder": {"scan": True}},
        "replicated, scan, remat": {"mesh": {}, "encoder": {"scan": True, "remat": "dots"}},
    }
    script, peers = ("tests/split_run.py",), (f"127.0.0.1:{free_port()}", "2")
    done = run(tmp_path / "one.json", json.dumps({"one": plain}), script=script)
    assert done.returncode == 0, done.stderr
    for done in run_pair(*(((tmp_path / "two.json", json.dumps(cases), *peers, n), script) for n in range(2))):
        assert done.returncode == 0, done.stderr
    one = json.loads((tmp_path / "one.json").read_text())["one"]
    two = json.loads((tmp_path / "two.json").read_text())
    assert two.keys() == cases.keys()
    for name, found in two.items():
        assert (found["samples"], found["masks"]) == (one["samples"], one["masks"]), name
        np.testing.assert_allclose(found["loss"], one["loss"], rtol=1e-6, err_msg=name)
    assert one["loss"][-1] < 0.99 * one["loss"][0]  # it learns: else equal losses would say nothing


@pytest.mark.slow
def test_processes_of_one_tensor_group_load_the_same_images(tmp_path):
    script, peers = ("tests/split_run.py",), (f"127.0.0.1:{free_port()}", "2")
    case = json.dumps({"case": {"mesh": {"tensor": 2}, "encoder": {}}})
    assert run(tmp_path / "one.json", case.replace('"tensor": 2', ""), script=script).returncode == 0
    for done in run_pair(*(((tmp_path / "two.json", case, *peers, n), script) for n in range(2)), devices=1):
        assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name).read_text())["case"] for name in ("one.json", "two.json"))
    assert (two["samples"], two["masks"]) == (one["samples"], one["masks"])
    np.testing.assert_allclose(two["loss"], one["loss"], rtol=1e-6)


@pytest.mark.slow
def test_signal_to_one_process_saves_the_same_step_in_all(tmp_path):
    flags = (*DIGITS, "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.encoder.scan=true")
    for done in main_pair(*flags, "--workdir", tmp_path / "unbroken"):
        assert done.returncode == 0, done.stderr
    for when in ("step:6", "evaluators:8"):
        told = main_pair(*flags, "--workdir", tmp_path / "run", when=when, signal_name="SIGTERM")
        last = [done.stderr.strip().splitlines()[-1] for done in told]
        assert [done.returncode for done in told] == [143, 143], told[0].stderr
        assert last[0] == last[1]
        saved = max(int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir() if path.name.isdigit())
        assert f"step {saved} is saved" in last[0]
    assert saved == 8
    assert [row["step"] for row in rows(tmp_path / "run", "evaluations")] == [0]  # it was cut short
    for done in main_pair(*flags, "--workdir", tmp_path / "run"):
        assert done.returncode == 0, done.stderr
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")
    alone = run(*flags[:-3], "--workdir", tmp_path / "alone")
    assert alone.returncode == 0, alone.stderr
    one, two = (rows(tmp_path / name) for name in ("alone", "unbroken"))
    assert [row["samples"] for row in one] == [row["samples"] for row in two]
    np.testing.assert_allclose([row["loss"] for row in one[:3]], [row["loss"] for row in two[:3]], rtol=1e-6)


@pytest.mark.slow
def test_lost_process_ends_the_others_in_one_line(tmp_path):
    flags = (*DIGITS, "--workdir", tmp_path, "--heartbeat=10")
    left, killed = main_pair(*flags, when="step:7", signal_name="SIGKILL")
    assert killed.returncode == -signal.SIGKILL
    # The run notices, or, where it is waiting for a device, JAX's own watch: that aborts.
    said = {6: "ERROR[peer] another process of this run is gone", -signal.SIGABRT: "another task died"}
    assert said[left.returncode] in left.stderr
    assert "Thread 0x" not in left.stderr
    for done in main_pair(*flags):
        assert done.returncode == 0, done.stderr
    assert [row["step"] for row in rows(tmp_path)] == list(range(1, 25))


@pytest.mark.slow
def test_checkpoint_of_eight_devices_resumes_on_fewer_and_on_two_processes(tmp_path):
    wide = (*DIGITS, *SGD, "--config.encoder.width=128", "--config.steps=12")  # so wide that fsdp splits something
    assert run(*wide, "--workdir", tmp_path / "whole", devices=8).returncode == 0
    split = (*wide, "--config.mesh.fsdp=-1")
    assert run_until("step:7", "SIGTERM", *split, "--workdir", tmp_path / "8", devices=8).returncode == 143
    expected = [row["loss"] for row in rows(tmp_path / "whole")]
    for devices in (2, "pair"):
        workdir = shutil.copytree(tmp_path / "8", tmp_path / f"on {devices}")
        if devices == "pair":
            done = main_pair(*wide, "--config.mesh.tensor=2", "--workdir", workdir)[0]
        else:
            done = run(*wide, "--config.encoder.scan=true", "--workdir", workdir, devices=devices)
        assert done.returncode == 0, done.stderr
        assert "resuming at step 7 of 12" in done.stdout
        np.testing.assert_allclose([row["loss"] for row in rows(workdir)], expected, rtol=1e-6, err_msg=str(devices))
