"""Folders of image files, flat or by class, nested or not."""

import dataclasses
import hashlib
import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.data.sources.files import unreadable_error
from simmim_jax.data.sources.listing import folders, is_file, is_folder, nearest_folder
from simmim_jax.data.sources.names import Names
from simmim_jax.data.sources.splits import (
    EVALUATION,
    STANDARD,
    FileSource,
    both_sides,
    by_side,
    cases,
    own_split,
    side_of,
)
from simmim_jax.errors import ConfigError, DataError, warn_once

MAX_SORTED = 200_000  # entries of a directory sorted in memory; more are sorted in runs on disk


def make_folder(*, path: str, split: str, heldout_fraction: float, **_) -> "Folder":
    """The images below `path` that belong to `split`, in the order of their names.

    The root is `path/<split>` if it exists; the evaluation split may have any of its names. Otherwise a fixed part is
    held out (of `path/train` if that exists), drawn by a hash of the name: no file changes sides when others are added
    or removed. Only if the part of a small folder would be empty, one image is held out.

    The class is the first directory below the root. A folder with images outside of such directories, or with only one
    such directory, is unlabeled. Links are followed, no directory is visited twice, and hidden names are skipped.

    Raises DataError if there are no images, or if folders that look like splits would become classes.
    """
    if not path:
        raise ConfigError("data.path is empty", "data.source=folder", "set data.path to a folder of images")
    path = os.path.abspath(os.path.expanduser(path))
    found = split_folders(path, split)
    if not found and not os.path.isdir(path):
        raise DataError(f"{path} is not a folder", "data.path", nearest_folder(path.replace("{split}", "train")))
    own, evaluation = own_split(path, split, found, slash="/")
    root = found.get(own) or found.get("train") or path
    standard = split in STANDARD
    mixed = standard and root == path and both_sides(path, found, slash="/")
    if mixed:
        raise mixed
    names, notes = _index(root, one_side=standard)
    if notes.broken:
        warn_once(f"{root}: {notes.broken} broken links are left out, the first is {notes.first_broken}")
    if not len(names):
        raise DataError(
            f"{root} has 0 images", f"looked for {' '.join(EXTENSIONS)}", "point data.path at a folder of images"
        )
    standard = standard and "train" in found
    others = [found[side] for side in ("train", *evaluation) if standard and side != own]
    classes = _classes(notes.firsts, others)
    if (split in EVALUATION and not own) or (split == "train" and not evaluation):
        keep = _held_out(names, heldout_fraction) == (split != "train")
        if not keep.any():
            what = f"{root} has 0 of its {len(names)} images in split {split!r}"
            raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
        names = names if keep.all() else names.take(keep)
    return Folder(root, split, names, classes)


def split_folders(path: str, split: str = "train") -> dict[str, str]:
    """The folders in `path`, or those that a path with {split} means, by split name."""
    if "{split}" not in path or os.path.isdir(path):
        return {name: os.path.join(path, folder) for name, folder in by_side(folders(path)).items()}
    found = {}
    for side in dict.fromkeys((*STANDARD, split)):
        forms = [path.replace("{split}", form) for form in cases(side)]
        folder = next(filter(os.path.isdir, forms), "")
        if folder:
            found[side] = folder
    return found


class Folder(FileSource):
    """Image files below `root`."""

    def __init__(self, root: str, split: str, names: Names, classes: tuple[str, ...]):
        self.path = self.root = root
        self.split, self.names, self.classes = split, names, classes

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        name = self.name(i)
        label = self._numbers[name.split("/", 1)[0]] if self.classes else -1
        with open(os.path.join(self.root, name), "rb") as file:
            return {"image": file.read(), "label": label, "name": name}

    def name(self, i: int) -> str:
        return self.names[i]

    def fingerprint(self) -> dict:
        digests = {"names_sha256": self.names.digest(), "sizes_sha256": self.names.digest_sizes(self.root)}
        return {"source": "folder", "split": self.split, "count": len(self)} | digests


class _LinkedDirectoryError(Exception):
    """There is a link to a directory. Whether it leads to a new one is known only after a walk through all of them."""


@dataclasses.dataclass
class _Notes:
    """Facts collected during a walk through the images below `root`."""

    root: str
    one_side: bool = False  # refuse directories that look like splits
    firsts: set[str] = dataclasses.field(default_factory=set)  # first directories of images; "" for images in none
    sides: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # names that look like splits, by directory
    broken: int = 0  # links
    first_broken: str = ""

    def each(self, names: Iterable[str]) -> Iterator[str]:
        last = None
        for name in names:
            folder = name.rpartition("/")[0]
            if folder != last:
                self._note_folder(folder)
                last = folder
            yield name

    def _note_folder(self, folder: str) -> None:
        first, _, rest = folder.partition("/")
        self.firsts.add(first)
        for above, name in (("", first), (first, rest.partition("/")[0])) if self.one_side else ():
            side, known = side_of(name), self.sides.get(above, [])
            if side and side not in map(side_of, known):
                self.sides[above] = [*known, name]
                mixed = both_sides(os.path.join(self.root, above).rstrip("/"), self.sides[above], slash="/")
                if mixed:
                    where = os.path.join(self.root, above).rstrip("/")
                    fix = f"point data.path at {where}, or move all to train/ and val/ in {self.root}"
                    exact = set(STANDARD).issuperset(each.casefold() for each in self.sides[above])
                    raise DataError(mixed.what, mixed.where, fix if exact else mixed.fix)

    def note_broken(self, link: str) -> None:
        self.broken, self.first_broken = self.broken + 1, self.first_broken or link


