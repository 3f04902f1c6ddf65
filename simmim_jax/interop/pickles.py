"""What other people's PyTorch files hold, read without PyTorch and without running anything that they ask for.

The weights in a .pth file stand beside a pickle, and a pickle is a program that may import and call whatever it names.
`_unpickle` is its stack machine without that part: a global is only a name, and a call either rebuilds plain data with
a function of this module (`REBUILDERS`), or leaves a `Dropped`, or is refused.
Python's own Unpickler with another `find_class` was not taken: it calls what it is handed without telling the making of
an object (NEWOBJ) from a call (REDUCE), sets attributes, and lets one five-byte opcode ask for gigabytes of memo.

What becomes of a global, first rule that fits:

- named in REBUILDERS: calling it, or making an instance of it, gives plain data;
- of a module in ACTING, a name in ACTING_NAMES, or one reached through such a module: the file is refused, wherever it
  stands and whether or not it is called;
- made into an instance (NEWOBJ): a `Dropped`, as for the yacs config in the official SimMIM and Swin files;
- called (REDUCE, INST, OBJ): a `Dropped` if HARMLESS has it, otherwise the file is refused. An enum of someone's own
  module is pickled as such a call, and cannot be told from one that does harm;
- only mentioned: a `Dropped`.

A Dropped swallows the state, items and entries that the pickle gives it. What is read is bounded by the file: sizes are
checked before memory is taken, copies are counted, and content that unfolds beyond MAX_OBJECTS is refused.

Sources: torch/serialization.py, torch/_utils.py, torch/_tensor.py and _weights_only_unpickler.py of PyTorch 2.13,
CPython's pickletools and its table of Python 2's names, and what NumPy 1 and 2 pickle.
"""

import _compat_pickle
import io
import mmap
import os
import pickletools
import re
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np

from simmim_jax.errors import CheckpointError

MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of a legacy stream
PROTOCOL = 1001  # the second
MAX_OBJECTS = 10_000_000  # opcodes of a pickle, and objects of its content with shared ones counted as often as used
MAX_DEPTH = 200  # containers within containers
MAX_EXPANDED = 2**26  # bytes of an array with strides of 0 that is larger than its storage
MAX_TOTAL = 8, 2**28  # as float32 a state dict may take so many times the file's bytes (1 of float8 is 4), and more

AGAIN = "download or copy it again"
DISTRUST = "do not open it with PyTorch either; take the weights from a source that you trust"

DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "complex128": np.complex128, "complex64": np.complex64, "bool": np.bool_,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2, "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip
STORAGES = {
    "Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "ComplexDouble": "complex128",
    "ComplexFloat": "complex64", "Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8",
    "Bool": "bool", "Untyped": "uint8",
}  # fmt: skip

