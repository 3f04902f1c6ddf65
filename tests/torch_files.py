"""Write files like torch.save, without PyTorch: valid, damaged and hostile ones.

NumPy arrays (bfloat16 by ml_dtypes) are pickled as tensors, with a shared storage if they share memory.
Source: torch/serialization.py and Tensor.__reduce_ex__ of PyTorch 2.13.
"""

import collections
import io
import pickle
import zipfile
from dataclasses import dataclass

import numpy as np

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
STORAGE_OF = {
    "float64": "Double", "float32": "Float", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long", "int32": "Int",
    "int16": "Short", "int8": "Char", "uint8": "Byte", "bool": "Bool", "complex64": "ComplexFloat",
    "complex128": "ComplexDouble",
}  # fmt: skip


@dataclass(frozen=True)
class Global:
    """A global that the pickle imports. It need not exist here."""

    module: str
    name: str

    def __call__(self, *_):
        raise AssertionError(f"{self.module}.{self.name} was called")


class CfgNode(dict):
    """Pickled as a yacs.config.CfgNode, like the config in official checkpoints."""

    def __init__(self, *args, **kw):
        super().__init__(*args, **kw)
        self.__dict__ |= {"__immutable__": True, "__deprecated_keys__": set(), "__new_allowed__": False}


class Call:
    """Pickled as a call of `function` with `arguments`, which Python's unpickler executes."""

    def __init__(self, function, *arguments, state=None):
        self.reduced = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self):
        return self.reduced


class Parameter:
    """Pickled as a torch.nn.Parameter."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __reduce__(self):
        rebuild = Global("torch._utils", "_rebuild_parameter")
        return rebuild, (self.array, True, collections.OrderedDict())


class AsNumpy:
    """Pickled as a NumPy array, not as a tensor."""

    def __init__(self, array: np.ndarray):
        self.array = array

    def __reduce__(self):
        return self.array.__reduce__()


@dataclass(frozen=True)
class Storage:
    """Pickled as a persistent id. memory: the one-dimensional array that holds the tensors."""

    kind: str
    key: str
    memory: np.ndarray


class Pickler(pickle._Pickler):
    """Python's pickler in Python, so that it can write a Global that does not exist here."""

    def __init__(self, file, legacy, protocol):
        super().__init__(file, protocol)
        self.legacy, self.storages = legacy, {}  # by id of an array: its storage, and the array to keep the id valid

    def save(self, obj, save_persistent_id=True):
        obj = Global("yacs.config", "CfgNode") if obj is CfgNode else obj
        if not isinstance(obj, Global):
            return super().save(obj, save_persistent_id)
        if (known := self.memo.get(id(obj))) is not None:
            return self.write(self.get(known[0]))
        if self.proto >= 4:
            self.save(obj.module)
            self.save(obj.name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{obj.module}\n{obj.name}\n".encode())
        return self.memoize(obj)

    def persistent_id(self, obj):
        if not isinstance(obj, Storage):
            return None
        size = obj.memory.size
        module = "torch.storage" if obj.kind == "UntypedStorage" else "torch"
        return "storage", Global(module, obj.kind), obj.key, "cpu", size, *([None] if self.legacy else [])

    def reducer_override(self, obj):
        if not isinstance(obj, np.ndarray):
            return NotImplemented
        root = obj
        while isinstance(root.base, np.ndarray) and root.base.dtype == obj.dtype:
            root = root.base
        root = root if root.flags.c_contiguous else np.ascontiguousarray(obj)
        view = obj if np.may_share_memory(obj, root) or not obj.size else root
        storage = self.storage(root, obj.dtype.name)
        offset = (view.ctypes.data - root.ctypes.data) // obj.itemsize if obj.size else 0
        strides = tuple(step // obj.itemsize for step in view.strides)
        arguments = storage, offset, tuple(view.shape), strides, False, collections.OrderedDict()
        if obj.dtype.name in STORAGE_OF:
            return Global("torch._utils", "_rebuild_tensor_v2"), arguments
        return Global("torch._utils", "_rebuild_tensor_v3"), (*arguments, Global("torch", obj.dtype.name))

    def storage(self, root, dtype):
        if id(root) not in self.storages:
            is_typed = dtype in STORAGE_OF
            kind = f"{STORAGE_OF[dtype]}Storage" if is_typed else "UntypedStorage"
            flat = root.reshape(-1)
            key = str(len(self.storages) + (94000000000000 if self.legacy else 0))
            self.storages[id(root)] = Storage(kind, key, flat if is_typed else flat.view(np.uint8)), root
        return self.storages[id(root)][0]


def pickled(content, *, legacy: bool = False, protocol: int = 2) -> tuple[bytes, dict[str, np.ndarray]]:
    """The pickle of `content`, and its storages by key."""
    stream = io.BytesIO()
    pickler = Pickler(stream, legacy, protocol)
    pickler.dump(content)
    return stream.getvalue(), {storage.key: storage.memory for storage, _ in pickler.storages.values()}


def pack(path, data: bytes, storages: dict[str, np.ndarray], *, legacy: bool = False, byteorder: str = "little"):
    """Write a file with a pickle, which can be any bytes, and storages."""
    if legacy:
        info = {"protocol_version": PROTOCOL, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
        with open(path, "wb") as file:
            for value in (MAGIC, PROTOCOL, info):
                pickle.dump(value, file, protocol=2)
            file.write(data)
            pickle.dump(sorted(storages), file, protocol=2)
            for key in sorted(storages):
                file.write(storages[key].size.to_bytes(8, "little") + storages[key].tobytes())
        return
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", byteorder)
        for key, memory in storages.items():
            unit = memory.itemsize // 2 if memory.dtype.kind == "c" else memory.itemsize
            stored = memory.view(f"u{unit}").byteswap() if byteorder == "big" else memory
            archive.writestr(f"archive/data/{key}", stored.tobytes())
        archive.writestr("archive/version", "3\n")


def write_pth(path, content, *, legacy: bool = False, protocol: int = 2):
    """Write `content` as torch.save would: a zip archive, or (legacy) the stream of PyTorch before 1.6."""
    pack(path, *pickled(content, legacy=legacy, protocol=protocol), legacy=legacy)
