"""Millions of records: a start in seconds, the memory of ten thousand, and small pickles."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simmim_jax.data.prepared import HEAD, pack_record

FEW, MANY = 10_000, 10_000_000
PRIVATE = 24  # MiB that many records may need: a manifest took 3, a folder 13; a worker may need a quarter
PICKLE = 10_000  # bytes

# Opens the source, reads at both ends and in the middle, and does the same in another process. The few records are read
# first, so that imports are not part of the measurement.
PROGRAM = """
import json, pickle, subprocess, sys, time
from simmim_jax.data import make_source

def private():  # MiB of anonymous memory; mapped files belong to the page cache
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024

def measure(open_few, open_many):
    few = open_few()
    few[0]
    before, start = private(), time.monotonic()
    source = open_many()
    found = {"seconds": time.monotonic() - start, "count": len(source)}
    places = [0, 1, 63, 64, len(source) // 2, len(source) - 65, len(source) - 1]
    found["read"] = [[i, source.name(i), source[i]["label"], len(source[i]["image"])] for i in places]
    return few, source, found | {"private": private() - before}

if __name__ == "__main__":
    if sys.argv[1] == "worker":
        load = lambda: pickle.load(sys.stdin.buffer)
        print(json.dumps(measure(load, load)[2]))
    else:
        options = json.loads(sys.argv[1])
        few, source, found = measure(*(lambda path=path: make_source(**options, path=path) for path in sys.argv[2:]))
        pickles = pickle.dumps(few), pickle.dumps(source)
        command = [sys.executable, __file__, "worker"]
        worker = subprocess.run(command, input=b"".join(pickles), stdout=subprocess.PIPE, check=True)
        print(json.dumps(found | {"pickle": len(pickles[1]), "worker": json.loads(worker.stdout)}))
"""


def measure(tmp_path: Path, few: Path, many: Path, private: int = PRIVATE, **options) -> tuple[int, list]:
    """Run PROGRAM, and check what it measures. Returns (count, [[index, name, label, bytes], ...])."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), json.dumps(options), str(few), str(many)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["worker"]["count"] == found["count"]
    assert found["worker"]["read"] == found["read"]
    assert found["private"] < private
    assert found["worker"]["private"] < PRIVATE / 4
    assert found["pickle"] < PICKLE
    assert found["seconds"] < 60  # 3 on two idle cores; far more if records were Python objects
    return found["count"], found["read"]


def write_list(file: Path, count: int) -> None:
    """Write lines `p/00000000.png 000` with increasing number and label."""
    template = np.frombuffer(b"p/00000000.png 000\n", np.uint8)
    with open(file, "wb") as output:
        for start in range(0, count, 1_000_000):
            i = np.arange(start, min(start + 1_000_000, count))
            lines = np.tile(template, (len(i), 1))
            for digit in range(8):
                lines[:, 9 - digit] = ord("0") + i // 10**digit % 10
            for digit in range(3):
                lines[:, 17 - digit] = ord("0") + i % 1000 // 10**digit % 10
            output.write(lines)


@pytest.mark.slow
def test_list_of_ten_million_lines_needs_the_memory_of_ten_thousand(tmp_path):
    (tmp_path / "p").mkdir()
    files = [tmp_path / f"{count}.txt" for count in (FEW, MANY)]
    for count, file in zip((FEW, MANY), files, strict=True):
        write_list(file, count)
    for i in (0, 1, 63, 64, MANY // 2, MANY - 65, MANY - 1):
        Image.new("RGB", (4, 4)).save(tmp_path / "p" / f"{i:08}.png")
    # the allocator may keep blocks of lines, 2 to 33 MiB; ten million Python strings would need 600
    count, read = measure(tmp_path, *files, private=64, source="list", heldout_fraction=0.0)
    assert count == MANY
    for i, name, label, size in read:
        assert (name, label, size) == (f"p/{i:08}.png", i % 1000, os.path.getsize(tmp_path / name))


def write_manifest(root: Path, count: int, shard: int) -> None:
    """A prepared folder in which all shards except the last are the same file."""
    root.mkdir()
    for name, offset in (("first", 0), ("last", count - shard)):
        writer = ArrayRecordWriter(str(root / name), "group_size:1,uncompressed")
        for i in range(offset, offset + shard):
            writer.write(pack_record({"image": b"\xff\xd8\xff", "label": i % 10, "name": f"{i}"}))
        writer.close()
    shards, total = [], count // shard
    for number in range(total):
        file = root / ("last" if number == total - 1 else "first")
        link = root / f"part-{number:05}-of-{total:05}.array_record"
        os.link(file, link)
        digest = hashlib.sha256(f"{number}".encode()).hexdigest()
        shards.append({"file": link.name, "count": shard, "bytes": file.stat().st_size, "sha256": digest})
    manifest = HEAD | {"count": count, "classes": list("0123456789"), "shards": shards}
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_manifest_of_two_million_records_needs_the_memory_of_ten_thousand(tmp_path):
    write_manifest(tmp_path / "few", FEW, shard=500)
    write_manifest(tmp_path / "many", 2_000_000, shard=20_000)
    options = {"source": "array_record", "heldout_fraction": 0.0}
    count, read = measure(tmp_path, tmp_path / "few", tmp_path / "many", **options)
    assert count == 2_000_000
    for i, name, label, size in read:
        assert int(name) == (i if i >= 1_980_000 else i % 20_000)
        assert (label, size) == (int(name) % 10, 3)


@pytest.mark.slow
def test_folder_of_200_000_files_needs_the_memory_of_ten_thousand(tmp_path):
    for count in (FEW, 200_000):
        for i in range(count):
            if i % 1000 == 0:
                folder = tmp_path / f"{count}" / f"class{i // 1000:03}"
                folder.mkdir(parents=True)
            (folder / f"a_rather_long_name_of_an_image_{i:08}.jpg").touch()
    few, many = tmp_path / f"{FEW}", tmp_path / "200000"
    count, _ = measure(tmp_path, few, many, source="folder", heldout_fraction=0.1)
    assert 178_000 < count < 182_000
