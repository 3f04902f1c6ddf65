"""Random erasing, Mixup and CutMix: distributions, weights, and independence of how a batch is split.

test_augment_parity.py compares the distributions with timm's own code. Each way to draw takes a second or two to
compile. Hence there are few of them, and one draw of many images serves several tests.
"""

import math
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from simmim_jax.errors import ConfigError
from simmim_jax.objectives.mixing import Erasing, Mix, Mixing, check, draw_mix, erase, mix, mix_targets, partner
from simmim_jax.runtime.sharding import batch_sharding, make_mesh

KEY = jax.random.key(0)
SIZE = (24, 32)
OFFICIAL = {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5}
COUNT = 4000
MIN_P = 1e-4  # p value: a correct draw with another key fails one test in 10,000
FAST_COMPILE = {"xla_backend_optimization_level": "0"}
UNTOUCHED = 9.0  # noise from N(0, 1) does not reach it


@cache
def drawing(**options):
    draw = partial(draw_mix, image_size=SIZE, mixing=Mixing(**{**OFFICIAL, **options}))
    return jax.jit(draw, compiler_options=FAST_COMPILE)


def draw(batch_index: np.ndarray, **options) -> Mix:
    """Draws for these images of a batch of `COUNT`, each mixed with its partner in the reversed batch; numpy."""
    drawn = drawing(**options)(KEY, jnp.asarray(batch_index), jnp.asarray(COUNT - 1 - batch_index))
    return jax.tree.map(np.asarray, drawn)


@pytest.fixture(scope="module")
def many() -> Mix:
    return draw(np.arange(COUNT), mixup_mode="elem")


@cache
def erasing(**options):
    return jax.jit(partial(erase, erasing=Erasing(**options)), compiler_options=FAST_COMPILE)


@pytest.fixture(scope="module")
def erased() -> tuple[np.ndarray, np.ndarray]:
    """1500 images of one shade after erasing, and their erased pixels [b, y, x]."""
    images = np.asarray(erasing(reprob=0.5)(jnp.full((1500, *SIZE, 2), UNTOUCHED), KEY, jnp.arange(1500)))
    return images, (images != UNTOUCHED)[..., 0]


def random_images(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *SIZE, 3), np.float32))


# --- Mixup and CutMix


def test_weights_follow_beta_and_methods_the_switch_probability(many):
    assert stats.binomtest(int(many.use_cutmix.sum()), COUNT, 0.5).pvalue > MIN_P
    assert stats.kstest(many.weight[~many.use_cutmix], stats.beta(0.8, 0.8).cdf).pvalue > MIN_P
    assert not many.box[~many.use_cutmix].any()


def test_cutmix_boxes_are_inside_and_reach_every_edge(many):
    top, left, bottom, right = many.box[many.use_cutmix].T
    assert top.min() == left.min() == 0
    assert (bottom.max(), right.max()) == SIZE
    assert (top <= bottom).all()
    assert (left <= right).all()
    inside = (top > 0) & (bottom < SIZE[0])
    assert set((bottom - top)[inside] % 2) == {0, 1}  # odd sides stay odd


def test_weight_is_the_fraction_of_own_pixels_and_of_the_own_target(many):
    drawn = Mix(*(values[:64] for values in many))
    assert 10 < drawn.use_cutmix.sum() < 54
    mixed = np.asarray(jax.jit(mix)(jnp.ones((64, *SIZE, 1)), jnp.zeros((64, *SIZE, 1)), drawn))
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), drawn.weight, atol=1e-6)  # a float32 sum over 768 pixels
    own, other = (np.tile(np.float32(target), (64, 1)) for target in ([1, 0, 0], [0, 0.25, 0.75]))
    targets = np.asarray(jax.jit(mix_targets)(jnp.asarray(own), jnp.asarray(other), drawn))
    np.testing.assert_array_equal(targets[:, 0], drawn.weight)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)


def test_cutmix_takes_the_box_from_the_partner_and_mixup_blends_every_pixel():
    images, partners = random_images(3, 1), random_images(3, 2).at[2].set(jnp.nan)
    boxes = jnp.array([[0, 8, 24, 24], [0, 0, 0, 0], [0, 0, 0, 0]])
    drawn = Mix(jnp.array([0.5, 0.25, 1.0]), boxes, jnp.array([True, False, False]))
    cut, blended, unmixed = np.asarray(jax.jit(mix)(images, partners, drawn))
    np.testing.assert_array_equal(cut[:, 8:24], np.asarray(partners)[0, :, 8:24])
    np.testing.assert_array_equal(cut[:, :8], np.asarray(images)[0, :, :8])
    np.testing.assert_array_equal(cut[:, 24:], np.asarray(images)[0, :, 24:])
    np.testing.assert_allclose(blended, 0.25 * np.asarray(images)[1] + 0.75 * np.asarray(partners)[1], atol=1e-6)
    np.testing.assert_array_equal(unmixed, images[2])  # weight 1 keeps the bits, whatever the partner


