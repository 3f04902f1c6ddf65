"""Evaluators against independent computations, and the sheet of reconstructions."""

import inspect
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny import tiny_batch, tiny_objective

from simmim_jax.errors import ConfigError, DataError, NonFiniteError
from simmim_jax.evals import EVALUATORS, forward_passes, make_evaluator
from simmim_jax.evals.features import Features, make_feature_reader
from simmim_jax.evals.reconstruction import draw_reconstructions
from simmim_jax.evals.sheet import GAP, LINE

STATE = SimpleNamespace(step=3, params=None)
RNG = np.random.default_rng(0)


def clusters(count, spread):
    """Features of five classes around five centers."""
    labels = RNG.integers(0, 5, count)
    centers = np.random.default_rng(7).normal(size=(5, 16))
    return (centers[labels] + spread * RNG.normal(size=(count, 16))).astype(np.float32), labels


def batches(count, size, **arrays):
    """Yield `arrays` in batches of `size`; the rows that pad the last one are not valid."""
    for start in range(0, count, size):
        batch = {name: values[start : start + size] for name, values in arrays.items()}
        missing = size - len(next(iter(batch.values())))
        pad = {name: np.pad(values, [(0, missing)] + [(0, 0)] * (values.ndim - 1)) for name, values in batch.items()}
        yield pad | {"valid": np.arange(size) < size - missing}


def test_accuracy_is_exact_for_any_batch_size():
    logits, labels = RNG.normal(size=(103, 10)), RNG.integers(0, 10, 103)
    expected_top1 = (logits.argmax(axis=1) == labels).mean()
    expected_top5 = np.mean([label in row.argsort()[-5:] for row, label in zip(logits, labels, strict=True)])
    for size in (1, 8, 103, 200):
        heldout = list(batches(103, size, logits=logits, label=labels))
        run = make_evaluator("accuracy", {"predict": lambda _, b: b, "heldout": heldout})
        assert run(STATE) == pytest.approx({"top1": expected_top1, "top5": expected_top5, "images": 103})


def test_a_classifier_with_equal_logits_is_never_right():
    labels = np.arange(12) % 6
    for value, outcome in ((0.5, {"top1": 0.0, "top5": 0.0, "images": 12}), (np.nan, None)):
        heldout = list(batches(12, 4, logits=np.full((12, 6), value), label=labels))
        run = make_evaluator("accuracy", {"predict": lambda _, b: b, "heldout": heldout})
        if outcome:
            assert run(STATE) == outcome
        else:
            with pytest.raises(NonFiniteError):
                run(STATE)


def test_images_of_classes_without_training_images_are_counted():
    (train, train_labels), (heldout, labels) = clusters(80, 1.0), clusters(40, 1.0)
    use, count = train_labels != 3, float((labels == 3).sum())
    assert count
    inputs = {"features": lambda _: Features(train[use], train_labels[use], heldout, labels)}
    for name in ("knn", "linear"):
        assert make_evaluator(name, inputs)(STATE)["untrained_class_images"] == count
    logits = np.eye(5)[labels]
    heldout = list(batches(40, 8, logits=logits, label=labels))
    for trained, expected in (
        (np.arange(5) != 3, {"untrained_class_images": count}),
        (np.ones(5, bool), {}),
        (None, {}),
    ):
        run = make_evaluator("accuracy", {"predict": lambda _, b: b, "heldout": heldout, "trained": trained})
        assert run(STATE) == {"top1": 1.0, "images": 40.0} | expected


def test_knn_equals_a_computation_by_hand():
    (train, train_labels), (heldout, labels) = clusters(80, 1.5), clusters(40, 1.5)
    run = make_evaluator("knn", {"features": lambda _: Features(train, train_labels, heldout, labels)}, k=7)
    unit = lambda x: x / np.linalg.norm(x, axis=1, keepdims=True)  # noqa: E731
    similarity = unit(heldout) @ unit(train).T
    right = 0
    for row, label in zip(similarity, labels, strict=True):
        nearest = row.argsort()[-7:]
        votes = np.bincount(train_labels[nearest], np.exp(row[nearest] / 0.07), minlength=5)
        right += votes.argmax() == label
    assert run(STATE) == {"knn": right / 40}
    assert 0.3 < right / 40 < 1.0


def test_a_linear_probe_separates_clusters_and_not_random_labels():
    (train, train_labels), (heldout, labels) = clusters(300, 0.3), clusters(100, 0.3)
    probe = lambda *sets: make_evaluator("linear", {"features": lambda _: Features(*sets)})(STATE)["linear"]  # noqa: E731
    assert probe(train, train_labels, heldout, labels) == 1.0
    assert probe(train, RNG.permutation(train_labels), heldout, labels) < 0.6


def test_features_are_read_once_a_step_from_valid_labeled_images():
    calls = []

    def extract(params, batch):
        calls.append(1)
        return batch

    x, labels = clusters(21, 1.0)
    labels[4] = -1
    sets = [list(batches(21, 8, features=x, label=labels))] * 2
    read = make_feature_reader(extract=extract, train=sets[0], heldout=sets[1])
    features = read(STATE)
    assert read(STATE) is features
    assert len(calls) == 6
    np.testing.assert_array_equal(features.train, np.delete(x, 4, axis=0))
    with pytest.raises(NonFiniteError):
        make_feature_reader(
            extract=lambda _, b: b | {"features": np.full_like(b["features"], np.nan)}, train=sets[0], heldout=sets[1]
        )(STATE)


