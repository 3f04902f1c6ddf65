"""Rules: the name and layout of each of our arrays in another format. Every rule is read in both directions.

A format's table is a list of `Rule`s made from an encoder's options; import and export use the same list. Layouts only
reshape, transpose and split, so that a round trip is exact to the bit.

Our dense kernels are [in, out], PyTorch's are [out, in]. Our convolutions are [y, x, in, out], PyTorch's are
[out, in, y, x]. Attention heads have an axis of their own here.
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
    """Conversion between one array of ours and one or more of theirs. `to_ours` also gets the shape of ours."""

    to_theirs: Callable[[np.ndarray], list[np.ndarray]]
    to_ours: Callable[[list[np.ndarray], Shape], np.ndarray]


class Rule(NamedTuple):
    """Our parameter at path `ours` is stored under the names `theirs`, in that layout.

    fixed: a value that is no parameter here but is stored there, like sine-cosine positions.
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
    """A parameter that is stored as one array."""
    return [Rule(ours, (theirs,), layout)]


def dense(ours: str, theirs: str, layout: Layout = FROM_WIDTH, *, bias: bool = True) -> list[Rule]:
    """A linear layer."""
    rules = one(f"{ours}/kernel", f"{theirs}.weight", layout)
    return rules + one(f"{ours}/bias", f"{theirs}.bias", VECTOR) if bias else rules


def convolution(ours: str, theirs: str, *, bias: bool = True) -> list[Rule]:
    """A convolution."""
    return dense(ours, theirs, CONVOLUTION, bias=bias)


def norm(ours: str, theirs: str) -> list[Rule]:
    """A LayerNorm."""
    return one(f"{ours}/scale", f"{theirs}.weight") + one(f"{ours}/bias", f"{theirs}.bias")


def batch_norm(ours: str, theirs: str) -> list[Rule]:
    """A batch norm, with its running statistics."""
    statistics = one(f"{ours}/mean", f"{theirs}.running_mean") + one(f"{ours}/var", f"{theirs}.running_var")
    return norm(ours, theirs) + statistics


def three_dense(ours: str, theirs: Iterable[str], *, bias: bool) -> list[Rule]:
    """Query, key and value: one kernel here, three there. bias: whether all three have one."""
    names = tuple(theirs)
    rules = [Rule(f"{ours}/kernel", tuple(f"{name}.weight" for name in names), THREE_KERNELS)]
    if bias:
        rules.append(Rule(f"{ours}/bias", tuple(f"{name}.bias" for name in names), THREE_BIASES))
    return rules


def flatten(tree: dict) -> dict:
    """Nested parameters by path, like "block_0/norm1/scale"."""
    return flatten_dict(tree, sep="/")


def to_theirs(rules: list[Rule], params: dict) -> dict[str, np.ndarray]:
    """The arrays of `params` with the names of the format. Raises ValueError for a parameter without a rule."""
    ours, out = flatten(params), {}
    for rule in rules:
        value = rule.fixed if rule.fixed is not None else np.asarray(ours.pop(rule.ours))
        out |= {
            name: np.asarray(array, order="C")  # keeps scalars, which ascontiguousarray does not
            for name, array in zip(rule.theirs, rule.layout.to_theirs(value), strict=True)
        }
    if ours:
        raise ValueError(f"no rule for {sorted(ours)}")
    return out


def to_ours(rules: list[Rule], arrays: dict[str, np.ndarray], abstract: dict, where: str) -> dict:
    """The arrays as nested parameters with the shapes of `abstract`.

    Raises CheckpointError if names or shapes differ, or if weights are integers.
    """
    wanted = flatten(abstract)
    check_names_and_shapes(rules, {name: array.shape for name, array in arrays.items()}, abstract, where)
    if integers := [name for name in sorted(arrays) if arrays[name].dtype.kind in "biuc"]:
        what = f"{len(integers)} arrays are {arrays[integers[0]].dtype}, not real numbers: {_examples(integers)}"
        raise CheckpointError(what, where, "give the weights from before quantization")
    out = {}
    for rule in rules:
        if rule.fixed is None:
            theirs = [arrays[name] for name in rule.theirs]
            out[rule.ours] = np.ascontiguousarray(rule.layout.to_ours(theirs, wanted[rule.ours].shape))
    return unflatten_dict(out, sep="/")


def expected_shapes(rules: list[Rule], abstract: dict) -> dict[str, Shape]:
    """The shapes in the format of parameters with the shapes of `abstract`."""
    ours, shapes = flatten(abstract), {}
    for rule in rules:
        shape = rule.fixed.shape if rule.fixed is not None else ours[rule.ours].shape
        stand_in = np.broadcast_to(np.int8(0), shape)
        shapes |= {name: part.shape for name, part in zip(rule.theirs, rule.layout.to_theirs(stand_in), strict=True)}
    return shapes


def check_names_and_shapes(rules: list[Rule], shapes: dict[str, Shape], abstract: dict, where: str) -> None:
    """Raise CheckpointError unless the names and shapes in a file are exactly those that the rules expect."""
    expected = expected_shapes(rules, abstract)
    surplus = sorted(shapes.keys() - expected.keys())
    missing = sorted(expected.keys() - shapes.keys())
    other = [name for name in sorted(shapes.keys() & expected.keys()) if shapes[name] != expected[name]]
    if not (surplus or missing or other):
        return
    reasons, patterns = [], ",".join(patterns_for(surplus, expected))
    if surplus:
        reasons.append(f"{len(surplus)} arrays of the file have no place in the model: {_examples(surplus)}")
    if missing:
        reasons.append(f"{len(missing)} arrays of the model are not in the file: {_examples(missing)}")
    if other:
        name = other[0]
        reasons.append(
            f"{len(other)} have another shape: {name} is {list(shapes[name])} in the file and "
            f"{list(expected[name])} in the model" + (f"; also {_examples(other[1:])}" if other[1:] else "")
        )
    if missing or other:
        fix = "give the fields that differ as --encoder.FIELD=VALUE or --image_size=HEIGHT,WIDTH, or the right file"
        fix += f"; --allow {patterns!r} would skip the surplus arrays" if surplus else ""
    else:
        fix = f"if they are not needed, skip them with --allow {patterns!r}"
    raise CheckpointError("; ".join(reasons), where, fix)


def _examples(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def patterns_for(names: Iterable[str], needed: Iterable[str]) -> list[str]:
    """Short list of `fnmatch` patterns that match all `names` and none of `needed`."""
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
    """The names that match a pattern of `allow`. Raises CheckpointError for a pattern that matches none."""
    names, skipped = list(names), []
    for pattern in allow:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            what = f"--allow {pattern!r} matches none of the {len(names)} names"
            raise CheckpointError(what, "", f"they are like {_examples(names)}")
        skipped += matching
    return sorted(set(skipped))
