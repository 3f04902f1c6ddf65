"""Images in ArrayRecord files: prepared folders (`simmim_jax.data.prepared`), and files of other programs."""

import functools
import json
import logging
import os

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from simmim_jax.data.decode import BadImage
from simmim_jax.data.prepared import MANIFEST, PLAN, PREPARE, read_manifest, unpack_record
from simmim_jax.data.sources.classes import are_unlabeled
from simmim_jax.data.sources.files import changed_error, make_opener, read_tail, stat_file
from simmim_jax.data.sources.names import digest_of
from simmim_jax.data.sources.parts import FileSource, make_part
from simmim_jax.data.sources.splits import EVALUATION, Selection, select
from simmim_jax.data.sources.unread import is_image
from simmim_jax.errors import DataError

ARRAY_RECORDS = (".array_record", ".arrayrecord")
IMAGE_NAMES = ("image/encoded", "image", "jpg", "jpeg", "png", "webp", "img", "image_raw", "encoded", "image_bytes")
LABEL_NAMES = ("image/class/label", "label", "labels", "cls", "class", "fine_label", "target")
# For random access: no readahead, and no threads for one record.
OPTIONS = "readahead_buffer_size:0,max_parallelism:0"
BUFFER = 2**15  # bytes read at a time
MAX_OFFSETS = 2**22  # offsets of records, of 8 bytes each, in the memory of a process


def make_array_record(*, path: str, split: str, heldout_fraction: float, **_):
    """The images in ArrayRecord files, in the order of the files and of their records.

    A prepared folder is recognized by its manifest. In other files, a record is an encoded image, or a tf.train.Example
    with one. Their labels are returned as they are, and `classes` is ().

    Raises DataError if a shard is missing, truncated or differs from the manifest, or if a prepare is unfinished.
    """
    check_finished(path)
    selection = select(path, split, (*ARRAY_RECORDS, MANIFEST), "array_record")
    return make_part(ArrayRecords(selection, split), selection, heldout_fraction)


def check_finished(path: str) -> None:
    """Raise DataError if a prepare of this folder, or of a split in it, is unfinished."""
    path = os.path.abspath(os.path.expanduser(path))
    for folder in (path, *(os.path.join(path, side) for side in ("train", *EVALUATION))):
        if os.path.exists(os.path.join(folder, PLAN)):
            fix = "run the same simmim_jax.tools.prepare command again, which continues"
            raise DataError(f"{folder} is not completely prepared", "data.path", fix)


