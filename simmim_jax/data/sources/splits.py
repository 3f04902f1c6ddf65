"""Which files belong to a split, and which records are held out where no split for evaluation is.

For images in shards or lists, files belong to a split because `data.path` says {split}, because they lie in a folder of
that name, or because their name has it as a word (`train-00000-of-00004.parquet`, `val_map.txt`). Where no file belongs
to a split for evaluation, that is every k-th record, and training is the rest.

Train/ is as good as train/. Names that only look like both sides, as train2017/ beside val2017/, are no splits, and
must not be taken for classes either, for then images to evaluate on would be trained on: they are refused.
"""

import dataclasses
import fractions
import glob
import itertools
import math
import os
import re
from collections.abc import Callable, Collection, Iterable

from simmim_jax.data.sources.listing import folders, glance, is_file, nearest_path
from simmim_jax.errors import ConfigError, DataError, suggest, warn_once

EVALUATION = ("val", "valid", "validation", "test")  # one thing, by four names
MAX_FILES = 1_000_000  # that braces may name
WILDCARDS = re.compile(r"[*?\[{]")
COMPRESSIONS = (".gz", ".zst", ".bz2", ".xz", ".lz4")
LOOKED_INTO = 100  # sub-folders of a folder of shards, for shards that are left out
SIDES = {
    side: re.compile(rf"(?:{words})[\W_]*(?:set|data|images?)?[\W_]*\d*")
    for side, words in {
        "train": "train|training",
        "evaluation": "val|valid|validation|test|testing|eval(?:uation)?",
    }.items()
}


@dataclasses.dataclass(frozen=True)
class Selection:
    """The files of one split, as names relative to `root`, in order; and those of the `others`, for their classes."""

    path: str
    root: str
    files: list[str]
    others: list[str]
    own: str  # the name by which the split was found, or ""
    held_out: bool | None  # of these files, the held-out records are meant, or the rest; None: all

    def absolute(self, *, others: bool = False) -> list[str]:
        return [os.path.join(self.root, name) for name in (self.others if others else self.files)]


def by_side(names: Iterable[str]) -> dict[str, str]:
    """These names by themselves, and the standard splits by those that differ from them in case alone."""
    found = {name: name for name in names}
    standard = {name.casefold(): name for name in reversed(found) if name.casefold() in ("train", *EVALUATION)}
    return standard | found


def cases(side: str) -> tuple[str, ...]:
    """How the name of a split may be written in a path."""
    return (side, side.capitalize(), side.upper()) if side in ("train", *EVALUATION) else (side,)


def side_of(name: str) -> str:
    """`train` or `evaluation`, where a name looks like one of them; "" where it does not."""
    return next((side for side, words in SIDES.items() if words.fullmatch(name.casefold())), "")


def both_sides(path: str, names: Iterable[str], slash: str = "") -> DataError | None:
    """What is said of a path where some of these names look like training, and others like evaluation."""
    sides = {}
    for name in names:
        words = {name} if slash else _words(name)
        if len(found := {side_of(word) for word in words} - {""}) == 1:
            sides.setdefault(found.pop(), name)
    if len(sides) < 2:
        return None
    train, evaluation = (sides[side] + slash for side in SIDES)
    what = f"{path} has {train} and {evaluation}, which look like images to train on and to evaluate on"
    fix = f"name them train{slash} and val{slash}"
    alone = f"point data.path at {os.path.join(path, train)}" if slash else "give those to train on alone as data.path"
    return DataError(what, "data.path", f"{alone}, or {fix}")


def own_split(path: str, split: str, there: Collection[str], slash: str = "") -> tuple[str, list[str]]:
    """(the name by which this split is there, or "", and the splits for evaluation that are).

    Raises:
      ConfigError: for a split that is not there and cannot be made.
      DataError: where there would be images to evaluate on alone, and training is asked for.
    """
    evaluation = [side for side in EVALUATION if side in there]
    if split in EVALUATION:
        return next((side for side in (split, *evaluation) if side in there), ""), evaluation
    own = split if split in there else ""
    if split != "train" and not own:
        hint = suggest(split, {"train", "val", *list(there)[:10]})
        raise ConfigError(f"{path} has no {split!r}", "data.split", hint)
    if not own and evaluation:
        fix = "name the images to train on train/, or point data.path one level down"
        if not slash:
            fix = "name the files to train on train, or give them alone as data.path"
        raise DataError(f"{path} has {evaluation[0]}{slash} but no train{slash}", "data.path", fix)
    return own, evaluation


