"""Formats of other projects: exact round trips, what is detected from weights, and errors."""

import json
import math

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from simmim_jax import interop
from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop import backbone, folder, huggingface, mae, official, rules
from simmim_jax.interop.reading import Weights, read_weights
from simmim_jax.interop.weight_spec import integer_sqrt, mlp_ratio_from, table_side
from simmim_jax.models import make_encoder
from simmim_jax.tools.convert.weights import abstract_model

PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
SIMMIM, BARE = {"name": "simmim"}, {"name": "none"}
NORMED, PLAIN = (
    {"name": "classify", "num_classes": 5, "fc_norm": True},
    {"name": "classify", "num_classes": 5, "fc_norm": False},
)
VIT = {"name": "vit", "size": "ti", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8}
SWIN = {"size": "t", "width": 8, "depths": (2, 1, 1, 1), "num_heads": (1, 1, 2, 2), "window": 4}
RESNET = {"name": "resnet", "size": "50", "width": 8, "depths": (2, 1, 1, 1)}
CONVNEXT = {"name": "convnext", "size": "t", "widths": (8, 16, 24, 32), "depths": (2, 1, 1, 1)}
IMAGE = {"vit": (32, 32), "swin": (64, 64), "swinv2": (64, 64), "resnet": (64, 64), "convnext": (64, 64)}


SWINS = [{"name": "swin", **SWIN}, {"name": "swinv2", **SWIN}]
NO_BIAS = {"relative_position": "none", "qkv_bias": "none", "layer_scale": 0.0}
PLAIN_VIT = {**VIT, "relative_position": "none", "qkv_bias": "qkv", "layer_scale": 0.0, "absolute_position": "learned"}
FINETUNED = {**VIT, "relative_position": "per_block", "final_norm": False}
CASES = [  # (format, encoder, objective): each pair of a format and an option that changes its names or layouts
    ("official", {**VIT, **NO_BIAS, "absolute_position": "learned"}, SIMMIM),
    ("official", {**VIT, "relative_position": "shared", "layer_scale": 0.1, "absolute_position": "sincos"}, SIMMIM),
    ("official", {**VIT, "absolute_position": "none", "relative_position": "none"}, SIMMIM),
    ("official", {**VIT, "relative_position": "per_block"}, BARE),
    ("official", FINETUNED, NORMED),
    ("official", {**SWINS[0], "absolute_position": "learned", "patch_norm": False}, SIMMIM),
    ("official", {**SWINS[0], "qkv_bias": "none", "mlp_ratio": 2.5}, PLAIN),
    ("official", SWINS[1], SIMMIM),
    ("official", {**SWINS[1], "absolute_position": "learned", "patch_norm": False, "qkv_bias": "none"}, BARE),
    ("official", {**CONVNEXT, "layer_scale": 0.0}, SIMMIM),
    ("official", {**CONVNEXT, "layer_scale": 1e-6}, NORMED),
    ("timm", {**PLAIN_VIT, "class_token": False, "layer_scale": 1e-5}, BARE),
    ("timm", {**PLAIN_VIT, "class_position": False, "num_registers": 4}, BARE),
    ("timm", {**PLAIN_VIT, "class_position": False, "absolute_position": "sincos"}, BARE),
    ("timm", {**VIT, **NO_BIAS, "absolute_position": "sincos"}, BARE),
    ("timm", {**PLAIN_VIT, "final_norm": False}, NORMED),
    ("timm", FINETUNED, NORMED),
    ("timm", SWINS[0], PLAIN),
    ("timm", {**SWINS[1], "qkv_bias": "none"}, BARE),
    ("timm", RESNET, PLAIN),
    ("timm", {**CONVNEXT, "layer_scale": 0.0}, NORMED),
    ("timm", {**CONVNEXT, "layer_scale": 1e-6}, BARE),
    ("huggingface", {**PLAIN_VIT, "absolute_position": "sincos"}, SIMMIM),
    ("huggingface", {**VIT, **NO_BIAS, "absolute_position": "learned"}, BARE),
    ("huggingface", {**VIT, "relative_position": "shared", "layer_scale": 0.1}, BARE),
    ("huggingface", {**VIT, "relative_position": "none", "layer_scale": 0.0, "absolute_position": "learned"}, BARE),
    ("huggingface", FINETUNED, NORMED),
    ("huggingface", {**SWINS[0], "window": 2}, SIMMIM),
    ("huggingface", {**SWINS[0], "window": 2, "qkv_bias": "none", "absolute_position": "learned"}, PLAIN),
    ("huggingface", {**SWINS[1], "window": 2}, SIMMIM),
    ("huggingface", {**SWINS[1], "pretrained_windows": (4, 4, 4, 2)}, BARE),
]


