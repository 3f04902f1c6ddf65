"""The conversion tool from its command line: in, out, back, and every mistake in one line."""

import json
import re

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
    """The tool in this process."""
    convert.run([str(argument) for argument in arguments])


def told(*arguments, kind=ConfigError) -> str:
    """The one line of the tool's error."""
    with pytest.raises(kind) as caught:
        tool(*arguments)
    return str(caught.value)


@pytest.fixture
def state(tmp_path):
    """(path of a tiny official ViT as safetensors, its parameters as ours)."""
    weights, params = exported("official", VIT, SIMMIM)
    save_file(weights.arrays, tmp_path / "vit.safetensors")
    return tmp_path / "vit.safetensors", params


@pytest.fixture
def workdir(tmp_path, state):
    """A workdir of a tiny ViT."""
    tool(state[0], tmp_path / "workdir")
    return tmp_path / "workdir"


def official_file(path, options, objective, **more):
    """A .pth as the official code saves one: weights, optimizer, schedule, and a config of yacs. Returns our params."""
    weights, params = exported("official", options, objective)
    arrays = dict(weights.arrays)
    if options["name"].startswith("swin"):
        prefix = "encoder." if objective == SIMMIM else ""
        for stage, window in enumerate((4, 4, 4, 2)):
            buffers = official_buffers(window, window)
            if options["name"] == "swin":
                del buffers["relative_coords_table"]
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
    [("vit", VIT, SIMMIM), ("swin", SWINS[0], SIMMIM), ("swinv2", SWINS[1], SIMMIM),
     ("finetuned", {**VIT, "relative_position": "per_block", "final_norm": False}, NORMED)],
)  # fmt: skip
def test_an_official_pth_becomes_a_workdir(tmp_path, capsys, name, options, objective):
    params = official_file(tmp_path / "official.pth", options, objective, legacy=name == "vit", wrapper="module.")
    tool(tmp_path / "official.pth", tmp_path / "workdir")
    back, config = checkpoint.read_params(str(tmp_path / "workdir"))
    assert_same(back, params)
    assert config["imported"].keys() == {"from", "format", "sha256"}
    assert config["objective"] == objective
    assert config["image_size"] == list((32, 32) if options["name"] == "vit" else (64, 64))
    out = capsys.readouterr().out
    assert f"official {options['name']} ({objective['name']})" in out
    assert f"{sum(x.size for x in jax.tree.leaves(params)):,} parameters" in out
    assert f"--config.init_from={tmp_path / 'workdir'}" in out
    assert ("not weights, left out" in out) == options["name"].startswith("swin")


def test_a_hostile_file_is_refused_with_exit_code_5_and_without_a_trace(tmp_path):
    marker = tmp_path / "marker"
    harm = Call(Global("os", "system"), f"touch {marker}")
    official_file(tmp_path / "evil.pth", VIT, SIMMIM, content={"config": harm})
    done = run(tmp_path / "evil.pth", tmp_path / "workdir", script=CONVERT)
    assert done.returncode == 5, done.stderr
    assert re.fullmatch(r"ERROR\[checkpoint\] .+ - .+", done.stderr.strip().splitlines()[-1])
    assert not marker.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["evil.pth"]


def test_the_command_line_imports_and_exports(tmp_path, state):
    done = run(state[0], tmp_path / "workdir", script=CONVERT)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    done = run(tmp_path / "workdir", tmp_path / "out.safetensors", "--format=official", script=CONVERT)
    assert done.returncode == 0, done.stderr
    assert "official vit (simmim)" in done.stdout
    theirs, ours = load_file(state[0]), load_file(tmp_path / "out.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(theirs[name].tobytes() == ours[name].tobytes() for name in theirs)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("a",), "the following arguments are required: TO - command line"),
        (("a", "b", "c"), "unknown argument 'c' - command line - see --help"),
        (("a", "b", "--alow=x"), "unknown argument '--alow=x' - command line - did you mean --allow"),
        (("a", "b", "--image_size=big"), "--image-size=big - command line - give height,width in pixels"),
        (("a", "b", "--image-size=1,2,3"), "--image-size=1,2,3"),
        (("a", "b", "--image-size=0"), "--image-size=0"),
        (("a", "b", "--image-size=-64"), "--image-size=-64"),
        (("a", "b", "--image-size=1000000"), "--image-size=1000000"),
        (("a", "b", "--std=0.1,0.0,0.1"), "--std=0.1,0.0,0.1 - command line - give numbers above 0"),
        (("a", "b", "--mean=nan"), "--mean=nan - command line - give numbers with commas between"),
        (("a", "b", "--format=tim"), "unknown format 'tim' - did you mean timm"),
    ],
)
def test_a_mistake_in_an_option_is_one_line_and_exit_code_2(tmp_path, arguments, line):
    assert line in told(*arguments)


