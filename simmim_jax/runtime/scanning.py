"""Parameters of equal blocks, one by one or as one stack: on the disk and for others they are the former, in the memory
of a run that scans over its blocks the latter.

`stacks` is what an encoder says: {"blocks": ("block_0", "block_1", ...)}, the name of a stack and those of its blocks
in order; empty where nothing is stacked. The functions take any tree that holds such parameters, as moments do, and of
arrays as of `jax.ShapeDtypeStruct`.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import PyTree

ScannedLayers = dict[str, tuple[str, ...]]


def path_name(key_path) -> str:
    """The names of a parameter's path, joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def stack(tree: PyTree, scanned_layers: ScannedLayers, join: Callable = jnp.stack) -> PyTree:
    """`tree` with the blocks of each stack as one subtree, whose leaves have a new first axis, of the blocks."""

    def stacked(parts: dict) -> dict:
        parts = dict(parts)
        for name, blocks in scanned_layers.items():
            if blocks[0] in parts:
                parts[name] = jax.tree.map(lambda *x: _join(x, join), *(parts.pop(block) for block in blocks))
        return parts

    return _where({blocks[0] for blocks in scanned_layers.values()}, stacked, tree)


def unstack(tree: PyTree, scanned_layers: ScannedLayers) -> PyTree:
    """`tree` with the blocks of each stack under their own names: the inverse of `stack`."""

    def unstacked(parts: dict) -> dict:
        parts = dict(parts)
        for name, blocks in scanned_layers.items():
            if name in parts:
                whole = parts.pop(name)
                parts |= {block: jax.tree.map(lambda x, n=n: _part(x, n), whole) for n, block in enumerate(blocks)}
        return parts

    return _where(set(scanned_layers), unstacked, tree)


def _where(names: set[str], change: Callable[[dict], dict], tree: PyTree) -> PyTree:
    """`tree` with every dictionary in it that has one of these names replaced by what `change` makes of it."""
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
