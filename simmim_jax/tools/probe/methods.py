"""The methods of a probe: each takes the features of a block and yields rows of results.

A row has the setting that the validation images chose, their accuracy, and the accuracy on the test images. The
classifiers run on one device.
"""

import itertools
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simmim_jax.evals import probes
from simmim_jax.tools.probe.feature_cache import FeatureCache
from simmim_jax.tools.probe.sets import Sets

FEW_SHOT_C, MAX_FEW_SHOT_K = 1.0, 20  # fixed: few-shot probes choose nothing
MIN_STEPS = 16  # per epoch of the linear probe: few images mean smaller batches
MAX_STACKED = 2**30  # bytes of features that linear probes are trained on at once


class Block(NamedTuple):
    """Features of the training and test images, and the mean and scale of the training features."""

    train: Float[np.ndarray, "m d"]
    test: Float[np.ndarray, "n d"]
    statistics: tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]

    def train_at(self, indices: Int[np.ndarray, " p"]) -> Float[Array, "p d"]:
        """Return some standardized training features. They are selected on the host, which has more memory."""
        return probes.standardize(self.train[indices], *self.statistics)

    def all_train(self) -> Float[Array, "m d"]:
        return probes.standardize(self.train, *self.statistics)

    def all_test(self) -> Float[Array, "n d"]:
        return probes.standardize(self.test, *self.statistics)


def probe_blocks(
    cache: FeatureCache, sets: Sets, pool: str, wanted: dict[int, list[str]], options: Namespace
) -> Iterator[list[dict]]:
    """Yield the rows of one pooling, block by block. wanted: the methods of each block."""
    methods = {"logistic": logistic_rows, "ridge": ridge_rows, "knn": knn_rows, "fewshot": few_shot_rows}
    for group in group_blocks(cache, [block for block, names in wanted.items() if names], len(sets.train)):
        features = {block: read_block(cache, sets, pool, block) for block in group}
        linear_blocks = {block: x for block, x in features.items() if "linear" in wanted[block]}
        linear = linear_rows(linear_blocks, sets, options) if linear_blocks else {}
        for block in group:
            rows = [linear[block]] if block in linear else []
            for name in wanted[block]:
                if name in methods:
                    rows += methods[name](features[block], sets, options)
            yield [{"block": block} | row for row in rows]
        del features, linear_blocks  # free the memory before the next group


def group_blocks(cache: FeatureCache, blocks: list[int], count: int) -> Iterator[list[int]]:
    """Yield consecutive blocks of one width whose `count` training features take at most `MAX_STACKED` bytes.

    A larger block is a group of its own.
    """
    group: list[int] = []
    for block in blocks:
        width = cache.features("train", block).shape[1]
        same_width = not group or width == cache.features("train", group[0]).shape[1]
        if group and not (same_width and (len(group) + 1) * count * width * 4 <= MAX_STACKED):
            yield group
            group = []
        group = [*group, block]
    if group:
        yield group


def read_block(cache: FeatureCache, sets: Sets, pool: str, block: int) -> Block:
    """Read the features of the labeled images, or the half of them that is `pool`."""
    parts = []
    for split, rows in (("train", sets.train), ("test", sets.test)):
        features, columns = cache.features(split, block), slice(None)
        if cache.meta["identity"]["pool"] == "both" and pool != "both":
            half = features.shape[1] // 2
            columns = slice(half) if pool == "class_token" else slice(half, None)
        parts.append(np.asarray(features[:, columns][rows], np.float32))
    return Block(*parts, probes.statistics(parts[0]))


def make_row(method: str, sets: Sets, setting: str, validation: float, ranks, begin: float, edge: str = "") -> dict:
    """Return the row of a probe that was fitted to all training images. edge: see `grid_edge`."""
    return {
        "method": method,
        "images": "all",
        "setting": setting,
        "validation_top1": float(validation),
        **probes.accuracies(ranks, sets.num_classes),
        "draws": 1,
        "train_images": len(sets.train),
        "test_images": len(sets.test),
        "seconds": round(time.monotonic() - begin, 2),
        "edge": edge,
    }


