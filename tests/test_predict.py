"""The predict command: classes of images by name, reconstructions, and files that are replaced or not."""

import json
from argparse import Namespace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tiny_trained import CLASSES, PIXELS, SIMMIM, SIZE, image_pixels, make_images, make_run

from simmim_jax.errors import CheckpointError, ConfigError, DataError
from simmim_jax.evals.sheet import GAP, LINE
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint
from simmim_jax.tools import predict
from simmim_jax.tools.cli import parse_known

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


def test_the_likeliest_classes_are_named_in_the_order_of_the_images(images, classifier, capsys):
    workdir, probabilities = classifier
    predict.run([workdir, *paths(images, 4), "--json", *paths(images, 0, 8), "--top=2"])
    answers = json.loads(capsys.readouterr().out)
    assert [answer["image"] for answer in answers] == paths(images, 4, 0, 8)
    for n, answer in zip((4, 0, 8), answers, strict=True):
        best = np.argsort(-probabilities[n])[:2]
        assert [each["class"] for each in answer["predictions"]] == [CLASSES[label] for label in best]
        found = [each["probability"] for each in answer["predictions"]]
        np.testing.assert_allclose(found, probabilities[n][best], rtol=1e-5)  # another batch size, other sums
    predict.run([workdir, *paths(images, 2)])
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == paths(images, 2)[0]
    assert [line.split()[1] for line in lines] == [CLASSES[label] for label in np.argsort(-probabilities[2])]


def test_an_unreadable_image_is_named_and_the_others_are_answered(images, classifier, tmp_path, capsys, caplog):
    (bad,) = make_images(tmp_path, 1, classes=(), bad=(0,))
    with pytest.raises(DataError, match="1 of 2 images"):
        predict.run([classifier[0], str(tmp_path / bad), *paths(images, 1), "--json"])
    assert [answer["image"] for answer in json.loads(capsys.readouterr().out)] == paths(images, 1)
    assert bad in caplog.text
    caplog.clear()
    with pytest.raises(DataError) as raised:  # the same line that tells the reason
        predict.run([classifier[0], str(tmp_path / bad)])
    assert raised.value.where == str(tmp_path / bad)
    assert not caplog.text


def test_classes_are_numbers_if_their_names_are_unknown(images, tmp_path, capsys):
    gone = {"source": "folder", "path": str(tmp_path / "gone"), "name": "", "data_dir": "", "heldout_fraction": 0.1}
    for name, more, expected in (("a", {}, {0, 1, 2}), ("b", {"classes": ["x", "y", "z"]}, {"x", "y", "z"})):
        workdir, *_ = make_run(tmp_path / name, CLASSIFY, data=gone, **more)
        predict.run([workdir, *paths(images, 0), "--json"])
        printed = capsys.readouterr()
        assert {each["class"] for each in json.loads(printed.out)[0]["predictions"]} == expected
        assert ("number" in printed.err) == (name == "a")


@pytest.mark.slow
def test_a_pretraining_run_draws_the_reconstruction_of_each_image(images, tmp_path, capsys):
    workdir, encoder, params = make_run(tmp_path / "run")
    out = tmp_path / "new" / "x.png"
    predict.run([workdir, *paths(images, 0, 5), f"--out={out}", "--seed=3", "--json"])
    losses = [each["masked_loss"] for each in json.loads(capsys.readouterr().out)]
    objective = make_objective(encoder=encoder, image_size=SIZE, **PIXELS, **SIMMIM)
    both = image_pixels(images[0], [images[1][0], images[1][5]])
    batch = {"image": both, "label": jnp.zeros(2, int), "batch_index": jnp.arange(2)}
    expected = jax.jit(objective.predict)(params, batch, jax.random.key(3))
    np.testing.assert_allclose(losses, expected["loss"], rtol=1e-5)
    sheet, side, gap, header = np.asarray(Image.open(out)), 96, GAP, LINE + GAP
    assert sheet.shape == (header + 2 * (side + gap), 4 * (side + gap) + gap, 3)
    for n in range(2):
        row = sheet[header + n * (side + gap) :][:side:6]
        np.testing.assert_array_equal(row[:, gap:][:, :side:6], both[n])
        pasted = row[:, gap + 3 * (side + gap) :][:, :side:6]
        visible = ~np.asarray(expected["mask"][n])
        np.testing.assert_array_equal(pasted[visible], both[n][visible])
        assert (pasted[~visible] != np.asarray(both[n])[~visible]).any()


