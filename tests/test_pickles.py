"""PyTorch files: what is read, and that nothing in them is ever run."""

import argparse
import collections
import contextlib
import functools
import io
import json
import os
import pathlib
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import ml_dtypes
import numpy as np
import pytest
from torch_files import MAGIC, STORAGE_OF, AsNumpy, Call, CfgNode, Global, Parameter, Storage, pack, pickled, write_pth

from simmim_jax.errors import CheckpointError
from simmim_jax.interop.pickles import MAX_DEPTH
from simmim_jax.interop.pth import read_pth
from simmim_jax.interop.reading import read_weights
from simmim_jax.interop.rebuild import Dropped
from simmim_jax.interop.selection import state_dicts

WAYS = [{}, {"protocol": 4}, {"protocol": 5}, {"legacy": True}]
BOTH = [False, True]


def array(*shape, dtype=np.float32, seed=0):
    return (np.random.default_rng(seed).normal(size=shape) * 50).astype(dtype)


def official(**extra) -> dict:
    """What main_simmim.py of the official repository saves."""
    model = collections.OrderedDict()
    model["encoder.patch_embed.proj.weight"] = array(8, 3, 4, 4)
    model["encoder.mask_token"] = array(1, 1, 8, seed=1)
    model["encoder.relative_position_index"] = np.arange(16).reshape(4, 4)
    model._metadata = collections.OrderedDict({"": {"version": 1}})
    moments = {"step": 7, "exp_avg": array(8, seed=2), "exp_avg_sq": array(8, seed=3)}
    optimizer = {"state": {0: moments}, "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0, 1]}]}
    config = CfgNode(DATA=CfgNode(IMG_SIZE=192), BASE=[""])
    return {"model": model, "optimizer": optimizer, "lr_scheduler": {"base_values": [1e-3]}, "max_accuracy": 0.0,
            "scaler": {"scale": 65536.0}, "epoch": 99, "config": config} | extra  # fmt: skip


def same(got, wanted):
    """Equal to the bit, with types, shapes and dtypes."""
    if isinstance(wanted, Parameter | AsNumpy):
        wanted = wanted.array
    if isinstance(wanted, dict):
        return type(got) is dict and list(got) == list(wanted) and all(same(got[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list | tuple):
        return type(got) is type(wanted) and len(got) == len(wanted) and all(map(same, got, wanted))
    if isinstance(wanted, np.ndarray):
        alike = type(got) is np.ndarray and got.dtype == wanted.dtype and got.shape == wanted.shape
        return alike and got.tobytes() == wanted.tobytes()
    return type(got) is type(wanted) and got == wanted


def refused(path, match="refused: the file asks to run"):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_pth(path)
    assert caught.value.exit_code == 5
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "weights.pth"


@pytest.fixture
def marker(tmp_path):
    """A file that hostile content would create. The test fails if it exists at the end."""
    file = tmp_path / "marker"
    yield file
    assert not file.exists()


# What is read


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_official_layout_is_read_and_its_config_dropped(path, way):
    write_pth(path, official(), **way)
    content = read_pth(path)
    assert content.pop("config") == Dropped("yacs.config.CfgNode")
    expected = official()
    del expected["config"]
    assert same(content, expected)
    assert same(state_dicts(content, str(path))["model"], dict(expected["model"]))


@pytest.mark.parametrize("legacy", BOTH)
def test_every_dtype_is_read_to_the_bit(path, legacy):
    tensors = {}
    for dtype in (*STORAGE_OF, "uint16", "uint32", "uint64", "float8_e4m3fn", "float8_e5m2"):
        kind = np.dtype(getattr(ml_dtypes, dtype) if "bfloat" in dtype or "float8" in dtype else dtype)
        raw = np.random.default_rng(0).integers(0, 256, 6 * kind.itemsize, np.uint8)
        tensors[dtype] = ((raw % 2).astype(bool) if dtype == "bool" else raw.view(kind)).reshape(2, 3)
    write_pth(path, tensors, legacy=legacy)
    assert same(read_pth(path), tensors)


@pytest.mark.parametrize("legacy", BOTH)
def test_views_keep_offsets_and_strides_and_share_a_storage(path, legacy):
    whole = array(6, 8)
    tensors = {
        "whole": whole,
        "rows": whole[2:5],
        "transposed": whole.T,
        "strided": whole[1::2, ::3],
        "column": whole[:, 2],
        "expanded": np.broadcast_to(whole[:1], (5, 8)),
        "one": whole[3:4, 4].reshape(()),
    }
    write_pth(path, tensors, legacy=legacy)
    assert same(read_pth(path), tensors)
    assert len(pickled(tensors)[1]) <= 2


@pytest.mark.parametrize("legacy", BOTH)
def test_empty_scalar_and_parameter_tensors_keep_their_shapes(path, legacy):
    tensors = {
        "empty": np.zeros((0, 3), np.float32),
        "scalar": np.array(2.5, ml_dtypes.bfloat16),
        "parameter": Parameter(array(2, 2)),
        "size": Call(Global("torch", "Size"), (3, 4)),
    }
    write_pth(path, tensors, legacy=legacy)
    assert same(read_pth(path), tensors | {"size": (3, 4)})


def test_tensor_named_twice_is_one_array(path):
    x = array(3)
    write_pth(path, {"a": x, "b": x})
    content = read_pth(path)
    assert content["a"] is content["b"]


def test_old_variables_and_tensors_with_attributes_are_arrays(path):
    """As in torchvision files of 2017, and for subclasses of Tensor."""
    rebuild = Global("torch._utils", "_rebuild_tensor")
    storage = Storage("FloatStorage", "0", array(4))
    tensor = Call(rebuild, storage, 0, (4,), (1,))
    old = Call(Global("torch.nn.parameter", "Parameter"), tensor, state=(True, False, {}))
    of_type = Global("torch._tensor", "_rebuild_from_type_v2")
    subclass = Call(of_type, rebuild, Global("torch", "Tensor"), (storage, 1, (2,), (2,)), {"note": 1})
    data, _ = pickled({"old": old, "subclass": subclass})
    pack(path, data, {"0": array(4)})
    assert same(read_pth(path), {"old": array(4), "subclass": array(4)[1::2]})


def test_bare_storage_is_an_array_also_from_cuda(path):
    data, _ = pickled([Storage("FloatStorage", "0", array(4))])
    pack(path, data.replace(b"ctorch\n", b"ctorch.cuda\n"), {"0": array(4)})
    assert same(read_pth(path), [array(4)])


def test_big_endian_files_are_converted(path):
    tensors = {"f": array(3), "h": array(3, dtype=ml_dtypes.bfloat16), "c": array(2).astype(np.complex64),
               "b": np.arange(3, dtype=np.int8)}  # fmt: skip
    pack(path, *pickled(tensors), byteorder="big")
    assert same(read_pth(path), tensors)


# From protocol 4 on, names are stored with their lengths, so that NumPy 1's names cannot be inserted by replacement.
@pytest.mark.parametrize(("protocol", "numpy_1"), [(2, True), (4, False), (5, False)])
def test_arrays_and_scalars_of_numpy_1_and_2_are_read(path, protocol, numpy_1):
    content = {
        "scalar": np.float64(1.5),
        "integer": np.int64(-3),
        "truth": np.bool_(True),
        "array": AsNumpy(array(3, 4, dtype=np.float64)),
        "columns": AsNumpy(np.asfortranarray(array(3, 4))),
        "big": AsNumpy(np.arange(5, dtype=">i4")),
        "empty": AsNumpy(np.zeros((2, 0))),
        "words": AsNumpy(np.array(["a", "bc"])),
        "objects": AsNumpy(np.array([None, {}], object)),
        "word": np.str_("name"),
    }
    data, _ = pickled(content, protocol=protocol)
    if numpy_1:
        data = data.replace(b"numpy._core.", b"numpy.core.")
    pack(path, data, {})
    got = read_pth(path)
    dropped = {name: got.pop(name) for name in ("words", "objects", "word")}
    assert all(isinstance(value, Dropped) and value.name.startswith("numpy.") for value in dropped.values())
    assert (got.pop("scalar"), got.pop("integer"), got.pop("truth")) == (1.5, -3, True)
    assert same(got.pop("big"), np.arange(5, dtype=np.int32))
    np.testing.assert_array_equal(got["columns"], content["columns"].array)
    assert same(got, {"array": content["array"], "columns": np.ascontiguousarray(array(3, 4)),
                      "empty": np.zeros((2, 0))})  # fmt: skip


def test_containers_become_plain_and_classes_are_dropped(path):
    class Thing:
        pass

    thing = Thing()
    thing.__dict__ |= {"weights": array(2), "more": [1, 2]}
    content = {
        "default": collections.defaultdict(list, {"a": [1]}),
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict([("z", 1), ("a", 2)]),
        "set": {1, 2},
        "frozen": frozenset({"x"}),
        "bytes": b"\x00\xff",
        "bytearray": bytearray(b"ab"),
        "complex": 1 + 2j,
        "namespace": argparse.Namespace(lr=0.1, out=pathlib.PurePosixPath("runs/x")),
        "device": Call(Global("torch", "device"), "cuda", 0),
        "dtype": Global("torch", "float32"),
        "sparse": Call(Global("torch._utils", "_rebuild_sparse_tensor"), 1, 2),
        "none": None,
        3: 2**70,
        (1, "a"): [True, False, -1, 0.5, "é"],
    }
    write_pth(path, content)
    names = {"namespace": "argparse.Namespace", "device": "torch.device", "dtype": "torch.float32",
             "sparse": "torch._utils._rebuild_sparse_tensor"}  # fmt: skip
    expected = content | {key: Dropped(name) for key, name in names.items()} | {"bytearray": b"ab", "frozen": {"x"}}
    assert same(read_pth(path), {k: dict(v) if isinstance(v, dict) else v for k, v in expected.items()})


def test_pickled_model_is_reported_by_its_class(path):
    data = b"\x80\x02cpeople.models\nNet\n)\x81}(X\x04\x00\x00\x00_bufK\x01ub."
    pack(path, data, {})
    assert read_pth(path) == Dropped("people.models.Net")
    with pytest.raises(CheckpointError, match=r"people\.models\.Net"):
        state_dicts(read_pth(path), str(path))


def test_reading_writes_nothing_and_arrays_are_read_only(path):
    write_pth(path, {"x": array(3)})
    before = path.read_bytes()
    x = read_pth(path)["x"]
    with pytest.raises(ValueError, match="read-only"):
        x[0] = 1
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


# The state dict in it


def test_arrays_that_share_memory_cannot_outgrow_the_file(tmp_path):
    def write(count):
        one = np.ones(1, np.float32)
        expanded = {f"x{n}": np.broadcast_to(one, (4096, 4096)) for n in range(count)}  # of 64 MiB each
        write_pth(tmp_path / "x.pth", {"model": expanded})
        return read_weights(str(tmp_path / "x.pth")).arrays

    assert len(write(3)) == 3
    with pytest.raises(CheckpointError, match=r"40 arrays.* 2\.5 GiB"):
        write(40)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"weights": {}, "epoch": 1}, "no state dict among the keys weights, epoch - x.pth - "),
        ({str(i): i for i in range(50)}, r"keys 0, 1, .*, 19, \.\.\. - "),
        ({}, r"keys \(none\)"),
        ({"model": Dropped("torch.nn.Linear")}, "'model' is a whole object of torch.nn.Linear"),
        ({"model": {"w": Dropped("people.Int8")}}, "w is people.Int8, not an array"),
        ({"model": {"w": np.zeros(2), "n": 1}}, "'model' is no state dict: n is int, not an array"),
        ([1], "a list, not a state dict"),
        ({"\x1b[2J\nx": 1}, r"keys \?\[2J\?x - "),
    ],
)
def test_missing_state_dict_is_reported_with_the_keys(content, match):
    with pytest.raises(CheckpointError, match=match):
        state_dicts(content, "x.pth")


