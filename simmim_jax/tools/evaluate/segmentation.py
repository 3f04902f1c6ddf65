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
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run, format_size
from simmim_jax.tools import images
from simmim_jax.tools.cli import check_output
from simmim_jax.tools.evaluate.classification import is_table


def evaluate_segmentation(run: Run, objective: Objective, options: argparse.Namespace) -> dict[str, float]:
    """Print mIoU and accuracies; with --out write the table of classes and some overlays. Return the metrics.

    On the run's own images, the metrics are those of the run's own evaluation.
    """
    if options.crop_fraction is not None:
        raise ConfigError(
            "--crop-fraction of a segmentation run", "command line", "leave it out: images are not cropped"
        )
    source = open_pairs(run, options)
    own = not options.data or images.is_own(run, options.data)
    settings = images.segmentation_settings(run)
    chosen = {name: value for name in ("interpolation", "threads") if (value := getattr(options, name))}
    eval_inputs, state = images.make_segmentation_inputs(
        run, objective, source, batch_size=options.batch_size,
        limit=options.limit if options.limit is not None else run.config["eval_images"] if own else 0,
        max_bad_fraction=options.max_bad_fraction, on_error="replace", **chosen,
    )  # fmt: skip
    whole, known = eval_inputs["whole"], tuple(run.config.get("classes") or ())
    data.check_maps(source, whole.maps, run.channels, run.config["data"]["max_pixels"])
    images.warn_other_classes(known, source)
    names = ["segmentation.csv"] + [f"segmentation_{run.step}.png"] * bool(settings.get("pictures", 8))
    for name in names if options.out else ():
        check_output(
            Path(options.out) / name, overwrite=options.overwrite,
            **({"is_ours": is_table} if name.endswith(".csv") else {}),
        )  # fmt: skip
    size = format_size(run.image_size)
    print(f"{options.run} at step {run.step}, {source.describe()}: windows of {size} pixels", flush=True)
    eval_inputs |= {"folder": options.out, "classes": tuple(source.classes) or known}
    metrics = make_evaluator("segmentation", eval_inputs, **settings)(state)
    left_out = len(whole) - int(metrics["images"])
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
