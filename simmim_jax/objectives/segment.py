"""Semantic segmentation: a class for each pixel, by a linear map of one block's features or by UPerNet.

Shape letters: b images, y x pixels, c channels, k l the grid of a head's logits, d channels of features, n classes.
Source: Xiao et al. 2018, arXiv 1807.10221 (UPerNet); uper_head.py, psp_head.py and fcn_head.py of mmsegmentation.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from simmim_jax.errors import ConfigError, check_minimum, check_multiple, choose
from simmim_jax.models.layers import Linear, layer_norm, truncated_normal
from simmim_jax.models.pyramid import ConvNormRelu, Rescale, pyramid_blocks, pyramid_factors
from simmim_jax.objectives.features import check_readable
from simmim_jax.objectives.pixels import normalize

HEADS = ("linear", "upernet")
BINS = (1, 2, 3, 6)
AUXILIARY = 256  # channels of the auxiliary head
DROPPED = 0.1  # of a head's channels, before its last layer
AUXILIARY_LEVEL = 2  # of the pyramid


def resized(x: Float[Array, "b k l d"], size: tuple[int, int]) -> Float[Array, "b k2 l2 d"]:
    """Bilinear, pixels as areas: PyTorch's `interpolate(mode="bilinear", align_corners=False)`."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


def pooling_weights(size: int, bins: int) -> Float[np.ndarray, "m n"]:
    """Rows of weights that average `size` values into `bins` overlapping parts, as PyTorch's adaptive pooling does."""
    weights = np.zeros((bins, size), np.float32)
    for n in range(bins):
        first, last = n * size // bins, -(-(n + 1) * size // bins)
        weights[n, first:last] = 1 / (last - first)
    return weights


def drop_channels(
    x: Float[Array, "b k l d"], key: Key[Array, ""] | None, batch_index: Int[Array, " b"] | None
) -> Float[Array, "b k l d"]:
    """SegmentationSet channels of an image at zero, the others scaled up; drawn by the image's batch_index. No key: nothing."""
    if key is None:
        return x
    draw = lambda place: jax.random.bernoulli(jax.random.fold_in(key, place), 1 - DROPPED, x.shape[-1:])  # noqa: E731
    kept: Bool[Array, "b d"] = jax.vmap(draw)(batch_index)
    return jnp.where(kept[:, None, None], x / (1 - DROPPED), 0.0)


def logits_layer(num_classes: int, name: str) -> Linear:
    return Linear(num_classes, "float32", truncated_normal(100.0, 0.5), name=name)


class LinearHead(nn.Module):
    """LayerNorm of a feature and a linear map: the dense counterpart of a linear probe."""

    num_classes: int

    @nn.compact
    def __call__(self, maps: list[Float[Array, "b _ _ _"]], *_) -> tuple[Float[Array, "b k l n"], None]:
        return logits_layer(self.num_classes, "logits")(layer_norm(1e-6, "norm")(maps[0])), None