# Hostile files


def harms(marker) -> dict:
    """Content that creates the marker if it is run, by the name of what it runs."""
    touch, write = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "posix.system": Call(os.system, touch),
        "os.system": Call(Global("os", "system"), touch),
        "builtins.eval": Call(eval, write),
        "builtins.exec": Call(exec, write),
        "builtins.__import__": Call(__import__, "os"),
        "builtins.getattr": Call(getattr, Call(__import__, "os"), "system"),
        "io.open": Call(Global("io", "open"), str(marker), "w"),
        "builtins.print": [print],
        "builtins.apply": Call(Global("__builtin__", "apply"), os.system, (touch,)),
        "_functools.reduce": Call(Global("_functools", "reduce"), os.system, [touch]),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(marker)]),
        "subprocess.check_output": Call(subprocess.check_output, ["touch", str(marker)]),
        "functools.partial": Call(functools.partial(os.system, touch)),
        "functools.reduce": Call(Global("functools", "reduce"), os.system, [touch]),
        "operator.methodcaller": Call(Global("operator", "methodcaller"), "system", touch),
        "nt.system": Call(Global("nt", "system"), touch),
        "sys.modules": [Global("sys", "modules")],
        "runpy._run_code": Call(Global("runpy", "_run_code"), write, {}),
        "pickle.loads": Call(Global("pickle", "loads"), pickle.dumps(Call(os.system, touch))),
        "importlib.import_module": Call(Global("importlib", "import_module"), "antigravity"),
        "ctypes.CDLL": Call(Global("ctypes", "CDLL"), "libc.so.6"),
        "torch.hub.load": Call(Global("torch.hub", "load"), "people/repo", "model"),
        "torch.load": Call(Global("torch", "load"), str(marker)),
        "torch.storage._load_from_bytes": Call(Global("torch.storage", "_load_from_bytes"), b"x"),
        "torch.serialization.os.system": Call(Global("torch.serialization", "os.system"), touch),
        "yacs.config.os.system": [Global("yacs.config", "os.system")],
        "people.helpers.run": Call(Global("people.helpers", "run"), touch),
        "argparse.Namespace.__init__.__globals__": [Global("argparse", "Namespace.__init__.__globals__")],
        "collections.__builtins__": [Global("collections", "__builtins__")],
        "numpy.load": Call(np.load, str(marker)),
        "builtins.exec ": [Call(Global("torch._tensor", "_rebuild_from_type_v2"), exec, None, (write,), None)],
        "copyreg.__newobj__": [Global("copyreg", "__newobj__")],
    }


