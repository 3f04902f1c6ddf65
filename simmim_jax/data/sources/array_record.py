"""Images in ArrayRecord files: prepared folders (`simmim_jax.tools.prepare`), and those of others.

A prepared folder has a manifest, which says how many records each shard has, so that no shard is opened to begin.
"""

import functools
import hashlib
import json
import logging
import os

import msgpack
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources.files import changed, opener, stat_file
from simmim_jax.data.sources.splits import EVALUATION, Selection, part_of, select
from simmim_jax.errors import DataError

ARRAY_RECORDS = (".array_record", ".arrayrecord")
MANIFEST, FORMAT, VERSION = "manifest.json", "simmim_jax.prepared", 1
PLAN = ".prepare.json"  # which `prepare` removes when it is done
PREPARE = "prepare the folder again: python -m simmim_jax.tools.prepare"
IMAGE_NAMES = ("image/encoded", "image", "jpg", "jpeg", "png", "webp", "img", "image_raw", "encoded", "image_bytes")
LABEL_NAMES = ("image/class/label", "label", "labels", "cls", "class", "fine_label", "target")
# Shards are read at random: nothing is read ahead, and no threads are woken for one record.
OPTIONS = "readahead_buffer_size:0,max_parallelizm:0"
BUFFER = 2**15  # bytes that are read at a time
KEPT = 2**22  # places of records, of 8 bytes each, that a process holds
TAIL = 2**16  # bytes at a file's end, which say where its records are


