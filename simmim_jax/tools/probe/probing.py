"""What `simmim_jax.tools.probe` does: features of every block, probes of each, and what they found as tables and a
picture.

A row of the results is one method on one block and pooling: what was chosen by the validation images, their accuracy,
and the accuracy on the test images. The classifiers run on one device, the features on all; one process. Rows are
written after each block, and those that an earlier call has written are not computed again.
"""

import contextlib
import csv
import io
import itertools
import json
import math
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from PIL import Image

from simmim_jax.data import share_images
from simmim_jax.errors import ConfigError, DataError
from simmim_jax.evals import probes, subsets
from simmim_jax.evals.feature_cache import FeatureCache, Pass, key_of, open_cache
from simmim_jax.evals.features import jit_on_mesh
from simmim_jax.evals.plot import Curve, Panel, draw_curves
from simmim_jax.files import utf8_name, write_atomically
from simmim_jax.objectives.features import check_readable, make_all_features
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.runtime import compilation, sharding
from simmim_jax.tools.images import (
    check_labels,
    crop_options,
    describe_crop,
    follow_images,
    is_own,
    make_pass,
    open_source,
)

FEW_SHOT_C, FEW_SHOT_NEIGHBOURS = 1.0, 20  # where nothing is chosen
ANOTHER_OUT = "give another OUT: this file is left as it is"
MIN_STEPS = 16  # of the linear probe in an epoch: of few images, batches are smaller
DECIDES_ALL = ("seed", "validation_fraction")  # options that decide every row, beside the features
DECIDES = {  # and those that decide the rows of one kind
    "linear": ("learning_rates", "weight_decays", "epochs", "probe_batch_size"),
    "logistic": ("inverse_regularizations",), "ridge": ("regularizations",),
    "knn": ("neighbors", "temperature"), "fewshot": ("shots", "fractions", "seeds", "temperature"),
}  # fmt: skip
STACKED = 2**30  # bytes of features that linear probes are trained on at once, block beside block
COLUMNS = (
    "method", "images", "pool", "block", "paper", "chosen", "setting", "validation_top1", "top1", "top5", "draws",
    "top1_std", "top1_least", "top1_greatest", "train_images", "test_images", "seconds", "edge",
)  # fmt: skip


def probe(options: Namespace) -> list[dict]:
    """Probe a run; print, write and return the rows. options: those of `simmim_jax.tools.probe.parse`."""
    compilation.enable_cache()
    out = Path(options.out)
    earlier = read_earlier(out)
    trained = load_run(options.run, options.image_size)
    depth = trained.encoder.depth
    blocks = list(options.blocks or (*range(1, depth + 1), 0))
    for block in blocks:
        check_readable(trained.encoder, block, "patches", "--blocks")
    sources = open_sources(trained, options)
    pools = pools_of(trained, options.pool)
    cache = extract(trained, sources, pools, blocks, options, out)
    sets = labeled(cache, sources, options)
    paper = round(depth * 2 / 3)
    said = {
        "run": utf8_name(str(trained.folder)), "step": trained.step, "image_size": list(trained.image_size),
        **crop_options(trained, options.crop_fraction, options.interpolation),
        "depth": depth, "classes": sets["classes"],
        **{split: utf8_name(source.describe()) for split, source in sources.items()},
        "validation_images": len(sets["validation"]), "features": features_of(cache),
        "options": {name: utf8_name(x) if isinstance(x, str) else x for name, x in vars(options).items()},
    }  # fmt: skip
    rows, said["options_of"] = earlier_rows(out, earlier, said, options.only)
    for pool in pools:
        there = {(row["block"], kind_of(row)) for row in rows if row["pool"] == pool}
        left = {block: [kind for kind in options.only if (block, kind) not in there] for block in blocks}
        for found in probe_blocks(cache, sets, pool, left, options):
            for row in found:
                row = {"pool": pool, "paper": row["block"] == paper and pool == "patches"} | row
                rows.append({name: row.get(name) for name in COLUMNS})
            if found:
                tell(rows[-len(found) :])
            write_rows(out, said, rows)
    write_rows(out, said, rows)
    write_picture(out / "blocks.png", rows, paper)
    for line in table(rows, paper, depth):
        print(line)
    for line in edges(rows):
        print(line)
    print(f"\nwritten: {out}/results.csv, results.json, blocks.png")
    return rows


