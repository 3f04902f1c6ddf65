"""The preview command: its picture shows what the training step gets and masks, and its numbers are correct."""

import contextlib
import io
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image
from runs import run

from simmim_jax import compiled, data, experiment, train
from simmim_jax.config import load
from simmim_jax.errors import ConfigError, DataError
from simmim_jax.evals.sheet import GAP, LINE
from simmim_jax.objectives import simmim
from simmim_jax.tools import preview

START, IMAGES, SIDE = 1, 128, 32  # two batches of digits: steps 1 and 2


def digits(name="digits_vit_tiny"):
    c = load(f"configs/{name}.py")
    c.encoder.name, c.encoder.size = "vit", "ti"
    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 32, 1, (2,)
    c.probe_block, c.evals, c.online_probes = 1, {}, False
    return c


def folder(path):
    c = load("configs/folder_vit_small.py")
    c.data.path, c.image_size, c.batch_size, c.eval_batch_size = str(path), (SIDE, SIDE), 8, 8
    c.encoder.size, c.encoder.depth = "ti", 1
    c.data.heldout_fraction = 0.1
    return c


def read_batches(config, steps):
    """(source, the whole batches of these steps)."""
    made = experiment.make_experiment(config)
    with contextlib.closing(data.make_batches(made.source, made.batches, start_step=steps[0])) as batches:
        return made.source, [next(batches) for _ in steps]


@pytest.fixture(scope="module")
def previewed(tmp_path_factory):
    """(numbers, picture, printed text) of a preview of 128 digits."""
    out, printed = tmp_path_factory.mktemp("preview") / "x.png", io.StringIO()
    with contextlib.redirect_stdout(printed):
        numbers = preview.preview(digits(), out=str(out), images=IMAGES, start_step=START, seconds=0.05)
    return numbers, np.asarray(Image.open(out)), printed.getvalue()


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def masks_of_a_run(tmp_path_factory):
    """The masks that the step of a training run draws, by step, from the step, batch and key that it compiles with."""
    held, masks, make_masks = [], [], simmim.make_masks

    def spy(*arguments, **options):
        draw = make_masks(*arguments, **options)

        def hold(key, batch_index):
            held.append(draw(key, batch_index))
            return held[-1]

        return hold

    def compile_step(step, state, batch, key, mesh):
        @jax.jit
        def mask(state, batch, key):  # the rest of the step is dead code
            step(state, batch, key)
            return held.pop()

        def compiled(state, batch, key):
            masks.append(np.asarray(mask(state, batch, key)))
            if len(masks) == START + 2:
                raise Enough
            values = {"loss": 1.0, "samples": 0, "skipped": 0.0, "grad_norm": 0.0, "bad_images": 0, "stop": 0}
            return state.replace(step=jax.jit(lambda step: step + 1)(state.step)), values

        return compiled

    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Enough):
        patch.setattr(simmim, "make_masks", spy)
        patch.setattr(compiled, "compile_step", compile_step)
        config = digits()
        config.check_memory = False
        train.train(experiment.make_experiment(config), str(tmp_path_factory.mktemp("run")))
    assert len(masks) == START + 2
    return masks


