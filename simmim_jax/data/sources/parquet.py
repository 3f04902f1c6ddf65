"""Images in Parquet files, such as those of Hugging Face data sets.

The smallest readable unit is a row group. Each process caches some decoded row groups. Reading in order is fast, but
shuffled reading decodes a whole row group for each image.
"""

import bisect
import collections
import contextlib
import functools
import glob
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator

import numpy as np

from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources.classes import order_classes
from simmim_jax.data.sources.files import changed_error, make_opener, stat_file
from simmim_jax.data.sources.names import Column
from simmim_jax.data.sources.parts import FileSource, make_part
from simmim_jax.data.sources.splits import MAX_CLASSES, Selection, select
from simmim_jax.data.sources.table import PATH_NAMES
from simmim_jax.errors import DataError, warn_once

PARQUETS = (".parquet",)
IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "photo", "image_bytes", "bytes")
LABEL_NAMES = ("label", "labels", "fine_label", "cls", "class", "target", "class_id", "label_id", "coarse_label")
CACHE = 2**27  # bytes of decoded row groups per process
SLOW_ROWS, SLOW_BYTES = 200, 2**26  # of a row group: above, shuffled reading is slow
SAMPLE = 2**12  # bytes of each column chunk that are part of the fingerprint
MAX_NAMES = 100_000  # different strings in a column of class names; above, they are captions
DOWNLOAD = "download the file again"


