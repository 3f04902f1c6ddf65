"""A run opened for use: one checkpoint's weights and step, the windows it was trained with, its own images apart."""

import json

import jax
import numpy as np
import pytest
from tiny_trained import make_images, make_run

from simmim_jax import checkpoint, trained
from simmim_jax.models import make_encoder


def described(folder, image_size=(64, 64), **config):
    """What is opened of a run, without weights."""
    return trained.Trained({}, config, None, folder, image_size)


def test_weights_and_step_are_of_one_checkpoint_also_while_the_run_saves_another(tmp_path, monkeypatch):
    workdir, _, params = make_run(tmp_path / "run")
    read = checkpoint.read_params

    def read_while_saving(path):
        found = read(path)
        (tmp_path / "run" / "checkpoints" / "9").mkdir()
        return found

    monkeypatch.setattr(checkpoint, "read_params", read_while_saving)
    opened = trained.open_trained(workdir)
    assert opened.step == 7
    jax.tree.map(np.testing.assert_array_equal, opened.params, params)


def test_a_swin_v2_at_another_size_measures_displacements_by_the_windows_of_its_run(tmp_path, monkeypatch):
    encoder = {"name": "swinv2", "size": "t", "width": 8, "depths": (1, 1), "stage_heads": (1, 2), "window": 8}
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(make_encoder(**encoder).init, jax.random.key(0), images)["params"]
    params = {"encoder": jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)}
    config = {"encoder": encoder, "image_size": (32, 32), "mean": (0.5,) * 3, "std": (0.2,) * 3}
    monkeypatch.setattr(checkpoint, "find_step", lambda run: tmp_path / "7")
    monkeypatch.setattr(checkpoint, "read_params", lambda run: (params, json.loads(json.dumps(config))))
    assert trained.open_trained("run").encoder.pretrained_windows == ()
    assert trained.open_trained("run", (64, 64)).encoder.pretrained_windows == (8, 4)
    encoder["pretrained_windows"] = (6, 3)
    assert trained.open_trained("run", (64, 64)).encoder.pretrained_windows == (6, 3)


@pytest.mark.parametrize("by_path", [True, False])
def test_the_images_that_a_run_held_out_are_held_out_again_also_where_its_folder_is_given(tmp_path, by_path):
    make_images(tmp_path / "images", 60)
    own = {"source": "auto", "path": f"{tmp_path}/run/../images/", "name": "", "data_dir": "", "heldout_fraction": 0.3}
    (tmp_path / "run").mkdir()
    model = described(tmp_path / "run", data=own)
    path = str(tmp_path / "images") if by_path else ""
    sides = [trained.open_source(model, path, split, heldout_fraction=0.1) for split in ("train", "test")]
    train, test = ({side.name(i) for i in range(len(side))} for side in sides)
    seen = trained.open_source(model, "", "train")
    assert train == {seen.name(i) for i in range(len(seen))}
    assert not train & test
    assert len(train | test) == 60
    options = trained.source_options(model, str(tmp_path / "images"), 0.0, as_divided=False)
    assert options["heldout_fraction"] == 0.0


def test_images_are_cropped_as_in_the_run_and_those_for_an_import_as_official_code_has_it(tmp_path):
    assert described(tmp_path, data={"crop_fraction": 0.9, "interpolation": "bilinear"}).crop_fraction == 0.9
    assert described(tmp_path, data={"path": "DIR"}).crop_fraction == 1.0
    assert described(tmp_path, (224, 224)).crop_fraction == 0.875
    assert described(tmp_path, (32, 32)).crop_fraction == 1.0
    assert described(tmp_path).interpolation == "bicubic"
