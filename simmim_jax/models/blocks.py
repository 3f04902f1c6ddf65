"""How an encoder runs its blocks: one after another or by `lax.scan`, what of them the backward pass computes again,
and what stochastic depth draws.

A block is a Linen module of its own that the encoder calls as a pure function of its parameters: block(x, drop, ...) ->
x of the same shape. Blocks of one `kind` differ in nothing but their parameters and their rate of stochastic depth.
Shape letters: b images; "..." tokens or a map of them, and their width.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from simmim_jax.runtime.sharding import along_batch

REMAT = ("none", "full", "dots")


class Drop(NamedTuple):
    """Stochastic depth of one block: the probability to keep a branch, a key, and each image's place in the batch.

    Of a whole encoder: `keep` has a number for each block, and each block's key is `key` folded with its number.
    """

    keep: np.ndarray | np.float32 | Array
    key: Array
    batch_index: Int[Array, " b"]


def drops(
    encoder: nn.Module, train: bool, batch_index: Int[Array, " b"] | None, x: Float[Array, "b ..."]
) -> Drop | None:
    """What all blocks of an encoder drop by, from its rng stream "drop_path"; None where none drops.

    The rate grows linearly from 0 in the first block to the encoder's `drop_path` in the last. x: what they are of.
    """
    if not train or encoder.drop_path == 0.0:
        return None
    rates = [encoder.drop_path * n / max(encoder.depth - 1, 1) for n in range(encoder.depth)]
    batch_index = jnp.arange(x.shape[0]) if batch_index is None else batch_index
    return Drop(1 - np.asarray(rates, np.float32), encoder.make_rng("drop_path"), batch_index)


def drop_of(drop: Drop | None, number: int) -> Drop | None:
    """Of an encoder's `drops` those of block `number`; None where it keeps everything."""
    if drop is None or drop.keep[number] == 1.0:
        return None
    return Drop(drop.keep[number], jax.random.fold_in(drop.key, number), drop.batch_index)


def drop_path(x: Float[Array, "b ..."], drop: Drop | None, branch: int) -> Float[Array, "b ..."]:
    """Residual branch number `branch` of a block, all zero for some images, and scaled up for the others.

    Each image draws by its batch_index in the whole batch, so that no draw depends on how the batch is split (Huang et al.
    2016, arXiv 1603.09382).
    """
    if drop is None:
        return x
    key = jax.random.fold_in(drop.key, branch)
    kept = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place), drop.keep))(drop.batch_index)
    return jnp.where(jnp.expand_dims(kept, range(1, x.ndim)), x / drop.keep, 0.0)


def keep_products(primitive, *_, **params) -> bool:
    """What policy "dots" keeps: products with weights and convolutions; not those of attention, which have batches."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *_, **params)


def remat_options(remat: str, scanned: bool = False) -> dict:
    """The options of `jax.checkpoint` and `nn.remat` for a policy by name: "full" or "dots".

    "full" keeps a block's input alone, and "dots" what `keep_products` says too.
    """
    return {"policy": keep_products if remat == "dots" else None, "prevent_cse": not scanned}


def run_blocks(
    encoder: nn.Module,
    x: Float[Array, "b ..."],
    kinds: tuple[nn.Module, ...],
    names: tuple[str, ...],
    *,
    first: int = 0,
    scanned_layers: tuple[str, ...] = (),
    key: Array | None,
    drop: Drop | None,
    given: tuple = (),
    adapt: Callable[[PyTree, Int[Array, ""]], PyTree] = lambda params, _: params,
    seen: Callable[[Array], dict[str, Array]] = lambda x: {"blocks": x},
) -> Float[Array, "b ..."]:
    """What becomes of `x` in the blocks `names`; what is `seen` of each block's output is sown as `intermediates`.

    kinds: the modules of the blocks, in turns. A module is called with (x, its Drop, *given).
    first: the number of the first of these blocks in the encoder, by which keys are folded and `drop` is indexed.
    scanned_layers: the subtree of the encoder's parameters for each kind, where its blocks are stacked and scanned over; else
        each block's parameters have its own name.
    key: which initial values are drawn from; None but while the encoder is initialized. They are the same however
        the blocks run. `adapt` makes them out of a module's own and the block's number.
    seen: what is sown of an output, by name.
    """
    numbers = np.arange(first, first + len(names), dtype=np.int32)
    by_kind = [numbers[kind :: len(kinds)] for kind in range(len(kinds))]
    if key is not None:
        _init_blocks(encoder, x, kinds, names, by_kind, scanned_layers, key, given, adapt)

    def apply(block, params, x, drop):
        return along_batch(block.apply({"params": params}, along_batch(x), drop, *given))

    steps = [partial(apply, block) for block in kinds]
    if encoder.remat in ("full", "dots"):
        steps = [jax.checkpoint(step, **remat_options(encoder.remat, bool(scanned_layers))) for step in steps]

    def sow(x):
        for collection, value in seen(x).items():
            encoder.sow("intermediates", collection, value)

    if not scanned_layers:
        for n, name in enumerate(names):
            params = encoder.get_variable("params", name)
            x = steps[n % len(kinds)](params, x, drop_of(drop, first + n))
            sow(x)
        return x

    sows = encoder.is_mutable_collection("intermediates")

    def turn(x, scanned):  # a block of each kind
        outputs = []
        for step, (params, number, keep) in zip(steps, scanned, strict=True):
            own = None if drop is None else Drop(keep, jax.random.fold_in(drop.key, number), drop.batch_index)
            x = step(params, x, own)
            outputs.append(x)
        return x, outputs if sows else None

    scanned = [
        (encoder.get_variable("params", stack), of_kind, None if drop is None else drop.keep[of_kind])
        for stack, of_kind in zip(scanned_layers, by_kind, strict=True)
    ]
    x, outputs = jax.lax.scan(turn, x, scanned)
    for n in range(len(names)) if sows else ():
        sow(outputs[n % len(kinds)][n // len(kinds)])
    return x


def _init_blocks(encoder, x, kinds, names, by_kind, scanned_layers, key, given, adapt) -> None:
    """Put the initial parameters of the blocks into the encoder's.

    Always as scanned_layers, of which single blocks are cut: one program, whatever the depth, and the same values.
    """
    for kind, (block, numbers) in enumerate(zip(kinds, by_kind, strict=True)):
        if not len(numbers):
            continue

        def initial(number, block=block):
            params = block.init(jax.random.fold_in(key, number), jnp.zeros(x.shape, x.dtype), None, *given)["params"]
            return adapt(params, number)

        stack = jax.lax.map(initial, numbers)
        if scanned_layers:
            encoder.param(scanned_layers[kind], lambda _, stack=stack: stack)
            continue
        for n, name in enumerate(names[kind :: len(kinds)]):
            encoder.param(name, lambda _, stack=stack, n=n: jax.tree.map(lambda leaf: leaf[n], stack))
