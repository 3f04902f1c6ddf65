"""The evaluate command: metrics, results.csv, tables and pictures, which images are evaluated, and errors."""

import csv
import json
import re
import shutil
import threading
from argparse import Namespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from runs import DIGITS, run
from sklearn.metrics import confusion_matrix, top_k_accuracy_score
from tiny import tiny_encoder
from tiny_trained import keep_fingerprints

from simmim_jax.data import make_source
from simmim_jax.errors import CheckpointError, ConfigError, DataError, UserError
from simmim_jax.evals import accuracy
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.tools import images
from simmim_jax.tools.convert.weights import abstract_model
from simmim_jax.tools.evaluate import __main__ as evaluate
from simmim_jax.tools.evaluate import classification, confusion, results, segmentation

EVALUATE = ("-m", "simmim_jax.tools.evaluate")
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
ENCODER = {"name": "vit", "size": "ti", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
SIZE = (16, 16)
CLASSIFY = {"name": "classify", "num_classes": 7, "fc_norm": True}


def tool(*arguments):
    evaluate.run([str(argument) for argument in arguments])


def error(*arguments, kind=ConfigError) -> str:
    """The message of the command's error."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    return str(caught.value)


def write_images(folder, classes=CLASSES, each=4):
    """PNGs of noise, each in its own color, in a folder for each class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for n in range(each):
            pixels = rng.integers(0, 100, (20, 24, 3), dtype=np.uint8) + rng.integers(0, 156, 3, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")


def write_run(folder, objective, **config):
    """A workdir of a tiny model with random weights, large enough for answers that differ."""
    shaping = {name: value for name, value in objective.items() if name not in ("mask_patch_size", "mask_ratio")}
    _, abstract = abstract_model(ENCODER, shaping, SIZE, PIXELS)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), abstract)
    config = {"encoder": ENCODER, "objective": objective, "image_size": SIZE, **PIXELS, **config}
    checkpoint.write_params(str(folder), params, json.loads(json.dumps(config)), step=7)


def own_data(path, heldout_fraction=0.3):
    divided = {"heldout_fraction": heldout_fraction, "heldout_split": "validation", "split": "train"}
    return {"source": "auto", "path": str(path), "name": "", "data_dir": "", **divided}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, a pretraining run and an encoder, of random weights, and images."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_images(folder / "images")
    write_run(folder / "classifier", CLASSIFY)
    pretraining = {"name": "simmim", "mask_patch_size": 8, "mask_ratio": 0.5}
    write_run(folder / "pretrained", pretraining, data=own_data(folder / "images"), seed=3, eval_images=3)
    write_run(folder / "encoder", {"name": "none"})
    return folder


@pytest.fixture(scope="module")
def evaluated(place):
    """The classifier on all 28 images, seven at a time: (rows of results.csv, folder of files)."""
    tool(place / "classifier", f"--data={place / 'images'}", "--batch-size=7", f"--results={place / 'all.csv'}",
         f"--out={place / 'figures'}", "--mistakes=5", "--crop-fraction=1", "--interpolation=bilinear")  # fmt: skip
    return read_rows(place / "all.csv"), place / "figures"


def read_rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


# --- metrics


