"""Checkpoints: Orbax saves them asynchronously and atomically. They are verified when restored.

Layout: `workdir/checkpoints/<step>/{params, opt_state, ema, meta}`; `ema` only if the run keeps one. `meta` is JSON: a
checksum for each array and the run's own entries. Orbax has no checksums, so it would restore a flipped bit silently.
Each block is saved separately, even if the run scans over stacked blocks. With several processes, all of them must call
every function that takes a manager, at the same step.
"""

import contextlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jaxtyping import Array, PyTree, UInt32
from orbax.checkpoint.checkpoint_managers import preservation_policy

from simmim_jax.errors import CheckpointError, PeerError, differences
from simmim_jax.files import read_json, write_json
from simmim_jax.runtime import processes
from simmim_jax.runtime.scanning import path_name
from simmim_jax.train_step import TrainState

FREE_SPACE = "earlier checkpoints are kept; free some space or repair the folder, then run the same command again"


def make_manager(
    workdir: str, *, max_to_keep: int = 2, keep_period: int = 0, keep_best: str = ""
) -> ocp.CheckpointManager:
    """The Orbax manager of a workdir.

    It keeps the newest `max_to_keep` checkpoints, each `keep_period`-th step (0: none), and the checkpoint with the
    best value of the metric `keep_best` ("": none).
    """
    logging.get_absl_handler().addFilter(_is_not_from_orbax)
    policies = [preservation_policy.LatestN(max(max_to_keep, 1))]
    if keep_period:
        policies.append(preservation_policy.EveryNSteps(keep_period))
    worst = math.inf if is_lower_better(keep_best) else -math.inf
    metric = lambda metrics: metrics.get(keep_best, worst)  # noqa: E731
    if keep_best:
        policies.append(preservation_policy.BestN(get_metric_fn=metric, reverse=is_lower_better(keep_best), n=1))
    options = ocp.CheckpointManagerOptions(
        best_fn=metric if keep_best else None,
        preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
        cleanup_tmp_directories=True,
        enable_async_checkpointing=True,
    )
    handlers = {
        "params": ocp.StandardCheckpointHandler(),
        "opt_state": ocp.StandardCheckpointHandler(),
        "ema": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }
    return ocp.CheckpointManager(Path(workdir).absolute() / "checkpoints", options=options, item_handlers=handlers)


def is_lower_better(metric: str) -> bool:
    """Whether a lower value of an evaluation's metric is better: of a loss, not of an accuracy."""
    return metric.endswith("loss")


def best_step(evaluations: dict[int, dict], metric: str) -> int | None:
    """The first step with the best value of a metric; None if no evaluation has it. evaluations: rows by step."""
    sign = 1 if is_lower_better(metric) else -1
    values = {step: sign * row[metric] for step, row in sorted(evaluations.items()) if metric in row}
    return min(values, key=values.get, default=None)


def _is_not_from_orbax(record) -> bool:
    """A log filter that drops the tracebacks of Orbax's saving threads. `save` and `finish` raise these errors."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


def checksum(x: Array) -> UInt32[Array, ""]:
    """A 32-bit checksum that any single flipped bit changes, independent of how `x` is sharded.

    The bits of each element are multiplied by a different odd number and summed modulo 2**32. The order of the sum does
    not matter.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for dimension in range(x.ndim):
        stride = int(np.prod(x.shape[dimension + 1 :], dtype=np.int64)) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dimension) * jnp.uint32(stride)
    return jnp.sum(bits * (2 * index + 1), dtype=jnp.uint32)


@jax.jit
def _checksums(tree: PyTree) -> PyTree:
    return jax.tree.map(checksum, tree)


def checksums(tree: PyTree) -> dict[str, int]:
    """The checksum of every array of `tree`, by path."""
    sums = jax.device_get(_checksums(tree))
    return {path_name(path): int(value) for path, value in jax.tree_util.tree_leaves_with_path(sums)}


def save(manager: ocp.CheckpointManager, state: TrainState, meta: dict, metrics: dict | None = None) -> None:
    """Start to save `state` and `meta`. Returns as soon as the arrays may be donated, before they are written.

    metrics: of the evaluation at this step, for `keep_best`. Raises CheckpointError if this save or the previous one
    cannot be written.
    """

    def check_room() -> None:
        needed, free = (n / 2**20 for n in (sum(x.nbytes for x in jax.tree.leaves(state)), _free_bytes(manager)))
        if needed > free:
            raise CheckpointError(
                f"could not save: {needed:.1f} MiB needed, {free:.1f} MiB free", str(manager.directory), FREE_SPACE
            )

    processes.on_process_0(check_room)
    step, items = int(state.step), _items(state)
    meta = meta | {"step": step, "checksums": checksums(items)}
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    arguments = ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))
    with _translate_disk_errors(manager):
        manager.save(step, args=arguments, metrics=metrics or {})