# Modules, without leading underscores: what Python itself can harm with.
ACTING = frozenset((
    "aiohttp", "asyncio", "atexit", "bdb", "builtins", "cProfile", "cloudpickle", "code", "codecs", "codeop",
    "compileall", "concurrent", "copyreg", "ctypes", "dill", "dis", "distutils", "doctest", "ensurepip",
    "fcntl", "fileinput", "frozen_importlib", "frozen_importlib_external", "ftplib", "functools", "gc",
    "getpass", "glob", "http", "httpx", "idlelib", "imaplib", "imp", "importlib", "inspect", "io", "joblib",
    "lib2to3", "linecache", "marshal", "mmap", "multiprocessing", "nt", "ntpath", "operator", "os", "pdb",
    "pickle", "pickletools", "pip", "pkgutil", "poplib", "posix", "posixpath", "posixsubprocess", "pty",
    "pydoc", "requests", "runpy", "setuptools", "shelve", "shutil", "signal", "site", "smtplib", "socket",
    "socketserver", "sqlite3", "ssl", "subprocess", "sys", "sysconfig", "tarfile", "telnetlib", "tempfile",
    "thread", "threading", "timeit", "trace", "tracemalloc", "types", "unittest", "urllib", "venv",
    "webbrowser", "winapi", "winreg", "xmlrpc", "zipapp", "zipfile", "zipimport",
))  # fmt: skip
ACTING_NAMES = (
    "logging.config", "numpy.distutils", "numpy.f2py", "numpy.fromfile", "numpy.lib.npyio", "numpy.load",
    "numpy.memmap", "numpy.testing", "pandas.io", "pandas.read_pickle", "torch._dynamo", "torch._inductor",
    "torch.hub", "torch.jit", "torch.load", "torch.ops", "torch.package", "torch.save",
    "torch.serialization.load", "torch.serialization.save", "torch.storage._load_from_bytes",
    "torch.utils.cpp_extension", "torch.utils.model_zoo",
)  # fmt: skip
PLAIN = frozenset((
    "builtins.NoneType", "builtins.bool", "builtins.bytearray", "builtins.bytes", "builtins.complex",
    "builtins.dict", "builtins.float", "builtins.frozenset", "builtins.int", "builtins.list", "builtins.object",
    "builtins.range", "builtins.set", "builtins.slice", "builtins.str", "builtins.tuple",
    "types.SimpleNamespace",
))  # fmt: skip
HARMLESS = (
    "argparse", "builtins.range", "builtins.slice", "collections", "datetime", "decimal", "enum", "fractions",
    "numpy.dtypes", "numpy.random", "omegaconf", "pathlib", "re", "torch.device", "torch.optim",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_wrapper_subclass",
    "torch.serialization._get_layout", "types.SimpleNamespace", "typing", "uuid", "yacs",
)  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """What stands for a global, or an object of a class, that is not read: its dotted name and nothing else."""

    name: str


@dataclass
class _Unbuilt:
    """A NumPy array or dtype whose BUILD has not come yet, and the memo's entries that must follow it."""

    dtype: np.dtype | None
    places: list = field(default_factory=list)


class _HostileError(Exception):
    """The name of what a file asks to run."""


def read_pth(path: str | os.PathLike) -> object:
    """The plain content of a file by `torch.save`, with arrays for tensors and a `Dropped` for what is not read.

    Dicts, lists, tuples, sets, str, bytes, numbers, None, and NumPy arrays of the tensors' shapes and dtypes (bfloat16
    and float8 by ml_dtypes). Arrays of a zip archive view the file, which must stay as it is while they are in use, and
    cannot be written to. Sparse, quantized, nested and meta tensors, and NumPy arrays of strings or objects, are
    Dropped; bytearrays become bytes, NumPy scalars numbers, ordered and default dicts dicts.
    Reads zip archives (PyTorch 1.6 and later) and the stream before them (0.1.10 and later), whichever device they were
    saved from. Checksums are verified where the file has them. Raises CheckpointError if the file is missing, damaged,
    of another format, or asks to run anything.
    """
    where = str(path)
    try:
        data = _mapped(Path(path), where)
        _refuse_other_formats(data, where)
        is_zip = data[:4] == b"PK\x03\x04"
        content = _read_zip(data, where) if is_zip else _read_stream(data, where)
        _refuse_bombs(content)
        return content
    except CheckpointError:
        raise
    except _HostileError as error:
        raise CheckpointError(f"refused: the file asks to run {_shown(error)}", where, DISTRUST) from None
    except (OSError, MemoryError) as error:
        reason = _shown(getattr(error, "strerror", None) or "not enough memory")
        raise CheckpointError(f"cannot read: {reason}", where, "mend that and run again") from error
    except Exception as error:  # whatever pickletools, zipfile and NumPy say of damaged bytes
        reason = _shown(error) or type(error).__name__
        raise CheckpointError(f"the file is damaged: {reason}", where, AGAIN) from error


