"""Semantic segmentation: a class for each pixel, from a linear map of one block's features or from UPerNet.

Shape letters: b images, y x pixels, c channels, k l the grid of a head's logits, d channels of features, n classes.
Source: Xiao et al. 2018, arXiv 1807.10221 (UPerNet); uper_head.py, psp_head.py and fcn_head.py of mmsegmentation.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import check_minimum, check_multiple, choose, warn_once
from simmim_jax.models.layers import LayerNorm, Linear, truncated_normal
from simmim_jax.objectives.features import check_readable
from simmim_jax.objectives.pixels import normalize
from simmim_jax.objectives.pyramid import ConvNormRelu, Rescale, pyramid_blocks, pyramid_factors

HEADS = ("linear", "upernet")
BINS = (1, 2, 3, 6)  # sides of the pooled grids in pyramid pooling
AUXILIARY_CHANNELS = 256
AUXILIARY_LEVEL = 2  # pyramid level that the auxiliary head reads
DROP_RATE = 0.1  # fraction of a head's channels dropped before its last layer


class Options(NamedTuple):
    """Options of segmentation.

    num_classes: number of classes, 2 or more. Labels from there on mean "no class".
    head: "linear" or "upernet".
    block: block that the linear head reads, 1 to depth; 0 for the output of the trunk, after its final norm.
    blocks: the four blocks of UPerNet's pyramid in a plain transformer; (): those at each quarter of the depth.
    channels: channels of UPerNet's maps.
    auxiliary_weight: weight of the loss of UPerNet's auxiliary head, on the third level; 0 disables it.
    train_encoder: whether the encoder runs in training mode, with stochastic depth; false if it is frozen.
    """

    num_classes: int
    head: str = "linear"
    block: int = 0
    blocks: tuple[int, ...] | list[int] = ()
    channels: int = 512
    auxiliary_weight: int | float = 0.4
    train_encoder: bool = True


def resized(x: Float[Array, "b k l d"], size: tuple[int, int]) -> Float[Array, "b k2 l2 d"]:
    """Bilinear resampling as PyTorch's `interpolate(mode="bilinear", align_corners=False)`."""
    return jax.image.resize(x, (x.shape[0], *size, x.shape[3]), "bilinear", antialias=False)


def pooling_weights(size: int, bins: int) -> Float[np.ndarray, "m n"]:
    """Rows of weights that average `size` values into `bins` overlapping parts, as in PyTorch's adaptive pooling."""
    weights = np.zeros((bins, size), np.float32)
    for n in range(bins):
        first, last = n * size // bins, -(-(n + 1) * size // bins)
        weights[n, first:last] = 1 / (last - first)
    return weights


def drop_channels(
    x: Float[Array, "b k l d"], key: Key[Array, ""] | None, batch_index: Int[Array, " b"] | None
) -> Float[Array, "b k l d"]:
    """Dropout of whole channels, drawn by each image's batch_index. Without a key it changes nothing."""
    if key is None:
        return x
    draw = lambda n: jax.random.bernoulli(jax.random.fold_in(key, n), 1 - DROP_RATE, x.shape[-1:])  # noqa: E731
    kept: Bool[Array, "b d"] = jax.vmap(draw)(batch_index)
    return jnp.where(kept[:, None, None], x / (1 - DROP_RATE), 0.0)


def logits_layer(num_classes: int, name: str) -> Linear:
    return Linear(num_classes, "float32", truncated_normal(scale=0.5), name=name)


class LinearHead(nn.Module):
    """LayerNorm and a linear map of each feature: the dense counterpart of a linear probe."""

    num_classes: int

    @nn.compact
    def __call__(self, maps: list[Float[Array, "b _ _ _"]], *_) -> tuple[Float[Array, "b k l n"], None]:
        return logits_layer(self.num_classes, "logits")(LayerNorm(1e-6, name="norm")(maps[0])), None


