"""Read PyTorch files without PyTorch, and without running anything that they contain; see `pickles`.

Source: torch/serialization.py of PyTorch 2.13.
"""

import io
import mmap
import os
import re
import zipfile
import zlib
from pathlib import Path

import numpy as np

from simmim_jax.errors import CheckpointError
from simmim_jax.interop.pickles import HostileError, check_unfolded, one_line, unpickle
from simmim_jax.interop.rebuild import DTYPES, Dropped, is_count

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy stream
PROTOCOL = 1001  # the second
MAX_EXPANSION = 8, 2**28  # a state dict may take this many times the file's bytes in float32, plus this many bytes
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "Untyped": "uint8",
}  # fmt: skip

AGAIN = "download or copy it again"
DISTRUST = "do not open it with PyTorch either; take the weights from a source that you trust"


def read_pth(path: str | os.PathLike) -> object:
    """The content of a file by `torch.save`: plain data, NumPy arrays for tensors, a `Dropped` for anything else.

    Plain data are dicts, lists, tuples, sets, str, bytes, numbers and None. Ordered and default dicts become dicts,
    bytearrays bytes, NumPy scalars numbers. Arrays have the tensors' shapes and dtypes (bfloat16 and float8 by
    ml_dtypes). Sparse, quantized, nested and meta tensors, and NumPy arrays of strings or objects, are Dropped.

    Reads zip archives (PyTorch 1.6 and later) and the earlier stream (0.1.10 and later), saved from any device, and
    verifies checksums if the file has them. Arrays of a zip archive are read-only views of the file, which must not
    change while they are in use.

    Raises CheckpointError if the file is missing, damaged, in another format, or tries to run something.
    """
    where = str(path)
    try:
        data = _open(Path(path), where)
        _refuse_other_formats(data, where)
        content = _read_zip(data, where) if data[:4] == b"PK\x03\x04" else _read_stream(data, where)
        check_unfolded(content)
        return content
    except CheckpointError:
        raise
    except HostileError as error:
        raise CheckpointError(f"refused: the file asks to run {one_line(error)}", where, DISTRUST) from None
    except (OSError, MemoryError) as error:
        reason = one_line(getattr(error, "strerror", None) or "not enough memory")
        raise CheckpointError(f"cannot read: {reason}", where, "fix that and run again") from error
    except Exception as error:  # anything that pickle, zipfile and NumPy raise for damaged bytes
        reason = one_line(error) or type(error).__name__
        raise CheckpointError(f"the file is damaged: {reason}", where, AGAIN) from error


def check_expanded_size(arrays: dict[str, np.ndarray], paths: list[Path]) -> None:
    """Raise CheckpointError if copies of the arrays, which can share memory, need far more memory than the files."""
    needed = sum(array.size * max(4, array.itemsize) for array in arrays.values())
    factor, extra = MAX_EXPANSION
    if needed > factor * sum(path.stat().st_size for path in paths) + extra:
        what = f"its {len(arrays)} arrays share memory, and would take {needed / 2**30:.1f} GiB without"
        raise CheckpointError(what, str(paths[0]), "give a file that stores each array by itself")


def _open(path: Path, where: str) -> mmap.mmap:
    if not path.exists():
        raise CheckpointError("no such file", where, "give the path of a .pth file")
    if path.is_dir():
        raise CheckpointError("a folder, not a file", where, "give the path of a .pth file in it")
    if not path.is_file():
        raise CheckpointError("not a regular file", where, "give the path of a .pth file")
    with open(path, "rb") as file:
        if not os.fstat(file.fileno()).st_size:
            raise CheckpointError("the file is empty", where, AGAIN)
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _refuse_other_formats(data: mmap.mmap, where: str) -> None:
    start = data[:512]
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        raise CheckpointError("a web page, not weights", where, "download the file itself; you may have to log in")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("a git-lfs pointer, not the weights", where, "run `git lfs pull` in its repository")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= len(data) - 8:
        raise CheckpointError("a safetensors file under another name", where, "rename it to .safetensors")
    if start[257:262] == b"ustar":
        fix = "if PyTorch before 0.1.10 wrote it, load it with PyTorch and save it again"
        raise CheckpointError("a tar file, which is not supported", where, fix)
    if start[:1] != b"\x80" and start[:4] != b"PK\x03\x04":
        raise CheckpointError("not a PyTorch file", where, "give a file that torch.save wrote")


# Zip archives


