"""Blocks run by `lax.scan`, and blocks whose activations are computed again: the same values as without."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import relative_difference

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.models.blocks import block_drop, drops
from simmim_jax.runtime.scanning import stack, unstack

KEY = jax.random.key(0)
IMAGES = jax.random.normal(KEY, (2, 32, 32, 3))
ENCODERS = {
    "vit": {"width": 16, "depth": 3, "num_heads": 2, "patch_size": 8},
    "vit, a bias in each block": {
        "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "relative_position": "per_block", "class_token": False,
    },
    "swin": {"width": 8, "depths": (1, 5), "num_heads": (1, 2), "window": 2},
    "swinv2": {"width": 8, "depths": (4,), "num_heads": (1,), "window": 4},
    "convnext": {"depths": (2, 1, 1, 1), "widths": (8, 8, 8, 8), "layer_scale": 0.5},
}  # fmt: skip


def tiny(name, **options):
    return make_encoder(name.split(",")[0], None, **ENCODERS[name], drop_path=0.4, **options)


def at_random(encoder, seed=0):
    """Parameters, every one random: what starts at zero hides mistakes."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(encoder.init, KEY, IMAGES)["params"]
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)


@partial(jax.jit, static_argnames="encoder")
def run(encoder, params):
    """(features, what the blocks put out, gradients) in training."""

    def loss(params):
        features, sown = encoder.apply(
            {"params": params}, IMAGES, True, rngs={"drop_path": KEY}, mutable=["intermediates"]
        )
        return (features * jnp.cos(jnp.arange(features.size).reshape(features.shape))).mean(), (features, sown)

    (_, (features, sown)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return features, sown["intermediates"]["blocks"], grads


@pytest.mark.parametrize("name", ["vit", pytest.param("swin", marks=pytest.mark.slow)])
def test_initial_values_are_the_same_to_the_bit_with_scan(name):
    loop, scan = (jax.jit(tiny(name, scan=scan).init)(KEY, IMAGES)["params"] for scan in (False, True))
    stacked = stack(loop, tiny(name, scan=True).scanned_layers)
    assert jax.tree.structure(scan) == jax.tree.structure(stacked)
    jax.tree.map(np.testing.assert_array_equal, scan, stacked)


@pytest.mark.parametrize("name", ENCODERS)
def test_scan_has_the_stacks_that_it_says_and_no_others(name):
    loop, scan = tiny(name), tiny(name, scan=True)
    shapes, stacked = (jax.eval_shape(encoder.init, KEY, IMAGES)["params"] for encoder in (loop, scan))
    assert loop.scanned_layers == {}
    assert jax.tree.structure(unstack(stacked, scan.scanned_layers)) == jax.tree.structure(shapes)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), unstack(stacked, scan.scanned_layers), shapes)


def test_the_stacks_of_a_swin_are_its_plain_and_its_shifted_blocks_where_a_stage_has_two_pairs():
    assert make_encoder("swin", "t", scan=True).scanned_layers == {
        "stage_2_blocks_0": ("stage_2_block_0", "stage_2_block_2", "stage_2_block_4"),
        "stage_2_blocks_1": ("stage_2_block_1", "stage_2_block_3", "stage_2_block_5"),
    }
    odd = tiny("swin", scan=True).scanned_layers
    assert odd["stage_1_blocks_1"] == ("stage_1_block_1", "stage_1_block_3")
    assert "stage_1_block_4" not in sum(odd.values(), ())


def test_a_resnet_cannot_be_scanned_and_unknown_policies_are_named():
    with pytest.raises(ConfigError, match="unknown option of resnet 'scan'"):
        make_encoder("resnet", "50", scan=True)
    for name, size in (("vit", "ti"), ("swin", "t"), ("swinv2", "t"), ("convnext", "t"), ("resnet", "50")):
        with pytest.raises(ConfigError, match=r"unknown remat 'dot' - encoder.remat - choose one of none, full, dots"):
            make_encoder(name, size, remat="dot")


def test_scan_and_remat_change_no_feature_no_gradient_and_nothing_that_a_probe_reads():
    _compare("vit", scan=True, remat="dots")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("options", [{"scan": True}, {"scan": True, "remat": "full"}, {"remat": "dots"}], ids=str)
def test_scan_and_remat_change_nothing_of_any_encoder(name, options):
    _compare(name, **options)


def _compare(name, **options):
    plain, other = tiny(name), tiny(name, **options)
    params = at_random(plain)
    features, blocks, grads = run(plain, params)
    features_2, blocks_2, grads_2 = run(other, stack(params, other.scanned_layers))
    # float32 rounding, in the sums of another order that another program makes
    assert relative_difference(features_2, features) < 1e-5
    assert [x.shape for x in blocks_2] == [x.shape for x in blocks]
    assert relative_difference(blocks_2, blocks) < 1e-5
    assert relative_difference(unstack(grads_2, other.scanned_layers), grads) < 1e-4


def test_a_loss_is_the_same_within_a_millionth_and_dropped_branches_are_the_same_ones():
    plain = tiny("vit")
    params = at_random(plain)
    loss = jax.jit(
        lambda encoder, params: (encoder.apply({"params": params}, IMAGES, True, rngs={"drop_path": KEY}) ** 2).mean(),
        static_argnums=0,
    )
    expected = loss(plain, params)
    for scan, remat in ((False, "dots"), (True, "attention")):
        encoder = tiny("vit", scan=scan, remat=remat)
        np.testing.assert_allclose(loss(encoder, stack(params, encoder.scanned_layers)), expected, rtol=1e-6)


def test_the_first_block_drops_nothing_and_each_block_draws_for_itself():
    encoder = tiny("vit").bind({}, rngs={"drop_path": KEY})
    drop = drops(encoder, True, None, jnp.zeros((4, 1)))
    assert drop.keep[0] == 1.0
    assert block_drop(drop, 0) is None
    keys = {tuple(jax.random.key_data(block_drop(drop, n).key).tolist()) for n in (1, 2)}
    assert len(keys) == 2
    assert drops(encoder, False, None, jnp.zeros((4, 1))) is None


def test_a_deep_encoder_by_scan_is_no_longer_a_program_than_a_shallow_one():
    """Counted in the lines of what is handed to the compiler: its time goes by them."""

    def lines(depth, scan):
        encoder = make_encoder("vit", None, width=16, depth=depth, num_heads=2, patch_size=8, scan=scan)
        init = partial(encoder.init, images=IMAGES)
        grad = jax.grad(lambda params: encoder.apply(params, IMAGES).sum())
        lowered = jax.jit(init).lower(KEY), jax.jit(grad).lower(jax.eval_shape(init, KEY))
        return sum(len(x.as_text().splitlines()) for x in lowered)

    assert lines(9, True) == lines(3, True)
    assert lines(9, False) > 1.5 * lines(3, False)
