"""Command lines of tools: what they share in reading and obeying them."""

import argparse
import contextlib
import logging
import re
import sys
from collections.abc import Callable, Iterator

from simmim_jax.errors import ConfigError, DataError, Parser, exit_with_message, suggest

WHOLE = "leave --split out, or give --split=train"  # of images without parts, both are all of them


def start(run: Callable[[list[str]], None]) -> None:
    """Do what this process's command line says, by `run`: warnings and mistakes are told in a line each."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder may be named in bytes that are no UTF-8
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with exit_with_message():
        run(sys.argv[1:])


def parse_known(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """What `parser` makes of `argv`, with - and _ alike in flags, which may stand between all else.

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


def sides(text: str | None) -> tuple[int, int] | None:
    """(height, width) of "H,W", or of "H" for both. Raises ConfigError if it is neither."""
    if text is None:
        return None
    numbers = text.strip("()").split(",")
    if len(numbers) > 2 or not all(number.strip().isdecimal() and 0 < int(number) <= 16384 for number in numbers):
        raise ConfigError(f"--image-size={text}", "command line", "give height,width in pixels, like 224,224")
    return int(numbers[0]), int(numbers[-1])


def check_fraction(flag: str, value: int | float, *, of_crop: bool = False) -> None:
    """Raise ConfigError unless it is one of 0 to 1; `of_crop`: and not 0."""
    if not 0 <= value <= 1 or (of_crop and not value):
        fix = "give one above 0, up to 1" if of_crop else "give one of 0 to 1"
        raise ConfigError(f"{flag}={value:g}", "command line", fix)


@contextlib.contextmanager
def add_context(fix: str = WHOLE) -> Iterator[None]:
    """What opens a part of images inside: if it is empty, that is told with `fix`, not with a field of a config."""
    try:
        yield
    except DataError as error:
        if not error.where.startswith("data.heldout_fraction"):
            raise
        raise DataError(error.what, "nothing is held out of them", fix) from error


def check_seed(seed: int) -> None:
    """Raise ConfigError unless it is one that JAX and numpy take alike."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed={seed}", "command line", "give a number of 0 to 2**32 - 1")
