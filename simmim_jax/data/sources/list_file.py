"""Images listed in a text file, `path[ label]` on each line, like SimMIM's and Swin's train_map.txt and val_map.txt.

The file is read once, in blocks, and the offset of every 64th record is stored: ten million lines take a megabyte, and
their labels 40 on disk. A table (`table`) is first turned into such lines.
"""

import bisect
import functools
import hashlib
import io
import itertools
import os
import re
import stat
from collections.abc import Iterator

import numpy as np

from simmim_jax.data.decode import EXTENSIONS, BadImage
from simmim_jax.data.rasters import ARRAY_EXTENSIONS
from simmim_jax.data.sources.classes import order_classes
from simmim_jax.data.sources.files import File, changed_error, make_opener, stat_file
from simmim_jax.data.sources.listing import folders
from simmim_jax.data.sources.names import Column, digest_of
from simmim_jax.data.sources.parts import FileSource, make_part
from simmim_jax.data.sources.splits import EVALUATION, MAX_CLASSES, STANDARD, Selection, select, side_of
from simmim_jax.data.sources.table import find_columns, first_line, read_table
from simmim_jax.errors import DataError, warn_once

LISTS = (".txt", ".lst", ".list", ".csv", ".tsv")
STRIDE = 64  # records between two stored offsets
BLOCK = 2**22  # bytes read at a time
MAX_COMPARED = 200_000  # lines that are searched for an image with several labels
MAX_LINE = 2**16  # bytes
MAX_ROOTS = 1000  # folders next to a list in which its images are searched
# The path ends with the last image extension: names may contain spaces, and directories may be called x.jpg.
PATH = rb"[^\n]*(?:" + b"|".join(re.escape(extension.encode()) for extension in EXTENSIONS + ARRAY_EXTENSIONS) + rb")"
# After a tab or a comma a label may have spaces, but not after a space: it could be several labels.
REST = rb"(?:(?:[ \t]*[,\t][ \t]*|[ ]+(?=[^\s,]+[ \t\r]*$))([^\s,][^\n]*?)?)?[ \t\r]*$"
LINE = re.compile(rb"^(?!#)(" + PATH + rb")" + REST, re.IGNORECASE | re.MULTILINE)
LABEL = re.compile(rb"^(?!#)" + PATH + REST, re.IGNORECASE | re.MULTILINE)  # LINE without the path: 3 times as fast
INTEGER = re.compile(rb"[+-]?\d+")
COLUMNS = re.compile(rb"[,\t]|\s#")  # more columns, or a comment, in a label
WORDS = re.compile(PATH + rb"[ ]+([^\s,][^\n]*?)[ \t\r]*", re.IGNORECASE)
SEPARATORS = re.compile(rb"[\s|;/+&]+")  # of several labels
NUMERAL = re.compile(rb"[+-]?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?")
BOM = b"\xef\xbb\xbf"


def make_list(*, path: str, data_dir: str, split: str, heldout_fraction: float, **_):
    """The images named in one or several list files, in the order of the lines.

    A label is an integer or the name of a class without commas. Either all lines of a split have one, or none. Blank
    lines and those that begin with # are skipped. Relative paths start at `data_dir`. If that is "", they start at the
    folder of the list, or at a folder in it, depending on where the first image is.

    Raises DataError for a line that is not a path, with its number, and if the first image does not exist.
    """
    selection = select(path, split, LISTS, "list", is_list)
    return make_part(ListFile(selection, split, data_dir), selection, heldout_fraction)


