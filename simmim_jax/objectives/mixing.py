"""Random erasing, Mixup and CutMix, in the compiled step.

They equal `RandomErasing` and `Mixup` of timm 1.0.31, which official fine-tuning uses: images are normalized, erased,
then mixed. All are pure functions of a key and of an image's index in the global batch. The results are therefore the
same for any number of devices, processes and microbatches. Each function needs its own key.

Shape letters: b images, y x pixels, c channels, n classes. A box is (top, left, bottom, right) in pixels, with bottom
and right exclusive. The `weight` of a mixed image is its own part; its partner has 1 - weight.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from simmim_jax.errors import ConfigError, check_minimum, choose

ATTEMPTS = 10  # tries to find a box that fits, before an image is left unchanged
FILLS = {  # the content of an erased box in an image [y, x, c]
    "pixel": lambda key, shape: jax.random.normal(key, shape),
    "rand": lambda key, shape: jax.random.normal(key, shape[2:]),
    "const": lambda key, shape: jnp.zeros(shape[2:]),
}
MODES = ("batch", "pair", "elem")


class Mixing(NamedTuple):
    """How training images are mixed.

    Mixup: Zhang et al. 2017, arXiv 1710.09412. CutMix: Yun et al. 2019, arXiv 1905.04899. timm's `Mixup`.

    mixup, cutmix: a of Beta(a, a), from which the weight is drawn; 0 disables the method.
    mixup_prob: probability that an image is mixed.
    mixup_switch_prob: probability of CutMix if both are enabled.
    mixup_mode: one draw for the whole "batch", for each "pair", or for each element ("elem").
    mixup_group: in mode "batch", each `mixup_group` consecutive images have their own draw and reverse; 0: all have
        one.
    """

    mixup: int | float = 0.0
    cutmix: int | float = 0.0
    mixup_prob: int | float = 1.0
    mixup_switch_prob: int | float = 0.5
    mixup_mode: str = "batch"
    mixup_group: int = 0

    @property
    def active(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0


class Erasing(NamedTuple):
    """How boxes of training images are erased (Zhong et al. 2017, arXiv 1708.04896; timm's `RandomErasing`).

    reprob: probability that an image has an erased box.
    remode: noise for each "pixel", one draw for each channel of a box ("rand"), or 0 ("const").
    recount: maximum number of boxes; their number is drawn from 1 to `recount`.
    area: bounds of a box's fraction of the image, before division by the number of boxes.
    ratio: bounds of a box's height / width, drawn uniformly in its logarithm.
    """

    reprob: int | float = 0.0
    remode: str = "pixel"
    recount: int = 1
    area: tuple[int | float, int | float] = (0.02, 1 / 3)
    ratio: tuple[int | float, int | float] = (0.3, 1 / 0.3)


class Mix(NamedTuple):
    """A draw for each image: CutMix within `box`, or Mixup of all pixels. `weight` is the image's own part."""

    weight: Float[Array, " b"]
    box: Int[Array, "b 4"]
    use_cutmix: Bool[Array, " b"]


def check(mixing: Mixing, erasing: Erasing) -> None:
    """Raise ConfigError for options that cannot work."""
    values = mixing._asdict() | erasing._asdict()
    for name, minimum in {"mixup": 0, "cutmix": 0, "mixup_group": 0, "recount": 1}.items():
        check_minimum(f"objective.{name}", values[name], minimum)
    for name in ("mixup_prob", "mixup_switch_prob", "reprob"):
        if not 0 <= values[name] <= 1:
            raise ConfigError(f"{name} is {values[name]}", f"objective.{name}", "give a probability, 0 to 1")
    choose("mixup_mode", mixing.mixup_mode, MODES)
    choose("remode", erasing.remode, FILLS)


def erase(
    images: Float[Array, "b y x c"], key: Key[Array, ""], batch_index: Int[Array, " b"], erasing: Erasing
) -> Float[Array, "b y x c"]:
    """The images, some with boxes of noise. `images` are normalized, so the noise is N(0, 1)."""
    shape = images.shape[1:]

    def one(image: Float[Array, "y x c"], batch_index: Int[Array, ""]) -> Float[Array, "y x c"]:
        draw_key, *fill_keys = jax.random.split(jax.random.fold_in(key, batch_index), 1 + erasing.recount)
        draws = jax.random.uniform(draw_key, (1 + erasing.recount, 2 * ATTEMPTS + 2))  # one call compiles faster
        boxes = 1 + _integer(draws[0, 1], erasing.recount)
        for n, fill_key in enumerate(fill_keys):
            erased = _inside(_random_box(draws[1 + n], shape[:2], erasing, boxes), shape[:2])
            erased &= (draws[0, 0] < erasing.reprob) & (n < boxes)
            image = jnp.where(erased[..., None], FILLS[erasing.remode](fill_key, shape), image)
        return image

    return jax.vmap(one)(images, batch_index)


def draw_mix(
    key: Key[Array, ""],
    batch_index: Int[Array, " b"],
    partner_batch_index: Int[Array, " b"],
    image_size: tuple[int, int],
    mixing: Mixing,
) -> Mix:
    """How each image is mixed with its partner (see `partner`). image_size: (height, width) in pixels.

    CutMix's box has 1 - weight of the image's area. Its center is anywhere, so part of the box may be outside; the
    weight is then recomputed from the pixels that remain.
    """
    if not mixing.active:
        raise ValueError("mixup and cutmix are both 0: there is nothing to draw")
    both = mixing.mixup and mixing.cutmix
    cutmix_prob = mixing.mixup_switch_prob if both else float(mixing.cutmix > 0)

    def one(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, "4"], Bool[Array, ""]]:
        draw_key, weight_key = jax.random.split(key)
        mix_draw, cutmix_draw, *center_draws = jax.random.uniform(draw_key, (4,))
        use_cutmix = cutmix_draw < cutmix_prob
        alpha = jnp.where(use_cutmix, mixing.cutmix, mixing.mixup).astype(jnp.float32)
        own, other = jax.random.loggamma(weight_key, alpha, (2,))
        weight = jax.nn.sigmoid(own - other)  # Beta(a, a); jax.random.beta takes twice as long to compile
        weight = jnp.where(mix_draw < mixing.mixup_prob, weight, 1.0)
        box = jnp.where(use_cutmix, _cut(center_draws, image_size, weight), 0)
        top, left, bottom, right = box
        remaining = 1.0 - (bottom - top) * (right - left) / math.prod(image_size)
        return jnp.where(use_cutmix, remaining, weight), box, use_cutmix

    if mixing.mixup_mode == "batch" and not mixing.mixup_group:
        drawn = one(key)
        return Mix(*(jnp.broadcast_to(value, (*batch_index.shape, *value.shape)) for value in drawn))
    numbers = {
        "batch": batch_index // max(mixing.mixup_group, 1),
        "pair": jnp.minimum(batch_index, partner_batch_index),
        "elem": batch_index,
    }
    return Mix(*jax.vmap(lambda number: one(jax.random.fold_in(key, number)))(numbers[mixing.mixup_mode]))


