"""Prepared shards: their content, and that no interruption, second process or mistake loses or damages anything."""

import csv
import hashlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tiny_tfds import TinyShades

from simmim_jax.data.decode import BadImage, decode
from simmim_jax.data.prepared import unpack_record
from simmim_jax.data.sources import make_source
from simmim_jax.errors import BusyError, ConfigError, DataError, Preempted
from simmim_jax.tools import cli
from simmim_jax.tools.prepare import __main__ as command
from simmim_jax.tools.prepare import destination, shards

SETTINGS = shards.Settings(short_side=32, quality=92, subsampling="420", channels=3, max_pixels=10**6)


def prepare(source, dest, *flags):
    command.run([str(source), str(dest), "--workers=0", *flags])


def encoded(kind="JPEG", size=(40, 30), mode="RGB", seed=0, **options) -> bytes:
    """A file of smooth noise."""
    bands = len(Image.new(mode, (1, 1)).getbands())
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, bands), np.uint8)
    picture = Image.fromarray(noise[:, :, 0] if bands == 1 else noise, mode)
    file = io.BytesIO()
    picture.resize(size, Image.Resampling.BICUBIC).save(file, kind, **options)
    return file.getvalue()


def rotated() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def write(path, data=None, **options):
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(encoded(**options) if data is None else data)


def write_many(folder, count, **options):
    for i in range(count):
        write(folder / "ab"[i % 2] / f"{i:03d}.jpg", seed=i, **options)
    return folder


def records(folder) -> list[dict]:
    """All records of a split, in order."""
    found = []
    for path in sorted(Path(folder).glob("part-*")):
        reader = ArrayRecordReader(str(path))
        assert "group_size:1" in reader.writer_options_string()
        found += [unpack_record(data, None) for data in reader.read_all()]
        reader.close()
    return found


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def content(dest) -> dict:
    """Every file of DEST and its hash, without the date in the manifest."""
    found = {}
    for path in sorted(Path(dest).rglob("*")):
        if path.is_file() and path.name != ".prepare.lock":
            found[str(path.relative_to(dest))] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name == "manifest.json":
                found["made"] = json.loads(path.read_text())
                del found["made"]["made"], found[str(path.relative_to(dest))]
    return found


def partials(dest) -> list:
    return list(Path(dest).rglob("*.partial"))


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A folder of every kind of file, and its prepared form."""
    root = tmp_path_factory.mktemp("odd")
    for name, data in {
        "a/1 large.jpg": encoded(size=(90, 60)),
        "a/2 small.jpg": encoded(size=(30, 20)),
        "a/3 rotated.jpg": rotated(),
        "a/4 gray.jpg": encoded(mode="L", size=(20, 20)),
        "a/5 cmyk.jpg": encoded(mode="CMYK", size=(20, 20)),
        "b/1.png": encoded("PNG", size=(20, 20)),
        "b/2 alpha.png": encoded("PNG", mode="RGBA", size=(20, 20)),
        "b/3.webp": encoded("WEBP", size=(20, 20)),
        "b/4.bmp": encoded("BMP", size=(20, 20)),
        "b/5 \u00e4\n\u4e2d.png": encoded("PNG", size=(33, 500)),
        "b/6 \udcff.png": encoded("PNG", size=(20, 32)),
        "b/7 narrow.png": encoded("PNG", size=(1, 500)),
        "c/1 cut.jpg": encoded(size=(90, 60))[:-200],
        "c/2 empty.jpg": b"",
        "c/3 other.jpg": b"<html>",
        "c/4 bomb.png": encoded("PNG", size=(2000, 2000)),
    }.items():
        write(root / "images" / "train" / name, data)
    for name in ("b/x.jpg", "d/y.jpg", "d/z.jpg"):
        write(root / "images" / "validation" / name)
    prepare(root / "images", root / "to", "--short-side=32", "--max-bad-fraction=0.5", "--max-pixels=1000000")
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Twelve images, one of them bad, in four shards, prepared without interruption."""
    root = tmp_path_factory.mktemp("small")
    write_many(root / "from", 12, size=(40, 40))
    write(root / "from" / "a" / "004.jpg", b"")
    prepare(root / "from", root / "to", "--shards=4", "--short-side=32")
    return root


# --- content of the shards