def test_images_without_any_label_are_refused():
    x, labels = clusters(6, 1.0)
    sets = [list(batches(6, 4, features=x, label=of)) for of in (labels, np.full(6, -1))]
    for order, images in ((sets, "held-out"), (sets[::-1], "training")):
        read = make_feature_reader(extract=lambda _, batch: batch, train=order[0], heldout=order[1])
        with pytest.raises(DataError, match=images):
            make_evaluator("knn", {"features": read})(STATE)


@pytest.mark.slow
def test_held_out_loss_and_pictures_do_not_depend_on_the_batch_size(tmp_path):
    objective, data = tiny_objective(), jax.tree.map(np.asarray, tiny_batch(20))
    params, key = jax.jit(objective.init)(jax.random.key(0)), jax.random.key(9)
    jitted = jax.jit(lambda params, batch: objective.predict(params, batch, key))

    def predict(params, batch):
        out = jitted(params, {name: jnp.asarray(batch[name]) for name in data})
        return jax.device_get(out) | {name: batch[name] for name in ("batch_index", "valid")}

    results = {}
    for size in (8, 20):
        heldout = list(batches(20, size, **data))
        for batch in heldout:  # padding has indices of its own
            batch["batch_index"][~batch["valid"]] = 1000
        eval_inputs = {
            "predict": predict,
            "heldout": heldout,
            "spread": lambda count, size=size: batches(count, size, **{name: x[:count] for name, x in data.items()}),
        }
        eval_inputs["folder"] = str(tmp_path / str(size))
        results[size] = make_evaluator("reconstruction", eval_inputs, pictures=5)(
            SimpleNamespace(step=7, params=params)
        )
    losses = [result["masked_loss"] for result in results.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    expected = objective.loss_fn(params, tiny_batch(20), key, False)[0]
    np.testing.assert_allclose(losses[0], expected, rtol=1e-6)
    sheets = [np.asarray(Image.open(tmp_path / str(size) / "reconstruction_7.png")) for size in results]
    assert all((sheet == sheets[0]).all() for sheet in sheets)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_sheet_shows_original_masked_prediction_and_pasted(channels):
    image, prediction = np.full((32, 48, channels), 0.2), np.full((32, 48, channels), 0.8)
    mask = np.zeros((32, 48), bool)
    mask[:, :24] = True
    sheet = draw_reconstructions([(image, mask, prediction)] * 2)
    assert sheet.shape == (LINE + GAP + 2 * (96 + GAP), 4 * (144 + GAP) + GAP, 3)
    tile = lambda n: sheet[LINE + GAP + 48, GAP + n * (144 + GAP) + np.array([36, 108]), 0].tolist()  # noqa: E731 - a hidden, a visible pixel
    assert [tile(n) for n in range(4)] == [[51, 51], [128, 51], [204, 128], [204, 51]]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("knn", {"k": 0}),
        ("linear", {"iterations": 0}),
        ("knn", {"neigbors": 5}),
        ("reconstruction", {"pictures": -1}),
    ],
)
def test_options_that_cannot_work_are_refused(name, options):
    eval_inputs = {"features": len, "predict": len, "heldout": [], "spread": len, "folder": ""}
    with pytest.raises(ConfigError):
        make_evaluator(name, eval_inputs, **options)


def test_a_linear_probe_of_one_class_is_skipped_with_one_warning(caplog):
    (train, _), (heldout, labels) = clusters(10, 1.0), clusters(10, 1.0)
    run = make_evaluator("linear", {"features": lambda _: Features(train, np.zeros(10, int), heldout, labels)})
    assert [run(STATE), run(STATE)] == [{}, {}]
    assert caplog.text.count("10 training images are of one class") == 1


@pytest.mark.parametrize("name", sorted(EVALUATORS))
def test_an_evaluator_declares_its_inputs_and_takes_no_others(name):
    evaluator = EVALUATORS[name]
    parameters = inspect.signature(evaluator.make).parameters
    options = {each for each in parameters if each not in evaluator.inputs}
    assert set(evaluator.inputs) <= parameters.keys()
    assert all(parameters[each].default is not inspect.Parameter.empty for each in options)
    assert set(evaluator.needs) <= {"label", "label_map"}
    with pytest.raises(ConfigError, match=evaluator.inputs[0]):
        make_evaluator(name, {}, **{evaluator.inputs[0]: 1})


def test_features_are_extracted_once_for_all_their_evaluators():
    assert forward_passes(["knn"]) == forward_passes(["knn", "linear"]) == (1, 1)
    assert forward_passes(["reconstruction", "knn", "linear", "accuracy"]) == (3, 1)
    assert forward_passes([]) == (0, 0)


def test_an_unknown_evaluator_is_refused():
    with pytest.raises(ConfigError, match="did you mean knn"):
        make_evaluator("knnn", {})
