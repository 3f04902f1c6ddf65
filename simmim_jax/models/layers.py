"""Layers and initializers that encoders share.

Shape letters: b images, n tokens of one image (class token included), d width, h heads, i and j the token grid; "..."
stands for n tokens or for a map of them.

Parameters are float32. Matmuls run in `dtype` (float32 or bfloat16). The residual stream, norms, softmax and biases of
attention logits stay in float32, as in PyTorch's automatic mixed precision, which the official recipes use.
"""

import math
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError, check_minimum


def check_heads(width: int, heads: int, where: str) -> None:
    """Raise ConfigError unless `width` is a multiple of `heads`; suggest the nearest widths that are."""
    check_minimum(where, heads, 1)
    if width % heads:
        near = width // heads * heads
        raise ConfigError(
            f"width {width} is not a multiple of {heads} heads", where, f"try {near or heads} or {near + heads}"
        )


# Largest cut of a normal distribution, in standard deviations: 2 of 1e9 draws are beyond it. With a wider one, 1 of
# 1e7 float32 draws are the cut itself: uniform draws of exactly -1, which the inverse error function makes infinite.
MAX_TRUNCATION = 6.0


def truncated_normal(sigmas: float = MAX_TRUNCATION, scale: float = 1.0) -> jax.nn.initializers.Initializer:
    """N(0, 0.02) cut at `sigmas` standard deviations, without rescaling for the cut, times `scale`.

    Official SimMIM cuts a ViT at one sigma (vision_transformer.py, `VisionTransformerForSimMIM._trunc_normal_`). Its
    effective deviation is 0.0108. Everything else is cut at an absolute 2, which is 100 sigmas and cuts nothing.
    """
    sigmas = min(sigmas, MAX_TRUNCATION)
    return jax.nn.initializers.truncated_normal(0.02 * scale, lower=-sigmas, upper=sigmas)


def uniform_by_fan_in(fan_in: int) -> jax.nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)), PyTorch's default for the weight and bias of a convolution."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


class Linear(nn.Module):
    """A linear map of the last `axes` axes to `features` channels. The kernel has shape [*those axes, features]."""

    features: int
    dtype: str
    kernel_init: jax.nn.initializers.Initializer
    axes: int = 1
    use_bias: bool = True
    bias_init: jax.nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "... d"]:
        inputs = x.shape[x.ndim - self.axes :]
        kernel = self.param("kernel", self.kernel_init, (*inputs, self.features))
        bias = self.param("bias", self.bias_init, (self.features,)) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        # XLA:CPU multiplies plain matrices faster than arrays of more axes (benchmarks/README.md).
        out = x.reshape(-1, math.prod(inputs)) @ kernel.reshape(-1, self.features)
        out = out.reshape(*x.shape[: x.ndim - self.axes], self.features)
        return out if bias is None else out + bias


