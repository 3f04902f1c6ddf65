"""Checkpoints: saved by Orbax, asynchronously and atomically; verified at restore; and what surrounds them on a machine
that can fail: signals, and the lock on the workdir.

Layout: `workdir/checkpoints/<step>/{params, opt_state, ema, meta}`; `ema` where a run has an average. `meta` is JSON: a
checksum for each array, which Orbax does not have (a flipped bit restores silently), and what the run wants to find
again. Blocks stand one by one, also of a run that holds them stacked. Of several processes all call every function here
that takes a manager, at the same step.
"""

import contextlib
import fcntl
import json
import os
import shutil
import signal
import socket
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

from simmim_jax.runtime import processes
from simmim_jax.files import read_json

from simmim_jax.errors import BusyError, CheckpointError, PeerError
from simmim_jax.runtime.scanning import path_name
from simmim_jax.train_step import TrainState

MAKE_ROOM = "earlier checkpoints are kept; make room or mend the folder, and run the same command again"


def make_manager(workdir: str, *, max_to_keep: int = 2, keep_period: int = 0) -> ocp.CheckpointManager:
    """The checkpoints of `workdir`: the newest `max_to_keep`, and all whose step is a multiple of `keep_period` (0: none)."""
    logging.get_absl_handler().addFilter(_is_told_here)
    policies = [preservation_policy.LatestN(max(max_to_keep, 1))]
    if keep_period:
        policies.append(preservation_policy.EveryNSteps(keep_period))
    options = ocp.CheckpointManagerOptions(
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


def _is_told_here(record) -> bool:
    """False for the tracebacks of Orbax's saving threads: `save` and `finish` raise what failed, as one line."""
    return not (record.exc_info and ("orbax" in record.pathname or record.name == "asyncio"))


def checksum(x: Array) -> UInt32[Array, ""]:
    """A 32-bit number that any single flipped bit changes, and that does not depend on how `x` is split over devices.

    Each element's bits are multiplied by an odd number of its own, and summed modulo 2**32: integer sums have no order.
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


def save(manager: ocp.CheckpointManager, state: TrainState, meta: dict) -> None:
    """Begin to save `state`, and `meta` beside it; returns when the values are safe to overwrite, not when written.

    Raises CheckpointError if the disk cannot take it, now or at the save before.
    """

    def check_room() -> None:
        needed, free = (n / 2**20 for n in (sum(x.nbytes for x in jax.tree.leaves(state)), _free_bytes(manager)))
        if needed > free:
            raise CheckpointError(
                f"could not save: {needed:.1f} MiB needed, {free:.1f} MiB free", str(manager.directory), MAKE_ROOM
            )

    processes.on_process_0(check_room)
    step, items = int(state.step), _items(state)
    meta = meta | {"step": step, "checksums": checksums(items)}
    arrays = {name: ocp.args.StandardSave(item) for name, item in items.items()}
    arguments = ocp.args.Composite(**arrays, meta=ocp.args.JsonSave(meta))
    with _translate_disk_errors(manager):
        manager.save(step, args=arguments)


def _items(state: TrainState) -> dict[str, PyTree]:
    """The parts of a state that are saved, each by itself."""
    items = {"params": state.params, "opt_state": state.opt_state}
    return items if state.ema is None else items | {"ema": state.ema}


def finish(manager: ocp.CheckpointManager) -> None:
    """Wait until what is being saved is on the disk. Raises CheckpointError if it did not get there."""
    with _translate_disk_errors(manager):
        manager.wait_until_finished()


def _free_bytes(manager: ocp.CheckpointManager) -> int:
    """Of the disk that the checkpoints are on; 0 if their folder is gone."""
    folder = Path(manager.directory)
    return shutil.disk_usage(folder).free if folder.exists() else 0


@contextlib.contextmanager
def _translate_disk_errors(manager: ocp.CheckpointManager) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        if isinstance(told := processes.translate_error(error), PeerError):
            raise told from error
        reason = str(error).strip().splitlines()[0][:200]
        raise CheckpointError(
            f"could not save: {reason}", f"{manager.directory} ({_free_bytes(manager) / 2**20:.1f} MiB free)", MAKE_ROOM
        ) from error


def restore(
    manager: ocp.CheckpointManager, abstract: TrainState, new_moments: Callable[[PyTree], PyTree] | None = None
) -> tuple[TrainState, dict] | None:
    """(state, meta) of the newest checkpoint that is whole, placed as `abstract` says; None if there is none at all.

    A damaged one is named, moved to `workdir/damaged/`, and the one before it is tried; by several processes only if
    its arrays can be read and are not those that were saved, for else not all need to notice. One that holds parameters
    alone (see `write_params`) is given the optimizer's `new_moments` of them, and is refused where that is None. An
    average that is wanted and was not saved begins at the parameters. Raises CheckpointError if none is whole, or if
    the newest is of another model.
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
                absent.remove("opt_state")  # and is refused below
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
        except Exception as error:  # whatever Orbax, TensorStore or JSON say of damaged files
            reason = str(error).strip().splitlines()[0][:200] if str(error) else type(error).__name__
            if _is_of_the_machine(error):
                raise CheckpointError(f"cannot read: {reason}", str(folder), "mend that and run again") from error
            if jax.process_count() > 1 and not isinstance(error, _Damaged):  # not all may have found it
                fix = "if it is damaged, move this step away and run again"
                raise CheckpointError(f"cannot read: {reason}", str(folder), fix) from error
            aside = processes.on_process_0(lambda folder=folder: str(_move_aside(folder)))
            logging.warning("checkpoint %s is damaged (%s): moved to %s, trying the one before", folder, reason, aside)
            manager.reload()
    if steps:
        raise CheckpointError(
            f"all {len(steps)} checkpoints are damaged", str(manager.directory),
            "they were moved to damaged/ beside it; start again in a new --workdir",
        )  # fmt: skip
    return None


class _Damaged(ValueError):
    """Arrays that differ from their checksums, which all processes see alike."""


def write_params(workdir: str, params: PyTree, config: dict, *, step: int = 0) -> Path:
    """Make `workdir` one that holds `params` and no optimizer's moments, as if trained for `step` steps.

    config: what its config.json shall say. `init_from` takes such a workdir, and a run in it goes on from it.
    Raises CheckpointError if the disk cannot take it, or there is a checkpoint already.
    """
    if has_steps(workdir):
        raise CheckpointError("there are checkpoints here already", workdir, "give another folder")
    params = jax.tree.map(jnp.asarray, params)
    try:
        folder = Path(workdir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror}", workdir, "give another folder") from error
    meta = {"step": step, "checksums": checksums({"params": params}), "data": {}}
    with make_manager(workdir) as manager, _translate_disk_errors(manager), _quiet():
        manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params), meta=ocp.args.JsonSave(meta)))
        manager.wait_until_finished()
    return folder / "checkpoints" / str(step)


