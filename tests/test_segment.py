"""Segmentation: pyramids, heads and loss; windows over whole images; metrics; the commands; one whole run."""

import csv
import json
import shutil
import threading
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from runs import ROOT, assert_same_run, run, run_until
from sklearn.metrics import accuracy_score, confusion_matrix, jaccard_score, recall_score
from tiny import PIXELS, tiny_batch, tiny_encoder
from tiny_trained import ENCODER, SIZE, random_weights

from simmim_jax import data
from simmim_jax.compiled import abstract_batch
from simmim_jax.config import load
from simmim_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, warn_once
from simmim_jax.evals import make_evaluator, segmentation
from simmim_jax.evals.segmentation import (
    Canvas,
    corners_along,
    draw_segmentations,
    make_windows_reader,
    paint,
    palette,
    segment_all,
    shared_records,
)
from simmim_jax.evals.sheet import GAP, LINE
from simmim_jax.evaluation import Subject, make_eval_inputs
from simmim_jax.experiment import make_experiment
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.objectives.pyramid import Rescale, pyramid_blocks, pyramid_factors
from simmim_jax.objectives.segment import masked_cross_entropy, mean_labeled, pooling_weights
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import load_run
from simmim_jax.runtime import processes, sharding
from simmim_jax.tools import predict
from simmim_jax.tools.convert import __main__ as convert
from simmim_jax.tools.convert.weights import abstract_model
from simmim_jax.tools.evaluate import __main__ as evaluate
from simmim_jax.tools.evaluate import segmentation as evaluate_segmentation
from simmim_jax.train_step import mean_grads

RNG = np.random.default_rng(0)
STATE = SimpleNamespace(step=4, params=None)
WINDOW = (16, 16)


def segment(encoder=None, **options):
    return make_objective("segment", encoder or tiny_encoder(), **{**PIXELS, "num_classes": 5, **options})


def batch_with_maps(size=4, num_classes=5):
    maps = np.random.default_rng(1).integers(0, num_classes, (size, 32, 32)).astype(np.uint8)
    maps[:, :8] = 255
    return tiny_batch(size) | {"label_map": jnp.asarray(maps)}


def test_pixels_without_a_class_do_not_count():
    def loss_of(logits, maps):
        return masked_cross_entropy(logits, maps, mean_labeled(maps, 3))

    measure = jax.jit(jax.value_and_grad(loss_of, has_aux=True))
    logits = RNG.normal(size=(2, 8, 8, 3)).astype(np.float32)
    maps = RNG.integers(0, 3, (2, 8, 8)).astype(np.uint8)
    maps[:, 5:] = 255
    (loss, accuracy), slope = measure(logits, maps)
    kept, labels = logits[:, :5].reshape(-1, 3).astype(np.float64), maps[:, :5].reshape(-1)
    chances = np.exp(kept) / np.exp(kept).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(loss, -np.log(chances[np.arange(len(labels)), labels]).mean(), rtol=1e-5)
    np.testing.assert_allclose(accuracy, (kept.argmax(axis=1) == labels).mean(), rtol=1e-6)
    assert not np.asarray(slope)[:, 5:].any()
    assert np.asarray(slope)[:, :5].any()
    (loss, accuracy), slope = measure(logits, np.full_like(maps, 255))  # a batch without any class teaches nothing
    assert (float(loss), float(accuracy), float(np.abs(slope).max())) == (0.0, 0.0, 0.0)


def test_an_update_does_not_depend_on_microbatches_with_any_number_of_labeled_pixels():
    maps = np.array(batch_with_maps()["label_map"])
    maps[1], maps[2, 1:] = 255, 255
    objective, key = segment(MeanColors()), jax.random.key(0)
    batch, shapes = batch_with_maps() | {"label_map": jnp.asarray(maps)}, jax.eval_shape(objective.init, key)
    params = jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), jnp.float32), shapes)
    whole, parts = (
        jax.jit(partial(mean_grads, key=key, loss_fn=objective.loss_fn, microbatches=count))(
            params, objective.prepare(batch)
        )
        for count in (1, 4)
    )
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), whole, parts)


