"""RandAugment, random erasing, Mixup and CutMix compared with timm 1.0.31. Needs PyTorch and timm.

timm's modules are loaded from their files, because timm imports torchvision, which they do not need. Pixels and targets
must be equal. The random generators differ, so distributions of thousands of draws are compared; a p value below 1e-4
fails.
"""

import importlib.util
import math
import random
from collections import Counter
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from simmim_jax.data import augment as ours
from simmim_jax.objectives import mixing

torch = pytest.importorskip("torch")
timm = importlib.util.find_spec("timm")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(timm is None, reason="timm is not installed")]

MIN_P = 1e-4
MEAN = (0.485, 0.456, 0.406)
FILL = (124, 116, 104)
KEY = jax.random.key(0)
HPARAMS = {"translate_const": 100, "img_mean": FILL, "interpolation": Image.Resampling.BICUBIC}  # transforms_factory.py
GEOMETRIC_OPTIONS = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"timm_{name}", Path(timm.origin).parent / "data" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def auto_augment():
    return load("auto_augment")


@pytest.fixture(scope="module")
def random_erasing():
    return load("random_erasing")


@pytest.fixture(scope="module")
def mixup():
    return load("mixup")


@pytest.fixture(autouse=True)
def seeds():
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


class Coin(np.random.Generator):
    def __init__(self, negative: bool):
        super().__init__(np.random.PCG64(0))
        self.negative = negative

    def random(self) -> float:
        return 0.25 if self.negative else 0.75