def test_mode_batch_shares_one_draw_and_groups_have_their_own():
    """A group is the batch of one process of the official run."""
    size, group = 23, 5  # the last group has three
    index = np.arange(size)
    partners = np.asarray(partner(jnp.asarray(index), size, group))
    np.testing.assert_array_equal(partners[partners], index)
    np.testing.assert_array_equal(partners // group, index // group)
    np.testing.assert_array_equal(partners[20:], [22, 21, 20])
    np.testing.assert_array_equal(partner(jnp.asarray(index), size), index[::-1])
    weights = draw(index, mixup_mode="batch", mixup_group=group).weight
    by_group = [set(weights[index // group == n].tolist()) for n in range(5)]
    assert [len(found) for found in by_group] == [1] * 5
    assert len(set().union(*by_group)) == 5
    assert len(set(draw(index, mixup_mode="batch").weight.tolist())) == 1


@pytest.mark.slow
def test_mode_pair_shares_a_draw_and_mixup_prob_is_respected():
    drawn = draw(np.arange(COUNT), mixup_mode="pair", cutmix=0.0, mixup_prob=0.3)
    for values in drawn:
        np.testing.assert_array_equal(values, values[::-1])
    weight = drawn.weight[: COUNT // 2]
    assert not drawn.use_cutmix.any()  # cutmix=0
    assert stats.binomtest(int((weight < 1).sum()), len(weight), 0.3).pvalue > MIN_P
    assert stats.kstest(weight[weight < 1], stats.beta(0.8, 0.8).cdf).pvalue > MIN_P


def test_mixup_prob_zero_keeps_images_and_targets():
    @partial(jax.jit, compiler_options=FAST_COMPILE)
    def run(images, targets):
        index = jnp.arange(8)
        drawn = draw_mix(KEY, index, index[::-1], SIZE, Mixing(0.8, 1.0, mixup_prob=0.0, mixup_mode="elem"))
        return mix(images, images[::-1], drawn), mix_targets(targets, targets[::-1], drawn)

    given = random_images(8), jax.nn.one_hot(jnp.arange(8), 8)
    chex.assert_trees_all_equal(run(*given), given)


def test_drawing_without_a_method_is_an_error():
    with pytest.raises(ValueError, match="nothing to draw"):
        drawing(mixup=0.0, cutmix=0.0)(KEY, jnp.arange(2), jnp.arange(2))


# --- random erasing


def test_reprob_of_the_images_lose_one_whole_box_in_all_channels(erased):
    images, pixels = erased
    chosen = pixels.any(axis=(1, 2))
    assert stats.binomtest(int(chosen.sum()), len(chosen), 0.5).pvalue > MIN_P
    np.testing.assert_array_equal((images != UNTOUCHED).all(axis=-1), pixels)
    height, width = pixels.any(axis=2).sum(axis=1), pixels.any(axis=1).sum(axis=1)
    np.testing.assert_array_equal(pixels.sum(axis=(1, 2)), height * width)
    assert height.max() < SIZE[0]
    assert width.max() < SIZE[1]


def test_a_box_holds_independent_noise_in_each_pixel_and_channel(erased):
    images, pixels = erased
    noise = images[pixels]  # n c
    assert stats.kstest(noise.ravel()[:20_000], "norm").pvalue > MIN_P
    assert abs(np.corrcoef(noise.T)[0, 1]) < 5 / math.sqrt(len(noise))
    pairs = (pixels[:, :, 1:] & pixels[:, :, :-1])[..., None] & np.array([True, False])
    correlation = np.corrcoef(images[:, :, 1:][pairs], images[:, :, :-1][pairs])[0, 1]
    assert abs(correlation) < 5 / math.sqrt(pairs.sum())


def test_images_stay_whole_if_no_box_fits_or_none_is_chosen():
    images, index = random_images(64), jnp.arange(64)
    settings = Erasing(reprob=0.0), Erasing(reprob=1.0, area=(1.0, 1.0))  # a side of such a box has no room
    run = jax.jit(lambda: [erase(images, KEY, index, each) for each in settings], compiler_options=FAST_COMPILE)
    for erased in run():
        np.testing.assert_array_equal(erased, images)


@pytest.mark.slow
@pytest.mark.parametrize("remode", ["rand", "const"])
def test_a_box_of_rand_or_const_has_one_value_per_channel(remode):
    images = np.asarray(erasing(reprob=1.0, remode=remode)(jnp.full((500, *SIZE, 2), UNTOUCHED), KEY, jnp.arange(500)))
    boxes = [image[(image != UNTOUCHED)[..., 0]] for image in images]  # n c of each
    assert all((box == box[0]).all() for box in boxes)
    colors = np.stack([box[0] for box in boxes])
    assert not colors.any() if remode == "const" else stats.kstest(colors.ravel(), "norm").pvalue > MIN_P


@pytest.mark.slow
def test_the_number_of_boxes_is_drawn_and_boxes_share_the_area():
    draw = erasing(reprob=1.0, remode="const", recount=3, area=(0.3, 0.3), ratio=(1.0, 1.0))
    counts = (np.asarray(draw(jnp.full((1500, 60, 60, 1), UNTOUCHED), KEY, jnp.arange(1500))) == 0).sum(axis=(1, 2, 3))
    one, two, three = 33**2, 2 * 23**2, 3 * 19**2  # sides are rounded roots of 0.3 * 3600 / boxes
    assert counts.max() == one
    assert stats.binomtest(int((counts == one).sum()), 1500, 1 / 3).pvalue > MIN_P
    assert {two, three} <= set(counts.tolist())  # some boxes do not overlap


# --- independence of the split


def test_draws_of_an_image_depend_on_its_batch_index_only(many, erased):
    index = np.random.default_rng(0).integers(0, 1500, COUNT)  # another order, with repetitions
    chex.assert_trees_all_equal(draw(index, mixup_mode="elem"), Mix(*(values[index] for values in many)))
    index = index[:1500]
    again = erasing(reprob=0.5)(jnp.full(erased[0].shape, UNTOUCHED), KEY, jnp.asarray(index))
    chex.assert_trees_all_equal(np.asarray(again), erased[0][index])


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "pair"])
def test_images_and_targets_are_the_same_on_eight_devices_and_in_parts(mode):
    def augment(images, targets, partners, partner_targets, batch_index, partner_index):
        erase_key, mix_key = jax.random.split(KEY)
        images = erase(images, erase_key, batch_index, Erasing(reprob=0.5))
        partners = erase(partners, erase_key, partner_index, Erasing(reprob=0.5))
        drawn = draw_mix(mix_key, batch_index, partner_index, SIZE, Mixing(**OFFICIAL, mixup_mode=mode))
        return mix(images, partners, drawn), mix_targets(targets, partner_targets, drawn)

    batch_index = jnp.arange(16)
    batch = (random_images(16), jax.nn.one_hot(batch_index % 5, 5))
    batch = (*batch, *(values[::-1] for values in batch), batch_index, batch_index[::-1])
    whole = jax.tree.map(np.asarray, jax.jit(augment, compiler_options=FAST_COMPILE)(*batch))
    part = jax.jit(augment, compiler_options=FAST_COMPILE)(*(values[8:4:-1] for values in batch))
    chex.assert_trees_all_close(part, tuple(values[8:4:-1] for values in whole), rtol=0, atol=0)
    sharding = batch_sharding(make_mesh())
    split = jax.jit(augment, out_shardings=sharding, compiler_options=FAST_COMPILE)(*jax.device_put(batch, sharding))
    # draws are equal to the bit; the blend may use a fused multiply-add, rounded once instead of twice
    chex.assert_trees_all_close(jax.tree.map(np.asarray, split), whole, rtol=0, atol=1e-6)


def test_draws_are_those_of_jax_0_10_2(many, erased):
    """Other draws would change every run that resumes across an upgrade of JAX."""
    assert many.use_cutmix[:6].astype(int).tolist() == [0, 1, 1, 0, 1, 1]
    assert many.box[1:3].tolist() == [[0, 0, 12, 23], [0, 3, 14, 27]]
    weights = [0.3546736, 0.640625, 0.5625, 0.9763460]
    np.testing.assert_allclose(many.weight[:4], weights, atol=1e-5)  # from float32 gamma draws
    corners = [tuple(map(int, np.argwhere(pixels)[0])) if pixels.any() else None for pixels in erased[1][:6]]
    assert corners == [(15, 14), None, (3, 2), None, None, None]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (Mixing(mixup=math.nan), "objective.mixup"),
        (Mixing(cutmix=-1), "objective.cutmix"),
        (Mixing(mixup_prob=1.5), "mixup_prob is 1.5"),
        (Mixing(mixup_mode="element"), "did you mean elem"),
        (Erasing(reprob=math.nan), "objective.reprob"),
        (Erasing(remode="pixels"), "did you mean pixel"),
        (Erasing(recount=0), "recount is 0"),
    ],
)
def test_invalid_options_are_refused(options, hint):
    check(Mixing(**OFFICIAL), Erasing(reprob=0.25))
    with pytest.raises(ConfigError, match=hint):
        check(*((options, Erasing()) if isinstance(options, Mixing) else (Mixing(), options)))
