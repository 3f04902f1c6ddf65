"""RandAugment and color jitter: Pillow's pixels, timm's probabilities and magnitudes."""

import math
import pickle
from collections import Counter

import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps
from scipy import stats

from simmim_jax.data import BatchSpec, Loading, check_batches, fingerprint, make_batches, make_source
from simmim_jax.data.augment import (
    INCREASING,
    OPERATIONS,
    PLAIN,
    RandAugment,
    apply,
    draw_magnitude,
    draw_operations,
    make_augment,
    parse,
)
from simmim_jax.errors import ConfigError

OFFICIAL = "rand-m9-mstd0.5-inc1"
MEAN = (0.485, 0.456, 0.406)
FILL = {"RGB": (124, 116, 104), "L": 124}  # round(255 * mean), as in timm


class Coin(np.random.Generator):
    """A generator whose coins all have the same result."""

    def __init__(self, negative: bool):
        super().__init__(np.random.PCG64(0))
        self.negative = negative

    def random(self) -> float:
        return 0.25 if self.negative else 0.75


def photograph(mode: str = "RGB") -> Image.Image:
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(20, 220, (6, 5, 3), dtype=np.uint8)).resize((30, 24), Image.Resampling.BICUBIC)
    return soft.convert(mode)


def affine(*coefficients):
    def moved(image, fill, resample):
        return image.transform(image.size, Image.Transform.AFFINE, coefficients, resample=resample, fillcolor=fill)

    return moved


def turned(degrees):
    return lambda image, fill, resample: image.rotate(degrees, resample=resample, fillcolor=fill)


def enhanced(kind, factor):
    return lambda image, *_: getattr(ImageEnhance, kind)(image).enhance(factor)


def looked_up(function):
    """An operation on each value 0..255."""
    return lambda image, *_: Image.fromarray(np.array([function(v) for v in range(256)], np.uint8)[np.asarray(image)])


def enhancers(kind):
    increasing = {(9, True): 1 - 0.81, (9, False): 1.81, (2.5, True): 1 - 0.225, (2.5, False): 1.225}
    plain = {(9, True): 1.72, (9, False): 1.72, (2.5, True): 0.55, (2.5, False): 0.55}
    return {
        name: {case: enhanced(kind, factor) for case, factor in factors.items()}
        for name, factors in {f"{kind}Increasing": increasing, kind: plain}.items()
    }


def always(function):
    return {(magnitude, negative): function for magnitude in (9, 2.5) for negative in (True, False)}


def either_way(make, at_nine, at_two_and_a_half):
    return {
        (magnitude, negative): make(-amount if negative else amount)
        for magnitude, amount in {9: at_nine, 2.5: at_two_and_a_half}.items()
        for negative in (True, False)
    }


def by_magnitude(at_nine, at_two_and_a_half):
    return {(magnitude, negative): {9: at_nine, 2.5: at_two_and_a_half}[magnitude]
            for magnitude in (9, 2.5) for negative in (True, False)}  # fmt: skip


# Expected operation of Pillow, by (magnitude, result of the coin), on an image of 30 x 24 pixels.
EXPECTED = {
    "AutoContrast": always(lambda image, *_: ImageOps.autocontrast(image)),
    "Equalize": always(lambda image, *_: ImageOps.equalize(image)),
    "Invert": always(looked_up(lambda v: 255 - v)),
    "Rotate": either_way(turned, 27.0, 7.5),
    "ShearX": either_way(lambda s: affine(1, s, 0, 0, 1, 0), 0.27, 0.075),
    "ShearY": either_way(lambda s: affine(1, 0, 0, s, 1, 0), 0.27, 0.075),
    "TranslateXRel": either_way(lambda t: affine(1, 0, 30 * t, 0, 1, 0), 0.405, 0.1125),
    "TranslateYRel": either_way(lambda t: affine(1, 0, 0, 0, 1, 24 * t), 0.405, 0.1125),
    "Posterize": by_magnitude(looked_up(lambda v: v & 0b11100000), looked_up(lambda v: v & 0b10000000)),
    "PosterizeIncreasing": by_magnitude(looked_up(lambda v: v & 0b10000000), looked_up(lambda v: v & 0b11100000)),
    "Solarize": by_magnitude(
        looked_up(lambda v: v if v < 230 else 255 - v), looked_up(lambda v: v if v < 64 else 255 - v)
    ),
    "SolarizeIncreasing": by_magnitude(
        looked_up(lambda v: v if v < 26 else 255 - v), looked_up(lambda v: v if v < 192 else 255 - v)
    ),
    "SolarizeAdd": by_magnitude(
        looked_up(lambda v: v + 99 if v < 128 else v), looked_up(lambda v: v + 27 if v < 128 else v)
    ),
    "Desaturate": by_magnitude(enhanced("Color", 1 - 0.95), enhanced("Color", 1 - 0.625)),
    "GaussianBlur": by_magnitude(
        *(lambda image, *_, r=r: image.filter(ImageFilter.GaussianBlur(r)) for r in (1.81, 0.575))
    ),
    **enhancers("Color"), **enhancers("Contrast"), **enhancers("Brightness"), **enhancers("Sharpness"),
}  # fmt: skip


