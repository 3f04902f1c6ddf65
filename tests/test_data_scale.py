"""Ten million records: a start in seconds, no more memory than for ten thousand, and nothing large that travels."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import msgpack
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simmim_jax.data import make_source

FEW, MANY = 10_000, 10_000_000
# MiB that many records may take beyond ten thousand: a list or manifest took 3, a folder 13. A worker has a quarter.
PRIVATE = 24
PICKLE = 10_000  # bytes

# Opens the source, reads at both ends and in the middle, and lets a process as a worker is do the same.
PROGRAM = """
import json, pickle, subprocess, sys, time
from simmim_jax.data import make_source

def private():  # MiB of this process's own; mapped files are the page cache's, of which one fault may map 2 MiB
    with open("/proc/self/smaps_rollup") as file:
        return sum(int(line.split()[1]) for line in file if line.startswith("Anonymous:")) / 1024

def read(source):
    places = [0, 1, 63, 64, len(source) // 2, len(source) - 65, len(source) - 1]
    return [[i, source.name(i), source[i]["label"], len(source[i]["image"])] for i in places]

if __name__ == "__main__":
    if sys.argv[1] == "worker":
        source = pickle.load(sys.stdin.buffer)
        print(json.dumps({"count": len(source), "read": read(source), "private": private()}))
    else:
        options = json.loads(sys.argv[1])
        make_source(**options["warm"])[0]  # what is imported for the first record is not the data's
        before, start = private(), time.monotonic()
        source = make_source(**options["source"])
        told = {"seconds": time.monotonic() - start, "count": len(source), "read": read(source)}
        told["private"] = private() - before
        pickled = pickle.dumps(source)
        worker = subprocess.run([sys.executable, __file__, "worker"], input=pickled, stdout=subprocess.PIPE, check=True)
        print(json.dumps(told | {"pickle": len(pickled), "worker": json.loads(worker.stdout)}))
"""


def tell(tmp_path: Path, source: dict, warm: dict) -> dict:
    """What PROGRAM found of a source."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), json.dumps({"source": source, "warm": warm})]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "TMPDIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def check(few: dict, many: dict, count: int = MANY) -> None:
    assert many["count"] == many["worker"]["count"] == count
    assert many["worker"]["read"] == many["read"]
    assert many["private"] - few["private"] < PRIVATE
    assert many["worker"]["private"] - few["worker"]["private"] < PRIVATE / 4
    assert many["pickle"] < PICKLE
    assert many["seconds"] < 60  # 3 on an idle machine of two cores


def write_list(file: Path, count: int) -> None:
    """Lines `p/00000000.png 000`, of which the number and the label count up; their images are one and the same."""
    template = np.frombuffer(b"p/00000000.png 000\n", np.uint8)
    with open(file, "wb") as output:
        for start in range(0, count, 1_000_000):
            i = np.arange(start, min(start + 1_000_000, count))
            lines = np.tile(template, (len(i), 1))
            for place in range(8):
                lines[:, 9 - place] = ord("0") + i // 10**place % 10
            for place in range(3):
                lines[:, 17 - place] = ord("0") + i % 1000 // 10**place % 10
            output.write(lines)


@pytest.mark.slow
def test_a_list_of_ten_million_lines_takes_no_more_than_one_of_ten_thousand(tmp_path):
    (tmp_path / "p").mkdir()
    told = {}
    for count in (FEW, MANY):
        write_list(tmp_path / f"{count}.txt", count)
        for i in (0, 1, 63, 64, count // 2, count - 65, count - 1):
            Image.new("RGB", (4, 4)).save(tmp_path / "p" / f"{i:08}.png")
        options = {"source": "list", "heldout_fraction": 0.0}
        source = options | {"path": str(tmp_path / f"{count}.txt")}
        told[count] = tell(tmp_path, source, options | {"path": str(tmp_path / f"{FEW}.txt")})
    check(told[FEW], told[MANY])
    for i, name, label, size in told[MANY]["read"]:
        assert (name, label) == (f"p/{i:08}.png", i % 1000)
        assert size == os.path.getsize(tmp_path / name)


def write_manifest(root: Path, count: int, shard: int = 100_000) -> None:
    """A prepared folder in which all shards are one file, but for the last."""
    root.mkdir()
    for name, offset in (("first", 0), ("last", count - shard)):
        writer = ArrayRecordWriter(str(root / name), "group_size:1,uncompressed")
        for i in range(offset, offset + shard):
            writer.write(msgpack.packb({"image": b"\xff\xd8\xff", "label": i % 10, "name": f"{i}"}))
        writer.close()
    shards, total = [], count // shard
    for number in range(total):
        file = root / ("last" if number == total - 1 else "first")
        link = root / f"part-{number:05}-of-{total:05}.array_record"
        os.link(file, link)
        digest = hashlib.sha256(f"{number}".encode()).hexdigest()
        shards.append({"file": link.name, "count": shard, "bytes": file.stat().st_size, "sha256": digest})
    classes = [f"{i}" for i in range(10)]
    manifest = {"format": "simmim_jax.prepared", "version": 1, "count": count, "classes": classes, "shards": shards}
    (root / "manifest.json").write_text(json.dumps(manifest))


def test_a_manifest_of_ten_million_records_takes_no_more_than_one_of_ten_thousand(tmp_path):
    write_manifest(tmp_path / "few", FEW, shard=500)
    write_manifest(tmp_path / "many", MANY)
    options = {"source": "array_record", "heldout_fraction": 0.0}
    few, many = (
        tell(tmp_path, options | {"path": str(tmp_path / name)}, options | {"path": str(tmp_path / "few")})
        for name in ("few", "many")
    )
    check(few, many)
    for i, name, label, size in many["read"]:
        assert int(name) == (i if i >= MANY - 100_000 else i % 100_000)
        assert (label, size) == (int(name) % 10, 3)


def test_the_held_out_part_of_ten_million_lines_is_found_by_arithmetic(tmp_path):
    (tmp_path / "p").mkdir()
    write_list(tmp_path / "all.txt", 1_000_000)
    Image.new("RGB", (4, 4)).save(tmp_path / "p" / "00000000.png")
    train, held_out = (make_source("auto", path=str(tmp_path / "all.txt"), split=split) for split in ("train", "val"))
    assert (len(train), len(held_out)) == (900_000, 100_000)
    assert held_out.name(99_999) == "p/00999990.png"
    assert (train.name(0), train.name(899_999)) == ("p/00000001.png", "p/00999999.png")


@pytest.mark.slow
def test_a_folder_of_200_000_files_takes_no_more_than_one_of_ten_thousand(tmp_path):
    told = {}
    for count in (FEW, 200_000):
        for i in range(count):
            if i % 1000 == 0:
                folder = tmp_path / f"{count}" / f"class{i // 1000:03}"
                folder.mkdir(parents=True)
            (folder / f"a_rather_long_name_of_an_image_{i:08}.jpg").touch()
        options = {"source": "folder", "heldout_fraction": 0.1}
        warm = options | {"path": str(tmp_path / f"{FEW}")}
        told[count] = tell(tmp_path, options | {"path": str(tmp_path / f"{count}")}, warm)
    check(told[FEW], told[200_000], told[200_000]["count"])
    assert 178_000 < told[200_000]["count"] < 182_000
