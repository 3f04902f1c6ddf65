"""Embeddings: the features of the encoder, in the order of the images, after any interruption."""

import contextlib
import functools
import json
import signal
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from runs import command, run
from tiny_trained import CLASSES, PIXELS, image_pixels, make_images, make_run

from simmim_jax import data
from simmim_jax.data.decode import Picture
from simmim_jax.data.sources.folder import Folder
from simmim_jax.data.transforms import resize_and_center_crop
from simmim_jax.errors import BusyError, CheckpointError, ConfigError, DataError, NonFiniteError, UserError
from simmim_jax.files import lock_folder
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.runs import finished
from simmim_jax.tools import images
from simmim_jax.tools.embed import __main__ as embed
from simmim_jax.tools.embed import embeddings, encoding, parts

ENDINGS = (".parquet", ".npz")


class Killed(BaseException):
    """Stands for a kill: nothing of the command runs after it."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(workdir, encoder, its parameters, folder of images, their names)."""
    folder = tmp_path_factory.mktemp("embed")
    workdir, encoder, params = make_run(folder / "run")
    return workdir, encoder, params["encoder"], folder / "images", make_images(folder / "images")


def tool(made, out, *options, data=None):
    embed.run([made[0], str(made[3] if data is None else data), str(out), "--batch-size=8", *options])


@pytest.fixture
def quick(monkeypatch):
    """Load each run once, and let the first pixels of an image be its embedding. These tests are about files."""

    def embed_batches(run, options, view, mesh):
        for batch in images.make_pass(
            view, images.make_crop(run), mesh, batch_size=options.batch_size, threads=options.threads
        ):
            numbers = batch["image"].reshape(len(batch["image"]), -1)[:, :16].astype(np.float32)
            count = len(view) - batch["batch_index"][0]
            yield tuple(array[:count] for array in (batch["batch_index"], batch["valid"], batch["label"], numbers))

    monkeypatch.setattr(parts, "MAX_PART_ROWS", 8)
    monkeypatch.setattr(encoding, "embed_batches", embed_batches)
    monkeypatch.setattr(encoding, "embedding_shape", lambda run, options: (16,))
    monkeypatch.setattr(finished, "load_run", functools.cache(finished.load_run))


@contextlib.contextmanager
def killed_at(monkeypatch, target, name):
    """Kill the command in place of a function."""

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            yield


def read_about(path):
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"simmim_jax"])


def test_rows_are_the_images_in_order_with_names_labels_and_features(made, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "MAX_PART_ROWS", 8)
    _, encoder, params, folder, names = made
    tool(made, tmp_path / "x.parquet", "--block=1", "--pool=both")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column("name").to_pylist() == names
    assert table.column("index").to_pylist() == list(range(20))
    assert table.column("class_name").to_pylist() == [name.split("/")[0] for name in names]
    assert [CLASSES[label] for label in table.column("label").to_pylist()] == table.column("class_name").to_pylist()
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
    features = jax.jit(make_features(encoder, **PIXELS, block=1, pool="both"))
    expected, _ = features(params, image_pixels(folder, names))
    ours = np.array(table.column("embedding").to_pylist())
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)  # order of summation depends on the batch size
    about = read_about(tmp_path / "x.parquet")
    assert (about["block"], about["pool"], about["shape"], about["step"]) == (1, "both", [32], 7)
    assert (about["image_size"], about["mean"], about["normalized"]) == ([16, 16], list(PIXELS["mean"]), False)
    assert list(tmp_path.iterdir()) == [tmp_path / "x.parquet"]  # no parts remain


def test_token_maps_in_npz_follow_size_crop_and_normalization(made, tmp_path):
    """At another image size, where position tables are resized."""
    crop = {"crop_fraction": 0.5, "interpolation": "bilinear"}
    flags = ("--pool=map", "--normalize", "--dtype=float16", "--image-size=32,16", "--limit=5")
    tool(made, tmp_path / "x.npz", *flags, "--crop-fraction=0.5", "--interpolation=bilinear")
    arrays, names = np.load(tmp_path / "x.npz"), made[4][::4]
    pictures = [Picture(np.asarray(image), 3) for image in image_pixels(made[3], names)]
    images = jnp.stack([resize_and_center_crop(picture, size=(32, 16), **crop) for picture in pictures])
    model = finished.load_run(made[0], (32, 16))
    expected = jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, normalize(images, **PIXELS))
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert (arrays["embedding"].dtype, arrays["embedding"].shape) == (np.float16, (5, 4, 2, 16))
    np.testing.assert_allclose(arrays["embedding"], expected, atol=5e-4)  # float16 has 11 bits below 1
    assert arrays["index"].tolist() == [0, 4, 8, 12, 16]  # --limit spaces images evenly
    assert arrays["name"].tolist() == names
    assert [CLASSES[label] for label in arrays["label"]] == [name.split("/")[0] for name in names]
    assert arrays["classes"].tolist() == list(CLASSES)
    about = json.loads(str(arrays["about"]))
    assert (about["shape"], about["dtype"], about["normalized"]) == ([4, 2, 16], "float16", True)
    assert about.items() >= crop.items()