# --- operation by operation


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operation_gives_the_pixels_of_pillow(operation, mode):
    image = photograph(mode)
    for resample in (Image.Resampling.BICUBIC, Image.Resampling.BILINEAR):
        move = {"resample": resample, "fillcolor": FILL[mode]}
        for (magnitude, negative), expected in EXPECTED[operation].items():
            given = apply(operation, image, magnitude, Coin(negative), move)
            assert np.array_equal(given, expected(image, FILL[mode], resample)), (magnitude, negative)
            assert given.mode == mode


@pytest.mark.parametrize("operation", ["PosterizeIncreasing", "Posterize"])
def test_posterize_to_0_bits_is_black_and_to_8_bits_changes_nothing(operation):
    image = photograph()
    black, untouched = (10, -20) if operation == "PosterizeIncreasing" else (0, 30)
    assert not np.asarray(apply(operation, image, black, Coin(True), {})).any()
    assert np.array_equal(apply(operation, image, untouched, Coin(True), {}), image)


def test_names_of_the_two_sets_are_those_of_timm():
    changed = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
    assert len(PLAIN) == len(INCREASING) == 15
    assert {name.removesuffix("Increasing") for name in INCREASING} == set(PLAIN)
    assert {name for name in PLAIN if name not in INCREASING} == changed
    assert set(EXPECTED) == set(OPERATIONS)


# --- the string


@pytest.mark.parametrize(
    ("augment", "policy"),
    [
        ("rand", RandAugment(PLAIN)),
        (OFFICIAL, RandAugment(INCREASING, magnitude=9, deviation=0.5)),
        ("rand-inc1-mstd0.5-m9", RandAugment(INCREASING, magnitude=9, deviation=0.5)),
        ("rand-m15-n3-mmax20-p0.7-inc0", RandAugment(PLAIN, magnitude=15, max_magnitude=20, layers=3, probability=0.7)),
        ("rand-m7-mstd101", RandAugment(PLAIN, magnitude=7, deviation=math.inf)),
        ("rand-t3a-mstd1", RandAugment(("SolarizeIncreasing", "Desaturate", "GaussianBlur"), deviation=1.0)),
    ],
)
def test_string_is_parsed_as_in_timm(augment, policy):
    assert parse(augment) == policy


@pytest.mark.parametrize(
    ("augment", "hint"),
    [
        ("v0-mstd0.5", "write it like rand-m9"), ("rand_m9", "write it like rand-m9"), ("random-m9", "like rand-m9"),
        ("rand-m9-x3", "unknown part 'x3'"), ("rand-m9-inc", "unknown part 'inc'"), ("rand-", "unknown part ''"),
        ("rand-mstdinf", "unknown part 'mstdinf'"), ("rand-w0", "unknown part 'w0'"), ("rand-m9-m8", "m twice"),
        ("rand-m9.5", "m must be an integer"), ("rand-inc2", "inc must be 0 or 1"), ("rand-p1.5", "p must be"),
        ("rand-n0", "n must be"), ("rand-mmax0", "mmax must be"), ("rand-n16-tweights", "from 1 to 15"),
        ("rand-tweigths", "did you mean weights"),
    ],
)  # fmt: skip
def test_invalid_string_is_refused_in_one_line(augment, hint):
    with pytest.raises(ConfigError, match=hint) as refusal:
        make_augment(augment, color_jitter=0.0, mean=MEAN, interpolation="bicubic")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ({"mean": (0.5,) * 13}, "13 channels cannot be augmented"),
        ({"interpolation": "lanczos"}, "choose one of nearest, bilinear, bicubic"),
        ({"color_jitter": 0.4}, "set it to 0"),
        ({"color_jitter": -0.1, "augment": ""}, "color_jitter is -0.1"),
        ({"color_jitter": math.nan, "augment": ""}, "color_jitter is nan"),
    ],
)
def test_images_that_cannot_be_augmented_are_refused(options, hint):
    options = {"augment": OFFICIAL, "color_jitter": 0.0, "mean": MEAN, "interpolation": "bicubic", **options}
    with pytest.raises(ConfigError, match=hint):
        make_augment(options.pop("augment"), **options)


