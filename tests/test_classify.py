"""Classification: which features are read, and images that are erased and mixed in the step."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import random_params, tiny_batch

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective, mixing
from simmim_jax.objectives.features import make_all_features, make_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.train_step import mean_grads

PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
SIZE, CLASSES, BATCH = (16, 16), 5, 8
KEY = jax.random.key(7)
MIXING = {"mixup": 0.8, "cutmix": 1.0, "reprob": 0.5}


def tiny_encoder(**options):
    return make_encoder("vit", None, **{"width": 8, "depth": 2, "num_heads": 2, "patch_size": 4, **options})


def classifier(encoder=None, **options):
    options = {"image_size": SIZE, "num_classes": CLASSES, **PIXELS, **options}
    return make_objective("classify", encoder or tiny_encoder(), **options)


@pytest.fixture(scope="module")
def batch():
    drawn = tiny_batch(BATCH, (*SIZE, 3))
    return drawn | {"label": drawn["label"] % CLASSES}


@pytest.fixture(scope="module")
def params():
    return jax.jit(classifier().init)(jax.random.key(0))


def loss(objective, params, batch, train=True):
    return float(jax.jit(lambda *x: objective.loss_fn(*x, KEY, train)[0])(params, objective.prepare(batch)))


def test_mixing_affects_training_only(batch, params):
    plain, mixed = classifier(), classifier(**MIXING)
    assert loss(plain, params, batch) != loss(mixed, params, batch)
    assert loss(plain, params, batch, train=False) == loss(mixed, params, batch, train=False)


def test_a_mixed_image_is_trained_for_both_classes(batch, params):
    """The loss equals that of images and targets mixed by hand with the same draws."""
    smoothing = 0.1
    objective = classifier(mixup=0.8, label_smoothing=smoothing)
    _, mix_key = jax.random.split(jax.random.fold_in(KEY, 1))
    index = batch["batch_index"]
    weight = float(mixing.draw_mix(mix_key, index, index[::-1], SIZE, mixing.Mixing(mixup=0.8)).weight[0])
    assert 0 < weight < 1
    images = normalize(batch["image"], **PIXELS)
    mixed = weight * images + (1 - weight) * images[::-1]
    pooled, _ = make_features(tiny_encoder(), **PIXELS)(params["encoder"], mixed, True, KEY, index)
    kernel, bias = (params["head"]["logits"][name] for name in ("kernel", "bias"))
    logs = jax.nn.log_softmax(pooled @ kernel + bias)
    hot = np.full((BATCH, CLASSES), smoothing / CLASSES)
    hot[np.arange(BATCH), batch["label"]] += 1 - smoothing
    expected = -((weight * hot + (1 - weight) * hot[::-1]) * logs).sum(axis=1).mean()
    np.testing.assert_allclose(loss(objective, params, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["batch", pytest.param("elem", marks=pytest.mark.slow)])
def test_loss_and_gradient_of_a_mixed_batch_do_not_depend_on_microbatches(mode, batch, params):
    objective = classifier(**MIXING, mixup_mode=mode)
    grads = partial(mean_grads, key=KEY, loss_fn=objective.loss_fn)
    prepared = objective.prepare(batch)
    whole, parts = (jax.jit(partial(grads, microbatches=count))(params, prepared) for count in (1, 4))
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole[2], parts[2])


@pytest.mark.parametrize(
    ("pool", "scan"), [("both", True), pytest.param("patches", False, marks=pytest.mark.slow), ("class_token", False)]
)
def test_one_pass_gives_the_features_of_every_block(pool, scan, batch):
    encoder = tiny_encoder(scan=scan)
    params = jax.jit(encoder.init)(jax.random.key(1), normalize(batch["image"], **PIXELS))["params"]
    together = make_all_features(encoder, **PIXELS, pool=pool)(params, batch["image"])
    assert sorted(together) == [0, 1, 2]
    for block, features in together.items():
        single, _ = make_features(encoder, **PIXELS, block=block, pool=pool)(params, batch["image"])
        assert single.shape == (BATCH, 16 if pool == "both" else 8)
        np.testing.assert_allclose(features, single, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[2])  # the final norm is between them


def test_a_classifier_that_pools_the_class_token_trains_it(batch):
    objective = classifier(tiny_encoder(depth=1), pool="class_token")
    params = random_params(jax.eval_shape(objective.init, KEY))
    grads = jax.jit(jax.grad(lambda params: objective.loss_fn(params, batch, KEY, False)[0]))(params)
    assert np.abs(grads["encoder"]["cls_token"]).max() > 0


def test_partners_are_found_by_batch_index_in_any_order_of_rows(batch):
    order = np.array([0, 2, 1, 3, 5, 7, 4, 6])  # as from two processes with two shards each
    moved = {name: x[order] for name, x in batch.items()}
    prepared = classifier(mixup=1.0).prepare(moved)
    np.testing.assert_array_equal(prepared["partner_batch_index"], BATCH - 1 - order)
    for name in ("image", "label"):
        np.testing.assert_array_equal(prepared[f"partner_{name}"], batch[name][BATCH - 1 - order])
    prepared = classifier(mixup=1.0, mixup_group=4).prepare(moved)
    np.testing.assert_array_equal(prepared["partner_batch_index"], order // 4 * 4 + 3 - order % 4)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"mixup": -1.0}, "mixup"),
        ({"pool": "cls"}, "unknown pool 'cls'"),
        ({"encoder": tiny_encoder(class_token=False), "pool": "both"}, "without a class token"),
        ({"num_classes": 1}, "objective.num_classes"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"image_size": (16, 18)}, "try 16 or 20"),
        ({"mixup_probability": 0.5}, "did you mean mixup_prob"),
    ],
)
def test_invalid_options_are_refused(options, hint):
    with pytest.raises(ConfigError, match=hint):
        classifier(**options)
