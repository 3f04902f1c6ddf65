"""python -m simmim_jax.tools.prepare SOURCE DEST [options]

Images once reduced to what training needs, in ArrayRecord shards: DEST is then a data.path. `prepared` plans and
checks, `shards` writes.
"""

import argparse
import contextlib
import math
import os
import re
import shlex
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable

from tqdm import tqdm

from simmim_jax.errors import (
    ConfigError,
    DataError,
    Parser,
    Preempted,
    check_minimum,
    choose,
    suggest,
)
from simmim_jax.tools.cli import start

EXAMPLES = """\
examples:
  a folder of photographs, by class or not, with train/ and val/ or without, to sides of 256 pixels:
    python -m simmim_jax.tools.prepare DIR PREPARED
    python -m simmim_jax.main --config configs/folder_vit_small.py --config.data.path=PREPARED --workdir runs/mine
  every image at its size, for random access to what parquet files or tar files hold:
    python -m simmim_jax.tools.prepare 'shards/{split}-*.tar' PREPARED --short-side=0
  a data set that TFDS has prepared:
    python -m simmim_jax.tools.prepare PREPARED --source=tfds --name=imagenet2012 --data-dir=TFDS_DIR
  are all bytes as they were written?
    python -m simmim_jax.tools.prepare --verify PREPARED

Interrupted? The same command goes on, and ends with the same bytes.
"""
SETTINGS = ("short_side", "quality", "subsampling", "channels", "max_pixels")  # what decides the bytes of a shard
LINE_EVERY = 10.0  # seconds between lines of progress where nobody watches a bar
TRAIN = "python -m simmim_jax.main --config configs/folder_vit_small.py"
NAMED = 3  # files of a kind that a report names


