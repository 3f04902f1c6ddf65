"""Tar shards: samples, links, joined and damaged archives, and the cached index."""

import gzip
import os
import pickle
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from source_files import add_member, everything, labels, names, png, samples, shades, write_tar

from simmim_jax.data import make_source
from simmim_jax.data.sources import tar
from simmim_jax.errors import DataError, UserError, warn_once


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """A cache folder for the test."""
    path = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(path))
    return path


# --- samples


def test_sample_is_the_members_with_the_same_name_up_to_the_first_dot(tmp_path):
    members = {
        "x/1.json": b'{"label": 4, "caption": "x"}', "x/1.png": png(1), "x/1.second.jpg": b"no", "x/1.txt": b"words",
        "x.d/2.JPG": png(2), "x.d/2.json": b'{"label": 0}', "._3.png": b"of a Mac", ".git/4.png": b"hidden",
        "./5.cls": b" 2\n", "./5.json": b'{"label": 1}', "./5.png": png(5), "notes.txt": b"",
        "long" * 60 + ".png": png(7),
        "long" * 60 + ".cls": b"3", "é 猫\n.png": png(8), "é 猫\n.cls": b"0",
    }  # fmt: skip
    expected = ["x/1.png", "x.d/2.JPG", "./5.png", "long" * 60 + ".png", "é 猫\n.png"]
    for number, form in enumerate((tarfile.PAX_FORMAT, tarfile.GNU_FORMAT)):
        source = everything("tar", write_tar(tmp_path / f"{number}.tar", members, format=form))
        assert names(source) == [f"{number}.tar/{name}" for name in expected]
        assert (labels(source), shades(source)) == ([4, 0, 2, 3, 0], [1, 2, 5, 7, 8])
        assert source.classes == ("0", "1", "2", "3", "4")


def test_repeated_key_is_another_sample(tmp_path):
    again = {"0001.cls": b"2", "0001.png": png(8), "0002.cls": b"0", "0002.png": png(9)}
    twice = [(f"0003.{kind}", data) for n in (3, 4) for kind, data in (("png", png(n)), ("cls", b"%d" % (n - 3)))]
    source = everything("tar", write_tar(tmp_path / "a.tar", [*samples(1, 2).items(), *again.items(), *twice]))
    assert (shades(source), labels(source)) == ([1, 2, 8, 9, 3, 4], [1, 2, 2, 0, 0, 1])


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ([f"v1.0_{n:03}.png" for n in range(8)], {f"v1.0_{n:03}.png": -1 for n in range(8)}),
        (["v1.0_1.cls", "v1.0_1.png", "v1.0_2.cls", "v1.0_2.png"], {"v1.0_1.png": 0, "v1.0_2.png": 2}),
        (["0.gif", "0.png"], {"0.gif": -1, "0.png": -1}),
        (["0.depth.png", "0.png", "1.depth.png", "1.png"], {"0.png": -1, "1.png": -1}),
        (["0.depth.png", "0.png", "0.cls", "0.gif"], {"0.png": 2}),
        (["0.left.png", "0.right.png", "0.cls", "1.left.png", "1.cls"], {"0.left.png": 2, "1.left.png": 4}),
    ],
)
def test_one_image_of_a_sample_is_used_unless_names_have_dots(members, expected, tmp_path, caplog):
    data = [(name, b"%d" % n if name.endswith("cls") else png(n)) for n, name in enumerate(members)]
    source = everything("tar", write_tar(tmp_path / "a.tar", data))
    assert dict(zip(names(source), labels(source), strict=True)) == {f"a.tar/{k}": v for k, v in expected.items()}
    assert shades(source) == [members.index(name) for name in expected]
    skipped = [name for name in members if name not in expected and not name.endswith("cls")]
    assert len(caplog.records) == bool(skipped)
    assert not skipped or f"{len(skipped)} further images of a sample (a.tar/{skipped[0]}" in caplog.text


def test_hard_links_are_images_and_other_links_and_devices_are_not(tmp_path, caplog):
    with tarfile.open(write_tar(tmp_path / "a.tar", samples(1, 2)), "a") as archive:
        for name, target in {"3.cls": "0002.cls", "3.png": "0001.png", "4.cls": "3.cls", "4.png": "3.png"}.items():
            add_member(archive, name, type=tarfile.LNKTYPE, linkname=target)
    source = everything("tar", tmp_path / "a.tar")
    assert names(source) == [f"a.tar/{name}.png" for name in ("0001", "0002", 3, 4)]
    assert (shades(source), labels(source)) == ([1, 2, 1, 1], [1, 2, 2, 2])
    assert not caplog.records
    with tarfile.open(tmp_path / "a.tar", "a") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            add_member(archive, f"x{kind.decode()}.png", type=kind, linkname="/etc/passwd")
    assert len(everything("tar", tmp_path / "a.tar")) == 4


