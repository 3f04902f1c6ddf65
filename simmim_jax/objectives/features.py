"""Pooled features of an encoder, for classifiers, probes and embeddings.

Shape letters: b images, y x pixels, c channels, k l the feature grid, d the feature width (twice that for pool "both").
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, PyTree

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import ConfigError, choose
from simmim_jax.objectives.pixels import normalize

POOLS = ("patches", "class_token", "both")  # mean over the patches; the class token; both, concatenated


def check_readable(encoder: nn.Module, block: int, pool: str, where: str) -> None:
    """Raise ConfigError unless `encoder` has this block (1 to depth, or 0 for the output) and supports this pool."""
    if not 0 <= block <= encoder.depth:
        what = f"block {block} of an encoder of {encoder.depth} blocks"
        raise ConfigError(what, where, f"give 1 to {encoder.depth}, or 0 for the output")
    choose("pool", pool, POOLS)
    if pool != "patches" and not encoder.class_token:
        raise ConfigError(f"pool {pool!r} of an encoder without a class token", where, "give pool=patches")


def pooled(features: Float[Array, "b k l d"], class_tokens: Float[Array, "b d"] | None, pool: str):
    """[b, d], or [b, 2 * d] for "both"."""
    if pool == "class_token":
        return class_tokens
    mean = features.mean(axis=(1, 2))
    return mean if pool == "patches" else jnp.concatenate([class_tokens, mean], axis=-1)


def make_features(
    encoder: nn.Module,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None = None,
    block: int = 0,
    pool: str = "patches",
) -> Callable:
    """A function (params, images, train, key, batch_index, normalized) -> (pooled [b, d], batch_stats).

    images: as stored, or already normalized: float32, with `normalized` if they are stored as float32 too. batch_stats:
    the encoder's new running statistics if it has them and `train` is true, else empty.

    block: 1 to depth for that block's output; 0 for the output of the trunk, after its final norm. The paper's linear
        evaluation reads block 8 of 12 (microsoft/SimMIM#14).
    pool: one of `POOLS`. Raises ConfigError.
    """
    check_readable(encoder, block, pool, "probe_block or objective.block")
    stored = jnp.dtype(scale.dtype if scale else "uint8")

    def features(
        params,
        images: Num[Array, "b y x c"],
        train: bool = False,
        key: Key[Array, ""] | None = None,
        batch_index: Int[Array, " b"] | None = None,
        normalized: bool = False,
    ) -> tuple[Float[Array, "b d"], PyTree]:
        needs_blocks = block or pool != "patches"
        out, sown = encoder.apply(
            {"params": params},
            images if normalized or images.dtype != stored else normalize(images, mean, std, scale),
            train,
            batch_index,
            rngs=None if key is None else {"drop_path": key},
            mutable=["batch_stats", "intermediates"] if needs_blocks else ["batch_stats"],
        )
        if block:
            out = sown["intermediates"]["blocks"][block - 1]  # XLA drops the later blocks as dead code
        class_tokens = sown["intermediates"]["class_tokens"][block - 1] if pool != "patches" else None
        return pooled(out, class_tokens, pool), sown.get("batch_stats", {})

    return features


def make_all_features(
    encoder: nn.Module,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None = None,
    pool: str = "patches",
) -> Callable:
    """A function (params, images) -> {block: [b, d]} for blocks 1 to depth, and 0 for the output, in one pass.

    The width d may differ between blocks. pool: one of `POOLS`. Raises ConfigError.
    """
    check_readable(encoder, 0, pool, "pool")

    def features(params, images: Num[Array, "b y x c"]) -> dict[int, Float[Array, "b _"]]:
        out, sown = encoder.apply({"params": params}, normalize(images, mean, std, scale), mutable=["intermediates"])
        maps = [*sown["intermediates"]["blocks"], out]
        class_tokens = sown["intermediates"].get("class_tokens", [None] * len(maps))
        return {
            (n + 1) % len(maps): pooled(features, token, pool)
            for n, (features, token) in enumerate(zip(maps, class_tokens, strict=True))
        }

    return features