def photograph(height: int = 45, width: int = 61) -> Image.Image:
    rng = np.random.default_rng(0)
    soft = Image.fromarray(rng.integers(10, 240, (6, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    hard = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(np.where(np.arange(width)[:, None] % 20 < 5, hard, np.asarray(soft)))


# --- RandAugment


def test_operations_have_the_pixels_of_timm_at_every_magnitude(auto_augment, monkeypatch):
    image = photograph()
    for operation in ours.OPERATIONS:
        theirs = auto_augment.AugmentOp(operation, prob=1.0, hparams={**HPARAMS, "magnitude_max": 30})
        for magnitude in (*np.arange(0, 10, 0.5), 9.97, 10, 12, 17.3, 30):
            for negative in (True, False):
                monkeypatch.setattr(auto_augment.random, "random", lambda negative=negative: 0.75 if negative else 0.25)
                theirs.magnitude = float(magnitude)
                given = ours.apply(operation, image, float(magnitude), Coin(negative), GEOMETRIC_OPTIONS)
                try:
                    expected = theirs(image)
                except ValueError:  # Pillow 13 refuses 0 bits
                    assert operation.startswith("Posterize")
                    assert not np.asarray(given).any()
                    continue
                assert np.array_equal(given, expected), (operation, magnitude, negative)


@pytest.mark.parametrize("name", ["rand", "rand-m9-mstd0.5-inc1", "rand-m15-n3-mmax20-p0.7", "rand-m7-mstd101-inc1",
                                  "rand-tweights-inc1", "rand-t3a", "rand-m5-t3aw-n4"])  # fmt: skip
def test_string_is_parsed_as_by_timm(auto_augment, name):
    policy, theirs = ours.parse(name), auto_augment.rand_augment_transform(name, dict(HPARAMS))
    assert policy.operations == tuple(op.name for op in theirs.ops)
    assert policy.layers == theirs.num_layers
    if theirs.choice_weights is None:
        assert policy.weights is None
    else:
        np.testing.assert_allclose(policy.weights, theirs.choice_weights)
    for op in theirs.ops:
        assert (policy.magnitude, policy.probability, policy.deviation) == (op.magnitude, op.prob, op.magnitude_std)
        assert policy.max_magnitude == (op.magnitude_max or 10)


@pytest.mark.parametrize("name", ["rand-m9-mstd0.5-inc1", "rand-m7-mstd101-n3-p0.7", "rand-tweights-inc1-mstd1"])
def test_operations_and_arguments_have_the_distribution_of_timm(auto_augment, monkeypatch, name):
    draws = 6000
    seen: list[list[tuple[str, float]]] = []
    theirs = auto_augment.rand_augment_transform(name, dict(HPARAMS))
    for op in theirs.ops:

        def record(image, *arguments, op=op.name, **_):
            seen[-1].append((op, float(arguments[0]) if arguments else 0.0))
            return image

        op.aug_fn = record
    for _ in range(draws):
        seen.append([])
        theirs(None)
    expected, seen = seen, []

    for op, (strength, _) in ours.OPERATIONS.items():

        def record(image, argument, op=op, **_):
            seen[-1].append((op, 0.0 if argument is None else float(argument)))
            return image

        monkeypatch.setitem(ours.OPERATIONS, op, (strength, record))
    augment = ours.make_augment(name, color_jitter=0.0, mean=MEAN, interpolation="bicubic")
    rng, image = np.random.default_rng(0), np.zeros((2, 2, 3), np.uint8)
    for _ in range(draws):
        seen.append([])
        augment(image, rng)

    def table(of):
        counts = [Counter(map(of, sample)) for sample in (seen, expected)]
        return np.array([[count[key] for key in sorted(set(counts[0]) | set(counts[1]))] for count in counts])

    assert stats.chi2_contingency(table(len)).pvalue > MIN_P
    for place in range(2):  # the first and the second operation
        counts = table(lambda done, place=place: done[place][0] if len(done) > place else "")
        assert stats.chi2_contingency(counts[:, counts.sum(axis=0) > 10]).pvalue > MIN_P
    arguments = [{}, {}]
    for sample, by_operation in zip((seen, expected), arguments, strict=True):
        for op, argument in (pair for done in sample for pair in done):
            by_operation.setdefault(op, []).append(argument)
    assert set(arguments[0]) == set(arguments[1])
    for op in arguments[0]:
        if len(arguments[0][op]) > 50:
            assert stats.ks_2samp(arguments[0][op], arguments[1][op]).pvalue > MIN_P, op


# --- random erasing


@pytest.mark.parametrize(("size", "count"), [((48, 64), 1), ((32, 32), 3)])
def test_erased_boxes_have_the_distribution_of_timm(random_erasing, size, count):
    draws = 3000
    theirs = random_erasing.RandomErasing(probability=0.25, mode="pixel", max_count=count, device="cpu")
    shade = torch.full((draws, 3, *size), 9.0)
    expected = (theirs(shade)[:, 0] != 9.0).numpy()
    images = jnp.full((draws, *size, 1), 9.0)
    erase = jax.jit(partial(mixing.erase, erasing=mixing.Erasing(reprob=0.25, recount=count)))
    seen = np.asarray(erase(images, KEY, jnp.arange(draws)))[..., 0] != 9.0
    counts = [[hidden.any(axis=(1, 2)).sum(), (~hidden.any(axis=(1, 2))).sum()] for hidden in (seen, expected)]
    assert stats.chi2_contingency(np.array(counts)).pvalue > MIN_P
    seen, expected = (hidden[hidden.any(axis=(1, 2))] for hidden in (seen, expected))
    measures = {
        "area": lambda hidden: hidden.sum(axis=(1, 2)),
        "height": lambda hidden: hidden.any(axis=2).sum(axis=1),
        "width": lambda hidden: hidden.any(axis=1).sum(axis=1),
        "ratio": lambda hidden: hidden.any(axis=2).sum(axis=1) / hidden.any(axis=1).sum(axis=1),
        "top": lambda hidden: hidden.any(axis=2).argmax(axis=1),
        "left": lambda hidden: hidden.any(axis=1).argmax(axis=1),
    }
    for name, measure in measures.items():
        assert stats.ks_2samp(measure(seen), measure(expected)).pvalue > MIN_P, name


# --- Mixup and CutMix


SIZE = (24, 32)
OPTIONS = {
    "official": {"mixup": 0.8, "cutmix": 1.0, "mixup_prob": 1.0, "mixup_switch_prob": 0.5},
    "sometimes": {"mixup": 0.2, "cutmix": 2.0, "mixup_prob": 0.7, "mixup_switch_prob": 0.2},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_mixes_have_the_distribution_of_timm(mixup, monkeypatch, name):
    draws, options = 4000, OPTIONS[name]
    theirs = mixup.Mixup(
        mixup_alpha=options["mixup"], cutmix_alpha=options["cutmix"], prob=options["mixup_prob"],
        switch_prob=options["mixup_switch_prob"], mode="elem", num_classes=2,
    )  # fmt: skip
    boxes, rand_bbox = [], mixup.rand_bbox
    monkeypatch.setattr(mixup, "rand_bbox", lambda *arguments, **_: boxes.append(rand_bbox(*arguments)) or boxes[-1])
    weights, cut = [], []
    for _ in range(draws // 2):  # ones mixed with zeros: the mean is the weight
        mixed, _ = theirs(torch.stack([torch.ones(1, *SIZE), torch.zeros(1, *SIZE)]), torch.tensor([1, 0]))
        weights.append(float(mixed[0].mean()))
        cut.append(weights[-1] < 1 and bool(((mixed[0] == 0) | (mixed[0] == 1)).all()))
    draw = jax.jit(partial(mixing.draw_mix, image_size=SIZE, mixing=mixing.Mixing(mixup_mode="elem", **options)))
    drawn = jax.tree.map(np.asarray, draw(KEY, jnp.arange(draws), jnp.arange(draws)[::-1]))
    seen = {"weight": drawn.weight, "cut": drawn.use_cutmix & (drawn.weight < 1)}
    expected = {"weight": np.array(weights), "cut": np.array(cut)}
    kinds = [
        [sample["cut"].sum(), ((sample["weight"] < 1) & ~sample["cut"]).sum(), (sample["weight"] == 1).sum()]
        for sample in (seen, expected)
    ]
    assert (
        stats.chi2_contingency(np.array(kinds) + 1).pvalue > MIN_P
    )  # cut, blended and unchanged; no image may be unchanged
    assert stats.ks_2samp(*(sample["weight"][sample["cut"]] for sample in (seen, expected))).pvalue > MIN_P
    blends = [sample["weight"][(sample["weight"] < 1) & ~sample["cut"]] for sample in (seen, expected)]
    assert stats.ks_2samp(*blends).pvalue > MIN_P
    given, asked = drawn.box[seen["cut"]], np.array([box for box in boxes if box[1] > box[0] and box[3] > box[2]])
    for our_edge, their_edge in {0: 0, 2: 1, 1: 2, 3: 3}.items():  # timm's order is top, bottom, left, right
        assert stats.ks_2samp(given[:, our_edge], asked[:, their_edge]).pvalue > MIN_P


@pytest.mark.parametrize("cutmix", [False, True])
@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixed_images_and_targets_equal_those_of_timm_for_the_same_draws(mixup, monkeypatch, mode, cutmix):
    """Our `mix` and `mix_targets` receive the draws of timm."""
    count, classes, smoothing = 8, 5, 0.1
    images = np.random.default_rng(0).standard_normal((count, *SIZE, 3)).astype(np.float32)
    labels = np.arange(count) % classes
    theirs = mixup.Mixup(
        mixup_alpha=0.0 if cutmix else 0.8, cutmix_alpha=1.0 if cutmix else 0.0, mode=mode, num_classes=classes,
        label_smoothing=smoothing,
    )  # fmt: skip
    boxes, weights = [], []
    bbox, target = mixup.cutmix_bbox_and_lam, mixup.mixup_target
    monkeypatch.setattr(mixup, "cutmix_bbox_and_lam", lambda *a, **k: boxes.append(bbox(*a, **k)) or boxes[-1])
    monkeypatch.setattr(mixup, "mixup_target", lambda t, n, lam, *a: weights.append(lam) or target(t, n, lam, *a))
    mixed, targets = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), torch.from_numpy(labels))
    weight = np.broadcast_to(np.asarray(weights[0], np.float32).reshape(-1), (count,))
    box = np.zeros((count, 4), np.int32)
    if cutmix:
        edges = np.array([[int(edge) for edge in drawn] for drawn, _ in boxes], np.int32)[:, [0, 2, 1, 3]]
        edges = np.concatenate([edges, edges[::-1]]) if mode == "pair" else edges
        box[:] = edges
    drawn = mixing.Mix(jnp.asarray(weight), jnp.asarray(box), jnp.full(count, cutmix))
    given = mixing.mix(jnp.asarray(images), jnp.asarray(images[::-1]), drawn)
    # one or two float32 roundings of values of about 1
    np.testing.assert_allclose(np.asarray(given).transpose(0, 3, 1, 2), mixed.numpy(), rtol=0, atol=1e-6)
    smooth = np.eye(classes, dtype=np.float32)[labels] * (1 - smoothing) + np.float32(smoothing / classes)
    mixed_targets = mixing.mix_targets(jnp.asarray(smooth), jnp.asarray(smooth[::-1].copy()), drawn)
    np.testing.assert_allclose(mixed_targets, targets.numpy(), rtol=0, atol=1e-6)
    if cutmix:  # the weight is the area of the box, as in `draw_mix`
        area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
        np.testing.assert_allclose(weight, 1 - area / math.prod(SIZE), atol=1e-6)
