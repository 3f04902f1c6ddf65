"""One run, from its config to its summary, read from top to bottom. The only reader of the config.

batches -> masks -> encoder -> objective -> step -> checkpoint -> evaluation, one module for each word.
"""

import contextlib
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from absl import logging
from ml_collections import ConfigDict
from PIL import Image

from simmim_jax import data, optim
from simmim_jax.config import to_dict
from simmim_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    NonFiniteError,
    PeerError,
    Preempted,
    UserError,
    check_minimum,
)
from simmim_jax.evals import make_evaluator
from simmim_jax.evals.features import jit_on_mesh, make_feature_reader
from simmim_jax.evals.segmentation import make_windows_reader
from simmim_jax.files import read_json
from simmim_jax.models import make_encoder
from simmim_jax.objectives import Objective, make_objective
from simmim_jax.objectives.features import make_features
from simmim_jax.runs import checkpoint, pretrained
from simmim_jax.runs import records as run_records
from simmim_jax.runs import workdir as workdirs
from simmim_jax.runtime import costs, processes, sharding
from simmim_jax.runtime.processes import log0
from simmim_jax.runtime.scanning import path_name, stack, unstack
from simmim_jax.train_step import TrainState, hash_samples, init_state, train_step

MAX_MICROBATCHES = 16  # microbatches that are tried, times those of the config, where a step does not fit
MAX_EVALUATION_FRACTION, MAX_EVALUATIONS = (
    0.03,
    20,
)  # where config.eval_every leaves it open: of a run's work, and in number
MAX_INITIAL_WEIGHT = 0.05  # the part in an average of parameters, above which the run warns of it
SIGNAL_CHECK_PERIOD = 16  # batches of an evaluation, after which several processes tell each other of signals
READS = {"pool": "patches", "block": 0, "head": "", "blocks": ()}  # of an objective: what its head is, and of what
MAX_WORKERS = 32  # that a run takes unasked: each holds 250 MB


