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


@pytest.fixture(scope="module")
def setting():
    """(forward, params, images, mask) with normalized images and half of the tokens masked."""
    encoder = tiny_encoder()
    params = jax.jit(tiny_objective(encoder).init)(KEY)
    images = jax.random.normal(KEY, (4, 32, 32, 3))
    mask = jax.random.bernoulli(KEY, 0.5, (4, 2, 2)).repeat(2, axis=1).repeat(2, axis=2)
    return make_forward(encoder, channels=3), params, images, mask


def to_pixels(mask, stride=8):
    return mask.repeat(stride, axis=1).repeat(stride, axis=2)


def test_only_masked_pixels_are_targets(setting):
    forward, params, images, mask = setting
    _, prediction, _ = forward(params, images, mask, KEY, False)
    gradient = jax.grad(lambda targets: masked_l1(prediction, targets, to_pixels(mask), 8))(images)
    assert ((jnp.abs(gradient).max(axis=-1) > 0) == to_pixels(mask)).all()


def test_only_predictions_of_masked_pixels_have_a_gradient(setting):
    forward, params, images, mask = setting
    _, prediction, _ = forward(params, images, mask, KEY, False)
    gradient = jax.grad(lambda prediction: masked_l1(prediction, images, to_pixels(mask), 8))(prediction)
    assert ((jnp.abs(gradient).max(axis=-1) > 0) == mask).all()


def test_loss_is_the_mean_error_over_masked_pixels_and_channels(setting):
    _, _, images, mask = setting
    prediction = to_patches(jax.random.normal(jax.random.key(5), images.shape), 8)
    masked = np.asarray(to_pixels(mask))
    expected = np.abs(np.asarray(from_patches(prediction, 8)) - np.asarray(images))[masked].mean()
    # 1e-5: the official 1e-5 in the denominator, next to thousands of pixels, and float32 sums
    np.testing.assert_allclose(masked_l1(prediction, images, to_pixels(mask), 8), expected, rtol=1e-5)


def test_mask_patches_smaller_than_a_feature_are_counted_by_the_pixel():
    """As for Swin with mask patches smaller than its stride of 32."""
    images, prediction = jax.random.normal(KEY, (2, 16, 16, 3)), jnp.zeros((2, 1, 1, 3 * 256))
    masked = jax.random.bernoulli(KEY, 0.5, (2, 4, 4)).repeat(4, axis=1).repeat(4, axis=2)
    expected = np.abs(np.asarray(images))[np.asarray(masked)].mean()
    np.testing.assert_allclose(masked_l1(prediction, images, masked, 16), expected, rtol=1e-5)


@pytest.mark.parametrize(("height", "width", "channels"), [(32, 32, 3), (16, 48, 1), (48, 16, 5)])
def test_patches_have_the_order_of_pixel_shuffle(height, width, channels):
    images = jax.random.normal(KEY, (2, height, width, channels))
    patches = to_patches(images, 8)
    np.testing.assert_array_equal(from_patches(patches, 8), images)
    c, row, column = channels - 1, 3, 5
    np.testing.assert_array_equal(patches[1, 1, 0, c * 64 + row * 8 + column], images[1, 8 + row, column, c])


def test_denormalize_inverts_normalize():
    images = tiny_batch()["image"]
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    np.testing.assert_allclose(denormalize(normalize(images, mean, std), mean, std) * 255, images, atol=1e-3)


def test_local_moments_equal_those_of_each_window():
    images = np.asarray(jax.random.normal(KEY, (2, 9, 12, 2)))
    mean, deviation = map(np.asarray, local_moments(jnp.asarray(images), 5))
    for row, column in ((0, 0), (4, 6), (8, 11), (2, 1)):
        window = images[:, max(row - 2, 0) : row + 3, max(column - 2, 0) : column + 3].astype(np.float64)
        np.testing.assert_allclose(mean[:, row, column], window.mean(axis=(1, 2)), rtol=1e-5, atol=1e-6)
        expected = np.sqrt(window.var(axis=(1, 2), ddof=1) + 1e-6)
        np.testing.assert_allclose(deviation[:, row, column], expected, rtol=1e-5)


def test_norm_window_normalizes_the_target_and_predict_inverts_it():
    """A head that outputs 0 predicts the local mean of the image."""
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


@pytest.mark.parametrize(("image_size", "channels"), [((32, 64), 4), pytest.param((64, 16), 1, marks=pytest.mark.slow)])
def test_rectangular_images_with_any_number_of_channels_train(image_size, channels):
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


def test_predict_and_loss_fn_agree():
    objective, batch = tiny_objective(), tiny_batch()
    params = jax.jit(objective.init)(KEY)
    out = objective.predict(params, batch, KEY)
    assert out["image"].shape == out["prediction"].shape == (16, 32, 32, 3)
    assert (out["mask"].mean(axis=(1, 2)) == 0.5).all()
    np.testing.assert_allclose(out["loss"].mean(), objective.loss_fn(params, batch, KEY, False)[0], rtol=1e-6)


def test_bfloat16_matmuls_keep_gradients_and_loss_in_float32_and_close():
    encoder = tiny_encoder(dtype="bfloat16")
    objective, batch = tiny_objective(encoder), tiny_batch()
    params = jax.jit(objective.init)(KEY)
    (loss, grads), (exact, exact_grads) = (
        jax.jit(jax.value_and_grad(lambda p, of=of: of.loss_fn(p, batch, KEY, True)[0]))(params)
        for of in (objective, tiny_objective())
    )
    assert loss.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}
    np.testing.assert_allclose(loss, exact, rtol=1e-2)  # bfloat16 has eight bits
    # The mask token's gradient sums over the whole batch. Blending in bfloat16 would spoil it first.
    error = jnp.linalg.norm(grads["mask_token"] - exact_grads["mask_token"]) / jnp.linalg.norm(
        exact_grads["mask_token"]
    )
    assert error < 0.02
