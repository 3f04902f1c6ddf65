"""Laws that every encoder in the registry obeys. A new encoder needs one line in `TINY`."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import random_params, relative_difference

from simmim_jax.errors import ConfigError
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.models.layers import MAX_TRUNCATION, truncated_normal
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.simmim import make_forward
from simmim_jax.runtime.scanning import path_name, stack, unstack

KEY = jax.random.key(0)
SIZE = (64, 96)
IMAGES = jax.random.normal(KEY, (4, *SIZE, 3))
TINY = {
    "convnext": {"depths": (2, 1, 1, 1), "widths": (8, 8, 8, 8), "layer_scale": 0.5},
    "resnet": {"depths": (1, 1, 1, 1), "width": 8},
    "swin": {"width": 8, "depths": (1, 5), "num_heads": (1, 2), "window": 5, "absolute_position": "learned"},
    "swinv2": {"width": 8, "depths": (4,), "num_heads": (1,), "window": 4},
    "vit": {"width": 16, "depth": 3, "num_heads": 2, "patch_size": 16},
}
ALL = sorted(ENCODERS)
FAST = ("vit", "resnet")  # attention and convolutions; the others run the compiled laws as slow tests
SOME = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
SCANNED = [name for name in ALL if make_encoder(name, None, **TINY[name]).options().get("scan") is not None]


def tiny(name, **options):
    return make_encoder(name, None, **{**TINY[name], **options})


@pytest.mark.parametrize("sigmas", [1.0, 6.0, 100.0])
def test_initial_weights_have_no_strays(sigmas):
    """Among these draws are three uniform ones of exactly -1, which only the cut keeps from becoming infinite."""
    draw = jax.jit(lambda key: truncated_normal(sigmas)(key, (2**23,)))
    largest = np.abs(draw(jax.random.key(2))).max()
    assert largest <= 0.02 * min(sigmas, MAX_TRUNCATION)
    assert largest > 0.0199


def shapes(encoder, images=IMAGES):
    return jax.eval_shape(encoder.init, KEY, images)["params"]


def paths(params) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("size", "channels"), [((64, 96), 1), ((96, 64), 4)])
def test_embed_and_trunk_have_the_shapes_of_the_contract(name, size, channels):
    encoder, images = tiny(name), jnp.zeros((2, *size, channels))
    variables = jax.eval_shape(encoder.init, KEY, images)
    assert set(variables) == {"params"}
    tokens = jax.eval_shape(lambda v: encoder.apply(v, images, method="embed"), variables)
    assert tokens.shape[:3] == (2, *(side // encoder.token_stride for side in size))
    features, sown = jax.eval_shape(lambda v: encoder.apply(v, images, mutable=["intermediates"]), variables)
    assert features.shape[:3] == (2, *(side // encoder.feature_stride for side in size))
    assert tokens.dtype == features.dtype == jnp.float32
    blocks = sown["intermediates"]["blocks"]
    assert len(blocks) == encoder.depth == encoder.stages[-1]
    assert blocks[-1].shape == features.shape
    class_tokens = sown["intermediates"].get("class_tokens", ())
    assert len(class_tokens) == (encoder.depth + 1 if encoder.class_token else 0)


@pytest.mark.parametrize("name", ALL)
def test_layer_ids_cover_every_parameter_path(name):
    encoder = tiny(name)
    layers = {encoder.layer_id(path) for path in paths(shapes(encoder))}
    assert {0, *range(1, encoder.depth + 1)} <= layers <= set(range(encoder.depth + 2))
    assert encoder.layer_id("logits/kernel") == encoder.depth + 1


@pytest.mark.parametrize("name", ALL)
def test_parameters_and_features_are_float32_if_matmuls_are_bfloat16(name):
    encoder = tiny(name, dtype="bfloat16")
    params = shapes(encoder)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype("float32")}
    for method in ("embed", "__call__"):
        apply = partial(encoder.apply, method=method)
        assert jax.eval_shape(apply, {"params": params}, IMAGES).dtype == jnp.float32


@pytest.mark.parametrize("name", ALL)
def test_invalid_options_are_refused_and_every_size_is_valid(name):
    for option, hint in {"drop_path": 1.0, "dtype": "float16", "remat": "dot"}.items():
        with pytest.raises(ConfigError, match=option):
            tiny(name, **{option: hint})
    with pytest.raises(ConfigError, match="unknown option"):
        tiny(name, droppath=0.1)
    for size in ENCODERS[name][1]:
        assert make_encoder(name, size).depth > 0


POSITIONS = [
    ("vit", {"depth": 1, "absolute_position": "learned"}),
    ("vit", {"depth": 1, "absolute_position": "sincos"}),
    ("vit", {"depth": 1, "relative_position": "per_block"}),
    ("swinv2", {"window": 5}),  # does not tile the map, which is padded
]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in ALL), *POSITIONS])
def test_masked_pixels_have_no_influence_on_features(name, options):
    """In training mode. Gradients with respect to masked pixels are exactly zero; those of visible pixels are not."""
    encoder = tiny(name, drop_path=0.2, **options)
    objective = make_objective("simmim", encoder, image_size=SIZE, mean=(0.5,) * 3, std=(0.2,) * 3)
    params = random_params(jax.eval_shape(objective.init, KEY))
    forward = make_forward(encoder, channels=3)
    patches = jax.random.bernoulli(jax.random.key(2), 0.5, (4, 2, 3)).at[:, 0, 0].set(True).at[:, 1, 2].set(False)
    mask, masked = (patches.repeat(32 // side, 1).repeat(32 // side, 2) for side in (encoder.token_stride, 1))

    @jax.jit
    def run(images, mask):
        features, pull = jax.vjp(lambda images: forward(params, images, mask, KEY, True)[0], images)
        return features, pull(jax.random.normal(jax.random.key(3), features.shape))[0]

    features, gradient = run(IMAGES, mask)
    assert (gradient[masked] == 0.0).all()
    assert (gradient[~masked] != 0.0).mean() > 0.9  # a ReLU or pooling may stop a few
    _, unmasked = run(IMAGES, jnp.zeros_like(mask))
    assert (unmasked[masked] != 0.0).mean() > 0.9
    np.testing.assert_array_equal(run(jnp.where(masked[..., None], jnp.nan, IMAGES), mask)[0], features)


@partial(jax.jit, static_argnames="encoder")
def train(encoder, params):
    """(features, block outputs, gradients) in training mode."""

    def loss(params):
        rngs = {"drop_path": KEY}
        features, sown = encoder.apply({"params": params}, IMAGES, True, rngs=rngs, mutable=["intermediates"])
        return (features * jnp.cos(jnp.arange(features.size).reshape(features.shape))).mean(), (features, sown)

    (_, (features, sown)), grads = jax.value_and_grad(loss, has_aux=True)(params)
    return features, sown["intermediates"]["blocks"], grads


def check_equal(name, **options):
    plain, other = tiny(name, drop_path=0.4), tiny(name, drop_path=0.4, **options)
    params = random_params(shapes(plain))
    features, blocks, grads = train(plain, params)
    features_2, blocks_2, grads_2 = train(other, stack(params, other.scanned_layers))
    # float32 rounding, because another program sums in another order
    assert relative_difference(features_2, features) < 1e-5
    assert [x.shape for x in blocks_2] == [x.shape for x in blocks]
    assert relative_difference(blocks_2, blocks) < 1e-5
    # The gradient of a bias before batch norm is only rounding (1e-8 here; the largest gradient is 0.05), and that of a
    # logit scale sums values that cancel (1e-7 of 3e-3). They may differ by float32 rounding of the largest gradient.
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads))
    floor = 1e-2 * largest if name in ("resnet", "swinv2") else 0.0
    assert relative_difference(unstack(grads_2, other.scanned_layers), grads, floor) < 1e-4


@pytest.mark.parametrize(
    "name", [name if name == "vit" else pytest.param(name, marks=pytest.mark.slow) for name in SCANNED]
)
def test_scan_equals_loop(name):
    check_equal(name, scan=True, remat="dots")


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_equals_plain(name, remat):
    check_equal(name, remat=remat)


@pytest.mark.parametrize("name", SCANNED)
def test_scanned_layers_are_exactly_the_stacked_parameters(name):
    loop, scan = shapes(tiny(name)), shapes(tiny(name, scan=True))
    assert tiny(name).scanned_layers == {}
    unstacked = unstack(scan, tiny(name, scan=True).scanned_layers)
    assert jax.tree.map(lambda x: x.shape, unstacked) == jax.tree.map(lambda x: x.shape, loop)


@pytest.mark.parametrize("name", SOME)
def test_stochastic_depth_depends_on_batch_index_only(name):
    encoder = tiny(name, drop_path=0.9)
    params = random_params(shapes(encoder))
    images = jnp.broadcast_to(IMAGES[:1], (8, *SIZE, 3))
    rngs = {"drop_path": KEY}
    apply = jax.jit(lambda index: encoder.apply({"params": params}, images, True, index, rngs=rngs))
    index, order = jnp.arange(8), jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    features = apply(index)
    assert relative_difference(features, jnp.broadcast_to(features[:1], features.shape)) > 1e-2
    assert relative_difference(apply(index[order]), features[order]) < 1e-5


@pytest.mark.parametrize("name", SOME)
def test_evaluation_treats_each_image_by_itself_and_bfloat16_is_close(name):
    encoder, params = tiny(name, drop_path=0.9), random_params(shapes(tiny(name)))
    whole = jax.jit(lambda x: encoder.apply({"params": params}, x))(IMAGES)  # no rng: nothing is drawn
    single = jax.jit(lambda x: encoder.apply({"params": params}, x))(IMAGES[2:3])
    assert relative_difference(single, whole[2:3]) < 1e-5
    half = jax.jit(lambda x: tiny(name, dtype="bfloat16").apply({"params": params}, x))(IMAGES)
    assert 1e-4 < jnp.linalg.norm(whole - half) / jnp.linalg.norm(whole) < 0.03  # 0.004 per value: eight bits
