"""User-facing errors. Each prints one line and has its own exit code.

    ERROR[kind] what - where - how to fix it

`exit_with_message` prints the line to stderr and exits with the code of the kind. With SIMMIM_TRACEBACK=1, it lets the
error propagate with its traceback. This module imports no heavy packages, because it is needed before JAX is imported.
"""

import argparse
import contextlib
import difflib
import functools
import inspect
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from logging import Formatter

from absl import logging


class UserError(Exception):
    """An error that the user can fix: `what` happened, `where`, and the `fix`."""

    kind = "error"
    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what, where, fix)  # all three, so that pickling keeps them
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        parts = " - ".join(part for part in (self.what, self.where, self.fix) if part)
        return f"ERROR[{self.kind}] " + " ".join(parts.split())


class ConfigError(UserError):
    """A config or command line is invalid, or the config differs from that of the workdir."""

    kind, exit_code = "config", 2


class Parser(argparse.ArgumentParser):
    """An argparse parser that raises ConfigError."""

    def error(self, message: str):
        raise ConfigError(message, "command line", "see --help")


class DataError(UserError):
    """Images are missing, unreadable, too few, or have changed since the run started."""

    kind, exit_code = "data", 3


class NonFiniteError(UserError):
    """The loss or gradient is NaN or infinite for several steps in a row."""

    kind, exit_code = "nonfinite", 4


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or belongs to another model."""

    kind, exit_code = "checkpoint", 5


class PeerError(UserError):
    """Another process of the same run was lost."""

    kind, exit_code = "peer", 6


class BusyError(UserError):
    """Another process uses the workdir or output folder."""

    kind, exit_code = "busy", 75  # EX_TEMPFAIL


class Preempted(Exception):
    """SIGTERM or SIGINT was received. The state has been saved, and the same command resumes from it."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(signal_number, step)
        self.exit_code = 128 + signal_number  # 143 for SIGTERM, 130 for SIGINT, as in shells
        self.number, self.name, self.step = signal_number, signal.Signals(signal_number).name, step

    def __str__(self) -> str:
        state = f"step {self.step} is saved" if self.step else "no step to save"
        return f"stopped by {self.name}: {state}; run the same command to resume"


def suggest(name: str, choices: Iterable[str]) -> str:
    """A suggestion for an unknown `name`: the nearest choice, and all choices."""
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}choose one of {', '.join(sorted(choices))}"


def choose(what: str, name: str, choices):
    """`choices[name]`, or `name` if `choices` is a set. Raises ConfigError with the nearest choice."""
    if name in choices:
        return choices[name] if isinstance(choices, dict) else name
    raise ConfigError(f"unknown {what} {name!r}", fix=suggest(name, choices))


def check_options(what: str, function: Callable, options: dict) -> None:
    """Raise ConfigError for an option that `function` does not take, with the nearest one."""
    for option in options:
        choose(f"{what} option", option, set(inspect.signature(function).parameters))


def check_minimum(where: str, value: int | float, minimum: int, *, strict: bool = False) -> None:
    """Raise ConfigError unless `value` is at least `minimum`; with `strict`, above it."""
    if not (value > minimum if strict else value >= minimum):  # also true for NaN
        bound = "above" if strict else "of at least"
        raise ConfigError(f"{where.split('.')[-1]} is {value}", where, f"give a number {bound} {minimum}")


def check_multiple(size: int, unit: int, where: str, of_what: str) -> None:
    """Raise ConfigError unless `size` is a positive multiple of `unit`; suggest the nearest multiples."""
    if size < 1 or size % unit:
        below = size // unit * unit
        near = f"{below} or {below + unit}" if below > 0 else f"{unit}"
        raise ConfigError(f"{size} is not a multiple of {of_what}, {unit}", where, f"try {near}")


def differences(saved: dict, now: dict) -> str:
    """The first three entries that differ, as "name: 1 saved, 2 now", and the number of others; "" if all agree."""
    absent = "absent"
    sides = {name: (saved.get(name, absent), now.get(name, absent)) for name in sorted(saved | now)}
    changed = [f"{name}: {then} saved, {here} now" for name, (then, here) in sides.items() if then != here]
    return ", ".join(changed[:3]) + (f" and {len(changed) - 3} more" if len(changed) > 3 else "")


@functools.lru_cache(1000)
def warn_once(line: str) -> None:
    """Log a warning. Each distinct line is logged once per process."""
    logging.warning("%s", " ".join(line.split()).encode(errors="backslashreplace").decode())


def _end_processes() -> None:
    """Run multiprocessing's exit handler. Without it, multiprocessing warns about leaked semaphores."""
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._exit_function()


@contextlib.contextmanager
def exit_with_message(before_end: Callable[[bool], None] | None = None) -> Iterator[None]:
    """Context manager for the entry point of a program: turn UserError and Preempted into a line and an exit code.

    The process exits with 141 if its output pipe is closed, as by `| head`, and with 130 after Ctrl-C before a run has
    started. before_end: called after the line is printed; its argument is whether a signal ends the process.
    """
    logging.get_absl_handler().setFormatter(Formatter("%(levelname)s: %(message)s"))
    try:
        yield
    except (UserError, Preempted) as error:
        if os.environ.get("SIMMIM_TRACEBACK"):
            raise
        sys.stdout.flush()
        print(error, file=sys.stderr, flush=True)
        if before_end:
            before_end(isinstance(error, Preempted))
        _end_processes()
        # Everything is closed. Exit at once, so that this line is the last one: Orbax's threads print at shutdown.
        os._exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
