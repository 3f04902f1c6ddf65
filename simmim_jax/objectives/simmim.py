"""SimMIM: replace masked tokens by one learned token, and regress the masked pixels with a linear head and an L1 loss.

Source: paper sections 3.1 to 3.4; official models/simmim.py. Shape letters: b images, y x pixels, c channels, i j the
token grid, k l the feature grid, s the feature stride in pixels, d the feature width, p = c * s * s values per feature.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simmim_jax.data.pixels import Scale
from simmim_jax.errors import ConfigError, check_multiple
from simmim_jax.masking import make_masks
from simmim_jax.models.layers import Linear, truncated_normal, uniform_by_fan_in
from simmim_jax.objectives.pixels import denormalize, from_patches, has_data, local_moments, normalize, to_patches


class Options(NamedTuple):
    """mask, mask_patch_size, mask_ratio: the mask strategy and its options (see `simmim_jax.masking`).

    norm_window: odd side in pixels of the window over which each target pixel is normalized; 0 disables it (official
        NORM_TARGET; 47 for Swin V2). `predict` undoes it with the image's own mean and deviation, masked pixels
        included. The brightness and color of such a prediction are therefore given, not predicted.
    """

    mask: str = "random"
    mask_patch_size: int = 32
    mask_ratio: float = 0.6
    norm_window: int = 0


def masked_l1(
    prediction: Float[Array, "b k l p"],
    images: Float[Array, "b y x c"],
    masked: Bool[Array, "b y x"],
    stride: int,
    valid: Bool[Array, "b y x c"] | None = None,
) -> Float[Array, ""]:
    """The mean absolute error over the masked pixels and their channels.

    Equals the official sum / (masked pixels + 1e-5) / channels. Here the images are cut into patches; there the
    predictions are shuffled into pixels.

    valid: which values count, if some have no data; None: all. The mean is then over the masked and valid values, of a
      microbatch if there are several.
    """
    error = jnp.abs(prediction - to_patches(images, stride))
    weight = to_patches(masked[..., None].astype(jnp.float32), stride)  # b k l s*s
    by_channel = error.reshape(*error.shape[:3], images.shape[-1], stride**2)
    if valid is not None:
        weights = weight[:, :, :, None] * to_patches(valid.astype(jnp.float32), stride).reshape(by_channel.shape)
        return (by_channel * weights).sum() / (weights.sum() + 1e-5)
    return (by_channel * weight[:, :, :, None]).sum() / (weight.sum() + 1e-5) / images.shape[-1]


def make_head(channels: int, stride: int, width: int, dtype: str) -> Linear:
    """One linear layer from a feature to its pixels, initialized as PyTorch initializes a convolution."""
    initial = uniform_by_fan_in(width)
    return Linear(channels * stride**2, dtype, initial, bias_init=initial)


def make_forward(encoder: nn.Module, *, channels: int) -> Callable:
    """A function (params, images, mask, key, train, batch_index) -> (features, prediction, batch_stats).

    images: normalized float32 [b, y, x, c]. mask: [b, i, j]; masked pixels have no influence on the features.
    features: [b, k, l, d]. prediction: [b, k, l, p]. batch_stats: the encoder's new running statistics if it has them
    and `train` is true, else empty.
    """

    def forward(params, images, mask, key, train, batch_index=None):
        variables = {"params": params["encoder"]}
        tokens = encoder.apply(variables, images, method="embed")
        tokens = jnp.where(mask[..., None], params["mask_token"], tokens)  # float32: its gradient sums over the batch
        features, updated = encoder.apply(
            variables, tokens, train, batch_index, method="trunk", rngs={"drop_path": key}, mutable=["batch_stats"]
        )
        head = make_head(channels, encoder.feature_stride, features.shape[-1], encoder.dtype)
        prediction = head.apply({"params": params["head"]}, features).astype(jnp.float32)
        return features, prediction, updated.get("batch_stats", {})

    return forward


def make_simmim(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    scale: Scale | None,
    options: Options,
) -> dict:
    """SimMIM for images [b, *image_size, len(mean)].

    params: "encoder", "mask_token" [width of a token], "head" (kernel [d, p], bias [p]).
    predict: "loss" [b], "image" and "prediction" [b, y, x, c] float32 on the scale 0..1, "mask" [b, y, x] bool.
    """
    norm_window = options.norm_window
    if norm_window < 0 or (norm_window and norm_window % 2 == 0) or norm_window == 1:
        raise ConfigError(
            f"norm_window is {norm_window}", "objective.norm_window", "give an odd side in pixels, like 47, or 0"
        )
    stride, channels = encoder.feature_stride, len(mean)
    masks = make_masks(
        options.mask,
        image_size=image_size,
        token_stride=encoder.token_stride,
        mask_patch_size=options.mask_patch_size,
        mask_ratio=options.mask_ratio,
    )
    for size in image_size:
        check_multiple(size, stride, "image size", "the encoder's feature stride")
    forward = make_forward(encoder, channels=channels)

    def init(key):
        encoder_key, token_key, head_key = jax.random.split(key, 3)
        images = jnp.zeros((1, *image_size, channels))
        variables = encoder.init(encoder_key, images)
        tokens = jax.eval_shape(partial(encoder.apply, method="embed"), variables, images)
        features = jax.eval_shape(encoder.apply, variables, images)
        head = make_head(channels, stride, features.shape[-1], encoder.dtype)
        return {
            "encoder": variables["params"],
            "mask_token": truncated_normal(encoder.init_truncation)(token_key, tokens.shape[-1:]),
            "head": head.init(head_key, jnp.zeros(features.shape))["params"],
        }

    def reconstruct(params, batch, key, train):
        """(normalized images, masked pixels [b, y, x], prediction, batch_stats)."""
        mask_key, drop_key = jax.random.split(key)
        images = normalize(batch["image"], mean, std, scale)
        mask = masks(mask_key, batch["batch_index"])
        _, prediction, batch_stats = forward(params, images, mask, drop_key, train, batch["batch_index"])
        masked = jnp.repeat(jnp.repeat(mask, encoder.token_stride, axis=1), encoder.token_stride, axis=2)
        return images, masked, prediction, batch_stats

    def make_target(images):
        """(the target, the function from a prediction [b, k, l, p] to an image)."""
        if not norm_window:
            return images, lambda prediction: from_patches(prediction, stride)
        center, deviation = local_moments(images, norm_window)
        return (images - center) / deviation, lambda prediction: from_patches(prediction, stride) * deviation + center

    def valid_values(batch) -> tuple:
        """(which values have data [b, y, x, c],), or () if all have."""
        return () if scale is None or scale.missing is None else (has_data(batch["image"], scale),)

    def loss_fn(params, batch, key, train):
        images, masked, prediction, batch_stats = reconstruct(params, batch, key, train)
        target, _ = make_target(images)
        loss = masked_l1(prediction, target, masked, stride, *valid_values(batch))
        return loss, {"batch_stats": {"encoder": batch_stats}}

    def predict(params, batch, key):
        images, masked, prediction, _ = reconstruct(params, batch, key, False)
        target, to_image = make_target(images)

        def loss_of_one(prediction, target, masked, *valid):
            return masked_l1(prediction[None], target[None], masked[None], stride, *(each[None] for each in valid))

        return {
            "loss": jax.vmap(loss_of_one)(prediction, target, masked, *valid_values(batch)),
            "image": denormalize(images, mean, std),
            "prediction": denormalize(to_image(prediction), mean, std),
            "mask": masked,
        }

    return {
        "init": init,
        "loss_fn": loss_fn,
        "predict": predict,
        "needs": ("image",),
        "outputs": ("loss", "image", "prediction", "mask"),
        "evals": ("reconstruction", "knn", "linear"),
        "online_probes": ("knn", "linear"),
    }