class MeanColors(nn.Module):
    """An encoder that compiles fast: a linear map of each square's mean color."""

    depth, feature_stride, dtype, stages = 1, 8, "float32", ()

    @nn.compact
    def __call__(self, images, train=False, batch_index=None):
        out = nn.Dense(4)(nn.avg_pool(images, (8, 8), (8, 8)))
        self.sow("intermediates", "blocks", out)
        return out


def test_adaptive_pooling_equals_pytorch():
    torch_says = [
        [1 / 3] * 3 + [0] * 4,
        [0, 0, 1 / 3, 1 / 3, 1 / 3, 0, 0],
        [0] * 4 + [1 / 3] * 3,
    ]  # of 7 values, 3 bins
    np.testing.assert_allclose(pooling_weights(7, 3), torch_says, rtol=1e-6)
    np.testing.assert_allclose(pooling_weights(2, 6).sum(axis=1), 1, rtol=1e-6)


def test_a_pyramid_is_made_of_stages_or_of_the_quarters_of_a_depth():
    for name, options, blocks in (
        ("vit", {"width": 32, "depth": 12, "num_heads": 2, "patch_size": 16}, (3, 6, 9, 12)),
        ("swin", {"width": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 2, 4), "window": 4}, (1, 2, 4, 5)),
        ("convnext", {"depths": (1, 1, 2, 1), "widths": (8, 16, 24, 32)}, (1, 2, 4, 5)),
        ("resnet", {"depths": (1, 1, 1, 1), "width": 8}, (1, 2, 3, 4)),
    ):
        assert pyramid_blocks(make_encoder(name, None, **options)) == blocks


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit", {"width": 32, "depth": 2, "num_heads": 2, "patch_size": 8}),
        ("convnext", {"depths": (1, 1, 1, 1), "widths": (8, 16, 24, 32)}),
    ],
)
def test_a_pyramid_has_strides_4_to_32(name, options):
    encoder = make_encoder(name, None, **options)

    def levels(images):
        _, sown = encoder.init_with_output(jax.random.key(0), images, mutable=["params", "intermediates"])
        maps = [sown["intermediates"]["blocks"][n - 1] for n in pyramid_blocks(encoder)]
        rescale = [Rescale(factor, "float32") for factor in pyramid_factors(encoder)]
        return [level.init_with_output(jax.random.key(1), x)[0] for level, x in zip(rescale, maps, strict=True)]

    shapes = [x.shape[1:3] for x in jax.eval_shape(levels, jnp.zeros((1, 64, 96, 3)))]
    assert shapes == [(16, 24), (8, 12), (4, 6), (2, 3)]


def test_encoders_without_a_pyramid_are_refused():
    with pytest.raises(ConfigError, match=r"configs/folder_segment\.py:linear"):
        segment(tiny_encoder(patch_size=14), image_size=(28, 28), head="upernet")
    with pytest.raises(ConfigError, match="give four"):
        segment(head="upernet", blocks=(1, 2, 3, 4))
    with pytest.raises(ConfigError, match="did you mean linear"):
        segment(head="linea")
    with pytest.raises(ConfigError, match=r"objective\.num_classes"):
        segment(num_classes=1)


@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_the_logits_of_a_head_have_its_stride(head):
    objective = segment(MeanColors() if head == "linear" else None, head=head, channels=16)
    params = jax.eval_shape(objective.init, jax.random.key(0))
    logits = jax.eval_shape(objective.predict, params, batch_with_maps(), jax.random.key(1))["logits"]
    assert logits.shape == ((4, 4, 4, 5) if head == "linear" else (4, 8, 8, 5))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["linear", "upernet"])
def test_every_parameter_gets_a_gradient_and_dropout_follows_batch_index(head):
    objective = segment(head=head, channels=16)
    params, batch = jax.jit(objective.init)(jax.random.key(0)), objective.prepare(batch_with_maps(4))
    step = jax.jit(jax.value_and_grad(lambda *args: objective.loss_fn(*args, True)[0]))
    turned = jax.tree.map(lambda x: x[::-1], batch)
    steps = [
        step(params, each, jax.random.key(1))
        for each in (batch, turned, turned | {"batch_index": batch["batch_index"]})
    ]
    paths = jax.tree_util.tree_leaves_with_path(steps[0][1])
    idle = {jax.tree_util.keystr(path) for path, x in paths if not x.any()}
    of_the_output = {"['encoder']['norm']['scale']", "['encoder']['norm']['bias']"}
    assert idle == (set() if head == "linear" else of_the_output)  # UPerNet reads the blocks
    losses = [float(loss) for loss, _ in steps]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert (abs(losses[0] - losses[2]) > 1e-5) == (head == "upernet")  # the linear head drops nothing


