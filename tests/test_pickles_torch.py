"""Files that PyTorch wrote are read like PyTorch reads them, to the bit. Needs torch, and yacs for one test."""

import argparse
import collections
import io
import os
import pickle
import pickletools
import zipfile

import ml_dtypes
import numpy as np
import pytest
from torch_files import Parameter, pickled, write_pth

from simmim_jax.errors import CheckpointError
from simmim_jax.interop.pth import read_pth
from simmim_jax.interop.rebuild import Dropped
from simmim_jax.interop.selection import state_dicts

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.slow

BOTH = [False, True]
DTYPES = (
    "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool complex64 complex128 uint16 uint32 uint64 "
    "float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz"
)


def save(path, content, legacy=False, **kw):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy, **kw)
    return path


def random_tensor(*shape, dtype=torch.float32):
    size = torch.empty(0, dtype=dtype).element_size()
    if dtype == torch.bool:
        return torch.rand(shape) < 0.5
    return torch.randint(0, 256, (*shape[:-1], shape[-1] * size), dtype=torch.uint8).view(dtype)


def same(got, wanted):
    """Assert equality to the bit, with arrays for tensors."""
    if isinstance(wanted, torch.Tensor):
        assert type(got) is np.ndarray
        assert str(got.dtype) == str(wanted.dtype).removeprefix("torch.")
        assert got.shape == tuple(wanted.shape)
        raw = wanted.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        assert got.tobytes() == raw.tobytes()
    elif isinstance(wanted, dict):
        assert list(got) == list(wanted)
        for key in wanted:
            same(got[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert isinstance(got, list | tuple)
        assert len(got) == len(wanted)
        for pair in zip(got, wanted, strict=True):
            same(*pair)
    else:
        assert (type(got), got) == (type(wanted), wanted)


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, 4)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 8)
        self.tied = torch.nn.Linear(8, 8)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.tied(self.head(self.norm(self.conv(x)).mean((2, 3))))


