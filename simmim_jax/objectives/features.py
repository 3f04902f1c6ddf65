"""Pooled features of an encoder: what classifiers, probes and embeddings read.

Shape letters: b images, y x pixels, c channels, k l the feature grid, d the feature width (twice that for "both").
"""

from collections.abc import Callable

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8

from simmim_jax.errors import ConfigError, choose
from simmim_jax.objectives.pixels import normalize

POOLS = ("patches", "class_token", "both")  # mean of the patches; the class token; the two side by side


def check_readable(encoder: nn.Module, block: int, pool: str, where: str) -> None:
    """Raise ConfigError unless `encoder` has this block, 1 to depth or 0 for the output, and a token to pool so."""
    if not 0 <= block <= encoder.depth:
        raise ConfigError(
            f"block {block} of an encoder of {encoder.depth} blocks", where,
            f"give 1 to {encoder.depth}, or 0 for the output",
        )  # fmt: skip
    choose("pool", pool, POOLS)
    if pool != "patches" and not encoder.class_token:
        raise ConfigError(f"pool {pool!r} of an encoder without a class token", where, "give pool=patches")


def pooled(features: Float[Array, "b k l d"], class_tokens: Float[Array, "b d"] | None, pool: str):
    """[b, d] of a block's output, or [b, 2 * d] of "both"."""
    parts = {"patches": lambda: features.mean(axis=(1, 2)), "class_token": lambda: class_tokens}
    names = ("class_token", "patches") if pool == "both" else (pool,)
    return jnp.concatenate([parts[name]() for name in names], axis=-1)


def make_features(
    encoder: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], block: int = 0, pool: str = "patches"
) -> Callable:
    """A function (params, images, train, key, batch_index) -> (pooled, statistics).

    images: uint8, or float32 that are normalized already.

    pooled: [b, d] of one block. statistics: the encoder's new running ones, where it has them and is trained; else
    empty.

    block: 1 to depth for that block's output, as the paper's linear evaluation reads block 8 of 12
    (microsoft/SimMIM#14); 0 for what the trunk puts out after its final norm.
    pool: one of `POOLS`. Raises ConfigError.
    """
    check_readable(encoder, block, pool, "probe_block or objective.block")

    def features(
        params,
        images: UInt8[Array, "b y x c"] | Float[Array, "b y x c"],
        train: bool = False,
        key: Key[Array, ""] | None = None,
        batch_index: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b d"], PyTree]:
        reads = block or pool != "patches"
        out, seen = encoder.apply(
            {"params": params},
            normalize(images, mean, std) if images.dtype == jnp.uint8 else images,
            train,
            batch_index,
            rngs=None if key is None else {"drop_path": key},
            mutable=["batch_stats", "intermediates"] if reads else ["batch_stats"],
        )
        if block:
            out = seen["intermediates"]["blocks"][block - 1]  # later blocks are dead code to XLA
        class_tokens = seen["intermediates"]["class_tokens"][block - 1] if pool != "patches" else None
        return pooled(out, class_tokens, pool), seen.get("batch_stats", {})

    return features


def make_all_features(
    encoder: nn.Module, *, mean: tuple[float, ...], std: tuple[float, ...], pool: str = "patches"
) -> Callable:
    """A function (params, images uint8) -> {block: [b, d]}, of one pass: blocks 1 to depth, and 0 for the output.

    Widths differ from block to block where an encoder's do. pool: one of `POOLS`. Raises ConfigError.
    """
    check_readable(encoder, 0, pool, "pool")

    def features(params, images: UInt8[Array, "b y x c"]) -> dict[int, Float[Array, "b _"]]:
        out, seen = encoder.apply({"params": params}, normalize(images, mean, std), mutable=["intermediates"])
        maps = [*seen["intermediates"]["blocks"], out]
        class_tokens = seen["intermediates"].get("class_tokens", [None] * len(maps))
        return {
            (n + 1) % len(maps): pooled(features, token, pool)
            for n, (features, token) in enumerate(zip(maps, class_tokens, strict=True))
        }

    return features
