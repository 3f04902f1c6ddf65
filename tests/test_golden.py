"""Parity with the official implementations on their own reference arrays (tests/golden/README.md).

Arrays enter as a user's file does: saved, read, recognized, and converted by `interop`'s tables.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import save_file

from simmim_jax import interop
from simmim_jax.config import load
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.pixels import from_patches, local_moments
from simmim_jax.objectives.simmim import make_forward, masked_l1
from simmim_jax.optim import layers, make_is_decayed, make_optimizer, path_name

ROOT = Path(__file__).parent.parent
PRETRAINING = (
    "official_vit_pretrain_ape",
    "official_vit_pretrain_shared_rpb",
    "official_swin_pretrain",
    "official_swinv2_pretrain_normtarget47",
)
FINE_TUNING = ("official_vit_finetune", "official_swin_finetune", "official_swinv2_finetune")
KEY = jax.random.key(0)
PIXELS = {"image_size": (64, 64), "mean": (0.0,) * 3, "std": (1.0,) * 3}


def part(arrays: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def to_map(x):
    """Channels first, as in PyTorch."""
    return jnp.asarray(x).transpose(0, 3, 1, 2)


def relative_error(ours, theirs) -> float:
    """The largest difference, relative to the reference's largest value."""
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


class Reference:
    """One official run: its arrays, the encoder that `interop` detects in them, parameters and gradients."""

    def __init__(self, name: str, arrays: dict, folder):
        self.arrays, config = arrays, json.loads(str(arrays["config"]))
        save_file(part(arrays, "params/"), folder / "official.safetensors")
        weights = interop.read_weights(str(folder / "official.safetensors"))
        # Not in these weights: the heads of a ViT without bias tables, and the window of a Swin V2 without its buffers.
        given = {"num_heads": config["heads"]} if "vit" in name else {"window": config["window_size"]}
        found = interop.resolve(interop.detect(weights), given, (64, 64), weights.where)
        assert found.format == "official"
        fields = {field: value for field, value in found.encoder.items() if field != "name"}
        self.encoder, self.objective = make_encoder(found.encoder["name"], None, **fields), dict(found.objective)
        made = make_objective(encoder=self.encoder, **PIXELS, **self.objective)
        self.abstract = jax.eval_shape(made.init, KEY)
        self.rules = interop.make_rules("official", self.encoder, self.objective, found.prefix, (64, 64))
        self.params, self.gradients = (
            jax.tree.map(jnp.asarray, interop.to_ours(self.rules, of_file, self.abstract, name))
            for of_file in (weights.arrays, part(arrays, "grad/"))
        )
        self.images = jnp.asarray(arrays["images"].transpose(0, 2, 3, 1))


@pytest.fixture(scope="module")
def reference(request, golden, tmp_path_factory):
    return Reference(request.param, golden(request.param), tmp_path_factory.mktemp("official"))