@pytest.mark.parametrize("name", harms("x"))
def test_file_that_runs_something_is_refused_and_named(path, marker, name):
    """By itself, as the model, deep inside, and inside an object that is dropped; in each protocol and format."""
    harm = harms(marker)[name]
    deep, kept = official(), official()
    deep["optimizer"]["state"][0]["hidden"] = [{"x": (harm,)}]
    kept["config"]["HOOK"] = harm
    for way, content in zip(WAYS, (deep, kept, official(model=harm), harm), strict=True):
        write_pth(path, content, **way)
        assert f"the file asks to run {name.strip()} - " in refused(path)


LISTENER = """
import contextlib, pickle, sys
from simmim_jax.errors import CheckpointError
from simmim_jax.interop.pth import read_pth

watched = "compile ctypes exec import open os pickle shutil socket subprocess".split()
seen, listening = [], False

def hook(event, arguments):
    if listening and event.partition(".")[0] in watched and (event != "open" or "r" not in str(arguments[1])):
        seen.append(event)

sys.addaudithook(hook)
read_pth(sys.argv[1])
listening = True
for path in sys.argv[1:]:
    with contextlib.suppress(CheckpointError):
        read_pth(path)
assert not seen, seen
pickle.loads(pickle.dumps(len))
assert seen == ["pickle.find_class"]
"""


