"""Predictions of single images: a classifier's classes, by name, and a pretraining run's reconstruction."""

import json
from argparse import Namespace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_trained import CLASSES, PIXELS, SIMMIM, SIZE, make_images, make_run, image_pixels

from simmim_jax.errors import CheckpointError, ConfigError, DataError, UserError
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint
from simmim_jax.tools import predict
from simmim_jax.tools.cli import parse_known
from simmim_jax.tools.evaluate import segments

CLASSIFY = {"name": "classify", "num_classes": 3, "block": 0, "fc_norm": True}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """(folder, names) of nine images of three classes."""
    folder = tmp_path_factory.mktemp("predict")
    return folder, make_images(folder, 9)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory, images):
    """(workdir, probabilities of the nine images) of a classifier that was trained on their folder."""
    own = {"source": "folder", "path": str(images[0]), "name": "", "data_dir": "", "heldout_fraction": 0.1}
    workdir, encoder, params = make_run(tmp_path_factory.mktemp("classifier") / "run", CLASSIFY, data=own)
    batch = {"image": image_pixels(*images), "label": jnp.zeros(9, int), "batch_index": jnp.arange(9)}
    objective = make_objective(encoder=encoder, image_size=SIZE, **PIXELS, **CLASSIFY)
    logits = jax.jit(objective.predict)(params, batch, jax.random.key(0))["logits"]
    return workdir, np.asarray(jax.nn.softmax(logits))


def paths(images, *numbers):
    return [str(images[0] / images[1][n]) for n in numbers]


def test_the_likeliest_classes_are_named_with_their_probabilities_in_the_order_of_the_images(
    images, classifier, capsys
):
    workdir, probabilities = classifier
    predict.run([workdir, *paths(images, 4), "--json", *paths(images, 0, 8), "--top=2"])
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == paths(images, 4, 0, 8)
    for n, answer in zip((4, 0, 8), answers, strict=True):
        best = np.argsort(-probabilities[n])[:2]
        assert [each["class"] for each in answer["predictions"]] == [CLASSES[label] for label in best]
        ours = [each["probability"] for each in answer["predictions"]]
        np.testing.assert_allclose(ours, probabilities[n][best], rtol=1e-5)  # of a batch of eight devices


