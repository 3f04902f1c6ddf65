"""The command `convert`: import, export, and its errors."""

import json
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from runs import run
from safetensors.numpy import load_file, save_file
from test_interop import (
    NORMED,
    SIMMIM,
    SWINS,
    VIT,
    assert_same,
    exported,
    make,
    official_buffers,
    random_params,
)
from torch_files import Call, CfgNode, Global, write_pth

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop.reading import read_metadata
from simmim_jax.models import make_encoder
from simmim_jax.runs import checkpoint
from simmim_jax.tools.convert import __main__ as convert
from simmim_jax.tools.convert import exports

CONVERT = ("-m", "simmim_jax.tools.convert")


def tool(*arguments):
    """Run the tool in this process."""
    convert.run([str(argument) for argument in arguments])


def error(*arguments, kind=ConfigError) -> str:
    """The message of the error that the tool raises."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    return str(caught.value)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A folder with a tiny official ViT as safetensors and its workdir, and our parameters."""
    folder = tmp_path_factory.mktemp("imported")
    weights, params = exported("official", VIT, SIMMIM)
    save_file(weights.arrays, folder / "vit.safetensors")
    tool(folder / "vit.safetensors", folder / "workdir")
    return folder, params


@pytest.fixture
def state(imported, tmp_path):
    """(path of a tiny official ViT as safetensors, its parameters as ours)."""
    shutil.copy(imported[0] / "vit.safetensors", tmp_path)
    return tmp_path / "vit.safetensors", imported[1]


@pytest.fixture
def workdir(imported, tmp_path):
    """A workdir of the tiny ViT."""
    return Path(shutil.copytree(imported[0] / "workdir", tmp_path / "workdir"))


def official_file(path, options, objective, **more):
    """Write a .pth like the official code: weights, optimizer, schedule and a yacs config. Returns our parameters."""
    weights, params = exported("official", options, objective)
    arrays = dict(weights.arrays)
    if options["name"].startswith("swin"):
        prefix = "encoder." if objective == SIMMIM else ""
        for stage, window in enumerate((4, 4, 4, 2)):
            buffers = official_buffers(window, window)
            for name, value in buffers.items():
                if name != "attn_mask":
                    arrays[f"{prefix}layers.{stage}.blocks.0.attn.{name}"] = value
        arrays[f"{prefix}layers.0.blocks.1.attn_mask"] = official_buffers()["attn_mask"]
    moments = {0: {"step": 3, "exp_avg": np.zeros(4, np.float32)}}
    content = {
        "model": {more.get("wrapper", "") + name: x for name, x in arrays.items()},
        "optimizer": {"state": moments, "param_groups": [{"lr": 1e-4, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-4]},
        "max_accuracy": 0.0,
        "epoch": 799,
        "config": CfgNode({"MODEL": CfgNode({"TYPE": options["name"]})}),
        **more.get("content", {}),
    }
    write_pth(path, content, legacy=more.get("legacy", False))
    return params


@pytest.mark.parametrize(
    ("name", "options", "objective"),
    [("vit", VIT, SIMMIM), ("swinv2", SWINS[1], SIMMIM),
     ("finetuned", {**VIT, "relative_position": "per_block", "final_norm": False}, NORMED)],
)  # fmt: skip
def test_official_pth_is_imported(tmp_path, capsys, name, options, objective):
    params = official_file(tmp_path / "official.pth", options, objective, legacy=name == "vit", wrapper="module.")
    tool(tmp_path / "official.pth", tmp_path / "workdir")
    back, config = checkpoint.read_params(str(tmp_path / "workdir"))
    assert_same(back, params)
    assert config["imported"].keys() == {"from", "key", "format", "sha256"}
    assert config["objective"] == objective
    assert config["image_size"] == list((32, 32) if options["name"] == "vit" else (64, 64))
    out = capsys.readouterr().out
    assert f"official {options['name']} ({objective['name']})" in out
    assert f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters" in out
    assert f"--config.init_from={tmp_path / 'workdir'}" in out
    assert ("left out, not weights" in out) == options["name"].startswith("swin")


def test_hostile_file_is_refused_and_leaves_nothing(tmp_path):
    marker = tmp_path / "marker"
    harm = Call(Global("os", "system"), f"touch {marker}")
    official_file(tmp_path / "evil.pth", VIT, SIMMIM, content={"config": harm})
    assert "os.system" in error(tmp_path / "evil.pth", tmp_path / "workdir", kind=CheckpointError)
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_import_and_export_give_the_same_arrays(tmp_path, state, workdir):
    tool(workdir, tmp_path / "out.safetensors", "--format=official")
    theirs, ours = load_file(state[0]), load_file(tmp_path / "out.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("a",), "TO"),
        (("a", "b", "c"), "unknown argument 'c'"),
        (("a", "b", "--image_size=big"), "--image-size"),
        (("a", "b", "--std=0.1,0.0,0.1"), "--std"),
        (("a", "b", "--format=tim"), "did you mean timm"),
    ],
)
def test_invalid_options_are_config_errors(arguments, part):
    assert part in error(*arguments)


