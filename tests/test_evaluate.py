"""Evaluation alone: what is counted, what becomes of results.csv, what the files show, and mistakes in one line."""

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

from simmim_jax.errors import CheckpointError, ConfigError, DataError, UserError
from simmim_jax.evals import accuracy, confusion
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint, finished
from simmim_jax.tools.convert.weights import abstract_model
from simmim_jax.tools.evaluate import __main__ as evaluate
from simmim_jax.tools.evaluate import segments
from simmim_jax.tools.images import has_parts

EVALUATE = ("-m", "simmim_jax.tools.evaluate")
CLASSES = ("ant", "bee", "cat", "dog", "eel", "fox", "gnu")
PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
ENCODER = {"name": "vit", "size": "ti", "width": 16, "depth": 1, "num_heads": 2, "patch_size": 8}
SIZE = (16, 16)


def tool(*arguments):
    """The tool in this process."""
    evaluate.run([str(argument) for argument in arguments])


def told(*arguments, kind=ConfigError) -> str:
    """The one line of the tool's error."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_images(folder, classes=CLASSES, each=4):
    """PNGs of noise in a color of their own, in a folder for each class."""
    rng = np.random.default_rng(0)
    for name in classes:
        (folder / name).mkdir(parents=True)
        for n in range(each):
            pixels = rng.integers(0, 100, (20, 24, 3), dtype=np.uint8) + rng.integers(0, 156, 3, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{n}.png")


def write_workdir(folder, objective, **config):
    """A workdir of a tiny model with random weights, large enough for answers that differ; its parameters."""
    shaping = {name: value for name, value in objective.items() if name not in ("mask_patch_size", "ratio")}
    _, abstract = abstract_model(ENCODER, shaping, SIZE, PIXELS)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), abstract)
    told = {"encoder": ENCODER, "objective": objective, "image_size": SIZE, **PIXELS, **config}
    checkpoint.write_params(str(folder), params, json.loads(json.dumps(told)), step=7)
    return params


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a classifier, a pretraining run and an encoder alone, of random weights, and images."""
    folder = tmp_path_factory.mktemp("evaluate")
    write_images(folder / "images")
    data = {"source": "auto", "path": str(folder / "images"), "name": "", "data_dir": "", "heldout_fraction": 0.3,
            "heldout_split": "validation", "split": "train"}  # fmt: skip
    write_workdir(folder / "classifier", {"name": "classify", "num_classes": 7, "fc_norm": True})
    write_workdir(
        folder / "pretrained",
        {"name": "simmim", "mask_patch_size": 8, "mask_ratio": 0.5},
        data=data,
        seed=3,
        eval_images=3,
    )
    write_workdir(folder / "encoder", {"name": "none"})
    return folder


@pytest.fixture(scope="module")
def evaluated(place):
    """The classifier on all images, twenty-eight of them, seven at a time: (rows of results.csv, folder of files)."""
    tool(place / "classifier", f"--data={place / 'images'}", "--batch-size=7", f"--results={place / 'all.csv'}",
         f"--out={place / 'figures'}", "--mistakes=5", "--crop-fraction=1", "--interpolation=bilinear")  # fmt: skip
    return rows_of(place / "all.csv"), place / "figures"


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def random_answers(count=203, classes=7, batch=203):
    """(answers to random logits in batches of this size, logits, labels)."""
    rng = np.random.default_rng(2)
    logits, labels = rng.normal(size=(count, classes)).astype(np.float32), rng.integers(0, classes, count)
    parts = []
    for start in range(0, count, batch):
        missing = max(0, start + batch - count)
        part = slice(start, start + batch)
        out = {"logits": np.pad(logits[part], ((0, missing), (0, 0))), "label": np.pad(labels[part], (0, missing))}
        out |= {"batch_index": np.arange(start, start + batch), "valid": np.arange(batch) < batch - missing}
        parts.append(accuracy.answers_of(out)[0])
    return accuracy.join(parts), logits, labels


