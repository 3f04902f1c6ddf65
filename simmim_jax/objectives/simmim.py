"""SimMIM: replace the hidden tokens by one learned token, and regress the hidden pixels with a linear head and an L1
loss.

Paper sections 3.1 to 3.4; official models/simmim.py. Shape letters: b images, y x pixels, c channels, i j the token
grid, k l the feature grid, s the feature stride, d the feature width, p = c * s * s the values that one feature
predicts.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from simmim_jax.errors import ConfigError, check_multiple
from simmim_jax.masking import make_masks
from simmim_jax.models.layers import Linear, truncated_normal, uniform_by_fan_in
from simmim_jax.objectives.pixels import denormalize, from_patches, local_moments, normalize, to_patches


def masked_l1(
    prediction: Float[Array, "b k l p"], images: Float[Array, "b y x c"], hidden: Bool[Array, "b y x"], stride: int
) -> Float[Array, ""]:
    """Mean absolute error over the hidden pixels and their channels.

    The official sum / (hidden pixels + 1e-5) / channels, on cut images instead of shuffled predictions: the same terms.
    """
    error = jnp.abs(prediction - to_patches(images, stride))
    weight = to_patches(hidden[..., None].astype(jnp.float32), stride)  # b k l s*s
    by_channel = error.reshape(*error.shape[:3], images.shape[-1], stride**2)
    return (by_channel * weight[:, :, :, None]).sum() / (weight.sum() + 1e-5) / images.shape[-1]


def make_head(channels: int, stride: int, width: int, dtype: str) -> Linear:
    """One linear layer from a feature to the pixels of its square, initialized as PyTorch does a convolution."""
    initial = uniform_by_fan_in(width)
    return Linear(channels * stride**2, dtype, initial, bias_init=initial)


def make_forward(encoder: nn.Module, *, channels: int) -> Callable:
    """A function (params, images, mask, key, train, batch_index) -> (features, prediction, statistics).

    images: [b, y, x, c], normalized, float32. mask: [b, i, j]; nothing of the hidden pixels reaches the features.
    features: [b, k, l, d]. prediction: [b, k, l, p]. statistics: the encoder's new running ones, where it has them and
    is trained; else empty.
    """

    def forward(params, images, mask, key, train, batch_index=None):
        encoder_params = {"params": params["encoder"]}
        tokens = encoder.apply(encoder_params, images, method="embed")
        tokens = jnp.where(mask[..., None], params["mask_token"], tokens)  # float32: the gradient sums over the batch
        features, measured = encoder.apply(
            encoder_params, tokens, train, batch_index, method="trunk", rngs={"drop_path": key}, mutable=["batch_stats"]
        )
        head = make_head(channels, encoder.feature_stride, features.shape[-1], encoder.dtype)
        prediction = head.apply({"params": params["head"]}, features).astype(jnp.float32)
        return features, prediction, measured.get("batch_stats", {})

    return forward


def make_simmim(
    encoder: nn.Module,
    *,
    image_size: tuple[int, int],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mask: str = "random",
    mask_patch_size: int = 32,
    mask_ratio: float = 0.6,
    norm_window: int = 0,
):
    """(init, loss_fn, predict) of SimMIM for images [b, *image_size, len(mean)].

    `predict` gives "loss" [b], "image" and "prediction" [b, y, x, c] float32 in 0..1, and "mask" [b, y, x] bool.
    params: "encoder", "mask_token" [c of the tokens], "head" (kernel [d, p], bias [p]).
    norm_window: side of the window, odd, in pixels, over which each target pixel is normalized; 0: not (official
        NORM_TARGET; 47 for Swin V2). For the eye, `predict` undoes that with the mean and deviation of the whole
        image, hidden pixels included: the colors and shades that a picture then shows were given, not predicted.
    """
    if norm_window < 0 or (norm_window and norm_window % 2 == 0) or norm_window == 1:
        raise ConfigError(
            f"norm_window is {norm_window}", "objective.norm_window", "give an odd side in pixels, like 47, or 0"
        )
    stride, channels = encoder.feature_stride, len(mean)
    masks = make_masks(
        mask,
        image_size=image_size,
        token_stride=encoder.token_stride,
        mask_patch_size=mask_patch_size,
        mask_ratio=mask_ratio,
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

    def see(params, batch, key, train):
        """The normalized images, which of their pixels are hidden [b, y, x], the prediction, running statistics."""
        images = normalize(batch["image"], mean, std)
        mask_key, drop_key = jax.random.split(key)
        mask = masks(mask_key, batch["batch_index"])
        _, prediction, statistics = forward(params, images, mask, drop_key, train, batch["batch_index"])
        hidden = jnp.repeat(jnp.repeat(mask, encoder.token_stride, axis=1), encoder.token_stride, axis=2)
        return images, hidden, prediction, statistics

    def target_of(images):
        """What is predicted, and its inverse, from a prediction in patches to an image."""
        if not norm_window:
            return images, lambda prediction: from_patches(prediction, stride)
        center, spread = local_moments(images, norm_window)
        return (images - center) / spread, lambda prediction: from_patches(prediction, stride) * spread + center

    def loss_fn(params, batch, key, train):
        images, hidden, prediction, statistics = see(params, batch, key, train)
        target, _ = target_of(images)
        return masked_l1(prediction, target, hidden, stride), {"batch_stats": {"encoder": statistics}}

    def predict(params, batch, key):
        images, hidden, prediction, _ = see(params, batch, key, False)
        target, to_image = target_of(images)
        losses = jax.vmap(lambda *one: masked_l1(*(x[None] for x in one), stride))(prediction, target, hidden)
        return {
            "loss": losses,
            "image": denormalize(images, mean, std),
            "prediction": denormalize(to_image(prediction), mean, std),
            "mask": hidden,
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
