"""Compact lists of names and numbers: in memory if they are small, else in a file that worker processes map as well."""

import functools
import hashlib
import itertools
import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from simmim_jax.errors import DataError

LIMIT = 2**20  # bytes of a column in memory and in a pickle; larger ones are in a file
MAX_SIZES = 1000  # files whose sizes are part of a fingerprint
CHUNK = 2**16  # names converted to Python objects at a time


class Column:
    """Numbers that are first appended and then read as one `array`.

    More than LIMIT bytes are stored in a temporary file without a name, which disappears with this process. A pickle
    holds the path to map, and can be loaded by other processes, such as workers, as long as this process lives.
    """

    def __init__(self, dtype):
        self.dtype, self.parts, self.pending, self.file, self.path = np.dtype(dtype), [], 0, None, ""

    def append(self, values) -> None:
        values = np.ascontiguousarray(values, self.dtype)
        self.parts.append(values)
        self.pending += values.nbytes
        if self.pending > LIMIT:
            self._write()

    def _write(self) -> None:
        try:
            if self.file is None:
                nameless = os.path.isdir("/proc/self/fd")
                self.file = tempfile.TemporaryFile() if nameless else tempfile.NamedTemporaryFile()  # noqa: SIM115
                self.path = "" if nameless else self.file.name
            for part in self.parts:
                self.file.write(part)
            self.file.flush()
        except OSError as error:
            reason = error.strerror or type(error).__name__
            what, where = "the index of the images cannot be written", f"in {tempfile.gettempdir()}: {reason}"
            raise DataError(what, where, "set TMPDIR to a larger disk") from error
        self.parts, self.pending = [], 0

    @functools.cached_property
    def array(self) -> np.ndarray:
        """The numbers, read-only."""
        if self.file is None and not self.path:
            return np.concatenate([*self.parts, np.empty(0, self.dtype)])
        if self.file is not None and self.parts:
            self._write()
        return self._map(self.file.fileno() if self.file is not None else None)

    def _map(self, descriptor: int | None) -> np.ndarray:
        opened = os.open(self.path, os.O_RDONLY) if descriptor is None else descriptor
        try:
            return np.frombuffer(mmap.mmap(opened, 0, access=mmap.ACCESS_READ), self.dtype)
        finally:
            if descriptor is None:
                os.close(opened)

    def __len__(self) -> int:
        return len(self.array)

    def __getstate__(self) -> dict:
        array = self.array
        if self.file is None and not self.path:
            return {"dtype": self.dtype, "array": array}
        path = self.path or f"/proc/{os.getpid()}/fd/{self.file.fileno()}"
        return {"dtype": self.dtype, "path": path}

    def __setstate__(self, state: dict) -> None:
        self.__init__(state["dtype"])
        self.path = state.get("path", "")
        try:
            self.array = state["array"] if "array" in state else self._map(None)
            self.parts = [self.array] if "array" in state else []
        except OSError as error:
            fix = "keep the process that made it alive"
            raise DataError("the index of the images is gone", self.path, fix) from error


class Names:
    """A list of strings, stored as their joined bytes and the end of each."""

    def __init__(self, names: Iterable[str] = ()):
        self.bytes, self.ends, self.size = Column(np.uint8), Column(np.int64), 0
        names = map(os.fsencode, names)
        while chunk := list(itertools.islice(names, CHUNK)):
            self.append(b"".join(chunk), [len(name) for name in chunk])

    def append(self, joined, lengths) -> None:
        """Append names, given as their joined bytes and the length of each."""
        self.bytes.append(np.frombuffer(joined, np.uint8))
        self.ends.append(self.size + np.cumsum(lengths, dtype=np.int64))
        self.size += len(joined)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        ends = self.ends.array
        return os.fsdecode(self.bytes.array[ends[i - 1] if i else 0 : ends[i]].tobytes())

    def __iter__(self) -> Iterator[str]:
        return (os.fsdecode(name) for chunk in self._chunks() for name in chunk)

    def _chunks(self) -> Iterator[list[bytes]]:
        for _, joined, lengths in self._slices():
            ends = np.cumsum(lengths).tolist()
            whole = joined.tobytes()
            yield [whole[start:end] for start, end in zip([0, *ends], ends, strict=False)]

    def _slices(self) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        ends, start = self.ends.array, 0
        for first in range(0, len(ends), CHUNK):
            part = ends[first : first + CHUNK]
            yield first, self.bytes.array[start : part[-1]], np.diff(part, prepend=start)
            start = part[-1]

    def take(self, keep: np.ndarray) -> "Names":
        """The names where `keep`, bool [n], is True."""
        taken = Names()
        for first, joined, lengths in self._slices():
            kept = keep[first : first + len(lengths)]
            taken.append(joined[np.repeat(kept, lengths)], lengths[kept])
        return taken

    def digest(self) -> str:
        """SHA-256 of all names and their ends."""
        return digest_of(self.bytes.array, self.ends.array)

    def digest_sizes(self, root: str) -> str:
        """SHA-256 of the sizes of evenly spaced files. Reading those of all files takes long on a network disk."""
        sizes, count = [], min(len(self), MAX_SIZES)
        for n in range(count):
            try:
                sizes.append(os.stat(os.path.join(root, self[n * len(self) // count])).st_size)
            except OSError:
                sizes.append(-1)  # removed since; reading it will raise
        return digest_of(repr(sizes).encode())


def digest_of(*parts) -> str:
    """SHA-256 of buffers, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
