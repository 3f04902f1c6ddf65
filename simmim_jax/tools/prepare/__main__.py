"""python -m simmim_jax.tools.prepare SOURCE DEST [options]

Resize images once and store them in ArrayRecord shards: DEST is then a data.path. `destination` plans and verifies,
`shards` writes.
"""

import argparse
import contextlib
import importlib.util
import math
import os
import re
import shlex
import signal
from collections import defaultdict
from collections.abc import Callable
from functools import partial

from simmim_jax.errors import ConfigError, DataError, Parser, Preempted, choose
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  a folder of photographs, flat or by class, with or without train/ and val/, resized to 256 pixels:
    python -m simmim_jax.tools.prepare DIR PREPARED
    python -m simmim_jax.main --config configs/folder_vit_small.py --config.data.path=PREPARED --workdir runs/mine
  every image at its size, for random access to images in parquet or tar files:
    python -m simmim_jax.tools.prepare 'shards/{split}-*.tar' PREPARED --short-side=0
  a prepared TFDS data set:
    python -m simmim_jax.tools.prepare PREPARED --source=tfds --name=imagenet2012 --data-dir=TFDS_DIR
  check every byte:
    python -m simmim_jax.tools.prepare --verify PREPARED

  a job array of 64 machines with a shared DEST, and then once, on one of them, to finish it:
    python -m simmim_jax.tools.prepare DIR PREPARED --process=I --processes=64
    python -m simmim_jax.tools.prepare DIR PREPARED

If it is interrupted, the same command continues, and writes the same bytes as an unbroken run.
"""
TRAIN = "python -m simmim_jax.main --config configs/folder_vit_small.py"
MAX_NAMED = 3  # files of one kind in a message


class Stopped(Preempted):
    """SIGTERM or SIGINT: finished shards stay, and the same command continues."""

    def __init__(self, signal_number: int, fix: str):
        super().__init__(signal_number, 0)
        self.fix = fix

    def __str__(self) -> str:
        return f"stopped by {self.name}: finished shards stay; {self.fix}"


def make_parser() -> Parser:
    description = "Resize images once and store them in ArrayRecord shards."
    usage = "%(prog)s SOURCE DEST [options]\n       %(prog)s --verify DEST"
    parser = cli.make_parser("prepare", description, EXAMPLES, usage)
    add, number = parser.add_argument, cli.number
    add("paths", nargs="*", metavar="SOURCE DEST", help="a data.path, and the folder to write to")
    add("--short-side", type=number(int, 0), default=256, metavar="N", help="pixels if larger (default: 256; 0: any)")
    add("--quality", type=number(int, 1, 100), default=92, metavar="N", help="JPEG quality, 1 to 100 (default: 92)")
    add("--subsampling", default="420", metavar="420|444", help="JPEG chroma subsampling (default: 420)")
    add("--channels", type=number(int, 1), metavar="N", help="3, 1 for gray, or what all images have (the default)")
    add("--split", default="", metavar="A,B", help="default: train, val, valid, validation, test")
    add("--source", default="auto", metavar="KIND", help="data.source: folder, list, ... (default: auto)")
    add("--name", default="", help="name of a TFDS data set; SOURCE is omitted then")
    add("--data-dir", default="", metavar="DIR", help="of TFDS data sets, or of the files named in a list")
    add("--shards", type=number(int, 1), metavar="N", help="per split (default: shards of about 256 MiB)")
    add("--workers", type=number(int, 0), metavar="N", help="processes (default: one per core; 0: only the main one)")
    add("--process", type=number(int, 0), metavar="I", help="with --processes: write each N-th shard, from I on")
    add("--processes", type=number(int, 1), metavar="N", help="number of processes that share DEST")
    add("--beam", metavar="OPTIONS", help='run as an Apache Beam pipeline, like --beam="--runner=DirectRunner"')
    add("--max-pixels", type=number(int, 1), default=64_000_000, metavar="N", help="larger images are refused")
    cli.add_max_bad_fraction(parser)
    cli.add_overwrite(parser)
    add("--verify", action="store_true", help="check every byte of DEST")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, with `path` and `dest`. Raises ConfigError."""
    options = cli.parse_known(make_parser(), argv)
    only_dest = options.verify or options.name or options.source == "digits"
    expected = ["DEST"] if only_dest else ["SOURCE", "DEST"]
    if len(options.paths) != len(expected) or not all(options.paths):
        given = " ".join(map(repr, options.paths)) or "nothing"
        raise ConfigError(f"{given} instead of {' and '.join(expected)}", "command line", "see --help")
    *path, dest = (os.path.abspath(os.path.expanduser(path)) for path in options.paths)
    options.path, options.dest = path[0] if path else "", dest
    choose("subsampling", options.subsampling, {"420", "444"})
    if options.workers is None:
        cores = getattr(os, "sched_getaffinity", None)  # not on macOS
        options.workers = len(cores(0)) if cores else os.cpu_count() or 1
    if (options.process is None) != (options.processes is None):
        raise ConfigError("--process and --processes belong together", "command line", "give both, or none")
    if options.processes and options.process >= options.processes:
        what = f"process {options.process} of {options.processes}"
        raise ConfigError(what, "--process", f"give 0 to {options.processes - 1}")
    if options.beam is not None:
        if options.processes:
            raise ConfigError("--beam with --processes", "command line", "give one of them")
        if not importlib.util.find_spec("apache_beam"):
            raise ConfigError("Apache Beam is not installed", "--beam", "pip install apache-beam")
    if options.processes and options.overwrite:
        raise ConfigError("--overwrite with --processes", "command line", "remove DEST first, or give another")
    options.splits = [split for split in options.split.split(",") if split]
    for split in options.splits:
        if "/" in split or split.startswith("."):
            raise ConfigError(f"a split {split!r}", "--split", "give names like train,val: each becomes a folder")
    return options