def test_shards_have_the_records_of_each_split_in_order_with_common_classes(odd):
    assert sorted(os.listdir(odd / "to")) == [".prepare.lock", "train", "validation"]
    for split in ("train", "validation"):
        source = make_source("folder", path=str(odd / "images"), split=split, heldout_fraction=0.0)
        folder = odd / "to" / split
        found, expected = records(folder), [source[i] for i in range(len(source))]
        expected = [(each["name"], each["label"]) for each in expected if not each["name"].startswith("c/")]
        assert [(record["name"], record["label"]) for record in found] == expected
        stored = manifest(folder)
        assert (stored["count"], sum(s["count"] for s in stored["shards"])) == (len(found), len(found))
        assert tuple(stored["classes"]) == source.classes == ("a", "b", "c", "d")
        assert stored["source"] == {"described": source.describe(), "fingerprint": source.fingerprint()}
        assert stored["settings"] == SETTINGS.as_json()
        for shard in stored["shards"]:
            data = (folder / shard["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert stored["bytes"] == sum(shard["bytes"] for shard in stored["shards"])
        assert not [name for name in os.listdir(folder) if name.startswith(".")]


def test_bytes_are_kept_unless_size_orientation_mode_or_format_must_change(odd):
    kept, encoded_again = [], []
    for record in records(odd / "to" / "train"):
        file = (odd / "images" / "train" / record["name"]).read_bytes()
        is_kept = record["image"] == file
        (kept if is_kept else encoded_again).append(record["name"][:3])
        assert is_kept or Image.open(io.BytesIO(record["image"])).format == "JPEG"
        original = Image.fromarray(decode(file, 3))
        scale = min(1, 32 / min(original.size))  # images are never enlarged
        size = tuple(round(side * scale) for side in original.size)
        expected = np.asarray(original.resize(size, Image.Resampling.BICUBIC), np.float32)
        pixels = decode(record["image"], 3)
        assert pixels.shape == expected.shape, record["name"]
        # loss of JPEG at quality 92 with subsampled colors; a flip, another crop or other colors differ by 40 or more
        assert np.abs(pixels - expected).mean() < 8, record["name"]
    assert kept == ["a/2", "a/4", "b/1", "b/3", "b/6", "b/7"]
    assert encoded_again == ["a/1", "a/3", "a/5", "b/2", "b/4", "b/5"]


def test_mean_and_std_are_over_all_pixels(tmp_path):
    write_many(tmp_path / "from", 6, kind="PNG", size=(8, 5))
    write(tmp_path / "from" / "a" / "large.png", kind="PNG", size=(31, 20))
    prepare(tmp_path / "from", tmp_path / "to", "--shards=3")
    pixels = [decode(record["image"], 3).reshape(-1, 3) / 255 for record in records(tmp_path / "to" / "train")]
    stored = manifest(tmp_path / "to" / "train")
    np.testing.assert_allclose(stored["mean"], np.concatenate(pixels).mean(0), rtol=1e-12)
    np.testing.assert_allclose(stored["std"], np.concatenate(pixels).std(0), rtol=1e-12)


def test_refused_files_are_listed_with_their_exact_names_and_reasons(odd, tmp_path):
    with open(odd / "to" / "train" / "refused.csv", newline="") as file:
        rows = list(csv.reader(file))
    words = {"1 cut.jpg": "truncated", "2 empty.jpg": "empty", "3 other.jpg": "none of", "4 bomb.png": "max_pixels"}
    assert [name for name, _ in rows] == ["name", *(f"c/{name}" for name in words)]
    assert all(word in reason for (_, reason), word in zip(rows[1:], words.values(), strict=True))
    assert manifest(odd / "to" / "train")["refused"] == 4
    assert (odd / "to" / "validation" / "refused.csv").read_text().split() == ["name,reason"]
    names = ['a/\udcff,\n".jpg', "a/=1+1.jpg"]
    write_many(tmp_path / "from", 2)
    for name in names:
        write(tmp_path / "from" / name, b"no image")
    prepare(tmp_path / "from", tmp_path / "to", "--max-bad-fraction=1")
    with open(tmp_path / "to/train/refused.csv", newline="", errors="surrogateescape") as file:
        assert sorted(row[0] for row in csv.reader(file)) == sorted(["name", *names])


def test_gray_is_a_gray_jpeg_and_other_channels_are_raw(tmp_path):
    write(tmp_path / "from" / "1.png", kind="PNG", mode="RGBA", size=(64, 48))
    prepare(tmp_path / "from", tmp_path / "raw", "--channels=4", "--short-side=12")
    record = records(tmp_path / "raw" / "train")[0]
    pixels = record["image"]
    assert (pixels.shape, record["label"]) == ((12, 16, 4), -1)
    original = decode((tmp_path / "from" / "1.png").read_bytes(), 4).astype(float)
    assert np.abs(original.reshape(12, 4, 16, 4, 4).mean((1, 3)) - pixels).mean() < 3  # bicubic against a plain mean
    np.testing.assert_allclose(manifest(tmp_path / "raw" / "train")["mean"], pixels.mean((0, 1)) / 255)
    prepare(tmp_path / "from", tmp_path / "gray", "--channels=1")
    assert Image.open(io.BytesIO(records(tmp_path / "gray" / "train")[0]["image"])).mode == "L"
    assert len(manifest(tmp_path / "gray" / "train")["mean"]) == 1


def test_sources_without_files_are_prepared(tmp_path):
    TinyShades(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    command.run([str(tmp_path / "shades"), "--name=tiny_shades", "--source=tfds", "--workers=0",
                 f"--data_dir={tmp_path / 'tfds'}"])  # fmt: skip
    source = make_source("tfds", name="tiny_shades", data_dir=str(tmp_path / "tfds"), split="train")
    found = records(tmp_path / "shades" / "train")
    assert [r["label"] for r in found] == [source[i]["label"] for i in range(len(source))]
    command.run([str(tmp_path / "digits"), "--source=digits", "--workers=0", "--channels=1", "--quality=100",
                 "--split=test"])  # fmt: skip
    test, found = make_source("digits", split="test"), records(tmp_path / "digits" / "test")
    assert [r["label"] for r in found] == test.labels.tolist()
    assert np.abs(decode(found[7]["image"], 1).astype(int) - test[7]["image"]).max() < 8
    assert manifest(tmp_path / "digits" / "test")["classes"] == list("0123456789")


def test_short_side_zero_quality_and_subsampling_have_their_effect(tmp_path):
    bmp, settings = encoded("BMP", size=(300, 200)), SETTINGS._replace(short_side=0)
    images = [
        shards.shrink(bmp, each)[0]["image"]
        for each in (settings, settings._replace(quality=50), settings._replace(subsampling="444"))
    ]
    plain, coarse, full = images
    assert decode(plain, 3).shape == (200, 300, 3)
    assert len(coarse) < len(plain) < len(full)
    assert [Image.open(io.BytesIO(data)).layer[0][1] for data in (plain, full)] == [2, 1]
    long = np.tile(np.arange(200, dtype=np.uint8)[:, None], (400, 1))[:, :, None]  # too long for a JPEG
    stored, pixels = shards.shrink(long, SETTINGS._replace(channels=1))
    assert Image.open(io.BytesIO(stored["image"])).format == "PNG"
    assert np.array_equal(decode(stored["image"], 1), pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Pillow
def test_hostile_bytes_are_bad_images():
    rng = np.random.default_rng(0)
    originals = [encoded(kind, size=(12, 9)) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")] + [rotated()]
    bad = 0
    for _ in range(400):
        data = bytearray(originals[rng.integers(len(originals))])
        for offset in rng.integers(0, len(data), rng.integers(1, 8)):
            data[offset] = rng.integers(256)
        try:
            stored, pixels = shards.shrink(bytes(data), SETTINGS)
        except BadImage:
            bad += 1
            continue
        assert pixels.shape == decode(stored["image"], 3).shape
    assert 20 < bad < 380


# --- interrupted, killed, started twice


class Killed(BaseException):
    """An end that no `except` of the tool handles."""


def killed_at(monkeypatch, step: int, *arguments) -> bool:
    """Prepare, and end the run before (even step) or after (odd) a rename. Returns whether that was reached."""
    steps, rename = iter(range(10**6)), os.replace

    def replace(*paths):
        if next(steps) == step:
            raise Killed
        rename(*paths)
        if next(steps) == step:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            prepare(*arguments)
        except Killed:
            return True
        return False


def test_run_that_ends_anywhere_is_finished_with_the_same_bytes(tmp_path, monkeypatch):
    write_many(tmp_path / "from", 6)
    write(tmp_path / "from" / "a" / "004.jpg", b"")
    flags = ("--shards=2", "--short-side=24")
    prepare(tmp_path / "from", tmp_path / "unbroken", *flags)
    arguments, step = (tmp_path / "from", tmp_path / "to", *flags), 0
    while killed_at(monkeypatch, step, *arguments):
        inodes = {path: path.stat().st_ino for path in (tmp_path / "to").rglob("part-*")}
        write(tmp_path / "to" / "train" / ".part-00001-of-00002.array_record.1.partial", b"half")
        prepare(*arguments)
        assert content(tmp_path / "to") == content(tmp_path / "unbroken")
        # only the newest shard, if it has no sidecar, is written again
        assert sum(path.stat().st_ino != inode for path, inode in inodes.items()) <= 1
        shutil.rmtree(tmp_path / "to")
        step += 1
    assert step == 2 * (1 + 2 * 2 + 2)  # plan, shards with sidecars, refused.csv and manifest


def test_repeated_interruptions_and_a_damaged_shard_lose_nothing(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    assert killed_at(monkeypatch, 10, *arguments)
    first = tmp_path / "to" / "train" / "part-00000-of-00004.array_record"
    first.write_bytes(first.read_bytes()[:-1])
    runs = 0
    while killed_at(monkeypatch, 5, *arguments):
        runs += 1
    assert 1 <= runs <= 6
    assert content(tmp_path / "to") == content(small / "to")


def test_processes_of_a_job_and_a_last_command_write_the_same_bytes(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    folder = tmp_path / "to" / "train"
    assert killed_at(monkeypatch, 4, *arguments, "--process=2", "--processes=3")  # before its shard has a sidecar
    prepare(*arguments, "--process=1", "--processes=3")
    assert {path.name for path in folder.glob(".part-*.json")} == {".part-00001-of-00004.array_record.json"}
    prepare(*arguments, "--process=0", "--processes=3")
    assert not (folder / "manifest.json").exists()
    written = {path: path.stat().st_ino for n in (0, 1, 3) for path in folder.glob(f"part-0000{n}-*")}
    prepare(*arguments)  # finishes, and makes up for the killed process
    assert content(tmp_path / "to") == content(small / "to")
    assert written == {path: path.stat().st_ino for path in written}
    prepare(*arguments, "--process=2", "--processes=3")  # nothing is left to do
    assert not list(folder.glob(".*"))


def test_process_of_a_job_holds_its_part_and_a_whole_run_all_of_them(small, tmp_path):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    with destination.lock(str(tmp_path / "to"), destination.Job(0, 2)):
        prepare(*arguments, "--process=1", "--processes=2")
        for flags in ((), ("--process=0", "--processes=2")):
            with pytest.raises(BusyError):
                prepare(*arguments, *flags)


def test_beam_pipeline_writes_the_same_bytes(small, tmp_path):
    pytest.importorskip("apache_beam")
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32", "--beam=--runner=DirectRunner")
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")
    shutil.rmtree(tmp_path / "to")
    with pytest.raises(DataError, match="NoSuchRunner"):
        prepare(*arguments[:-1], "--beam=--runner=NoSuchRunner")


def test_number_of_shards_is_decided_once(tmp_path, monkeypatch):
    write_many(tmp_path / "from", 8)
    with monkeypatch.context() as patch:
        patch.setattr(destination, "SHARD_BYTES", 1500)
        assert killed_at(patch, 3, tmp_path / "from", tmp_path / "to")
    prepare(tmp_path / "from", tmp_path / "to")
    of = [shard["file"][-18:-13] for shard in manifest(tmp_path / "to" / "train")["shards"]]
    assert len(of) == int(of[0]) > 1


@pytest.mark.parametrize(
    ("count", "size", "expected"), [(1, 10, 1), (999, 10, 1), (2048, 10, 4), (10**5, 10, 16), (10**6, 2**16, 245)]
)
def test_shards_have_256_mib_and_small_data_enough_shards_for_several_workers(count, size, expected, monkeypatch):
    class Source:
        def __len__(self):
            return count

        def __getitem__(self, i):
            return {"image": b""}

    monkeypatch.setattr(destination, "shrink", lambda *_: ({"image": bytes(size)}, None))
    assert destination._choose_shards(Source(), SETTINGS) == expected
    tasks = shards.make_tasks("x", count, expected)
    assert [task.start for task in tasks] == [0, *(task.stop for task in tasks[:-1])]
    assert tasks[-1].stop == count


@pytest.mark.parametrize(
    ("number", "code", "flags"), [(signal.SIGTERM, 143, ()), (signal.SIGINT, 130, ["--overwrite"])]
)
def test_signal_ends_a_run_without_workers_and_names_the_command_to_continue(
    number, code, flags, small, tmp_path, monkeypatch
):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    rename, before = os.replace, signal.getsignal(number)

    def replace(*paths):
        rename(*paths)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(Preempted) as raised:
            prepare(*arguments, *flags)
    assert raised.value.exit_code == code
    assert ("without --overwrite" in str(raised.value)) == bool(flags)
    assert signal.getsignal(number) is before
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")


def test_worker_process_writes_the_same_bytes(small, tmp_path):  # the slow tests have several workers
    prepare(small / "from", tmp_path / "to", "--shards=4", "--short-side=32", "--workers=1")
    assert content(tmp_path / "to") == content(small / "to")


def start(source, dest, *flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "simmim_jax.tools.prepare", source, dest, "--workers=2", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def sidecars(dest) -> list:
    return list(Path(dest).glob("train/.part-*.json"))


def wait_for_shard(process, dest, more_than: int = 0) -> list[psutil.Process]:
    """Wait until more shards are finished. Returns the children of the process."""
    until = time.monotonic() + 60
    while len(sidecars(dest)) <= more_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    return psutil.Process(process.pid).children(recursive=True)


def wait_for_end(process, children) -> tuple[int, str]:
    """(exit code, last line of stderr) of a process, which must leave no child behind."""
    _, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    return process.returncode, stderr.strip().splitlines()[-1] if stderr.strip() else ""


def kill_a_worker(dest, more_than: int, killed: list) -> None:
    """Kill a worker of this process when more shards are finished."""
    until = time.monotonic() + 60
    while len(sidecars(dest)) <= more_than and time.monotonic() < until:
        time.sleep(0.002)
    killed.append(multiprocessing.active_children()[0].pid)
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.slow
def test_run_after_signals_kills_and_a_second_process_is_finished_with_the_same_bytes(tmp_path):
    write(tmp_path / "large.jpg", size=(900, 900))
    for i in range(160):
        (tmp_path / "from" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "large.jpg", tmp_path / "from" / "ab"[i % 2] / f"{i:03d}.jpg")
    source, dest, flags = tmp_path / "from", tmp_path / "to", ("--short-side=32", "--shards=32")

    process = start(source, dest, *flags)
    children = wait_for_shard(process, dest)
    with pytest.raises(BusyError, match=f"{dest} by pid {process.pid}"):
        prepare(source, dest, *flags)
    os.killpg(process.pid, signal.SIGINT)  # like ^C in a terminal
    code, line = wait_for_end(process, children)
    assert code == 130
    assert line.startswith("stopped by SIGINT")
    assert not partials(dest)

    process = start(source, dest, *flags)
    children = wait_for_shard(process, dest, more_than=len(sidecars(dest)))
    process.kill()
    assert wait_for_end(process, children)[0] == -signal.SIGKILL
    kept = {path: path.stat().st_ino for path in dest.glob("train/part-*")}
    assert 2 <= len(kept) < 32

    killed = []
    killer = threading.Thread(target=kill_a_worker, args=(dest, len(sidecars(dest)), killed))
    killer.start()
    with pytest.raises(DataError, match=r"worker \d+ was killed by SIGKILL.*set --workers lower") as raised:
        prepare(source, dest, *flags, "--workers=2")
    killer.join()
    assert f"worker {killed[0]} " in str(raised.value)
    assert not partials(dest)

    prepare(source, dest, *flags)
    assert sum(path.stat().st_ino != inode for path, inode in kept.items()) <= 2  # one per worker
    prepare(source, tmp_path / "unbroken", *flags)
    assert content(dest) == content(tmp_path / "unbroken")


@pytest.mark.slow
def test_run_killed_at_random_moments_is_finished_with_the_same_bytes(tmp_path):
    write_many(tmp_path / "from", 200, size=(300, 300))
    write(tmp_path / "from" / "a" / "100.jpg", b"")
    source, dest, flags = tmp_path / "from", tmp_path / "to", ("--short-side=32", "--shards=20")
    prepare(source, tmp_path / "unbroken", *flags)
    kills = 0
    for tenths in range(2, 40, 3):
        process = start(source, dest, *flags)
        time.sleep(tenths / 10)
        killed = process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True) if killed else []
        process.kill()
        process.communicate()
        kills += killed
        _, alive = psutil.wait_procs(children, timeout=5)
        assert not alive
        if tenths % 9 == 0:
            shutil.rmtree(dest, ignore_errors=True)
    assert kills >= 5
    assert start(source, dest, *flags).wait(60) == 0
    assert content(dest) == content(tmp_path / "unbroken")


# --- existing folders


def test_finished_folder_is_left_unchanged(small, capsys):
    before = {path: path.stat().st_mtime_ns for path in (small / "to").rglob("*/*")}
    prepare(small / "from", small / "to", "--short-side=32")
    assert {path: path.stat().st_mtime_ns for path in (small / "to").rglob("*/*")} == before
    out = capsys.readouterr().out
    assert "is finished: 11 images in 4 shards" in out
    assert f"--config.data.path={small / 'to'} " in out


def test_other_settings_and_sources_are_refused_for_finished_and_unfinished_folders(small, tmp_path, monkeypatch):
    assert killed_at(monkeypatch, 5, small / "from", tmp_path / "half", "--short-side=32", "--shards=4")
    shutil.copytree(small / "to", tmp_path / "whole")
    before = content(tmp_path)
    for dest in ("half", "whole"):
        for flags, says in (
            (["--short-side=31", "--quality=9"], "quality: 92 saved, 9 now, short_side: 32 saved, 31 now"),
            (["--short-side=32", "--shards=5"], "shards: 4 saved, 5 now"),
        ):
            with pytest.raises(ConfigError, match=f"{says}.*--overwrite"):
                prepare(small / "from", tmp_path / dest, *flags)
    assert content(tmp_path) == before
    shutil.copytree(small / "from", tmp_path / "moved")
    prepare(tmp_path / "moved", tmp_path / "whole", "--short-side=32")  # the same images in another folder
    write(tmp_path / "moved" / "a" / "more.jpg")
    with pytest.raises(ConfigError, match=r"another SOURCE.*12 images.*13 images"):
        prepare(tmp_path / "moved", tmp_path / "whole", "--short-side=32")


def test_overwrite_replaces_only_files_of_prepare(small, tmp_path):
    shutil.copytree(small / "to", tmp_path / "to")
    write(tmp_path / "to" / "train" / "mine.txt", b"")
    with pytest.raises(ConfigError, match=r"'mine\.txt'"):
        prepare(small / "from", tmp_path / "to", "--overwrite")
    assert (tmp_path / "to" / "train" / "manifest.json").exists()
    (tmp_path / "to" / "train" / "mine.txt").unlink()
    write(tmp_path / "to" / "notes.txt", b"")
    prepare(small / "from", tmp_path / "to", "--overwrite", "--short-side=16", "--shards=2")
    assert len(list((tmp_path / "to" / "train").iterdir())) == 4
    assert min(Image.open(io.BytesIO(records(tmp_path / "to" / "train")[0]["image"])).size) == 16
    assert (tmp_path / "to" / "notes.txt").exists()


@pytest.mark.parametrize("name", ["notes.txt", "train/1.jpg", "other/1.jpg", "train/part-00000-of-00001.array_record"])
def test_folder_of_other_files_is_refused(name, small, tmp_path):
    write(tmp_path / "to" / name, b"")
    for flags in ((), ("--overwrite",)):
        with pytest.raises(ConfigError, match="prepare has not written"):
            prepare(small / "from", tmp_path / "to", *flags)
        assert [path for path in (tmp_path / "to").rglob("*") if path.is_file()] == [tmp_path / "to" / name]


def test_source_and_dest_must_be_separate(small, tmp_path):
    (tmp_path / "link").symlink_to(small)
    for dest in (small / "from", small / "from" / "a" / "to", small, tmp_path / "link" / "from" / "x"):
        with pytest.raises(ConfigError, match="SOURCE and DEST"):
            prepare(small / "from", dest)
    with pytest.raises(ConfigError, match="folder of one split"):
        prepare(small / "from", small / "to" / "train")


# --- files that cannot be read or written


def test_too_many_bad_files_end_the_run_and_finished_shards_stay(tmp_path):
    write_many(tmp_path / "from", 12)
    for name in ("a/006.jpg", "a/008.jpg", "b/007.jpg", "b/009.jpg"):
        write(tmp_path / "from" / name, b"no")
    arguments = tmp_path / "from", tmp_path / "to", "--shards=6"
    with pytest.raises(DataError, match=r"2 images .* at most 1, .*'a/006.jpg' \(is none of.*'a/008.jpg'"):
        prepare(*arguments)
    with pytest.raises(DataError, match=r"4 images .* at most 3, .*'a/008.jpg'.*'b/007.jpg'.*'b/009.jpg'"):
        prepare(*arguments, "--max-bad-fraction=0.25")
    assert len(list((tmp_path / "to" / "train").glob("part-*"))) == 5
    assert not partials(tmp_path)
    prepare(*arguments, "--max-bad-fraction=0.3")
    assert manifest(tmp_path / "to" / "train")["refused"] == 4
    write(tmp_path / "bad" / "1.jpg", b"")
    with pytest.raises(DataError, match=r"no image .*'1.jpg'"):  # although one may be bad
        prepare(tmp_path / "bad", tmp_path / "none")


def test_full_disk_is_reported_and_the_same_command_continues(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert killed_at(monkeypatch, 5, *arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))  # like a full disk, without root
    try:
        with pytest.raises(DataError, match=r"File too large.*MiB free\).*part-00001"):
            prepare(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not partials(tmp_path)
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")
    write(tmp_path / "file", b"")
    for dest in (tmp_path / "file" / "to", "/proc/to"):
        with pytest.raises(DataError, match=rf"cannot write: .*{dest}"):
            prepare(small / "from", dest)


def test_names_of_folders_may_be_bytes_that_are_not_utf8(tmp_path):
    dest = f"{tmp_path}/\udcff \u4e2d"
    write(tmp_path / "from \udcfe" / "1.jpg")
    prepare(tmp_path / "from \udcfe", dest)
    assert manifest(os.path.join(dest, "train"))["count"] == 1
    command.run(["--verify", dest])


# --- the command line


def test_report_has_numbers_reasons_and_the_training_command(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cli, "LINE_PERIOD", 0.0)
    monkeypatch.setattr(shards, "REPORT_PERIOD", 0.0)
    write_many(tmp_path / "from", 4, size=(512, 300))
    for i in range(5):
        write(tmp_path / "from" / f"a/bad\x1b {i}.jpg", b"")
    prepare(tmp_path / "from", tmp_path / "my shards", "--max-bad-fraction=0.9")
    out, err = capsys.readouterr()
    assert "train: 4 images in 1 shard, 2 classes" in out
    assert "5 because: 'is empty': 'a/bad\\x1b 0.jpg', 'a/bad\\x1b 1.jpg', 'a/bad\\x1b 2.jpg', ..." in out
    assert f"--config.data.path='{tmp_path}/my shards' " in out
    mean = manifest(tmp_path / "my shards" / "train")["mean"]
    assert f"--config.mean={','.join(f'{value:.4f}' for value in mean)} " in out
    assert "train: 9 of 9 images, " in err
    assert "5 refused" in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["a"], "'a' instead of SOURCE and DEST"),
        (["a", "b", "--quality=101"], "--quality"),
        (["a", "b", "--subsampling=422"], "'422'.*420, 444"),
        (["a", "b", "--split=../x"], r"'\.\./x'"),
        (["a", "b", "--source=foldr"], "'foldr'.*did you mean folder"),
        (["/nowhere/at all", "b"], "/nowhere/at all does not exist"),
        (["a", "b", "--process=1"], "--processes"),
        (["a", "b", "--process=2", "--processes=2"], "0 to 1"),
        (["a", "b", "--process=0", "--processes=2", "--overwrite"], "--overwrite"),
    ],
)
def test_mistake_on_the_command_line_is_one_line(flags, says):
    with pytest.raises((ConfigError, DataError), match=says) as raised:
        command.run(flags)
    assert "\n" not in str(raised.value)


# --- splits and classes


def test_splits_are_those_of_the_source_or_those_requested(tmp_path):
    for name in ("train/a/1.jpg", "val/a/2.jpg", "valid/a/3.jpg", "extra/a/4.jpg"):
        write(tmp_path / "from" / name)
    prepare(tmp_path / "from", tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == [".prepare.lock", "train", "val", "valid"]
    assert [record["name"] for record in records(tmp_path / "to" / "valid")] == ["a/3.jpg"]
    prepare(tmp_path / "from", tmp_path / "to", "--split=extra,val")
    assert [record["name"] for record in records(tmp_path / "to" / "extra")] == ["a/4.jpg"]


@pytest.mark.parametrize(
    ("kind", "names", "expected"),
    [
        ("tar", ["imagenet-train-0001.tar", "imagenet-validation-0001.tar"], ["validation"]),
        ("list", ["train.txt", "val_map.txt", "testing.txt", "valid.py"], ["val"]),
        ("parquet", ["train-00000-of-00002.parquet", "test-00000-of-00001.PARQUET"], ["test"]),
        ("tar", ["all.tar"], []),
        ("folder", ["train/1.jpg", "valid/1.jpg", "val.txt"], ["valid"]),
    ],
)
def test_evaluation_splits_have_the_exact_names_of_the_source(kind, names, expected, tmp_path):
    for name in names:
        write(tmp_path / name, b"")
    assert command.evaluation_splits(str(tmp_path), kind, make_source) == expected
    if kind != "folder" and expected:
        assert command.evaluation_splits(str(tmp_path / "*"), kind, make_source) == expected
        template = tmp_path / names[0].replace("train", "{split}")
        own = names[1] == names[0].replace("train", expected[0])
        assert command.evaluation_splits(str(template), kind, make_source) == (expected if own else [])


def test_prepared_folder_can_be_prepared_again_without_a_change(odd, tmp_path):
    prepare(odd / "to", tmp_path / "again", "--short-side=0")
    for split in ("train", "validation"):
        for dest in (odd / "to", tmp_path / "again"):
            source = make_source("auto", path=str(dest), split=split)
            assert [source[i] for i in range(len(source))] == records(odd / "to" / split)
            assert source.classes == ("a", "b", "c", "d")


def test_labels_without_names_become_numbered_classes(tmp_path):
    (tmp_path / "from").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "from" / "x.array_record"), "group_size:1")
    for label in (0, 2):
        example = tf_example_pb2.Example()
        example.features.feature["image/encoded"].bytes_list.value.append(encoded())
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()
    for _ in range(2):  # the second time it is finished
        prepare(tmp_path / "from", tmp_path / "to")
        source = make_source("auto", path=str(tmp_path / "to"), heldout_fraction=0.0)
        assert source.classes == ("0", "1", "2")
        assert [source[i]["label"] for i in range(2)] == [0, 2]


def test_labels_mean_the_same_classes_in_every_split(tmp_path):
    def merge(**classes):
        return command.merge_classes({split: SimpleNamespace(classes=names) for split, names in classes.items()})

    assert merge(train=("a", "b"), val=()) == (["a", "b"], {"train": [0, 1], "val": []})
    digits = tuple(map(str, range(12)))
    assert merge(train=digits, val=digits[:11])[1]["val"] == list(range(11))
    assert merge(train=("a", "c"), val=("b", "c")) == (["a", "b", "c"], {"train": [0, 2], "val": [1, 2]})
    for name in ("train/b/1.jpg", "train/c/1.jpg"):
        write(tmp_path / "from" / name)
    prepare(tmp_path / "from", tmp_path / "to")
    for name in ("val/b/1.jpg", "val/a/1.jpg"):
        write(tmp_path / "from" / name)
    with pytest.raises(ConfigError, match=r"another class than in .*train"):
        prepare(tmp_path / "from", tmp_path / "to", "--split=val")


# --- verify


def test_verify_reports_undamaged_splits(small, odd, capsys):
    command.run(["--verify", str(odd / "to")])
    assert "train: undamaged (12 images in 1 shard)" in capsys.readouterr().out
    command.run(["--verify", str(small / "to" / "train")])
    assert "train: undamaged (11 images in 4 shards)" in capsys.readouterr().out
    with pytest.raises(DataError, match="no prepared folder"):
        command.run(["--verify", str(small)])


def test_verify_names_every_damaged_missing_and_surplus_shard(small, tmp_path, capsys, monkeypatch):
    train = tmp_path / "to" / "train"
    shutil.copytree(small / "to", tmp_path / "to")
    paths = sorted(train.glob("part-*"))
    data = bytearray(paths[0].read_bytes())
    data[len(data) // 2] ^= 1
    paths[0].write_bytes(data)
    paths[1].unlink()
    paths[2].write_bytes(paths[2].read_bytes()[:-5])
    write(train / "part-00007-of-00009.array_record", b"")
    stored = manifest(train)
    stored["shards"][3]["count"] += 1
    (train / "manifest.json").write_text(json.dumps(stored))
    with pytest.raises(DataError, match="6 damaged or missing"):
        command.run(["--verify", str(tmp_path / "to")])
    lines = [line.removeprefix(f"{train}: ") for line in capsys.readouterr().out.splitlines()]
    starts = (
        "manifest.json: 11 images, but 12", "part-00000-of-00004.array_record: its bytes",
        "part-00001-of-00004.array_record: No such file", "part-00002-of-00004.array_record: ",
        "part-00003-of-00004.array_record: 3 records, but 4", "part-00007-of-00009.array_record: not in",
    )  # fmt: skip
    assert all(line.startswith(expected) for expected, line in zip(starts, lines, strict=True))
    with pytest.raises(DataError, match="damaged since"):
        prepare(small / "from", tmp_path / "to", "--short-side=32")
    assert killed_at(monkeypatch, 5, small / "from", tmp_path / "half")
    with pytest.raises(DataError, match=r"unfinished: train.* without --overwrite"):
        command.run(["--verify", str(tmp_path / "half")])
    assert "damaged" not in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"format": "x"}, {"shards": [{"file": "../x"}]}, {"count": "1"}, {"source": {}}])
def test_manifest_of_another_program_is_refused(change, small, tmp_path):
    train = tmp_path / "to" / "train"
    shutil.copytree(small / "to", tmp_path / "to")
    (train / "manifest.json").write_text(json.dumps(manifest(train) | change))
    for arguments in (["--verify", str(tmp_path / "to")], [str(small / "from"), str(tmp_path / "to")]):
        with pytest.raises(DataError, match=r"manifest\.json"):
            command.run(arguments)
