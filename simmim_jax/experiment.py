"""`make_experiment(config) -> Experiment`: all parts of a run, made from its config.

Training, memory planning, previews, tools and benchmarks all start from an `Experiment`. This is the only module that
reads a config and assembles encoder, objective, optimizer, batches and state, which is why it is longer than others.
Modules below it take plain arguments.
"""

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
from absl import logging
from jax.sharding import Mesh
from jaxtyping import Array, Key
from ml_collections import ConfigDict

from simmim_jax import automatic, data, optim
from simmim_jax.config import changes, flat, new_phase, to_dict
from simmim_jax.data import BatchSpec, Loading
from simmim_jax.data.label_maps import LabelMapSpec
from simmim_jax.data.pixels import Pixels
from simmim_jax.data.sample import PixelOptions
from simmim_jax.errors import ConfigError, DataError, check_minimum, choose, suggest, warn_once
from simmim_jax.evals import EVALUATORS, forward_passes
from simmim_jax.files import read_json
from simmim_jax.flags import as_flag
from simmim_jax.masking import num_masked
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.models.encoder import Encoder
from simmim_jax.objectives import Objective, make_objective
from simmim_jax.objectives.features import make_features
from simmim_jax.runs import checkpoint, pretrained
from simmim_jax.runtime import processes, sharding
from simmim_jax.runtime.processes import log0
from simmim_jax.runtime.scanning import unstack
from simmim_jax.train_step import TrainState, init_state

MAX_EVALUATION_FRACTION = 0.03  # of a run's work, for eval_every=-1
MAX_EVALUATIONS = 20  # per run, for eval_every=-1
MAX_INITIAL_WEIGHT = 0.05  # weight of the initial parameters in the final EMA, above which a warning is logged
MAX_RATIO_OFFSET = 0.03  # difference between the masked fraction and mask_ratio, above which a warning is logged
FEW_HELDOUT = 50  # held-out images, below which a warning is logged
MAX_DEFAULT_WORKERS = 32  # cap on decoder processes for data.workers=-1; each holds 250 MB


class Keys(NamedTuple):
    """Random keys of a run. The key of a step is `step` folded with the step number."""

    init: Key[Array, ""]
    step: Key[Array, ""]
    eval: Key[Array, ""]


class Evals(NamedTuple):
    """The evaluators of a run.

    options: evaluator name -> its options.
    every: steps between two evaluations; 0: only at the start and the end.
    images: number of held-out images, and of training images for probes; 0: all.
    features: (params, images) -> pooled features, the input of probes.
    """

    options: dict[str, dict]
    every: int
    images: int
    batch_size: int
    crop: data.CenterCrop
    features: Callable


class Saving(NamedTuple):
    """Settings of checkpoints, logging and limits. The parameters do not depend on them."""

    save_every: int
    max_to_keep: int
    keep_period: int
    keep_best: str
    patience: int
    log_every: int
    profile_steps: tuple[int, ...]
    max_nonfinite_steps: int
    check_memory: bool


class Experiment(NamedTuple):
    """Everything that a config determines.

    record: content of config.json.
    changes: config fields that are not at their default.
    tx: Optax gradient transformation.
    schedule: step -> learning rate.
    is_frozen: parameter path -> whether it gets no update; None if nothing is frozen.
    is_decayed: parameter path -> whether it gets weight decay.
    pixels: type, bands, value range and normalization of the images.
    steps: length of the run.
    source, heldout: training and held-out images; None if they were not opened.
    init_from: folder of the checkpoint that the parameters start from; None: random parameters, or a resumed run.
    init_parts: top-level groups of parameters to take from `init_from`; (): the default.
    state: abstract and sharded `TrainState`.
    variant: {config field: value} -> the Experiment with these values.
    """

    record: dict
    changes: dict
    encoder: Encoder
    objective: Objective
    pixels: Pixels
    tx: object
    schedule: Callable
    is_frozen: Callable[[str], bool] | None
    is_decayed: Callable[[str], bool]
    steps: int
    steps_per_epoch: int
    microbatches: int
    ema_decay: float
    source: object
    heldout: object
    batches: BatchSpec
    loading: Loading
    evals: Evals
    saving: Saving
    init_from: Path | None
    init_parts: tuple[str, ...]
    mesh: Mesh
    keys: Keys
    state: TrainState
    variant: Callable[[dict], "Experiment"]