def test_windows_reach_the_end_and_leave_no_gap():
    for size, step in ((16, 0), (17, 0), (40, 0), (40, 16), (100, 3), (5, 0)):
        corners = corners_along(size, 16, 4, step)
        covered = np.zeros(max(corners) + 16, bool)
        for corner in corners:
            assert corner % 4 == 0
            covered[corner : corner + 16] = True
        assert covered.all()
        assert size <= len(covered) < max(size, 16) + 4


def of_pixel(params, windows):
    """Logits whose highest class is each pixel's gray value."""
    return np.eye(6, dtype=np.float32)[np.minimum(windows[..., 0], 5)] * 3


def pictures(shapes, num_classes=5):
    for index, shape in enumerate(shapes):
        truth = RNG.integers(0, num_classes, shape).astype(np.uint8)
        yield {"image": truth[..., None].repeat(3, axis=2), "label_map": truth, "index": index}


def eval_inputs(records, **more):
    given = {"whole": records, "window": WINDOW, "window_batch": 4, "fill": np.zeros(3, np.uint8), "folder": ""}
    return given | {"read_windows": of_pixel} | more


def test_windows_together_predict_each_pixel_for_any_image_and_batch_size():
    records = list(pictures([(16, 16), (5, 40), (33, 21), (50, 70), (1, 1)]))
    for batch, step in ((1, 0), (3, 5), (64, 16)):
        result = make_evaluator("segmentation", eval_inputs(records, window_batch=batch), step=step)(STATE)
        assert result == {"miou": 1.0, "pixel_accuracy": 1.0, "mean_accuracy": 1.0, "images": 5.0}


def test_logits_are_averaged_where_windows_overlap():
    canvas = Canvas((16, 24), WINDOW, (4, 4), 8, 2)
    assert canvas.corners == [(0, 0), (0, 8)]
    canvas.add((0, 0), np.broadcast_to(np.float32([1, 0]), (4, 4, 2)))
    canvas.add((0, 8), np.broadcast_to(np.float32([0, 4]), (4, 4, 2)))
    mean = canvas.total / canvas.count
    np.testing.assert_array_equal(mean[0], [[1, 0]] * 2 + [[0.5, 2]] * 2 + [[0, 4]] * 2)
    assert canvas.predict((32, 48)).shape == (32, 48)
    assert (np.diff(canvas.predict((4, 6)), axis=1) >= 0).all()


def test_logits_are_enlarged_as_pytorch_does_it():
    canvas = Canvas((16, 16), WINDOW, (4, 4), 0, 2)
    logits = RNG.normal(size=(4, 4, 2)).astype(np.float32)
    canvas.add((0, 0), logits)
    expected = jax.image.resize(logits, (40, 40, 2), "bilinear").argmax(axis=-1)
    assert (canvas.predict((40, 40)) == expected).mean() > 0.999  # but for ties to the last bit