class UPerNet(nn.Module):
    """Pyramid pooling of the coarsest map, a feature pyramid upwards from it, and all levels fused at the finest scale.

    Uses group norms instead of the official batch norms over all devices. With a key, the second output is that of the
    auxiliary head; without one it is None.
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
            x = self.block(3, "auxiliary", AUXILIARY_CHANNELS)(levels[min(AUXILIARY_LEVEL, len(levels) - 1)])
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
        """Means over 1, 4, 9 and 36 parts of a map, each projected to `channels` and resized back."""
        size, pooled = x.shape[1:3], []
        for bins in BINS:
            down, across = (jnp.asarray(pooling_weights(side, bins)) for side in size)
            parts = jnp.einsum("pk,ql,bkld->bpqd", down, across, x)
            pooled.append(resized(self.block(1, f"bins_{bins}")(parts), size))
        return pooled


def mean_labeled(label_map: UInt[Array, "b y x"], num_classes: int) -> Float[Array, " b"]:
    """The mean number of pixels per image that have a class, repeated for each image; never 0."""
    counts = (label_map < num_classes).sum(axis=(1, 2), dtype=jnp.float32)
    return jnp.full(counts.shape, jnp.maximum(counts.mean(), 1 / len(counts)))


def masked_cross_entropy(
    logits: Float[Array, "b k l n"], label_map: UInt[Array, "b y x"], labeled: Float[Array, " b"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(cross entropy, pixel accuracy), averaged over the pixels that have a class. Logits are resized to the label map.

    labeled: `mean_labeled` of the whole batch. The sum is divided by it instead of by these images' own count, so that
    the mean over microbatches equals the mean over all labeled pixels of the batch. Labels from n on are no class.
    """
    logits = resized(logits, label_map.shape[1:])
    labels = label_map.astype(jnp.int32)
    valid = labels < logits.shape[-1]
    chosen = jnp.where(valid, labels, 0)
    right = jnp.take_along_axis(logits, chosen[..., None], axis=-1)[..., 0]
    loss = jax.nn.logsumexp(logits, axis=-1) - right
    count = labeled.sum()
    correct = (logits.argmax(axis=-1) == chosen) & valid
    return jnp.where(valid, loss, 0.0).sum() / count, correct.sum(dtype=jnp.float32) / count


def make_segment(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None,
    options: Options,
) -> dict:
    """Cross entropy over the pixels of "label_map" [b, y, x] that have a class.

    params: "encoder" and "head". metrics: "pixel_accuracy". predict: "logits" [b, k, l, n] at the head's own stride:
        that of its block for the linear head, and that of its finest level for UPerNet, 4 pixels for a ViT.
    """
    num_classes, head = options.num_classes, options.head
    choose("head", head, HEADS)
    check_minimum("objective.num_classes", num_classes, 2)
    check_minimum("objective.channels", options.channels, 1)
    check_minimum("objective.auxiliary_weight", options.auxiliary_weight, 0)
    check_readable(encoder, options.block, "patches", "objective.block")
    for size in image_size:
        check_multiple(size, encoder.feature_stride, "image size", "the encoder's feature stride")
    if head == "linear":
        blocks, decoder = (options.block,), LinearHead(num_classes)
    else:
        blocks = pyramid_blocks(encoder, tuple(options.blocks))
        decoder = UPerNet(num_classes, options.channels, pyramid_factors(encoder), encoder.dtype)

    def forward(params, images, train=False, key=None, batch_index=None):
        """(the maps that the head reads, batch_stats)."""
        out, sown = encoder.apply(
            {"params": params},
            normalize(images, mean, std, scale),
            train,
            batch_index,
            rngs=None if key is None else {"drop_path": key},
            mutable=["batch_stats", "intermediates"],
        )
        outputs = sown["intermediates"]["blocks"]
        return [outputs[n - 1] if n else out for n in blocks], sown.get("batch_stats", {})

    def init(key):
        if options.train_encoder != (head == "upernet"):
            state = "trained" if options.train_encoder else "frozen"
            warn_once(
                f"head {head} over a {state} encoder: rates and schedule are those of the other head; "
                f"--config=configs/folder_segment.py:{head} sets all of them"
            )
        encoder_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_size, len(mean)), jnp.uint8)
        encoder_params = encoder.init(encoder_key, normalize(images, mean, std, scale))["params"]
        maps, _ = jax.eval_shape(forward, encoder_params, images)
        head_params = decoder.init(head_key, [jnp.zeros(x.shape) for x in maps])["params"]
        return {"encoder": encoder_params, "head": head_params}

    def prepare(batch):
        return batch | {"mean_labeled": mean_labeled(batch["label_map"], num_classes)}

    def loss_fn(params, batch, key, train):
        drop_key, head_key = jax.random.split(key)
        train_mode = train and options.train_encoder
        maps, batch_stats = forward(params["encoder"], batch["image"], train_mode, drop_key, batch["batch_index"])
        logits, auxiliary = decoder.apply(
            {"params": params["head"]}, maps, *((head_key, batch["batch_index"]) if train else ())
        )
        truth = batch["label_map"], batch["mean_labeled"]
        loss, accuracy = masked_cross_entropy(logits, *truth)
        if auxiliary is not None and options.auxiliary_weight:
            loss += options.auxiliary_weight * masked_cross_entropy(auxiliary, *truth)[0]
        return loss, {"pixel_accuracy": accuracy, "batch_stats": {"encoder": batch_stats}}

    def predict(params, batch, key):
        maps, _ = forward(params["encoder"], batch["image"])
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
