"""Parameters of another run: position tables are resized like in the official code, other differences are refused."""

import json
import shutil

import jax
import numpy as np
import pytest
from runs import arrays, run
from tiny import PIXELS, tiny_encoder

from simmim_jax.errors import CheckpointError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.runs.pretrained import fit, refuse_other_encoder, refuse_other_windows
from simmim_jax.runs.resize import resize_bias_table, resize_positions

KEY = jax.random.key(0)
WINDOWS = ((6, 7), (7, 14), (12, 14), (14, 16), (14, 12))


def test_resized_table_equals_scipys_removed_interp2d(golden):
    """tests/golden/resizing.npz is by scipy 1.13.1; the same FITPACK routines compute both."""
    arrays = golden("resizing")
    for source, target in WINDOWS:
        name = f"{source}_{target}"
        resized = resize_bias_table(arrays[f"table_{name}"], (source, source), (target, target))
        np.testing.assert_allclose(resized, arrays[f"resized_{name}"], atol=1e-6)


def test_extra_rows_and_tables_of_the_right_size_do_not_change():
    table = np.random.default_rng(0).normal(size=(27 * 27 + 3, 2)).astype(np.float32)
    assert resize_bias_table(table, (14, 14), (14, 14), extra=3) is table
    larger = resize_bias_table(table, (14, 14), (16, 16), extra=3)
    assert larger.shape == (31 * 31 + 3, 2)
    np.testing.assert_array_equal(larger[-3:], table[-3:])


def test_axes_are_resized_independently():
    """In rectangles, values that depend only on the row or only on the column still do so after resizing."""
    rows, columns = (np.arange(2 * side - 1.0) ** 2 for side in (8, 4))
    table = np.stack(np.meshgrid(rows, columns, indexing="ij"), axis=-1).reshape(-1, 2)
    resized = resize_bias_table(table, (8, 4), (4, 16)).reshape(7, 31, 2)
    assert np.ptp(resized[..., 0], axis=1).max() < 1e-9
    assert np.ptp(resized[..., 1], axis=0).max() < 1e-9
    moved = resize_positions(np.repeat(np.arange(8.0), 4)[:, None], (8, 4), (4, 8)).reshape(4, 8)
    assert np.ptp(moved, axis=1).max() < 1e-9
    assert (np.diff(moved[:, 0]) > 0).all()


def test_windows_below_3_tokens_are_resized():
    """The official code fails for them. Stages of small models have them."""
    parabola = np.array([[row**2 + column for column in (-1, 0, 1)] for row in (-1, 0, 1)], np.float32).reshape(9, 1)
    resized = resize_bias_table(parabola, (2, 2), (3, 3)).reshape(5, 5)
    np.testing.assert_allclose(resized, resized[::-1], atol=1e-6)
    np.testing.assert_allclose(resized[1:4, 1:4].reshape(9, 1), parabola, atol=1e-6)
    assert (resize_bias_table(np.full((1, 2), 0.5, np.float32), (1, 1), (2, 2)) == 0.5).all()


def test_resized_positions_equal_pytorchs_bicubic_interpolation(golden):
    """tests/golden/resizing.npz is by torch 2.13; the tolerance covers its float32."""
    arrays = golden("resizing")
    for source, target in ((4, 6), (7, 5), (12, 14)):
        moved = resize_positions(arrays[f"positions_{source}_{target}"], (source, source), (target, target))
        np.testing.assert_allclose(moved, arrays[f"moved_{source}_{target}"], atol=5e-6)


def random_params(encoder, image_size=(32, 32)):
    """Random values for all parameters of a masked image model."""
    objective = make_objective("simmim", encoder, **{**PIXELS, "image_size": image_size}, mask_patch_size=16)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(objective.init, KEY)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)


def test_parameters_that_fit_are_taken_unchanged():
    params = random_params(tiny_encoder())
    taken, notes = fit(params, params, "here")
    jax.tree.map(np.testing.assert_array_equal, taken, params)
    assert notes == []


