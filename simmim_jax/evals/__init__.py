"""Evaluators: metrics of a model.

`make_evaluator(name, eval_inputs, **options)` returns `run(state) -> {metric: float}`. An evaluator receives inputs
such as a compiled function and the images of one pass. It depends on neither config nor model. Its metrics are the
same for any batch size and device count.

An entry of `EVALUATORS` declares which of these `eval_inputs` it takes:

    heldout       one pass over the held-out images: an iterable of batches
    spread        (count) -> a pass over `count` held-out images, evenly spread
    predict       (params, batch) -> dict of numpy arrays: the objective's prediction for the batch, with "label",
                  "batch_index" and "valid" (False for padding rows), for the images of all processes
    features      (state) -> evals.features.Features of training and held-out images
    trained       whether each class has training images: bool [c], or None if that is unknown
    folder        folder for figures, <folder>/<name>_<step>.png; "": no figures
    pixels        `data.pixels.Pixels` of the images: which channels figures show, and with which contrast

and for segmentation:

    whole         the held-out images at full size, each with its label map
    max_bad_images  the number of images in `whole` that may be unreadable; None: any
    window        (height, width) of the model's input
    window_batch  windows per batch
    read_windows  (params, windows) -> logits of the windows
    fill          the pixel value that pads a window
    classes       the names of the classes, or ()

To add an evaluator, write one file, and add one line to `EVALUATORS`.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import NamedTuple

from simmim_jax.errors import choose
from simmim_jax.evals import accuracy, knn, linear, reconstruction, segmentation


class Evaluator(NamedTuple):
    """How an evaluator is made, its inputs, and the cost of one evaluation.

    make: (**eval_inputs, **options) -> run.
    inputs: names of the eval_inputs that it takes.
    needs: entries that the images must have: "label" or "label_map". An evaluator that needs neither uses no ground
        truth. It may therefore also run on training images.
    heldout_passes, train_passes: number of forward passes over the held-out images and the training images.
    metrics: names of its metrics that `keep_best` may ask for; (): its own name.
    """

    make: Callable
    inputs: tuple[str, ...]
    needs: tuple[str, ...] = ()
    heldout_passes: int = 1
    train_passes: int = 0
    metrics: tuple[str, ...] = ()


FEATURES = ("features",)
WINDOWS = ("read_windows", "whole", "window", "window_batch", "fill", "folder", "classes", "max_bad_images", "pixels")
EVALUATORS = {
    "accuracy": Evaluator(
        accuracy.make_accuracy, ("predict", "heldout", "trained"), ("label",), metrics=("top1", "top5")
    ),
    "knn": Evaluator(knn.make_knn, FEATURES, ("label",), train_passes=1),
    "linear": Evaluator(linear.make_linear, FEATURES, ("label",), train_passes=1),
    "reconstruction": Evaluator(
        reconstruction.make_reconstruction,
        ("predict", "heldout", "spread", "folder", "pixels"),
        metrics=("masked_loss",),
    ),
    "segmentation": Evaluator(
        segmentation.make_segmentation, WINDOWS, ("label_map",), metrics=("miou", "pixel_accuracy", "mean_accuracy")
    ),
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
    """Total forward passes of these evaluators over (the held-out images, the training images).

    Features are extracted once for all evaluators that read them.
    """
    evaluators = [EVALUATORS[name] for name in names]
    distinct = {each.inputs if "features" in each.inputs else id(each): each for each in evaluators}.values()
    return sum(each.heldout_passes for each in distinct), sum(each.train_passes for each in distinct)
