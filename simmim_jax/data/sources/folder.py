"""Any folder of image files, flat or by class, nested or not."""

import dataclasses
import difflib
import functools
import hashlib
import heapq
import json
import os
import tempfile
from collections.abc import Iterable, Iterator

import numpy as np

from simmim_jax.data.sources.listing import folders, is_file, is_folder, nearest_folder
from simmim_jax.data.sources.names import Names
from simmim_jax.data.sources.splits import EVALUATION, both_sides, by_side, cases, own_split, side_of
from simmim_jax.errors import ConfigError, DataError, warn_once

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")
PART = 200_000  # entries of one directory that are sorted in memory; more are sorted in parts, on disk
SAMPLE = 1000  # files whose sizes the fingerprint looks at


def make_folder(*, path: str, split: str, heldout_fraction: float, **_) -> "Folder":
    """The images below `path` that belong to `split`, in the order of their names.

    `path/<split>` is taken where it exists, an evaluation split by any of its names. Otherwise the images to evaluate
    on are a fixed part (of `path/train`, if there is one), drawn by a hash of the name: no file changes sides when
    others come or go (but in a folder so small that the part would be no image, where it is one). The class is the
    first directory below that root; a folder with images outside of such directories, or with only one, is unlabeled.
    Links are followed, no directory is visited twice, and hidden names are skipped. `path` may have {split} in it.

    Raises:
      DataError: where there are no images, or folders that look like splits and would be taken for classes.
    """
    if not path:
        raise ConfigError("data.path is empty", "data.source=folder", "set data.path to a folder of images")
    path = os.path.abspath(os.path.expanduser(path))
    there = split_folders(path, split)
    if not there and not os.path.isdir(path):
        raise DataError(f"{path} is not a folder", "data.path", nearest_folder(path.replace("{split}", "train")))
    own, evaluation = own_split(path, split, there, slash="/")
    root = there.get(own) or there.get("train") or path
    standard = split in ("train", *EVALUATION)
    mixed = standard and root == path and both_sides(path, there, slash="/")
    if mixed:
        raise mixed
    names, noted = _index(root, one_side=standard)
    if noted.dead:
        warn_once(f"{root}: {noted.dead} links lead nowhere and are left out, the first being {noted.first_dead}")
    if not len(names):
        raise DataError(f"{root} has 0 images", f"looked for {' '.join(EXTENSIONS)}", _nearest_images(root))
    standard = standard and "train" in there
    others = [there[side] for side in ("train", *evaluation) if standard and side != own]
    classes = _classes(noted.firsts, others)
    if (split in EVALUATION and not own) or (split == "train" and not evaluation):
        keep = _held_out(names, heldout_fraction) == (split != "train")
        if not keep.any():
            what = f"{root} has 0 of its {len(names)} images in split {split!r}"
            raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
        names = names if keep.all() else names.take(keep)
    return Folder(root, split, names, classes)


def split_folders(path: str, split: str = "train") -> dict[str, str]:
    """The folders in `path`, or that {split} in it stands for, by the names of the splits that they may be."""
    if "{split}" not in path or os.path.isdir(path):
        return {name: os.path.join(path, folder) for name, folder in by_side(folders(path)).items()}
    there = {}
    for side in dict.fromkeys(("train", *EVALUATION, split)):
        forms = [path.replace("{split}", form) for form in cases(side)]
        folder = next(filter(os.path.isdir, forms), "")
        if folder:
            there[side] = folder
    return there


