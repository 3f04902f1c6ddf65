"""What a file of weights is, and small questions about the shapes in it."""

import math
from typing import NamedTuple

from simmim_jax.errors import CheckpointError


class WeightSpec(NamedTuple):
    """A model as read off its weights.

    encoder: "name" and the fields of the encoder; None for one that cannot be read off. objective: "name", which is
    "simmim", "classify" or "none" (a bare encoder), with its options. image_size: (height, width), or None.
    prefix: what the encoder's names begin with there. notes: what the user should know. windows: the side of each
    stage's windows, where the file has it and no parameter does.
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
    """Shapes by name, the encoder's without their prefix; asks that fail name the file."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], where: str):
        super().__init__(shapes)
        self.where = where

    def __missing__(self, name: str):
        raise CheckpointError(f"no {name!r} among {len(self)} arrays", self.where, "the file is not whole")

    def count(self, prefix: str) -> int:
        """One more than the highest number that follows `prefix`, as in "blocks.11.norm1.weight"; 0 if none does."""
        rests = [name.removeprefix(prefix).split(".")[0] for name in self if name.startswith(prefix)]
        return 1 + max((int(rest) for rest in rests if rest.isdigit()), default=-1)

    def any(self, ending: str) -> bool:
        """Whether a name ends so."""
        return any(name.endswith(ending) for name in self)

    def first(self, ending: str) -> tuple[int, ...] | None:
        """The shape of the first array whose name ends so; None if none does."""
        return next((self[name] for name in sorted(self) if name.endswith(ending)), None)


def find_prefix(names, anchor: str) -> str | None:
    """What stands before `anchor` in the one name that ends with it; None if no name does."""
    found = sorted((name.removesuffix(anchor) for name in names if name.endswith(anchor)), key=len)
    return found[0] if found else None


def without_prefix(shapes: dict, prefix: str, where: str) -> Shapes:
    """Those of `shapes` whose names begin with `prefix`, without it."""
    return Shapes({name.removeprefix(prefix): s for name, s in shapes.items() if name.startswith(prefix)}, where)


def integer_sqrt(number: int) -> int | None:
    """The square root where it is a whole number."""
    root = math.isqrt(max(number, 0))
    return root if root * root == number else None


def table_side(rows: int) -> int | None:
    """The side of the square window or grid whose displacements fill a table of so many rows."""
    root = integer_sqrt(rows)
    return (root + 1) // 2 if root and root % 2 else None


def mlp_ratio_from(hidden: int, width: int) -> float:
    """hidden / width, such that int(width * ratio) is `hidden` again."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def square(patch: tuple[int, ...], where: str) -> int:
    """The side of a patch, from the shape of its convolution [out, in, y, x]."""
    if len(patch) != 4 or patch[2] != patch[3]:
        raise CheckpointError(f"patches of {list(patch[2:])} pixels", where, "patches must be square")
    return patch[2]


def check_agreement(pairs: dict[str, tuple], where: str) -> None:
    """Raise CheckpointError if the weights and the config.json beside them disagree; `pairs`: (weights, config)."""
    different = {name: pair for name, pair in pairs.items() if None not in pair and pair[0] != pair[1]}
    if different:
        told = ", ".join(f"{name} is {weights} in the weights, {config} there" for name, (weights, config) in
                         different.items())  # fmt: skip
        raise CheckpointError(f"config.json disagrees with the weights: {told}", where, "mend config.json")
