"""Random erasing, Mixup and CutMix: timm's chances, honest weights, and the same images however a batch is split.

Each way to draw takes a second or two to compile (half of that without optimization): hence few of them, whose many
draws are asked many questions.
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
from simmim_jax.objectives.mixing import Mix, check_mixing, draw_mix, erase, mix, mix_targets, partner_of
from simmim_jax.runtime.sharding import batch_sharding, make_mesh

KEY = jax.random.key(0)
SIZE = (24, 32)
OFFICIAL = {"mixup": 0.8, "cutmix": 1.0, "probability": 1.0, "switch": 0.5}
MANY = 4000
LEAST = 1e-4  # p value: were the draws right and the key another, one test in 10,000 would fail
QUICKLY = {"xla_backend_optimization_level": "0"}
UNTOUCHED = 9.0  # noise that is N(0, 1) does not come to it


@cache
def drawing(**options):
    return jax.jit(partial(draw_mix, **{"image_size": SIZE, **OFFICIAL, **options}), compiler_options=QUICKLY)


def draw(positions: np.ndarray, **options) -> Mix:
    """Mixes of the images at these places of a batch of `MANY`, each with that of the reversed batch; numpy."""
    drawn = drawing(**options)(KEY, jnp.asarray(positions), jnp.asarray(MANY - 1 - positions))
    return jax.tree.map(np.asarray, drawn)


@pytest.fixture(scope="module")
def many() -> Mix:
    return draw(np.arange(MANY), mode="elem")


def cut_weights(shares: np.ndarray, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """The weights that CutMix leaves, written down anew: a box of the other share, with its center at any pixel."""
    box = np.ones_like(shares)
    for side in size:
        cut = np.floor(side * np.sqrt(1 - shares)).astype(int)
        center = rng.integers(0, side, len(shares))
        box = box * (np.minimum(center + (cut + 1) // 2, side) - np.maximum(center - cut // 2, 0)) / side
    return 1 - box


def images_of(count: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal((count, *SIZE, 3), np.float32))


# --- how images are mixed


def test_cutmix_is_as_frequent_as_the_switch_says(many):
    assert stats.binomtest(int(many.use_cutmix.sum()), MANY, 0.5).pvalue > LEAST


def test_mixup_s_weights_come_from_its_beta_distribution(many):
    assert stats.kstest(many.weight[~many.use_cutmix], stats.beta(0.8, 0.8).cdf).pvalue > LEAST
    assert not many.box[~many.use_cutmix].any()


def test_cutmix_s_weights_are_those_of_boxes_that_are_cut_off_at_the_edges(many):
    rng = np.random.default_rng(0)
    expected = cut_weights(rng.beta(1.0, 1.0, 100_000), SIZE, rng)
    weight = many.weight[many.use_cutmix]
    assert abs(weight.mean() - expected.mean()) < 5 * expected.std() / math.sqrt(len(weight))
    for low in np.arange(0, 1, 0.1):  # by tenths: the weights are discrete
        share = ((expected > low) & (expected <= low + 0.1)).mean()
        seen = int(((weight > low) & (weight <= low + 0.1)).sum())
        assert stats.binomtest(seen, len(weight), share).pvalue > LEAST


def test_boxes_lie_inside_and_reach_every_edge(many):
    top, left, bottom, right = many.box[many.use_cutmix].T
    assert top.min() == left.min() == 0
    assert (bottom.max(), right.max()) == SIZE
    assert (top <= bottom).all()
    assert (left <= right).all()
    whole = (top > 0) & (bottom < SIZE[0])
    assert set((bottom - top)[whole] % 2) == {0, 1}  # odd sides stay odd


def test_the_weight_is_the_share_of_an_image_s_own_pixels_and_of_its_target(many):
    drawn = Mix(*(values[:64] for values in many))
    assert 10 < drawn.use_cutmix.sum() < 54
    mixed = np.asarray(jax.jit(mix)(jnp.ones((64, *SIZE, 1)), jnp.zeros((64, *SIZE, 1)), drawn))
    np.testing.assert_allclose(mixed.mean(axis=(1, 2, 3)), drawn.weight, atol=1e-6)  # a sum over 768 pixels, in float32
    own, other = (np.tile(np.float32(target), (64, 1)) for target in ([1, 0, 0], [0, 0.25, 0.75]))
    targets = np.asarray(jax.jit(mix_targets)(jnp.asarray(own), jnp.asarray(other), drawn))
    np.testing.assert_array_equal(targets[:, 0], drawn.weight)
    np.testing.assert_allclose(targets.sum(axis=1), 1, atol=1e-6)


def test_cutmix_takes_the_box_from_the_partner_and_mixup_blends_every_pixel():
    images, partners = images_of(2, 1), images_of(2, 2)
    drawn = Mix(jnp.array([0.5, 0.25]), jnp.array([[0, 8, 24, 24], [0, 0, 0, 0]]), jnp.array([True, False]))
    cut, blended = np.asarray(jax.jit(mix)(images, partners, drawn))
    np.testing.assert_array_equal(cut[:, 8:24], np.asarray(partners)[0, :, 8:24])
    np.testing.assert_array_equal(cut[:, :8], np.asarray(images)[0, :, :8])
    np.testing.assert_array_equal(cut[:, 24:], np.asarray(images)[0, :, 24:])
    np.testing.assert_allclose(blended, 0.25 * np.asarray(images)[1] + 0.75 * np.asarray(partners)[1], atol=1e-6)


@pytest.mark.slow
def test_pairs_share_their_draw_and_as_many_are_mixed_as_the_probability_says():
    drawn = draw(np.arange(MANY), mode="pair", cutmix=0.0, probability=0.3)
    for values in drawn:
        np.testing.assert_array_equal(values, values[::-1])
    weight = drawn.weight[: MANY // 2]
    assert not drawn.use_cutmix.any()  # Mixup works alone
    assert stats.binomtest(int((weight < 1).sum()), len(weight), 0.3).pvalue > LEAST
    assert stats.kstest(weight[weight < 1], stats.beta(0.8, 0.8).cdf).pvalue > LEAST


def test_a_batch_shares_one_draw_and_every_key_has_its_own():
    def of_steps(keys):
        one = partial(draw_mix, image_size=SIZE, mode="batch", mixup=0.0, cutmix=1.0)
        return jax.vmap(lambda key: one(key, jnp.arange(4), jnp.arange(4)[::-1]))(keys)

    drawn = jax.jit(of_steps, compiler_options=QUICKLY)(jax.random.split(KEY, 500))
    drawn = jax.tree.map(np.asarray, drawn)
    for values in drawn:
        np.testing.assert_array_equal(values, np.broadcast_to(values[:, :1], values.shape))
    assert drawn.use_cutmix.all()  # CutMix works alone
    assert len(np.unique(drawn.weight)) > 150
    assert 0.5 < drawn.weight.mean() < 0.9


def test_an_image_that_is_not_mixed_keeps_its_bits():
    images, partners = images_of(2), jnp.full((2, *SIZE, 3), jnp.nan)
    not_mixed = Mix(jnp.ones(2), jnp.zeros((2, 4), jnp.int32), jnp.array([True, False]))
    np.testing.assert_array_equal(jax.jit(mix)(images, partners, not_mixed), images)


def test_nothing_to_mix_is_an_error():
    with pytest.raises(ValueError, match="nothing to draw"):
        drawing(mixup=0.0, cutmix=0.0)(KEY, jnp.arange(2), jnp.arange(2))


# --- random erasing


@cache
def erasing(**options):
    return jax.jit(partial(erase, **options), compiler_options=QUICKLY)


def erased(images: int, size: tuple[int, int], channels: int = 1, **options) -> tuple[np.ndarray, np.ndarray]:
    """Images that were all of one shade, erased, and which pixels that was done to [count, y, x]."""
    shade = jnp.full((images, *size, channels), UNTOUCHED)
    after = np.asarray(erasing(**options)(shade, KEY, jnp.arange(images)))
    hidden = after != UNTOUCHED
    assert (hidden == hidden[..., :1]).all()  # in all channels or none
    return after, hidden[..., 0]


def sides(hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return hidden.any(axis=2).sum(axis=1), hidden.any(axis=1).sum(axis=1)


def boxes_as_timm_draws_them(count: int, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """(height, width, top, left) of each, written down anew: the first of ten that is less than the image."""
    boxes = []
    for _ in range(count):
        for _ in range(10):
            area, ratio = rng.uniform(0.02, 1 / 3) * size[0] * size[1], math.exp(rng.uniform(*np.log((0.3, 1 / 0.3))))
            height, width = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if height < size[0] and width < size[1]:
                boxes.append((height, width, rng.integers(size[0] - height + 1), rng.integers(size[1] - width + 1)))
                break
    return np.array(boxes)


@pytest.fixture(scope="module")
def scratched() -> tuple[np.ndarray, np.ndarray]:
    return erased(1500, SIZE, channels=2, probability=0.5)


def test_as_many_images_are_erased_as_the_probability_says(scratched):
    _, hidden = scratched
    assert stats.binomtest(int(hidden.any(axis=(1, 2)).sum()), len(hidden), 0.5).pvalue > LEAST


def test_an_image_loses_one_box_whose_size_and_place_are_distributed_as_timm_s(scratched):
    hidden = scratched[1][scratched[1].any(axis=(1, 2))]
    height, width = sides(hidden)
    np.testing.assert_array_equal(hidden.sum(axis=(1, 2)), height * width)  # a whole box
    top, left = hidden.any(axis=2).argmax(axis=1), hidden.any(axis=1).argmax(axis=1)
    expected = boxes_as_timm_draws_them(5000, SIZE, np.random.default_rng(0)).T
    measures = [
        lambda height, width, top, left: height * width,
        lambda height, width, top, left: height / width,
        lambda height, width, top, left: top / (SIZE[0] - height),
        lambda height, width, top, left: left / (SIZE[1] - width),
    ]
    for measure in measures:
        seen = measure(height, width, top, left), measure(*expected)
        assert stats.ks_2samp(*seen).pvalue > LEAST


def test_what_stands_in_a_box_is_noise_in_each_pixel_and_channel(scratched):
    images, hidden = scratched
    pixels = images[hidden]  # n c
    assert stats.kstest(pixels.ravel()[:20_000], "norm").pvalue > LEAST
    assert abs(np.corrcoef(pixels.T)[0, 1]) < 5 / math.sqrt(len(pixels))
    neighbors = (hidden[:, :, 1:] & hidden[:, :, :-1])[..., None] & np.array([True, False])
    beside = np.corrcoef(images[:, :, 1:][neighbors], images[:, :, :-1][neighbors])[0, 1]
    assert abs(beside) < 5 / math.sqrt(neighbors.sum())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["rand", "const"])
def test_a_box_may_be_of_one_color_or_of_the_mean_s(mode):
    images, hidden = erased(1500, SIZE, channels=2, probability=1.0, mode=mode)
    boxes = [image[places] for image, places in zip(images, hidden, strict=True)]  # n c of each
    assert all((box == box[0]).all() for box in boxes)
    colors = np.stack([box[0] for box in boxes])
    if mode == "const":
        assert not colors.any()
    else:
        assert stats.kstest(colors.ravel(), "norm").pvalue > LEAST
        assert abs(np.corrcoef(colors.T)[0, 1]) < 5 / math.sqrt(len(colors))


@pytest.mark.slow
def test_areas_are_uniform_and_ratios_uniform_in_their_logarithm():
    _, hidden = erased(1000, (100, 100), probability=1.0, mode="const", area=(0.05, 0.15), ratio=(0.5, 2.0))
    height, width = sides(hidden)  # every box fits at once
    # five standard errors of a quantile; the rounding of the sides moves an area by about 0.001, a ratio by 0.02
    quartiles = np.quantile(height * width / 1e4, [0.25, 0.5, 0.75])
    assert np.allclose(quartiles, [0.075, 0.1, 0.125], atol=0.1 * 5 * 0.5 / math.sqrt(1000) + 0.001)
    quartiles = np.quantile(np.log2(height / width), [0.25, 0.5, 0.75])
    assert np.allclose(quartiles, [-0.5, 0, 0.5], atol=2 * 5 * 0.5 / math.sqrt(1000) + 0.02)


@pytest.mark.slow
def test_boxes_are_anywhere_to_the_last_row_and_column():
    _, hidden = erased(2000, (8, 8), probability=1.0, mode="const", area=(0.06, 0.0626), ratio=(0.99, 1.01))
    assert (hidden.sum(axis=(1, 2)) == 4).all()  # 2 x 2 pixels
    corners = hidden.any(axis=2).argmax(axis=1) * 7 + hidden.any(axis=1).argmax(axis=1)
    assert stats.chisquare(np.bincount(corners, minlength=49)).pvalue > LEAST


@pytest.mark.slow
def test_an_image_that_no_box_fits_stays_whole_and_so_does_one_that_is_not_chosen():
    for size, options in {(4, 64): {"area": (0.9, 1.0)}, SIZE: {"probability": 0.0}}.items():
        assert not erased(200, size, **{"probability": 1.0, **options})[1].any()


@pytest.mark.slow
def test_a_box_that_does_not_fit_is_drawn_anew():
    _, hidden = erased(1000, (100, 100), probability=1.0, mode="const", area=(0.6, 0.6))
    fits = math.log(1 / 0.6) / math.log(1 / 0.3)  # neither side reaches 100: of one try in 2.4
    assert hidden.any(axis=(1, 2)).mean() == pytest.approx(1 - (1 - fits) ** 10, abs=0.01)


@pytest.mark.slow
def test_the_number_of_boxes_is_drawn_and_they_share_the_area():
    options = {"probability": 1.0, "mode": "const", "area": (0.3, 0.3), "ratio": (1.0, 1.0)}
    hidden = erased(1500, (60, 60), count=3, **options)[1].sum(axis=(1, 2))
    one, two, three = 33**2, 2 * 23**2, 3 * 19**2  # the sides are rounded roots of 0.3 * 3600 / boxes
    assert hidden.max() == one == 1089
    # two boxes hide 1,058 pixels unless they overlap, three then no more than 1,083
    assert stats.binomtest(int((hidden == one).sum()), 1500, 1 / 3).pvalue > LEAST
    assert (hidden == two).any()
    assert (hidden == three).any()
    assert (hidden < two - 19).any()


# --- the same however the batch is split


def test_what_becomes_of_an_image_depends_on_its_place_and_not_on_the_batch_around_it(many, scratched):
    places = np.random.default_rng(0).integers(0, 1500, MANY)  # in another order, some several times
    chex.assert_trees_all_equal(draw(places, mode="elem"), Mix(*(values[places] for values in many)))
    places = places[:1500]
    again = erasing(probability=0.5)(jnp.full(scratched[0].shape, UNTOUCHED), KEY, jnp.asarray(places))
    chex.assert_trees_all_equal(np.asarray(again), scratched[0][places])


def augmented(images, targets, partners, partner_targets, batch_index, partner_batch_index, *, mode):
    """The whole chain, as an objective has it."""
    erase_key, mix_key = jax.random.split(KEY)
    images = erase(images, erase_key, batch_index, probability=0.5)
    partners = erase(partners, erase_key, partner_batch_index, probability=0.5)
    drawn = draw_mix(mix_key, batch_index, partner_batch_index, image_size=SIZE, mode=mode, **OFFICIAL)
    return mix(images, partners, drawn), mix_targets(targets, partner_targets, drawn)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["batch", "pair"])
def test_images_and_targets_are_the_same_on_eight_devices_and_in_parts_as_in_the_whole(mode):
    batch_index = jnp.arange(16)
    batch = (images_of(16), jax.nn.one_hot(batch_index % 5, 5))
    batch = (*batch, *(values[::-1] for values in batch), batch_index, batch_index[::-1])
    chain = jax.jit(partial(augmented, mode=mode), compiler_options=QUICKLY)
    whole = jax.tree.map(np.asarray, chain(*batch))
    for part in (slice(0, 4), slice(8, 4, -1)):
        again = chain(*(values[part] for values in batch))
        chex.assert_trees_all_close(again, tuple(values[part] for values in whole), rtol=0, atol=0)
    placed = batch_sharding(make_mesh())
    chain = jax.jit(partial(augmented, mode=mode), out_shardings=placed, compiler_options=QUICKLY)
    split = chain(*jax.device_put(batch, placed))
    # the draws are equal to the bit; the blend may be one multiplication and addition, rounded once, or two operations
    chex.assert_trees_all_close(jax.tree.map(np.asarray, split), whole, rtol=0, atol=1e-6)


def test_a_group_is_mixed_within_itself_by_one_draw_and_apart_from_others():
    """As the batch of each of the official run's processes is."""
    size, group = 23, 5  # the last group has three
    places = np.arange(size)
    partners = np.asarray(partner_of(jnp.asarray(places), size, group))
    np.testing.assert_array_equal(partners[partners], places)
    np.testing.assert_array_equal(partners // group, places // group)
    np.testing.assert_array_equal(partners[:5], [4, 3, 2, 1, 0])
    np.testing.assert_array_equal(partners[20:], [22, 21, 20])
    np.testing.assert_array_equal(partner_of(jnp.asarray(places), size), places[::-1])
    weights = draw(places, mode="batch", group=group).weight
    of_groups = [set(weights[places // group == n].tolist()) for n in range(5)]
    assert all(len(found) == 1 for found in of_groups)
    assert len(set().union(*of_groups)) == 5
    assert len(set(draw(places, mode="batch").weight.tolist())) == 1


def test_draws_do_not_change_with_a_new_jax_unnoticed(many, scratched):
    """Written down from jax 0.10.2: other draws would change every run that resumes across an upgrade."""
    assert many.use_cutmix[:6].astype(int).tolist() == [0, 1, 1, 0, 1, 1]
    assert many.box[1:3].tolist() == [[0, 0, 12, 23], [0, 3, 14, 27]]
    weights = [0.3546736, 0.640625, 0.5625, 0.9763460]
    np.testing.assert_allclose(many.weight[:4], weights, atol=1e-5)  # from gamma draws, in float32
    places = [tuple(map(int, np.argwhere(hidden)[0])) if hidden.any() else None for hidden in scratched[1][:6]]
    assert places == [(15, 14), None, (3, 2), None, None, None]


# --- options


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"mixup": -0.1}, "objective.mixup"), ({"mixup": math.nan}, "objective.mixup"),
        ({"cutmix": -1}, "objective.cutmix"), ({"probability": 1.5}, "mixup_prob is 1.5"),
        ({"switch": -0.5}, "mixup_switch_prob is -0.5"), ({"erase": 2}, "objective.reprob"),
        ({"erase": math.nan}, "give a probability"), ({"mode": "element"}, "did you mean elem"),
        ({"remode": "pixels"}, "did you mean pixel"), ({"recount": 0}, "recount is 0"),
    ],
)  # fmt: skip
def test_options_that_do_not_work_are_refused(options, hint):
    check_mixing()
    check_mixing(mixup=0.8, cutmix=1, probability=1, switch=0.5, mode="pair", erase=0.25)
    with pytest.raises(ConfigError, match=hint):
        check_mixing(**options)