class Folder:
    """Image files below `root`, by name."""

    def __init__(self, root: str, split: str, names: Names, classes: tuple[str, ...]):
        self.root, self.split, self.names, self.classes = root, split, names, classes

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "_numbers"}

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict:
        name = self.name(i)
        label = self._numbers[name.split("/", 1)[0]] if self.classes else -1
        with open(os.path.join(self.root, name), "rb") as file:
            return {"image": file.read(), "label": label, "name": name}

    def name(self, i: int) -> str:
        return self.names[i]

    def describe(self) -> str:
        return f"{self.root}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        sizes = hashlib.sha256(json.dumps(self._sizes()).encode()).hexdigest()
        part = {"count": len(self), "names_sha256": self.names.digest(), "sizes_sha256": sizes}
        return {"source": "folder", "split": self.split} | part

    def _sizes(self) -> list[int]:
        """The sizes of some files, in bytes: a thousand questions are cheap on a network disk too, and all are not."""
        sizes = []
        for place in range(min(len(self), SAMPLE)):
            try:
                name = self.name(place * len(self) // min(len(self), SAMPLE))
                sizes.append(os.stat(os.path.join(self.root, name)).st_size)
            except OSError:
                sizes.append(-1)  # gone since, which is told when it is read
        return sizes


class _LinkedDirectoryError(Exception):
    """There are links to directories, and which of them lead to new ones takes all directories to be known."""


@dataclasses.dataclass
class _Noted:
    """What is seen on the way through the images below `root`."""

    root: str
    one_side: bool = False  # directories that look like splits are refused
    firsts: set[str] = dataclasses.field(default_factory=set)  # of their directories; "" of images in none
    sides: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # by directory, what looks like a split in it
    dead: int = 0  # links that lead nowhere
    first_dead: str = ""

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
                    fix = f"point data.path at {where}, or bring all to train/ and val/ in {self.root}"
                    exact = {"train", *EVALUATION}.issuperset(each.casefold() for each in self.sides[above])
                    raise DataError(mixed.what, mixed.where, fix if exact else mixed.fix)

    def note_dead(self, link: str) -> None:
        self.dead, self.first_dead = self.dead + 1, self.first_dead or link


def _index(root: str, one_side: bool = False) -> tuple[Names, _Noted]:
    """(the names of the images below `root`, in order; what was seen on the way)."""
    noted = _Noted(root, one_side)
    try:
        return Names(noted.each(_walk(root, None, noted))), noted
    except _LinkedDirectoryError:
        noted = _Noted(root, one_side)
        return Names(noted.each(_walk(root, _passed_over(root), noted))), noted


def _walk(root: str, passed_over: set[str] | None, noted: _Noted) -> Iterator[str]:
    """Names of the images below `root`, relative to it, in order, not in directories that are `passed_over`.

    Raises:
      _LinkedDirectoryError: where `passed_over` is None, and there is a link to a directory.
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
        if passed_over is None:
            if entry and os.path.islink(where):
                raise _LinkedDirectoryError
            if _is_seen(where, seen):
                continue
        elif name in passed_over:
            continue
        stack.append((name, _entries(where, noted)))


def _passed_over(root: str) -> set[str]:
    """The directories, with a "/" after each, that are not visited, so that none is visited twice."""
    seen, waiting, links, over = set(), [""], [], set()
    while waiting or links:
        # links last and by name, so that of two ways to a directory the same one is taken on every disk
        name = waiting.pop() if waiting else heapq.heappop(links) + "/"
        where = os.path.join(root, name.rstrip("/"))
        if _is_seen(where, seen):
            over.add(name)
            continue
        for entry in _entries(where, _Noted(root), images=False):
            if os.path.islink(os.path.join(where, entry.rstrip("/"))):
                heapq.heappush(links, (name + entry).rstrip("/"))
            else:
                waiting.append(name + entry)
    return over


def _is_seen(where: str, seen: set[tuple[int, int]]) -> bool:
    try:
        status = os.stat(where)
    except OSError as error:
        raise _unreadable(where, error) from error
    identity = status.st_dev, status.st_ino
    if identity in seen:
        return True
    seen.add(identity)
    return False


def _unreadable(where: str, error: OSError) -> DataError:
    reason = error.strerror or type(error).__name__
    return DataError(f"{where} cannot be read", reason, "mend it, or move it out of data.path")


def _entries(where: str, noted: _Noted, images: bool = True) -> Iterator[str]:
    """The directories, with a "/" after each, and images of one directory, in the order that their names give."""
    part, parts = [], []
    try:
        with os.scandir(where) as listing:
            for entry in listing:
                if entry.name.startswith("."):
                    continue
                if is_folder(entry):
                    part.append(entry.name + "/")
                elif images and entry.name.lower().endswith(EXTENSIONS) and is_file(entry):
                    part.append(entry.name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    noted.note_dead(entry.path)
                if len(part) == PART:
                    parts.append(_put_aside(sorted(part)))
                    part = []
    except OSError as error:
        raise _unreadable(where, error) from error
    return heapq.merge(*parts, sorted(part)) if parts else iter(sorted(part))


def _put_aside(names: list[str]) -> Iterator[str]:
    """The same names, from a file."""
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
    """Class names, of the images in these directories and of those below the `others`."""
    found = set(firsts)
    for other in others:
        found |= {folder for folder in folders(other) if folder in found or _has_images(os.path.join(other, folder))}
    return tuple(sorted(found)) if "" not in found and len(found) >= 2 else ()


def _held_out(names: Names, fraction: float) -> np.ndarray:
    """Whether each image is held out: those with hashes below the fraction, and of several images at least one."""
    bound, least, held_out = fraction * 2**64, (2**64, 0), np.zeros(len(names), bool)
    for i, name in enumerate(names):
        value = int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big")
        held_out[i] = value < bound
        least = min(least, (value, i))
    if fraction > 0 and len(names) > 1:
        held_out[least[1]] = True
    return held_out


def _has_images(folder: str) -> bool:
    try:
        return next(_walk(folder, None, _Noted(folder)), None) is not None
    except _LinkedDirectoryError:
        return next(_walk(folder, _passed_over(folder), _Noted(folder)), None) is not None


def _nearest_images(path: str) -> str:
    """What to do about a folder without images: the one beside it, of the likeliest name, that has some."""
    parent, own = os.path.split(path)
    if os.path.dirname(parent) == parent:  # beside /data lie /proc and /sys
        return "point data.path at a folder of images"
    beside = sorted(folders(parent), key=lambda name: -difflib.SequenceMatcher(None, name, own).ratio())
    for folder in (os.path.join(parent, name) for name in beside[:20] if name != own):
        # a glance before a walk: beside it may lie a home directory's worth of other things
        glance = [folder, *(os.path.join(folder, name) for name in folders(folder)[:3])]
        if any(name.lower().endswith(EXTENSIONS) for place in glance for name in os.listdir(place)):
            return f"did you mean {folder} ({len(_index(folder)[0])} images)?"
    return "point data.path at a folder of images"
