"""Batches: the same at a step however they are computed, whole whatever the files are, and gone when the run is."""

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
from tiny_tfds import TinyShades

from simmim_jax import data
from simmim_jax.data import BatchSpec, CenterCrop, Loading, Shard, make_epoch, make_source
from simmim_jax.errors import ConfigError, DataError

OPTIONS = {"batch_size": 16, "seed": 3, "image_size": (12, 10), "channels": 1}


def make_batches(source, *, start_step=0, shard=(0, 1), **options):
    """The batches of OPTIONS with these changes to the spec and the loading."""
    loading = {name: options.pop(name) for name in Loading._fields if name in options}
    spec = BatchSpec(**OPTIONS | options)
    return data.make_batches(source, spec, start_step=start_step, shard=Shard(*shard), loading=Loading(**loading))


def fingerprint(source, **options):
    return data.fingerprint(source, BatchSpec(**OPTIONS | options))


def take(batches, count: int) -> list[dict]:
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
    return take(make_batches(digits), 6)


def write_shades(root: Path, count: int) -> None:
    for i in range(count):
        Image.new("L", (6, 8), 3 * i).save(root / f"{i:03}.png")


SPOILERS = [
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    lambda file: file.write_bytes(file.read_bytes()[:-24]),
    lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"x" * 50),
    lambda file: Image.new("L", (9000, 9000)).save(file),  # 81 million pixels
]


@pytest.fixture
def spoilt(tmp_path):
    """64 images of which 5 are bad, and the indices of these."""
    write_shades(tmp_path, 64)
    bad = [5, 6, 20, 33, 63]
    for i, spoil in zip(bad, SPOILERS, strict=True):
        spoil(tmp_path / f"{i:03}.png")
    return make_source("folder", path=str(tmp_path), heldout_fraction=0.0), bad


# --- the batch_index is the step


def test_a_batch_is_what_its_records_say(digits, six):
    for batch in six:
        assert {key: (value.shape, str(value.dtype)) for key, value in batch.items()} == {
            "image": ((16, 12, 10, 1), "uint8"),
            "label": ((16,), "int32"),
            "index": ((16,), "int64"),
            "replaced": ((16,), "bool"),
            "batch_index": ((16,), "int32"),
        }
        assert [digits[i]["label"] for i in batch["index"].tolist()] == batch["label"].tolist()
        assert all(type(value) is np.ndarray and value.flags.owndata for value in batch.values())


def test_the_order_is_that_of_every_earlier_version(six):
    # a change here, by us or by grain, gives every interrupted run other data when it goes on
    assert six[0]["index"][:8].tolist() == [941, 163, 571, 1223, 1122, 1385, 1394, 201]
    assert six[5]["index"][:8].tolist() == [349, 43, 833, 714, 420, 580, 95, 356]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_batch_is_the_same_for_any_number_of_workers(workers, digits, six):
    assert_equal(take(make_batches(digits, workers=workers), 6), six)


@pytest.mark.parametrize("threads", [0, 1, 4])
@pytest.mark.parametrize("prefetch", [1, 3])
def test_a_batch_is_the_same_for_any_number_of_threads(threads, prefetch, digits, six):
    assert_equal(take(make_batches(digits, threads=threads, prefetch=prefetch), 6), six)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_batches_together_are_the_one_process_batch(processes, digits, six):
    parts = [take(make_batches(digits, shard=(p, processes)), 6) for p in range(processes)]
    for step, batch in enumerate(six):
        for key, value in batch.items():
            for process in range(processes):
                assert np.array_equal(parts[process][step][key], value[process::processes])


@pytest.mark.parametrize(("start", "workers"), [(0, 0), (1, 0), (5, 0), (4, 2)])
def test_starting_at_a_step_gives_what_an_unbroken_run_has_there(start, workers, digits, six):
    again = make_batches(digits, start_step=start, workers=workers)
    assert_equal(take(again, 6 - start), six[start:])


def test_starting_late_is_as_quick_as_starting(digits):
    start = time.monotonic()
    late = take(make_batches(digits, start_step=10_000_000), 1)
    assert time.monotonic() - start < 2
    assert late[0]["image"].any()


