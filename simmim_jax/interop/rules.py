"""Rules: which array of ours is which of theirs, and how it is laid out there. Each is read in both directions.

A format's table is a list of `Rule`s that a function makes from an encoder's options; import and export are the same
list. Layouts only reshape, transpose and split, so that what goes out and comes back is the same to the bit.
Dense kernels are [in, out] here and [out, in] in PyTorch, convolutions [y, x, in, out] and [out, in, y, x]; here heads
have an axis of their own.
"""

import fnmatch
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from simmim_jax.errors import CheckpointError

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Both ways between one array of ours and one or more of theirs; `to_ours` is told the shape to arrive at."""

    to_theirs: Callable[[np.ndarray], list[np.ndarray]]
    to_ours: Callable[[list[np.ndarray], Shape], np.ndarray]


class Rule(NamedTuple):
    """Our parameter at path `ours` is `theirs`, one name or several, in that layout.

    fixed: in place of a parameter, what is fixed here and stored there, like sine-cosine positions.
    """

    ours: str
    theirs: tuple[str, ...]
    layout: Layout
    fixed: np.ndarray | None = None


def _flat_input(x: np.ndarray) -> np.ndarray:
    return x.reshape(x.shape[0], -1)


SAME = Layout(lambda x: [x], lambda y, shape: y[0])
VECTOR = Layout(lambda x: [x.reshape(-1)], lambda y, shape: y[0].reshape(shape))
FROM_WIDTH = Layout(lambda x: [_flat_input(x).T], lambda y, shape: y[0].T.reshape(shape))  # [in, ...out]
TO_WIDTH = Layout(lambda x: [x.reshape(-1, x.shape[-1]).T], lambda y, shape: y[0].T.reshape(shape))  # [...in, out]
CONVOLUTION = Layout(lambda x: [x.transpose(3, 2, 0, 1)], lambda y, shape: y[0].transpose(2, 3, 1, 0))
POINTWISE = Layout(lambda x: [x.T[:, :, None, None]], lambda y, shape: y[0][:, :, 0, 0].T)  # a dense layer as 1x1
TOKEN = Layout(lambda x: [x[None, None]], lambda y, shape: y[0][0, 0])
POSITIONS = Layout(lambda x: [x[None]], lambda y, shape: y[0][0])
PER_HEAD = Layout(lambda x: [x[:, None, None]], lambda y, shape: y[0][:, 0, 0])
THREE_KERNELS = Layout(  # [in, 3, h, c] as three dense kernels
    lambda x: [_flat_input(x[:, part]).T for part in range(3)],
    lambda y, shape: np.stack([part.T.reshape(shape[0], *shape[2:]) for part in y], axis=1),
)
THREE_BIASES = Layout(  # [3, h, c] as three vectors
    lambda x: [x[part].reshape(-1) for part in range(3)],
    lambda y, shape: np.stack([part.reshape(shape[1:]) for part in y]),
)


def one(ours: str, theirs: str, layout: Layout = SAME) -> list[Rule]:
    """A parameter that is one array there."""
    return [Rule(ours, (theirs,), layout)]


def dense(ours: str, theirs: str, layout: Layout = FROM_WIDTH, *, bias: bool = True) -> list[Rule]:
    """A linear map, and its bias where it has one."""
    rules = one(f"{ours}/kernel", f"{theirs}.weight", layout)
    return rules + one(f"{ours}/bias", f"{theirs}.bias", VECTOR) if bias else rules


def convolution(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """A convolution, and its bias where it has one."""
    return dense(ours, theirs, CONVOLUTION, bias=bias)


def norm(ours: str, theirs: str) -> list[Rule]:
    """A LayerNorm."""
    return one(f"{ours}/scale", f"{theirs}.weight") + one(f"{ours}/bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> list[Rule]:
    """A batch norm with its running statistics."""
    statistics = one(f"{ours}/mean", f"{theirs}.running_mean") + one(f"{ours}/var", f"{theirs}.running_var")
    return norm(ours, theirs) + statistics


def three_dense(ours: str, theirs: Iterable[str], *, bias: bool) -> list[Rule]:
    """Query, key and value, one kernel here and three there; `bias` for one on all three."""
    names = tuple(theirs)
    rules = [Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in names), THREE_KERNELS)]
    if bias:
        rules.append(Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in names), THREE_BIASES))
    return rules


def flatten(tree: dict) -> dict:
    """Nested parameters by path, "block_0/norm1/scale"."""
    return flatten_dict(tree, sep="/")


def to_theirs(rules: list[Rule], params: dict) -> dict[str, np.ndarray]:
    """The arrays of `params` under their names. Raises ValueError if the rules do not cover them exactly."""
    ours, out = flatten(params), {}
    for rule in rules:
        value = rule.fixed if rule.fixed is not None else np.asarray(ours.pop(rule.ours))
        out |= {
            name: np.asarray(array, order="C")  # which leaves a number without axes as it is
            for name, array in zip(rule.theirs, rule.layout.to_theirs(value), strict=True)
        }
    if ours:
        raise ValueError(f"no rule for {sorted(ours)}")
    return out


def to_ours(rules: list[Rule], arrays: dict[str, np.ndarray], abstract: dict, where: str) -> dict:
    """The arrays as nested parameters of the shapes of `abstract`.

    Raises CheckpointError that lists both sides if a name is left over, is missing, or has another shape, or if
    weights are integers.
    """
    wanted = flatten(abstract)
    check_names_and_shapes(rules, {name: array.shape for name, array in arrays.items()}, abstract, where)
    if whole := [name for name in sorted(arrays) if arrays[name].dtype.kind in "biuc"]:
        raise CheckpointError(
            f"{len(whole)} arrays are {arrays[whole[0]].dtype}, no real numbers: {_examples(whole)}", where,
            "give the weights as they were before they were quantized",
        )  # fmt: skip
    out = {}
    for rule in rules:
        if rule.fixed is None:
            theirs = [arrays[name] for name in rule.theirs]
            out[rule.ours] = np.ascontiguousarray(rule.layout.to_ours(theirs, wanted[rule.ours].shape))
    return unflatten_dict(out, sep="/")


def expected_shapes(rules: list[Rule], abstract: dict) -> dict[str, Shape]:
    """The shape that each of their arrays has for parameters of the shapes of `abstract`."""
    ours, shapes = flatten(abstract), {}
    for rule in rules:
        shape = rule.fixed.shape if rule.fixed is not None else ours[rule.ours].shape
        stand_in = np.broadcast_to(np.int8(0), shape)
        shapes |= {name: part.shape for name, part in zip(rule.theirs, rule.layout.to_theirs(stand_in), strict=True)}
    return shapes


def check_names_and_shapes(rules: list[Rule], shapes: dict[str, Shape], abstract: dict, where: str) -> None:
    """Raise CheckpointError unless names and shapes of a file are exactly those that the rules expect."""
    expected = expected_shapes(rules, abstract)
    surplus = sorted(shapes.keys() - expected.keys())
    missing = sorted(expected.keys() - shapes.keys())
    other = [name for name in sorted(shapes.keys() & expected.keys()) if shapes[name] != expected[name]]
    if not (surplus or missing or other):
        return
    told = []
    if surplus:
        told.append(f"{len(surplus)} arrays of the file have no place in the model: {_examples(surplus)}")
    if missing:
        told.append(f"{len(missing)} that the model needs are not in the file: {_examples(missing)}")
    if other:
        name = other[0]
        told.append(
            f"{len(other)} have another shape: {name} is {list(shapes[name])} in the file and "
            f"{list(expected[name])} in the model" + (f"; also {_examples(other[1:])}" if other[1:] else "")
        )
    if missing or other:
        fix = "give the fields that differ as --encoder.FIELD=VALUE or --image_size=HEIGHT,WIDTH, or the right file"
        if surplus:
            fix += f"; --allow {','.join(patterns_for(surplus, expected))!r} would skip what has no place"
    else:
        fix = f"if they are not needed, skip them with --allow {','.join(patterns_for(surplus, expected))!r}"
    raise CheckpointError("; ".join(told), where, fix)


def _examples(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def patterns_for(names: Iterable[str], needed: Iterable[str]) -> list[str]:
    """Few patterns (as of `fnmatch`) that fit all `names` and none of `needed`."""
    needed, patterns = list(needed), []
    for name in names:
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns):
            continue
        parts = name.split(".")
        general = [re.sub(r"^\d+$", "*", part) for part in parts]
        prefixes = [".".join(general[:count]) + ".*" for count in range(1, len(parts))]
        choices = [*prefixes, ".".join(general), name]
        patterns.append(next(c for c in choices if c == name or not fnmatch.filter(needed, c)))
    return patterns


def skip(names: Iterable[str], allow: Iterable[str]) -> list[str]:
    """Those of `names` that a pattern of `allow` fits. Raises CheckpointError for a pattern that fits none."""
    names, skipped = list(names), []
    for pattern in allow:
        fitting = fnmatch.filter(names, pattern)
        if not fitting:
            raise CheckpointError(
                f"--allow {pattern!r} fits none of the {len(names)} names", "", f"they are like {_examples(names)}"
            )
        skipped += fitting
    return sorted(set(skipped))
