"""One run: restore, loop, save, evaluate.

The order is batches -> masks -> encoder -> objective -> step -> checkpoint -> evaluation. Each has its own module.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from simmim_jax import data, optim
from simmim_jax.compiled import compile_train_step, make_state, step_flops, to_device
from simmim_jax.errors import CheckpointError, DataError, PeerError, Preempted
from simmim_jax.evaluation import make_evaluators
from simmim_jax.experiment import Experiment, pretrained_settings
from simmim_jax.files import read_json
from simmim_jax.memory import check_memory
from simmim_jax.runs import checkpoint, pretrained
from simmim_jax.runs.records import Clock, Limits, Profile, Recorder, Records, RunLength, write_summary
from simmim_jax.runs.workdir import hold, refuse_other_data, write_versions
from simmim_jax.runtime import processes, sharding
from simmim_jax.runtime.costs import devices
from simmim_jax.runtime.processes import StopSignal, log0
from simmim_jax.runtime.scanning import stack, unstack
from simmim_jax.train_step import TrainState


def train(experiment: Experiment, workdir: str) -> dict:
    """Run an experiment in `workdir`, or resume it from its newest checkpoint; return the content of summary.json.

    Raises the `UserError`s of `errors`. Saves the state and raises Preempted after a SIGTERM or SIGINT.
    """
    clock = Clock()
    with hold(experiment.record, workdir), StopSignal() as stop:
        summary = processes.on_process_0(lambda: read_json(Path(workdir) / "summary.json"))
        if summary.get("planned_steps") == experiment.steps:
            log0(f"nothing to do: {workdir} is finished, {summary['step']} steps; the results are in summary.json")
            return summary
        processes.on_process_0(lambda: write_versions(workdir))
        evaluators = make_evaluators(experiment, workdir, stop)
        available = devices.device_memory(jax.local_devices()[0]) or 0  # before the state is allocated
        saver = make_saver(experiment, workdir)
        with clock.measure("state"):
            state, bad_images = restore_or_start(experiment, saver, workdir)
        start = int(state.step)
        log_start(experiment, workdir, start)
        batches = data.make_batches(
            experiment.source,
            experiment.batches,
            start_step=start,
            shard=data.Shard(*sharding.batch_shard(experiment.mesh)),
            loading=experiment.loading,
        )
        with clock.measure("compile"):
            step_fn = compile_train_step(experiment)
            # Compute all rates here. In the loop, each would wait in the device's queue behind a whole step.
            rates = jax.device_get(jax.jit(jax.vmap(experiment.schedule))(np.arange(experiment.steps)))
            flops = step_flops(experiment)
        if experiment.saving.check_memory:
            check_memory(experiment, needed_memory(experiment, step_fn), processes.process_min(available))
        peak = devices.peak_flops(jax.local_devices()[0], experiment.encoder.dtype) * experiment.mesh.size
        length = RunLength(experiment.steps, experiment.steps_per_epoch, experiment.batches.batch_size, flops / peak)
        limits = Limits(
            experiment.saving.log_every,
            experiment.saving.max_nonfinite_steps,
            data.max_bad_images(experiment.source, experiment.loading),
        )
        recorder = Recorder(
            clock, Records(workdir, start), length, limits, rates, experiment.source, experiment.loading.workers
        )
        recorder.bad_images, recorder.signal = bad_images, processes.process_max(stop.number)
        run = Loop(experiment, workdir, clock, Clock(), recorder, saver, evaluators, stop)
        last = run_loop(run, state, batches, step_fn)
        trained_images = (last - start) * experiment.batches.batch_size
        summary = write_summary(
            workdir, recorder.records.evaluations, clock, run.evaluator_clock, last, experiment.steps, trained_images
        )
        metric = experiment.saving.keep_best
        if (best := checkpoint.best_step(recorder.records.evaluations, metric)) is not None:
            value = recorder.records.evaluations[best][metric]
            log0(f"best {metric}: {value:.4g}, " + (f"in {workdir}/checkpoints/{best}" if best else "before training"))
        if (Path(workdir) / "figures").is_dir():
            log0(f"pictures: {workdir}/figures")
        return summary


class Saver(NamedTuple):
    """Saves states. Checkpoints store each block separately, even if the run scans over stacked blocks.

    saved: abstract state in the structure of a checkpoint. to_saved, from_saved: conversion of a state to this
    structure and back. fingerprint: fingerprint of the data.
    """

    manager: object
    saved: TrainState
    to_saved: Callable[[TrainState], TrainState]
    from_saved: Callable[[TrainState], TrainState]
    fingerprint: dict

    def save(self, state: TrainState, bad_images: int, metrics: dict | None = None) -> None:
        meta = {"data": self.fingerprint, "bad_images": bad_images}
        checkpoint.save(self.manager, sharding.convert(self.to_saved, state, self.saved), meta, metrics)


def make_saver(experiment: Experiment, workdir: str) -> Saver:
    """The `Saver` of a run. Raises ConfigError if processes read different data."""
    source, layers = experiment.source, experiment.encoder.scanned_layers
    fingerprint = data.fingerprint(source, experiment.batches)
    if experiment.heldout:
        fingerprint["heldout"] = experiment.heldout.fingerprint()
    processes.check_same(
        json.dumps(fingerprint), "the data differs", source.describe(), "give all hosts the same files"
    )
    saving = experiment.saving
    manager = checkpoint.make_manager(
        workdir, max_to_keep=saving.max_to_keep, keep_period=saving.keep_period, keep_best=saving.keep_best
    )
    to_saved, from_saved = (partial(change, scanned_layers=layers) for change in (unstack, stack))
    return Saver(manager, to_saved(experiment.state), to_saved, from_saved, fingerprint)


def restore_or_start(experiment: Experiment, saver: Saver, workdir: str) -> tuple[TrainState, int]:
    """(state, bad images of the epoch so far): restored from a checkpoint, or new.

    If `init_from` is given, a new state starts from its parameters.
    """
    new_moments = jax.jit(experiment.tx.init, out_shardings=sharding.shardings(saver.saved.opt_state))
    restored = checkpoint.restore(saver.manager, saver.saved, new_moments)
    if restored:
        state, meta = restored
        refuse_other_data(meta["data"], saver.fingerprint, workdir)
        return sharding.convert(saver.from_saved, state, experiment.state), meta.get("bad_images", 0)
    state = make_state(experiment)
    if experiment.init_from:
        taken = pretrained.take_params(
            experiment.init_from,
            experiment.record,
            saver.saved.params,
            experiment.init_parts,
            experiment.encoder.token_stride,
        )
        abstract = {part: experiment.state.params[part] for part in taken}
        state = state.replace(params=state.params | sharding.convert(saver.from_saved, taken, abstract))
        if state.ema is not None:
            state = state.replace(ema=jax.tree.map(jax.numpy.copy, state.params))
    elif experiment.objective.needs != ("image",):
        log0(f"all weights are random: config.init_from is empty{pretrained_settings(experiment.record)}")
    return state, 0


def log_start(experiment: Experiment, workdir: str, start: int) -> None:
    """Log the start step, data and devices, the config fields that are not at their default, and the parameters."""
    count = jax.process_count()
    log0(
        f"{'resuming at' if start else 'starting'} step {start} of {experiment.steps} in {workdir}: "
        f"{len(experiment.source)} images, batch {experiment.batches.batch_size}, "
        f"{experiment.mesh.size} {jax.devices()[0].device_kind} device(s)"
        + (f", {count} processes" if count > 1 else "")
    )
    log0("config: " + "  ".join(f"{name}={value}" for name, value in experiment.changes.items()))
    params = unstack(experiment.state.params, experiment.encoder.scanned_layers)
    log0(optim.parameter_overview(params, experiment.is_frozen, experiment.is_decayed))


def needed_memory(experiment: Experiment, step_fn: Callable) -> int:
    """Bytes that a run needs on each device; 0 if the compiler does not report them."""
    needed = devices.memory(step_fn) or 0
    if experiment.encoder.scanned_layers:  # saving unstacks the blocks
        needed = max(needed, 2 * devices.state_bytes(experiment.state))
    return needed


class Loop(NamedTuple):
    """The objects that the training loop uses."""

    experiment: Experiment
    workdir: str
    clock: Clock
    evaluator_clock: Clock
    recorder: Recorder
    saver: Saver
    evaluators: dict[str, Callable]
    stop: StopSignal


def run_loop(run: Loop, state: TrainState, batches, step_fn: Callable) -> int:
    """Train to the last step, or until `patience` is exhausted; return the step.

    Save and evaluate when due. Also save after a signal, and before a DataError if possible. Whether a save or
    evaluation is due depends only on the step and the records, so a resumed run does the same. For `keep_best`, the
    state of an evaluation is saved after it, with its metrics.
    """
    experiment, clock, recorder, mesh = run.experiment, run.clock, run.recorder, run.experiment.mesh
    every, saving, steps = experiment.evals.every, experiment.saving, experiment.steps
    evaluations = recorder.records.evaluations
    key = jax.jit(lambda key: key, out_shardings=sharding.replicated(mesh))(experiment.keys.step)
    step = saved = int(state.step)
    profile = Profile(run.workdir, experiment.saving.profile_steps)
    peer_lost = False
    try:
        while True:
            # Read the signal once per iteration. With several processes, use the one that the step has shared with all.
            signal = run.stop.number if jax.process_count() == 1 else recorder.signal
            if saving.patience and is_patience_exhausted(evaluations, step, saving.keep_best, saving.patience):
                steps = step
            must_save = step == steps or signal
            evaluation_due = step not in evaluations and (step in (0, steps) or bool(every and step % every == 0))
            save_due = step > saved and (must_save or step % saving.save_every == 0)
            if saving.keep_best and not signal:
                save_due = not evaluation_due and (save_due or (step > saved and step in evaluations))
            if save_due or evaluation_due:
                recorder.flush()
            if save_due and (must_save or not recorder.skipped):  # keep the state before non-finite steps
                with clock.measure("save"):
                    run.saver.save(state, recorder.bad_images, evaluations.get(step))
                saved = step
            if signal:
                raise Preempted(signal, saved)
            if evaluation_due:
                evaluate(run, step, state)
                continue  # check for signals again
            if step == steps:
                return step
            with jax.transfer_guard("disallow"):  # only explicit transfers
                with clock.measure("data"):  # while the device computes the previous step
                    batch = to_device(next(batches), run.stop.number, mesh)
                step += 1
                profile.before(step)
                with clock.measure("step"), jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, device_metrics = step_fn(state, batch, key)
            profile.after(step, device_metrics)
            recorder.push(step, device_metrics)
    except DataError:
        if jax.process_count() == 1:  # otherwise the other processes would have to save too
            recorder.flush()
            if step > saved and not recorder.skipped:
                run.saver.save(state, recorder.bad_images)
        raise
    except BrokenPipeError:
        raise
    except (PeerError, jax.errors.JaxRuntimeError, ValueError) as error:
        translated = processes.translate_error(error)
        peer_lost = isinstance(translated, PeerError)
        if translated is error:
            raise
        raise translated from error
    except OSError as error:
        raise CheckpointError(
            f"cannot write: {error.strerror or error}",
            str(error.filename or run.workdir),
            f"repair the disk or folder; the same command continues from step {saved}",
        ) from error
    finally:
        profile.close()
        batches.close()
        recorder.records.close()
        if not peer_lost:  # without a peer, a save cannot finish
            with clock.measure("save"):
                checkpoint.finish(run.saver.manager)


def is_patience_exhausted(evaluations: dict[int, dict], step: int, metric: str, patience: int) -> bool:
    """Whether the evaluation at `step` is at least the `patience`-th after the one with the best value of `metric`."""
    if step not in evaluations:  # most steps
        return False
    best = checkpoint.best_step(evaluations, metric)
    return best is not None and sum(other > best for other in evaluations) >= patience


def evaluate(run: Loop, step: int, state: TrainState) -> None:
    """Run all evaluators and record their results. After a signal, stop: the resumed run repeats the evaluation."""
    with run.clock.measure("evaluation"):
        row, evaluated = {}, state if state.ema is None else state.replace(params=state.ema)
        try:
            for name, evaluator in run.evaluators.items():
                with run.evaluator_clock.measure(name):
                    row |= evaluator(evaluated)
        except Preempted as stopped:
            run.recorder.signal = stopped.number
            return
        run.recorder.records.write_evaluation(step, row)
    if row:
        log0(f"evaluation at step {step}: " + "  ".join(f"{name} {value:.4g}" for name, value in row.items()))
