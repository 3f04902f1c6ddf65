"""Compact lists of names, in memory and on disk, and files that are read by many threads."""

import hashlib
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest
from source_files import everything, write_images

from simmim_jax.data.sources import files
from simmim_jax.data.sources import names as names_module
from simmim_jax.errors import DataError


@pytest.mark.parametrize("limit", [0, 100, 2**20])
def test_names_are_the_same_in_memory_and_on_disk(limit, monkeypatch):
    monkeypatch.setattr(names_module, "LIMIT", limit)
    monkeypatch.setattr(names_module, "CHUNK", 7)
    expected = [f"{i}é\n{'x' * (i % 5)}" for i in range(100)] + [os.fsdecode(b"\xff\xfe")]
    made = names_module.Names(expected)
    again = pickle.loads(pickle.dumps(made))
    for each in (made, again, pickle.loads(pickle.dumps(again))):
        assert list(each) == [each[i] for i in range(101)] == expected
        assert list(each.take(np.arange(101) % 3 == 0)) == expected[::3]
        assert each.digest() == made.digest()
    encoded = [os.fsencode(name) for name in expected]
    ends = np.cumsum([len(name) for name in encoded], dtype=np.int64)
    assert made.digest() == hashlib.sha256(b"".join(encoded) + ends.tobytes()).hexdigest()  # is in checkpoints
    assert list(names_module.Names([])) == []


def test_index_on_disk_leaves_no_file_and_is_read_by_other_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(names_module, "LIMIT", 100)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    source = everything("folder", write_images(tmp_path / "images", *(f"{i}.png" for i in range(100))))
    assert os.listdir(tmp_path / "temporary") == []
    program = "import pickle, sys; s = pickle.load(sys.stdin.buffer); print(s.name(99), len(s), 'image' in s[50])"
    done = subprocess.run([sys.executable, "-c", program], input=pickle.dumps(source), capture_output=True, check=True)
    assert done.stdout.decode().split() == ["99.png", "100", "True"]
    state = source.names.ends.__getstate__()
    with pytest.raises(DataError, match="index of the images is gone"):
        names_module.Column.__new__(names_module.Column).__setstate__(state | {"path": "/proc/1/fd/99999"})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="set TMPDIR"):  # the same for a full disk
        names_module.Names(str(i) for i in range(100))


def test_file_is_closed_silently_if_its_module_is_gone_first(tmp_path, monkeypatch):
    (tmp_path / "a").write_bytes(b"x")
    opened, raised = files.File(str(tmp_path / "a"), files.stat_file(str(tmp_path / "a"))), []
    descriptor = opened.descriptor
    monkeypatch.setattr(sys, "unraisablehook", raised.append)
    monkeypatch.setattr(files, "os", None)  # the state at the exit of Python
    del opened
    assert not raised
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
