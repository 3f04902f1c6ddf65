"""What a run writes down: metrics.jsonl, evaluations.jsonl, TensorBoard, the console line, traces, where time went.

The two .jsonl files hold what seed and config determine, each step once, so that an interrupted run's equal an unbroken
run's to the letter. What depends on the machine (images/s, waiting) goes to TensorBoard and the console.
"""

import contextlib
import json
import math
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import tensorboardX

from simmim_jax.files import write_atomically
from simmim_jax.runtime.processes import log0

STARVED = 0.2  # the share of a run's time that may go into waiting for data before the run says what to change
QUIET = ("skipped", "bad_images")  # on the console only where they are not 0


class Records:
    """The files of a run in `workdir`, cut back to `step` first: what came later will be computed again.

    writes: whether this process writes them; of several, one does, and the others know alone what is there.
    """

    def __init__(self, workdir: str, step: int, *, writes: bool = True):
        self._folder = Path(workdir)
        self._files, self._board = {}, None
        for name in ("metrics", "evaluations") if writes else ():
            path = self._folder / f"{name}.jsonl"
            rows = [row for row in read_rows(path) if row["step"] <= step]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows))
            self._files[name] = path.open("a")
        self.evaluations = {row["step"]: row for row in read_rows(self._folder / "evaluations.jsonl")}
        if writes:
            board = str(self._folder / "tensorboard")
            self._board = tensorboardX.SummaryWriter(board, purge_step=step + 1 if step else None)

    def write_metrics(self, step: int, row: dict[str, float | str], machine: dict[str, float]) -> None:
        """One row of metrics.jsonl; `machine` is what depends on the machine, and goes to TensorBoard alone."""
        self._write("metrics", {"step": step, **row})
        numbers = {name: value for name, value in (row | machine).items() if not isinstance(value, str)}
        self._board_scalars(step, {f"train/{name}": value for name, value in numbers.items()})

    def write_evaluation(self, step: int, row: dict[str, float], pictures: dict[str, np.ndarray]) -> None:
        """One row of evaluations.jsonl, and `pictures` (uint8 [y, x, 3]) for TensorBoard."""
        self.evaluations[step] = {"step": step, **row}
        self._write("evaluations", self.evaluations[step])
        self._board_scalars(step, {f"evaluation/{name}": value for name, value in row.items()})
        if self._board:
            for name, picture in pictures.items():
                self._board.add_image(name, picture, step, dataformats="HWC")
            self._board.flush()

    def _write(self, name: str, row: dict) -> None:
        if name in self._files:
            print(json.dumps(row), file=self._files[name], flush=True)

    def _board_scalars(self, step: int, scalars: dict[str, float]) -> None:
        for name, value in scalars.items() if self._board else ():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        if self._board:
            self._board.close()


def read_rows(path: Path) -> list[dict]:
    """The rows of a .jsonl file, without a last line that a kill has torn; none if there is no file."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("step"), int):
                rows.append(row)
    return rows


class Clock:
    """Where the time of a run goes, by name, in seconds."""

    def __init__(self):
        self._start = time.perf_counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def measure(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] += time.perf_counter() - start

    def total(self) -> float:
        return time.perf_counter() - self._start

    def summary(self) -> dict[str, float]:
        """Seconds by name, what is left over as "other", rounded to 0.01 s, and their sum as "total"."""
        total = self.total()
        parts = {**self.seconds, "other": total - sum(self.seconds.values()), "total": total}
        return {name: round(value, 2) for name, value in parts.items()}


class Progress:
    """The console line: how far, how well, how fast, how long still. Rates are those of the last five lines.

    seconds_at_peak: seconds that a step would take at the devices' peak, as its matmuls' operations count.
    """

    def __init__(
        self, clock: Clock, *, step: int, steps: int, steps_per_epoch: int, batch_size: int, seconds_at_peak: float
    ):
        self._seconds_at_peak = seconds_at_peak
        self._clock, self._steps, self._steps_per_epoch, self._batch_size = clock, steps, steps_per_epoch, batch_size
        self._first_step, self._said = step, False
        self._marks = deque(maxlen=5)  # step, seconds of steps and data, seconds of data: as each line was written
        self._mark(step)

    def _mark(self, step: int) -> tuple[int, float, float]:
        seconds = self._clock.seconds
        self._marks.append((step, seconds["step"] + seconds["data"], seconds["data"]))
        return self._marks[-1]

    def machine(self, step: int) -> dict[str, float]:
        """images/s, model FLOP/s utilization, and the share of time waiting for data; evaluation and saving are left
        out.
        """
        first = self._marks[0]
        done, busy, waited = (now - then for now, then in zip(self._mark(step), first, strict=True))
        busy = max(busy, 1e-9)
        rates = {"images_per_second": done * self._batch_size / busy, "mfu": done * self._seconds_at_peak / busy}
        return rates | {"data_wait": waited / busy}

    def is_starved(self) -> bool:
        """Whether over the last lines more than `STARVED` of the time went into waiting for data; said once a run."""
        (_, busy, waited), (_, busy_then, waited_then) = self._marks[-1], self._marks[0]
        begun = self._marks[0][0] > self._first_step  # until then the lines hold the start of the workers
        starved = begun and not self._said and waited - waited_then > STARVED * (busy - busy_then)
        self._said |= starved
        return starved

    def line(self, step: int, row: dict[str, float], machine: dict[str, float]) -> str:
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in row.items() if name not in QUIET or value)
        left = (self._steps - step) * self._batch_size / max(machine["images_per_second"], 1e-9)
        return (
            f"step {step}/{self._steps}  epoch {step / self._steps_per_epoch:.2f}  {numbers}  "
            f"{machine['images_per_second']:.0f} images/s  MFU {machine['mfu']:.0%}  "
            f"data wait {machine['data_wait']:.0%}  ETA {duration(left)}"
        )


class Profile:
    """A trace of the steps from `steps[0]` to `steps[1]`, for TensorBoard's profiler; none where `steps` is empty."""

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


def duration(seconds: float) -> str:
    """h:mm:ss."""
    if not math.isfinite(seconds):
        return "unknown"
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
