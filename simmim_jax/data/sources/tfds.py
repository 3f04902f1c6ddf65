"""TensorFlow Datasets prepared as ArrayRecord, read without TensorFlow."""

import difflib
import functools
import json
import logging
import os
import re
import threading

from google.protobuf.message import DecodeError

from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources.classes import are_unlabeled
from simmim_jax.data.sources.files import read_tail, stat_file
from simmim_jax.data.sources.listing import folders
from simmim_jax.data.sources.names import digest_of
from simmim_jax.data.sources.splits import STANDARD
from simmim_jax.data.sources.unread import Unread, report
from simmim_jax.errors import ConfigError, DataError

VERSION = re.compile(r"\d+\.\d+\.\d+")


def make_tfds(*, name: str, data_dir: str, split: str, path: str = "", **_) -> "Tfds":
    """A split, or a slice of one, of a prepared TFDS data set. Never downloads.

    The data set has that name or, if `name` is empty, is in the folder `path`.
    """
    if name or not path:
        if not name:
            fix = "set data.name to a data set, such as imagenet2012"
            raise ConfigError("data.name is empty", "data.source=tfds", fix)
        return Tfds(name, os.path.expanduser(data_dir), split)
    path = os.path.abspath(os.path.expanduser(path))
    directory = prepared_directory(path)
    if not directory:
        fix = "point data.path at the folder that has dataset_info.json, or set data.name"
        raise DataError(f"{path} has no prepared TFDS data set", "data.source=tfds", fix)
    return Tfds("", "", split, directory)


def prepared_directory(path: str) -> str:
    """The folder of a prepared TFDS data set: `path`, or the highest version in it; "" if there is none."""
    versions = [name for name in folders(path) if VERSION.fullmatch(name)]
    versions.sort(key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    for directory in (path, *(os.path.join(path, version) for version in versions)):
        if all(os.path.isfile(os.path.join(directory, file)) for file in ("dataset_info.json", "features.json")):
            return directory
    return ""


class Tfds:
    """A split of a prepared TFDS data set."""

    unlabeled = ""  # why there are no classes

    def __init__(self, name: str, data_dir: str, split: str, directory: str = ""):
        import tensorflow_datasets as tfds

        self.dataset, self.data_dir, self.split, self.directory = name, data_dir, split, directory
        info = self._make_builder().info
        try:
            self.count = info.splits[split].num_examples
        except (KeyError, ValueError, AssertionError) as error:
            splits = ", ".join(f"{key} ({value.num_examples})" for key, value in sorted(info.splits.items()))
            fix = "set data.split to one of them, or to a slice like train[:90%]"
            raise DataError(f"{name or info.full_name} has no split {split!r}", f"splits: {splits}", fix) from error
        self.images = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.Image)]
        labels = [key for key, feature in info.features.items() if isinstance(feature, tfds.features.ClassLabel)]
        if "image" not in self.images and len(self.images) != 1:
            what = f"{info.full_name} has {len(self.images)} image features, and none named 'image'"
            raise DataError(what, f"features: {', '.join(info.features)}", "choose another data.name")
        if not self.count:
            raise DataError(f"{info.full_name} has 0 images", f"split {split!r}", "set data.split to a larger one")
        self.full_name = info.full_name
        self.image = "image" if "image" in self.images else self.images[0]
        self.label = "label" if "label" in labels else labels[0] if len(labels) == 1 else ""
        self.classes = tuple(info.features[self.label].names) if self.label else ()
        if self.classes and are_unlabeled(self):
            self.label, self.classes, self.unlabeled = "", (), f"split {split!r} has no labels: choose another one"
        elif not self.label:
            self.unlabeled = f"none of its features is a ClassLabel named 'label': {', '.join(info.features)}"
        _report_unread(info, split, [key for key in labels if key != self.label])

    @functools.cached_property
    def records(self):
        import tensorflow_datasets as tfds

        decoders = {key: tfds.decode.SkipDecoding() for key in self.images}
        return self._make_builder().as_data_source(self.split, decoders=decoders)

    def _make_builder(self):
        return _open_directory(self.directory) if self.directory else _make_tfds_builder(self.dataset, self.data_dir)

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key != "records"}

    def __len__(self) -> int:
        return self.count

    def record(self, i: int) -> dict:
        """All features of a record, with images as encoded bytes. Raises BadImage if it cannot be read."""
        i = range(self.count)[i]
        records = self.records
        try:
            return records[i]
        except (RuntimeError, IndexError, ValueError, DecodeError) as error:
            raise BadImage("its record is damaged: " + " ".join(str(error).split())[:160]) from error

    def __getitem__(self, i: int) -> dict:
        i = range(self.count)[i]
        record = self.record(i)
        label = int(record[self.label]) if self.label else -1
        return {"image": record[self.image], "label": label, "name": self.name(i)}

    def name(self, i: int) -> str:
        return f"{self.full_name}/{self.split}/{i}"

    def describe(self) -> str:
        return f"{self.full_name}, split {self.split} ({len(self)} images)"

    def file_instructions(self) -> list:
        """The records in this split by shard: objects with `filename`, `skip` and `take`."""
        return self._make_builder().info.splits[self.split].file_instructions

    def fingerprint(self) -> dict:
        files = sorted({each.filename for each in self.file_instructions()})
        sizes = [stat_file(file)[0] for file in files]
        tails = [digest_of(read_tail(file, size)) for file, size in zip(files, sizes, strict=True)]
        shards = json.dumps(list(zip(map(os.path.basename, files), sizes, tails, strict=True))).encode()
        part = {"count": len(self), "shards_sha256": digest_of(shards)}
        return {"source": "tfds", "name": self.full_name, "split": self.split} | part


