"""ResNet and ConvNeXt: the encoder contract, what masking hides, batch norm and its running statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.models.resnet import BatchNorm
from simmim_jax.objectives.simmim import make_forward, make_simmim

KEY = jax.random.key(0)
QUICK_KEY = jax.random.key(0, impl="rbg")  # compiles sooner
NAMES = ("resnet", "convnext")
TINY = {
    "resnet": ("50", {"depths": (1, 1, 1, 1), "width": 8}),
    "convnext": ("t", {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32), "layer_scale": 0.5}),
}
FEATURES = {"resnet": 256, "convnext": 32}
IMAGES = jax.random.normal(KEY, (4, 64, 96, 3))


def tiny_cnn(name, **options):
    size, own = TINY[name]
    return make_encoder(name, size, **{**own, **options})


def at_random(shapes, seed=0):
    """Parameters of these shapes whose kernels keep the scale of their input and whose vectors are near 1: alive in
    every branch, with no statistic at its default, and drawn by numpy, since to compile an `init` takes seconds."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        if len(leaf.shape) > 1:
            return jnp.asarray(rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape), jnp.float32)
        return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape) - 0.2, jnp.float32)

    return jax.tree.map(draw, shapes)


def lively(name):
    """Parameters for any tiny encoder of a name."""
    return at_random(jax.eval_shape(tiny_cnn(name).init, KEY, IMAGES)["params"])


@partial(jax.jit, static_argnames=("encoder", "train", "method", "mutable"))
def apply(encoder, params, images, train=False, batch_index=None, method=None, mutable=False):
    rngs = {"drop_path": KEY}
    return encoder.apply({"params": params}, images, train, batch_index, rngs=rngs, method=method, mutable=mutable)


def relative_difference(a, b) -> float:
    """The largest difference of two trees, each leaf's as a share of its largest value: as in `tiny`, but by numpy,
    which compiles nothing for each new shape and compares arrays from different devices."""

    def one(x, y):
        x, y = np.asarray(x), np.asarray(y)
        return np.abs(x - y).max() / max(np.abs(y).max(), 1e-12)

    return max(map(float, jax.tree.leaves(jax.tree.map(one, a, b))))