def _read_zip(data: mmap.mmap, where: str) -> object:
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise ValueError("the table at its end is missing or broken; it may be cut short") from error
    names = {entry.filename: entry for entry in entries}
    if len(names) != len(entries) or sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its table of entries contradicts itself")
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if any(re.fullmatch(r"[^/]*/(constants\.pkl|code/.*)", name) for name in names):
        raise CheckpointError("a TorchScript archive: a program", where, "give the state dict of the model in it")
    if len(roots) != 1:
        raise CheckpointError("a zip archive, but not by torch.save", where, "give a file that torch.save wrote")
    root = roots[0]

    def entry(name: str) -> np.ndarray:
        if root + name not in names:
            raise ValueError(f"it has no entry {one_line(name)}")
        return _stored(data, names[root + name])

    byteorder = entry("byteorder").tobytes() if root + "byteorder" in names else b"little"
    if byteorder not in (b"little", b"big"):
        raise ValueError("its byte order is neither little nor big")
    big_endian, storages = byteorder == b"big", {}

    def load_storage(identity: tuple) -> object:
        kind, key, count, _ = _parse_storage(identity, 5)
        if kind is None:
            return Dropped(identity[1].name)
        if key not in storages:
            storages[key] = entry(f"data/{key}") if count else np.empty(0, np.uint8)
        if count * kind.itemsize > storages[key].size:
            raise ValueError(f"its storage {one_line(key)} is smaller than its size")
        array = np.ndarray((count,), kind, storages[key]) if count else np.empty(0, kind)
        if big_endian and "Untyped" in identity[1].name:
            raise ValueError("untyped storages of a big-endian machine are not supported")
        if not big_endian or kind.itemsize == 1:
            return array
        if (key, kind) not in storages:
            unit = kind.itemsize // 2 if kind.kind == "c" else kind.itemsize
            storages[key, kind] = array.view(f"u{unit}").byteswap().view(kind)
        return storages[key, kind]

    return unpickle(io.BytesIO(entry("data.pkl").tobytes()), len(data), load_storage)


def _stored(data: mmap.mmap, entry: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an entry, as a view of the file."""
    name = one_line(entry.filename)
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"its entry {name} is compressed or encrypted")
    at = entry.header_offset
    header = data[at : at + 30]
    if at < 0 or header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ValueError(f"its entry {name} is not at the position in the table")
    at += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if at + entry.file_size > len(data):
        raise ValueError(f"its entry {name} is larger than the file")
    content = np.frombuffer(data, np.uint8, entry.file_size, at)
    if entry.CRC and zlib.crc32(content) != entry.CRC:  # 0 after torch.serialization.set_crc32_options(False)
        raise ValueError(f"its entry {name} differs from its checksum")
    return content


# The stream of PyTorch before 1.6: pickles, then the bytes of the storages


class _StreamStorages:
    """Arrays for the storages of a stream. Their bytes follow the object, so their memory is allocated before."""

    def __init__(self, file_size: int):
        self.arrays, self.free = {}, file_size

    def __call__(self, identity: tuple) -> object:
        if identity[:1] == ("module",) and len(identity) == 4:
            return identity[1]
        kind, key, count, view = _parse_storage(identity, 6)
        if kind is None:
            raise ValueError(f"{one_line(identity[1].name)} is not supported")
        if key not in self.arrays:
            self.free -= count * kind.itemsize
            if self.free < 0:
                raise ValueError("its storages are larger than the file")
            self.arrays[key] = np.zeros(count, kind)
        if self.arrays[key].dtype != kind:
            raise ValueError(f"its storage {one_line(key)} has two types")
        if view is None:
            return self.arrays[key]
        _, start, length = view
        if not (is_count(start) and is_count(length) and start + length <= self.arrays[key].size):
            raise ValueError(f"a view is outside its storage {one_line(key)}")
        return self.arrays[key][start : start + length]


def _read_stream(data: mmap.mmap, where: str) -> object:
    def unpickle_plain():
        return unpickle(data, len(data), _no_storage)

    def is_next(number: int) -> bool:
        value = unpickle_plain()
        return type(value) is int and value == number

    if not is_next(MAGIC):
        fix = "load it with the program that wrote it, and save the weights as safetensors"
        raise CheckpointError("a plain pickle, not a file of torch.save", where, fix)
    if not is_next(PROTOCOL):
        raise ValueError("the version of its format is unknown")
    unpickle_plain()  # byte order and type sizes of the machine; the storages are little-endian in any case
    storages = _StreamStorages(len(data))
    content, arrays = unpickle(data, len(data), storages), storages.arrays
    keys = unpickle_plain()
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(arrays):
        raise ValueError("its list of storages differs from that of its tensors")
    for key in keys:
        storage = arrays[key]
        if int.from_bytes(data.read(8), "little") != storage.size or data.tell() + storage.nbytes > len(data):
            raise ValueError(f"its storage {one_line(key)} has another size, or is cut short")
        storage.view(np.uint8)[:] = np.frombuffer(data, np.uint8, storage.nbytes, data.tell())
        data.seek(storage.nbytes, os.SEEK_CUR)
    return content


def _no_storage(identity: tuple) -> object:
    raise ValueError("a storage where none can be")


def _parse_storage(identity: tuple, length: int) -> tuple:
    """(dtype or None if it is not supported, key, count, view or None) of a persistent id."""
    if len(identity) not in (5, length) or identity[0] != "storage" or not isinstance(identity[1], Dropped):
        raise ValueError("a persistent id names no storage")
    _, kind, key, _, count, view = (*identity, None)[:6]
    is_view = type(view) is tuple and len(view) == 3
    if type(key) is not str or not is_count(count) or not (view is None or is_view):
        raise ValueError("the persistent id of a storage is malformed")
    name = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", kind.name)
    if not name:
        raise ValueError(f"{one_line(kind.name)} is not a type of storage")
    dtype = STORAGES.get(name[1])
    return dtype and np.dtype(DTYPES[dtype]), key, count, view