def test_as_text_each_image_has_a_line_and_one_for_each_class(images, classifier, capsys):
    workdir, probabilities = classifier
    predict.run([workdir, *paths(images, 2)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == paths(images, 2)[0]
    best = np.argsort(-probabilities[2])
    assert [line.split()[1] for line in lines] == [CLASSES[label] for label in best]
    assert sum(float(line.split()[0].rstrip("%")) for line in lines) == pytest.approx(100, abs=0.02)


def test_an_unreadable_image_is_named_and_the_others_are_answered(images, classifier, tmp_path, capsys, caplog):
    (bad,) = make_images(tmp_path, 1, classes=(), bad=(0,))
    with pytest.raises(DataError, match="1 of 2 images cannot be read"):
        predict.run([classifier[0], str(tmp_path / bad), *paths(images, 1), "--json"])
    assert [answer["image"] for answer in json.loads(capsys.readouterr().out)] == paths(images, 1)
    assert bad in caplog.text


def test_classes_are_told_by_number_where_the_data_are_gone_and_by_the_names_of_the_config_if_it_has_them(
    images, tmp_path, capsys
):
    gone = {"source": "folder", "path": str(tmp_path / "gone"), "name": "", "data_dir": "", "heldout_fraction": 0.1}
    for name, more, expected in (("a", {}, {0, 1, 2}), ("b", {"classes": ["x", "y", "z"]}, {"x", "y", "z"})):
        workdir, *_ = make_run(tmp_path / name, CLASSIFY, data=gone, **more)
        predict.run([workdir, *paths(images, 0), "--json"])
        said = capsys.readouterr()
        assert {each["class"] for each in json.loads(said.out)[0]["predictions"]} == expected
        assert ("classes are told by number" in said.err) == (name == "a")


def test_a_pretraining_run_knows_no_classes_and_says_what_to_do(images, tmp_path):
    workdir, *_ = make_run(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"knows no classes .* fine-tune or probe it .*--out=FILE.png"):
        predict.run([workdir, *paths(images, 0)])


@pytest.mark.slow
def test_a_pretraining_run_draws_what_it_makes_of_each_image(images, tmp_path, capsys):
    workdir, encoder, params = make_run(tmp_path / "run")
    out = tmp_path / "new" / "x.png"
    predict.run([workdir, *paths(images, 0, 5), f"--out={out}", "--seed=3", "--json"])
    losses = [each["masked_loss"] for each in json.loads(capsys.readouterr().out)]
    objective = make_objective(encoder=encoder, image_size=SIZE, **PIXELS, **SIMMIM)
    both = image_pixels(images[0], [images[1][0], images[1][5]])
    batch = {"image": both, "label": jnp.zeros(2, int), "batch_index": jnp.arange(2)}
    expected = jax.jit(objective.predict)(params, batch, jax.random.key(3))
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-5)
    sheet, (row, tile) = np.asarray(Image.open(out)), (16 + 96 + 4, 96 + 4)
    assert sheet.shape == (16 + 2 * row - 2 * 16, 4 * tile + 4, 3)
    for n in range(2):
        at = 16 + n * (96 + 4)
        shown = sheet[at : at + 96 : 6, 4 : 4 + 96 : 6]
        np.testing.assert_array_equal(shown, both[n])
        pasted = sheet[at : at + 96 : 6, 4 + 3 * tile :][:, :96:6]
        visible = ~np.asarray(expected["mask"][n])
        np.testing.assert_array_equal(pasted[visible], both[n][visible])
        assert (pasted[~visible] != np.asarray(both[n])[~visible]).any()


@pytest.mark.parametrize("several", [False, True])
def test_predict_replaces_what_it_has_written_and_no_photograph_or_map_of_somebody_else(
    tmp_path, monkeypatch, capsys, several
):
    monkeypatch.chdir(tmp_path)
    images = [f"{n}.png" for n in range(1 + several)]
    for name in images:
        Image.new("RGB", (9, 8)).save(name)
    stem = "street_2" if several else "street"
    predicted = np.arange(72).reshape(8, 9) % 2
    monkeypatch.setattr(segments, "segment_images", lambda *_: ((n, predicted, 2) for n in range(len(images))))

    def segment():
        options = Namespace(images=images, out="street.png", top=5, json=False)
        predict.segment(SimpleNamespace(config={}, channels=3), options)

    predict.segment(
        SimpleNamespace(config={}, channels=3), Namespace(images=images, out="", top=5, json=False)
    )  # writes nothing
    for name in (f"{stem}.png", f"{stem}_mask.png"):
        Image.new("L", (9, 8), 7).save(name)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(ConfigError, match=f"a file that predict has not written - {name} - give another --out"):
            segment()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        (tmp_path / name).unlink()
    segment()
    predicted = 1 - predicted
    segment()
    np.testing.assert_array_equal(Image.open(f"{stem}_mask.png"), predicted)
    images[0] = f"{stem}.png"  # written by predict, and an image now
    with pytest.raises(ConfigError, match=f"one of the images - {stem}.png"):
        segment()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["run"], ConfigError, "arguments are required: IMAGE"),
        (["run", "x.png", "--tpo=3"], ConfigError, "did you mean --top"),
        (["run", "x.png", "--top=0"], ConfigError, "at least 1"),
        (["run", "x.png", f"--seed={2**64}"], ConfigError, "0 to 2"),
        (["run", "x.png", "--out=x.jpg"], ConfigError, "ends in .png"),
        (["run", "gone.png"], DataError, "no such image"),
        (["run", "."], DataError, "a folder, no image"),
        (["gone", "x.png"], CheckpointError, "no such folder"),
        (["run", "x.png", "--image-size=12"], ConfigError, "give multiples of 8"),
        (["run", "x.png", "--out=y.png"], ConfigError, "--out for a classifier"),
        (["alone", "x.png"], CheckpointError, "an encoder alone, without a head"),
        (["pretrained", "x.png", "--out=x.png/y.png"], ConfigError, "cannot write: "),
        (["pretrained", "x.png", "--out=./x.png"], ConfigError, "one of the images - x.png - give another --out"),
    ],
)
def test_a_mistake_is_told_in_one_line(classifier, tmp_path, monkeypatch, arguments, kind, message):
    make_images(tmp_path, 1, classes=())
    (tmp_path / "000.png").rename(tmp_path / "x.png")
    (tmp_path / "run").symlink_to(classifier[0])
    if arguments[0] in ("alone", "pretrained"):
        make_run(tmp_path / "pretrained")
        params, config = checkpoint.read_params(str(tmp_path / "pretrained"))
        config["objective"] = {"name": "none"}
        checkpoint.write_params(str(tmp_path / "alone"), {"encoder": params["encoder"]}, config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as told:
        predict.run(arguments)
    assert type(told.value) is kind
    assert "\n" not in str(told.value)


def test_flags_stand_anywhere_and_what_follows_two_dashes_is_none():
    for line in (["RUN", "a.png", "--top=3", "b.png"], ["--top=3", "RUN", "a.png", "b.png"]):
        assert parse_known(predict.make_parser(), line).images == ["a.png", "b.png"]
    assert parse_known(predict.make_parser(), ["--top=3", "--", "RUN", "-odd.png"]).images == ["-odd.png"]