@pytest.mark.parametrize("several", [False, True])
def test_existing_files_are_replaced_with_overwrite_and_only_if_ours(tmp_path, monkeypatch, several):
    monkeypatch.chdir(tmp_path)
    images = [f"{n}.png" for n in range(1 + several)]
    for name in images:
        Image.new("RGB", (9, 8)).save(name)
    stem = "street_2" if several else "street"
    predicted = [np.arange(72).reshape(8, 9) % 2]
    monkeypatch.setattr(predict, "segment_images", lambda *_: ((n, predicted[0], 2) for n in range(len(images))))

    def segment(out="street.png", overwrite=False):
        options = Namespace(images=images, out=out, top=5, json=False, overwrite=overwrite)
        list(predict.segment(SimpleNamespace(config={}, channels=3), None, options))

    segment(out="")
    assert len(list(tmp_path.iterdir())) == len(images)
    for name in (f"{stem}.png", f"{stem}_mask.png"):
        Image.new("L", (9, 8), 7).save(name)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        for overwrite in (False, True):
            with pytest.raises(ConfigError, match=name):
                segment(overwrite=overwrite)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
        (tmp_path / name).unlink()
    segment()
    with pytest.raises(ConfigError, match="--overwrite"):
        segment()
    predicted[0] = 1 - predicted[0]
    segment(overwrite=True)
    np.testing.assert_array_equal(Image.open(f"{stem}_mask.png"), predicted[0])
    images[0] = f"{stem}.png"  # ours, and an input now
    with pytest.raises(ConfigError, match=f"{stem}.png"):
        segment(overwrite=True)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["run"], ConfigError, "IMAGE"),
        (["run", "x.png", "--out=x.jpg"], ConfigError, ".png"),
        (["run", "gone.png"], DataError, "gone.png"),
        (["run", "."], DataError, "folder"),
        (["gone", "x.png"], CheckpointError, "no such folder"),
        (["run", "x.png", "--image-size=12"], ConfigError, "multiples of 8"),
        (["run", "x.png", "--out=y.png"], ConfigError, "--out"),
        (["alone", "x.png"], CheckpointError, "without a head"),
        (["pretrained", "x.png"], CheckpointError, "--out=FILE.png"),
        (["pretrained", "x.png", "--out=x.png/y.png"], ConfigError, "cannot write"),
        (["pretrained", "x.png", "--out=./x.png", "--overwrite"], ConfigError, "input"),
    ],
)
def test_an_error_is_one_line(classifier, tmp_path, monkeypatch, arguments, kind, message):
    make_images(tmp_path, 1, classes=())
    (tmp_path / "000.png").rename(tmp_path / "x.png")
    (tmp_path / "run").symlink_to(classifier[0])
    if arguments[0] in ("alone", "pretrained"):
        make_run(tmp_path / "pretrained")
        params, config = checkpoint.read_params(str(tmp_path / "pretrained"))
        config["objective"] = {"name": "none"}
        checkpoint.write_params(str(tmp_path / "alone"), {"encoder": params["encoder"]}, config)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as caught:
        predict.run(arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_flags_may_stand_anywhere_and_end_at_two_dashes():
    for line in (["RUN", "a.png", "--top=3", "b.png"], ["--top=3", "RUN", "a.png", "b.png"]):
        assert parse_known(predict.make_parser(), line).images == ["a.png", "b.png"]
    assert parse_known(predict.make_parser(), ["--top=3", "--", "RUN", "-odd.png"]).images == ["-odd.png"]
