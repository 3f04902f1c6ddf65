"""What all commands share: parser, error wrapper, progress bar, and the rule for files that exist."""

import argparse
import contextlib
import csv
import io
import logging
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from simmim_jax.errors import ConfigError, DataError, Parser, UserError, exit_with_message, suggest
from simmim_jax.files import utf8_name

WHOLE = "leave --split out, or give --split=train"  # fix for images that are not divided into parts
MARKS = (b"Software\0simmim_jax", b'content="simmim_jax', b'"made_by": "simmim_jax')  # in our PNG, HTML and JSON files
LINE_PERIOD = 10.0  # seconds between two lines of progress if stderr is no terminal


# --- the command line


def make_parser(command: str, description: str, examples: str, usage: str | None = None) -> Parser:
    """An empty parser of `python -m simmim_jax.tools.COMMAND`."""
    return Parser(
        prog=f"python -m simmim_jax.tools.{command}",
        usage=usage,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_image_options(parser: Parser) -> None:
    """Add the options of commands that pass images through a run's model."""
    add = parser.add_argument
    add_image_size(parser)
    add(
        "--crop-fraction", type=number(float, 0, 1, strict=True), metavar="R",
        help="part of the resized side that the crop keeps (default: the run's; imports: 0.875, up to 32 pixels 1)",
    )  # fmt: skip
    add("--interpolation", default="", help="bilinear, bicubic, ... (default: the run's; imports: bicubic)")
    size, threads = number(int, 1), number(int, 0)
    add("--batch-size", type=size, default=64, metavar="N", help="images per batch; changes no result (default: 64)")
    add("--threads", type=threads, metavar="N", help="decoder threads, a batch each (default: one per core, up to 16)")
    add_max_bad_fraction(parser)


def add_image_size(parser: Parser, when: str = "(default: the run's); position embeddings are resized to it") -> None:
    parser.add_argument("--image-size", type=parse_size, metavar="H[,W]", help=f"pixels {when}")


def add_max_bad_fraction(parser: Parser) -> None:
    meaning = "part of the images that may be unreadable, rounded up (default: 0.01)"
    parser.add_argument("--max-bad-fraction", type=number(float, 0, 1), default=0.01, metavar="R", help=meaning)


def add_seed(parser: Parser, what: str) -> None:
    """Add --seed: a number that both JAX and numpy accept."""
    parser.add_argument("--seed", type=number(int, 0, 2**32 - 1), default=0, metavar="N", help=f"{what} (default: 0)")


def parse_known(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """Parse `argv`. Flags may be written with - or _, and stand anywhere.

    Raises ConfigError with the nearest flag.
    """
    hyphened = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), argument) for argument in argv]
    parse = parser.parse_known_args if "--" in hyphened else parser.parse_known_intermixed_args  # which takes -- away
    options, surplus = parse(hyphened)
    if surplus:
        known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        flag = surplus[0].split("=")[0]
        fix = suggest(flag, known) if flag.startswith("-") else "see --help"
        raise ConfigError(f"unknown argument {surplus[0]!r}", "command line", fix)
    return options


def numbers(
    kind: type,
    minimum: int | float,
    maximum: int | float = math.inf,
    *,
    strict: bool = False,
    empty: bool = False,
    distinct: bool = False,
) -> Callable[[str], tuple]:
    """A parser of comma-separated finite numbers from `minimum` (strict: above it) to `maximum`."""
    bound = "" if minimum == -math.inf else f" {'above' if strict else 'of at least'} {minimum}"
    bound += f", at most {maximum}" if maximum < math.inf else ""

    def parse_numbers(text: str) -> tuple:
        try:
            values = tuple(kind(part) for part in text.strip("()").split(",") if part.strip())
        except ValueError:
            noun = "numbers" if kind is float else "whole numbers"
            raise argparse.ArgumentTypeError(f"{text!r}: give {noun}, separated by commas") from None
        if not values and not empty:
            raise argparse.ArgumentTypeError("empty: give a number")
        for value in values:
            if not minimum <= value <= maximum or (strict and value == minimum) or math.isinf(value):  # also NaN
                raise argparse.ArgumentTypeError(f"{value}: give a finite number{bound}")
        return tuple(dict.fromkeys(values)) if distinct else values

    return parse_numbers


def number(
    kind: type, minimum: int | float, maximum: int | float = math.inf, *, strict: bool = False
) -> Callable[[str], int | float]:
    """A parser of one number."""

    def parse_number(text: str) -> int | float:
        values = numbers(kind, minimum, maximum, strict=strict)(text)
        if len(values) > 1:
            raise argparse.ArgumentTypeError(f"{text!r}: give one number")
        return values[0]

    return parse_number


def parse_size(text: str) -> tuple[int, int]:
    """(height, width) from "H,W", or from "H" for both."""
    sides = numbers(int, 1, 16384)(text)
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text!r}: give height,width in pixels, like 224,224")
    return sides[0], sides[-1]


