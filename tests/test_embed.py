"""Embeddings: the numbers of the encoder, in the order of the images, whatever interrupts the writing."""

import contextlib
import functools
import json
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet
import pytest
from runs import ROOT, command, run
from tiny_trained import CLASSES, PIXELS, make_images, make_run, pixels_of

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
from simmim_jax.tools.embed import embeddings

TOOL = ("-m", "simmim_jax.tools.embed")


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
    """A run is opened once, and an embedding is the first pixels of an image: what is tested is how it is written."""

    def compute(model, options, view, mesh):
        for batch in images.make_pass(model, view, mesh, batch_size=options.batch_size, threads=options.threads):
            numbers = batch["image"].reshape(len(batch["image"]), -1)[:, :16].astype(np.float32)
            rows = np.arange(len(numbers)) < len(view) - batch["batch_index"][0]
            yield tuple(array[rows] for array in (batch["batch_index"], batch["valid"], batch["label"], numbers))

    in_parts_of(monkeypatch, 8)
    monkeypatch.setattr(embed, "compute", compute)
    monkeypatch.setattr(embed, "shape_of", lambda model, options: (16,))
    monkeypatch.setattr(finished, "load_run", functools.cache(finished.load_run))


@contextlib.contextmanager
def killed_at(monkeypatch, target, name):
    """A kill in place of a function."""

    def kill(*arguments):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(target, name, kill)
        with pytest.raises(Killed):
            yield


class Killed(BaseException):
    """The process is gone at this place, and nothing of it runs any more."""


def in_parts_of(monkeypatch, rows):
    monkeypatch.setattr(embed, "PART_ROWS", rows)


def about_of(path):
    return json.loads(pyarrow.parquet.read_schema(path).metadata[b"simmim_jax"])


def test_rows_are_the_images_in_order_with_names_labels_and_the_features_of_the_block(made, tmp_path, monkeypatch):
    in_parts_of(monkeypatch, 8)
    _, encoder, params, folder, names = made
    tool(made, tmp_path / "x.parquet", "--block=1", "--pool=both")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column("name").to_pylist() == names
    assert table.column("index").to_pylist() == list(range(20))
    assert table.column("class_name").to_pylist() == [name.split("/")[0] for name in names]
    assert [CLASSES[label] for label in table.column("label").to_pylist()] == table.column("class_name").to_pylist()
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[32]"
    features = jax.jit(make_features(encoder, **PIXELS, block=1, pool="both"))
    expected, _ = features(params, pixels_of(folder, names))
    ours = np.array(table.column("embedding").to_pylist())
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-6)  # batches of other sizes are summed otherwise
    about = about_of(tmp_path / "x.parquet")
    assert (about["block"], about["pool"], about["shape"], about["step"]) == (1, "both", [32], 7)
    assert (about["image_size"], about["mean"], about["normalized"]) == ([16, 16], list(PIXELS["mean"]), False)
    assert about["what"] == "the class token of block 1, and then the mean of its patches"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.parquet"]  # no parts are left


def test_an_npz_holds_maps_of_tokens_each_of_length_1_where_asked_for(made, tmp_path):
    _, encoder, params, folder, names = made
    cropped = {"crop_fraction": 0.5, "interpolation": "bilinear"}
    tool(made, tmp_path / "x.npz", "--pool=map", "--normalize", "--dtype=float16", "--crop-fraction=0.5",
         "--interpolation=bilinear")  # fmt: skip
    arrays = np.load(tmp_path / "x.npz")
    images = resized(pixels_of(folder, names), size=(16, 16), **cropped)
    expected = jax.jit(encoder.apply)({"params": params}, normalize(images, **PIXELS))
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    assert (arrays["embedding"].dtype, arrays["embedding"].shape) == (np.float16, (20, 2, 2, 16))
    np.testing.assert_allclose(arrays["embedding"], expected, atol=5e-4)  # float16 has 11 bits below 1
    assert arrays["name"].tolist() == names
    assert [CLASSES[label] for label in arrays["label"]] == [name.split("/")[0] for name in names]
    assert arrays["classes"].tolist() == list(CLASSES)
    about = json.loads(str(arrays["about"]))
    assert (about["shape"], about["dtype"], about["normalized"]) == ([2, 2, 16], "float16", True)
    assert about.items() >= cropped.items()
    assert about["images"].startswith("resized (bilinear) to cover 32 x 32 pixels, center-cropped to 16 x 16, ")


