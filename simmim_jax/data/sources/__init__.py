"""Where images lie: random access to records by index, that survives being pickled into worker processes.

A source has a length; `source[i]`, a record {"image": the bytes of a file, or uint8 or uint16 [h, w, c] or [h, w],
"label": int, -1 where there is none, "name": str}; `source.name(i)`, the name alone; `classes`, the names of the
labels, () where there are none; `describe()`, for messages; and `fingerprint()`, JSON that changes whenever the records
or their order do, and not when they are merely moved to another folder.

A record that cannot be read raises BadImage or OSError when it is asked for; what a start-up can tell is a DataError.
Open files do not travel into workers: each process opens its own. An index of many records is mapped from a file, so
that ten million take a process no more memory than ten thousand.
"""

import contextlib
import glob
import os
import re

from simmim_jax.data.sources.array_record import ARRAY_RECORDS, make_array_record, read_manifest, refuse_unfinished
from simmim_jax.data.sources.digits import make_digits
from simmim_jax.data.sources.folder import EXTENSIONS, make_folder
from simmim_jax.data.sources.list_file import LISTS, make_list
from simmim_jax.data.sources.listing import glance, is_folder, nearest_path
from simmim_jax.data.sources.parquet import PARQUETS, make_parquet
from simmim_jax.data.sources.splits import EVALUATION, WILDCARDS, cases, existing_part
from simmim_jax.data.sources.tar import COMPRESSED, TARS, make_tar
from simmim_jax.data.sources.tfds import make_tfds, prepared_directory
from simmim_jax.errors import ConfigError, DataError, suggest, warn_once

__all__ = ["SOURCES", "make_source", "share_images"]

KINDS = {LISTS: "list", (*TARS, *COMPRESSED): "tar", PARQUETS: "parquet", ARRAY_RECORDS: "array_record"}
TAKEN = "a folder of images, of shards or of a prepared data set, or a .txt list, .tar, .parquet or .array_record file"


def make_source(
    source: str,
    *,
    path: str = "",
    name: str = "",
    data_dir: str = "",
    split: str = "train",
    heldout_fraction: float = 0.1,
):
    """The records of one split of a data set.

    Args:
      source: `auto`: what `path` is, or the TFDS data set `name`. `digits`: scikit-learn's 1,797 hand-written digits,
        there without a download. `folder`: any folder of images, flat or by class. `list`: a text file with the path of
        an image on each line, and perhaps a label. `tar`, `parquet`, `array_record`: shards, as of WebDataset, Hugging
        Face and `simmim_jax.tools.prepare`. `tfds`: a prepared TensorFlow Datasets data set.
      path: of the file or folder. It may have {split} in it, and for lists and shards wildcards and {000..146}.
      name, data_dir: of the TFDS data set, and of the directory that it was prepared in; "" is TFDS's own. For a list,
        `data_dir` is what its paths are relative to.
      split: "train", or a part to evaluate on: val, valid, validation, test. For TFDS any split or slice of it.
      heldout_fraction: what is kept from training of data that have no split for evaluation. Not for TFDS.

    Raises:
      ConfigError: for a source or split that does not exist.
      DataError: where there are no such images.
    """
    if source not in SOURCES:
        raise ConfigError(f"unknown source {source!r}", "data.source", suggest(source, SOURCES))
    if not 0 <= heldout_fraction < 1:
        raise ConfigError(f"heldout_fraction={heldout_fraction}", "data.heldout_fraction", "must be in [0, 1)")
    return SOURCES[source](path=path, name=name, data_dir=data_dir, split=split, heldout_fraction=heldout_fraction)


def share_images(first, second) -> bool:
    """Whether two sources are one part by two names, or slices of TFDS that overlap."""
    if hasattr(first, "file_instructions") and hasattr(second, "file_instructions"):
        return any(
            max(a.skip, b.skip) < min(a.skip + a.take, b.skip + b.take)
            for a in first.file_instructions()
            for b in second.file_instructions()
            if a.filename == b.filename
        )
    if len(first) != len(second):  # a fingerprint asks for the sizes of a thousand files
        return False
    roots = [getattr(getattr(source, "images", source), "root", "") for source in (first, second)]
    return roots[0] == roots[1] and first.fingerprint() | {"split": ""} == second.fingerprint() | {"split": ""}


