"""Prepared shards: what is in them, and that who kills, doubles or misdirects a prepare loses and spoils nothing."""

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

import msgpack
import numpy as np
import psutil
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2
from tiny_tfds import TinyShades

from simmim_jax.data.decode import BadImage, decode
from simmim_jax.data.sources import make_source
from simmim_jax.errors import BusyError, ConfigError, DataError, Preempted
from simmim_jax.tools.prepare import __main__ as command
from simmim_jax.tools.prepare import prepared, shards

SETTINGS = {"short_side": 32, "quality": 92, "subsampling": "420", "channels": 3, "max_pixels": 10**6}


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


def write(path, data=None, **options):
    path = os.fsencode(path)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    Path(os.fsdecode(path)).write_bytes(encoded(**options) if data is None else data)


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(exif=exif)


def many(folder, count, **options):
    for i in range(count):
        write(folder / "ab"[i % 2] / f"{i:03d}.jpg", seed=i, **options)
    return folder


def records(folder) -> list[dict]:
    """All records of a split, in order."""
    found = []
    for path in sorted(Path(folder).glob("part-*")):
        reader = ArrayRecordReader(str(path))
        assert "group_size:1" in reader.writer_options_string()
        found += [msgpack.unpackb(data, unicode_errors="surrogateescape") for data in reader.read_all()]
        reader.close()
    return found


def manifest(folder) -> dict:
    return json.loads((Path(folder) / "manifest.json").read_text())