def trained():
    """A model and its AdamW after two steps."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("legacy", BOTH)
def test_tensors_of_every_dtype_are_read(tmp_path, legacy):
    for dtype in DTYPES.split():
        x = random_tensor(5, 6, dtype=getattr(torch, dtype))
        content = {"x": x, "t": x.T, "s": x[1::2, ::3], "0-d": x[3, 4], "empty": x[:0], "e": x[:1].expand(4, 6)}
        path = save(tmp_path / f"{dtype}.pth", content, legacy)
        same(read_pth(path), content)
        is_unsupported = "uint" in dtype or "float8" in dtype  # legacy files that torch.load cannot read
        if not (legacy and is_unsupported and dtype != "uint8"):
            same(read_pth(path), torch.load(path))


@pytest.mark.parametrize("legacy", BOTH)
def test_training_checkpoint_with_shared_parameters_is_read(tmp_path, legacy):
    model, optimizer = trained()
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "lr_scheduler": schedule.state_dict(),
        "parameters": list(model.parameters()),
        "epoch": 99,
        "max_accuracy": 0.0,
        "size": torch.Size([2, 3]),
        "rng": torch.get_rng_state(),
    }
    path = save(tmp_path / "x.pth", content, legacy)
    got = read_pth(path)
    same(got, torch.load(path, weights_only=False))
    same(state_dicts(got, str(path))["model"], dict(model.state_dict()))
    assert np.shares_memory(got["model"]["head.weight"], got["model"]["tied.weight"])


@pytest.mark.parametrize(("protocol", "legacy"), [(2, True), (2, False), (4, False), (5, False)])
def test_numpy_arrays_in_a_checkpoint_are_read(tmp_path, protocol, legacy):
    content = {"s": np.float32(1.5), "a": np.arange(6, dtype=np.int16).reshape(2, 3), "b": b"\x00\xff", "set": {1, 2}}
    path = save(tmp_path / "x.pth", content, legacy, pickle_protocol=protocol)
    got = read_pth(path)
    assert (got["s"], got["b"], got["set"]) == (1.5, b"\x00\xff", {1, 2})
    np.testing.assert_array_equal(got["a"], content["a"], strict=True)


@pytest.mark.parametrize("legacy", BOTH)
def test_configs_are_dropped(tmp_path, legacy):
    config = pytest.importorskip("yacs.config").CfgNode({"DATA": {"IMG_SIZE": 192}, "BASE": [""]})
    config.freeze()
    weight = torch.randn(3)
    content = {"model": {"w": weight}, "config": config, "args": argparse.Namespace(lr=0.1, device=torch.device("cpu"))}
    path = save(tmp_path / "x.pth", content, legacy)
    got = read_pth(path)
    assert got["config"] == Dropped("yacs.config.CfgNode")
    assert got["args"] == Dropped("argparse.Namespace")
    same(state_dicts(got, str(path))["model"], {"w": weight})


@pytest.mark.parametrize("legacy", BOTH)
def test_unsupported_tensors_are_dropped_and_the_rest_is_read(tmp_path, legacy):
    content = {
        "w": torch.ones(2),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, device="meta"),
        "dtype": torch.bfloat16,
        "default": collections.defaultdict(list, a=[1]),
    }
    path = save(tmp_path / "x.pth", content, legacy)
    got = read_pth(path)
    same(got["w"], torch.ones(2))
    assert [got[key] for key in ("sparse", "meta", "dtype", "default")] == [
        Dropped("torch._utils._rebuild_sparse_tensor"), Dropped("torch._utils._rebuild_meta_tensor_no_storage"),
        Dropped("torch.bfloat16"), {"a": [1]},
    ]  # fmt: skip


def test_parameters_with_attributes_and_tensor_subclasses_are_read(tmp_path):
    parameter = torch.nn.Parameter(torch.randn(3))
    parameter.note = "ignored"
    tensor = torch.randn(4)
    tensor.note = 1
    path = save(tmp_path / "x.pth", {"p": parameter, "t": tensor, "b": torch.nn.Buffer(torch.ones(2))})
    same(read_pth(path), torch.load(path, weights_only=False))


@pytest.mark.parametrize("legacy", BOTH)
def test_pickled_model_is_dropped(tmp_path, legacy):
    path = save(tmp_path / "x.pth", Net(), legacy)
    got = read_pth(path)
    assert isinstance(got, Dropped)
    with pytest.raises(CheckpointError, match=r"Net, not a state dict"):
        state_dicts(got, str(path))


def test_scripted_model_is_refused(tmp_path):
    torch.jit.script(torch.nn.Linear(2, 2)).save(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="a TorchScript archive"):
        read_pth(tmp_path / "x.pth")


def test_file_without_checksums_is_read(tmp_path):
    x = torch.randn(10)
    torch.serialization.set_crc32_options(False)
    try:
        path = save(tmp_path / "x.pth", {"x": x})
    finally:
        torch.serialization.set_crc32_options(True)
    same(read_pth(path), {"x": x})


def test_tensors_in_a_plain_pickle_are_refused(tmp_path):
    """They hold a nested file that a function of PyTorch would load."""
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps({"x": torch.ones(2)}, protocol=2))
    with pytest.raises(CheckpointError, match=r"refused: the file asks to run torch\.storage\._load_from_bytes"):
        read_pth(path)


@pytest.mark.parametrize("legacy", BOTH)
def test_call_that_pytorch_runs_is_refused(tmp_path, legacy):
    class Harm:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'marker'}",)

    path = save(tmp_path / "x.pth", {"model": {"w": torch.ones(2)}, "extra": Harm()}, legacy)
    with pytest.raises(CheckpointError, match=r"refused: the file asks to run posix\.system"):
        read_pth(path)
    assert not (tmp_path / "marker").exists()
    torch.load(path, weights_only=False)  # PyTorch runs it
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("legacy", BOTH)
def test_writer_of_the_other_tests_writes_files_that_pytorch_reads(tmp_path, legacy):
    whole = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    arrays = {
        "w": whole,
        "t": whole.T,
        "s": whole[1::2, 2:],
        "p": Parameter(whole),
        "h": whole.astype(ml_dtypes.bfloat16),
    } | ({} if legacy else {"u": np.arange(4, dtype=np.uint16)})
    write_pth(tmp_path / "x.pth", arrays, legacy=legacy)
    loaded = torch.load(tmp_path / "x.pth")
    same(read_pth(tmp_path / "x.pth"), loaded)
    assert loaded["t"].untyped_storage().data_ptr() == loaded["w"].untyped_storage().data_ptr()
    stream = io.BytesIO()
    torch.save({"w": torch.ones(4, 6)}, stream)
    opcodes = [op for op in _opcodes(pickled({"w": whole})[0]) if "PUT" not in op]
    written = [op for op in _opcodes(_data_pkl(stream)) if "PUT" not in op]
    assert opcodes == written


def _data_pkl(stream):
    with zipfile.ZipFile(stream) as archive:
        return archive.read("archive/data.pkl")


def _opcodes(data):
    return [f"{opcode.name} {argument}" for opcode, argument, _ in pickletools.genops(data)]
