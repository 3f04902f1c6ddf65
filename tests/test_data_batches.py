"""Batches: functions of the step for any shards, workers and threads; bad images; workers that die."""

import itertools
import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from simmim_jax import data
from simmim_jax.data import BatchSpec, CenterCrop, Loading, Shard, make_epoch, make_source
from simmim_jax.errors import ConfigError, DataError

OPTIONS = {"batch_size": 16, "seed": 3, "image_size": (12, 10), "channels": 1}
GRAY = CenterCrop((8, 8), channels=1)


def make_batches(source, *, start_step=0, shard=(0, 1), **options):
    """The batches of OPTIONS with these changes to the spec and the loading."""
    loading = {name: options.pop(name) for name in Loading._fields if name in options}
    spec = BatchSpec(**OPTIONS | options)
    return data.make_batches(source, spec, start_step=start_step, shard=Shard(*shard), loading=Loading(**loading))


def take(count: int, source, **options) -> list[dict]:
    batches = make_batches(source, **options)
    taken = [next(batches) for _ in range(count)]
    batches.close()
    return taken


def assert_equal(some: list[dict], others: list[dict]) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            assert one[key].dtype == other[key].dtype
            assert np.array_equal(one[key], other[key]), key


@pytest.fixture(scope="module")
def digits():
    return make_source("digits")


@pytest.fixture(scope="module")
def six(digits):
    return take(6, digits)


def make_folder(root: Path, count: int):
    """A source of images with the values 0, 3, 6, ..."""
    for i in range(count):
        Image.new("L", (6, 8), 3 * i).save(root / f"{i:03}.png")
    return make_source("folder", path=str(root), heldout_fraction=0.0)


DAMAGES = [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    lambda file: file.write_bytes(file.read_bytes()[:-24]),
    lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50),
    lambda file: Image.new("L", (9000, 9000)).save(file),  # 81 million pixels
    lambda file: file.unlink(),
    lambda file: file.unlink() or file.mkdir(),
]
REASONS = ["is empty", "none of", "runcated", "", "9000 x 9000 pixels", "[Errno", "[Errno"]
BAD = [5, 6, 20, 33, 40, 41, 63]


@pytest.fixture
def damaged(tmp_path):
    """64 images, of which those of BAD cannot be read."""
    source = make_folder(tmp_path, 64)
    for i, damage in zip(BAD, DAMAGES, strict=True):
        damage(tmp_path / f"{i:03}.png")
    return source


# --- the position is the step


def test_batch_has_the_entries_of_its_spec_and_the_labels_of_its_records(digits, six):
    for batch in six:
        found = {key: (value.shape, value.dtype) for key, value in batch.items()}
        assert found == BatchSpec(**OPTIONS).arrays()
        assert [digits[i]["label"] for i in batch["index"].tolist()] == batch["label"].tolist()
        assert all(type(value) is np.ndarray and value.flags.owndata for value in batch.values())


def test_order_is_that_of_earlier_versions(six):
    # A change here, by us or by grain, would give interrupted runs other data.
    assert six[0]["index"][:8].tolist() == [941, 163, 571, 1223, 1122, 1385, 1394, 201]
    assert six[5]["index"][:8].tolist() == [349, 43, 833, 714, 420, 580, 95, 356]


def test_threads_and_prefetch_do_not_change_batches(digits, six):
    assert_equal(take(6, digits, threads=0, prefetch=1), six)
    assert_equal(take(6, digits, threads=4, prefetch=3), six)


@pytest.mark.parametrize("count", [2, 4])
def test_shards_are_rows_of_the_global_batch(count, digits, six):
    parts = [take(6, digits, shard=(index, count)) for index in range(count)]
    for step, batch in enumerate(six):
        for key, value in batch.items():
            for index in range(count):
                assert np.array_equal(parts[index][step][key], value[index::count])


def test_any_start_step_gives_the_batches_of_an_unbroken_run(digits, six):
    assert_equal(take(5, digits, start_step=1), six[1:])
    assert take(1, digits, start_step=10_000_000)[0]["image"].any()


