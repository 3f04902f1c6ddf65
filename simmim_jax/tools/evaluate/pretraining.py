"""Evaluation of a pretraining run: its held-out masked loss, under the masks of the run's own evaluations."""

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from simmim_jax import train
from simmim_jax.evals import make_evaluator
from simmim_jax.evals.features import jit_on_mesh
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run, make_state
from simmim_jax.runtime import sharding
from simmim_jax.tools import images
from simmim_jax.tools.cli import Progress, check_output
from simmim_jax.tools.evaluate.classification import open_images
from simmim_jax.tools.evaluate.results import model_name

HEADLESS = "fine-tune or probe it first (configs/folder_finetune.py, configs/folder_linear.py)"
PICTURES = 8  # reconstructions on the sheet


def evaluate_pretraining(run: Run, objective: Objective, options: argparse.Namespace) -> None:
    """Print the loss; with --out draw reconstructions."""
    if options.limit is None:
        own = not options.data or images.is_own(run, options.data)
        options.limit = run.config.get("eval_images", 0) if own else 0
    source, description = open_images(run, options)
    picture = Path(options.out) / f"reconstruction_{run.step}.png"
    if options.out:
        check_output(picture, overwrite=options.overwrite)
    crop = images.crop_options(run, options.crop_fraction, options.interpolation)
    print(f"{model_name(run)} at step {run.step}, {description}: {images.describe_crop(run, **crop)}", flush=True)
    mesh, (_, _, key) = sharding.make_mesh(), train.make_keys(run.config.get("seed", 0))
    make_pass = partial(images.make_pass, run, source, mesh)
    count = min(options.limit or len(source), len(source))
    progress = Progress("evaluate", count)

    def heldout() -> Iterator[dict]:
        yield from progress.watch(make_pass(**images.pass_options(options)))
        images.check_left_out(progress.refused, count, options.max_bad_fraction, source)

    eval_inputs = {
        "predict": jit_on_mesh(lambda params, batch: objective.predict(params, batch, key), mesh),
        "heldout": heldout(),
        "spread": lambda pictures: make_pass(**images.pass_options(options) | {"limit": pictures}),
        "folder": options.out,
    }
    run_evaluator = make_evaluator("reconstruction", eval_inputs, pictures=PICTURES if options.out else 0)
    loss = run_evaluator(make_state(run, mesh))["masked_loss"]
    left_out = f", {progress.refused} left out" if progress.refused else ""
    print(f"masked_loss {loss:.4f} of {count - progress.refused} images{left_out}")
    if options.results:
        print(f"no row in {options.results}: a pretraining run has no classes; {HEADLESS}")
    if options.out:
        print(f"{options.out}: {picture.name}")