def _report_unread(info, split: str, labels: list[str]) -> None:
    """Report splits that are not among the standard ones, and further labels."""
    unread = Unread()
    for name in info.splits:
        if name not in STANDARD and name not in split:
            unread.add("splits", os.path.join(info.full_name, name))
    for name in labels:
        unread.add("features with labels", os.path.join(info.full_name, name))
    report(info.full_name, unread)


def _make_tfds_builder(name: str, data_dir: str):
    import tensorflow_datasets as tfds

    fix = f"tfds build {name} --file_format=array_record" + (f" --data_dir={data_dir}" if data_dir else "")
    fix = f"set data.data_dir to its folder, or prepare it once: pip install tensorflow-cpu && {fix}"
    absl, thread = logging.getLogger("absl"), threading.get_ident()

    def is_wanted(record: logging.LogRecord) -> bool:
        # TFDS warns of every folder that it searches; messages of other threads must pass
        return record.thread != thread or record.levelno >= logging.ERROR

    absl.addFilter(is_wanted)
    try:
        builder = tfds.builder(name, data_dir=data_dir or None, file_format="array_record")
        if builder.is_prepared():
            return builder
    except tfds.core.DatasetNotFoundError as error:
        known = [*folders(data_dir), *tfds.list_builders(with_community_datasets=False)]
        near = difflib.get_close_matches(name, known, n=3)
        meant = f"did you mean {' or '.join(near)}?" if near else "see tensorflow_datasets.list_builders()"
        raise DataError(f"TFDS has no data set {name!r}", f"data_dir={data_dir!r}", meant) from error
    except Exception as error:  # a bad version, config or file format: TFDS raises exceptions of any type
        raise DataError(f"TFDS cannot open {name!r}", f"data_dir={data_dir!r}: {_reason(error)}", fix) from error
    finally:
        absl.removeFilter(is_wanted)
    raise DataError(f"{name} is not prepared", f"looked in {builder.data_dir}", fix)


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rpartition('": ')[2][:200]


def _open_directory(directory: str):
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(directory, file_format="array_record")
        if builder.info.splits:
            return builder
        reason = "it has no splits"
    except Exception as error:  # the files are untrusted, and TFDS raises exceptions of any type
        reason = _reason(error)
    fix = "prepare it again, with --file_format=array_record"
    raise DataError("TFDS cannot open the data set", f"{directory}: {reason}", fix)
