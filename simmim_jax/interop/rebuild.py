"""Rebuild plain data for the functions that PyTorch and NumPy put into pickles; see `pickles`.

The arguments come from the file and can be anything. The functions raise ValueError, TypeError or AttributeError if
they do not fit. Sources: torch/_utils.py and torch/_tensor.py of PyTorch 2.13, and the pickles of NumPy 1 and 2.
"""

import re
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np

MAX_EXPANDED = 2**26  # bytes of an array whose strides of 0 make it larger than its storage

DTYPES = {
    "float64": np.float64, "float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16,
    "complex128": np.complex128, "complex64": np.complex64, "bool": np.bool_,
    "int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8,
    "uint64": np.uint64, "uint32": np.uint32, "uint16": np.uint16, "uint8": np.uint8,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "float8_e5m2": ml_dtypes.float8_e5m2, "float8_e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
}  # fmt: skip


@dataclass(frozen=True)
class Dropped:
    """Stands for a global or an object that is not read: its dotted name and nothing else."""

    name: str


@dataclass
class Unbuilt:
    """A NumPy array or dtype before its BUILD, and the memo entries to update then."""

    dtype: np.dtype | None
    memo_keys: list = field(default_factory=list)


def is_count(value: object) -> bool:
    """Whether it is an int from 0 to 2**63 - 1."""
    return type(value) is int and 0 <= value < 2**63


def is_key(value: object) -> bool:
    """Whether it is cheap to hash. The hash of nested tuples can take exponential time."""
    if type(value) is tuple:
        return len(value) <= 16 and all(type(x) is not tuple and is_key(x) for x in value)
    if type(value) is int:
        return value.bit_length() <= 64
    return value is None or type(value) in (str, bytes, float, bool, Dropped)


def set_items(target: object, items: list) -> object:
    """Add [key, value, key, value, ...] to a dict."""
    if len(items) % 2:
        raise ValueError("its pickle has a key without a value")
    if type(target) is dict:
        keys = items[::2]
        if not all(map(is_key, keys)):
            raise ValueError("a dict key is not a string or number")
        target.update(zip(keys, items[1::2], strict=True))
    elif not isinstance(target, Dropped):
        raise ValueError("its pickle sets an item of an object that is no dict")
    return target


def _tensor(storage: object, offset: object, size: object, stride: object, *_) -> object:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2."""
    return storage if isinstance(storage, Dropped) else _view(storage, storage.dtype, offset, size, stride)


def _tensor_v3(storage: object, offset: object, size: object, stride: object, _, hooks: object, dtype: object, *__):
    """torch._utils._rebuild_tensor_v3: an untyped storage, and the dtype of the tensor."""
    kind = DTYPES.get(dtype.name.removeprefix("torch."))
    return dtype if kind is None else _view(storage, np.dtype(kind), offset, size, stride)


def _view(storage: np.ndarray, dtype: np.dtype, offset: object, size: object, stride: object) -> np.ndarray:
    """torch.Tensor.set_: offset and strides in elements."""
    if type(storage) is not np.ndarray or storage.ndim != 1 or not storage.flags.c_contiguous:
        raise ValueError("a tensor has no storage")
    if type(size) not in (tuple, list) or type(stride) not in (tuple, list) or len(size) != len(stride):
        raise ValueError("a tensor has no shape")
    if len(size) > 64 or not all(map(is_count, (offset, *size, *stride))):
        raise ValueError("the shape of a tensor is not made of whole numbers")
    if 0 in size:
        return np.empty(tuple(size), dtype)
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    elements = 1
    for n in size:
        elements *= n
    is_too_large = elements * dtype.itemsize > max(storage.nbytes, MAX_EXPANDED)
    if (last + 1) * dtype.itemsize > storage.nbytes or is_too_large:
        raise ValueError("a tensor is larger than its storage")
    steps = tuple(step * dtype.itemsize for step in stride)
    return np.ndarray(tuple(size), dtype, storage.view(np.uint8), offset * dtype.itemsize, steps)


def _same(value: object, *_) -> object:
    """torch.nn.Parameter and other wrappers around a tensor; arrays that stand for a TPU's tensors."""
    if not isinstance(value, np.ndarray | Dropped):
        raise ValueError("a parameter holds no tensor")
    return value