def test_reading_imports_compiles_starts_and_writes_nothing(tmp_path, marker):
    """By Python's audit events, in a process without type checks."""
    paths = []
    for number, harm in enumerate((None, *harms(marker).values())):
        for legacy in BOTH:
            paths.append(str(tmp_path / f"{number}{legacy}.pth"))
            write_pth(paths[-1], official(extra=harm), legacy=legacy)
    subprocess.run([sys.executable, "-c", LISTENER, *paths], check=True, cwd=pathlib.Path(__file__).parent.parent)


def test_plain_pickle_that_runs_something_is_refused(path, marker):
    path.write_bytes(pickle.dumps(Call(os.system, f"touch {marker}")))
    refused(path)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"(S'touch %s'\nios\nsystem\n.", "asks to run os.system"),  # INST
        (b"(cos\nsystem\nS'touch %s'\no.", "asks to run os.system"),  # OBJ
        (b"(cpeople.code\nrun\nS'touch %s'\no.", "asks to run people.code.run"),
        (b"(S'touch %s'\nipeople.code\nrun\n.", "asks to run people.code.run"),
        (b"\x80\x02cos\nsystem\nS'touch %s'\n\x85\x81.", "asks to run os.system"),  # NEWOBJ
        (b"\x80\x04cos\nsystem\nS'touch %s'\n\x85}\x92.", "asks to run os.system"),  # NEWOBJ_EX
        (b"\x80\x02cos\nsystem\n}S'x'\nS'touch %s'\nsb.", "asks to run os.system"),  # BUILD
        (b"\x80\x02c__builtin__\neval\nS'touch %s'\n\x85R.", "asks to run builtins.eval"),
        (b"\x80\x02\x82\x01.", "asks to run extension 1"),
        (b"\x80\x02\x83\x01\x01.", "asks to run extension 257"),
        (b"\x80\x02\x84\x01\x01\x00\x00.", "asks to run extension 257"),
        (b"Pid\n.", "damaged: .*PERSID"),
        (b"\x80\x02K\x01Q.", "damaged: a persistent id"),
        (b"\x80\x02X\x06\x00\x00\x00moduleK\x01K\x02K\x03tQ.", "damaged"),
        (b"\x80\x05\x97.", "damaged: .*NEXT_BUFFER"),
        (b"\x80\x02cos;x\nsystem\n.", "damaged: .*not a name"),
        (b"\x80\x02cpeople\nx y\n.", "damaged: .*not a name"),
        (b"\x80\x04K\x01K\x02\x93.", "damaged: .*STACK_GLOBAL"),
    ],
)
def test_rare_opcodes_that_name_or_call_are_refused(path, marker, data, match):
    pack(path, data.replace(b"%s", str(marker).encode()), {})
    refused(path, match)