def test_both_file_types_read_back_equal(made, quick, tmp_path):
    listings, numbers = [], []
    for ending in ENDINGS:
        tool(made, tmp_path / f"x{ending}")
        listings.append(embeddings.read_listing(tmp_path / f"x{ending}"))
        numbers.append(np.concatenate(list(embeddings.read_embeddings(tmp_path / f"x{ending}", rows=7))))
    assert listings[0].names == listings[1].names == made[4]
    np.testing.assert_array_equal(listings[0].labels, listings[1].labels)
    np.testing.assert_array_equal(listings[0].index, listings[1].index)
    np.testing.assert_array_equal(*numbers)
    assert numbers[0].shape == (20, 16)


def test_images_without_classes_have_no_labels(made, quick, tmp_path):
    names = make_images(tmp_path / "flat", 9, classes=())
    for ending in ENDINGS:
        tool(made, tmp_path / f"x{ending}", data=tmp_path / "flat")
    assert pyarrow.parquet.read_schema(tmp_path / "x.parquet").names == ["index", "name", "embedding"]
    assert sorted(np.load(tmp_path / "x.npz")) == ["about", "embedding", "index", "name"]
    assert embeddings.read_listing(tmp_path / "x.npz").labels.tolist() == [-1] * 9
    assert embeddings.read_listing(tmp_path / "x.parquet").names == names


@pytest.mark.parametrize("ending", ENDINGS)
def test_labels_of_classes_without_names_stay_numbers(made, quick, tmp_path, monkeypatch, ending):
    read, make_source = Folder.__getitem__, data.make_source

    def make_without_names(**options):
        source = make_source(**options)
        source.classes = ()
        return source

    monkeypatch.setattr(data, "make_source", make_without_names)
    monkeypatch.setattr(Folder, "__getitem__", lambda source, i: read(source, i) | {"label": i % 4})
    tool(made, tmp_path / f"x{ending}")
    listing = embeddings.read_listing(tmp_path / f"x{ending}")
    assert listing.labels.tolist() == [0, 1, 2, 3] * 5
    assert listing.about["classes"] == ["0", "1", "2", "3"]
    assert embeddings.read_about(tmp_path / f"x{ending}")["classes"] == []


def test_a_folder_of_images_and_label_maps_is_refused(made, quick, tmp_path):
    for name in ("images", "masks"):
        make_images(tmp_path / name, 3, classes=())
    with pytest.raises(DataError, match=f"{tmp_path}/images"):
        tool(made, tmp_path / "x.npz", data=tmp_path)


@pytest.mark.parametrize(
    ("place", "ending"),
    [("part 1", ".parquet"), ("in part 2", ".parquet"), ("joined", ".npz"), ("renamed", ".npz")],
)
def test_after_a_kill_the_same_command_ends_with_the_same_bytes(made, quick, tmp_path, monkeypatch, ending, place):
    whole, broken = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    tool(made, whole)
    write_part, written = parts.write_part, []

    def write_or_die(folder, number, *rest):
        written.append(number)
        if place == "in part 2" and number == 2:
            (folder / ".part-000002.parquet.partial").write_bytes(b"PAR1 half")
            raise Killed
        write_part(folder, number, *rest)
        if place == "part 1" and number == 1:
            raise Killed

    def join_or_die(paths, out, about):
        out.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(parts, "write_part", write_or_die)
        if place == "joined":
            patch.setitem(embeddings.JOINERS, ending, join_or_die)
        if place == "renamed":
            patch.setattr(parts.shutil, "rmtree", lambda folder: join_or_die(None, folder / "LOCK", None))
        with pytest.raises(Killed):
            tool(made, broken)
    assert broken.exists() == (place == "renamed")
    written.clear()
    monkeypatch.setattr(parts, "write_part", lambda *a: (written.append(a[1]), write_part(*a)))
    tool(made, broken)
    assert written == ([2] if "part" in place else [])  # finished parts are reused
    assert broken.read_bytes() == whole.read_bytes()
    assert not broken.with_name(broken.name + ".parts").exists()


