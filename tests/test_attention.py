"""Attention, GELU and LayerNorm with custom gradients, and the choice of cuDNN's attention."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo
from tiny import relative_difference, tiny_encoder

from simmim_jax.errors import ConfigError
from simmim_jax.models import attention, make_encoder, vit
from simmim_jax.models.attention import attend_by_cudnn, attend_by_xla, choose_attention, cudnn_padding
from simmim_jax.models.layers import gelu, normalize_channels

KEY = jax.random.key(0)
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU: JAX_PLATFORMS=cuda")


def drawn(*shapes, dtype="float32"):
    return [
        jax.random.normal(key, shape, dtype)
        for key, shape in zip(jax.random.split(KEY, len(shapes)), shapes, strict=True)
    ]


def formula_attention(query, key, value, bias):
    logits = jnp.einsum("...qhc,...khc->...hqk", query, key) * query.shape[-1] ** -0.5
    weights = jax.nn.softmax(logits if bias is None else logits + bias)
    return jnp.einsum("...hqk,...khc->...qhc", weights, value)


def value_and_gradients(function, *arguments):
    out, pull = jax.vjp(function, *arguments)
    (weight,) = drawn(out.shape)
    return out, pull(weight.astype(out.dtype))


@pytest.mark.parametrize(
    ("lead", "bias", "recompute"),
    [
        pytest.param((2, 4), (4, 3, 7, 7), False, id="windows"),
        pytest.param((2,), (3, 7, 7), True, id="a bias, recomputed"),
        pytest.param((2,), (3, 7, 7), False, id="a bias", marks=pytest.mark.slow),
        pytest.param((2,), None, False, id="no bias", marks=pytest.mark.slow),
    ],
)
def test_attention_and_its_gradients_equal_the_formula(lead, bias, recompute):
    arguments = drawn(*[(*lead, 7, 3, 5)] * 3, *([bias] if bias else []))
    more = [] if bias else [None]
    ours = value_and_gradients(jax.jit(lambda *x: attend_by_xla(*x, *more, recompute=recompute)), *arguments)
    formula = value_and_gradients(jax.jit(lambda *x: formula_attention(*x, *more)), *arguments)
    assert relative_difference(ours, formula) < 2e-6  # float32 rounding of sums over seven tokens


@pytest.mark.slow
def test_attention_is_finite_for_large_logits():
    query, key, value, bias = drawn(*[(1, 7, 1, 8)] * 3, (1, 7, 7))
    out, grads = value_and_gradients(attend_by_xla, 300 * query, 300 * key, value, 1e4 * bias)
    assert all(jnp.isfinite(x).all() for x in jax.tree.leaves((out, grads)))


@pytest.mark.slow
def test_attention_in_bfloat16_rounds_only_products():
    arguments = drawn(*[(2, 7, 3, 8)] * 3, (3, 7, 7))
    half = [x.astype("bfloat16") for x in arguments[:3]] + arguments[3:]
    exact = value_and_gradients(formula_attention, *[x.astype("float32") for x in half])
    out, grads = value_and_gradients(attend_by_xla, *half)
    assert [x.dtype for x in (out, *grads)] == [*["bfloat16"] * 4, "float32"]
    assert relative_difference(jax.tree.map(lambda x: x.astype("float32"), (out, grads)), exact) < 2e-2  # eight bits


@pytest.mark.parametrize("backend", ["cpu", "tpu"])  # they keep different values for the gradient
def test_gelu_and_its_gradient_are_exact_to_float32(backend, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    points = np.linspace(-9, 9, 2001)
    below = np.array([0.5 * math.erfc(-x / 2**0.5) for x in points])
    slopes = below + points * np.exp(-0.5 * points**2) / (2 * np.pi) ** 0.5
    value, pull = jax.vjp(gelu, jnp.asarray(points, jnp.float32))
    (slope,) = pull(jnp.ones_like(value))
    # 1 + erf(x) has the rounding of float32 at 1, 6e-8, for any x. PyTorch uses the same formula.
    np.testing.assert_allclose(value, points * below, atol=6e-7, rtol=3e-7)
    np.testing.assert_allclose(slope, slopes, atol=6e-7)
    halves = jnp.asarray(points, jnp.bfloat16)
    np.testing.assert_array_equal(gelu(halves), gelu(halves.astype(jnp.float32)).astype(jnp.bfloat16))


def test_layer_norm_and_its_gradients_equal_the_formula_also_far_from_zero():
    def formula(x, scale, bias):
        centered = x - x.mean(-1, keepdims=True)
        return centered / jnp.sqrt((centered**2).mean(-1, keepdims=True) + 1e-5) * scale + bias

    for offset in (0.0, 1000.0):
        x, scale, bias = drawn((2, 3, 64), (64,), (64,))
        arguments = (x + offset, scale, bias)
        ours = value_and_gradients(jax.jit(lambda *x: normalize_channels(*x, 1e-5)), *arguments)
        assert relative_difference(ours, value_and_gradients(jax.jit(formula), *arguments)) < 1e-5


@pytest.mark.parametrize(
    ("dtype", "head_width", "reason"),
    [
        ("float32", 64, "it needs encoder.dtype bfloat16, not float32"),
        ("bfloat16", 36, "it needs heads of 8, 16, ... 128 channels, not of 36"),
        ("bfloat16", 256, "not of 256"),
        pytest.param(
            "bfloat16", 64, "an NVIDIA GPU, and this is cpu", marks=pytest.mark.skipif(not needs_gpu.args[0], reason="")
        ),
    ],
)
def test_auto_avoids_an_unavailable_cudnn_and_cudnn_gives_the_reason(dtype, head_width, reason):
    assert choose_attention("auto", dtype, head_width) == choose_attention("xla", dtype, head_width) == "xla"
    with pytest.raises(ConfigError, match=reason) as error:
        choose_attention("cudnn", dtype, head_width)
    assert "\n" not in str(error.value)


def test_unknown_options_are_refused_and_swin_has_no_cudnn():
    with pytest.raises(ConfigError, match="choose one of auto, xla, cudnn"):
        make_encoder("vit", "ti", attention="flash")
    for name in ("swin", "swinv2"):
        with pytest.raises(ConfigError, match=r"choose one of auto, xla$"):
            make_encoder(name, "t", attention="cudnn")


def test_cudnn_gets_even_lengths():
    assert [cudnn_padding(tokens) for tokens in (196, 197, 65, 577)] == [0, 3, 7, 7]


@pytest.mark.parametrize("relative_position", ["shared", pytest.param("none", marks=pytest.mark.slow)])
def test_padding_for_cudnn_changes_no_feature_or_gradient(relative_position, monkeypatch):
    """17 tokens with the class token, padded to 24. Only the kernel is replaced."""
    encoder, images = tiny_encoder(relative_position=relative_position, depth=1), jax.random.normal(KEY, (2, 32, 32, 3))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(encoder.init, KEY, images)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), jnp.float32), shapes)
    loss = lambda params: jnp.square(encoder.apply(params, images)).mean()  # noqa: E731
    expected = jax.jit(jax.value_and_grad(loss))(params)
    seen, plain = [], jax.nn.dot_product_attention

    def kernel(*arguments, implementation, **options):
        seen.append((arguments[0].shape[1], implementation))
        return plain(*arguments, **options)

    monkeypatch.setattr(vit, "choose_attention", lambda *_: "cudnn")
    monkeypatch.setattr(jax.nn, "dot_product_attention", kernel)
    assert relative_difference(jax.jit(jax.value_and_grad(lambda p: loss(p)))(params), expected) < 1e-5
    assert set(seen) == {(24, "cudnn")}


@pytest.mark.parametrize(
    ("relative_position", "kernels"),
    [("shared", {"ScaleBiasSoftmax", "ScaleBiasSoftmaxBackward"}), ("none", {"Softmax", "SoftmaxBackward"})],
)
@pytest.mark.parametrize("scan", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_lowering_for_cuda_calls_cudnn_forward_and_backward(relative_position, kernels, scan, monkeypatch):
    """JAX refuses without an installed cuDNN. Its check is replaced; the program is lowered, not compiled."""
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(attention, "refusal_of_cudnn", lambda *_: "")
    encoder = tiny_encoder(relative_position=relative_position, dtype="bfloat16", scan=scan, remat="dots")
    images = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(encoder.init, KEY, images)
    grad = jax.jit(jax.grad(lambda params: encoder.apply(params, images).sum()))
    lowered = grad.trace(params).lower(lowering_platforms=("cuda",)).as_text()
    called = {call.split('"')[0].split("(")[0] for call in lowered.split("__cudnn$fmha")[1:]}
    assert called == kernels


@needs_gpu
@pytest.mark.parametrize("tokens", [16, 17, 197])
@pytest.mark.parametrize("with_bias", [False, True])
def test_cudnn_equals_the_formula_including_the_gradient_of_the_bias(tokens, with_bias):
    padded = tokens + cudnn_padding(tokens)
    arguments = drawn(*[(64, tokens, 4, 64)] * 3, dtype="bfloat16") + (drawn((4, tokens, tokens)) if with_bias else [])
    more = [] if with_bias else [None]

    def by_cudnn(*x):
        heads = [jnp.pad(one, ((0, 0), (0, padded - tokens), (0, 0), (0, 0))) for one in x[:3]]
        return attend_by_cudnn(*heads, *x[3:], *more, tokens)[:, :tokens]

    assert choose_attention("auto", "bfloat16", 64) == "cudnn"
    ours = jax.jit(lambda *x: value_and_gradients(by_cudnn, *x))(*arguments)
    exact = jax.jit(lambda *x: value_and_gradients(lambda *y: formula_attention(*y, *more), *x))(
        *[x.astype("float32") for x in arguments]
    )
    assert relative_difference(jax.tree.map(lambda x: x.astype("float32"), ours), exact) < 2e-2  # eight bits