def run(argv: list[str]) -> None:
    """Prepare or verify."""
    options = parse(argv)
    # with --overwrite, the same command would start from the beginning
    fix = f"run the same command{', without --overwrite,' if options.overwrite else ''} again to continue"
    stays = "run the same command again: finished shards stay"
    with cli.translate_errors(DataError, options.dest, stays, f"set --workers or --max-pixels lower, and {stays}"):
        if options.verify:
            verify(options)
        else:
            with Signals(fix) as signals:
                prepare(options, signals)


# --- the splits of SOURCE


def open_splits(options: argparse.Namespace) -> dict:
    """The sources of all requested splits, by the names of their folders in DEST."""
    from simmim_jax.data.sources import make_source
    from simmim_jax.data.sources.classes import compare_classes
    from simmim_jax.data.sources.unread import one_report

    def open_split(split: str):
        where = {"path": options.path, "name": options.name, "data_dir": options.data_dir}
        return make_source(options.source, **where, split=split, heldout_fraction=0.0)

    with one_report():
        if options.splits:
            return {split: open_split(split) for split in options.splits}
        train = open_split("train")
        sides = evaluation_splits(options.path, train.fingerprint()["source"], open_split)
        sources = {side: open_split(side) for side in sides}
    for source in sources.values():
        if train.classes and source.classes == train.classes:
            compare_classes(train, source, required=False)
    return {"train": train} | sources


def evaluation_splits(path: str, kind: str, open_split: Callable) -> list[str]:
    """Which of val, valid, validation and test a source has under exactly this name.

    open_split: opens a split. Only used for TFDS, because other kinds accept any of the names for any other.
    """
    from simmim_jax.data.sources import KINDS
    from simmim_jax.data.sources.folder import split_folders
    from simmim_jax.data.sources.splits import EVALUATION, select

    def exists(side: str) -> bool:
        if kind == "tfds":
            with contextlib.suppress(DataError):
                return bool(open_split(side))
            return False
        extensions = next(extensions for extensions, of_kind in KINDS.items() if of_kind == kind)
        return select(path, side, extensions, kind).own == side

    if kind == "digits":
        return ["test"]
    if kind == "folder":
        return [side for side in EVALUATION if side in split_folders(path)]
    return [side for side in EVALUATION if exists(side)]


def merge_classes(sources: dict) -> tuple[list[str], dict[str, list[int]]]:
    """(the classes of all splits, the new labels of each split), so that a label means one class in all splits."""
    from simmim_jax.data.sources.classes import order_classes

    classes = max((list(source.classes) for source in sources.values()), key=len)
    if any(list(source.classes) != classes[: len(source.classes)] for source in sources.values()):
        classes = list(order_classes(name for source in sources.values() for name in source.classes))
    number = {name: label for label, name in enumerate(classes)}
    return classes, {split: [number[name] for name in source.classes] for split, source in sources.items()}