@jax.custom_vjp
def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Exact GELU, by erf, computed in float32 for any dtype."""
    return _gelu_and_slope(x)[0]


def _gelu_and_slope(x):
    exact = x.astype(jnp.float32)
    below = 0.5 * (1.0 + jax.lax.erf(exact * np.float32(0.5**0.5)))
    density = jnp.exp(-0.5 * exact * exact) * np.float32((2 * np.pi) ** -0.5)
    return (exact * below).astype(x.dtype), (below + exact * density).astype(x.dtype)


def _gelu_forward(x):
    # On CPU, compute value and slope together and keep the slope. Elsewhere memory is slower than arithmetic: keep x.
    value, slope = _gelu_and_slope(x)
    return value, slope if jax.default_backend() == "cpu" else x


def _gelu_backward(kept, grad):
    slope = kept if jax.default_backend() == "cpu" else _gelu_and_slope(kept)[1]
    return (grad * slope,)


gelu.defvjp(_gelu_forward, _gelu_backward)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalize_channels(
    x: Float[Array, "... d"], scale: Float[Array, " d"], bias: Float[Array, " d"], epsilon: float
) -> Float[Array, "... d"]:
    """LayerNorm over the channels. The variance is the mean square of the centered x, as in PyTorch, plus `epsilon`."""
    return _normalize(x, scale, bias, epsilon)[0]


def _normalize(x, scale, bias, epsilon):
    mean = x.mean(axis=-1, keepdims=True)
    over = jax.lax.rsqrt(jnp.square(x - mean).mean(axis=-1, keepdims=True) + epsilon)
    return (x - mean) * over * scale + bias, (x, scale, mean, over)


def _normalize_gradient(epsilon, kept, grad):
    x, scale, mean, over = kept
    normal, inner = (x - mean) * over, grad * scale
    along = (inner * normal).mean(axis=-1, keepdims=True)
    grad_x = (inner - inner.mean(axis=-1, keepdims=True) - normal * along) * over
    leading = tuple(range(x.ndim - 1))
    return grad_x, (grad * normal).sum(axis=leading), grad.sum(axis=leading)


normalize_channels.defvjp(_normalize, _normalize_gradient)


class LayerNorm(nn.Module):
    """LayerNorm over the channels, in float32. initial: initial value of the scale."""

    epsilon: float
    initial: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        scale = self.param("scale", nn.initializers.constant(self.initial), x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])
        return normalize_channels(x.astype(jnp.float32), scale, bias, self.epsilon)


def patch_convolution(width: int, side: int, dtype: str, init_truncation: float, name: str | None = None) -> nn.Conv:
    """A linear map of each square of `side` x `side` values to `width` channels."""
    return nn.Conv(
        width, (side, side), side, "VALID", dtype=dtype, kernel_init=truncated_normal(init_truncation), name=name
    )


class PatchEmbed(nn.Module):
    """One token per patch: a convolution without overlap, initialized as in PyTorch."""

    width: int
    patch_size: int
    dtype: str

    @nn.compact
    def __call__(self, images: Float[Array, "b y x c"]) -> Float[Array, "b i j d"]:
        shape = (self.patch_size, self.patch_size, images.shape[-1], self.width)
        initial = uniform_by_fan_in(shape[0] * shape[1] * shape[2])
        kernel, bias = self.param("kernel", initial, shape), self.param("bias", initial, shape[3:])
        images, kernel, bias = nn.dtypes.promote_dtype(images, kernel, bias, dtype=self.dtype)
        tokens = jax.lax.conv_general_dilated(
            images, kernel, shape[:2], "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return (tokens + bias).astype(jnp.float32)


class Mlp(nn.Module):
    """Linear, exact GELU, linear. hidden: hidden units."""

    hidden: int
    init_truncation: float
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b ... d"]) -> Float[Array, "b ... d"]:
        initial = truncated_normal(self.init_truncation)
        first = Linear(self.hidden, self.dtype, initial, name="fc1")
        second = Linear(x.shape[-1], self.dtype, initial, name="fc2")
        return second(gelu(first(x))).astype(jnp.float32)


class LayerScale(nn.Module):
    """One learned factor per channel, starting at `initial` (Touvron et al. 2021, arXiv 2103.17239, eq. 4)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ... d"]) -> Float[Array, "b ... d"]:
        return x * self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))


def relative_position_index(grid: tuple[int, int], class_token: bool) -> Int[np.ndarray, "n n"]:
    """The row of the bias table for each (query, key) pair of tokens on a `grid` of (i, j) patches.

    The first (2i-1)(2j-1) rows are displacements. With a class token, three more follow in the official order: class to
    patch, patch to class, class to class (microsoft/SimMIM models/vision_transformer.py, `Attention`).
    """
    i, j = grid
    coordinates = np.stack(np.meshgrid(np.arange(i), np.arange(j), indexing="ij"), axis=-1).reshape(-1, 2)
    displacement = coordinates[:, None] - coordinates[None, :]  # n n 2, each from -(size-1) to size-1
    index = (displacement[..., 0] + i - 1) * (2 * j - 1) + displacement[..., 1] + j - 1
    if class_token:
        rows = (2 * i - 1) * (2 * j - 1)
        index = np.pad(index, ((1, 0), (1, 0)))
        index[0, :], index[:, 0], index[0, 0] = rows, rows + 1, rows + 2
    return index


class RelativePositionBias(nn.Module):
    """A learned bias of the attention logits per head and displacement."""

    num_heads: int
    class_token: bool = False
    initializer: jax.nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h n n"]:
        index = relative_position_index(grid, self.class_token)
        table = self.param("table", self.initializer, (int(index.max()) + 1, self.num_heads))
        return table[index].transpose(2, 0, 1)  # h n n
