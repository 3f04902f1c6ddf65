"""Which files belong to a split, and which records are held out if there is no evaluation split.

This holds for shards and lists. A file belongs to a split if `data.path` contains {split}, if it is in a folder of that
name, or if its own name contains it as a word (`train-00000-of-00004.parquet`, `val_map.txt`). If no file belongs to an
evaluation split, every k-th record is held out, and training uses the others.

Case does not matter: Train/ is train/. Names that only look like both sides, such as train2017/ next to val2017/, are
refused: they are not splits, and as classes they would put evaluation images into training.
"""

import fractions
import functools
import glob
import itertools
import math
import os
import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

from simmim_jax.data.sources.files import unreadable_error
from simmim_jax.data.sources.listing import folders, is_file, nearest_path, peek
from simmim_jax.errors import ConfigError, DataError, suggest, warn_once

EVALUATION = ("val", "valid", "validation", "test")  # names of the evaluation split
STANDARD = ("train", *EVALUATION)
MAX_FILES = 1_000_000  # named by braces
MAX_CLASSES = 1_000_000
WILDCARDS = re.compile(r"[*?\[{]")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lz4")
MAX_SUBFOLDERS = 100  # subfolders searched for shards that are not read
SIDES = {
    side: re.compile(rf"(?:{words})[\W_]*(?:set|data|images?)?[\W_]*\d*")
    for side, words in {
        "train": "train|training",
        "evaluation": "val|valid|validation|test|testing|eval(?:uation)?",
    }.items()
}


class Selection(NamedTuple):
    """The files of one split, as names relative to `root`, in order."""

    path: str
    root: str
    files: list[str]
    others: list[str]  # files of the other standard splits, whose classes count too
    own: str  # the name under which the split was found, or ""
    held_out: bool | None  # the part of the records: held-out (True), the others (False), all (None)

    def absolute(self, *, others: bool = False) -> list[str]:
        return [os.path.join(self.root, name) for name in (self.others if others else self.files)]


def by_side(names: Iterable[str]) -> dict[str, str]:
    """The names by themselves, and by the standard split that they equal except for case."""
    found = {name: name for name in names}
    standard = {name.casefold(): name for name in reversed(found) if name.casefold() in STANDARD}
    return standard | found


def cases(side: str) -> tuple[str, ...]:
    """The spellings of a split's name in a path."""
    return (side, side.capitalize(), side.upper()) if side in STANDARD else (side,)


def side_of(name: str) -> str:
    """`train` or `evaluation` if a name looks like one of them, else ""."""
    return next((side for side, words in SIDES.items() if words.fullmatch(name.casefold())), "")


def both_sides(path: str, names: Iterable[str], slash: str = "") -> DataError | None:
    """The error for a path where some names look like training and others like evaluation; None if not so."""
    sides = {}
    for name in names:
        words = {name} if slash else _words(name)
        if len(found := {side_of(word) for word in words} - {""}) == 1:
            sides.setdefault(found.pop(), name)
    if len(sides) < 2:
        return None
    train, evaluation = (sides[side] + slash for side in SIDES)
    what = f"{path} has {train} and {evaluation}, which look like training and evaluation images"
    own = f"point data.path at {os.path.join(path, train)}" if slash else "give only the training files as data.path"
    return DataError(what, "data.path", f"{own}, or name them train{slash} and val{slash}")


def own_split(path: str, split: str, found: Collection[str], slash: str = "") -> tuple[str, list[str]]:
    """(the name under which a split exists, or ""; the existing evaluation splits).

    Raises:
      ConfigError: the split does not exist and is not a standard one.
      DataError: only evaluation images exist, but training is requested.
    """
    evaluation = [side for side in EVALUATION if side in found]
    if split in EVALUATION:
        return next((side for side in (split, *evaluation) if side in found), ""), evaluation
    own = split if split in found else ""
    if split != "train" and not own:
        hint = suggest(split, {"train", "val", *list(found)[:10]})
        raise ConfigError(f"{path} has no {split!r}", "data.split", hint)
    if not own and evaluation:
        fix = "name the training images train/, or point data.path one level down"
        if not slash:
            fix = "name the training files train, or give only them as data.path"
        raise DataError(f"{path} has {evaluation[0]}{slash} but no train{slash}", "data.path", fix)
    return own, evaluation