def test_workers_make_the_same_batches_and_ignore_the_signals_of_the_job(digits, six):
    batches = make_batches(digits, start_step=1, workers=2)
    first = [next(batches), next(batches)]  # the second comes from the second worker, so both have started
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert_equal([*first, *itertools.islice(batches, 3)], six[1:])
    batches.close()


def test_epochs_are_different_permutations(digits):
    batches = take(6, digits, batch_size=479, image_size=(2, 2), threads=0)  # a third of an epoch each
    epochs = np.concatenate([batch["index"] for batch in batches]).reshape(2, 1437)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(1437))
    assert (epochs[0] == epochs[1]).mean() < 0.05


def test_crops_differ_between_epochs_rows_and_shards(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for i in range(8):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    batches = [batch for p in range(2) for batch in take(3, source, batch_size=8, shard=(p, 2))]  # 3 epochs
    assert len({row.tobytes() for batch in batches for row in batch["image"]}) == 24


def test_seeds_share_neither_order_nor_crops(digits):
    # With grain's own shuffle, the first epoch of seed 1 would have the order of the second epoch of seed 0.
    def order(seed, epoch):
        spec = {"seed": seed, "batch_size": 479, "image_size": (2, 2)}  # a third of an epoch
        return take(1, digits, **spec, start_step=3 * epoch, threads=0)[0]["index"]

    assert (order(0, 1) == order(1, 0)).mean() < 0.05
    assert (order(0, 0) == order(1, 0)).mean() < 0.05


def test_without_random_crops_a_batch_is_its_images(digits):
    (batch,) = take(1, digits, image_size=(8, 8), crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0), flip=0.0)
    assert np.array_equal(batch["image"], np.stack([digits[i]["image"] for i in batch["index"].tolist()]))


# --- bad images


def test_replacement_of_a_bad_image_depends_on_its_index_only(damaged):
    one = take(8, damaged, max_bad_fraction=0.2)
    assert_equal(take(5, damaged, max_bad_fraction=0.2, start_step=3), one[3:])
    halves = [take(8, damaged, shard=(p, 2)) for p in range(2)]
    for step in range(8):
        assert np.array_equal(halves[1][step]["image"], one[step]["image"][1::2])
    counts = [Counter(i for batch in one[n : n + 4] for i in batch["index"].tolist()) for n in (0, 4)]  # 2 epochs
    assert counts[0] == counts[1]
    assert not set(counts[0]) & set(BAD)
    assert sorted(counts[0].values()) == [1] * 50 + [2] * 7  # seven different substitutes
    assert sum(batch["replaced"].sum() for batch in one) == 14
    for batch in one:  # each image is that of its index
        assert np.array_equal(batch["image"][:, 0, 0, 0], 3 * batch["index"])


def test_bad_image_is_logged_once_with_its_reason(damaged, caplog):
    take(9, damaged, max_bad_fraction=0.2)
    messages = [record.message for record in caplog.records if record.message.startswith("bad image")]
    lines = sorted(message.partition("(64 images): ")[2] for message in messages)
    assert [line[:7] for line in lines] == [f"{i:03}.png" for i in BAD]
    for line, reason in zip(lines, REASONS, strict=True):
        assert reason in line


@pytest.mark.parametrize(
    ("options", "allowed"),
    [({"max_bad_fraction": 0.01}, 1), ({"max_bad_fraction": 0.0}, 0), ({"on_error": "raise"}, 0)],
)
def test_too_many_bad_images_end_the_run(options, allowed, damaged):
    batches = make_batches(damaged, **options)
    message = rf"{allowed + 1} bad images, of at most {allowed}; the last: 0\d\d\.png: .* split train \(64 images\)"
    with pytest.raises(DataError, match=message):
        list(itertools.islice(batches, 4))
    assert next(batches, "ended") == "ended"


def test_one_of_several_processes_does_not_end_for_bad_images(damaged, caplog):
    for index in range(2):
        take(4, damaged, max_bad_fraction=0.0, shard=(index, 2))  # an epoch
    messages = [record.message for record in caplog.records if record.message.startswith("bad image")]
    assert len(messages) == len(BAD)
    assert all(", of at most 0 in " in message for message in messages)


