"""How an encoder runs its blocks: in a loop or by `lax.scan`, with rematerialization and stochastic depth.

A block is a separate Linen module that the encoder calls as a pure function of its parameters: block(x, drop, *args)
-> x of the same shape. Blocks of one module differ only in their parameters and their stochastic depth rate.
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
    """Stochastic depth: the probability to keep a branch, a key, and each image's index in the global batch.

    For a whole encoder, `keep` has one number per block, and a block's key is `key` folded with the block's number.
    """

    keep: np.ndarray | np.float32 | Array
    key: Array
    batch_index: Int[Array, " b"]


class Blocks(NamedTuple):
    """Blocks that run one after another.

    modules: Linen modules, used in turn: block n uses modules[n % len(modules)]. They are called with (x, drop, *args).
    names: the names of the blocks' parameters.
    first: the number of the first block in the encoder; keys are folded with these numbers, and `drop` is indexed by
        them.
    scanned_layers: names of the stacked parameters, one per module, to run the blocks by `lax.scan`; (): a loop.
    args: further arguments of each block.
    init_fn: (params, number) -> params; changes a block's initial parameters.
    sow_fn: (output) -> {collection: value} to sow as `intermediates`.
    """

    modules: tuple[nn.Module, ...]
    names: tuple[str, ...]
    first: int = 0
    scanned_layers: tuple[str, ...] = ()
    args: tuple = ()
    init_fn: Callable[[PyTree, Int[Array, ""]], PyTree] = lambda params, _: params
    sow_fn: Callable[[Array], dict[str, Array]] = lambda x: {"blocks": x}

    def numbers(self, kind: int) -> Int[np.ndarray, " n"]:
        """The numbers of the blocks that use modules[kind]."""
        return np.arange(self.first, self.first + len(self.names), dtype=np.int32)[kind :: len(self.modules)]


def drops(
    encoder: nn.Module, train: bool, batch_index: Int[Array, " b"] | None, x: Float[Array, "b ..."]
) -> Drop | None:
    """Stochastic depth of all blocks, drawn from the rng stream "drop_path"; None if nothing is dropped.

    The rate grows linearly from 0 in the first block to `encoder.drop_path` in the last.
    """
    if not train or encoder.drop_path == 0.0:
        return None
    rates = [encoder.drop_path * n / max(encoder.depth - 1, 1) for n in range(encoder.depth)]
    batch_index = jnp.arange(x.shape[0]) if batch_index is None else batch_index
    return Drop(1 - np.asarray(rates, np.float32), encoder.make_rng("drop_path"), batch_index)


def block_drop(drop: Drop | None, number: int) -> Drop | None:
    """Stochastic depth of block `number`; None if it keeps everything."""
    if drop is None or drop.keep[number] == 1.0:
        return None
    return Drop(drop.keep[number], jax.random.fold_in(drop.key, number), drop.batch_index)


def drop_path(x: Float[Array, "b ..."], drop: Drop | None, branch: int) -> Float[Array, "b ..."]:
    """Residual branch number `branch` of a block, set to zero for some images and scaled up for the others.

    Each image draws by its batch_index, so no draw depends on how the batch is split (Huang et al. 2016, arXiv
    1603.09382).
    """
    if drop is None:
        return x
    key = jax.random.fold_in(drop.key, branch)
    kept = jax.vmap(lambda n: jax.random.bernoulli(jax.random.fold_in(key, n), drop.keep))(drop.batch_index)
    return jnp.where(jnp.expand_dims(kept, range(1, x.ndim)), x / drop.keep, 0.0)


def keep_products(primitive, *_, **params) -> bool:
    """The policy "dots": keep convolutions and products with weights, but not those of attention, which are batched."""
    if primitive is jax.lax.conv_general_dilated_p:
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *_, **params)


def remat_options(remat: str, scanned: bool = False) -> dict:
    """Options of `jax.checkpoint` and `nn.remat`. "full" keeps block inputs; "dots" also those of `keep_products`."""
    return {"policy": keep_products if remat == "dots" else None, "prevent_cse": not scanned}


def run_blocks(
    encoder: nn.Module, x: Float[Array, "b ..."], blocks: Blocks, *, key: Array | None, drop: Drop | None
) -> Float[Array, "b ..."]:
    """The output of the last block. Each block's output is sown by `blocks.sow_fn`.

    key: for initial parameters; None unless the encoder is being initialized. Scan and loop have equal initial values.
    """
    if key is not None:
        _init_blocks(encoder, x, blocks, key)
    modules, scanned_layers = blocks.modules, blocks.scanned_layers

    def apply(block, params, x, drop):
        return along_batch(block.apply({"params": params}, along_batch(x), drop, *blocks.args))

    steps = [partial(apply, block) for block in modules]
    if encoder.remat in ("full", "dots"):
        steps = [jax.checkpoint(step, **remat_options(encoder.remat, bool(scanned_layers))) for step in steps]

    def sow(x):
        for collection, value in blocks.sow_fn(x).items():
            encoder.sow("intermediates", collection, value)

    if not scanned_layers:
        for n, name in enumerate(blocks.names):
            params = encoder.get_variable("params", name)
            x = steps[n % len(modules)](params, x, block_drop(drop, blocks.first + n))
            sow(x)
        return x

    sows = encoder.is_mutable_collection("intermediates")

    def turn(x, scanned):  # one block of each module
        outputs = []
        for step, (params, number, keep) in zip(steps, scanned, strict=True):
            own = None if drop is None else Drop(keep, jax.random.fold_in(drop.key, number), drop.batch_index)
            x = step(params, x, own)
            outputs.append(x)
        return x, outputs if sows else None

    numbers = [blocks.numbers(kind) for kind in range(len(modules))]
    scanned = [
        (encoder.get_variable("params", stack), own, None if drop is None else drop.keep[own])
        for stack, own in zip(scanned_layers, numbers, strict=True)
    ]
    x, outputs = jax.lax.scan(turn, x, scanned)
    for n in range(len(blocks.names)) if sows else ():
        sow(outputs[n % len(modules)][n // len(modules)])
    return x


def _init_blocks(encoder: nn.Module, x: Float[Array, "b ..."], blocks: Blocks, key: Array) -> None:
    """Put the blocks' initial parameters into the encoder's.

    They are always computed stacked, and cut apart for a loop. This takes one program for any depth, and gives the same
    values either way.
    """
    for kind, block in enumerate(blocks.modules):
        numbers = blocks.numbers(kind)
        if not len(numbers):
            continue

        def initial(number, block=block):
            block_key = jax.random.fold_in(key, number)
            params = block.init(block_key, jnp.zeros(x.shape, x.dtype), None, *blocks.args)["params"]
            return blocks.init_fn(params, number)

        stack = jax.lax.map(initial, numbers)
        if blocks.scanned_layers:
            encoder.param(blocks.scanned_layers[kind], lambda _, stack=stack: stack)
            continue
        for n, name in enumerate(blocks.names[kind :: len(blocks.modules)]):
            encoder.param(name, lambda _, stack=stack, n=n: jax.tree.map(lambda leaf: leaf[n], stack))
