"""Contents of folders, and suggestions for paths that do not exist."""

import difflib
import itertools
import os

MAX_PEEK = 10_000  # entries of a folder that `peek` reads


def folders(path: str) -> list[str]:
    """Names of the folders in `path`, sorted, without hidden ones; [] if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return sorted(entry.name for entry in listing if not entry.name.startswith(".") and is_folder(entry))
    except OSError:
        return []


def peek(path: str) -> list[os.DirEntry]:
    """The first entries of a folder, without hidden ones; [] if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return [entry for entry in itertools.islice(listing, MAX_PEEK) if not entry.name.startswith(".")]
    except OSError:
        return []


def is_folder(entry: os.DirEntry) -> bool:
    """`entry.is_dir()`, but False for a link to itself, for which that raises."""
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_file(entry: os.DirEntry) -> bool:
    """`entry.is_file()`, but False for a link to itself, for which that raises."""
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def nearest_folder(path: str) -> str:
    """A suggestion for a path that is not a folder."""
    parent, missing = _last_folder(path)
    if os.path.exists(os.path.join(parent, missing)):
        return f"{missing} is a file: did you mean {parent}?"
    return _suggest(parent, missing, folders(parent))


def nearest_path(path: str) -> str:
    """A suggestion for a path that does not exist."""
    parent, missing = _last_folder(path)
    return _suggest(parent, missing, [entry.name for entry in peek(parent)])


def _suggest(parent: str, missing: str, names: list[str]) -> str:
    near = difflib.get_close_matches(missing, names, n=1)
    return f"did you mean {os.path.join(parent, near[0])}?" if near else f"{parent} exists, but it has no {missing}"


def _last_folder(path: str) -> tuple[str, str]:
    """(the deepest existing folder of a path, the name missing in it)."""
    parent, missing = path, ""
    while not os.path.isdir(parent):
        parent, missing = os.path.split(parent)
    return parent, missing