def test_only_bad_images_end_the_run_at_once(tmp_path):
    source = make_folder(tmp_path, 20)
    for file in tmp_path.iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(DataError, match=r"20 images in a row .* 0\d\d\.png: is none of JPEG"):
        next(make_batches(source, max_bad_fraction=1.0))


# --- refused values


def test_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(DataError, match=r"batch of 2000.*digits, split train \(1437 images\).*1437"):
        make_batches(digits, batch_size=2000)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shard": (0, 3)}, "batch_size=16.*3 processes, like 15"), ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"batch_size": 0}, "batch_size=0"), ({"seed": -1}, "seed=-1"), ({"image_size": (0, 4)}, "image_size"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"), ({"crop_scale": (0.9, 1.5)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"), ({"flip": 2.0}, "flip=2"), ({"start_step": -1}, "start_step=-1"),
        ({"interpolation": "cubic"}, "interpolation='cubic'.*bicubic"), ({"workers": -1}, "workers=-1"),
        ({"prefetch": 0}, "prefetch=0"), ({"max_bad_fraction": 2.0}, "max_bad_fraction=2"),
        ({"on_error": "ignore"}, "on_error='ignore'.*replace, raise"),
        ({"augment": "rand-m9"}, "1 numbers"),
    ],
)  # fmt: skip
def test_invalid_value_is_refused_at_once(changed, message, digits):
    with pytest.raises(ConfigError, match=message):
        make_batches(digits, **changed)


def test_workers_of_a_program_without_a_file_are_refused(digits, monkeypatch):
    monkeypatch.setattr(sys.modules["__main__"], "__file__", "/nowhere/<stdin>", raising=False)
    with pytest.raises(ConfigError, match=r"<stdin> - data\.workers"):
        make_batches(digits, workers=1)


# --- one pass