def content(dest) -> dict:
    """Every file of DEST and what is in it, but for the date."""
    found = {}
    for path in sorted(Path(dest).rglob("*")):
        if path.is_file() and path.name != ".prepare.lock":
            found[str(path.relative_to(dest))] = hashlib.sha256(path.read_bytes()).hexdigest()
            if path.name == "manifest.json":
                found["made"] = json.loads(path.read_text())
                del found["made"]["made"], found[str(path.relative_to(dest))]
    return found


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """A source of everything that a folder may hold, and where it was prepared."""
    root = tmp_path_factory.mktemp("odd")
    for name, data in {
        "a/1 large.jpg": encoded(size=(90, 60)),
        "a/2 small.jpg": encoded(size=(30, 20)),
        "a/3 turned.jpg": turned(),
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


# --- what is in the shards


def test_shards_hold_the_records_of_each_split_in_order_with_one_numbering_of_the_classes(odd):
    assert sorted(os.listdir(odd / "to")) == [".prepare.lock", "train", "validation"]
    for split in ("train", "validation"):
        source = make_source("folder", path=str(odd / "images"), split=split, heldout_fraction=0.0)
        folder = odd / "to" / split
        found, wanted = records(folder), [source[i] for i in range(len(source))]
        wanted = [record for record in wanted if not record["name"].startswith("c/")]
        assert [record["name"] for record in found] == [record["name"] for record in wanted]
        assert [record["label"] for record in found] == [record["label"] for record in wanted]
        told = manifest(folder)
        assert (told["count"], sum(s["count"] for s in told["shards"])) == (len(found), len(found))
        assert tuple(told["classes"]) == source.classes == ("a", "b", "c", "d")
        assert told["source"] == {"described": source.describe(), "fingerprint": source.fingerprint()}
        assert told["settings"] == SETTINGS
        for shard in told["shards"]:
            data = (folder / shard["file"]).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
        assert told["bytes"] == sum(shard["bytes"] for shard in told["shards"])
        leftover = [name for name in os.listdir(folder) if name.startswith(".")]
        assert not leftover


def test_bytes_are_kept_unless_size_orientation_mode_or_format_must_change(odd):
    found = {record["name"]: record["image"] for record in records(odd / "to" / "train")}
    kept, made = [], []
    for name, data in found.items():
        original = (odd / "images" / "train" / name).read_bytes()
        (kept if data == original else made).append(name[:3])
        assert data == original or Image.open(io.BytesIO(data)).format == "JPEG"
    assert kept == ["a/2", "a/4", "b/1", "b/3", "b/6", "b/7"]
    assert made == ["a/1", "a/3", "a/5", "b/2", "b/4", "b/5"]


def test_images_look_as_pillow_reduces_them_and_are_never_enlarged(odd):
    for record in records(odd / "to" / "train"):
        file = odd / "images" / "train" / record["name"]
        original = Image.fromarray(decode(file.read_bytes(), 3))
        scale = min(1, 32 / min(original.size))
        size = tuple(round(side * scale) for side in original.size)
        wanted = np.asarray(original.resize(size, Image.Resampling.BICUBIC), np.float32)
        pixels = decode(record["image"], 3)
        assert pixels.shape == wanted.shape, record["name"]
        # JPEG at quality 92 with half the colors' resolution; a flip, another crop or other colors make 40 and more
        assert np.abs(pixels - wanted).mean() < 8, record["name"]


def test_mean_and_std_are_those_of_all_pixels(tmp_path):
    many(tmp_path / "from", 6, kind="PNG", size=(8, 5))
    write(tmp_path / "from" / "a" / "large.png", kind="PNG", size=(31, 20))
    prepare(tmp_path / "from", tmp_path / "to", "--shards=3")
    pixels = [decode(record["image"], 3).reshape(-1, 3) / 255 for record in records(tmp_path / "to" / "train")]
    told = manifest(tmp_path / "to" / "train")
    assert told["channels"] == 3
    np.testing.assert_allclose(told["mean"], np.concatenate(pixels).mean(0), rtol=1e-12)
    np.testing.assert_allclose(told["std"], np.concatenate(pixels).std(0), rtol=1e-12)


def test_refused_files_are_left_out_and_listed_with_the_reason(odd):
    with open(odd / "to" / "train" / "refused.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["name", "reason"]
    assert [name for name, _ in rows[1:]] == [
        "c/1 cut.jpg", "c/2 empty.jpg", "c/3 other.jpg", "c/4 bomb.png",
    ]  # fmt: skip
    for (_, reason), word in zip(rows[1:], ("truncated", "empty", "none of", "max_pixels"), strict=True):
        assert word in reason
    assert manifest(odd / "to" / "train")["refused"] == 4
    assert (odd / "to" / "validation" / "refused.csv").read_text().split() == ["name,reason"]


def test_names_in_refused_csv_are_the_bytes_on_disk(tmp_path):
    names = ['a/\udcff,\n".jpg', "a/=1+1.jpg"]
    many(tmp_path / "from", 2)
    for name in names:
        write(tmp_path / "from" / name, b"no image")
    prepare(tmp_path / "from", tmp_path / "to", "--max-bad-fraction=1")
    with open(tmp_path / "to/train/refused.csv", newline="", errors="surrogateescape") as file:
        assert sorted(row[0] for row in csv.reader(file)) == sorted(["name", *names])


def test_gray_and_many_channels_are_stored_as_the_config_will_ask_for_them(tmp_path):
    write(tmp_path / "from" / "1.png", kind="PNG", mode="RGBA", size=(64, 48))
    prepare(tmp_path / "from", tmp_path / "raw", "--channels=4", "--short-side=12")
    record = records(tmp_path / "raw" / "train")[0]
    assert record["shape"] == [12, 16, 4]
    pixels = np.frombuffer(record["image"], np.uint8).reshape(record["shape"])
    original = decode((tmp_path / "from" / "1.png").read_bytes(), 4).astype(float)
    assert np.abs(original.reshape(12, 4, 16, 4, 4).mean((1, 3)) - pixels).mean() < 3  # bicubic beside a plain mean
    assert record["label"] == -1
    told = manifest(tmp_path / "raw" / "train")
    np.testing.assert_allclose(told["mean"], pixels.mean((0, 1)) / 255)
    prepare(tmp_path / "from", tmp_path / "gray", "--channels=1")
    record = records(tmp_path / "gray" / "train")[0]
    assert Image.open(io.BytesIO(record["image"])).mode == "L"
    assert len(manifest(tmp_path / "gray" / "train")["mean"]) == 1


def test_sources_that_are_no_files_are_prepared_too(tmp_path):
    TinyShades(data_dir=str(tmp_path / "tfds"), file_format="array_record").download_and_prepare()
    command.run([str(tmp_path / "shades"), "--name=tiny_shades", "--source=tfds", "--workers=0",
                 f"--data_dir={tmp_path / 'tfds'}"])  # fmt: skip
    source = make_source("tfds", name="tiny_shades", data_dir=str(tmp_path / "tfds"), split="train")
    found = records(tmp_path / "shades" / "train")
    assert [r["label"] for r in found] == [source[i]["label"] for i in range(len(source))]
    command.run([str(tmp_path / "digits"), "--source=digits", "--workers=0", "--channels=1", "--quality=100"])
    test = make_source("digits", split="test")
    found = records(tmp_path / "digits" / "test")
    assert [r["label"] for r in found] == test.labels.tolist()
    assert np.abs(decode(found[7]["image"], 1).astype(int) - test[7]["image"]).max() < 8
    assert manifest(tmp_path / "digits" / "train")["classes"] == list("0123456789")


def test_size_zero_keeps_every_size_and_quality_and_subsampling_are_heard(tmp_path):
    write(tmp_path / "from" / "1.bmp", kind="BMP", size=(300, 200))
    images = []
    for flag in ("--overwrite", "--quality=50", "--subsampling=444"):
        prepare(tmp_path / "from", tmp_path / flag, "--short_side=0", flag)
        images.append(records(tmp_path / flag / "train")[0]["image"])
    plain, coarse, full = images
    assert decode(plain, 3).shape == (200, 300, 3)
    assert len(coarse) < len(plain) < len(full)
    assert [Image.open(io.BytesIO(data)).layer[0][1] for data in (plain, full)] == [2, 1]


def test_an_image_too_long_for_jpeg_becomes_a_png():
    long = np.tile(np.arange(200, dtype=np.uint8)[:, None], (400, 1))[:, :, None]
    stored, pixels = shards.shrink(long, **SETTINGS | {"channels": 1})
    assert Image.open(io.BytesIO(stored["image"])).format == "PNG"
    assert np.array_equal(decode(stored["image"], 1), pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
def test_hostile_bytes_are_bad_images_and_nothing_else():
    rng = np.random.default_rng(0)
    originals = [encoded(kind, size=(12, 9)) for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF")] + [turned()]
    bad = 0
    for _ in range(400):
        data = bytearray(originals[rng.integers(len(originals))])
        for place in rng.integers(0, len(data), rng.integers(1, 8)):
            data[place] = rng.integers(256)
        try:
            stored, pixels = shards.shrink(bytes(data), **SETTINGS)
        except BadImage:
            bad += 1
            continue
        assert pixels.shape == decode(stored["image"], 3).shape
    assert 20 < bad < 380


# --- interrupted, killed, doubled


class Killed(BaseException):
    """What no `except` in the tool answers."""


def killed_at(monkeypatch, place: int, *arguments) -> bool:
    """Whether the `place`-th of all renames was reached, before (even) or after (odd) which the run ended."""
    places, rename = iter(range(10**6)), os.replace

    def replace(*paths):
        if next(places) == place:
            raise Killed
        rename(*paths)
        if next(places) == place:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        try:
            prepare(*arguments)
        except Killed:
            return True
        return False


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Twelve images, one of them bad, in four shards, as an unbroken run makes them."""
    root = tmp_path_factory.mktemp("small")
    many(root / "from", 12, size=(40, 40))
    write(root / "from" / "a" / "004.jpg", b"")
    prepare(root / "from", root / "to", "--shards=4", "--short-side=32")
    return root


def test_wherever_a_run_ends_the_same_command_finishes_it_with_the_same_bytes(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    place = 0
    while killed_at(monkeypatch, place, *arguments):
        done = {path: path.stat().st_ino for path in tmp_path.rglob("part-*")}
        write(tmp_path / "to" / "train" / ".part-00003-of-00004.array_record.1.partial", b"half")
        write(tmp_path / "to" / "train" / ".manifest.json.1.partial", b"half")
        prepare(*arguments)
        assert content(tmp_path / "to") == content(small / "to")
        # a shard without its sidecar is made again: it is the newest
        assert sum(path.stat().st_ino != inode for path, inode in done.items()) <= 1
        shutil.rmtree(tmp_path / "to")
        place += 1
    assert place == 2 * (1 + 4 * 2 + 2)  # the plan, shards and their sidecars, the list of the refused and the manifest


def test_many_interruptions_of_one_run_lose_nothing(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    runs = 0
    while killed_at(monkeypatch, 5, *arguments):
        runs += 1
    assert 2 <= runs <= 6
    assert content(tmp_path / "to") == content(small / "to")


def test_a_shard_whose_size_is_not_its_sidecars_is_made_again(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    assert killed_at(monkeypatch, 10, *arguments)
    first = tmp_path / "to" / "train" / "part-00000-of-00004.array_record"
    first.write_bytes(first.read_bytes()[:-1])
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")


def test_the_number_of_shards_is_decided_once(tmp_path, monkeypatch):
    many(tmp_path / "from", 8)
    with monkeypatch.context() as patch:
        patch.setattr(prepared, "SHARD_BYTES", 1500)
        assert killed_at(patch, 3, tmp_path / "from", tmp_path / "to")
    prepare(tmp_path / "from", tmp_path / "to")
    of = [shard["file"][-18:-13] for shard in manifest(tmp_path / "to" / "train")["shards"]]
    assert len(of) == int(of[0]) > 1


@pytest.mark.parametrize(
    ("count", "size", "wanted"), [(1, 10, 1), (999, 10, 1), (2048, 10, 4), (10**5, 10, 16), (10**6, 2**16, 245)]
)
def test_shards_are_of_256_mib_and_of_small_data_enough_for_several_workers(count, size, wanted, monkeypatch):
    class Source:
        def __len__(self):
            return count

        def __getitem__(self, i):
            return {"image": b""}

    monkeypatch.setattr(prepared, "shrink", lambda image, **_: ({"image": bytes(size)}, None))
    assert prepared._suitable_shards(Source(), {}) == wanted
    tasks = shards.make_tasks("x", count, wanted)
    assert [task.start for task in tasks] == [0, *(task.stop for task in tasks[:-1])]
    assert tasks[-1].stop == count


def start(source, dest, *flags) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "simmim_jax.tools.prepare", source, dest, "--workers=2", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip


def wait_for_shard(process, dest, more_than: int = 0) -> list[psutil.Process]:
    """Waits until more shards are done; the process's children."""
    until = time.monotonic() + 60
    while len(sidecars(dest)) <= more_than:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)
    return psutil.Process(process.pid).children(recursive=True)


def ended(process, children) -> tuple[int, str]:
    """The exit code and the last line of stderr of a process that leaves nobody behind."""
    began = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive
    assert time.monotonic() - began < 10
    return process.returncode, stderr.strip().splitlines()[-1] if stderr.strip() else ""


def partials(dest) -> list:
    return list(Path(dest).rglob("*.partial"))


@pytest.mark.slow
def test_signals_deaths_and_a_second_prepare_leave_a_run_that_the_same_command_finishes(tmp_path):
    write(tmp_path / "large.jpg", size=(900, 900))
    for i in range(160):
        (tmp_path / "from" / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        os.link(tmp_path / "large.jpg", tmp_path / "from" / "ab"[i % 2] / f"{i:03d}.jpg")
    source, dest, flags = tmp_path / "from", tmp_path / "to", ("--short-side=32", "--shards=32")

    process = start(source, dest, *flags)
    children = wait_for_shard(process, dest)
    with pytest.raises(BusyError, match=f"DEST is in use - {dest} by pid {process.pid}"):
        prepare(source, dest, *flags)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    code, line = ended(process, children)
    assert code == 130
    assert line == "stopped by SIGINT: shards that are done stay; run the same command again to go on"
    assert not partials(dest)

    process = start(source, dest, *flags)
    children = wait_for_shard(process, dest, more_than=len(sidecars(dest)))
    process.kill()
    assert ended(process, children)[0] == -signal.SIGKILL
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
    assert sum(path.stat().st_ino != inode for path, inode in kept.items()) <= 2  # one for each worker
    prepare(source, tmp_path / "unbroken", *flags)
    assert content(dest) == content(tmp_path / "unbroken")


def sidecars(dest) -> list:
    return list(Path(dest).glob("train/.part-*.json"))


def kill_a_worker(dest, more_than: int, killed: list) -> None:
    """Kills one of this process's workers when more shards are done."""
    until = time.monotonic() + 60
    while len(sidecars(dest)) <= more_than and time.monotonic() < until:
        time.sleep(0.002)
    killed.append(multiprocessing.active_children()[0].pid)
    os.kill(killed[0], signal.SIGKILL)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_signal_ends_a_run_without_workers_too_and_says_which_command_goes_on(
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
    assert str(raised.value).endswith(f"the same command{', without --overwrite,' * bool(flags)} again to go on")
    assert signal.getsignal(number) is before
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")


@pytest.mark.slow
def test_a_run_killed_at_any_moment_is_finished_with_the_same_bytes(tmp_path):
    many(tmp_path / "from", 200, size=(300, 300))
    write(tmp_path / "from" / "a" / "100.jpg", b"")
    source, dest, flags = tmp_path / "from", tmp_path / "to", ("--short-side=32", "--shards=20")
    prepare(source, tmp_path / "unbroken", *flags)
    kills = 0
    for tenths in range(2, 40):
        process = start(source, dest, *flags)
        time.sleep(tenths / 10)
        killed = process.poll() is None
        children = psutil.Process(process.pid).children(recursive=True) if killed else []
        process.kill()
        process.communicate()
        kills += killed
        if tenths % 4 == 0:
            _, alive = psutil.wait_procs(children, timeout=5)
            assert not alive
        if tenths % 9 == 0:
            shutil.rmtree(dest, ignore_errors=True)
    assert kills >= 5
    process = start(source, dest, *flags)
    assert process.wait(60) == 0
    assert content(dest) == content(tmp_path / "unbroken")


def test_the_number_of_workers_changes_no_byte(small, tmp_path):
    prepare(small / "from", tmp_path / "to", "--shards=4", "--short-side=32", "--workers=3")
    assert content(tmp_path / "to") == content(small / "to")


# --- not what was begun, not ours


def test_a_finished_folder_is_left_alone(small, capsys):
    before = {path: path.stat().st_mtime_ns for path in (small / "to").rglob("*/*")}
    prepare(small / "from", small / "to", "--short-side=32")
    assert {path: path.stat().st_mtime_ns for path in (small / "to").rglob("*/*")} == before
    out = capsys.readouterr().out
    assert "is finished: 11 images in 4 shards" in out
    assert f"--config.data.path={small / 'to'} " in out


@pytest.mark.parametrize(
    ("flags", "difference"),
    [
        (["--short-side=31", "--quality=9"], "short_side was 32 and is 31; quality was 92 and is 9"),
        (["--short-side=32", "--shards=5"], "shards was 4 and is 5"),
    ],
)
def test_other_settings_are_refused_whether_it_was_finished_or_not(flags, difference, small, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=f"finished otherwise: {difference}.*--overwrite"):
        prepare(small / "from", small / "to", *flags)
    assert killed_at(monkeypatch, 5, small / "from", tmp_path / "to", "--short-side=32", "--shards=4")
    before = content(tmp_path)
    with pytest.raises(ConfigError, match=f"begun otherwise: {difference}"):
        prepare(small / "from", tmp_path / "to", *flags)
    assert content(tmp_path) == before


def test_another_source_is_refused_and_the_same_elsewhere_is_not(small, tmp_path):
    shutil.copytree(small / "to", tmp_path / "to")
    shutil.copytree(small / "from", tmp_path / "moved")
    prepare(tmp_path / "moved", tmp_path / "to", "--short-side=32")
    write(tmp_path / "moved" / "a" / "more.jpg")
    with pytest.raises(ConfigError, match=r"SOURCE was .*12 images\) and is .*moved.*13 images\) \(other count"):
        prepare(tmp_path / "moved", tmp_path / "to", "--short-side=32")


def test_overwrite_starts_anew_and_replaces_only_what_prepare_wrote(small, tmp_path):
    shutil.copytree(small / "to", tmp_path / "to")
    write(tmp_path / "to" / "train" / "mine.txt", b"")
    with pytest.raises(ConfigError, match=r"holds 'mine.txt', which prepare has not written"):
        prepare(small / "from", tmp_path / "to", "--overwrite")
    assert (tmp_path / "to" / "train" / "manifest.json").exists()
    (tmp_path / "to" / "train" / "mine.txt").unlink()
    write(tmp_path / "to" / "notes.txt", b"")
    prepare(small / "from", tmp_path / "to", "--overwrite", "--short-side=16", "--shards=2")
    assert len(list((tmp_path / "to" / "train").iterdir())) == 4
    assert min(Image.open(io.BytesIO(records(tmp_path / "to" / "train")[0]["image"])).size) == 16
    assert (tmp_path / "to" / "notes.txt").exists()


@pytest.mark.parametrize("name", ["notes.txt", "train/1.jpg", "other/1.jpg", "train/part-00000-of-00001.array_record"])
@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_folder_of_other_things_is_refused(name, flags, small, tmp_path):
    write(tmp_path / "to" / name, b"")
    with pytest.raises(ConfigError, match="which prepare has not written"):
        prepare(small / "from", tmp_path / "to", *flags)
    assert [path for path in (tmp_path / "to").rglob("*") if path.is_file()] == [tmp_path / "to" / name]


def test_source_and_dest_may_not_lie_in_each_other(small, tmp_path):
    (tmp_path / "link").symlink_to(small)
    for dest in (small / "from", small / "from" / "a" / "to", small, tmp_path / "link" / "from" / "x"):
        with pytest.raises(ConfigError, match="the same, or one lies in the other"):
            prepare(small / "from", dest)
    with pytest.raises(ConfigError, match="folder of one split"):
        prepare(small / "from", small / "to" / "train")


# --- what cannot be read or written


def test_too_many_bad_files_end_it_with_three_named_and_what_is_done_stays(tmp_path):
    many(tmp_path / "from", 12)
    for name in ("a/006.jpg", "a/008.jpg", "b/007.jpg", "b/009.jpg"):
        write(tmp_path / "from" / name, b"no")
    arguments = tmp_path / "from", tmp_path / "to", "--shards=6"
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"2 images .* at most 1, .*'a/006.jpg' \(is none of.*'a/008.jpg'"
        ) as raised:
            prepare(*arguments)
    assert raised.value.exit_code == 3
    with pytest.raises(DataError, match=r"4 images .* at most 3, .*'a/008.jpg'.*'b/007.jpg'.*'b/009.jpg'"):
        prepare(*arguments, "--max-bad-fraction=0.25")
    assert len(list((tmp_path / "to" / "train").glob("part-*"))) == 5
    assert not partials(tmp_path)
    prepare(*arguments, "--max-bad-fraction=0.3")
    assert manifest(tmp_path / "to" / "train")["refused"] == 4


def test_no_good_image_at_all_is_refused_though_one_may_be_bad(tmp_path):
    write(tmp_path / "from" / "1.jpg", b"")
    with pytest.raises(DataError, match=r"no image can be used, the first being '1.jpg' \(is empty\)"):
        prepare(tmp_path / "from", tmp_path / "to")


def test_a_full_disk_is_told_in_one_line_and_the_same_command_goes_on(small, tmp_path, monkeypatch):
    arguments = (small / "from", tmp_path / "to", "--shards=4", "--short-side=32")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    assert killed_at(monkeypatch, 5, *arguments)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, before[1]))  # the nearest to a full disk that needs no root
    try:
        with pytest.raises(DataError, match=r"cannot write: .*File too large.*MiB free\).*part-00001.*make room"):
            prepare(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not partials(tmp_path)
    prepare(*arguments)
    assert content(tmp_path / "to") == content(small / "to")


def test_a_dest_that_cannot_be_written_is_told_in_one_line(small, tmp_path):
    write(tmp_path / "file", b"")
    with pytest.raises(DataError, match=r"cannot write: Not a directory.*file/to"):
        prepare(small / "from", tmp_path / "file" / "to")
    with pytest.raises(DataError, match=r"cannot write: .*/proc/to"):
        prepare(small / "from", "/proc/to")


def test_folders_may_be_named_in_bytes_that_are_no_utf8(tmp_path):
    dest = f"{tmp_path}/\udcff \u4e2d"
    write(tmp_path / "from \udcfe" / "1.jpg")
    prepare(tmp_path / "from \udcfe", dest)
    assert manifest(os.path.join(dest, "train"))["count"] == 1
    command.run(["--verify", dest])


# --- what a user sees


def test_the_report_says_what_came_of_it_and_how_to_train_on_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "LINE_EVERY", 0.0)
    monkeypatch.setattr(shards, "TOLD_EVERY", 0.0)
    many(tmp_path / "from", 4, size=(512, 300))
    for i in range(5):
        write(tmp_path / "from" / f"a/bad\x1b {i}.jpg", b"")
    prepare(tmp_path / "from", tmp_path / "my shards", "--max-bad-fraction=0.9")
    out, err = capsys.readouterr()
    assert "train: 4 images in 1 shard, 2 classes" in out
    assert "5 because: 'is empty': 'a/bad\\x1b 0.jpg', 'a/bad\\x1b 1.jpg', 'a/bad\\x1b 2.jpg', ..." in out
    assert f"--config.data.path='{tmp_path}/my shards' " in out
    told = manifest(tmp_path / "my shards" / "train")
    assert f"--config.mean={','.join(f'{value:.4f}' for value in told['mean'])} " in out
    assert "train: 9 of 9 images, " in err
    assert "5 refused" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["a"], "'.*a' where SOURCE and DEST should be|'a' where SOURCE and DEST"),
        (["a", "b", "--shrot-side=3"], "unknown argument '--shrot-side=3'.*did you mean --short-side"),
        (["a", "b", "--short-side=x"], "--short-side: invalid int value"),
        (["a", "b", "--short-side=-1"], "short-side is -1 .*at least 0"),
        (["a", "b", "--quality=101"], "quality is 101.*1 to 100"),
        (["a", "b", "--subsampling=422"], "unknown subsampling '422'.*420, 444"),
        (["a", "b", "--max-bad-fraction=2"], "max-bad-fraction is 2.0"),
        (["a", "b", "--shards=0"], "shards is 0"),
        (["a", "b", "--split=../x"], "a split '../x'"),
        (["a", "b", "--source=foldr"], "unknown source 'foldr'.*did you mean folder"),
        (["/nowhere/at all", "b"], "/nowhere/at all does not exist"),
    ],
)
def test_mistakes_on_the_command_line_are_one_line(flags, message):
    with pytest.raises((ConfigError, DataError), match=message) as raised:
        command.run(flags)
    assert "\n" not in str(raised.value)


