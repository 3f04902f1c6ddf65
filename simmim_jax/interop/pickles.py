"""A restricted unpickler for PyTorch files. It imports nothing and calls nothing that a file names.

A pickle is a program that can name any global and call it. Here a global becomes a `Dropped`, which holds its name and
nothing else. What happens next, by the first rule that fits:

- names in REBUILDERS are rebuilt as plain data by the functions of `rebuild`;
- names in ALLOWED become a `Dropped`, also if they are called;
- other names in the standard library, or reached through it, are refused wherever they appear;
- any other name becomes a `Dropped` if it is only mentioned or instantiated (NEWOBJ), as the yacs config in official
  files, and is refused if it is called (REDUCE, INST, OBJ).

A Dropped swallows the state, items and entries that the pickle gives it.

`_Unpickler` subclasses Python's `pickle._Unpickler`. The faster `pickle.Unpickler` is not safe with any `find_class`:

- it allocates its memo up to the largest index, so that five bytes ask for 64 GB;
- it hashes dict keys without a limit, so that 200 bytes of nested tuples take years;
- a subclass cannot tell NEWOBJ from REDUCE, and cannot replace BUILD, which sets attributes.

In the Python class the memo is a dict and each opcode is a method. `_Unpickler.dispatch` lists the opcodes that are
allowed: those that only move values, from Python, and replacements for those that call, build, hash or allocate.
`pickletools.genops` checks opcodes, lengths and the number of operations first, so that memory is bounded by the file.

Sources: _weights_only_unpickler.py of PyTorch 2.13, CPython's pickle.py and its table of Python 2's names.
"""

import _compat_pickle
import io
import mmap
import pickle
import pickletools
import re
import sys
from collections.abc import Callable

import numpy as np

from simmim_jax.interop.rebuild import REBUILDERS, Dropped, Unbuilt, build, make_set, set_items

MAX_OBJECTS = 10_000_000  # opcodes in a pickle; objects in its content, with shared ones counted each time
MAX_DEPTH = 200  # containers within containers
MAX_COPIES = 2**20  # elements copied from the memo, in addition to the file's size

ALLOWED = (
    "argparse", "builtins.NoneType", "builtins.bool", "builtins.dict", "builtins.float", "builtins.int",
    "builtins.list", "builtins.object", "builtins.range", "builtins.slice", "builtins.str", "builtins.tuple",
    "collections", "datetime", "decimal", "enum", "fractions", "math", "numbers", "numpy.dtypes", "numpy.random",
    "omegaconf", "pathlib", "random", "re", "torch.device", "torch.optim",
    "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_nested_tensor",
    "torch._utils._rebuild_qtensor", "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_wrapper_subclass",
    "torch.serialization._get_layout", "types.SimpleNamespace", "typing", "uuid", "yacs",
)  # fmt: skip
OPCODES = (  # opcodes of which Python's implementation only moves values, or calls a method replaced here
    "PROTO FRAME STOP MARK POP POP_MARK DUP NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT "
    "BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES "
    "SHORT_BINBYTES BINBYTES8 EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST LIST EMPTY_DICT EMPTY_SET PUT BINPUT "
    "LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET GLOBAL STACK_GLOBAL INST OBJ BINPERSID"
)
REPLACED = "REDUCE NEWOBJ NEWOBJ_EX BUILD APPEND APPENDS ADDITEMS SETITEM SETITEMS DICT FROZENSET BYTEARRAY8"


def one_line(text: object) -> str:
    """A text from a file for one line of a terminal: at most 200 printable ASCII characters."""
    line = "".join(c if c.isprintable() and c.isascii() else "?" for c in str(text)[:200])
    return line if len(str(text)) <= 200 else line + "..."


class HostileError(Exception):
    """The name of the global that a file tries to run."""


def unpickle(stream: io.BytesIO | mmap.mmap, file_size: int, load_storage: Callable) -> object:
    """The content of the pickle at the stream's position, which is left behind the pickle.

    file_size: limit of what is copied. load_storage: gives the array for a persistent id.
    Raises HostileError if the pickle tries to run something, ValueError or another exception if it is damaged.
    """
    start = stream.tell()
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > MAX_OBJECTS:
            raise ValueError(f"its pickle has more than {MAX_OBJECTS} operations")
        if opcode.name in ("EXT1", "EXT2", "EXT4"):
            raise HostileError(f"extension {argument} of the reader")
        if ord(opcode.code) not in _Unpickler.dispatch:
            raise ValueError(f"its pickle has the opcode {opcode.name}, which PyTorch never writes")
    end = stream.tell()
    stream.seek(start)
    unpickler = _Unpickler(io.BytesIO(stream.read(end - start)), file_size, load_storage)
    content = unpickler.load()
    if unpickler.stack or unpickler.metastack:
        raise ValueError("its pickle ends in the middle")
    return content


class _Memo(dict):
    def __setitem__(self, key, value):
        if isinstance(value, Unbuilt):
            value.memo_keys.append(key)
        super().__setitem__(key, value)