def select(path: str, split: str, extensions: tuple[str, ...], kind: str) -> Selection:
    """The files that `path` and `split` mean: a file, a folder, wildcards, braces, or any of them with {split}."""
    if not path:
        raise ConfigError("data.path is empty", f"data.source={kind}", "set data.path to a file or a folder")
    path = os.path.abspath(os.path.expanduser(path))
    standard = tuple(dict.fromkeys(("train", *EVALUATION, split)))
    if "{split}" in path:
        root = _fixed_folder(path.replace("{split}", "*"))
        forms = {side: [path.replace("{split}", form) for form in cases(side)] for side in standard}
        there = {side: next(filter(None, (_expand(form, extensions) for form in forms[side])), []) for side in forms}
        everything = []
    elif os.path.isfile(path):
        root, there, everything = os.path.dirname(path), {}, [path]
    elif os.path.isdir(path):
        root, everything = path, _files_in(path, extensions) or _files_in(os.path.join(path, "data"), extensions)
        named = _by_words(everything, path, standard)
        sides = by_side(folders(path))
        there = {
            side: _files_in(os.path.join(path, sides.get(side, side)), extensions) or named[side] for side in standard
        }
    elif WILDCARDS.search(path):
        root, everything = _fixed_folder(path), _expand(path, extensions)
        there = _by_words(everything, root, standard)
    else:
        raise DataError(f"{path} does not exist", "data.path", nearest_path(path))
    there = {side: files for side, files in there.items() if files}
    own, evaluation = own_split(path, split, there)
    files = there.get(own) or there.get("train") or everything
    if not files:
        what = f"looked for {' '.join(f'*{extension}' for extension in extensions)}"
        sides = ", ".join(standard) if "{split}" in path else ""
        what = f"{what} with {sides} for {{split}}" if sides else what
        raise DataError(f"{path} has no files of data.source={kind}", what, "point data.path at them")
    mixed = files is everything and both_sides(root, (os.path.relpath(file, root) for file in files))
    if mixed:
        raise mixed
    if os.path.isdir(path):
        _tell_of_others(path, files, there, extensions, kind)
    held_out = (split in EVALUATION and not own) or (split == "train" and not evaluation)
    mine = split in ("train", *EVALUATION)
    others = [file for side in ("train", *evaluation) if mine and side != own for file in there.get(side, [])]
    both = set(there.get("train", [])) & {file for side in evaluation for file in there[side]}
    if both:
        raise DataError(f"{min(both)} is of train and of {evaluation[0]}", path, "change data.path or the file's name")
    relative, taken = [os.path.relpath(file, root) for file in files], set(files)
    others = [os.path.relpath(file, root) for file in others if file not in taken]
    return Selection(path, root, relative, others, own, split != "train" if held_out else None)


def part_of(source, selection: Selection, heldout_fraction: float):
    """The records of a source that are meant: all, or those that are held out, or the rest."""
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


