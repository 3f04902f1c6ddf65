"""The processes of a run: initialization, communication between them, and signals.

A run on one host is usually one process. On several hosts, every process runs the same command. Process 0 locks the
workdir and writes shared files.
"""

import contextlib
import faulthandler
import hashlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from simmim_jax import errors
from simmim_jax.errors import ConfigError, PeerError, UserError

# Environment variables that `srun` sets.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")


def join(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, *, heartbeat: int = 100
) -> None:
    """Connect to the other processes of this run, if any. Call it before any other use of JAX.

    coordinator: HOST:PORT of process 0. processes: number of processes. process: index of this process. These three
    default to JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, and then to the values that SLURM, Open
    MPI or a TPU slice provides. heartbeat: seconds of silence after which a process counts as lost and the others end.
    Raises ConfigError if only some of the three are given, or the other processes cannot be reached.
    """
    given = {
        "--coordinator": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "--processes": _number("JAX_NUM_PROCESSES") if processes is None else processes,
        "--process": _number("JAX_PROCESS_ID") if process is None else process,
    }
    if given["--processes"] == 1 and not given["--process"]:
        return
    missing = [name for name, value in given.items() if value is None]
    options = {}
    if not missing:
        address, count, own = given.values()
        if not 0 <= own < count:
            raise ConfigError(f"--process={own} of --processes={count}", "command line", f"give 0 to {count - 1}")
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--coordinator={address}", "command line", "give HOST:PORT of the first process")
        options = {"coordinator_address": address, "num_processes": count, "process_id": own}
        options["cluster_detection_method"] = "deactivate"
    elif len(missing) < 3:
        fix = "give all of --coordinator, --processes and --process, or none of them"
        raise ConfigError(f"{' and '.join(missing)} not given", "command line", fix)
    elif not _is_cluster():
        return
    elif _one_task_for_each_node():  # otherwise JAX uses only one of its GPUs
        options["local_device_ids"] = list(range(int(os.environ["SLURM_GPUS_ON_NODE"])))
    # JAX's preemption service would handle SIGTERM. A run shares signals between processes itself, in the step.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(**options, heartbeat_timeout_seconds=heartbeat)
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        where = given["--coordinator"] or "the cluster's environment"
        fix = "start all with the same command; process 0's port must be open and free; for one process: --processes=1"
        raise ConfigError(f"cannot join the other processes: {reason}", where, fix) from error
    if not os.environ.get("SIMMIM_TRACEBACK"):
        # If another process is lost, JAX aborts this one with a message. Do not print all threads' stacks after it.
        faulthandler.disable()


def _number(variable: str) -> int | None:
    value = os.environ.get(variable)
    if value is not None and not value.isdigit():
        raise ConfigError(f"{variable}={value}", "environment", "give a number")
    return None if value is None else int(value)


def _is_cluster() -> bool:
    """Whether the environment describes several processes in a way that JAX can read."""
    environment = os.environ
    if all(name in environment for name in SLURM):
        return int(environment["SLURM_NTASKS"]) > 1
    if int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return True
    on_tpu = importlib.util.find_spec("libtpu") and environment.get("JAX_PLATFORMS", "tpu") != "cpu"
    return bool(on_tpu) and any(any(Path("/dev").glob(name)) for name in ("accel*", "vfio/[0-9]*"))


def _one_task_for_each_node() -> bool:
    nodes = os.environ.get("SLURM_STEP_NUM_NODES")
    return nodes == os.environ.get("SLURM_NTASKS") and os.environ.get("SLURM_GPUS_ON_NODE", "").isdigit()


def is_process_0() -> bool:
    return jax.process_index() == 0


def log0(line: str) -> None:
    """Print a line on process 0."""
    if is_process_0():
        print(line, flush=True)


def process_max(number: int) -> int:
    """The largest `number` of all processes. All processes must call this, and wait for each other."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.int32(number)).max())


def process_min(number: int) -> int:
    """The smallest `number` of all processes. All processes must call this, and wait for each other."""
    return number if jax.process_count() == 1 else int(multihost_utils.process_allgather(np.float64(number)).min())


def on_process_0(action: Callable[[], object]):
    """Run `action` on process 0 only. Return its result (JSON data) or raise its UserError on all processes."""
    if jax.process_count() == 1:
        return action()
    message, value, failed = {}, None, None
    if is_process_0():
        try:
            value = action()
            message = {"value": value}
        except UserError as error:
            failed, message = error, {"error": [type(error).__name__, error.what, error.where, error.fix]}
    words = np.frombuffer(json.dumps(message, default=lambda _: None).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(words))))
    if not is_process_0():
        words = np.zeros(length, np.uint8)
    words = multihost_utils.broadcast_one_to_all(words)
    if failed:
        raise failed
    if is_process_0():
        return value
    message = json.loads(bytes(np.asarray(words, np.uint8)))
    if "error" in message:
        name, *what = message["error"]
        raise getattr(errors, name)(*what)
    return message["value"]


def check_same(text: str, what: str, where: str, fix: str) -> None:
    """Raise ConfigError on all processes unless `text` is the same on all."""
    if jax.process_count() > 1:
        own = np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint8)
        others = multihost_utils.process_allgather(own)
        different = [n for n, digest in enumerate(others) if not np.array_equal(digest, others[0])]
        if different:
            raise ConfigError(f"{what}: process {different[0]} differs from process 0", where, fix)


def leave(*, agreed: bool) -> None:
    """Disconnect from the other processes. Call this before `os._exit`.

    agreed: whether all processes end because of a signal, with their state saved. They then wait for each other, so
    that none counts as lost. Otherwise, wait two seconds, so that the other processes can still report why they end.
    """
    if not jax.distributed.is_initialized():  # does not initialize a device, which may be what failed
        return
    with contextlib.suppress(Exception):  # keep this process's own exit code
        if agreed:
            jax.distributed.shutdown()
        else:
            time.sleep(2)


def translate_error(error: Exception) -> Exception:
    """A PeerError if the message of `error` shows that another process was lost; otherwise `error` itself."""
    if jax.process_count() == 1 or isinstance(error, UserError):
        return error
    reason = " ".join(str(error).split())
    lost = ("connection closed", "connection reset", "connection refused", "heartbeat", "coordination service")
    lost += ("broken pipe", "remote process exited", "another task died")
    if any(word in reason.lower() for word in lost):
        fix = "see its own log; start all processes again with the same command"
        return PeerError(f"another process of this run was lost: {reason[:160]}", f"process {jax.process_index()}", fix)
    return error


class StopSignal:
    """Context manager that catches SIGTERM and SIGINT.

    number: number of the first signal received; 0: none. A second signal ends the process at once.
    """

    def __init__(self):
        self.number = 0

    def _on_signal(self, number, frame):
        if self.number:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self.number = number
        os.write(2, b"stopping: finishing the step and saving; send the signal again to stop at once\n")

    def __enter__(self):
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