def test_skipped_members_are_counted_in_one_warning_each_time(tmp_path, caplog):
    for shard in "ab":
        with tarfile.open(write_tar(tmp_path / f"{shard}.tar", {"9.cls": b"1"} | samples(1)), "a") as archive:
            for number in range(2):
                add_member(archive, f"{number}\n.png", type=tarfile.SYMTYPE, linkname="0001.png")
    for _ in range(2):  # the second time from the cache
        caplog.clear()
        warn_once.cache_clear()
        assert shades(everything("tar", tmp_path)) == [1, 1]
        assert len(caplog.records) == 1
        for says in ("4 images that are links", "('a.tar/0\\n.png'", "2 labels", "(a.tar/9.cls"):
            assert says in caplog.text


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"1.png": b"x", "1.cls": b"0 1"}, r"label '0 1'.*'1\.cls'"),
        ({"1.png": b"x", "1.cls": b"0.5"}, r"label '0\.5'"),
        ({"1.png": b"x", "1.json": b'{"label": 0.5}'}, r"label 0\.5"),
        ({"1.png": b"x", "1.json": b'{"label": [0, 1]}'}, r"label \[0, 1\]"),
        ({"1.png": b"x", "1.cls": b" \n", "2.png": b"x", "2.cls": b"cat"}, r"1 of 2 images have a label"),
        ({"1.png": b"x", "1.cls": b"-1"}, r"label '-1'"),
        ({"1.png": b"x", "1.cls": b"9" * 30}, r"label '9+'"),
        ({"1.png": b"x", "1.json": b'{"label": 99999999}'}, r"label 99999999"),
        ({"1.png": b"x", "1.json": b"{"}, r"JSON.*'1\.json'"),
        ({"1.png": b"x", "1.json": b"[" * 100_000}, r"JSON"),
        ({"1.png": b"x", "1.cls": b"0", "2.png": b"y"}, r"1 of 2 images have a label, and a\.tar/2\.png has none"),
        ({"1.txt": b"x"}, r"a\.tar has 0 images"),
    ],
)
def test_invalid_label_is_reported_with_the_member(members, says, tmp_path):
    with pytest.raises(DataError, match=says):
        make_source("tar", path=write_tar(tmp_path / "a.tar", members))


# --- damaged and changed archives


def test_joined_tars_are_read_to_the_end_of_the_last(tmp_path, caplog):
    parts = [Path(write_tar(tmp_path / f"{n}.tar", samples(n, n + 1))).read_bytes() for n in (1, 3, 5)]
    (tmp_path / "all").mkdir()
    file = tmp_path / "all" / "c.tar"
    file.write_bytes(parts[0] + parts[1] + bytes(2**20) + parts[2])
    source = everything("tar", file)
    assert (shades(source), labels(source)) == ([1, 2, 3, 4, 5, 6], [1, 2, 0, 1, 2, 0])
    assert not caplog.records
    file.write_bytes(parts[0] + b"no header" * 100)
    with pytest.raises(DataError, match=rf"c\.tar .* at byte {len(parts[0])} "):
        make_source("tar", path=str(file))


