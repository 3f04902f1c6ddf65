"""Classification: what of the encoder is read, and training images that are erased and mixed in the step."""

from functools import partial

import jax
import numpy as np
import pytest
from tiny import tiny_batch

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective, mixing
from simmim_jax.objectives.features import POOLS, make_all_features, make_features
from simmim_jax.objectives.pixels import normalize
from simmim_jax.train_step import mean_grads

PIXELS = {"mean": (0.4, 0.5, 0.6), "std": (0.2, 0.3, 0.4)}
SIZE, CLASSES, BATCH = (16, 16), 5, 8
KEY = jax.random.key(7)
MIXING = {"mixup": 0.8, "cutmix": 1.0, "erase": 0.5}


def tiny_encoder(**options):
    return make_encoder("vit", None, **{"width": 8, "depth": 2, "num_heads": 2, "patch_size": 4, **options})


def classifier(encoder=None, **options):
    encoder = encoder or tiny_encoder()
    return make_objective("classify", encoder, image_size=SIZE, num_classes=CLASSES, **PIXELS, **options)


@pytest.fixture(scope="module")
def batch():
    drawn = tiny_batch(BATCH, (*SIZE, 3))
    return drawn | {"label": drawn["label"] % CLASSES}


@pytest.fixture(scope="module")
def params():
    return jax.jit(classifier().init)(jax.random.key(0))


def loss_of(objective, params, batch, train=True):
    return float(jax.jit(lambda *x: objective.loss_fn(*x, KEY, train)[0])(params, objective.prepare(batch)))


def test_mixing_changes_training_alone(batch, params):
    plain, mixed = classifier(), classifier(**MIXING)
    assert loss_of(plain, params, batch) != loss_of(mixed, params, batch)
    assert loss_of(plain, params, batch, train=False) == loss_of(mixed, params, batch, train=False)
    logits = [objective.predict(params, batch, KEY)["logits"] for objective in (plain, mixed)]
    np.testing.assert_array_equal(*logits)


def test_mixing_that_never_happens_changes_nothing(batch, params):
    never = classifier(mixup=0.8, mixup_prob=0.0)
    losses = [loss_of(objective, params, batch) for objective in (never, classifier())]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_mixed_image_is_trained_for_both_its_classes(batch, params):
    """The loss is that of images and targets mixed by hand, of the draws of `simmim_jax.objectives.mixing`."""
    smoothing = 0.1
    objective = classifier(mixup=0.8, label_smoothing=smoothing)
    _, mix_key = jax.random.split(jax.random.fold_in(KEY, 1))
    drawn = mixing.draw_mix(
        mix_key, batch["batch_index"], batch["batch_index"][::-1], image_size=SIZE, mixup=0.8, cutmix=0.0
    )
    weight = float(drawn.weight[0])
    assert 0 < weight < 1
    images = normalize(batch["image"], **PIXELS)
    pooled, _ = make_features(tiny_encoder(), **PIXELS)(
        params["encoder"], weight * images + (1 - weight) * images[::-1], True, KEY, batch["batch_index"]
    )
    kernel, bias = (params["head"]["logits"][name] for name in ("kernel", "bias"))
    logs = jax.nn.log_softmax(pooled @ kernel + bias)
    hot = np.full((BATCH, CLASSES), smoothing / CLASSES)
    hot[np.arange(BATCH), batch["label"]] += 1 - smoothing
    expected = -((weight * hot + (1 - weight) * hot[::-1]) * logs).sum(axis=1).mean()
    np.testing.assert_allclose(loss_of(objective, params, batch), expected, rtol=1e-5)


@pytest.mark.parametrize("mode", ["batch", pytest.param("elem", marks=pytest.mark.slow)])
def test_loss_and_gradient_do_not_depend_on_how_a_mixed_batch_is_split(mode, batch, params):
    objective = classifier(**MIXING, mixup_mode=mode)
    whole, parts = (
        jax.jit(partial(mean_grads, key=KEY, loss_fn=objective.loss_fn, microbatches=count))(
            params, objective.prepare(batch)
        )
        for count in (1, 4)
    )
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), whole[2], parts[2])


@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("scan", [False, True])
def test_one_pass_gives_the_features_of_every_block(pool, scan, batch):
    encoder = tiny_encoder(scan=scan)
    params = jax.jit(encoder.init)(jax.random.key(1), normalize(batch["image"], **PIXELS))["params"]
    together = make_all_features(encoder, **PIXELS, pool=pool)(params, batch["image"])
    assert sorted(together) == [0, 1, 2]
    for block, features in together.items():
        alone, _ = make_features(encoder, **PIXELS, block=block, pool=pool)(params, batch["image"])
        assert alone.shape == (BATCH, 16 if pool == "both" else 8)
        np.testing.assert_allclose(features, alone, rtol=1e-5, atol=1e-6)
    assert not np.allclose(together[0], together[2])  # the norm at the end stands between them


def test_a_partner_is_found_by_its_place_however_rows_lie(batch):
    order = np.array([0, 2, 1, 3, 5, 7, 4, 6])  # as of two processes with two shares each
    moved = {name: x[order] for name, x in batch.items()}
    prepared = classifier(mixup=1.0).prepare(moved)
    np.testing.assert_array_equal(prepared["partner_batch_index"], BATCH - 1 - order)
    for name in ("image", "label"):
        np.testing.assert_array_equal(prepared[f"partner_{name}"], batch[name][BATCH - 1 - order])
    prepared = classifier(mixup=1.0, mixup_group=4).prepare(moved)
    np.testing.assert_array_equal(prepared["partner_batch_index"], order // 4 * 4 + 3 - order % 4)


def test_a_classifier_may_read_the_class_token(batch):
    objective = classifier(pool="class_token")
    params = jax.jit(objective.init)(jax.random.key(0))
    grads = jax.jit(jax.grad(lambda p: objective.loss_fn(p, batch, KEY, False)[0]))(params)
    assert np.abs(grads["encoder"]["cls_token"]).max() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixup": -1.0}, "mixup"),
        ({"mixup_mode": "batches"}, "did you mean batch"),
        ({"erase": 2.0}, "erase"),
        ({"pool": "cls"}, "unknown pool 'cls'"),
        ({"encoder": tiny_encoder(class_token=False), "pool": "both"}, "without a class token"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        classifier(**options)
