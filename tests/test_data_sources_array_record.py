"""ArrayRecord: prepared folders, shards of other programs, and damaged records."""

import json
import os
from pathlib import Path

import msgpack
import numpy as np
import pytest
from source_files import (
    everything,
    labels,
    names,
    png,
    shade_of,
    shades,
    write_images,
    write_prepared,
    write_records,
)
from tensorflow_datasets.proto import tf_example_pb2

from simmim_jax.data import make_source
from simmim_jax.data.decode import BadImage
from simmim_jax.data.prepared import pack_record
from simmim_jax.errors import DataError


def example(**features) -> bytes:
    made = tf_example_pb2.Example()
    for name, value in features.items():
        feature = made.features.feature[name.replace("__", "/")]
        (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
    return made.SerializeToString()


# --- prepared folders


def test_prepared_images_have_their_original_names(tmp_path):
    write_prepared(tmp_path / "train", [1, 2], [3], [4, 5, 6])
    write_prepared(tmp_path / "validation", [7, 8])
    source = make_source("auto", path=str(tmp_path))
    assert names(source) == [f"x/{shade}.png" for shade in range(1, 7)]
    assert (shades(source), labels(source)) == ([1, 2, 3, 4, 5, 6], [1, 2, 0, 1, 2, 0])
    assert source.classes == ("a", "b", "c")
    assert shades(make_source("auto", path=str(tmp_path), split="test")) == [7, 8]
    assert len(everything("auto", tmp_path / "train")) == 6


def test_shard_is_opened_only_when_it_is_read(tmp_path):
    write_prepared(tmp_path, [1, 2], [3, 4])
    second = tmp_path / "part-00001-of-00002.array_record"
    second.write_bytes(bytes(second.stat().st_size))
    source = everything("array_record", tmp_path)
    assert (len(source), shade_of(source[1])) == (4, 2)
    with pytest.raises(DataError, match=rf"{second.name} is truncated or damaged"):
        source[2]


def test_images_of_other_channels_are_arrays(tmp_path):
    record = {"image": bytes([2] * 24), "shape": [2, 3, 4], "label": 1, "name": "x"}
    image = everything("auto", write_prepared(tmp_path, [2], records=[pack_record(record)]))[0]["image"]
    assert (image.shape, image.dtype, image.min(), image.max()) == ((2, 3, 4), np.uint8, 2, 2)


def test_incomplete_prepared_folder_is_refused_at_once(tmp_path):
    def refused(says, source="array_record"):
        with pytest.raises(DataError, match=says):
            make_source(source, path=str(tmp_path))

    write_prepared(tmp_path, [1, 2], [3])
    file, shard = tmp_path / "manifest.json", tmp_path / "part-00001-of-00002.array_record"
    data, manifest = shard.read_bytes(), json.loads(file.read_text())
    shard.write_bytes(data[:-1])
    refused(rf"{shard.name} has \d+ bytes.*simmim_jax\.tools\.prepare")
    shard.unlink()
    refused(rf"{shard.name} is missing.*simmim_jax\.tools\.prepare")
    shard.write_bytes(data)
    outside = {"file": "../x.array_record", "count": 3, "bytes": 1, "sha256": ""}
    for change in ({"version": 2}, {"count": 5}, {"count": "3"}, {"classes": None}, {"shards": [outside]}):
        file.write_text(json.dumps(manifest | change))
        refused(r"manifest\.json (is damaged|has version 2)")
    file.write_text(json.dumps(manifest | {"shards": [], "count": 0}))
    refused("has 0 images")
    file.write_text("{")
    refused(r"manifest\.json cannot be read")
    file.unlink()
    refused("is unfinished", "auto")


def test_unfinished_prepare_is_refused(tmp_path):
    write_images(tmp_path, "train/1.png")
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / ".prepare.json").write_text("{}")
    for source in ("auto", "array_record"):
        with pytest.raises(DataError, match=r"/val is not completely prepared"):
            make_source(source, path=str(tmp_path))


# --- damaged records


def test_damaged_record_is_a_bad_image_and_the_others_are_read(tmp_path):
    write_prepared(tmp_path, list(range(30)))
    shard = tmp_path / "part-00000-of-00001.array_record"
    data = bytearray(shard.read_bytes())
    start = data.index(png(17)) + 20
    data[start : start + 4] = b"oops"
    shard.write_bytes(data)
    source = everything("array_record", tmp_path)
    with pytest.raises(BadImage, match="mismatch"):
        source[17]
    assert source.name(17) == f"{shard.name}/17"
    assert [shade_of(source[i]) for i in range(30) if i != 17] == [i for i in range(30) if i != 17]


def test_hostile_records_are_bad_images(tmp_path):
    record = {"image": b"x", "label": 0, "name": "x"}
    bad = [
        b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"image": b"x"}), msgpack.packb(record | {"label": 3}),
        msgpack.packb(record | {"label": "a"}), msgpack.packb(record | {"image": "text"}), msgpack.packb(record)[:-1],
        msgpack.packb(record | {"shape": [2, 2, 9]}), msgpack.packb(record | {"shape": "x"}), b"\x91" * 10_000,
    ]  # fmt: skip
    source = everything("array_record", write_prepared(tmp_path, range(len(bad)), records=bad))
    for i in range(len(bad)):
        with pytest.raises(BadImage, match="its record"):
            source[i]


# --- shards of other programs


def test_records_of_other_programs_are_images_or_examples(tmp_path):
    write_records(tmp_path / "images" / "0.arrayrecord", [png(1), png(2)])
    source = everything("auto", tmp_path / "images")
    assert (shades(source), labels(source)) == ([1, 2], [-1, -1])
    assert source[1]["name"] == source.name(1) == "0.arrayrecord/1"
    records = [example(image__encoded=png(shade), image__class__label=shade) for shade in (3, 4)]
    write_records(tmp_path / "examples" / "0.array_record", [*records, b"\xff\xff", example()])
    source = everything("auto", tmp_path / "examples")
    assert [(shade_of(source[i]), source[i]["label"]) for i in (0, 1)] == [(3, 3), (4, 4)]
    for i in (2, 3):
        with pytest.raises(BadImage, match="no encoded image"):
            source[i]


def test_records_without_images_are_refused(tmp_path):
    file = tmp_path / "0.array_record"
    for records, says in {
        (b"\xff\xff words",): r"no image.*no tf\.train\.Example", (example(text=b"words"),): "no image.*text",
        (): "has 0 images",
    }.items():  # fmt: skip
        write_records(file, records)
        with pytest.raises(DataError, match=says):
            make_source("array_record", path=str(tmp_path))
    for data in (b"", b"x" * 100, os.urandom(200_000)):
        Path(file).write_bytes(data)
        with pytest.raises(DataError, match=r"0\.array_record is truncated or damaged"):
            make_source("array_record", path=str(tmp_path))


def test_groups_of_records_are_warned_of(tmp_path, caplog):
    write_records(tmp_path / "0.array_record", [png(1), png(2)], options="group_size:10")
    assert shades(everything("array_record", tmp_path)) == [1, 2]
    assert "in groups" in caplog.text
