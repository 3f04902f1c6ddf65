"""Worker processes: started without a fuss, watched while they work, begun anew once, and never left behind."""

import multiprocessing
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


def watched(opened: list, open_at: Callable[[int], Iterator], step: int) -> Iterator[dict[str, np.ndarray]]:
    """The batches from `step` on, of the iterator in the list `opened`, which `open_at(step)` gave.

    If a worker dies, the batch that it owed is made again, and all that follow, by new workers: that is the same
    batch, for it is a function of the step. A second death is a DataError that says which process died, of what, and
    how much memory it had.
    """
    deaths, memory = 0, {}
    try:
        while True:
            try:
                batch = next(opened[0])
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                fault, where, fix = _death(str(error), memory)
                # an iterator that has failed goes on with the work of the workers that are left: never ask it again
                close(opened)
                deaths += 1
                if deaths > 1:
                    raise DataError(f"{fault}, the second to die", where, fix) from error
                logging.warning("%s (%s): its work is done again, from step %d; %s", fault, where, step, fix)
                opened.append(open_at(step))
                continue
            memory = _look(memory)
            step += 1
            # copied, for a worker's arrays are shared memory, and any left over at exit is reported as leaked
            batch = {key: value if type(value) is np.ndarray else np.array(value) for key, value in batch.items()}
            yield batch
    finally:
        while opened:  # as `close` does, whose name may be gone already when the interpreter ends
            opened.pop().close()


def check_main() -> None:
    """Raise ConfigError where workers cannot start: they begin by importing the main program from its file."""
    file = getattr(sys.modules["__main__"], "__file__", None)
    if file and not os.path.exists(file):
        fix = "save the program to a file, or set data.workers=0"
        raise ConfigError(f"workers cannot start from {file}", "data.workers", fix)


def close(opened: list) -> None:
    """Ends the workers and forgets the iterator in the list, whose shared memory is given back with it."""
    while opened:
        opened.pop().close()


def init_worker(index: int, count: int, *, main: int) -> None:
    """Runs first in each worker, which ends when `main` does, and not by the signals that `main` answers by saving."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ^C and SLURM signal every process of the job
    signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def watch_parent():
        # not PR_SET_PDEATHSIG: it comes too late for a parent that dies while the worker starts
        while os.getppid() == main:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch_parent, daemon=True).start()


def let_grain_run_without_flags() -> None:
    """grain 0.2.18 reads an absl flag as workers start, and fails where nobody parsed any: pytest, notebooks, tools."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS["grain_enable_multiprocess_worker_profiling"].present = True


def _look(memory: dict) -> dict:
    """The workers and the resident memory that each was last seen with, in bytes; looked at once a second."""
    now = time.monotonic()
    if now - memory.get("seen", -1) < 1:
        return memory
    workers = [child for child in multiprocessing.active_children() if child.name.startswith("grain-process")]
    sizes = {}
    for worker in workers:
        try:
            sizes[worker] = psutil.Process(worker.pid).memory_info().rss
        except psutil.Error:  # gone since: the iterator will tell
            sizes[worker] = memory.get("sizes", {}).get(worker, 0)
    return {"seen": now, "sizes": sizes}


def _death(message: str, memory: dict) -> tuple[str, str, str]:
    """Which worker died of what, its memory, and what to do about it."""
    code = int(re.search(r"exit code (-?\d+)", message)[1])
    dead = [(worker, size) for worker, size in memory.get("sizes", {}).items() if worker.exitcode == code]
    who = f"data worker {dead[0][0].pid}" if dead else "a data worker"
    held = f", with {dead[0][1] / 2**20:.0f} MiB of memory when last seen" if dead and dead[0][1] else ""
    free = f"{psutil.virtual_memory().available / 2**20:.0f} MiB are free on this host now"
    fix = "see the lines above; a script must start them below `if __name__ == '__main__':`"
    if -code == signal.SIGKILL:
        fix = "likely out of memory: set data.workers, data.prefetch or batch_size lower"
    elif -code == signal.SIGBUS:
        fix = "likely /dev/shm is full: enlarge it (docker run --shm-size), or set data.workers=0"
    what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
    return f"{who} {what}", f"exit code {code}{held}; {free}", fix