def partner(batch_index: Int[Array, " b"], size: int, group: int = 0) -> Int[Array, " b"]:
    """The index of each image's partner in a global batch of `size`.

    Each `group` consecutive images are reversed; the last group may be smaller. 0: the whole batch is reversed, as timm
    does. In a run of several processes, timm reverses each process's own batch, which `group` reproduces.
    """
    start = batch_index // group * group if group else jnp.zeros_like(batch_index)
    end = jnp.minimum(start + group, size) if group else size
    return start + end - 1 - batch_index


def mix(images: Float[Array, "b y x c"], partners: Float[Array, "b y x c"], drawn: Mix) -> Float[Array, "b y x c"]:
    """The images, each mixed with its partner."""
    weight = drawn.weight[:, None, None, None]
    inside = jax.vmap(lambda box: _inside(box, images.shape[1:3]))(drawn.box)[..., None]  # b y x 1
    cut = jnp.where(inside, partners, images)
    blended = jnp.where(weight == 1, images, weight * images + (1 - weight) * partners)
    return jnp.where(drawn.use_cutmix[:, None, None, None], cut, blended)


def mix_targets(targets: Float[Array, "b n"], partners: Float[Array, "b n"], drawn: Mix) -> Float[Array, "b n"]:
    """The targets, weighted like the images."""
    weight = drawn.weight[:, None]
    return weight * targets + (1 - weight) * partners


def _random_box(
    draws: Float[Array, " draws"], size: tuple[int, int], erasing: Erasing, boxes: Int[Array, ""]
) -> Int[Array, "4"]:
    """The first box of ten tries that is smaller than the image in both directions, or an empty one."""
    area_draws, ratio_draws, position_draws = jnp.split(draws, (ATTEMPTS, 2 * ATTEMPTS))
    area, ratio = erasing.area, erasing.ratio
    areas = (area[0] + area_draws * (area[1] - area[0])) * math.prod(size) / boxes
    ratios = jnp.exp(math.log(ratio[0]) + ratio_draws * math.log(ratio[1] / ratio[0]))
    heights = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    fits = (heights < size[0]) & (widths < size[1])
    first = fits.argmax()
    height, width = jnp.where(fits.any(), heights[first], 0), jnp.where(fits.any(), widths[first], 0)
    top = _integer(position_draws[0], size[0] - height + 1)
    left = _integer(position_draws[1], size[1] - width + 1)
    return jnp.stack([top, left, top + height, left + width])


def _cut(center_draws: list[Float[Array, ""]], size: tuple[int, int], weight: Float[Array, ""]) -> Int[Array, "4"]:
    """CutMix's box. An image keeps `weight` of its area if all of the box is inside."""
    edges = []
    for side, draw in zip(size, center_draws, strict=True):
        cut = (side * jnp.sqrt(1.0 - weight)).astype(jnp.int32)  # rounded down
        center = _integer(draw, side)
        edges.append((jnp.clip(center - cut // 2, 0, side), jnp.clip(center + (cut + 1) // 2, 0, side)))
    (top, bottom), (left, right) = edges
    return jnp.stack([top, left, bottom, right])


def _integer(draw: Float[Array, ""], stop: int | Int[Array, ""]) -> Int[Array, ""]:
    """0 to `stop` - 1 with equal probabilities, from a draw in [0, 1)."""
    return jnp.floor(draw * stop).astype(jnp.int32)


def _inside(box: Int[Array, "4"], size: tuple[int, int]) -> Bool[Array, "y x"]:
    top, left, bottom, right = box
    rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))
