"""Contents of folders, and suggestions for paths that do not exist."""

import difflib
import itertools
import os

MAX_PEEK = 10_000  # entries of a folder that `peek` reads
MAX_SEARCHED = 10  # folders in a folder that `has_files` searches
# Folders of thumbnails, deleted files and the like, that Synology, QNAP, macOS, Windows and Linux create. They have
# copies of the images.
SYSTEM_FOLDERS = {
    "@eadir", "@__thumb", "thumbnails", "thumbs", "_thumbs", "__macosx", "#recycle", "@recycle", "$recycle.bin",
    "#snapshot", "@recently-snapshot", "lost+found", "system volume information",
}  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether a file or folder is hidden, or a folder of the operating system."""
    return name.startswith(".") or name.casefold() in SYSTEM_FOLDERS


def folders(path: str) -> list[str]:
    """Names of the folders in `path`, sorted, without hidden ones; [] if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return sorted(entry.name for entry in listing if not is_hidden(entry.name) and is_folder(entry))
    except OSError:
        return []


def peek(path: str) -> list[os.DirEntry]:
    """The first entries of a folder, without hidden ones; [] if it cannot be read."""
    try:
        with os.scandir(path) as listing:
            return [entry for entry in itertools.islice(listing, MAX_PEEK) if not is_hidden(entry.name)]
    except OSError:
        return []


def has_files(path: str, extensions: tuple[str, ...], depth: int = 3) -> bool:
    """Whether a folder has files with these endings. It searches the first folders down to `depth` levels."""
    entries = peek(path)
    if any(entry.name.lower().endswith(extensions) and is_file(entry) for entry in entries):
        return True
    inside = [entry.path for entry in entries if depth > 1 and is_folder(entry)][:MAX_SEARCHED]
    return any(has_files(each, extensions, depth - 1) for each in inside)


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