def test_option_values_are_parsed():
    given = ("--encoder.depths=2,2", "--encoder.num_heads=[1, 2]", "--encoder.window", "7", "--encoder.qkv_bias=none",
             "--encoder.final_norm=False", "--image-size=192", "--mean=0,0,0", "--allow=a,b",
             "--allow", "c.*")  # fmt: skip
    options, fields = convert.parse(["FROM", *given, "TO"])
    assert fields == {"depths": (2, 2), "num_heads": (1, 2), "window": 7, "qkv_bias": "none", "final_norm": False}
    assert (options.image_size, options.mean, options.allow) == ((192, 192), (0.0, 0.0, 0.0), ["a", "b", "c.*"])
    assert (options.source, options.target, options.overwrite) == ("FROM", "TO", False)


@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--encoder.head=2", "did you mean num_heads"),
        ("--encoder.window=12", "unknown vit field 'window'"),
        ("--encoder.num_heads=two", "int"),
        ("--encoder.norm_epsilon=1e400", "to 1000"),
        ("--encoder.norm_epsilon=nan", "float"),
        ("--encoder.norm_epsilon=-1.0", "from 0"),
        ("--encoder.patch_size=0", "from 1 to"),
        ("--encoder.depth=True", "int"),
        ("--mean=0.5", "no mean for 3 channel(s)"),
    ],
)
def test_unknown_and_invalid_fields_are_refused(tmp_path, state, flag, part):
    assert part in error(state[0], tmp_path / "w", flag)
    assert not (tmp_path / "w").exists()


def test_invalid_sources_and_targets_are_refused(tmp_path, workdir):
    assert "no such file or folder" in error(tmp_path / "nowhere", tmp_path / "w", kind=CheckpointError)
    assert "--format in an import" in error(tmp_path / "nowhere", tmp_path / "w", "--format=timm")
    assert "--image-size in an export" in error(workdir, tmp_path / "w", "--image_size=32")
    assert "--encoder.num_heads in an export" in error(workdir, tmp_path / "w", "--encoder.num_heads=2")
    assert "--format=official or --format=timm" in error(workdir, tmp_path / "w.safetensors")
    for ending in (".pth", ".stablehlp"):
        assert f"files that end in {ending}" in error(workdir, tmp_path / f"w{ending}")
    (tmp_path / "w.folder").mkdir()
    assert {exports.infer_format(str(tmp_path / name)) for name in ("w", "w-0.9", "w.folder")} == {"huggingface"}


