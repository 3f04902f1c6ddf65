"""Classification of pooled features: linear evaluation with a frozen encoder, and fine-tuning.

Source: official models/vision_transformer.py, `forward_features` and `head` (mean pooling, `fc_norm`). Shape letters: b
images, y x pixels, c channels, d the feature width, n classes.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import ConfigError, check_minimum, check_multiple
from simmim_jax.models.layers import LayerNorm, truncated_normal
from simmim_jax.objectives import mixing
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import normalize


class Options(NamedTuple):
    """Options of classification.

    num_classes: number of classes, 2 or more.
    block: block to read, 1 to depth; 0 for the output of the trunk.
    pool: how features are pooled, one of `features.POOLS`.
    fc_norm: LayerNorm after pooling (official `fc_norm`); None: if the encoder does not end in a norm.
    head_init_scale: factor on the head's initial N(0, 0.02) (official: 0.001 for ViT).
    label_smoothing: in [0, 1).
    train_encoder: whether the encoder runs in training mode, with stochastic depth; false if it is frozen.
    mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode, mixup_group: see `mixing.Mixing`.
    reprob, remode, recount: see `mixing.Erasing`.
    """

    num_classes: int
    block: int = 0
    pool: str = "patches"
    fc_norm: bool | None = None
    head_init_scale: float = 1.0
    label_smoothing: float = 0.0
    train_encoder: bool = True
    mixup: float = 0.0
    cutmix: float = 0.0
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    mixup_group: int = 0
    reprob: float = 0.0
    remode: str = "pixel"
    recount: int = 1


class Head(nn.Module):
    """An optional LayerNorm (official `fc_norm`), and one linear map to `num_classes` logits."""

    num_classes: int
    fc_norm: bool
    scale: float

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b n"]:
        if self.fc_norm:
            pooled = LayerNorm(1e-6, name="norm")(pooled)
        return nn.Dense(self.num_classes, kernel_init=truncated_normal(scale=self.scale), name="logits")(pooled)


def make_classify(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None,
    options: Options,
) -> dict:
    """Cross entropy over the classes of pooled features.

    params: "encoder" and "head". metrics: "top1", the fraction of correct predictions. For a mixed image, the class
        with the larger weight is correct. predict: "logits" [b, n].

    Training images are erased and then mixed in the compiled step, as in official data_finetune.py and
    main_finetune.py. A mixing partner may be on another device, so each device gathers the whole batch as it is
    stored.
    """
    num_classes = options.num_classes
    check_minimum("objective.num_classes", num_classes, 2)
    if not 0 <= options.label_smoothing < 1:
        raise ConfigError(f"label_smoothing {options.label_smoothing} is not in [0, 1)", "objective.label_smoothing")
    for size in image_size:  # an incomplete last token would be dropped silently
        check_multiple(size, encoder.token_stride, "image size", "the side of the encoder's tokens")
    mixes = mixing.Mixing(*(getattr(options, name) for name in mixing.Mixing._fields))
    erasing = mixing.Erasing(options.reprob, options.remode, options.recount)
    mixing.check(mixes, erasing)
    features = make_features(encoder, mean=mean, std=std, scale=scale, block=options.block, pool=options.pool)
    fc_norm = encoder.fc_norm if options.fc_norm is None else options.fc_norm
    head = Head(num_classes, fc_norm, options.head_init_scale)

    def init(key):
        encoder_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_size, len(mean)), jnp.uint8)
        encoder_params = encoder.init(encoder_key, normalize(images, mean, std, scale))["params"]
        pooled, _ = jax.eval_shape(features, encoder_params, images)
        return {"encoder": encoder_params, "head": head.init(head_key, jnp.zeros(pooled.shape))["params"]}

    def logits(params, images, *mode, **options):
        pooled, batch_stats = features(params["encoder"], images, *mode, **options)
        return head.apply({"params": params["head"]}, pooled), batch_stats

    def targets(labels: Int[Array, " b"]) -> Float[Array, "b n"]:
        return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), options.label_smoothing)

    def prepare(batch):
        if not mixes.active:
            return batch
        row = jnp.argsort(batch["batch_index"])  # the row of each batch_index, in any order of the rows
        partner = row[mixing.partner(batch["batch_index"], len(row), mixes.mixup_group)]
        return batch | {f"partner_{name}": batch[name][partner] for name in ("image", "label", "batch_index")}

    def augment(batch, erase_key, mix_key) -> tuple[Float[Array, "b y x c"], Float[Array, "b n"]]:
        """The erased and mixed images, normalized, and their targets."""

        def erase(images, batch_index):
            images = normalize(images, mean, std, scale)
            return mixing.erase(images, erase_key, batch_index, erasing) if erasing.reprob else images

        images, own = erase(batch["image"], batch["batch_index"]), targets(batch["label"])
        if not mixes.active:
            return images, own
        drawn = mixing.draw_mix(mix_key, batch["batch_index"], batch["partner_batch_index"], image_size, mixes)
        partners = erase(batch["partner_image"], batch["partner_batch_index"])
        return mixing.mix(images, partners, drawn), mixing.mix_targets(own, targets(batch["partner_label"]), drawn)

    def loss_fn(params, batch, key, train):
        drop_key, (erase_key, mix_key) = key, jax.random.split(jax.random.fold_in(key, 1))
        images, wanted = batch["image"], targets(batch["label"])
        augmented = bool(train and (erasing.reprob or mixes.active))
        if augmented:
            images, wanted = augment(batch, erase_key, mix_key)
        mode = train and options.train_encoder, drop_key, batch["batch_index"]
        predicted, batch_stats = logits(params, images, *mode, normalized=augmented)
        correct = predicted.argmax(axis=-1) == wanted.argmax(axis=-1)
        metrics = {"top1": correct.mean(dtype=jnp.float32), "batch_stats": {"encoder": batch_stats}}
        return optax.softmax_cross_entropy(predicted, wanted).mean(), metrics

    def predict(params, batch, key):
        return {"logits": logits(params, batch["image"])[0]}

    return {
        "init": init,
        "loss_fn": loss_fn,
        "predict": predict,
        "prepare": prepare,
        "needs": ("image", "label"),
        "outputs": ("logits",),
        "evals": ("accuracy", "knn", "linear"),
        "online_probes": ("knn", "linear"),
        "num_classes": num_classes,
    }
