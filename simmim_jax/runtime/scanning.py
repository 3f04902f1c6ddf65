"""Scanned layers: stack the parameters of equal blocks for `lax.scan`, and unstack them for checkpoints and exports.

`scanned_layers` is an attribute of the encoder. It maps the name of a stack to the names of its blocks, in order:
{"blocks": ("block_0", "block_1", ...)}; {} if nothing is scanned. The functions take any tree that contains such
parameters, like an optimizer state. Its leaves are arrays or `jax.ShapeDtypeStruct`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

ScannedLayers = dict[str, tuple[str, ...]]


def path_name(key_path) -> str:
    """A parameter's path, as names joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def stack(tree: PyTree, scanned_layers: ScannedLayers, join: Callable = jnp.stack) -> PyTree:
    """Stack the blocks of each entry of `scanned_layers` along a new first axis, under the name of the stack."""

    def stacked(parts: dict) -> dict:
        parts = dict(parts)
        for name, blocks in scanned_layers.items():
            if blocks[0] in parts:
                parts[name] = jax.tree.map(lambda *x: _join(x, join), *(parts.pop(block) for block in blocks))
        return parts

    return _where({blocks[0] for blocks in scanned_layers.values()}, stacked, tree)


def unstack(tree: PyTree, scanned_layers: ScannedLayers) -> PyTree:
    """The inverse of `stack`: each block under its own name."""

    def unstacked(parts: dict) -> dict:
        parts = dict(parts)
        for name, blocks in scanned_layers.items():
            if name in parts:
                whole = parts.pop(name)
                parts |= {block: jax.tree.map(lambda x, n=n: _part(x, n), whole) for n, block in enumerate(blocks)}
        return parts

    return _where(set(scanned_layers), unstacked, tree)


def _where(names: set[str], change: Callable[[dict], dict], tree: PyTree) -> PyTree:
    """Replace each dict in `tree` that has one of these names as a key by `change(dict)`."""
    has = lambda x: isinstance(x, dict) and not names.isdisjoint(x)  # noqa: E731
    return jax.tree.map(lambda x: change(x) if has(x) else x, tree, is_leaf=has)


def _join(leaves: tuple, join: Callable):
    first = leaves[0]
    if not isinstance(first, jax.ShapeDtypeStruct):
        return join(leaves)
    return _abstract(first, (len(leaves), *first.shape), lambda spec: (None, *spec))


def _part(x, n: int):
    return x[n] if not isinstance(x, jax.ShapeDtypeStruct) else _abstract(x, x.shape[1:], lambda spec: spec[1:])


def _abstract(x: jax.ShapeDtypeStruct, shape: tuple[int, ...], respecify: Callable) -> jax.ShapeDtypeStruct:
    place = x.sharding
    if isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, PartitionSpec(*respecify(tuple(place.spec))))
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=place)