@pytest.mark.parametrize("batch_size", [7, 203])
def test_top_k_and_confusion_equal_scikit_learn_for_any_batch_size(batch_size):
    rng, count = np.random.default_rng(2), 203
    logits, labels = rng.normal(size=(count, 7)).astype(np.float32), rng.integers(0, 7, count)
    parts = []
    for start in range(0, count, batch_size):
        rows = np.arange(start, start + batch_size)
        out = {
            "logits": logits[rows % count],
            "label": labels[rows % count],
            "batch_index": rows,
            "valid": rows < count,
        }
        parts.append(accuracy.read_answers(out)[0])
    answers = accuracy.join(parts)
    metrics = accuracy.top(answers, 7)
    for k in (1, 5):
        assert metrics[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, logits, k=k), abs=1e-12)
    expected = confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))
    np.testing.assert_array_equal(confusion.confusion_matrix(answers, 7), expected)
    others = expected - np.diag(np.diag(expected))
    confused, times = confusion.most_confused_with(answers, 8)  # no image has the eighth class
    np.testing.assert_array_equal(confused, [*others.argmax(axis=1), -1])
    np.testing.assert_array_equal(times, [*others.max(axis=1), 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers.confidence, probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(answers.batch_index, np.arange(count))


def test_a_tie_is_an_error_so_that_the_diagonal_counts_the_hits():
    out = {"logits": np.float32([[1, 1, 0], [1, 1, 0], [0, 2, 1]]), "label": np.array([0, 1, 1]),
           "valid": np.ones(3, bool)}  # fmt: skip
    answers, _ = accuracy.read_answers(out)
    matrix = confusion.confusion_matrix(answers, 3)
    assert matrix.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert np.trace(matrix) / 3 == accuracy.top(answers, 3)["top1"]


def test_undefined_numbers_in_the_table_of_classes_are_empty():
    out = {"logits": np.float32([[3, 1, 0], [0, 1, 2], [0, 1, 2]]), "label": np.array([0, 1, 1]),
           "valid": np.ones(3, bool)}  # fmt: skip
    table = confusion.classes_csv(accuracy.read_answers(out)[0], ["a", "b, c", "d\ne"])
    assert table.splitlines() == [
        "class,images,top1,top5,most_confused_with,times", "a,1,100.00,,,0", '"b, c",2,0.00,,d e,2', "d e,0,,,,0"
    ]  # fmt: skip


def test_the_command_equals_the_model_applied_by_hand(place, evaluated):
    (row,), figures = evaluated
    params = jax.tree.map(jnp.asarray, checkpoint.read_params(str(place / "classifier"))[0])
    objective = make_objective(
        encoder=tiny_encoder(width=16, depth=1, num_heads=2), image_size=SIZE, **CLASSIFY, **PIXELS
    )
    labels = np.repeat(np.arange(7), 4)
    files = [place / "images" / CLASSES[label] / f"{n % 4}.png" for n, label in enumerate(labels)]
    # 20 x 24 pixels become 16 x 19, of which the middle 16 x 16 are kept
    left = round((19 - 16) / 2) * 24 / 19
    box = (left, 0, left + 16 * 24 / 19, 20)
    crops = [np.asarray(Image.open(file).resize(SIZE, Image.Resampling.BILINEAR, box=box)) for file in files]
    logits = np.asarray(jax.jit(objective.predict)(params, {"image": np.stack(crops)}, jax.random.key(0))["logits"])
    top1, top5 = (100 * top_k_accuracy_score(labels, logits, k=k) for k in (1, 5))
    assert 0 < top1 < top5 < 100
    count = sum(x.size for x in jax.tree.leaves(params))
    expected = {"top1": f"{top1:.3f}", "top1_err": f"{100 - top1:.3f}", "top5": f"{top5:.3f}", "model": "vit",
                "img_size": "16", "param_count": f"{count / 1e6:.2f}", "crop_pct": "1", "step": "7", "images": "28",
                "interpolation": "bilinear", "run": str(place / "classifier"),
                "data": f"{place / 'images'}, all (28 images)"}  # fmt: skip
    assert expected.items() <= row.items()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])
    assert row["version"]
    matrix = confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))
    written = list(csv.reader((figures / "confusion.csv").open()))
    assert written[0] == ["class", *CLASSES]
    assert [[int(x) for x in line[1:]] for line in written[1:]] == matrix.tolist()
    by_class = read_rows(figures / "classes.csv")
    assert [(row["class"], row["images"]) for row in by_class] == [(name, "4") for name in CLASSES]
    assert sum(float(row["top1"]) for row in by_class) / 7 == pytest.approx(top1, abs=0.01)


def test_batch_size_changes_nothing_and_existing_files_need_overwrite(place, evaluated, tmp_path, monkeypatch, capsys):
    (first,), figures = evaluated
    out = shutil.copytree(figures, tmp_path / "out")
    monkeypatch.setattr(confusion, "MAX_CLASSES", 6)
    again = (place / "classifier", f"--data={place / 'images'}", "--batch_size=64", f"--results={tmp_path / 'all.csv'}",
             "--crop-fraction=1", "--interpolation=bilinear", f"--out={out}", "--mistakes=0")  # fmt: skip
    assert "--overwrite" in error(*again)
    tool(*again, "--overwrite")
    assert [path.name for path in out.iterdir()] == ["classes.csv"]  # no matrix of more than MOST classes
    assert (out / "classes.csv").read_text() == (figures / "classes.csv").read_text()
    assert [row | {"date": ""} for row in read_rows(tmp_path / "all.csv")] == [first | {"date": ""}]
    (out / "confusion.png").write_text("a file of somebody else")
    assert "confusion.png" in error(*again, "--overwrite")
    assert (out / "confusion.png").read_text() == "a file of somebody else"


