"""Data sources: random access to the records of a data set. One file per kind of source."""

import contextlib
import glob
import os
from typing import Protocol, runtime_checkable

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.data.prepared import read_manifest
from simmim_jax.data.sources.array_record import ARRAY_RECORDS, check_finished, make_array_record
from simmim_jax.data.sources.digits import make_digits
from simmim_jax.data.sources.folder import make_folder
from simmim_jax.data.sources.list_file import LISTS, make_list
from simmim_jax.data.sources.listing import is_folder, nearest_path, peek
from simmim_jax.data.sources.overlap import share_images
from simmim_jax.data.sources.parquet import PARQUETS, has_images, make_parquet
from simmim_jax.data.sources.splits import EVALUATION, WILDCARDS, cases, existing_part
from simmim_jax.data.sources.tar import COMPRESSED, TARS, make_tar
from simmim_jax.data.sources.tfds import make_tfds, prepared_directory
from simmim_jax.data.sources.unread import ARCHIVES, one_report
from simmim_jax.errors import ConfigError, DataError, suggest

__all__ = ["SOURCES", "Source", "make_source", "share_images"]

KINDS = {LISTS: "list", (*TARS, *COMPRESSED): "tar", PARQUETS: "parquet", ARRAY_RECORDS: "array_record"}
PATHS = "a folder of images, of shards or of a prepared data set, or a .txt list, .tar, .parquet or .array_record file"


@runtime_checkable
class Source(Protocol):
    """The records of one split of a data set, in a fixed order.

    A source can be pickled into worker processes. Open files are not pickled: each process opens its own. A large index
    is memory-mapped from a file, so that ten million records need no more memory per process than ten thousand.

    A source may also have `unlabeled`, what to do to have classes; `by_name`, whether a label is the position of its
    name among all names; `all_labels()`, the labels without reading images; and `files()`, the files of its records, to
    find images that two sources share.
    """

    classes: tuple[str, ...]  # names of the labels 0, 1, ...; () if records have no labels, or the names are unknown

    def __len__(self) -> int:
        """Number of records."""

    def __getitem__(self, i: int) -> dict:
        """Read record i: {"image": bytes or array, "label": int, "name": str}.

        The image is an encoded file, or uint8 or uint16 [h, w, c] or [h, w]. The label is -1 if there is none.
        Raises BadImage or OSError for a record that cannot be read, IndexError for a record that does not exist, and
        DataError if the files have changed since the source was made.
        """

    def name(self, i: int) -> str:
        """The name of record i, without reading the image if possible."""

    def describe(self) -> str:
        """Path, split and number of images, for messages."""

    def fingerprint(self) -> dict:
        """JSON that changes if the records or their order change, but not if they are moved to another folder."""


