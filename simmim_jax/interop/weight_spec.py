"""What a file of weights contains, and questions about the shapes in it."""

import math
from collections.abc import Iterable
from typing import NamedTuple

from simmim_jax.errors import CheckpointError


class WeightSpec(NamedTuple):
    """A model, as far as its weights determine it.

    encoder: "name" and the encoder's fields; None for a field that the weights do not determine.
    objective: "name" ("simmim", "classify" or "none" for a bare encoder) and its options.
    image_size: (height, width), or None if unknown.
    prefix: prefix of the encoder's names in the file.
    notes: messages for the user.
    windows: side of each stage's windows, if the file has it and no parameter does.
    """

    format: str
    encoder: dict
    objective: dict
    image_size: tuple[int, int] | None
    channels: int
    prefix: str = ""
    notes: tuple[str, ...] = ()
    windows: tuple[int, ...] | None = None


class Shapes(dict):
    """Shapes by name, without the prefix of the encoder. A missing name raises CheckpointError."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], where: str):
        super().__init__(shapes)
        self.where = where

    def __missing__(self, name: str):
        raise CheckpointError(f"no {name!r} among {len(self)} arrays", self.where, "the file is incomplete")

    def count(self, prefix: str) -> int:
        """One more than the highest number after `prefix`, as in "blocks.11.norm1.weight"; 0 if there is none."""
        rests = [name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)]
        return 1 + max((int(rest) for rest in rests if rest.isdigit()), default=-1)

    def any(self, ending: str) -> bool:
        """Whether a name has this ending."""
        return any(name.endswith(ending) for name in self)

    def first(self, ending: str) -> tuple[int, ...] | None:
        """The shape of the first array with this ending, or None."""
        return next((self[name] for name in sorted(self) if name.endswith(ending)), None)


def find_prefix(names: Iterable[str], anchor: str) -> str | None:
    """The part before `anchor` in the shortest name that ends with it, or None."""
    found = sorted((name.removesuffix(anchor) for name in names if name.endswith(anchor)), key=len)
    return found[0] if found else None


def shapes_below(arrays: dict, prefix: str, where: str) -> Shapes:
    """The shapes of the arrays whose names start with `prefix`, without it."""
    return Shapes({name.removeprefix(prefix): x.shape for name, x in arrays.items() if name.startswith(prefix)}, where)


def integer_sqrt(number: int) -> int | None:
    """The square root if it is an integer, else None."""
    root = math.isqrt(max(number, 0))
    return root if root * root == number else None


def table_side(rows: int) -> int | None:
    """The side of the square window whose displacements fill a table of `rows` rows, or None."""
    root = integer_sqrt(rows)
    return (root + 1) // 2 if root and root % 2 else None


def mlp_ratio_from(hidden: int, width: int) -> float:
    """hidden / width, rounded so that int(width * ratio) == hidden."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def patch_side(patch: tuple[int, ...], where: str) -> int:
    """The side of a patch, from the shape of its convolution [out, in, y, x]."""
    if len(patch) != 4 or patch[2] != patch[3]:
        raise CheckpointError(f"patches of {list(patch[2:])} pixels", where, "patches must be square")
    return patch[2]


def check_agreement(pairs: dict[str, tuple], where: str) -> None:
    """Raise CheckpointError if weights and config.json differ. pairs: (in the weights, in config.json) by name."""
    different = [
        f"{name} is {weights} in the weights, {config} in config.json"
        for name, (weights, config) in pairs.items()
        if None not in (weights, config) and weights != config
    ]
    if different:
        raise CheckpointError(f"config.json disagrees: {', '.join(different)}", where, "fix config.json")