def _subclass(function: object, cls: object, arguments: object, *_) -> object:
    """torch._tensor._rebuild_from_type_v2: a tensor with attributes, or of a subclass."""
    if function.name not in TENSORS:
        raise ValueError(f"{function.name} rebuilds no tensor")
    return TENSORS[function.name](*arguments)


def _size(shape: object = ()) -> tuple:
    if type(shape) not in (tuple, list):
        raise ValueError("a size is not a tuple")
    return tuple(shape)


def _dict(items: object = ()) -> dict:
    """collections.OrderedDict and Counter."""
    if type(items) is dict:
        return dict(items)
    if not all(type(pair) in (list, tuple) and len(pair) == 2 for pair in items):
        raise ValueError("the items of a dict are not pairs")
    return set_items({}, [x for pair in items for x in pair])


def _default_dict(factory: object = None, items: object = ()) -> dict:
    return _dict(items)


def make_set(items: object = ()) -> set:
    """builtins.set and frozenset."""
    if type(items) not in (list, tuple, set) or not all(map(is_key, items)):
        raise ValueError("a set is not made of strings or numbers")
    return set(items)


def _complex(real: object, imaginary: object) -> complex:
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("a complex number is not made of two floats")
    return complex(real, imaginary)


def _bytes(value: object = b"", encoding: object = "latin1") -> bytes:
    """_codecs.encode, which Python 3 uses to pickle bytes for Python 2; bytearray."""
    if type(value) is bytes:
        return value
    if type(value) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are not latin-1")
    return value.encode("latin1")


def _plain_object(cls: object, *_) -> object:
    """copyreg._reconstructor, which makes instances before protocol 2."""
    return REBUILDERS[cls.name]() if cls.name in REBUILDERS else Dropped(cls.name)


def _dtype(name: object, *_) -> object:
    if type(name) is not str or not re.fullmatch(r"[<>|=]?(b1|[iu][1248]|f[248]|c8|c16)", name):
        return Dropped("numpy.dtype")
    return Unbuilt(np.dtype(name))


def _unbuilt_array(*_) -> Unbuilt:
    return Unbuilt(None)


def build(unbuilt: Unbuilt, state: tuple) -> object:
    """The array or dtype with this state."""
    if unbuilt.dtype is not None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise ValueError("a dtype has no byte order")
        return unbuilt.dtype.newbyteorder(order)
    _, shape, dtype, is_fortran, data = state
    return _array(data, dtype, shape, "F" if is_fortran else "C")


def _array(data: object, dtype: object, shape: object, order: object = "C") -> object:
    """An array of NumPy 1 or 2: the state of an ndarray, or numpy._core.numeric._frombuffer of protocol 5."""
    if isinstance(dtype, Dropped):
        return Dropped("numpy.ndarray")
    dtype = dtype.dtype if isinstance(dtype, Unbuilt) else dtype
    data = _bytes(data)
    if not isinstance(dtype, np.dtype) or type(shape) is not tuple or not all(map(is_count, shape)):
        raise ValueError("an array has no shape or dtype")
    if order not in ("C", "F"):
        raise ValueError("an array has no order")
    array = np.ndarray(shape, dtype, data, order=order) if 0 not in shape else np.empty(shape, dtype)
    if array.nbytes != len(data):
        raise ValueError("an array has another size than its data")
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
    "torch._tensor._rebuild_from_type": _subclass,
    "torch._tensor._rebuild_from_type_v2": _subclass,
    "torch.nn.parameter.Parameter": _same,
    "torch.nn.parameter.Buffer": _same,
    "torch.autograd.variable.Variable": _same,
    "torch.Size": _size,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": _default_dict,
    "builtins.set": make_set,
    "builtins.frozenset": make_set,
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