class ListFile(FileSource):
    """Image files named in lists."""

    def __init__(self, selection: Selection, split: str, data_dir: str):
        self.path, self.split = selection.path, split
        standard = EVALUATION if split in EVALUATION and selection.held_out is None else ("train",)
        sides = list(dict.fromkeys((selection.own, split, *standard)))
        paths, others = selection.absolute(), selection.absolute(others=True)
        roots = [_roots(file, data_dir, sides) for file in paths]
        scans = [_scan(file, *stat_file(file), root) for file, root in zip(paths, roots, strict=True)]
        rest = [_scan(file, *stat_file(file), _roots(file, data_dir, list(STANDARD))) for file in others]
        self.lists = [(file, stat_file(file), scan["starts"]) for file, scan in zip(paths, scans, strict=True)]
        self.tables = [scan["table"] for scan in scans]
        self.ends = list(itertools.accumulate(scan["count"] for scan in scans))
        if not self.ends[-1]:
            raise DataError(f"{paths[0]} lists 0 images", f"split {split!r}", "give a line `path[ label]` per image")
        self.labeled = _are_labeled(scans, paths)
        labeled = [(scan, file) for scan, file in zip(rest, others, strict=True) if scan["labeled"]]
        if not self.labeled:
            self.unlabeled = "give `path label` on each line"
            if labeled:
                warn_once(f"{paths[0]}: images without labels, unlike those of {labeled[0][1]}")
        labeled = [*zip(scans, paths, strict=True), *labeled] if self.labeled else []
        self.classes, self.integers = _classes(labeled)
        self.by_name = not self.integers
        self.roots = [_find_root(file, scan, each) for file, scan, each in zip(paths, scans, roots, strict=True)]
        # the numbers of labels depend on the names of all classes
        names = b"" if self.integers else "\0".join(self.classes).encode(errors="surrogateescape")
        self.digest = digest_of(*(scan["digest"] for scan in scans), names)
        self.labels = Column(np.int32)
        for scan in scans if self.labeled else ():
            numbers = np.array([self._label(label) for label in scan["labels"]], np.int32)
            for start in range(0, scan["count"], BLOCK):
                self.labels.append(numbers[scan["ids"].array[start : start + BLOCK]])

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict:
        which, name, label = self._line(i)
        return {"image": _read(os.path.join(self.roots[which], name)), "label": label, "name": name}

    def image_path(self, i: int) -> str:
        which, name, _ = self._line(i)
        return os.path.join(self.roots[which], name)

    def files(self) -> list[str]:
        return [path for path, *_ in self.lists]

    def name(self, i: int) -> str:
        return self._line(i)[1]

    def _line(self, i: int) -> tuple[int, str, int]:
        i = range(len(self))[i]
        which = bisect.bisect_right(self.ends, i)
        i -= self.ends[which - 1] if which else 0
        path, version, starts = self.lists[which]
        block, rest = divmod(i, STRIDE)
        starts, table = starts.array, self.tables[which]
        start, end = int(starts[block]), int(starts[block + 1]) if block + 1 < len(starts) else None
        if table is not None:
            text = table.array[start:end].tobytes()
        else:
            text = self._open(path, version).read((version[0] if end is None else end) - start, start)
        found = LINE.findall(text)
        if rest >= len(found):
            raise changed_error(path)
        return which, os.fsdecode(found[rest][0]), self._label(found[rest][1])

    def _label(self, text: bytes) -> int:
        if not self.labeled:
            return -1
        return int(text) if self.integers else self._numbers[os.fsdecode(text)]

    @functools.cached_property
    def _open(self):
        return make_opener(File)

    def all_labels(self) -> np.ndarray:
        return self.labels.array if self.labeled else np.full(len(self), -1, np.int32)

    def fingerprint(self) -> dict:
        return {"source": "list", "split": self.split, "count": len(self), "lines_sha256": self.digest}


@functools.lru_cache(4)  # both splits scan both lists
def _scan(path: str, size: int, time: int, roots: tuple[str, ...]) -> dict:
    """The count, the offset of every 64th record, a digest of the records, and facts about the labels of a list.

    "labels" are the different labels, and "ids" the index of that of each record. "table" has the lines of a table.
    """
    columns = find_columns(path)
    table = read_table(path, columns, roots) if columns else None
    starts, ids, digest = Column(np.int64), Column(np.int32), hashlib.sha256()
    count, first, line, labeled, without, labels = 0, None, 1, 0, None, {}
    for offset, block in _blocks(path, table):
        if b"\0" in block:
            number = line + block.count(b"\n", 0, block.index(b"\0"))
            raise DataError("the list contains zero bytes", f"{path}, line {number}", "save it as UTF-8 text")
        ends = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        found = LABEL.findall(block)
        places = np.concatenate([[0], ends[:-1] + 1])
        numbers = range(line, line + len(ends))
        if len(found) != len(ends) or b".." in block:
            found, places, numbers = _scan_lines(path, block, line)
        if len(found) == len(ends):
            records = block
        else:
            rows = block.split(b"\n")
            records = b"".join(rows[number - line] + b"\n" for number in numbers)
        digest.update(records.replace(b"\r\n", b"\n"))
        if found and first is None:
            first = LINE.search(block)[1], numbers[0]
        starts.append(offset + np.asarray(places, np.int64)[-count % STRIDE :: STRIDE])
        new = set(found) - labels.keys()
        if new:
            firsts = dict(zip(reversed(found), reversed(numbers), strict=True))
            labels.update((label, firsts[label]) for label in sorted(new, key=firsts.get))
        number_of = {label: number for number, label in enumerate(labels)} if new or not count else number_of
        ids.append(np.fromiter(map(number_of.__getitem__, found), np.int32, len(found)))
        count, line = count + len(found), line + len(ends)
        labeled += len(found) - found.count(b"")
        if without is None and labeled < count:
            without = labels[b""]
        if len(labels) > MAX_CLASSES:
            what = f"more than {MAX_CLASSES} classes"
            raise DataError(what, f"{path}, line {numbers[-1]}", "give only the class after each path")
    if 0 < labeled < count:
        number = next(number for label, number in labels.items() if label)
        what = f"line {without} has no label, and line {number} has one"
        raise DataError(what, path, "label every line, or none")
    firsts = {label: number for label, number in labels.items() if label}
    named = _are_names(firsts, path)
    largest = -1
    for label, number in firsts.items() if not named else ():
        value = int(label[:20])
        if not 0 <= value < MAX_CLASSES:
            fix = f"number the classes from 0, to {MAX_CLASSES - 1} at most"
            raise DataError(f"label {os.fsdecode(label[:20])}", f"{path}, line {number}", fix)
        largest = max(largest, value)
    if labeled and count <= MAX_COMPARED:
        _check_repeated(path, table)
    return {
        "count": count, "starts": starts, "digest": digest.digest(), "first": first, "named": named, "table": table,
        "largest": largest, "labeled": labeled > 0, "labels": list(labels), "ids": ids,
    }  # fmt: skip