def test_existing_output_stays_without_overwrite(tmp_path, state, workdir):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert "--overwrite" in error(state[0], workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    tool(state[0], workdir, "--overwrite", "--mean=0.5,0.5,0.5")
    assert json.loads((workdir / "config.json").read_text())["mean"] == [0.5, 0.5, 0.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.safetensors", "workdir"]


FOREIGN = "simmim_jax has not written it"


def test_overwrite_replaces_only_what_a_conversion_of_the_same_kind_wrote(tmp_path, state, workdir):
    for name, flags in (
        ("bare", ["--allow=head,mask_token"]),
        ("a.stablehlo", []),
        ("a.safetensors", ["--format=official"]),
    ):
        tool(workdir, tmp_path / name, *flags)
        tool(workdir, tmp_path / name, *flags, "--overwrite")
    (tmp_path / "bare" / "notes.txt").write_text("mine")
    assert FOREIGN in error(workdir, tmp_path / "bare", "--overwrite")
    (tmp_path / "bare" / "notes.txt").unlink()
    save_file({"a": np.zeros(3)}, tmp_path / "bare" / "model.safetensors")  # like save_pretrained, with our config.json
    assert FOREIGN in error(workdir, tmp_path / "bare", "--overwrite")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    assert FOREIGN in error(state[0], tmp_path / "photos", "--overwrite")
    foreign = jax.export.export(jax.jit(lambda x: x))(np.zeros(3)).serialize()
    for name, content in (("b.stablehlo", foreign), ("c.stablehlo", b"text"), ("d.safetensors", b"text")):
        (tmp_path / name).write_bytes(content)
        flags = ["--format=official"] if name.endswith("safetensors") else []
        assert FOREIGN in error(workdir, tmp_path / name, *flags, "--overwrite")
        assert (tmp_path / name).read_bytes() == content
    shutil.copytree(workdir, tmp_path / "trained")
    (tmp_path / "trained" / "metrics.jsonl").write_text("")
    assert FOREIGN in error(state[0], tmp_path / "trained", "--overwrite")
    assert "a folder" in error(workdir, tmp_path / "trained", "--format=timm", "--overwrite")
    assert FOREIGN in error(workdir, tmp_path / "trained", "--overwrite")
    assert checkpoint.has_steps(str(tmp_path / "trained"))


def test_overlapping_source_and_target_are_refused(tmp_path, state, workdir):
    hf = tmp_path / "downloaded"
    hf.mkdir()
    for source, target in ((state[0], state[0]), (workdir, workdir), (workdir, workdir / "hf"), (state[0], tmp_path),
                           (workdir / "checkpoints" / "0", workdir), (hf, f"{hf}/../downloaded")):  # fmt: skip
        assert "FROM and TO" in error(source, target, "--overwrite")
    (tmp_path / "link").symlink_to(workdir)
    assert "FROM and TO" in error(workdir, tmp_path / "link", "--overwrite")


@pytest.mark.parametrize(
    ("format", "options", "image_size"),
    [
        (
            "official",
            {**VIT, "relative_position": "none", "absolute_position": "learned", "layer_scale": 0.3},
            (64, 16),
        ),
        ("official", {**SWINS[1], "pretrained_windows": (8, 8, 8, 4)}, (64, 64)),
        ("timm", {**SWINS[1], "pretrained_windows": (8, 8, 8, 4)}, (64, 64)),
    ],
)
def test_fields_that_names_do_not_determine_come_back_from_our_metadata(tmp_path, capsys, format, options, image_size):
    params = random_params(make(options, {"name": "none"}, image_size)[1])
    config = {"encoder": options, "image_size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    checkpoint.write_params(str(tmp_path / "run"), params, json.loads(json.dumps(config)))
    tool(tmp_path / "run", tmp_path / "a.safetensors", f"--format={format}")
    assert ("windows of pretraining" in capsys.readouterr().out) == ("pretrained_windows" in options)
    tool(tmp_path / "a.safetensors", tmp_path / "back")
    assert "note: assumed" not in capsys.readouterr().out
    back, read = checkpoint.read_params(str(tmp_path / "back"))
    assert_same(back, params)
    assert (tuple(read["image_size"]), read["mean"], read["std"]) == (image_size, [0.5] * 3, [0.25] * 3)
    assert repr(make_encoder(**read["encoder"])) == repr(make_encoder(**options))


@pytest.mark.parametrize(
    "change",
    [{"encoder": 1}, {"encoder": {"name": "swin"}}, {"encoder": {"name": "vit", "width": "16"}}, {"mean": [1, 2]},
     {"image_size": [32, 32, 32]}, {"std": [0, 0, 0]}, {"encoder": {"name": "vit", "depth": 3}}, None],
)  # fmt: skip
def test_changed_metadata_are_refused(tmp_path, imported, change):
    if not (imported[0] / "a.safetensors").exists():
        tool(imported[0] / "workdir", imported[0] / "a.safetensors", "--format=official")
    metadata = read_metadata(imported[0] / "a.safetensors")
    metadata["model"] = json.dumps(json.loads(metadata["model"]) | change) if change else "{"
    save_file(load_file(imported[0] / "a.safetensors"), tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises((CheckpointError, ConfigError), match=r"b\.safetensors"):
        tool(tmp_path / "b.safetensors", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_model_card_has_step_origin_and_only_the_metrics_of_that_step(tmp_path, state):
    config = {"encoder": {**VIT}, "objective": {"name": "simmim"}, "image_size": (32, 32), "mean": (0.5,) * 3,
              "std": (0.25,) * 3, "init_from": "runs/before"}  # fmt: skip
    checkpoint.write_params(str(tmp_path / "run"), state[1], json.loads(json.dumps(config)), step=70)
    for step, expected in ((70, True), (90, False)):
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"step": step, "masked_loss": 0.25}))
        tool(tmp_path / "run", tmp_path / f"hf{step}", "--allow=head,mask_token")
        card = (tmp_path / f"hf{step}" / "README.md").read_text()
        assert "after 70 steps of training" in card
        assert "`runs/before`" in card
        assert "the user left out: head, mask_token" in card
        assert "no place" not in card
        assert ("masked_loss: 0.25" in card) == expected


@pytest.mark.parametrize(
    ("image_size", "size"), [((32, 32), {"shortest_edge": 40}), ((64, 16), {"height": 64, "width": 16})]
)
def test_preprocessor_resizes_and_crops_like_the_run_and_squashing_is_noted(tmp_path, capsys, image_size, size):
    options = {**VIT, "class_token": True, "relative_position": "none", "absolute_position": "learned"}
    params = random_params(make(options, {"name": "none"}, image_size)[1])
    config = {"encoder": options, "image_size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3,
              "data": {"crop_fraction": 0.8, "interpolation": "bilinear"}}  # fmt: skip
    checkpoint.write_params(str(tmp_path / "run"), params, json.loads(json.dumps(config)))
    tool(tmp_path / "run", tmp_path / "hf")
    found = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    square = image_size[0] == image_size[1]
    assert (found["size"], found["resample"], found["do_center_crop"]) == (size, 2, square)
    assert found["crop_size"] == {"height": image_size[0], "width": image_size[1]}
    for text in (capsys.readouterr().out, (tmp_path / "hf" / "README.md").read_text()):
        assert ("squashes images to 64 x 16" in text) != square


def test_allow_must_leave_something_useful(tmp_path, state, workdir):
    assert "leaves out all" in error(state[0], tmp_path / "w", "--allow=*")
    line = error(state[0], tmp_path / "w", "--allow=encoder.mask_token")
    assert "--allow 'encoder.mask_token,decoder.*'" in line
    tool(state[0], tmp_path / "bare", "--allow=encoder.mask_token,decoder.*")
    assert "'hed' matches nothing" in error(tmp_path / "bare", tmp_path / "hf", "--allow=hed", kind=CheckpointError)


def test_failed_export_leaves_nothing(tmp_path, state, workdir, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simmim_jax.tools.convert.exports.save_file", fail)
    for target in ((tmp_path / "hf",), (tmp_path / "out.safetensors", "--format=official")):
        assert "cannot write: No space left on device" in error(workdir, *target, kind=CheckpointError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.safetensors", "workdir"]


def test_full_disk_is_one_line_with_exit_code_5(tmp_path, state, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    done = run(state[0], tmp_path / "new", script=CONVERT, file_limit=4)
    assert done.returncode == 5, done.stderr
    assert re.fullmatch(r"ERROR\[checkpoint\] .+ - .+ - make room .+", done.stderr.strip())
    assert sorted(tmp_path.iterdir()) == [state[0]]


def test_failed_replacement_keeps_the_old_output(tmp_path, state, workdir, monkeypatch):
    before = (workdir / "config.json").read_text()

    def fail(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    line = error(state[0], workdir, "--overwrite", "--mean=.1,.1,.1", kind=CheckpointError)
    assert "cannot write: Input/output error" in line
    assert (workdir / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.safetensors", "workdir"]


def test_target_below_a_file_is_refused(tmp_path, state, workdir):
    assert "cannot write" in error(workdir, state[0] / "hf", kind=CheckpointError)


def test_allow_leaves_parts_out_and_prints_them(tmp_path, state, workdir, capsys):
    assert "encoder.mask_token" in error(state[0], tmp_path / "bare", "--allow=decoder.*", kind=CheckpointError)
    capsys.readouterr()
    tool(state[0], tmp_path / "bare", "--allow=decoder.*", "--allow", "encoder.mask_token")
    assert "--allow: decoder.0.bias, decoder.0.weight, encoder.mask_token" in capsys.readouterr().out
    params, config = checkpoint.read_params(str(tmp_path / "bare"))
    assert (list(params), config["objective"]) == (["encoder"], {"name": "none"})
    tool(workdir, tmp_path / "bare.safetensors", "--format=official", "--allow=head,mask_token")
    assert "--allow: head, mask_token" in capsys.readouterr().out
    assert not [name for name in load_file(tmp_path / "bare.safetensors") if "decoder" in name or "mask" in name]


def test_exported_classifier_has_the_class_names_of_the_run(tmp_path, capsys):
    options, objective = {**VIT, "relative_position": "per_block", "final_norm": False}, {"name": "classify"}
    objective |= {"num_classes": 2, "fc_norm": True}
    params = random_params(make(options, objective, (32, 32))[1])
    config = {
        "encoder": options,
        "objective": objective,
        "image_size": (32, 32),
        "mean": (0.5,) * 3,
        "std": (0.25,) * 3,
    }
    checkpoint.write_params(str(tmp_path / "run"), params, json.loads(json.dumps(config | {"classes": ["ant", "bee"]})))
    tool(tmp_path / "run", tmp_path / "hf")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["id2label"] == {"0": "ant", "1": "bee"}
    assert written["label2id"] == {"ant": 0, "bee": 1}
    assert "AutoModelForImageClassification" in capsys.readouterr().out


def test_export_that_a_format_cannot_hold_is_refused(tmp_path, state):
    weights, _ = exported("official", SWINS[0], SIMMIM)
    save_file(weights.arrays, tmp_path / "swin.safetensors")
    tool(tmp_path / "swin.safetensors", tmp_path / "swin")
    line = error(tmp_path / "swin", tmp_path / "hf", kind=CheckpointError)
    assert "huggingface cannot hold this model" in line
    assert not (tmp_path / "hf").exists()


def test_lost_config_and_unknown_objective_are_refused(tmp_path, workdir):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"objective": {"name": "contrast"}}))
    assert "leave them out with --allow head,mask_token" in error(workdir, tmp_path / "hf", kind=CheckpointError)
    tool(workdir, tmp_path / "hf", "--allow=head,mask_token")
    (workdir / "config.json").unlink()
    assert "config.json" in error(workdir, tmp_path / "hf2", kind=CheckpointError)


def test_hugging_face_folder_is_exported_and_imported(tmp_path, capsys):
    weights, params = exported("official", {**SWINS[1], "window": 2}, SIMMIM)
    save_file(weights.arrays, tmp_path / "swin.safetensors")
    tool(tmp_path / "swin.safetensors", tmp_path / "swin", "--encoder.window=2", "--image_size=64", "--std=.2,.3,.4")
    (tmp_path / "swin" / "summary.json").write_text(json.dumps({"step": 0, "masked_loss": 0.25, "start": {"x": 1}}))
    tool(tmp_path / "swin", tmp_path / "hf")
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == [
        "README.md", "config.json", "model.safetensors", "preprocessor_config.json",
    ]  # fmt: skip
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["Swinv2ForMaskedImageModeling"]
    pixels = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert (pixels["size"], pixels["resample"]) == ({"shortest_edge": 73}, 3)  # of imports: 64 / 0.875, and bicubic
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "- masked_loss: 0.25" in card
    assert "swin.safetensors" in card  # where the weights came from
    tool(tmp_path / "hf", tmp_path / "again")
    back, read = checkpoint.read_params(str(tmp_path / "again"))
    assert_same(back, params)
    first = json.loads((tmp_path / "swin" / "config.json").read_text())
    assert {name: read[name] for name in read if name != "imported"} == {
        name: first[name] for name in first if name != "imported"
    }
    assert read["std"] == [0.2, 0.3, 0.4]


def test_unsupported_heads_are_left_out_and_printed(tmp_path, workdir, state, capsys):
    tool(workdir, tmp_path / "beit")
    out = capsys.readouterr().out
    assert "huggingface vit (encoder only)" in out
    assert "huggingface has no place for it: head, mask_token" in out
    assert "no place for: head, mask_token" in (tmp_path / "beit/README.md").read_text()
    tool(tmp_path / "beit", tmp_path / "again")
    assert_same(checkpoint.read_params(str(tmp_path / "again"))[0], {"encoder": state[1]["encoder"]})


def test_stablehlo_program_gives_the_same_features_for_any_batch_size(tmp_path, workdir, state):
    tool(workdir, tmp_path / "vit.stablehlo")
    program = jax.export.deserialize(bytearray((tmp_path / "vit.stablehlo").read_bytes()))
    assert set(program.platforms) == {"cpu", "cuda", "tpu"}
    config = json.loads((workdir / "config.json").read_text())
    encoder = make_encoder(**config["encoder"])
    mean, std = np.float32(config["mean"]), np.float32(config["std"])
    for batch in (1, 3):
        images = np.random.default_rng(batch).integers(0, 256, (batch, 32, 32, 3), np.uint8)
        features = program.call(images)
        params = jax.tree.map(jnp.asarray, state[1]["encoder"])
        expected = encoder.apply({"params": params}, jnp.asarray((images.astype(np.float32) / 255 - mean) / std))
        assert features.shape == (batch, 4, 4, 16)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)  # the exporter's jit fuses differently


def test_step_and_checkpoints_folders_are_runs(tmp_path, workdir, state):
    for number, source in enumerate((workdir / "checkpoints", workdir / "checkpoints" / "0")):
        tool(source, tmp_path / f"{number}.safetensors", "--format=official")
        assert load_file(tmp_path / f"{number}.safetensors").keys() == load_file(state[0]).keys()


@pytest.mark.slow
def test_official_pretraining_continues_in_the_imported_workdir(golden, tmp_path):
    """With the imported weights, new optimizer moments and a known origin; and it resumes."""
    model = {
        name.removeprefix("params/"): x for name, x in golden("official_swin_pretrain").items() if "params/" in name
    }
    write_pth(tmp_path / "official.pth", {"model": model, "epoch": 799})
    tool(tmp_path / "official.pth", tmp_path / "run")
    before, _ = checkpoint.read_params(str(tmp_path / "run"))
    flags = (
        "--config=configs/simmim_swin_b_800ep.py", "--config.encoder.width=8", "--config.encoder.depths=2,2,2,2",
        "--config.encoder.num_heads=1,1,2,2", "--config.encoder.window=4", "--config.image_size=64,64",
        "--config.encoder.dtype=float32", "--config.data.source=digits", "--config.data.heldout_split=test",
        "--config.data.workers=0", "--config.batch_size=16", "--config.eval_images=16", "--config.steps=2",
        "--workdir", tmp_path / "run",
    )  # fmt: skip
    done = run(*flags, "--config.optim.learning_rate=0", "--config.optim.warmup_learning_rate=0")
    assert done.returncode == 0, done.stderr
    assert "starting step 0 of 2" in done.stdout
    after, config = checkpoint.read_params(str(tmp_path / "run"))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert config["imported"]["format"] == "official"
    assert "window: 4 saved, 6 now" in run(*flags, "--config.encoder.window=6").stderr