def test_values_on_the_command_line_are_numbers_tuples_and_words():
    given = ("--encoder.depths=2,2", "--encoder.num_heads=[1, 2]", "--encoder.window", "7", "--encoder.qkv_bias=none",
             "--encoder.final_norm=False", "--image-size=192", "--mean=0,0,0", "--allow=a,b",
             "--allow", "c.*")  # fmt: skip
    options, fields = convert.parse(["FROM", *given, "TO"])
    assert fields == {"depths": (2, 2), "num_heads": (1, 2), "window": 7, "qkv_bias": "none", "final_norm": False}
    assert (options.image_size, options.mean, options.allow) == ((192, 192), (0.0, 0.0, 0.0), ["a", "b", "c.*"])
    assert (options.source, options.target, options.overwrite) == ("FROM", "TO", False)


def test_help_and_mistakes_are_told_without_importing_jax():
    for arguments, code in ((("--help",), 0), (("a", "b", "--alow=x"), 2)):
        done = run(*arguments, script=("-X", "importtime", *CONVERT))
        assert done.returncode == code
        imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines() if "|" in line}
        assert "argparse" in imported
        assert not imported & {"jax", "flax", "numpy", "orbax", "safetensors"}
        if code:
            assert done.stderr.strip().splitlines()[-1].startswith("ERROR[config] unknown argument '--alow=x'")
        else:
            assert "examples:" in done.stdout


def test_a_field_that_does_not_exist_or_does_not_fit_is_told(tmp_path, state):
    assert "unknown vit field 'head' - did you mean heads" in told(state[0], tmp_path / "w", "--encoder.head=2")
    assert "--encoder.num_heads=two - command line - give a int, like 12" in told(
        state[0], tmp_path / "w", "--encoder.num_heads=two"
    )
    for value, fix in (("norm_epsilon=1e400", "to 1000"), ("norm_epsilon=nan", "float"), ("norm_epsilon=-1.0", "0"),
                       ("patch_size=0", "from 1 to"), ("depth=True", "int")):  # fmt: skip
        assert re.search(rf"--encoder.{value.split('=')[0]}=.* - command line - .*{fix}",
                         told(state[0], tmp_path / "w", f"--encoder.{value}"))  # fmt: skip
    assert "unknown vit field 'window'" in told(state[0], tmp_path / "w", "--encoder.window", "12")
    assert "no mean for 3 channel(s)" in told(state[0], tmp_path / "w", "--mean=0.5")
    assert not (tmp_path / "w").exists()


def test_a_source_that_is_nothing_is_told(tmp_path, workdir):
    assert "no such file or folder" in told(tmp_path / "nowhere", tmp_path / "w", kind=CheckpointError)
    assert "nowhere is no run of ours" in told(tmp_path / "nowhere", tmp_path / "w", "--format=timm")
    assert "--image-size in an export" in told(workdir, tmp_path / "w", "--image_size=32")
    assert "--encoder.num_heads in an export" in told(workdir, tmp_path / "w", "--encoder.num_heads=2")
    assert "a state dict under whose names?" in told(workdir, tmp_path / "w.safetensors")
    for ending in (".pth", ".onnx", ".stablehlp"):
        line = told(workdir, tmp_path / f"w{ending}")
        assert f"no format has files that end in {ending}" in line
        assert "give FILE.safetensors (of official and timm), FILE.stablehlo, or --format=huggingface" in line
    (tmp_path / "w.folder").mkdir()
    assert {exports.inferred_format(str(tmp_path / name)) for name in ("w", "w-0.9", "w.folder")} == {"huggingface"}


