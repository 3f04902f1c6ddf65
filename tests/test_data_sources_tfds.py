"""TensorFlow Datasets: splits, slices, and errors, without TensorFlow and without a network."""

import concurrent.futures
import shutil
import subprocess
import sys
from pathlib import Path

import absl.logging
import pytest
from google.protobuf.message import DecodeError
from source_files import everything, labels
from tiny_tfds import CLASSES, TinyShades

from simmim_jax.data import make_source, share_images
from simmim_jax.data.decode import BadImage
from simmim_jax.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    TinyShades(data_dir=data_dir, file_format="array_record").download_and_prepare()
    return data_dir


@pytest.fixture
def copy(tfds_dir, tmp_path):
    """A copy of the data set, to damage."""
    return shutil.copytree(f"{tfds_dir}/tiny_shades", tmp_path / "copy")


def shades(tfds_dir, split="train"):
    return make_source("tfds", name="tiny_shades", data_dir=tfds_dir, split=split)


def test_records_are_read_without_tensorflow(tfds_dir):
    program = f"""
import sys
import numpy
from simmim_jax.data import make_source
from simmim_jax.data.decode import decode
source = make_source("tfds", name="tiny_shades", data_dir={tfds_dir!r})
record = source[3]
print(len(source), source.classes, record["label"], record["name"], numpy.asarray(decode(record["image"], 3)).shape)
assert "tensorflow" not in sys.modules and "tiny_tfds" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == f"8 {CLASSES} 1 tiny_shades/1.0.0/train/3 (6, 5, 3)\n"
    assert done.stderr == ""


def test_slices_are_parts_of_a_split_and_know_if_they_overlap(tfds_dir):
    def images(split):
        source = shades(tfds_dir, split)
        return [source[i]["image"] for i in range(len(source))]

    assert images("train[:75%]") + images("train[75%:]") == images("train")
    assert images("train[:2]+test") == images("train")[:2] + images("test")
    assert share_images(shades(tfds_dir, "train[:75%]"), shades(tfds_dir, "train[50%:]"))
    assert not share_images(shades(tfds_dir, "train[:50%]"), shades(tfds_dir, "train[50%:]"))


def test_folder_and_name_open_the_same_data_set(tfds_dir, tmp_path):
    by_name = shades(tfds_dir, "test")
    for path in (f"{tfds_dir}/tiny_shades", f"{tfds_dir}/tiny_shades/1.0.0"):
        by_path = make_source("auto", path=path, split="test")
        assert by_path.fingerprint() == by_name.fingerprint()
        assert [by_path[i] for i in range(4)] == [by_name[i] for i in range(4)]
    with pytest.raises(DataError, match="no prepared TFDS data set"):
        make_source("tfds", path=tfds_dir)
    (shard,) = Path(tfds_dir).rglob("*train*array_record*")
    shutil.copy(shard, tmp_path / "train.array_record")  # a shard without the metadata of TFDS
    assert labels(everything("array_record", tmp_path)) == labels(shades(tfds_dir))


def test_unknown_split_or_data_set_is_refused_with_those_that_exist(tfds_dir):
    for split in ("val", "tra[:3]", "train[:x]"):
        with pytest.raises(DataError, match=r"test \(4\), train \(8\)"):
            shades(tfds_dir, split)
    for name, near in {"cifar01": "cifar10", "tiny_shade": "tiny_shades"}.items():
        with pytest.raises(DataError, match=rf"{name}'.*did you mean {near}"):
            make_source("tfds", name=name, data_dir=tfds_dir)
    with pytest.raises(ConfigError, match=r"data\.name is empty"):
        make_source("tfds")


def test_unprepared_data_set_is_refused_without_a_network(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise AssertionError("network access")

    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    command = f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}"
    with pytest.raises(DataError, match=rf"imagenet2012 is not prepared.*{tmp_path}.*{command}"):
        make_source("tfds", name="imagenet2012", data_dir=str(tmp_path))
    assert not caplog.records


def test_other_formats_and_damaged_metadata_are_refused(tfds_dir, tmp_path):
    shutil.copytree(tfds_dir, tmp_path / "copy")
    info = next((tmp_path / "copy").rglob("dataset_info.json"))
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(DataError, match=r"'tiny_shades'.*(?i:tfrecord).*--file_format=array_record"):
        shades(str(tmp_path / "copy"))
    info.write_text("{")
    with pytest.raises(DataError, match="TFDS cannot open"):
        make_source("auto", path=str(info.parent))


def test_damaged_record_is_a_bad_image_and_changes_the_fingerprint(copy):
    whole, test = (make_source("auto", path=str(copy), split=split) for split in ("train", "test"))
    before, records = (whole.fingerprint(), test.fingerprint()), [whole[i] for i in range(8)]
    (shard,) = copy.rglob("*train*array_record*")
    data = bytearray(shard.read_bytes())
    data[100:104] = b"oops"
    shard.write_bytes(data)
    source, bad = make_source("auto", path=str(copy)), 0
    for i in range(8):
        try:
            assert source[i] == records[i]
        except BadImage:
            bad += 1
    assert bad
    for changed in (data[:-1], data[:-1] + b"x"):
        shard.write_bytes(changed)
        assert make_source("auto", path=str(copy)).fingerprint() != before[0]
    assert test.fingerprint() == before[1]
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} cannot be read"):
        make_source("auto", path=str(copy)).fingerprint()


@pytest.mark.parametrize("error", [RuntimeError, IndexError, ValueError, DecodeError])
def test_any_error_of_a_record_is_a_bad_image(error, tfds_dir):
    class Records:
        def __getitem__(self, i):
            raise error("broken")

    source = shades(tfds_dir)
    source.records = Records()
    with pytest.raises(BadImage, match="broken"):
        source[0]


def test_opening_in_threads_silences_no_later_warning(tfds_dir, caplog):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert set(pool.map(lambda _: shades(tfds_dir)[0]["label"], range(16))) == {0}
    assert not caplog.records
    absl.logging.warning("still logged")
    assert [record.message for record in caplog.records] == ["still logged"]