def train(config: ConfigDict, workdir: str) -> dict:
    """Run `config` in `workdir`, from where an earlier run of it stopped; returns what summary.json holds.

    Raises UserError of the kinds that `errors` lists; Preempted after a SIGTERM or SIGINT, with the state saved.
    """
    clock = run_records.Clock()

    # What the run is, without a device: what the user can have got wrong is told here, at once.
    check_numbers(config)
    encoder_fields = resolve_encoder(config, workdir)
    encoder = make_encoder(**encoder_fields)
    pixels = {"mean": config.mean, "std": config.std}
    objective = make_objective(encoder=encoder, image_size=config.image_size, **pixels, **config.objective)
    features = make_features(encoder, **pixels, block=config.probe_block)
    source, heldout_source = make_sources(config)
    batch_spec, loading = batch_options(config)
    data.check_batches(source, batch_spec, loading)
    steps, steps_per_epoch = run_length(config, len(source))
    warn_about_length(config, steps, steps_per_epoch)
    tx, schedule = make_tx(config, encoder, steps, steps_per_epoch)
    record_of_config = to_dict(config) | {"encoder": encoder_record(encoder, encoder_fields)}
    if config.objective.name in ("classify", "segment"):
        record_of_config["classes"] = list(source.classes)
    init_from = None
    if config.init_from and not processes.on_process_0(lambda: checkpoint.has_steps(workdir)):
        init_from = Path(processes.on_process_0(lambda: str(checkpoint.find_step(config.init_from))))
        check_init_from(init_from, record_of_config)

    evals = resolve_evals(config, source, heldout_source)
    if config.online_probes and source.classes and "knn" not in evals:
        log0("no probes: knn and linear are for images by class, and ask for the same classes, two or more, held out")
    evaluation_every = evaluation_period(config, evals, steps, len(source), len(heldout_source or ()))

    with workdirs.hold(record_of_config, workdir), checkpoint.StopSignal() as stop:
        summary = processes.on_process_0(lambda: read_json(Path(workdir) / "summary.json"))
        if summary.get("step") == steps:
            log0(f"nothing to do: {workdir} is finished, {steps} of {steps} steps; its results are in summary.json")
            return summary
        processes.on_process_0(lambda: workdirs.write_versions(workdir))

        # What is wrong with the devices for this run is told before anything is compiled.
        mesh = sharding.make_mesh(**config.mesh)
        ways = sharding.num_batch_shards(mesh)
        sharding.check_batch_size("batch_size", config.batch_size, ways, config.microbatches)
        sharding.check_batch_size("eval_batch_size", config.eval_batch_size, ways)
        init_key, step_key, eval_key = make_keys(config.seed)
        evaluators = make_evaluators(
            config, evals, features, objective, source, heldout_source, mesh, eval_key, workdir, stop
        )

        # The state, born where it lives: restored, drawn from the seed, or begun with another run's encoder.
        make_state = partial(init_state, init=objective.init, tx=tx, ema_decay=config.ema_decay)
        abstract = shard_state(jax.eval_shape(make_state, init_key), mesh, encoder)
        into_stacks, into_blocks = (
            partial(function, scanned_layers=encoder.scanned_layers) for function in (stack, unstack)
        )
        in_blocks = into_blocks(abstract)  # as checkpoints have it
        check_frozen(config, encoder, in_blocks.params)
        manager = checkpoint.make_manager(workdir, max_to_keep=config.max_to_keep, keep_period=config.keep_period)
        fingerprint = data.fingerprint(source, batch_spec)
        if heldout_source:
            fingerprint["heldout"] = heldout_source.fingerprint()
        processes.check_same(json.dumps(fingerprint), "the data", source.describe(), "give all hosts the same files")
        there = costs.memory_of(jax.local_devices()[0]) or 0  # before the state takes its part of it
        bad_images = 0  # of this epoch so far, in all processes
        with clock.measure("state"):
            new_moments = jax.jit(tx.init, out_shardings=places(in_blocks.opt_state))
            restored = checkpoint.restore(manager, in_blocks, new_moments)
            if restored:
                state, meta = restored
                state = convert(into_stacks, state, abstract)
                bad_images = meta.get("bad_images", 0)
                refuse_other_data(meta["data"], fingerprint, workdir)
            else:
                state = jax.jit(make_state, out_shardings=places(abstract))(init_key)
                if init_from:
                    taken = take_params(init_from, config, encoder, in_blocks.params, source.classes)
                    taken = convert(into_stacks, taken, {part: abstract.params[part] for part in taken})
                    state = state.replace(params=state.params | taken)
                    if state.ema is not None:
                        state = state.replace(ema=jax.tree.map(jax.numpy.copy, state.params))
                elif config.objective.name != "simmim":
                    log0(f"all weights are random, as config.init_from is empty{made_for_pretrained(config)}")
        start = step = int(state.step)
        parameters, trained = parameters_of(config, encoder, in_blocks.params)
        log0(
            f"{'resuming at' if start else 'starting'} step {start} of {steps} in {workdir}: {len(source)} images, "
            f"batch {config.batch_size}, {parameters / 1e6:.1f} M parameters"
            + (f", of which {trained / 1e6:.3g} M are trained, " if trained < parameters else ", ")
            + f"{mesh.size} {jax.devices()[0].device_kind} device(s)"
            + (f", {jax.process_count()} processes" if jax.process_count() > 1 else "")
        )

        shard = data.Shard(*sharding.batch_shard(mesh))
        batches = data.make_batches(source, batch_spec, start_step=start, shard=shard, loading=loading)
        with clock.measure("compile"):
            compiled_step = compile_training(config, objective, tx, abstract, step_key, mesh, encoder)
            # all at once: a rate that is computed in the loop waits in the device's queue behind a whole step
            rates = jax.device_get(jax.jit(jax.vmap(schedule))(np.arange(steps)))
            flops = step_flops(config, objective, abstract, step_key, encoder)
        if config.check_memory:
            needed = costs.memory(compiled_step) or 0
            if encoder.scanned_layers:  # saving makes blocks of them
                needed = max(needed, 2 * costs.held_bytes(abstract))
            check_memory(config, encoder, needed, processes.process_min(there), steps, steps_per_epoch)
        step_key = jax.jit(lambda key: key, out_shardings=sharding.replicated(mesh))(step_key)
        records = open_records(workdir, step)
        peak = costs.peak_flops(jax.local_devices()[0], encoder.dtype) * mesh.size
        progress = run_records.Progress(
            clock, step=step, steps=steps, steps_per_epoch=steps_per_epoch, batch_size=config.batch_size,
            seconds_at_peak=flops / peak,
        )  # fmt: skip
        costs_of_evaluators = run_records.Clock()
        recorded = start
        signalled = processes.process_max(stop.number)  # the number of a signal that all processes know of, or 0
        skipped = 0  # steps in a row without an update
        allowed = data.max_bad_images(source, loading)

        def record(step: int, device_metrics: dict) -> None:
            """Read a step's metrics, which waits for it; write a row where one is due."""
            nonlocal skipped, bad_images, recorded, signalled
            recorded = step
            with clock.measure("step"):
                values = jax.device_get(device_metrics)
            signalled = max(signalled, int(values.pop("stop")))
            samples = f"{int(values.pop('samples')):08x}"
            bad_images = int(values["bad_images"]) + (bad_images if (step - 1) % steps_per_epoch else 0)
            values["bad_images"] = bad_images
            row = {name: float(values[name]) for name in ("loss", *sorted(values.keys() - {"loss"}))}
            skipped = skipped + 1 if row["skipped"] else 0
            if step % config.log_every == 0 or step in (1, steps) or skipped:
                row["learning_rate"] = float(rates[step - 1])
                machine = progress.machine(step)
                records.write_metrics(step, row | {"samples": samples}, machine)
                log0(progress.line(step, row, machine))
                if progress.is_starved():
                    log0(f"the device waits for data: {data.advice(source, workers=loading.workers)}")
            if skipped > config.max_nonfinite_steps:
                raise NonFiniteError(
                    f"loss {row['loss']} and gradient norm {row['grad_norm']} at step {step}, {skipped} steps in a row",
                    workdir, "none of these was applied; look at the images, or lower the rate in a new --workdir",
                )  # fmt: skip
            if bad_images > allowed:
                what = f"{bad_images} bad images in an epoch, of at most {allowed}: they are named above"
                raise DataError(what, source.describe(), data.BAD_IMAGES_FIX)

        def save() -> None:
            with clock.measure("save"):
                saving = convert(into_blocks, state, in_blocks)
                checkpoint.save(manager, saving, {"data": fingerprint, "bad_images": bad_images})

        def evaluate() -> None:
            """Run all evaluators; a signal amid them leaves the evaluation to the next run."""
            nonlocal signalled
            with clock.measure("evaluation"):
                row, judged = {}, state if state.ema is None else state.replace(params=state.ema)
                try:
                    for name, run in evaluators.items():
                        with costs_of_evaluators.measure(name):
                            row |= run(judged)
                except Preempted as cut:
                    signalled = cut.number
                    return
                records.write_evaluation(step, row, pictures_of(workdir, step))
            log0(f"evaluation at step {step}: " + "  ".join(f"{k} {v:.4g}" for k, v in row.items()))

        # The loop. What is due at a step follows from the step and the records alone, so a resumed run does the same.
        pending = None  # the newest step's metrics, read one step late: the device never waits for the host
        saved, profile = start, run_records.Profile(workdir, config.profile_steps)
        gone = False  # whether another process is
        try:
            while True:
                # Once an iteration: a signal that comes later is seen by the next. Of several processes, what all know.
                stopping = stop.number if jax.process_count() == 1 else signalled
                must_save = step == steps or stopping
                save_due = step > saved and (must_save or step % config.save_every == 0)
                evaluation_due = step not in records.evaluations and (
                    step in (0, steps) or bool(evaluation_every and step % evaluation_every == 0)
                )
                if pending and (save_due or evaluation_due):
                    record(*pending)
                    pending = None
                if save_due and (must_save or not skipped):  # amid bad steps, keep what was before them
                    save()
                    saved = step
                if stopping:
                    raise Preempted(stopping, saved)
                if evaluation_due:
                    evaluate()
                    continue  # to look at the signals again
                if step == steps:
                    break
                with clock.measure("data"):  # while the device works on the step before
                    batch = next(batches)
                    batch["stop"] = np.full(batch["label"].shape, stop.number, np.int32)
                    batch = to_device(batch, mesh)
                profile.before(step + 1)
                with clock.measure("step"):
                    state, device_metrics = compiled_step(state, batch, step_key)
                step += 1
                profile.after(step, device_metrics)
                if pending:
                    record(*pending)
                pending = (step, device_metrics)
        except DataError:
            if jax.process_count() == 1:  # else the others would have to save with it
                if pending and pending[0] > recorded:
                    record(*pending)
                if step > saved and not skipped:
                    save()
            raise
        except BrokenPipeError:
            raise
        except (PeerError, jax.errors.JaxRuntimeError, ValueError) as error:
            told = processes.translate_error(error)
            gone = isinstance(told, PeerError)
            if told is error:
                raise
            raise told from error
        except OSError as error:
            raise CheckpointError(
                f"cannot write: {error.strerror or error}", str(error.filename or workdir),
                f"mend the disk or folder; the same command goes on from step {saved}",
            ) from error  # fmt: skip
        finally:
            profile.close()
            batches.close()
            records.close()
            if not gone:  # else it could not be finished
                with clock.measure("save"):
                    checkpoint.finish(manager)  # whatever ends the run, a save that has begun is finished

        return write_summary(
            workdir, records, clock, dict(costs_of_evaluators.seconds), step=steps, trained=steps - start,
            batch_size=config.batch_size,
        )  # fmt: skip


