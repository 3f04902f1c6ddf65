"""Images in tar files of WebDataset's layout, read in place by their offsets, without extraction.

Consecutive members with the same key, the path up to the first dot of the base name, are one sample: an image, and
optionally a label. Finding the offsets takes a pass over all headers, so the index of a shard is stored in the user's
cache folder.

Reading headers, grouping samples and caching the index are in one file because they share its columns.
"""

import array
import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import shlex
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import BinaryIO, NamedTuple

import numpy as np

from simmim_jax.data.decode import EXTENSIONS, BadImage
from simmim_jax.data.sources.classes import NUMBER, order_classes
from simmim_jax.data.sources.files import File, make_opener, stat_file
from simmim_jax.data.sources.listing import is_hidden
from simmim_jax.data.sources.names import Column, Names, digest_of
from simmim_jax.data.sources.parts import FileSource, make_part
from simmim_jax.data.sources.splits import MAX_CLASSES, Selection, select
from simmim_jax.data.sources.unread import Unread, kind_of_file, report
from simmim_jax.errors import DataError

TARS = (".tar",)
COMPRESSED = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.zst": "zstd -d", ".tar.bz2": "bunzip2", ".tar.xz": "xz -d",
    ".tar.lz4": "lz4 -d",
}  # fmt: skip
MAX_JSON = 2**20  # bytes of a member that is searched for a label
SAMPLE = 4096  # bytes read at an offset to detect other content
DOWNLOAD = "download the file again"
VERSION = "3"  # of the files in the cache
COLUMNS = {
    "offsets": np.int64, "sizes": np.int64, "labels": np.int32, "ends": np.int64, "names": np.uint8,
    "sampled": np.uint8, "passed": np.uint8, "texts": np.uint8,
}  # fmt: skip