def test_what_is_written_is_read_again_from_both_kinds_of_file(made, quick, tmp_path):
    read = {}
    for ending in embeddings.ENDINGS:
        tool(made, tmp_path / f"x{ending}")
        listing = embeddings.read_listing(tmp_path / f"x{ending}")
        read[ending] = listing, np.concatenate(list(embeddings.read_embeddings(tmp_path / f"x{ending}", rows=7)))
    (of_parquet, numbers), (of_npz, same_numbers) = read.values()
    assert of_parquet.names == of_npz.names == made[4]
    np.testing.assert_array_equal(of_parquet.labels, of_npz.labels)
    np.testing.assert_array_equal(of_parquet.index, of_npz.index)
    np.testing.assert_array_equal(numbers, same_numbers)
    assert numbers.shape == (20, 16)


def test_images_without_classes_have_no_labels(made, quick, tmp_path):
    names = make_images(tmp_path / "flat", 9, classes=())
    for ending in embeddings.ENDINGS:
        tool(made, tmp_path / f"x{ending}", data=tmp_path / "flat")
    assert pyarrow.parquet.read_schema(tmp_path / "x.parquet").names == ["index", "name", "embedding"]
    assert sorted(np.load(tmp_path / "x.npz")) == ["about", "embedding", "index", "name"]
    assert embeddings.read_listing(tmp_path / "x.npz").labels.tolist() == [-1] * 9
    assert embeddings.read_listing(tmp_path / "x.parquet").names == names


@pytest.mark.parametrize("ending", embeddings.ENDINGS)
def test_labels_of_classes_without_names_are_kept_as_numbers(made, quick, tmp_path, monkeypatch, ending):
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


def test_the_label_maps_beside_images_are_not_embedded(made, quick, tmp_path):
    for name in ("images", "masks"):
        make_images(tmp_path / name, 3, classes=())
    with pytest.raises(DataError, match=f"give {tmp_path}/images alone"):
        tool(made, tmp_path / "x.npz", data=tmp_path)
    tool(made, tmp_path / "x.npz", data=tmp_path / "images")


@pytest.mark.parametrize(
    ("place", "ending"),
    [
        ("part 1", ".parquet"),
        ("in part 2", ".parquet"),
        ("joined", ".parquet"),
        ("joined", ".npz"),
        ("renamed", ".npz"),
    ],
)
def test_after_a_kill_at_any_place_the_same_command_ends_with_the_same_bytes(
    made, quick, tmp_path, monkeypatch, ending, place
):
    whole, broken = tmp_path / f"whole{ending}", tmp_path / f"broken{ending}"
    tool(made, whole)
    write_part, written = embeddings.write_part, []

    def write_or_die(folder, number, *rest):
        written.append(number)
        if place == "in part 2" and number == 2:
            (folder / "part-000002.parquet.partial").write_bytes(b"PAR1 half")
            raise Killed
        write_part(folder, number, *rest)
        if place == "part 1" and number == 1:
            raise Killed

    def join_or_die(paths, out, about):
        out.write_bytes(b"half")
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(embeddings, "write_part", write_or_die)
        if place == "joined":
            patch.setitem(embeddings.JOINERS, ending, join_or_die)
        if place == "renamed":
            patch.setattr(embeddings.shutil, "rmtree", lambda folder: join_or_die(None, folder / "LOCK", None))
        with pytest.raises(Killed):
            tool(made, broken)
    assert broken.exists() == (place == "renamed")
    written.clear()
    monkeypatch.setattr(embeddings, "write_part", lambda *a: (written.append(a[1]), write_part(*a)))
    tool(made, broken)
    assert written == ([2] if "part" in place else [])  # those that were done stayed
    assert broken.read_bytes() == whole.read_bytes()
    assert not broken.with_name(broken.name + ".parts").exists()


