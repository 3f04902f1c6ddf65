"""Worker processes of the data pipeline: start, watch, restart once, and never outlive the main process."""

import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

import numpy as np
import psutil
from absl import flags, logging

from simmim_jax.errors import ConfigError, DataError


class WatchedBatches:
    """Iterator over the batches of `open_at(step)`, which may decode in worker processes.

    If a worker dies, new workers make its batch and all later ones: a batch is a function of the step, so nothing
    changes. A second death raises DataError with the cause of death and the free memory.
    """

    def __init__(self, open_at: Callable[[int], Iterator[dict]], step: int):
        self.open_at, self.step = open_at, step
        self.batches = open_at(step)
        self.deaths = 0

    def __iter__(self) -> "WatchedBatches":
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        try:
            batch = next(self.batches)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            self._restart(error)
            return next(self)
        self.step += 1
        # Copy: a worker's arrays are shared memory, and those still alive at exit would be reported as leaked.
        return {key: value if type(value) is np.ndarray else np.array(value) for key, value in batch.items()}

    def close(self) -> None:
        """End the workers and free their shared memory."""
        batches, self.batches = self.batches, iter(())
        if hasattr(batches, "close"):
            batches.close()

    def _restart(self, error: RuntimeError) -> None:
        fault, where, fix = _death(str(error))
        self.close()  # after an error, grain's iterator would continue with the remaining workers only
        self.deaths += 1
        if self.deaths > 1:
            raise DataError(f"{fault}, the second to die", where, fix) from error
        logging.warning("%s (%s): restarting the workers at step %d; %s", fault, where, self.step, fix)
        self.batches = self.open_at(self.step)


def check_main() -> None:
    """Raise ConfigError if workers cannot start: they import the main program from its file."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file and not os.path.exists(file):
        fix = "save the program to a file, or set data.workers=0"
        raise ConfigError(f"workers cannot start from {file}", "data.workers", fix)


def init_worker(index: int, count: int, *, main: int) -> None:
    """Initialize a worker: ignore the signals that the main process handles, and exit when process `main` does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C and SLURM signal every process of the job
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch_parent():
        # PR_SET_PDEATHSIG would be too late if the parent dies while the worker starts.
        while os.getppid() == main:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()


def let_grain_run_without_flags() -> None:
    """Allow workers without parsed absl flags (pytest, notebooks): grain 0.2.18 reads a flag when it starts them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS["grain_enable_multiprocess_worker_profiling"].present = True


def _death(message: str) -> tuple[str, str, str]:
    """(what a worker died of, its exit code and the free memory, what to do about it)."""
    code = int(re.search(r"exit code (-?\d+)", message)[1])
    free = f"{psutil.virtual_memory().available / 2**20:.0f} MiB are free on this host now"
    fix = "see the lines above; a script must start workers under `if __name__ == '__main__':`"
    if -code == signal.SIGKILL:
        fix = "probably out of memory: lower data.workers, data.prefetch or batch_size"
    elif -code == signal.SIGBUS:
        fix = "probably /dev/shm is full: enlarge it (docker run --shm-size), or set data.workers=0"
    what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"a data worker {what}", f"exit code {code}; {free}", fix
