"""Objectives: training losses, with the heads that they need.

`make_objective(name, encoder, **options)` returns an `Objective`: four pure functions and their properties. Code
outside this folder depends on these properties, never on the name of an objective.

A batch is a dict of arrays with the image axis b first:

    image        uint8, uint16, int16 or float32 [b, y, x, c], as stored
    label        int32 [b]; -1 means unlabeled
    label_map    unsigned integers [b, y, x], for images with label maps
    batch_index  int32 [b], the index of each image in the global batch

`params` is a dict of float32 arrays. The encoder's own parameters are under "encoder".

Random numbers come from `key`. The training step has already folded the step number into it. An objective first splits
it into named streams, and folds the `batch_index` of an image into a stream before it draws. No random number then
depends on how the batch is split over devices, processes and microbatches.

    simmim    mask_key, drop_key = split(key)
    classify  drop_key = key; erase_key, mix_key = split(fold_in(key, 1))
    segment   drop_key, head_key = split(key)

To add an objective, write one file, and add one line to `OBJECTIVES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import check_options, choose
from simmim_jax.objectives import classify, segment, simmim


class Objective(NamedTuple):
    """The functions and properties of an objective. Each objective's `make_*` function returns a dict of these fields.

    Functions:
      init: (key) -> params.
      loss_fn: (params, batch, key, train) -> (loss, metrics). The loss is a float32 scalar to minimize. metrics is a
        dict of float32 scalars, plus "batch_stats": new values of the parameters that are measured, not learned, such
        as batch norm's running mean. "batch_stats" is empty for most encoders.
      predict: (params, batch, key) -> dict of arrays with the keys `outputs`, for evaluators.
      prepare: (batch) -> batch. Runs on a whole training batch before it is split into microbatches. It adds the
        entries that the loss of an image needs from other images, such as a Mixup partner.

    Properties:
      needs: batch entries that `loss_fn` reads in addition to "batch_index": some of "image", "label", "label_map".
      outputs: keys of the dict that `predict` returns.
      evals: names of the evaluators that fit this objective.
      online_probes: those of `evals` that `config.online_probes` enables for images with classes.
      num_classes: number of classes of labels or label maps; 0 for self-supervised objectives.
    """

    init: Callable
    loss_fn: Callable
    predict: Callable
    prepare: Callable = lambda batch: batch
    needs: tuple[str, ...] = ("image",)
    outputs: tuple[str, ...] = ()
    evals: tuple[str, ...] = ()
    online_probes: tuple[str, ...] = ()
    num_classes: int = 0


OBJECTIVES = {  # name: (make function, options class)
    "classify": (classify.make_classify, classify.Options),
    "segment": (segment.make_segment, segment.Options),
    "simmim": (simmim.make_simmim, simmim.Options),
}


def make_objective(
    name: str,
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None = None,
    **options,
) -> Objective:
    """The objective `name` of `encoder`, for images of `image_size` (height, width) in pixels.

    mean, std: per channel, on the scale 0..1. scale: how stored samples become 0..1; None: they are divided by 255.
    options: fields of the objective's `Options`.
    Raises ConfigError for an unknown name or option, or for invalid values.
    """
    make, options_class = choose("objective", name, OBJECTIVES)
    check_options(f"{name} objective", options_class, options)
    pixels = {"mean": mean, "std": std, "scale": scale}
    return Objective(**make(encoder, image_size=image_size, **pixels, options=options_class(**options)))