def test_a_part_that_is_damaged_or_follows_a_gap_is_made_anew(made, quick, tmp_path, monkeypatch):
    tool(made, tmp_path / "whole.parquet")
    out = tmp_path / "x.parquet"
    with killed_at(monkeypatch, embeddings, "join"):
        tool(made, out)
    part = embeddings.part_path(tmp_path / "x.parquet.parts", 1)
    part.write_bytes(part.read_bytes()[:-20])
    tool(made, out)
    assert out.read_bytes() == (tmp_path / "whole.parquet").read_bytes()


@pytest.mark.parametrize(
    ("change", "kind", "message", "finished"),
    [
        (["--pool=class_token"], ConfigError, 'pool "patches" then, "class_token" now', False),
        (["--pool=class_token"], ConfigError, 'pool "patches" then, "class_token" now', True),
        (["--block=1"], ConfigError, "block 0 then, 1 now", False),
        (["--normalize", "--dtype=float16"], ConfigError, 'dtype "float32" then, "float16" now, normalize', False),
        (["--crop-fraction=0.5"], ConfigError, "crop_fraction 1.0 then, 0.5 now", False),
        (["--interpolation=nearest"], ConfigError, 'interpolation "bicubic" then, "nearest" now', True),
        ("run", ConfigError, "other weights", True),
        ("images", DataError, "other images", False),
    ],
)
def test_it_does_not_go_on_with_another_run_data_or_options_and_names_them(
    made, quick, tmp_path, monkeypatch, change, kind, message, finished
):
    out = tmp_path / "x.parquet"
    if finished:
        tool(made, out)
    else:
        with killed_at(monkeypatch, embeddings, "join"):
            tool(made, out)
    before = out.read_bytes() if finished else None
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


def test_what_embed_has_not_written_is_never_replaced(made, quick, tmp_path):
    out = tmp_path / "x.parquet"
    out.write_text("mine")
    for options in ([], ["--overwrite"]):
        with pytest.raises(DataError, match="no file of embeddings"):
            tool(made, out, *options)
    assert out.read_text() == "mine"
    (tmp_path / "y.npz.parts").mkdir()
    (tmp_path / "y.npz.parts" / "letters").write_text("mine")
    for options in ([], ["--overwrite"]):
        with pytest.raises(ConfigError, match="a folder that embed has not begun"):
            tool(made, tmp_path / "y.npz", *options)
    assert (tmp_path / "y.npz.parts" / "letters").read_text() == "mine"


def test_two_at_once_are_refused(made, quick, tmp_path):
    folder = tmp_path / "x.npz.parts"
    folder.mkdir()
    with lock_folder(folder), pytest.raises(BusyError):
        tool(made, tmp_path / "x.npz")


def test_unreadable_images_are_named_and_left_out_up_to_a_fraction(made, quick, tmp_path, caplog):
    names = make_images(tmp_path / "images", bad=(3, 17))
    with pytest.raises(DataError, match=r"2 images cannot be read, of at most 1, the last being .*, 'owl/017.png'"):
        tool(made, tmp_path / "x.parquet", data=tmp_path / "images")
    tool(made, tmp_path / "x.parquet", "--max-bad-fraction=0.1", data=tmp_path / "images")
    table = pyarrow.parquet.read_table(tmp_path / "x.parquet")
    assert table.column("name").to_pylist() == [name for n, name in enumerate(names) if n not in (3, 17)]
    assert table.column("index").to_pylist() == [n for n in range(20) if n not in (3, 17)]
    about = about_of(tmp_path / "x.parquet")
    assert (about["left_out"], about["left_out_names"]) == (2, ["cat/003.png", "owl/017.png"])
    assert "cat/003.png" in caplog.text
    make_images(tmp_path / "none", 2, bad=(0, 1))
    with pytest.raises(DataError, match="none of the images can be read"):
        tool(made, tmp_path / "none.npz", "--max-bad-fraction=1", data=tmp_path / "none")


def test_a_fault_that_passes_leaves_no_part_behind(made, quick, tmp_path, monkeypatch):
    read = Folder.__getitem__

    def gone_after_part_0(source, i):
        if i >= 8:
            raise OSError(5, "Input/output error")
        return read(source, i)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "__getitem__", gone_after_part_0)
        with pytest.raises(DataError, match="8 images cannot be read"):
            tool(made, tmp_path / "x.parquet")
    tool(made, tmp_path / "x.parquet")
    assert embeddings.read_listing(tmp_path / "x.parquet").names == made[4]