def make_tar(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in tar files, in the order of the files and of their members.

    The label is the integer or the class name in the sample's `.cls`, or "label" in its `.json`. Either all samples of
    a split have one, or none.

    Raises DataError for a compressed, truncated or damaged tar file.
    """
    try:
        selection = select(path, split, TARS, "tar")
    except DataError:
        compressed = ""
        with contextlib.suppress(DataError):
            compressed = select(path, split, tuple(COMPRESSED), "tar").absolute()[0]
        _refuse_compressed(compressed)
        raise
    _refuse_compressed(selection.absolute()[0])
    return make_part(Tar(selection, split), selection, heldout_fraction)


def _refuse_compressed(path: str) -> None:
    """Raise DataError if the name is that of a compressed tar file."""
    extension = next((extension for extension in COMPRESSED if path.lower().endswith(extension)), "")
    if extension:
        what = f"{path} is compressed, but random access needs an uncompressed tar file"
        fix = f"{COMPRESSED[extension]} {shlex.quote(path)}, then python -m simmim_jax.tools.prepare if disks are slow"
        raise DataError(what, "data.path", fix)


class Tar(FileSource):
    """Images in tar files."""

    def __init__(self, selection: Selection, split: str):
        self.path, self.split = selection.path, split
        self.shards = []  # (name, path, version)
        self.offsets, self.sizes, self.labels = Column(np.int64), Column(np.int64), Column(np.int32)
        self.names, counts, labels, sampled, unread = Names(), [], [], [], Unread()
        for name, path in zip(selection.files, selection.absolute(), strict=True):
            version = stat_file(path)
            shard = _index(path, version[0])
            self.shards.append((name, path, version))
            for column in ("offsets", "sizes"):
                getattr(self, column).append(shard[column])
            self.names.append(shard["names"], np.diff(shard["ends"], prepend=0))
            counts.append(len(shard["ends"]))
            labels.append(_read_labels(shard))
            sampled.append(shard["sampled"])
            for why, (count, first) in json.loads(shard["passed"].tobytes()).items():
                unread.add(why, os.path.join(path, first), count=count)
        self.ends, self.sampled = list(itertools.accumulate(counts)), digest_of(*sampled)
        if not self.ends[-1]:
            what = f"looked for {' '.join(EXTENSIONS)} in {len(counts)} files"
            what = f"it has {unread.describe(selection.root)}" if unread.found else what
            raise DataError(f"{selection.absolute()[0]} has 0 images", what, "point data.path at tar files of images")
        report(selection.root, unread, f"split {split}")
        labeled = sum(int((numbers >= 0).sum()) for numbers, _ in labels)
        if 0 < labeled < len(self):
            unlabeled = self.name(int(np.argmax(np.concatenate([numbers for numbers, _ in labels]) < 0)))
            what = f"{labeled} of {len(self)} images have a label, and {unlabeled} has none"
            raise DataError(what, self.path, "label all of them, or none")
        others = selection.absolute(others=True) if labeled else []
        self.classes, number = _number_classes([*labels, *(_read_labels(_index(p, stat_file(p)[0])) for p in others)])
        self.by_name = any(texts for _, texts in labels)
        for numbers, texts in labels:
            self.labels.append(number(numbers, texts))
        if not self.classes:
            self.unlabeled = "give each sample a .cls with its class"

    @functools.cached_property
    def _open(self):
        return make_opener(File)

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        _, path, version = self.shards[bisect.bisect_right(self.ends, i)]
        size = int(self.sizes.array[i])
        image = self._open(path, version).read(size, int(self.offsets.array[i]))
        if len(image) < size:
            raise BadImage(f"is truncated: {len(image)} of {size} bytes")
        return {"image": image, "label": int(self.labels.array[i]), "name": self.name(i)}

    def all_labels(self) -> np.ndarray:
        return self.labels.array

    def files(self) -> list[str]:
        return [path for _, path, _ in self.shards]

    def name(self, i: int) -> str:
        return f"{self.shards[bisect.bisect_right(self.ends, i)][0]}/{self.names[i]}"

    def fingerprint(self) -> dict:
        shards = json.dumps([[name, end] for (name, *_), end in zip(self.shards, self.ends, strict=True)]).encode()
        columns = (self.names.bytes, self.names.ends, self.offsets, self.sizes, self.labels)
        digest = digest_of(shards, *(column.array for column in columns))
        hashes = {"index_sha256": digest, "sampled_sha256": self.sampled}
        return {"source": "tar", "split": self.split, "count": len(self)} | hashes


Labels = tuple[np.ndarray, tuple[str, ...]]  # numbers by image, -1 for none; the names of these numbers, or ()


def _read_labels(shard: dict[str, np.ndarray]) -> Labels:
    return shard["labels"], tuple(json.loads(shard["texts"].tobytes()))


def _number_classes(labels: list[Labels]) -> tuple[tuple[str, ...], Callable[..., np.ndarray]]:
    """(the names of the classes of all shards, a function from the labels of a shard to numbers of classes)."""
    if not any(texts for _, texts in labels):
        largest = max(int(numbers.max(initial=-1)) for numbers, _ in labels)
        return tuple(map(str, range(largest + 1))), lambda numbers, _: numbers
    found = (texts or map(str, np.unique(numbers[numbers >= 0])) for numbers, texts in labels)
    classes = order_classes(itertools.chain(*found))
    number_of = {name: number for number, name in enumerate(classes)}

    def number(numbers: np.ndarray, texts: tuple[str, ...]) -> np.ndarray:
        names = texts or tuple(map(str, range(int(numbers.max(initial=-1)) + 1)))
        return np.array([*(number_of.get(name, -1) for name in names), -1])[numbers]  # [-1] is -1

    return classes, number


def _index(path: str, size: int) -> dict[str, np.ndarray]:
    """The index of a shard, from the cache if it is there: the arrays of COLUMNS.

    `names` has the joined bytes of all names, `sampled` a hash of parts of some images, and `passed` the skipped
    members as JSON: {reason: [count, name of the first]}.
    """
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(home, "simmim_jax", "tar")
    try:
        with open(path, "rb") as file:
            cached = os.path.join(folder, f"{_key(path, file.fileno())}.npz")
            with contextlib.suppress(OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
                with np.load(cached, allow_pickle=False) as arrays:
                    shard = {column: arrays[column] for column in COLUMNS}
                if _is_valid(shard, size):
                    return shard
            shard = _read_headers(file, path, size)  # no cached index, or a damaged one
    except OSError as error:
        raise DataError(f"{path} cannot be read", error.strerror or type(error).__name__, DOWNLOAD) from error
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz.part", delete=False) as part:
            try:
                np.savez(part, **shard)
                part.close()
                os.replace(part.name, cached)
            except BaseException:
                os.unlink(part.name)
                raise
    except OSError as error:  # a full or read-only home only costs time
        logging.info("the index of %s is not cached: %s", path, error)
    return shard


def _key(path: str, descriptor: int) -> str:
    """The key of a shard in the cache: a hash of its path, its file system attributes, and some of its bytes."""
    status = os.fstat(descriptor)
    tail = tarfile.RECORDSIZE + SAMPLE  # padding may take up to a record
    parts = ((0, SAMPLE), (status.st_size // 2, SAMPLE), (max(0, status.st_size - tail), tail))
    attributes = "\0".join((VERSION, os.path.abspath(path), *map(str, _identity(status))))
    return digest_of(attributes.encode(errors="replace"), *_read_parts(descriptor, parts))[:32]


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_ctime_ns


def _read_parts(descriptor: int, parts: Iterable[tuple[int, int]]) -> list[bytes]:
    return [os.pread(descriptor, size, offset) for offset, size in parts]


def _is_valid(shard: dict[str, np.ndarray], size: int) -> bool:
    ends, offsets, sizes = shard["ends"], shard["offsets"], shard["sizes"]
    return (
        all(array.dtype == COLUMNS[column] and array.ndim == 1 for column, array in shard.items())
        and len(ends) == len(offsets) == len(sizes) == len(shard["labels"])
        and len(shard["names"]) == (ends[-1] if len(ends) else 0)
        and bool((np.diff(ends, prepend=0) >= 0).all())
        and isinstance(json.loads(shard["passed"].tobytes()), dict)
        and bool(((offsets >= 0) & (sizes >= 0) & (offsets <= size - sizes)).all())
    )


def _read_headers(file: BinaryIO, path: str, size: int) -> dict[str, np.ndarray]:
    """Make the index of a shard from its headers."""
    offsets, sizes, ends = (array.array("q") for _ in range(3))
    names, labels, skipped = bytearray(), [], {}
    for sample in _samples(_files(file, path, size, skipped)):
        chosen = _images(sample)
        for image, sidecars in chosen:
            offsets.append(image.offset)
            sizes.append(image.size)
            labels.append(_label(file.fileno(), sidecars, path))
            names += os.fsencode(image.name)
            ends.append(len(names))
        used = {image.name for image, _ in chosen}
        for member in sample:
            if member.is_image and member.name not in used:
                _skip(skipped, "further images of a sample", member.name)
            elif not chosen and _holds_label(file.fileno(), member, path):
                _skip(skipped, "labels without an image", member.name)
    # from the middle of an image, because the first bytes of many images are equal
    some = sorted({0, len(sizes) // 2, len(sizes) - 1}) if sizes else []
    parts = [(offsets[i] + max(0, sizes[i] - SAMPLE) // 2, min(sizes[i], SAMPLE)) for i in some]
    sampled = hashlib.sha256(b"".join(_read_parts(file.fileno(), parts))).digest()
    found = order_classes(str(label) for label in labels if label != -1) if any(map(_is_text, labels)) else ()
    number_of = {name: number for number, name in enumerate(found)} | {"-1": -1}
    numbers = [number_of[str(label)] for label in labels] if found else labels
    arrays = {"offsets": offsets, "sizes": sizes, "labels": numbers, "ends": ends}
    texts = {"names": names, "sampled": sampled, "passed": json.dumps(skipped).encode()}
    texts["texts"] = json.dumps(found).encode()
    return {column: np.array(values, COLUMNS[column]) for column, values in arrays.items()} | {
        column: np.frombuffer(text, np.uint8) for column, text in texts.items()
    }


def _skip(skipped: dict[str, list], why: str, name: str, count: int = 1) -> None:
    skipped.setdefault(why, [0, name])[0] += count


def _members(file: BinaryIO, path: str, size: int) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file of `size` bytes, which may be several tar files joined by `cat`."""
    start, last = 0, -1
    while start is not None:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                while (member := archive.next()) is not None:
                    archive.members = []  # the module would store all of them
                    if member.offset <= last or member.size < 0 or member.offset_data + member.size > size:
                        what = f"{path} is truncated or damaged at byte {member.offset}"
                        raise DataError(what, f"member {member.name!r}", DOWNLOAD)
                    last = member.offset
                    yield member
        except DataError:
            raise
        except Exception as error:  # the bytes are untrusted, and tarfile raises exceptions of any type
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            if os.pread(file.fileno(), 8, 0).startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
                what = f"{path} is compressed, but random access needs an uncompressed tar file"
                raise DataError(what, "data.path", "decompress it") from error
            raise DataError(f"{path} is truncated or damaged after byte {max(last, 0)}", reason, DOWNLOAD) from error
        start = _start_after(file.fileno(), path, archive.offset)


def _start_after(descriptor: int, path: str, offset: int) -> int | None:
    """The offset of the next tar file after the end marker at `offset`; None if only zeros follow."""
    end = os.pread(descriptor, tarfile.BLOCKSIZE, offset)
    if end.strip(b"\0") or 0 < len(end) < tarfile.BLOCKSIZE:  # the module silently stops here
        raise DataError(f"{path} is truncated or damaged at byte {offset}", "there is no header", DOWNLOAD)
    if not end:
        logging.warning("%s has no end marker at byte %d: it may be truncated", path, offset)
    while part := os.pread(descriptor, 2**20, offset):
        offset += len(part) - len(rest := part.lstrip(b"\0"))
        if rest:
            return offset - offset % tarfile.BLOCKSIZE
    return None


class Member(NamedTuple):
    """A file in a shard. `kind` is the part of the name after the dot that ends the `key`, in lower case."""

    name: str
    key: str
    kind: str
    offset: int
    size: int

    @property
    def is_image(self) -> bool:
        return self.name.lower().endswith(EXTENSIONS)

    @property
    def stem(self) -> str:
        return self.kind.rpartition(".")[0]


def _files(file: BinaryIO, path: str, size: int, skipped: dict[str, list]) -> Iterator[Member]:
    """The members of a shard that may belong to a sample."""
    places: dict[str, tuple[int, int]] | None = None  # by name, filled at the first hard link: most shards have none
    for member in _members(file, path, size):
        place, why = None, "images that are links or devices"
        if member.islnk():
            places = _places(file, path, size, member.offset) if places is None else places
            place = places.get(member.linkname)
        elif member.isreg():
            place, why = _place(member), "images that are sparse files"  # their bytes are not contiguous
        if place and places is not None:
            places[member.name] = place
        folder, base = os.path.split(member.name)
        stem, dot, kind = base.partition(".")
        if member.isdir() or not base or _is_hidden(member.name):
            continue
        if what := kind_of_file(base) if dot else "":
            _skip(skipped, what, member.name)
        if not dot:
            continue
        if place:
            yield Member(member.name, os.path.join(folder, stem), kind.lower(), *place)
        elif base.lower().endswith(EXTENSIONS):
            _skip(skipped, why, member.name)


def _place(member: tarfile.TarInfo) -> tuple[int, int] | None:
    return (member.offset_data, member.size) if member.isreg() and not member.issparse() else None


def _places(file: BinaryIO, path: str, size: int, end: int) -> dict[str, tuple[int, int]]:
    """(offset, size) of each file before `end`, by name; the last one if a name occurs twice."""
    before = itertools.takewhile(lambda member: member.offset < end, _members(file, path, size))
    return {member.name: place for member in before if (place := _place(member))}


def _samples(members: Iterable[Member]) -> Iterator[list[Member]]:
    """Group members by sample like WebDataset: a new key, or a kind that the sample already has, begins a new one."""
    key, sample = "", {}
    for member in members:
        if sample and (member.key != key or member.kind in sample):
            yield list(sample.values())
            sample = {}
        key, sample[member.kind] = member.key, member
    if sample:
        yield list(sample.values())


def _images(sample: list[Member]) -> list[tuple[Member, list[Member]]]:
    """The images used from a sample, each with the members that may hold its label.

    If the key also has members that are not images, one image is used: 0.jpg rather than 0.depth.png. Otherwise all are
    used, because the names differ in their extension, 0.jpg and 0.png, or contain dots, v1.0_000.jpg and v1.0_001.jpg.
    """
    images = [member for member in sample if member.is_image]
    plain = [image for image in images if not image.stem]
    sidecars: dict[str, list[Member]] = {}
    for member in sample:
        if not member.is_image:
            sidecars.setdefault(member.stem, []).append(member)
    if plain or "" in sidecars:
        chosen = plain or images
        return [(image, sidecars.get("", [])) for image in (chosen[:1] if sidecars else chosen)]
    return [(image, sidecars.get(image.stem, [])) for image in images]


def _is_hidden(name: str) -> bool:
    *above, base = (part for part in name.split("/") if part not in (".", ".."))
    return base.startswith(".") or any(map(is_hidden, above))


def _is_text(label: int | str) -> bool:
    return isinstance(label, str)


def _label(descriptor: int, sidecars: list[Member], path: str) -> int | str:
    """The label in a .cls, or else in a .json: a number or the name of a class, or -1."""
    labels = {}
    for member in sidecars:
        kind = member.kind.rpartition(".")[2]
        if kind in ("cls", "json"):
            text = os.pread(descriptor, min(member.size, MAX_JSON), member.offset)
            parse = _parse_cls if kind == "cls" else _parse_json
            labels[kind] = _class(parse(text, where := f"{path}, member {member.name!r}"), where)
    return labels.get("cls", labels.get("json", -1))


def _holds_label(descriptor: int, member: Member, path: str) -> bool:
    with contextlib.suppress(DataError):
        return _label(descriptor, [member], path) != -1
    return False


def _parse_cls(text: bytes, where: str) -> str | None:
    return os.fsdecode(text.strip()) or None


def _parse_json(text: bytes, where: str) -> object:
    """The value of "label", or None."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("invalid JSON", where, "repair it, or leave it out") from error
    value = value.get("label") if isinstance(value, dict) else None
    return None if value == -1 or value == "" else value


def _class(value: object, where: str) -> int | str:
    """A label from its value in a file: a number, the name of a class, or -1 for None. Raises DataError for others."""
    if value is None:
        return -1
    text = str(value).strip()
    several = len(text.split()) > 1 and all(map(NUMBER.fullmatch, text.split()))
    is_number = bool(NUMBER.fullmatch(text))
    if isinstance(value, bool) or not isinstance(value, int | str) or several or (is_number and not text.isdecimal()):
        raise _label_error(repr(value)[:60], where)
    if is_number and (len(text) > 18 or int(text) >= MAX_CLASSES):
        raise _label_error(repr(value)[:60], where)
    return int(text) if is_number else text


def _label_error(shown: str, where: str) -> DataError:
    fix = f"give one number from 0 to {MAX_CLASSES - 1}, or the name of a class"
    return DataError(f"label {shown} is not a class", where, fix)
