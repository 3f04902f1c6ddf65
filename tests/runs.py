"""Small runs of the command line in their own processes."""

import json
import multiprocessing
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
SPLIT_RUN = ("tests/split_run.py",)
# An epoch has 1437 // 128 = 11 steps, so a run of 24 crosses two ends of an epoch.
DIGITS = (
    "--config=configs/digits_vit_tiny.py", "--config.encoder.width=32", "--config.encoder.depth=2",
    "--config.encoder.num_heads=2", "--config.probe_block=2",
    "--config.batch_size=128", "--config.eval_batch_size=128", "--config.steps=24", "--config.save_every=5",
    "--config.log_every=1", "--config.eval_every=8", "--config.eval_images=128",
)  # fmt: skip


def command(*arguments, devices=1, script=("-m", "simmim_jax.main")):
    """(arguments, keyword arguments) for subprocess: a run from the repository root on simulated devices."""
    flags = re.sub(r"(device_count)=\d+", rf"\1={devices}", os.environ["XLA_FLAGS"])
    if script == SPLIT_RUN:  # its losses are compared closely, and rounding grows with unoptimized sums
        flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return [sys.executable, *script, *map(str, arguments)], {"cwd": ROOT, "env": env, "text": True}


def run(*arguments, timeout=600, file_limit=None, script=None, **options) -> subprocess.CompletedProcess:
    """Run to the end. No file that it writes may grow beyond `file_limit` KiB.

    If possible, the run is a fork of a process that has imported JAX and the package but used no device yet. This saves
    three seconds. Data workers cannot start in a fork, because they import the main module.
    """
    if script is None and file_limit is None and not any("workers" in str(argument) for argument in arguments):
        return _run_forked([str(argument) for argument in arguments], timeout, **options)
    line, keywords = command(*arguments, **options, **({"script": script} if script else {}))
    line = ["bash", "-c", f'ulimit -f {file_limit or "unlimited"}; exec "$@"', "bash", *line]
    return subprocess.run(line, capture_output=True, timeout=timeout, check=False, **keywords)


def _run_forked(arguments, timeout, devices=1) -> subprocess.CompletedProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simmim_jax.train"])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("out", "err")]
        child = context.Process(target=_main, args=(arguments, devices, *map(str, outputs)))
        child.start()
        child.join(timeout)
        if child.is_alive():
            child.kill()
            child.join()
            raise subprocess.TimeoutExpired(arguments, timeout, *(path.read_text() for path in outputs))
        return subprocess.CompletedProcess(arguments, child.exitcode, *(path.read_text() for path in outputs))


def _main(arguments: list[str], devices: int, out: str, err: str) -> None:
    """`python -m simmim_jax.main` with these arguments, in a fork."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(ROOT)
    sys.path[0:0] = [str(ROOT)]
    os.environ["XLA_FLAGS"] = command(devices=devices)[1]["env"]["XLA_FLAGS"]
    sys.argv = ["simmim_jax.main", *arguments]
    runpy.run_module("simmim_jax.main", run_name="__main__", alter_sys=True)


def run_until(when, signal_name, *arguments, **options) -> subprocess.CompletedProcess:
    """A run that gets a signal at an exact point: see killed_run.py."""
    return run(when, signal_name, *arguments, script=("tests/killed_run.py",), **options)


def rows(workdir, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / f"{name}.jsonl").read_text().splitlines()]


def arrays(workdir, step) -> dict[str, np.ndarray]:
    """All arrays of a checkpoint, parameters and optimizer, by path."""
    out = {}
    for item in ("params", "opt_state"):
        folder = Path(workdir).absolute() / "checkpoints" / str(step) / item
        with ocp.PyTreeCheckpointer() as checkpointer:
            tree = checkpointer.metadata(folder).item_metadata.tree
            kinds = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            restored = checkpointer.restore(folder, restore_args=kinds)
        out |= {item + jax.tree_util.keystr(path): x for path, x in jax.tree_util.tree_leaves_with_path(restored)}
    return out


def assert_same_run(workdir, unbroken, step=24) -> None:
    """Check that parameters, moments, metrics and evaluations of two finished runs are bit-identical."""
    ours, theirs = arrays(workdir, step), arrays(unbroken, step)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert different == []
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (Path(workdir) / name).read_text() == (Path(unbroken) / name).read_text()