class UPerNet(nn.Module):
    """Pyramid pooling on the coarsest map, a feature pyramid from there up, and all levels together at the finest.

    Group norms stand where official code has batch norms over all devices. The second output, while there is a key, is
    that of the auxiliary head.
    """

    num_classes: int
    channels: int
    factors: tuple[int | float, ...]
    dtype: str

    def block(self, kernel: int, name: str, channels: int | None = None) -> ConvNormRelu:
        return ConvNormRelu(channels or self.channels, kernel, self.dtype, name=name)

    @nn.compact
    def __call__(
        self,
        maps: list[Float[Array, "b _ _ _"]],
        key: Key[Array, ""] | None = None,
        batch_index: Int[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b k l n"], Float[Array, "b k2 l2 n"] | None]:
        keys = (None, None) if key is None else jax.random.split(key)
        levels = [
            Rescale(factor, self.dtype, name=f"level_{n}")(x)
            for n, (factor, x) in enumerate(zip(self.factors, maps, strict=True))
        ]
        auxiliary = None
        if key is not None or self.is_initializing():
            x = self.block(3, "auxiliary", AUXILIARY)(levels[min(AUXILIARY_LEVEL, len(levels) - 1)])
            auxiliary = logits_layer(self.num_classes, "auxiliary_logits")(drop_channels(x, keys[1], batch_index))
        *finer, last = levels
        laterals = [self.block(1, f"lateral_{n}")(x) for n, x in enumerate(finer)]
        laterals.append(self.block(3, "pooled")(jnp.concatenate([last, *self.pool(last)], axis=-1)))
        for n in range(len(finer) - 1, -1, -1):
            laterals[n] += resized(laterals[n + 1], laterals[n].shape[1:3])
        outputs = [self.block(3, f"output_{n}")(x) for n, x in enumerate(laterals[:-1])] + laterals[-1:]
        size = outputs[0].shape[1:3]
        x = jnp.concatenate([outputs[0], *(resized(x, size) for x in outputs[1:])], axis=-1)
        x = drop_channels(self.block(3, "together")(x), keys[0], batch_index)
        return logits_layer(self.num_classes, "logits")(x), auxiliary

    def pool(self, x: Float[Array, "b k l d"]) -> list[Float[Array, "b k l _"]]:
        """The means of 1, 4, 9 and 36 parts of a map, each mapped to `channels` and brought back to its size."""
        size, pooled = x.shape[1:3], []
        for bins in BINS:
            down, across = (jnp.asarray(pooling_weights(side, bins)) for side in size)
            parts = jnp.einsum("pk,ql,bkld->bpqd", down, across, x)
            pooled.append(resized(self.block(1, f"bins_{bins}")(parts), size))
        return pooled


def mean_labeled(label_map: UInt[Array, "b y x"], num_classes: int) -> Float[Array, " b"]:
    """How many pixels of an image have a class, in the mean over the images: the same for each, and never 0."""
    counts = (label_map < num_classes).sum(axis=(1, 2), dtype=jnp.float32)
    return jnp.full(counts.shape, jnp.maximum(counts.mean(), 1 / len(counts)))


def masked_cross_entropy(
    logits: Float[Array, "b k l n"], label_map: UInt[Array, "b y x"], labeled: Float[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(cross entropy, share of right pixels), each summed over the pixels that have a class and divided by how many of
    them the whole batch has for so many images.

    Labels from n on are no class. labeled: `mean_labeled` of the whole batch, so that the mean over the equal parts
    of a batch is that over the pixels of all its images. The logits are brought to the map's size.
    """
    logits = resized(logits, label_map.shape[1:])
    labels = label_map.astype(jnp.int32)
    valid = labels < logits.shape[-1]
    chosen = jnp.where(valid, labels, 0)
    right = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - right
    count = labeled.sum()
    hits = (logits.argmax(axis=-1) == chosen) & valid
    return jnp.where(valid, loss, 0.0).sum() / count, hits.sum(dtype=jnp.float32) / count


@functools.cache  # a run that begins is initialized twice
def warn_other_head(head: str, train_encoder: bool) -> None:
    """Warn of a head that was chosen without its config."""
    logging.warning(
        "head %s over an encoder that is %s: rates and schedule are those for the other head; "
        "--config=configs/folder_segment.py:%s sets them all", head, "trained" if train_encoder else "frozen", head,
    )  # fmt: skip


def make_segment(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    head: str = "linear",
    block: int = 0,
    blocks: tuple[int, ...] | list[int] = (),
    channels: int = 512,
    auxiliary_weight: int | float = 0.4,
    train_encoder: bool = True,
):
    """(init, loss_fn, predict, prepare) of cross entropy over the pixels of "label_map" [b, y, x] that have a class.

    `predict` gives "logits" [b, k, l, n], one for each `y // k` pixels: UPerNet's stride is that of its finest level,
    4 pixels for a ViT, the linear head's that of its block.
    params: "encoder" and "head". loss_fn's metric: "pixel_accuracy".

    block: whose output the linear head reads, 1 to depth; 0 for what the trunk puts out after its final norm.
    blocks: of a plain transformer, the four that UPerNet's pyramid is made of; by default those at each quarter.
    channels: of UPerNet's maps. auxiliary_weight: of the loss of its auxiliary head, on the third level; 0: none.
    train_encoder: whether the encoder is in training mode, with stochastic depth; false where it is frozen.
    """
    choose("head", head, HEADS)
    if num_classes < 2:
        raise ConfigError(
            f"num_classes is {num_classes}", "objective.num_classes", "give the number of classes, 2 or more"
        )
    check_minimum("objective.channels", channels, 1)
    check_minimum("objective.auxiliary_weight", auxiliary_weight, 0)
    check_readable(encoder, block, "patches", "objective.block")
    for size in image_size:
        check_multiple(size, encoder.feature_stride, "image size", "the encoder's feature stride")
    if head == "linear":
        taken, decoder = (block,), LinearHead(num_classes)
    else:
        taken = pyramid_blocks(encoder, tuple(blocks))
        decoder = UPerNet(num_classes, channels, pyramid_factors(encoder), encoder.dtype)

    def see(params, images, *mode):
        """(the maps that the head takes, the encoder's new running statistics)."""
        train, key, batch_index = mode or (False, None, None)
        out, seen = encoder.apply(
            {"params": params},
            normalize(images, mean, std),
            train,
            batch_index,
            rngs=None if key is None else {"drop_path": key},
            mutable=["batch_stats", "intermediates"],
        )
        blocks_seen = seen["intermediates"]["blocks"]
        return [blocks_seen[n - 1] if n else out for n in taken], seen.get("batch_stats", {})

    def init(key):
        if train_encoder != (head == "upernet"):
            warn_other_head(head, train_encoder)
        encoder_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_size, len(mean)), jnp.uint8)
        encoder_params = encoder.init(encoder_key, normalize(images, mean, std))["params"]
        maps, _ = jax.eval_shape(see, encoder_params, images)
        head_params = decoder.init(head_key, [jnp.zeros(x.shape) for x in maps])["params"]
        return {"encoder": encoder_params, "head": head_params}

    def prepare(batch):
        return batch | {"mean_labeled": mean_labeled(batch["label_map"], num_classes)}

    def loss_fn(params, batch, key, train):
        drop_key, head_key = jax.random.split(key)
        maps, statistics = see(
            params["encoder"], batch["image"], train and train_encoder, drop_key, batch["batch_index"]
        )
        logits, auxiliary = decoder.apply(
            {"params": params["head"]}, maps, *((head_key, batch["batch_index"]) if train else ())
        )
        truth = batch["label_map"], batch["mean_labeled"]
        loss, accuracy = masked_cross_entropy(logits, *truth)
        if auxiliary is not None and auxiliary_weight:
            loss += auxiliary_weight * masked_cross_entropy(auxiliary, *truth)[0]
        return loss, {"pixel_accuracy": accuracy, "batch_stats": {"encoder": statistics}}

    def predict(params, batch, key):
        maps, _ = see(params["encoder"], batch["image"])
        return {"logits": decoder.apply({"params": params["head"]}, maps)[0]}

    return {
        "init": init,
        "loss_fn": loss_fn,
        "predict": predict,
        "prepare": prepare,
        "needs": ("image", "label_map"),
        "outputs": ("logits",),
        "evals": ("segmentation",),
        "num_classes": num_classes,
    }