def make_experiment(
    config: ConfigDict,
    workdir: str = "",
    *,
    images: int | None = None,
    pixels: Pixels | None = None,
    on_cpu: bool | None = None,
    extend: bool = False,
) -> Experiment:
    """Turn a config into an `Experiment`. Allocates no device memory.

    workdir: of the run. If it has checkpoints, its config.json has the fields that the config leaves open.
    images: size of the training set; None: open the data and count the images.
    pixels: of the images; None: by the config, the workdir and the images.
    on_cpu: whether the run is for CPUs; None: whether this machine has only CPUs.
    extend: whether other values of `config.EXTENDABLE` than those of the workdir begin a new phase.
    Raises UserError for every mistake in the config or the data.
    """
    source = heldout = init_from = None
    if images is None:
        source, heldout = open_sources(config)
        images = len(source)
    on_cpu = jax.default_backend() == "cpu" if on_cpu is None else on_cpu
    config = fill_in(config, workdir, images, len(source.classes) if source else 0, on_cpu)
    check_config(config)
    pixels = pixels or resolve_pixels(config, source, heldout, workdir)
    encoder_options = resolve_encoder(config, workdir)
    encoder = make_encoder(**encoder_options)
    objective = make_objective(
        encoder=encoder, image_size=config.image_size, **pixels.normalization, **config.objective
    )
    batches, loading = make_batch_spec(config, objective, pixels), make_loading(config)
    record = to_dict(config) | {"encoder": encoder_record(encoder, encoder_options)} | pixels.as_record()
    if source:
        check_sources(config, objective, source, heldout, batches)
        data.check_batches(source, batches, loading)
        if objective.needs != ("image",):
            record["classes"] = list(source.classes)
        if "label" in objective.needs:
            record["untrained_classes"] = data.untrained_classes(source)
    if workdir and config.init_from and not processes.on_process_0(lambda: checkpoint.has_steps(workdir)):
        init_from = Path(processes.on_process_0(lambda: str(checkpoint.find_step(config.init_from))))
        pretrained.check_init_from(init_from, record)
    steps, steps_per_epoch = run_length(config, images)
    warn_about_fit(config, steps, steps_per_epoch)
    is_frozen = optim.make_frozen(config.optim.frozen, config.optim.frozen_layers, encoder.layer_id)
    no_decay = encoder.no_decay(pretraining=not objective.num_classes)
    record["phases"] = make_phases(record, workdir, steps, extend)
    first_step = record["phases"][-1]["step"] if record["phases"] else 0
    tx, schedule = make_tx(config, encoder, no_decay, first_step, steps, steps_per_epoch)

    mesh = sharding.make_mesh(**config.mesh)
    num_shards = sharding.num_batch_shards(mesh)
    sharding.check_batch_size("batch_size", config.batch_size, num_shards, config.microbatches)
    sharding.check_batch_size("eval_batch_size", config.eval_batch_size, num_shards)
    keys = make_keys(config.seed)
    make_state = partial(init_state, init=objective.init, tx=tx, ema_decay=config.ema_decay)
    state = jax.eval_shape(make_state, keys.init)
    sharding.check_tensor(state.params, mesh)
    state = sharding.shard_state(state, mesh, tuple(encoder.scanned_layers))
    optim.check_frozen(
        unstack(state.params, encoder.scanned_layers),
        is_frozen,
        frozen=config.optim.frozen,
        frozen_layers=config.optim.frozen_layers,
        depth=encoder.depth,
        drop_path=encoder.drop_path,
        train_encoder=config.objective.get("train_encoder"),
    )

    return Experiment(
        record=record,
        changes=changes(config),
        encoder=encoder,
        objective=objective,
        pixels=pixels,
        tx=tx,
        schedule=schedule,
        is_frozen=is_frozen,
        is_decayed=optim.make_is_decayed(no_decay[config.optim.decay_rule]),
        steps=steps,
        steps_per_epoch=steps_per_epoch,
        microbatches=config.microbatches,
        ema_decay=config.ema_decay,
        source=source,
        heldout=heldout,
        batches=batches,
        loading=loading,
        evals=make_evals(config, encoder, objective, pixels, (source, heldout), steps),
        saving=Saving(**{name: config[name] for name in Saving._fields}),
        init_from=init_from,
        init_parts=tuple(part for parts in config.init_parts for part in parts.split(",")),
        mesh=mesh,
        keys=keys,
        state=state,
        variant=lambda settings: make_experiment(
            with_settings(config, settings), workdir, images=images, pixels=pixels, on_cpu=on_cpu
        ),
    )


