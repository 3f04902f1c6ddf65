"""Classification of pooled features: linear evaluation (encoder frozen) and fine-tuning.

Official models: `forward_features` and `head` of vision_transformer.py (mean pooling, `fc_norm`). Shape letters: b
images, y x pixels, c channels, k l the feature grid, d the feature width, n classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from simmim_jax.errors import ConfigError, check_multiple
from simmim_jax.models.layers import layer_norm, truncated_normal
from simmim_jax.objectives import mixing
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import normalize


class Head(nn.Module):
    """LayerNorm where asked for (official `fc_norm`), and one linear map to `num_classes` logits."""

    num_classes: int
    fc_norm: bool
    scale: float

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b n"]:
        if self.fc_norm:
            pooled = layer_norm(1e-6, "norm")(pooled)
        return nn.Dense(self.num_classes, kernel_init=truncated_normal(100.0, self.scale), name="logits")(pooled)


def make_classify(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    num_classes: int,
    block: int = 0,
    fc_norm: bool | None = None,
    head_init_scale: float = 1.0,
    label_smoothing: float = 0.0,
    train_encoder: bool = True,
    pool: str = "patches",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    mixup_prob: float = 1.0,
    mixup_switch_prob: float = 0.5,
    mixup_mode: str = "batch",
    mixup_group: int = 0,
    reprob: float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
):
    """(init, loss_fn, predict, prepare) of cross entropy over `num_classes`; `predict` gives "logits" [b, n].

    params: "encoder" and "head". loss_fn's metrics: "top1", the share of right answers; of mixed images, of those that
        name the class with the greater share.
    fc_norm: LayerNorm of what is pooled (official `fc_norm`); None: where the encoder has no norm at its end.
    head_init_scale: factor on the head's initial N(0, 0.02) (official: 0.001 for ViT).
    train_encoder: whether the encoder is in training mode, with stochastic depth; false where it is frozen.
    pool: what of the encoder is classified, one of `features.POOLS`.
    reprob, remode, recount: probability that boxes of a training image become noise, of which kind, and how many
        at most.
    mixup, cutmix, mixup_prob, mixup_switch_prob, mixup_mode, mixup_group: how training images, and their targets, are mixed,
        each with the one at its place in the reversed batch, or in each `mixup_group` neighbors of it (see
        `simmim_jax.objectives.mixing`). All of it happens in the compiled step, first erasing, as in official data_finetune.py
        and main_finetune.py. Partners may be on other devices: each device then gathers the whole batch, as uint8.
    """
    if num_classes < 2:
        raise ConfigError(
            f"num_classes is {num_classes}", "objective.num_classes", "give the number of classes, 2 or more"
        )
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing {label_smoothing} is not in [0, 1)", "objective.label_smoothing")
    for size in image_size:  # else what lies beyond the last whole token would go unseen
        check_multiple(size, encoder.token_stride, "image size", "the side of the encoder's tokens")
    mixing.check_mixing(
        mixup=mixup, cutmix=cutmix, probability=mixup_prob, switch=mixup_switch_prob, mode=mixup_mode,
        group=mixup_group, reprob=reprob, remode=remode, recount=recount,
    )  # fmt: skip
    mixes = mixup > 0 or cutmix > 0
    features = make_features(encoder, mean=mean, std=std, block=block, pool=pool)
    head = Head(num_classes, encoder.fc_norm if fc_norm is None else fc_norm, head_init_scale)

    def init(key):
        encoder_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_size, len(mean)), jnp.uint8)
        encoder_params = encoder.init(encoder_key, normalize(images, mean, std))["params"]
        pooled, _ = jax.eval_shape(features, encoder_params, images)
        return {"encoder": encoder_params, "head": head.init(head_key, jnp.zeros(pooled.shape))["params"]}

    def logits_of(params, images, *mode):
        pooled, statistics = features(params["encoder"], images, *mode)
        return head.apply({"params": params["head"]}, pooled), statistics

    def targets_of(labels: Int[Array, " b"]) -> Float[Array, "b n"]:
        return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)

    def prepare(batch):
        if not mixes:
            return batch
        place = jnp.argsort(batch["batch_index"])  # of each batch_index among the rows, however processes share them
        partner = place[mixing.partner_of(batch["batch_index"], len(place), mixup_group)]
        return batch | {f"partner_{name}": batch[name][partner] for name in ("image", "label", "batch_index")}

    def augmented(batch, key) -> tuple[Float[Array, "b y x c"], Float[Array, "b n"]]:
        """The batch's images as they are trained on, and what they are to be taken for."""
        erase_key, mix_key = jax.random.split(jax.random.fold_in(key, 1))  # the key itself draws stochastic depth

        def erased(images, batch_index):
            images = normalize(images, mean, std)
            if not reprob:
                return images
            return mixing.erase(images, erase_key, batch_index, probability=reprob, mode=remode, count=recount)

        images, targets = erased(batch["image"], batch["batch_index"]), targets_of(batch["label"])
        if not mixes:
            return images, targets
        drawn = mixing.draw_mix(
            mix_key, batch["batch_index"], batch["partner_batch_index"], image_size=image_size, mixup=mixup, cutmix=cutmix,
            probability=mixup_prob, switch=mixup_switch_prob, mode=mixup_mode, group=mixup_group,
        )  # fmt: skip
        partners = erased(batch["partner_image"], batch["partner_batch_index"])
        images = mixing.mix(images, partners, drawn)
        return images, mixing.mix_targets(targets, targets_of(batch["partner_label"]), drawn)

    def loss_fn(params, batch, key, train):
        images, targets = batch["image"], targets_of(batch["label"])
        if train and (reprob or mixes):
            images, targets = augmented(batch, key)
        logits, statistics = logits_of(params, images, train and train_encoder, key, batch["batch_index"])
        right = logits.argmax(axis=-1) == targets.argmax(axis=-1)
        metrics = {"top1": right.mean(dtype=jnp.float32), "batch_stats": {"encoder": statistics}}
        return optax.softmax_cross_entropy(logits, targets).mean(), metrics

    def predict(params, batch, key):
        return {"logits": logits_of(params, batch["image"])[0]}

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
