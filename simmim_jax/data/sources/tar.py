"""Images in tar files, as WebDataset keeps them: read in place by their offsets, nothing is unpacked.

Members of one shard that share their path up to the first dot of the base name are one sample: an image, and perhaps a
label. The places of a shard's images are kept in the user's cache folder, for to find them all headers must be read.
"""

import bisect
import contextlib
import functools
import hashlib
import itertools
import json
import logging
import os
import re
import shlex
import tarfile
import tempfile
import zipfile

import numpy as np

from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources.files import File, opener, stat_file
from simmim_jax.data.sources.folder import EXTENSIONS
from simmim_jax.data.sources.names import Column, Names, digest_of
from simmim_jax.data.sources.splits import Selection, natural_classes, part_of, require_labels_of_all, select
from simmim_jax.errors import DataError

TARS = (".tar",)
COMPRESSED = {
    ".tar.gz": "gunzip", ".tgz": "gunzip", ".tar.zst": "zstd -d", ".tar.bz2": "bunzip2", ".tar.xz": "xz -d",
    ".tar.lz4": "lz4 -d",
}  # fmt: skip
MOST_CLASSES = 1_000_000
LARGEST_JSON = 2**20  # bytes of a member that is looked into for a label
VERSION = "1"  # of the files in the cache
COLUMNS = {"offsets": np.int64, "sizes": np.int64, "labels": np.int32, "ends": np.int64, "names": np.uint8}


def make_tar(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in tar files, in the order of the files and of their members.

    The label is the integer in the sample's `.cls`, or "label" in its `.json`; all samples have one, or none.

    Raises:
      DataError: for a compressed, truncated or damaged tar file.
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
    return part_of(Tar(selection, split), selection, heldout_fraction)


def _refuse_compressed(path: str) -> None:
    """Raise DataError for the name of a compressed tar file."""
    extension = next((extension for extension in COMPRESSED if path.lower().endswith(extension)), "")
    if extension:
        what = f"{path} is compressed, and random access needs plain tar"
        fix = f"{COMPRESSED[extension]} {shlex.quote(path)}, then python -m simmim_jax.tools.prepare if disks are slow"
        raise DataError(what, "data.path", fix)


class Tar:
    """Images in tar files, by number."""

    def __init__(self, selection: Selection, split: str):
        self.path, self.split = selection.path, split
        self.shards = []  # (name, path, version)
        self.offsets, self.sizes, self.labels = Column(np.int64), Column(np.int64), Column(np.int32)
        self.names, counts, summaries = Names(), [], []
        for name, path in zip(selection.files, selection.absolute(), strict=True):
            version = stat_file(path)
            shard = _index(path, version)
            self.shards.append((name, path, version))
            for column in ("offsets", "sizes", "labels"):
                getattr(self, column).append(shard[column])
            self.names.append(shard["names"], np.diff(shard["ends"], prepend=0))
            counts.append(len(shard["ends"]))
            summaries.append(_summary(shard))
        self.ends = list(itertools.accumulate(counts))
        if not self.ends[-1]:
            what = f"looked for {' '.join(EXTENSIONS)} in {len(counts)} files"
            raise DataError(f"{selection.absolute()[0]} has 0 images", what, "point data.path at tar files of images")
        labelled = sum(each[1] for each in summaries)
        unlabelled = lambda: self.name(int(np.flatnonzero(self.labels.array < 0)[0]))  # noqa: E731
        require_labels_of_all(labelled, len(self), self.path, unlabelled)
        largest = [each[2] for each in summaries]
        if labelled:
            others = selection.absolute(others=True)
            largest += [_summary(_index(path, stat_file(path)))[2] for path in others]
        self.classes = natural_classes(max(largest))

    @functools.cached_property
    def _open(self):
        return opener(File)

    def __getstate__(self) -> dict:  # open files do not travel: each process opens its own
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, i: int) -> dict:
        i = range(len(self))[i]
        _, path, version = self.shards[bisect.bisect_right(self.ends, i)]
        size = int(self.sizes.array[i])
        image = self._open(path, version).read(size, int(self.offsets.array[i]))
        if len(image) < size:
            raise BadImage(f"is cut short: {len(image)} of {size} bytes")
        return {"image": image, "label": int(self.labels.array[i]), "name": self.name(i)}

    def name(self, i: int) -> str:
        return f"{self.shards[bisect.bisect_right(self.ends, i)][0]}/{self.names[i]}"

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        shards = json.dumps([[name, end] for (name, *_), end in zip(self.shards, self.ends, strict=True)]).encode()
        columns = (self.names.bytes, self.names.ends, self.offsets, self.sizes, self.labels)
        digest = digest_of(shards, *(column.array for column in columns))
        return {"source": "tar", "split": self.split, "count": len(self), "index_sha256": digest}


def _summary(shard: dict[str, np.ndarray]) -> tuple[int, int, int]:
    """(count, how many are labelled, the largest label or -1)."""
    labels = shard["labels"]
    return len(labels), int((labels >= 0).sum()), int(labels.max(initial=-1))