@pytest.mark.slow
def test_eight_devices_and_one_give_the_same_files(place, tmp_path):
    for devices, batch_size in ((1, 64), (8, 7)):
        done = run(place / "classifier", f"--data={place / 'images'}", f"--batch-size={batch_size}",
                   f"--results={tmp_path / 'results.csv'}", f"--out={tmp_path / str(devices)}",
                   script=EVALUATE, devices=devices)  # fmt: skip
        assert done.returncode == 0, done.stderr
    first, second = read_rows(tmp_path / "results.csv")
    assert first | {"date": ""} == second | {"date": ""}
    for name in ("confusion.csv", "classes.csv"):
        assert (tmp_path / "1" / name).read_text() == (tmp_path / "8" / name).read_text()


# --- pictures


def test_the_sheet_of_mistakes_begins_with_those_of_highest_confidence(evaluated):
    _, figures = evaluated
    assert Image.open(figures / "mistakes.png").text["Software"] == "simmim_jax"
    rng, mistakes = np.random.default_rng(0), confusion.Mistakes(3)
    for start in (0, 4):
        confidence = np.array([0.3, 0.9, 0.5, 0.8]) + start / 100
        answers = accuracy.Answers(np.arange(start, start + 4), np.zeros(4, int), np.array([1, 0, 2, 3]),
                                   np.array([1, 0, 2, 3]), confidence)  # fmt: skip
        mistakes.add(rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8), answers)
    assert [(m.batch_index, m.predicted) for m in mistakes.kept] == [(7, 3), (3, 3), (6, 2)]
    assert all(m.image.base is None for m in mistakes.kept)  # a view would hold its whole batch
    assert confusion.draw_mistakes(mistakes.kept, ["a", "b", "c", "d"]).shape[2] == 3


@pytest.mark.parametrize("classes", [2, 41])
def test_the_confusion_picture_is_blue_on_the_diagonal_and_red_elsewhere(classes):
    matrix = np.diag(np.full(classes, 9))
    matrix[0, 1] = 9
    names = [f"class {n}" for n in range(classes)]
    red, green, blue = np.moveaxis(confusion.draw_confusion(matrix, names).astype(int), -1, 0)
    diagonal = ((blue > red + 60) & (blue > green + 60)).any(axis=0)
    cell = 34 if classes <= 40 else 1000 / classes
    assert abs(diagonal.sum() - classes * cell) <= cell  # all of the diagonal, less its numbers
    left, cell = int(diagonal.argmax()), int(cell)
    wrong = (red > blue + 60) & (red > green + 60)
    assert wrong[:, left + cell : left + 2 * cell].sum() > cell**2 / 2
    (line,) = confusion.most_confused_pairs(matrix, names, 3)
    assert line.startswith("9 ")


# --- results.csv

ROW = dict.fromkeys(results.COLUMNS, "1")


def test_rows_that_are_appended_at_once_stay_whole(tmp_path):
    path = tmp_path / "results.csv"

    def add(name):
        for n in range(20):
            results.append_row(path, ROW | {"run": f"{name} {n} " + "x" * 3000, "data": 'a, "quoted"\nname'})

    threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(path.read_text().splitlines()) == 81
    rows = read_rows(path)
    assert {row["run"].rsplit(" ", 1)[0] for row in rows} == {f"{name} {n}" for name in "abcd" for n in range(20)}
    assert {row["data"] for row in rows} == {'a, "quoted" name'}
    assert rows[0].keys() == ROW.keys()
    assert tuple(rows[0])[:9] == results.TIMM_COLUMNS


def test_a_file_with_other_columns_stays_as_it_is(place, tmp_path):
    other = tmp_path / "other.csv"
    for content in ("model,top1\nvit,80\n", ",".join(results.TIMM_COLUMNS) + "\n", "\0\xff"):
        other.write_text(content, encoding="latin-1")
        assert "has not written it" in error(place / "classifier", f"--data={place / 'images'}", f"--results={other}")
        assert other.read_text(encoding="latin-1") == content