def features_of(cache: FeatureCache) -> str:
    """Names the numbers of a cache, whichever poolings it has."""
    meta = json.loads((cache.folder / "meta.json").read_text())
    return key_of(meta["identity"] | {"pool": "", "dtype": meta["dtype"]})


def kind_of(row: dict) -> str:
    """What `--only` calls it."""
    return row["method"] if row["images"] == "all" else "fewshot"


def options_of(options: dict, kinds: Iterable[str]) -> dict[str, dict]:
    """Of each of these kinds of probes the options that decide its rows, as JSON."""
    as_json = json.loads(json.dumps(options))
    return {kind: {name: as_json.get(name) for name in (*DECIDES_ALL, *DECIDES[kind])} for kind in kinds}


def read_earlier(out: Path) -> dict:
    """What `out`/results.json says, {} without one. Raises ConfigError if it, or results.csv, is none of this tool."""
    path, needed = out / "results.csv", set(COLUMNS) - {"edge"}  # which earlier versions had not
    if path.exists():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if not needed <= set(file.readline().strip().split(",")):
                raise ConfigError("a file with other columns than a probe's", str(path), ANOTHER_OUT)
    path, ours = out / "results.json", False
    if not path.exists():
        return {}
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        earlier = json.loads(path.read_text())
        ours = isinstance(earlier["options"], dict) and all(needed <= row.keys() for row in earlier["rows"])
    if not ours:
        raise ConfigError("not the results of a probe", str(path), ANOTHER_OUT)
    return earlier


def earlier_rows(out: Path, earlier: dict, said: dict, kinds: tuple[str, ...]) -> tuple[list[dict], dict[str, dict]]:
    """(the rows of `earlier` that stay, `options_of` these and of `kinds`, those that are asked for now).

    They are of the same features, and of the same options where their kind is asked for. Where there are others, the
    earlier results are moved to a folder of their own first, and that is said.
    """
    now = options_of(said["options"], kinds)
    if not earlier:
        return [], now
    before = earlier.get("options_of")
    if before is None:  # by an earlier version, whose few-shot fractions were of fewer images
        before = options_of(earlier.get("options", {}), set(DECIDES) - {"fewshot"})
    same = {kind for kind in before if now.get(kind, before[kind]) == before[kind]}
    if earlier.get("features") != said["features"]:
        same = set()
    rows = [row for row in earlier["rows"] if kind_of(row) in same]
    if len(rows) < len(earlier["rows"]):
        aside = next(path for n in itertools.count(1) if not (path := out / f"earlier_{n}").exists())
        aside.mkdir()
        for name in ("results.csv", "blocks.png", "results.json"):
            if (out / name).exists():
                (out / name).replace(aside / name)
        others = len(earlier["rows"]) - len(rows)
        print(f"{others} earlier results are of other weights, images or options: all are in {aside} now", flush=True)
    if rows:
        print(f"{len(rows)} results are there already, and are kept", flush=True)
    return rows, {kind: before[kind] for kind in DECIDES if kind in map(kind_of, rows)} | now


def write_rows(out: Path, said: dict, rows: list[dict]) -> None:
    """Put the rows in order, mark them and write them."""
    kinds, pools = tuple(DECIDES), ("patches", "class_token", "both")
    rows.sort(key=lambda row: (pools.index(row["pool"]), row["block"] or math.inf, kinds.index(kind_of(row))))
    mark_chosen(rows)
    write_atomically(out / "results.json", json.dumps(said | {"edges": [*edges(rows)], "rows": rows}, indent=2) + "\n")
    write_atomically(out / "results.csv", csv_of(rows))


