"""What the commands share: help without heavy imports, and numbers on the command line."""

import argparse
import math
import subprocess
import sys
from importlib import import_module

import pytest
from runs import ROOT

from simmim_jax.errors import ConfigError, DataError
from simmim_jax.tools import cli

TOOLS = ROOT / "simmim_jax" / "tools"
COMMANDS = ["predict", *sorted(f"{path.parent.name}.__main__" for path in TOOLS.glob("*/__main__.py"))]
HELP = """
import sys
from importlib import import_module
for name in sys.argv[1:]:
    try:
        import_module(f"simmim_jax.tools.{name}").run(["--help"])
    except SystemExit:
        pass
print({"jax", "flax", "grain", "numpy", "orbax", "PIL", "safetensors"} & set(sys.modules))
"""


def test_help_imports_nothing_heavy():
    line = [sys.executable, "-c", HELP, *COMMANDS]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.count("examples:") == len(COMMANDS) == 7
    assert done.stdout.endswith("\nset()\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_flag_is_refused_with_the_nearest_one(name):
    command = import_module(f"simmim_jax.tools.{name}")
    positionals = [action for action in command.make_parser()._actions if not action.option_strings]
    with pytest.raises(ConfigError, match=r"'--overwrit'.*did you mean --overwrite"):
        command.run(["x"] * len(positionals) + ["--overwrit"])


@pytest.mark.parametrize(
    ("parse", "good", "bad"),
    [
        (cli.number(int, 0), {"0": 0, "7": 7}, ("", "-1", "x", "1.5", "1,2", "inf")),
        (cli.number(float, 0, 1), {"0": 0.0, "1": 1.0}, ("-0.1", "1.5", "nan")),
        (cli.number(float, 0, strict=True), {"0.1": 0.1}, ("0", "inf", "nan")),
        (cli.numbers(float, -math.inf), {"-1,2,2": (-1.0, 2.0, 2.0)}, ("nan", "", "1;2")),
        (cli.numbers(int, 1, empty=True, distinct=True), {"": (), "2, 1,2": (2, 1)}, ("0",)),
        (cli.parse_size, {"192": (192, 192), "(64, 32)": (64, 32)}, ("big", "1,2,3", "-64", "0", "1000000")),
        (cli.path, {"x": "x"}, ("",)),
    ],
)
def test_values_outside_of_their_bounds_are_refused(parse, good, bad):
    assert {text: parse(text) for text in good} == good
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError):
            parse(text)


@pytest.mark.parametrize(
    ("raised", "line"),
    [
        (
            OSError(28, "No space left on device", "x.png"),
            "cannot read or write: No space left on device - x.png - free",
        ),
        (OSError("damaged"), "cannot read or write: damaged - OUT - free"),
        (MemoryError(), "not enough memory - OUT - give less"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "not enough memory - OUT - give less"),
        (RuntimeError("INTERNAL: a bug"), None),
        (BrokenPipeError(), None),
    ],
)
def test_a_full_disk_and_too_little_memory_are_one_line_and_other_errors_stay(raised, line):
    with (
        pytest.raises(DataError if line else type(raised)) as caught,
        cli.translate_errors(DataError, "OUT", "free", "give less"),
    ):
        raise raised
    assert str(caught.value) == (f"ERROR[data] {line}" if line else str(raised))