def make_keys(seed: int) -> Keys:
    """The random keys of a run."""
    return Keys(*jax.random.split(jax.random.key(seed), 3))


def make_label_maps(num_classes: int, pixels: Pixels, options: dict) -> LabelMapSpec:
    """How label maps are read. pixels: of the images, which are padded with their mean. options: config.data.maps."""
    return LabelMapSpec(num_classes=num_classes, fill=pixels.fill, **options)


def check_config(config: ConfigDict) -> None:
    """Raise ConfigError for invalid numbers that would otherwise fail late or silently."""
    if len(config.image_size) != 2 or min(config.image_size) < 1:
        raise ConfigError(f"image_size {config.image_size}", "image_size", "give height,width in pixels, like 224,224")
    lengths = {len(values) for values in (config.mean, config.std)} - {0}
    if len(lengths) > 1 or min(config.std, default=1) <= 0:
        raise ConfigError(
            f"mean {config.mean} and std {config.std}", "mean, std", "give one positive number per channel for each"
        )
    for name in ("batch_size", "microbatches", "eval_batch_size", "log_every", "save_every", "max_to_keep"):
        check_minimum(name, config[name], 1)
    for name in ("steps", "epochs", "eval_images", "keep_period", "patience", "max_nonfinite_steps", "ema_decay"):
        check_minimum(name, config[name], 0)
    check_minimum("eval_every", config.eval_every, -1)
    if config.ema_decay >= 1:
        raise ConfigError(f"ema_decay is {config.ema_decay}", "ema_decay", "give a number below 1, like 0.9999, or 0")
    if config.patience and not config.keep_best:
        raise ConfigError("patience without a metric", "patience", "give --config.keep_best, like linear")
    if config.init_parts and not config.init_from:
        what = f"init_parts {','.join(config.init_parts)} without a run to take them from"
        raise ConfigError(what, "init_from", "give a run's workdir as --config.init_from, or remove init_parts")
    if len(config.profile_steps) not in (0, 2) or list(config.profile_steps) != sorted(config.profile_steps):
        raise ConfigError(f"profile_steps {config.profile_steps}", "profile_steps", "give first,last, like 20,25")


def fill_in(config: ConfigDict, workdir: str, images: int, classes: int, on_cpu: bool) -> ConfigDict:
    """A copy of `config` with a value for each of `automatic.FIELDS` that is None. Logs these values.

    images, classes: of the training set; 0 if unknown. A resumed run keeps the values in its config.json.
    """
    check_minimum("microbatches", config.microbatches, 1)  # eval_batch_size is a quotient
    fields = dict(flat(to_dict(config)))
    if all(fields.get(name, "") is not None for name in automatic.FIELDS):
        return config
    resumes, earlier = earlier_record(config, workdir)
    earlier = dict(flat(earlier))
    settings = lambda known: {name: known[name] for name in ("encoder.size", "encoder.patch_size") if name in known}  # noqa: E731
    chosen = automatic.choose(
        fields,
        automatic.Facts(
            images=images,
            classes=classes,
            on_cpu=on_cpu,
            batch_unit=sharding.num_batch_shards(sharding.make_mesh(**config.mesh)) * config.microbatches,
            sizes=tuple(choose("encoder", config.encoder.name, ENCODERS)[1]) if config.encoder.name else (),
            saved=earlier if resumes else {},
            init_from={} if resumes else earlier,
            token_stride=lambda known: (
                make_encoder(**resolve_encoder(with_settings(config, settings(known)), workdir)).token_stride
            ),
        ),
    )
    for name, (value, reason) in chosen.items():
        log0(f"chosen: {name} {as_flag(value)} ({reason})")
    return with_settings(config, {name: value for name, (value, _) in chosen.items()})


