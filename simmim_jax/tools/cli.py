"""What all commands share: parser, error wrapper, progress bar, and the rule for files that exist."""

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from simmim_jax.errors import ConfigError, DataError, Parser, UserError, check_minimum, exit_with_message, suggest

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
    add("--image-size", metavar="H[,W]", help="pixels (default: the run's); position embeddings are resized to it")
    add(
        "--crop-fraction", type=float, metavar="R",
        help="part of the resized side that the crop keeps (default: the run's; imports: 0.875, up to 32 pixels 1)",
    )  # fmt: skip
    add("--interpolation", default="", help="bilinear, bicubic, ... (default: the run's; imports: bicubic)")
    add("--batch-size", type=int, default=64, metavar="N", help="images per batch; changes no result (default: 64)")
    add("--threads", type=int, metavar="N", help="decoder threads, a batch each (default: one per core, up to 16)")
    add(
        "--max-bad-fraction", type=float, default=0.01, metavar="R",
        help="part of the images that may be unreadable, rounded up (default: 0.01)",
    )  # fmt: skip


def check_image_options(options: argparse.Namespace) -> None:
    """Check the options of `add_image_options`; parse `image_size`. Raises ConfigError."""
    options.image_size = parse_size(options.image_size)
    check_minimum("--batch-size", options.batch_size, 1)
    check_minimum("--threads", options.threads or 0, 0)
    if options.crop_fraction is not None:
        check_fraction("--crop-fraction", options.crop_fraction, of_crop=True)
    check_fraction("--max-bad-fraction", options.max_bad_fraction)


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


def parse_size(text: str | None) -> tuple[int, int] | None:
    """(height, width) from "H,W", or from "H" for both. Raises ConfigError."""
    if text is None:
        return None
    numbers = text.strip("()").split(",")
    if len(numbers) > 2 or not all(number.strip().isdecimal() and 0 < int(number) <= 16384 for number in numbers):
        raise ConfigError(f"--image-size={text}", "command line", "give height,width in pixels, like 224,224")
    return int(numbers[0]), int(numbers[-1])


def check_fraction(flag: str, value: int | float, *, of_crop: bool = False) -> None:
    """Raise ConfigError unless 0 <= value <= 1; for a crop, unless 0 < value <= 1."""
    if not 0 <= value <= 1 or (of_crop and not value):
        fix = "give a number above 0, up to 1" if of_crop else "give a number from 0 to 1"
        raise ConfigError(f"{flag}={value:g}", "command line", fix)


def check_seed(seed: int) -> None:
    """Raise ConfigError unless both JAX and numpy accept the seed."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed={seed}", "command line", "give a number from 0 to 2**32 - 1")


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
    except MemoryError as found:
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