def test_what_is_there_is_kept_unless_told_to_overwrite_it_and_then_only_what_a_conversion_wrote(
    tmp_path, state, workdir
):
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert "there is something already" in told(state[0], workdir)
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    tool(state[0], workdir, "--overwrite", "--mean=0.5,0.5,0.5")
    assert json.loads((workdir / "config.json").read_text())["mean"] == [0.5, 0.5, 0.5]
    assert [path.name for path in tmp_path.iterdir() if "partial" in path.name or ".old" in path.name] == []

    (workdir / "metrics.jsonl").write_text("")
    assert "a run has gone on in this folder" in told(state[0], workdir, "--overwrite")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "one.jpg").write_text("")
    assert "no import has written this folder" in told(state[0], tmp_path / "photos", "--overwrite")
    assert (tmp_path / "photos" / "one.jpg").exists()

    out = tmp_path / "out.safetensors"
    out.write_text("something")
    assert "there is something already" in told(workdir, out, "--format=official")
    assert "no conversion to safetensors has written this file" in told(
        workdir, out, "--format=official", "--overwrite"
    )
    assert out.read_text() == "something"
    out.unlink()
    tool(workdir, out, "--format=official")
    tool(workdir, out, "--format=official", "--overwrite")
    assert load_file(out).keys() == load_file(state[0]).keys()


def test_from_and_to_may_not_lie_in_one_another(tmp_path, state, workdir):
    hf = tmp_path / "downloaded"
    hf.mkdir()
    for source, target in ((state[0], state[0]), (workdir, workdir), (workdir, workdir / "hf"), (state[0], tmp_path),
                           (workdir / "checkpoints" / "0", workdir), (hf, f"{hf}/../downloaded")):  # fmt: skip
        assert "FROM and TO are the same, or one lies in the other" in told(source, target, "--overwrite")
    (tmp_path / "link").symlink_to(workdir)
    assert "FROM and TO are the same" in told(workdir, tmp_path / "link", "--overwrite")