def earlier_record(config: ConfigDict, workdir: str) -> tuple[bool, dict]:
    """(whether the run resumes, config.json of the workdir if it does, else that of `init_from`, else {})."""
    if workdir and checkpoint.has_steps(workdir):
        return True, read_json(Path(workdir) / "config.json")
    return False, pretrained.config_of(checkpoint.find_step(config.init_from)) if config.init_from else {}


def with_settings(config: ConfigDict, settings: dict) -> ConfigDict:
    """A copy of `config` with the values of `settings`, by dotted name."""
    changed = copy.deepcopy(config)  # keeps the fields that follow from others
    for name, value in settings.items():
        group, _, field = name.rpartition(".")
        (changed[group] if group else changed)[field] = value
    return changed


def resolve_encoder(config: ConfigDict, workdir: str) -> dict:
    """The options of `make_encoder`. Without `encoder.name`, those of the `init_from` run; fields of the config win.

    When resuming, the encoder is read from the workdir's own config.json: the `init_from` run may have been deleted.
    """
    fields = to_dict(config)["encoder"]
    given = {name: value for name, value in fields.items() if value is not None and (name, value) != ("size", "")}
    if given["name"]:
        return {"size": None, **given}
    _, saved = earlier_record(config, workdir)
    if "encoder" not in saved:
        where = f"config.json of {config.init_from}" if config.init_from else "encoder.name"
        raise ConfigError("no encoder", where, "give --config.encoder.name, or a run's workdir as --config.init_from")
    taken = pretrained.architecture(saved["encoder"])
    if given.get("size", taken.get("size")) != taken.get("size"):
        raise ConfigError(
            f"encoder.size is {given['size']!r}, but init_from has {taken.get('size')!r}",
            "encoder.size",
            "remove it, or name the encoder too: --config.encoder.name",
        )
    if "pretrained_windows" in taken:
        taken["pretrained_windows"] = pretrained.measuring_windows(saved)
    return taken | {name: value for name, value in given.items() if name not in ("name", "size")}


def encoder_record(encoder: Encoder, options: dict) -> dict:
    """All fields of an encoder as JSON data, including those that its size and its class determine."""
    return json.loads(json.dumps({"name": options["name"], "size": options["size"], **encoder.options()}))


def run_length(config: ConfigDict, images: int) -> tuple[int, int]:
    """(steps of the run, steps of an epoch)."""
    steps_per_epoch = images // config.batch_size
    steps = config.steps or round(config.epochs * steps_per_epoch)
    if steps < 1:
        raise ConfigError(f"a run of {steps} steps", "epochs", "give --config.epochs or --config.steps above 0")
    return steps, steps_per_epoch