def test_tfds_batches_are_the_same_from_worker_processes(tmp_path):
    TinyShades(data_dir=str(tmp_path), file_format="array_record").download_and_prepare()
    source = make_source("tfds", name="tiny_shades", data_dir=str(tmp_path))
    options = {**OPTIONS, "batch_size": 8}
    assert_equal(take(make_batches(source, workers=2, **options), 3), take(make_batches(source, **options), 3))


def test_every_epoch_is_a_permutation_and_no_two_are_alike(digits):
    options = {**OPTIONS, "batch_size": 479, "image_size": (2, 2)}  # a third of an epoch
    epochs = np.concatenate([batch["index"] for batch in take(make_batches(digits, **options), 6)]).reshape(2, 1437)
    for epoch in epochs:
        assert np.array_equal(np.sort(epoch), np.arange(1437))
    assert (epochs[0] == epochs[1]).mean() < 0.05


def test_a_record_is_cropped_anew_in_every_epoch(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)).save(tmp_path / "1.png")
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    crops = take(make_batches(source, batch_size=1), 20)
    assert len({crop["image"].tobytes() for crop in crops}) == 20


def test_within_a_batch_each_row_is_cropped_by_itself_in_every_process(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32), dtype=np.uint8)
    for i in range(8):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    options = {**OPTIONS, "batch_size": 8}
    parts = [take(make_batches(source, shard=(p, 2), **options), 1)[0]["image"] for p in range(2)]
    assert len({row.tobytes() for row in np.concatenate(parts)}) == 8


def test_seeds_share_neither_order_nor_crops(digits):
    # grain's own shuffle gives seed 1 in its first epoch the order of seed 0 in its second
    def order(seed, epoch):
        options = {**OPTIONS, "seed": seed, "batch_size": 1437, "image_size": (2, 2)}
        return take(make_batches(digits, start_step=epoch, **options), 1)[0]["index"]

    assert (order(0, 1) == order(1, 0)).mean() < 0.05
    assert (order(0, 0) == order(1, 0)).mean() < 0.05