@pytest.mark.parametrize("batch", [1, 7, 64, 203])
def test_top_k_and_confusion_are_those_of_scikit_learn_for_any_batch_size(batch):
    answers, logits, labels = random_answers(batch=batch)
    metrics = accuracy.top(answers, 7)
    for k in (1, 5):
        assert metrics[f"top{k}"] == pytest.approx(top_k_accuracy_score(labels, logits, k=k), abs=1e-12)
    expected = confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))
    np.testing.assert_array_equal(confusion.confusion_matrix(answers, 7), expected)
    others = expected - np.diag(np.diag(expected))
    confused, times = confusion.confused_with(answers, 8)  # of the eighth class there is no image
    np.testing.assert_array_equal(confused, [*others.argmax(axis=1), -1])
    np.testing.assert_array_equal(times, [*others.max(axis=1), 0])
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(answers.confidence, probabilities.max(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(answers.batch_index, np.arange(203))


def test_a_class_that_only_ties_with_another_is_taken_for_the_other_so_that_the_diagonal_counts_the_hits():
    out = {"logits": np.float32([[1, 1, 0], [1, 1, 0], [0, 2, 1]]), "label": np.array([0, 1, 1]),
           "valid": np.ones(3, bool)}  # fmt: skip
    answers, _ = accuracy.answers_of(out)
    matrix = confusion.confusion_matrix(answers, 3)
    assert matrix.tolist() == [[0, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert np.trace(matrix) / 3 == accuracy.top(answers, 3)["top1"]


def test_the_table_of_classes_leaves_empty_what_cannot_be_said():
    out = {"logits": np.float32([[3, 1, 0], [0, 1, 2], [0, 1, 2]]), "label": np.array([0, 1, 1]),
           "valid": np.ones(3, bool)}  # fmt: skip
    answers, _ = accuracy.answers_of(out)
    table = confusion.classes_csv(answers, ["a", "b, c", "d\ne"])
    assert table.splitlines() == [
        "class,images,top1,top5,most_confused_with,times", "a,1,100.00,,,0", '"b, c",2,0.00,,d e,2', "d e,0,,,,0"
    ]  # fmt: skip


def test_the_tool_gives_what_the_model_says_of_each_image(place, evaluated):
    rows, figures = evaluated
    params = jax.tree.map(jnp.asarray, checkpoint.read_params(str(place / "classifier"))[0])
    objective = make_objective(
        "classify", tiny_encoder(width=16, depth=1, num_heads=2), image_size=SIZE, num_classes=7, fc_norm=True, **PIXELS
    )
    labels = np.repeat(np.arange(7), 4)
    files = [place / "images" / CLASSES[label] / f"{n % 4}.png" for n, label in enumerate(labels)]
    # 20 x 24 pixels become 16 x 19, of which the middle 16 x 16 are kept
    crops = [Image.open(file).resize((16, 16), Image.Resampling.BILINEAR, box=box_of((20, 24), (16, 19), 16))
             for file in files]  # fmt: skip
    batch = {"image": jnp.asarray(np.stack([np.asarray(crop) for crop in crops]))}
    logits = np.asarray(jax.jit(objective.predict)(params, batch, jax.random.key(0))["logits"])

    (row,) = rows
    top1, top5 = (100 * top_k_accuracy_score(labels, logits, k=k) for k in (1, 5))
    assert 0 < top1 < top5 < 100
    assert (row["top1"], row["top5"]) == (f"{top1:.3f}", f"{top5:.3f}")
    assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
    matrix = confusion_matrix(labels, logits.argmax(axis=1), labels=range(7))
    written = list(csv.reader((figures / "confusion.csv").open()))
    assert written[0] == ["class", *CLASSES]
    assert [[int(x) for x in line[1:]] for line in written[1:]] == matrix.tolist()
    by_class = rows_of(figures / "classes.csv")
    assert [row["class"] for row in by_class] == list(CLASSES)
    assert {row["images"] for row in by_class} == {"4"}
    assert sum(float(row["top1"]) for row in by_class) / 7 == pytest.approx(top1, abs=0.01)


def box_of(size, resized, kept):
    """(left, upper, right, lower) in the image of `size` of the middle `kept` pixels of it `resized`, sides h and w."""
    left = round((resized[1] - kept) / 2)
    scale = size[1] / resized[1]
    return left * scale, 0, (left + kept) * scale, size[0]


def test_a_row_has_the_columns_of_timm_and_then_ours(place, evaluated):
    (row,), _ = evaluated
    header = (place / "all.csv").read_text().splitlines()[0]
    assert header.startswith("model,img_size,top1,top1_err,top5,top5_err,param_count,crop_pct,interpolation,images,")
    count = sum(x.size for x in jax.tree.leaves(checkpoint.read_params(str(place / "classifier"))[0]))
    told = {"model": "vit", "img_size": "16", "param_count": f"{count / 1e6:.2f}", "crop_pct": "1", "step": "7",
            "interpolation": "bilinear", "images": "28", "run": str(place / "classifier")}  # fmt: skip
    assert told.items() <= row.items()
    assert row["data"] == f"{place / 'images'}, all (28 images)"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", row["date"])
    assert row["version"]


def test_another_batch_size_and_a_second_evaluation_add_the_same_row_and_many_classes_have_no_matrix(
    place, evaluated, tmp_path, monkeypatch, capsys
):
    (first,), figures = evaluated
    monkeypatch.setattr(confusion, "MOST", 6)
    (tmp_path / "confusion.png").write_text("of an earlier evaluation")
    tool(place / "classifier", f"--data={place / 'images'}", "--batch_size=64", f"--results={place / 'all.csv'}",
         "--crop-fraction=1", "--interpolation=bilinear", f"--out={tmp_path}", "--mistakes=0")  # fmt: skip
    rows = rows_of(place / "all.csv")
    assert [path.name for path in tmp_path.iterdir()] == ["classes.csv"]
    assert (tmp_path / "classes.csv").read_text() == (figures / "classes.csv").read_text()
    assert len(rows) == 2
    assert rows[1] | {"date": ""} == first | {"date": ""}
    top1, top5 = float(first["top1"]), float(first["top5"])
    assert f"top-1 {top1:.2f} %  top-5 {top5:.2f} %  of 28 images" in capsys.readouterr().out


def test_the_sheet_of_mistakes_has_the_surest_of_them_first(evaluated):
    _, figures = evaluated
    sheet = Image.open(figures / "mistakes.png")
    assert sheet.width > 4 * sheet.height / 2  # five in a row
    rng, mistakes = np.random.default_rng(0), confusion.Mistakes(3)
    for start in (0, 4):
        confidence = np.array([0.3, 0.9, 0.5, 0.8]) + start / 100
        answers = accuracy.Answers(np.arange(start, start + 4), np.zeros(4, int), np.array([1, 0, 2, 3]),
                                   np.array([1, 0, 2, 3]), confidence)  # fmt: skip
        mistakes.see(rng.integers(0, 256, (4, 8, 8, 1), dtype=np.uint8), answers)
    assert [(m.batch_index, m.predicted) for m in mistakes.kept] == [(7, 3), (3, 3), (6, 2)]
    assert all(m.image.base is None for m in mistakes.kept)  # not a part of its whole batch
    assert confusion.draw_mistakes(mistakes.kept, ["a", "b", "c", "d"]).shape[2] == 3


@pytest.mark.parametrize("classes", [2, 7, 40, 41, 300])
def test_a_picture_of_the_matrix_is_blue_where_it_is_right_and_red_where_it_is_wrong(classes):
    matrix = np.diag(np.full(classes, 9))
    matrix[0, 1] = 9
    names = [f"class {n}" for n in range(classes)]
    pixels = confusion.draw_confusion(matrix, names).astype(int)
    red, green, blue = np.moveaxis(pixels, -1, 0)
    side = int(((blue > red + 60) & (blue > green + 60)).any(axis=0).sum())
    cell = 34 if classes <= 40 else max(2, 1000 // classes)
    assert abs(side - classes * cell) <= cell  # all of the diagonal, less its numbers
    left = int(((blue > red + 60) & (blue > green + 60)).any(axis=0).argmax())
    wrong = (red > blue + 60) & (red > green + 60)
    assert wrong[:, left + cell : left + 2 * cell].sum() > cell**2 / 2
    assert "9 x" in confusion.most_confused(matrix, names, 3)[0]
    assert len(confusion.most_confused(matrix, names, 3)) == 1


ROW = dict.fromkeys(evaluate.COLUMNS, "1")


def test_rows_that_are_added_at_once_stand_one_below_the_other(tmp_path):
    path = tmp_path / "results.csv"

    def add(name):
        for n in range(40):
            evaluate.append_row(path, ROW | {"run": f"{name} {n} " + "x" * 3000, "data": 'a, "quoted"\nname'})

    threads = [threading.Thread(target=add, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = path.read_text().splitlines()
    assert len(lines) == 161
    rows = rows_of(path)
    assert {row["run"].rsplit(" ", 1)[0] for row in rows} == {f"{name} {n}" for name in "abcd" for n in range(40)}
    assert {row["data"] for row in rows} == {'a, "quoted" name'}


def test_a_file_with_other_columns_is_left_as_it_is(place, tmp_path):
    other = tmp_path / "other.csv"
    for content in ("model,top1\nvit,80\n", ",".join(evaluate.TIMMS) + "\n", "\0\xff"):
        other.write_text(content, encoding="latin-1")
        line = told(place / "classifier", f"--data={place / 'images'}", f"--results={other}")
        assert "a file with other columns" in line
        assert other.read_text(encoding="latin-1") == content


def test_a_last_line_that_was_cut_off_does_not_take_the_next_row_with_it(tmp_path):
    path = tmp_path / "new" / "results.csv"
    evaluate.check_results(path)
    assert not path.parent.exists()
    evaluate.append_row(path, ROW)
    whole = path.read_text()
    path.write_text(whole + "vit,2")
    evaluate.append_row(path, ROW)
    assert path.read_text() == whole + "vit,2\n" + whole.splitlines()[1] + "\n"


def test_a_row_that_does_not_reach_the_disk_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / "results.csv"
    evaluate.append_row(path, ROW)
    before = path.read_text()

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(DataError, match=r"no row was added: No space left on device - .*results\.csv - make room"):
        evaluate.append_row(path, ROW)
    assert path.read_text() == before


def test_classes_that_differ_are_told_and_other_names_are_warned_of(place, tmp_path, capsys):
    write_images(tmp_path / "five", CLASSES[:5], each=1)
    assert "the head knows 7 classes, the images have 5" in told(
        place / "classifier", f"--data={tmp_path / 'five'}", "--results=", kind=DataError
    )
    write_images(tmp_path / "other", (*CLASSES[:6], "hen"), each=1)
    own = {"source": "auto", "path": str(place / "images"), "name": "", "data_dir": "", "heldout_fraction": 0.3}
    write_workdir(tmp_path / "run", {"name": "classify", "num_classes": 7, "fc_norm": True}, data=own)
    tool(tmp_path / "run", f"--data={tmp_path / 'other'}", "--results=")
    assert "warning: class 6 is 'gnu' in the run and 'hen' in" in capsys.readouterr().err
    tool(tmp_path / "run", "--results=")
    out = capsys.readouterr()
    assert "warning" not in out.err
    assert int(re.search(r"of (\d+) images", out.out)[1]) < 28  # the held-out part of its own


def test_images_without_classes_and_broken_ones_are_told(place, tmp_path, capsys):
    for name in "ab":
        Image.new("RGB", (16, 16)).save(tmp_path / f"{name}.png")
    line = told(place / "classifier", f"--data={tmp_path}", "--results=", kind=DataError)
    assert "images without classes" in line
    write_images(tmp_path / "broken", each=2)
    (tmp_path / "broken" / "ant" / "0.png").write_bytes(b"no image")
    broken = f"--data={tmp_path / 'broken'}"
    line = told(place / "classifier", broken, "--results=", "--max-bad-fraction=0", kind=DataError)
    assert "1 of 14 images cannot be read or have no class" in line
    tool(place / "classifier", broken, "--results=")  # of a hundredth, rounded up, as in the run's own evaluation
    line = told(place / "pretrained", broken, "--max-bad-fraction=0", kind=DataError)
    assert "1 of 14 images cannot be read" in line
    capsys.readouterr()
    tool(place / "pretrained", broken)
    assert "of 13 images, 1 left out" in capsys.readouterr().out


def test_images_with_names_of_classes_and_without_labels_are_told_at_once():
    class Unlabeled(list):
        classes, describe = CLASSES, staticmethod(lambda: "a test set")

    model = finished.Run({}, {"objective": {"num_classes": 7}}, None, None, SIZE)
    with pytest.raises(DataError, match=r"images without labels, .* - a test set - give images that have one"):
        evaluate.check_classes(model, Unlabeled([{"label": -1}]), compare_names=False)


def test_a_run_whose_images_were_moved_is_evaluated_on_what_it_held_out(place, tmp_path, capsys):
    images = shutil.copytree(place / "images", tmp_path / "images")
    own = {"source": "auto", "path": str(images), "name": "", "data_dir": "", "heldout_fraction": 0.3,
           "split": "train", "heldout_split": "validation"}  # fmt: skip
    write_workdir(tmp_path / "run", {"name": "classify", "num_classes": 7, "fc_norm": True}, data=own, classes=CLASSES)
    model = finished.load_run(str(tmp_path / "run"))
    parts = {name: finished.open_source(model, "", split) for name, split in
             (("source", "train"), ("heldout", "validation"))}  # fmt: skip
    keep_fingerprints(tmp_path / "run", **parts)

    def heldout(path):
        options = Namespace(data=path and str(path), split="")
        source, told = evaluate.open_images(evaluate.with_images(model, options.data), options)
        return [source.name(i) for i in range(len(source))], told, capsys.readouterr()

    mine, told_mine, said = heldout("")
    assert (len(mine), said) == (len(parts["heldout"]), ("", ""))
    moved = images.rename(tmp_path / "moved")
    again, told_again, said = heldout(moved)
    assert again == mine
    assert told_again == told_mine.replace(str(images), str(moved))
    assert said == (f"{moved}: the images of the run, in another place; of them the part that it held out\n", "")

    part = shutil.copytree(moved, tmp_path / "part")
    shutil.rmtree(part / "ant")
    write_images(part, ("ant",), each=1)
    names, _, said = heldout(part)
    assert len(names) == 25
    assert re.search(
        r"warning: whether the run was trained on some .* cannot be known: its own, '.*/images', ", said.err
    )
    shutil.copytree(moved, images)
    assert "warning: the run was trained on some of these images, like " in heldout(part)[2].err
    (images / mine[0]).unlink()
    assert "warning: " in heldout("")[2].err
    for name in mine:
        (moved / name).unlink()
    with pytest.raises(DataError, match=r"all of these images the run was trained on - .* - give --split=train"):
        heldout(moved)


def test_names_of_bytes_that_are_no_utf8_are_written_as_escapes(place, tmp_path):
    images = tmp_path / "caf\udce9"
    write_images(images, (*CLASSES[:6], "g\udcffu"), each=2)
    tool(place / "classifier", f"--data={images}", f"--results={tmp_path / 'all.csv'}", f"--out={tmp_path / 'out'}")
    (row,) = rows_of(tmp_path / "all.csv")
    assert row["data"] == f"{tmp_path}/caf\\xe9, all (14 images)"
    assert [row["class"] for row in rows_of(tmp_path / "out" / "classes.csv")] == [*CLASSES[:6], "g\\xffu"]


def test_images_to_train_on_are_not_evaluated_on_unasked(tmp_path):
    model = finished.Run({}, {}, None, tmp_path, SIZE)
    data = tmp_path / "data"

    def heldout(split=""):
        return evaluate.open_images(model, Namespace(data=str(data), split=split))

    write_images(data, CLASSES[:2], each=2)
    assert heldout()[1] == f"{data}, all (4 images)"
    with pytest.raises(DataError, match=r"has 0 of its 4 .* in split 'val' - nothing is held out .* leave --split out"):
        heldout("val")
    assert heldout("train")[1] == f"{data}, split train (4 images)"
    write_images(data / "train", CLASSES[:2], each=1)
    for name in CLASSES[:2]:
        shutil.rmtree(data / name)
    with pytest.raises(DataError, match=r"images to train on, and none to evaluate on - .*give --split=train"):
        heldout()
    assert len(heldout("train")[0]) == 2
    with pytest.raises(DataError, match=r"has 0 of its 2 .* in split 'val' - .* give --split=train"):
        heldout("val")
    (data / "val").mkdir()
    with pytest.raises(DataError, match="val has 0 images"):
        heldout()
    write_images(data / "val", CLASSES[:2], each=2)
    assert heldout()[1] == f"{data / 'val'}, split validation (4 images)"


def test_a_run_that_held_nothing_out_asks_for_other_images(place):
    own = {"source": "auto", "path": str(place / "images"), "name": "", "data_dir": "", "heldout_fraction": 0.0}
    model = finished.Run({}, {"data": own}, None, place, SIZE)
    with pytest.raises(DataError, match=r"0 of its 28 images .* - nothing is held out of them - give others as --data"):
        evaluate.open_images(model, Namespace(data="", split=""))


def test_images_with_maps_are_found_by_the_same_rule(tmp_path, capsys):
    for kind in ("images", "masks"):
        (tmp_path / "data" / kind).mkdir(parents=True)
        for n in range(3):
            Image.new("L", (8, 8)).save(tmp_path / "data" / kind / f"{n}.png")
    own = {"source": "auto", "path": str(tmp_path / "data"), "name": "", "data_dir": "", "heldout_fraction": 0.3}
    write_workdir(tmp_path / "run", {"name": "none"}, data=own)
    model = finished.load_run(str(tmp_path / "run"))

    def heldout(path, split, own):
        options = Namespace(data=str(tmp_path / path) if path else "", split=split)
        return segments.open_pairs(model, options, own=own)

    shutil.copytree(tmp_path / "data", tmp_path / "other")
    with pytest.raises(DataError, match=r"0 of its 3 images in split 'val' - nothing is held out .* leave --split out"):
        heldout("other", "val", False)
    keep_fingerprints(tmp_path / "run", heldout=heldout("", "", True))
    heldout("", "", True)
    assert not capsys.readouterr().err
    Image.effect_noise((9, 9), 50).save(tmp_path / "data" / "images" / heldout("", "", True).name(0))
    heldout("", "", True)
    assert "not what the run held out: the data have changed since" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "parts"), [("images-0.tar", False), ("train-0.tar", True), ("data/train_0.parquet", True)]
)
def test_shards_to_train_on_are_told_by_their_names(tmp_path, name, parts):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    assert has_parts(str(tmp_path)) == parts
    assert has_parts(str((tmp_path / name).with_stem("*"))) == parts
    assert not has_parts(str(tmp_path / name))  # this one is asked for by name


def test_a_pretraining_run_gets_its_own_loss_of_as_many_images_as_it_had_and_no_row(
    place, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    tool(place / "pretrained", "--batch-size=8", "--out=figures")
    out = capsys.readouterr().out
    assert re.search(r"masked_loss \d\.\d{4} of 3 images", out)
    assert "a pretraining run has no classes; fine-tune or probe it first" in out
    assert [path.name for path in tmp_path.iterdir()] == ["figures"]
    assert [path.name for path in (tmp_path / "figures").iterdir()] == ["reconstruction_7.png"]


@pytest.mark.parametrize(
    ("arguments", "kind", "line"),
    [
        (("encoder", "--data=images"), CheckpointError, "an encoder alone, without a head"),
        (("nowhere",), CheckpointError, "no such folder"),
        (("images",), CheckpointError, "no checkpoint"),
        (("classifier",), DataError, "no images given, and the run says of none"),
        (("classifier", "--data=imges"), DataError, "did you mean"),
        (("classifier", "--data=images", "--image-size=15"), ConfigError, "give multiples of 8 pixels"),
        (("classifier", "--data=images", "--interpolation=cubic"), ConfigError, "interpolation"),
        (("classifier", "--data=images", "--results=images/ant/0.png/new/results.csv"), ConfigError, "no folder"),
        (("classifier", "--data=images", "--results=images"), ConfigError, "a folder - "),
        (("classifier", "--data=images", "--results=", "--out=images/ant/0.png"), DataError, "File exists"),
        (("classifier", "--data=tfds:nothing_of_this_name", "--results="), UserError, "nothing_of_this_name"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(place, monkeypatch, arguments, kind, line):
    monkeypatch.chdir(place)
    before = sorted(place.iterdir())
    assert line in told(*arguments, kind=kind)
    assert sorted(place.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ((), "the following arguments are required: RUN"),
        (("",), "an empty RUN"),
        (("run", "--result=x"), "unknown argument '--result=x' - command line - did you mean --results"),
        (("run", "--batch-size=0"), "batch-size is 0"),
        (("run", "--threads=-1"), "threads is -1"),
        (("run", "--mistakes=-1"), "mistakes is -1"),
        (("run", "--image-size=big"), "--image-size=big"),
        (("run", "--crop-fraction=1.5"), "--crop-fraction=1.5 - command line - give one above 0, up to 1"),
        (("run", "--crop-fraction=nan"), "--crop-fraction=nan"),
        (("run", "--max-bad-fraction=2"), "--max-bad-fraction=2"),
    ],
)
def test_a_mistake_in_an_option_is_one_line(arguments, line):
    assert line in told(*arguments)


def test_help_is_told_without_importing_jax():
    done = run("--help", script=("-X", "importtime", *EVALUATE))
    assert done.returncode == 0
    assert "examples:" in done.stdout
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "argparse" in imported
    assert not imported & {"jax", "flax", "numpy", "orbax", "PIL"}


@pytest.mark.slow
def test_eight_devices_and_one_evaluate_alike_also_what_does_not_fill_a_batch(place, tmp_path):
    lines = []
    for devices, batch_size in ((1, 64), (1, 7), (8, 7)):
        done = run(place / "classifier", f"--data={place / 'images'}", f"--batch-size={batch_size}",
                   f"--results={tmp_path / 'results.csv'}", f"--out={tmp_path / f'{devices}_{batch_size}'}",
                   script=EVALUATE, devices=devices)  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines()[1])
    assert len(set(lines)) == 1
    assert "of 28 images" in lines[0]
    rows = rows_of(tmp_path / "results.csv")
    assert len({json.dumps(row | {"date": ""}) for row in rows}) == 1
    for name in ("confusion.csv", "classes.csv"):
        assert len({(folder / name).read_text() for folder in tmp_path.iterdir() if folder.is_dir()}) == 1


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_leaves_what_was_there(place, tmp_path):
    results = tmp_path / "results.csv"
    evaluate.append_row(results, ROW | {"data": "x" * 900})
    before = results.read_text()
    done = run(
        place / "classifier", f"--data={place / 'images'}", f"--results={results}", script=EVALUATE, file_limit=1
    )
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"ERROR\[data\] no row was added: .+ - .+ - make room.+", done.stderr.strip().splitlines()[-1])
    assert results.read_text() == before
    done = run(place / "classifier", f"--data={place / 'images'}", "--results=", f"--out={tmp_path / 'figures'}",
               script=EVALUATE, file_limit=1)  # fmt: skip
    assert done.returncode == 3, done.stderr
    assert re.fullmatch(r"ERROR\[data\] cannot write: .+ - .+ - make room.+", done.stderr.strip().splitlines()[-1])
    assert not [path for path in (tmp_path / "figures").iterdir() if "partial" in path.name]


@pytest.mark.slow
def test_the_loss_of_a_pretraining_run_is_what_the_run_itself_measured_whatever_the_batch(tmp_path):
    done = run(*DIGITS, f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    measured = json.loads((tmp_path / "run" / "summary.json").read_text())["masked_loss"]
    done = run(tmp_path / "run", "--batch-size=50", "--results=", script=EVALUATE)
    assert done.returncode == 0, done.stderr
    assert f"masked_loss {measured:.4f} of 128 images" in done.stdout
