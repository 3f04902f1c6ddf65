"""benchmarks/scaling.py and compile_time.py: they run, and their tables are right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from bench import FOLDER, load_program


@pytest.fixture(scope="module")
def scaling():
    return load_program("scaling")


@pytest.fixture(scope="module")
def compile_time():
    return load_program("compile_time")


def test_table_adds_up_the_sent_bytes(scaling):
    row = {
        "model": "vit_b", "devices": 8, "placement": "mixed", "mesh": {"data": 1, "fsdp": 2, "tensor": 4},
        "state_bytes": 2**30, "communication_seconds": 0.002, "compute_seconds": 0.004,
        "collectives": [
            {"kind": "all-reduce", "count": 3, "sent": 2**20}, {"kind": "all-reduce", "count": 1, "sent": 2**20},
            {"kind": "all-gather", "count": 2, "sent": 2**22}, {"kind": "all-to-all", "count": 1, "sent": 2**19},
        ],
    }  # fmt: skip
    cells = [cell.strip() for cell in scaling.table({"rows": [row]}).splitlines()[2].strip("|").split("|")]
    assert cells[3:] == ["1 x 2 x 4", "1024", "6.5", "2.0", "4.0", "0.0", "0.5", "7", "2.00", "50%"]


def test_ratios_of_compile_time_are_to_the_smallest_depth_of_the_same_kind_and_round(compile_time):
    def one(seconds):
        return {"seconds": seconds, "device": "1 x cpu", "phases": dict.fromkeys(compile_time.PHASES, seconds / 4)}

    specs = [{"model": "vit_s", "scan": scan, "depth": depth} for scan in (False, True) for depth in (24, 12)]
    rounds = [[one(4.0), one(2.0), one(3.0), one(3.0)], [one(9.0), one(3.0), one(2.0), one(1.0)]]
    rows = compile_time.summarize(rounds, specs)
    assert [row["times_least"] for row in rows] == [[2.0, 2.5, 3.0], [1.0] * 3, [1.0, 1.5, 2.0], [1.0] * 3]
    assert [row["seconds"] for row in rows] == [6.5, 2.5, 2.5, 2.0]
    assert "2.50" in compile_time.table({"rows": rows})


def run(name: str, flags: str, out: Path) -> tuple[dict, str]:
    """(report, printed table) of a benchmark."""
    command = [sys.executable, FOLDER / f"{name}.py", *flags.split(), f"--out={out}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert flags in report["command"]
    return report, done.stdout


@pytest.mark.slow
def test_scaling_counts_each_placement(tmp_path):
    flags = "--models=vit_ti --devices=8 --tensor=1 --batch-per-device=2 --dtype=float32"
    report, printed = run("scaling", f"{flags} --override=encoder.depth=1 --placements=replicated,fsdp", tmp_path / "x")
    replicated, split = report["rows"]
    assert replicated["placement"] == "replicated"
    assert split["state_bytes"] < replicated["state_bytes"] / 2
    assert {each["kind"] for each in replicated["collectives"]} == {"all-reduce"}
    assert "| replicated |" in printed


@pytest.mark.slow
def test_compile_time_is_measured_by_depth(tmp_path):
    flags = "--models=vit_ti --depths=1,2 --scan=on --batch=8 --image=32 --rounds=1"
    report, printed = run("compile_time", flags, tmp_path / "x")
    assert [(row["scan"], row["depth"]) for row in report["rows"]] == [(True, 1), (True, 2)]
    assert all(row["phases"]["compile"] > 0 for row in report["rows"])
    assert printed.count("| vit_ti |") == 2
