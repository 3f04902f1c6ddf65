"""Evaluators: how good a model is.

The contract. `make_evaluator(name, eval_inputs, **options)` returns `run(state) -> {metric: float}`. An evaluator
receives what it evaluates (a compiled function, the images of one pass) and knows neither config nor model. Its metrics
are the same for any batch size and device count.

An entry of `EVALUATORS` declares the `eval_inputs` that it takes, out of these:

    heldout       one pass over the held-out images: an iterable of batches
    spread        (count) -> a pass over `count` held-out images, evenly spread
    predict       (params, batch) -> dict of numpy arrays: the objective's prediction for the batch, with "label",
                  "batch_index" and "valid" (False for rows that only fill up the batch), for all processes' images
    features      (state) -> evals.features.Features of training and held-out images
    folder        where figures are written: <folder>/<name>_<step>.png; "" for no figures

and for segmentation:

    whole         the held-out images at full size, each with its label map
    max_bad_images  the number of images in `whole` that may be unreadable; None: any
    window        (height, width) of the model's input
    window_batch  windows per batch
    read_windows  (params, windows) -> their logits
    fill          the pixel value that pads a window
    classes       the names of the classes, or ()

A new evaluator is one file, and one entry in `EVALUATORS`.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

from simmim_jax.errors import choose
from simmim_jax.evals import accuracy, knn, linear, reconstruction, segmentation


class Evaluator(NamedTuple):
    """How an evaluator is made, what it needs, and what one evaluation costs.

    make: (**eval_inputs, **options) -> run.
    inputs: the names of the eval_inputs that it takes.
    needs: the entries that the images must have: "label" or "label_map". One without any uses no ground truth, so that
        it may also look at images that were trained on.
    heldout_passes, train_passes: forward passes over the held-out and over the training images.
    """

    make: Callable
    inputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    heldout_passes: int = 1
    train_passes: int = 0


FEATURES = ("features",)
WINDOWS = ("read_windows", "whole", "window", "window_batch", "fill", "folder", "classes", "max_bad_images")
EVALUATORS = {
    "accuracy": Evaluator(accuracy.make_accuracy, ("predict", "heldout"), ("label",)),
    "knn": Evaluator(knn.make_knn, FEATURES, ("label",), train_passes=1),
    "linear": Evaluator(linear.make_linear, FEATURES, ("label",), train_passes=1),
    "reconstruction": Evaluator(reconstruction.make_reconstruction, ("predict", "heldout", "spread", "folder")),
    "segmentation": Evaluator(segmentation.make_segmentation, WINDOWS, ("label_map",)),
}


def make_evaluator(name: str, eval_inputs: dict, **options) -> Callable:
    """The evaluator `name`. Raises ConfigError for an unknown name or option."""
    evaluator = choose("evaluator", name, EVALUATORS)
    known = set(inspect.signature(evaluator.make).parameters) - set(evaluator.inputs)
    for option in options:
        choose(f"{name} evaluator option", option, known)
    given = {each: eval_inputs[each] for each in evaluator.inputs if each in eval_inputs}
    return evaluator.make(**given, **options)


def forward_passes(names: Iterable[str]) -> tuple[int, int]:
    """Forward passes over (the held-out images, the training images) that these evaluators take together.

    Features are extracted once for all evaluators that read them.
    """
    evaluators = [EVALUATORS[name] for name in names]
    distinct = {each.inputs if "features" in each.inputs else id(each): each for each in evaluators}.values()
    return sum(each.heldout_passes for each in distinct), sum(each.train_passes for each in distinct)
