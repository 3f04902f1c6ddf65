"""Command lines of tools: what they share in reading them."""

import argparse
import re

from simmim_jax.errors import ConfigError, Parser, nearest_of


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