def open_records(workdir: str, step: int) -> run_records.Records:
    """The records of a run, cut back to `step`. The first process alone has files; all know what has been evaluated."""
    records = run_records.Records(workdir, step, writes=processes.is_process_0())
    evaluated = processes.on_process_0(lambda: list(records.evaluations.values()))
    records.evaluations = {row["step"]: row for row in evaluated}
    return records


def places(abstract):
    """The sharding of each leaf of an abstract tree."""
    return jax.tree.map(lambda x: x.sharding, abstract)


def shard_state(abstract, mesh, encoder):
    """An abstract state with its placement. Raises ConfigError where `mesh` does not fit it."""
    sharding.check_tensor(abstract.params, mesh)
    return sharding.place(abstract, mesh, tuple(encoder.scanned_layers))


def convert(function: Callable, tree, abstract):
    """`function` of a tree of arrays, placed as `abstract` says; the tree itself where that is like it already."""
    if jax.tree.structure(tree) == jax.tree.structure(abstract):
        return tree
    return jax.jit(function, out_shardings=places(abstract))(tree)


def check_numbers(config: ConfigDict) -> None:
    """Refuse numbers that are not what they should be, before they fail somewhere deep, or in silence."""
    if len(config.image_size) != 2 or min(config.image_size) < 1:
        raise ConfigError(f"image_size {config.image_size}", "image_size", "give height,width in pixels, like 224,224")
    if not config.mean or len(config.mean) != len(config.std) or min(config.std) <= 0:
        raise ConfigError(
            f"mean {config.mean} and std {config.std}", "mean, std", "give one positive number per channel for each"
        )
    for name in ("batch_size", "microbatches", "eval_batch_size", "log_every", "save_every", "max_to_keep"):
        check_minimum(name, config[name], 1)
    for name in ("steps", "epochs", "eval_images", "keep_period", "max_nonfinite_steps", "ema_decay"):
        check_minimum(name, config[name], 0)
    check_minimum("eval_every", config.eval_every, -1)
    if config.ema_decay >= 1:
        raise ConfigError(f"ema_decay is {config.ema_decay}", "ema_decay", "give a number below 1, like 0.9999, or 0")
    if config.init_parts and not config.init_from:
        what = f"init_parts {','.join(config.init_parts)}, and nothing to take them from"
        raise ConfigError(what, "init_from", "give a run's workdir as --config.init_from, or leave init_parts out")
    if len(config.profile_steps) not in (0, 2) or list(config.profile_steps) != sorted(config.profile_steps):
        raise ConfigError(f"profile_steps {config.profile_steps}", "profile_steps", "give first,last, like 20,25")


def make_keys(seed: int) -> jax.Array:
    """The keys of a run: for its parameters, its steps and its evaluations."""
    return jax.random.split(jax.random.key(seed), 3)


def run_length(config: ConfigDict, images: int) -> tuple[int, int]:
    """(steps of the run, steps of an epoch)."""
    steps_per_epoch = images // config.batch_size
    steps = config.steps or round(config.epochs * steps_per_epoch)
    if steps < 1:
        raise ConfigError(f"a run of {steps} steps", "epochs", "give --config.epochs or --config.steps above 0")
    return steps, steps_per_epoch


def warn_about_length(config: ConfigDict, steps: int, steps_per_epoch: int) -> None:
    """Say what of `config` is for longer runs than one of so many steps."""
    if config.optim.warmup_epochs * steps_per_epoch >= steps:
        logging.warning("the warm-up, %g epochs, is as long as the run: its rate stays low", config.optim.warmup_epochs)
    left = config.ema_decay**steps
    if config.ema_decay and left > MAX_INITIAL_WEIGHT:
        what = "the average of parameters, which is evaluated and handed on, will be %.0f %% those at the start: %s"
        logging.warning(what, 100 * left, f"ema_decay {config.ema_decay:g} is for longer runs than {steps} steps")