MADE = {}  # shapes by model: tests share them


def make(options, objective, image_size=None):
    """(encoder, shapes) of a small model."""
    image_size = image_size or IMAGE[options["name"]]
    key = (repr(make_encoder(**options)), repr(objective), image_size)
    if key not in MADE:
        MADE[key] = abstract_model(options, objective, image_size, PIXELS)
    return MADE[key]


def random_params(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), abstract)


def exported(format, options, objective, image_size=None):
    """(Weights as read from a file of this format, our parameters)."""
    image_size = image_size or IMAGE[options["name"]]
    encoder, abstract = make(options, objective, image_size)
    chosen = interop.EXPORTS[format]
    assert chosen.refusal(encoder, objective, image_size) == ""
    assert chosen.exported_objective(encoder, objective) == objective
    params = random_params(abstract)
    table = chosen.rules(encoder, objective, chosen.export_prefix(objective["name"]), image_size)
    config = {}
    if format == "huggingface":
        config = json.loads(json.dumps(folder.make_config(encoder, objective, image_size, 3)))
    return Weights(rules.to_theirs(table, params), {}, config, {}, "file", ""), params


def imported(weights, given=None, image_size=None):
    """(parameters, WeightSpec) of a file. given, image_size: as on the command line."""
    found = interop.resolve(interop.detect(weights), given or {}, image_size, weights.where)
    encoder, abstract = make({"size": "t" if "swin" in found.encoder["name"] else SIZES[found.encoder["name"]],
                              **found.encoder}, found.objective, found.image_size)  # fmt: skip
    table = interop.make_rules(found.format, encoder, found.objective, found.prefix, found.image_size)
    return rules.to_ours(table, weights.arrays, abstract, weights.where), found


SIZES = {"vit": "ti", "resnet": "50", "convnext": "t"}


def assert_same(params, expected):
    ours, theirs = rules.flatten(params), rules.flatten(expected)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()] == []
    assert all(ours[name].shape == theirs[name].shape for name in ours)


@pytest.mark.parametrize(("format", "options", "objective"), CASES)
def test_export_and_import_are_exact(format, options, objective):
    weights, params = exported(format, options, objective)
    name, given, image_size = options["name"], {}, None
    if name == "vit" and format != "huggingface":
        given["num_heads"] = 2
    if name == "swinv2" and format != "huggingface":
        given["window"] = options["window"]
    if name == "swinv2" or name in ("resnet", "convnext") or (name == "vit" and "image_size" not in weights.config):
        image_size = IMAGE[name]
    back, found = imported(weights, given, image_size)
    assert_same(back, params)
    assert found.objective == objective
    # timm's BEiT has the official names. An official ViT without parts of a BEiT has timm's names.
    assert found.format in ({"official", "timm"} if name == "vit" and format != "huggingface" else {format})
    whole = {f: getattr(make_encoder(**options), f) for f in found.encoder if f != "name"}
    assert {f: v for f, v in found.encoder.items() if f != "name"} == whole
    assert found.image_size == IMAGE[name]


# Detection


def test_position_tables_determine_the_image_size():
    for options in ({"absolute_position": "learned", "relative_position": "none"}, {"relative_position": "shared"}):
        weights, _ = exported("official", {**VIT, **options}, SIMMIM)
        assert interop.detect(weights).image_size == (32, 32)


