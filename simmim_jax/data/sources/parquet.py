"""Images in Parquet files, as Hugging Face data sets have them.

A row group is the least that can be read, so each process keeps some of them, decoded: reading in order is quick, and
shuffled reading decodes a group for each image.
"""

import bisect
import collections
import functools
import hashlib
import json
import logging
import os
import threading

import numpy as np

from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources.files import changed, opener, stat_file
from simmim_jax.data.sources.names import Column
from simmim_jax.data.sources.splits import Selection, natural_classes, part_of, select
from simmim_jax.errors import DataError, warn_once

PARQUETS = (".parquet",)
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "class_id", "label_id", "coarse_label")
KEPT = 2**27  # bytes of decoded row groups that a process keeps
MANY_ROWS, MANY_BYTES = 200, 2**26  # in a row group: shuffled reading is slow beyond
SAMPLE = 2**12  # bytes of each column's part that the fingerprint looks at
MAX_CLASSES = 1_000_000
MAX_NAMES = 100_000  # of classes, in a column of strings; beyond they are captions


def make_parquet(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in Parquet files, in the order of the files and of their rows.

    The image is a column of bytes, or of structs with "bytes", named image, img, jpg, ..., or the only such one. The
    label is a column named label, Label, labels, ...: of integers, where the classes' names are those that Hugging Face
    writes, or else of strings, which are the names.

    Raises:
      DataError: for a file that is no Parquet file, or has no such column.
    """
    selection = select(path, split, PARQUETS, "parquet")
    return part_of(Parquet(selection, split), selection, heldout_fraction)


class Parquet:
    """Rows of Parquet files that have an image."""

    def __init__(self, selection: Selection, split: str):
        self.path, self.split, self.names, self.paths = selection.path, split, selection.files, selection.absolute()
        self.versions = [stat_file(path) for path in self.paths]
        opened = _open(self.paths[0], self.versions[0])
        self.image, self.label, self.named = _columns(opened.schema_arrow, self.paths[0])
        if not self.label:
            unused = _label_field(opened.schema_arrow, lambda _: True)
            if unused and unused.name != self.image:
                warn_once(f"{self.path}: column {unused.name!r} is of type {str(unused.type)[:80]}, not used")
        names = () if self.named else _class_names(opened.schema_arrow, self.label)
        self.group_ends, self.group_files, self.group_numbers = Column(np.int64), Column(np.int32), Column(np.int32)
        self.file_ends, samples, labels, self.count, most = [], [], [], 0, (0, 0)
        for number, (path, version) in enumerate(zip(self.paths, self.versions, strict=True)):
            opened = _open(path, version)
            if _columns(opened.schema_arrow, path) != (self.image, self.label, self.named):
                what = f"{path} has other columns than {self.paths[0]}"
                raise DataError(what, f"image {self.image!r}, label {self.label!r}", "give files of one data set")
            if not self.named and _class_names(opened.schema_arrow, self.label) != names:
                raise DataError(
                    f"{path} has other classes than {self.paths[0]}", "data.path", "give files of one data set"
                )
            counts, largest = _group_sizes(opened.metadata, self.image)
            self.group_ends.append(self.count + np.cumsum(counts))
            self.group_files.append(np.full(len(counts), number))
            self.group_numbers.append(np.arange(len(counts)))
            self.count += int(counts.sum())
            self.file_ends.append(self.count)
            most = max(most, (int(counts.max(initial=0)), largest))
            samples.append(_sample(path, opened.metadata))
            labels.append(None if self.named else _label_range(opened, self.label, path))
        if not self.count:
            raise DataError(f"{self.path} has 0 images", f"split {split!r}", "point data.path at files that have rows")
        if self.named:
            self.classes = self._take_names(selection.absolute(others=True))
        else:
            for other in selection.absolute(others=True) if self.label and not names else ():
                opened = _open(other, stat_file(other))
                has_it = _label_column(opened.schema_arrow) == (self.label, False)
                labels.append(_label_range(opened, self.label, other) if has_it else None)
            self.classes = _classes(labels, names, self.path)
        if not self.classes:
            self.label = ""
        listed = list(zip(self.names, samples, strict=True))
        # the numbers of labels follow from the names of all classes
        listed = json.dumps([listed, self.classes] if self.named and self.classes else listed)
        self.sample = hashlib.sha256(listed.encode()).hexdigest()
        if most[0] > MANY_ROWS or most[1] > MANY_BYTES:
            logging.warning(
                "%s: a row group has %d images (%.0f MiB), and shuffled reading decodes a whole one for each image: "
                "prepare shards once with python -m simmim_jax.tools.prepare", self.path, most[0], most[1] / 2**20,
            )  # fmt: skip
        self._start()

    def _take_names(self, others: list[str]) -> tuple[str, ...]:
        """The names of the classes in all files, sorted; () where no row has one, or each its own."""
        found, without, first_without = set(), 0, ""
        for path in (*self.paths, *others):
            opened = _open(path, stat_file(path))
            if path in others and _label_column(opened.schema_arrow) != (self.label, True):
                continue
            new, missing = _label_names(opened, self.label, path)
            found |= new
            if path not in others and missing:
                without, first_without = without + missing, first_without or path
            if len(found) > MAX_NAMES:
                warn_once(f"{self.path}: column {self.label!r} has more than {MAX_NAMES} different texts, not used")
                return ()
        if 0 < without < self.count:
            what = f"{first_without} has rows without a label"
            raise DataError(what, f"column {self.label!r}", "label all of them, or none")
        return () if without else tuple(sorted(found))

    @functools.cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.classes)}

    def _start(self) -> None:
        self.lock, self.kept, self.kept_bytes = threading.Lock(), collections.OrderedDict(), 0

    @functools.cached_property
    def _open(self):
        return opener(_open)

    def __getstate__(self) -> dict:  # neither open files nor what was read from them travels
        mine = ("_open", "_numbers", "lock", "kept", "kept_bytes")
        return {key: value for key, value in self.__dict__.items() if key not in mine}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i: int) -> dict:
        i = range(self.count)[i]
        ends = self.group_ends.array
        group = int(np.searchsorted(ends, i, side="right"))
        row = i - (int(ends[group - 1]) if group else 0)
        images, labels = self._group(group)
        image = images[row].as_py()
        image = image.get("bytes") if isinstance(image, dict) else image
        if image is None:
            raise BadImage("has no bytes in its row")
        label = -1 if labels is None else labels[row].as_py()
        label = self._numbers[label] if isinstance(label, str) else label
        return {"image": image, "label": label, "name": self.name(i)}

    def _group(self, group: int) -> tuple:
        """The columns (images, labels or None) of a row group."""
        # one thread decodes at a time: Arrow has threads of its own, and two must not decode the same group
        with self.lock:
            if group in self.kept:
                self.kept.move_to_end(group)
                return self.kept[group][:2]
            columns, size = self._decode(group)
            self.kept[group] = (*columns, size)
            self.kept_bytes += size
            while self.kept_bytes > KEPT and len(self.kept) > 1:
                self.kept_bytes -= self.kept.popitem(last=False)[1][2]
            return columns

    def _decode(self, group: int) -> tuple[tuple, int]:
        import pyarrow

        file = int(self.group_files.array[group])
        try:
            opened = self._open(self.paths[file], self.versions[file])
            wanted = [self.image, *([self.label] if self.label else [])]
            table = opened.read_row_group(int(self.group_numbers.array[group]), columns=wanted)
        except pyarrow.ArrowException as error:
            raise BadImage(" ".join(str(error).split())[:200]) from error
        return (table.column(self.image), table.column(self.label) if self.label else None), table.nbytes

    def name(self, i: int) -> str:
        file = bisect.bisect_right(self.file_ends, i)
        return f"{self.names[file]}/{i - (self.file_ends[file - 1] if file else 0)}"

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        return {"source": "parquet", "split": self.split, "count": len(self), "sample_sha256": self.sample}


def _open(path: str, version: tuple[int, int]):
    """The file, or a DataError where it is damaged, or not of this version any more."""
    import pyarrow
    import pyarrow.parquet

    if stat_file(path) != version:
        raise changed(path)
    try:
        with open(path, "rb") as file:  # Arrow reads from the end, and looks at no more to begin with
            if file.read(4) != b"PAR1":
                raise pyarrow.ArrowInvalid("it does not begin as one")
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is no whole Parquet file", reason, "fetch the file again") from error


def _columns(schema, path: str) -> tuple[str, str, bool]:
    """(the column of images; that of labels, or "" where there is none; whether these are names and not integers)."""
    import pyarrow

    def has_bytes(kind) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and has_bytes(kind.field(i).type) for i in range(kind.num_fields))
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = [field.name for field in schema if has_bytes(field.type)]
    image = next((name for name in IMAGE_NAMES if name in images), images[0] if len(images) == 1 else "")
    if not image or len(set(schema.names)) != len(schema.names):
        columns = ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)
        what = f"{path} has {len(images)} columns of images, and none named {' or '.join(IMAGE_NAMES[:2])}"
        raise DataError(what, f"columns: {columns}", "name the column of encoded images 'image'")
    return image, *_label_column(schema)


def _label_column(schema) -> tuple[str, bool]:
    import pyarrow

    label = _label_field(schema, pyarrow.types.is_integer)
    named = None if label else _label_field(schema, _is_text)
    return getattr(label or named, "name", ""), named is not None


def _label_field(schema, is_kind):
    """The likeliest field of labels among those of a kind, or None: `label` before `Label`, both before `class`."""
    fields = [field for field in schema if is_kind(field.type)]
    fields = [field for field in fields if field.name.casefold() in LABEL_NAMES]
    order = lambda field: (LABEL_NAMES.index(field.name.casefold()), field.name != field.name.casefold())  # noqa: E731
    return min(fields, key=order, default=None)


def _is_text(kind) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(getattr(pyarrow.types, f"is_{each}")(kind) for each in ("string", "large_string", "string_view"))


def _label_names(opened, label: str, path: str) -> tuple[set[str], int]:
    """(the different names in the column of labels, how many rows have none)."""
    import pyarrow

    found, without = set(), 0
    for number in range(opened.metadata.num_row_groups):
        try:
            column = opened.read_row_group(number, columns=[label]).column(label)
            new = column.unique().to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is damaged", f"row group {number}: {reason}", "fetch the file again") from error
        found.update(name for name in new if name is not None)
        without += column.null_count
        if len(found) > MAX_NAMES:
            break
    return found, without


def _class_names(schema, label: str) -> tuple[str, ...]:
    """The names of the classes as Hugging Face writes them; () where it does not."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    names = list(names.values()) if isinstance(names, dict) else names  # as some old cards have them
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _group_sizes(metadata, image: str) -> tuple[np.ndarray, int]:
    """(rows of each row group, the bytes of the images of the largest)."""
    counts, largest = np.empty(metadata.num_row_groups, np.int64), 0
    parts = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == image]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        counts[number] = group.num_rows
        largest = max(largest, sum(group.column(part).total_uncompressed_size for part in parts))
    return counts, largest


