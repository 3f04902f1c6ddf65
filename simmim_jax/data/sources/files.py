"""Files that are read at random places by several threads, each opened once in a process."""

import functools
import os
import resource
import stat
from collections.abc import Callable

from simmim_jax.errors import DataError

# Files that one source holds open in a process. A run has two sources, and much else to open.
LIMIT = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
OPEN = 1024 if LIMIT == resource.RLIM_INFINITY else max(64, min(1024, LIMIT // 4))


class File:
    """An open file, closed when nobody reads from it any more."""

    def __init__(self, path: str, version: tuple[int, int]):
        self.path, self.version, self.descriptor = path, version, -1
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        """As many of these bytes as there are.

        Raises:
          DataError: if the file is not of its version any more, for other bytes may stand there now.
        """
        if version_of(os.fstat(self.descriptor)) != self.version:
            raise changed(self.path)
        parts = []
        while size > 0 and (part := os.pread(self.descriptor, min(size, 2**30), offset)):
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def __del__(self, close=os.close):  # bound here, for when Python exits, this module's names may be gone before
        if self.descriptor >= 0:
            close(self.descriptor)


def opener(open_one: Callable, most: int = 1024) -> Callable:
    """`open_one`, which keeps what it opened last. What it drops stays open while a thread still reads from it."""
    return functools.lru_cache(min(OPEN, most))(open_one)


def changed(path: str) -> DataError:
    """What is said of a file that is not the one that the run began with."""
    return DataError(f"{path} has changed since the run began", "data.path", "start again, or undo the change")


def version_of(status: os.stat_result) -> tuple[int, int]:
    """(size in bytes, time of the last change in nanoseconds): what says whether a file is still the same."""
    return status.st_size, status.st_mtime_ns


def stat_file(path: str) -> tuple[int, int]:
    """The version of a file, or a DataError if it is none that can be read."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path} is not a file", "data.path", "point data.path at a file or a folder")
        if not os.access(path, os.R_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{path} cannot be read", reason, "mend it, or move it out of data.path") from error
    return version_of(status)
