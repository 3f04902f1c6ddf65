"""What sources of files share, and the part of their records that is held out, or the others."""

import fractions
import functools
import math

import numpy as np

from simmim_jax.data.sources.classes import read_labels
from simmim_jax.data.sources.splits import HELDOUT_FRACTION, MIN_HELDOUT, Selection
from simmim_jax.errors import DataError


def make_part(source, selection: Selection, heldout_fraction: float | None):
    """The records of a selection: all, the held-out ones, or the others. heldout_fraction: as in `make_source`."""
    part = source
    if selection.held_out is not None and (heldout_fraction != 0 or selection.held_out):
        every = 0
        if heldout_fraction is None:
            every = min(round(1 / HELDOUT_FRACTION), max(len(source) // MIN_HELDOUT, 4))
        elif heldout_fraction > 0.5:
            every = 1 / fractions.Fraction(heldout_fraction).limit_denominator(1_000_000)
        elif heldout_fraction:
            every = round(1 / heldout_fraction)
        part = Part(source, every, selection.held_out)
    if not len(part):
        what = f"{source.path} has 0 of its {len(source)} images in split {source.split!r}"
        raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
    return part


class FileSource:
    """What the sources of files share. Each sets `path`, `split` and `classes`, and `unlabeled` if it has none."""

    per_process = ("_open", "_numbers")  # attributes that each process makes itself
    by_name = False  # whether the number of a class is its position among the names of all classes
    reads_groups = False  # whether reading a record reads many others
    unlabeled = ""  # what to do to have classes, if there are none
    # mean, std and pixels of a manifest; {} if there is none, or its images are divided by 255
    pixels: dict = {}  # noqa: RUF012

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in self.per_process}

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"


class Part(FileSource):
    """Every k-th record of a source, starting with the first, or all others. A single record is never held out.

    `every`, k, may be a fraction such as 5/3: the records are 0, k, 2 k, ..., rounded down. 0 holds nothing out.
    """

    def __init__(self, whole, every: int | fractions.Fraction, held_out: bool):
        self.whole, self.every, self.held_out = whole, every, held_out
        self.path, self.split, self.classes = whole.path, whole.split, whole.classes
        self.pixels, self.reads_groups = getattr(whole, "pixels", {}), getattr(whole, "reads_groups", False)
        self.unlabeled, self.by_name = getattr(whole, "unlabeled", ""), getattr(whole, "by_name", False)
        count = math.ceil(len(whole) / fractions.Fraction(every)) if every and len(whole) > 1 else 0
        self.count = count if held_out else len(whole) - count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        return self.whole[self._index(i)]

    def name(self, i: int) -> str:
        return self.whole.name(self._index(i))

    def all_labels(self) -> np.ndarray | None:
        labels = read_labels(self.whole)
        if labels is None or not self.every:
            return labels
        count = self.count if self.held_out else len(self.whole) - self.count
        held_out = np.arange(count) * self.every.numerator // self.every.denominator
        return labels[held_out] if self.held_out else np.delete(labels, held_out)

    def _index(self, i: int) -> int:
        i = range(self.count)[i]  # raises IndexError
        period, held_out = self.every.numerator, self.every.denominator  # held_out records in each period of records
        if self.held_out:
            return i * period // held_out
        if self.count == len(self.whole):
            return i
        return -(-(i + 1) * period // (period - held_out)) - 1

    def fingerprint(self) -> dict:
        every = self.every if isinstance(self.every, int) else str(self.every)
        part = {"count": len(self), "every": every, "held_out": self.held_out}
        return self.whole.fingerprint() | part