def test_without_random_crops_a_batch_is_its_images(digits):
    options = {**OPTIONS, "image_size": (8, 8), "crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}
    batch = take(make_batches(digits, **options), 1)[0]
    assert np.array_equal(batch["image"], np.stack([digits[i]["image"] for i in batch["index"].tolist()]))


# --- bad images


def test_bad_images_are_replaced_alike_for_any_workers_and_processes(spoilt):
    source, bad = spoilt
    options = {**OPTIONS, "max_bad_fraction": 0.1}
    one = take(make_batches(source, **options), 8)
    assert_equal(take(make_batches(source, workers=2, **options), 8), one)
    assert_equal(take(make_batches(source, start_step=3, **options), 5), one[3:])
    halves = [take(make_batches(source, shard=(p, 2), **options), 8) for p in range(2)]
    for step in range(8):
        assert np.array_equal(halves[1][step]["image"], one[step]["image"][1::2])
    epochs = np.concatenate([batch["index"] for batch in one]).reshape(2, 64)
    counts = [Counter(epoch.tolist()) for epoch in epochs]
    assert counts[0] == counts[1]  # the substitute depends on the bad index alone
    assert not set(counts[0]) & set(bad)
    assert sorted(counts[0].values()) == [1] * 54 + [2] * 5  # five different images stand in
    assert sum(batch["replaced"].sum() for batch in one) == 10  # five an epoch
    for batch in one:  # and the image is that of the index told
        assert np.array_equal(batch["image"][:, 0, 0, 0], 3 * batch["index"])


def test_a_bad_image_is_named_once_with_its_reason(spoilt, caplog):
    source, _ = spoilt
    take(make_batches(source, workers=1, max_bad_fraction=0.1), 12)
    told = [record.message for record in caplog.records if record.message.startswith("bad image")]
    lines = sorted(line.partition("(64 images): ")[2] for line in told)
    assert [line[:7] for line in lines] == ["005.png", "006.png", "020.png", "033.png", "063.png"]
    for line, reason in zip(lines, ["is empty", "none of", "runcated", "", "9000 x 9000 pixels"], strict=True):
        assert reason in line


@pytest.mark.parametrize("workers", [0, 2])
def test_too_many_bad_images_stop_the_run_and_say_which(workers, spoilt):
    source, _ = spoilt
    batches = make_batches(source, workers=workers, max_bad_fraction=0.01)
    with pytest.raises(
        DataError, match=r"2 bad images, of at most 1; the last: 0\d\d\.png: .* split train \(64 images\)"
    ):
        list(zip(batches, range(4), strict=False))
    assert next(batches, "ended") == "ended"


def test_of_several_processes_none_ends_by_itself_for_bad_images(spoilt, caplog):
    source, bad = spoilt
    for process in range(2):
        take(make_batches(source, max_bad_fraction=0.0, shard=(process, 2)), 4)  # an epoch
    told = [record.message for record in caplog.records if record.message.startswith("bad image")]
    assert len(told) == len(bad)
    assert all(", of at most 0 in " in line for line in told)


@pytest.mark.parametrize("options", [{"max_bad_fraction": 0.0}, {"on_error": "raise", "max_bad_fraction": 0.5}])
def test_a_fraction_of_zero_and_the_policy_raise_stop_at_the_first(options, spoilt):
    source, _ = spoilt
    with pytest.raises(DataError, match="1 bad images, of at most 0"):
        take(make_batches(source, **options), 4)


def test_an_unreadable_or_vanished_file_is_a_bad_image(tmp_path, caplog):
    write_shades(tmp_path, 20)
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    (tmp_path / "003.png").unlink()
    (tmp_path / "004.png").unlink()
    (tmp_path / "004.png").mkdir()
    batches = take(make_batches(source, max_bad_fraction=0.1), 3)
    assert not {3, 4} & set(np.concatenate([batch["index"] for batch in batches]).tolist())
    assert {"003.png", "004.png"} == set(re.findall(r"0\d\d\.png(?=: \[Errno)", caplog.text))


@pytest.mark.parametrize("workers", [0, 1])
def test_when_nothing_can_be_read_the_run_stops_at_once(workers, tmp_path):
    write_shades(tmp_path, 20)
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    for file in tmp_path.iterdir():
        file.write_bytes(b"gone")
    with pytest.raises(
        DataError, match=r"20 images in a row cannot be read, the last one is 0\d\d\.png: is none of JPEG"
    ):
        next(make_batches(source, workers=workers, max_bad_fraction=1.0))


# --- errors at the door


def test_a_batch_larger_than_the_data_is_refused(digits):
    with pytest.raises(
        DataError, match=r"a batch of 2000 is larger.*digits, split train \(1437 images\).*1437 or less"
    ):
        make_batches(digits, batch_size=2000)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"shard": (0, 3)}, "batch_size=16.*multiple of the 3 processes, like 15"),
        ({"shard": (2, 2)}, r"shard=\(2, 2\)"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"seed": -1}, "seed=-1"),
        ({"image_size": (0, 4)}, "image_size"),
        ({"crop_scale": (0.9, 0.5)}, "crop_scale"),
        ({"crop_ratio": (0.0, 1.0)}, "crop_ratio"),
        ({"flip": 2.0}, "flip=2"),
        ({"interpolation": "cubic"}, "interpolation='cubic'.*bicubic"),
        ({"start_step": -1}, "start_step=-1"),
        ({"workers": -1}, "workers=-1"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"max_bad_fraction": 2.0}, "max_bad_fraction=2"),
        ({"on_error": "ignore"}, "on_error='ignore'.*replace, raise"),
    ],
)
def test_values_that_cannot_work_are_refused_at_once(changed, says, digits):
    with pytest.raises(ConfigError, match=says):
        make_batches(digits, **changed)


