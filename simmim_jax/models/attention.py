"""Multi-head attention: the projections, and softmax(query key^T) value in the fastest available form.

Three options compute the same values:

    cudnn  the fused kernel of cuDNN through `jax.nn.dot_product_attention`, on NVIDIA GPUs in bfloat16. It never writes
           the attention weights to memory.
    xla    matrix products with a custom gradient, which keeps the unnormalized weights or recomputes them.
    auto   cudnn if it is available, else xla.

Shape letters: b images, n tokens of one sequence, "..." images and windows, h heads, c width of a head, d of a token.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.backend import get_backend
from jaxtyping import Array, Float

from simmim_jax.errors import ConfigError

ATTENTION = ("auto", "xla", "cudnn")
PADDING_BIAS = -1e9  # added to the logits of padding keys


class QueryKeyValue(nn.Module):
    """Queries, keys and values of all heads, by linear maps of the tokens."""

    num_heads: int
    use_bias: bool
    dtype: str
    kernel_init: jax.nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "... n d"]) -> tuple[Float[Array, "... n h c"], ...]:
        width = x.shape[-1]
        features = (3, self.num_heads, width // self.num_heads)
        kernel = self.param("kernel", self.kernel_init, (width, *features))
        bias = self.param("bias", nn.initializers.zeros, features) if self.use_bias else None
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        # Three matrix products: a single one would be split by copies, and would shard badly over `tensor`.
        rows, shape = x.reshape(-1, width), (*x.shape[:-1], *features[1:])
        out = ((rows @ kernel[:, part].reshape(width, -1)).reshape(shape) for part in range(3))
        return tuple(out if bias is None else (one + bias[part] for part, one in enumerate(out)))


def refusal_of_cudnn(dtype: str, head_width: int) -> str:
    """Why cuDNN's attention cannot run here on a model with these heads; "" if it can.

    The conditions are those of `check_is_flash_attention` in jax/_src/cudnn/fused_attention_stablehlo.py, for any GPU.
    """
    if dtype != "bfloat16":
        return f"it needs encoder.dtype bfloat16, not {dtype}"
    if head_width % 8 or head_width > 128:
        return f"it needs heads of 8, 16, ... 128 channels, not of {head_width}"
    if jax.default_backend() != "gpu" or "cuda" not in get_backend().platform_version:
        return f"it needs an NVIDIA GPU, and this is {jax.default_backend()}"
    if float(jax.local_devices()[0].compute_capability) < 8.0:
        return "it needs an NVIDIA GPU of compute capability 8.0 or later"
    return ""


def choose_attention(name: str, dtype: str, head_width: int) -> str:
    """ "cudnn" or "xla" for the option `name`. Raises ConfigError if "cudnn" is requested and not available."""
    if name == "xla":
        return name
    refusal = refusal_of_cudnn(dtype, head_width)
    if refusal and name == "cudnn":
        raise ConfigError(f"cuDNN attention is not available: {refusal}", "encoder.attention", "leave it at auto")
    return "xla" if refusal else "cudnn"


def cudnn_padding(tokens: int) -> int:
    """The number of padding tokens to add. JAX trains with cuDNN only for an even number of tokens.

    An odd number is padded to the next multiple of 8, so that each row of a bias is aligned to 16 bytes.
    """
    return -tokens % 8 if tokens % 2 else 0


def attend_by_cudnn(
    query: Float[Array, "b n h c"],
    key: Float[Array, "b n h c"],
    value: Float[Array, "b n h c"],
    bias: Float[Array, "h m m"] | None,
    tokens: int,
) -> Float[Array, "b n h c"]:
    """softmax(query key^T / sqrt(c) + bias) value by the kernel of cuDNN, with gradients for the bias too.

    tokens: number of tokens to attend to; the others, at the end, are padding.
    bias: without padding, so m = tokens. It is rounded to bfloat16 for the kernel. Logits and softmax are in float32.
    """
    more, lengths = query.shape[1] - tokens, None
    if bias is not None:
        bias = jnp.pad(bias, ((0, 0), (0, more), (0, 0)))
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, more)), constant_values=PADDING_BIAS)[None].astype(query.dtype)
    elif more:
        lengths = jnp.full(query.shape[:1], tokens, jnp.int32)
    return jax.nn.dot_product_attention(
        query, key, value, bias=bias, key_value_seq_lengths=lengths, implementation="cudnn"
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    query: Float[Array, "... h n c"],
    key: Float[Array, "... h n c"],
    value: Float[Array, "... h n c"],
    bias: Float[Array, "..."] | None,
    scale: float,
    recompute: bool,
) -> Float[Array, "... h n c"]:
    """softmax(scale * query key^T + bias) value, with logits and softmax in float32.

    bias: float32, broadcasts to the logits [..., h, n, n].
    recompute: keep no array of shape [..., h, n, n] for the gradient.
    """
    return _attend(query, key, value, bias, scale, recompute)[0]


def _logits(query, key, bias, scale):
    logits = jnp.einsum("...qc,...kc->...qk", query, key, preferred_element_type=jnp.float32) * scale
    return logits if bias is None else logits + bias


def _attend(query, key, value, bias, scale, recompute):
    logits = _logits(query, key, bias, scale)
    largest = logits.max(axis=-1, keepdims=True)
    weights = jnp.exp(logits - largest)
    over = 1.0 / weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(value.dtype)
    out = jnp.einsum("...qk,...kc->...qc", weights, value, preferred_element_type=jnp.float32) * over
    out = out.astype(value.dtype)
    return out, (query, key, value, bias, out, over, largest if recompute else weights)


def _attend_gradient(scale, recompute, kept, grad):
    query, key, value, bias, out, over, weights = kept
    if recompute:
        # The barrier stops the compiler from reusing the logits of the forward pass, which would keep them.
        query, key, bias, grad = jax.lax.optimization_barrier((query, key, bias, grad))
        weights = jnp.exp(_logits(query, key, bias, scale) - weights).astype(value.dtype)
    # Divide the gradient of the output instead of the weights, which are larger.
    grad = grad * over
    inner = (grad * out).sum(axis=-1, keepdims=True)
    grad = grad.astype(value.dtype)
    grad_value = jnp.einsum("...qk,...qc->...kc", weights, grad)
    grad_weights = jnp.einsum("...qc,...kc->...qk", grad, value, preferred_element_type=jnp.float32)
    grad_logits = weights * (grad_weights - inner)
    grad_bias = None if bias is None else _sum_to(grad_logits, bias.shape)
    grad_logits = (grad_logits * scale).astype(query.dtype)
    grad_query = jnp.einsum("...qk,...kc->...qc", grad_logits, key)
    grad_key = jnp.einsum("...qk,...qc->...kc", grad_logits, query)
    return grad_query, grad_key, grad_value, grad_bias


def _sum_to(x, shape):
    """Sum `x` over the axes along which an array of `shape` was broadcast."""
    x = x.sum(axis=tuple(range(x.ndim - len(shape))))
    return x.sum(axis=tuple(axis for axis, size in enumerate(shape) if size != x.shape[axis]), keepdims=True)


attend.defvjp(_attend, _attend_gradient)


def attend_by_xla(
    query: Float[Array, "... n h c"],
    key: Float[Array, "... n h c"],
    value: Float[Array, "... n h c"],
    bias: Float[Array, "..."] | None,
    *,
    scale: float | None = None,
    recompute: bool = False,
) -> Float[Array, "... n h c"]:
    """softmax(scale * query key^T + bias) value; see `attend`. scale: None for 1 / sqrt(c)."""
    query, key, value = (jnp.swapaxes(x, -2, -3) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return jnp.swapaxes(attend(query, key, value, bias, scale, recompute), -2, -3)