def official_buffers(window=4, pretrained=4, side=16):
    """Buffers of an official Swin V2's first stage, and of the last, which has one window of its map."""
    steps = np.arange(1 - window, window) * 8 / (pretrained - 1)
    steps = np.sign(steps) * np.log2(np.abs(steps) + 1) / 3
    table = np.stack(np.meshgrid(steps, steps, indexing="ij"), axis=-1)[None].astype(np.float32)
    return {
        "relative_coords_table": table,
        "relative_position_index": np.zeros((window**2, window**2), np.int64),
        "attn_mask": np.zeros(((side // window) ** 2, window**2, window**2), np.float32),
    }


def test_buffers_of_official_swin_v2_determine_windows_and_image_size(tmp_path):
    weights, params = exported("official", SWINS[1], PLAIN)
    arrays = dict(weights.arrays)
    for stage, window in enumerate((4, 4, 4, 2)):
        buffers = official_buffers(window, window)
        for name, value in buffers.items():
            arrays[f"layers.{stage}.blocks.0.attn.{name}"] = value
    arrays["layers.0.blocks.1.attn_mask"] = official_buffers()["attn_mask"]
    save_file(arrays, tmp_path / "file.safetensors")
    read = read_weights(str(tmp_path / "file.safetensors"))
    back, found = imported(read)
    assert (found.image_size, found.encoder["window"]) == ((64, 64), 4)
    assert found.encoder["pretrained_windows"] == ()
    assert_same(back, params)
    assert len(read.derived) == 13
    coordinates = [
        official_buffers(window, pretrained)["relative_coords_table"] for window, pretrained in ((7, 6), (4, 3))
    ]
    assert official.pretrained_windows(coordinates, [7, 4]) == (6, 3)


def test_undetermined_fields_are_requested():
    weights, _ = exported("timm", SWINS[1], BARE)
    found = interop.detect(weights)
    with pytest.raises(CheckpointError, match=r"give --encoder.window=VALUE, --image_size=HEIGHT,WIDTH"):
        interop.resolve(found, {}, None, "file")
    with pytest.raises(CheckpointError, match=r"give --image_size=HEIGHT,WIDTH"):
        interop.resolve(found, {"window": 4}, None, "file")
    weights, _ = exported("official", {**VIT, "absolute_position": "none", "relative_position": "none"}, SIMMIM)
    with pytest.raises(CheckpointError, match=r"give --encoder.num_heads=VALUE, --image_size=HEIGHT,WIDTH"):
        imported(weights)


def test_guessed_heads_are_noted():
    options = {**VIT, "width": 128, "relative_position": "none", "absolute_position": "learned"}
    weights, _ = exported("official", options, SIMMIM)
    _, found = imported(weights)
    assert found.encoder["num_heads"] == 2
    assert "assumed 2 heads" in found.notes[0]


def test_heads_of_known_sizes():
    sizes = ((1280, 32), (768, 12), (384, 6), (100, 2))
    assert [official.guess_num_heads(*size) for size in sizes] == [16, 12, 6, None]


def test_timm_folder_of_the_hub_gives_image_size_and_normalization():
    weights, params = exported("timm", {**SWINS[0], "window": 2}, BARE)
    cfg = {"input_size": [3, 64, 64], "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    weights = weights._replace(config={"architecture": "swin_tiny", "pretrained_cfg": cfg})
    back, found = imported(weights)
    assert_same(back, params)
    assert found.image_size == (64, 64)
    assert interop.find_normalization(weights) == {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}


def test_table_sides_and_mlp_ratios():
    assert [table_side((2 * n - 1) ** 2) for n in range(1, 20)] == list(range(1, 20))
    assert table_side(16) is None
    assert integer_sqrt(15) is None
    sizes = [(width, hidden) for width in range(90, 1200, 37) for hidden in (1, 999, 4304)]
    assert all(int(width * mlp_ratio_from(hidden, width)) == hidden for width, hidden in sizes)


# Errors


def changed(weights, **arrays):
    """`weights` with arrays added, replaced, or (None) removed."""
    merged = {**weights.arrays, **{name.replace("__", "."): value for name, value in arrays.items()}}
    return weights._replace(arrays={name: x for name, x in merged.items() if x is not None})


def message(weights, given=None, image_size=None) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as caught:
        imported(weights, given, image_size)
    return str(caught.value)


def test_missing_array_is_refused():
    weights, _ = exported("official", VIT, SIMMIM)
    text = message(changed(weights, encoder__blocks__1__norm2__bias=None))
    assert "not in the file: encoder.blocks.1.norm2.bias" in text
    assert text.startswith("ERROR[checkpoint]")


def test_surplus_array_is_refused_with_the_option_that_skips_it():
    weights, params = exported("official", VIT, SIMMIM)
    names = ("encoder__blocks__0__attn__q_norm__weight", "encoder__blocks__1__attn__q_norm__weight")
    more = changed(weights, **dict.fromkeys((*names, "lm_head__weight", "lm_head__bias"), np.zeros(8, np.float32)))
    text = message(more)
    assert "4 arrays of the file have no place in the model: encoder.blocks.0.attn.q_norm.weight" in text
    assert "--allow 'encoder.blocks.*.attn.q_norm.*,lm_head.*'" in text
    skipped = interop.skip(more.arrays, ["encoder.blocks.*.attn.q_norm.*", "lm_head.*"])
    assert len(skipped) == 4
    rest = more._replace(arrays={name: x for name, x in more.arrays.items() if name not in skipped})
    assert_same(imported(rest)[0], params)


def test_pattern_that_matches_nothing_is_refused():
    with pytest.raises(CheckpointError, match=r"'haed.*' matches none"):
        interop.skip(["head.bias", "head.weight"], ["haed.*"])


def test_wrong_shape_is_refused_with_both_shapes():
    weights, _ = exported("official", VIT, SIMMIM)
    text = message(changed(weights, encoder__norm__weight=np.zeros(17, np.float32)))
    assert "1 have another shape: encoder.norm.weight is [17] in the file and [16] in the model" in text


def test_wrong_windows_are_refused():
    weights, _ = exported("official", SWINS[0], SIMMIM)
    text = message(weights, {"window": 2})
    assert "[4, 4, 4, 2] by stage in the file; [2, 2, 2, 2]" in text
    assert "windows disagree" in message(weights, image_size=(128, 128))


SWIN_CONFIG = [  # (field of config.json, value, part of the message)
    ("window_size", 4, "window_size is 2 in the weights, 4"),
    ("depths", [2, 1, 2, 1], "depths is (2, 1, 1, 1) in the weights, (2, 1, 2, 1)"),
    ("num_heads", [1, 1, 1, 1], "num_heads is (1, 1, 2, 2)"),
    ("embed_dim", 16, "embed_dim is 8 in the weights, 16"),
    ("patch_size", 8, "patch_size is [4, 4] in the weights, [8, 8]"),
    ("num_channels", 1, "num_channels is 3 in the weights, 1"),
    ("hidden_act", "relu", "hidden_act 'relu'"),
    ("layer_norm_eps", 1e-6, "layer_norm_eps 1e-06"),
    ("model_type", "bert", "model_type 'bert'"),
    ("model_type", ["swin"], "model_type \"['swin']\""),
    ("image_size", "64", "image_size '64' in config.json"),
    ("image_size", {"height": 64}, "image_size \"{'height': 64}\""),
    ("image_size", [64], "image_size '[64]'"),
    ("image_size", [64, 0], "image_size '[64, 0]'"),
    ("image_size", 10**6, "image size (1000000, 1000000)"),
    ("num_channels", "3", "num_channels '3'"),
    ("layer_norm_eps", math.inf, "layer_norm_eps 'inf'"),
    ("depths", ["2", 1, 1, 1], "depths is"),
    ("depths", 7, "no swin has"),
]
BEIT_CONFIG = [
    ("num_hidden_layers", 3, "num_hidden_layers is 2 in the weights, 3"),
    ("num_attention_heads", 4, "num_attention_heads is 2 in the weights, 4"),
    ("hidden_size", 32, "hidden_size is 16 in the weights, 32"),
    ("image_size", 64, "image_size is 32 in the weights, 64"),
    ("use_shared_relative_position_bias", False, "relative positions is shared in the weights, none"),
]


def test_config_that_contradicts_its_weights_is_refused():
    swin, beit = {**SWINS[0], "window": 2}, {**VIT, "relative_position": "shared"}
    for table, options, objective in ((SWIN_CONFIG, swin, SIMMIM), (BEIT_CONFIG, beit, BARE)):
        weights, _ = exported("huggingface", options, objective)
        for field, value, part in table:
            assert part in message(weights._replace(config=weights.config | {field: value})), field


def test_impossible_shapes_are_refused():
    weights, _ = exported("official", VIT, SIMMIM)
    name = "encoder.rel_pos_bias.relative_position_bias_table"
    for shape in ((5,), (), (5, 0)):
        assert message(changed(weights, **{name.replace(".", "__"): np.zeros(shape, np.float32)}))
    assert "patches of [8, 4]" in message(
        changed(weights, encoder__patch_embed__proj__weight=np.zeros((16, 3, 8, 4), np.float32))
    )


def test_unknown_names_are_refused_with_the_supported_formats():
    weights = Weights({"transformer.wte.weight": np.zeros((3, 3), np.float32)}, {}, {}, {}, "gpt.pth", "")
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight - gpt.pth - supported"):
        interop.detect(weights)


def test_hugging_face_file_without_its_config_is_refused():
    weights, _ = exported("huggingface", {**SWINS[0], "window": 2}, SIMMIM)
    assert "without its config.json" in message(weights._replace(config={}))


def test_names_of_a_transformers_5_state_dict_are_refused():
    weights, _ = exported("huggingface", {**SWINS[0], "window": 2}, SIMMIM)
    renamed = {name.replace("patch_embeddings", "patches"): x for name, x in weights.arrays.items()}
    assert "give the output of save_pretrained" in message(weights._replace(arrays=renamed))


@pytest.mark.parametrize("format", ["timm", "huggingface", "official"])
def test_classifier_of_the_class_token_is_exported_and_imported(format):
    options = {**PLAIN_VIT, "qkv_bias": "qv", "relative_position": "shared"} if format == "official" else PLAIN_VIT
    objective = {"name": "classify", "num_classes": 5, "fc_norm": False, "pool": "class_token"}
    assert interop.EXPORTS[format].refusal(make_encoder(**options), objective, (32, 32)) == ""
    weights, params = exported(format, options, objective)
    taken, found = imported(weights, {"num_heads": 2})
    assert found.objective == objective
    assert_same(taken, params)


def test_unsupported_classifier_is_refused_until_it_is_left_out():
    """Without a final norm and without fc_norm: timm's fc_norm=False with global_pool="avg"."""
    weights, params = exported("timm", {**PLAIN_VIT, "final_norm": False}, BARE)
    head = {"head__weight": np.zeros((5, 16), np.float32), "head__bias": np.zeros(5, np.float32)}
    text = message(changed(weights, **head), {"num_heads": 2})
    assert "reads neither fc_norm" in text
    assert "--allow 'head.*'" in text
    assert_same(imported(weights, {"num_heads": 2})[0], params)


def test_mae_without_its_decoder_is_an_encoder_with_fixed_positions():
    weights, params = exported("timm", {**PLAIN_VIT, "absolute_position": "sincos"}, BARE)
    x = np.zeros((8, 16), np.float32)
    whole = changed(weights, mask_token=x[:1, None, :8], decoder_pos_embed=x[None], decoder_embed__weight=x,
                    decoder_blocks__0__norm1__weight=x[0], decoder_norm__weight=x[0],
                    decoder_pred__weight=x)  # fmt: skip
    assert mae.recognize(whole) == "vit"
    text = message(whole, {"num_heads": 2})
    assert "mask_token" in text
    allow = text.split("--allow '")[1].split("'")[0].split(",")
    for patterns in (allow, ["decoder_*", "mask_token"]):
        skipped = interop.skip(whole.arrays, patterns)
        assert len(skipped) == 6
        rest = whole._replace(arrays={name: y for name, y in whole.arrays.items() if name not in skipped})
        back, found = imported(rest, {"num_heads": 2})
        assert found.encoder["absolute_position"] == "sincos"
        assert_same(back, params)


# Refusals of export


@pytest.mark.parametrize(
    ("format", "options", "objective", "text"),
    [
        ("huggingface", {**VIT, "relative_position": "none", "qkv_bias": "qkv"}, BARE, "LayerScale or relative"),
        ("huggingface", {**VIT, "class_token": False}, BARE, "always has a class token"),
        ("huggingface", {**VIT, "final_norm": False}, SIMMIM, "always has a final norm"),
        ("huggingface", {**VIT, "relative_position": "none", "qkv_bias": "qkv", "layer_scale": 0.0}, BARE,
         "always has absolute positions"),
        ("huggingface", SWINS[0], BARE, "does not shrink a window of 4"),
        ("huggingface", {**SWINS[0], "patch_norm": False}, BARE, "norm after the patches"),
        ("huggingface", {**SWINS[1], "window": 2}, NORMED, "no norm after pooling"),
        ("huggingface", VIT, NORMED, "one norm, after pooling"),
        ("huggingface", RESNET, BARE, "timm can hold it"),
        ("official", RESNET, BARE, "no official ResNet"),
        ("official", {**VIT, "qkv_bias": "qkv"}, BARE, "no bias on keys"),
        ("official", {**VIT, "class_token": False}, BARE, "always has a class token"),
        *((format, {**PLAIN_VIT, "qkv_bias": "qv", **options}, BARE, "position of the class token")
          for format in ("huggingface", "official", "timm", "backbone")
          for options in ({"num_registers": 2}, {"class_position": False})),
        ("timm", {**PLAIN_VIT, "num_registers": 2}, BARE, "no position of the class token"),
        ("official", {**SWINS[0], "final_norm": False}, BARE, "always has a final norm"),
        ("official", {**VIT, "final_norm": False}, {**NORMED, "block": 2}, "reads block 2"),
        ("official", CONVNEXT, PLAIN, "norm after pooling"),
        ("timm", {**VIT, "qkv_bias": "qkv"}, BARE, "no bias on keys"),
        ("timm", {**SWINS[0], "absolute_position": "learned"}, BARE, "no absolute positions"),
        ("timm", RESNET, NORMED, "no norm after pooling"),
        ("timm", {**SWINS[0], "window": 3}, BARE, "windows of 3 do not tile"),
        ("timm", {**SWINS[1], "norm_epsilon": 1e-2}, BARE, "0.01, but 1e-05"),
        ("official", {**VIT, "norm_epsilon": 1e-5}, BARE, "1e-05, but 1e-06"),
        ("huggingface", {**SWINS[1], "window": 2, "norm_epsilon": 1e-2}, BARE, "some norms of the swinv2"),
        ("huggingface", {**VIT, "final_norm": False, "norm_epsilon": 1e-5}, NORMED, "the norm after pooling"),
    ],
)  # fmt: skip
def test_model_that_a_format_cannot_hold_is_refused(format, options, objective, text):
    assert text in interop.EXPORTS[format].refusal(make_encoder(**options), objective, IMAGE[options["name"]])


BACKBONE_VIT = {**VIT, "relative_position": "none", "qkv_bias": "qkv"}


@pytest.mark.parametrize(
    "options",
    [VIT, {**VIT, "relative_position": "per_block", "final_norm": False, "layer_scale": 0.0}, BACKBONE_VIT,
     {**BACKBONE_VIT, "qkv_bias": "qv", "layer_scale": 0.0, "absolute_position": "sincos", "final_norm": False},
     {**SWINS[0], "window": 2}, {**SWINS[1], "window": 2}, RESNET, CONVNEXT],
    ids=lambda options: options["name"],
)  # fmt: skip
def test_backbone_holds_the_encoder_and_a_norm_per_stage(options):
    weights, params = exported("backbone", options, BARE)
    encoder = make_encoder(**options)
    config = backbone.make_config(encoder, IMAGE[options["name"]], 3)
    assert config["architectures"] == [backbone.CLASSES[config["model_type"]]]
    assert set(config["out_features"]) <= {f"stage{n + 1}" for n in range(len(backbone.stage_ends(encoder)))}
    assert config["out_features"][-1] == f"stage{len(backbone.stage_ends(encoder))}"
    norms = {name: x for name, x in weights.arrays.items() if name.startswith("hidden_states_norms.")}
    assert len(norms) == (8 if config["model_type"] in ("swin", "convnext") else 0)
    for name, x in norms.items():
        if config["model_type"] == "swin" and "stage4" in name:
            part = "scale" if name.endswith("weight") else "bias"
            np.testing.assert_array_equal(x, params["encoder"]["norm"][part])
        else:
            assert set(x.tolist()) == {1.0 if name.endswith("weight") else 0.0}
    if config["model_type"] == "resnet":
        assert {x.shape for name, x in weights.arrays.items() if name.endswith("num_batches_tracked")} == {()}
    assert any("its maps are the outputs of our" in note for note in backbone.export_notes(encoder))


@pytest.mark.parametrize(
    ("options", "image_size", "text"),
    [
        ({**VIT, "class_token": False}, (32, 32), "has a class token"),
        ({**VIT, "qkv_bias": "qkv"}, (32, 32), "biases only on queries and values"),
        (VIT, (32, 64), "square images"),
        ({**BACKBONE_VIT, "mlp_ratio": 2.5}, (32, 32), "mlp_ratio is 2.5"),
        ({**RESNET, "norm_epsilon": 1e-3}, (64, 64), "0.001, but always 1e-05"),
        ({**CONVNEXT, "norm_epsilon": 1e-5}, (64, 64), "1e-05, but always 1e-06"),
        ({**SWINS[0], "patch_norm": False}, (64, 64), "norm after the patches"),
    ],
)
def test_encoder_without_a_backbone_is_refused_with_an_alternative(options, image_size, text):
    reason = backbone.refusal(make_encoder(**options), BARE, image_size)
    assert text in reason
    assert "stablehlo" in reason or options["name"] == "swin"


def test_rectangular_masked_image_model_is_refused_for_transformers():
    assert "are square" in huggingface.refusal(make_encoder(**PLAIN_VIT), SIMMIM, (256, 64))
    assert huggingface.refusal(make_encoder(**PLAIN_VIT), BARE, (256, 64)) == ""


# Files next to the weights


def test_padded_windows_of_timm_are_noted():
    weights, _ = exported("timm", {**SWINS[1], "window": 2}, BARE)
    notes = {size: imported(weights, {"window": 2}, (size, size))[1].notes for size in (64, 72)}
    assert [any("timm pads" in note for note in notes[size]) for size in (64, 72)] == [False, True]


def test_timm_variants_with_the_same_names_are_refused_or_noted():
    weights, _ = exported("timm", RESNET, BARE)
    assert any("anti-aliased" in note for note in interop.detect(weights).notes)
    for architecture in ("resnetblur50", "resnetaa50"):
        assert f"architecture '{architecture}'" in message(weights._replace(config={"architecture": architecture}))
    config = {"architecture": "resnet50", "model_args": {"aa_layer": "avg"}}
    assert "model_args has aa_layer 'avg'" in message(weights._replace(config=config))
    assert interop.detect(weights._replace(config={"architecture": "resnet50"})).notes == ()


@pytest.mark.parametrize(
    "mean", ["0.5", None, [0.5, 0.5], [0.5, "0.5", 0.5], [math.nan] * 3, [math.inf] * 3, [True] * 3]
)
def test_invalid_normalization_is_refused(mean):
    weights, _ = exported("timm", RESNET, BARE)
    with pytest.raises(CheckpointError, match=r"mean .* is not 3 number\(s\) - file - give --mean"):
        interop.find_normalization(weights._replace(preprocessor={"image_mean": mean}))
    assert interop.find_normalization(weights._replace(preprocessor={"image_mean": mean}), 3, ("std",)) == {}


def test_single_std_applies_to_every_channel_and_zero_is_refused():
    weights, _ = exported("timm", RESNET, BARE)
    assert interop.find_normalization(weights._replace(preprocessor={"image_std": 0.5})) == {"std": (0.5, 0.5, 0.5)}
    with pytest.raises(CheckpointError, match=r"std \[0, 1, 1\] is not 3 number\(s\) above 0"):
        interop.find_normalization(weights._replace(preprocessor={"image_std": [0, 1, 1]}))


def test_rectangular_model_is_exported_and_imported():
    weights, params = exported("official", VIT, SIMMIM, (32, 64))
    assert interop.detect(weights).image_size is None  # 7 * 15 displacements are no square
    back, _ = imported(weights, {}, (32, 64))
    assert_same(back, params)


# Reading


def test_half_precision_is_converted_and_noted(tmp_path):
    arrays = {"a.weight": np.ones(3, np.float16), "b.weight": np.full(3, 1.5, ml_dtypes.bfloat16)}
    save_file(arrays, tmp_path / "half.safetensors")
    weights = read_weights(str(tmp_path / "half.safetensors"))
    assert {x.dtype for x in weights.arrays.values()} == {np.dtype(np.float32)}
    assert weights.arrays["b.weight"].tolist() == [1.5, 1.5, 1.5]
    assert weights.notes == ("converted bfloat16, float16 to float32",)
    assert len(weights.sha256) == 64


def test_wrapper_and_old_names_are_normalized_and_buffers_separated(tmp_path):
    x = np.ones(3, np.float32)
    names = ("module.a.rpe_mlp.0.weight", "module.a.attn_mask", "module.a.k_bias", "module.a.num_batches_tracked")
    save_file({**dict.fromkeys(names, x), "module.a.k_bias": 0 * x}, tmp_path / "file.safetensors")
    weights = read_weights(str(tmp_path / "file.safetensors"))
    assert list(weights.arrays) == ["a.cpb_mlp.0.weight"]
    assert sorted(weights.derived) == ["a.attn_mask", "a.k_bias", "a.num_batches_tracked"]
    save_file({"a.k_bias": x}, tmp_path / "file.safetensors")
    assert list(read_weights(str(tmp_path / "file.safetensors")).arrays) == ["a.k_bias"]  # no zeros: it is a weight


def test_sharded_folder_is_read(tmp_path):
    weights, params = exported("huggingface", {**SWINS[0], "window": 2}, SIMMIM)
    names = sorted(weights.arrays)
    parts = {"model-1-of-2.safetensors": names[:40], "model-2-of-2.safetensors": names[40:]}
    for file, part in parts.items():
        save_file({name: weights.arrays[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"no config.json"):
        read_weights(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(weights.config))
    assert_same(imported(read_weights(str(tmp_path)))[0], params)
    (tmp_path / "model-2-of-2.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: model-2-of-2.safetensors"):
        read_weights(str(tmp_path))


def test_index_determines_the_shard_of_an_array(tmp_path):
    one, two = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    x = np.zeros(2, np.float32)
    save_file({"x": x, "y": x}, one)
    save_file({"x": x + 1, "z": x}, two)
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": two.name, "y": one.name}}))
    assert read_weights(str(tmp_path)).arrays["x"].tolist() == [1, 1]
    for weight_map, text in (
        ({"y": one.name, "z": two.name}, "x is in both a.safetensors and b.safetensors"),
        (
            {"x": one.name, "y": two.name},
            "y is not in b.safetensors",
        ),
        ({"x": 1}, "does not give the file of each array"),
        ({"x": "../a.safetensors"}, "does not give the file of each array"),
        ([one.name], "does not give the file of each array"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=text):
            read_weights(str(tmp_path))


def test_two_names_of_one_module_are_refused(tmp_path):
    x = np.ones(3, np.float32)
    save_file({"a.rpe_mlp.0.weight": x, "a.cpb_mlp.0.weight": x}, tmp_path / "file.safetensors")
    with pytest.raises(CheckpointError, match=r"both rpe_mlp and cpb_mlp"):
        read_weights(str(tmp_path / "file.safetensors"))


def test_nonfinite_weights_are_noted_and_integers_refused(tmp_path):
    weights, _ = exported("official", VIT, SIMMIM)
    name = "encoder.norm.weight"
    save_file({**weights.arrays, name: np.full(16, np.nan, np.float32)}, tmp_path / "nan.safetensors")
    (note,) = read_weights(str(tmp_path / "nan.safetensors")).notes
    assert note == f"not all finite: 1 arrays have NaN or infinite values, like {name}"
    save_file({**weights.arrays, name: np.ones(16, np.int8)}, tmp_path / "int.safetensors")
    assert f"int8, not real numbers: {name}" in message(read_weights(str(tmp_path / "int.safetensors")))


def test_damaged_and_unknown_files_are_refused(tmp_path):
    whole = tmp_path / "whole.safetensors"
    save_file({"a": np.ones(100, np.float32)}, whole)
    (tmp_path / "cut.safetensors").write_bytes(whole.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match=r"damaged safetensors file"):
        read_weights(str(tmp_path / "cut.safetensors"))
    (tmp_path / "weights.npy").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"unknown kind of file '.npy'"):
        read_weights(str(tmp_path / "weights.npy"))
    with pytest.raises(CheckpointError, match=r"no such file or folder"):
        read_weights(str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"no model.safetensors or pytorch_model.bin"):
        read_weights(str(tmp_path))
    assert load_file(whole)["a"].sum() == 100