def test_help_and_mistakes_are_told_before_anything_heavy_comes_in():
    code = "import sys; from simmim_jax.tools.prepare import __main__ as prepare\ntry: prepare.run(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'jax', 'grain', 'numpy', 'PIL'} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip().endswith("[]")
    assert "--max-bad-fraction" in out


def test_splits_are_those_of_the_source_and_those_asked_for(tmp_path):
    for name in ("train/a/1.jpg", "val/a/2.jpg", "valid/a/3.jpg", "extra/a/4.jpg"):
        write(tmp_path / "from" / name)
    prepare(tmp_path / "from", tmp_path / "to")
    assert sorted(os.listdir(tmp_path / "to")) == [".prepare.lock", "train", "val", "valid"]
    assert [record["name"] for record in records(tmp_path / "to" / "valid")] == ["a/3.jpg"]
    prepare(tmp_path / "from", tmp_path / "to", "--split=extra,val")
    assert [record["name"] for record in records(tmp_path / "to" / "extra")] == ["a/4.jpg"]


@pytest.mark.parametrize(
    ("kind", "names", "wanted"),
    [
        ("tar", ["imagenet-train-0001.tar", "imagenet-validation-0001.tar"], ["validation"]),
        ("list", ["train.txt", "val_map.txt", "testing.txt", "valid.py"], ["val"]),
        ("parquet", ["train-00000-of-00002.parquet", "test-00000-of-00001.PARQUET"], ["test"]),
        ("tar", ["all.tar"], []),
        ("folder", ["train/1.jpg", "valid/1.jpg", "val.txt"], ["valid"]),
    ],
)
def test_evaluation_splits_go_by_the_names_that_the_source_itself_has(kind, names, wanted, tmp_path):
    for name in names:
        write(tmp_path / name, b"")
    assert command.evaluation_splits(str(tmp_path), kind, make_source) == wanted
    if kind != "folder" and wanted:
        assert command.evaluation_splits(str(tmp_path / "*"), kind, make_source) == wanted
        beside = tmp_path / names[0].replace("train", "{split}")
        own = names[1] == names[0].replace("train", wanted[0])
        assert command.evaluation_splits(str(beside), kind, make_source) == (wanted if own else [])


