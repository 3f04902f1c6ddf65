"""What a user did that cannot work, said in one line, with an exit code of its own.

Every error a user can cause ends as one line on stderr::

    ERROR[kind] what - where - what to do

`exit_with_message` prints it without a traceback (set SIMMIM_TRACEBACK=1 to see one) and exits with the code of its
kind.
This module imports nothing of ours, and nothing heavy: it is needed before JAX is.
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

from absl import logging


class UserError(Exception):
    """An error that the user can mend: `what` happened, `where`, and what to do about it (`fix`)."""

    kind = "error"
    exit_code = 1

    def __init__(self, what: str, where: str = "", fix: str = ""):
        super().__init__(what, where, fix)  # all three, so that the error survives pickling between processes
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        parts = " - ".join(part for part in (self.what, self.where, self.fix) if part)
        return f"ERROR[{self.kind}] " + " ".join(parts.split())


class ConfigError(UserError):
    """A config that is misspelt, mistyped, contradictory, or not the one of this workdir."""

    kind, exit_code = "config", 2


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are errors of one line."""

    def error(self, message: str):
        raise ConfigError(message, "command line", "see --help")


class DataError(UserError):
    """Images that are missing, unreadable, too few, or not those that the run began with."""

    kind, exit_code = "data", 3


class NonFiniteError(UserError):
    """A loss or gradient that is NaN or infinite, several steps in a row."""

    kind, exit_code = "nonfinite", 4


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another model."""

    kind, exit_code = "checkpoint", 5


class PeerError(UserError):
    """Another process of the same run that is gone."""

    kind, exit_code = "peer", 6


class BusyError(UserError):
    """A workdir that another run holds."""

    kind, exit_code = "busy", 75  # EX_TEMPFAIL


class Preempted(Exception):
    """A SIGTERM or SIGINT came: the state is saved, and the same command goes on from there."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(signal_number, step)
        self.exit_code = 128 + signal_number  # 143 for SIGTERM, 130 for SIGINT, as shells have it
        self.number, self.name, self.step = signal_number, signal.Signals(signal_number).name, step

    def __str__(self) -> str:
        state = f"step {self.step} is saved" if self.step else "there was no step to save"
        return f"stopped by {self.name}: {state}; run the same command again to go on"


def suggest(name: str, choices: Iterable[str]) -> str:
    """What to do about a `name` that is not among the choices: the nearest of them, and all."""
    near = difflib.get_close_matches(str(name), choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{hint}choose one of {', '.join(sorted(choices))}"


def choose(what: str, name: str, choices):
    """`choices[name]` (or `name`, of a set), or a ConfigError that lists the choices and the nearest."""
    if name in choices:
        return choices[name] if isinstance(choices, dict) else name
    raise ConfigError(f"unknown {what} {name!r}", fix=suggest(name, choices))


def check_options(what: str, function: Callable, options: dict) -> None:
    """Raise ConfigError for an option that `function` does not take, with the nearest that it does."""
    for option in options:
        choose(f"{what} option", option, set(inspect.signature(function).parameters))


def check_minimum(where: str, value: int | float, minimum: int, *, strict: bool = False) -> None:
    """Raise ConfigError unless `value` is `minimum` or more, or, where `strict`, more."""
    if not (value > minimum if strict else value >= minimum):  # so that NaN is refused
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
    """Log a warning, once per process for equal lines."""
    logging.warning("%s", " ".join(line.split()).encode(errors="backslashreplace").decode())


def _end_processes() -> None:
    """What multiprocessing does when an interpreter ends: else it tells of semaphores that were left behind."""
    if "multiprocessing.util" in sys.modules:
        sys.modules["multiprocessing.util"]._exit_function()


@contextlib.contextmanager
def exit_with_message(before_end: Callable[[bool], None] | None = None) -> Iterator[None]:
    """End the process as promised above, if what runs inside raises UserError or Preempted; quietly if it is cut off.

    For the entry of a program: the exit codes are those of the errors, 141 where nobody reads the output any more, as
    after `| head`, and 130 for a Ctrl-C before a run has begun (later it is a signal like SIGTERM).
    before_end: called after the line is printed, with whether it is a signal that ends the process.
    """
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
        # All is closed by now, and the line must be the last: Orbax's threads print while the interpreter shuts down.
        os._exit(error.exit_code)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except KeyboardInterrupt:
        sys.exit(130)