def test_color_jitter_comes_after_the_three_operations_of_deit_iii():
    options = {"mean": MEAN, "interpolation": "bicubic"}
    both, first = (make_augment("rand-t3a-n1-p1", color_jitter=c, **options) for c in (0.3, 0.0))
    jitter = make_augment("", color_jitter=0.3, **options)
    image = np.random.default_rng(1).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    rng, again = np.random.default_rng(2), np.random.default_rng(2)
    np.testing.assert_array_equal(both(image, rng), jitter(first(image, again), again))


# --- probabilities


def five_deviations(share: float, draws: int) -> float:
    return 5 * math.sqrt(share * (1 - share) / draws)


def test_operations_are_equally_likely_and_half_of_them_are_applied():
    policy, rng, draws = parse(OFFICIAL), np.random.default_rng(0), 3000
    drawn = [draw_operations(policy, rng) for _ in range(draws)]
    done = Counter(operation for operations in drawn for operation in operations)
    assert set(done) == set(INCREASING)
    for count in done.values():
        assert count / (2 * draws) == pytest.approx(1 / 30, abs=five_deviations(1 / 30, 2 * draws))
    lengths = Counter(map(len, drawn))
    for length, share in {0: 0.25, 1: 0.5, 2: 0.25}.items():
        assert lengths[length] / draws == pytest.approx(share, abs=five_deviations(share, draws))
    assert any(len(operations) == 2 and operations[0] == operations[1] for operations in drawn)


def test_weighted_operations_have_their_weights_and_never_repeat():
    policy, rng, draws = parse("rand-tweights-n2-p1"), np.random.default_rng(0), 3000
    drawn = [draw_operations(policy, rng) for _ in range(draws)]
    assert all(len(set(operations)) == 2 for operations in drawn)
    first = Counter(operations[0] for operations in drawn)
    for operation, weight in zip(policy.operations, policy.weights, strict=True):
        assert first[operation] / draws == pytest.approx(weight, abs=five_deviations(weight, draws))


@pytest.mark.parametrize(
    ("augment", "distribution", "most"),
    [
        ("rand-m9-mstd0.5", stats.norm(9, 0.5), 10), ("rand-m0-mstd1", stats.norm(0, 1), 10),
        ("rand-m12-mmax13-mstd1", stats.norm(12, 1), 13), ("rand-m8-mstd101", stats.uniform(0, 8), 10),
    ],
)  # fmt: skip
def test_magnitudes_are_clipped_normal_or_uniform(augment, distribution, most):
    policy, rng, draws = parse(augment), np.random.default_rng(0), 5000
    magnitudes = np.array([draw_magnitude(policy, rng) for _ in range(draws)])
    below, above = distribution.cdf(0), distribution.sf(most)
    assert (magnitudes == 0).mean() == pytest.approx(below, abs=five_deviations(below, draws))
    assert (magnitudes == most).mean() == pytest.approx(above, abs=five_deviations(above, draws) + 1 / draws)
    between = magnitudes[(magnitudes > 0) & (magnitudes < most)]
    share = (distribution.cdf(between) - below) / (1 - below - above)
    assert stats.kstest(share, "uniform").pvalue > 1e-4


def test_magnitudes_without_deviation_are_equal():
    rng = np.random.default_rng(0)
    assert [draw_magnitude(parse(f"rand-m{m}"), rng) for m in (0, 7, 10, 12)] == [0, 7, 10, 10]


