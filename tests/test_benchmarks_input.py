"""benchmarks/input.py: it runs, takes turns, stops the other sides, and reports what is missing."""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from bench import FOLDER, load_program
from PIL import Image

from simmim_jax.config import base_config


@pytest.fixture(scope="module")
def bench():
    return load_program("input")


def write_photographs(root: Path, count: int = 8) -> Path:
    rng = np.random.default_rng(0)
    for n in range(count):
        folder = root / f"class {n % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((320, 240), Image.Resampling.BICUBIC).save(folder / f"{n}.jpg")
    return root


def rates(*of_rounds: float) -> list[dict]:
    return [{"images_per_second": rate, "cores_busy": 1.5} for rate in of_rounds]


def facts(**settings) -> dict:
    return {"settings": settings or {"workers": 0, "threads": 2, "prefetch": 4}, "start_seconds": 1.0}


def test_each_round_reverses_the_order_of_the_round_before(bench):
    assert list(bench.in_turns(["a", "b", "c"], 3)) == [["a", "b", "c"], ["c", "b", "a"], ["a", "b", "c"]]


def test_ratios_are_within_a_round_and_to_the_best_number_of_torch_workers(bench):
    rounds = {
        "ours, photographs": rates(10, 20, 60),
        "torch, 0 workers": rates(1, 1, 90),
        "torch, 2 workers": rates(5, 5, 20),
        "tf": rates(10, 40, 60),
    }
    rows = bench.summarize(rounds, {name: facts() for name in rounds}, cores=2)
    assert rows[0]["compared_with"] == {"torch": "torch, 2 workers", "tf": "tf"}
    assert rows[0]["times"] == {"torch": [2.0, 3.0, 4.0], "tf": [0.5, 1.0, 1.0]}
    assert (rows[0]["images_per_second"], rows[0]["images_per_second_per_core"]) == (20, 10)
    assert all(row["times"] == {} for row in rows[1:])


def test_table_has_all_goals_whether_reached_missed_or_not_measured(bench):
    rounds = {"ours, photographs": rates(10, 10), "torch, 0 workers": rates(2, 2), "tf": rates(20, 20)}
    lines = bench.goals_table(bench.summarize(rounds, {name: facts() for name in rounds}, cores=2)).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [[row[0], row[1], row[3]] for row in cells] == [
        ["ours, photographs, x torch", "2.5", "yes"],
        ["ours, shards, x torch", "5.0", "not measured"],
        ["ours, photographs, x tf", "1.0", "no"],
        ["ours, shards, x tf", "1.0", "not measured"],
    ]


def test_sweep_has_each_setting_once_and_the_best_of_a_source_first(bench):
    specs, sources = bench.make_sweep({"ours, photographs": {"path": "p"}, "ours, shards": {"path": "s"}})
    assert len(specs) == 2 * 3 * 3 * 2
    assert {spec["path"] for name, spec in specs.items() if sources[name] == "shards"} == {"s"}
    settings = [tuple(spec["settings"].values()) for name, spec in specs.items() if sources[name] == "photographs"]
    assert len(set(settings)) == len(settings) == 18
    rounds = {name: rates(number, number) for number, name in enumerate(specs, 1)}
    of_each = {name: facts(**spec["settings"]) for name, spec in specs.items()}
    rows = bench.summarize_sweep(rounds, of_each, sources)
    assert [row["source"] for row in rows] == ["photographs"] * 18 + ["shards"] * 18
    assert [row["images_per_second"] for row in rows] == [*range(18, 0, -1), *range(36, 18, -1)]
    assert [rows[0]["times_best"], rows[18]["times_best"]] == [[1.0] * 3] * 2


def test_sides_that_read_different_images_are_refused(bench):
    specs = {"ours": {"prepared": False}, "shards": {"prepared": True}, "tf": {"prepared": False}}
    bench.check_same_images(specs, {"ours": {"images": 8}, "shards": {"images": 6}, "tf": {"images": 8}})
    with pytest.raises(SystemExit, match="ours: 8; tf: 7"):
        bench.check_same_images(specs, {"ours": {"images": 8}, "tf": {"images": 7}})


@pytest.fixture
def spinning():
    """A process and its worker in their own group, both using the CPU all the time."""
    command = "import os\nif worker := os.fork(): print(worker, flush=True)\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", command], process_group=0, stdout=subprocess.PIPE, text=True)
    yield process, int(process.stdout.readline())
    os.killpg(process.pid, 9)
    process.wait()


def test_stopped_side_and_its_workers_use_no_cpu_until_their_turn(bench, spinning):
    process, worker = spinning
    used = bench.pause(process)
    family = bench.family(process.pid)
    assert family.keys() == {process.pid, worker}
    assert {state for state, _ in family.values()} == {"T"}
    time.sleep(0.2)
    bench.resume(process, used)  # exits if they used the CPU
    while bench.used_by(process) < used + 0.1:  # it continues
        time.sleep(0.01)


def test_side_that_uses_the_cpu_while_stopped_ends_the_run(bench, spinning):
    process, _ = spinning
    used = bench.used_by(process)
    while bench.used_by(process) < used + 0.1:
        time.sleep(0.01)
    with pytest.raises(SystemExit, match=r"used .* s of CPU"):
        bench.resume(process, used)


@pytest.mark.slow
def test_our_side_is_measured_without_a_peer(tmp_path):
    photographs, out = write_photographs(tmp_path / "photographs"), tmp_path / "input.json"
    flags = "--peer=none --cores=1 --batch=4 --image=64 --rounds=2 --seconds=0.05 --warm=0 --max-difference"
    command = [sys.executable, FOLDER / "input.py", f"--path={photographs}", f"--out={out}", *flags.split()]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    (row,) = report["rows"]
    assert (row["side"], row["images"], row["shape"], row["dtype"]) == ("ours, photographs", 8, [4, 64, 64, 3], "uint8")
    assert row["settings"] == {"workers": 1} | {name: base_config().data[name] for name in ("threads", "prefetch")}
    assert len(row["rounds"]) == 2
    assert all(each["images_per_second"] > 0 and each["batches"] >= 1 <= each["discarded"] for each in row["rounds"])
    assert row["times"] == {}
    assert report["missing"].keys() == {"ours, shards", "torch", "tf"}
    assert all(f"not measured: {name}" in done.stdout for name in report["missing"])
    assert report["difference"]["images"] == 8
    assert 0 <= report["difference"]["mean"] <= report["difference"]["greatest"] <= 255
    assert "not measured" in done.stdout
    assert "| ours, photographs (" in done.stdout
    assert flags in report["command"]


@pytest.mark.parametrize("python", [sys.executable, "/no/such/python"])
def test_peer_that_is_not_installed_is_missing_with_the_reason(bench, tmp_path, monkeypatch, python):
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not installed here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    cores = sorted(os.sched_getaffinity(0))[:1]
    specs = {"tf": {"kind": "tf", "cores": cores, "path": "", "batch": 4, "image": 32, "antialias": False}}
    options = argparse.Namespace(rounds=1, seconds=0.01, warm=0.0)
    rounds, facts, missing = bench.measure(specs, {"tf": python}, options)
    assert (rounds, facts) == ({}, {})
    reason = "not installed here" if python == sys.executable else "/no/such/python: No such file or directory"
    assert missing == {"tf": reason}


def test_unreadable_data_is_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    command = [sys.executable, FOLDER / "input.py", f"--path={tmp_path / 'empty'}", "--peer=none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("benchmarks/input.py: ours: ERROR[data]")
    assert done.stderr.count("\n") == 1