def test_shared_table_is_copied_to_each_block_and_unused_norm_is_dropped():
    saved = random_params(tiny_encoder())
    other = tiny_encoder(relative_position="per_block", final_norm=False)
    taken, notes = fit(saved, random_params(other), "here")
    for n in range(2):
        np.testing.assert_array_equal(
            taken["encoder"][f"block_{n}"]["rel_pos_bias"]["table"], saved["encoder"]["rel_pos_bias"]["table"]
        )
    assert "norm" not in taken["encoder"]
    assert notes == [
        ("encoder/block_0/rel_pos_bias/table", "copied from encoder/rel_pos_bias/table"),
        ("encoder/block_1/rel_pos_bias/table", "copied from encoder/rel_pos_bias/table"),
        ("encoder/norm/bias", "dropped, this encoder has no final norm"),
        ("encoder/norm/scale", "dropped, this encoder has no final norm"),
    ]
    taken, notes = fit(saved, random_params(other, image_size=(48, 48)), "here")
    expected = resize_bias_table(saved["encoder"]["rel_pos_bias"]["table"], (4, 4), (6, 6), extra=3)
    np.testing.assert_array_equal(taken["encoder"]["block_1"]["rel_pos_bias"]["table"], expected)
    assert ("encoder/block_1/rel_pos_bias/table", "resized from 52 to 124 rows") in notes


def test_rectangular_positions_follow_the_sides_even_if_their_number_is_equal():
    encoder = tiny_encoder(absolute_position="learned")
    saved, other = random_params(encoder, (128, 32)), random_params(encoder, (32, 128))
    taken, notes = fit(saved, other, "here", ((16, 4), (4, 16)))
    assert {done for _, done in notes} == {"resized from 65 to 65 rows", "resized from 220 to 220 rows"}
    expected = resize_positions(saved["encoder"]["pos_embed"], (16, 4), (4, 16), extra=1)
    np.testing.assert_array_equal(taken["encoder"]["pos_embed"], expected)
    assert fit(saved, saved, "here", ((16, 4), (16, 4)))[1] == []
    with pytest.raises(CheckpointError, match=r"217 displacements are not square"):
        fit(saved, random_params(encoder, (64, 64)), "here")
    patches = tiny_encoder(absolute_position="learned", class_position=False)
    saved = random_params(patches, (128, 32))
    taken, _ = fit(saved, random_params(patches, (32, 128)), "here", ((16, 4), (4, 16)))
    expected = resize_positions(saved["encoder"]["pos_embed"], (16, 4), (4, 16))
    np.testing.assert_array_equal(taken["encoder"]["pos_embed"], expected)


def test_swin_tables_follow_windows_and_positions_follow_the_image():
    sizes = {"width": 8, "depths": (1, 1), "num_heads": (1, 2), "absolute_position": "learned"}
    saved = random_params(make_encoder("swin", "t", window=4, **sizes))
    taken, notes = fit(saved, random_params(make_encoder("swin", "t", window=6, **sizes), (48, 48)), "here")
    assert taken["encoder"]["stage_0_block_0"]["attn"]["rel_pos_bias"]["table"].shape == (121, 1)
    expected = resize_positions(saved["encoder"]["pos_embed"], (8, 8), (12, 12))
    np.testing.assert_array_equal(taken["encoder"]["pos_embed"], expected)
    assert notes == [
        ("encoder/pos_embed", "resized from 64 to 144 rows"),
        ("encoder/stage_0_block_0/attn/rel_pos_bias/table", "resized from 49 to 121 rows"),
        ("encoder/stage_1_block_0/attn/rel_pos_bias/table", "resized from 49 to 121 rows"),
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 3}, "encoder/block_2/.* is absent there and float32"),
        ({"depth": 1}, "encoder/block_1/.* there and absent here"),
        ({"width": 64}, r"is float32\[32\] there and float32\[64\] here"),
        ({"layer_scale": 0.0}, "scale_attn/gamma is float32.* there and absent here"),
        ({"absolute_position": "learned"}, "pos_embed is absent there"),
    ],
)
def test_other_differences_are_refused_with_both_sides(options, message):
    with pytest.raises(CheckpointError, match=message):
        fit(random_params(tiny_encoder()), random_params(tiny_encoder(**options)), "here")


def test_encoder_with_equal_shapes_and_other_fields_is_refused():
    saved = {"encoder": {"name": "vit", "num_heads": 2, "relative_position": "shared", "drop_path": 0.0}, "mean": [0.5]}
    same = {"encoder": {**saved["encoder"], "relative_position": "per_block", "drop_path": 0.1}, "mean": [0.5]}
    refuse_other_encoder(saved, same, "here")
    refuse_other_encoder({}, same, "here")  # without config.json there is nothing to compare
    for change in ({"encoder": {**saved["encoder"], "num_heads": 4}}, {"mean": [0.4]},
                   {"encoder": {**saved["encoder"], "relative_position": "none"}}):  # fmt: skip
        with pytest.raises(CheckpointError, match="another encoder"):
            refuse_other_encoder(saved, {**saved, **change}, "here")