def test_what_is_prepared_is_read_back_as_it_was_and_can_be_prepared_again(odd, tmp_path):
    prepare(odd / "to", tmp_path / "again", "--short-side=0")
    for split in ("train", "validation"):
        ours = [make_source("auto", path=str(dest), split=split) for dest in (odd / "to", tmp_path / "again")]
        found = records(odd / "to" / split)
        for source in ours:
            assert [source[i] for i in range(len(source))] == found
            assert source.classes == ("a", "b", "c", "d")


def test_labels_without_names_become_classes_that_are_numbers(tmp_path):
    (tmp_path / "from").mkdir()
    writer = ArrayRecordWriter(str(tmp_path / "from" / "x.array_record"), "group_size:1")
    for label in (0, 2):
        example = tf_example_pb2.Example()
        example.features.feature["image/encoded"].bytes_list.value.append(encoded())
        example.features.feature["label"].int64_list.value.append(label)
        writer.write(example.SerializeToString())
    writer.close()
    for _ in range(2):  # made, and found finished
        prepare(tmp_path / "from", tmp_path / "to")
        source = make_source("auto", path=str(tmp_path / "to"), heldout_fraction=0.0)
        assert source.classes == ("0", "1", "2")
        assert [source[i]["label"] for i in range(2)] == [0, 2]


