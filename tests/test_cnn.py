"""ResNet and ConvNeXt: sizes, layers, initial values, batch norm. test_encoders.py has the laws of all encoders."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from tiny import fast_jit, random_params, relative_difference

from simmim_jax.errors import ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.models.resnet import BatchNorm

KEY = jax.random.key(0)
FAST_KEY = jax.random.key(0, impl="rbg")  # compiles faster
TINY = {
    "resnet": ("50", {"depths": (1, 1, 1, 1), "width": 8}),
    "convnext": ("t", {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32), "layer_scale": 0.5}),
}
IMAGES = jax.random.normal(KEY, (4, 64, 96, 3))


def tiny_cnn(name, **options):
    size, own = TINY[name]
    return make_encoder(name, size, **{**own, **options})


def lively(name):
    return random_params(jax.eval_shape(tiny_cnn(name).init, KEY, IMAGES)["params"])


@partial(jax.jit, static_argnames=("encoder", "train", "method", "mutable"))
def apply(encoder, params, images, train=False, batch_index=None, method=None, mutable=False):
    rngs = {"drop_path": KEY}
    return encoder.apply({"params": params}, images, train, batch_index, rngs=rngs, method=method, mutable=mutable)


def paths(tree) -> list[str]:
    leaves, _ = jax.tree.flatten_with_path(tree)
    return ["/".join(key.key for key in path) for path, _ in leaves]


def batch_norm(x, train, momentum=0.1):
    """(output, new statistics, parameters) of the layer on `x`, with no parameter at its default."""
    layer = BatchNorm(1e-5, momentum)
    variables = random_params(jax.eval_shape(lambda: layer.init(KEY, x, False)))
    y, state = layer.apply(variables, x, train, mutable=["batch_stats"])
    return y, state.get("batch_stats", {}), variables["params"]


def test_batch_norm_in_training_equals_pytorch():
    x = 3.0 + 2.0 * jax.random.normal(KEY, (3, 4, 5, 6))
    y, new, params = batch_norm(x, True, momentum=0.25)
    flat = np.asarray(x, np.float64).reshape(-1, 6)
    mean, squares = flat.mean(axis=0), ((flat - flat.mean(axis=0)) ** 2).sum(axis=0)
    expected = (flat - mean) / np.sqrt(squares / 60 + 1e-5) * params["scale"] + params["bias"]
    np.testing.assert_allclose(np.reshape(y, (-1, 6)), expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(new["mean"], 0.75 * params["mean"] + 0.25 * mean, rtol=1e-6)
    np.testing.assert_allclose(new["var"], 0.75 * params["var"] + 0.25 * squares / 59, rtol=1e-6)


def test_batch_norm_in_evaluation_uses_running_statistics_and_updates_nothing():
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


def test_batch_norm_covers_the_whole_batch_on_any_number_of_devices():
    x = 3.0 + 2.0 * jax.random.normal(KEY, (16, 4, 4, 6)) * jnp.arange(1, 17)[:, None, None, None]
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    layer = BatchNorm(1e-5, 0.1)
    variables = layer.init(KEY, x, False)
    run = jax.jit(lambda x: layer.apply(variables, x, True, mutable=["batch_stats"]))
    alone, spread = run(x), run(jax.device_put(x, NamedSharding(mesh, PartitionSpec("data"))))
    assert relative_difference(spread, alone) < 1e-5


def test_new_running_statistics_have_the_paths_of_their_parameters_in_training_only():
    encoder, params = tiny_cnn("resnet"), lively("resnet")
    _, state = apply(encoder, params, IMAGES, True, mutable=("batch_stats",))
    stored = [path for path in paths(params) if path.endswith(("/mean", "/var"))]
    assert paths(state["batch_stats"]) == stored
    assert len(stored) == 2 * (1 + 4 * 4)
    assert "batch_stats" not in apply(encoder, params, IMAGES, False, mutable=("batch_stats",))[1]
    assert apply(encoder, params, IMAGES, True).shape == (4, 2, 3, 256)  # the collection need not be mutable
    for train in (False, True):
        assert set(jax.eval_shape(lambda train=train: encoder.init(KEY, IMAGES, train))) == {"params"}


def test_running_statistics_get_no_gradient():
    encoder = tiny_cnn("resnet")

    def loss(params, share):
        features, state = encoder.apply({"params": params}, IMAGES, True, mutable=["batch_stats"])
        return features.std() + share * sum(leaf.sum() for leaf in jax.tree.leaves(state))

    params, gradient = lively("resnet"), jax.jit(jax.grad(loss))
    grads = gradient(params, 1.0)
    for path, leaf in zip(paths(grads), jax.tree.leaves(grads), strict=True):
        assert leaf.any() != path.endswith(("/mean", "/var")), path
    assert relative_difference(gradient(params, 0.0), grads) < 1e-6  # new statistics carry no gradient


def test_resnet_branches_start_at_zero_and_kernels_with_he_initialization():
    params = fast_jit(tiny_cnn("resnet", width=32).init)(FAST_KEY, IMAGES[:1])["params"]
    for n in range(4):
        block = params[f"stage_{n}_block_0"]
        assert not block["norm3"]["scale"].any()
        assert (block["norm1"]["scale"] == 1).all()
        kernel = block["conv2"]["kernel"]
        np.testing.assert_allclose(kernel.std(), (2 / (9 * kernel.shape[-1])) ** 0.5, rtol=0.05)
    assert "bias" not in params["stem_conv"]


def test_initial_values_of_convnext_are_those_of_the_paper():
    params = fast_jit(tiny_cnn("convnext", widths=(32, 48, 64, 96), layer_scale=1e-6).init)(FAST_KEY, IMAGES[:1])[
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
        ("resnet", "50", 25_557_032 - 2049 * 1000),  # timm's count without the head of 1000 classes
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


def test_resnet_50x4_has_four_times_the_channels_of_resnet_50():
    image = jnp.zeros((1, 224, 224, 3))
    small, wide = (jax.eval_shape(make_encoder("resnet", size).init, KEY, image)["params"] for size in ("50", "50x4"))
    assert paths(small) == paths(wide)
    for path, a, b in zip(paths(small), jax.tree.leaves(small), jax.tree.leaves(wide), strict=True):
        expected = [4 * n for n in a.shape]
        if path.endswith("kernel"):
            expected[:2] = a.shape[:2]
        if path == "stem_conv/kernel":
            expected[2] = 3
        assert list(b.shape) == expected, path


BATCH_NORM = ("bias", "mean", "scale", "var")


def test_parameters_and_layers_of_resnet():
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


def test_parameters_and_layers_of_convnext():
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
        ("resnet", {"depths": (3, 4, 6)}, "per stage, 4 in all"),
        ("resnet", {"width": 0}, "at least 1"),
        ("resnet", {"norm_momentum": 0.0}, r"not in \(0, 1\]"),
        ("resnet", {"norm_epsilon": 0.0}, "above 0"),
        ("convnext", {"depths": ()}, "above 0 per stage"),
        ("convnext", {"widths": (8, 16, 24, 0)}, "above 0 per stage"),
        ("convnext", {"layer_scale": -1.0}, "at least 0"),
    ],
)
def test_invalid_options_are_refused(name, options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_cnn(name, **options)