def make_auto(*, path: str, name: str, split: str, **options):
    """The source that `path` is, or, without a path, the TFDS data set `name`."""
    if not path and not name:
        fix = f"set data.path to {TAKEN}; or data.name to a TFDS data set"
        raise ConfigError("data.path and data.name are empty", "data.source=auto", fix)
    kind = _kind_of(os.path.abspath(os.path.expanduser(path)), split) if path else "tfds"
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


def _kind_of(path: str, split: str) -> str:
    """The kind of source that a path is, by its name, or a glance into the folder."""
    sides = dict.fromkeys((split, *(EVALUATION if split in EVALUATION else ()), "train", *EVALUATION))
    if os.path.isdir(path):
        return _kind_of_folder(path, sides)
    kind = next((kind for extensions, kind in KINDS.items() if path.lower().endswith(extensions)), "")
    if kind:
        return kind
    if "{split}" in path:
        beside = [path.replace("{split}", form) for side in sides for form in cases(side)]
        path = next((folder for folder in beside if os.path.isdir(folder)), beside[0])
        if os.path.isdir(path):
            return _kind_of_folder(path, {})
    elif WILDCARDS.search(path):
        folder, rest = existing_part(path)
        found = next(glob.iglob(os.path.join(glob.escape(folder), rest)), "")
        kind = next((kind for extensions, kind in KINDS.items() if found.lower().endswith(extensions)), "")
        if kind:
            return kind
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist", "data.path", nearest_path(path))
    if path.lower().endswith(EXTENSIONS):
        return "folder"  # which knows what to do about one image
    raise DataError(f"{path} is of no kind that is known", "data.source=auto", f"set data.path to {TAKEN}")


def _kind_of_folder(path: str, sides) -> str:
    if prepared_directory(path):
        return "tfds"
    # the folder of the split first: beside it may lie the archives that it was unpacked from
    beside = (os.path.join(path, form) for side in sides for form in cases(side))
    kind = next(filter(None, map(_glance_at, (*beside, path, os.path.join(path, "data")))), "folder")
    if kind == "folder":
        refuse_unfinished(path)  # which may not hold a shard yet
        _tell_of_lists(path)
    return kind


def _tell_of_lists(path: str) -> None:
    """Warns of the lists of splits in a folder of images, which may have been meant."""
    word = re.compile(rf"(?<![a-z0-9])({'|'.join(('train', *EVALUATION))})(?![a-z0-9])", re.IGNORECASE)
    names = sorted(entry.name for entry in glance(path) if entry.name.lower().endswith(LISTS))
    lists = [name for name in names if word.search(name)]
    if lists:
        template = os.path.join(path, word.sub("{split}", lists[0], count=1))
        warn_once(f"{path}: all its images are taken, not those in {', '.join(lists[:4])}: set data.path={template}")


def _glance_at(folder: str) -> str:
    """The kind of what lies in a folder; "" where it has neither shards, nor images, nor folders with images."""
    entries = glance(folder)
    found = dict.fromkeys((ARRAY_RECORDS, PARQUETS, (*TARS, *COMPRESSED)), False)
    for entry in entries:
        name = entry.name.lower()
        if name.endswith(EXTENSIONS):
            return "folder"
        for extensions in found:
            found[extensions] |= name.endswith(extensions)
    for extensions, there in found.items():
        if there:
            return KINDS[extensions]
    nested = [entry.path for entry in entries if is_folder(entry)][:3]
    nested += [next((each.path for each in glance(place) if is_folder(each)), place) for place in nested]
    if any(entry.name.lower().endswith(EXTENSIONS) for place in nested for entry in glance(place)):
        return "folder"
    with contextlib.suppress(DataError):  # many a thing has a manifest
        return "array_record" if read_manifest(folder) else ""
    return ""
