"""The examples of docs/extending.md run: each is registered by one line and obeys its contract."""

import importlib.util
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PIXELS, tiny_batch

from simmim_jax import data
from simmim_jax.data.sources import SOURCES, Source
from simmim_jax.evals import EVALUATORS, Evaluator, make_evaluator
from simmim_jax.masking import MASKS, make_masks
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.objectives import OBJECTIVES, make_objective

PAGE = Path(__file__).parent.parent / "docs" / "extending.md"
KEY = jax.random.key(0)


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The modules of the page's code blocks, by the names of their files."""
    folder, modules = tmp_path_factory.mktemp("toys"), {}
    for name, code in re.findall(r"```python\n# \w+(?:/\w+)*/(\w+)\.py\n(.*?)```", PAGE.read_text(), flags=re.S):
        path = folder / f"{name}.py"
        path.write_text(code)
        spec = importlib.util.spec_from_file_location(f"toy_{name}", path)
        modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    assert len(modules) == 5
    return SimpleNamespace(**modules)


def test_the_encoder_learns_under_simmim_with_the_mask(toys, monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", (toys.toy.Toy, toys.toy.SIZES))
    monkeypatch.setitem(MASKS, "checkerboard", toys.checkerboard.mask_checkerboard)
    encoder = make_encoder("toy", "s", width=8)
    objective = make_objective("simmim", encoder, **PIXELS, mask="checkerboard", mask_patch_size=8, mask_ratio=0.5)
    params = jax.jit(objective.init)(KEY)
    loss = jax.jit(lambda params: objective.loss_fn(params, tiny_batch(4), KEY, True)[0])
    grads = jax.jit(jax.grad(lambda params: objective.loss_fn(params, tiny_batch(4), KEY, True)[0]))(params)
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    assert loss(jax.tree.map(lambda x, g: x - 0.01 * g, params, grads)) < loss(params)
    paths = ("patch_embed/kernel", "conv/bias", "norm/scale")
    assert [encoder.layer_id(path) for path in paths] == [0, 1, encoder.depth + 1]
    masks = make_masks("checkerboard", image_size=(32, 48), token_stride=8, mask_patch_size=8, mask_ratio=0.5)
    drawn = np.asarray(masks(KEY, jnp.arange(8)))
    assert (drawn.sum(axis=(1, 2)) == 12).all()
    assert not (drawn[:, 1:] & drawn[:, :-1]).any()


def test_the_objective_has_a_loss_and_a_prediction(toys, monkeypatch):
    monkeypatch.setitem(ENCODERS, "toy", (toys.toy.Toy, toys.toy.SIZES))
    monkeypatch.setitem(OBJECTIVES, "color", (toys.color.make_color, toys.color.Options))
    objective = make_objective("color", make_encoder("toy", "s", width=8), **PIXELS, block=1)
    params, batch = jax.jit(objective.init)(KEY), tiny_batch(4)
    loss, grads = jax.jit(jax.value_and_grad(lambda params: objective.loss_fn(params, batch, KEY, True)[0]))(params)
    assert loss > 0
    assert jnp.abs(grads["head"]).max() > 0
    out = objective.predict(params, batch, KEY)
    assert set(out) == set(objective.outputs)
    assert out["color"].shape == (4, 3)
    assert set(objective.online_probes) <= set(objective.evals) <= set(EVALUATORS)


def test_the_evaluator_measures(toys, monkeypatch):
    monkeypatch.setitem(EVALUATORS, "spread", Evaluator(toys.spread.make_spread, ("features",), train_passes=1))
    heldout = np.array([[0.0, 1.0], [2.0, 3.0]])
    run = make_evaluator("spread", {"features": lambda state: SimpleNamespace(heldout=heldout)}, scale=2.0)
    assert run(None) == {"spread": 2.0}


def test_the_source_feeds_batches(toys, monkeypatch):
    monkeypatch.setitem(SOURCES, "noise", toys.noise.make_noise)
    source = data.make_source("noise", split="train")
    assert isinstance(source, Source)
    crop = data.CenterCrop(image_size=(32, 32), channels=3)
    (batch,) = list(data.make_epoch(source, crop=crop, batch_size=64))
    np.testing.assert_array_equal(batch["image"][5], source[5]["image"])
    assert batch["valid"].all()
    assert not data.share_images(source, data.make_source("noise", split="test"))
