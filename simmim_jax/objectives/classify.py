"""Classification of pooled features: linear evaluation (encoder frozen) and fine-tuning.

Official models: `forward_features` and `head` of vision_transformer.py (mean pooling, `fc_norm`). Shape letters: b
images, y x pixels, c channels, k l the feature grid, d the feature width, n classes.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from simmim_jax.errors import ConfigError
from simmim_jax.masking import check_multiple
from simmim_jax.models.layers import layer_norm, truncated_normal
from simmim_jax.objectives.features import make_features
from simmim_jax.objectives.pixels import normalise


class Head(nn.Module):
    """LayerNorm where asked for (official `fc_norm`), and one linear map to `num_classes` logits."""

    num_classes: int
    pool_norm: bool
    scale: float

    @nn.compact
    def __call__(self, pooled: Float[Array, "b d"]) -> Float[Array, "b n"]:
        if self.pool_norm:
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
    pool_norm: bool | None = None,
    head_scale: float = 1.0,
    label_smoothing: float = 0.0,
    train_encoder: bool = True,
):
    """(init, loss_fn, predict) of cross entropy over `num_classes`; `predict` gives "logits" [b, n].

    params: "encoder" and "head". loss_fn's metrics: "top1", the share of right answers.
    pool_norm: LayerNorm of what is pooled (official `fc_norm`); None: where the encoder has no norm at its end.
    head_scale: factor on the head's initial N(0, 0.02) (official: 0.001 for ViT).
    train_encoder: whether the encoder is in training mode, with stochastic depth; false where it is frozen.
    """
    if num_classes < 2:
        raise ConfigError(
            f"num_classes is {num_classes}", "objective.num_classes", "give the number of classes, 2 or more"
        )
    if not 0 <= label_smoothing < 1:
        raise ConfigError(f"label_smoothing {label_smoothing} is not in [0, 1)", "objective.label_smoothing")
    for size in image_size:  # else what lies beyond the last whole token would go unseen
        check_multiple(size, encoder.token_stride, "image size", "the side of the encoder's tokens")
    features = make_features(encoder, mean=mean, std=std, block=block)
    head = Head(num_classes, encoder.pool_norm if pool_norm is None else pool_norm, head_scale)

    def init(key):
        encoder_key, head_key = jax.random.split(key)
        images = jnp.zeros((1, *image_size, len(mean)), jnp.uint8)
        encoder_params = encoder.init(encoder_key, normalise(images, mean, std))["params"]
        pooled, _ = jax.eval_shape(features, encoder_params, images)
        return {"encoder": encoder_params, "head": head.init(head_key, jnp.zeros(pooled.shape))["params"]}

    def logits_of(params, images, *mode):
        pooled, statistics = features(params["encoder"], images, *mode)
        return head.apply({"params": params["head"]}, pooled), statistics

    def loss_fn(params, batch, key, train):
        logits, statistics = logits_of(params, batch["image"], train and train_encoder, key, batch["position"])
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], num_classes), label_smoothing)
        right = logits.argmax(axis=-1) == batch["label"]
        metrics = {"top1": right.mean(dtype=jnp.float32), "statistics": {"encoder": statistics}}
        return optax.softmax_cross_entropy(logits, targets).mean(), metrics

    def predict(params, batch, key):
        return {"logits": logits_of(params, batch["image"])[0]}

    return init, loss_fn, predict
