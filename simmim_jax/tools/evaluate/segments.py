"""Runs of segmentation at work: the classes of an image's pixels, and how good they are over images with maps.

In all of it, `model` is a run of objective segment. Images are scaled, cut into windows and put together as the run's
own evaluation does it. Shape letters: h w pixels of an image, c channels.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
from jaxtyping import Int, UInt8

from simmim_jax import data, train
from simmim_jax.data.sources.label_maps import TRAINING
from simmim_jax.errors import ConfigError
from simmim_jax.evals import make_evaluator
from simmim_jax.evals.features import jit_on_mesh
from simmim_jax.evals.segmentation import paint, segment_all
from simmim_jax.evals.sheet import to_rgb
from simmim_jax.runs import finished
from simmim_jax.runs.finished import Run
from simmim_jax.runtime import sharding
from simmim_jax.tools.images import open_heldout

ROWS = 256  # of an image that are painted at a time
GAP = 8  # pixels between a photograph and its overlay


def segment_images(model: Run, source) -> Iterator[tuple[int, Int[np.ndarray, "h w"], int]]:
    """(place in `source`, the class of each pixel, how many classes there are) of each image that can be read."""
    eval_inputs, state = make_eval_inputs(model, source)
    read = partial(eval_inputs["read_windows"], state.params)
    cut = (eval_inputs[name] for name in ("whole", "window", "window_batch", "fill"))
    for record, prediction, num_classes in segment_all(read, *cut, evaluation_of(model).get("step", 0)):
        yield record["index"], prediction, num_classes


def overlay(
    image: UInt8[np.ndarray, "h w c"], prediction: Int[np.ndarray, "h w"], num_classes: int
) -> UInt8[np.ndarray, "h _ 3"]:
    """An image, and beside it the same under the colors of its classes."""
    parts = []
    for first in range(0, len(image), ROWS):  # a photograph as numbers of eight bytes is large
        rows = (to_rgb(image[first : first + ROWS] / 255) * 255).round().astype(np.uint8)
        gap = np.full((len(rows), GAP, 3), 255, np.uint8)
        parts.append(np.concatenate([rows, gap, paint(rows, prediction[first : first + ROWS], num_classes)], axis=1))
    return np.concatenate(parts)


def evaluate(model: Run, options: argparse.Namespace) -> dict[str, float]:
    """Print how good the run is on images with maps, and with --out write the table of classes and some overlays.

    options: those of the tool `evaluate`. Gives the metrics of `evals.segmentation`: those of the run's own evaluation,
    where the images are its own.
    """
    if options.crop_fraction is not None:
        raise ConfigError("--crop-fraction of a run of segment", "command line", "leave it out: images are taken whole")
    own = not options.data or finished.is_own(model, options.data)
    source = open_pairs(model, options, own=own)
    limit = options.limit if options.limit is not None else model.config["eval_images"] if own else 0
    chosen = {name: value for name in ("interpolation", "threads") if (value := getattr(options, name))}
    eval_inputs, state = make_eval_inputs(
        model, source, batch_size=options.batch_size, limit=limit, max_bad_fraction=options.max_bad_fraction,
        on_error="replace", **chosen,
    )  # fmt: skip
    whole, known = eval_inputs["whole"], tuple(model.config.get("classes") or ())
    data.check_maps(source, whole.maps, model.channels, model.config["data"]["max_pixels"])
    if told := finished.other_class(known, source):
        print(f"warning: {told}", file=sys.stderr)
    height, width = model.image_size
    print(f"{options.run} at step {model.step}, {source.describe()}: windows of {height} x {width} pixels", flush=True)
    eval_inputs |= {"folder": options.out, "classes": tuple(source.classes) or known}
    metrics = make_evaluator("segmentation", eval_inputs, **evaluation_of(model))(state)
    left_out = len(whole) - int(metrics["images"])
    told = "  ".join(f"{name} {metrics[name]:.6f}" for name in ("miou", "pixel_accuracy", "mean_accuracy"))
    print(f"{told}  of {metrics['images']:.0f} images" + (f", {left_out} left out" if left_out else ""))
    if options.results:
        print(f"no row in {options.results}: it has no column for mIoU")
    if options.out:
        written = sorted(path.name for path in Path(options.out).glob(f"segmentation*{model.step}.png"))
        print(f"{options.out}: {', '.join(['segmentation.csv', *written])}")
    return metrics


def evaluation_of(model: Run) -> dict:
    """The options of the run's own evaluation."""
    return model.config.get("evals", {}).get("segmentation") or {}


def make_eval_inputs(
    model: Run, source, *, batch_size: int = 0, limit: int = 0, **of_data
) -> tuple[dict, SimpleNamespace]:
    """What the evaluator of segmentation asks for, as in the run, and the state that it is given.

    batch_size: of windows, at most; 0: as in the run. It becomes a multiple of what the devices need.
    """
    mesh, key = sharding.make_mesh(), jax.random.key(0)
    ways, windows = sharding.num_batch_shards(mesh), model.config["eval_batch_size"]
    windows = min(batch_size or windows, windows)
    config = model.config | {
        "image_size": model.image_size, "eval_batch_size": -(-windows // ways) * ways, "eval_images": limit,
        "data": model.config["data"] | of_data,
    }  # fmt: skip
    objective = finished.objective_of(model)
    predict = jit_on_mesh(lambda params, batch: objective.predict(params, batch, key), mesh)
    eval_inputs = train.segmentation_inputs(config, predict, source, *sharding.batch_shard(mesh))
    return eval_inputs, SimpleNamespace(step=model.step, params=jax.device_put(model.params, sharding.replicated(mesh)))


def open_pairs(model: Run, options: argparse.Namespace, *, own: bool):
    """The images with maps to evaluate on; see `heldout.open_heldout`."""

    def to_train_on(source) -> bool:
        below = os.path.relpath(source.map_root, os.path.abspath(os.path.expanduser(options.data)))
        return bool({name.casefold() for name in below.split(os.sep)} & set(TRAINING))

    make = partial(data.make_label_map_source, **finished.source_options(model, options.data, 0.0))
    return open_heldout(model, options, make, to_train_on, own=own)