def _items(state: TrainState) -> dict[str, PyTree]:
    """The items of a checkpoint."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items if state.ema is None else items | {"ema": state.ema}


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait until the last save is on disk. Raises CheckpointError if it failed."""
    with _translate_disk_errors(manager):
        manager.wait_until_finished()


def _free_bytes(manager: ocp.CheckpointManager) -> int:
    """Free bytes on the checkpoints' disk; 0 if their folder does not exist."""
    folder = Path(manager.directory)
    return shutil.disk_usage(folder).free if folder.exists() else 0


@contextlib.contextmanager
def _translate_disk_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(translated := processes.translate_error(error), PeerError):
            raise translated from error
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"could not save: {reason}",
            f"{manager.directory} ({_free_bytes(manager) / 2**20:.1f} MiB free)",
            FREE_SPACE,
        ) from error


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState, new_moments: Callable[[PyTree], PyTree] | None = None
) -> tuple[TrainState, dict] | None:
    """(state, meta) of the newest undamaged checkpoint, sharded as `abstract`; None if there are no checkpoints.

    A damaged checkpoint is reported and moved to `workdir/damaged/`, and the previous one is tried. With several
    processes, this applies only to arrays that do not match their checksums: not all processes may see other damage.

    new_moments: makes the optimizer state from the parameters, for a checkpoint without one (see `write_params`); None:
    refuse such a checkpoint. A missing EMA starts at the parameters. Raises CheckpointError if all checkpoints are
    damaged, or the newest belongs to another model.
    """
    steps = processes.on_process_0(lambda: sorted(manager.all_steps(), reverse=True))
    for step in steps:
        folder = Path(manager.directory) / str(step)
        try:
            meta = _read_meta(folder)
            with _quiet():
                saved = manager.item_metadata(step)
            wanted = _items(abstract)
            there = {name.split("/")[0] for name in meta["checksums"]}
            absent = [name for name in ("opt_state", "ema") if name in wanted and name not in there]
            if not new_moments and "opt_state" in absent:
                absent.remove("opt_state")  # refused below
            for name in absent:
                del wanted[name]
            _refuse_other_model(saved, wanted, folder)
            arguments = ocp.args.Composite(**{name: ocp.args.StandardRestore(item) for name, item in wanted.items()})
            with _quiet():
                restored = manager.restore(step, args=arguments)
            items = {name: restored[name] for name in wanted}
            damaged = _damaged(items, meta["checksums"])
            if damaged:
                raise _Damaged(f"{len(damaged)} arrays differ from their checksums, e.g. {damaged[0]}")
            if "opt_state" in absent:
                items["opt_state"] = new_moments(items["params"])
            if "ema" in absent:
                items["ema"] = jax.tree.map(jnp.copy, items["params"])
            count = jax.jit(jnp.int32, out_shardings=abstract.step.sharding)(np.int32(meta["step"]))
            return TrainState(step=count, **items), meta
        except CheckpointError:
            raise
        except Exception as error:  # Orbax, TensorStore and JSON raise many types for damaged files
            reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
            if _is_machine_error(error):
                raise CheckpointError(f"cannot read: {reason}", str(folder), "repair it and run again") from error
            if jax.process_count() > 1 and not isinstance(error, _Damaged):  # other processes may not have seen it
                fix = "if it is damaged, move this step away and run again"
                raise CheckpointError(f"cannot read: {reason}", str(folder), fix) from error
            aside = processes.on_process_0(lambda folder=folder: str(_move_aside(folder)))
            logging.warning(
                "checkpoint %s is damaged (%s): moved to %s, trying the checkpoint before it", folder, reason, aside
            )
            manager.reload()
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints are damaged", str(manager.directory),
            "they were moved to damaged/ next to it; start in a new --workdir",
        )  # fmt: skip
    return None


class _Damaged(ValueError):
    """Arrays differ from their checksums. All processes find this together."""


def write_params(workdir: str, params: PyTree, config: dict, *, step: int = 0) -> Path:
    """Create a workdir with `params` but no optimizer state, as if trained for `step` steps; return the step's folder.

    config: the content of its config.json. The workdir can be used as `init_from`, and a run can continue in it.
    Raises CheckpointError if it cannot be written, or already has checkpoints.
    """
    if has_steps(workdir):
        raise CheckpointError("the folder has checkpoints already", workdir, "give another folder")
    params = jax.tree.map(jnp.asarray, params)
    try:
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", config)
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror}", workdir, "give another folder") from error
    meta = {"step": step, "checksums": checksums({"params": params}), "data": {}}
    with make_manager(workdir) as manager, _translate_disk_errors(manager), _quiet():
        manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)))
        manager.wait_until_finished()
    return folder / "checkpoints" / str(step)