# --- prepare


class Signals:
    """Raise `Stopped` for SIGINT and SIGTERM: at once, or at the next `poll` if `deferred`."""

    def __init__(self, fix: str):
        self.fix, self.number, self.deferred = fix, 0, False

    def poll(self) -> None:
        if self.number:
            raise Stopped(self.number, self.fix)

    def _on_signal(self, number, frame):
        if not self.number:  # the first signal already ends everything
            self.number = number
            if not self.deferred:
                self.poll()

    def __enter__(self):
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def prepare(options: argparse.Namespace, signals: Signals) -> None:
    """Prepare all splits of SOURCE, one after the other."""
    from simmim_jax.data.sample import PixelOptions, find_pixels
    from simmim_jax.tools.prepare import destination
    from simmim_jax.tools.prepare.shards import Settings

    destination.check_paths(options.path, options.dest)
    sources = open_splits(options)
    classes, labels = merge_classes(sources)
    first = next(iter(sources.values()))
    pixels, remarks = find_pixels(first, PixelOptions(channels=options.channels or 0), options.max_pixels)
    print(*remarks, sep="\n", end="\n" if remarks else "")
    how = {name: getattr(options, name) for name in ("short_side", "quality", "subsampling", "max_pixels")}
    settings = Settings(**how, channels=pixels.channels, samples=pixels.samples)
    job = destination.Job(options.process, options.processes) if options.processes else None
    with destination.lock(options.dest, job):
        destination.check_classes(options.dest, classes, splits=set(sources))
        how = {
            "classes": classes,
            "settings": settings,
            "pixels": pixels,
            "shards": options.shards,
            "overwrite": options.overwrite,
        }
        plans = {  # check all splits before any is begun
            split: destination.make_plan(os.path.join(options.dest, split), source, **how)
            for split, source in sources.items()
        }
        # write all plans before the first shard: a split without a plan would look as if it did not exist
        begun = {
            split: destination.begin(plan, sources[split], job) for split, plan in plans.items() if not plan.manifest
        }
        manifests = {}
        for split, source in sources.items():
            if manifest := plans[split].manifest:
                destination.remove_working_files(plans[split].folder)
                count = f"{manifest['count']:,} images in {shard_count(manifest)}"
                print(f"{plans[split].folder} is finished: {count}")
            else:
                made = partial(write_split, plans[split], source, labels[split], *begun[split], options, signals)
                if job:
                    made()
                    continue
                manifest = finish_split(plans[split], begun[split][0], rate=made())
            manifests[split] = manifest
    if job and len(manifests) < len(sources):
        print(f"process {job.process} of {job.processes}: its shards are written. When those of all processes are, run")
        print("the same command once without --process and --processes: it writes the manifest")
        return
    if "train" in manifests:
        print_command(options.dest, manifests["train"])


def write_split(
    plan, source, labels: list[int], tasks: list, done: dict, options: argparse.Namespace, signals: Signals
) -> float:
    """Write the missing ones of these shards of a split. Returns the images per second."""
    from simmim_jax.tools.prepare import shards

    refused = [fault for made in done.values() for fault in made.refused]
    allowed = max(1, math.ceil(options.max_bad_fraction * len(source)))
    split = os.path.basename(plan.folder)
    total = sum(task.stop - task.start for task in tasks)
    progress = cli.Progress(split, total, sum(task.stop - task.start for task in done), len(refused))

    def report(count: int, faults: list) -> None:
        refused.extend(faults)
        progress.add(count, len(faults))
        if len(refused) > allowed:
            named = ", ".join(f"{name!r} ({reason})" for name, reason in refused[-MAX_NAMED:])
            what = f"{len(refused)} images cannot be used, of at most {allowed}, the last are {named}"
            fix = "repair them and use --overwrite, or raise --max-bad-fraction: with 1, all are listed in refused.csv"
            raise DataError(what, source.describe(), fix)

    missing = [task for task in tasks if task not in done]
    signals.deferred = options.beam is None
    try:
        report(0, [])
        if options.beam is None:
            how = {"workers": options.workers, "report": report, "poll": signals.poll}
            shards.write_shards(source, missing, plan.settings, labels, **how)
            signals.poll()
        else:
            from simmim_jax.tools.prepare import beam

            beam.write_shards(source, missing, plan.settings, labels, options=options.beam, report=report)
    finally:
        signals.deferred = False
        progress.close()
    return progress.rate()


