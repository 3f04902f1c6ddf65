"""What `data.path` has that is not read, reported in one line when the sources are opened."""

import contextlib
import contextvars
import os
from collections.abc import Iterator

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.errors import warn_once

MAX_OPENED = 1000  # files without an ending in a folder that are opened to see whether they are images
MAX_NAMED = 2  # names of one kind in the line
UNREAD_IMAGES = (
    ".heic", ".heif", ".hif", ".avif", ".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".ico",
    ".tga", ".dds", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2", ".dcm", ".nii",
    ".npy", ".npz", ".mat", ".eps", ".pdf", ".mp4", ".mov", ".avi", ".mkv",
)  # fmt: skip
DATA_FILES = (
    ".tar", ".parquet", ".array_record", ".arrayrecord", ".tfrecord", ".tfrecords", ".arrow", ".feather", ".lmdb",
    ".mdb", ".h5", ".hdf5", ".beton", ".mds", ".rec", ".pkl", ".pickle",
)  # fmt: skip
ARCHIVES = (".zip", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".lz4", ".7z", ".rar")
FIXES = {
    "archives": "unpack them to read them",
    "images without an ending": "add one, such as .jpg",
    ".heic files": "pip install pillow-heif, or convert them",
    ".heif files": "pip install pillow-heif, or convert them",
}
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"GIF8")  # of image files


class Unread:
    """Files and folders that are not read, by what they are: their number, and the first names."""

    def __init__(self):
        self.found: dict[str, tuple[int, list[str], str]] = {}
        self.opened = 0  # files without an ending

    def add(self, what: str, path: str, fix: str = "", count: int = 1) -> None:
        number, names, fix_before = self.found.get(what, (0, [], ""))
        if len(names) < MAX_NAMED or path < names[-1]:
            names = sorted([*names, path])[:MAX_NAMED]
        self.found[what] = number + count, names, fix or fix_before or FIXES.get(what, "")

    def add_file(self, folder: str, name: str) -> None:
        """Add a file that is not read, if it may have images."""
        path, what = os.path.join(folder, name), kind_of_file(name)
        if not os.path.splitext(name)[1] and self.opened < MAX_OPENED:
            self.opened += 1
            what = "images without an ending" if _has_signature(path) else ""
        if what:
            self.add(what, path)

    def describe(self, top: str) -> str:
        """What is not read, with names relative to the folder `top`."""
        parts = []
        for what, (count, names, fix) in self.found.items():
            named = ", ".join(_shown(name, top) for name in names)
            more = ", ..." if count > len(names) else ""
            parts.append(f"{count} {what} ({named}{more}{f': {fix}' if fix else ''})")
        return "; ".join(parts)


def kind_of_file(name: str) -> str:
    """What a file is that may have images and has an ending that is not read; "" for other files."""
    extension = os.path.splitext(name.lower())[1]
    if extension in ARCHIVES:
        return "archives"
    if extension in UNREAD_IMAGES or extension in DATA_FILES or extension.startswith(EXTENSIONS):  # such as .jpg~
        return "" if extension in EXTENSIONS else f"{extension} files"
    return ""


def _has_signature(path: str) -> bool:
    with contextlib.suppress(OSError), open(path, "rb", opener=_open_nonblocking) as file:
        return is_image(file.read(16))
    return False


def _open_nonblocking(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # opening a pipe would hang


def is_image(raw: bytes) -> bool:
    """Whether the first bytes are those of an image file that `decode` may read."""
    return raw.startswith(SIGNATURES) or (raw[:4] == b"RIFF" and raw[8:12] == b"WEBP") or raw[4:8] == b"ftyp"


Found = dict[tuple[str, str], Unread]  # by folder, and part of it
_reported: contextvars.ContextVar[Found | None] = contextvars.ContextVar("reported", default=None)


def report(where: str, unread: Unread, part: str = "") -> None:
    """Add what is not read of a part of the folder `where` to the line. A part that is read twice is counted once."""
    found = _reported.get()
    if found is not None:
        found[where, part] = unread


@contextlib.contextmanager
def one_report(log: bool = True) -> Iterator[None]:
    """Log one line with what all sources that are made inside this context do not read; nothing if not `log`."""
    if _reported.get() is not None and log:  # part of a larger report
        yield
        return
    found: Found = {}
    token = _reported.set(found)
    try:
        yield
    finally:
        _reported.reset(token)
    found = {where: unread for where, unread in found.items() if unread.found}
    if found and log:
        warn_once(_line(found))


def _line(found: Found) -> str:
    top = os.path.commonpath([where for where, _ in found])
    return f"{top}: not read: {'; '.join(unread.describe(top) for unread in found.values())}"


def _shown(path: str, top: str) -> str:
    name = os.path.relpath(path, top) + "/" * path.endswith("/")
    return name if name.isprintable() and " " not in name else repr(name)
