"""Random erasing, Mixup and CutMix, in the compiled step: what makes a training image, and its target, another.

As timm 1.0.31 has them (`RandomErasing`, `Mixup`), which official fine-tuning trains with: the images are normalized,
erased, then mixed. All are pure functions of a key and of an image's place in the global batch, so that the images are
the same for any number of devices, processes and microbatches. Each function needs a key of its own.

Letters of shapes: b images, y x pixels, c channels, n classes. A box is (top, left, bottom, right) in pixels, the last
two beyond it. The `weight` of a mixed image is its own share; the partner has the rest.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from simmim_jax.errors import ConfigError, check_minimum, choose

ATTEMPTS = 10  # to find a box that fits, before an image is left as it is
FILLS = {  # what stands in an erased box of an image [y, x, c]
    "pixel": lambda key, shape: jax.random.normal(key, shape),
    "rand": lambda key, shape: jax.random.normal(key, shape[2:]),
    "const": lambda key, shape: jnp.zeros(shape[2:]),
}
MODES = ("batch", "pair", "elem")


class Mix(NamedTuple):
    """How images are mixed: by CutMix within the box, else by Mixup in all pixels; `weight` is the image's own."""

    weight: Float[Array, " b"]
    box: Int[Array, "b 4"]
    use_cutmix: Bool[Array, " b"]


def check_mixing(
    *,
    mixup: int | float = 0.0,
    cutmix: int | float = 0.0,
    probability: int | float = 1.0,
    switch: int | float = 0.5,
    mode: str = "batch",
    group: int = 0,
    erase: int | float = 0.0,
    remode: str = "pixel",
    recount: int = 1,
) -> None:
    """Raise ConfigError for options of `draw_mix`, and of `erase`, that cannot work."""
    check_minimum("objective.mixup", mixup, 0)
    check_minimum("objective.cutmix", cutmix, 0)
    shares = {"mixup_prob": probability, "mixup_switch_prob": switch, "erase": erase}
    for name, value in shares.items():
        if not 0 <= value <= 1:
            raise ConfigError(f"{name} is {value}", f"objective.{name}", "give a probability, 0 to 1")
    choose("mixup_mode", mode, MODES)
    check_minimum("objective.mixup_group", group, 0)
    choose("remode", remode, FILLS)
    check_minimum("objective.recount", recount, 1)


def erase(
    images: Float[Array, "b y x c"],
    key: Key[Array, ""],
    batch_index: Int[Array, " b"],
    *,
    probability: int | float,
    mode: str = "pixel",
    area: tuple[int | float, int | float] = (0.02, 1 / 3),
    ratio: tuple[int | float, int | float] = (0.3, 1 / 0.3),
    count: int = 1,
) -> Float[Array, "b y x c"]:
    """The images, some with boxes in which noise stands; `images` are normalized, so that noise is N(0, 1).

    Random erasing (Zhong et al. 2017, arXiv 1708.04896), timm's `RandomErasing`.

    Args:
      batch_index: the images' places in the global batch; with the key they decide everything.
      probability: that an image has any.
      mode: noise for each "pixel", one draw for each channel of a box ("rand"), or 0 ("const").
      area: bounds of a box's part of the image, before it is divided by the number of boxes.
      ratio: bounds of a box's height / width, drawn uniformly in its logarithm.
      count: boxes at most; their number is drawn from 1 to `count`.
    """
    shape = images.shape[1:]

    def one(image: Float[Array, "y x c"], batch_index: Int[Array, ""]) -> Float[Array, "y x c"]:
        draw_key, *fill_keys = jax.random.split(jax.random.fold_in(key, batch_index), 1 + count)
        draws = jax.random.uniform(draw_key, (1 + count, 2 * ATTEMPTS + 2))  # at once: each call takes long to compile
        boxes = 1 + _integer(draws[0, 1], count)
        for place, fill_key in enumerate(fill_keys):
            hidden = _inside(_random_box(draws[1 + place], shape[:2], area, ratio, boxes), shape[:2])
            hidden &= (draws[0, 0] < probability) & (place < boxes)
            image = jnp.where(hidden[..., None], FILLS[mode](fill_key, shape), image)
        return image

    return jax.vmap(one)(images, batch_index)