def test_a_row_begins_a_line_after_one_that_was_cut_off_and_is_removed_if_it_does_not_reach_the_disk(
    tmp_path, monkeypatch
):
    path = tmp_path / "new" / "results.csv"
    results.append_row(path, ROW)
    whole = path.read_text()
    path.write_text(whole + "vit,2")
    results.append_row(path, ROW)
    after = path.read_text()
    assert after == whole + "vit,2\n" + whole.splitlines()[1] + "\n"

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match="No space left on device"):
        results.append_row(path, ROW)
    assert path.read_text() == after


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_changes_no_file(place, tmp_path):
    path = tmp_path / "results.csv"
    results.append_row(path, ROW | {"data": "x" * 900})
    before = path.read_text()
    for where in (f"--results={path}", f"--out={tmp_path / 'figures'}"):
        done = run(
            place / "classifier", f"--data={place / 'images'}", "--results=", where, script=EVALUATE, file_limit=1
        )
        assert done.returncode == 3, done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith("ERROR[data]")
    assert path.read_text() == before
    assert not [path for path in (tmp_path / "figures").iterdir() if "partial" in path.name]


# --- which images are evaluated


def test_classes_that_do_not_fit_the_head_are_refused_and_other_names_are_warned_of(place, tmp_path, capsys):
    write_run(tmp_path / "run", CLASSIFY, data=own_data(place / "images"))
    model = load_run(str(tmp_path / "run"))

    class Source(list):
        def __init__(self, classes, label=0):
            super().__init__([{"label": label}])
            self.classes, self.describe = classes, lambda: "these images"

    for source, message in (
        (Source(CLASSES[:5]), "7 classes, .* 5"), (Source(CLASSES, -1), "without labels"),
        (Source((), -1), "without labels"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=message):
            classification.check_classes(model, source, compare_names=False)
    classification.check_classes(model, Source(CLASSES), compare_names=True)
    assert not capsys.readouterr().err
    classification.check_classes(model, Source((*CLASSES[:6], "hen")), compare_names=True)
    assert re.search(r"warning: class 6 .*gnu.*hen", capsys.readouterr().err)


def test_images_of_some_of_the_classes_are_matched_by_name(place, tmp_path, capsys):
    write_run(tmp_path / "run", CLASSIFY, classes=CLASSES)
    known = tuple(CLASSES)
    for names in (["gnu"], CLASSES, CLASSES[4:1:-1]):
        folder = tmp_path / "-".join(names)
        for name in names:
            shutil.copytree(place / "images" / name, folder / name)
        (tmp_path / "list.txt").write_text(
            "".join(f"{folder.name}/{name}/{n}.png\t{name}\n" for name in names for n in range(4))
        )
        source = images.match_classes(known, make_source("auto", path=f"{tmp_path}/list.txt", heldout_fraction=0.0))
        assert source.classes == known
        for i in range(len(source)):
            assert known[source[i]["label"]] == source.name(i).split("/")[1]
    tool(tmp_path / "run", f"--data={tmp_path / 'list.txt'}", "--batch-size=8", f"--results={tmp_path / 'some.csv'}")
    assert "3 of the run's 7 classes" in capsys.readouterr().out
    assert read_rows(tmp_path / "some.csv")[0]["images"] == "12"
    write_images(tmp_path / "others", classes=["ant", "zebra"])
    other = make_source("auto", path=str(tmp_path / "others"), heldout_fraction=0.0)
    assert images.match_classes(known, other) is other


def test_order_of_numbered_folders_is_named_if_the_head_has_no_names(place, tmp_path, capsys):
    model = load_run(str(place / "classifier"))
    for names, warned in ((range(5, 12), True), (range(7), False), ("abcdefg", False)):
        write_images(tmp_path / str(names), classes=map(str, names), each=1)
        source = make_source("auto", path=str(tmp_path / str(names)), heldout_fraction=0.0)
        classification.check_classes(model._replace(config=model.config | {"classes": []}), source, compare_names=True)
        assert ("by their numbers (5, 6, 7, 8, ...)" in capsys.readouterr().err) == warned


def test_accuracy_over_classes_without_training_images_says_so(place, tmp_path, capsys):
    write_run(tmp_path / "run", CLASSIFY, data=own_data(place / "images"), classes=CLASSES, untrained_classes=["gnu"])
    tool(tmp_path / "run", "--split=train", "--batch-size=8", f"--results={tmp_path / 'r.csv'}")
    assert re.search(r"of 21 images \(\d of them of classes without training images: gnu\)", capsys.readouterr().out)
    assert "training images: gnu" in read_rows(tmp_path / "r.csv")[0]["data"]


def test_unreadable_images_are_left_out_up_to_a_fraction(place, tmp_path, capsys):
    write_images(tmp_path, each=2)
    (tmp_path / "ant" / "0.png").write_bytes(b"no image")
    for name in ("classifier", "pretrained"):
        arguments = (place / name, f"--data={tmp_path}", "--results=", "--batch-size=8")
        assert "1 of 14 images" in error(*arguments, "--max-bad-fraction=0", kind=DataError)
        capsys.readouterr()
        tool(*arguments)  # a hundredth, rounded up
        assert "of 13 images, 1 left out" in capsys.readouterr().out


def test_a_run_whose_images_were_moved_is_evaluated_on_its_held_out_images(place, tmp_path, capsys):
    folder = shutil.copytree(place / "images", tmp_path / "images")
    write_run(tmp_path / "run", CLASSIFY, data=own_data(folder), classes=CLASSES)
    model = load_run(str(tmp_path / "run"))
    parts = {"source": "train", "heldout": "validation"}
    keep_fingerprints(tmp_path / "run", **{name: images.open_source(model, "", split) for name, split in parts.items()})

    def heldout(path):
        path = path and str(path)
        followed = images.follow_images(model, path)
        source, description = classification.open_images(followed, Namespace(data=path, split=""))
        return [source.name(i) for i in range(len(source))], description, capsys.readouterr().err

    own, description, warning = heldout("")
    assert 0 < len(own) < 28
    assert not warning
    moved = folder.rename(tmp_path / "moved")
    assert heldout(moved) == (own, description.replace(str(folder), str(moved)), "")
    shutil.copytree(moved, folder)
    (folder / own[0]).unlink()
    assert "not the images that the run held out" in heldout("")[2]
    for name in own:
        (moved / name).unlink()
    with pytest.raises(DataError, match="trained on all"):
        heldout(moved)


def test_images_of_the_training_part_are_found_in_any_part_of_other_data(place, tmp_path, capsys):
    model = load_run(str(place / "pretrained"))
    shutil.copytree(place / "images", tmp_path / "val")
    write_images(tmp_path / "new" / "val", ("x", "y"))
    part, new = place / "images" / "ant", tmp_path / "new"
    for path, split, seen in ((tmp_path, "", True), (tmp_path, "val", True), (part, "", True), (new, "", False)):
        classification.open_images(model, Namespace(data=str(path), split=split))
        assert ("trained on some" in capsys.readouterr().err) == seen


def test_training_images_are_evaluated_only_if_asked_for(tmp_path):
    model, folder = Run({}, {}, None, tmp_path, SIZE), tmp_path / "data"

    def heldout(split=""):
        return classification.open_images(model, Namespace(data=str(folder), split=split))

    write_images(folder, CLASSES[:2], each=2)
    assert heldout()[1] == f"{folder}, all (4 images)"
    assert heldout("train")[1] == f"{folder}, split train (4 images)"
    with pytest.raises(DataError, match="--split"):
        heldout("val")
    write_images(folder / "train", CLASSES[:2], each=1)
    for name in CLASSES[:2]:
        shutil.rmtree(folder / name)
    with pytest.raises(DataError, match="--split=train"):
        heldout()
    assert len(heldout("train")[0]) == 2
    (folder / "val").mkdir()
    with pytest.raises(DataError, match="val has 0 images"):
        heldout()
    write_images(folder / "val", CLASSES[:2], each=2)
    assert heldout()[1] == f"{folder / 'val'}, split validation (4 images)"


def test_a_run_that_held_nothing_out_asks_for_other_images(place):
    model = Run({}, {"data": own_data(place / "images", 0.0)}, None, place, SIZE)
    with pytest.raises(DataError, match="--data"):
        classification.open_images(model, Namespace(data="", split=""))


def test_images_with_label_maps_are_found_by_the_same_rule(tmp_path, capsys):
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for n in range(3):
            Image.new("L", (8, 8)).save(tmp_path / "data" / kind / f"{n}.png")
    write_run(tmp_path / "run", {"name": "none"}, data=own_data(tmp_path / "data"))
    model = load_run(str(tmp_path / "run"))

    def heldout(path="", split=""):
        return segmentation.open_pairs(model, Namespace(data=path, split=split))

    shutil.copytree(tmp_path / "data", tmp_path / "other")
    with pytest.raises(DataError, match="--split"):
        heldout(str(tmp_path / "other"), "val")
    keep_fingerprints(tmp_path / "run", heldout=heldout())
    heldout()
    assert not capsys.readouterr().err
    Image.effect_noise((9, 9), 50).save(tmp_path / "data" / "images" / heldout().name(0))
    heldout()
    assert "not the images that the run held out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parts"), [("images-0.tar", False), ("train-0.tar", True), ("data/train_0.parquet", True)]
)
def test_training_shards_are_recognized_by_their_names(tmp_path, name, parts):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert images.has_parts(str(tmp_path)) == parts
    assert images.has_parts(str((tmp_path / name).with_stem("*"))) == parts
    assert not images.has_parts(str(tmp_path / name))  # given by name