NONSENSE = [None, -1, 2**63, 1.5, "x", b"x", (), (1, 2, 3), (-1,), (2**62, 2**62), ["x"], {}, True, Global("a", "b")]


@pytest.mark.parametrize(
    "function",
    [
        ("torch._utils", "_rebuild_tensor_v2", 6),
        ("torch._utils", "_rebuild_tensor_v3", 7),
        ("torch._utils", "_rebuild_parameter", 3),
        ("torch._tensor", "_rebuild_from_type_v2", 4),
        ("torch", "Size", 1),
        ("collections", "OrderedDict", 1),
        ("collections", "defaultdict", 2),
        ("_codecs", "encode", 2),
        ("builtins", "set", 1),
        ("builtins", "complex", 2),
        ("numpy", "dtype", 3),
        ("numpy.core.multiarray", "_reconstruct", 3),
        ("numpy.core.multiarray", "scalar", 2),
        ("numpy._core.numeric", "_frombuffer", 4),
        ("copyreg", "_reconstructor", 3),
    ],
    ids=lambda f: f[1],
)
def test_rebuilders_with_wrong_arguments_raise_our_error_or_give_plain_data(path, function):
    module, name, count = function
    rng = np.random.default_rng(0)
    storage = Storage("FloatStorage", "0", array(4))
    dtype = np.dtype("f4")
    for _ in range(25):
        choices = [*NONSENSE, storage, dtype]
        arguments = [choices[i] for i in rng.integers(0, len(choices), rng.integers(count + 2))]
        state = NONSENSE[rng.integers(len(NONSENSE))]
        data, _ = pickled(Call(Global(module, name), *arguments, state=state))
        pack(path, data, {"0": array(4)})
        with contextlib.suppress(CheckpointError):
            content = read_pth(path)
            assert isinstance(content, np.ndarray | Dropped | tuple | dict | set | bytes | complex | float | int)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((5, (1,), (1,)), "larger than its storage"),
        ((0, (2, 3), (2, 1)), "larger than its storage"),
        ((0, (2**40,), (0,)), "larger than its storage"),
        ((0, (2**40, 2**40), (0, 0)), "larger than its storage"),
        ((0, (0, 2**62), (1, 1)), "damaged"),
        ((0, (2,), (-1,)), "whole numbers"),
        ((-1, (2,), (1,)), "whole numbers"),
        ((0, (2,), (1, 1)), "no shape"),
        ((0, (1,) * 65, (1,) * 65), "whole numbers"),
    ],
)
def test_tensor_larger_than_its_storage_is_refused(path, arguments, match):
    storage = Storage("FloatStorage", "0", array(4))
    data, _ = pickled(Call(Global("torch._utils", "_rebuild_tensor_v2"), storage, *arguments, False, {}))
    pack(path, data, {"0": array(4)})
    refused(path, match)