def state_dict(content: object, path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays by parameter name out of what `read_pth` gave.

    Under "model" (SimMIM, Swin, MAE), "state_dict" (timm, OpenMMLab, Lightning), "module" (DeepSpeed), "model_ema",
    "state_dict_ema", or the content itself, whichever is first. Raises CheckpointError, with the keys that are there,
    if none of these is a dict of arrays. path: for that message only.
    """
    where, fix = str(path), "give a file with a state dict, or one with it under 'model' or 'state_dict'"
    if isinstance(content, Dropped):
        raise CheckpointError(f"a whole object of {_shown(content.name)}, not a state dict", where, fix)
    if not isinstance(content, dict):
        raise CheckpointError(f"a {type(content).__name__}, not a state dict", where, fix)
    names = ("model", "state_dict", "module", "model_ema", "state_dict_ema")
    for arrays in (*(content.get(name) for name in names), content):
        if isinstance(arrays, dict) and arrays and all(_is_entry(*item) for item in arrays.items()):
            return arrays
    for name in names:
        if isinstance(content.get(name), Dropped):
            raise CheckpointError(f"{name!r} is a whole object of {_shown(content[name].name)}", where, fix)
        for entry, value in content[name].items() if isinstance(content.get(name), dict) else ():
            if not _is_entry(entry, value):
                kind = value.name if isinstance(value, Dropped) else type(value).__name__
                raise CheckpointError(
                    f"{name!r} is no state dict: {_shown(entry)} is {_shown(kind)}, not an array", where, fix
                )
    keys = ", ".join(_shown(key) for key in list(content)[:20]) + (", ..." if len(content) > 20 else "")
    raise CheckpointError(f"no state dict among the keys {keys or '(none)'}", where, fix)


def refuse_expanded(arrays: dict[str, np.ndarray], file: Path) -> None:
    """Raise CheckpointError if the arrays, which may share storages or have strides of 0, need far more memory than
    `file` has bytes."""
    needed = sum(array.size * max(4, array.itemsize) for array in arrays.values())
    times, more = MAX_TOTAL
    if needed > times * file.stat().st_size + more:
        raise CheckpointError(
            f"its {len(arrays)} arrays share memory, and would take {needed / 2**30:.1f} GiB without",
            str(file), "give a file whose weights are stored each by itself",
        )  # fmt: skip


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray)


def _shown(text: object) -> str:
    """A name out of a file, fit for one line on a terminal: it may be long, or hold control characters."""
    line = "".join(c if c.isprintable() and c.isascii() else "?" for c in str(text)[:200])
    return line if len(str(text)) <= 200 else line + "..."


# The file


def _mapped(path: Path, where: str) -> mmap.mmap:
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
        raise CheckpointError("a web page, not weights", where, "download the file itself, logged in if need be")
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("a git-lfs pointer, not the weights", where, "run `git lfs pull` in its repository")
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= len(data) - 8:
        raise CheckpointError("a safetensors file under another name", where, "rename it to .safetensors")
    if start[257:262] == b"ustar":
        fix = "if it is of PyTorch before 0.1.10, load it with PyTorch and save it again"
        raise CheckpointError("a tar file, which is not read", where, fix)
    if start[:1] != b"\x80" and start[:4] != b"PK\x03\x04":
        raise CheckpointError("not a PyTorch file", where, "give a file that torch.save wrote")


def _read_zip(data: mmap.mmap, where: str) -> object:
    try:
        with zipfile.ZipFile(data) as archive:
            entries = archive.infolist()
    except Exception as error:
        raise ValueError("the table at its end is missing or broken, as if it were cut short") from error
    names = {entry.filename: entry for entry in entries}
    if len(names) != len(entries) or sum(entry.file_size for entry in entries) > len(data):
        raise ValueError("its table of entries contradicts itself")
    roots = [name.removesuffix("data.pkl") for name in names if re.fullmatch(r"[^/]*/data\.pkl", name)]
    if any(re.fullmatch(r"[^/]*/(constants\.pkl|code/.*)", name) for name in names):
        raise CheckpointError("a TorchScript archive: a program", where, "give the state dict of the model in it")
    if len(roots) != 1:
        raise CheckpointError("a zip archive, but not of torch.save", where, "give a file that torch.save wrote")
    root = roots[0]

    def entry(name):
        if root + name not in names:
            raise ValueError(f"it has no entry {_shown(name)}")
        return _stored(data, names[root + name])

    byteorder = entry("byteorder").tobytes() if root + "byteorder" in names else b"little"
    if byteorder not in (b"little", b"big"):
        raise ValueError("its byte order is neither little nor big")
    big_endian, storages = byteorder == b"big", {}

    def storage_of(identity):
        kind, key, count, _ = _storage(identity, 5)
        if kind is None:
            return Dropped(identity[1].name)
        if key not in storages:
            storages[key] = entry(f"data/{key}") if count else np.empty(0, np.uint8)
        if count * kind.itemsize > storages[key].size:
            raise ValueError(f"its storage {_shown(key)} is smaller than it says")
        array = np.ndarray((count,), kind, storages[key]) if count else np.empty(0, kind)
        if big_endian and "Untyped" in identity[1].name:
            raise ValueError("untyped storages of a big-endian machine are not read")
        if not big_endian or kind.itemsize == 1:
            return array
        if (key, kind) not in storages:
            unit = kind.itemsize // 2 if kind.kind == "c" else kind.itemsize
            storages[key, kind] = array.view(f"u{unit}").byteswap().view(kind)
        return storages[key, kind]

    return _unpickle(io.BytesIO(entry("data.pkl").tobytes()), len(data), storage_of)


def _stored(data: mmap.mmap, entry: zipfile.ZipInfo) -> np.ndarray:
    """The bytes of an entry, in place."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
        raise ValueError(f"its entry {_shown(entry.filename)} is compressed or encrypted")
    at = entry.header_offset
    header = data[at : at + 30]
    if at < 0 or header[:4] != b"PK\x03\x04" or len(header) < 30:
        raise ValueError(f"its entry {_shown(entry.filename)} is not where the table says")
    at += 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    if at + entry.file_size > len(data):
        raise ValueError(f"its entry {_shown(entry.filename)} is larger than the file")
    content = np.frombuffer(data, np.uint8, entry.file_size, at)
    if entry.CRC and zlib.crc32(content) != entry.CRC:  # 0 with torch.serialization.set_crc32_options(False)
        raise ValueError(f"its entry {_shown(entry.filename)} differs from its checksum")
    return content


def _read_stream(data: mmap.mmap, where: str) -> object:
    def no_storage(_):
        raise ValueError("a storage stands where none can")

    def is_next(number):
        value = _unpickle(data, len(data), no_storage)
        return type(value) is int and value == number

    if not is_next(MAGIC):
        fix = "load it with what wrote it, and save the weights as safetensors"
        raise CheckpointError("a plain pickle, not a file of torch.save", where, fix)
    if not is_next(PROTOCOL):
        raise ValueError("the version of its format is unknown")
    _unpickle(data, len(data), no_storage)  # byte order and sizes of types, of the machine: storages are little-endian

    storages, taken = {}, 0

    def storage_of(identity):
        nonlocal taken
        if identity[:1] == ("module",) and len(identity) == 4:
            return identity[1]
        kind, key, count, view = _storage(identity, 6)
        if kind is None:
            raise ValueError(f"storages of {_shown(identity[1].name)} are not read")
        if key not in storages:
            # The storages' own bytes come after the object, so their memory is taken before.
            taken += count * kind.itemsize
            if taken > len(data):
                raise ValueError("its storages are larger than the file")
            storages[key] = np.zeros(count, kind)
        if storages[key].dtype != kind:
            raise ValueError(f"its storage {_shown(key)} has two types")
        if view is None:
            return storages[key]
        _, start, length = view
        if not (_is_count(start) and _is_count(length) and start + length <= storages[key].size):
            raise ValueError(f"a view lies outside its storage {_shown(key)}")
        return storages[key][start : start + length]

    content = _unpickle(data, len(data), storage_of)
    keys = _unpickle(data, len(data), no_storage)
    if type(keys) is not list or not all(type(key) is str for key in keys) or sorted(keys) != sorted(storages):
        raise ValueError("its list of storages is not that of its tensors")
    for key in keys:
        storage = storages[key]
        if int.from_bytes(data.read(8), "little") != storage.size or data.tell() + storage.nbytes > len(data):
            raise ValueError(f"its storage {_shown(key)} is of another size, or cut short")
        storage.view(np.uint8)[:] = np.frombuffer(data, np.uint8, storage.nbytes, data.tell())
        data.seek(storage.nbytes, os.SEEK_CUR)
    return content


def _storage(identity: tuple, length: int) -> tuple:
    """(dtype or None if not read, key, count, view or None) of a persistent id, checked."""
    if len(identity) not in (5, length) or identity[0] != "storage" or not isinstance(identity[1], Dropped):
        raise ValueError("a persistent id is not of a storage")
    _, kind, key, _, count, view = (*identity, None)[:6]
    is_view = type(view) is tuple and len(view) == 3
    if type(key) is not str or not _is_count(count) or not (view is None or is_view):
        raise ValueError("the persistent id of a storage is malformed")
    name = re.fullmatch(r"torch\.(?:cuda\.|storage\.)?(\w+)Storage", kind.name)
    if not name:
        raise ValueError(f"{_shown(kind.name)} is not a type of storage")
    known = STORAGES.get(name[1])
    return known and np.dtype(DTYPES[known]), key, count, view


# The stack machine


def _unpickle(stream: io.BytesIO | mmap.mmap, file_size: int, storage_of: Callable) -> object:
    """What the pickle at the stream's position makes, which is left behind it.

    file_size: no more than this is copied. storage_of: an array for a persistent id.
    Raises _HostileError if it asks to run something, ValueError or another if it is damaged.
    """
    stack, marks, memo, copied = [], [], {}, 0

    def top():
        if len(stack) <= (marks[-1] if marks else 0):
            raise ValueError("its pickle takes from an empty stack")
        return stack[-1]

    def pop():
        top()
        return stack.pop()

    def pop_mark():
        if not marks:
            raise ValueError("its pickle has no mark where it needs one")
        at = marks.pop()
        items = stack[at:]
        del stack[at:]
        return items

    def put(place):
        memo[place] = top()
        if isinstance(stack[-1], _Unbuilt):
            stack[-1].places.append(place)

    def counted(values):
        """The values, unless copies of them grow beyond the file: a memo lets a long one be named often."""
        nonlocal copied
        if type(values) is not tuple:
            raise ValueError("its pickle calls with what are no arguments")
        copied += len(values) + sum(len(x) for x in values if isinstance(x, str | bytes | list | tuple | dict | set))
        if copied > file_size + 2**20:
            raise ValueError("its pickle multiplies its content")
        return values

    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_OBJECTS:
            raise ValueError(f"its pickle has more than {MAX_OBJECTS} operations")
        match opcode.name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                put(argument)
            case "MEMOIZE":
                put(len(memo))
            case "BINGET" | "LONG_BINGET" | "GET":
                if argument not in memo:
                    raise ValueError("its pickle refers to what is not there")
                stack.append(memo[argument])
            case (
                "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE" | "STRING" | "BINSTRING"
                | "SHORT_BINSTRING" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "INT" | "BININT" | "BININT1"
                | "BININT2" | "LONG" | "LONG1" | "LONG4" | "FLOAT" | "BINFLOAT"
            ):  # fmt: skip
                stack.append(argument)
            case "BYTEARRAY8":
                stack.append(bytes(argument))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "MARK":
                marks.append(len(stack))
            case "POP":
                if marks and marks[-1] == len(stack):
                    marks.pop()
                else:
                    pop()
            case "POP_MARK":
                pop_mark()
            case "DUP":
                stack.append(top())
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [pop() for _ in range(int(opcode.name[-1]))]
                stack.append(tuple(reversed(items)))
            case "EMPTY_LIST":
                stack.append([])
            case "LIST":
                stack.append(pop_mark())
            case "EMPTY_DICT":
                stack.append({})
            case "DICT":
                stack.append(_with_items({}, pop_mark()))
            case "EMPTY_SET":
                stack.append(set())
            case "FROZENSET":
                stack.append(_set(pop_mark()))
            case "APPEND" | "APPENDS":
                items = [pop()] if opcode.name == "APPEND" else pop_mark()
                if type(top()) is list:
                    top().extend(items)
                elif not isinstance(top(), Dropped):
                    raise ValueError("its pickle appends to what is no list")
            case "SETITEM" | "SETITEMS":
                items = [pop(), pop()][::-1] if opcode.name == "SETITEM" else pop_mark()
                _with_items(top(), items)
            case "ADDITEMS":
                items = pop_mark()
                if type(top()) is set:
                    top().update(_set(items))
                elif not isinstance(top(), Dropped):
                    raise ValueError("its pickle adds to what is no set")
            case "GLOBAL":
                stack.append(_global(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                name, module = pop(), pop()
                stack.append(_global(module, name))
            case "REDUCE":
                arguments, function = pop(), pop()
                stack.append(_call(function, counted(arguments)))
            case "NEWOBJ":
                arguments, kind = pop(), pop()
                stack.append(_instance(kind, counted(arguments)))
            case "NEWOBJ_EX":
                _, arguments, kind = pop(), pop(), pop()
                stack.append(_instance(kind, counted(arguments)))
            case "INST":
                function = _global(*argument.split(" ", 1))
                stack.append(_call(function, counted(tuple(pop_mark()))))
            case "OBJ":
                function, *arguments = pop_mark()
                stack.append(_call(function, counted(tuple(arguments))))
            case "BUILD":
                state, unbuilt = pop(), top()
                if isinstance(unbuilt, _Unbuilt):
                    stack[-1] = _built(unbuilt, counted(state))
                    memo.update(dict.fromkeys(unbuilt.places, stack[-1]))
                elif not isinstance(unbuilt, Dropped | dict | list | set | np.ndarray | np.dtype):
                    raise ValueError("its pickle gives a state to what has none")
            case "BINPERSID":
                identity = pop()
                if type(identity) is not tuple:
                    raise ValueError("a persistent id is not of a storage")
                stack.append(storage_of(identity))
            case "EXT1" | "EXT2" | "EXT4":
                raise _HostileError(f"extension {argument} of whoever reads it")
            case _:
                raise ValueError(f"its pickle has the opcode {opcode.name}, which PyTorch never writes")
    if len(stack) != 1 or marks:
        raise ValueError("its pickle ends in the middle")
    return stack[0]


def _with_items(target: object, items: list) -> object:
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    if type(target) is dict:
        keys = items[::2]
        if not all(map(_is_key, keys)):
            raise ValueError("a key of a dict is not a word or number")
        target.update(zip(keys, items[1::2], strict=True))
    elif not isinstance(target, Dropped):
        raise ValueError("its pickle sets an item of what is no dict")
    return target


def _is_key(value: object) -> bool:
    """Whether hashing it takes no time to speak of: a tuple of tuples of one tuple can be made to take years."""
    if type(value) is tuple:
        return len(value) <= 16 and all(type(x) is not tuple and _is_key(x) for x in value)
    if type(value) is int:
        return value.bit_length() <= 64
    return value is None or type(value) in (str, bytes, float, bool, Dropped)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _global(module: object, name: object) -> Dropped:
    """A global as a name, its module as NumPy 1, Python 3 and PyTorch 2 have it. Raises _HostileError if it can act."""
    if type(module) is not str or type(name) is not str or len(module) + len(name) > 1000:
        raise ValueError("a global has no name")
    default = _compat_pickle.IMPORT_MAPPING.get(module, module), name
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), default)
    module = "torch._tensor" if module == "torch.tensor" else re.sub(r"^numpy\._core\b", "numpy.core", module)
    full, parts = f"{module}.{name}", name.split(".")
    if not all(part.isidentifier() for part in full.split(".")):
        raise ValueError(f"{full} is not a name")
    if full in REBUILDERS or full in PLAIN:
        return Dropped(full)
    reached = any(part.lstrip("_") in ACTING for part in (module.partition(".")[0], *parts[:-1]))
    if reached or _is_under(full, ACTING_NAMES) or any(re.fullmatch("__.*__", part) for part in parts):
        raise _HostileError(full)
    return Dropped(full)


def _is_under(name: str, prefixes: tuple) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def _call(function: object, arguments: object) -> object:
    if not isinstance(function, Dropped) or type(arguments) is not tuple:
        raise ValueError("its pickle calls what is no function")
    if function.name in REBUILDERS:
        try:
            return REBUILDERS[function.name](*arguments)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the arguments of {function.name} do not fit") from error
    if _is_under(function.name, HARMLESS):
        return Dropped(function.name)
    raise _HostileError(function.name)


def _instance(kind: object, arguments: object) -> object:
    if isinstance(kind, Dropped) and kind.name not in REBUILDERS:
        return kind
    return _call(kind, arguments)


def _refuse_bombs(content: object) -> None:
    """Raise ValueError if the content is in itself, too deep, or too large for whoever walks through it.

    Ten lists, each with ten times the one before, take a hundred bytes of pickle and ten thousand million visits.
    """
    measures, within, todo = {}, set(), [(content, False)]  # by id: (objects, depth)
    while todo:
        value, is_measured = todo.pop()
        if isinstance(value, _Unbuilt):
            raise ValueError("an array lacks its data")
        if type(value) not in (dict, list, tuple) or id(value) in measures:
            continue
        inner = list(value.values()) if type(value) is dict else value
        if is_measured:
            parts = [measures.get(id(x), (1, 0)) for x in inner]
            measures[id(value)] = 1 + sum(n for n, _ in parts), 1 + max((depth for _, depth in parts), default=0)
            within.discard(id(value))
            if measures[id(value)][0] > MAX_OBJECTS or measures[id(value)][1] > MAX_DEPTH:
                raise ValueError(f"its content unfolds into over {MAX_OBJECTS} objects or {MAX_DEPTH} levels")
        elif id(value) in within:
            raise ValueError("its content contains itself")
        else:
            within.add(id(value))
            todo.append((value, True))
            todo.extend((x, False) for x in inner)


# What is rebuilt. Arguments come from the file: nothing about them is known.


def _tensor(storage: object, offset: object, size: object, stride: object, *_) -> object:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return storage if isinstance(storage, Dropped) else _view(storage, storage.dtype, offset, size, stride)


def _tensor_v3(storage: object, offset: object, size: object, stride: object, _, hooks: object, dtype: object, *__):
    """torch._utils._rebuild_tensor_v3: an untyped storage, and the type of the tensor."""
    kind = DTYPES.get(dtype.name.removeprefix("torch."))
    return dtype if kind is None else _view(storage, np.dtype(kind), offset, size, stride)


def _view(storage: np.ndarray, dtype: np.dtype, offset: object, size: object, stride: object) -> np.ndarray:
    """As torch.Tensor.set_: offset and strides in elements."""
    if type(storage) is not np.ndarray or storage.ndim != 1 or not storage.flags.c_contiguous:
        raise ValueError("a tensor has no storage")
    if type(size) not in (tuple, list) or type(stride) not in (tuple, list) or len(size) != len(stride):
        raise ValueError("a tensor has no shape")
    if len(size) > 64 or not all(map(_is_count, (offset, *size, *stride))):
        raise ValueError("the shape of a tensor is not of whole numbers")
    if 0 in size:
        return np.empty(tuple(size), dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = 1
    for n in size:
        elements *= n
    too_large = elements * dtype.itemsize > max(storage.nbytes, MAX_EXPANDED)
    if (last + 1) * dtype.itemsize > storage.nbytes or too_large:
        raise ValueError("a tensor is larger than its storage")
    steps = tuple(step * dtype.itemsize for step in stride)
    return np.ndarray(tuple(size), dtype, storage.view(np.uint8), offset * dtype.itemsize, steps)


def _same(value: object, *_) -> object:
    """torch.nn.Parameter and its like around a tensor; arrays that stood for a TPU's tensors."""
    if not isinstance(value, np.ndarray | Dropped):
        raise ValueError("a parameter holds no tensor")
    return value


def _of_subclass(function: object, kind: object, arguments: object, *_) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    if function.name not in TENSORS:
        raise ValueError("a tensor is rebuilt by what does not")
    return _call(function, arguments)


def _size(shape: object = ()) -> tuple:
    if type(shape) not in (tuple, list):
        raise ValueError("a size is not a tuple")
    return tuple(shape)


def _dict(items: object = ()) -> dict:
    """collections.OrderedDict, Counter and, with its factory left out, defaultdict."""
    if type(items) is dict:
        return dict(items)
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in items):
        raise ValueError("a dict is not of pairs")
    return _with_items({}, [x for pair in items for x in pair])


def _default_dict(factory: object = None, items: object = ()) -> dict:
    return _dict(items)


def _set(items: object = ()) -> set:
    if type(items) not in (list, tuple, set) or not all(map(_is_key, items)):
        raise ValueError("a set is not of words or numbers")
    return set(items)


def _complex(real: object, imaginary: object) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number is not of two others")
    return complex(real, imaginary)


def _bytes(value: object = b"", encoding: object = "latin1") -> bytes:
    """_codecs.encode, as which Python 3 pickles bytes for Python 2; bytearray."""
    if type(value) is bytes:
        return value
    if type(value) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not of latin-1")
    return value.encode("latin1")


def _plain_object(kind: object, *_) -> object:
    """copyreg._reconstructor, which makes instances before protocol 2."""
    return _instance(kind, ())


def _dtype(name: object, *_) -> object:
    if type(name) is not str or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", name):
        return Dropped("numpy.dtype")
    return _Unbuilt(np.dtype(name))


def _unbuilt_array(*_) -> _Unbuilt:
    return _Unbuilt(None)


def _built(unbuilt: _Unbuilt, state: object) -> object:
    if type(state) is not tuple:
        raise ValueError("an array has no state")
    if unbuilt.dtype is not None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise ValueError("a dtype has no byte order")
        return unbuilt.dtype.newbyteorder(order)
    _, shape, dtype, is_fortran, data = state
    return _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object = "C") -> object:
    """An array by NumPy 1 or 2: the state of an ndarray, or numpy._core.numeric._frombuffer of protocol 5."""
    if isinstance(dtype, Dropped):
        return Dropped("numpy.ndarray")
    dtype = dtype.dtype if isinstance(dtype, _Unbuilt) else dtype
    data = _bytes(data)
    if not isinstance(dtype, np.dtype) or type(shape) is not tuple or not all(map(_is_count, shape)):
        raise ValueError("an array has no shape or dtype")
    if order not in ("C", "F"):
        raise ValueError("an array has no order")
    array = np.ndarray(shape, dtype, data, order=order) if 0 not in shape else np.empty(shape, dtype)
    if array.nbytes != len(data):
        raise ValueError("an array is of another size than its data")
    return array if dtype.isnative else array.astype(dtype.newbyteorder("="))


def _scalar(dtype: object, data: object = b"") -> object:
    array = _array(data, dtype, ())
    return Dropped("numpy.generic") if isinstance(array, Dropped) else array.item()


TENSORS = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _same,
    "torch._utils._rebuild_parameter_with_state": _same,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": _same,
    "torch._utils._rebuild_device_tensor_from_numpy": _same,
    "torch._utils._rebuild_xla_tensor": _same,
}
REBUILDERS = TENSORS | {
    "torch._tensor._rebuild_from_type": _of_subclass,
    "torch._tensor._rebuild_from_type_v2": _of_subclass,
    "torch.nn.parameter.Parameter": _same,
    "torch.nn.parameter.Buffer": _same,
    "torch.autograd.variable.Variable": _same,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": _set,
    "builtins.frozenset": _set,
    "builtins.complex": _complex,
    "builtins.bytearray": _bytes,
    "builtins.bytes": _bytes,
    "_codecs.encode": _bytes,
    "copyreg._reconstructor": _plain_object,
    "numpy.dtype": _dtype,
    "numpy.core.multiarray._reconstruct": _unbuilt_array,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy.core.numeric._frombuffer": _array,
}