def _check_repeated(path: str, table: Column | None) -> None:
    """Raise DataError if an image is listed again with another label."""
    line, seen = 1, {}
    for _, block in _blocks(path, table):
        rows = block.split(b"\n")[:-1]
        for number, text in enumerate(rows, line):
            if match := LINE.fullmatch(text):
                label, first = seen.setdefault(match[1], (match[2], number))
                if label != match[2]:
                    what = f"{os.fsdecode(match[1])} has the labels {os.fsdecode(label)} and {os.fsdecode(match[2])}"
                    raise DataError(what, f"{path}, lines {first} and {number}", "an image has one class: list it once")
        line += len(rows)


def _are_names(labels: dict[bytes, int], path: str) -> bool:
    """Whether labels are names of classes and not integers. `labels` has the first line of each.

    Raises DataError for more columns, a comment, or numbers that are not integers.
    """
    others = [label for label in labels if not INTEGER.fullmatch(label)]
    numerals = all(NUMERAL.fullmatch(label) for label in labels)
    for label in others:
        parts = [part for part in SEPARATORS.split(label) if part]
        several = b"|" in label or (
            len(parts) > 1 and (all(map(NUMERAL.fullmatch, parts)) or all(part in labels for part in parts))
        )
        if numerals or several or COLUMNS.search(label):
            what = f"{os.fsdecode(label[:80])!r} is not the label of an image"
            fix = "give `path[ label]`: an integer, or the name of a class without a comma or a comment"
            if several:
                fix = "an image has one class: list it once, with one label"
            elif numerals:
                fix = "give integers, starting at 0, or names of classes"
            raise DataError(what, f"{path}, line {labels[label]}", fix)
    return bool(others)


def _blocks(path: str, table: Column | None) -> Iterator[tuple[int, bytes]]:
    """(offset, complete lines) of the blocks of a file, or of the lines of a table.

    The last line ends with a newline even if the file does not.
    """
    rest, offset = b"", 0
    with open(path, "rb") if table is None else io.BytesIO(table.array) as file:
        while True:
            read = file.read(BLOCK)
            if offset == 0 and not rest and read.startswith(BOM):
                read, offset = read[len(BOM) :], len(BOM)
            if offset == 0 and not rest and read.startswith((b"\xff\xfe", b"\xfe\xff")):
                raise DataError(f"{path} is UTF-16", "data.source=list", "save it as UTF-8 text")
            block = rest + read
            if not read:
                if block:
                    yield offset, block + b"\n"
                return
            end = block.rfind(b"\n") + 1
            if len(block) - end > MAX_LINE:
                what = f"a line of more than {MAX_LINE} bytes"
                raise DataError(what, f"{path}, at byte {offset + end}", "give a text file with a path on each line")
            if end:
                yield offset, block[:end]
            rest, offset = block[end:], offset + end


def _scan_lines(path: str, block: bytes, line: int) -> tuple[list[bytes], list[int], list[int]]:
    """(labels, offsets in the block, line numbers) of the records of a block that also has other lines."""
    found, places, numbers, place = [], [], [], 0
    for number, text in enumerate(block.split(b"\n")[:-1], line):
        if text.strip() and not text.startswith(b"#"):
            match = LINE.fullmatch(text)
            where = f"{path}, line {number}"
            if not match:
                shown = os.fsdecode(text[:80]).strip()
                if words := WORDS.fullmatch(text):
                    what = f"{os.fsdecode(words[1][:80])!r} is not the label of an image"
                    fix = "give one label; if it is the name of a class, put a tab or a comma before it"
                    raise DataError(what, where, fix)
                fix = "give `path[ label]`, the path with an image extension; begin comments and headings with #"
                raise DataError(f"{shown!r} is not the path of an image", where, fix)
            if _leaves(match[1]):
                raise DataError(f"{os.fsdecode(match[1])!r} leaves the folder of the images", where, "remove the ..")
            found.append(match[2] or b"")
            places.append(place)
            numbers.append(number)
        place += len(text) + 1
    return found, places, numbers