def test_swin_v2_needs_the_windows_of_pretraining():
    there = make_encoder("swinv2", "b", window=12).stage_windows((192, 192))
    assert there == (12, 12, 12, 6)
    moved = make_encoder("swinv2", "b", window=14)
    with pytest.raises(CheckpointError, match=r"pretrained_windows=12,12,12,6"):
        refuse_other_windows(there, moved.stage_windows((224, 224)), "here")


SMALL_SWIN = (
    "--config=configs/folder_vit_small.py", "--config.encoder.name=swinv2", "--config.encoder.size=t",
    "--config.encoder.width=16", "--config.encoder.depths=1,1", "--config.encoder.num_heads=1,2",
    "--config.encoder.window=4", "--config.image_size=32,32", "--config.objective.mask_patch_size=8",
)  # fmt: skip
DIGITS = (
    "--config.data.source=digits", "--config.data.heldout_split=test", "--config.mean=0.3,", "--config.std=0.4,",
    "--config.batch_size=32", "--config.steps=2", "--config.eval_images=64", "--config.optim.warmup_epochs=0",
)  # fmt: skip


@pytest.mark.slow
def test_swin_v2_is_fine_tuned_at_another_window_and_size(tmp_path):
    """Fine-tuning takes the architecture from the run, and the windows of pretraining for Swin V2."""
    done = run(*SMALL_SWIN, *DIGITS, "--workdir", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    tune = ("--config=configs/folder_finetune.py", *DIGITS, "--config.objective.num_classes=10",
            "--config.encoder.window=6", "--config.image_size=48,48")  # fmt: skip
    tuned = (*tune, "--config.init_from", tmp_path / "run", "--workdir", tmp_path / "tuned",
             "--config.optim.learning_rate=0", "--config.optim.min_learning_rate=0")  # fmt: skip
    done = run(*tuned)
    assert done.returncode == 0, done.stderr
    assert "encoder: taken from" in done.stdout
    config = json.loads((tmp_path / "tuned" / "config.json").read_text())["encoder"]
    assert (config["name"], config["window"], config["pretrained_windows"]) == ("swinv2", 6, [4, 4])
    before, after = arrays(tmp_path / "run", 2), arrays(tmp_path / "tuned", 2)
    names = [name for name in after if name.startswith("params['encoder']")]
    assert len(names) > 30
    assert all(before[name].tobytes() == after[name].tobytes() for name in names)

    shutil.rmtree(tmp_path / "run")  # resuming does not need the run that it started from
    done = run(*tuned)
    assert "nothing to do" in done.stdout, done.stderr


@pytest.mark.slow
def test_encoder_name_replaces_the_encoder_of_a_recipe(tmp_path):
    """A ResNet trains, is evaluated, and is probed linearly without changes to its batch norm statistics."""
    done = run(
        "--config=configs/digits_vit_tiny.py", "--config.encoder.name=resnet", "--config.encoder.size=50",
        "--config.encoder.depths=1,1,1,1", "--config.encoder.width=8", "--config.steps=2", "--config.probe_block=2",
        "--config.evals.linear.C=0.01", "--workdir", tmp_path / "run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "absolute_position, class_token, depth, num_heads, patch_size" in done.stdout
    linear = [
        "--config=configs/folder_linear.py",
        *(flag for flag in DIGITS if not flag.startswith(("--config.mean", "--config.std"))),
        "--config.image_size=32,32", "--config.mean=0.305,", "--config.std=0.376,",
        "--config.objective.num_classes=10", "--config.init_from", tmp_path / "run",
    ]  # fmt: skip
    done = run(*linear, "--workdir", tmp_path / "linear")
    assert done.returncode == 0, done.stderr
    before, after = arrays(tmp_path / "run", 2), arrays(tmp_path / "linear", 2)
    names = [name for name in after if name.startswith("params['encoder']")]
    assert len(names) > 30  # running statistics among them
    assert all(before[name].tobytes() == after[name].tobytes() for name in names)