def _index(path: str, version: tuple[int, int]) -> dict[str, np.ndarray]:
    """Where the images of a shard are, from the cache if it knows; COLUMNS, of which `names` is all names' bytes."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(home, "simmim_jax", "tar")
    key = hashlib.sha256("\0".join((VERSION, os.path.abspath(path), *map(str, version))).encode(errors="replace"))
    cached = os.path.join(folder, f"{key.hexdigest()[:32]}.npz")
    try:
        with np.load(cached, allow_pickle=False) as arrays:
            shard = {column: arrays[column] for column in COLUMNS}
        if _is_sound(shard, version[0]):
            return shard
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        pass  # not there, or not whole: it is made anew
    shard = _read_headers(path, version[0])
    try:
        os.makedirs(folder, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, suffix=".npz.part", delete=False) as file:
            try:
                np.savez(file, **shard)
                file.close()
                os.replace(file.name, cached)
            except BaseException:
                os.unlink(file.name)
                raise
    except OSError as error:  # a home that is full or read-only costs time, and nothing else
        logging.info("the index of %s is not kept: %s", path, error)
    return shard


def _is_sound(shard: dict[str, np.ndarray], size: int) -> bool:
    ends, offsets, sizes = shard["ends"], shard["offsets"], shard["sizes"]
    return (
        all(array.dtype == COLUMNS[column] and array.ndim == 1 for column, array in shard.items())
        and len(ends) == len(offsets) == len(sizes) == len(shard["labels"])
        and len(shard["names"]) == (ends[-1] if len(ends) else 0)
        and bool((np.diff(ends, prepend=0) >= 0).all())
        and bool(((offsets >= 0) & (sizes >= 0) & (offsets <= size - sizes)).all())
    )


def _read_headers(path: str, size: int) -> dict[str, np.ndarray]:
    """The index of a shard, made from its headers."""
    images: dict[str, tuple[int, int, str]] = {}  # by sample: offset, size, name
    labels: dict[str, int] = {}
    fix = "fetch the file again"
    last = -1
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # it would keep them all
                if member.offset <= last or member.size < 0 or member.offset_data + member.size > size:
                    what = f"{path} is truncated or damaged at byte {member.offset}"
                    raise DataError(what, f"member {member.name!r}", fix)
                last = member.offset
                base = os.path.basename(member.name)
                # links and devices have no bytes of their own, and those of a sparse file do not lie in one piece
                if not member.isreg() or member.issparse() or _is_hidden(member.name):
                    continue
                sample = member.name[: len(member.name) - len(base)] + base.partition(".")[0]
                kind = base.partition(".")[2].lower()
                if base.lower().endswith(EXTENSIONS):
                    images.setdefault(sample, (member.offset_data, member.size, member.name))
                elif kind in ("cls", "json"):
                    label = _label(file.fileno(), member, kind, path)
                    if label >= 0 and (kind == "cls" or sample not in labels):
                        labels[sample] = label
            end = os.pread(file.fileno(), tarfile.BLOCKSIZE, archive.offset)
    except DataError:
        raise
    except Exception as error:  # anybody's bytes, and of these tarfile raises what it trips over
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        start = _first_bytes(path)
        if start.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"BZh", b"\xfd7zXZ")):
            fix = "decompress it"
            raise DataError(f"{path} is compressed, and random access needs plain tar", "data.path", fix) from error
        where = last + 1 if last < 0 else last
        raise DataError(f"{path} is truncated or damaged after byte {where}", reason, fix) from error
    if end.strip(b"\0") or 0 < len(end) < tarfile.BLOCKSIZE:  # the module takes this for the end, silently
        raise DataError(f"{path} is truncated or damaged at byte {archive.offset}", "no header is there", fix)
    if not end:
        logging.warning("%s has no end mark at byte %d: it may be cut short", path, archive.offset)
    names = [os.fsencode(name) for _, _, name in images.values()]
    return {
        "offsets": np.array([offset for offset, _, _ in images.values()], np.int64),
        "sizes": np.array([size for _, size, _ in images.values()], np.int64),
        "labels": np.array([labels.get(sample, -1) for sample in images], np.int32),
        "ends": np.cumsum([len(name) for name in names], dtype=np.int64),
        "names": np.frombuffer(b"".join(names), np.uint8),
    }


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def _label(descriptor: int, member: tarfile.TarInfo, kind: str, path: str) -> int:
    """The label that a member holds, or -1 for a .json without one."""
    text = os.pread(descriptor, min(member.size, LARGEST_JSON), member.offset_data)
    where, fix = f"{path}, member {member.name!r}", f"give a number from 0 to {MOST_CLASSES - 1}"
    if kind == "cls":
        if not re.fullmatch(rb"\s*\d{1,18}\s*", text) or int(text) >= MOST_CLASSES:
            shown = os.fsdecode(text[:40])
            raise DataError(f"label {shown!r} is not the number of a class", where, fix)
        return int(text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError("JSON that cannot be read", where, "mend it, or leave it out") from error
    value = value.get("label", -1) if isinstance(value, dict) else -1
    if isinstance(value, bool) or not isinstance(value, int):
        return -1
    if not -1 <= value < MOST_CLASSES:
        raise DataError(f"label {value} is not the number of a class", where, fix)
    return value


def _first_bytes(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(8)