class Stopped(Preempted):
    """A SIGTERM or SIGINT came: shards that are done stay, and the same command goes on."""

    def __init__(self, signal_number: int, fix: str):
        super().__init__(signal_number, 0)
        self.fix = fix

    def __str__(self) -> str:
        return f"stopped by {self.name}: shards that are done stay; {self.fix}"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.prepare",
        usage="%(prog)s SOURCE DEST [options]\n       %(prog)s --verify DEST",
        description="Write images as ArrayRecord shards, reduced to what training needs.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("paths", nargs="*", metavar="SOURCE DEST", help="a data.path, and the folder to write to")
    add = parser.add_argument
    add(
        "--short-side", type=int, default=256, metavar="N", help="pixels, of images that are larger; 0: all as they are"
    )
    add("--quality", type=int, default=92, metavar="N", help="of JPEG, 1 to 100 (default: 92)")
    add("--subsampling", default="420", metavar="420|444", help="of the colors in JPEG (default: 420)")
    add("--channels", type=int, default=3, metavar="N", help="3, 1 for gray, or as many as all images have")
    add(
        "--split", default="", metavar="A,B", help="default: train, and of val, valid, validation, test those there are"
    )
    add(
        "--source",
        default="auto",
        metavar="KIND",
        help="as data.source, where SOURCE does not tell it: folder, list, ...",
    )
    add("--name", default="", help="of a TFDS data set: then DEST alone is given")
    add("--data-dir", default="", metavar="DIR", help="of TFDS, or of the files that a list names")
    add("--shards", type=int, metavar="N", help="of each split (default: of about 256 MiB each)")
    add("--workers", type=int, metavar="N", help="processes (default: one for each core; 0: in this one)")
    add("--max-pixels", type=int, default=64_000_000, metavar="N", help="larger images are refused")
    add(
        "--max-bad-fraction",
        type=float,
        default=0.01,
        metavar="R",
        help="of images that may be refused (default: 0.01)",
    )
    add("--overwrite", action="store_true", help="start anew; replaces nothing that prepare has not written")
    add("--verify", action="store_true", help="check every byte of a DEST")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with `path` and `dest`. Raises ConfigError for what is not one, with the nearest."""
    parser = make_parser()
    options, surplus = parser.parse_known_args([_hyphens(argument) for argument in argv])
    if surplus:
        known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        raise ConfigError(f"unknown argument {surplus[0]!r}", "command line", suggest(surplus[0].split("=")[0], known))
    alone = options.verify or options.name or options.source == "digits"
    wanted = ["DEST"] if alone else ["SOURCE", "DEST"]
    if len(options.paths) != len(wanted) or not all(options.paths):
        given = " ".join(map(repr, options.paths)) or "nothing"
        raise ConfigError(f"{given} where {' and '.join(wanted)} should be", "command line", "see --help")
    *path, dest = (os.path.abspath(os.path.expanduser(path)) for path in options.paths)
    options.path, options.dest = path[0] if path else "", dest
    check_minimum("--short-side", options.short_side, 0)
    for name in ("quality", "channels", "max_pixels"):
        check_minimum(f"--{name.replace('_', '-')}", getattr(options, name), 1)
    if options.quality > 100:
        raise ConfigError(f"quality is {options.quality}", "--quality", "give a number from 1 to 100")
    choose("subsampling", options.subsampling, {"420", "444"})
    if not 0 <= options.max_bad_fraction <= 1:
        raise ConfigError(f"max-bad-fraction is {options.max_bad_fraction}", "--max-bad-fraction", "give one of 0 to 1")
    if options.shards is not None:
        check_minimum("--shards", options.shards, 1)
    if options.workers is None:
        cores = getattr(os, "sched_getaffinity", None)  # not on macOS
        options.workers = len(cores(0)) if cores else os.cpu_count() or 1
    check_minimum("--workers", options.workers, 0)
    options.splits = [split for split in options.split.split(",") if split]
    for split in options.splits:
        if "/" in split or split.startswith("."):
            raise ConfigError(f"a split {split!r}", "--split", "give names like train,val: each becomes a folder")
    return options


def _hyphens(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return (flag.replace("_", "-") if flag.startswith("--") else flag) + equals + value


# --- what SOURCE has


def open_splits(options: argparse.Namespace) -> dict:
    """The sources of all splits that are asked for, by the names of their folders in DEST."""
    from simmim_jax.data.sources import make_source

    def open_split(split: str):
        where = {"path": options.path, "name": options.name, "data_dir": options.data_dir}
        return make_source(options.source, **where, split=split, heldout_fraction=0.0)

    if options.splits:
        return {split: open_split(split) for split in options.splits}
    train = open_split("train")
    sides = evaluation_splits(options.path, train.fingerprint()["source"], open_split)
    return {"train": train} | {side: open_split(side) for side in sides}


def evaluation_splits(path: str, kind: str, open_split: Callable) -> list[str]:
    """Which of val, valid, validation and test a source of this kind has by that name: `open_split` takes any for any.

    open_split: the source of a split of a TFDS data set, or a DataError.
    """
    from simmim_jax.data.sources import KINDS
    from simmim_jax.data.sources.folder import split_folders
    from simmim_jax.data.sources.splits import EVALUATION, select

    def there(side: str) -> bool:
        if kind == "tfds":
            with contextlib.suppress(DataError):
                return bool(open_split(side))
            return False
        # of a prepared folder the manifest is looked for, which lies where its shards do
        extensions = next(extensions for extensions, of_kind in KINDS.items() if of_kind == kind)
        return select(path, side, extensions, kind).own == side

    if kind == "digits":
        return ["test"]
    if kind == "folder":
        return [side for side in EVALUATION if side in split_folders(path)]
    return [side for side in EVALUATION if there(side)]


def one_numbering(sources: dict) -> tuple[list[str], dict[str, list[int]]]:
    """The classes of all splits, and what the labels of each become, so that a number means one class everywhere."""
    classes = max((list(source.classes) for source in sources.values()), key=len)
    if any(list(source.classes) != classes[: len(source.classes)] for source in sources.values()):
        classes = sorted({name for source in sources.values() for name in source.classes})
    number = {name: label for label, name in enumerate(classes)}
    return classes, {split: [number[name] for name in source.classes] for split, source in sources.items()}


# --- the work


class Signals:
    """Answers SIGINT and SIGTERM while entered: by raising `Stopped`, at once or, if `patient`, in the next `poll`."""

    def __init__(self, fix: str):
        self.fix, self.number, self.patient = fix, 0, False

    def poll(self) -> None:
        if self.number:
            raise Stopped(self.number, self.fix)

    def _on_signal(self, number, frame):
        if not self.number:  # a second one is late: all is about to end
            self.number = number
            if not self.patient:
                self.poll()

    def __enter__(self):
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


class Progress:
    """A bar on a terminal; elsewhere a line now and then."""

    def __init__(self, title: str, total: int, done: int, refused: int):
        self.title, self.total, self.done, self.refused, self.began = title, total, done, refused, time.monotonic()
        self.first, self.lined = done, self.began
        is_terminal = sys.stderr.isatty()
        self.bar = tqdm(desc=title, total=total, initial=done, unit=" images", disable=not is_terminal, file=sys.stderr)

    def add(self, count: int, refused: int) -> None:
        self.done, self.refused = self.done + count, self.refused + refused
        self.bar.update(count)
        self.bar.set_postfix_str(f"{self.refused} refused", refresh=False)
        if self.bar.disable and time.monotonic() > self.lined + LINE_EVERY:
            self.lined = time.monotonic()
            line = f"{self.title}: {self.done:,} of {self.total:,} images, {self.rate():,.0f} images/s"
            print(f"{line}, {self.refused} refused", file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Images per second, of this run."""
        return (self.done - self.first) / max(time.monotonic() - self.began, 1e-9)