def _leaves(name: bytes) -> bool:
    """Whether a relative path leaves its root at any point."""
    depth = 0
    for part in name.split(b"/") if not name.startswith(b"/") else ():
        depth += {b"..": -1, b".": 0, b"": 0}.get(part, 1)
        if depth < 0:
            return True
    return False


def _are_labeled(scans: list[dict], paths: list[str]) -> bool:
    """Whether the lists of a split have labels. Raises DataError if only some of them have."""
    with_label, without = (
        [path for scan, path in zip(scans, paths, strict=True) if scan["count"] and scan["labeled"] == labeled]
        for labeled in (True, False)
    )
    if with_label and without:
        raise DataError(
            f"{without[0]} has no labels, and {with_label[0]} has", "data.source=list", "label all, or none"
        )
    return bool(with_label)


def _classes(labeled: list[tuple[dict, str]]) -> tuple[tuple[str, ...], bool]:
    """(names of the classes in these lists, whether they are integers)."""
    named = [path for scan, path in labeled if scan["named"]]
    integers = [path for scan, path in labeled if not scan["named"] and scan["count"]]
    if named and integers:
        what = f"{integers[0]} has numbers for labels, and {named[0]} has names"
        raise DataError(what, "data.source=list", "use the same in all lists")
    if not named:
        return tuple(map(str, range(max((scan["largest"] for scan, _ in labeled), default=-1) + 1))), True
    return order_classes(os.fsdecode(label) for scan, _ in labeled for label in scan["labels"] if label), False


def _roots(file: str, data_dir: str, sides: list[str]) -> tuple[str, ...]:
    """The folders that the paths of a list may be relative to."""
    if data_dir:
        data_dir = os.path.abspath(os.path.expanduser(data_dir))
        return (
            tuple(data_dir.replace("{split}", side) for side in sides if side) if "{split}" in data_dir else (data_dir,)
        )
    folder = os.path.dirname(file)
    own = [os.path.join(folder, side) for side in sides if side]
    inside = [os.path.join(folder, name) for name in folders(folder)[:MAX_ROOTS]]
    alike = [path for path in inside if side_of(os.path.basename(path)) in map(side_of, sides) and path not in own]
    return tuple(dict.fromkeys((folder, *own, *alike, *inside)))


def _find_root(path: str, scan: dict, roots: tuple[str, ...]) -> str:
    """The folder that the paths of a list are relative to: the first candidate with the first image."""
    if not scan["count"]:
        return roots[0]
    name, number = os.fsdecode(scan["first"][0]), scan["first"][1]
    for root in roots:
        if os.path.exists(os.path.join(root, name)):
            return root
    where = f"{path}, line {number}" + ("" if os.path.isabs(name) else f", looked in {', '.join(roots[:4])}")
    fix = "set data.data_dir to the folder that the paths are relative to"
    fix = "write the paths with / instead of \\" if "\\" in name else fix
    raise DataError(f"{name} does not exist", where, "correct the paths" if os.path.isabs(name) else fix)


def list_kind(path: str) -> tuple[str, str]:
    """("lists", the path of the first image), or (another kind of label file, ""), or ("", "") for other files."""
    if not path.lower().endswith(LISTS):
        return "files of labels", ""
    roots = _roots(path, "", list(STANDARD))
    try:
        columns = find_columns(path)
        if columns:
            first = first_line(path, columns, roots)
        else:
            with open(path, "rb") as file:
                lines = file.read(MAX_LINE).splitlines()
            first = next((line for line in lines if line.strip() and not line.startswith(b"#")), b"")
    except OSError:
        return "", ""
    except DataError:  # several columns may be the label
        return "files with several labels", ""
    found = LINE.fullmatch(first)
    if not found:
        return "files with several labels" * bool(WORDS.fullmatch(first)), ""
    if COLUMNS.search(found[2] or b""):
        return "files with several labels", ""
    paths = [os.path.join(root, os.fsdecode(found[1])) for root in roots]
    return "lists", next(filter(os.path.exists, paths), paths[0])


def is_list(path: str) -> bool:
    return list_kind(path)[0] == "lists"


def _read(path: str) -> bytes:
    # O_NONBLOCK: a list is untrusted, and opening a pipe would hang
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise BadImage("is not a file")
        return file.read()