def warn_about_fit(config: ConfigDict, steps: int, steps_per_epoch: int) -> None:
    """Warn if the warm-up or the EMA horizon does not fit into `steps`, or the mask ratio into few mask patches."""
    if "mask_ratio" in config.objective:
        patches = math.prod(side // config.objective.mask_patch_size for side in config.image_size)
        masked = num_masked(patches, config.objective.mask_ratio)
        if masked / patches > config.objective.mask_ratio + MAX_RATIO_OFFSET:
            logging.warning(
                "%d of %d mask patches are masked: %.1f %%, not %.1f %%; smaller mask patches are closer",
                masked,
                patches,
                100 * masked / patches,
                100 * config.objective.mask_ratio,
            )
    if (config.optim.warmup_epochs or 0) * steps_per_epoch >= steps:
        logging.warning(
            "the warm-up of %g epochs is as long as the run: the learning rate stays low", config.optim.warmup_epochs
        )
    initial = config.ema_decay**steps
    if config.ema_decay and initial > MAX_INITIAL_WEIGHT:
        logging.warning(
            "ema_decay %g is too high for %d steps: %.0f %% of the EMA, which is evaluated and exported, will be the "
            "initial parameters",
            config.ema_decay,
            steps,
            100 * initial,
        )


def make_phases(record: dict, workdir: str, steps: int, extend: bool) -> list[dict]:
    """The phases of a run after its first: {"step": where it begins, changed field: its new value}, in order.

    A phase keeps the state of the optimizer. Its schedule begins at its first step, warm-up included.
    """
    newest = checkpoint.newest_step(workdir) if workdir else None
    if newest is None:
        if extend:
            raise ConfigError("no checkpoint to extend", workdir, "run the command without --extend")
        return []
    saved = read_json(Path(workdir) / "config.json")
    phases = saved.get("phases", [])
    if extend and (changed := new_phase(saved, record)):
        if steps <= newest:
            what = f"the run has {newest} steps already, this config {steps}"
            raise ConfigError(what, workdir, "give more with --config.epochs or --config.steps")
        log0(f"extending {workdir} from step {newest} to {steps}: a new phase with {changed}")
        phases = [*phases, {"step": newest, **changed}]
    return phases


def make_tx(
    config: ConfigDict, encoder: Encoder, no_decay: dict, first_step: int, steps: int, steps_per_epoch: int
) -> tuple:
    """(optimizer, learning-rate schedule) of a run's last phase, which begins at `first_step`."""
    options = {**config.optim, "lr_step_offset": config.optim.lr_step_offset + first_step}
    return optim.make_optimizer(
        steps=steps - first_step,
        steps_per_epoch=max(steps_per_epoch, 1),
        layer_id=encoder.layer_id,
        depth=encoder.depth,
        no_decay=no_decay,
        scanned_layers=encoder.scanned_layers,
        **options,
    )


def resolve_pixels(config: ConfigDict, source, heldout, workdir: str) -> Pixels:
    """Type, bands, value range and normalization of the images, found once; logs what was found.

    They are those in the config.json of a resumed run or of `init_from`, or in the manifest of a prepared folder, else
    those of a sample of the images. Fields of the config win. source, heldout: None if they were not opened.
    """
    given = PixelOptions(
        mean=tuple(config.mean),
        std=tuple(config.std),
        value_range=tuple(config.data.value_range),
        bands=tuple(band for each in config.data.bands for band in str(each).split(",")),
        nodata=config.data.nodata,
        max_nodata=config.data.max_nodata,
    )

    def find() -> list:
        _, saved = earlier_record(config, workdir)
        found, remarks = data.resolve_pixels(source, given, saved, config.data.max_pixels)
        if heldout:
            data.check_pixels(found, heldout, config.data.max_pixels)
        return [found.as_record(), remarks]

    record, remarks = processes.on_process_0(find)
    for remark in remarks:
        log0(remark)
    return Pixels.from_record(record, config.data.max_nodata)


def make_batch_spec(config: ConfigDict, objective: Objective, pixels: Pixels) -> BatchSpec:
    """Every setting that affects the pixels in the batch of a step."""
    fields = {name: config.data[name] for name in BatchSpec._fields if name in config.data}
    label_maps = None
    if "label_map" in objective.needs:
        label_maps = make_label_maps(config.objective.num_classes, pixels, dict(config.data.maps))
    return BatchSpec(
        **fields,
        image_size=config.image_size,
        batch_size=config.batch_size,
        seed=config.seed,
        channels=pixels.channels,
        mean=pixels.mean,
        label_maps=label_maps,
        samples=pixels.samples,
    )


def make_loading(config: ConfigDict) -> Loading:
    """How batches are loaded on this machine."""
    loading = Loading(**{name: config.data[name] for name in Loading._fields})
    if loading.workers == -1:  # on a CPU, decoder processes would take cores from the step
        on_cpu = jax.default_backend() == "cpu"
        loading = loading._replace(workers=0 if on_cpu else min(data.cores() - 1, MAX_DEFAULT_WORKERS))
    return loading


def open_sources(config: ConfigDict) -> tuple:
    """(training images, held-out images). Held-out is None if no evaluator reads it. Raises UserError."""
    make = partial(
        data.make_label_map_source if "maps" in config.data else data.make_source,
        **{name: config.data[name] for name in ("source", "path", "name", "data_dir", "heldout_fraction")},
    )
    with data.one_report():
        source = make(split=config.data.split)
        heldout = make(split=config.data.heldout_split) if config.evals or config.online_probes else None
    return source, heldout


def check_sources(config: ConfigDict, objective: Objective, source, heldout, batches: BatchSpec) -> None:
    """Raise UserError if the images do not fit the objective or the evaluators."""
    if batches.label_maps:
        for each in filter(None, (source, heldout)):
            data.check_maps(each, batches.label_maps, batches.channels, batches.max_pixels, batches.samples)
    if "label" in objective.needs:
        if not source.classes:
            raise DataError("images without classes", source.describe(), data.how_to_label(source))
        if len(source.classes) == 1:
            raise DataError(
                f"all images are of class {source.classes[0]!r}", source.describe(), "give two or more classes"
            )
        if len(source.classes) != config.objective.num_classes:
            untrained = ", ".join(map(repr, data.untrained_classes(source)[:3]))
            raise ConfigError(
                f"num_classes is {config.objective.num_classes}, but the data has {len(source.classes)} classes"
                + (f" (of {untrained} it has no training images)" if untrained else ""),
                source.describe(),
                f"give --config.objective.num_classes={len(source.classes)}",
            )
    if heldout and len(heldout) < FEW_HELDOUT and config.evals:
        logging.warning(
            "only %d held-out images: their loss and accuracy are rough; hold out more with data.heldout_fraction",
            len(heldout),
        )
    check_evals(config, objective, source, heldout)


def check_evals(config: ConfigDict, objective: Objective, source, heldout) -> None:
    """Raise UserError if the evaluators do not fit the objective or the images."""
    unfit = set(config.evals) - set(objective.evals)
    if unfit:
        raise ConfigError(
            f"objective {config.objective.name} has nothing to evaluate for {', '.join(sorted(unfit))}",
            "config.evals",
            f"choose from {', '.join(sorted(objective.evals))}",
        )
    evals = resolve_evals(config, objective, source, heldout)
    judges = [name for name in sorted(evals) if EVALUATORS[name].needs]
    shared = heldout is not None and data.share_images(source, heldout)
    if shared and not judges:
        warn_once(f"{heldout.describe()}: some held-out images are training images, so the held-out loss is too good")
    if shared and judges:
        raise ConfigError(
            f"some held-out images are training images, so {', '.join(judges)} would be too good",
            f"data.heldout_split={config.data.heldout_split}",
            f"give a split without images of {config.data.split}: data.heldout_fraction of a folder, or train[90%:] of "
            "TFDS; only reconstruction may look at training images, with --config.online_probes=false",
        )
    labeled = [name for name in config.evals if "label" in EVALUATORS[name].needs]
    if labeled and heldout.classes != source.classes:
        fix = "give both the same class folders"
        if source.classes and not heldout.classes:
            own = getattr(source, "root", "") or "only the training images"
            fix = f"{data.how_to_label(heldout)}; or hold a part of the training images out: data.path={own}"
        raise DataError(
            f"the held-out images have {len(heldout.classes) or 'no'} classes, the training images "
            f"{len(source.classes) or 'none'}",
            heldout.describe(),
            fix,
        )
    if labeled and not source.classes:
        raise ConfigError(
            f"{' and '.join(labeled)} need classes, and the images have none",
            source.describe(),
            f"{data.how_to_label(source)}, or remove these evaluators from config.evals",
        )
    if heldout and source.classes and any("label" in EVALUATORS[name].needs for name in evals):
        data.compare_classes(source, heldout, required=bool(labeled))


def resolve_evals(config: ConfigDict, objective: Objective, source, heldout) -> dict[str, dict]:
    """Evaluator options by name: `config.evals`, plus the online probes if the images have two or more classes.

    Classes with fewer than two training images each, on average, cannot be probed.
    """
    evals = {name: dict(options) for name, options in config.evals.items()}
    classes = len(source.classes)
    if config.online_probes and heldout and source.classes == heldout.classes and 1 < classes <= len(source) / 2:
        evals = {name: {} for name in objective.online_probes} | evals
    return evals


def make_evals(
    config: ConfigDict, encoder: Encoder, objective: Objective, pixels: Pixels, sources: tuple, steps: int
) -> Evals:
    """The evaluators of a run, and how often they run. sources: training and held-out images, or None."""
    source, heldout = sources
    options = resolve_evals(config, objective, source, heldout) if source else {}
    if source and config.online_probes and not options.keys() >= set(objective.online_probes):
        unlabeled = next((each for each in (source, heldout) if not each.classes), None)
        need = "they need two or more classes with several images each, the same in training and held-out images"
        log0(f"no online probes: {data.how_to_label(unlabeled) if unlabeled else need}")
    metrics = {metric for name in options for metric in EVALUATORS[name].metrics or (name,)}
    if source and config.keep_best and config.keep_best not in metrics:
        what = f"no evaluation of this run has the metric {config.keep_best!r}"
        raise ConfigError(what, "keep_best", suggest(config.keep_best, metrics) if metrics else "add one to evals")
    return Evals(
        options=options,
        every=evaluation_period(config, options, steps, len(source or ()), len(heldout or ())),
        images=config.eval_images,
        batch_size=config.eval_batch_size,
        crop=data.CenterCrop(
            image_size=config.image_size,
            channels=pixels.channels,
            crop_fraction=config.data.crop_fraction,
            interpolation=config.data.interpolation,
            max_pixels=config.data.max_pixels,
            samples=pixels.samples._replace(max_nodata=1.0),
        ),
        features=make_features(encoder, **pixels.normalization, block=config.probe_block),
    )


def evaluation_period(config: ConfigDict, evals: dict, steps: int, images: int, heldout: int) -> int:
    """Steps between two evaluations; 0: only at the start and the end.

    For `eval_every=-1`, all evaluators together take at most `MAX_EVALUATION_FRACTION` of the run's work and run at
    most `MAX_EVALUATIONS` times, at least `log_every` steps apart. A forward pass counts as a third of a training step.
    """
    if config.eval_every >= 0 or not evals:
        return max(config.eval_every, 0)
    limit = config.eval_images or math.inf
    heldout_passes, train_passes = forward_passes(evals)
    forward = heldout_passes * min(heldout, limit) + train_passes * min(images, limit)
    affordable = MAX_EVALUATION_FRACTION * steps * config.batch_size / max(forward / 3, 1) - 2  # start and end
    count = min(int(affordable), MAX_EVALUATIONS)
    return max(-(-steps // (count + 1)), config.log_every) if count > 0 else 0


def pretrained_settings(record: dict) -> str:
    """A note on settings that only suit pretrained weights; "" if there are none. record: of config.json."""
    notes = []
    if record["optim"]["layer_decay"] < 1:
        notes.append(f"optim.layer_decay {record['optim']['layer_decay']:g} slows the low layers down (1 does not)")
    if record["optim"]["frozen"] or record["optim"]["frozen_layers"]:
        notes.append("optim.frozen freezes random weights")
    return "".join(f"; {note}" for note in notes)