def test_truncated_shard_is_reported_with_the_offset_for_any_cut(tmp_path, caplog):
    whole = Path(write_tar(tmp_path / "whole.tar", samples(1, 2, 3))).read_bytes()
    cut_file = tmp_path / "cut.tar"
    source = everything("tar", tmp_path / "whole.tar")
    last = int(source.offsets.array[-1] + source.sizes.array[-1])
    for cut in (0, 1, 100, 511, 513, 600, 1500, 2000, 4000, last - 1):
        cut_file.write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"cut\.tar.*(at byte|after byte) \d|has 0 images"):
            make_source("tar", path=str(cut_file))
    assert not caplog.records
    cut_file.write_bytes(whole[: -(-last // 512) * 512])  # only the end marker is missing
    assert len(everything("tar", cut_file)) == 3
    assert "no end marker" in caplog.text
    cut_file.write_bytes(whole[:1024] + b"x" * 512 + whole[1024:])
    with pytest.raises(DataError, match="damaged"):
        make_source("tar", path=str(cut_file))
    cut_file.write_bytes(gzip.compress(whole))
    with pytest.raises(DataError, match="is compressed"):
        make_source("tar", path=str(cut_file))


def test_hostile_tar_is_an_error_and_never_hangs(tmp_path):
    whole = Path(write_tar(tmp_path / "whole.tar", samples(*range(4)), format=tarfile.PAX_FORMAT)).read_bytes()
    rng, refused, file = random.Random(0), 0, tmp_path / "damaged.tar"
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 8)):
            start = rng.randrange(len(damaged) // 512) * 512 + rng.choice([0, 100, 124, 156, 257, rng.randrange(512)])
            damaged[start : start + 12] = rng.randbytes(12)
        file.write_bytes(damaged)
        try:
            source = everything("tar", file)
            assert all(source[i]["name"] == source.name(i) for i in range(len(source)))
        except UserError:
            refused += 1
    assert refused > 50
    # a negative size leads back to its own header
    loop = bytearray(tarfile.TarInfo("1.png").tobuf(tarfile.GNU_FORMAT))
    loop[124:136] = b"\xff" * 10 + b"\xfe\x00"
    loop[148:156] = b" " * 8
    loop[148:156] = b"%06o\0 " % sum(loop)
    file.write_bytes(bytes(loop) + bytes(1024))
    with pytest.raises(DataError, match="damaged"):
        make_source("tar", path=str(file))


def test_shard_that_changes_during_a_run_gives_no_other_images(tmp_path):
    source = everything("tar", write_tar(tmp_path / "a.tar", samples(1, 2, 3)))
    source[0]
    os.truncate(tmp_path / "a.tar", 2000)
    for each in (source, pickle.loads(pickle.dumps(source))):
        with pytest.raises(DataError, match="has changed"):
            each[2]


# --- the cached index


def test_index_is_cached_and_replaced_if_it_is_damaged(tmp_path, cache, monkeypatch):
    file, calls, read_headers = write_tar(tmp_path / "a.tar", samples(1, 2, 3)), [], tar._read_headers
    monkeypatch.setattr(tar, "_read_headers", lambda *args: calls.append(args) or read_headers(*args))
    records = [everything("tar", file)[i] for i in range(3)]
    assert len(calls) == 1
    (cached,) = (cache / "simmim_jax" / "tar").iterdir()
    with np.load(cached) as arrays:
        outside = {name: arrays[name] for name in arrays} | {"offsets": np.array([0, 10**9, 7])}
    for damage in (b"", b"no npz", cached.read_bytes()[:100], pickle.dumps({"a": 1}), None):
        np.savez(cached, **outside) if damage is None else cached.write_bytes(damage)
        source = everything("tar", file)
        assert [source[i] for i in range(3)] == records
    assert len(calls) == 6
    write_tar(tmp_path / "a.tar", samples(4, 5, 6, 7))
    assert shades(everything("tar", file)) == [4, 5, 6, 7]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a.tar"))  # no folder can be made in it
    assert shades(everything("tar", file)) == [4, 5, 6, 7]


@pytest.mark.parametrize("detected_by", ["file system", "bytes"])
def test_shard_rewritten_with_the_same_size_and_time_is_indexed_again(detected_by, tmp_path, monkeypatch):
    if detected_by == "bytes":
        monkeypatch.setattr(tar, "_identity", lambda status: (status.st_size, status.st_mtime_ns))
    file = tmp_path / "a.tar"
    write_tar(file, samples(1, 2, 3))
    before = os.stat(file)
    assert names(everything("tar", file))[0] == "a.tar/0001.png"
    file.write_bytes(Path(write_tar(tmp_path / "other", samples(5, 6, 7))).read_bytes())
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (os.stat(file).st_size, os.stat(file).st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    source = everything("tar", file)
    assert names(source) == [f"a.tar/000{n}.png" for n in (5, 6, 7)]
    assert labels(source) == [2, 0, 1]


def test_fingerprint_depends_on_pixels_and_not_on_times_with_three_reads_a_shard(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    members = {f"{n}.png": rng.bytes(20_000) for n in range(5)}
    for shard in "ab":
        write_tar(tmp_path / f"{shard}.tar", members)
    first = everything("tar", tmp_path)
    before, reads, pread = first.fingerprint(), [], os.pread
    monkeypatch.setattr(os, "pread", lambda *args: reads.append(args) or pread(*args))
    assert everything("tar", tmp_path).fingerprint() == before
    assert len(reads) <= 2 * 3
    write_tar(tmp_path / "b.tar", members, mtime=7)
    assert everything("tar", tmp_path).fingerprint() == before
    with open(tmp_path / "b.tar", "r+b") as file:
        for offset in first.offsets.array[5:]:
            file.seek(int(offset))
            file.write(rng.bytes(20_000))
    after = everything("tar", tmp_path).fingerprint()
    assert after["index_sha256"] == before["index_sha256"]
    assert after != before
