"""A loaded run: its weights, its image size, and which images it is shown."""

import json
import shutil

import jax
import numpy as np
import pytest
from tiny_trained import make_images, make_run

from simmim_jax import data
from simmim_jax.data.decode import MAX_PIXELS
from simmim_jax.errors import DataError
from simmim_jax.models import make_encoder
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.tools import images


def make_described(folder, image_size=(64, 64), **config):
    """A run without weights."""
    return Run({}, config, None, folder, image_size)


def own_data(path):
    return {"source": "auto", "path": str(path), "name": "", "data_dir": "", "split": "train", "heldout_fraction": 0.3}


def names(source):
    return {source.name(i) for i in range(len(source))}


def test_weights_and_step_are_of_one_checkpoint_also_if_the_run_saves_another_meanwhile(tmp_path, monkeypatch):
    workdir, _, params = make_run(tmp_path / "run")
    read = checkpoint.read_params

    def read_while_saving(path):
        found = read(path)
        (tmp_path / "run" / "checkpoints" / "9").mkdir()
        return found

    monkeypatch.setattr(checkpoint, "read_params", read_while_saving)
    run = load_run(workdir)
    assert run.step == 7
    jax.tree.map(np.testing.assert_array_equal, run.params, params)
    assert repr(run) == f"Run(vit at 16 pixels, {workdir}/checkpoints/7)"


def test_swin_v2_at_another_size_measures_displacements_by_the_windows_of_its_run(tmp_path, monkeypatch):
    encoder = {"name": "swinv2", "size": "t", "width": 8, "depths": (1, 1), "num_heads": (1, 2), "window": 8}
    shape = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    abstract = jax.eval_shape(make_encoder(**encoder).init, jax.random.key(0), shape)["params"]
    params = {"encoder": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract)}
    config = {"encoder": encoder, "image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setattr(checkpoint, "find_step", lambda run, **_: tmp_path / "7")
    monkeypatch.setattr(checkpoint, "read_params", lambda run: (params, json.loads(json.dumps(config))))
    assert load_run("run").encoder.pretrained_windows == ()
    assert load_run("run", (64, 64)).encoder.pretrained_windows == (8, 4)
    encoder["pretrained_windows"] = (6, 3)
    assert load_run("run", (64, 64)).encoder.pretrained_windows == (6, 3)


@pytest.fixture
def divided(tmp_path):
    """A run that was trained on a part of the 60 images in tmp_path/"images", with their fingerprint."""
    make_images(tmp_path / "images", 60)
    run = make_described(tmp_path / "7", data=own_data(f"{tmp_path}/7/../images/"))
    (tmp_path / "7" / "meta").mkdir(parents=True)
    saved = {"data": {"source": images.open_training_images(run).fingerprint()}}
    (tmp_path / "7" / "meta" / "metadata").write_text(json.dumps(saved))
    return run


def test_held_out_images_are_the_same_by_the_run_by_path_and_after_a_move(divided, tmp_path):
    train, test = (names(images.open_source(divided, "", split)) for split in ("train", "test"))
    assert not train & test
    assert len(train | test) == 60
    path = str(tmp_path / "images")
    assert names(images.open_source(divided, path, "test")) == test
    assert images.source_options(divided, path, 0.0, as_divided=False)["heldout_fraction"] == 0.0
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    followed = images.follow_images(divided, str(moved))
    assert names(images.open_source(followed, str(moved), "test", 0.0)) == test
    (moved / "owl" / "another.png").write_bytes((moved / "owl" / "059.png").read_bytes())
    assert images.follow_images(divided, str(moved)) is divided  # other images
    assert images.follow_images(divided, str(tmp_path / "nowhere")) is divided


def test_images_that_a_run_was_trained_on_are_recognized_in_another_folder(divided, tmp_path):
    part = tmp_path / "part"
    for name in sorted(names(images.open_training_images(divided)))[::4]:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "images" / name, part / name)
    make_images(tmp_path / "others", 60, size=(8, 8))  # of the same names
    part, others = (
        data.make_source("folder", path=str(tmp_path / name), heldout_fraction=0.0) for name in ("part", "others")
    )
    assert images.seen_in_training(divided, part).rpartition(" ")[2] in names(part)
    assert images.seen_in_training(divided, others) == ""
    shutil.rmtree(tmp_path / "images")
    assert "are gone" in images.seen_in_training(divided, part)
    assert images.seen_in_training(divided._replace(config=divided.config | {"classes": ["hen"]}), part) == ""


def test_a_relative_path_that_does_not_exist_here_is_refused(tmp_path, monkeypatch):
    make_images(tmp_path / "images", 1)
    paths = ("images", "images/{split}", "images/*.tar")
    monkeypatch.chdir(tmp_path)
    runs = [make_described(tmp_path, data=own_data(path)) for path in paths]
    assert [images.source_options(run, "")["path"] for run in runs] == list(paths)
    monkeypatch.chdir("/")
    for run in runs:
        with pytest.raises(DataError, match="--data"):
            images.source_options(run, "")


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_label_maps_are_not_read_as_images(tmp_path, layout):
    for name in ("imgs", "Masks"):
        make_images(tmp_path / layout.format(name), 3, classes=())
    with pytest.raises(DataError, match=f"give {tmp_path}/{layout.format('imgs')}"):
        images.open_source(make_described(tmp_path), str(tmp_path), "train", 0.0)


def test_a_pass_takes_max_pixels_from_the_run_and_up_to_16_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "cores", lambda: 96)
    assert [images.make_loading(threads).threads for threads in (None, 0)] == [16, 0]
    for config, expected in (({"data": {"max_pixels": 99}}, 99), ({}, MAX_PIXELS)):
        assert images.make_crop(make_described(tmp_path, mean=(0,), **config)).max_pixels == expected


def test_the_first_readable_image_decides_whether_images_have_labels():
    class Broken(list):
        def __getitem__(self, i):
            if i == 0:
                raise OSError
            return super().__getitem__(i)

    assert images.has_labels(Broken([{"label": -1}, {"label": 3}]))
    assert not images.has_labels(Broken([{"label": 3}, {"label": -1}]))


def test_crops_are_the_runs_and_for_an_import_those_of_the_official_code(tmp_path):
    assert make_described(tmp_path, data={"crop_fraction": 0.9}).crop_fraction == 0.9
    assert make_described(tmp_path, data={"path": "DIR"}).crop_fraction == 1.0
    assert make_described(tmp_path, (224, 224)).crop_fraction == 0.875
    assert make_described(tmp_path, (32, 32)).crop_fraction == 1.0
    assert make_described(tmp_path).interpolation == "bicubic"