# --- one pass


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("threads", [0, 2])
@pytest.mark.parametrize("batch_size", [2, 50, 400])
def test_a_pass_has_every_record_once_and_every_batch_full(batch_size, threads, processes, digits):
    source = make_source("digits", split="test")
    seen = []
    for process in range(processes):
        loading = Loading(threads=threads, max_bad_fraction=1.0)
        shard = Shard(process, processes)
        epoch = make_epoch(source, CenterCrop((8, 8), 1), batch_size=batch_size, shard=shard, loading=loading)
        batches = list(epoch)
        assert len(batches) == len(epoch) == -(-360 // batch_size)
        assert_equal(list(epoch), batches)  # a second pass is the first
        for batch in batches:
            assert batch["image"].shape == (batch_size // processes, 8, 8, 1)
            assert batch["valid"].dtype == bool
            assert not batch["image"][~batch["valid"]].any()
            assert (batch["label"][~batch["valid"]] == -1).all()
            for image, label, index in zip(
                *(batch[key][batch["valid"]] for key in ("image", "label", "index")), strict=True
            ):
                record = source[int(index)]
                assert np.array_equal(image, record["image"])
                assert label == record["label"]
                seen.append(int(index))
    assert sorted(seen) == list(range(360))


def test_a_limited_pass_is_spread_evenly(digits):
    def indices(limit):
        batches = list(make_epoch(digits, CenterCrop((8, 8), 1), batch_size=8, limit=limit))
        return [int(i) for batch in batches for i in batch["index"][batch["valid"]]]

    assert indices(10) == [i * 1437 // 10 for i in range(10)]
    assert indices(9999) == list(range(1437))


def test_a_pass_leaves_out_bad_images_and_says_so_once(spoilt, caplog):
    source, bad = spoilt
    epoch = make_epoch(source, CenterCrop((8, 6), 1), batch_size=24)
    for _ in range(2):
        batches = list(epoch)
        valid = np.concatenate([batch["valid"] for batch in batches])
        assert np.flatnonzero(~valid).tolist() == [*bad, *range(64, 72)]
        index = np.concatenate([batch["index"] for batch in batches])
        assert index.tolist() == [*range(64), *[-1] * 8]
        image = np.concatenate([batch["image"] for batch in batches])
        assert np.array_equal(image[:, 0, 0, 0], np.where(valid, 3 * np.arange(72), 0).astype(np.uint8))
    assert sum("left out" in record.message for record in caplog.records) == 5


# --- the fingerprint


def test_the_fingerprint_holds_what_decides_the_samples(tmp_path):
    write_shades(tmp_path, 20)
    options = {"seed": 0, "batch_size": 4, "image_size": (8, 8), "channels": 3}
    source = make_source("folder", path=str(tmp_path), heldout_fraction=0.0)
    before = fingerprint(source, **options)
    assert json.loads(json.dumps(before)) == before
    assert before == fingerprint(make_source("folder", path=str(tmp_path), heldout_fraction=0.0), **options)
    changes = [
        {"seed": 1}, {"batch_size": 8}, {"image_size": (8, 9)}, {"channels": 1}, {"crop_scale": (0.5, 1.0)},
        {"crop_ratio": (1.0, 1.0)}, {"flip": 0.0}, {"interpolation": "bicubic"}, {"max_pixels": 100},
    ]  # fmt: skip
    for change in changes:
        after = fingerprint(source, **{**options, **change})
        assert [key for key in before if before[key] != after[key]] == list(change)
    (tmp_path / "new.png").touch()
    after = fingerprint(make_source("folder", path=str(tmp_path), heldout_fraction=0.0), **options)
    assert [key for key in before if before[key] != after[key]] == ["source"]


# --- processes that die

PROGRAM = """
import multiprocessing, sys, time
from simmim_jax.data import BatchSpec, Loading, make_batches, make_source

if __name__ == "__main__":
    source = make_source("digits")
    batches = make_batches(source, BatchSpec(16, 0, (64, 64)), loading=Loading(workers=2, prefetch=4))
    batch = next(batches), next(batches)  # the second is the second worker's
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    {rest}
"""


def start(tmp_path: Path, rest: str) -> tuple[subprocess.Popen, list[int]]:
    (tmp_path / "program.py").write_text(PROGRAM.format(rest=rest))
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    program = subprocess.Popen(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, text=True, stdout=-1, stderr=-1
    )
    workers = [int(pid) for pid in program.stdout.readline().split()]
    assert len(workers) == 2
    return program, workers


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int], seconds: float) -> list[int]:
    end = time.monotonic() + seconds
    while time.monotonic() < end and any(map(is_alive, pids)):
        time.sleep(0.1)
    return [pid for pid in pids if is_alive(pid)]


def test_a_run_that_ends_leaves_no_worker_no_shared_memory_and_no_noise(tmp_path):
    program, workers = start(tmp_path, "keep = batches, batch; next(batches)")
    output, errors = program.communicate(timeout=20)
    assert (program.returncode, output, errors) == (0, "", "")
    assert not wait_until_dead(workers, 1)


def shared_memory_of(pids: list[int]) -> set[str]:
    """The names of the shared memory that any of these processes has mapped; others may have their own meanwhile."""
    maps = "".join(Path(f"/proc/{pid}/maps").read_text() for pid in pids)
    return set(re.findall(r"/dev/shm/(psm_\w+)", maps))


def test_workers_do_not_outlive_a_killed_main_process(tmp_path):
    program, workers = start(tmp_path, "time.sleep(60)")
    mapped = shared_memory_of([program.pid, *workers])
    assert len(mapped) > 4
    program.kill()
    program.wait()
    assert not wait_until_dead(workers, 5)
    program.stdout.close(), program.stderr.close()
    time.sleep(0.5)  # the resource tracker sees them go, and then clears up
    assert not mapped & set(os.listdir("/dev/shm"))


def test_a_run_that_ends_by_an_error_leaves_nothing_behind_either(tmp_path):
    write_shades(tmp_path, 20)
    for file in tmp_path.iterdir():
        file.write_bytes(b"gone")
    (tmp_path / "program.py").write_text(
        "import sys\n"
        "from simmim_jax.data import BatchSpec, Loading, make_batches, make_source\n"
        "from simmim_jax.errors import exit_with_message\n"
        "if __name__ == '__main__':\n"
        f"    source = make_source('folder', path={str(tmp_path)!r}, heldout_fraction=0.0)\n"
        "    with exit_with_message():\n"
        "        batches = make_batches(source, BatchSpec(4, 0, (8, 8)), loading=Loading(workers=2))\n"
        "        try:\n"
        "            next(batches)\n"
        "        finally:\n"
        "            batches.close()\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, tmp_path / "program.py"], env=environment, text=True, capture_output=True)
    assert done.returncode == 3
    assert done.stderr.startswith("ERROR[data] 20 images in a row cannot be read")
    assert done.stderr.count("\n") == 1


def test_workers_of_a_program_that_is_no_file_are_refused_and_batches_without_them_are_not(tmp_path):
    program = (
        "from simmim_jax.data import BatchSpec, Loading, make_batches, make_source\n"
        "for workers in (0, 1):\n"
        "    batches = make_batches(make_source('digits'), BatchSpec(4, 0, (8, 8)), loading=Loading(workers))\n"
        "    print(next(batches)['label'].shape)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-"], input=program, env=environment, text=True, capture_output=True)
    assert done.stdout == "(4,)\n"
    assert "ERROR[config] workers cannot start from <stdin> - data.workers - save the program" in done.stderr


def kill_a_worker() -> int:
    victim = next(child for child in multiprocessing.active_children() if child.name.startswith("grain"))
    os.kill(victim.pid, signal.SIGKILL)
    return victim.pid


def test_a_killed_workers_batches_are_made_again_once_and_a_second_death_ends_the_run(digits, caplog):
    unbroken = take(make_batches(digits), 24)
    batches = make_batches(digits, workers=2, prefetch=1)
    first = [next(batches) for _ in range(2)]
    time.sleep(1.1)  # their memory is looked at once a second
    first += [next(batches)]
    killed = kill_a_worker()
    began = time.monotonic()
    assert_equal([*first, *itertools.islice(batches, 21)], unbroken)
    assert time.monotonic() - began < 10  # two workers have started in that time
    (told,) = [record.message for record in caplog.records if "its work is done again" in record.message]
    assert re.match(
        rf"data worker {killed} was killed by SIGKILL \(exit code -9, with \d+ MiB of .* MiB are free", told
    )

    kill_a_worker()
    began = time.monotonic()
    with pytest.raises(DataError, match=r"worker.* was killed by SIGKILL, the second to die - exit .*data\.workers"):
        list(itertools.islice(batches, 20))
    assert time.monotonic() - began < 5
    assert next(batches, "ended") == "ended"


def test_workers_leave_the_signals_of_the_job_to_the_main_process(digits, six):
    batches = make_batches(digits, workers=2)
    first = [next(batches), next(batches)]  # the second is the second worker's: both are at work
    for child in multiprocessing.active_children():
        os.kill(child.pid, signal.SIGTERM)
        os.kill(child.pid, signal.SIGINT)
    assert_equal([*first, *take(batches, 4)], six)
