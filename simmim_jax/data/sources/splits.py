"""Which files belong to a split, and which records are held out if there is no evaluation split.

This holds for shards and lists. A file belongs to a split if `data.path` contains {split}, if it is in a folder of that
name, or if its own name contains it as a word (`train-00000-of-00004.parquet`, `val_map.txt`). If no file belongs to an
evaluation split, every k-th record is held out, and training uses the others.

Case does not matter: Train/ is train/. Names that only look like both sides, such as train2017/ next to val2017/, are
refused: they are not splits, and as classes they would put evaluation images into training.
"""

import glob
import itertools
import os
import re
from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.data.prepared import MANIFEST
from simmim_jax.data.sources.files import unreadable_error
from simmim_jax.data.sources.listing import folders, has_files, is_file, nearest_path, peek
from simmim_jax.data.sources.unread import Unread, report
from simmim_jax.errors import ConfigError, DataError, suggest

EVALUATION = ("val", "valid", "validation", "test")  # names of the evaluation split
STANDARD = ("train", *EVALUATION)
HELDOUT_FRACTION, MIN_HELDOUT = 0.02, 8  # of images that is held out by default; fewest, of 32 images or more
MAX_FILES = 1_000_000  # named by braces
MAX_CLASSES = 1_000_000
WILDCARDS = re.compile(r"[*?\[{]")
# Words of folders and files that are no classes, next to a split.
NOT_CLASSES = {
    "unlabeled", "unlabelled", "unsupervised", "extra", "additional", "other", "others", "raw", "original", "originals",
    "image", "images", "img", "imgs", "photo", "photos", "picture", "pictures", "mask", "masks", "label", "labels",
    "annotation", "annotations", "segmentation", "segmentations", "dev", "holdout", "submission", "results", "output",
    "outputs", "sample", "samples", "noisy", "pseudo", "private", "public", "backup", "old", "new", "tmp", "temp",
    "cache", "figures", "docs", "doc", "readme", "info", "meta", "metadata", "map", "classes", "names", "words",
}  # fmt: skip
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


def class_like(names: Iterable[str], split: str) -> list[str]:
    """The names next to that of a split which may be classes, such as `bus` next to `train`, but not `unlabeled`."""
    known = set(re.split(r"[\W_]+", split.casefold()))

    def is_class(name: str) -> bool:
        words = set(re.split(r"[\W_]+", name.casefold())) - known - {"", "of"}
        stems = {word.rstrip("0123456789") or word for word in words}
        return bool(words) and not any(stem in NOT_CLASSES or side_of(stem) for stem in stems)

    return [name for name in names if is_class(name)]


def split_or_class(path: str, split: str, others: list[str], if_class: str, if_split: str) -> DataError:
    """The error for a split whose neighbors look like classes, so that it may be a class itself."""
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    what = f"{split} may be a class, like {shown} next to it, or a split, of which they are no part"
    return DataError(what, path, f"for a class, {if_class}; for a split, {if_split}")


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
            fix += f"; rename {evaluation[0]} if it is a class"
        raise DataError(f"{path} has {evaluation[0]}{slash} but no train{slash}", "data.path", fix)
    return own, evaluation


def select(
    path: str, split: str, extensions: tuple[str, ...], kind: str, is_data: Callable[[str], bool] = os.path.isfile
) -> Selection:
    """The files of a split. `path` is a file, a folder, wildcards, braces, or any of them with {split}.

    is_data: whether a file may have images, and is reported if it is not read.
    """
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
    is_standard = split in STANDARD
    if is_standard and "{split}" not in path and not os.path.isfile(path):
        _report_unread(path, files, by_split, list(filter(is_data, everything)), kind)
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


def _report_unread(
    path: str, files: list[str], by_split: dict[str, list[str]], everything: list[str], kind: str
) -> None:
    """Report what is next to files of splits, which the user may have meant.

    Raises DataError if there is only one split, which may be a class like the others.
    """
    folder, extension = os.path.dirname(files[0]), os.path.splitext(files[0])[1]
    is_manifest = os.path.basename(files[0]) == MANIFEST
    wanted = (MANIFEST,) if is_manifest else (extension,)
    splits = {file for side, chosen in by_split.items() if side in STANDARD for file in chosen} | set(files)
    unused, unread = [file for file in everything if file not in splits], Unread()
    for file in unused:
        unread.add(f"{extension} files", file)
    report_as, inside = os.path.dirname(path.split("*")[0]), []
    if os.path.isdir(path):
        report_as, sides = path, by_side(folders(path))
        used = {os.path.relpath(os.path.dirname(file), path).split(os.sep)[0] for file in splits}
        inside = [name for name in folders(path) if name not in used] if kind != "list" else []
        inside = [name for name in inside if has_files(os.path.join(path, name), wanted)]
        fix = f"to read all, set data.path={path}/**/*{extension}" if folder == path else ""
        for name in inside:
            unread.add("folders", os.path.join(path, name, ""), fix)
        empty = [
            sides[side] for side in EVALUATION if side in sides and side not in by_split and sides[side] not in inside
        ]
        for name in empty if not any(side in by_split for side in EVALUATION) and kind != "list" else ():
            what = f"folders without {extension} files"
            unread.add(what, os.path.join(path, name, ""), "evaluation images are held out of the training files")
        stems = {os.path.splitext(os.path.basename(file))[0] for file in files}
        for entry in peek(folder) if kind != "list" else ():
            stem, ending = os.path.splitext(entry.name)
            if ending.lower() in EXTENSIONS and is_file(entry):
                unread.add("images next to them", entry.path)
            elif entry.path not in everything and stem not in stems and ending.lower() != extension.lower():
                unread.add_file(folder, entry.name)
    report(report_as, unread)
    present = [side for side in STANDARD if by_split.get(side)]
    if len(present) == 1 and not is_manifest:  # which `prepare` writes only for splits
        split, neighbors = os.path.basename(by_split[present[0]][0]), list(map(os.path.basename, unused))
        if os.path.dirname(by_split[present[0]][0]) != path and inside:
            split, neighbors = os.path.basename(os.path.dirname(by_split[present[0]][0])), inside
        if classes := class_like(neighbors, split):
            rename = "rename it so that no word in its name is that of a split"
            raise split_or_class(path, split, classes, rename, "move the others away")


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
