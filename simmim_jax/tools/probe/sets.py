"""The images of a probe: their sources, which of them fit, validate and test, and the few-shot draws."""

from argparse import Namespace
from functools import partial
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from simmim_jax.data import how_to_label, one_report, share_images
from simmim_jax.errors import ConfigError, DataError
from simmim_jax.files import utf8_name
from simmim_jax.runs.finished import Run
from simmim_jax.tools.images import check_labels, follow_images, is_own, open_source
from simmim_jax.tools.probe import subsets
from simmim_jax.tools.probe.feature_cache import FeatureCache

MAX_LISTED = 5  # classes without images that a line names

# (name, indices into `Sets.fit` of each draw)
Draws = list[tuple[str, list[Int[np.ndarray, " q"]]]]


class Sets(NamedTuple):
    """Labeled images. train, test: rows of the feature cache. fit, validation: indices into train. draws: few-shot."""

    num_classes: int
    train: Int[np.ndarray, " m"]
    train_labels: Int[np.ndarray, " m"]
    test: Int[np.ndarray, " n"]
    test_labels: Int[np.ndarray, " n"]
    fit: Int[np.ndarray, " p"]
    validation: Int[np.ndarray, " v"]
    draws: Draws


def open_sources(run: Run, options: Namespace) -> dict:
    """Return the "train" and "test" images, with the same classes. Raises DataError and ConfigError."""
    run = follow_images(run, options.data)
    own = run.config.get("data", {}) if not options.data or is_own(run, options.data) else {}
    splits = {
        "train": options.train_split or own.get("split", "train"),
        "test": options.test_split or own.get("heldout_split", "test"),
    }
    same = "give another --test-split"
    if splits["train"] == splits["test"]:
        raise ConfigError(f"split {splits['train']!r} both to fit to and to test on", "command line", same)
    with one_report():
        sources = {name: open_source(run, options.data, split) for name, split in splits.items()}
    train, test = sources.values()
    if share_images(train, test):
        raise ConfigError(f"the training images {train.describe()} include test images", test.describe(), same)
    if len(train.classes) < 2:
        what = f"{len(train.classes)} classes: a probe needs two"
        raise DataError(what, train.describe(), how_to_label(train))
    if train.classes != test.classes:
        what = f"{len(test.classes)} test classes differ from the {len(train.classes)} training classes"
        fix = "give both splits the same class folders" if test.classes else how_to_label(test)
        raise DataError(what, test.describe(), fix)
    for split, source in sources.items():
        check_labels(source, f"--{split}-split")
    return sources


def make_sets(cache: FeatureCache, sources: dict, options: Namespace) -> Sets:
    """Split the labeled images. Print which classes lack images. Raises DataError if the sets cannot be probed."""
    num_classes, rows, labels = len(sources["train"].classes), {}, {}
    for split, source in sources.items():
        all_labels = cache.labels(split)
        rows[split] = np.flatnonzero(all_labels >= 0)
        labels[split] = all_labels[rows[split]]
        if not len(rows[split]):
            raise DataError("no image with a label could be read", source.describe(), "see the warning for each image")
        counts = np.bincount(labels[split], minlength=num_classes)
        if lacking := [utf8_name(source.classes[n]) for n in np.flatnonzero(counts == 0)]:
            more = ", ..." if len(lacking) > MAX_LISTED else ""
            names = ", ".join(lacking[:MAX_LISTED])
            print(f"classes without {split} images ({len(lacking)}): {names}{more}", flush=True)
    where, train_labels = sources["train"].describe(), labels["train"]
    if not np.isin(labels["test"], train_labels).any():
        fix = "give both splits the same class folders"
        raise DataError("no class has training and test images", sources["test"].describe(), fix)
    if len(np.unique(train_labels)) < 2:
        raise DataError(f"{len(train_labels)} images of one class: a probe needs two", where, "raise --limit")
    fit, validation = subsets.split_by_class(train_labels, options.validation_fraction, options.seed)
    if not len(validation):
        raise DataError("one image per class: none is left for validation", where, "give more images")
    draws = make_draws(train_labels, fit, options) if "fewshot" in options.only else []
    if options.only == ("fewshot",) and not draws:
        raise DataError("no few-shot draw is possible", where, "lower --shots, or give --fractions")
    return Sets(num_classes, rows["train"], train_labels, rows["test"], labels["test"], fit, validation, draws)


def make_draws(train_labels: Int[np.ndarray, " m"], fit: Int[np.ndarray, " p"], options: Namespace) -> Draws:
    """Draw the few-shot subsets of `fit`. Print which `options.shots` exceed the images of a class.

    Fractions count all training images, not only those in `fit`.
    """
    labels = train_labels[fit]
    smallest = int(np.unique(labels, return_counts=True)[1].min())
    if lacking := [n for n in options.shots if n > smallest]:
        shots = ", ".join(map(str, lacking))
        print(f"a class has {smallest} images to draw from: no draws of {shots} per class", flush=True)
    draw = {f"{n} per class": partial(subsets.draw_per_class, labels, n) for n in options.shots if n <= smallest}
    for fraction in options.fractions:
        draw[f"{100 * fraction:g} %"] = partial(subsets.draw_fraction, labels, fraction, all_labels=train_labels)
    return [(name, [draw_one(seed=seed) for seed in range(options.seeds)]) for name, draw_one in draw.items()]
