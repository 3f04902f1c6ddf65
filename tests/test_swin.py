"""Swin and Swin V2: sizes, shifted, shrunk and padded windows, initial values. test_encoders.py has common laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import PIXELS, fast_jit

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.models.swin import in_windows
from simmim_jax.models.swinv2 import log_displacements, unit_length
from simmim_jax.models.windows import join_windows, shift_mask, split_windows, stage_grids, window_and_shift
from simmim_jax.objectives import make_objective

KEY = jax.random.key(0)
NAMES = ("swin", "swinv2")
TINY = {"width": 8, "depths": (2, 2), "num_heads": (1, 2), "window": 4}


def tiny_swin(name, **options):
    return make_encoder(name, "t", **{**TINY, **options})


LARGE = (("l", 195.2), ("h", 655.2), ("giant", 1061.0))


def count(tree) -> int:
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(("size", "window", "total"), [("b", 6, 89_874_104), ("l", 12, 199_881_204)])
def test_swin_with_simmim_has_the_official_parameter_count(size, window, total):
    pixels = {**PIXELS, "image_size": (192, 192)}
    objective = make_objective("simmim", make_encoder("swin", size, window=window), **pixels)
    params = jax.eval_shape(objective.init, KEY)
    assert count(params) == total
    assert size != "b" or count(params["encoder"]) == 86_725_176


@pytest.mark.parametrize(
    ("size", "millions"),
    [("s", 49.0), ("b", 86.9), *(pytest.param(*each, marks=pytest.mark.slow) for each in LARGE)],
)
def test_swin_v2_has_the_official_parameter_count(size, millions):
    """Counts of the backbone in MODELHUB.md of microsoft/Swin-Transformer, to its precision."""
    encoder = make_encoder("swinv2", size, window=12)
    params = jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 192, 192, 3)))
    assert count(params) / 1e6 == pytest.approx(millions, abs=0.05 if millions < 1000 else 0.5)


@pytest.mark.parametrize("name", NAMES)
def test_maps_that_windows_do_not_tile_have_the_shapes_of_the_contract(name):
    """36 x 52 pixels are maps of 9 x 13 and 5 x 7 tokens, and the first has odd sides."""
    image_size = (36, 52)
    encoder, images = tiny_swin(name), jnp.zeros((2, *image_size, 3))
    variables = jax.eval_shape(encoder.init, KEY, images)
    apply = lambda v, x: encoder.apply(v, x, mutable=["intermediates"])  # noqa: E731
    features, sown = jax.eval_shape(apply, variables, images)
    grids = stage_grids(image_size, 4, 2)
    assert (encoder.token_stride, encoder.feature_stride, encoder.depth) == (4, 8, 4)
    assert features.shape == (2, *grids[1], 16)
    shapes = [(2, *grids[0], 8)] * 2 + [(2, *grids[1], 16)] * 2
    assert [x.shape for x in sown["intermediates"]["blocks"]] == shapes


def test_join_windows_inverts_split_windows():
    x = jnp.arange(2 * 6 * 9 * 2.0).reshape(2, 6, 9, 2)
    windows = split_windows(x, 3)
    assert windows.shape == (2, 6, 9, 2)
    np.testing.assert_array_equal(windows[1, 4].reshape(3, 3, 2), x[1, 3:6, 3:6])
    np.testing.assert_array_equal(join_windows(windows, (6, 9)), x)


def test_small_maps_shrink_the_window_and_have_no_shift():
    assert window_and_shift((48, 48), 12, True) == (12, 6)
    assert window_and_shift((12, 12), 12, True) == (12, 0)
    assert window_and_shift((6, 6), 12, True) == (6, 0)
    assert window_and_shift((8, 20), 12, True) == (8, 0)
    assert window_and_shift((14, 14), 7, False) == (7, 0)
    assert [window_and_shift(grid, 12, False)[0] for grid in stage_grids((192, 192), 4, 4)] == [12, 12, 12, 6]


def test_shift_mask_separates_tokens_that_only_the_roll_joined():
    """Tokens of one window attend to each other if and only if they were within one window before the roll."""
    grid, side, shift = (6, 9), 3, 1
    row, column = np.meshgrid(*map(np.arange, grid), indexing="ij")
    rolled = np.stack([np.roll(axis, (-shift, -shift), axis=(0, 1)) for axis in (row, column)], axis=-1)
    tiles = rolled.reshape(2, 3, 3, 3, 2).swapaxes(1, 2).reshape(6, 9, 2)
    near = np.abs(tiles[:, :, None] - tiles[:, None, :]).max(axis=-1) < side
    np.testing.assert_array_equal(shift_mask(grid, side, shift), np.where(near, 0.0, -100.0).astype(np.float32))


def test_maps_are_padded_at_the_bottom_and_right_and_cut_again():
    calls = []

    def attention(windows, side, mask):
        calls.append((windows.shape, side, mask))
        return windows + 1

    x = jax.random.normal(KEY, (1, 5, 7, 2))
    np.testing.assert_array_equal(in_windows(attention, x, 4, True), x + 1)
    ((shape, side, mask),) = calls
    assert (shape, side, mask.shape) == ((1, 4, 16, 2), 4, (4, 16, 16))


@pytest.mark.parametrize("name", NAMES)
def test_layer_ids_are_the_official_ones(name):
    encoder = tiny_swin(name)
    layers = {"patch_embed/kernel": 0, "patch_norm/scale": 0, "stage_0_block_0/norm1/scale": 1,
              "stage_0_block_1/mlp/fc1/bias": 2, "stage_0_merge/reduction/kernel": 2,
              "stage_1_block_0/attn/proj/bias": 3, "stage_1_block_1/norm2/bias": 4, "norm/scale": 5,
              "pos_embed": 5}  # fmt: skip
    assert {path: encoder.layer_id(path) for path in layers} == layers


def test_swin_v2_starts_with_zero_branches_and_temperature_ten():
    images = jnp.zeros((1, 32, 32, 3))
    one = {"depths": (1,), "num_heads": (1,)}
    params = fast_jit(tiny_swin("swinv2", **one).init)(KEY, images)["params"]
    block = params["stage_0_block_0"]
    for norm in ("norm1", "norm2"):
        assert not block[norm]["scale"].any()
        assert not block[norm]["bias"].any()
    np.testing.assert_allclose(jnp.exp(block["attn"]["logit_scale"]), 10, rtol=1e-6)
    first = fast_jit(tiny_swin("swin", **one).init)(KEY, images)["params"]["stage_0_block_0"]
    table = first["attn"]["rel_pos_bias"]["table"]
    np.testing.assert_allclose(table.std(), 0.02, rtol=0.3)


def test_displacements_are_scaled_by_the_pretrained_window():
    own, moved = (log_displacements(8, window).reshape(15, 15, 2) for window in (0, 4))
    assert own[0, 0, 0] == pytest.approx(-np.log2(9) / 3)
    np.testing.assert_allclose(moved[4:11, 4:11], log_displacements(4, 0).reshape(7, 7, 2), rtol=1e-6)
    assert (own[7, 7] == 0).all()
    assert np.isfinite(log_displacements(1, 0)).all()


def test_unit_length_of_a_zero_vector_is_zero_with_a_finite_gradient():
    x = jnp.zeros((2, 3)).at[0].set(jnp.array([3.0, 0.0, 4.0]))
    np.testing.assert_allclose(unit_length(x), [[0.6, 0, 0.8], [0, 0, 0]], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: unit_length(x).sum())(x)).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": (3, 2)}, "width 8 is not a multiple of 3 heads"),
        ({"depths": (2, 2, 2)}, "above 0 per stage"),
        ({"window": 0}, "window is 0"),
        ({"absolute_position": "sincos"}, "choose one of none, learned"),
    ],
)
def test_invalid_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_swin(name, **options)


def test_pretrained_windows_need_one_number_per_stage():
    with pytest.raises(ConfigError, match="one number per stage"):
        make_encoder("swinv2", "b", pretrained_windows=(12, 6))