def finish_split(plan, tasks: list, *, rate: float) -> dict:
    """Write the manifest of a split, and report it. Returns the manifest."""
    from simmim_jax.tools.prepare import destination

    manifest, made = destination.finish(plan, tasks)
    print_report(plan.folder, manifest, made, rate)
    return manifest


# --- output


def shard_count(manifest: dict) -> str:
    count = len(manifest["shards"])
    return f"{count:,} shard" + "s" * (count > 1)


def print_report(folder: str, manifest: dict, made, rate: float) -> None:
    """Print what was written for one split, and which images were refused."""
    count, before, after = manifest["count"], made.source_bytes, manifest["bytes"]
    classes = f", {len(manifest['classes'])} classes" if manifest["classes"] else ""
    mean, std = (" ".join(f"{value:.4f}" for value in manifest[key]) for key in ("mean", "std"))
    print(f"{os.path.basename(folder)}: {count:,} images in {shard_count(manifest)}{classes}: {folder}")
    print(f"  size   {before / 2**20:,.1f} MiB before, {after / 2**20:,.1f} MiB now ({after / max(before, 1):.0%})")
    print(f"  files  {made.kept:,} unchanged, {count - made.kept:,} encoded again")
    print(f"  speed  {rate:,.0f} images/s")
    print(f"  mean   {mean}\n  std    {std}")
    if not made.refused:
        return
    reasons = defaultdict(list)
    for name, reason in made.refused:
        reasons[re.sub(r"\d+", "#", reason)].append((name, reason))
    print(f"  refused {len(made.refused)}, all listed in {os.path.join(folder, 'refused.csv')}:")
    for faults in sorted(reasons.values(), key=len, reverse=True)[:5]:
        named = ", ".join(repr(name) for name, _ in faults[:MAX_NAMED])
        print(f"    {len(faults)} because: {faults[0][1]!r}: {named}{', ...' if len(faults) > MAX_NAMED else ''}")


def print_command(dest: str, manifest: dict) -> None:
    """Print the command that trains on DEST."""
    # a channel with one value cannot be normalized, and a run takes the numbers of other than 8-bit images by itself
    is_flat = min(manifest["std"]) < 1e-4 or "pixels" in manifest
    print("\nto train on it" + (":" if is_flat else ", with its own mean and std if you like:"))
    print(f"  {TRAIN} --config.data.path={shlex.quote(dest)} --workdir runs/mine", flush=True)
    if not is_flat:
        mean, std = (",".join(f"{value:.4f}" for value in manifest[key]) for key in ("mean", "std"))
        print(f"  --config.mean={mean} --config.std={std}", flush=True)


# --- verify


def verify(options: argparse.Namespace) -> None:
    """Read every byte of DEST, and print the faults of each folder. Raises DataError if there are any."""
    from simmim_jax.tools.prepare import destination

    faults, unfinished, folders = 0, [], destination.prepared_folders(options.dest)
    for folder in folders:
        if not destination.read_manifest(folder):
            unfinished.append(os.path.basename(folder))
            continue
        found = destination.damaged_shards(folder, workers=options.workers or 1)
        faults += len(found)
        for fault in found:
            print(f"{folder}: {fault}")
        if not found:
            manifest = destination.read_manifest(folder)
            print(f"{folder}: undamaged ({manifest['count']:,} images in {shard_count(manifest)})", flush=True)
    if not folders:
        raise DataError("no prepared folder", options.dest, "give the DEST of an earlier prepare")
    if faults:
        what = f"{faults} damaged or missing, as listed above"
        raise DataError(what, options.dest, "prepare it again, with --overwrite")
    if unfinished:
        what = f"unfinished: {', '.join(unfinished)}"
        raise DataError(what, options.dest, "run the command that began it again, without --overwrite")


if __name__ == "__main__":
    cli.start(run)