def paths(tree) -> list[str]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return ["/".join(key.key for key in path) for path, _ in leaves]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("shape", "channels"), [((64, 96), 1), ((96, 64), 3), ((32, 64), 4)])
def test_features_have_one_place_per_32_pixels_of_any_image(name, shape, channels):
    encoder, images = tiny_cnn(name), jnp.zeros((2, *shape, channels))
    variables = jax.eval_shape(encoder.init, KEY, images)
    assert set(variables) == {"params"}
    tokens = jax.eval_shape(lambda v: encoder.apply(v, images, method="embed"), variables)
    assert tokens.shape[:3] == (2, shape[0] // encoder.token_stride, shape[1] // encoder.token_stride)
    features, sown = jax.eval_shape(lambda v: encoder.apply(v, images, mutable=["intermediates"]), variables)
    expected = (2, shape[0] // encoder.feature_stride, shape[1] // encoder.feature_stride, FEATURES[name])
    assert features.shape == expected
    assert tokens.dtype == features.dtype == jnp.float32
    blocks = sown["intermediates"]["blocks"]
    assert [block.shape[1] for block in blocks] == [shape[0] // stride for stride in (4, 8, 16, 32)]
    assert blocks[-1].shape == features.shape
    assert encoder.depth == len(blocks) == 4


@pytest.mark.parametrize("name", NAMES)
def test_the_last_block_is_the_output_and_the_call_is_embed_and_trunk(name):
    encoder, params = tiny_cnn(name), lively(name)
    features, sown = apply(encoder, params, IMAGES, mutable=("intermediates",))
    np.testing.assert_array_equal(sown["intermediates"]["blocks"][-1], features)
    tokens = encoder.apply({"params": params}, IMAGES, method="embed")
    assert relative_difference(apply(encoder, params, tokens, method="trunk"), features) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_close_to_float32_and_its_parameters_are_float32(name):
    params = lively(name)
    exact, rounded = (apply(tiny_cnn(name, dtype=dtype), params, IMAGES) for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == jnp.float32
    assert 1e-4 < jnp.linalg.norm(exact - rounded) / jnp.linalg.norm(exact) < 0.02  # eight bits a value: 0.004 each
    initial = jax.eval_shape(tiny_cnn(name, dtype="bfloat16").init, KEY, IMAGES)
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["resnet", pytest.param("convnext", marks=pytest.mark.slow)])
def test_rematerialization_changes_no_output_gradient_or_statistic(name):
    params, probe = lively(name), jax.random.normal(jax.random.key(1), (4, 2, 3, FEATURES[name]))

    def run(remat):
        encoder = tiny_cnn(name, drop_path=0.5, remat=remat)

        def loss(params):
            features, state = encoder.apply(
                {"params": params}, IMAGES, True, rngs={"drop_path": KEY}, mutable=["batch_stats"]
            )
            return (features * probe).sum(), (features, state)

        (_, (features, state)), grads = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
        return features, state, grads

    plain, remat = run("none"), run("full")
    # The same sums in another order, and batch norm over as few as 24 values: float32 rounding, magnified.
    assert jax.tree.structure(plain) == jax.tree.structure(remat)
    assert relative_difference(plain[:2], remat[:2]) < 1e-5
    # What shifts the stem's map is undone by the batch norms after it: that gradient is nothing but rounding.
    for grads in (plain[2], remat[2]):
        assert name != "resnet" or np.abs(grads["stem_norm"].pop("bias")).max() < 1e-3
    assert relative_difference(plain[2], remat[2]) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("train", [False, True])
def test_nothing_of_a_hidden_pixel_reaches_a_feature(name, train):
    encoder = tiny_cnn(name, drop_path=0.2)
    init = make_simmim(encoder, image_size=(64, 96), mean=(0.5, 0.5, 0.5), std=(0.2, 0.2, 0.2))["init"]
    params = at_random(jax.eval_shape(init, KEY))
    forward = make_forward(encoder, channels=3)
    squares = jax.random.bernoulli(jax.random.key(2), 0.5, (4, 2, 3)).at[:, 0, 0].set(True).at[:, 1, 2].set(False)
    mask, hidden = (
        jnp.repeat(jnp.repeat(squares, 32 // stride, 1), 32 // stride, 2) for stride in (encoder.token_stride, 1)
    )

    @jax.jit
    def see(images, mask):
        features, pull = jax.vjp(lambda images: forward(params, images, mask, KEY, train)[0], images)
        return features, pull(jax.random.normal(jax.random.key(3), features.shape))[0]

    features, gradient = see(IMAGES, mask)
    assert (gradient[hidden] == 0.0).all()
    assert (gradient[~hidden] != 0.0).mean() > 0.9  # a ReLU or the pooling may stop a few
    _, unmasked = see(IMAGES, jnp.zeros_like(mask))
    assert (unmasked[hidden] != 0.0).mean() > 0.9
    spoilt = jnp.where(hidden[..., None], jnp.nan, IMAGES)
    np.testing.assert_array_equal(see(spoilt, mask)[0], features)


@pytest.mark.parametrize("name", NAMES)
def test_stochastic_depth_draws_by_position_whatever_the_split(name):
    encoder, params = tiny_cnn(name, drop_path=0.9), lively(name)
    images = jnp.broadcast_to(IMAGES[:1], (8, 64, 96, 3))
    batch_index = jnp.arange(8)
    if name == "convnext":  # batch norm is of a whole batch: a split one has other statistics
        whole = apply(encoder, params, images, True, batch_index)
        halves = [apply(encoder, params, images[n : n + 4], True, batch_index[n : n + 4]) for n in (0, 4)]
        assert relative_difference(jnp.concatenate(halves), whole) < 1e-5
        np.testing.assert_array_equal(apply(encoder, params, images, True), whole)  # None counts 0, 1, 2, ...
    same_place = apply(encoder, params, images, True, jnp.zeros(8, jnp.int32))
    assert relative_difference(same_place, jnp.broadcast_to(same_place[:1], same_place.shape)) < 1e-5
    places = apply(encoder, params, images, True, batch_index)
    assert relative_difference(places, jnp.broadcast_to(places[:1], places.shape)) > 1e-2
    order = jnp.asarray([3, 1, 7, 0, 2, 6, 5, 4])
    assert relative_difference(apply(encoder, params, images, True, batch_index[order]), places[order]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_draws_nothing_and_treats_each_image_by_itself(name):
    encoder, params = tiny_cnn(name, drop_path=0.9), lively(name)
    whole = jax.jit(lambda p, x: encoder.apply({"params": p}, x))(params, IMAGES)  # no rng to draw from
    assert relative_difference(whole, apply(tiny_cnn(name), params, IMAGES)) < 1e-6
    alone = apply(encoder, params, IMAGES[2:3])
    assert relative_difference(alone, whole[2:3]) < 1e-5


def batch_norm(x, train, momentum=0.1):
    """(output, statistics, variables) of the layer on `x`, with statistics and scale away from their defaults."""
    layer = BatchNorm(1e-5, momentum)
    variables = at_random(jax.eval_shape(lambda: layer.init(KEY, x, False)))
    y, state = layer.apply(variables, x, train, mutable=["batch_stats"])
    return y, state.get("batch_stats", {}), variables["params"]


def test_batch_norm_normalizes_by_the_batch_and_averages_as_pytorch_does():
    x = 3.0 + 2.0 * jax.random.normal(KEY, (3, 4, 5, 6))
    y, new, params = batch_norm(x, True, momentum=0.25)
    flat = np.asarray(x, np.float64).reshape(-1, 6)
    mean, squares = flat.mean(axis=0), ((flat - flat.mean(axis=0)) ** 2).sum(axis=0)
    expected = (flat - mean) / np.sqrt(squares / 60 + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(np.reshape(y, (-1, 6)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["mean"], 0.75 * params["mean"] + 0.25 * mean, rtol=1e-6)
    np.testing.assert_allclose(new["var"], 0.75 * params["var"] + 0.25 * squares / 59, rtol=1e-6)


def test_batch_norm_in_evaluation_uses_what_is_stored_and_stores_nothing():
    x = 3.0 + 2.0 * jax.random.normal(KEY, (3, 4, 5, 6))
    y, new, params = batch_norm(x, False)
    assert new == {}
    expected = (x - params["mean"]) / np.sqrt(params["var"] + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_keeps_float32_accuracy_far_from_zero():
    x = 1000.0 + jax.random.normal(KEY, (8, 8, 8, 2))
    y, _, params = batch_norm(x, True)
    normal = (y - params["bias"]) / params["scale"]
    np.testing.assert_allclose(normal.std(axis=(0, 1, 2)), 1.0, rtol=1e-4)


def test_batch_norm_is_of_the_whole_batch_whatever_the_number_of_devices():
    x = 3.0 + 2.0 * jax.random.normal(KEY, (16, 4, 4, 6)) * jnp.arange(1, 17)[:, None, None, None]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layer = BatchNorm(1e-5, 0.1)
    variables = layer.init(KEY, x, False)
    run = jax.jit(lambda x: layer.apply(variables, x, True, mutable=["batch_stats"]))
    alone, spread = run(x), run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert relative_difference(spread, alone) < 1e-5


def test_running_statistics_are_put_under_the_paths_of_their_parameters_in_training_alone():
    encoder, params = tiny_cnn("resnet"), lively("resnet")
    _, state = apply(encoder, params, IMAGES, True, mutable=("batch_stats",))
    stored = [path for path in paths(params) if path.endswith(("/mean", "/var"))]
    assert paths(state["batch_stats"]) == stored
    assert len(stored) == 2 * (1 + 4 * 4)
    assert "batch_stats" not in apply(encoder, params, IMAGES, False, mutable=("batch_stats",))[1]
    assert apply(encoder, params, IMAGES, True).shape == (4, 2, 3, 256)  # a mutable collection is not needed
    for train in (False, True):
        assert set(jax.eval_shape(lambda train=train: encoder.init(KEY, IMAGES, train))) == {"params"}


@pytest.mark.parametrize("train", [False, True])
def test_running_statistics_get_no_gradient(train):
    encoder = tiny_cnn("resnet")

    def loss(params, share):
        features, state = encoder.apply({"params": params}, IMAGES, train, mutable=["batch_stats"])
        return features.std() + share * sum(leaf.sum() for leaf in jax.tree.leaves(state))

    params, gradient = lively("resnet"), jax.jit(jax.grad(loss))
    grads = gradient(params, 1.0)
    for path, leaf in zip(paths(grads), jax.tree.leaves(grads), strict=True):
        assert leaf.any() != path.endswith(("/mean", "/var")), path
    assert relative_difference(gradient(params, 0.0), grads) < 1e-6  # nor does anything get one through the new values


def test_a_residual_branch_of_resnet_starts_at_zero_and_its_kernels_as_he_et_al():
    params = jax.jit(tiny_cnn("resnet", width=32).init)(QUICK_KEY, IMAGES[:1])["params"]
    for n in range(4):
        block = params[f"stage_{n}_block_0"]
        assert not block["norm3"]["scale"].any()
        assert (block["norm1"]["scale"] == 1).all()
        kernel = block["conv2"]["kernel"]
        np.testing.assert_allclose(kernel.std(), (2 / (9 * kernel.shape[-1])) ** 0.5, rtol=0.05)
    assert "bias" not in params["stem_conv"]


def test_convnext_starts_as_the_paper_says():
    params = jax.jit(tiny_cnn("convnext", widths=(32, 48, 64, 96), layer_scale=1e-6).init)(QUICK_KEY, IMAGES[:1])[
        "params"
    ]
    for path, leaf in zip(paths(params), jax.tree.leaves(params), strict=True):
        if path.endswith("gamma"):
            np.testing.assert_array_equal(leaf, np.full(leaf.shape, 1e-6, np.float32))
        elif path.endswith("kernel"):
            np.testing.assert_allclose(leaf.std(), 0.02, rtol=0.1, err_msg=path)
        else:
            assert (leaf == float(path.endswith("scale"))).all(), path


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("resnet", "50", 25_557_032 - 2049 * 1000),  # timm's counts, less those of a head for 1000 classes
        ("resnet", "101", 44_549_160 - 2049 * 1000),
        ("convnext", "t", 28_589_128 - 2 * 768 - 769 * 1000),
        ("convnext", "s", 50_223_688 - 2 * 768 - 769 * 1000),
        ("convnext", "b", 88_591_464 - 2 * 1024 - 1025 * 1000),
        ("convnext", "l", 197_767_336 - 2 * 1536 - 1537 * 1000),
    ],
)
def test_every_size_has_the_published_parameter_count(name, size, count):
    encoder = make_encoder(name, size)
    params = jax.eval_shape(encoder.init, KEY, jnp.zeros((1, 224, 224, 3)))["params"]
    sizes = dict(zip(paths(params), (leaf.size for leaf in jax.tree.leaves(params)), strict=True))
    assert sum(n for path, n in sizes.items() if not path.endswith(("/mean", "/var"))) == count
    layers = {encoder.layer_id(path) for path in sizes}
    assert layers == set(range(encoder.depth + 1))


def test_resnet_50x4_is_a_resnet_50_with_four_times_the_channels_everywhere():
    image = jnp.zeros((1, 224, 224, 3))
    small, wide = (
        jax.eval_shape(make_encoder("resnet", size).init, KEY, image)["params"] for size in ("50", "50x4")
    )  # fmt: skip
    assert paths(small) == paths(wide)
    for path, a, b in zip(paths(small), jax.tree.leaves(small), jax.tree.leaves(wide), strict=True):
        expected = [4 * n for n in a.shape]
        if path.endswith("kernel"):
            expected[:2] = a.shape[:2]
        if path == "stem_conv/kernel":
            expected[2] = 3
        assert list(b.shape) == expected, path


BATCH_NORM = ("bias", "mean", "scale", "var")


def test_the_parameters_and_layers_of_resnet_written_out():
    encoder = make_encoder("resnet", "50", depths=(1, 2, 1, 1), width=8)
    params = jax.eval_shape(encoder.init, KEY, IMAGES)["params"]
    expected = {"stem_conv/kernel": 0} | {f"stem_norm/{leaf}": 0 for leaf in BATCH_NORM}
    blocks = ("stage_0_block_0", "stage_1_block_0", "stage_1_block_1", "stage_2_block_0", "stage_3_block_0")
    for layer, block in enumerate(blocks, start=1):
        for n in (1, 2, 3):
            expected |= {f"{block}/conv{n}/kernel": layer}
            expected |= {f"{block}/norm{n}/{leaf}": layer for leaf in BATCH_NORM}
        if block != "stage_1_block_1":
            expected |= {f"{block}/shortcut_conv/kernel": layer}
            expected |= {f"{block}/shortcut_norm/{leaf}": layer for leaf in BATCH_NORM}
    assert {path: encoder.layer_id(path) for path in paths(params)} == expected
    assert encoder.layer_id("logits/kernel") == encoder.depth + 1 == 6


def test_the_parameters_and_layers_of_convnext_written_out():
    encoder = make_encoder("convnext", "t", depths=(1, 2, 1, 1), widths=(8, 16, 24, 32))
    params = jax.eval_shape(encoder.init, KEY, IMAGES)["params"]
    expected = {f"patch_{leaf}": 0 for leaf in ("embed/kernel", "embed/bias", "norm/scale", "norm/bias")}
    blocks = ("stage_0_block_0", "stage_1_block_0", "stage_1_block_1", "stage_2_block_0", "stage_3_block_0")
    for layer, block in enumerate(blocks, start=1):
        for leaf in ("conv/kernel", "conv/bias", "norm/scale", "norm/bias", "scale/gamma"):
            expected |= {f"{block}/{leaf}": layer}
        for leaf in ("fc1/kernel", "fc1/bias", "fc2/kernel", "fc2/bias"):
            expected |= {f"{block}/mlp/{leaf}": layer}
    for stage, layer in ((1, 2), (2, 4), (3, 5)):
        for leaf in ("norm/scale", "norm/bias", "conv/kernel", "conv/bias"):
            expected |= {f"stage_{stage}_down/{leaf}": layer}
    assert {path: encoder.layer_id(path) for path in paths(params)} == expected
    assert encoder.layer_id("logits/kernel") == encoder.depth + 1 == 6


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet", {"depths": (3, 4, 6)}, "four numbers above 0"),
        ("resnet", {"depths": (3, 4, 0, 3)}, "four numbers above 0"),
        ("resnet", {"width": 0}, "at least 1"),
        ("resnet", {"norm_momentum": 0.0}, r"not in \(0, 1\]"),
        ("resnet", {"norm_epsilon": 0.0}, "above 0"),
        ("resnet", {"drop_path": 1.0}, r"not in \[0, 1\)"),
        ("resnet", {"dtype": "float16"}, "choose one of float32, bfloat16"),
        ("resnet", {"widths": (1, 2, 3, 4)}, "did you mean width"),
        ("convnext", {"depths": ()}, "four numbers above 0"),
        ("convnext", {"widths": (8, 16, 24, 0)}, "four numbers above 0"),
        ("convnext", {"layer_scale": -1.0}, "at least 0"),
        ("convnext", {"drop_path": -0.1}, r"not in \[0, 1\)"),
        ("convnext", {"init_truncation": 0.0}, "above 0"),
        ("convnext", {"dtype": "float16"}, "choose one of float32, bfloat16"),
        ("convnext", {"depth": 12}, "did you mean depths"),
    ],
)
def test_options_that_cannot_work_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_cnn(name, **options)