def make_array_record(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in ArrayRecord files, in the order of the files and of their records.

    A prepared folder is known by its manifest. In files of others, a record is the bytes of an image, or a
    tf.train.Example that has them; such labels are given as they are, and `classes` are unknown.

    Raises:
      DataError: where a shard is missing, truncated, or not what the manifest says, or a prepare is unfinished.
    """
    refuse_unfinished(path)
    selection = select(path, split, (*ARRAY_RECORDS, MANIFEST), "array_record")
    return part_of(ArrayRecords(selection, split), selection, heldout_fraction)


def refuse_unfinished(path: str) -> None:
    """Raise DataError if a prepare of this folder, or of a split in it, has not come to its end."""
    path = os.path.abspath(os.path.expanduser(path))
    for folder in (path, *(os.path.join(path, side) for side in ("train", *EVALUATION))):
        if os.path.exists(os.path.join(folder, PLAN)):
            fix = "run the same simmim_jax.tools.prepare again, which goes on"
            raise DataError(f"{folder} is not prepared to its end", "data.path", fix)


def read_manifest(folder: str) -> dict | None:
    """The manifest of a prepared folder; None where there is none of ours.

    Raises:
      DataError: for one that is damaged, or of a later version.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read", reason, PREPARE) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return None
    if manifest.get("version") != VERSION:
        what = f"{path} has version {manifest.get('version')!r}, and this program knows {VERSION}"
        raise DataError(what, "data.path", "update simmim_jax, or prepare the folder again")
    try:
        shards, classes = manifest["shards"], manifest["classes"]
        sound = all(isinstance(name, str) for name in classes)
        for shard in shards:
            name = shard["file"]
            sound &= isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")
            sound &= isinstance(shard["sha256"], str) and _is_count(shard["count"]) and _is_count(shard["bytes"])
        sound &= sum(shard["count"] for shard in shards) == manifest["count"]
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise DataError(f"{path} is damaged", "it does not say what a manifest must", PREPARE)
    return manifest


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


class ArrayRecords:
    """Records of ArrayRecord files, of one form: `prepared`, `image` or `example`."""

    def __init__(self, selection: Selection, split: str):
        self.path, self.split = selection.path, split
        manifests, files = [], []
        for file in selection.files:
            (manifests if os.path.basename(file) == MANIFEST else files).append(file)
        folders = dict.fromkeys(os.path.dirname(file) for file in manifests)
        prepared = {folder: read_manifest(os.path.join(selection.root, folder)) for folder in folders}
        prepared = {folder: manifest for folder, manifest in prepared.items() if manifest}
        self.classes, self.form = (), "prepared"
        if prepared:
            shards = self._take_prepared(selection, prepared)
        else:
            shards = [_count(os.path.join(selection.root, file)) for file in files]
        self.root = selection.root
        self.names = [os.path.relpath(shard["path"], selection.root) for shard in shards]
        self.versions = np.array([shard["version"] for shard in shards], np.int64).reshape(-1, 2)
        self.ends = np.cumsum([shard["count"] for shard in shards], dtype=np.int64)
        if not self.ends.sum():
            raise DataError(f"{self.path} has 0 images", f"split {split!r}", "point data.path at files with records")
        listed = [[shard["count"], shard["sha256"]] for shard in shards]
        if not prepared:  # the name of such a record is made of its shard's
            listed = [[name, *each] for name, each in zip(self.names, listed, strict=True)]
            self._take_foreign()
        self.digest = hashlib.sha256(json.dumps(listed).encode()).hexdigest()

    def _take_prepared(self, selection: Selection, prepared: dict[str, dict]) -> list[dict]:
        shards = []
        for folder, manifest in prepared.items():
            for shard in manifest["shards"]:
                path = os.path.join(selection.root, folder, shard["file"])
                if not os.path.exists(path):
                    raise DataError(f"{path} is missing", f"{MANIFEST} has it", f"copy it again, or {PREPARE}")
                version = stat_file(path)
                if version[0] != shard["bytes"]:
                    what = f"{path} has {version[0]} bytes, and {MANIFEST} says {shard['bytes']}"
                    raise DataError(what, "data.path", f"copy it again, or {PREPARE}")
                shards.append(shard | {"path": path, "version": version})
            classes = tuple(manifest["classes"])
            if self.classes and classes != self.classes:
                raise DataError("folders of different classes", self.path, "give folders of one data set")
            self.classes = classes
        return shards

    def _take_foreign(self) -> None:
        path, first = os.path.join(self.root, self.names[self._shard(0)]), self._raw(0)
        self.form = "image" if _is_image(first) else "example"
        if self.form == "example" and _is_prepared(first):
            manifest = read_manifest(os.path.dirname(path))
            if not manifest:
                what = f"{os.path.dirname(path)} is unfinished: it has no {MANIFEST}"
                raise DataError(what, "data.path", PREPARE)
            self.form, self.classes = "prepared", tuple(manifest["classes"])
        elif self.form == "example":
            features = _features(first)
            if features is None or not _image_in(features):
                has = (
                    f"features: {', '.join(sorted(features)[:20])}" if features else "it is no tf.train.Example either"
                )
                fix = "give records that are encoded images, or Examples with image/encoded"
                raise DataError(f"{path}: the first record has no image", has, fix)

    @functools.cached_property
    def _open(self):
        # an open shard holds the place of each record
        return opener(_open, max(16, KEPT * len(self.names) // len(self)))

    def __getstate__(self) -> dict:  # open files do not travel: each process opens its own
        return {key: value for key, value in self.__dict__.items() if key != "_open"}

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def _raw(self, i: int) -> bytes:
        i = range(len(self))[i]
        shard = self._shard(i)
        place = i - int(self.ends[shard - 1] if shard else 0)
        try:
            # as a range, for of a list of one the reader looks at every record's place
            reader = self._open(os.path.join(self.root, self.names[shard]), tuple(self.versions[shard].tolist()))
            return reader.read(place, place + 1)[0]
        except (RuntimeError, IndexError) as error:  # one damaged record; the others can be read
            raise BadImage(" ".join(str(error).split())[:200]) from error

    def __getitem__(self, i: int) -> dict:
        raw = self._raw(i)
        if self.form == "prepared":
            return _unpack(raw, len(self.classes) or None)
        if _is_image(raw):
            return {"image": raw, "label": -1, "name": self._place(i)}
        features = _features(raw)
        image = _image_in(features) if features else b""
        if not image:
            raise BadImage("its record has no encoded image")
        return {"image": image, "label": _label_in(features), "name": self._place(i)}

    def name(self, i: int) -> str:
        """The name that the image had, or its place in its shard."""
        if self.form == "prepared":
            try:
                return _unpack(self._raw(i), len(self.classes) or None)["name"]
            except (BadImage, OSError):
                pass  # a record that cannot be read is named by its place
        return self._place(i)

    def _place(self, i: int) -> str:
        shard = self._shard(i)
        return f"{self.names[shard]}/{i - int(self.ends[shard - 1] if shard else 0)}"

    def describe(self) -> str:
        return f"{self.path}, split {self.split} ({len(self)} images)"

    def fingerprint(self) -> dict:
        return {"source": "array_record", "split": self.split, "count": len(self), "shards_sha256": self.digest}


def _open(path: str, version: tuple[int, int]) -> ArrayRecordReader:
    """A reader, or a DataError where the file is damaged, or not of this version any more."""
    if stat_file(path) != version:
        raise changed(path)
    fix = "fetch the file again, or prepare the folder again"
    try:
        reader = ArrayRecordReader(path, options=OPTIONS, file_reader_buffer_size=BUFFER)
        reader.num_records()
        whole = reader.ok()
        reason = "its end is not that of an ArrayRecord file"
    except (RuntimeError, ValueError) as error:
        whole, reason = False, " ".join(str(error).split())[:200]
    if not whole:
        raise DataError(f"{path} is truncated or damaged", reason, fix)
    return reader


def _count(path: str) -> dict:
    """What a manifest would say of a shard, as far as it can be found without reading all of it."""
    version = stat_file(path)
    reader = _open(path, version)
    count = reader.num_records()
    if "group_size:1," not in reader.writer_options_string() + "," and reader.writer_options_string():
        logging.warning("%s holds its records in groups, of which each image takes a whole one: %s", path, PREPARE)
    with open(path, "rb") as file:
        file.seek(max(0, version[0] - TAIL))
        digest = hashlib.sha256(f"{version[0]}".encode() + file.read()).hexdigest()
    return {"path": path, "version": version, "count": count, "sha256": digest}


def _is_image(raw: bytes) -> bool:
    """Whether these are the first bytes of a file that `decode` may take."""
    starts = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"BM", b"II*\0", b"MM\0*", b"GIF8")
    return raw.startswith(starts) or (raw[:4] == b"RIFF" and raw[8:12] == b"WEBP")


def _is_prepared(raw: bytes) -> bool:
    try:
        _unpack(raw, None)
    except BadImage:
        return False
    return True


def _unpack(raw: bytes, classes: int | None) -> dict:
    """The record that `simmim_jax.tools.prepare` wrote; of labels at most so many, None for any."""
    try:
        record = msgpack.unpackb(raw, raw=False, unicode_errors="surrogateescape")
        image, label, name = record["image"], record["label"], record["name"]
        shape = record.get("shape")
    except Exception as error:  # the bytes may be anybody's
        raise BadImage("its record is damaged") from error
    right = isinstance(image, bytes) and isinstance(name, str) and isinstance(label, int)
    if not right or label < -1 or (classes is not None and label >= classes):
        raise BadImage("its record is damaged")
    if shape is not None:
        try:
            image = np.frombuffer(image, np.uint8).reshape(shape)
        except (TypeError, ValueError) as error:
            raise BadImage(f"its record has {len(image)} bytes of pixels for the shape {shape!r}"[:200]) from error
    return {"image": image, "label": label, "name": name}


def _features(raw: bytes) -> dict | None:
    """The features of a tf.train.Example, by name; None where it is none."""
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return dict(tf_example_pb2.Example.FromString(raw).features.feature)
    except Exception:  # protobuf's DecodeError, for which there would be another import
        return None


def _image_in(features: dict) -> bytes:
    for name in IMAGE_NAMES:
        if name in features and features[name].bytes_list.value:
            return features[name].bytes_list.value[0]
    return b""


def _label_in(features: dict) -> int:
    for name in LABEL_NAMES:
        if name in features and features[name].int64_list.value:
            return int(features[name].int64_list.value[0])
    return -1