def make_parquet(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in Parquet files, in the order of the files and of their rows.

    The image column has bytes, or structs with "bytes". It is named image, img, jpg, ..., or is the only such column.
    The label column is named label, Label, labels, .... It has integers, with class names from Hugging Face's metadata,
    or strings, which are the class names.

    Raises DataError for a file that is not Parquet, or has no such column.
    """
    selection = select(path, split, PARQUETS, "parquet")
    return make_part(Parquet(selection, split), selection, heldout_fraction)


class Parquet(FileSource):
    """Rows with an image of Parquet files."""

    per_process = (*FileSource.per_process, "lock", "cache", "cache_bytes")
    reads_groups = True

    def __init__(self, selection: Selection, split: str):
        self.path, self.split, self.names, self.paths = selection.path, split, selection.files, selection.absolute()
        self.versions = [stat_file(path) for path in self.paths]
        opened = _open(self.paths[0], self.versions[0])
        self.image, self.label, self.named = _columns(opened.schema_arrow, self.paths[0])
        if not self.label:
            unused = _label_field(opened.schema_arrow, lambda _: True)
            names = ", ".join(name for name in opened.schema_arrow.names if name != self.image) or "no other column"
            self.unlabeled = f"name the column of integers or class names 'label' (the file has {names[:200]})"
            if unused and unused.name != self.image:
                self._leave_out(unused.name, f"it has type {str(unused.type)[:80]}")
        names = () if self.named else _class_names(opened.schema_arrow, self.label)
        self.group_ends, self.group_files, self.group_numbers = Column(np.int64), Column(np.int32), Column(np.int32)
        self.file_ends, samples, labels, self.count, max_group = [], [], [], 0, (0, 0)
        for number, (path, version) in enumerate(zip(self.paths, self.versions, strict=True)):
            opened = _open(path, version)
            if _columns(opened.schema_arrow, path) != (self.image, self.label, self.named):
                what = f"{path} has other columns than {self.paths[0]}"
                raise DataError(what, f"image {self.image!r}, label {self.label!r}", "give files of one data set")
            if not self.named and _class_names(opened.schema_arrow, self.label) != names:
                what = f"{path} has other classes than {self.paths[0]}"
                raise DataError(what, "data.path", "give files of one data set")
            counts, max_bytes = _group_sizes(opened.metadata, self.image)
            self.group_ends.append(self.count + np.cumsum(counts))
            self.group_files.append(np.full(len(counts), number))
            self.group_numbers.append(np.arange(len(counts)))
            self.count += int(counts.sum())
            self.file_ends.append(self.count)
            max_group = max(max_group, (int(counts.max(initial=0)), max_bytes))
            samples.append(_sample(path, opened.metadata))
            labels.append(None if self.named else _label_range(opened, self.label, path))
        if not self.count:
            raise DataError(f"{self.path} has 0 images", f"split {split!r}", "point data.path at files that have rows")
        self.by_name = self.named
        if self.named:
            self.classes = self._find_names(selection.absolute(others=True))
        else:
            for other in selection.absolute(others=True) if self.label and not names else ():
                opened = _open(other, stat_file(other))
                labeled = _label_column(opened.schema_arrow) == (self.label, False)
                labels.append(_label_range(opened, self.label, other) if labeled else None)
            self.classes = _classes(labels, names, self.path)
        if not self.classes:
            self.unlabeled = self.unlabeled or f"column {self.label!r} has no label in any row: label all of them"
            self.label = ""
        listed = list(zip(self.names, samples, strict=True))
        # the numbers of labels depend on the names of all classes
        listed = json.dumps([listed, self.classes] if self.named and self.classes else listed)
        self.sample = hashlib.sha256(listed.encode()).hexdigest()
        rows, size = max_group
        if rows > SLOW_ROWS or size > SLOW_BYTES:
            what = f"a row group has {rows} images ({size / 2**20:.0f} MiB), and shuffled reading decodes one per image"
            logging.warning("%s: %s: run python -m simmim_jax.tools.prepare once", self.path, what)
        self._start()

    def _leave_out(self, column: str, why: str) -> None:
        """Warn that a column of labels is not used, and why."""
        self.unlabeled = (
            f"column {column!r} is not used: {why}: store integers, or the names of classes, one for an image"
        )
        warn_once(f"{self.path}: images without labels: {self.unlabeled}")

    def _find_names(self, others: list[str]) -> tuple[str, ...]:
        """The sorted class names of all files; () if no row has one, or there are too many different ones."""
        found, unlabeled, first_unlabeled = set(), 0, ""
        for path in (*self.paths, *others):
            opened = _open(path, stat_file(path))
            if path in others and _label_column(opened.schema_arrow) != (self.label, True):
                continue
            new, missing = _label_names(opened, self.label, path)
            found |= new
            if path not in others and missing:
                unlabeled, first_unlabeled = unlabeled + missing, first_unlabeled or path
            if len(found) > MAX_NAMES:
                self._leave_out(self.label, f"it has more than {MAX_NAMES} different strings")
                return ()
        if 0 < unlabeled < self.count:
            what = f"{first_unlabeled} has rows without a label"
            raise DataError(what, f"column {self.label!r}", "label all of them, or none")
        return () if unlabeled else order_classes(found)

    def _start(self) -> None:
        self.lock, self.cache, self.cache_bytes = threading.Lock(), collections.OrderedDict(), 0

    @functools.cached_property
    def _open(self):
        return make_opener(_open)

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
        # one thread decodes at a time: Arrow has its own threads, and no group should be decoded twice
        with self.lock:
            if group in self.cache:
                self.cache.move_to_end(group)
                return self.cache[group][:2]
            columns, size = self._decode(group)
            self.cache[group] = (*columns, size)
            self.cache_bytes += size
            while self.cache_bytes > CACHE and len(self.cache) > 1:
                self.cache_bytes -= self.cache.popitem(last=False)[1][2]
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

    def all_labels(self) -> np.ndarray:
        if not self.label:
            return np.full(self.count, -1)
        labels = []
        for path, version in zip(self.paths, self.versions, strict=True):
            with _as_damaged(path, 0):
                column = _open(path, version).read(columns=[self.label]).column(self.label)
            labels += [self._numbers[label] for label in column.to_pylist()] if self.named else column.to_pylist()
        return np.array(labels, np.int64)

    def files(self) -> list[str]:
        return self.paths

    def name(self, i: int) -> str:
        file = bisect.bisect_right(self.file_ends, i)
        return f"{self.names[file]}/{i - (self.file_ends[file - 1] if file else 0)}"

    def fingerprint(self) -> dict:
        return {"source": "parquet", "split": self.split, "count": len(self), "sample_sha256": self.sample}


def _open(path: str, version: tuple[int, int]):
    """An open file. Raises DataError if it is damaged, or has another version."""
    import pyarrow
    import pyarrow.parquet

    if stat_file(path) != version:
        raise changed_error(path)
    try:
        with open(path, "rb") as file:  # Arrow reads only the end at first
            if file.read(4) != b"PAR1":
                raise pyarrow.ArrowInvalid("it does not begin with PAR1")
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is not a complete Parquet file", reason, DOWNLOAD) from error


def _columns(schema, path: str) -> tuple[str, str, bool]:
    """(the image column; the label column, or ""; whether labels are names and not integers)."""
    import pyarrow

    def has_bytes(kind) -> bool:
        if pyarrow.types.is_struct(kind):
            return any(kind.field(i).name == "bytes" and has_bytes(kind.field(i).type) for i in range(kind.num_fields))
        return pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)

    images = [field.name for field in schema if has_bytes(field.type)]
    image = next((name for name in IMAGE_NAMES if name in images), images[0] if len(images) == 1 else "")
    if not image or len(set(schema.names)) != len(schema.names):
        columns = ", ".join(f"{field.name} ({str(field.type)[:40]})" for field in schema)
        what = f"{path} has {len(images)} image columns, and none named {' or '.join(IMAGE_NAMES[:2])}"
        fix = "name the column of encoded images 'image'"
        if not images and glob.glob(glob.escape(os.path.dirname(path)) + "/*.tar"):
            fix = "the images are in the tar files next to it: set data.source=tar"
        elif not images and "url" in schema.names:
            fix = "it has only links: download the images, for example with img2dataset"
        elif not images and any(name in schema.names for name in PATH_NAMES):
            fix = "it has only names of files: write them to a list, `path,label` on each line"
        raise DataError(what, f"columns: {columns}", fix)
    return image, *_label_column(schema)


def has_images(path: str) -> bool:
    """Whether a file is Parquet with a column of images."""
    with contextlib.suppress(DataError):
        _columns(_open(path, stat_file(path)).schema_arrow, path)
        return True
    return False


def _label_column(schema) -> tuple[str, bool]:
    import pyarrow

    label = _label_field(schema, pyarrow.types.is_integer)
    named = None if label else _label_field(schema, _is_text)
    return getattr(label or named, "name", ""), named is not None


def _label_field(schema, is_kind):
    """The most likely label field among those of a kind, or None: `label` before `Label` before `class`."""
    fields = [field for field in schema if is_kind(field.type)]
    fields = [field for field in fields if field.name.casefold() in LABEL_NAMES]
    order = lambda field: (LABEL_NAMES.index(field.name.casefold()), field.name != field.name.casefold())  # noqa: E731
    return min(fields, key=order, default=None)


def _is_text(kind) -> bool:
    import pyarrow

    kind = kind.value_type if pyarrow.types.is_dictionary(kind) else kind
    return any(getattr(pyarrow.types, f"is_{each}")(kind) for each in ("string", "large_string", "string_view"))


@contextlib.contextmanager
def _as_damaged(path: str, row_group: int) -> Iterator[None]:
    """Turn errors of reading a row group into DataError."""
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} is damaged", f"row group {row_group}: {reason}", DOWNLOAD) from error


def _label_names(opened, label: str, path: str) -> tuple[set[str], int]:
    """(the different names in the label column, the number of rows without one)."""
    found, unlabeled = set(), 0
    for number in range(opened.metadata.num_row_groups):
        with _as_damaged(path, number):
            column = opened.read_row_group(number, columns=[label]).column(label)
            new = column.unique().to_pylist()
        found.update(name for name in new if name is not None and name.strip())
        unlabeled += column.null_count
        if any(name is not None and not name.strip() for name in new):  # an empty text is no class
            unlabeled += sum(name is not None and not name.strip() for name in column.to_pylist())
        if len(found) > MAX_NAMES:
            break
    return found, unlabeled


def _class_names(schema, label: str) -> tuple[str, ...]:
    """The class names in Hugging Face's metadata; () if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ()
    names = list(names.values()) if isinstance(names, dict) else names  # the form of some old dataset cards
    return tuple(names) if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _group_sizes(metadata, image: str) -> tuple[np.ndarray, int]:
    """(rows of each row group, bytes of the largest image column chunk)."""
    counts, max_bytes = np.empty(metadata.num_row_groups, np.int64), 0
    parts = [i for i in range(metadata.num_columns) if metadata.schema.column(i).path.split(".")[0] == image]
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        counts[number] = group.num_rows
        max_bytes = max(max_bytes, sum(group.column(part).total_uncompressed_size for part in parts))
    return counts, max_bytes


def _label_range(opened, label: str, path: str) -> tuple[int, int] | None:
    """The smallest and largest label of a file; None if it has no rows or no such column."""
    import pyarrow.compute

    if not label or not opened.metadata.num_rows:
        return None
    lows, highs = [], []
    # nested columns have several leaves
    paths = [opened.metadata.schema.column(i).path for i in range(opened.metadata.num_columns)]
    column = paths.index(label)
    for number in range(opened.metadata.num_row_groups):
        if not opened.metadata.row_group(number).num_rows:
            continue
        statistics = opened.metadata.row_group(number).column(column).statistics
        known = statistics is not None and statistics.has_min_max and statistics.has_null_count
        with _as_damaged(path, number):
            if known:
                low, high, unlabeled = statistics.min, statistics.max, statistics.null_count
            else:
                values = opened.read_row_group(number, columns=[label]).column(label)
                bounds = pyarrow.compute.min_max(values)
                low, high, unlabeled = bounds["min"].as_py(), bounds["max"].as_py(), values.null_count
        if unlabeled or low is None:
            what = f"{path} has {unlabeled} rows without a label"
            raise DataError(what, f"column {label!r}, row group {number}", "label all of them, or none")
        lows.append(low)
        highs.append(high)
    return min(lows), max(highs)


def _classes(ranges: list[tuple[int, int] | None], names: tuple[str, ...], path: str) -> tuple[str, ...]:
    """The class names of labels in these ranges; () if all labels are -1, as in unlabeled test sets."""
    ranges = [each for each in ranges if each]
    if not ranges or all(each == (-1, -1) for each in ranges):
        return ()
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    if low < 0 or high >= (len(names) or MAX_CLASSES):
        bound = len(names) or MAX_CLASSES
        raise DataError(f"labels from {low} to {high}", path, f"number the classes from 0 to {bound - 1}")
    return names or tuple(map(str, range(high + 1)))


def _sample(path: str, metadata) -> str:
    """SHA-256 of the footer and of the beginning of each column chunk.

    The footer has the schema and the offset, size and bounds of each chunk. It does not change if rows of a group are
    exchanged.
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