def test_a_damaged_part_is_written_again(made, quick, tmp_path, monkeypatch):
    tool(made, tmp_path / "whole.parquet")
    out = tmp_path / "x.parquet"
    with killed_at(monkeypatch, parts, "join"):
        tool(made, out)
    part = parts.part_path(tmp_path / "x.parquet.parts", 1)
    part.write_bytes(part.read_bytes()[:-20])
    tool(made, out)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "kind", "message", "complete"),
    [
        (["--pool=class_token"], ConfigError, 'pool "patches" then, "class_token" now', True),
        (["--crop-fraction=0.5"], ConfigError, "crop_fraction 1.0 then, 0.5 now", False),
        ("run", ConfigError, "other weights", True),
        ("images", DataError, "other images", False),
    ],
)
def test_another_run_data_or_option_needs_overwrite(
    made, quick, tmp_path, monkeypatch, change, kind, message, complete
):
    out = tmp_path / "x.parquet"
    with contextlib.nullcontext() if complete else killed_at(monkeypatch, parts, "join"):
        tool(made, out)
    before = out.read_bytes() if complete else None
    other, options = made, change
    if change == "run":
        other, options = (make_run(tmp_path / "other", seed=1)[0], *made[1:]), []
    if change == "images":
        make_images(tmp_path / "other", 19)
        other, options = (*made[:3], tmp_path / "other", []), []
    with pytest.raises(kind, match=message):
        tool(other, out, *options)
    assert (out.read_bytes() if out.exists() else None) == before
    tool(other, out, *options, "--overwrite")
    assert out.read_bytes() != before
    assert len(embeddings.read_listing(out).names) == (19 if change == "images" else 20)


def test_files_of_others_are_never_replaced(made, quick, tmp_path):
    out, folder = tmp_path / "x.parquet", tmp_path / "y.npz.parts"
    out.write_text("mine")
    folder.mkdir()
    (folder / "letters").write_text("mine")
    for options in ([], ["--overwrite"]):
        with pytest.raises(DataError, match="not a file of embeddings"):
            tool(made, out, *options)
        with pytest.raises(ConfigError, match="did not create"):
            tool(made, tmp_path / "y.npz", *options)
    assert out.read_text() == (folder / "letters").read_text() == "mine"
    (folder / "letters").unlink()
    with lock_folder(folder), pytest.raises(BusyError):
        tool(made, tmp_path / "y.npz")


def test_unreadable_images_are_named_and_left_out_up_to_a_fraction(made, quick, tmp_path, caplog):
    names = make_images(tmp_path / "images", bad=(3, 17))
    with pytest.raises(DataError, match="2 of 20 images"):
        tool(made, tmp_path / "x.parquet", data=tmp_path / "images")
    tool(made, tmp_path / "x.parquet", "--max-bad-fraction=0.1", data=tmp_path / "images")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column("name").to_pylist() == [name for n, name in enumerate(names) if n not in (3, 17)]
    assert table.column("index").to_pylist() == [n for n in range(20) if n not in (3, 17)]
    about = read_about(tmp_path / "x.parquet")
    assert (about["left_out"], about["left_out_names"]) == (2, ["cat/003.png", "owl/017.png"])
    assert "cat/003.png" in caplog.text
    make_images(tmp_path / "none", 2, bad=(0, 1))
    with pytest.raises(DataError, match="none of the images"):
        tool(made, tmp_path / "none.npz", "--max-bad-fraction=1", data=tmp_path / "none")


def test_a_fault_that_passes_leaves_no_part_behind(made, quick, tmp_path, monkeypatch):
    read = Folder.__getitem__

    def gone_after_part_0(source, i):
        if i >= 8:
            raise OSError(5, "Input/output error")
        return read(source, i)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "__getitem__", gone_after_part_0)
        with pytest.raises(DataError, match="8 of 20 images"):
            tool(made, tmp_path / "x.parquet")
    tool(made, tmp_path / "x.parquet")
    assert embeddings.read_listing(tmp_path / "x.parquet").names == made[4]


def test_overwrite_continues_and_keeps_the_old_file_until_the_end(made, quick, tmp_path, monkeypatch):
    out = tmp_path / "x.parquet"
    tool(made, out)
    before, write_part, written = out.read_bytes(), parts.write_part, []

    def write_or_die(folder, number, *rest):
        if number == 1 and 1 not in written:
            written.append(1)
            raise Killed
        written.append(number)
        write_part(folder, number, *rest)

    monkeypatch.setattr(parts, "write_part", write_or_die)
    with pytest.raises(Killed):
        tool(made, out, "--block=1", "--overwrite")
    assert out.read_bytes() == before
    tool(made, out, "--block=1", "--overwrite")
    assert written == [0, 1, 1, 2]
    assert read_about(out)["block"] == 1