def grid_edge(name: str, best: Sequence[int | float], grid: Sequence[int | float], flag: str) -> str:
    """Return a hint if the best value is the largest or smallest of the grid, else "".

    best: all values that are equally good on the validation images. A tie gives no hint.
    """
    value = best[0]
    if len(grid) < 2 or len(set(best)) > 1 or min(grid) < value < max(grid):
        return ""
    end, factor = ("largest", 10) if value == max(grid) else ("smallest", 0.1)
    further = ",".join(f"{value * factor**n:g}" for n in range(3))
    return f"{name} {value:g} is the {end} value tried: try {flag}={further}"


def linear_rows(blocks: dict[int, Block], sets: Sets, options: Namespace) -> dict[int, dict]:
    """Train a grid of linear probes on all blocks at once, then the best setting of each block on all images."""
    begin, labels = time.monotonic(), sets.train_labels
    grid = [*itertools.product(options.learning_rates, options.weight_decays)]
    settings = np.float32(grid)
    train = partial(
        probes.sweep,
        key=jax.random.key(options.seed),
        classes=sets.num_classes,
        epochs=options.epochs,
        batch_size=min(options.probe_batch_size, max(1, len(labels) // MIN_STEPS)),
    )
    every = np.broadcast_to(settings, (len(blocks), *settings.shape))
    x = jnp.stack([block.train_at(sets.fit) for block in blocks.values()])
    classifiers = train(x, labels[sets.fit], every[..., 0], every[..., 1])
    del x  # before the next stack
    best, top1, equals = [], [], []
    for n, block in enumerate(blocks.values()):
        ranks = probes.ranks(block.train_at(sets.validation), labels[sets.validation], at_index(classifiers, n))
        each, at = probes.choose_setting(ranks)
        best.append(at)
        top1.append(each[at])
        equals.append([grid[m] for m in np.flatnonzero(each == each[at])])
    chosen = settings[best][:, None]
    refitted = train(
        jnp.stack([block.all_train() for block in blocks.values()]), labels, chosen[..., 0], chosen[..., 1]
    )
    rows = {}
    for n, (number, block) in enumerate(blocks.items()):
        classifier = at_index(refitted, (n, 0))
        ranks = probes.ranks(block.all_test(), sets.test_labels, classifier)
        rate, decay = grid[best[n]]
        setting = f"learning rate {rate:g}, weight decay {decay:g}"
        rates, decays = zip(*equals[n], strict=True)
        edges = [grid_edge("learning rate", rates, options.learning_rates, "--learning-rates")]
        if decay:  # nothing is below 0
            edges.append(grid_edge("weight decay", decays, options.weight_decays, "--weight-decays"))
        row = make_row("linear", sets, setting, top1[n], ranks, begin, " and ".join(filter(None, edges)))
        if not np.isfinite(np.asarray(classifier.bias)).all():
            print(f"block {number}: the linear probe diverged at {setting}: lower --learning-rates", flush=True)
            row |= dict.fromkeys(("validation_top1", "top1", "top5"))
            row |= {"setting": f"diverged at {setting}", "edge": ""}
        rows[number] = row | {"seconds": round(row["seconds"] / len(blocks), 2)}
    return rows


def at_index(classifiers: probes.Linear, at: int | tuple[int, int]) -> probes.Linear:
    return probes.Linear(classifiers.weights[at], classifiers.bias[at])


class Strength(NamedTuple):
    """The setting of a method with one number: its name, its flag, and the values to try."""

    name: str
    flag: str
    values: tuple[float, ...]


def path_row(method: str, fit_path: Callable, strength: Strength, block: Block, sets: Sets) -> dict:
    """Fit a probe at several strengths, then the best one on all training images.

    fit_path(features, labels, values, start): the classifier of each value; start: the initial classifier, or None.
    """
    begin, labels, values = time.monotonic(), sets.train_labels, strength.values
    classifiers = fit_path(block.train_at(sets.fit), labels[sets.fit], values, None)
    ranks = probes.ranks(block.train_at(sets.validation), labels[sets.validation], classifiers)
    top1, at = probes.choose_setting(ranks)
    refitted = fit_path(block.all_train(), labels, values[at : at + 1], at_index(classifiers, at))
    ranks = probes.ranks(block.all_test(), sets.test_labels, refitted)[:, 0]
    best = [values[n] for n in np.flatnonzero(top1 == top1[at])]
    edge = grid_edge(strength.name, best, values, strength.flag)
    return make_row(method, sets, f"{strength.name} {values[at]:g}", top1[at], ranks, begin, edge)


def logistic_rows(block: Block, sets: Sets, options: Namespace) -> Iterator[dict]:
    def fit_path(x, labels, values, start):
        return probes.logistic_path(x, labels, np.float32(values), start, classes=sets.num_classes)

    yield path_row("logistic", fit_path, Strength("C", "--C", options.C), block, sets)


def ridge_rows(block: Block, sets: Sets, options: Namespace) -> Iterator[dict]:
    def fit_path(x, labels, values, start):
        return probes.ridge_path(x, labels, values, classes=sets.num_classes)

    strength = Strength("regularization", "--regularizations", options.regularizations)
    yield path_row("ridge", fit_path, strength, block, sets)


def knn_rows(block: Block, sets: Sets, options: Namespace) -> Iterator[dict]:
    """Yield one row for each k. Features are neither centered nor scaled."""
    begin, x, labels = time.monotonic(), block.train, sets.train_labels
    classify = partial(
        probes.nearest_classes, classes=sets.num_classes, k=options.neighbors, temperature=options.temperature
    )
    validation = classify(x[sets.fit], labels[sets.fit], x[sets.validation])
    test = classify(x, labels, block.test)
    for n, k in enumerate(options.neighbors):
        top1 = (probes.class_ranks(validation[n], labels[sets.validation]) < 1).mean()
        ranks = probes.class_ranks(test[n], sets.test_labels)
        yield make_row("knn", sets, f"k {k}", top1, ranks, begin)


def few_shot_rows(block: Block, sets: Sets, options: Namespace) -> Iterator[dict]:
    """Yield logistic regression and k-NN for each few-shot setting, averaged over its draws.

    k is the number of images in the smallest class, at most `MAX_FEW_SHOT_K`.
    """
    labels, classes = sets.train_labels, sets.num_classes
    queries = (block.train[sets.validation], block.test)
    standardized = (block.train_at(sets.validation), block.all_test())
    truth = (labels[sets.validation], sets.test_labels)
    for images, draws in sets.draws:
        begin, ranks = time.monotonic(), {"logistic": [], "knn": []}
        smallest = np.unique(labels[sets.fit[draws[0]]], return_counts=True)[1].min()
        k = min(MAX_FEW_SHOT_K, int(smallest))
        for drawn in (sets.fit[indices] for indices in draws):
            classifier = probes.logistic_path(
                block.train_at(drawn), labels[drawn], np.float32([FEW_SHOT_C]), classes=classes
            )
            pairs = zip(standardized, truth, strict=True)
            ranks["logistic"].append([probes.ranks(x, true, classifier)[:, 0] for x, true in pairs])
            classify = partial(
                probes.nearest_classes,
                block.train[drawn],
                labels[drawn],
                classes=classes,
                k=(k,),
                temperature=options.temperature,
            )
            pairs = zip(queries, truth, strict=True)
            ranks["knn"].append([probes.class_ranks(classify(x)[0], true) for x, true in pairs])
        for method, setting in (("logistic", f"C {FEW_SHOT_C:g}"), ("knn", f"k {k}")):
            validation = [probes.accuracies(each[0], classes)["top1"] for each in ranks[method]]
            test = [probes.accuracies(each[1], classes) for each in ranks[method]]
            top1 = [each["top1"] for each in test]
            yield {
                "method": method,
                "images": images,
                "setting": setting,
                "validation_top1": float(np.mean(validation)),
                "top1": float(np.mean(top1)),
                "top5": float(np.mean([each["top5"] for each in test])) if classes > 5 else None,
                "draws": options.seeds,
                "top1_std": float(np.std(top1, ddof=1)) if len(top1) > 1 else None,
                "top1_min": min(top1),
                "top1_max": max(top1),
                "train_images": len(drawn),
                "test_images": len(sets.test),
                "seconds": round((time.monotonic() - begin) / 2, 2),
            }