def test_color_jitter_is_brightness_contrast_and_saturation_of_pillow_in_any_order():
    jitter = make_augment("", color_jitter=0.4, mean=MEAN, interpolation="bilinear")
    orders = set()
    for seed in range(40):
        rng = np.random.default_rng(seed)
        order, image = [int(place) for place in rng.permutation(3)], photograph()
        for place in order:
            kind = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)[place]
            image = kind(image).enhance(rng.uniform(0.6, 1.4))
        assert np.array_equal(jitter(np.asarray(photograph()), np.random.default_rng(seed)), image)
        orders.add(tuple(order))
    assert len(orders) == 6


# --- whole images


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("options", [{"augment": OFFICIAL}, {"augment": "rand-t3aw-n3"}, {"color_jitter": 0.4}])
def test_augmentation_keeps_shape_and_dtype_and_depends_on_the_generator_only(mode, options):
    image = np.atleast_3d(np.asarray(photograph(mode)))
    options = {"augment": "", "color_jitter": 0.0, "mean": MEAN[: image.shape[2]], **options}
    augment = make_augment(**options, interpolation="bicubic")
    before, changed = image.copy(), 0
    for seed in range(40):
        augmented = augment(image, np.random.default_rng(seed))
        again = pickle.loads(pickle.dumps(augment))(image, np.random.default_rng(seed))  # as in a worker process
        assert (augmented.shape, augmented.dtype) == (image.shape, np.uint8)
        assert np.array_equal(augmented, again)
        changed += not np.array_equal(augmented, image)
    assert np.array_equal(image, before)
    assert changed >= 20  # RandAugment leaves a quarter unchanged


def test_pixels_from_outside_have_the_mean_color():
    augment = make_augment("rand-m10-n1-p1", color_jitter=0.0, mean=MEAN, interpolation="nearest")
    white = np.full((24, 30, 3), 255, np.uint8)
    colors = {tuple(c) for seed in range(60) for c in augment(white, np.random.default_rng(seed)).reshape(-1, 3)}
    assert (124, 116, 104) in colors
    assert (128, 128, 128) not in colors


def test_no_augmentation_is_no_function():
    assert make_augment("", color_jitter=0.0, mean=(), interpolation="lanczos") is None


# --- in batches

BATCHES = {"batch_size": 16, "seed": 3, "image_size": (12, 10), "channels": 1, "interpolation": "bicubic"}
DIGITS = make_source("digits")


def take(count: int, **options) -> list[np.ndarray]:
    batches = make_batches(DIGITS, BatchSpec(**BATCHES, **options))
    images = [next(batches)["image"] for _ in range(count)]
    batches.close()
    return images


def test_augmentation_does_not_change_crop_and_flip():
    assert np.array_equal(take(3), take(3, augment="rand-p0", mean=(0.3,)))
    assert not np.array_equal(take(3), take(3, augment=OFFICIAL, mean=(0.3,)))


def test_fingerprint_has_augmentation_only_if_it_is_used():
    options = {"seed": 0, "batch_size": 4, "image_size": (8, 8)}
    before = fingerprint(DIGITS, BatchSpec(**options))
    assert set(before) == {"source", "seed", "batch_size", "image_size", "channels", "crop_scale", "crop_ratio", "flip",
                           "interpolation", "max_pixels"}  # fmt: skip
    assert fingerprint(DIGITS, BatchSpec(augment="", color_jitter=0.0, mean=MEAN, **options)) == before
    augmented = fingerprint(DIGITS, BatchSpec(augment=OFFICIAL, mean=MEAN, **options))
    assert augmented == before | {"augment": OFFICIAL, "mean": list(MEAN)}
    assert fingerprint(DIGITS, BatchSpec(color_jitter=0.4, mean=MEAN, **options)) == before | {"color_jitter": 0.4}


def test_invalid_augmentation_of_batches_is_refused():
    with pytest.raises(ConfigError, match="must have 1 numbers"):
        check_batches(DIGITS, BatchSpec(**BATCHES, augment=OFFICIAL), Loading())
    with pytest.raises(ConfigError, match="unknown part 'x3'"):
        check_batches(DIGITS, BatchSpec(**BATCHES, augment="rand-x3", mean=(0.5,)), Loading())
    with pytest.raises(ConfigError, match="5 channels"):
        check_batches(DIGITS, BatchSpec(**BATCHES | {"channels": 5}, color_jitter=0.4, mean=(0.5,) * 5), Loading())