def select(path: str, split: str, extensions: tuple[str, ...], kind: str) -> Selection:
    """The files of a split. `path` is a file, a folder, wildcards, braces, or any of them with {split}."""
    if not path:
        raise ConfigError("data.path is empty", f"data.source={kind}", "set data.path to a file or a folder")
    path = os.path.abspath(os.path.expanduser(path))
    standard = tuple(dict.fromkeys((*STANDARD, split)))
    root, by_split, everything = _find_files(path, standard, extensions)
    by_split = {side: files for side, files in by_split.items() if files}
    own, evaluation = own_split(path, split, by_split)
    files = by_split.get(own) or by_split.get("train") or everything
    if not files:
        where = f"looked for {' '.join(f'*{extension}' for extension in extensions)}"
        where += f" with {', '.join(standard)} for {{split}}" if "{split}" in path else ""
        raise DataError(f"{path} has no files of data.source={kind}", where, "point data.path at them")
    mixed = files is everything and both_sides(root, (os.path.relpath(file, root) for file in files))
    if mixed:
        raise mixed
    if os.path.isdir(path):
        _warn_of_unread(path, files, by_split, extensions, kind)
    is_standard = split in STANDARD
    held_out = is_standard and (not evaluation if split == "train" else not own)
    others = [file for side in ("train", *evaluation) if is_standard and side != own for file in by_split.get(side, [])]
    both = set(by_split.get("train", [])) & {file for side in evaluation for file in by_split[side]}
    if both:
        what = f"{min(both)} belongs to train and to {evaluation[0]}"
        raise DataError(what, path, "change data.path or the name of the file")
    used = set(files)
    names, other_names = (
        [os.path.relpath(file, root) for file in group]
        for group in (files, [file for file in others if file not in used])
    )
    return Selection(path, root, names, other_names, own, split != "train" if held_out else None)


def _find_files(
    path: str, splits: tuple[str, ...], extensions: tuple[str, ...]
) -> tuple[str, dict[str, list[str]], list[str]]:
    """(the root folder, the files of each split, all files)."""
    if "{split}" in path:
        forms = {side: [path.replace("{split}", form) for form in cases(side)] for side in splits}
        found = {side: next(filter(None, (_expand(form, extensions) for form in forms[side])), []) for side in splits}
        return _fixed_folder(path.replace("{split}", "*")), found, []
    if os.path.isfile(path):
        return os.path.dirname(path), {}, [path]
    if os.path.isdir(path):
        everything = _files_in(path, extensions) or _files_in(os.path.join(path, "data"), extensions)
        named, sides = _by_words(everything, path, splits), by_side(folders(path))
        inside = {side: _files_in(os.path.join(path, sides.get(side, side)), extensions) for side in splits}
        return path, {side: inside[side] or named[side] for side in splits}, everything
    if WILDCARDS.search(path):
        root, everything = _fixed_folder(path), _expand(path, extensions)
        return root, _by_words(everything, root, splits), everything
    raise DataError(f"{path} does not exist", "data.path", nearest_path(path))


def make_part(source, selection: Selection, heldout_fraction: float):
    """The records of a selection: all, the held-out ones, or the others."""
    part = source
    if selection.held_out is not None and (heldout_fraction or selection.held_out):
        every = 0
        if heldout_fraction > 0.5:
            every = 1 / fractions.Fraction(heldout_fraction).limit_denominator(1_000_000)
        elif heldout_fraction:
            every = round(1 / heldout_fraction)
        part = Part(source, every, selection.held_out)
    if not len(part):
        what = f"{source.path} has 0 of its {len(source)} images in split {source.split!r}"
        raise DataError(what, f"data.heldout_fraction={heldout_fraction}", "change it, or add images")
    return part


class FileSource:
    """What the sources of files share. Each sets `path`, `split` and `classes`."""

    per_process = ("_open", "_numbers")  # attributes that each process makes itself

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in self.per_process}

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"


