"""The preview: what it draws is what the step is fed and hides, and what it says is what is so."""

import contextlib
import io
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image
from runs import run

from simmim_jax import data, train
from simmim_jax.config import load
from simmim_jax.errors import ConfigError, DataError
from simmim_jax.objectives import simmim
from simmim_jax.tools import preview

START, IMAGES, SIDE = 1, 128, 32  # two batches of digits: steps 1 and 2


def digits(name="digits_vit_tiny"):
    c = load(f"configs/{name}.py")
    c.encoder.name, c.encoder.size = "vit", "ti"
    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 32, 1, 2
    c.probe_block, c.evals = 1, {}
    return c


def folder(path):
    c = load("configs/folder_vit_small.py")
    c.data.path, c.image_size, c.batch_size = str(path), (SIDE, SIDE), 4
    c.encoder.size, c.encoder.depth = "ti", 1
    c.data.heldout_fraction = 0.1
    return c


def batches_of(config, steps):
    """The whole batches of these steps, as one process has them."""
    source, _ = train.make_sources(config)
    batch_spec, _ = train.batch_options(config)
    with contextlib.closing(data.make_batches(source, batch_spec, start_step=steps[0])) as batches:
        return source, [next(batches) for _ in steps]


@pytest.fixture(scope="module")
def fed(tmp_path_factory):
    """(numbers, picture, numbers as written, what was printed) of a preview of 128 digits."""
    out = tmp_path_factory.mktemp("preview") / "not there yet" / "preview.png"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        numbers = preview.preview(
            digits(), out=str(out), json_path=f"{out}.json", images=IMAGES, start_step=START, seconds=0.05
        )
    assert sorted(path.name for path in out.parent.iterdir()) == ["preview.png", "preview.png.json"]
    return numbers, np.asarray(Image.open(out)), json.loads((out.parent / "preview.png.json").read_text()), printed


class Enough(Exception):
    """The run has said what it was asked for."""


@pytest.fixture(scope="module")
def masks_of_a_run(tmp_path_factory):
    """The masks that the step of a training run draws, by step: of the step, batch and key that it compiles with."""
    held, masks, make_masks = [], [], simmim.make_masks

    def spied(*arguments, **options):
        draw = make_masks(*arguments, **options)

        def hold(key, positions):
            held.append(draw(key, positions))
            return held[-1]

        return hold

    def compile_step(step, state, batch, key, mesh):
        @jax.jit
        def mask_alone(state, batch, key):  # what is left of the step when nothing else of it is asked for
            step(state, batch, key)
            return held.pop()

        def compiled(state, batch, key):
            masks.append(np.asarray(mask_alone(state, batch, key)))
            if len(masks) == START + 2:
                raise Enough
            values = {"loss": 1.0, "samples": 0, "skipped": 0.0, "grad_norm": 0.0, "bad_images": 0, "stop": 0}
            return state.replace(step=state.step + 1), values

        return compiled

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Enough):
        patch.setattr(simmim, "make_masks", spied)
        patch.setattr(train, "compile_step", compile_step)
        config = digits()
        config.check_memory = False  # nothing is compiled that would tell
        train.train(config, str(tmp_path_factory.mktemp("run")))
    assert len(masks) == START + 2
    return masks