@pytest.mark.parametrize("legacy", BOTH)
def test_storage_larger_than_the_file_is_refused_before_allocation(path, legacy):
    class Claim:
        size = 2**50

    data, _ = pickled([Storage("DoubleStorage", "0", Claim)], legacy=legacy)
    pack(path, data, {"0": array(4)}, legacy=legacy)
    refused(path, "its storage 0 is smaller|larger than the file")


def test_storage_with_two_types_is_refused(path):
    storages = [Storage("FloatStorage", "0", array(4)), Storage("IntStorage", "0", array(4))]
    pack(path, pickled(storages, legacy=True)[0], {"0": array(4)}, legacy=True)
    refused(path, "two types")


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


# Each list holds the previous one ten times.
LAUGHS = b"".join(b"0]q%c(" % (i + 1) + b"h%c" % i * 10 + b"e" for i in range(12))
BOMBS = {
    "laughs": b"\x80\x02]q\x00(K\x01e" + LAUGHS + b".",
    "pairs": b"\x80\x02K\x01" + b"2\x86" * 90 + b".",
    "hash": b"\x80\x02K\x01" + b"2\x86" * 90 + b"q\x00}h\x00K\x01s.",
    "itself": b"\x80\x02]q\x00h\x00a.",
    "memo": b"\x80\x02K\x01r\xff\xff\xff\xff.",
    "deep": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
    "string": b"\x80\x02X\xff\xff\xff\xffabc.",
    "long string": b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"abc.",
    "frame": b"\x80\x04\x95" + struct.pack("<Q", 2**62) + b"N.",
    "digits": b"L" + b"9" * 100_000 + b"L\n.",
    "copies": b"\x80\x02c__builtin__\nset\nq\x00]q\x01(" + b"K\x01" * 20_000 + b"e\x85q\x02"
    + b"0h\x00h\x02R" * 20_000 + b".",
    "bytearray": b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b"abc.",
    "bytes": b"\x80\x02c_codecs\nencode\nq\x00X" + struct.pack("<I", 100_000) + b"a" * 100_000
    + b"X\x06\x00\x00\x00latin1\x86q\x02" + b"0h\x00h\x02R" * 20_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS)
def test_small_file_cannot_take_much_memory_or_time(path, bomb):
    pack(path, BOMBS[bomb], {})
    if bomb in ("memo", "frame"):
        read_pth(path)  # neither the memo's index nor the frame's length allocates anything
    else:
        refused(path, "damaged")


def test_nesting_is_limited(path):
    write_pth(path, nested(MAX_DEPTH - 1))
    read_pth(path)
    write_pth(path, nested(MAX_DEPTH))
    refused(path, "unfolds")


# Damage


