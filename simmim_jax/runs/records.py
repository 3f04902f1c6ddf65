"""The records of a run: metrics.jsonl, evaluations.jsonl, TensorBoard, console lines, traces, time, summary.json.

The two .jsonl files contain only values that the seed and the config determine, at most one row per step. The files of
a resumed run therefore equal those of an unbroken run. Machine-dependent numbers (images/s, data wait) go to
TensorBoard and the console.
"""

import contextlib
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tensorboardX
from PIL import Image

from simmim_jax import data
from simmim_jax.errors import DataError, NonFiniteError
from simmim_jax.files import write_atomically, write_json
from simmim_jax.runtime import compilation, processes
from simmim_jax.runtime.processes import log0

MAX_DATA_WAIT = 0.2  # fraction of the time spent waiting for data, above which the run suggests a fix
HIDDEN_ZEROS = ("skipped", "bad_images")  # metrics that a console line shows only if they are not 0


class Records:
    """The record files of a run, without rows after `step`: the run computes these again.

    Only process 0 writes. All processes have `evaluations`, the rows of evaluations.jsonl by step.
    """

    def __init__(self, workdir: str, step: int):
        self.step, self.folder = step, Path(workdir)
        self._files, self._board = {}, None
        if processes.is_process_0():
            for name in ("metrics", "evaluations"):
                path = self.folder / f"{name}.jsonl"
                rows = [row for row in read_rows(path) if row["step"] <= step]
                write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
                self._files[name] = path.open("a")
            board = str(self.folder / "tensorboard")
            self._board = tensorboardX.SummaryWriter(board, purge_step=step + 1 if step else None)
        rows = processes.on_process_0(lambda: read_rows(self.folder / "evaluations.jsonl"))
        self.evaluations = {row["step"]: row for row in rows}

    def write_metrics(self, step: int, row: dict[str, float | str], machine: dict[str, float]) -> None:
        """Write one row of metrics.jsonl. Write the machine-dependent numbers to TensorBoard only."""
        self._write("metrics", {"step": step, **row})
        numbers = {name: value for name, value in (row | machine).items() if not isinstance(value, str)}
        self._write_scalars(step, {f"train/{name}": value for name, value in numbers.items()})

    def write_evaluation(self, step: int, row: dict[str, float]) -> None:
        """Write one row of evaluations.jsonl. Add it and the figures of this step to TensorBoard."""
        self.evaluations[step] = {"step": step, **row}
        self._write("evaluations", self.evaluations[step])
        self._write_scalars(step, {f"evaluation/{name}": value for name, value in row.items()})
        if self._board:
            for name, figure in read_figures(self.folder, step).items():
                self._board.add_image(name, figure, step, dataformats="HWC")
            self._board.flush()

    def _write(self, name: str, row: dict) -> None:
        if name in self._files:
            print(json.dumps(row), file=self._files[name], flush=True)

    def _write_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board:
            self._board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, without a last line that a kill truncated; [] if the file does not exist."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


def read_figures(folder: Path, step: int) -> dict[str, np.ndarray]:
    """The figures that evaluators wrote at this step: name -> uint8 [y, x, 3]."""
    paths = (folder / "figures").glob(f"*_{step}.png")
    return {path.stem.rsplit("_", 1)[0]: np.asarray(Image.open(path).convert("RGB")) for path in paths}


