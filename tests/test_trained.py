"""A run opened for use: one checkpoint's weights and step, the windows it was trained with, its own images apart."""

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
from simmim_jax.runs import checkpoint, finished


def described(folder, image_size=(64, 64), **config):
    """What is opened of a run, without weights."""
    return finished.Run({}, config, None, folder, image_size)


def test_weights_and_step_are_of_one_checkpoint_also_while_the_run_saves_another(tmp_path, monkeypatch):
    workdir, _, params = make_run(tmp_path / "run")
    read = checkpoint.read_params

    def read_while_saving(path):
        found = read(path)
        (tmp_path / "run" / "checkpoints" / "9").mkdir()
        return found

    monkeypatch.setattr(checkpoint, "read_params", read_while_saving)
    opened = finished.load_run(workdir)
    assert opened.step == 7
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)


def test_a_swin_v2_at_another_size_measures_displacements_by_the_windows_of_its_run(tmp_path, monkeypatch):
    encoder = {"name": "swinv2", "size": "t", "width": 8, "depths": (1, 1), "num_heads": (1, 2), "window": 8}
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(make_encoder(**encoder).init, jax.random.key(0), images)["params"]
    params = {"encoder": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}
    config = {"encoder": encoder, "image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setattr(checkpoint, "find_step", lambda run: tmp_path / "7")
    monkeypatch.setattr(checkpoint, "read_params", lambda run: (params, json.loads(json.dumps(config))))
    assert finished.load_run("run").encoder.pretrained_windows == ()
    assert finished.load_run("run", (64, 64)).encoder.pretrained_windows == (8, 4)
    encoder["pretrained_windows"] = (6, 3)
    assert finished.load_run("run", (64, 64)).encoder.pretrained_windows == (6, 3)


@pytest.mark.parametrize("by_path", [True, False])
def test_the_images_that_a_run_held_out_are_held_out_again_also_where_its_folder_is_given(tmp_path, by_path):
    make_images(tmp_path / "images", 60)
    own = {"source": "auto", "path": f"{tmp_path}/run/../images/", "name": "", "data_dir": "", "heldout_fraction": 0.3}
    (tmp_path / "run").mkdir()
    model = described(tmp_path / "run", data=own)
    path = str(tmp_path / "images") if by_path else ""
    sides = [finished.open_source(model, path, split, heldout_fraction=0.1) for split in ("train", "test")]
    train, test = ({side.name(i) for i in range(len(side))} for side in sides)
    seen = finished.open_source(model, "", "train")
    assert train == {seen.name(i) for i in range(len(seen))}
    assert not train & test
    assert len(train | test) == 60
    options = finished.source_options(model, str(tmp_path / "images"), 0.0, as_divided=False)
    assert options["heldout_fraction"] == 0.0


def own_data(path):
    return {"source": "auto", "path": str(path), "name": "", "data_dir": "", "split": "train", "heldout_fraction": 0.3}


def names_of(source):
    return {source.name(i) for i in range(len(source))}


@pytest.fixture
def divided(tmp_path):
    """A run that was trained on a part of 60 images in tmp_path/"images", as its checkpoint tells."""
    make_images(tmp_path / "images", 60)
    model = described(tmp_path / "7", data=own_data(tmp_path / "images"))
    (tmp_path / "7" / "meta").mkdir(parents=True)
    kept = {"data": {"source": finished.training_images(model).fingerprint()}}
    (tmp_path / "7" / "meta" / "metadata").write_text(json.dumps(kept))
    return model


def test_the_images_that_a_run_held_out_are_held_out_again_where_its_folder_was_moved(divided, tmp_path):
    sides = [names_of(finished.open_source(divided, "", split)) for split in ("train", "test")]
    moved = (tmp_path / "images").rename(tmp_path / "moved")
    there = finished.follow_images(divided, str(moved))
    assert [names_of(finished.open_source(there, str(moved), split, 0.0)) for split in ("train", "test")] == sides
    (moved / "owl" / "another.png").write_bytes((moved / "owl" / "059.png").read_bytes())
    assert finished.follow_images(divided, str(moved)) is divided  # other images, or more
    assert finished.follow_images(divided, str(tmp_path / "nowhere")) is divided


def test_images_that_a_run_was_trained_on_are_known_in_another_folder_and_told_where_that_cannot_be(divided, tmp_path):
    part = tmp_path / "part"
    for name in sorted(names_of(finished.training_images(divided)))[::4]:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "images" / name, part / name)
    make_images(tmp_path / "others", 60, size=(8, 8))  # of the same names
    sources = {name: data.make_source("folder", path=str(tmp_path / name), heldout_fraction=0.0)
               for name in ("part", "others")}  # fmt: skip
    told = finished.seen_in_training(divided, sources["part"])
    assert told.rpartition("these images, like ")[2] in names_of(sources["part"])
    assert finished.seen_in_training(divided, sources["others"]) == ""
    shutil.rmtree(tmp_path / "images")
    assert "cannot be known: its own, " in finished.seen_in_training(divided, sources["part"])
    other_classes = divided._replace(config=divided.config | {"classes": ["hen", "fox"]})
    assert finished.seen_in_training(other_classes, sources["part"]) == ""