def panels(picture, count, panels_of_each=2, side=SIDE):
    """The tiles of a sheet of square images, [count, panels, y, x, 3]."""
    scale = -(-preview.SIDES[0] // side)
    shown = side * scale
    height, width = shown + preview.LINE + preview.GAP, panels_of_each * (shown + 1) + 2 * preview.GAP
    columns = preview.columns_of(count, height, width)
    rows = -(-count // columns)
    assert picture.shape == (rows * height + preview.LINE + preview.GAP, columns * width + preview.GAP, 3)
    tiles = []
    for n in range(count):
        y = preview.LINE + preview.GAP + n // columns * height
        x = preview.GAP + n % columns * width
        tiles.append([picture[y : y + shown, x + p * (shown + 1) :][:, :shown] for p in range(panels_of_each)])
        assert (picture[y + shown : y + shown + preview.LINE, x : x + shown] < 200).any(), "no caption"
    return np.array(tiles)[:, :, ::scale, ::scale], np.array(tiles)


def test_the_picture_holds_the_crops_of_the_steps_and_grays_what_a_run_of_the_config_hides(fed, masks_of_a_run):
    tiles, _ = panels(fed[1], IMAGES)
    _, batches = batches_of(digits(), (START, START + 1))
    crops = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(tiles[:, 0], np.repeat(crops, 3, axis=-1))
    hidden = np.concatenate(masks_of_a_run[START:]).repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(tiles[:, 1], np.where(hidden[..., None], 128, tiles[:, 0]))


def test_each_image_is_enlarged_pixel_by_pixel(fed):
    tiles, whole = panels(fed[1], IMAGES)
    np.testing.assert_array_equal(whole, tiles.repeat(3, axis=2).repeat(3, axis=3))


def test_the_numbers_are_those_of_the_crops_and_masks(fed, masks_of_a_run):
    numbers, _, written, _ = fed
    assert written == numbers
    source, batches = batches_of(digits(), (START, START + 1))
    crops = np.concatenate([batch["image"] for batch in batches]) / 255
    assert numbers["pixels"]["mean"] == pytest.approx([crops.mean()])
    assert numbers["pixels"]["std"] == pytest.approx([crops.std()])
    assert (numbers["images"], len(numbers["classes"])) == (1437, 10)
    for n, shown in enumerate(numbers["shown"]):
        batch, row = batches[n // 64], n % 64
        assert (shown["step"], shown["batch_index"]) == (START + n // 64, row)
        assert (shown["index"], shown["label"]) == (batch["index"][row], batch["label"][row])
        assert shown["name"] == source.name(int(batch["index"][row]))
    assert numbers["masks"]["ratio"] == 10 / 16
    assert numbers["masks"]["asked"] == 0.6
    distances = [distance_by_hand(mask.repeat(4, axis=0).repeat(4, axis=1)) for mask in masks_of_a_run[START]]
    distances += [distance_by_hand(mask.repeat(4, axis=0).repeat(4, axis=1)) for mask in masks_of_a_run[START + 1]]
    assert numbers["masks"]["average_distance"] == pytest.approx(np.mean(distances))


def distance_by_hand(hidden):
    """AvgDist by its definition: all hidden pixels against all visible ones."""
    inside, outside = (np.argwhere(which).astype(float) for which in (hidden, ~hidden))
    squares = (inside**2).sum(1)[:, None] + (outside**2).sum(1) - 2 * inside @ outside.T
    return np.sqrt(squares.min(axis=1)).mean()


def test_what_is_printed_names_the_data_the_masks_and_who_waits_for_whom(fed):
    numbers, _, _, printed = fed
    lines = printed.getvalue()
    assert "digits, split train (1437 images); 10 classes: 0, 1, 2, 3, 4, ..." in lines
    assert "0.6250 hidden, 10 of 16 blocks (asked: 0.6), AvgDist 4." in lines
    assert "below the 10 to 20" in lines
    assert "(config: 0.305)" in lines
    assert "warning" not in lines
    assert numbers["verdict"] in lines
    rates = [numbers[name]["images_per_second"] for name in ("data", "step")]
    assert numbers["waiting"] == pytest.approx(max(0, 1 - rates[0] / rates[1]))
    assert numbers["step"]["batch_size"] == 64
    assert numbers["step"]["images_per_second"] == pytest.approx(
        64 * numbers["step"]["steps"] / numbers["step"]["seconds"]
    )
    assert (numbers["data"]["workers"], numbers["data"]["threads"], numbers["data"]["prefetch"]) == (0, 2, 4)


@pytest.mark.parametrize(
    ("data_rate", "step_rate", "words"),
    [
        (210.0, 100.0, "data 210 images/s, step needs 100: the pipeline keeps up (2.1x)"),
        (57.0, 100.0, "data 57 images/s, step needs 100: the device would wait 43% of the time: do this"),
    ],
)
def test_the_verdict_says_who_waits_and_what_to_do(data_rate, step_rate, words):
    assert preview.verdict(data_rate, step_rate, "do this") == words


@pytest.mark.parametrize(("distance", "word"), [(9.9, "below"), (10.0, "inside"), (20.0, "inside"), (20.1, "above")])
def test_distances_are_told_beside_the_band_of_the_paper(distance, word):
    masks = {"mask_ratio": 0.5, "blocks": 4, "asked": 0.5, "average_distance": distance}
    assert f"{word} the 10 to 20" in preview.mask_lines(masks)[0][1]


def test_masks_that_leave_nothing_are_told_and_no_failure():
    objective = digits().objective
    numbers = preview.mask_numbers([np.ones((32, 32), bool)], objective)
    assert numbers["average_distance"] is None
    assert preview.mask_lines(numbers)[1][0] == "warning"


def test_what_was_waiting_when_the_clock_started_is_not_counted():
    def batches():
        for n in range(100):
            time.sleep(0.01 if n >= 5 else 0)
            yield {"image": np.zeros(4), "replaced": np.arange(4) == n}

    timed = preview.time_data(batches(), 0.05, warm_up=5)
    assert timed["images_per_second"] <= 400
    assert timed["read"] == 20 + round(timed["images_per_second"] * timed["seconds"])
    assert timed["bad_images"] == 4


def test_a_part_of_a_large_batch_holds_images_of_that_batch_under_their_own_masks(
    tmp_path, monkeypatch, masks_of_a_run
):
    config = digits()
    monkeypatch.setattr(preview, "PART", 16 * SIDE * SIDE)
    assert preview.parts_of(64, SIDE * SIDE) == 4
    numbers = preview.preview(config, out=str(tmp_path / "x.png"), images=16, start_step=START, seconds=0.0, step=False)
    _, (batch,) = batches_of(config, (START,))
    tiles, _ = panels(np.asarray(Image.open(tmp_path / "x.png")), 16)
    for shown, (crop, masked) in zip(numbers["shown"], tiles, strict=True):
        row = shown["batch_index"]
        assert shown["index"] == batch["index"][row]
        np.testing.assert_array_equal(crop[..., :1], batch["image"][row])
        hidden = masks_of_a_run[START][row].repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(masked[hidden], 128)
        np.testing.assert_array_equal(masked[~hidden], crop[~hidden])


@pytest.mark.parametrize(
    ("batch_size", "bytes_of_each", "parts"), [(2048, 192 * 192 * 3, 32), (97, 2**20, 97), (64, 1024, 1)]
)
def test_parts_divide_the_batch_and_are_of_the_size_wanted(batch_size, bytes_of_each, parts):
    assert preview.parts_of(batch_size, bytes_of_each) == parts


def test_crops_of_a_classifier_bear_their_class_and_no_mask(tmp_path, capsys):
    config = digits("digits_linear")
    config.objective.block, config.mean = 1, (0.9,)
    numbers = preview.preview(config, out=str(tmp_path / "x.png"), images=6, seconds=0.0, step=False)
    tiles, _ = panels(np.asarray(Image.open(tmp_path / "x.png")), 6, panels_of_each=1)
    _, (batch,) = batches_of(config, (0,))
    np.testing.assert_array_equal(tiles[:, 0, :, :, :1], batch["image"][:6])
    assert numbers["masks"] is None
    assert "step" not in numbers
    assert "verdict" not in numbers
    assert preview.caption_of({"hidden": None, "label": 1}, ("cat", "dog")) == "dog"
    assert preview.caption_of({"hidden": None, "label": -1}, ("cat", "dog")) == "no class"
    mean = f"{numbers['pixels']['mean'][0]:.3f}"
    assert f"mean is off by more than 0.1: these crops have about --config.mean={mean}," in capsys.readouterr().out


def test_bad_images_and_names_of_any_bytes_are_no_failure(tmp_path, capsys):
    for n in range(10):
        Image.new("RGB", (40, 40), (20 * n, 0, 90)).save(
            tmp_path / f"a b\n{n}\udcff é.png".encode(errors="surrogateescape").decode(errors="surrogateescape")
        )
    for n in range(4):
        (tmp_path / f"broken {n}.jpg").write_text("<html>404</html>")
    config = folder(tmp_path)
    config.data.max_bad_fraction = 1.0
    numbers = preview.preview(config, out=str(tmp_path / "x" / "x.png"), images=8, seconds=0.0, step=False)
    assert numbers["data"]["bad_images"] >= sum(shown["replaced"] for shown in numbers["shown"])
    assert numbers["data"]["bad_images"] > 0
    assert f"{numbers['data']['bad_images']} of {numbers['data']['read']} read were bad" in capsys.readouterr().out
    assert preview.printable("a\nb\udcff é") == "a?b\\udcff é"


@pytest.mark.parametrize(
    ("shape", "size"), [((300, 600, 1), (160, 320)), ((8, 12, 5), (96, 144)), ((1, 5, 2), (96, 480))]
)
def test_images_of_any_shape_and_number_of_channels_are_drawn(shape, size):
    image = np.full(shape, 200, np.uint8)
    sheet = preview.draw([(image, np.zeros(shape[:2], bool))] * 3, ["name", "long " * 500, ""], "title")
    assert preview.tile_size(*shape[:2]) == size
    top = preview.LINE + preview.GAP
    assert (sheet[top : top + size[0], preview.GAP : preview.GAP + size[1]] == 200).all()


def test_missing_data_and_places_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(DataError, match="imagez"):
        preview.preview(folder(tmp_path / "imagez"), out=str(tmp_path / "x.png"), step=False)
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "x.png"):
        with pytest.raises(ConfigError, match=str(out)):
            preview.preview(digits(), out=str(out), step=False)
    config = digits()
    config.objective.mask_ratio = 2.0
    with pytest.raises(ConfigError, match="ratio"):
        preview.preview(config, out=str(tmp_path / "x.png"), step=False)
    assert not (tmp_path / "x.png").exists()


def test_a_step_that_does_not_fit_is_told_with_what_to_do(tmp_path, monkeypatch):
    def compile_step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(train, "compile_step", compile_step)
    with pytest.raises(ConfigError, match=r"64 does not fit .* --config.microbatches"):
        preview.preview(digits(), out=str(tmp_path / "x.png"), images=1, seconds=0.0)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--imagez=3", "Did you mean: images"),
        ("--images=0", "--images=0"),
        ("--config.batch_sise=8", "did you mean batch_size"),
    ],
)
def test_a_mistake_in_a_flag_is_one_line_without_jax(flag, message):
    script = ("-X", "importtime", "-m", "simmim_jax.tools.preview")
    done = run("--config=configs/digits_vit_tiny.py", flag, script=script)
    assert done.returncode == 2, done.stderr
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("ERROR[config]")
    assert message in line
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "ml_collections" in imported
    assert not imported & {"jax", "flax", "grain"}


def test_help_tells_every_flag_without_a_config():
    done = run("--help", script=("-m", "simmim_jax.tools.preview"))
    for flag in (
        "--config:",
        "--out:",
        "--json:",
        "--images:",
        "--start-step:",
        "--seconds:",
        "--[no]step:",
        "--workdir:",
    ):
        assert flag in done.stdout
