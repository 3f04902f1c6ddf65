"""What lies in a folder, and what a path that leads nowhere may have meant."""

import difflib
import itertools
import os

GLANCE = 10_000  # entries of a directory that are looked at where not all need be


def folders(path: str) -> list[str]:
    """Names of the directories directly in `path`, sorted; none if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return sorted(entry.name for entry in listing if not entry.name.startswith(".") and is_folder(entry))
    except OSError:
        return []


def glance(path: str) -> list[os.DirEntry]:
    """The first entries of a directory that are not hidden; none if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return [entry for entry in itertools.islice(listing, GLANCE) if not entry.name.startswith(".")]
    except OSError:
        return []


def is_folder(entry: os.DirEntry) -> bool:
    # an entry knows without asking the disk, unless it is a link; of a link to itself it raises, where os.path says no
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def is_file(entry: os.DirEntry) -> bool:
    return os.path.isfile(entry.path) if entry.is_symlink() else entry.is_file()


def nearest_folder(path: str) -> str:
    """What to do about a path that is no folder, by the last part of it that is one."""
    parent, missing = _last_folder(path)
    if os.path.exists(os.path.join(parent, missing)):
        return f"{missing} is a file: did you mean {parent}?"
    near = difflib.get_close_matches(missing, folders(parent), n=1)
    return f"did you mean {os.path.join(parent, near[0])}?" if near else f"{parent} is there, but it has no {missing}"


def nearest_path(path: str) -> str:
    """What to do about a path that is neither file nor folder."""
    parent, missing = _last_folder(path)
    near = difflib.get_close_matches(missing, [entry.name for entry in glance(parent)], n=1)
    return f"did you mean {os.path.join(parent, near[0])}?" if near else f"{parent} is there, but it has no {missing}"


def _last_folder(path: str) -> tuple[str, str]:
    parent, missing = path, ""
    while not os.path.isdir(parent):
        parent, missing = os.path.split(parent)
    return parent, missing
