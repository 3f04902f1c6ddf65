"""The inputs of evaluators, for running and finished runs: `make_eval_inputs`."""

import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Key

from simmim_jax import data
from simmim_jax.errors import Preempted
from simmim_jax.evals import make_evaluator
from simmim_jax.evals.features import jit_on_mesh, make_feature_reader
from simmim_jax.evals.segmentation import make_windows_reader
from simmim_jax.experiment import Experiment, make_keys, make_label_maps
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run
from simmim_jax.runtime import processes, sharding
from simmim_jax.runtime.processes import StopSignal

SIGNAL_CHECK_PERIOD = 16  # batches of an evaluation between two checks for signals, if there are several processes


class Subject(NamedTuple):
    """What is evaluated, and how its images are read.

    key: random key of the evaluation.
    heldout, train: held-out images, and training images for probes.
    limit: number of images; 0: all.
    folder: folder for figures; "": no figures.
    features: (params, images) -> features, for probes.
    pixels: of the images, for pictures.
    label_maps: how label maps are read, for segmentation.
    stop: signal that ends an evaluation early; None: nothing does.
    """

    objective: Objective
    mesh: Mesh
    key: Key[Array, ""]
    heldout: object
    crop: data.CenterCrop
    batch_size: int
    limit: int
    loading: data.Loading
    folder: str = ""
    pixels: data.Pixels = data.Pixels()
    train: object = None
    features: Callable | None = None
    label_maps: data.LabelMapSpec | None = None
    stop: StopSignal | None = None


def make_eval_inputs(subject: Subject) -> dict:
    """The inputs of evaluators, by name. The docstring of `evals` describes them."""
    shard = data.Shard(*sharding.batch_shard(subject.mesh))
    epoch = partial(data.make_epoch, crop=subject.crop, batch_size=subject.batch_size, shard=shard)
    whole_pass = partial(epoch, limit=subject.limit, loading=subject.loading, process_max=processes.process_max)

    def compiled(function: Callable) -> Callable:
        run = jit_on_mesh(function, subject.mesh)
        return stoppable(run, subject.stop) if subject.stop else run

    predict = compiled(lambda params, batch: subject.objective.predict(params, batch, subject.key))
    heldout = whole_pass(subject.heldout)
    inputs = {
        "folder": subject.folder,
        "heldout": heldout,
        "spread": lambda count: epoch(
            subject.heldout, limit=count, loading=subject.loading._replace(max_bad_fraction=1.0)
        ),
        "predict": predict,
        "pixels": subject.pixels,
    }
    if subject.features:
        inputs["features"] = make_feature_reader(
            extract=compiled(
                lambda params, batch: {"features": subject.features(params["encoder"], batch["image"])[0]}
            ),
            train=whole_pass(subject.train),
            heldout=heldout,
        )
    if subject.label_maps:
        inputs |= segmentation_inputs(subject, predict, shard)
    return inputs


def segmentation_inputs(subject: Subject, predict: Callable, shard: data.Shard) -> dict:
    """The inputs of the segmentation evaluator: whole images and their windows."""
    crop, maps = subject.crop, subject.label_maps
    whole = data.SegmentationSet(subject.heldout, crop, maps, limit=subject.limit, loading=subject.loading)
    return {
        "whole": whole,
        "max_bad_images": whole.max_bad_images,
        "window": crop.image_size,
        "window_batch": subject.batch_size,
        "read_windows": make_windows_reader(predict, subject.batch_size, *shard),
        "fill": np.asarray(maps.fill, crop.samples.dtype),
        "classes": subject.heldout.classes,
    }


def make_evaluators(experiment: Experiment, workdir: str, stop: StopSignal) -> dict[str, Callable]:
    """The evaluators of a run: name -> run(state). After a signal they raise Preempted at the next check."""
    evals = experiment.evals
    if not evals.options:
        return {}
    subject = Subject(
        objective=experiment.objective,
        mesh=experiment.mesh,
        key=experiment.keys.eval,
        heldout=experiment.heldout,
        crop=evals.crop,
        batch_size=evals.batch_size,
        limit=evals.images,
        loading=experiment.loading,
        pixels=experiment.pixels,
        folder=str(Path(workdir) / "figures") if processes.is_process_0() else "",
        train=experiment.source,
        features=evals.features,
        label_maps=experiment.batches.label_maps,
        stop=stop,
    )
    inputs = make_eval_inputs(subject)
    if "accuracy" in evals.options:
        inputs["trained"] = data.classes_with_images(experiment.source)
    return {name: make_evaluator(name, inputs, **options) for name, options in evals.options.items()}


def make_run_subject(
    run: Run,
    objective: Objective,
    source,
    *,
    crop: data.CenterCrop,
    batch_size: int,
    limit: int,
    loading: data.Loading,
    folder: str = "",
) -> Subject:
    """The `Subject` of a finished run and the images of `source`, with the masks of the run's own evaluations.

    batch_size: rounded up to a multiple of the number of devices.
    """
    mesh = sharding.make_mesh()
    num_shards = sharding.num_batch_shards(mesh)
    label_maps = None
    if "label_map" in objective.needs:
        label_maps = make_label_maps(objective.num_classes, run.pixels, run.config["data"]["maps"])
    return Subject(
        objective=objective,
        mesh=mesh,
        key=make_keys(run.config.get("seed", 0)).eval,
        heldout=source,
        crop=crop,
        batch_size=-(-batch_size // num_shards) * num_shards,
        limit=limit,
        loading=loading,
        pixels=run.pixels,
        folder=folder,
        label_maps=label_maps,
    )


def stoppable(function: Callable, stop: StopSignal) -> Callable:
    """Wrap a function that all processes call together. Raise Preempted if any of them has received a signal."""
    calls = itertools.count()

    def run(*arguments):
        due = jax.process_count() == 1 or next(calls) % SIGNAL_CHECK_PERIOD == 0
        if due and (signal := processes.process_max(stop.number)):
            raise Preempted(signal, 0)
        return function(*arguments)

    return run