class ArrayRecords(FileSource):
    """Records of ArrayRecord files. `form` is prepared, image or example, the same for all of them."""

    def __init__(self, selection: Selection, split: str):
        self.path, self.split, self.root = selection.path, split, selection.root
        folders = [os.path.dirname(file) for file in selection.files if os.path.basename(file) == MANIFEST]
        prepared = {folder: read_manifest(os.path.join(self.root, folder)) for folder in dict.fromkeys(folders)}
        prepared = {folder: manifest for folder, manifest in prepared.items() if manifest}
        self.classes, self.form, self.pixels = (), "prepared", {}
        if prepared:
            shards = self._list_prepared(prepared)
        else:
            files = (file for file in selection.files if os.path.basename(file) != MANIFEST)
            shards = [_inspect(os.path.join(self.root, file)) for file in files]
        self.names = [os.path.relpath(shard["path"], self.root) for shard in shards]
        self.versions = np.array([shard["version"] for shard in shards], np.int64).reshape(-1, 2)
        self.ends = np.cumsum([shard["count"] for shard in shards], dtype=np.int64)
        if not self.ends.sum():
            raise DataError(f"{self.path} has 0 images", f"split {split!r}", "point data.path at files with records")
        listed = [[shard["count"], shard["sha256"]] for shard in shards]
        if not prepared:  # names of such records depend on the names of the shards
            listed = [[name, *each] for name, each in zip(self.names, listed, strict=True)]
            self._detect_form()
        self.digest = digest_of(json.dumps(listed).encode())
        if self.classes and are_unlabeled(self):
            self.classes, self.unlabeled = (), f"the images had no labels when {self.path} was prepared"
        elif not self.classes:
            self.unlabeled = "if the records have labels, prepare them: python -m simmim_jax.tools.prepare"

    def _list_prepared(self, prepared: dict[str, dict]) -> list[dict]:
        shards = []
        for folder, manifest in prepared.items():
            if sum(shard["count"] for shard in manifest["shards"]) != manifest["count"]:
                what = f"{os.path.join(self.root, folder, MANIFEST)} is damaged"
                raise DataError(what, "its count is not the sum over its shards", PREPARE)
            for shard in manifest["shards"]:
                path = os.path.join(self.root, folder, shard["file"])
                if not os.path.exists(path):
                    raise DataError(f"{path} is missing", f"{MANIFEST} lists it", f"copy it again, or {PREPARE}")
                version = stat_file(path)
                if version[0] != shard["bytes"]:
                    what = f"{path} has {version[0]} bytes, but {shard['bytes']} in {MANIFEST}"
                    raise DataError(what, "data.path", f"copy it again, or {PREPARE}")
                shards.append(shard | {"path": path, "version": version})
            classes = tuple(manifest["classes"])
            if self.classes and classes != self.classes:
                raise DataError("folders with different classes", self.path, "give folders of one data set")
            self.classes = classes
            self.pixels = {name: manifest[name] for name in ("mean", "std", "pixels") if manifest.get("pixels")}
        return shards

    def _detect_form(self) -> None:
        path, first = os.path.join(self.root, self.names[self._shard(0)]), self._raw(0)
        self.form = "image" if is_image(first) else "example"
        if self.form == "example" and _is_prepared(first):
            manifest = read_manifest(os.path.dirname(path))
            if not manifest:
                what = f"{os.path.dirname(path)} is unfinished: it has no {MANIFEST}"
                raise DataError(what, "data.path", PREPARE)
            self.form, self.classes = "prepared", tuple(manifest["classes"])
        elif self.form == "example":
            features = _features(first)
            if features is None or not _image_feature(features):
                where = f"features: {', '.join(sorted(features)[:20])}" if features else "it is no tf.train.Example"
                fix = "give records that are encoded images, or Examples with image/encoded"
                raise DataError(f"{path}: the first record has no image", where, fix)

    @functools.cached_property
    def _open(self):
        # an open shard holds the offset of each of its records
        return make_opener(_open, max(16, MAX_OFFSETS * len(self.names) // len(self)))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _shard(self, i: int) -> int:
        return int(np.searchsorted(self.ends, i, side="right"))

    def _raw(self, i: int) -> bytes:
        i = range(len(self))[i]
        shard = self._shard(i)
        offset = i - int(self.ends[shard - 1] if shard else 0)
        try:
            reader = self._open(os.path.join(self.root, self.names[shard]), tuple(self.versions[shard].tolist()))
            return reader.read(offset, offset + 1)[0]  # for a list of one, the reader looks up every record
        except (RuntimeError, IndexError) as error:  # one damaged record; the others can be read
            raise BadImage(" ".join(str(error).split())[:200]) from error

    def __getitem__(self, i: int) -> dict:
        raw = self._raw(i)
        if self.form == "prepared":
            return unpack_record(raw, len(self.classes) or None)
        if is_image(raw):
            return {"image": raw, "label": -1, "name": self._shard_name(i)}
        features = _features(raw)
        image = _image_feature(features) if features else b""
        if not image:
            raise BadImage("its record has no encoded image")
        return {"image": image, "label": _label_feature(features), "name": self._shard_name(i)}

    def files(self) -> list[str]:
        return [os.path.join(self.root, name) for name in self.names]

    def name(self, i: int) -> str:
        """The original name of a prepared image; else the shard and the number in it."""
        if self.form == "prepared":
            try:
                return unpack_record(self._raw(i), len(self.classes) or None)["name"]
            except (BadImage, OSError):
                pass
        return self._shard_name(i)

    def _shard_name(self, i: int) -> str:
        shard = self._shard(i)
        return f"{self.names[shard]}/{i - int(self.ends[shard - 1] if shard else 0)}"

    def fingerprint(self) -> dict:
        return {"source": "array_record", "split": self.split, "count": len(self), "shards_sha256": self.digest}


def _open(path: str, version: tuple[int, int]) -> ArrayRecordReader:
    """A reader. Raises DataError if the file is damaged, or has another version."""
    if stat_file(path) != version:
        raise changed_error(path)
    try:
        reader = ArrayRecordReader(path, options=OPTIONS, file_reader_buffer_size=BUFFER)
        reader.num_records()
        valid, reason = reader.ok(), "it does not end like an ArrayRecord file"
    except (RuntimeError, ValueError) as error:
        valid, reason = False, " ".join(str(error).split())[:200]
    if not valid:
        what = f"{path} is truncated or damaged"
        raise DataError(what, reason, "download the file again, or prepare the folder again")
    return reader


def _inspect(path: str) -> dict:
    """What a manifest would say about a shard, with a hash of its end only."""
    version = stat_file(path)
    reader = _open(path, version)
    count = reader.num_records()
    if "group_size:1," not in reader.writer_options_string() + "," and reader.writer_options_string():
        logging.warning("%s stores records in groups, and reading one image decodes a whole group: %s", path, PREPARE)
    digest = digest_of(str(version[0]).encode(), read_tail(path, version[0]))
    return {"path": path, "version": version, "count": count, "sha256": digest}


def _is_prepared(raw: bytes) -> bool:
    try:
        unpack_record(raw, None)
    except BadImage:
        return False
    return True


def _features(raw: bytes) -> dict | None:
    """The features of a tf.train.Example by name; None if the bytes are not one."""
    from tensorflow_datasets.proto import tf_example_pb2

    try:
        return dict(tf_example_pb2.Example.FromString(raw).features.feature)
    except Exception:  # protobuf's DecodeError, which would need another import
        return None


def _image_feature(features: dict) -> bytes:
    for name in IMAGE_NAMES:
        if name in features and features[name].bytes_list.value:
            return features[name].bytes_list.value[0]
    return b""


def _label_feature(features: dict) -> int:
    for name in LABEL_NAMES:
        if name in features and features[name].int64_list.value:
            return int(features[name].int64_list.value[0])
    return -1
