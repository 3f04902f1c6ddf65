"""What encoders share: how they are called, initialisers, Mlp, DropPath, LayerScale, relative position bias.

Shape letters: b images, n tokens of one image (class token included), d width, h heads, i and j the token grid; "..."
stands for n tokens or for a map of them.

Parameters are float32. Matmuls run in `dtype` (float32 or bfloat16); the residual stream, norms, softmax and biases of
the attention logits stay in float32, as under PyTorch's automatic mixed precision, which the official recipes use.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError, check_minimum


def check_choices(encoder: nn.Module, choices: dict[str, tuple[str, ...]]) -> None:
    """Raise ConfigError unless each field of `choices` has one of them, and drop_path is a rate."""
    for field, allowed in choices.items():
        value = getattr(encoder, field)
        if value not in allowed:
            raise ConfigError(f"unknown {field} {value!r}", f"encoder.{field}", f"choose one of {', '.join(allowed)}")
    if not 0 <= encoder.drop_path < 1:
        raise ConfigError(f"drop_path {encoder.drop_path} is not in [0, 1)", "encoder.drop_path")


def check_heads(width: int, heads: int, where: str) -> None:
    """Raise ConfigError unless `width` divides into `heads`; name the nearest widths that do."""
    check_minimum(where, heads, 1)
    if width % heads:
        near = width // heads * heads
        raise ConfigError(
            f"width {width} is no multiple of {heads} heads", where, f"try {near or heads} or {near + heads}"
        )


def truncated_normal(sigmas: float, scale: float = 1.0) -> jax.nn.initializers.Initializer:
    """N(0, 0.02) cut at `sigmas` standard deviations, not rescaled for the cut, then times `scale`.

    Official SimMIM cuts a ViT at one sigma (vision_transformer.py, `VisionTransformerForSimMIM._trunc_normal_`), which
    leaves an effective deviation of 0.0108, and everything else at an absolute 2, which is 100 sigmas.
    """
    return jax.nn.initializers.truncated_normal(0.02 * scale, lower=-sigmas, upper=sigmas)


def uniform_by_fan_in(fan_in: int) -> jax.nn.initializers.Initializer:
    """U(-1/sqrt(fan_in), 1/sqrt(fan_in)): PyTorch's default for the weight and the bias of a convolution."""
    bound = fan_in**-0.5
    return lambda key, shape, dtype=jnp.float32: jax.random.uniform(key, shape, dtype, -bound, bound)


def layer_norm(epsilon: float, name: str | None = None, *, scale: float = 1.0) -> nn.LayerNorm:
    """LayerNorm in float32 with the two-pass variance of PyTorch (Flax's one-pass default cancels in float32).

    scale: what its weights start from; its bias starts from 0.
    """
    return nn.LayerNorm(
        epsilon=epsilon,
        use_fast_variance=False,
        dtype=jnp.float32,
        scale_init=nn.initializers.constant(scale),
        name=name,
    )


class Encoder(nn.Module):
    """What every encoder is, called as a whole: `embed` and `trunk` in turn (the contract: `simmim_jax.models`)."""

    def __call__(
        self, images: Float[Array, "b y x c"], train: bool = False, position: Int[Array, " b"] | None = None
    ) -> Float[Array, "b k l d"]:
        return self.trunk(self.embed(images), train, position)


class PatchEmbed(nn.Module):
    """One token for each square of `patch_size` pixels: a convolution without overlap, initialised as PyTorch does."""

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
    """Linear, exact (erf) GELU, linear; `hidden` units between. The second kernel is scaled down by `rescale`."""

    hidden: int
    init_truncation: float
    rescale: float = 1.0
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b ... d"]) -> Float[Array, "b ... d"]:
        first = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=truncated_normal(self.init_truncation), name="fc1")
        second = nn.Dense(
            x.shape[-1], dtype=self.dtype, kernel_init=truncated_normal(self.init_truncation, self.rescale), name="fc2"
        )
        return second(nn.gelu(first(x), approximate=False)).astype(jnp.float32)


class LayerScale(nn.Module):
    """One learned factor per channel, `initial` at the start (Touvron et al. 2021, arXiv 2103.17239, eq. 4)."""

    initial: float

    @nn.compact
    def __call__(self, x: Float[Array, "b ... d"]) -> Float[Array, "b ... d"]:
        return x * self.param("gamma", nn.initializers.constant(self.initial), (x.shape[-1],))


class DropPath(nn.Module):
    """Stochastic depth: zero a whole residual branch for an image with probability `rate`, and scale up the others.

    Draws from the rng stream "drop_path" while `train` is true, for each image by its `position` in the whole batch, so
    that no draw depends on how the batch is split (Huang et al. 2016, arXiv 1603.09382).
    """

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "b ... d"], train: bool, position: Int[Array, " b"] | None = None
    ) -> Float[Array, "b ... d"]:
        if not train or self.rate == 0.0:
            return x
        key = self.make_rng("drop_path")
        position = jnp.arange(x.shape[0]) if position is None else position
        kept = jax.vmap(lambda place: jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - self.rate))(position)
        return jnp.where(jnp.expand_dims(kept, range(1, x.ndim)), x / (1.0 - self.rate), 0.0)


def drop_path_rates(last: float, depth: int) -> list[float]:
    """The rate of stochastic depth of each of `depth` blocks: from 0 in the first, linearly to `last` in the last."""
    return [last * n / max(depth - 1, 1) for n in range(depth)]


def relative_position_index(grid: tuple[int, int], class_token: bool) -> Int[np.ndarray, "n n"]:
    """Row of the bias table for each (query, key) pair of tokens on a `grid` of (i, j) patches.

    The first (2i-1)(2j-1) rows are the displacements. With a class token three more follow, in the official order:
    class to patch, patch to class, class to class (microsoft/SimMIM models/vision_transformer.py, `Attention`).
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
    """A learned number per head and displacement, added to the attention logits."""

    heads: int
    class_token: bool = False
    initializer: jax.nn.initializers.Initializer = nn.initializers.zeros

    @nn.compact
    def __call__(self, grid: tuple[int, int]) -> Float[Array, "h n n"]:
        index = relative_position_index(grid, self.class_token)
        table = self.param("table", self.initializer, (int(index.max()) + 1, self.heads))
        return table[index].transpose(2, 0, 1)  # h n n
