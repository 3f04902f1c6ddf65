"""Command lines of tools: what they share in reading and obeying them."""

import argparse
import logging
import re
import sys
from collections.abc import Callable

from simmim_jax.errors import ConfigError, Parser, nearest_of, told_in_one_line


def start(run: Callable[[list[str]], None]) -> None:
    """Do what this process's command line says, by `run`: warnings and mistakes are told in a line each."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder may be named in bytes that are no UTF-8
    logging.addLevelName(logging.WARNING, "warning")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    with told_in_one_line():
        run(sys.argv[1:])


def parse_known(parser: Parser, argv: list[str]) -> argparse.Namespace:
    """What `parser` makes of `argv`, with - and _ alike in flags. Raises ConfigError with the nearest flag."""
    hyphened = [re.sub(r"^--[^=]+", lambda flag: flag[0].replace("_", "-"), argument) for argument in argv]
    options, surplus = parser.parse_known_args(hyphened)
    if surplus:
        known = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        flag = surplus[0].split("=")[0]
        fix = nearest_of(flag, known) if flag.startswith("-") else "see --help"
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


def check_seed(seed: int) -> None:
    """Raise ConfigError unless it is one that JAX and numpy take alike."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed={seed}", "command line", "give a number of 0 to 2**32 - 1")