def test_overwriting_takes_only_what_bears_our_mark_and_is_of_the_same_kind(tmp_path, state, workdir, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tool("~/workdir", "~/bare", "--allow=head,mask_token")
    tool(workdir, tmp_path / "bare", "--allow=head,mask_token", "--overwrite")
    tool(workdir, tmp_path / "a.stablehlo")
    tool(workdir, tmp_path / "a.stablehlo", "--overwrite")
    (tmp_path / "bare" / "notes.txt").write_text("mine")
    assert "it holds 'notes.txt' too" in told(workdir, tmp_path / "bare", "--overwrite")
    (tmp_path / "bare" / "notes.txt").unlink()
    save_file({"a": np.zeros(3)}, tmp_path / "bare" / "model.safetensors")  # as save_pretrained would, config.json kept
    assert "no conversion to huggingface has written" in told(workdir, tmp_path / "bare", "--overwrite")
    foreign = jax.export.export(jax.jit(lambda x: x))(np.zeros(3)).serialize()
    (tmp_path / "b.stablehlo").write_bytes(foreign)
    (tmp_path / "c.stablehlo").write_text("text")
    for name in ("b.stablehlo", "c.stablehlo"):
        assert "no conversion to stablehlo has written" in told(workdir, tmp_path / name, "--overwrite")
    tool(state[0], tmp_path / "other")
    assert "a folder, where" in told(workdir, tmp_path / "other", "--format=timm", "--overwrite")
    assert "no conversion to huggingface has written" in told(workdir, tmp_path / "other", "--overwrite")
    assert checkpoint.has_steps(str(tmp_path / "other"))


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
def test_what_the_names_do_not_tell_comes_back_from_our_own_metadata(tmp_path, capsys, format, options, image_size):
    params = random_params(make(options, {"name": "none"}, image_size)[1])
    config = {"encoder": options, "image_size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    checkpoint.write_params(str(tmp_path / "run"), params, json.loads(json.dumps(config)))
    tool(tmp_path / "run", tmp_path / "a.safetensors", f"--format={format}")
    assert ("note: the file does not tell the windows of pretraining" in capsys.readouterr().out) == (
        "pretrained_windows" in options
    )
    tool(tmp_path / "a.safetensors", tmp_path / "back")
    assert "note: took" not in capsys.readouterr().out
    back, read = checkpoint.read_params(str(tmp_path / "back"))
    assert_same(back, params)
    assert (tuple(read["image_size"]), read["mean"], read["std"]) == (image_size, [0.5] * 3, [0.25] * 3)
    assert repr(make_encoder(**read["encoder"])) == repr(make_encoder(**options))


@pytest.mark.parametrize(
    "change",
    [{"encoder": 1}, {"encoder": {"name": "swin"}}, {"encoder": {"name": "vit", "width": "16"}}, {"mean": [1, 2]},
     {"image_size": ["a", 1]}, {"image_size": [32, 32, 32]}, {"std": [0, 0, 0]},
     {"encoder": {"name": "vit", "depth": 3}}, None],
)  # fmt: skip
def test_metadata_of_ours_that_somebody_changed_is_told(tmp_path, state, workdir, change):
    tool(workdir, tmp_path / "a.safetensors", "--format=official")
    metadata = read_metadata(tmp_path / "a.safetensors")
    metadata["model"] = json.dumps(json.loads(metadata["model"]) | change) if change else "{"
    save_file(load_file(state[0]), tmp_path / "b.safetensors", metadata=metadata)
    with pytest.raises((CheckpointError, ConfigError), match=r"b\.safetensors"):
        tool(tmp_path / "b.safetensors", tmp_path / "w")
    assert not (tmp_path / "w").exists()


def test_the_card_tells_the_step_where_it_began_and_only_the_metrics_of_that_step(tmp_path, state):
    config = {"encoder": {**VIT}, "objective": {"name": "simmim"}, "image_size": (32, 32), "mean": (0.5,) * 3,
              "std": (0.25,) * 3, "init_from": "runs/before"}  # fmt: skip
    checkpoint.write_params(str(tmp_path / "run"), state[1], json.loads(json.dumps(config)), step=70)
    for step, expected in ((70, True), (90, False)):
        (tmp_path / "run" / "summary.json").write_text(json.dumps({"step": step, "masked_loss": 0.25}))
        tool(tmp_path / "run", tmp_path / f"hf{step}", "--allow=head,mask_token")
        card = (tmp_path / f"hf{step}" / "README.md").read_text()
        assert "after 70 steps of training" in card
        assert "began with the weights of `runs/before`" in card
        assert "as its user chose: head, mask_token" in card
        assert "no place" not in card
        assert ("masked_loss: 0.25" in card) == expected


@pytest.mark.parametrize(
    ("image_size", "size"), [((32, 32), {"shortest_edge": 40}), ((64, 16), {"height": 64, "width": 16})]
)
def test_the_processor_of_a_folder_resizes_and_crops_as_the_run_does_and_what_it_squashes_is_told(
    tmp_path, capsys, image_size, size
):
    options = {**VIT, "class_token": True, "relative_position": "none", "absolute_position": "learned"}
    params = random_params(make(options, {"name": "none"}, image_size)[1])
    config = {"encoder": options, "image_size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3,
              "data": {"crop_fraction": 0.8, "interpolation": "bilinear"}}  # fmt: skip
    checkpoint.write_params(str(tmp_path / "run"), params, json.loads(json.dumps(config)))
    tool(tmp_path / "run", tmp_path / "hf")
    told = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    square = image_size[0] == image_size[1]
    assert (told["size"], told["resample"], told["do_center_crop"]) == (size, 2, square)
    assert told["crop_size"] == {"height": image_size[0], "width": image_size[1]}
    for text in (capsys.readouterr().out, (tmp_path / "hf" / "README.md").read_text()):
        assert ("preprocessor_config.json squashes images to 64 x 16" in text) != square


def test_what_allow_leaves_out_must_leave_something_of_use(tmp_path, state, workdir):
    assert "leaves out all 35 arrays" in re.sub(r"all \d+", "all 35", told(state[0], tmp_path / "w", "--allow=*"))
    line = told(state[0], tmp_path / "w", "--allow=encoder.mask_token")
    assert "give --allow 'encoder.mask_token,decoder.*', or neither" in line
    tool(state[0], tmp_path / "bare", "--allow=encoder.mask_token,decoder.*")
    assert "'hed' fits nothing: the run has an encoder and no heads" in told(
        tmp_path / "bare", tmp_path / "hf", "--allow=hed", kind=CheckpointError
    )


def test_a_failure_amid_writing_leaves_nothing_behind(tmp_path, state, workdir, monkeypatch):
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("simmim_jax.tools.convert.exports.save_file", fail)
    for target in ((tmp_path / "hf",), (tmp_path / "out.safetensors", "--format=official")):
        assert "cannot write: No space left on device" in told(workdir, *target, kind=CheckpointError)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.safetensors", "workdir"]


def test_a_full_disk_is_told_in_one_line_both_ways(tmp_path, state, workdir, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    before = sorted(tmp_path.iterdir())
    for target, more in ((tmp_path / "new", ()), (tmp_path / "out.safetensors", ("--format=official",))):
        source = workdir if more else state[0]
        done = run(source, target, *more, script=CONVERT, file_limit=4)
        assert done.returncode == 5, done.stderr
        assert re.fullmatch(
            r"ERROR\[checkpoint\] (cannot write|could not save): .+ - .+ - make room .+", done.stderr.strip()
        )
    assert sorted(tmp_path.iterdir()) == before


def test_too_little_memory_is_told_in_one_line(tmp_path, state, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr("simmim_jax.interop.reading.load_file", fail)
    assert "not enough memory" in told(state[0], tmp_path / "w", kind=CheckpointError)


def test_an_overwriting_that_fails_at_the_last_moment_leaves_what_was_there(tmp_path, state, workdir, monkeypatch):
    before = (workdir / "config.json").read_text()

    def fail(self, target):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    line = told(state[0], workdir, "--overwrite", "--mean=.1,.1,.1", kind=CheckpointError)
    assert "cannot write: Input/output error" in line
    assert (workdir / "config.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["vit.safetensors", "workdir"]


def test_a_target_below_a_file_is_told(tmp_path, state, workdir):
    assert "cannot write" in told(workdir, state[0] / "hf", kind=CheckpointError)


def test_allow_leaves_parts_out_and_says_so(tmp_path, state, workdir, capsys):
    line = told(state[0], tmp_path / "bare", "--allow=decoder.*", kind=CheckpointError)
    assert "encoder.mask_token" in line
    capsys.readouterr()
    tool(state[0], tmp_path / "bare", "--allow=decoder.*", "--allow", "encoder.mask_token")
    assert "skipped, as --allow says: decoder.0.bias, decoder.0.weight, encoder.mask_token" in capsys.readouterr().out
    params, config = checkpoint.read_params(str(tmp_path / "bare"))
    assert (list(params), config["objective"]) == (["encoder"], {"name": "none"})

    tool(workdir, tmp_path / "bare.safetensors", "--format=official", "--allow=head,mask_token")
    assert "left out, as --allow says: head, mask_token" in capsys.readouterr().out
    assert not [name for name in load_file(tmp_path / "bare.safetensors") if "decoder" in name or "mask" in name]


def test_an_export_that_a_format_cannot_hold_names_the_reason(tmp_path, state):
    weights, _ = exported("official", SWINS[0], SIMMIM)
    save_file(weights.arrays, tmp_path / "swin.safetensors")
    tool(tmp_path / "swin.safetensors", tmp_path / "swin")
    line = told(tmp_path / "swin", tmp_path / "hf", kind=CheckpointError)
    assert "huggingface cannot hold this model: transformers does not shrink a table" in line
    assert not (tmp_path / "hf").exists()


def test_a_checkpoint_whose_config_is_lost_or_of_no_known_objective_is_told(tmp_path, workdir):
    config = json.loads((workdir / "config.json").read_text())
    (workdir / "config.json").write_text(json.dumps(config | {"objective": {"name": "contrast"}}))
    assert "leave them out with --allow head,mask_token" in told(workdir, tmp_path / "hf", kind=CheckpointError)
    tool(workdir, tmp_path / "hf", "--allow=head,mask_token")
    (workdir / "config.json").unlink()
    assert "no config.json that tells what it is" in told(workdir, tmp_path / "hf2", kind=CheckpointError)


def test_a_hugging_face_folder_goes_out_and_comes_back(tmp_path, capsys):
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


def test_what_has_no_place_in_a_format_is_left_out_and_told(tmp_path, workdir, state, capsys):
    tool(workdir, tmp_path / "beit")
    out = capsys.readouterr().out
    assert "huggingface vit (none)" in out
    assert "left out, as huggingface has no place for it: head, mask_token" in out
    assert "because this format has no place for it: head, mask_token" in (tmp_path / "beit/README.md").read_text()
    tool(tmp_path / "beit", tmp_path / "again")
    assert_same(checkpoint.read_params(str(tmp_path / "again"))[0], {"encoder": state[1]["encoder"]})


def test_a_stablehlo_program_gives_the_same_features_for_any_batch_size(tmp_path, workdir, state):
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
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)  # fused otherwise, by the exporter's jit


def test_a_step_and_a_checkpoints_folder_are_runs_of_ours(tmp_path, workdir, state):
    for number, source in enumerate((workdir / "checkpoints", workdir / "checkpoints" / "0")):
        tool(source, tmp_path / f"{number}.safetensors", "--format=official")
        assert load_file(tmp_path / f"{number}.safetensors").keys() == load_file(state[0]).keys()


@pytest.mark.slow
def test_official_pretraining_goes_on_in_the_imported_workdir(golden, tmp_path):
    """With the weights that came in, fresh moments, and their origin still known; and again where it stopped."""
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
    assert "window: saved 4, now 6" in run(*flags, "--config.encoder.window=6").stderr
