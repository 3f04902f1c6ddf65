"""Objectives: what is learned.

The contract. `make_objective(name, encoder, **options)` returns an `Objective` of three pure functions:

    init(key) -> params                                    float32; the encoder's own under "encoder"
    loss_fn(params, batch, key, train) -> (loss, metrics)  a float32 scalar to minimise; a dict of float32 scalars, and
                                                           "statistics": those of params that training measures and
                                                           does not learn, new (batch norm's; most often none)
    predict(params, batch, key) -> dict                    for evaluators: what it makes of a batch; see each file

A batch is a dict of arrays with b in front: "image" uint8 [b, h, w, c], "label" int32 [b] (-1: unlabelled), and
"position" int32 [b], each image's place in the whole batch as the data pipeline has it. Randomness of one image comes
from `key` and its position, so that it does not depend on how the batch is split. `key` is already folded with the
step.

A new objective is one file, and one line in `OBJECTIVES`.
"""

from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn

from simmim_jax.errors import check_options, choose
from simmim_jax.objectives import classify, simmim


class Objective(NamedTuple):
    init: Callable
    loss_fn: Callable
    predict: Callable


OBJECTIVES = {"simmim": simmim.make_simmim, "classify": classify.make_classify}


def make_objective(name: str, encoder: nn.Module, **options) -> Objective:
    """The objective `name` over `encoder`. Raises ConfigError for an unknown name, or options that cannot work."""
    make = choose("objective", name, OBJECTIVES)
    check_options(f"{name} objective", make, options)
    return Objective(*make(encoder, **options))
