"""Whether two sources have images in common, also if links lead to the same files."""

import functools
import os
from collections.abc import Iterator

from simmim_jax.data.sources.folder import Folder
from simmim_jax.data.sources.label_maps import MappedFolder
from simmim_jax.data.sources.list_file import ListFile
from simmim_jax.data.sources.parts import Part
from simmim_jax.data.sources.tfds import Tfds

MAX_COMPARED = 200_000  # lines of lists, and links, that are compared one by one


def share_images(first, second) -> bool:
    """Whether two sources have images in common.

    They are the same records under two split names, overlapping slices of a TFDS data set, or links to the same folders
    or files. Copies of a file are not found.
    """
    first, second = (source.images if isinstance(source, MappedFolder) else source for source in (first, second))
    if isinstance(first, Tfds) and isinstance(second, Tfds):
        return any(
            max(a.skip, b.skip) < min(a.skip + a.take, b.skip + b.take)
            for a in first.file_instructions()
            for b in second.file_instructions()
            if a.filename == b.filename
        )
    parts = isinstance(first, Part) and isinstance(second, Part) and first.path == second.path
    if parts and first.every == second.every and first.held_out != second.held_out:
        return False
    first, second = (source.whole if isinstance(source, Part) else source for source in (first, second))
    if isinstance(first, Folder) and isinstance(second, Folder):
        return _share_files(first, second)
    if isinstance(first, ListFile) and isinstance(second, ListFile) and len(first) + len(second) <= MAX_COMPARED:
        return not set(_real_names(first)).isdisjoint(_real_names(second))
    if hasattr(first, "files") and hasattr(second, "files"):
        return not set(map(os.path.realpath, first.files())).isdisjoint(map(os.path.realpath, second.files()))
    return first.fingerprint() | {"split": ""} == second.fingerprint() | {"split": ""}


def _share_files(first: Folder, second: Folder) -> bool:
    has_links = first.has_links or second.has_links
    if not has_links:
        if os.path.realpath(first.root) == os.path.realpath(second.root):  # parts by hash, or all the same
            return len(first) == len(second) and first.names.digest() == second.names.digest()
        if _real_folders(first).isdisjoint(_real_folders(second)):
            return False
    return not set(_real_names(second)).isdisjoint(_real_names(first))


def _real_folders(source: Folder) -> set[str]:
    return {os.path.realpath(os.path.join(source.root, name)) for name in {os.path.dirname(n) for n in source.names}}


def _real_names(source: Folder | ListFile) -> Iterator[str]:
    """The path of each image without links: those of folders, and those of files if there are few images."""
    real_folder = functools.lru_cache(100_000)(os.path.realpath)
    resolve = getattr(source, "has_links", True) and len(source) <= MAX_COMPARED
    for i in range(len(source)):
        folder, name = os.path.split(source.image_path(i))
        path = os.path.join(real_folder(folder), name)
        yield os.path.realpath(path) if resolve and os.path.islink(path) else path