def make_tx(config: ConfigDict, encoder, steps: int, steps_per_epoch: int) -> tuple:
    """(optimizer, schedule) of a run."""
    return optim.make_optimizer(
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        layer_id=encoder.layer_id,
        depth=encoder.depth,
        decayed_too=encoder.DECAYED_TOO,
        scanned_layers=encoder.scanned_layers,
        **config.optim,
    )


def make_sources(config: ConfigDict) -> tuple:
    """The training images, and the held-out ones that evaluators look at (None where there are no evaluators)."""
    options = {name: config.data[name] for name in ("source", "path", "name", "data_dir", "heldout_fraction")}
    segments = config.objective.name == "segment"
    make = data.make_label_map_source if segments else data.make_source
    source = make(split=config.data.split, **options)
    heldout = make(split=config.data.heldout_split, **options) if config.evals or config.online_probes else None
    for each in (source, heldout) if segments else ():
        if each:
            data.check_maps(each, make_label_map_spec(config), len(config.mean), config.data.max_pixels)
    unfit = set(config.evals) - {"segmentation"} if segments else set(config.evals) & {"segmentation"}
    if unfit:
        raise ConfigError(
            f"evaluators that objective {config.objective.name} has nothing for: {', '.join(sorted(unfit))}",
            "config.evals", "segmentation goes with objective segment alone, and that with no other",
        )  # fmt: skip
    if config.objective.name == "classify":
        if not source.classes:
            raise DataError("images without classes", source.describe(), "put each class into a folder of its own")
        if len(source.classes) != config.objective.num_classes:
            raise ConfigError(
                f"num_classes is {config.objective.num_classes}, the data have {len(source.classes)} classes",
                source.describe(), f"give --config.objective.num_classes={len(source.classes)}",
            )  # fmt: skip
    judges = resolve_evals(config, source, heldout).keys() - {"reconstruction"}
    if heldout and judges and data.share_images(source, heldout):
        raise ConfigError(
            f"held-out images are among those trained on: {', '.join(sorted(judges))} would judge by them",
            f"data.heldout_split={config.data.heldout_split}",
            f"give one apart from {config.data.split}, like data.heldout_fraction of a folder, or train[90%:] of TFDS; "
            "reconstruction alone may look at them, with --config.online_probes=false",
        )  # fmt: skip
    labeled = {"knn", "linear", "accuracy"} & set(config.evals)
    if labeled and heldout.classes != source.classes:
        raise DataError(
            f"the held-out images have {len(heldout.classes) or 'no'} classes, the others {len(source.classes)}",
            heldout.describe(), "give both the same folders of classes",
        )  # fmt: skip
    probes = [name for name in config.evals if name in ("knn", "linear")]
    if probes and not source.classes:
        raise ConfigError(
            f"{' and '.join(probes)} need classes, and the images have none", source.describe(),
            "put each class into a folder of its own, or leave these evaluators out of config.evals",
        )  # fmt: skip
    return source, heldout


def resolve_evals(config: ConfigDict, source, heldout) -> dict[str, dict]:
    """The options of a run's evaluators by name: `config.evals`, and, where images have classes, `config.online_probes`."""
    evals = {name: dict(options) for name, options in config.evals.items()}
    fits = config.objective.name != "segment" and heldout and source.classes == heldout.classes
    if config.online_probes and fits and len(source.classes) > 1:
        evals = {"knn": {}, "linear": {}} | evals
    return evals