class Clock:
    """A timer that sums the seconds spent under each name."""

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time a block. Compilation within it counts as "compile"."""
        start, compiled = time.perf_counter(), compilation.seconds()
        try:
            yield
        finally:
            compiled = compilation.seconds() - compiled
            self.seconds[name] += time.perf_counter() - start - compiled
            if compiled:
                self.seconds["compile"] += compiled

    def total(self) -> float:
        return time.perf_counter() - self._start

    def summary(self) -> dict[str, float]:
        """Seconds by name, rounded to 0.01 s, with the remainder as "other" and their sum as "total"."""
        total = self.total()
        parts = {**self.seconds, "other": total - sum(self.seconds.values()), "total": total}
        return {name: round(value, 2) for name, value in parts.items()}


class RunLength(NamedTuple):
    """steps: of the run. batch_size: global. seconds_at_peak: time of a step if its matmuls ran at peak FLOP/s."""

    steps: int
    steps_per_epoch: int
    batch_size: int
    seconds_at_peak: float = 0.0


class Progress:
    """The console line: step, metrics, images/s, MFU, data wait, ETA. Rates cover the last five lines."""

    def __init__(self, clock: Clock, step: int, length: RunLength):
        self._clock, self._length, self._first_step, self._warned = clock, length, step, False
        self._marks = deque(maxlen=5)  # (step, seconds in steps and data, seconds in data) at each line
        self._mark(step)

    def _mark(self, step: int) -> tuple[int, float, float]:
        seconds = self._clock.seconds
        self._marks.append((step, seconds["step"] + seconds["data"], seconds["data"]))
        return self._marks[-1]

    def machine(self, step: int) -> dict[str, float]:
        """images/s, MFU, and the fraction of time spent waiting for data; evaluations do not count."""
        first = self._marks[0]
        done, busy, waited = (now - then for now, then in zip(self._mark(step), first, strict=True))
        busy = max(busy, 1e-9)
        return {
            "images_per_second": done * self._length.batch_size / busy,
            "mfu": done * self._length.seconds_at_peak / busy,
            "data_wait": waited / busy,
        }

    def is_starved(self) -> bool:
        """Whether more than `MAX_DATA_WAIT` of the recent time was spent waiting for data; True at most once a run."""
        (_, busy, waited), (first, busy_then, waited_then) = self._marks[-1], self._marks[0]
        started = first > self._first_step  # the first lines include the start of the workers
        starved = started and not self._warned and waited - waited_then > MAX_DATA_WAIT * (busy - busy_then)
        self._warned |= starved
        return starved

    def line(self, step: int, row: dict[str, float], machine: dict[str, float]) -> str:
        steps, steps_per_epoch, batch_size, _ = self._length
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in HIDDEN_ZEROS or value)
        left = (steps - step) * batch_size / max(machine["images_per_second"], 1e-9)
        return (
            f"step {step}/{steps}  epoch {step / steps_per_epoch:.2f}  {numbers}  "
            f"{machine['images_per_second']:.0f} images/s  MFU {machine['mfu']:.0%}  "
            f"data wait {machine['data_wait']:.0%}  ETA {duration(left)}"
        )


class Limits(NamedTuple):
    """When to log and when to stop.

    log_every: steps between two log lines. nonfinite_steps: consecutive non-finite steps above which the run stops.
    bad_images: bad images in an epoch above which the run stops.
    """

    log_every: int
    nonfinite_steps: int
    bad_images: int


class Recorder:
    """Records the metrics of each step. Reads them one step late, so that the device never waits for the host.

    signal: largest signal number that any process has received; 0: none.
    skipped: consecutive steps without an update.
    bad_images: number of bad images in this epoch so far, in all processes.
    rates: learning rate of each step.
    source, workers: used for advice if the device waits for data.
    """

    def __init__(
        self, clock: Clock, records: Records, length: RunLength, limits: Limits, rates: np.ndarray, source, workers: int
    ):
        self._clock, self.records, self._length, self._limits, self._rates = clock, records, length, limits, rates
        self._source, self._workers = source, workers
        self._progress = Progress(clock, records.step, length)
        self._pending = None  # (step, device metrics) of the newest step
        self.signal, self.skipped, self.bad_images = 0, 0, 0

    def push(self, step: int, device_metrics: dict) -> None:
        """Record the previous step, then keep this one."""
        self.flush()
        self._pending = (step, device_metrics)

    def flush(self) -> None:
        """Wait for the newest step and record it. Raises NonFiniteError and DataError."""
        if self._pending is None:
            return
        (step, device_metrics), self._pending = self._pending, None
        with self._clock.measure("step"):
            values = jax.device_get(device_metrics)
        self.signal = max(self.signal, int(values.pop("stop")))
        samples = f"{int(values.pop('samples')):08x}"
        first_of_epoch = (step - 1) % self._length.steps_per_epoch == 0
        self.bad_images = int(values["bad_images"]) + (0 if first_of_epoch else self.bad_images)
        values["bad_images"] = self.bad_images
        row = {name: float(values[name]) for name in ("loss", *sorted(values.keys() - {"loss"}))}
        self.skipped = self.skipped + 1 if row["skipped"] else 0
        if step % self._limits.log_every == 0 or step in (1, self._length.steps) or self.skipped:
            row["learning_rate"] = float(self._rates[step - 1])
            machine = self._progress.machine(step)
            self.records.write_metrics(step, row | {"samples": samples}, machine)
            log0(self._progress.line(step, row, machine))
            if self._progress.is_starved():
                log0(f"the device waits for data: {data.advice(self._source, workers=self._workers)}")
        if self.skipped > self._limits.nonfinite_steps:
            raise NonFiniteError(
                f"loss {row['loss']}, gradient norm {row['grad_norm']} at step {step}, {self.skipped} steps in a row",
                str(self.records.folder),
                "none of these updates was applied; check the images, or lower the learning rate in a new --workdir",
            )
        if self.bad_images > self._limits.bad_images:
            what = f"{self.bad_images} bad images in an epoch, more than {self._limits.bad_images}: see the log above"
            raise DataError(what, self._source.describe(), data.BAD_IMAGES_FIX)


class Profile:
    """A trace of the steps from `steps[0]` to `steps[1]` for TensorBoard's profiler; none if `steps` is ()."""

    def __init__(self, workdir: str, steps: tuple[int, ...]):
        self._folder, self._steps, self._traces = str(Path(workdir) / "tensorboard"), steps, False

    def before(self, step: int) -> None:
        if self._steps and self._steps[0] <= step <= self._steps[1] and not self._traces:
            jax.profiler.start_trace(self._folder)
            self._traces = True

    def after(self, step: int, device_metrics: dict) -> None:
        if self._traces and step >= self._steps[1]:
            jax.block_until_ready(device_metrics)
            self.close()

    def close(self) -> None:
        if self._traces:
            jax.profiler.stop_trace()
            self._traces, self._steps = False, ()
            log0(f"the trace is in {self._folder}/plugins/profile")


