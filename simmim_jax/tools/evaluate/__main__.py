"""python -m simmim_jax.tools.evaluate RUN [options]

How good a trained model is on images that it was not trained on. Of a classifier, one that was trained here or that
`convert` imported: top-1 and top-5 over the whole validation set, one row in results.csv, and with --out which classes
it takes for which. Of a pretraining run: its held-out masked loss, as the run itself measures it.

The columns of results.csv are timm's, accuracies in per cent and parameters in millions, and ours after them. A file
that others append to at the same time stays whole, and so does one in which this process is killed.
"""

import argparse
import csv
import datetime
import fcntl
import importlib.metadata
import io
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from simmim_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Parser,
    check_minimum,
)
from simmim_jax.files import utf8_name, write_atomically
from simmim_jax.tools.cli import check_fraction, parse_known, parse_size, start

EXAMPLES = """\
examples:
  a run that was fine-tuned, on the held-out images of its own data:
    python -m simmim_jax.tools.evaluate runs/finetuned
  the same at another size, on other images, with the matrix of confusion and the 24 worst mistakes:
    python -m simmim_jax.tools.evaluate runs/finetuned --data=DIR --image-size=256 --out=figures
  a classifier of timm's or transformers', once imported:
    python -m simmim_jax.tools.convert FOLDER runs/theirs
    python -m simmim_jax.tools.evaluate runs/theirs --data=DIR/imagenet --crop-fraction=0.9
  a segmentation run, on images and maps: mIoU and accuracies, with --out a table of classes and overlays; no row in
  results.csv, whose columns have no place for them:
    python -m simmim_jax.tools.evaluate runs/segments --data=DIR --out=figures
"""
TIMMS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
OURS = ("images", "run", "step", "data", "date", "version")
COLUMNS = TIMMS + OURS
PATIENCE = 30  # seconds between two lines of progress
SEE = "see summary.json in its workdir, or give a run of classify or simmim"
HEADLESS = "fine-tune or probe it first (configs/folder_finetune.py, configs/folder_linear.py)"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.evaluate",
        description="Accuracy of a classifier, or held-out loss of a pretraining run, over a whole validation set.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="workdir of a run or an import, or a step in it")
    add("--data", default="", metavar="PATH", help="a data.path, or digits, or tfds:NAME (default: the run's own)")
    add("--split", default="", metavar="NAME",
        help="of the images (default: the part to evaluate on; of a folder without one, all)")  # fmt: skip
    add("--image-size", metavar="H[,W]", help="in pixels (default: that of the run); positions are resized to it")
    add("--crop-fraction", type=float, metavar="R",
        help="of the resized side that is kept (default: the run's; imports: 0.875, up to 32 pixels 1)")  # fmt: skip
    add("--interpolation", default="", help="bilinear, bicubic, ... (default: the run's; imports: bicubic)")
    add("--batch-size", type=int, default=64, metavar="N", help="default: 64; of it no result depends")
    add("--threads", type=int, metavar="N", help="that decode a batch each (default: as many as cores, up to 16)")
    add("--limit", type=int, metavar="N",
        help="so many images, evenly spread; 0: all (default: all; own ones of simmim: as in the run)")  # fmt: skip
    add("--max-bad-fraction", type=float, default=0.01, metavar="R",
        help="of images that may be unreadable, rounded up (default: 0.01)")  # fmt: skip
    add("--results", default="results.csv", metavar="FILE", help="to add a row to (default: results.csv; '': none)")
    add("--out", default="", metavar="FOLDER", help="for confusion.csv and .png, classes.csv, mistakes.png")
    add("--mistakes", type=int, default=24, metavar="N", help="images on mistakes.png (default: 24; 0: no such file)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError for what is not one, with the nearest."""
    options = parse_known(make_parser(), argv)
    if not options.run:
        raise ConfigError("an empty RUN", "command line", "see --help")
    for name in ("run", "data", "results", "out"):
        setattr(options, name, os.path.expanduser(getattr(options, name)))
    options.image_size = parse_size(options.image_size)
    check_minimum("--batch-size", options.batch_size, 1)
    check_minimum("--threads", options.threads or 0, 0)
    check_minimum("--limit", options.limit or 0, 0)
    check_minimum("--mistakes", options.mistakes, 0)
    if options.crop_fraction is not None:
        check_fraction("--crop-fraction", options.crop_fraction, of_crop=True)
    check_fraction("--max-bad-fraction", options.max_bad_fraction)
    return options


def run(argv: list[str]) -> None:
    """Evaluate, as the command line says."""
    options = parse(argv)
    try:
        evaluate(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        what, where = f"cannot read or write: {error.strerror or error}", str(error.filename or options.out)
        raise DataError(what, where, "mend that and run again") from error
    except MemoryError as error:
        raise DataError("not enough memory", options.run, "set --batch-size lower") from error


def evaluate(options: argparse.Namespace) -> None:
    """Evaluate a run, by options that have been read."""
    from simmim_jax.runs import finished  # JAX comes in here: help and mistakes are told without it
    from simmim_jax.runtime import compilation, sharding
    from simmim_jax.tools.evaluate import segments

    compilation.keep_compiled()
    model = finished.load_run(options.run, options.image_size)
    model = with_images(model, options.data)
    if (model.config.get("objective") or {}).get("name") == "segment":
        segments.evaluate(model, options)
        return
    settle(options, model)
    objective = finished.objective_of(model)
    name = model.config["objective"]["name"]
    if name not in ("classify", "simmim"):
        raise CheckpointError(f"a run of {name}, which is evaluated as it trains", str(model.folder), SEE)
    if options.results and name == "classify":
        check_results(Path(options.results))
    source, told = open_images(model, options)
    if name == "classify":
        check_classes(model, source, compare_names=bool(options.data))
    if options.out:
        Path(options.out).mkdir(parents=True, exist_ok=True)
    mesh = sharding.make_mesh()
    heldout = finished.make_pass(
        model, source, mesh, batch_size=options.batch_size, crop_fraction=options.crop_fraction,
        interpolation=options.interpolation, limit=options.limit, threads=options.threads,
    )  # fmt: skip
    pixels = finished.told_pixels(model, options.crop_fraction, options.interpolation)
    print(f"{model_name(model)} at step {model.step}, {told}: {pixels}", flush=True)
    if name == "classify":
        evaluate_classifier(model, objective, source, told, heldout, mesh, options)
    else:
        evaluate_pretraining(model, objective, source, heldout, mesh, options)


def with_images(model, path: str):
    """The model, as `finished.follow_images` has it, which says so where the run's images have moved to `path`."""
    from simmim_jax.runs import finished

    moved = finished.follow_images(model, path)
    if moved is not model:
        print(f"{path}: the images of the run, in another place; of them the part that it held out", flush=True)
    return moved


def settle(options: argparse.Namespace, model) -> None:
    """Fill in how many images are taken, cropped and resized how, where the options leave it open: as the run does."""
    from simmim_jax.runs import finished

    vars(options).update(finished.crop_as_asked(model, options.crop_fraction, options.interpolation))
    if options.limit is None:
        pretrained = (model.config.get("objective") or {}).get("name") == "simmim"
        own = not options.data or finished.is_own(model, options.data)
        options.limit = model.config.get("eval_images", 0) if pretrained and own else 0


def open_images(model, options: argparse.Namespace) -> tuple:
    """(the images to evaluate on, what they are); see `images.open_heldout`."""
    from simmim_jax.runs import finished
    from simmim_jax.tools import images

    path, own = options.data, not options.data or finished.is_own(model, options.data)
    make = partial(finished.open_source, model, path, heldout_fraction=0.0)
    source = images.open_heldout(model, options, make, lambda source: images.has_parts(path), own=own)
    told = source.describe()
    return source, told if own or options.split else told.replace("split train", "all")


def check_classes(model, source, *, compare_names: bool) -> None:
    """Raise DataError unless the images have labels, of as many classes as the head.

    compare_names: warn too where the classes of the run have other names, for which its own images are opened.
    """
    from simmim_jax.runs import finished

    count, there = model.config["objective"]["num_classes"], tuple(source.classes)
    if there:
        finished.check_labels(source, "--split")
    elif not finished.has_labels(source):
        raise DataError("images without classes", source.describe(), "put each class into a folder of its own")
    if there and len(there) != count:
        raise DataError(
            f"the head knows {count} classes, the images have {len(there)}", source.describe(),
            "give the images that it was trained for, or fine-tune it on these",
        )  # fmt: skip
    if compare_names and (told := finished.other_class(finished.class_names(model), source)):
        print(f"warning: {told}", file=sys.stderr)


def watched(batches: Iterable[dict], count: int) -> Iterator[dict]:
    """The batches, with a line on stderr every now and then."""
    begun = said = time.monotonic()
    seen = 0
    for batch in batches:
        yield batch
        seen += int(batch["valid"].sum())
        now = time.monotonic()
        if now - said > PATIENCE:
            said = now
            print(f"{seen} of {count} images, {seen / (now - begun):.0f} images/s", file=sys.stderr, flush=True)


def evaluate_classifier(model, objective, source, told: str, heldout, mesh, options: argparse.Namespace) -> None:
    """Print the accuracies, add a row to the results and write what --out asks for."""
    import jax

    from simmim_jax.evals import accuracy, confusion
    from simmim_jax.evals.features import jit_on_mesh
    from simmim_jax.runtime import sharding

    key = jax.random.key(0)
    predict = jit_on_mesh(lambda params, batch: objective.predict(params, batch, key), mesh)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    count = min(options.limit or len(source), len(source))
    classes = model.config["objective"]["num_classes"]
    mistakes = confusion.Mistakes(options.mistakes if options.out else 0)

    def parts() -> Iterator[accuracy.Answers]:
        for batch in watched(heldout, count):
            answers, used = accuracy.answers_of(predict(params, batch))
            if mistakes.most:
                mistakes.see(batch["image"][used], answers)
            yield answers

    answers = accuracy.join(parts())
    left_out = count - len(answers.label)
    refuse_many(left_out, count, "cannot be read or have no class", source, options)
    metrics = accuracy.top(answers, classes)
    shares = "".join(f"top-{k} {100 * metrics[f'top{k}']:.2f} %  " for k in (1, 5) if f"top{k}" in metrics)
    print(f"{shares}of {len(answers.label)} images" + (f", {left_out} left out" if left_out else ""), flush=True)

    if options.results:
        append_row(Path(options.results), row_of(model, told, metrics, options))
        print(f"a row more in {options.results}")
    if options.out:
        names = [utf8_name(str(name)) for name in source.classes] or [str(n) for n in range(classes)]
        folder = Path(options.out)
        for name in ("mistakes.png", "confusion.csv", "confusion.png"):  # of an earlier evaluation
            (folder / name).unlink(missing_ok=True)
        files = {"classes.csv": confusion.classes_csv(answers, names).encode()}
        if classes <= confusion.MOST:
            matrix = confusion.confusion_matrix(answers, classes)
            files["confusion.csv"] = confusion.matrix_csv(matrix, names).encode()
            files["confusion.png"] = png(confusion.draw_confusion(matrix, names))
        if mistakes.kept:
            files["mistakes.png"] = png(confusion.draw_mistakes(mistakes.kept, names))
        for name, content in files.items():
            write(folder / name, content)
        print(f"{options.out}: {', '.join(files)}")


def refuse_many(left_out: int, count: int, why: str, source, options: argparse.Namespace) -> None:
    """Raise DataError if more images than `options` allow, rounded up as in a run, are left out."""
    if left_out > math.ceil(options.max_bad_fraction * count):
        fix = "mend them, or set --max-bad-fraction higher"
        raise DataError(f"{left_out} of {count} images {why}", source.describe(), fix)


def evaluate_pretraining(model, objective, source, heldout, mesh, options: argparse.Namespace) -> None:
    """Print the held-out masked loss under the masks of the run's own evaluations; with --out draw pictures."""
    import jax

    from simmim_jax import train
    from simmim_jax.evals import make_evaluator
    from simmim_jax.evals.features import jit_on_mesh
    from simmim_jax.runs import finished
    from simmim_jax.runtime import sharding

    count = min(options.limit or len(source), len(source))
    left_out = 0

    def readable() -> Iterator[dict]:
        nonlocal left_out
        left_out = count
        for batch in watched(heldout, count):
            left_out -= int(batch["valid"].sum())
            yield batch
        refuse_many(left_out, count, "cannot be read", source, options)

    _, _, key = train.make_keys(model.config.get("seed", 0))
    eval_inputs = {
        "predict": jit_on_mesh(lambda params, batch: objective.predict(params, batch, key), mesh),
        "heldout": Repeated(readable),
        "spread": lambda pictures: finished.make_pass(
            model, source, mesh, batch_size=options.batch_size, crop_fraction=options.crop_fraction,
            interpolation=options.interpolation, limit=pictures, threads=options.threads,
        ),
        "folder": options.out,
    }  # fmt: skip
    state = SimpleNamespace(step=model.step, params=jax.device_put(model.params, sharding.replicated(mesh)))
    metrics = make_evaluator("reconstruction", eval_inputs, pictures=8 if options.out else 0)(state)
    told = f", {left_out} left out" if left_out else ""
    print(f"masked_loss {metrics['masked_loss']:.4f} of {count - left_out} images{told}")
    print(
        f"no accuracy, and no row in {options.results or 'results.csv'}: a pretraining run has no classes; {HEADLESS}"
    )
    if options.out:
        print(f"{options.out}: reconstruction_{model.step}.png")


class Repeated:
    """Batches, made anew each time that they are asked for."""

    def __init__(self, make: Callable[[], Iterator[dict]]):
        self.make = make

    def __iter__(self) -> Iterator[dict]:
        return self.make()


def png(pixels) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def write(path: Path, content: bytes) -> None:
    """`path` holds all of `content`, or what it held before."""
    try:
        write_atomically(path, lambda partial: partial.write_bytes(content))
    except OSError as error:
        raise DataError(
            f"cannot write: {error.strerror or error}", str(path), "make room, or give another --out"
        ) from error


def model_name(model) -> str:
    """Like vit_b; of an encoder with other numbers than its size has, the name alone."""
    from simmim_jax.models import ENCODERS

    told = model.config["encoder"]
    fields = ENCODERS[told["name"]][1].get(told.get("size"), {"width": None})
    same = fields.items() <= model.encoder.options().items()
    return f"{told['name']}_{told['size']}" if same else told["name"]


def row_of(model, told: str, metrics: dict[str, float], options: argparse.Namespace) -> dict[str, str]:
    """A row of the results, by column. told: what the images are."""
    from simmim_jax.runs import finished

    row = {}
    for name in ("top1", "top5"):
        share = 100 * metrics[name] if name in metrics else None
        row[name] = "" if share is None else f"{share:.3f}"
        row[f"{name}_err"] = "" if share is None else f"{100 - share:.3f}"
    return row | {
        "model": model_name(model),
        "img_size": finished.told_size(model.image_size),
        "param_count": f"{parameters_of(model.params) / 1e6:.2f}",
        "crop_pct": f"{options.crop_fraction:g}",
        "interpolation": options.interpolation,
        "images": f"{metrics['images']:.0f}",
        "run": options.run,
        "step": str(model.step),
        "data": told,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "version": version(),
    }


def parameters_of(params) -> int:
    """How many numbers are learned; what batch norm measures is not."""
    import jax

    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if path[-1].key not in ("mean", "var"))


def version() -> str:
    """The commit of this code where it lies in a repository, with + where it was changed; else its version."""
    root = Path(__file__).parents[2]
    if (root / ".git").exists():
        try:
            git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
            return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return importlib.metadata.version("simmim_jax")
    except importlib.metadata.PackageNotFoundError:
        return ""


def line_of(values: Sequence[str]) -> str:
    """A line of CSV: what would break it becomes a space."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([" ".join(utf8_name(value).split()) for value in values])
    return text.getvalue()


def check_results(path: Path) -> None:
    """Refuse a file of results that no row can be added to, before anything is computed. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError("a folder", str(path), "give a file, like --results=results.csv")
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if existing != path and not existing.is_dir():
        raise ConfigError("no folder", str(existing), "give another --results")
    if not os.access(existing, os.W_OK):
        raise ConfigError("may not be written", str(existing), "give another --results")
    if existing == path:
        with open(path, "rb") as file:
            check_header(path, file.readline())


def check_header(path: Path, line: bytes) -> None:
    """Raise ConfigError unless the first line of a file, empty in a new one, is that of `COLUMNS`."""
    columns = next(csv.reader([line.decode("utf-8-sig", "replace").strip()]), [])
    if line and tuple(columns) != COLUMNS:
        other = next((name for name in columns if name not in COLUMNS), "") or "too few"
        raise ConfigError(
            f"a file with other columns ({other[:40]})", str(path), "give another --results: this one is left as it is"
        )


def append_row(path: Path, row: dict[str, str]) -> None:
    """Add a line to the file, and before it the header where it is new: in one write, under a lock, or not at all.

    The folder is made where it is missing.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            check_header(path, file.readline())
            file.seek(max(size - 1, 0))
            unfinished = size and file.read(1) != b"\n"
            text = line_of([row[name] for name in COLUMNS])
            text = ("\n" if unfinished else "" if size else line_of(COLUMNS)) + text
            try:
                if file.write(text.encode()) != len(text.encode()):
                    raise OSError(28, "No space left on device", str(path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        fix = "make room; what is in it is as it was"
        raise DataError(f"no row was added: {error.strerror or error}", str(path), fix) from error


if __name__ == "__main__":
    start(run)