class Part:
    """Every k-th record of a source (the first, the k-th after it, ...; of a single one none), or all the others.

    `every`, k, may be a fraction, as 5/3: the records are those at 0, k, 2 k, ..., rounded down. 0 stands for none.
    """

    def __init__(self, whole, every: int | fractions.Fraction, held_out: bool):
        self.whole, self.every, self.held_out = whole, every, held_out
        self.path, self.split, self.classes = whole.path, whole.split, whole.classes
        count = math.ceil(len(whole) / fractions.Fraction(every)) if every and len(whole) > 1 else 0
        self.count = count if held_out else len(whole) - count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        return self.whole[self._place(i)]

    def name(self, i: int) -> str:
        return self.whole.name(self._place(i))

    def _place(self, i: int) -> int:
        i = range(self.count)[i]  # an IndexError where there is no such record
        period, held_out = self.every.numerator, self.every.denominator  # in records
        if self.held_out:
            return i * period // held_out
        if self.count == len(self.whole):
            return i
        return -(-(i + 1) * period // (period - held_out)) - 1

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        every = self.every if isinstance(self.every, int) else str(self.every)
        part = {"count": len(self), "every": every, "held_out": self.held_out}
        return self.whole.fingerprint() | part


def natural_classes(largest: int) -> tuple[str, ...]:
    """The names of the classes of integer labels up to `largest`."""
    return tuple(str(label) for label in range(largest + 1))


def require_labels_of_all(labeled: int, count: int, path: str, first_without: Callable[[], str]) -> None:
    """Raise DataError where some records have a label and others do not."""
    if 0 < labeled < count:
        what = f"{labeled} of {count} images have a label, and {first_without()} has none"
        raise DataError(what, path, "label all of them, or none")


def _files_in(folder: str, extensions: tuple[str, ...]) -> list[str]:
    try:
        with os.scandir(folder) as listing:
            mine = (entry for entry in listing if entry.name.lower().endswith(extensions) and entry.name[0] != ".")
            return sorted(entry.path for entry in mine if is_file(entry))
    except FileNotFoundError:
        return []
    except NotADirectoryError:
        return []
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DataError(f"{folder} cannot be read", reason, "mend it, or move it out of data.path") from error


def _tell_of_others(
    path: str, files: list[str], there: dict[str, list[str]], extensions: tuple[str, ...], kind: str
) -> None:
    """Warns of what lies beside the files of a folder, and may have been meant to be read."""
    folder = os.path.dirname(files[0])
    packed = tuple(extension + packing for extension in extensions for packing in COMPRESSIONS)
    packed += (".tgz",) if ".tar" in extensions else ()
    compressed = sorted(entry.name for entry in glance(folder) if entry.name.lower().endswith(packed))
    if compressed:
        what = f"{folder}: {len(compressed)} compressed files beside those that are read are left out"
        warn_once(f"{what}, the first being {compressed[0]}: decompress them, or move them away")
    if kind == "list":  # beside lists lie folders of images, and of what else belongs to them
        return
    sides = by_side(folders(path))
    empty = [sides[side] for side in EVALUATION if side in sides]
    if empty and not any(side in there for side in EVALUATION):
        what = f"{os.path.join(path, empty[0])} has no files of data.source={kind}"
        warn_once(f"{what}: what is evaluated on is held out of the files to train on")
    if folder == path:
        shards = tuple(extension for extension in extensions if extension.startswith("."))
        own = {sides.get(side) for side in ("train", *EVALUATION, *there)}
        others = [name for name in folders(path) if name not in own][:LOOKED_INTO]
        inside = {name: glance(os.path.join(path, name)) for name in others}
        below = [name for name in others if any(entry.name.lower().endswith(shards) for entry in inside[name])]
        if below:
            what = f"{path}: files in {len(below)} sub-folders are left out, the first being {below[0]}/"
            warn_once(f"{what}: to take all, set data.path={path}/**/*{shards[0]}")


def _words(name: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _by_words(files: list[str], root: str, sides: tuple[str, ...]) -> dict[str, list[str]]:
    """The files of each side: those that have it as a word in their name, or in that of a folder below `root`."""
    named = {side: [] for side in sides}
    for file in files:
        words = _words(os.path.relpath(file, root))
        evaluation = words & set(EVALUATION)
        if "train" in words and evaluation:
            what = f"{file} is named as of train and as of {min(evaluation)}"
            raise DataError(what, "data.path", "rename it, or give the files as a path with {split} in it")
        for side in sides:
            if side.lower() in words:
                named[side].append(file)
    return named


def _expand(pattern: str, extensions: tuple[str, ...]) -> list[str]:
    """The files that a path with wildcards and braces means, in order; [] where there are none.

    Raises:
      DataError: where braces name some files that are there, and some that are not.
    """
    if os.path.isdir(pattern):
        return _files_in(pattern, extensions)
    if os.path.isfile(pattern):
        return [pattern]
    found, missing = [], []
    folder, rest = existing_part(pattern)
    for path in _without_braces(rest):
        if glob.has_magic(path):
            some = glob.glob(os.path.join(glob.escape(folder), path), recursive=True)
            found += sorted(name for name in some if os.path.isfile(name) and name.lower().endswith(extensions))
        else:
            path = os.path.join(folder, path)
            (found if os.path.isfile(path) else missing).append(path)
    if found and missing:
        fix = "fetch them, or change the braces in data.path"
        raise DataError(f"{len(missing)} files are missing, the first being {missing[0]}", pattern, fix)
    return list(dict.fromkeys(found))


def _without_braces(pattern: str) -> list[str]:
    """The paths that {000..146} and {a,b} stand for, as in bash."""
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
            count *= len(choices)
            _check_count(count, pattern)
            choices = [f"{number:0{width}}" for number in choices]
        elif "," in piece:
            choices = piece.split(",")
            count *= len(choices)
        else:
            choices = ["{" + piece + "}"]
        _check_count(count, pattern)
        pieces.append(choices)
    return ["".join(parts) for parts in itertools.product(*pieces)]


def _check_count(count: int, pattern: str) -> None:
    if count > MAX_FILES:
        raise ConfigError(f"{pattern} names {count} files", "data.path", f"give at most {MAX_FILES}")


def _fixed_folder(pattern: str) -> str:
    """The folder that all files of a pattern lie below."""
    folder, rest = existing_part(pattern)
    wild = WILDCARDS.search(rest)
    return os.path.dirname(os.path.join(folder, rest[: wild.start()] if wild else rest))


def existing_part(pattern: str) -> tuple[str, str]:
    """(the folder of a pattern that is there by that very name, though it may have brackets in it; the rest)."""
    folder, parts = os.sep, [part for part in pattern.split(os.sep) if part]
    while parts and os.path.isdir(os.path.join(folder, parts[0])):
        folder = os.path.join(folder, parts.pop(0))
    return folder, os.sep.join(parts)
