"""Classes: their order, and which of them have training and held-out images."""

import contextlib
import re
import unicodedata
from collections.abc import Iterable
from fractions import Fraction

import numpy as np
from jaxtyping import Bool, Int

from simmim_jax.data.decode import BadImage
from simmim_jax.errors import DataError, warn_once

NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)
MAX_READ = 20_000  # records that are read for their labels, if a source has no list of labels
MAX_TRIED = 10  # damaged records that are passed over in search of a label
MAX_NAMED = 5  # classes that a line names


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The names in order: as numbers if all of them are numbers (2 before 10), else as text."""
    names = sorted(set(names))
    if names and all(map(NUMBER.fullmatch, names)):
        names.sort(key=Fraction)
    return tuple(names)


def read_labels(source) -> Int[np.ndarray, " n"] | None:
    """The labels of all records in order, -1 for none; None if that would take long.

    A source may have a method `all_labels`. Else up to `MAX_READ` records are read; a bad one has the label -1.
    """
    if hasattr(source, "all_labels"):
        return source.all_labels()
    if len(source) > MAX_READ:
        return None
    labels = np.full(len(source), -1, np.int64)
    for i in range(len(source)):
        try:
            labels[i] = source[i]["label"]
        except (BadImage, OSError):
            continue
    return labels


def classes_with_images(source) -> Bool[np.ndarray, " c"] | None:
    """Whether each class of a source has an image in it; None if that is unknown."""
    labels = read_labels(source)
    if labels is None:
        return None
    return np.bincount(labels[labels >= 0], minlength=len(source.classes))[: len(source.classes)] > 0


def untrained_classes(train) -> list[str]:
    """The names of classes without training images; [] if that is unknown."""
    trained = classes_with_images(train)
    return [] if trained is None else [train.classes[n] for n in np.flatnonzero(~trained)]


def compare_classes(train, heldout, *, required: bool) -> None:
    """Warn of classes that have only training or only held-out images. Both sources have the same classes.

    required: raise DataError if no class has both.
    """
    trained, held_out = classes_with_images(train), classes_with_images(heldout)
    if trained is None or held_out is None:
        return
    same: dict[str, list[str]] = {}
    for name in train.classes:
        same.setdefault(unicodedata.normalize("NFKC", name).casefold().strip(), []).append(name)
    twins = [" and ".join(map(repr, names)) for names in same.values() if len(names) > 1]
    if (trained & held_out).all() and not twins:
        return
    parts = [
        f"{_shown([train.classes[n] for n in np.flatnonzero(missing)])} {what}"
        for what, missing in {
            "held-out but no training images, so that every answer for them is wrong": held_out & ~trained,
            "training but no held-out images": trained & ~held_out,
            "no images": ~trained & ~held_out,
        }.items()
        if missing.any()
    ]
    parts += [f"{', '.join(twins[:MAX_NAMED])} look like the same class"] if twins else []
    line = "; ".join(parts)
    if required and not (trained & held_out).any():
        what = f"no class has training and held-out images: {line}"
        raise DataError(what, heldout.describe(), "give both the same class folders or labels")
    warn_once(f"classes of {train.describe()} and {heldout.describe()}: {line}")


def differs_from_text_order(source) -> bool:
    """Whether the numbers of the classes come from their names, and would be others in the order of text."""
    return getattr(source, "by_name", False) and list(source.classes) != sorted(source.classes)


def are_unlabeled(source) -> bool:
    """Whether the first record of a source that can be read has no label, although the format names classes."""
    for i in range(min(len(source), MAX_TRIED)):
        with contextlib.suppress(BadImage, OSError):
            return source[i]["label"] < 0
    return False


def how_to_label(source) -> str:
    """What to do so that the images of a source have classes."""
    return getattr(source, "unlabeled", "") or "put each class into its own folder"


def _shown(names: list[str]) -> str:
    more = ", ..." if len(names) > MAX_NAMED else ""
    has = "has" if len(names) == 1 else f"({len(names)}) have"
    return f"{', '.join(map(repr, names[:MAX_NAMED]))}{more} {has}"
