"""Evaluation of a segmentation run on images with label maps.

Images are scaled, cut into windows and put together as in the run's own evaluation.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from simmim_jax import data
from simmim_jax.data.sources.label_maps import TRAINING
from simmim_jax.errors import ConfigError
from simmim_jax.evals import make_evaluator
from simmim_jax.evaluation import make_eval_inputs, make_run_subject
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run, format_size, make_state
from simmim_jax.tools import images
from simmim_jax.tools.cli import check_output, has_mark
from simmim_jax.tools.evaluate.classification import is_table


def evaluate_segmentation(run: Run, objective: Objective, options: argparse.Namespace) -> dict[str, float]:
    """Print mIoU and accuracies; with --out write the table of classes and some overlays. Return the metrics.

    On the run's own images, the metrics are those of the run's own evaluation.
    """
    if options.crop_fraction is not None:
        what = "--crop-fraction of a segmentation run"
        raise ConfigError(what, "command line", "leave it out: images are not cropped")
    source = open_pairs(run, options)
    own = not options.data or images.is_own(run, options.data)
    threads = run.config["data"]["threads"] if options.threads is None else options.threads
    subject = make_run_subject(
        run,
        objective,
        source,
        crop=images.make_crop(run, 1.0, options.interpolation),
        batch_size=min(options.batch_size, run.config["eval_batch_size"]),
        limit=options.limit if options.limit is not None else run.config["eval_images"] if own else 0,
        loading=images.make_loading(threads, options.max_bad_fraction),
        folder=options.out,
    )
    eval_inputs, known = make_eval_inputs(subject), tuple(run.config.get("classes") or ())
    data.check_maps(source, subject.label_maps, run.channels, subject.crop.max_pixels, run.pixels.samples)
    images.warn_other_classes(known, source)
    settings = run.config.get("evals", {}).get("segmentation") or {}
    names = ["segmentation.csv"] + [f"segmentation_{run.step}.png"] * bool(settings.get("pictures", 8))
    for name in names if options.out else ():
        is_ours = is_table if name.endswith(".csv") else has_mark
        check_output(Path(options.out) / name, overwrite=options.overwrite, is_ours=is_ours)
    size = format_size(run.image_size)
    print(f"{options.run} at step {run.step}, {source.describe()}: windows of {size} pixels", flush=True)
    eval_inputs["classes"] = tuple(source.classes) or known
    metrics = make_evaluator("segmentation", eval_inputs, **settings)(make_state(run, subject.mesh))
    left_out = len(eval_inputs["whole"]) - int(metrics["images"])
    numbers = "  ".join(f"{name} {metrics[name]:.6f}" for name in ("miou", "pixel_accuracy", "mean_accuracy"))
    print(f"{numbers}  of {metrics['images']:.0f} images" + (f", {left_out} left out" if left_out else ""))
    if options.results:
        print(f"no row in {options.results}: it has no column for mIoU")
    if options.out:
        print(f"{options.out}: {', '.join(names)}")
    return metrics


def open_pairs(run: Run, options: argparse.Namespace):
    """The images with label maps to evaluate on; see `images.open_heldout`."""

    def is_training(source) -> bool:
        below = os.path.relpath(source.map_root, os.path.abspath(os.path.expanduser(options.data)))
        return bool({name.casefold() for name in below.split(os.sep)} & set(TRAINING))

    make = partial(data.make_label_map_source, **images.source_options(run, options.data, 0.0))
    return images.open_heldout(run, options, make, is_training)