def make_source(
    source: str,
    *,
    path: str = "",
    name: str = "",
    data_dir: str = "",
    split: str = "train",
    heldout_fraction: float | None = 0.1,
) -> Source:
    """Make the source of one split of a data set.

    Args:
      source: a key of SOURCES.
        auto: detected from `path`, or the TFDS data set `name`.
        digits: scikit-learn's 1,797 handwritten digits, without a download.
        folder: a folder of images, flat or by class.
        list: a text file; each line has the path of an image, and optionally a label.
        tar, parquet, array_record: shards, as written by WebDataset, Hugging Face and `simmim_jax.tools.prepare`.
        tfds: a prepared TensorFlow Datasets data set.
      path: the file or folder. It may contain {split}. For lists and shards, it may contain wildcards and {000..146}.
      name: name of a TFDS data set.
      data_dir: directory of TFDS data sets; "" for TFDS's default. For a list, the folder of its relative paths.
      split: "train", or an evaluation split: val, valid, validation, test. For TFDS, any split or slice.
      heldout_fraction: fraction of the images that is held out if the data has no evaluation split. None: 2 %, at least
        8 images if there are 32 or more. TFDS ignores it.

    Raises:
      ConfigError: the source or split does not exist.
      DataError: there are no such images.
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}", "data.source", suggest(source, SOURCES))
    if heldout_fraction is not None and not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction={heldout_fraction}", "data.heldout_fraction", "must be in [0, 1)")
    options = {"name": name, "data_dir": data_dir, "heldout_fraction": heldout_fraction}
    with one_report():
        return SOURCES[source](path=path, split=split, **options)


def make_auto(*, path: str, name: str, split: str, **options) -> Source:
    """The source detected from `path`, or the TFDS data set `name` if `path` is empty."""
    if not path and not name:
        fix = f"set data.path to {PATHS}; or data.name to a TFDS data set"
        raise ConfigError("data.path and data.name are empty", "data.source=auto", fix)
    kind = _detect(os.path.abspath(os.path.expanduser(path)), split) if path else "tfds"
    return SOURCES[kind](path=path, name="" if path else name, split=split, **options)


SOURCES = {
    "auto": make_auto,
    "digits": make_digits,
    "folder": make_folder,
    "list": make_list,
    "tar": make_tar,
    "parquet": make_parquet,
    "array_record": make_array_record,
    "tfds": make_tfds,
}


def _detect(path: str, split: str) -> str:
    """The kind of source at a path, detected from its extension or from the files in the folder."""
    sides = dict.fromkeys((split, *(EVALUATION if split in EVALUATION else ()), "train", *EVALUATION))
    if os.path.isdir(path):
        return _detect_folder(path, sides)
    if kind := _kind_by_extension(path):
        return kind
    if "{split}" in path:
        candidates = [path.replace("{split}", form) for side in sides for form in cases(side)]
        path = next((folder for folder in candidates if os.path.isdir(folder)), candidates[0])
        if os.path.isdir(path):
            return _detect_folder(path, {})
    elif WILDCARDS.search(path):
        folder, rest = existing_part(path)
        if kind := _kind_by_extension(next(glob.iglob(os.path.join(glob.escape(folder), rest)), "")):
            return kind
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist", "data.path", nearest_path(path))
    if path.lower().endswith(EXTENSIONS):
        return "folder"  # reports that the path is one image
    if path.lower().endswith(ARCHIVES):
        raise DataError(f"{path} is an archive", "data.path", "unpack it, and set data.path to the folder")
    raise DataError(f"{path} has no known extension", "data.source=auto", f"set data.path to {PATHS}")


def _kind_by_extension(path: str) -> str:
    return next((kind for extensions, kind in KINDS.items() if path.lower().endswith(extensions)), "")


def _detect_folder(path: str, sides) -> str:
    if prepared_directory(path):
        return "tfds"
    # Check the folder of the split first: its parent may contain the archives that it was extracted from.
    candidates = (os.path.join(path, form) for side in sides for form in cases(side))
    kind = next(filter(None, map(_peek_kind, (*candidates, path, os.path.join(path, "data")))), "folder")
    if kind == "folder":
        check_finished(path)  # an unfinished `prepare` may not have written a shard yet
    return kind


def _peek_kind(folder: str) -> str:
    """The kind of the files in a folder; "" if it contains no shards, images or folders of images."""
    entries = peek(folder)
    shards = {
        KINDS[extensions]: [entry.path for entry in entries if entry.name.lower().endswith(extensions)]
        for extensions in (ARRAY_RECORDS, PARQUETS, (*TARS, *COMPRESSED))
    }
    images = sum(entry.name.lower().endswith(EXTENSIONS) for entry in entries)
    kinds = {kind: paths[0] for kind, paths in shards.items() if paths}
    # a picture next to shards, or archives next to pictures
    count = sum(len(paths) for paths in shards.values())
    if images > count or (images == count > 0 and set(kinds) == {"tar"}):
        return "folder"
    nested = [entry.path for entry in entries if is_folder(entry)][:3]
    nested += [next((each.path for each in peek(place) if is_folder(each)), place) for place in nested]
    has_folders = any(entry.name.lower().endswith(EXTENSIONS) for place in nested for entry in peek(place))
    if "parquet" in kinds and (has_folders or len(kinds) > 1) and not has_images(kinds["parquet"]):
        kinds.pop("parquet")  # metadata of other files, such as img2dataset writes
    if kinds:
        return next(iter(kinds))
    if has_folders:
        return "folder"
    with contextlib.suppress(DataError):  # another program may have written a file of this name
        return "array_record" if read_manifest(folder) else ""
    return ""
