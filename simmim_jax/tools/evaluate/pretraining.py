"""Evaluation of a pretraining run: its held-out masked loss, under the masks of the run's own evaluations."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from simmim_jax.evals import make_evaluator
from simmim_jax.evaluation import make_eval_inputs
from simmim_jax.objectives import Objective
from simmim_jax.runs.finished import Run, make_state
from simmim_jax.tools import images
from simmim_jax.tools.cli import Progress, check_output
from simmim_jax.tools.evaluate.classification import make_subject, open_images

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
    subject, count = make_subject(run, objective, source, description, options)
    eval_inputs, progress = make_eval_inputs(subject), Progress("evaluate", count)

    def heldout() -> Iterator[dict]:
        yield from progress.watch(eval_inputs["heldout"])
        images.check_left_out(progress.refused, count, options.max_bad_fraction, source)

    pictures = PICTURES if options.out else 0
    run_evaluator = make_evaluator("reconstruction", eval_inputs | {"heldout": heldout()}, pictures=pictures)
    loss = run_evaluator(make_state(run, subject.mesh))["masked_loss"]
    left_out = f", {progress.refused} left out" if progress.refused else ""
    print(f"masked_loss {loss:.4f} of {count - progress.refused} images{left_out}")
    if options.results:
        print(f"no row in {options.results}: a pretraining run has no classes; {HEADLESS}")
    if options.out:
        print(f"{options.out}: {picture.name}")
