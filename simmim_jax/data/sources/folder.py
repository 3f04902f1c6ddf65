"""Folders of image files, flat or by class, nested or not."""

import dataclasses
import hashlib
import heapq
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.data.rasters import ARRAY_EXTENSIONS
from simmim_jax.data.sources.classes import order_classes
from simmim_jax.data.sources.files import unreadable_error
from simmim_jax.data.sources.listing import folders, has_files, is_file, is_folder, is_hidden, nearest_folder, peek
from simmim_jax.data.sources.names import Names, digest_of
from simmim_jax.data.sources.neighbors import add_lists, report_neighbors
from simmim_jax.data.sources.parts import FileSource
from simmim_jax.data.sources.splits import (
    EVALUATION,
    HELDOUT_FRACTION,
    MIN_HELDOUT,
    STANDARD,
    both_sides,
    by_side,
    cases,
    own_split,
    side_of,
)
from simmim_jax.data.sources.unread import Unread, report
from simmim_jax.errors import ConfigError, DataError, warn_once

MAX_SORTED = 200_000  # entries of a directory sorted in memory; more are sorted in runs on disk


def make_folder(*, path: str, split: str, heldout_fraction: float | None, **_) -> "Folder":
    """The images below `path` that belong to `split`, in the order of their names.

    The root is `path/<split>` if it exists; the evaluation split may have any of its names. Otherwise a fixed part is
    held out (of `path/train` if that exists), drawn by a hash of the name: no file changes sides when others are added
    or removed, except in a small folder, of which a minimum is held out (see `_held_out`).

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
    standard = split in STANDARD
    if standard and os.path.isdir(path):
        report_neighbors(path, found)
    own, evaluation = own_split(path, split, found, slash="/")
    root = found.get(own) or found.get("train") or path
    mixed = standard and root == path and both_sides(path, found, slash="/")
    if mixed:
        raise mixed
    names, notes = _index(root, one_side=standard)
    if not len(names):  # next to pictures, arrays are more likely masks or features than images
        names, notes = _index(root, one_side=standard, endings=ARRAY_EXTENSIONS)
    notes.report()
    if not len(names):
        where = f"looked for {' '.join(EXTENSIONS + ARRAY_EXTENSIONS)}"
        where = f"it has {notes.unread.describe(root)}" if notes.unread.found else where
        raise DataError(f"{root} has 0 images", where, "point data.path at a folder of images")
    standard = standard and "train" in found
    others = [found[side] for side in ("train", *evaluation) if standard and side != own]
    labels = _classes(notes, len(names), others)
    if (split in EVALUATION and not own) or (split == "train" and not evaluation):
        keep = _held_out(names, heldout_fraction) == (split != "train")
        if not keep.any():
            what = f"{root} has 0 of its {len(names)} images in split {split!r}"
            raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
        names = names if keep.all() else names.take(keep)
    return Folder(root, split, names, notes, labels)


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

    by_name = True

    def __init__(self, root: str, split: str, names: Names, notes: "_Notes", labels: tuple[tuple[str, ...], str]):
        self.path = self.root = root
        self.split, self.names, self.has_links = split, names, notes.has_links
        self.classes, self.unlabeled = labels

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        name = self.name(i)
        label = self._numbers[name.split("/", 1)[0]] if self.classes else -1
        with open(self.image_path(i), "rb") as file:
            return {"image": file.read(), "label": label, "name": name}

    def name(self, i: int) -> str:
        return self.names[i]

    def image_path(self, i: int) -> str:
        return os.path.join(self.root, self.name(i))

    def all_labels(self) -> np.ndarray:
        numbers = self._numbers
        return np.fromiter((numbers[name.split("/", 1)[0]] if numbers else -1 for name in self.names), np.int64)

    def fingerprint(self) -> dict:
        digests = {"names_sha256": self.names.digest(), "sizes_sha256": self.names.digest_sizes(self.root)}
        # the numbers of labels depend on the classes of all splits
        digests["classes_sha256"] = digest_of(*(os.fsencode(name) + b"\0" for name in self.classes))
        return {"source": "folder", "split": self.split, "count": len(self)} | digests


class _LinkedDirectoryError(Exception):
    """There is a link to a directory. Whether it leads to a new one is known only after a walk through all of them."""


@dataclasses.dataclass
class _Notes:
    """Facts collected during a walk through the images below `root`."""

    root: str
    one_side: bool = False  # refuse directories that look like splits
    endings: tuple[str, ...] = EXTENSIONS  # of the images
    firsts: set[str] = dataclasses.field(default_factory=set)  # first directories of images; "" for images in none
    sides: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # names that look like splits, by directory
    unread: Unread = dataclasses.field(default_factory=Unread)
    strays: list[str] = dataclasses.field(default_factory=list)  # the first images that are in no directory
    has_links: bool = False  # whether an image is a link
    outside: int = 0  # number of images that are in no directory

    def each(self, names: Iterable[str]) -> Iterator[str]:
        last = None
        for name in names:
            folder = name.rpartition("/")[0]
            if folder != last:
                self._note_folder(folder)
                last = folder
            if not folder:
                self.outside += 1
                self.strays += [name] if self.outside < 3 else []
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

    def note_hidden(self, entry: os.DirEntry) -> None:
        """Note a hidden image, or a hidden directory that has some."""
        if is_folder(entry):
            if has_files(entry.path, EXTENSIONS):
                self.unread.add("hidden and thumbnail folders", entry.path + "/")
        elif entry.name.lower().endswith(EXTENSIONS) and not entry.name.startswith("._"):  # metadata of macOS
            self.unread.add("hidden images", entry.path)

    def report(self) -> None:
        """Report what was not read."""
        if len(self.firsts) > 1 and "" not in self.firsts:
            for name in folders(self.root):
                where = os.path.join(self.root, name)
                if name not in self.firsts and not os.path.islink(where):
                    self.unread.add("folders without images", where + "/")
        add_lists(self.unread, self.root)
        report(self.root, self.unread)


def _index(root: str, one_side: bool = False, endings: tuple[str, ...] = EXTENSIONS) -> tuple[Names, _Notes]:
    """(the names of the images below `root` in order, facts collected on the way)."""
    notes = _Notes(root, one_side, endings)
    try:
        return Names(notes.each(_walk(root, None, notes))), notes
    except _LinkedDirectoryError:
        notes = _Notes(root, one_side, endings)
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
                if is_hidden(entry.name):
                    notes.note_hidden(entry)
                elif is_folder(entry):
                    run.append(entry.name + "/")
                elif images and entry.name.lower().endswith(notes.endings) and is_file(entry):
                    run.append(entry.name)
                    notes.has_links |= entry.is_symlink()
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    notes.unread.add("broken links", entry.path)
                else:
                    notes.unread.add_file(where, entry.name)
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


def _classes(notes: _Notes, count: int, others: list[str]) -> tuple[tuple[str, ...], str]:
    """(the names of the classes of these images and of the other splits, in order; why there are none, with a fix).

    A split without class folders has no labels. Neither has one whose images are all in one folder, such as
    val/images/ of Tiny ImageNet, unless that is a class of a split with several.
    """
    own = notes.firsts
    sides = [_first_folders(other, own, notes.endings) for other in others]
    known = set().union(*(side for side in (own, *sides) if len(side) > 1 and "" not in side))
    labeled = [side for side in (own, *sides) if side <= known]
    classes = order_classes(set().union(*labeled))
    files = (os.path.join(notes.root, name + ending) for name in own for ending in ("_stats.json", ".parquet"))
    are_shards = any(map(os.path.exists, files))
    if own in labeled and len(classes) > 1 and not are_shards:
        return classes, ""
    named = sorted(own - {""})
    if are_shards:
        why = f"{named[0]}/ is a shard of img2dataset: put each class into its own folder"
    elif not named:
        why = "no image is in a folder: put each class into its own folder"
    elif "" in own:
        shown = ", ".join(f"{name}/" for name in named[:3]) + (", ..." if len(named) > 3 else "")
        why = f"{notes.outside} images, like {notes.strays[0]}, are next to the folders {shown}, so that these are no "
        why += "classes: move them away, or into a folder"
    else:
        why = f"all images are in one folder, {named[0]}/: put each class into its own folder"
        if len(folders(os.path.join(notes.root, named[0]))) > 1:
            why += f", or set data.path={os.path.join(notes.root, named[0])} if its folders are the classes"
        if known:
            why = f"{named[0]}/ is no class of the other splits: put each class into its own folder"
    if lists := add_lists(Unread(), notes.root) or add_lists(Unread(), os.path.dirname(notes.root)) * bool(others):
        why += f", or use the labels in {lists[0]}, if they are there"
    is_minority = len(named) > 1 and 2 * notes.outside < count
    if known or is_minority:
        warn_once(f"{notes.root}: images without labels: {why}")
    return (), why


def _first_folders(root: str, known: set[str], endings: tuple[str, ...]) -> set[str]:
    """The folders in `root` with images, and "" if there are images in no folder."""
    index = lambda name: _index(os.path.join(root, name), endings=endings)[0]  # noqa: E731
    found = {name for name in folders(root) if name in known or len(index(name))}
    outside = any(entry.name.lower().endswith(endings) and is_file(entry) for entry in peek(root))
    return found | ({""} if outside else set())


def _held_out(names: Names, fraction: float | None) -> np.ndarray:
    """Whether each image is held out: if its hash is below the fraction, or among the smallest hashes.

    At least one of several images is held out; for the fraction None, at least `MIN_HELDOUT`, or a quarter.
    """
    least = 1 if len(names) > 1 and fraction != 0 else 0
    if fraction is None:
        fraction, least = HELDOUT_FRACTION, max(min(MIN_HELDOUT, len(names) // 4), least)
    held_out = np.zeros(len(names), bool)

    def hashes() -> Iterator[tuple[int, int]]:
        for i, name in enumerate(names):
            value = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
            held_out[i] = value < fraction * 2**64
            yield value, i

    for _, i in heapq.nsmallest(max(least, 1), hashes())[:least]:
        held_out[i] = True
    return held_out