def test_overwriting_goes_on_and_what_was_there_stays_until_all_is_done(made, quick, tmp_path, monkeypatch):
    out = tmp_path / "x.parquet"
    tool(made, out)
    before, write_part, written = out.read_bytes(), embeddings.write_part, []

    def write_or_die(folder, number, *rest):
        if number == 1 and 1 not in written:
            written.append(1)
            raise Killed
        written.append(number)
        write_part(folder, number, *rest)

    monkeypatch.setattr(embeddings, "write_part", write_or_die)
    with pytest.raises(Killed):
        tool(made, out, "--block=1", "--overwrite")
    assert out.read_bytes() == before
    tool(made, out, "--block=1", "--overwrite")
    assert written == [0, 1, 1, 2]
    assert about_of(out)["block"] == 1


def test_a_limit_takes_images_evenly(made, quick, tmp_path):
    tool(made, tmp_path / "x.npz", "--limit=5")
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["index"].tolist() == [0, 4, 8, 12, 16]
    assert arrays["name"].tolist() == made[4][::4]


@pytest.mark.slow
def test_another_image_size_gives_another_grid_with_positions_resized_to_it(made, tmp_path):
    tool(made, tmp_path / "x.npz", "--limit=5", "--image-size=32,16", "--pool=map")
    model = finished.load_run(made[0], (32, 16))
    images = resized(pixels_of(made[3], made[4][::4]), size=(32, 16), interpolation="bicubic")
    images = normalize(images, **PIXELS)
    expected = jax.jit(model.encoder.apply)({"params": model.params["encoder"]}, images)
    ours = np.load(tmp_path / "x.npz")["embedding"]
    assert ours.shape == (5, 4, 2, 16)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)


def resized(images, **how):
    """And cropped, as the tool does it."""
    return jnp.stack([resize_and_center_crop(Picture(np.asarray(image), 3), **how) for image in images])


def test_digits_need_no_path_and_runs_know_their_own_images(quick, tmp_path):
    own = {"source": "digits", "path": "", "name": "", "data_dir": "", "heldout_fraction": 0.1, "split": "test"}
    workdir, *_ = make_run(tmp_path / "run", data=own, probe_block=1)
    for name, *options in (("given", "digits", "--split=test"), ("own", "")):  # which it was trained on
        embed.run([workdir, *options, str(tmp_path / f"{name}.npz"), "--limit=3"])
    given, own = (dict(np.load(tmp_path / f"{name}.npz")) for name in ("given", "own"))
    np.testing.assert_array_equal(given["embedding"], own["embedding"])
    assert own["name"][0].startswith("digits/")
    assert json.loads(str(own["about"]))["block"] == 1  # what the run's own probes read


def test_numbers_that_a_file_cannot_hold_are_told():
    huge = np.full((2, 3), 1.0, np.float32)
    huge[1, 2] = 1e5
    with pytest.raises(NonFiniteError, match="float16 cannot hold - b"):
        embed.in_dtype(huge, "float16", ["a", "b"])
    huge[1, 2] = np.nan
    with pytest.raises(NonFiniteError, match="not finite - b"):
        embed.in_dtype(huge, "float32", ["a", "b"])