def test_the_metrics_equal_scikit_learn(tmp_path):
    def noisy(params, windows):
        return RNG.normal(size=(*windows.shape[:3], 6)).astype(np.float32) + of_pixel(params, windows) / 2

    predictions = []
    records = list(pictures([(16, 16), (30, 20), (12, 40)]))
    records[1]["label_map"] = np.where(RNG.random((30, 20)) < 0.3, 255, records[1]["label_map"]).astype(np.uint8)
    records[1]["label_map"][records[1]["label_map"] == 3] = 255

    def keep(*args):
        for each in segment_all(*args):
            predictions.append(each[1])
            yield each

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(segmentation, "segment_all", keep)
        given = eval_inputs(records, read_windows=noisy, folder=str(tmp_path), classes=tuple("abcde"))
        result = make_evaluator("segmentation", given, pictures=2)(STATE)
    truth = np.concatenate([record["label_map"].ravel() for record in records])
    predicted = np.concatenate([prediction.ravel() for prediction in predictions])[truth < 6]
    truth = truth[truth < 6]
    labels = np.union1d(truth, predicted)
    of_classes = jaccard_score(truth, predicted, labels=labels, average=None)
    assert result["miou"] == pytest.approx(of_classes.mean(), abs=1e-12)
    assert result["pixel_accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    recall = recall_score(truth, predicted, labels=np.unique(truth), average="macro")
    assert result["mean_accuracy"] == pytest.approx(recall, abs=1e-12)
    rows = list(csv.DictReader((tmp_path / "segmentation.csv").open()))
    assert [row["name"] for row in rows] == [*"abcde", ""]
    np.testing.assert_allclose([float(rows[n]["iou"]) for n in labels], of_classes, atol=1e-6)
    counts = confusion_matrix(truth, predicted, labels=range(6))
    assert [int(row["pixels"]) for row in rows] == counts.sum(axis=1).tolist()
    assert [int(row["predicted_pixels"]) for row in rows] == counts.sum(axis=0).tolist()
    assert np.asarray(Image.open(tmp_path / "segmentation_4.png")).shape[2] == 3


def test_invalid_options_and_results_are_errors():
    records = list(pictures([(16, 16)]))
    for options in ({"step": 17}, {"step": -1}, {"pictures": -1}):
        with pytest.raises(ConfigError):
            make_evaluator("segmentation", eval_inputs(records), **options)
    with pytest.raises(NonFiniteError):
        make_evaluator("segmentation", eval_inputs(records, read_windows=lambda _, x: of_pixel(_, x) * np.nan))(STATE)
    records[0]["label_map"] = np.full((16, 16), 255, np.uint8)
    with pytest.raises(DataError, match="no held-out pixel"):
        make_evaluator("segmentation", eval_inputs(records))(STATE)


def test_classes_without_a_pixel_are_warned_of_once(caplog):
    records = list(pictures([(16, 16), (16, 16)], num_classes=4))
    run = make_evaluator("segmentation", eval_inputs(records, classes=("a", "b", "c", "d", "car")))
    assert run(STATE) == run(STATE)
    said = [record.message for record in caplog.records if "no pixel" in record.message]
    assert [line.split(": ")[-1] for line in said] == ["4 (car), 5"]


@pytest.mark.parametrize("allowed", [1, 2, None])
def test_too_many_images_left_out_are_an_error(allowed):
    class Lacking:
        __len__, __iter__ = lambda self: 5, lambda self: pictures([(16, 16)] * 3)

    run = make_evaluator("segmentation", eval_inputs(Lacking(), max_bad_images=allowed))
    if allowed == 1:
        with pytest.raises(DataError, match="2 of 5 images"):
            run(STATE)
    else:
        assert run(STATE)["images"] == 3


def test_windows_come_back_in_order_from_any_number_of_processes():
    def predict_of(shares):
        def predict(params, batch):  # of all processes, one after another
            whole = np.concatenate([all_windows[share::shares] for share in range(shares)])
            places = np.concatenate([np.arange(8)[share::shares] for share in range(shares)])
            np.testing.assert_array_equal(batch["image"], all_windows[0::shares])
            return {"logits": whole[:, :2, :2].astype(np.float32), "batch_index": places}

        return predict

    windows = RNG.integers(0, 255, (5, 4, 4, 3)).astype(np.uint8)
    all_windows = np.concatenate([windows, np.zeros((3, 4, 4, 3), np.uint8)])
    for shares in (1, 2, 4):
        logits = make_windows_reader(predict_of(shares), 8, 0, shares)(None, windows)
        np.testing.assert_array_equal(logits, windows[:, :2, :2])


def test_the_device_computes_while_predictions_are_enlarged_and_images_stay_in_order(monkeypatch):
    records, later, kept = list(pictures([WINDOW] * 5)), threading.Event(), Canvas.predict

    def predict(canvas, shape):
        assert later.wait(30)
        return kept(canvas, shape)

    def read(windows):
        if (windows[0] == records[2]["image"]).all():
            later.set()
        return of_pixel(None, windows)

    monkeypatch.setattr(Canvas, "predict", predict)
    monkeypatch.setattr(segmentation, "THREADS", 2)
    done = list(segment_all(read, records, WINDOW, 1, np.zeros(3, np.uint8)))
    assert [record["index"] for record, _, _ in done] == [0, 1, 2, 3, 4]
    for record, prediction, _ in done:
        np.testing.assert_array_equal(prediction, record["label_map"])


def greatest_of(count):
    """(`processes.process_max` of so many threads, a place where each says which it is)."""
    barrier, place, given = threading.Barrier(count, timeout=30), threading.local(), [0] * count

    def process_max(number):
        given[place.process] = number
        barrier.wait()
        most = max(given)
        barrier.wait()
        return most

    return process_max, place


@pytest.mark.parametrize("count", [1, 3])
def test_too_many_bad_images_end_a_pass_with_the_same_error_in_all_processes(count, tmp_path):
    for n in range(30):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / f"{n:02}.png")
    for n in (3, 6, 7):  # of three processes, the last has none of them
        (tmp_path / f"{n:02}.png").write_bytes(b"")
    source = data.make_source("folder", path=str(tmp_path), split="train", heldout_fraction=0.0)
    process_max, place = greatest_of(count)

    def read(process, fraction):
        place.process = process
        split = {"shard": data.Shard(process, count), "process_max": process_max}
        loading = data.Loading(max_bad_fraction=fraction)
        epoch = data.make_epoch(source, data.CenterCrop((8, 8)), batch_size=6, loading=loading, **split)
        try:
            return sum(int(batch["valid"].sum()) for batch in epoch)
        except DataError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        assert sum(pool.map(partial(read, fraction=0.1), range(count))) == 27
        said = set(pool.map(partial(read, fraction=0.05), range(count)))
    assert len(said) == 1
    assert "3 of 30 images" in said.pop()