def open_sources(trained: Run, options: Namespace) -> dict:
    """ "train" and "test" images with the same classes. Raises DataError and ConfigError."""
    trained = follow_images(trained, options.data)
    own = trained.config.get("data", {}) if not options.data or is_own(trained, options.data) else {}
    splits = {
        "train": options.train_split or own.get("split", "train"),
        "test": options.test_split or own.get("heldout_split", "test"),
    }
    if splits["train"] == splits["test"]:
        raise ConfigError(
            f"split {splits['train']!r} to fit to and to report on", "command line", "give another --test-split"
        )
    sources = {name: open_source(trained, options.data, split) for name, split in splits.items()}
    train, test = sources.values()
    if share_images(train, test):
        raise ConfigError(
            f"the images to fit to, {train.describe()}, and to report on are the same, or some are", test.describe(),
            "give another --test-split",
        )  # fmt: skip
    if len(train.classes) < 2:
        raise DataError(
            f"{len(train.classes) or 'no'} class{'' if len(train.classes) == 1 else 'es'}: a probe needs two",
            train.describe(), "put each class into a folder of its own",
        )  # fmt: skip
    if train.classes != test.classes:
        raise DataError(
            f"the test images have {len(test.classes) or 'no'} classes, the training images {len(train.classes)}, "
            "or others", test.describe(), "give both the same folders of classes",
        )  # fmt: skip
    for split, source in sources.items():
        check_labels(source, f"--{split}-split")
    return sources


def pools_of(trained: Run, pool: str) -> tuple[str, ...]:
    """The poolings to probe; "all" is what the encoder has."""
    if pool == "all":
        return ("patches", "class_token", "both") if trained.encoder.class_token else ("patches",)
    check_readable(trained.encoder, 0, pool, "--pool")
    return (pool,)