def test_images_of_a_run_by_a_relative_path_are_asked_for_where_they_are_not(tmp_path, monkeypatch):
    make_images(tmp_path / "images", 6)
    paths = ("images", "images/{split}", "images/*.tar")
    models = [described(tmp_path, data=own_data(path)) for path in paths]
    monkeypatch.chdir(tmp_path)
    assert [finished.source_options(model, "")["path"] for model in models] == list(paths)
    monkeypatch.chdir("/")
    for model in models:
        with pytest.raises(DataError, match=r"as seen from where it was started, .* - / - give them \(--data=DIR\)"):
            finished.source_options(model, "")


@pytest.mark.parametrize("layout", ["{}", "train/{}"])
def test_label_maps_are_not_taken_for_images(tmp_path, layout):
    for name in ("imgs", "Masks"):
        make_images(tmp_path / layout.format(name), 3, classes=())
    with pytest.raises(DataError, match=rf"give {tmp_path}/{layout.format('imgs')} alone"):
        finished.open_source(described(tmp_path), str(tmp_path), "train", 0.0)


def test_a_pass_has_the_largest_image_of_its_run_and_all_cores_up_to_16(tmp_path, monkeypatch):
    make_epoch, seen = data.make_epoch, []
    monkeypatch.setattr(
        data, "make_epoch", lambda _, crop, **options: seen.append((crop, options)) or make_epoch([], crop, **options)
    )
    monkeypatch.setattr(data, "cores", lambda: 96)
    for config, threads in (({"data": {"max_pixels": 99}}, None), ({}, 0)):
        model = described(tmp_path, mean=(0,), **config)
        finished.make_pass(model, [], finished.sharding.make_mesh(), threads=threads)
    assert [(crop.max_pixels, options["loading"].threads) for crop, options in seen] == [(99, 16), (MAX_PIXELS, 0)]


def test_labels_are_those_of_the_first_image_that_can_be_read():
    class Broken(list):
        def __getitem__(self, i):
            if i == 0:
                raise OSError
            return super().__getitem__(i)

    assert finished.has_labels(Broken([{"label": -1}, {"label": 3}]))
    assert not finished.has_labels(Broken([{"label": 3}, {"label": -1}]))


def test_images_are_cropped_as_in_the_run_and_those_for_an_import_as_official_code_has_it(tmp_path):
    assert described(tmp_path, data={"crop_fraction": 0.9, "interpolation": "bilinear"}).crop_fraction == 0.9
    assert described(tmp_path, data={"path": "DIR"}).crop_fraction == 1.0
    assert described(tmp_path, (224, 224)).crop_fraction == 0.875
    assert described(tmp_path, (32, 32)).crop_fraction == 1.0
    assert described(tmp_path).interpolation == "bicubic"