@pytest.mark.parametrize("legacy", BOTH)
def test_truncated_file_is_refused(path, legacy):
    write_pth(path, official(), legacy=legacy)
    whole = path.read_bytes()
    for part in range(10):
        path.write_bytes(whole[: len(whole) * part // 10])
        refused(path, "damaged|is empty")
    path.write_bytes(whole[:-1])
    refused(path, "damaged|is empty")


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
@pytest.mark.parametrize(("way", "count"), [
    ({}, 100), ({"legacy": True}, 100), *(pytest.param(way, 2000, marks=pytest.mark.slow) for way in WAYS)
], ids=str)  # fmt: skip
def test_damaged_pickles_raise_only_our_error_and_run_nothing(path, way, count, marker):
    content = official(extra=[np.float64(2), AsNumpy(array(3)), {1, 2}, {"text": f"touch {marker}"}])
    data, storages = pickled(content, **way)
    rng = np.random.default_rng(0)
    read = 0
    for _ in range(count):
        flipped = bytearray(data)
        for at in rng.integers(0, len(data), rng.integers(1, 4)):
            flipped[at] = rng.integers(256)
        pack(path, bytes(flipped), storages, legacy=way.get("legacy", False))
        with contextlib.suppress(CheckpointError):
            read_pth(path)
            read += 1
    assert 0 < read < count


@pytest.mark.parametrize("legacy", BOTH)
def test_damaged_files_raise_only_our_error(path, legacy):
    write_pth(path, official(), legacy=legacy)
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(60):
        flipped = bytearray(whole)
        flipped[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with contextlib.suppress(CheckpointError):
            read_pth(path)


def test_damaged_weights_differ_from_their_checksum(path):
    write_pth(path, {"x": array(100)})
    whole = path.read_bytes()
    at = whole.index(array(100).tobytes()) + 50
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    refused(path, "archive/data/0 differs from its checksum")
    crc = struct.pack("<I", zlib.crc32(array(100).tobytes()))
    path.write_bytes(path.read_bytes().replace(crc, bytes(4)))  # torch.serialization.set_crc32_options(False)
    assert read_pth(path)["x"].shape == (100,)


@pytest.mark.parametrize("legacy", BOTH)
def test_missing_storage_is_refused(path, legacy):
    data, storages = pickled({"x": array(3), "y": array(4)}, legacy=legacy)
    storages.popitem()
    pack(path, data, storages, legacy=legacy)
    refused(path, "damaged: (it has no entry data/1|its list of storages)")


# Other files


def archive_of(**entries):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return stream.getvalue()


def tar_of(name):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        tar.addfile(tarfile.TarInfo(name))
    return stream.getvalue()


HEADER = json.dumps({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
OTHERS = {
    "the file is empty": b"",
    "a web page": b"\n<!DOCTYPE html><html>Sign in</html>",
    "a git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n",
    "a safetensors file": struct.pack("<Q", len(HEADER)) + HEADER + bytes(4),
    "not a PyTorch file": b"\x89HDF\r\n\x1a\n" + bytes(600),
    "not a PyTorch file ": b"{'detail': 'not found'}",
    "a tar file": tar_of("storages"),
    "a TorchScript archive": archive_of(**{"m/data.pkl": b"N.", "m/constants.pkl": b"N.", "m/code/a.py": b""}),
    "a zip archive, but not": archive_of(**{"arr_0.npy": b""}),
    "a plain pickle": pickle.dumps({"x": 1}),
    "damaged: .*contradicts": archive_of(**{"a/data.pkl": b"N."}).replace(b"a/data.pkl", b"a/data.pkl", 1)
    .replace(struct.pack("<II", 2, 2), struct.pack("<II", 2**30, 2**30)),
    "damaged: the version": pickle.dumps(MAGIC, 2) + pickle.dumps(1002, 2),
}  # fmt: skip


@pytest.mark.parametrize("match", OTHERS)
def test_other_formats_are_recognized(path, match):
    path.write_bytes(OTHERS[match])
    refused(path, match.strip())


def test_missing_files_and_folders_are_refused(tmp_path):
    refused(tmp_path / "nowhere.pth", "no such file")
    refused(tmp_path, "a folder, not a file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")


def test_compressed_and_duplicate_entries_are_refused(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", b"\x80\x02N0" + b"N0" * 10_000 + b"N.")
    refused(path, "contradicts|compressed")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"N.")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a/data.pkl", b"N.")
    refused(path, "contradicts")


def test_entry_names_with_dots_read_no_other_file(path, tmp_path):
    storage = Storage("FloatStorage", "../../../etc/passwd", array(4))
    data, _ = pickled([storage])
    pack(path, data, {"../../../etc/passwd": array(4)})
    assert same(read_pth(path), [array(4)])
    pack(path, data, {})
    refused(path, re.escape("it has no entry data/../../../etc/passwd"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["weights.pth"]
