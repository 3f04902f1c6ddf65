"""File utilities: atomic writes, JSON, printable file names, and a lock on a folder."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

from simmim_jax.errors import BusyError, ConfigError, UserError


def utf8_name(name: str) -> str:
    r"""A file's name as text that UTF-8 can encode. Bytes that are not UTF-8 become \xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def printable(name: str) -> str:
    """A file's name that is safe to print: `utf8_name` with "?" for control characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in utf8_name(name))


def write_atomically(path: Path, content: str | bytes | Callable[[Path], object]) -> None:
    """Write a file atomically. After a crash, `path` has either the complete new content or the complete old content.

    content: text, bytes, or a function that writes a file to a given path. Syncs the data to disk before the rename.
    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        if callable(content):
            content(partial)
        else:
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        with open(partial, "rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object atomically, indented."""
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def read_json(
    path: Path, error: type[UserError] = ConfigError, fix: str = "remove it, or give another --workdir"
) -> dict:
    """The object in a JSON file; {} if there is no file. Raises `error` if it has no object or is unreadable."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {}
    except OSError as reason:
        raise error(f"cannot read: {reason.strerror}", str(path), fix) from reason
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise error("not a JSON object", str(path), fix)
    return content


def read_text(path: Path) -> str:
    """The text of a file; "" if it cannot be read."""
    try:
        return path.read_text()
    except OSError:
        return ""


@contextlib.contextmanager
def lock_folder(folder: Path, name: str = "LOCK", what: str = "workdir is in use") -> Iterator[None]:
    """Hold an exclusive lock on `folder`. It ends with the process. Raises BusyError if another process holds it.

    name: the lock file in the folder. what: the first part of the error message.
    """
    with open(folder / name, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise BusyError(what, f"{folder} by {owner}", "wait for it, or give another folder") from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {socket.gethostname()} since {datetime.now():%Y-%m-%d %H:%M:%S}\n")
        lock.flush()
        os.fsync(lock.fileno())  # so that other hosts can read the owner
        yield
