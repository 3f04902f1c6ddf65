"""Files that tools write: whole, or not at all; and the names of files in them."""

import os
from collections.abc import Callable
from pathlib import Path


def printable(name: str) -> str:
    """A file's name as UTF-8 can hold it: bytes that are none become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """`path` holds all that `write` (partial path) writes, on the disk, or what it held before. Raises OSError."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