@pytest.mark.parametrize(("batch_size", "threads", "count"), [(2, 2, 1), (50, 0, 2), (400, 2, 2)])
def test_pass_has_every_record_once_and_every_batch_full(batch_size, threads, count):
    source, seen = make_source("digits", split="test"), []
    loading = Loading(threads=threads, max_bad_fraction=1.0)
    for index in range(count):
        epoch = make_epoch(source, GRAY, batch_size=batch_size, shard=Shard(index, count), loading=loading)
        batches = list(epoch)
        assert len(batches) == len(epoch) == -(-360 // batch_size)
        assert_equal(list(epoch), batches)  # a second pass repeats the first
        for batch in batches:
            valid = batch["valid"]
            assert (batch["image"].shape, valid.dtype) == ((batch_size // count, 8, 8, 1), bool)
            assert not batch["image"][~valid].any()
            assert (batch["label"][~valid] == -1).all()
            for image, label, i in zip(*(batch[key][valid] for key in ("image", "label", "index")), strict=True):
                assert np.array_equal(image, source[int(i)]["image"])
                assert label == source[int(i)]["label"]
                seen.append(int(i))
    assert sorted(seen) == list(range(360))


def test_limited_pass_is_spread_evenly(digits):
    def indices(limit):
        batches = make_epoch(digits, GRAY, batch_size=8, limit=limit)
        return [int(i) for batch in batches for i in batch["index"][batch["valid"]]]

    assert indices(10) == [i * 1437 // 10 for i in range(10)]
    assert indices(9999) == list(range(1437))


def test_pass_leaves_out_bad_images_and_logs_them_once(damaged, caplog):
    epoch = make_epoch(damaged, CenterCrop((8, 6), channels=1), batch_size=24)
    for _ in range(2):
        batches = list(epoch)
        batch = {key: np.concatenate([each[key] for each in batches]) for key in batches[0]}
        assert np.flatnonzero(~batch["valid"]).tolist() == [*BAD, *range(64, 72)]
        assert batch["index"].tolist() == [*range(64), *[-1] * 8]
        shades = np.where(batch["valid"], 3 * np.arange(72), 0).astype(np.uint8)
        assert np.array_equal(batch["image"][:, 0, 0, 0], shades)
    assert sum("left out" in record.message for record in caplog.records) == len(BAD)


# --- the fingerprint


def test_fingerprint_holds_what_decides_the_samples(tmp_path):
    spec = BatchSpec(batch_size=4, seed=0, image_size=(8, 8))
    source = make_folder(tmp_path, 20)
    before = data.fingerprint(source, spec)
    assert json.loads(json.dumps(before)) == before
    changes = {
        "seed": 1, "batch_size": 8, "image_size": (8, 9), "channels": 1, "crop_scale": (0.5, 1.0),
        "crop_ratio": (1.0, 1.0), "flip": 0.0, "interpolation": "bicubic", "max_pixels": 100,
    }  # fmt: skip
    for name, value in changes.items():
        after = data.fingerprint(source, spec._replace(**{name: value}))
        assert [key for key in before if before[key] != after[key]] == [name]
    (tmp_path / "new.png").touch()
    after = data.fingerprint(make_source("folder", path=str(tmp_path), heldout_fraction=0.0), spec)
    assert [key for key in before if before[key] != after[key]] == ["source"]


# --- processes that die

PROGRAM = """
import multiprocessing, sys, time
from simmim_jax.data import BatchSpec, Loading, make_batches, make_source
from simmim_jax.errors import exit_with_message

if __name__ == "__main__":
    with exit_with_message():
        source = make_source({source})
        batches = make_batches(source, BatchSpec(16, 0, (64, 64)), loading=Loading(workers=2, prefetch=4))
        batch = next(batches), next(batches)  # the second comes from the second worker
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        {rest}
"""


def start(tmp_path: Path, source: str, rest: str) -> subprocess.Popen:
    (tmp_path / "program.py").write_text(PROGRAM.format(source=source, rest=rest))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    line = [sys.executable, str(tmp_path / "program.py")]
    return subprocess.Popen(line, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    """Whether the condition holds within half a minute."""
    for _ in range(300):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_run_that_ends_leaves_no_worker_no_shared_memory_and_no_output(tmp_path):
    program = start(tmp_path, "'digits'", "keep = batches, batch; next(batches)")
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    output, errors = program.communicate(timeout=60)
    assert (program.returncode, output, errors) == (0, "", "")
    assert wait_until(lambda: not any(map(is_alive, workers)))


def test_workers_and_shared_memory_end_with_a_killed_main_process(tmp_path):
    program = start(tmp_path, "'digits'", "time.sleep(600)")
    workers = [int(pid) for pid in program.stdout.readline().split()]
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in (program.pid, *workers))
    mapped = set(re.findall(r"/dev/shm/(psm_\w+)", maps))
    assert len(mapped) > 4
    program.kill()
    program.communicate()
    assert wait_until(lambda: not any(map(is_alive, workers)))
    assert wait_until(lambda: not mapped & set(os.listdir("/dev/shm")))  # the resource tracker removes it


@pytest.mark.slow
def test_error_of_a_worker_is_one_line_of_the_main_process(tmp_path):
    (tmp_path / "images").mkdir()
    for i in range(20):
        (tmp_path / "images" / f"{i}.png").write_bytes(b"gone")
    program = start(tmp_path, f"'folder', path={str(tmp_path / 'images')!r}, heldout_fraction=0.0", "pass")
    output, errors = program.communicate(timeout=120)
    assert (program.returncode, output, errors.count("\n")) == (3, "", 1)
    assert errors.startswith("ERROR[data] 20 images in a row")


def kill_a_worker():
    worker = next(child for child in multiprocessing.active_children() if child.name.startswith("grain"))
    os.kill(worker.pid, signal.SIGKILL)


def test_batches_of_a_killed_worker_are_made_again_and_a_second_death_ends_the_run(digits, caplog):
    unbroken = take(20, digits)
    batches = make_batches(digits, workers=2, prefetch=1)
    first = [next(batches) for _ in range(3)]
    kill_a_worker()
    assert_equal([*first, *itertools.islice(batches, 17)], unbroken)
    (message,) = [record.message for record in caplog.records if "restarting the workers" in record.message]
    assert re.match(r"a data worker was killed by SIGKILL \(exit code -9; \d+ MiB", message)

    kill_a_worker()
    with pytest.raises(DataError, match=r"worker.* was killed by SIGKILL, the second to die - exit .*data\.workers"):
        list(itertools.islice(batches, 20))
    assert next(batches, "ended") == "ended"