class Part(FileSource):
    """Every k-th record of a source, starting with the first, or all others. A single record is never held out.

    `every`, k, may be a fraction such as 5/3: the records are 0, k, 2 k, ..., rounded down. 0 holds nothing out.
    """

    def __init__(self, whole, every: int | fractions.Fraction, held_out: bool):
        self.whole, self.every, self.held_out = whole, every, held_out
        self.path, self.split, self.classes = whole.path, whole.split, whole.classes
        count = math.ceil(len(whole) / fractions.Fraction(every)) if every and len(whole) > 1 else 0
        self.count = count if held_out else len(whole) - count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        return self.whole[self._index(i)]

    def name(self, i: int) -> str:
        return self.whole.name(self._index(i))

    def _index(self, i: int) -> int:
        i = range(self.count)[i]  # raises IndexError
        period, held_out = self.every.numerator, self.every.denominator  # held_out records in each period of records
        if self.held_out:
            return i * period // held_out
        if self.count == len(self.whole):
            return i
        return -(-(i + 1) * period // (period - held_out)) - 1

    def fingerprint(self) -> dict:
        every = self.every if isinstance(self.every, int) else str(self.every)
        part = {"count": len(self), "every": every, "held_out": self.held_out}
        return self.whole.fingerprint() | part


def _files_in(folder: str, extensions: tuple[str, ...]) -> list[str]:
    """Paths of the files in a folder, sorted, without hidden ones; [] if the folder does not exist."""
    try:
        with os.scandir(folder) as listing:
            mine = (entry for entry in listing if entry.name.lower().endswith(extensions) and entry.name[0] != ".")
            return sorted(entry.path for entry in mine if is_file(entry))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise unreadable_error(folder, error) from error


def _warn_of_unread(path: str, files: list[str], by_split: dict, extensions: tuple[str, ...], kind: str) -> None:
    """Warn of files next to those that are read, which the user may have meant."""
    folder = os.path.dirname(files[0])
    packed = tuple(extension + packing for extension in extensions for packing in COMPRESSIONS)
    packed += (".tgz",) if ".tar" in extensions else ()
    compressed = sorted(entry.name for entry in peek(folder) if entry.name.lower().endswith(packed))
    if compressed:
        what = f"{folder}: {len(compressed)} compressed files are not read, the first is {compressed[0]}"
        warn_once(f"{what}: decompress them, or move them away")
    if kind == "list":  # the folder of a list usually has folders of images and other files
        return
    sides = by_side(folders(path))
    empty = [sides[side] for side in EVALUATION if side in sides]
    if empty and not any(side in by_split for side in EVALUATION):
        what = f"{os.path.join(path, empty[0])} has no files of data.source={kind}"
        warn_once(f"{what}: evaluation images are held out of the training files")
    if folder == path:
        shards = tuple(extension for extension in extensions if extension.startswith("."))
        own = {sides.get(side) for side in (*STANDARD, *by_split)}
        others = [name for name in folders(path) if name not in own][:MAX_SUBFOLDERS]
        inside = {name: peek(os.path.join(path, name)) for name in others}
        below = [name for name in others if any(entry.name.lower().endswith(shards) for entry in inside[name])]
        if below:
            what = f"{path}: files in {len(below)} subfolders are not read, the first is {below[0]}/"
            warn_once(f"{what}: to read all, set data.path={path}/**/*{shards[0]}")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _by_words(files: list[str], root: str, splits: tuple[str, ...]) -> dict[str, list[str]]:
    """The files of each split: those with its name as a word in their own name, or in that of a folder below `root`."""
    named = {side: [] for side in splits}
    for file in files:
        words = _words(os.path.relpath(file, root))
        evaluation = words & set(EVALUATION)
        if "train" in words and evaluation:
            what = f"the name of {file} says train and {min(evaluation)}"
            raise DataError(what, "data.path", "rename it, or give the files as a path with {split} in it")
        for side in splits:
            if side.lower() in words:
                named[side].append(file)
    return named


def _expand(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """The files of a path with wildcards and braces, in order; [] if there are none.

    Raises DataError if braces name some files that exist and some that do not.
    """
    if os.path.isdir(pattern):
        return _files_in(pattern, extensions)
    if os.path.isfile(pattern):
        return [pattern]
    found, missing = [], []
    folder, rest = existing_part(pattern)
    for path in _expand_braces(rest):
        if glob.has_magic(path):
            some = glob.glob(os.path.join(glob.escape(folder), path), recursive=True)
            found += sorted(name for name in some if os.path.isfile(name) and name.lower().endswith(extensions))
        else:
            path = os.path.join(folder, path)
            (found if os.path.isfile(path) else missing).append(path)
    if found and missing:
        fix = "download them, or change the braces in data.path"
        raise DataError(f"{len(missing)} files are missing, the first is {missing[0]}", pattern, fix)
    return list(dict.fromkeys(found))


def _expand_braces(pattern: str) -> list[str]:
    """The paths of a pattern with {000..146} and {a,b}, as in bash."""
    pieces, count = [], 1
    for i, piece in enumerate(re.split(r"\{([^{}]*)\}", pattern)):
        bounds = re.fullmatch(r"(\d{1,18})\.\.(\d{1,18})", piece)
        if i % 2 == 0:
            choices = [piece]
        elif bounds:
            first, last = int(bounds[1]), int(bounds[2])
            width = len(bounds[1]) if bounds[1][0] == "0" or len(bounds[1]) == len(bounds[2]) else 0
            step = 1 if last >= first else -1
            choices = range(first, last + step, step)
            _check_count(count * len(choices), pattern)  # before the range becomes a list
            choices = [f"{number:0{width}}" for number in choices]
        elif "," in piece:
            choices = piece.split(",")
        else:
            choices = ["{" + piece + "}"]
        count *= len(choices)
        _check_count(count, pattern)
        pieces.append(choices)
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _check_count(count: int, pattern: str) -> None:
    if count > MAX_FILES:
        raise ConfigError(f"{pattern} names {count} files", "data.path", f"give at most {MAX_FILES}")


def _fixed_folder(pattern: str) -> str:
    """The deepest folder that contains all files of a pattern."""
    folder, rest = existing_part(pattern)
    wild = WILDCARDS.search(rest)
    return os.path.dirname(os.path.join(folder, rest[: wild.start()] if wild else rest))


def existing_part(pattern: str) -> tuple[str, str]:
    """(the part of a pattern that exists literally as a folder, even with brackets in its name; the rest)."""
    folder, parts = os.sep, [part for part in pattern.split(os.sep) if part]
    while parts and os.path.isdir(os.path.join(folder, parts[0])):
        folder = os.path.join(folder, parts.pop(0))
    return folder, os.sep.join(parts)