def draw_mix(
    key: Key[Array, ""],
    batch_index: Int[Array, " b"],
    partner_batch_index: Int[Array, " b"],
    *,
    image_size: tuple[int, int],
    mixup: int | float,
    cutmix: int | float,
    probability: int | float = 1.0,
    switch: int | float = 0.5,
    mode: str = "batch",
    group: int = 0,
) -> Mix:
    """How each image is mixed with its partner, see `partner_of`.

    Mixup (Zhang et al. 2017, arXiv 1710.09412) and CutMix (Yun et al. 2019, arXiv 1905.04899), timm's `Mixup`.

    Args:
      batch_index, partner_batch_index: places in the global batch.
      image_size: (height, width) in pixels.
      mixup, cutmix: a of Beta(a, a), from which an image's own share is drawn; 0: never so. One must be above 0.
      probability: that images are mixed at all.
      switch: the probability of CutMix where there are both.
      mode: one draw for the whole "batch", for each "pair", or for each element ("elem").
      group: of mode "batch": each `group` neighbors have a draw of their own; 0: all have one.

    CutMix's box has the other share of the image's area, and a center anywhere, so that it may lie partly outside; the
    weight is then that of the pixels that are left of the image.
    """
    if not (mixup or cutmix):
        raise ValueError("mixup and cutmix are both 0: there is nothing to draw")
    share_of_cutmix = switch if mixup and cutmix else float(cutmix > 0)

    def one(key: Key[Array, ""]) -> tuple[Float[Array, ""], Int[Array, "4"], Bool[Array, ""]]:
        draw_key, share_key = jax.random.split(key)
        of_mixing, of_cutmix, *of_center = jax.random.uniform(draw_key, (4,))
        use_cutmix = of_cutmix < share_of_cutmix
        alpha = jnp.where(use_cutmix, cutmix, mixup).astype(jnp.float32)
        own, other = jax.random.loggamma(share_key, alpha, (2,))
        share = jax.nn.sigmoid(own - other)  # Beta(a, a), as jax.random.beta, which takes twice as long to compile
        share = jnp.where(of_mixing < probability, share, 1.0)
        box = jnp.where(use_cutmix, _cut(of_center, image_size, share), 0)
        left = 1.0 - _area(box) / math.prod(image_size)
        return jnp.where(use_cutmix, left, share), box, use_cutmix

    if mode == "batch" and not group:
        drawn = one(key)
        return Mix(*(jnp.broadcast_to(value, (*batch_index.shape, *value.shape)) for value in drawn))
    places = {
        "batch": batch_index // max(group, 1),
        "pair": jnp.minimum(batch_index, partner_batch_index),
        "elem": batch_index,
    }
    place = places[mode]
    return Mix(*jax.vmap(lambda place: one(jax.random.fold_in(key, place)))(place))


def partner_of(batch_index: Int[Array, " b"], size: int, group: int = 0) -> Int[Array, " b"]:
    """The places in a global batch of `size` of the images that those at `batch_index` are mixed with.

    timm reverses the batch, of which each process of a run has one of its own: so it is in each `group` neighbors
    here, the last of which may be fewer, however many processes there are. 0: in the whole batch.
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
    """The targets, each in proportion to its image's weight."""
    weight = drawn.weight[:, None]
    return weight * targets + (1 - weight) * partners


def _random_box(
    draws: Float[Array, " draws"], size: tuple[int, int], area: tuple, ratio: tuple, boxes: Int[Array, ""]
) -> Int[Array, "4"]:
    """A box to erase: of ten tries the first that is less than the image in both directions, or an empty one."""
    of_area, of_ratio, of_place = jnp.split(draws, (ATTEMPTS, 2 * ATTEMPTS))
    areas = (area[0] + of_area * (area[1] - area[0])) * math.prod(size) / boxes
    ratios = jnp.exp(math.log(ratio[0]) + of_ratio * math.log(ratio[1] / ratio[0]))
    heights = jnp.round(jnp.sqrt(areas * ratios)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas / ratios)).astype(jnp.int32)
    fits = (heights < size[0]) & (widths < size[1])
    first = fits.argmax()
    height, width = jnp.where(fits.any(), heights[first], 0), jnp.where(fits.any(), widths[first], 0)
    top, left = _integer(of_place[0], size[0] - height + 1), _integer(of_place[1], size[1] - width + 1)
    return jnp.stack([top, left, top + height, left + width])


def _cut(of_center: list[Float[Array, ""]], size: tuple[int, int], share: Float[Array, ""]) -> Int[Array, "4"]:
    """CutMix's box, which leaves an image `share` of its area where all of it lies inside."""
    edges = []
    for side, draw in zip(size, of_center, strict=True):
        cut = (side * jnp.sqrt(1.0 - share)).astype(jnp.int32)  # rounded down
        center = _integer(draw, side)
        edges.append((jnp.clip(center - cut // 2, 0, side), jnp.clip(center + (cut + 1) // 2, 0, side)))
    (top, bottom), (left, right) = edges
    return jnp.stack([top, left, bottom, right])


def _integer(draw: Float[Array, ""], below: int | Int[Array, ""]) -> Int[Array, ""]:
    """0 to `below` - 1, all alike, by a draw in [0, 1)."""
    return jnp.floor(draw * below).astype(jnp.int32)


def _inside(box: Int[Array, "4"], size: tuple[int, int]) -> Bool[Array, "y x"]:
    top, left, bottom, right = box
    rows, columns = jnp.arange(size[0]), jnp.arange(size[1])
    return ((rows >= top) & (rows < bottom))[:, None] & ((columns >= left) & (columns < right))


def _area(box: Int[Array, "4"]) -> Int[Array, ""]:
    return (box[2] - box[0]) * (box[3] - box[1])