def test_evaluations_limit_bad_images_as_training_does(monkeypatch):
    asked, loading = [], data.Loading(max_bad_fraction=0.25)
    monkeypatch.setattr(data, "make_epoch", lambda _, **options: asked.append(options) or [])
    mesh, key = sharding.make_mesh(), jax.random.key(0)
    crop = data.CenterCrop((32, 32))
    objective = segment(MeanColors())
    make_eval_inputs(
        Subject(objective, mesh, key, [], crop, batch_size=8, limit=0, loading=loading, train=[], features=of_pixel)
    )
    bound = (0.25, processes.process_max)
    assert [(options["loading"].max_bad_fraction, options["process_max"]) for options in asked] == [bound, bound]


def test_images_that_one_process_lacks_are_left_out_by_all(monkeypatch):
    there = ([0, 1, 2, 4, 7], [1, 2, 3, 4, 5, 7, 8], [0, 2, 3, 4, 7, 9])
    process_max, place = greatest_of(3)

    def take(process):
        place.process = process
        return [record["index"] for record in shared_records({"index": index} for index in there[process])]

    assert [record["index"] for record in shared_records({"index": index} for index in there[0])] == there[0]
    monkeypatch.setattr(processes, "process_max", process_max)
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(take, range(3))) == [[2, 4, 7]] * 3


def test_a_picture_shows_image_truth_and_prediction():
    image = np.full((20, 40, 3), 100, np.uint8)
    truth, prediction = np.zeros((20, 40), np.uint8), np.ones((20, 40), np.int32)
    truth[:, 20:] = 255
    sheet = draw_segmentations([(image, truth, prediction)] * 2, 2)
    height, width = 100, 200  # 224 // 40 times as large
    assert sheet.shape == (LINE + GAP + 2 * (height + GAP), 3 * (width + GAP) + GAP, 3)
    colors = palette(2)
    assert len({tuple(color) for color in palette(150).tolist()} | {(0, 0, 0)}) == 151
    shade = lambda color: (0.4 * 100 + 0.6 * color).round().tolist()  # noqa: E731
    at = lambda column, x: sheet[LINE + GAP + 50, GAP + column * (width + GAP) + x].tolist()  # noqa: E731
    assert (at(0, 10), at(1, 10), at(1, 190)) == ([100] * 3, shade(colors[0]), [100] * 3)
    assert at(2, 10) == at(2, 190) == shade(colors[1])
    assert (paint(image, np.full((20, 40), 255), 2) == image).all()


def write_squares(folder, count=24):
    """Dark images with a bright square, whose map says where that is."""
    rng = np.random.default_rng(3)
    for split, many in (("train", count), ("val", 6)):
        for n in range(many):
            image, truth = rng.integers(0, 60, (40, 48, 3)).astype(np.uint8), np.zeros((40, 48), np.uint8)
            top, left = rng.integers(0, 24, 2)
            image[top : top + 16, left : left + 16] += 150
            truth[top : top + 16, left : left + 16] = 1
            for kind, pixels in (("images", image), ("masks", truth)):
                (folder / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / kind / split / f"{n}.png")


