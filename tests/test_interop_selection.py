"""Which weights of a file are taken, and names without the prefixes of wrappers."""

import re

import numpy as np
import pytest
from safetensors.numpy import save_file
from test_interop import NORMED, PLAIN_VIT, SIMMIM, VIT, assert_same, exported, imported
from torch_files import AsNumpy, Global, write_pth

from simmim_jax import interop
from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop.reading import read_weights
from simmim_jax.interop.rebuild import Dropped
from simmim_jax.interop.selection import select, state_dicts, unwrap
from simmim_jax.runs import checkpoint
from simmim_jax.tools.convert import __main__ as convert

CLASSIFIER = ("timm", {**PLAIN_VIT, "class_token": False, "final_norm": False}, NORMED)
PRETRAINED = ("official", VIT, SIMMIM)
WRAPPERS = [  # (prefix of the encoder's names, prefix of the head's)
    ("", ""), ("module.", "module."), ("_orig_mod.", "_orig_mod."), ("model.", "model."), ("net.", "net."),
    ("backbone.", ""), ("model.backbone.", "model."), ("module._orig_mod.model.", "module._orig_mod.model."),
    ("backbone._orig_mod.", ""), ("model._orig_mod.", "model._orig_mod."), ("network.module.", "network.module."),
    ("_fsdp_wrapped_module.backbone._fsdp_wrapped_module.", "_fsdp_wrapped_module."), ("student.", "student."),
    ("vit.", "vit."), ("lit.body.net.", "lit.body."), ("encoder.", "encoder."),
]  # fmt: skip


def is_of_head(name):
    return name.startswith(("head.", "decoder."))


@pytest.mark.parametrize("wrappers", WRAPPERS, ids="|".join)
@pytest.mark.parametrize("model", [CLASSIFIER, PRETRAINED], ids=["classifier", "pretrained"])
def test_encoder_and_head_are_found_behind_any_wrapper(model, wrappers):
    weights, params = exported(*model)
    arrays = {wrappers[is_of_head(name)] + name: x for name, x in weights.arrays.items()}
    if "student" in wrappers[0]:  # it is a wrapper only next to a teacher
        arrays |= {name.replace("student.", "teacher."): x + 1 for name, x in arrays.items()}
        taken = select({"": arrays}, "file", average=False)
    else:
        taken = select({"": arrays}, "file")
    back, found = imported(weights._replace(arrays=taken.arrays), {"num_heads": 2})
    assert_same(back, params)
    assert found.objective["name"] == model[2]["name"]


def test_names_that_would_become_equal_stay():
    names = ("model.patch_embed.proj.weight", "patch_embed.proj.bias", "model.patch_embed.proj.bias")
    assert tuple(unwrap(dict.fromkeys(names, np.zeros(1)))) == names


def test_wrapper_inside_of_the_encoder_is_dropped():
    names = ("patch_embed.proj.weight", "blocks.0._orig_mod.attn.qkv.weight")
    assert list(unwrap(dict.fromkeys(names, np.zeros(1)))) == [names[0], "blocks.0.attn.qkv.weight"]


def sets(model, *keys):
    """A file's content: the same weights under each key, with other values."""
    weights, _ = exported(*model)
    return {key: {name: x + n for name, x in weights.arrays.items()} for n, key in enumerate(keys)}


