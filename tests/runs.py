"""Runs of the command line in processes of their own, small enough for a test."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
# An epoch is 1437 // 128 = 11 steps: a run of 24 crosses two ends of one.
DIGITS = (
    "--config=configs/digits_vit_tiny.py", "--config.encoder.width=32", "--config.encoder.depth=2",
    "--config.encoder.heads=2", "--config.probe_block=2",
    "--config.batch_size=128", "--config.eval_batch_size=128", "--config.steps=24", "--config.save_every=5",
    "--config.log_every=1", "--config.eval_every=8", "--config.eval_images=128",
)  # fmt: skip


def command(*arguments, devices=1, script=("-m", "simmim_jax.main")):
    """(arguments, keyword arguments) for subprocess: a run from the repository's root on so many simulated devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    return [sys.executable, *script, *map(str, arguments)], {"cwd": ROOT, "env": env, "text": True}


def run(*arguments, timeout=300, file_limit="unlimited", **options) -> subprocess.CompletedProcess:
    """A run to its end; no file that it writes may grow beyond `file_limit` KiB."""
    line, keywords = command(*arguments, **options)
    line = ["bash", "-c", f'ulimit -f {file_limit}; exec "$@"', "bash", *line]
    return subprocess.run(line, capture_output=True, timeout=timeout, check=False, **keywords)


def run_until(when, signal_name, *arguments, **options) -> subprocess.CompletedProcess:
    """A run that gets a signal at an exact place: see killed_run.py."""
    return run(when, signal_name, *arguments, script=("tests/killed_run.py",), **options)


def rows(workdir, name="metrics") -> list[dict]:
    return [json.loads(line) for line in (Path(workdir) / f"{name}.jsonl").read_text().splitlines()]


def arrays(workdir, step) -> dict[str, np.ndarray]:
    """Every array of a checkpoint, parameters and optimizer, by path."""
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
    """Parameters, moments, metrics and evaluations of two finished runs are equal to the bit."""
    ours, theirs = arrays(workdir, step), arrays(unbroken, step)
    assert ours.keys() == theirs.keys()
    different = [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]
    assert different == []
    for name in ("metrics.jsonl", "evaluations.jsonl"):
        assert (Path(workdir) / name).read_text() == (Path(unbroken) / name).read_text()
