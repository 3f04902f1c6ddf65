"""A run and its data: the metrics record the samples and bad images of each step."""

import shutil

import numpy as np
import pytest
from PIL import Image
from runs import arrays, rows, run, run_until

from simmim_jax.data import BatchSpec, Loading, make_batches, make_source

SMALL = (
    "--config=configs/folder_vit_small.py", "--config.encoder.width=32", "--config.encoder.depth=1",
    "--config.encoder.num_heads=2", "--config.image_size=64,64", "--config.batch_size=8", "--config.steps=12",
    "--config.save_every=3", "--config.log_every=1", "--config.eval_images=8", "--config.data.max_bad_fraction=0.2",
)  # fmt: skip


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """40 training JPEGs, of which 5 are bad, and 8 held-out ones."""
    root = tmp_path_factory.mktemp("photographs")
    for split, count in {"train": 40, "val": 8}.items():
        (root / split).mkdir()
        for n in range(count):
            pixels = np.random.default_rng(n).integers(0, 256, (9, 12, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((96, 72), 3).save(root / split / f"{n:02}.jpg")
    for n, content in enumerate([b"", b"<html>404</html>", b"\xff\xd8\xff\xe0", b"GIF89a", b"\x89PNG\r\n\x1a\n"]):
        (root / "train" / f"{7 * n:02}.jpg").write_bytes(content)
    return root


@pytest.fixture(scope="module")
def unbroken(photographs, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    done = run(*SMALL, f"--config.data.path={photographs}", "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("bad image ") == 5
    return workdir


def murmur(index: int, batch_index: int) -> int:
    """The finalizer of MurmurHash3, in Python's own integers."""
    bits = (index * 0x9E3779B1 + batch_index * 0x85EBCA77) % 2**32
    for shift, factor in [(16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)]:
        bits = (bits ^ bits >> shift) * factor % 2**32
    return bits


def test_metrics_record_the_samples_and_bad_images_of_each_step(photographs, unbroken):
    source = make_source("auto", path=str(photographs))
    batches = make_batches(source, BatchSpec(8, 0, (64, 64)), loading=Loading(max_bad_fraction=0.2))
    written = rows(unbroken)
    assert [row["step"] for row in written] == list(range(1, 13))
    bad = 0
    for row, batch in zip(written, batches, strict=False):
        pairs = zip(batch["index"].tolist(), batch["batch_index"].tolist(), strict=True)
        assert row["samples"] == f"{sum(murmur(*pair) for pair in pairs) % 2**32:08x}"
        bad = batch["replaced"].sum() + (bad if row["step"] % 5 != 1 else 0)  # an epoch is five steps
        assert row["bad_images"] == bad
    batches.close()
    assert [written[step - 1]["bad_images"] for step in (5, 10)] == [5, 5]
    assert len({row["samples"] for row in written}) == 12


@pytest.mark.slow
def test_killed_run_that_resumes_with_workers_equals_unbroken_run(photographs, unbroken, tmp_path):
    flags = (*SMALL, f"--config.data.path={photographs}", "--workdir", tmp_path, "--config.data.workers=2")
    assert run_until("step:8", "SIGKILL", *flags).returncode == -9
    done = run(*flags)
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path) == rows(unbroken)
    ours, theirs = arrays(tmp_path, 12), arrays(unbroken, 12)
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)


def test_run_that_ends_by_a_bad_image_resumes_without_loss(photographs, unbroken, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(photographs, copy)
    first = next(n for n, row in enumerate(rows(unbroken), start=1) if row["bad_images"])
    flags = (*SMALL, f"--config.data.path={copy}", "--workdir", tmp_path / "run")
    strict = run(*flags, "--config.data.on_error=raise")
    assert strict.returncode == 3
    assert strict.stderr.splitlines()[-1].startswith("ERROR[data] 1 bad images, of at most 0")
    assert "Traceback" not in strict.stderr
    newest = max((int(path.name) for path in (tmp_path / "run" / "checkpoints").glob("[0-9]*")), default=0)
    assert newest == first - 1
    assert [row["step"] for row in rows(tmp_path / "run")] == list(range(1, first))
    done = run(*flags)  # the policy may change, because no sample depends on it
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path / "run") == rows(unbroken)