def read_params(init_from: str) -> tuple[dict, dict]:
    """(parameters as nested dicts of numpy arrays, config.json) of a run, trained on any devices.

    If the run keeps an EMA of the parameters, returns the EMA, as evaluations do. init_from: a workdir, its
    `checkpoints` folder, or the folder of a step. The config is {} if the file does not exist. Raises CheckpointError
    if there is no checkpoint, or it is damaged.
    """
    folder = find_step(init_from)
    hint = "give another step's folder"
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        try:
            with _quiet():
                item = "ema" if (folder / "ema").is_dir() else "params"
                saved = checkpointer.metadata(folder / item).item_metadata.tree
                arguments = jax.tree.map(
                    lambda x: ocp.RestoreArgs(restore_type=np.ndarray), saved, is_leaf=lambda x: hasattr(x, "shape")
                )
                params = checkpointer.restore(folder / item, args=ocp.args.PyTreeRestore(restore_args=arguments))
            damaged = _damaged({item: params}, _read_meta(folder)["checksums"])
        except Exception as error:  # Orbax, TensorStore and JSON raise many types for damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"damaged checkpoint: {reason}", str(folder), hint) from error
    if damaged:
        raise CheckpointError(f"damaged array {damaged[0]}", str(folder), hint)
    config = read_json(folder.parent.parent / "config.json", CheckpointError, "restore the original file")
    return params, config


def has_steps(workdir: str) -> bool:
    """Whether any checkpoint has been saved in `workdir`."""
    return newest_step(workdir) is not None


def newest_step(workdir: str) -> int | None:
    """The step of the newest checkpoint in `workdir`; None if there is none."""
    return max(_steps_in(Path(workdir) / "checkpoints"), default=None)


def _steps_in(folder: Path) -> list[int]:
    return [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []


def find_step(init_from: str, hint: str = " (an empty init_from: random weights)") -> Path:
    """The newest step's folder of a workdir or `checkpoints` folder, or the step's folder itself.

    hint: the end of the fix in the error.
    """
    root = Path(init_from).expanduser().absolute()
    if (root / "params").is_dir():
        return root
    for folder in (root / "checkpoints", root):
        if steps := _steps_in(folder):
            return folder / str(max(steps))
    raise CheckpointError(
        "no checkpoint" if root.exists() else "no such folder", str(root),
        f"give the workdir of a run that has a checkpoint{hint}",
    )  # fmt: skip


def _meta_path(folder: Path) -> Path:
    return folder / "meta" / "metadata"


def _read_meta(folder: Path) -> dict:
    return json.loads(_meta_path(folder).read_text())


def read_fingerprints(folder: Path) -> dict:
    """The data fingerprints in the checkpoint of a step's folder; {} for imported weights."""
    return read_json(_meta_path(folder), CheckpointError, "give another step's folder").get("data", {})


def _damaged(items: PyTree, expected: dict[str, int]) -> list[str]:
    return [name for name, value in checksums(items).items() if expected.get(name) != value]


def _refuse_other_model(saved: PyTree, wanted: dict[str, PyTree], folder: Path) -> None:
    """Raise CheckpointError unless the saved arrays have the paths, shapes and dtypes of `wanted`."""

    def shapes(tree: PyTree) -> dict[str, str]:
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {path_name(path): f"{jnp.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves}

    for name, abstract in wanted.items():
        if changed := differences(shapes(saved[name].tree), shapes(abstract)):
            raise CheckpointError(
                f"another model ({changed})", str(folder), "give the config of that run, or a new --workdir"
            )


def _is_machine_error(error: Exception) -> bool:
    """Whether reading failed because of memory, permissions or the disk, and not because of damaged files."""
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return True
    return isinstance(error, MemoryError) or any(
        word in str(error) for word in ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED")
    )


def _move_aside(folder: Path) -> Path:
    aside = folder.parent.parent / "damaged" / f"{folder.name}-{datetime.now():%Y%m%d-%H%M%S}"
    aside.parent.mkdir(exist_ok=True)
    return folder.rename(aside)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress hundreds of log lines about a damaged file. The error reports it once.

    The lines come from Orbax's log and from TensorStore's threads. These threads still write to the file descriptor for
    a moment after the first failure.
    """
    level, stderr, nowhere = logging.get_verbosity(), os.dup(2), os.open(os.devnull, os.O_WRONLY)
    logging.set_verbosity(logging.FATAL)
    os.dup2(nowhere, 2)
    try:
        yield
    except Exception:
        time.sleep(1)
        raise
    finally:
        os.dup2(stderr, 2)
        logging.set_verbosity(level)
        os.close(stderr)
        os.close(nowhere)
