"""automatic.py: values for the fields that a recipe leaves open, from the data and the machine."""

import json

import numpy as np
import pytest
from PIL import Image

from simmim_jax import automatic, train
from simmim_jax.config import load
from simmim_jax.experiment import fill_in, make_experiment, with_settings
from simmim_jax.models import ENCODERS, make_encoder

FACTS = automatic.Facts(
    images=100, classes=7, on_cpu=False, batch_unit=1, sizes=("s",), saved={}, init_from={}, token_stride=None
)


def chosen(images=1000, classes=3, on_cpu=True, name="folder_vit_small", **settings):
    config = with_settings(load(f"configs/{name}.py"), settings)
    return fill_in(config, "", images=images, classes=classes, on_cpu=on_cpu)


@pytest.mark.parametrize("images", [1, 7, 40, 250, 10_000, 1_300_000])
@pytest.mark.parametrize("on_cpu", [True, False])
def test_every_choice_gives_a_run_that_fits_the_data(images, on_cpu):
    config = chosen(images, on_cpu=on_cpu)
    units = 8  # devices of the tests
    assert config.batch_size % units == 0
    assert config.batch_size == units or config.batch_size <= images / 4
    steps = config.epochs * (images // config.batch_size)
    assert images < units or steps > 100
    assert 3e-4 < config.optim.learning_rate < 3e-3
    height, width = config.image_size
    assert config.objective.mask_patch_size <= min(height, width) / 4


def test_given_fields_are_kept_and_the_others_follow_them():
    config = chosen(**{"batch_size": 64, "image_size": (96, 96), "encoder.size": "s", "epochs": 3.0})
    assert (config.batch_size, config.image_size, config.encoder.size, config.epochs) == (64, (96, 96), "s", 3.0)
    assert config.encoder.patch_size is None
    assert config.objective.mask_patch_size == 16
    assert config.eval_batch_size == 64


@pytest.mark.parametrize("size", [(64, 64), (224, 224), (192, 96), (48, 80)])
@pytest.mark.parametrize("encoder", [("vit", {"patch_size": 8}), ("swin", {}), ("resnet", {})])
def test_mask_patches_divide_the_image_and_are_tokens(size, encoder):
    name, options = encoder
    stride = make_encoder(name, next(iter(ENCODERS[name][1])), **options).token_stride
    config = chosen(**{"image_size": size, "encoder.name": name} | {f"encoder.{k}": v for k, v in options.items()})
    patch = config.objective.mask_patch_size
    assert patch % stride == 0
    assert all(side % patch == 0 for side in size)
    assert patch <= max(min(size) / 4, stride)


def test_longer_runs_get_lower_rates():
    rates = [automatic.RULES["base_learning_rate"](
        {"batch_size": 512, "steps": steps, "epochs": 0}, FACTS._replace(images=512)
    )["base_learning_rate"][0] for steps in (100, 1_000, 10_000, 100_000, 10**6)]  # fmt: skip
    assert rates == sorted(rates, reverse=True)
    assert rates[0] == rates[1] == 2e-3
    assert rates[-1] == rates[-2] == 4e-4


def test_recipes_without_open_fields_are_unchanged():
    config = load("configs/digits_vit_tiny.py")
    assert fill_in(config, "", images=10, classes=2, on_cpu=True) is config


def test_classes_come_from_the_data_and_the_image_size_from_init_from():
    config = chosen(classes=7, name="folder_finetune", **{"encoder.name": "vit", "encoder.size": "ti"})
    assert config.objective.num_classes == 7
    assert config.image_size == (224, 224)
    facts = FACTS._replace(init_from={"image_size": [64, 32]})
    assert automatic.choose({"image_size": None}, facts)["image_size"][0] == (64, 32)


def test_workdir_keeps_its_choices_when_images_are_added():
    facts = FACTS._replace(saved={"batch_size": 8, "epochs": 9.0, "image_size": [32, 32]})
    choices = automatic.choose({"batch_size": None, "epochs": None, "image_size": None}, facts)
    assert [choices[name][0] for name in ("batch_size", "epochs", "image_size")] == [8, 9.0, (32, 32)]


def test_eight_images_or_a_quarter_are_held_out_by_default(tmp_path):
    for count, least in ((12, 3), (20, 5), (60, 8), (250, 8)):
        folder = tmp_path / str(count)
        folder.mkdir()
        for n in range(count):
            Image.fromarray(np.full((40, 40, 3), n, np.uint8)).save(folder / f"{n}.png")
        made = make_experiment(with_settings(load("configs/folder_vit_small.py"), {
            "data.path": str(folder), "encoder.depth": 1,
        }))  # fmt: skip
        assert len(made.heldout) >= least
        assert len(made.heldout) + len(made.source) == count
        assert len(made.heldout) <= max(count / 4, least) + 3


def test_run_with_chosen_fields_resumes_and_is_extended(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(40):
        Image.fromarray(np.full((70, 80, 3), 5 * n, np.uint8)).save(images / f"{n}.png")
    settings = {"data.path": str(images), "encoder.depth": 1, "encoder.width": 24, "steps": 2}

    def run(extend=False, **changes):
        config = with_settings(load("configs/folder_vit_small.py"), settings | changes)
        workdir = str(tmp_path / "run")
        return train.train(make_experiment(config, workdir, extend=extend), workdir)

    assert run()["step"] == 2
    assert run(steps=3, extend=True)["step"] == 3
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (saved["encoder"]["patch_size"], saved["image_size"]) == (8, [64, 64])
