"""runs/records.py: each step is recorded once; console lines, clocks and signals."""

import json

import numpy as np
import pytest
from PIL import Image

from simmim_jax.data import make_source
from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.files import write_atomically
from simmim_jax.runs.records import Clock, Limits, Progress, Recorder, Records, RunLength, duration, read_rows


def test_rows_after_the_restored_step_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": n}) + "\n" for n in range(1, 9)) + '{"loss": 9}\n[1]\n{"st'
    )
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "knn": 0.1}\n{"step": 8, "knn": 0.2}\n')
    records = Records(str(tmp_path), 5)
    assert set(records.evaluations) == {0}
    records.write_metrics(6, {"loss": 60.0}, {"images_per_second": 1.0})
    (tmp_path / "figures").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "figures" / "reconstruction_6.png")
    records.write_evaluation(6, {"knn": 0.3})
    records.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 6, "loss": 60.0}
    assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0, 6]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_file_is_replaced_as_a_whole(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "one")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    try:
        write_atomically(path, "two")
    except OSError:
        assert path.read_text() == "one"


def test_clock_accounts_for_all_time():
    clock = Clock()
    for _ in range(3):
        with clock.measure("step"):
            sum(range(1000))
    summary = clock.summary()
    assert set(summary) == {"step", "other", "total"}
    assert summary["step"] + summary["other"] <= summary["total"] + 0.02


def test_progress_line_has_rate_data_wait_and_eta():
    clock = Clock()
    progress = Progress(clock, 0, RunLength(100, 10, 32, 0.08))
    clock.seconds |= {"step": 3.0, "data": 1.0, "evaluation": 50.0}
    machine = progress.machine(20)
    assert machine == {"images_per_second": 20 * 32 / 4.0, "mfu": 20 * 0.08 / 4.0, "data_wait": 0.25}
    line = progress.line(20, {"loss": 0.5, "skipped": 0.0}, machine)
    assert line == "step 20/100  epoch 2.00  loss 0.5  160 images/s  MFU 40%  data wait 25%  ETA 0:00:16"


def test_data_wait_is_reported_once_and_not_at_the_start():
    clock = Clock()
    progress = Progress(clock, 0, RunLength(1000, 10, 32, 0.1))
    starved = []
    for line in range(1, 20):
        clock.seconds["step"] += 1.0
        clock.seconds["data"] += (
            5.0 if line == 1 else 0.1 if line < 10 else 0.5
        )  # workers start; later the device starves
        progress.machine(10 * line)
        starved.append(progress.is_starved())
    # at line 11 two of the last four lines have 0.5 s each, two 0.1 s: 1.2 of 5.2 s
    assert [n for n, is_starved in enumerate(starved, start=1) if is_starved] == [11]


def test_durations_are_readable():
    expected = {0.0: "0:00:00", 61.4: "0:01:01", 3600 * 30 + 5.0: "30:00:05", float("inf"): "unknown"}
    assert {seconds: duration(seconds) for seconds in expected} == expected


@pytest.mark.parametrize(
    ("metrics", "error"), [({"bad_images": 3}, DataError), ({"skipped": 1.0, "loss": float("nan")}, NonFiniteError)]
)
def test_run_stops_above_a_limit(tmp_path, metrics, error):
    step = {"loss": 1.0, "grad_norm": 1.0, "skipped": 0.0, "samples": 7, "bad_images": 0, "stop": 0} | metrics
    source, length = make_source("digits", split="train", heldout_fraction=0.0), RunLength(100, 10, 32)
    recorder = Recorder(Clock(), Records(str(tmp_path), 0), length, Limits(1, 1, 2), np.zeros(100), source, 0)
    if error is NonFiniteError:  # one step in a row is allowed
        recorder.push(1, step)
        recorder.flush()
    recorder.push(2, step)
    with pytest.raises(error):
        recorder.flush()
    recorder.records.close()
