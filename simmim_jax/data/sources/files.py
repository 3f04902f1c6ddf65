"""Files read at random positions by several threads. Each process opens a file once."""

import functools
import os
import resource
import stat
from collections.abc import Callable

from simmim_jax.errors import DataError

LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
TAIL = 2**16  # bytes that `read_tail` reads
# open files per source and process; a run has two sources and opens many other files
MAX_OPEN = 1024 if LIMIT == resource.RLIM_INFINITY else max(64, min(1024, LIMIT // 4))


class File:
    """An open file, closed when nothing refers to it any more."""

    def __init__(self, path: str, version: tuple[int, int]):
        self.path, self.version, self.descriptor = path, version, -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        """Read `size` bytes, or fewer at the end of the file.

        Raises DataError if the file is not of its version any more, because the offset may be wrong then.
        """
        if file_version(os.fstat(self.descriptor)) != self.version:
            raise changed_error(self.path)
        parts = []
        while size > 0 and (part := os.pread(self.descriptor, min(size, 2**30), offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self, close=os.close):  # bound here: at exit, the globals of this module may be gone already
        if self.descriptor >= 0:
            close(self.descriptor)


def make_opener(open_one: Callable, max_open: int = 1024) -> Callable:
    """`open_one` with a cache of its last results. A dropped file stays open while a thread reads from it."""
    return functools.lru_cache(min(MAX_OPEN, max_open))(open_one)


def changed_error(path: str) -> DataError:
    """The error for a file that is not the one that the run began with."""
    return DataError(f"{path} has changed since the run began", "data.path", "start again, or undo the change")


def unreadable_error(path: str, error: OSError) -> DataError:
    """The error for a file or folder that cannot be read."""
    reason = error.strerror or type(error).__name__
    return DataError(f"{path} cannot be read", reason, "repair it, or move it out of data.path")


def file_version(status: os.stat_result) -> tuple[int, int]:
    """(size in bytes, time of the last change in nanoseconds), which change if the file changes."""
    return status.st_size, status.st_mtime_ns


def read_tail(path: str, size: int) -> bytes:
    """The end of a file of `size` bytes. In ArrayRecord files it holds the offsets of the records."""
    with open(path, "rb") as file:
        file.seek(max(0, size - TAIL))
        return file.read()


def stat_file(path: str) -> tuple[int, int]:
    """The version of a file. Raises DataError if it is not a readable file."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a file", "data.path", "point data.path at a file or a folder")
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise unreadable_error(path, error) from error
    return file_version(status)