def read_tiles(picture, count, panels=2):
    """The tiles of a sheet of square images [count, panels, y, x, 3], as large as the images."""
    scale, side = -(-preview.TILE_SIDES[0] // SIDE), preview.TILE_SIDES[0]
    height, width = side + LINE + GAP, panels * (side + 1) - 1 + GAP
    columns = (picture.shape[1] - GAP) // width
    tiles = []
    for n in range(count):
        y, x = LINE + GAP + n // columns * height, GAP + n % columns * width
        tiles.append([picture[y:, x + p * (side + 1) :][:side, :side] for p in range(panels)])
        assert (picture[y + side : y + side + LINE, x : x + side] < 200).any(), "no caption"
    tiles = np.array(tiles)
    small = tiles[:, :, ::scale, ::scale]
    np.testing.assert_array_equal(tiles, small.repeat(scale, axis=2).repeat(scale, axis=3))
    return small


def test_the_picture_shows_the_crops_and_masks_of_a_run(previewed, masks_of_a_run):
    tiles = read_tiles(previewed[1], IMAGES)
    _, batches = read_batches(digits(), (START, START + 1))
    crops = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(tiles[:, 0], np.repeat(crops, 3, axis=-1))
    masks = np.concatenate(masks_of_a_run[START:]).repeat(4, axis=1).repeat(4, axis=2)
    np.testing.assert_array_equal(tiles[:, 1], np.where(masks[..., None], 128, tiles[:, 0]))


def test_the_numbers_describe_the_crops_and_masks(previewed, masks_of_a_run):
    numbers, _, printed = previewed
    source, batches = read_batches(digits(), (START, START + 1))
    crops = np.concatenate([batch["image"] for batch in batches]) / 255
    assert numbers["pixels"]["mean"] == pytest.approx([crops.mean()])
    assert numbers["pixels"]["std"] == pytest.approx([crops.std()])
    assert (numbers["images"], len(numbers["classes"])) == (1437, 10)
    for n, shown in enumerate(numbers["shown"]):
        batch, row = batches[n // 64], n % 64
        assert (shown["step"], shown["batch_index"]) == (START + n // 64, row)
        assert (shown["index"], shown["label"]) == (batch["index"][row], batch["label"][row])
        assert shown["name"] == source.name(int(batch["index"][row]))
    masks = np.concatenate(masks_of_a_run[START:]).repeat(4, axis=1).repeat(4, axis=2)
    assert (numbers["masks"]["ratio"], numbers["masks"]["asked"]) == (10 / 16, 0.6)
    assert numbers["masks"]["average_distance"] == pytest.approx(np.mean([distance_by_hand(mask) for mask in masks]))
    step, rates = numbers["step"], [numbers[name]["images_per_second"] for name in ("data", "step")]
    assert numbers["waiting"] == pytest.approx(max(0, 1 - rates[0] / rates[1]))
    assert step["images_per_second"] == pytest.approx(64 * step["steps"] / step["seconds"])
    assert (numbers["data"]["workers"], numbers["data"]["threads"], numbers["data"]["prefetch"]) == (0, 2, 4)
    for part in ("1437 images", "10 classes", "0.6250 masked, 10 of 16", "below 10 to 20", numbers["verdict"]):
        assert part in printed
    assert "warning" not in printed


def distance_by_hand(mask):
    """AvgDist by its definition: every masked pixel against every visible one."""
    inside, outside = (np.argwhere(which).astype(float) for which in (mask, ~mask))
    squares = (inside**2).sum(1)[:, None] + (outside**2).sum(1) - 2 * inside @ outside.T
    return np.sqrt(squares.min(axis=1)).mean()


def test_the_verdict_names_who_waits():
    assert "keeps up (2.1x)" in preview.compare_rates(210.0, 100.0, "do this")
    assert "wait 43% of the time: do this" in preview.compare_rates(57.0, 100.0, "do this")


def test_average_distances_are_compared_with_the_best_range():
    masks = {"ratio": 0.5, "mask_patches": 4, "asked": 0.5}
    for distance, word in ((9.9, "below"), (10.0, "inside"), (20.0, "inside"), (20.1, "above"), (None, "warning")):
        assert word in str(preview.format_masks(masks | {"average_distance": distance}))
    assert (
        preview.measure_masks([np.ones((8, 8), bool)], {"mask_patch_size": 8, "mask_ratio": 1})["average_distance"]
        is None
    )


def test_batches_that_were_waiting_are_not_timed():
    def batches():
        for n in range(100):
            time.sleep(0.01 if n >= 5 else 0)
            yield {"image": np.zeros(4), "replaced": np.arange(4) == n}

    timed = preview.time_data(batches(), 0.05, warm_up=5)
    assert timed["images_per_second"] <= 400
    assert timed["read"] == 20 + round(timed["images_per_second"] * timed["seconds"])
    assert timed["bad_images"] == 4


def test_a_part_of_a_large_batch_has_rows_of_that_batch_with_their_own_masks(tmp_path, monkeypatch, masks_of_a_run):
    monkeypatch.setattr(preview, "PART_BYTES", 16 * SIDE * SIDE)
    assert preview.count_parts(64, SIDE * SIDE) == 4
    out = tmp_path / "x.png"
    numbers = preview.preview(digits(), out=str(out), images=16, start_step=START, seconds=0.0, time_step=False)
    _, (batch,) = read_batches(digits(), (START,))
    tiles = read_tiles(np.asarray(Image.open(out)), 16)
    for shown, (crop, masked) in zip(numbers["shown"], tiles, strict=True):
        row = shown["batch_index"]
        assert shown["index"] == batch["index"][row]
        np.testing.assert_array_equal(crop[..., :1], batch["image"][row])
        mask = masks_of_a_run[START][row].repeat(4, axis=0).repeat(4, axis=1)
        np.testing.assert_array_equal(masked, np.where(mask[..., None], 128, crop))


def test_parts_divide_the_batch_and_have_the_wanted_size():
    for batch_size, image_bytes, parts in ((2048, 192 * 192 * 3, 32), (97, 2**20, 97), (64, 1024, 1)):
        assert preview.count_parts(batch_size, image_bytes) == parts


def test_crops_of_a_classifier_have_their_class_and_no_mask(tmp_path, capsys):
    config = digits("digits_linear")
    config.objective.block, config.mean = 1, (0.9,)
    numbers = preview.preview(config, out=str(tmp_path / "x.png"), images=6, seconds=0.0, time_step=False)
    tiles = read_tiles(np.asarray(Image.open(tmp_path / "x.png")), 6, panels=1)
    _, (batch,) = read_batches(config, (0,))
    np.testing.assert_array_equal(tiles[:, 0, :, :, :1], batch["image"][:6])
    assert numbers["masks"] is None
    assert not {"step", "verdict"} & numbers.keys()
    assert [preview.caption({"mask": None, "label": n}, ("cat", "dog")) for n in (1, -1)] == ["dog", "no class"]
    assert f"--config.mean={numbers['pixels']['mean'][0]:.3f}," in capsys.readouterr().out


def test_bad_images_and_names_of_any_bytes_are_no_error(tmp_path, capsys):
    for n in range(14):
        Image.new("RGB", (40, 40), (10 * n, 0, 90)).save(tmp_path / f"a b\n{n}\udcff é.png")
    for n in range(4):
        (tmp_path / f"broken {n}.jpg").write_text("<html>404</html>")
    config = folder(tmp_path)
    config.data.max_bad_fraction = 1.0
    numbers = preview.preview(config, out=str(tmp_path / "x" / "x.png"), images=8, seconds=0.0, time_step=False)
    assert numbers["data"]["bad_images"] >= sum(shown["replaced"] for shown in numbers["shown"])
    assert numbers["data"]["bad_images"] > 0
    assert f"{numbers['data']['bad_images']} of {numbers['data']['read']} " in capsys.readouterr().out


def test_images_of_any_shape_and_number_of_channels_are_drawn():
    for shape, size in (((300, 600, 1), (160, 320)), ((8, 12, 5), (96, 144)), ((1, 5, 2), (96, 480))):
        sample = {"image": np.full(shape, 200, np.uint8), "mask": np.zeros(shape[:2], bool), "name": "long " * 500}
        sheet = preview.draw_samples([sample] * 3, (), "title")
        assert (sheet[LINE + GAP :, GAP:][: size[0], : size[1]] == 200).all()


def test_mistakes_of_the_config_are_errors_before_a_picture_is_written(tmp_path):
    out = tmp_path / "x.png"
    with pytest.raises(DataError, match="imagez"):
        preview.preview(folder(tmp_path / "imagez"), out=str(out), time_step=False)
    config = digits()
    config.objective.mask_ratio = 2.0
    with pytest.raises(ConfigError, match="mask_ratio"):
        preview.preview(config, out=str(out), time_step=False)
    assert not out.exists()


def test_a_step_that_does_not_fit_into_memory_is_one_error(tmp_path, monkeypatch):
    def compile_step(*_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(compiled, "compile_step", compile_step)
    with pytest.raises(ConfigError, match=r"64 .*--config.microbatches"):
        preview.preview(digits(), out=str(tmp_path / "x.png"), images=1, seconds=0.0)


def test_files_are_written_as_the_flags_say_and_replaced_only_with_overwrite(tmp_path):
    out, numbers = tmp_path / "new" / "x.png", tmp_path / "new" / "x.json"
    arguments = ("--config=configs/digits_vit_tiny.py", "--nostep", "--seconds=0", "--images=4", f"--out={out}")
    script = ("-m", "simmim_jax.tools.preview")
    done = run(*arguments, f"--json={numbers}", script=script)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in out.parent.iterdir()) == ["x.json", "x.png"]
    assert len(json.loads(numbers.read_text())["shown"]) == 4
    done = run(*arguments, script=("-X", "importtime", *script))
    assert done.returncode == 2
    assert "ERROR[config] exists" in done.stderr
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
    assert "ml_collections" in imported
    assert not imported & {"jax", "flax", "grain"}


def test_help_lists_every_flag_without_a_config():
    done = run("--help", script=("-m", "simmim_jax.tools.preview"))
    for flag in ("config", "out", "json", "images", "start-step", "seconds", "[no]step", "workdir", "[no]overwrite"):
        assert f"--{flag}:" in done.stdout
