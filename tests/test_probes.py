"""Classifiers of frozen features against scikit-learn and computations by hand, and the subsets that they fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from simmim_jax.evals import probes
from simmim_jax.tools.probe import subsets

CLASSES = 6


def clusters(count, spread=2.0, width=12, seed=0):
    """Return standardized, correlated float32 features around six centers, and labels."""
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(CLASSES), rng.integers(0, CLASSES, count - CLASSES)])
    fixed = np.random.default_rng(7)
    centers, mix = fixed.normal(size=(CLASSES, width)), fixed.normal(size=(width, width))
    features = (centers[labels] + spread * rng.normal(size=(count, width))) @ mix
    return ((features - features.mean(0)) / features.std(0)).astype(np.float32), labels


@pytest.fixture
def small_parts(monkeypatch):
    """Process 32 images at a time, and compare them with 24 at a time."""
    for name, size in (("ROWS", 32), ("KEYS", 24)):
        monkeypatch.setattr(probes, name, size)
    compiled = (probes.logistic_path, probes._nearest_classes)
    for function in compiled:
        function.clear_cache()
    yield
    for function in compiled:
        function.clear_cache()


def test_logistic_regression_equals_scikit_learn_at_every_strength(small_parts):
    x, labels = clusters(150)  # five parts, the last one padded
    strengths = (0.01, 1.0, 10.0)
    found = probes.logistic_path(x, labels, np.float32(strengths), classes=CLASSES, tolerance=1e-6)

    def objective(weights, bias, strength):
        logits = x.astype(np.float64) @ weights + bias
        loss = np.log(np.exp(logits).sum(1)) - logits[np.arange(150), labels]
        return strength * loss.sum() + (weights**2).sum() / 2

    for n, strength in enumerate(strengths):
        theirs = LogisticRegression(C=strength, max_iter=1000, tol=1e-8).fit(x.astype(np.float64), labels)
        ours = np.asarray(found.weights[n], np.float64), np.asarray(found.bias[n], np.float64)
        least = objective(theirs.coef_.T, theirs.intercept_, strength)
        assert least <= objective(*ours, strength) < least * (1 + 1e-5)  # float32's sum of 150 losses
        if strength <= 1:  # for larger C the minimum is too flat for float32
            np.testing.assert_allclose(ours[0], theirs.coef_.T, atol=2e-3 * np.abs(theirs.coef_).max())


def test_ridge_regression_equals_scikit_learn_at_every_strength(small_parts):
    x, labels = clusters(150)
    queries, _ = clusters(40, seed=1)
    x[:, 0], queries[:, 0] = (each[:, 1] + 1e-3 * each[:, 0] for each in (x, queries))  # almost equal features
    strengths = (1e-8, 1e-3, 0.1, 10.0)
    found = probes.ridge_path(jnp.asarray(x), labels, strengths, classes=CLASSES)
    for n, strength in enumerate(strengths):
        theirs = Ridge(alpha=strength * len(x)).fit(x.astype(np.float64), np.eye(CLASSES)[labels])
        ours = queries @ np.asarray(found.weights[n]) + np.asarray(found.bias[n])
        np.testing.assert_allclose(ours, theirs.predict(queries), atol=2e-5)


@pytest.mark.parametrize(
    ("function", "more"),
    [
        (probes.logistic_path, {"iterations": 2}),
        (probes.sweep, {"epochs": 2}),
    ],
)
@pytest.mark.slow
def test_classifiers_of_imagenet_need_at_most_a_second_copy_of_the_features(function, more):
    features, labels = jax.ShapeDtypeStruct((1_281_167, 768), np.float32), jax.ShapeDtypeStruct((1_281_167,), np.int32)
    given = (features, labels)
    if function is probes.logistic_path:
        given += (jax.ShapeDtypeStruct((7,), np.float32),)
    if function is probes.sweep:
        features, grid = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((1, *features.shape), (1, 15)))
        given = (features, labels, grid, grid, jax.random.key(0))
    memory = function.lower(*given, classes=1000, **more).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.1 * 4 * features.size


def test_every_product_of_a_sweep_is_exact_in_float32():
    given = (np.zeros((1, 8, 3), np.float32), np.zeros(8, int), *np.ones((2, 1, 1), np.float32), jax.random.key(0))
    with jax.default_matmul_precision("default"):  # as outside of tests
        program = str(jax.make_jaxpr(lambda *given: probes.sweep(*given, classes=2, epochs=1))(*given))
    assert program.count("dot_general[") == program.count("precision=(Precision.HIGHEST, Precision.HIGHEST)") > 0


def test_nearest_neighbors_equal_those_of_scikit_learn_for_any_part_size(small_parts):
    (x, labels), (queries, _) = clusters(150), clusters(70, seed=1)  # seven parts of keys and three of queries
    numbers = (1, 7, 20, 500)
    found = probes.nearest_classes(x + 0.3, labels, queries, classes=CLASSES, k=numbers, temperature=0.2)
    assert found.shape == (4, 70, 5)
    for n, number in enumerate(numbers):
        theirs = KNeighborsClassifier(
            min(number, 150), metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.2)
        ).fit(x + 0.3, labels)
        shares = theirs.predict_proba(queries)
        np.testing.assert_array_equal(found[n, :, 0], shares.argmax(axis=1))
        first = np.where(np.sort(shares)[:, :-6:-1] > 0, np.argsort(-shares, kind="stable")[:, :5], -1)
        np.testing.assert_array_equal(found[n], first)


def test_of_equal_votes_the_lowest_class_is_first_and_classes_without_votes_are_missing():
    train, labels = np.float32([[1, 0], [1, 0], [0, 1], [-1, 0]]), np.array([3, 1, 0, 2])
    query = np.float32([[2, 0]])
    found = probes.nearest_classes(train, labels, query, classes=4, k=(2, 4), temperature=0.001)
    assert found[:, 0].tolist() == [[1, 3, -1, -1, -1], [1, 3, -1, -1, -1]]  # exp(-1000) is 0 in float32
    assert probes.class_ranks(found[0], np.array([3])).tolist() == [1]
    assert probes.class_ranks(found[0], np.array([2])).tolist() == [5]


def test_a_sweep_equals_gradient_descent_of_each_setting():
    blocks = np.stack([clusters(60)[0], clusters(60, spread=0.5)[0]])
    labels = clusters(60)[1]
    rates, decays = np.float32([[0.5, 1.0, 1e38], [0.5, 2.0, 1e38]]), np.float32([[0, 0.1, 1e38], [0.3, 0, 0]])
    found = probes.sweep(blocks, labels, rates, decays, jax.random.key(0), classes=CLASSES, batch_size=256, epochs=5)
    for s in range(2):
        for g in range(2):
            x, targets = blocks[s].astype(np.float64), np.eye(CLASSES)[labels]
            w, b = np.zeros((12, CLASSES)), np.zeros(CLASSES)
            momentum = [0.0, 0.0]
            for step in range(5):  # the batch has all images: their order does not matter
                z = np.exp(x @ w + b)
                error = (z / z.sum(1, keepdims=True) - targets) / 60
                momentum = [0.9 * momentum[0] + x.T @ error + decays[s, g] * w, 0.9 * momentum[1] + error.sum(0)]
                rate = rates[s, g] * 60 / 256 * (1 + np.cos(np.pi * step / 5)) / 2
                w, b = w - rate * momentum[0], b - rate * momentum[1]
            np.testing.assert_allclose(found.weights[s, g], w, atol=1e-5)
            np.testing.assert_allclose(found.bias[s, g], b, atol=1e-5)
    assert not np.isfinite(np.asarray(found.weights[0, 2])).all()
    ranks = probes.ranks(blocks[0], labels, probes.Linear(found.weights[0], found.bias[0]))
    top1, best = probes.choose_setting(ranks)
    assert top1[2] == 0  # a setting that diverged is not chosen
    assert best == top1.argmax() != 2


@pytest.mark.slow
def test_an_epoch_of_a_sweep_takes_every_image_once():
    x = np.eye(8, dtype=np.float32)[None]
    labels = np.arange(8) % 2
    found = probes.sweep(x, labels, np.float32([[0.1]]), np.float32([[0]]), jax.random.key(1), classes=2, batch_size=2,
                         epochs=1)  # fmt: skip
    moved = np.abs(np.asarray(found.weights[0, 0])).sum(axis=1)
    assert (moved > 0).all()  # each feature belongs to one image


def test_features_are_standardized_as_by_scikit_learn_and_constant_ones_become_zero():
    x = (3 * np.random.default_rng(0).normal(size=(50, 4)) + [0, 1000, 5, 7]).astype(np.float32)
    x[:, 2] = 5.1
    mean, scale = probes.statistics(x)
    ours = np.asarray(probes.standardize(x, mean, scale))
    np.testing.assert_allclose(ours, StandardScaler().fit_transform(x.astype(np.float64)), atol=1e-4)  # of 1000
    assert np.abs(ours[:, 2]).max() < 1e-6


def test_ties_and_nan_rank_the_true_class_last():
    x = np.float32([[1.0]])
    weights = jnp.float32([[[0, 0, 1]], [[0, 0, np.nan]]])
    ranks = probes.ranks(x, np.array([0]), probes.Linear(weights, jnp.zeros((2, 3))))
    assert ranks.tolist() == [[2, 2]]
    assert probes.accuracies(np.array([0, 4, 5, 0]), 10) == {"top1": 0.5, "top5": 0.75}
    assert probes.accuracies(np.array([0, 4]), 5)["top5"] is None


def test_validation_images_come_from_every_class_and_differ_by_seed():
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(4), [1, 2, 30, 101]))
    fit, validation = subsets.split_by_class(labels, 0.1, seed=0)
    assert sorted([*fit, *validation]) == list(range(134))
    assert np.bincount(labels[validation], minlength=4).tolist() == [0, 1, 3, 10]
    np.testing.assert_array_equal(validation, subsets.split_by_class(labels, 0.1, seed=0)[1])
    assert not np.array_equal(validation, subsets.split_by_class(labels, 0.1, seed=1)[1])


def test_a_draw_is_a_permutation_of_each_class_in_the_order_of_the_images():
    labels = np.random.default_rng(0).integers(0, 5, 300) * 3  # some classes have no image
    rng, drawn = np.random.default_rng(7), []
    for label in range(0, 15, 3):
        drawn += rng.permutation(np.flatnonzero(labels == label))[:4].tolist()
    assert subsets.draw_per_class(labels, 4, 7).tolist() == sorted(drawn)


@pytest.mark.parametrize("validation_fraction", [0.1, 0.9])
def test_a_fraction_counts_all_images_of_a_class_including_those_that_validate(validation_fraction):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(3), [500, 1000, 20]))
    fit, _ = subsets.split_by_class(labels, validation_fraction, seed=0)
    drawn = subsets.draw_fraction(labels[fit], 0.1, 0, all_labels=labels)
    assert np.bincount(labels[fit[drawn]]).tolist() == [50, 100, 2]
    assert len(subsets.draw_fraction(labels[fit], 0.95, 0, all_labels=labels)) == len(fit)  # at most those there are