def test_labels_mean_the_same_classes_in_every_split():
    def numbering(**classes):
        return command.one_numbering({split: SimpleNamespace(classes=names) for split, names in classes.items()})

    assert numbering(train=("a", "b"), val=()) == (["a", "b"], {"train": [0, 1], "val": []})
    digits = tuple(map(str, range(12)))
    assert numbering(train=digits, val=digits[:11])[1]["val"] == list(range(11))
    assert numbering(train=("a", "c"), val=("b", "c")) == (["a", "b", "c"], {"train": [0, 2], "val": [1, 2]})


def test_a_split_prepared_later_may_not_number_its_classes_otherwise(tmp_path):
    for name in ("train/b/1.jpg", "train/c/1.jpg"):
        write(tmp_path / "from" / name)
    prepare(tmp_path / "from", tmp_path / "to")
    for name in ("val/b/1.jpg", "val/a/1.jpg"):
        write(tmp_path / "from" / name)
    with pytest.raises(ConfigError, match=r"a label would mean another class than in .*train"):
        prepare(tmp_path / "from", tmp_path / "to", "--split=val")


# --- verify


def test_verify_says_of_each_split_whether_it_is_whole(small, odd, capsys):
    command.run(["--verify", str(odd / "to")])
    assert "train: whole (12 images in 1 shard)" in capsys.readouterr().out
    command.run(["--verify", str(small / "to" / "train")])
    assert "train: whole (11 images in 4 shards)" in capsys.readouterr().out
    with pytest.raises(DataError, match="nothing prepared is here"):
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
    told = manifest(train)
    told["shards"][3]["count"] += 1
    (train / "manifest.json").write_text(json.dumps(told))
    with pytest.raises(DataError, match="6 damaged or missing") as raised:
        command.run(["--verify", str(tmp_path / "to")])
    assert raised.value.exit_code == 3
    lines = [line.removeprefix(f"{train}: ") for line in capsys.readouterr().out.splitlines()]
    for start_of, line in zip(
        (
            "manifest.json: 11 images, where its shards have 12", "part-00000-of-00004.array_record: its bytes",
            "part-00001-of-00004.array_record: No such file", "part-00002-of-00004.array_record: ",
            "part-00003-of-00004.array_record: 3 records, where 4", "part-00007-of-00009.array_record: not in",
        ),
        lines, strict=True,
    ):  # fmt: skip
        assert line.startswith(start_of)
    with pytest.raises(DataError, match="finished once, and damaged since"):
        prepare(small / "from", tmp_path / "to", "--short-side=32")
    assert killed_at(monkeypatch, 5, small / "from", tmp_path / "half")
    with pytest.raises(DataError, match="1 damaged"):
        command.run(["--verify", str(tmp_path / "half")])
    assert "unfinished" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"format": "x"}, {"shards": [{"file": "../x"}]}, {"count": "1"}, {"source": {}}])
def test_a_manifest_that_is_not_ours_is_told_in_one_line(change, small, tmp_path):
    train = tmp_path / "to" / "train"
    shutil.copytree(small / "to", tmp_path / "to")
    (train / "manifest.json").write_text(json.dumps(manifest(train) | change))
    for arguments in (["--verify", str(tmp_path / "to")], [str(small / "from"), str(tmp_path / "to")]):
        with pytest.raises(DataError, match=r"not what prepare has written.*manifest.json"):
            command.run(arguments)