def read_params(init_from: str) -> tuple[dict, dict]:
    """(parameters as nested dicts of numpy arrays, config.json) of a run, whatever devices it was trained on.

    Of a run that keeps an average of its parameters, that average, which is what its evaluations are of. init_from: a
    workdir, its `checkpoints` folder, or one step's folder in it. The config is empty where there is none.
    Raises CheckpointError if there is no checkpoint, or it is damaged.
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
        except Exception as error:  # whatever Orbax, TensorStore or JSON say of damaged files
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise CheckpointError(f"damaged checkpoint: {reason}", str(folder), hint) from error
    if damaged:
        raise CheckpointError(f"damaged array {damaged[0]}", str(folder), hint)
    config = read_json(folder.parent.parent / "config.json", CheckpointError, "bring back the one that was written")
    return params, config


def has_steps(workdir: str) -> bool:
    """Whether any checkpoint has been saved in `workdir`."""
    return bool(_steps_in(Path(workdir) / "checkpoints"))


def _steps_in(folder: Path) -> list[int]:
    return [int(child.name) for child in folder.iterdir() if child.name.isdigit()] if folder.is_dir() else []


def find_step(init_from: str) -> Path:
    """The newest step's folder of a workdir or `checkpoints` folder, or the step's folder itself."""
    root = Path(init_from).expanduser().absolute()
    if (root / "params").is_dir():
        return root
    for folder in (root / "checkpoints", root):
        if steps := _steps_in(folder):
            return folder / str(max(steps))
    raise CheckpointError(
        "no checkpoint" if root.exists() else "no such folder", str(root),
        "give the workdir of a run that has saved a checkpoint (an empty init_from: an untrained encoder)",
    )  # fmt: skip


def _meta_of(folder: Path) -> Path:
    return folder / "meta" / "metadata"


def _read_meta(folder: Path) -> dict:
    return json.loads(_meta_of(folder).read_text())


def read_fingerprints(folder: Path) -> dict:
    """What `save` was told of the data of the run whose step's folder this is; empty of an import."""
    return read_json(_meta_of(folder), CheckpointError, "give another step's folder").get("data", {})


def _damaged(items: PyTree, expected: dict[str, int]) -> list[str]:
    return [name for name, value in checksums(items).items() if expected.get(name) != value]


def _refuse_other_model(saved, wanted: dict[str, PyTree], folder: Path) -> None:
    for name, abstract in wanted.items():
        _refuse_difference(saved[name].tree, abstract, folder, "give the config of that run, or a new --workdir")


def _refuse_difference(saved: PyTree, wanted: PyTree, folder: Path, hint: str) -> None:
    """Raise CheckpointError, with examples from both sides, unless paths, shapes and types agree."""

    def describe(tree):
        leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
        return {path_name(path): f"{jnp.dtype(x.dtype).name}{list(x.shape)}" for path, x in leaves}

    have, want = describe(saved), describe(wanted)
    different = [name for name in sorted(have | want) if have.get(name) != want.get(name)]
    if different:
        name = different[0]
        raise CheckpointError(
            f"another model: {len(different)} arrays differ, e.g. {name} is {have.get(name, 'absent')} there and "
            f"{want.get(name, 'absent')} here", str(folder), hint,
        )  # fmt: skip


def _is_of_the_machine(error: Exception) -> bool:
    """Whether reading failed for memory, rights or the disk, and not because the files are damaged."""
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
    """Without the hundreds of lines about a damaged file: the error says it once.

    They come from Orbax's log and, written straight to the file descriptor, from TensorStore's threads, which go on for
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


class StopSignal:
    """Remembers the first SIGTERM or SIGINT while entered, in `number` (0: none); a second one ends the process."""

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