def extract(
    trained: Run, sources: dict, pools: tuple[str, ...], blocks: list[int], options: Namespace, out: Path
) -> FeatureCache:
    """The features of the blocks, from the disk where they are there."""
    pool = pools[0] if len(pools) == 1 else "both"  # of which the others are parts
    mesh = sharding.make_mesh()
    ways = sharding.num_batch_shards(mesh)
    batch_size = -(-options.batch_size // ways) * ways
    passes, pixels = {}, crop_options(trained, options.crop_fraction, options.interpolation)
    print(f"{options.run} at step {trained.step}: {describe_crop(trained, **pixels)}", flush=True)
    for split, source in sources.items():
        images = make_pass(
            trained, source, mesh, batch_size=batch_size, **pixels, limit=options.limit, threads=options.threads
        )
        passes[split] = Pass(
            min(options.limit or len(source), len(source)),
            batch_size,
            lambda start, images=images: iter(images.dataset[start:].to_iter_dataset(images.options)),
        )
    params = trained.params["encoder"]
    identity = {
        "checksums": checkpoint.checksums(params), "step": trained.step, "encoder": trained.config["encoder"],
        "image_size": list(trained.image_size), **{name: list(x) for name, x in trained.normalization.items()}, "pool": pool,
        **pixels, "limit": options.limit,
        **{split: source.fingerprint() for split, source in sources.items()},
    }  # fmt: skip
    features = make_all_features(trained.encoder, **trained.normalization, pool=pool)

    def wanted(params, batch) -> dict:
        found = features(params, batch["image"])
        return {f"block_{block}": found[block] for block in blocks}

    run = jit_on_mesh(wanted, mesh)
    on_devices = jax.device_put(params, sharding.replicated(mesh))
    return open_cache(
        out / "features", identity, passes, partial(run, on_devices), blocks, options.dtype, partial(print, flush=True),
        options.max_bad_fraction,
    )  # fmt: skip


def labeled(cache: FeatureCache, sources: dict, options: Namespace) -> dict:
    """Which images are used for what, by index, and their labels; says which classes lack images.

    "train" and "test": rows of the cache with a label. "fit" and "validation": indices into those of "train".
    """
    sets: dict = {"classes": len(sources["train"].classes)}
    for split, source in sources.items():
        labels = cache.labels(split)
        sets[split] = np.flatnonzero(labels >= 0)
        sets[f"{split}_labels"] = labels[sets[split]]
        if not len(sets[split]):
            raise DataError("no image with a label could be read", source.describe(), "look at what was said of each")
        counts = np.bincount(sets[f"{split}_labels"], minlength=sets["classes"])
        if lacking := [utf8_name(source.classes[n]) for n in np.flatnonzero(counts == 0)]:
            more = ", ..." if len(lacking) > 5 else ""
            print(f"classes without {split} images ({len(lacking)}): {', '.join(lacking[:5])}{more}", flush=True)
    labels = sets["train_labels"]
    if not np.isin(sets["test_labels"], labels).any():
        raise DataError(
            "no class has training and test images", sources["test"].describe(), "give both the same folders of classes"
        )
    if len(np.unique(labels)) < 2:
        raise DataError(
            f"{len(labels)} images of one class: a probe needs two",
            sources["train"].describe(),
            "give a higher --limit",
        )
    sets["fit"], sets["validation"] = subsets.split_by_class(labels, options.validation_fraction, options.seed)
    if not len(sets["validation"]):
        raise DataError(
            f"{len(labels)} images, one of each class: none to choose settings by", sources["train"].describe(),
            "give more images, or a higher --limit",
        )  # fmt: skip
    sets["plans"] = plans_of(labels, sets["fit"], options) if "fewshot" in options.only else []
    if options.only == ("fewshot",) and not sets["plans"]:
        raise DataError("no few-shot draw is left", sources["train"].describe(), "give lower --shots, or --fractions")
    return sets


def plans_of(
    labels: Int[np.ndarray, " m"], fit: Int[np.ndarray, " p"], options: Namespace
) -> list[tuple[str, list[Int[np.ndarray, " q"]]]]:
    """(name, indices into `fit` of each draw) of each few-shot setting; says which take more images than a class has.

    labels: of all training images, whose fractions are meant. fit: those to draw from.
    """
    own = labels[fit]
    least = int(np.unique(own, return_counts=True)[1].min())
    if lacking := [n for n in options.shots if n > least]:
        print(
            f"a class has {least} images to draw from: no draws of {', '.join(map(str, lacking))} per class", flush=True
        )
    plans = [(f"{n} per class", partial(subsets.draw_per_class, own, n)) for n in options.shots if n <= least]
    plans += [(f"{100 * f:g} %", partial(subsets.draw_fraction, own, f, of=labels)) for f in options.fractions]
    return [(name, [draw(seed=seed) for seed in range(options.seeds)]) for name, draw in plans]


class Block(NamedTuple):
    """Features of all training and test images, as they are, and the mean and scale of the training images'."""

    train: Float[np.ndarray, "m d"]
    test: Float[np.ndarray, "n d"]
    standard: tuple[Float[np.ndarray, " d"], Float[np.ndarray, " d"]]

    def train_at(self, indices: Int[np.ndarray, " p"]) -> Float[Array, "p d"]:
        """Of some training images, standardized, on the device: chosen on the host, where there is more room."""
        return probes.standardize(self.train[indices], *self.standard)

    def all_train(self) -> Float[Array, "m d"]:
        return probes.standardize(self.train, *self.standard)

    def all_test(self) -> Float[Array, "n d"]:
        return probes.standardize(self.test, *self.standard)


def probe_blocks(
    cache: FeatureCache, sets: dict, pool: str, left: dict[int, list[str]], options: Namespace
) -> Iterator[list[dict]]:
    """The rows of one pooling, block by block; a group of blocks is in memory, or one, where they are large.

    left: of each block the kinds of probes that are wanted.
    """
    methods = {"logistic": logistic_rows, "ridge": ridge_rows, "knn": knn_rows, "fewshot": few_shot_rows}
    for group in groups_of(cache, [block for block, kinds in left.items() if kinds], len(sets["train"])):
        read = {block: read_block(cache, sets, pool, block) for block in group}
        wanted = {block: features for block, features in read.items() if "linear" in left[block]}
        linear = linear_rows(wanted, sets, options) if wanted else {}
        for block in group:
            rows = [linear[block]] if block in linear else []
            for name in left[block]:
                if name in methods:
                    rows += methods[name](read[block], sets, options)
            yield [{"block": block} | row for row in rows]
        del read, wanted  # before the next are read


def groups_of(cache: FeatureCache, blocks: list[int], count: int) -> Iterator[list[int]]:
    """The blocks in groups of neighbors of one width, whose features of the training images are at most `STACKED`."""
    group: list[int] = []
    for block in blocks:
        width = cache.features("train", block).shape[1]
        fits = not group or (
            width == cache.features("train", group[0]).shape[1] and (len(group) + 1) * count * width * 4 <= STACKED
        )
        if not fits:
            yield group
            group = []
        group = [*group, block]
    if group:
        yield group


def read_block(cache: FeatureCache, sets: dict, pool: str, block: int) -> Block:
    """The labeled images' features of a block, or the half of them that is `pool`."""
    parts = []
    for split in ("train", "test"):
        mapped = cache.features(split, block)
        half = mapped.shape[1] // 2
        columns = slice(None)
        if is_both(cache):
            columns = {"class_token": slice(half), "patches": slice(half, None)}.get(pool, columns)
        parts.append(np.asarray(mapped[:, columns][sets[split]], np.float32))
    return Block(*parts, probes.statistics(parts[0]))


def is_both(cache: FeatureCache) -> bool:
    return json.loads((cache.folder / "meta.json").read_text())["identity"]["pool"] == "both"


def whole_row(method: str, sets: dict, setting: str, validation: float, ranks, begin: float, edge: str = "") -> dict:
    """A row of a probe that was fitted to all training images. edge: see `edge_of`."""
    return {
        "method": method, "images": "all", "setting": setting, "validation_top1": float(validation),
        **probes.accuracies(ranks, sets["classes"]), "draws": 1, "train_images": len(sets["train"]),
        "test_images": len(sets["test"]), "seconds": round(time.monotonic() - begin, 2), "edge": edge,
    }  # fmt: skip


def edge_of(name: str, best: Sequence[int | float], tried: Sequence[int | float], flag: str) -> str:
    """Tells that none but the highest or the lowest value of those `tried` is as good, and what to try then; else "".

    best: the values that the validation images like best, and equally.
    """
    value = best[0]
    if len(tried) < 2 or len(set(best)) > 1 or min(tried) < value < max(tried):
        return ""
    end, factor = ("highest", 10) if value == max(tried) else ("lowest", 0.1)
    further = ",".join(f"{value * factor**n:g}" for n in range(3))
    return f"{name} {value:g} is the {end} that was tried: try {flag}={further}"


def edges(rows: list[dict]) -> Iterator[str]:
    """A line for each end of what a method has tried, with the blocks whose best setting it is."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("edge"):
            found.setdefault((row["method"], row["edge"]), []).append(f"{name_of(row['block'])} of {row['pool']}")
    for (method, edge), where in found.items():
        yield f"{method}, {', '.join(where)}: {edge}"


def linear_rows(read: dict[int, Block], sets: dict, options: Namespace) -> dict[int, dict]:
    """A grid of linear probes for all these blocks at once; then, of each block, the best on all images."""
    begin = time.monotonic()
    fit, validation, labels = sets["fit"], sets["validation"], sets["train_labels"]
    tried = [*itertools.product(options.learning_rates, options.weight_decays)]
    settings = np.float32(tried)
    train = partial(
        probes.sweep, key=jax.random.key(options.seed), classes=sets["classes"], epochs=options.epochs,
        batch_size=min(options.probe_batch_size, max(1, len(labels) // MIN_STEPS)),
    )  # fmt: skip
    grid = np.broadcast_to(settings, (len(read), *settings.shape))
    x = jnp.stack([block.train_at(fit) for block in read.values()])
    found = train(x, labels[fit], grid[..., 0], grid[..., 1])
    del x
    best, top1, equals = [], [], []
    for n, block in enumerate(read.values()):
        each, at = probes.choose_setting(
            probes.ranks(block.train_at(validation), labels[validation], at_index(found, n))
        )
        best.append(at)
        top1.append(each[at])
        equals.append([tried[m] for m in np.flatnonzero(each == each[at])])
    chosen = settings[best][:, None]
    refitted = train(jnp.stack([block.all_train() for block in read.values()]), labels, chosen[..., 0], chosen[..., 1])
    rows = {}
    for n, (name, block) in enumerate(read.items()):
        classifier = at_index(refitted, (n, 0))
        ranks = probes.ranks(block.all_test(), sets["test_labels"], classifier)
        rate, decay = tried[best[n]]
        setting = f"learning rate {rate:g}, weight decay {decay:g}"
        rates, decays = zip(*equals[n], strict=True)
        ends = [edge_of("learning rate", rates, options.learning_rates, "--learning-rates")]
        if decay:  # below 0 there is none
            ends.append(edge_of("weight decay", decays, options.weight_decays, "--weight-decays"))
        row = whole_row("linear", sets, setting, top1[n], ranks, begin, " and ".join(filter(None, ends)))
        if not np.isfinite(np.asarray(classifier.bias)).all():
            print(f"{name_of(name)}: the linear probe diverged at {setting}: give lower --learning-rates", flush=True)
            row |= dict.fromkeys(("validation_top1", "top1", "top5"))
            row |= {"setting": f"diverged at {setting}", "edge": ""}
        rows[name] = row | {"seconds": round(row["seconds"] / len(read), 2)}
    return rows


def at_index(classifiers: probes.Linear, at) -> probes.Linear:
    return probes.Linear(classifiers.weights[at], classifiers.bias[at])


def path_row(
    method: str, name: str, flag: str, fit_path: Callable, strengths: tuple[float, ...], block: Block, sets: dict
) -> dict:
    """A probe at several strengths; then the best of these on all images.

    fit_path(features, labels, strengths, start) -> the classifier of each; start: one to begin from, or None.
    """
    begin = time.monotonic()
    fit, validation, labels = sets["fit"], sets["validation"], sets["train_labels"]
    found = fit_path(block.train_at(fit), labels[fit], strengths, None)
    top1, at = probes.choose_setting(probes.ranks(block.train_at(validation), labels[validation], found))
    refitted = fit_path(block.all_train(), labels, strengths[at : at + 1], at_index(found, at))
    ranks = probes.ranks(block.all_test(), sets["test_labels"], refitted)[:, 0]
    edge = edge_of(name, [strengths[n] for n in np.flatnonzero(top1 == top1[at])], strengths, flag)
    return whole_row(method, sets, f"{name} {strengths[at]:g}", top1[at], ranks, begin, edge)


def logistic_rows(block: Block, sets: dict, options: Namespace) -> Iterator[dict]:
    def fit_path(x, labels, strengths, start):
        return probes.logistic_path(x, labels, np.float32(strengths), start, classes=sets["classes"])

    flag = "--inverse-regularizations"
    yield path_row("logistic", "C", flag, fit_path, options.inverse_regularizations, block, sets)


def ridge_rows(block: Block, sets: dict, options: Namespace) -> Iterator[dict]:
    def fit_path(x, labels, strengths, start):
        return probes.ridge_path(x, labels, strengths, classes=sets["classes"])

    yield path_row("ridge", "regularization", "--regularizations", fit_path, options.regularizations, block, sets)


def knn_rows(block: Block, sets: dict, options: Namespace) -> Iterator[dict]:
    """A row for each number of neighbors. The features are as they are, neither centerd nor scaled."""
    begin, x, y = time.monotonic(), block.train, block.test
    fit, validation, labels = sets["fit"], sets["validation"], sets["train_labels"]
    find = partial(
        probes.nearest_classes, classes=sets["classes"], neighbors=options.neighbors, temperature=options.temperature
    )
    tried = find(x[fit], labels[fit], x[validation])
    found = find(x, labels, y)
    for n, number in enumerate(options.neighbors):
        top1 = (probes.found_ranks(tried[n], labels[validation]) < 1).mean()
        ranks = probes.found_ranks(found[n], sets["test_labels"])
        yield whole_row("knn", sets, neighbors_of(number), top1, ranks, begin)


def few_shot_rows(block: Block, sets: dict, options: Namespace) -> Iterator[dict]:
    """Logistic regression and k-NN on few of the images to fit to, over several subsets.

    As many neighbors are asked as the smallest class has images, and at most `FEW_SHOT_NEIGHBOURS`.
    """
    labels, classes = sets["train_labels"], sets["classes"]
    fit, validation = sets["fit"], sets["validation"]
    tried_on, tested_on = block.train_at(validation), block.all_test()
    judged = (labels[validation], sets["test_labels"])
    for images, drawn_at in sets["plans"]:
        begin, found = time.monotonic(), {"logistic": [], "knn": []}
        neighbors = min(FEW_SHOT_NEIGHBOURS, int(np.unique(labels[fit[drawn_at[0]]], return_counts=True)[1].min()))
        for drawn in (fit[indices] for indices in drawn_at):
            classifier = probes.logistic_path(
                block.train_at(drawn), labels[drawn], np.float32([FEW_SHOT_C]), classes=classes
            )
            find = partial(
                probes.nearest_classes, block.train[drawn], labels[drawn], classes=classes,
                neighbors=(neighbors,), temperature=options.temperature,
            )  # fmt: skip
            given = zip((tried_on, tested_on), judged, strict=True)
            found["logistic"].append([probes.ranks(z, of, classifier)[:, 0] for z, of in given])
            queries = (block.train[validation], block.test)
            found["knn"].append([probes.found_ranks(find(z)[0], of) for z, of in zip(queries, judged, strict=True)])
        settings = {"logistic": f"C {FEW_SHOT_C:g}", "knn": neighbors_of(neighbors)}
        for method, ranks in found.items():
            tried = [probes.accuracies(each[0], classes)["top1"] for each in ranks]
            tested = [probes.accuracies(each[1], classes) for each in ranks]
            top1 = subsets.spread([each["top1"] for each in tested])
            yield {
                "method": method, "images": images, "setting": settings[method],
                "validation_top1": float(np.mean(tried)), "top1": top1["mean"],
                "top5": float(np.mean([each["top5"] for each in tested])) if classes > 5 else None,
                "draws": options.seeds, "top1_std": top1["std"], "top1_least": top1["least"],
                "top1_greatest": top1["process_max"], "train_images": len(drawn), "test_images": len(sets["test"]),
                "seconds": round((time.monotonic() - begin) / 2, 2),
            }  # fmt: skip


def neighbors_of(number: int) -> str:
    return f"{number} neighbor{'' if number == 1 else 's'}"


def mark_chosen(rows: list[dict]) -> None:
    """Say of each row whether the validation images prefer it to all of its method and number of images."""
    best: dict[tuple, dict] = {}
    for row in rows:
        kind = (row["method"], row["images"])
        if row["validation_top1"] is None:  # it diverged
            continue
        if kind not in best or row["validation_top1"] > best[kind]["validation_top1"]:
            best[kind] = row
    for row in rows:
        row["chosen"] = any(row is each for each in best.values())


def tell(rows: list[dict]) -> None:
    """One line of a block: top-1 in percent of each method on all training images, or where there are none, on few.

    Of several rows of a method that is the one which the validation images prefer.
    """
    best: dict[str, dict] = {}
    for row in [row for row in rows if row["images"] == "all"] or rows:
        name = row["method"] if row["images"] == "all" else f"{row['method']} {row['images']}"
        if name not in best or row["validation_top1"] > best[name]["validation_top1"]:
            best[name] = row
    found = ", ".join(
        f"{name} diverged" if row["top1"] is None else f"{name} {100 * row['top1']:.1f}" for name, row in best.items()
    )
    seconds = sum({(row["method"], row["images"]): row["seconds"] for row in rows}.values())
    print(f"{name_of(rows[0]['block'])}, {rows[0]['pool']}: {found} ({seconds:.1f} s)", flush=True)


def name_of(block: int) -> str:
    return f"block {block}" if block else "output"


def csv_of(rows: list[dict]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def table(rows: list[dict], paper: int, depth: int) -> Iterator[str]:
    """For each method and number of images, what the paper's block gives and what the validation images choose."""
    yield f"\npaper: block {paper} of {depth}, mean of patch tokens; best: the block that the validation images choose"
    yield f"{'method':10}{'images':13}{'paper top-1':>17}{'top-5':>8}   {'best top-1':>17}{'top-5':>8}   which"
    chosen = {(row["method"], row["images"]): row for row in rows if row["chosen"]}
    for kind in dict.fromkeys((row["method"], row["images"]) for row in rows):
        best = chosen.get(kind)
        papers = [row for row in rows if row["paper"] and (row["method"], row["images"]) == kind]
        papers = [row for row in papers if row["validation_top1"] is not None]
        paper_row = max(papers, key=lambda row: row["validation_top1"], default=None)
        which = f"{name_of(best['block'])}, {best['pool']}, {best['setting']}" if best else "diverged everywhere"
        yield f"{kind[0]:10}{kind[1]:13}{_numbers_of(paper_row)}   {_numbers_of(best)}   {which}"


def _numbers_of(row: dict | None) -> str:
    if row is None:
        return f"{'-':>17}{'-':>8}"
    spread = f" +- {100 * row['top1_std']:4.2f}" if row["top1_std"] is not None else ""
    top5 = f"{100 * row['top5']:.2f}" if row["top5"] is not None else "-"
    top1 = f"{100 * row['top1']:.2f}{spread}"
    return f"{top1:>17}{top5:>8}"


def write_picture(path: Path, rows: list[dict], paper: int) -> None:
    """Top-1 over the blocks: of each pooling a panel for the whole training set, and one for few-shot subsets."""
    rows = [row for row in rows if row["top1"] is not None]
    if not rows:
        return
    blocks = sorted({row["block"] for row in rows}, key=lambda block: block or math.inf)
    ticks = [str(block) if block else "out" for block in blocks]
    panels = []
    for pool in dict.fromkeys(row["pool"] for row in rows):
        for few in (False, True):
            curves: dict[tuple[str, str], list] = {}
            for row in (r for r in rows if r["pool"] == pool and (r["images"] != "all") == few):
                top1 = row["top1"]
                band = (top1, row["top1_least"], row["top1_greatest"]) if few else (top1,) * 3
                detail = row["images"] if few else row["setting"] if row["method"] == "knn" else ""
                curve = curves.setdefault((row["method"], detail), [])
                curve.append((blocks.index(row["block"]), *(100 * each for each in band)))
            details = list(dict.fromkeys(detail for _, detail in curves))
            drawn = [
                Curve(
                    f"{method} {detail}".strip(), points, details.index(detail) if few else n, few and method == "knn"
                )
                for n, ((method, detail), points) in enumerate(curves.items())
            ]
            title = f"{pool}: " + ("few labels, mean and range over draws" if few else "all training images")
            if drawn:
                marked = blocks.index(paper) if paper in blocks and pool == "patches" else None
                panels.append(Panel(f"top-1, {title}", drawn, marked))
    sheet = draw_curves(panels, ticks)
    write_atomically(path, lambda partial: Image.fromarray(sheet).save(partial, "PNG"))