@pytest.mark.parametrize(
    ("model", "keys", "options", "taken"),
    [
        (PRETRAINED, ("model", "model_ema"), {}, "model"),
        (PRETRAINED, ("state_dict_ema", "state_dict"), {}, "state_dict"),
        (CLASSIFIER, ("model", "model_ema"), {}, "model_ema"),
        (CLASSIFIER, ("state_dict_ema", "state_dict"), {}, "state_dict_ema"),
        (CLASSIFIER, ("net", "ema"), {"average": False}, "net"),
        (PRETRAINED, ("model", "model_ema"), {"average": True}, "model_ema"),
        (PRETRAINED, ("model", "model_ema"), {"key": "model_ema"}, "model_ema"),
        (PRETRAINED, ("student", "teacher"), {}, "teacher"),
        (PRETRAINED, ("student", "teacher"), {"average": False}, "student"),
        (PRETRAINED, ("encoder", "target_encoder"), {}, "encoder"),
        (PRETRAINED, ("model_ema",), {}, "model_ema"),
        (PRETRAINED, ("module",), {}, "module"),
        (PRETRAINED, ("weights",), {}, "weights"),
        (PRETRAINED, ("a", "b"), {"key": "b"}, "b"),
    ],
)
def test_one_of_several_sets_is_taken_and_the_others_are_named(model, keys, options, taken):
    content = sets(model, *keys)
    found = select(state_dicts({**content, "epoch": 3}, "file"), "file", **options)
    assert found.key == taken
    assert all((found.arrays[name] == x).all() for name, x in content[taken].items())
    assert all(re.search(rf"\b{key}\b", found.note) for key in keys) == (len(keys) > 1)


def test_file_without_arrays_is_refused(tmp_path):
    save_file({}, tmp_path / "empty.safetensors")
    with pytest.raises(CheckpointError, match="no weights"):
        interop.detect(read_weights(str(tmp_path / "empty.safetensors")))


def test_average_inside_of_a_dict_and_as_a_whole_object_are_not_passed_over():
    weights, _ = exported(*CLASSIFIER)
    inner = {"decay": 0.99, "module": {name: x + 1 for name, x in weights.arrays.items()}}
    found = select(state_dicts({"model": weights.arrays, "ema": inner}, "file"), "file")
    assert found.key == "ema.module"
    found = select(state_dicts({"model": weights.arrays, "ema": Dropped("people.Ema")}, "file"), "file")
    assert found.key == "model"
    assert "ema in the file is a whole object" in found.note


@pytest.mark.parametrize("prefixes", [("student.", "teacher."), ("model.", "ema_model."), ("", "momentum_encoder.")])
def test_sets_side_by_side_in_one_state_dict_are_told_apart(prefixes):
    weights, params = exported(*PRETRAINED)
    arrays = {prefix + name: x + n for n, prefix in enumerate(prefixes) for name, x in weights.arrays.items()}
    trained, averaged = (select({"state_dict": arrays}, "file", average=average) for average in (False, True))
    assert trained.key.startswith("state_dict.")
    for found, shift in ((trained, 0), (averaged, 1)):
        assert all((found.arrays[name] == x + shift).all() for name, x in weights.arrays.items())
    assert averaged.key in trained.note
    assert_same(imported(weights._replace(arrays=trained.arrays), {"num_heads": 2})[0], params)


@pytest.mark.parametrize(
    ("keys", "options", "match"),
    [
        (("model", "model_ema"), {"key": "model_em"}, "has model, model_ema.*did you mean model_ema"),
        (("model",), {"average": True}, "no averaged weights.*has model"),
        (("teacher",), {"average": False}, "no trained weights"),
        (("a", "b"), {}, "2 sets of weights: a, b.*--key=a"),
        (("",), {"key": "model"}, "without a key"),
    ],
)
def test_set_that_is_not_there_or_not_determined_is_refused(keys, options, match):
    with pytest.raises(CheckpointError, match=match):
        select(sets(PRETRAINED, *keys), "file", **options)


def lightning_file(path):
    """A checkpoint as Lightning writes it, with a metric and a loss next to the model."""
    weights, params = exported(*CLASSIFIER)
    state = {f"model.{name}": x for name, x in weights.arrays.items()}
    state |= {"loss.weight": np.ones(5, np.float32)}
    hyper = Global("lightning_fabric.utilities.data", "AttributeDict")
    callbacks = {"ModelCheckpoint{'monitor': None}": {"best_model_score": AsNumpy(np.ones(1))}}
    content = {"epoch": 1, "pytorch-lightning_version": "2.6", "state_dict": state, "callbacks": callbacks}
    write_pth(path, content | {"hyper_parameters": hyper})
    return params