@pytest.mark.parametrize("reference", PRETRAINING, indirect=True)
def test_pretraining_equals_the_official_one(reference):
    """Features, reconstruction and loss, and the gradient of every parameter."""
    arrays, encoder, mask = reference.arrays, reference.encoder, jnp.asarray(reference.arrays["mask"] == 1)
    forward, stride = make_forward(encoder, channels=3), encoder.feature_stride
    hidden = mask.repeat(encoder.token_stride, axis=1).repeat(encoder.token_stride, axis=2)
    target = reference.images
    if window := json.loads(str(arrays["config"])).get("norm_target"):
        mean, deviation = local_moments(target, window)
        target = (target - mean) / deviation

    def loss_fn(params):
        features, prediction, _ = forward(params, reference.images, mask, KEY, False)
        return masked_l1(prediction, target, hidden, stride), (features, prediction)

    (loss, (features, prediction)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(reference.params)
    assert relative_error(to_map(features), arrays["features"]) < 1e-5
    assert relative_error(to_map(from_patches(prediction, stride)), arrays["reconstruction"]) < 1e-5
    assert relative_error(loss, arrays["loss"]) < 1e-5
    errors = jax.tree.map(relative_error, grads, reference.gradients)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.mark.parametrize("reference", FINE_TUNING, indirect=True)
def test_fine_tuning_equals_the_official_one(reference):
    """Logits and loss, and the gradient of every parameter."""
    arrays = reference.arrays
    options = {name: value for name, value in reference.objective.items() if name != "name"}
    objective = make_objective("classify", reference.encoder, **PIXELS, **options)
    loss_fn, predict = objective.loss_fn, objective.predict
    batch = {
        "image": reference.images,  # random values, used as normalized images
        "label": jnp.asarray(arrays["labels"], jnp.int32),
        "batch_index": jnp.arange(2),
    }

    def loss_of(params):
        return loss_fn(params, batch, KEY, False)[0], predict(params, batch, KEY)["logits"]

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(reference.params)
    assert relative_error(logits, arrays["logits"]) < 1e-5
    assert relative_error(loss, arrays["loss"]) < 1e-5
    expected = optax.softmax_cross_entropy_with_integer_labels(arrays["logits"], arrays["labels"]).mean()
    assert relative_error(loss, expected) < 1e-5
    errors = jax.tree.map(relative_error, grads, reference.gradients)
    assert max(jax.tree.leaves(errors)) < 1e-4, errors


@pytest.mark.parametrize("reference", PRETRAINING + FINE_TUNING, indirect=True)
def test_every_official_parameter_is_compared_and_exported_unchanged(reference):
    theirs = part(reference.arrays, "params/")
    assert sum(x.size for x in jax.tree.leaves(reference.params)) == sum(x.size for x in theirs.values())
    exported = interop.to_theirs(reference.rules, jax.device_get(reference.params))
    assert exported.keys() == theirs.keys()
    for name, x in exported.items():
        np.testing.assert_array_equal(x, theirs[name])


@pytest.mark.parametrize(
    ("name", "decay", "encoder"),
    [
        (
            "vit_depth4_layer_decay_0.65",
            0.65,
            ("vit", {"width": 48, "depth": 4, "num_heads": 3, "relative_position": "per_block", "final_norm": False}),
        ),
        (
            "swin_depths2222_layer_decay_0.9",
            0.9,
            ("swin", {"width": 8, "depths": (2,) * 4, "num_heads": (1, 1, 2, 2), "window": 4}),
        ),
    ],
)
def test_fine_tuning_gives_each_parameter_the_official_rate_and_decay(golden_json, name, decay, encoder):
    expected = golden_json("official_finetune_param_groups")[name]
    encoder = make_encoder(encoder[0], None, **encoder[1])
    objective = {"name": "classify", "num_classes": 7, "fc_norm": "vit" in name}
    params = jax.eval_shape(make_objective(encoder=encoder, **PIXELS, **objective).init, KEY)
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    rules = interop.make_rules("official", encoder, objective, "", (64, 64))
    official_name = {rule.ours: rule.theirs for rule in rules}

    scales = jax.tree.map(
        lambda layer: decay ** (encoder.depth + 1 - layer), layers(params, encoder.layer_id, encoder.depth)
    )
    # An update without gradient is the rate times the decay.
    tx, _ = make_optimizer(
        "adamw", steps=1, steps_per_epoch=1, schedule="constant", learning_rate=1.0, weight_decay=0.05,
        layer_decay=decay, layer_id=encoder.layer_id, depth=encoder.depth,
        no_decay=encoder.no_decay(pretraining=False),
    )  # fmt: skip
    update_of = jax.jit(lambda x: tx.update(jax.tree.map(jnp.zeros_like, x), tx.init(x), x, step=0)[0])
    updates = jax.device_get(update_of(ones))
    groups = {}
    for (path, scale), update in zip(
        jax.tree_util.tree_leaves_with_path(scales), jax.tree.leaves(updates), strict=True
    ):
        for theirs in official_name[path_name(path)]:
            groups[theirs] = {"lr_scale": scale, "weight_decay": 0.05 if update.any() else 0.0}
            np.testing.assert_allclose(-update, scale * groups[theirs]["weight_decay"], rtol=1e-6)
    assert groups == {theirs: pytest.approx(group, rel=1e-12) for theirs, group in expected.items()}


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("swin_b_100ep", "simmim/simmim_pretrain__swin_base__img192_window6__100ep"),
        ("swin_b_800ep", "simmim/simmim_pretrain__swin_base__img192_window6__100ep"),
        ("swin_l_800ep", "simmim/simmim_pretrain__swin_base__img192_window6__100ep"),
        ("swinv2_b_800ep", "swin_transformer/simmim_pretrain__swinv2_base__img192_window12__800ep"),
        ("vit_b_800ep", "simmim/simmim_pretrain__vit_base__img224__800ep"),
    ],
)
def test_pretraining_recipe_decays_the_official_parameters(golden_json, recipe, name):
    """With the default rule. With the other one, the names in official `no_weight_decay_keywords` never decay."""
    expected = golden_json("official_pretrain_param_groups")[name]
    config = load(str(ROOT / f"configs/simmim_{recipe}.py"))
    small = {"width": 48, "depth": 3} if "vit" in recipe else {"width": 8, "depths": (1, 1, 2, 1)}
    heads = {"num_heads": (3,) if "vit" in recipe else (1, 1, 2, 2)}
    encoder = make_encoder(**{**config.encoder, **small, **heads})
    pixels = PIXELS | {"image_size": config.image_size}
    params = jax.eval_shape(make_objective(encoder=encoder, **pixels, **config.objective).init, KEY)
    rules = interop.make_rules("official", encoder, {"name": "simmim"}, "encoder.", config.image_size)
    no_decay = encoder.no_decay(pretraining=True)

    def decayed_names(rule):
        is_decayed = make_is_decayed(no_decay[rule])
        return {theirs for one in rules for theirs in one.theirs if is_decayed(one.ours)}

    assert {theirs for rule in rules for theirs in rule.theirs} == expected.keys()
    assert len(jax.tree.leaves(params)) == len(rules)
    assert {group["lr_scale"] for group in expected.values()} == {config.optim.layer_decay}
    official = {theirs for theirs, group in expected.items() if group["weight_decay"] == config.optim.weight_decay}
    assert decayed_names(config.optim.decay_rule) == official
    keywords = ("relative_position_bias_table", "cpb_mlp", "logit_scale") if "swin" in recipe else ("none",)
    assert decayed_names("intended") == {theirs for theirs in official if not any(word in theirs for word in keywords)}