def evaluation_period(config: ConfigDict, evals: dict, steps: int, images: int, heldout: int) -> int:
    """Steps from one evaluation to the next; 0: none but at start and end.

    For `config.eval_every` of -1: as many as keep the passes of all evaluations under `MAX_EVALUATION_FRACTION` of the run's
    work, a forward pass being a third of a training step's; at most `MAX_EVALUATIONS`. Segmentation counts as a pass
    for each image, of which a large one takes several.
    """
    if config.eval_every >= 0 or not evals:
        return max(config.eval_every, 0)
    limit = config.eval_images or math.inf
    of_one = min(heldout, limit) * len({"reconstruction", "accuracy", "segmentation"} & set(evals))
    if {"knn", "linear"} & set(evals):
        of_one += min(heldout, limit) + min(images, limit)
    affordable = (
        MAX_EVALUATION_FRACTION * steps * config.batch_size / max(of_one / 3, 1) - 2
    )  # at start and end there is one
    count = min(int(affordable), MAX_EVALUATIONS)
    return -(-steps // (count + 1)) if count > 0 else 0


def make_label_map_spec(config: ConfigDict) -> data.LabelMapSpec:
    """How the label maps of a run of segmentation are read, and crops drawn."""
    fill = tuple(round(255 * value) for value in config.mean)
    return data.LabelMapSpec(num_classes=config.objective.num_classes, fill=fill, **config.data.maps)


def batch_options(config: ConfigDict) -> tuple[data.BatchSpec, data.Loading]:
    """What decides which pixels are in the batch of a step, and how they are loaded."""
    fields = {name: config.data[name] for name in data.BatchSpec._fields if name in config.data}
    spec = data.BatchSpec(
        **fields,
        batch_size=config.batch_size,
        seed=config.seed,
        channels=len(config.mean),
        mean=config.mean,
        label_maps=make_label_map_spec(config) if config.objective.name == "segment" else None,
    )
    loading = data.Loading(**{name: config.data[name] for name in data.Loading._fields})
    if loading.workers == -1:  # on a CPU, workers would take cores from the step
        workers = 0 if jax.default_backend() == "cpu" else min(data.cores() - 1, MAX_WORKERS)
        loading = loading._replace(workers=workers)
    return spec, loading


def resolve_encoder(config: ConfigDict, workdir: str) -> dict:
    """The options of the encoder; where it has no name, those of the run that `init_from` names, and what is given.

    A run that is gone on from has its encoder in its own config.json: the other may be gone by then.
    """
    told = to_dict(config)["encoder"]
    given = {name: value for name, value in told.items() if value is not None and (name, value) != ("size", "")}
    if given["name"]:
        return {"size": None, **given}
    there = {}
    if workdir and checkpoint.has_steps(workdir):
        there = read_json(Path(workdir) / "config.json")
    elif config.init_from:
        there = config_of(checkpoint.find_step(config.init_from))
    if "encoder" not in there:
        where = f"config.json of {config.init_from}" if config.init_from else "encoder.name"
        raise ConfigError("no encoder", where, "give --config.encoder.name, or a run's workdir as --config.init_from")
    taken = pretrained.architecture(there["encoder"])
    if given.get("size", taken.get("size")) != taken.get("size"):
        raise ConfigError(
            f"encoder.size is {given['size']!r}, and init_from has {taken.get('size')!r}", "encoder.size",
            "leave it out, or name the encoder too: --config.encoder.name",
        )  # fmt: skip
    if "pretrained_windows" in taken:
        taken["pretrained_windows"] = measuring_windows(there)
    return taken | {name: value for name, value in given.items() if name not in ("name", "size")}


def encoder_record(encoder, options: dict) -> dict:
    """All fields of an encoder as JSON data, what its size and its class leave open filled in."""
    fields = {f.name: getattr(encoder, f.name) for f in dataclasses.fields(encoder) if f.name not in ("parent", "name")}
    return json.loads(json.dumps({"name": options["name"], "size": options["size"], **fields}))


def config_of(step_folder: Path) -> dict:
    """The config.json of the run that a step's folder belongs to; empty if it has none."""
    return read_json(step_folder.parent.parent / "config.json")


def check_init_from(step_folder: Path, now: dict) -> None:
    """Raise CheckpointError if the run of `init_from` fed or built its encoder in a way that cannot be bridged."""
    saved = config_of(step_folder)
    pretrained.refuse_other_encoder(saved, now, str(step_folder))
    if "pretrained_windows" in saved.get("encoder", {}) and saved.get("image_size"):
        there, here = (measuring_windows(config) for config in (saved, now))
        pretrained.refuse_other_windows(there, here, str(step_folder))


def measuring_windows(config: dict) -> tuple[int, ...]:
    """The side of the window by which each stage of a Swin V2 measures its displacements."""
    encoder = make_encoder(**pretrained.architecture(config["encoder"]))
    return encoder.pretrained_windows or encoder.stage_windows(tuple(config["image_size"]))


def grids_of(saved: dict, stride: int, image_size: tuple[int, int]) -> tuple | None:
    """The maps of tokens that a run of the config `saved` had, and that this one has; None if that says no size."""
    sizes = (saved.get("image_size"), image_size)
    return tuple(tuple(side // stride for side in size) for size in sizes) if sizes[0] else None


def take_params(step_folder: Path, config: ConfigDict, encoder, abstract: dict, classes: Sequence[str] = ()) -> dict:
    """The parts of a run's parameters that `config` asks for, in the shapes and places of `abstract`.

    classes: of the images that are trained on. A head that read other features or knew other classes is left out.
    """
    saved, saved_config = checkpoint.read_params(str(step_folder))
    same = saved_config.get("objective", {}).get("name") == config.objective.name
    asked = tuple(part for parts in config.init_parts for part in parts.split(","))
    if same and "head" in saved and not asked and (why := other_head(saved_config, config, classes)):
        same = False
        log0(f"the head is left out: there {why} (--config.init_parts=encoder,head takes it nonetheless)")
    parts = asked or (tuple(name for name in abstract if name in saved) if same else ("encoder",))
    for part in parts:
        for side in (saved, abstract):
            if part not in side:
                raise ConfigError(
                    f"no {part!r} among {', '.join(sorted(side))}", f"init_parts, {step_folder}",
                    f"choose of {', '.join(sorted(saved.keys() & abstract.keys()))}",
                )  # fmt: skip
    wanted = {part: abstract[part] for part in parts}
    grids = grids_of(saved_config, encoder.token_stride, config.image_size)
    taken, notes = pretrained.fit({part: saved[part] for part in parts}, wanted, str(step_folder), grids)
    log0(f"{', '.join(parts)}: taken from {step_folder}")
    names = {}  # by what was done to them
    for name, done in notes:
        names.setdefault(done, []).append(name)
    for done, of in names.items():
        log0(f"  {done}: {of[0]}{f' and {len(of) - 1} more' if len(of) > 1 else ''}")
    put = lambda value, x: jax.make_array_from_callback(x.shape, x.sharding, lambda part: value[part])  # noqa: E731
    return jax.tree.map(put, taken, wanted)


def other_head(saved: dict, config: ConfigDict, classes: Sequence[str]) -> str:
    """What the head of a run of the same objective read or knew, where that is something else; "" where it is not."""
    for name, usual in READS.items():
        there, here = (json.dumps(objective.get(name, usual)) for objective in (saved["objective"], config.objective))
        if there != here:
            return f"objective.{name} is {there}"
    known = saved.get("classes")
    if not known or not classes or list(known) == list(classes):
        return ""
    return f"it knows {len(known)} classes, {', '.join(known[:3])} and so on"


def made_for_pretrained(config: ConfigDict) -> str:
    """What in `config` is for weights that have learned something, as a part of a sentence; "" where nothing is."""
    told = []
    if config.optim.layer_decay < 1:
        told.append(f"optim.layer_decay {config.optim.layer_decay:g} slows the low layers down (1 does not)")
    if config.optim.frozen or config.optim.frozen_layers:
        told.append("what optim.frozen keeps as it is stays so")
    return "".join(f"; {each}" for each in told)


def refuse_other_data(saved: dict, now: dict, workdir: str) -> None:
    """Raise DataError if the data are not those that the run began with: it would go on with others, in silence."""
    changed = [name for name in saved if name in now and saved[name] != now[name]]
    if changed:
        examples = ", ".join(f"{name}: {saved[name]} then, {now[name]} now" for name in changed)
        raise DataError(f"the data have changed ({examples})", workdir, "bring them back, or start in a new --workdir")


def abstract_batch(config: ConfigDict) -> dict:
    """Shapes and types of a whole batch on the device."""
    size, shape = config.batch_size, (config.batch_size, *config.image_size, len(config.mean))
    of_each = {"label": np.int32, "batch_index": np.int32, "index": np.uint32, "replaced": np.bool_, "stop": np.int32}
    arrays = {name: jax.ShapeDtypeStruct((size,), dtype) for name, dtype in of_each.items()}
    if config.objective.name == "segment":
        arrays["label_map"] = jax.ShapeDtypeStruct(shape[:3], make_label_map_spec(config).dtype)
    return {"image": jax.ShapeDtypeStruct(shape, np.uint8), **arrays}


def step_and_samples(state: TrainState, batch: dict, key: jax.Array, **options) -> tuple[TrainState, dict]:
    """`train_step`, which also tells which images the whole batch held, how many of them stand in for bad ones, and
    "stop", the process_max number of a signal that any process has got.
    """
    index, replaced = batch["index"], batch["replaced"]
    learned = {name: batch[name] for name in ("image", "label", "batch_index", "label_map") if name in batch}
    state, values = train_step(state, learned, key, **options)
    values |= {"samples": hash_samples(index, batch["batch_index"]), "bad_images": replaced.sum(dtype=np.int32)}
    values["stop"] = batch["stop"].max()
    return state, values


def compile_training(
    config: ConfigDict, objective: Objective, tx, state: TrainState, key: jax.Array, mesh, encoder
) -> Callable:
    """(state, batch, key) -> (state, metrics) of a run, compiled for an abstract `state`."""
    loss_fn = optim.freeze(objective.loss_fn, frozen_of(config, encoder), encoder.scanned_layers)
    split = {"microbatches": config.microbatches, "ema_decay": config.ema_decay}
    step = partial(step_and_samples, loss_fn=loss_fn, prepare=objective.prepare, tx=tx, **split)
    return compile_step(step, state, abstract_batch(config), key, mesh)


def step_flops(config: ConfigDict, objective: Objective, state: TrainState, key: jax.Array, encoder) -> int:
    """Multiplications and additions in the matmuls of a step, over all devices; recomputed ones do not count."""
    loss_fn = optim.freeze(objective.loss_fn, frozen_of(config, encoder), encoder.scanned_layers)
    batch = jax.eval_shape(objective.prepare, abstract_batch(config))
    return costs.step_flops(loss_fn, state.params, batch, key)


def frozen_of(config: ConfigDict, encoder) -> Callable | None:
    """Whether the parameter of a path is frozen, by `config`."""
    return optim.make_frozen(config.optim.frozen, config.optim.frozen_layers, encoder.layer_id)


def check_frozen(config: ConfigDict, encoder, params) -> None:
    """Raise ConfigError for layers that are not there, or that would not be as still as they look."""
    layers = config.optim.frozen_layers
    if layers > encoder.depth + 1:
        raise ConfigError(
            f"frozen_layers is {layers}, of an encoder of {encoder.depth} blocks", "optim.frozen_layers",
            f"give 1 for what embeds, up to {encoder.depth + 1} for all blocks",
        )  # fmt: skip
    is_frozen = frozen_of(config, encoder) or (lambda path: False)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    named = optim.make_frozen(config.optim.frozen)
    if named and not any(map(named, paths)):
        raise ConfigError(
            f"no parameter's path begins with {config.optim.frozen!r}", "optim.frozen",
            f"they are like {paths[0]} and {paths[-1]}",
        )  # fmt: skip
    if all(map(is_frozen, paths)):
        raise ConfigError("all parameters are frozen: nothing would be trained", "optim.frozen", "leave some out")
    measured = [path for path in paths if path.endswith(("/mean", "/var")) and is_frozen(path)]
    if measured and config.objective.get("train_encoder", True):
        raise ConfigError(
            f"{measured[0]} is frozen, but its batch norm would still use each batch's own statistics", "optim.frozen",
            "freeze the whole encoder, with objective.train_encoder=false, or nothing of it",
        )  # fmt: skip
    still = all(is_frozen(path) for path in paths if path.startswith("encoder/"))
    if not still and not config.objective.get("train_encoder", True):
        what = "objective.train_encoder=false keeps no parameter as it is, it turns stochastic depth off: %s"
        logging.warning(what, "the encoder is frozen by --config.optim.frozen=encoder/")
    if still and config.objective.get("train_encoder") and encoder.drop_path:
        logging.warning("the encoder is frozen, and still drops paths: give --config.objective.train_encoder=false")


def parameters_of(config: ConfigDict, encoder, params) -> tuple[int, int]:
    """(how many numbers there are, how many of them are trained)."""
    is_frozen = frozen_of(config, encoder) or (lambda path: False)
    sizes = [(path_name(path), math.prod(x.shape)) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    return sum(size for _, size in sizes), sum(size for path, size in sizes if not is_frozen(path))


def check_memory(config: ConfigDict, encoder, needed: int, there: int, steps: int, steps_per_epoch: int | None) -> None:
    """Tell what a step needs of each device's memory; raise ConfigError if that is more than is there.

    needed, there: bytes; 0 where it is not known. The error names settings with which it fits, found by compiling them.
    """
    if not needed or not there:  # not told
        return
    log0(f"memory: a step needs {gib(needed)} of {gib(there)} of each device")
    if needed > there:
        log0("that is too much: looking for settings that fit")
        tried = try_settings(config, encoder, steps, steps_per_epoch, there)
        fitting = [
            " ".join(f"--config.{name}={value}" for name, value in each["settings"].items())
            + f" ({gib(each['memory_bytes'])})"
            for each in tried
            if each["fits"]
        ]
        raise ConfigError(
            f"a step needs {gib(needed)} of each device, which has {gib(there)}",
            f"batch_size {config.batch_size}", f"give {' or '.join(fitting) or 'a smaller batch'}; "
            "--config.check_memory=false tries it nonetheless",
        )  # fmt: skip


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"


def with_settings(config, settings: dict):
    """A copy of `config` with other values of some fields, by dotted names."""
    changed = config.copy_and_resolve_references()
    for name, value in settings.items():
        folder, _, field = name.rpartition(".")
        (changed[folder] if folder else changed)[field] = value
    return changed


def build(config, steps: int, steps_per_epoch: int | None, devices: int | None = None) -> dict:
    """What a run of `config` makes before it compiles, without an array: encoder, objective, tx, mesh, state and key.

    steps_per_epoch: None where it does not matter. devices: that there should be; None: as many as there are.
    """
    if devices and jax.device_count() != devices:
        raise ConfigError(f"{jax.device_count()} devices are simulated, not {devices}", "--devices", "start anew")
    encoder = make_encoder(**resolve_encoder(config, ""))
    objective = make_objective(
        encoder=encoder, image_size=config.image_size, mean=config.mean, std=config.std, **config.objective
    )
    tx, _ = make_tx(config, encoder, steps, steps_per_epoch or 1)
    mesh = sharding.make_mesh(**config.mesh)
    sharding.check_batch_size("batch_size", config.batch_size, sharding.num_batch_shards(mesh), config.microbatches)
    init_key, key, _ = make_keys(config.seed)
    make_state = partial(init_state, init=objective.init, tx=tx, ema_decay=config.ema_decay)
    abstract = shard_state(jax.eval_shape(make_state, init_key), mesh, encoder)
    return {
        "encoder": encoder, "objective": objective, "tx": tx, "mesh": mesh, "abstract": abstract, "key": key,
        "make_state": partial(make_state, init_key),
    }  # fmt: skip


def compile_to_measure(config, built: dict, steps: int, steps_per_epoch: int | None):
    """`compile_step` of what needs as much memory as on an accelerator.

    XLA:CPU drops the barriers that keep a compiler from computing once what `encoder.remat` has computed twice, so that
    the blocks of a scan alone are really computed again. So a model with remat is measured scanned.
    """
    encoder = built["encoder"]
    if getattr(encoder, "remat", "none") != "none" and not getattr(encoder, "scan", True):
        scanned = with_settings(config, {"encoder.scan": True})
        with contextlib.suppress(ConfigError):  # where some blocks are frozen and others not
            config, built = scanned, build(scanned, steps, steps_per_epoch)
    parts = (built[name] for name in ("objective", "tx", "abstract", "key", "mesh", "encoder"))
    return compile_training(config, *parts)


def try_settings(config, encoder, steps: int, steps_per_epoch: int | None, there: int) -> Iterator[dict]:
    """What a device needs under settings that make a step smaller: {"settings", "memory_bytes", "fits"} of each.

    Each alone first: `encoder.remat`, `mesh.fsdp` and `microbatches`, these doubled until it fits; where none does,
    they are added up.
    """

    def attempt(settings: dict) -> dict | None:
        changed = with_settings(config, settings)
        try:
            built = build(changed, steps, steps_per_epoch)
        except UserError:  # these devices or this encoder do not take it
            return None
        memory = costs.memory(compile_to_measure(changed, built, steps, steps_per_epoch))
        return {"settings": settings, "memory_bytes": memory, "fits": memory <= there}

    def try_parts(settings: dict) -> Iterator[dict]:
        parts = 2
        while parts <= MAX_MICROBATCHES and (
            tried := attempt({**settings, "microbatches": parts * config.microbatches})
        ):
            yield tried
            if tried["fits"]:
                return
            parts *= 2

    can_remat = hasattr(encoder, "scan") and encoder.remat != "full"
    single = [{"encoder.remat": "full"}] if can_remat else []
    all_ways = {"mesh.fsdp": -1} if config.mesh.data == -1 else {"mesh.data": -1, "mesh.fsdp": -1}
    single += [all_ways] if config.mesh.fsdp == 1 else []
    all_tried = [tried for settings in single if (tried := attempt(settings))]
    all_tried += try_parts({})
    yield from all_tried
    if any(tried["fits"] for tried in all_tried):
        return
    together = {name: value for settings in single for name, value in settings.items()}
    tried = attempt(together) if len(single) > 1 else None
    if tried:
        yield tried
    if together and not (tried and tried["fits"]):
        yield from try_parts(together)


def compile_step(step: Callable, state: TrainState, batch: dict, key: jax.Array, mesh) -> Callable:
    """`step`, compiled once for these shapes: the state placed as it is and donated, the batch split over devices."""
    state_sharding, everywhere = jax.tree.map(lambda x: x.sharding, state), sharding.replicated(mesh)
    jitted = jax.jit(
        step,
        in_shardings=(state_sharding, sharding.batch_sharding(mesh), everywhere),
        out_shardings=(state_sharding, everywhere),
        donate_argnums=0,
    )
    with jax.set_mesh(mesh):
        return jitted.lower(state, batch, key).compile()


def to_device(
    batch: dict, mesh, names: tuple[str, ...] = ("image", "label", "batch_index", "index", "replaced", "stop")
) -> dict:
    """What of a batch the device needs, as global arrays."""
    narrow = {"index": batch["index"].astype(np.uint32)}  # JAX has no 64 bits; of more than 2**32 images, the last 32
    names = (*names, "label_map") if "label_map" in batch else names
    return sharding.to_global({name: narrow.get(name, batch[name]) for name in names}, mesh)


def make_evaluators(
    config: ConfigDict,
    evals: dict,
    features: Callable,
    objective: Objective,
    source,
    heldout_source,
    mesh,
    key: jax.Array,
    workdir: str,
    stop: checkpoint.StopSignal,
) -> dict[str, Callable]:
    """The evaluators `evals` by name, each given what it asks for out of what a run has; they heed `stop`."""
    run_till_signal = lambda function: stoppable(jit_on_mesh(function, mesh), stop)  # noqa: E731
    share, shares = sharding.batch_shard(mesh)
    loading = data.Loading(threads=config.data.threads, on_error=config.data.on_error, max_bad_fraction=1.0)
    epoch = partial(
        data.make_epoch,
        crop=data.CenterCrop(
            image_size=config.image_size,
            channels=len(config.mean),
            crop_fraction=config.data.crop_fraction,
            interpolation=config.data.interpolation,
            max_pixels=config.data.max_pixels,
        ),
        batch_size=config.eval_batch_size,
        shard=data.Shard(share, shares),
        loading=loading,
    )
    bound = {
        "loading": loading._replace(max_bad_fraction=config.data.max_bad_fraction),
        "process_max": processes.process_max,
    }
    eval_inputs = {"folder": str(Path(workdir) / "figures") if processes.is_process_0() else ""}
    if evals:
        heldout = epoch(heldout_source, limit=config.eval_images, **bound)
        eval_inputs["heldout"] = heldout
        eval_inputs["spread"] = lambda count: epoch(heldout_source, limit=count)
        eval_inputs["predict"] = run_till_signal(lambda params, batch: objective.predict(params, batch, key))
        eval_inputs["features"] = make_feature_reader(
            extract=run_till_signal(lambda params, batch: {"features": features(params["encoder"], batch["image"])[0]}),
            train=epoch(source, limit=config.eval_images, **bound),
            heldout=heldout,
        )
    if evals and config.objective.name == "segment":
        eval_inputs |= segmentation_inputs(config, eval_inputs["predict"], heldout_source, share, shares)
    return {name: make_evaluator(name, eval_inputs, **options) for name, options in evals.items()}


def stoppable(function: Callable, stop: checkpoint.StopSignal) -> Callable:
    """`function`, which all processes call together, raising Preempted once a signal has come to any of them."""
    calls = itertools.count()

    def run(*arguments):
        asked = jax.process_count() == 1 or next(calls) % SIGNAL_CHECK_PERIOD == 0
        if asked and (signalled := processes.process_max(stop.number)):
            raise Preempted(signalled, 0)
        return function(*arguments)

    return run


def segmentation_inputs(config: ConfigDict | dict, predict: Callable, source, share: int, shares: int) -> dict:
    """What the evaluator of segmentation asks for beside what all do. config: also as config.json has it."""
    config = ConfigDict(config)
    maps, batch_size = make_label_map_spec(config), config.eval_batch_size
    whole = data.SegmentationSet(
        source, size=config.image_size, maps=maps, channels=len(config.mean), interpolation=config.data.interpolation,
        limit=config.eval_images, threads=config.data.threads, on_error=config.data.on_error,
        max_bad_fraction=config.data.max_bad_fraction, max_pixels=config.data.max_pixels,
    )  # fmt: skip
    return {
        "whole": whole, "most_bad": whole.most_bad, "window": config.image_size, "window_batch": batch_size,
        "read_windows": make_windows_reader(predict, batch_size, share, shares),
        "fill": np.asarray(maps.fill, np.uint8), "classes": source.classes,
    }  # fmt: skip


def pictures_of(workdir: str, step: int) -> dict[str, np.ndarray]:
    """The figures that evaluators have drawn at this step, by name; none but in the first process."""
    if not processes.is_process_0():
        return {}
    paths = (Path(workdir) / "figures").glob(f"*_{step}.png")
    return {path.stem.rsplit("_", 1)[0]: np.asarray(Image.open(path).convert("RGB")) for path in paths}


def write_summary(
    workdir: str,
    records: run_records.Records,
    clock: run_records.Clock,
    evaluators: dict[str, float],
    *,
    step: int,
    trained: int,
    batch_size: int,
) -> dict:
    """Write summary.json, and print the results beside those at step 0, and where the time went.

    evaluators: seconds that each took; what two of them read was computed by the first.
    """
    first, last = ({k: v for k, v in records.evaluations.get(n, {}).items() if k != "step"} for n in (0, step))
    seconds = clock.summary()
    rate = trained * batch_size / max(seconds.get("step", 0) + seconds.get("data", 0), 1e-9)
    summary = {"step": step, **last, "start": first, "images_per_second": round(rate, 1), "seconds": seconds}
    summary["seconds_of_evaluators"] = {name: round(value, 2) for name, value in evaluators.items()}
    if not processes.is_process_0():
        return summary
    run_records.write_atomically(Path(workdir) / "summary.json", json.dumps(summary, indent=2) + "\n")
    if last:
        print(f"\n{'':16}{'step 0':>12}{f'step {step}':>12}")
        for name, value in last.items():
            print(f"{name:16}{first.get(name, float('nan')):12.4f}{value:12.4f}")
    print(
        "\ntime: " + "  ".join(f"{name} {value:.1f} s" for name, value in seconds.items()) + f"  ({rate:.0f} images/s)"
    )
    if evaluators:
        share = seconds.get("evaluation", 0) / max(seconds["total"], 1e-9)
        parts = "  ".join(f"{name} {value:.1f} s" for name, value in evaluators.items())
        print(f"evaluations: {parts}  ({share:.1%} of the time)")
    return summary