def test_names_that_are_not_utf8_are_escaped(place, tmp_path):
    folder = tmp_path / "caf\udce9"
    write_images(folder, (*CLASSES[:6], "g\udcffu"), each=2)
    tool(place / "classifier", f"--data={folder}", f"--results={tmp_path / 'all.csv'}", f"--out={tmp_path / 'out'}")
    (row,) = read_rows(tmp_path / "all.csv")
    assert row["data"] == f"{tmp_path}/caf\\xe9, all (14 images)"
    assert [row["class"] for row in read_rows(tmp_path / "out" / "classes.csv")] == [*CLASSES[:6], "g\\xffu"]


# --- pretraining runs


def test_a_pretraining_run_gets_its_masked_loss_and_a_picture_but_no_row(place, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tool(place / "pretrained", "--batch-size=8", "--out=figures")
    assert re.search(r"masked_loss \d\.\d{4} of 3 images", capsys.readouterr().out)  # its own eval_images
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["figures/reconstruction_7.png"]
    assert "--overwrite" in error(place / "pretrained", "--batch-size=8", "--out=figures")


@pytest.mark.slow
def test_the_loss_of_a_pretraining_run_equals_its_own_evaluation(tmp_path):
    done = run(*DIGITS, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["masked_loss"]
    done = run(tmp_path / "run", "--batch-size=50", "--results=", script=EVALUATE)
    assert done.returncode == 0, done.stderr
    assert f"masked_loss {measured:.4f} of 128 images" in done.stdout


# --- errors


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (("encoder", "--data=images"), CheckpointError, "without a head"),
        (("nowhere",), CheckpointError, "nowhere"),
        (("images",), CheckpointError, "no checkpoint"),
        (("classifier",), DataError, "classifier"),
        (("classifier", "--data=imges"), DataError, "did you mean"),
        (("classifier", "--data=images", "--image-size=15"), ConfigError, "multiples of 8"),
        (("classifier", "--data=images", "--interpolation=cubic"), ConfigError, "cubic"),
        (("classifier", "--data=images", "--results=images/ant/0.png/new/results.csv"), ConfigError, "0.png"),
        (("classifier", "--data=images", "--results=images"), ConfigError, "a folder"),
        (("classifier", "--data=images", "--results=", "--out=images/ant/0.png"), ConfigError, "0.png"),
        (("classifier", "--data=tfds:nothing_of_this_name", "--results="), UserError, "nothing_of_this_name"),
        ((), ConfigError, "RUN"),
        (("run", "--crop-fraction=1.5"), ConfigError, "--crop-fraction"),
    ],
)
def test_an_error_is_one_line_and_writes_nothing(place, monkeypatch, arguments, kind, message):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    line = error(*arguments, kind=kind)
    assert message in line
    assert "\n" not in line
    assert sorted(place.iterdir()) == before