def run(argv: list[str]) -> None:
    """Prepare, or verify, as the command line says."""
    options = parse(argv)
    # a rerun with --overwrite would begin again
    fix = f"run the same command{', without --overwrite,' if options.overwrite else ''} again to go on"
    try:
        if options.verify:
            verify(options)
            return
        with Signals(fix) as signals:
            prepare(options, signals)
    except BrokenPipeError:
        raise
    except OSError as error:
        what, where = f"cannot read or write: {error.strerror or error}", str(error.filename or options.dest)
        raise DataError(what, where, "mend that and run again: what is done stays") from error
    except MemoryError as error:
        fix = "set --workers or --max-pixels lower, and run again: what is done stays"
        raise DataError("not enough memory", options.dest, fix) from error


def prepare(options: argparse.Namespace, signals: Signals) -> None:
    """All splits of SOURCE into DEST, one after the other."""
    from simmim_jax.tools.prepare import (
        prepared,  # grain and JAX come in with the data: help and mistakes are told without
    )

    prepared.check_places(options.path, options.dest)
    sources = open_splits(options)
    classes, labels = one_numbering(sources)
    settings = {key: getattr(options, key) for key in SETTINGS}
    with prepared.held(options.dest):
        prepared.check_numbering(options.dest, classes, beside=set(sources))
        plans = {}
        for split, source in sources.items():  # all are looked at before any is begun
            folder = os.path.join(options.dest, split)
            plans[split] = prepared.make_plan(
                folder, source, classes=classes, settings=settings, shards=options.shards, overwrite=options.overwrite
            )
        # the plans of all splits before the first shard: a split that is not begun must not look as if there were none
        begun = {split: prepared.begin(plan, sources[split]) for split, plan in plans.items() if not plan.manifest}
        for split, source in sources.items():
            if manifest := plans[split].manifest:
                prepared.leave_finished(plans[split].folder)
                count = f"{manifest['count']:,} images in {shards_of(manifest)}"
                print(f"{plans[split].folder} is finished: {count}")
            else:
                manifest = prepare_split(plans[split], source, labels[split], *begun[split], options, signals)
            if split == "train":
                mean, std = (",".join(f"{value:.4f}" for value in manifest[key]) for key in ("mean", "std"))
                is_flat = min(manifest["std"]) < 1e-4  # a channel of one value, by which nothing can be divided
    if "train" in sources:
        path = shlex.quote(options.dest)
        print("\nto train on it" + (":" if is_flat else ", and, if you like, to normalize by its own mean and std:"))
        print(f"  {TRAIN} --config.data.path={path} --workdir runs/mine", flush=True)
        if not is_flat:
            print(f"  --config.mean={mean} --config.std={std}", flush=True)