def _label_range(opened, label: str, path: str) -> tuple[int, int] | None:
    """The smallest and largest label of a file; None where it has no rows or no such column."""
    import pyarrow
    import pyarrow.compute

    if not label or not opened.metadata.num_rows:
        return None
    lows, highs = [], []
    # of leaves there may be more than columns
    paths = [opened.metadata.schema.column(i).path for i in range(opened.metadata.num_columns)]
    column = paths.index(label)
    for number in range(opened.metadata.num_row_groups):
        if not opened.metadata.row_group(number).num_rows:
            continue
        statistics = opened.metadata.row_group(number).column(column).statistics
        known = statistics is not None and statistics.has_min_max and statistics.has_null_count
        try:
            if known:
                low, high, without = statistics.min, statistics.max, statistics.null_count
            else:
                values = opened.read_row_group(number, columns=[label]).column(label)
                bounds = pyarrow.compute.min_max(values)
                low, high, without = bounds["min"].as_py(), bounds["max"].as_py(), values.null_count
        except (pyarrow.ArrowException, OSError) as error:
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"{path} is damaged", f"row group {number}: {reason}", "fetch the file again") from error
        if without or low is None:
            what = f"{path} has {without} rows without a label"
            raise DataError(what, f"column {label!r}, row group {number}", "label all of them, or none")
        lows.append(low)
        highs.append(high)
    return min(lows), max(highs)


def _classes(ranges: list[tuple[int, int] | None], names: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The names of the classes of labels in these ranges; () where all labels are -1, as in test sets without any."""
    ranges = [each for each in ranges if each]
    if not ranges or all(each == (-1, -1) for each in ranges):
        return ()
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high >= (len(names) or MAX_CLASSES):
        bound = len(names) or MAX_CLASSES
        raise DataError(f"labels from {low} to {high}", path, f"number the classes from 0 to {bound - 1}")
    return names or natural_classes(high)


def _sample(path: str, metadata) -> str:
    """SHA-256 of the footer (schema; place, size and bounds of each column's part) and of where each such part begins.

    The footer alone is the same when the rows of a group change places.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        file.seek(-8 - size, os.SEEK_END)
        digest.update(file.read(size))
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            for column in range(group.num_columns):
                part = group.column(column)
                file.seek(min(part.data_page_offset, part.dictionary_page_offset or part.data_page_offset))
                digest.update(file.read(min(part.total_compressed_size, SAMPLE)))
    return digest.hexdigest()