def write_summary(
    workdir: str,
    evaluations: dict[int, dict],
    clock: Clock,
    evaluator_clock: Clock,
    step: int,
    planned_steps: int,
    trained_images: int,
) -> dict:
    """Write summary.json. Print the results compared with those at step 0, and the time spent on each part of the run.

    evaluator_clock: seconds by evaluator; work that two evaluators share counts for the first. step, planned_steps: the
    last step, and the length of the run, which may have ended early. trained_images: images trained on since this start
    of the run, over all processes.
    """
    first, last = ({k: v for k, v in evaluations.get(n, {}).items() if k != "step"} for n in (0, step))
    seconds = clock.summary()
    rate = trained_images / max(seconds.get("step", 0) + seconds.get("data", 0), 1e-9)
    evaluators = {name: round(value, 2) for name, value in evaluator_clock.seconds.items() if name != "compile"}
    summary = {
        "step": step,
        "planned_steps": planned_steps,
        **last,
        "start": first,
        "images_per_second": round(rate, 1),
        "seconds": seconds,
    }
    summary["seconds_of_evaluators"] = evaluators
    if not processes.is_process_0():
        return summary
    write_json(Path(workdir) / "summary.json", summary)
    if last:
        print(f"\n{'':16}{'step 0':>12}{f'step {step}':>12}")
        for name, value in last.items():
            print(f"{name:16}{first.get(name, float('nan')):12.4f}{value:12.4f}")
    parts = "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items())
    print(f"\ntime: {parts}  ({rate:.0f} images/s)")
    if evaluators:
        share = seconds.get("evaluation", 0) / max(seconds["total"], 1e-9)
        parts = "  ".join(f"{name} {value:.1f} s" for name, value in evaluators.items())
        print(f"evaluations: {parts}  ({share:.1%} of the time)")
    return summary


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss; "unknown" if not finite."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
