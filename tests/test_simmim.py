"""SimMIM: targets, loss and prediction. test_encoders.py and test_objectives.py have the common laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PIXELS, tiny_batch, tiny_encoder, tiny_objective

from simmim_jax.errors import ConfigError
from simmim_jax.objectives.pixels import denormalize, from_patches, local_moments, normalize, to_patches
from simmim_jax.objectives.simmim import make_forward, masked_l1

KEY = jax.random.key(1)
ENCODERS = (
    {},
    {"absolute_position": "learned", "relative_position": "per_block", "class_token": False},
    {"absolute_position": "sincos", "relative_position": "none", "qkv_bias": "qkv"},
)


@pytest.fixture
def setting():
    """(forward, params, images, mask) with images normalized and half of the tokens hidden."""
    encoder = tiny_encoder()
    params = jax.jit(tiny_objective(encoder).init)(KEY)
    images = jax.random.normal(KEY, (4, 32, 32, 3))
    mask = jax.random.bernoulli(KEY, 0.5, (4, 2, 2)).repeat(2, axis=1).repeat(2, axis=2)
    return make_forward(encoder, channels=3), params, images, mask


def pixels_of(mask, stride=8):
    return mask.repeat(stride, axis=1).repeat(stride, axis=2)


def test_no_visible_pixel_is_a_target(setting):
    forward, params, images, mask = setting
    _, prediction, _ = forward(params, images, mask, KEY, False)
    gradient = jax.grad(lambda targets: masked_l1(prediction, targets, pixels_of(mask), 8))(images)
    assert ((jnp.abs(gradient).max(axis=-1) > 0) == pixels_of(mask)).all()


def test_no_gradient_comes_from_the_prediction_of_a_visible_pixel(setting):
    forward, params, images, mask = setting
    _, prediction, _ = forward(params, images, mask, KEY, False)
    gradient = jax.grad(lambda prediction: masked_l1(prediction, images, pixels_of(mask), 8))(prediction)
    assert ((jnp.abs(gradient).max(axis=-1) > 0) == mask).all()


def test_the_loss_is_the_mean_error_of_hidden_pixels_and_channels(setting):
    _, _, images, mask = setting
    prediction = to_patches(jax.random.normal(jax.random.key(5), images.shape), 8)
    hidden = np.asarray(pixels_of(mask))
    expected = np.abs(np.asarray(from_patches(prediction, 8)) - np.asarray(images))[hidden].mean()
    # 1e-5: the official 1e-5 in the denominator of some thousand pixels, and float32 sums
    np.testing.assert_allclose(masked_l1(prediction, images, pixels_of(mask), 8), expected, rtol=1e-5)


def test_masks_finer_than_a_feature_are_counted_by_the_pixel():
    """As under Swin with blocks smaller than its stride of 32."""
    images, prediction = jax.random.normal(KEY, (2, 16, 16, 3)), jnp.zeros((2, 1, 1, 3 * 256))
    hidden = jax.random.bernoulli(KEY, 0.5, (2, 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_allclose(
        masked_l1(prediction, images, hidden, 16), np.abs(np.asarray(images))[np.asarray(hidden)].mean(), rtol=1e-5
    )


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (16, 48, 1), (48, 16, 5)])
def test_patches_are_cut_and_joined_in_the_order_of_pixel_shuffle(height, width, channels):
    images = jax.random.normal(KEY, (2, height, width, channels))
    patches = to_patches(images, 8)
    np.testing.assert_array_equal(from_patches(patches, 8), images)
    c, row, column = channels - 1, 3, 5
    np.testing.assert_array_equal(patches[1, 1, 0, c * 64 + row * 8 + column], images[1, 8 + row, column, c])


def test_pixels_return_from_normalization():
    images = tiny_batch()["image"]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    np.testing.assert_allclose(denormalize(normalize(images, mean, std), mean, std) * 255, images, atol=1e-3)


def test_local_moments_equal_those_counted_pixel_by_pixel():
    images = np.asarray(jax.random.normal(KEY, (2, 9, 12, 2)))
    mean, deviation = map(np.asarray, local_moments(jnp.asarray(images), 5))
    for row, column in ((0, 0), (4, 6), (8, 11), (2, 1)):
        window = images[:, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].astype(np.float64)
        np.testing.assert_allclose(mean[:, row, column], window.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
        expected = np.sqrt(window.var(axis=(1, 2), ddof=1) + 1e-6)
        np.testing.assert_allclose(deviation[:, row, column], expected, rtol=1e-5)


def test_a_normalized_target_is_learnt_and_its_prediction_shown_as_an_image():
    """A head that says 0 everywhere predicts the local mean of the image."""
    objective, batch = tiny_objective(norm_window=9), tiny_batch()
    params = jax.jit(objective.init)(KEY)
    params = params | {"head": jax.tree.map(jnp.zeros_like, params["head"])}
    out = objective.predict(params, batch, KEY)
    images = normalize(batch["image"], PIXELS["mean"], PIXELS["std"])
    mean, deviation = local_moments(images, 9)
    expected = np.abs(np.asarray((images - mean) / deviation))[np.asarray(out["mask"])].mean()
    np.testing.assert_allclose(out["loss"].mean(), expected, rtol=1e-5)
    np.testing.assert_allclose(out["prediction"], denormalize(mean, PIXELS["mean"], PIXELS["std"]), atol=1e-5)
    for size in (8, 1, -3):
        with pytest.raises(ConfigError, match="give an odd side"):
            tiny_objective(norm_window=size)


@pytest.mark.parametrize(
    ("image_size", "channels"), [((32, 64), 3), ((64, 16), 1), pytest.param((32, 32), 6, marks=pytest.mark.slow)]
)
def test_rectangular_images_and_any_channel_count_train(image_size, channels):
    statistics = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    objective = tiny_objective(image_size=image_size, **statistics)
    batch = tiny_batch(4, (*image_size, channels))
    step = jax.jit(jax.value_and_grad(lambda p: objective.loss_fn(p, batch, KEY, True)[0]))
    loss, grads = step(jax.jit(objective.init)(KEY))
    assert jnp.isfinite(loss)
    zero = [
        jax.tree_util.keystr(path) for path, g in jax.tree_util.tree_leaves_with_path(grads) if not jnp.abs(g).max()
    ]
    assert zero == []


def test_prediction_and_loss_describe_the_same_batch():
    objective, batch = tiny_objective(), tiny_batch()
    params = jax.jit(objective.init)(KEY)
    out = objective.predict(params, batch, KEY)
    assert out["image"].shape == out["prediction"].shape == (16, 32, 32, 3)
    assert (out["mask"].mean(axis=(1, 2)) == 0.5).all()
    np.testing.assert_allclose(out["loss"].mean(), objective.loss_fn(params, batch, KEY, False)[0], rtol=1e-6)


def test_bfloat16_matmuls_leave_parameters_tokens_and_loss_in_float32():
    encoder = tiny_encoder(dtype="bfloat16")
    objective, batch = tiny_objective(encoder), tiny_batch()
    params = jax.jit(objective.init)(KEY)
    assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    (loss, grads), (exact, exact_grads) = (
        jax.jit(jax.value_and_grad(lambda p, of=of: of.loss_fn(p, batch, KEY, True)[0]))(params)
        for of in (objective, tiny_objective())
    )
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, exact, rtol=1e-2)  # bfloat16 keeps eight bits
    # The mask token's gradient is a sum over the whole batch, the first to go wrong where it is blended in bfloat16.
    error = jnp.linalg.norm(grads["mask_token"] - exact_grads["mask_token"]) / jnp.linalg.norm(
        exact_grads["mask_token"]
    )
    assert error < 0.02