def test_names_that_are_no_utf8_are_written_as_escapes():
    assert embeddings.printable("caf\udce9.jpg") == "caf\\xe9.jpg"
    assert embeddings.printable("über.jpg") == "über.jpg"


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["run", "images"], ConfigError, "arguments are required: OUT"),
        (["run", "images", "x.csv"], ConfigError, "ends in .parquet or .npz"),
        (
            ["run", "images", "caf\udce9.npz"],
            ConfigError,
            r"OUT is caf\\xe9.npz - command line - give a path that is UTF-8",
        ),
        (["run", "images", "x.npz", "--pol=map"], ConfigError, "did you mean --pool"),
        (["run", "images", "x.npz", "--pool=mean"], ConfigError, "unknown pool 'mean'"),
        (["run", "images", "x.npz", "--dtype=int8"], ConfigError, "unknown dtype 'int8'"),
        (["run", "images", "x.npz", "--image_size=0"], ConfigError, "--image-size=0"),
        (["run", "images", "x.npz", "--batch-size=0"], ConfigError, "at least 1"),
        (["run", "images", "x.npz", "--threads=-1"], ConfigError, "at least 0"),
        (["run", "images", "x.npz", "--max-bad-fraction=2"], ConfigError, "one of 0 to 1"),
        (["run", "images", "x.npz", "--crop-fraction=0"], ConfigError, "one above 0, up to 1"),
        (
            ["run", "images", "x.npz", "--interpolation=cubic"],
            ConfigError,
            "unknown interpolation 'cubic' - did you mean",
        ),
        (["run", "images", "x.npz", "--split=val"], DataError, "0 of its 20 .* 'val' - .* - leave --split out"),
        (["nothing", "images", "x.npz"], CheckpointError, "no such folder"),
        (["run", "nothing", "x.npz"], DataError, "nothing does not exist"),
        (["run", "", "x.npz"], DataError, "the run says of none"),
        (["run", "images", "x.npz", "--block=3"], ConfigError, "block 3 of an encoder of 2 blocks"),
        (["run", "images", "x.npz", "--image-size=12"], ConfigError, "give multiples of 8"),
        (["run", "images", "run/config.json/x.npz"], DataError, "cannot read or write: "),
    ],
)
def test_a_mistake_is_told_in_one_line(made, tmp_path, monkeypatch, arguments, kind, message):
    (tmp_path / "run").symlink_to(made[0])
    (tmp_path / "images").symlink_to(made[3])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as told:
        embed.run(arguments)
    assert type(told.value) is kind
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*.npz*"))


def test_help_and_mistakes_are_told_without_importing_jax():
    line = "import sys; from simmim_jax.tools import embed, map, predict; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", line], cwd=ROOT, check=True, timeout=60)


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_same_command_goes_on(made, tmp_path):
    arguments = [made[0], made[3], tmp_path / "x.npz", "--batch-size=8"]
    full = run(*arguments, script=TOOL, file_limit=1)
    assert full.returncode == 3, full.stderr
    assert full.stderr.splitlines()[-1].startswith("ERROR[data] cannot read or write: ")
    assert "Traceback" not in full.stderr
    assert run(*arguments, script=TOOL).returncode == 0
    tool(made, tmp_path / "unbroken.npz")
    np.testing.assert_allclose(
        np.load(tmp_path / "x.npz")["embedding"], np.load(tmp_path / "unbroken.npz")["embedding"], rtol=1e-5, atol=1e-6
    )


@pytest.mark.slow
def test_after_kill_9_the_same_command_ends_with_the_same_bytes_and_eight_devices_give_the_same_numbers(made, tmp_path):
    make_images(tmp_path / "images", 300, size=(64, 64))
    line = "import sys; from simmim_jax.tools import embed; embed.PART_ROWS = 8; embed.run(sys.argv[1:])"

    def start(out, devices=1):
        arguments = [made[0], tmp_path / "images", tmp_path / out, "--batch-size=8"]
        whole, options = command(*arguments, devices=devices, script=("-c", line))
        return subprocess.Popen(whole, stderr=subprocess.PIPE, **options)

    assert start("whole.parquet").wait(100) == 0
    kills = 0
    for parts in (1, 9, 20, 37):  # SIGKILL as soon as so many parts are there
        child = start("x.parquet")
        while child.poll() is None and len(list((tmp_path / "x.parquet.parts").glob("*.parquet"))) < parts:
            time.sleep(0.001)
        child.send_signal(signal.SIGKILL)
        kills += child.wait() == -signal.SIGKILL
    assert kills >= 2
    assert start("x.parquet").wait(100) == 0
    assert (tmp_path / "x.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()
    assert start("eight.parquet", devices=8).wait(100) == 0
    tables = [pyarrow.parquet.read_table(tmp_path / f"{name}.parquet") for name in ("whole", "eight")]
    assert tables[0].column("name") == tables[1].column("name")
    numbers = [np.array(table.column("embedding").to_pylist()) for table in tables]
    np.testing.assert_allclose(*numbers, rtol=1e-5, atol=1e-6)  # one image on a device is summed otherwise than eight


def test_these_tests_run_on_eight_devices():
    assert jax.device_count() == 8
