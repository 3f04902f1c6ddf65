"""Objectives: what is learned.

The contract. `make_objective(name, encoder, **options)` returns an `Objective` of pure functions:

    init(key) -> params                                    float32; the encoder's own under "encoder"
    loss_fn(params, batch, key, train) -> (loss, metrics)  a float32 scalar to minimize; a dict of float32 scalars, and
                                                           "batch_stats": those of params that training measures and
                                                           does not learn, new (batch norm's; most often none)
    predict(params, batch, key) -> dict                    for evaluators: what it makes of a batch; see each file
    prepare(batch) -> batch                                of a whole batch for training, before it is worked off in
                                                           parts: each image with what its loss needs of others; most
                                                           objectives have none

A batch is a dict of arrays with b in front: "image" uint8 [b, h, w, c], "label" int32 [b] (-1: unlabeled), and
"batch_index" int32 [b], each image's place in the whole batch as the data pipeline has it; of images with label maps also
"label_map" [b, y, x]. Randomness of one image comes
from `key` and its batch_index, so that it does not depend on how the batch is split. `key` is already folded with the
step.

A new objective is one file, and one line in `OBJECTIVES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from simmim_jax.errors import check_options, choose
from simmim_jax.objectives import classify, segment, simmim


class Objective(NamedTuple):
    init: Callable
    loss_fn: Callable
    predict: Callable
    prepare: Callable = lambda batch: batch


OBJECTIVES = {"simmim": simmim.make_simmim, "classify": classify.make_classify, "segment": segment.make_segment}


def make_objective(name: str, encoder: nn.Module, **options) -> Objective:
    """The objective `name` over `encoder`. Raises ConfigError for an unknown name, or options that cannot work."""
    make = choose("objective", name, OBJECTIVES)
    check_options(f"{name} objective", make, options)
    return Objective(*make(encoder, **options))
