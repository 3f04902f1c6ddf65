"""Records hold each step once, whatever was written before."""

import json

import numpy as np

from simmim_jax.files import write_atomically
from simmim_jax.runs.records import Clock, Progress, Records, duration, read_rows


def test_rows_after_the_restored_step_are_cut_and_a_torn_line_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps({"step": n, "loss": n}) + "\n" for n in range(1, 9)) + '{"loss": 9}\n[1]\n{"st'
    )
    (tmp_path / "evaluations.jsonl").write_text('{"step": 0, "knn": 0.1}\n{"step": 8, "knn": 0.2}\n')
    records = Records(str(tmp_path), 5)
    assert set(records.evaluations) == {0}
    records.write_metrics(6, {"loss": 60.0}, {"images_per_second": 1.0})
    records.write_evaluation(6, {"knn": 0.3}, {"reconstruction": np.zeros((4, 4, 3), np.uint8)})
    records.close()
    assert [row["step"] for row in read_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert read_rows(tmp_path / "metrics.jsonl")[-1] == {"step": 6, "loss": 60.0}
    assert [row["step"] for row in read_rows(tmp_path / "evaluations.jsonl")] == [0, 6]
    assert list((tmp_path / "tensorboard").glob("events.*"))


def test_a_file_is_whole_or_as_before(tmp_path, monkeypatch):
    path = tmp_path / "summary.json"
    write_atomically(path, "one")
    monkeypatch.setattr("pathlib.Path.replace", lambda *_: (_ for _ in ()).throw(OSError("killed")))
    try:
        write_atomically(path, "two")
    except OSError:
        assert path.read_text() == "one"


def test_the_clock_accounts_for_all_of_the_time():
    clock = Clock()
    for _ in range(3):
        with clock.measure("step"):
            sum(range(1000))
    summary = clock.summary()
    assert set(summary) == {"step", "other", "total"}
    assert summary["step"] + summary["other"] <= summary["total"] + 0.02


def test_the_progress_line_gives_rate_waiting_and_time_left():
    clock = Clock()
    progress = Progress(clock, step=0, steps=100, steps_per_epoch=10, batch_size=32, seconds_at_peak=0.08)
    clock.seconds |= {"step": 3.0, "data": 1.0, "evaluation": 50.0}
    machine = progress.machine(20)
    assert machine == {"images_per_second": 20 * 32 / 4.0, "mfu": 20 * 0.08 / 4.0, "data_wait": 0.25}
    line = progress.line(20, {"loss": 0.5, "skipped": 0.0}, machine)
    assert line == "step 20/100  epoch 2.00  loss 0.5  160 images/s  MFU 40%  data wait 25%  ETA 0:00:16"


def test_a_run_that_waits_for_data_says_so_once_when_the_start_is_past():
    clock = Clock()
    progress = Progress(clock, step=0, steps=1000, steps_per_epoch=10, batch_size=32, seconds_at_peak=0.1)
    said = []
    for line in range(1, 20):
        clock.seconds["step"] += 1.0
        clock.seconds["data"] += 5.0 if line == 1 else 0.1 if line < 10 else 0.5  # the workers start; later they starve
        progress.machine(10 * line)
        said.append(progress.is_starved())
    # at line 11 two of the last four lines have 0.5 s each, two 0.1 s: 1.2 of 5.2 s
    assert [n for n, starved in enumerate(said, start=1) if starved] == [11]


def test_durations_are_readable():
    expected = {0.0: "0:00:00", 61.4: "0:01:01", 3600 * 30 + 5.0: "30:00:05", float("inf"): "unknown"}
    assert {seconds: duration(seconds) for seconds in expected} == expected