def test_a_config_opens_its_images_with_label_maps(monkeypatch, tmp_path):
    write_squares(tmp_path, 16)
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    config = load("configs/folder_segment.py")
    config.data.path, config.objective.num_classes = str(tmp_path), 2
    config.encoder.name, config.encoder.size, config.encoder.depth = "vit", "ti", 1
    experiment = make_experiment(config)
    assert (len(experiment.source), len(experiment.heldout)) == (16, 6)
    assert experiment.batches.label_maps.fill == (124, 116, 104)
    label_map = abstract_batch(experiment)["label_map"]
    assert (label_map.shape, label_map.dtype) == ((16, 512, 512), np.uint8)


@pytest.mark.parametrize(("head", "trained"), [("linear", False), ("linear", True), ("upernet", False)])
def test_a_head_with_the_settings_of_the_other_one_is_warned_of(head, trained, caplog):
    warn_once.cache_clear()
    objective = segment(MeanColors(), head=head, channels=16, train_encoder=trained)
    jax.eval_shape(objective.init, jax.random.key(0))
    assert (f"--config=configs/folder_segment.py:{head}" in caplog.text) == (trained != (head == "upernet"))


TRAINED = {"name": "segment", "num_classes": 5, "head": "linear", "train_encoder": False}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Of a run that segments, with random weights."""
    folder = tmp_path_factory.mktemp("segments")
    maps = {"reduce_zero_label": False, "ignore": 255, "channel": -1, "short_side": 0, "scale": (0.5, 2.0)}
    own = {"source": "auto", "path": str(folder / "data"), "name": "", "data_dir": "", "heldout_fraction": 0.1}
    how = {
        "interpolation": "bilinear",
        "threads": 2,
        "on_error": "replace",
        "max_bad_fraction": 0.01,
        "max_pixels": 10**6,
    }
    config = {"eval_batch_size": 6, "eval_images": 0, "evals": {"segmentation": {"pictures": 2, "step": 0}}}
    config |= {"encoder": ENCODER, "objective": TRAINED, "data": own | how | {"maps": maps}, "classes": list("abcde")}
    _, abstract = abstract_model(ENCODER, TRAINED, SIZE, {"mean": PIXELS["mean"], "std": PIXELS["std"]})
    config |= {"image_size": SIZE, "mean": PIXELS["mean"], "std": PIXELS["std"]}
    checkpoint.write_params(str(folder / "run"), random_weights(abstract), json.loads(json.dumps(config)), step=7)
    return str(folder / "run")


def photographs(folder, shapes):
    """PNGs of a few large colors, one of them stored on its side; their paths."""
    folder.mkdir(parents=True)
    for n, (height, width) in enumerate(shapes):
        colors = Image.fromarray(RNG.integers(0, 256, (4, 5, 3)).astype(np.uint8))
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = 6 if n == 1 else 1
        colors.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{n}.png", exif=exif)
    return sorted(map(str, folder.iterdir()))


def test_predicted_masks_are_perfect_label_maps_for_an_evaluation(workdir, tmp_path, capsys, monkeypatch):
    paths = photographs(tmp_path / "photos" / "images", [(40, 60), (33, 50), (16, 60)])
    predict.run([workdir, *paths, f"--out={tmp_path}/out/x.png", "--json", "--top=5"])
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == paths
    (tmp_path / "photos" / "masks").mkdir()
    there = set()
    for n, (path, answer) in enumerate(zip(paths, answers, strict=True)):
        photograph = np.asarray(ImageOps.exif_transpose(Image.open(path)))
        mask = Image.open(tmp_path / "out" / f"x_{n + 1}_mask.png")
        labels, shown = np.asarray(mask), np.asarray(Image.open(tmp_path / "out" / f"x_{n + 1}.png"))
        assert (mask.mode, labels.shape) == ("L", photograph.shape[:2])
        shares = {each["label"]: each["share"] for each in answer["classes"]}
        assert shares == {label: (labels == label).mean() for label in np.unique(labels)}
        assert {each["class"] for each in answer["classes"]} == {"abcde"[label] for label in shares}
        np.testing.assert_array_equal(shown[:, : labels.shape[1]], photograph)
        np.testing.assert_array_equal(shown[:, labels.shape[1] + 8 :], paint(photograph, labels, 5))
        mask.save(tmp_path / "photos" / "masks" / f"{n}.png")
        there |= shares.keys()
    assert len(there) > 1
    monkeypatch.chdir(tmp_path)
    evaluate.run([workdir, f"--data={tmp_path}/photos", "--out=figures"])
    said = capsys.readouterr().out
    assert "miou 1.000000  pixel_accuracy 1.000000  mean_accuracy 1.000000  of 3 images" in said
    assert sorted(path.name for path in (tmp_path / "figures").iterdir()) == ["segmentation.csv", "segmentation_7.png"]
    assert not (tmp_path / "results.csv").exists()


def test_training_images_and_crops_are_refused(workdir, tmp_path):
    write_squares(tmp_path / "data", 2)
    for kind in ("images", "masks"):
        shutil.rmtree(tmp_path / "data" / kind / "val")
    with pytest.raises(DataError, match="--split=train"):
        evaluate.run([workdir, f"--data={tmp_path}/data"])
    with pytest.raises(ConfigError, match="--crop-fraction"):
        evaluate.run([workdir, f"--data={tmp_path}/data", "--crop-fraction=0.5"])


def test_images_with_label_maps_that_a_run_was_trained_on_are_warned_of(workdir, tmp_path, capsys):
    write_squares(tmp_path / "data", 4)
    run = load_run(workdir)
    run = run._replace(config=run.config | {"data": run.config["data"] | {"path": str(tmp_path / "data")}})
    for split, warning in (("train", "like 0.png"), ("val", "")):
        for kind in ("images", "masks"):
            shutil.copytree(tmp_path / "data" / kind / split, tmp_path / split / kind)
        options = Namespace(data=str(tmp_path / split), split="")
        assert len(evaluate_segmentation.open_pairs(run, options)) == {"train": 4, "val": 6}[split]
        printed = capsys.readouterr().err
        assert warning in printed if warning else not printed


def test_the_heads_of_a_segmentation_run_have_no_place_in_a_backbone(workdir, tmp_path, capsys):
    convert.run([workdir, str(tmp_path / "backbone"), "--format=backbone"])
    assert "head" in capsys.readouterr().out
    with pytest.raises(CheckpointError, match="head"):
        convert.run([workdir, str(tmp_path / "other"), "--format=huggingface"])


ARGUMENTS = (
    "--config.encoder.name=vit", "--config.encoder.size=ti", "--config.encoder.width=32", "--config.encoder.depth=2",
    "--config.encoder.num_heads=2", "--config.encoder.patch_size=4", "--config.image_size=32,32",
    "--config.objective.num_classes=2", "--config.objective.channels=16", "--config.batch_size=8",
    "--config.optim.layer_decay=1", "--config.optim.warmup_epochs=0", "--config.log_every=1",
    "--config.data.maps.short_side=-1", "--config.save_every=10",
)  # fmt: skip


@pytest.mark.slow
def test_a_run_learns_where_things_are_and_resumes_and_its_evaluation_is_repeated(tmp_path):
    write_squares(tmp_path / "data")
    steps = 40
    arguments = ("--config=configs/folder_segment.py:linear", f"--config.data.path={tmp_path}/data", *ARGUMENTS)
    arguments += ("--config.base_learning_rate=1.0", f"--config.steps={steps}")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    done = run(*arguments, f"--workdir={whole}")
    assert done.returncode == 0, done.stderr
    summary = json.loads((whole / "summary.json").read_text())
    assert summary["miou"] > 0.8 > summary["start"]["miou"] + 0.2
    evaluate.run([str(whole), f"--out={tmp_path}/again", "--results="])  # here on eight devices, there on one
    for name in ("segmentation.csv", f"segmentation_{steps}.png"):
        assert (tmp_path / "again" / name).read_bytes() == (whole / "figures" / name).read_bytes()
    stopped = run_until("step:13", "SIGTERM", *arguments, f"--workdir={cut}")
    assert stopped.returncode == 143, stopped.stderr
    done = run(*arguments, f"--workdir={cut}")
    assert done.returncode == 0, done.stderr
    assert_same_run(cut, whole, steps)