def path(text: str) -> str:
    """A path that is not empty, with ~ expanded."""
    if not text:
        raise argparse.ArgumentTypeError("empty")
    return os.path.expanduser(text)


# --- errors


def start(run: Callable[[list[str]], None]) -> None:
    """Call `run` with this process's arguments. Each warning and each error is one line on stderr."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be bytes that are not UTF-8
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exit_with_message():
        run(sys.argv[1:])


@contextlib.contextmanager
def translate_errors(error: type[UserError], where: str, fix: str, memory_fix: str) -> Iterator[None]:
    """Raise OSError and MemoryError of what runs inside as `error`. where: used if the OSError names no file."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as found:
        raise error(f"cannot read or write: {found.strerror or found}", str(found.filename or where), fix) from found
    except (MemoryError, RuntimeError) as found:  # JAX raises RuntimeError if a device lacks memory
        if isinstance(found, RuntimeError) and "RESOURCE_EXHAUSTED" not in str(found):
            raise
        raise error("not enough memory", where, memory_fix) from found


@contextlib.contextmanager
def add_context(fix: str = WHOLE) -> Iterator[None]:
    """While opening a part of the images: if it is empty, suggest `fix`, not a config field."""
    try:
        yield
    except DataError as error:
        if not error.where.startswith("data.heldout_fraction"):
            raise
        raise DataError(error.what, "no images are held out", fix) from error


# --- files that exist


def add_overwrite(parser: Parser) -> None:
    parser.add_argument(
        "--overwrite", action="store_true", help="replace existing output, if this package has written it"
    )


def check_overwrite(path: str | Path, *, overwrite: bool, is_ours: bool) -> None:
    """Apply the rule for output that exists: it stays, except with --overwrite, and then only if it is ours.

    Raises ConfigError.
    """
    if not overwrite:
        raise ConfigError("exists", str(path), "give --overwrite, or another path")
    if not is_ours:
        raise ConfigError("exists, and simmim_jax has not written it", str(path), "give another path, or move it away")


def has_mark(path: Path) -> bool:
    """Whether a PNG, HTML or JSON file was written by this package."""
    with open(path, "rb") as file:
        head = file.read(1000)
    return any(mark in head for mark in MARKS)


def check_output(
    path: str | Path, *, overwrite: bool, is_ours: Callable[[Path], bool] = has_mark, inputs: Iterable[str | Path] = ()
) -> None:
    """Raise ConfigError unless the file `path` may be written; make its folder. Call it before any work is done.

    is_ours: (path) -> whether this package has written the file. inputs: files to read, which are never replaced.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise ConfigError("a folder", str(path), "give a file")
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(13, "Permission denied", str(path.parent))
        if not path.exists():
            return
        if any(path.samefile(each) for each in inputs):
            raise ConfigError("one of the input files", str(path), "give another path")
        check_overwrite(path, overwrite=overwrite, is_ours=is_ours(path))
    except OSError as error:
        raise ConfigError(f"cannot write: {error.strerror or error}", str(path), "give another path") from error


def to_csv(rows: Iterable[Iterable]) -> str:
    """Rows as CSV, one line each: line breaks in a value become spaces."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([" ".join(utf8_name(x).split()) if isinstance(x, str) else x for x in row] for row in rows)
    return text.getvalue()


# --- progress


class Progress:
    """A progress bar on a terminal; otherwise a line every `LINE_PERIOD` seconds."""

    def __init__(self, title: str, total: int, done: int = 0, refused: int = 0):
        self.title, self.total, self.done, self.refused = title, total, done, refused
        self.first_done = done
        self.start = self.last_line = time.monotonic()
        disable = not sys.stderr.isatty()
        self.bar = tqdm(desc=title, total=total, initial=done, unit=" images", disable=disable, file=sys.stderr)

    def add(self, count: int, refused: int = 0) -> None:
        """Count `count` more images, `refused` of them unusable."""
        self.done, self.refused = self.done + count, self.refused + refused
        self.bar.update(count)
        self.bar.set_postfix_str(f"{self.refused} refused", refresh=False)
        if self.bar.disable and time.monotonic() > self.last_line + LINE_PERIOD:
            self.last_line = time.monotonic()
            line = f"{self.title}: {self.done:,} of {self.total:,} images, {self.rate():,.0f} images/s"
            print(f"{line}, {self.refused} refused", file=sys.stderr, flush=True)

    def rate(self) -> float:
        """Images per second since the start of this process's work."""
        return (self.done - self.first_done) / max(time.monotonic() - self.start, 1e-9)

    def watch(self, batches: Iterable[dict]) -> Iterator[dict]:
        """The batches; the valid and the other images of each are counted once it is done with."""
        try:
            for batch in batches:
                yield batch
                images = min(len(batch["valid"]), self.total - self.done)  # without those that fill up the last batch
                self.add(images, images - int(batch["valid"].sum()))
        finally:
            self.close()

    def close(self) -> None:
        self.bar.close()