def _index(root: str, one_side: bool = False) -> tuple[Names, _Notes]:
    """(the names of the images below `root` in order, facts collected on the way)."""
    notes = _Notes(root, one_side)
    try:
        return Names(notes.each(_walk(root, None, notes))), notes
    except _LinkedDirectoryError:
        notes = _Notes(root, one_side)
        return Names(notes.each(_walk(root, _find_skipped(root), notes))), notes


def _walk(root: str, skipped: set[str] | None, notes: _Notes) -> Iterator[str]:
    """Names of the images below `root`, relative to it, in order, without the directories in `skipped`.

    Raises _LinkedDirectoryError if `skipped` is None and there is a link to a directory.
    """
    seen, stack = set(), [("", iter([""]))]
    while stack:
        folder, entries = stack[-1]
        entry = next(entries, None)
        if entry is None:
            stack.pop()
            continue
        name = folder + entry
        if entry and not entry.endswith("/"):
            yield name
            continue
        where = os.path.join(root, name.rstrip("/"))
        if skipped is None:
            if entry and os.path.islink(where):
                raise _LinkedDirectoryError
            if _is_seen(where, seen):
                continue
        elif name in skipped:
            continue
        stack.append((name, _entries(where, notes)))


def _find_skipped(root: str) -> set[str]:
    """The directories, with a "/" after each, to skip so that none is visited twice."""
    seen, waiting, links, skipped = set(), [""], [], set()
    while waiting or links:
        # links last and by name, so that of two ways to a directory the same one is used on every disk
        name = waiting.pop() if waiting else heapq.heappop(links) + "/"
        where = os.path.join(root, name.rstrip("/"))
        if _is_seen(where, seen):
            skipped.add(name)
            continue
        for entry in _entries(where, _Notes(root), images=False):
            if os.path.islink(os.path.join(where, entry.rstrip("/"))):
                heapq.heappush(links, (name + entry).rstrip("/"))
            else:
                waiting.append(name + entry)
    return skipped


def _is_seen(where: str, seen: set[tuple[int, int]]) -> bool:
    try:
        status = os.stat(where)
    except OSError as error:
        raise unreadable_error(where, error) from error
    identity = status.st_dev, status.st_ino
    if identity in seen:
        return True
    seen.add(identity)
    return False


def _entries(where: str, notes: _Notes, images: bool = True) -> Iterator[str]:
    """The directories, with a "/" after each, and the images in one directory, sorted by name."""
    run, runs = [], []
    try:
        with os.scandir(where) as listing:
            for entry in listing:
                if entry.name.startswith("."):
                    continue
                if is_folder(entry):
                    run.append(entry.name + "/")
                elif images and entry.name.lower().endswith(EXTENSIONS) and is_file(entry):
                    run.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    notes.note_broken(entry.path)
                if len(run) == MAX_SORTED:
                    runs.append(_store(sorted(run)))
                    run = []
    except OSError as error:
        raise unreadable_error(where, error) from error
    return heapq.merge(*runs, sorted(run)) if runs else iter(sorted(run))


def _store(names: list[str]) -> Iterator[str]:
    """Write names to a temporary file, and return an iterator that reads them."""
    file = tempfile.TemporaryFile()  # noqa: SIM115
    file.write(b"".join(os.fsencode(name) + b"\0" for name in names))
    file.seek(0)

    def read() -> Iterator[str]:
        rest = b""
        with file:
            while block := file.read(2**16):
                *whole, rest = (rest + block).split(b"\0")
                yield from map(os.fsdecode, whole)

    return read()


def _classes(firsts: set[str], others: list[str]) -> tuple[str, ...]:
    """The class names of images in the directories `firsts` and of those below `others`."""
    found = set(firsts)
    for other in others:
        found |= {folder for folder in folders(other) if folder in found or len(_index(os.path.join(other, folder))[0])}
    return tuple(sorted(found)) if "" not in found and len(found) >= 2 else ()


def _held_out(names: Names, fraction: float) -> np.ndarray:
    """Whether each image is held out: if its hash is below the fraction. Of several images at least one is."""
    bound, smallest, held_out = fraction * 2**64, (2**64, 0), np.zeros(len(names), bool)
    for i, name in enumerate(names):
        value = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
        held_out[i] = value < bound
        smallest = min(smallest, (value, i))
    if fraction > 0 and len(names) > 1:
        held_out[smallest[1]] = True
    return held_out
