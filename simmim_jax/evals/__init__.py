"""Evaluators: how good it is.

The contract. `make_evaluator(name, eval_inputs, **options)` returns `run(state) -> {metric: float}`. An evaluator receives
what it evaluates (a compiled function, the images of one pass) and knows neither config nor model. Its metrics are the
same for any batch size and device count. Supplies, of which each evaluator's signature picks what it needs:

    heldout     one pass over the held-out images: iterable of batches
    spread      (count) -> a pass over so many of them, spread evenly
    predict     (params, batch) -> dict of numpy arrays: what the objective makes of the batch, and of the same images
                "label", "batch_index" and "valid" (false where a batch is filled up); of all processes' images
    features    (state) -> evals.features.Features of training and held-out images
    folder      where figures go: <folder>/<name>_<step>.png

Of segmentation besides: whole, the held-out images, as large as they are, with their maps; window, (height, width) of
what the model takes; window_batch, how many of these at a time; read_windows, (params, windows) -> their logits; fill,
a pixel, with which windows are padded; classes, their names; and most_bad, how many of `whole` may be left out.

A new evaluator is one file, and one line in `EVALUATORS`.
"""

import inspect
from collections.abc import Callable

from simmim_jax.errors import check_options, choose
from simmim_jax.evals import accuracy, knn, linear, reconstruction, segmentation

EVALUATORS = {
    "accuracy": accuracy.make_accuracy,
    "knn": knn.make_knn,
    "linear": linear.make_linear,
    "reconstruction": reconstruction.make_reconstruction,
    "segmentation": segmentation.make_segmentation,
}


def make_evaluator(name: str, eval_inputs: dict, **options) -> Callable:
    """The evaluator `name`. Raises ConfigError for an unknown name."""
    make = choose("evaluator", name, EVALUATORS)
    wanted = inspect.signature(make).parameters
    check_options(f"{name} evaluator", make, options)
    return make(**{supply: value for supply, value in eval_inputs.items() if supply in wanted}, **options)