def run(*arguments):
    convert.run([str(argument) for argument in arguments])


def test_lightning_checkpoint_is_imported_with_its_head(tmp_path, capsys):
    params = lightning_file(tmp_path / "epoch=1.ckpt")
    options = ("--encoder.num_heads=2", "--allow=loss.weight")
    run(tmp_path / "epoch=1.ckpt", tmp_path / "workdir", *options)
    back, config = checkpoint.read_params(str(tmp_path / "workdir"))
    assert_same(back, params)
    assert (config["objective"]["name"], config["imported"]["key"]) == ("classify", "state_dict")
    assert "weights: those under 'state_dict'" in capsys.readouterr().out


def test_command_takes_the_weights_that_the_user_asks_for(tmp_path, capsys):
    write_pth(tmp_path / "both.pth", {**sets(PRETRAINED, "model", "model_ema"), "epoch": 3})
    for n, (options, key) in enumerate(
        [((), "model"), (("--ema",), "model_ema"), (("--no-ema",), "model"), (("--key=model_ema",), "model_ema")]
    ):
        run(tmp_path / "both.pth", tmp_path / f"w{n}", "--encoder.num_heads=2", *options)
        back, config = checkpoint.read_params(str(tmp_path / f"w{n}"))
        assert config["imported"]["key"] == key
        assert back["mask_token"][0] == exported(*PRETRAINED)[1]["mask_token"][0] + (key == "model_ema")
        assert "note: took" in capsys.readouterr().out
    for option in ("--ema", "--no-ema", "--key=model"):
        with pytest.raises(ConfigError, match="in an export"):
            run(tmp_path / "w0", tmp_path / "out.safetensors", "--format=timm", option)


def test_average_by_torchvision_is_read_without_its_counter(tmp_path):
    weights, params = exported(*CLASSIFIER)
    arrays = {f"module.{name}": x for name, x in weights.arrays.items()} | {"n_averaged": np.int64([7])}
    save_file(arrays, tmp_path / "average.safetensors")
    assert_same(imported(read_weights(str(tmp_path / "average.safetensors")), {"num_heads": 2})[0], params)


@pytest.mark.parametrize(
    ("options", "rows"), [({"num_registers": 3, "class_position": False}, 16), ({"num_registers": 4}, 17),
                          ({"class_position": False}, 16)]
)  # fmt: skip
def test_registers_and_positions_of_patches_only_are_detected(options, rows):
    model = {**PLAIN_VIT, **options}
    encoder, objective = {**PLAIN_VIT, "class_position": False} | options, {"name": "none"}
    if model.get("class_position", True):  # as DINOv2 saves it; timm cannot hold it
        weights, _ = exported("timm", encoder | {"class_position": False}, objective)
        table = weights.arrays["pos_embed"]
        table = np.concatenate([np.ones_like(table[:, :1]), table], axis=1)
        weights = weights._replace(arrays=weights.arrays | {"pos_embed": table})
    else:
        weights, _ = exported("timm", encoder, objective)
    assert weights.arrays["pos_embed"].shape[1] == rows
    found = interop.detect(weights)
    assert found.image_size == (32, 32)
    assert {name: found.encoder[name] for name in options} == options


def test_tokens_that_the_vit_does_not_have_are_refused_with_the_reason():
    weights, _ = exported("timm", PLAIN_VIT, {"name": "none"})
    token = np.zeros((1, 1, 16), np.float32)
    distilled = weights._replace(arrays=weights.arrays | {"dist_token": token})
    with pytest.raises(CheckpointError, match="distillation token"):
        interop.detect(distilled)
    table = np.zeros((1, 16 + 1 + 6, 16), np.float32)
    registers = weights.arrays | {"reg_token": np.zeros((1, 6, 16), np.float32), "pos_embed": table}
    with pytest.raises(CheckpointError, match="23 positions for 6 registers"):
        interop.detect(weights._replace(arrays=registers))