class _Unpickler(pickle._Unpickler):
    dispatch = {}  # noqa: RUF012 - as in the base class; filled below

    def __init__(self, file: io.BytesIO, file_size: int, load_storage: Callable):
        super().__init__(file, encoding="latin1")
        self.memo, self.load_storage = _Memo(), load_storage
        self.copies_left = file_size + MAX_COPIES

    def find_class(self, module: str, name: str) -> Dropped:
        return resolve_global(module, name)

    def persistent_load(self, identity: object) -> object:
        if type(identity) is not tuple:
            raise ValueError("a persistent id names no storage")
        return self.load_storage(identity)

    def limited(self, values: object) -> tuple:
        """The arguments of a call, if copies of them do not outgrow the file: the memo can name a long one often."""
        if type(values) is not tuple:
            raise ValueError("its pickle calls a function without arguments")
        sizes = (len(x) for x in values if isinstance(x, str | bytes | list | tuple | dict | set))
        self.copies_left -= len(values) + sum(sizes)
        if self.copies_left < 0:
            raise ValueError("its pickle multiplies its content")
        return values

    def _instantiate(self, function, arguments):  # INST and OBJ
        self.append(_call(function, self.limited(tuple(arguments))))

    def load_reduce(self):
        arguments, function = self.stack.pop(), self.stack.pop()
        self.append(_call(function, self.limited(arguments)))

    def load_newobj(self):
        arguments, cls = self.stack.pop(), self.stack.pop()
        self.append(_instance(cls, self.limited(arguments)))

    def load_newobj_ex(self):
        self.stack.pop()  # keyword arguments
        self.load_newobj()

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Unbuilt):
            self.stack[-1] = build(target, self.limited(state))
            self.memo.update(dict.fromkeys(target.memo_keys, self.stack[-1]))
        elif not isinstance(target, Dropped | dict | list | set | np.ndarray | np.dtype):
            raise ValueError("its pickle gives a state to an object without one")

    def load_append(self):
        _add(self.stack[-2], [self.stack.pop()], list)

    def load_appends(self):
        items = self.pop_mark()
        _add(self.stack[-1], items, list)

    def load_additems(self):
        items = self.pop_mark()
        _add(self.stack[-1], items, set)

    def load_setitem(self):
        value, key = self.stack.pop(), self.stack.pop()
        set_items(self.stack[-1], [key, value])

    def load_setitems(self):
        items = self.pop_mark()
        set_items(self.stack[-1], items)

    def load_dict(self):
        self.append(set_items({}, self.pop_mark()))

    def load_frozenset(self):
        self.append(make_set(self.pop_mark()))

    def load_bytearray8(self):
        self.load_binbytes8()  # Python's own allocates the length before it reads


for _name in OPCODES.split():
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = pickle._Unpickler.dispatch[getattr(pickle, _name)[0]]
for _name in REPLACED.split():
    _Unpickler.dispatch[getattr(pickle, _name)[0]] = getattr(_Unpickler, f"load_{_name.lower()}")


def _add(target: object, items: list, kind: type) -> None:
    if type(target) is kind:
        target.update(make_set(items)) if kind is set else target.extend(items)
    elif not isinstance(target, Dropped):
        raise ValueError(f"its pickle adds items to an object that is no {kind.__name__}")


def resolve_global(module: str, name: str) -> Dropped:
    """A global as its name in NumPy 1, Python 3 and PyTorch 2. Raises HostileError if it could run something."""
    if len(module) + len(name) > 1000:
        raise ValueError("a global has too long a name")
    default = _compat_pickle.IMPORT_MAPPING.get(module, module), name
    module, name = _compat_pickle.NAME_MAPPING.get((module, name), default)
    module = "torch._tensor" if module == "torch.tensor" else re.sub(r"^numpy\._core\b", "numpy.core", module)
    full, parts = f"{module}.{name}", name.split(".")
    if not all(part.isidentifier() for part in full.split(".")):
        raise ValueError(f"{full} is not a name")
    if full in REBUILDERS:
        return Dropped(full)
    is_standard = module.partition(".")[0] in sys.stdlib_module_names and not _is_allowed(full)
    is_reached = any(part in sys.stdlib_module_names for part in parts[:-1])
    if is_standard or is_reached or any(re.fullmatch("__.*__", part) for part in parts):
        raise HostileError(full)
    return Dropped(full)


def _is_allowed(name: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in ALLOWED)


def _call(function: object, arguments: object) -> object:
    if not isinstance(function, Dropped) or type(arguments) is not tuple:
        raise ValueError("its pickle calls an object that is no function")
    if function.name in REBUILDERS:
        try:
            return REBUILDERS[function.name](*arguments)
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the arguments of {function.name} do not fit") from error
    if _is_allowed(function.name):
        return Dropped(function.name)
    raise HostileError(function.name)


def _instance(cls: object, arguments: object) -> object:
    return cls if isinstance(cls, Dropped) and cls.name not in REBUILDERS else _call(cls, arguments)


def check_unfolded(content: object) -> None:
    """Raise ValueError if the content contains itself, is too deep, or is too large to walk through.

    Ten lists that each hold the previous one ten times take a hundred bytes of pickle and 10**10 visits.
    """
    measures, parents, todo = {}, set(), [(content, False)]  # measures: (objects, depth) by id
    while todo:
        value, is_measured = todo.pop()
        if isinstance(value, Unbuilt):
            raise ValueError("an array has no data")
        if type(value) not in (dict, list, tuple) or id(value) in measures:
            continue
        inner = list(value.values()) if type(value) is dict else value
        if is_measured:
            parts = [measures.get(id(x), (1, 0)) for x in inner]
            measures[id(value)] = 1 + sum(n for n, _ in parts), 1 + max((depth for _, depth in parts), default=0)
            parents.discard(id(value))
            if measures[id(value)][0] > MAX_OBJECTS or measures[id(value)][1] > MAX_DEPTH:
                raise ValueError(f"its content unfolds into over {MAX_OBJECTS} objects or {MAX_DEPTH} levels")
        elif id(value) in parents:
            raise ValueError("its content contains itself")
        else:
            parents.add(id(value))
            todo.append((value, True))
            todo.extend((x, False) for x in inner)
