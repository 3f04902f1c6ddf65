"""The Vision Transformer's sizes, options and initial values. test_encoders.py has the laws of all encoders."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import fast_jit, random_params, relative_difference, tiny_encoder, tiny_objective

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.models.blocks import block_drop, drop_path, drops
from simmim_jax.models.layers import relative_position_index
from simmim_jax.models.vit import sincos_position

KEY = jax.random.key(0)
IMAGES = jnp.zeros((1, 224, 224, 3))


def parameter_count(encoder, images=IMAGES) -> int:
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(encoder.init, KEY, images)))


def test_vit_b_has_the_official_parameter_count():
    """timm's vit_base_patch16_224 without head: learned positions, qkv biases, no LayerScale."""
    plain = make_encoder(
        "vit", "b", absolute_position="learned", relative_position="none", qkv_bias="qkv", layer_scale=0.0
    )
    assert parameter_count(plain) == 85_798_656
    changes = -197 * 768 - 12 * 768 + 24 * 768 + 732 * 12  # no positions, no key bias, LayerScale, one table
    assert parameter_count(make_encoder("vit", "b")) == 85_798_656 + changes


def test_initial_kernels_are_cut_at_one_sigma_and_rescaled_by_depth():
    encoder = make_encoder("vit", "ti", width=192, depth=3, num_heads=3)
    params = fast_jit(encoder.init)(KEY, jnp.zeros((1, 32, 32, 3)))["params"]
    deviation = 0.02 * 0.5395  # of a normal cut at one sigma: 0.0108
    for n in range(3):
        block = params[f"block_{n}"]
        for kernel, scale in (
            (block["attn"]["qkv"]["kernel"], 1),
            (block["mlp"]["fc1"]["kernel"], 1),
            (block["attn"]["proj"]["kernel"], (2 * (n + 1)) ** -0.5),
            (block["mlp"]["fc2"]["kernel"], (2 * (n + 1)) ** -0.5),
        ):
            assert jnp.abs(kernel).max() <= 0.02 * scale
            np.testing.assert_allclose(kernel.std(), deviation * scale, rtol=0.02)
        np.testing.assert_array_equal(block["scale_attn"]["gamma"], np.full(192, 0.1, np.float32))
        for zero in (block["attn"]["q_bias"], block["attn"]["v_bias"], block["attn"]["proj"]["bias"]):
            assert not zero.any()
    assert not params["rel_pos_bias"]["table"].any()
    assert jnp.abs(params["patch_embed"]["kernel"]).max() <= 0.02


def test_head_starts_like_a_pytorch_convolution():
    head = fast_jit(tiny_objective().init)(KEY)["head"]
    for values in (head["kernel"], head["bias"]):
        assert jnp.abs(values).max() <= 32**-0.5
        np.testing.assert_allclose(values.std(), 32**-0.5 / 3**0.5, rtol=0.1)


def test_stochastic_depth_rate_grows_linearly_and_keeps_the_expectation():
    encoder = tiny_encoder(depth=5, drop_path=0.4).bind({}, rngs={"drop_path": KEY})
    drop = drops(encoder, True, None, jnp.zeros((20000, 1)))
    assert drops(encoder, False, None, jnp.zeros((4, 1))) is None
    assert len({tuple(jax.random.key_data(block_drop(drop, n).key).tolist()) for n in (1, 2, 3, 4)}) == 4
    np.testing.assert_allclose(drop.keep, [1, 0.9, 0.8, 0.7, 0.6], rtol=1e-6)
    assert block_drop(drop, 0) is None
    x = jnp.ones((20000, 1, 1))
    for number in (1, 4):
        out = drop_path(x, block_drop(drop, number), 0)
        np.testing.assert_allclose(np.unique(out), [0.0, 1 / drop.keep[number]], rtol=1e-6)
        np.testing.assert_allclose(out.mean(), 1.0, atol=5 * ((1 / drop.keep[number] - 1) / 20000) ** 0.5)
    np.testing.assert_array_equal(drop_path(x, None, 0), x)


def test_relative_positions_depend_on_the_displacement_only():
    index = relative_position_index((3, 5), class_token=True)
    assert index.shape == (16, 16)
    patches = index[1:, 1:].reshape(3, 5, 3, 5)
    assert patches[0, 0, 1, 2] == patches[1, 2, 2, 4] != patches[1, 2, 0, 0]
    rows = 5 * 9
    assert sorted(set(patches.ravel())) == list(range(rows))
    assert (index[0, 1:] == rows).all()
    assert (index[1:, 0] == rows + 1).all()
    assert index[0, 0] == rows + 2


def test_sincos_positions_are_distinct_and_bounded():
    table = sincos_position((7, 9), 64, class_token=True)
    assert table.shape == (64, 64)
    assert not table[0].any()
    assert len(np.unique(table.round(6), axis=0)) == 64
    np.testing.assert_allclose((table[1:] ** 2).sum(axis=1), 32, rtol=1e-5)


def features(encoder, params):
    images = jax.random.normal(KEY, (2, 32, 32, 3))
    return fast_jit(lambda params: encoder.apply({"params": params}, images))(params)


def test_positions_of_patches_only_equal_a_zero_position_of_the_class_token():
    options = {"absolute_position": "learned", "relative_position": "none", "depth": 1}
    whole, patches = tiny_encoder(**options), tiny_encoder(**options, class_position=False)
    params = random_params(jax.eval_shape(patches.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"])
    padded = params | {"pos_embed": jnp.pad(params["pos_embed"], ((1, 0), (0, 0)))}
    # the sums have another order
    assert relative_difference(features(whole, padded), features(patches, params)) < 1e-5


def test_registers_take_part_in_attention_and_their_order_is_free():
    encoder = tiny_encoder(num_registers=3, absolute_position="learned", relative_position="none", depth=1)
    params = random_params(jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 32, 32, 3)))["params"])
    out = features(encoder, params)
    assert out.shape == (2, 4, 4, 32)
    assert encoder.layer_id("registers") == 0
    swapped = features(encoder, params | {"registers": params["registers"][::-1]})
    other = features(encoder, params | {"registers": -params["registers"]})
    assert relative_difference(swapped, out) < 1e-5  # the sums have another order
    assert relative_difference(other, out) > 1e-3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_registers": 4}, "relative_position=none"),
        ({"width": 100, "num_heads": 3}, "try 99 or 102"),
        ({"relative_position": "both"}, "choose one of none, shared, per_block"),
        ({"absolute_position": "sincos", "width": 6, "num_heads": 2}, "multiple of 4"),
        ({"depth": 0}, "at least 1"),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        make_encoder("vit", "ti", **options)