def prepare_split(
    plan, source, labels: list[int], tasks: list, done: dict, options: argparse.Namespace, signals: Signals
) -> dict:
    """Make what is missing of one split, which has been begun, and report it: the manifest."""
    from simmim_jax.tools.prepare import prepared, shards

    refused = [fault for made in done.values() for fault in made.refused]
    allowed = max(1, math.ceil(options.max_bad_fraction * len(source)))
    split = os.path.basename(plan.folder)
    progress = Progress(split, len(source), sum(task.stop - task.start for task in done), len(refused))

    def tell(count: int, faults: list) -> None:
        refused.extend(faults)
        progress.add(count, len(faults))
        if len(refused) > allowed:
            named = ", ".join(f"{name!r} ({reason})" for name, reason in refused[-NAMED:])
            fix = "mend them and use --overwrite, or raise --max-bad-fraction: at 1, all are listed in refused.csv"
            what = f"{len(refused)} images cannot be used, of at most {allowed}, the last being {named}"
            raise DataError(what, source.describe(), fix)

    signals.patient = True
    try:
        tell(0, [])
        missing = [task for task in tasks if task not in done]
        shards.write_shards(
            source, missing, plan.settings, labels, workers=options.workers, tell=tell, poll=signals.poll
        )
        signals.poll()
    finally:
        signals.patient = False
        progress.bar.close()
    manifest, made = prepared.finish(plan, tasks)
    report(split, plan.folder, manifest, made, progress)
    return manifest


def shards_of(manifest: dict) -> str:
    count = len(manifest["shards"])
    return f"{count:,} shard" + "s" * (count > 1)


def report(split: str, folder: str, manifest: dict, made, progress: Progress) -> None:
    """Print what has become of one split."""
    count, before, after = manifest["count"], made.source_bytes, manifest["bytes"]
    ours = shards_of(manifest) + (f", {len(manifest['classes'])} classes" * bool(manifest["classes"]))
    numbers = [" ".join(f"{value:.4f}" for value in manifest[key]) for key in ("mean", "std")]
    print(f"{split}: {count:,} images in {ours}: {folder}")
    print(f"  size   {before / 2**20:,.1f} MiB before, {after / 2**20:,.1f} MiB now ({after / max(before, 1):.0%})")
    print(f"  bytes  kept as they were of {made.kept:,} images, of {count - made.kept:,} made anew")
    print(f"  speed  {progress.rate():,.0f} images/s")
    print(f"  mean   {numbers[0]}\n  std    {numbers[1]}")
    if not made.refused:
        return
    reasons = defaultdict(list)
    for name, reason in made.refused:
        reasons[re.sub(r"\d+", "#", reason)].append((name, reason))
    print(f"  refused {len(made.refused)}, all listed in {os.path.join(folder, 'refused.csv')}:")
    for faults in sorted(reasons.values(), key=len, reverse=True)[:5]:
        named = ", ".join(repr(name) for name, _ in faults[:NAMED])
        print(f"    {len(faults)} because: {faults[0][1]!r}: {named}{', ...' if len(faults) > NAMED else ''}")


def verify(options: argparse.Namespace) -> None:
    """Read every byte of DEST, and say of each folder in it whether it is whole. Raises DataError if one is not."""
    from simmim_jax.tools.prepare import prepared

    faults, folders = 0, prepared.prepared_folders(options.dest)
    for folder in folders:
        found = prepared.damaged_shards(folder, workers=options.workers or 1)
        faults += len(found)
        for fault in found:
            print(f"{folder}: {fault}")
        if not found:
            manifest = prepared.read_manifest(folder)
            print(f"{folder}: whole ({manifest['count']:,} images in {shards_of(manifest)})", flush=True)
    if not folders:
        raise DataError("nothing prepared is here", options.dest, "give the DEST of an earlier prepare")
    if faults:
        raise DataError(
            f"{faults} damaged or missing, as listed above", options.dest, "prepare it again, with --overwrite"
        )


if __name__ == "__main__":
    start(run)