def test_digits_need_no_path_and_runs_know_their_own_images(quick, tmp_path):
    own = {"source": "digits", "path": "", "name": "", "data_dir": "", "heldout_fraction": 0.1, "split": "test"}
    workdir, *_ = make_run(tmp_path / "run", data=own, probe_block=1)
    for name, *options in (("given", "digits", "--split=test"), ("own", "")):  # '' means the training split
        embed.run([workdir, *options, str(tmp_path / f"{name}.npz"), "--limit=3"])
    given, own = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("given", "own"))
    np.testing.assert_array_equal(given["embedding"], own["embedding"])
    assert own["name"][0].startswith("digits/")
    assert json.loads(str(own["about"]))["block"] == 1  # the default is the run's probe_block


def test_numbers_that_a_file_cannot_hold_are_refused():
    huge = np.full((2, 3), 1.0, np.float32)
    for value, dtype in ((1e5, "float16"), (np.nan, "float32")):
        huge[1, 2] = value
        with pytest.raises(NonFiniteError, match=" - b - "):
            parts.cast(huge, dtype, ["a", "b"])


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["run", "images"], ConfigError, "OUT"),
        (["run", "images", "x.csv"], ConfigError, "x.csv"),
        (["run", "images", "caf\udce9.npz"], ConfigError, r"caf\\xe9.npz"),
        (["run", "images", "x.npz", "--pool=mean"], ConfigError, "'mean'"),
        (["run", "images", "x.npz", "--image_size=0"], ConfigError, "--image-size"),
        (["run", "images", "x.npz", "--interpolation=cubic"], ConfigError, "'cubic' - did you mean"),
        (["run", "images", "x.npz", "--split=val"], DataError, "'val'"),
        (["nothing", "images", "x.npz"], CheckpointError, "nothing"),
        (["run", "nothing", "x.npz"], DataError, "nothing does not exist"),
        (["run", "", "x.npz"], DataError, "run"),
        (["run", "images", "x.npz", "--block=3"], ConfigError, "block 3 of an encoder of 2 blocks"),
        (["run", "images", "x.npz", "--image-size=12"], ConfigError, "multiples of 8"),
        (["run", "images", "run/config.json/x.npz"], DataError, "cannot read or write: "),
    ],
)
def test_a_mistake_is_one_line(made, quick, tmp_path, monkeypatch, arguments, kind, message):
    (tmp_path / "run").symlink_to(made[0])
    (tmp_path / "images").symlink_to(made[3])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        embed.run(arguments)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("*.npz*"))


SMALL_PARTS = """
import sys
from simmim_jax.tools.embed import __main__, parts
parts.MAX_PART_ROWS = 8
__main__.cli.start(__main__.run)
"""


@pytest.mark.slow
def test_after_sigkill_or_a_full_disk_the_same_command_ends_with_the_same_bytes_and_device_count_changes_nothing(
    made, tmp_path
):
    make_images(tmp_path / "images", 300, size=(64, 64))
    script = ("-c", SMALL_PARTS)

    def arguments(out):
        return [made[0], tmp_path / "images", tmp_path / out, "--batch-size=8"]

    def start(out, devices=1):
        line, options = command(*arguments(out), devices=devices, script=script)
        return subprocess.Popen(line, stderr=subprocess.PIPE, **options)

    assert start("whole.parquet").wait(300) == 0
    kills = 0
    for count in (1, 20):  # SIGKILL as soon as this many parts exist
        child = start("x.parquet")
        while child.poll() is None and len(list((tmp_path / "x.parquet.parts").glob("*.parquet"))) < count:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 1
    full = run(*arguments("x.parquet"), script=script, file_limit=1)
    assert full.returncode == 3, full.stderr
    assert full.stderr.splitlines()[-1].startswith("ERROR[data] cannot read or write: ")
    assert "Traceback" not in full.stderr
    assert start("x.parquet").wait(300) == 0
    assert (tmp_path / "x.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert start("eight.parquet", devices=8).wait(300) == 0
    tables = [pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "eight")]
    assert tables[0].column("name") == tables[1].column("name")
    numbers = [np.array(table.column("embedding").to_pylist()) for table in tables]
    np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-6)  # order of summation depends on the batch per device
