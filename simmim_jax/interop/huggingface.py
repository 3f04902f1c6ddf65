"""Hugging Face transformers: folders of ViT, BEiT, Swin and Swinv2, for masked images, classification, or bare.

The names are those that `save_pretrained` writes; `state_dict()` of transformers 5 has other names.

The ViT of transformers is the plain one. A ViT with relative positions, LayerScale, or biases only on queries and
values, like the official one, is a BEiT there. The BEiT has no pixel decoder.

config.json gives what the weights do not determine. It is refused if it contradicts them.
"""

import math

from simmim_jax.errors import CheckpointError
from simmim_jax.interop.official import (
    WITHOUT_HEAD,
    class_token_classifier,
    classifier,
    head_refusal,
    pooled_fix,
    position_type,
    reads_class_token,
)
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.rules import (
    PER_HEAD,
    POINTWISE,
    POSITIONS,
    TO_WIDTH,
    TOKEN,
    VECTOR,
    Rule,
    convolution,
    dense,
    norm,
    one,
    three_dense,
)
from simmim_jax.interop.tables import positions, under_encoder
from simmim_jax.interop.weight_spec import (
    Shapes,
    WeightSpec,
    check_agreement,
    find_prefix,
    mlp_ratio_from,
    patch_side,
    shapes_below,
    table_side,
)
from simmim_jax.models.windows import stage_grids, window_and_shift

NAME = "huggingface"
MODEL_TYPES = {"vit": "vit", "beit": "vit", "swin": "swin", "swinv2": "swinv2"}
PATCHES = "embeddings.patch_embeddings.projection"
TABLE = "relative_position_bias_table"
ROUNDED_DOWN = (
    "for images of {}, transformers' Swinv2 computes windows for feature maps rounded down at each halving, but its "
    "maps are rounded up; no other implementation has these windows"
)


def recognize(weights: Weights) -> str | None:
    """The encoder in config.json, or None without one. Raises CheckpointError for an unsupported model type."""
    has_patches = find_prefix(weights.arrays, f"{PATCHES}.weight") is not None
    if not weights.config and has_patches:
        what = "a Hugging Face model without its config.json"
        raise CheckpointError(what, weights.where, "give the folder that has both")
    model_type = weights.config.get("model_type")
    if not weights.config or (model_type is None and "architecture" in weights.config):  # timm's folders on the hub
        return None
    if model_type is None or str(model_type) not in MODEL_TYPES:
        what = f"model_type {str(model_type)[:100]!r} in config.json"
        raise CheckpointError(what, weights.where, f"only {', '.join(MODEL_TYPES)} are supported")
    if not has_patches:
        what = f"no {PATCHES}.weight among the names ({', '.join(sorted(weights.arrays)[:3])})"
        fix = "give the output of save_pretrained, not a state_dict() of transformers 5"
        raise CheckpointError(what, weights.where, fix)
    return MODEL_TYPES[model_type]


def detect(name: str, weights: Weights) -> WeightSpec:
    """The model in config.json. Raises CheckpointError if the weights contradict it."""
    prefix = find_prefix(weights.arrays, f"{PATCHES}.weight")
    shapes = shapes_below(weights.arrays, prefix, weights.where)
    if weights.config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act {weights.config['hidden_act']!r}", weights.where, "only gelu is supported")
    spec = (_detect_vit if name == "vit" else _detect_swin)(name, weights, shapes, prefix)
    return spec._replace(image_size=_image_size(weights), channels=_positive_int(weights, "num_channels", 3))


def _field(weights: Weights, field: str, default=None):
    """A field of config.json. default: that of transformers, which writes only what differs."""
    value = weights.config.get(field, default)
    if value is None:
        raise CheckpointError(f"no {field!r} in config.json", weights.where, "add it")
    return value


def _invalid(weights: Weights, field: str, value, fix: str) -> CheckpointError:
    return CheckpointError(f"{field} {str(value)[:100]!r} in config.json", weights.where, fix)


def _positive_int(weights: Weights, field: str, default=None) -> int:
    value = _field(weights, field, default)
    if type(value) is not int or value < 1:
        raise _invalid(weights, field, value, "make it a whole number")
    return value


def _positive_float(weights: Weights, field: str, default: float) -> float:
    value = _field(weights, field, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise _invalid(weights, field, value, "make it a number above 0")
    return float(value)


def _image_size(weights: Weights) -> tuple[int, int]:
    """(height, width), from one number or two."""
    size = _field(weights, "image_size", 224)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise _invalid(weights, "image_size", size, "make it a whole number, or a list of two")
    return tuple(sides)


def _patch_size(weights: Weights, shapes: Shapes, default: int) -> int:
    size, patch = _field(weights, "patch_size", default), shapes[f"{PATCHES}.weight"]
    sides = size if isinstance(size, list) else [size, size]
    channels = patch[1], _positive_int(weights, "num_channels", 3)
    check_agreement({"patch_size": (list(patch[2:]), sides), "num_channels": channels}, weights.where)
    return patch_side(patch, weights.where)


def _relative_position(weights: Weights) -> str:
    shared, per_block = (weights.config.get(f"use_{kind}relative_position_bias") for kind in ("shared_", ""))
    return "shared" if shared else "per_block" if per_block else "none"


def _detect_vit(name: str, weights: Weights, shapes: Shapes, prefix: str) -> WeightSpec:
    is_beit = weights.config["model_type"] == "beit"
    width, depth = _positive_int(weights, "hidden_size", 768), _positive_int(weights, "num_hidden_layers", 12)
    heads = _positive_int(weights, "num_attention_heads", 12)
    patch_size, table = _patch_size(weights, shapes, 16), shapes.first(TABLE)
    shared = f"encoder.relative_position_bias.{TABLE}" in shapes
    height, is_square = _image_size(weights)[0], len(set(_image_size(weights))) == 1
    side = table_side(table[0] - 3) if table and is_square else None
    pairs = {
        "hidden_size": (shapes[f"{PATCHES}.weight"][0], width),
        "num_hidden_layers": (shapes.count("encoder.layer."), depth),
        "num_attention_heads": (table[1] if table else None, heads),
        "relative positions": ("shared" if shared else "per_block" if table else "none", _relative_position(weights)),
        "image_size": (side and side * patch_size, height if is_square else None),
    }
    check_agreement(pairs, weights.where)
    inner = "encoder.layer.0.attention.attention"
    bias = "qkv" if f"{inner}.key.bias" in shapes else "qv" if f"{inner}.query.bias" in shapes else "none"
    has_scale = is_beit and shapes.any("lambda_1")
    encoder = {
        "name": "vit",
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio_from(_positive_int(weights, "intermediate_size", 3072), width),
        "patch_size": patch_size,
        "class_token": "embeddings.cls_token" in shapes,
        "absolute_position": position_type(weights.arrays.get(f"{prefix}embeddings.position_embeddings"), True),
        "relative_position": _relative_position(weights),
        "qkv_bias": bias,
        "layer_scale": weights.config.get("layer_scale_init_value", 0.1) if has_scale else 0.0,
        "final_norm": "layernorm.weight" in shapes,
        "norm_epsilon": _positive_float(weights, "layer_norm_eps", 1e-12),
    }
    objective, notes = _objective(weights, fc_norm=True), []
    if objective["name"] == "classify":
        if "pooler.layernorm.weight" not in shapes:
            objective = class_token_classifier(objective["num_classes"])
        elif encoder["norm_epsilon"] != 1e-6:
            notes.append(f"the norm after pooling has epsilon 1e-6 here, {encoder['norm_epsilon']:g} in transformers")
    return WeightSpec(NAME, encoder, objective, None, 3, prefix, tuple(notes))


def _objective(weights: Weights, *, fc_norm: bool) -> dict:
    """The objective that the heads in the file belong to."""
    simmim = "decoder.0.weight" in weights.arrays
    return {"name": "simmim"} if simmim else classifier(weights, "classifier", fc_norm=fc_norm)


def _detect_swin(name: str, weights: Weights, shapes: Shapes, prefix: str) -> WeightSpec:
    depths, heads = tuple(_field(weights, "depths")), tuple(_field(weights, "num_heads"))
    width, window = _positive_int(weights, "embed_dim", 96), _positive_int(weights, "window_size", 7)
    epsilon = _positive_float(weights, "layer_norm_eps", 1e-5)
    stages = shapes.count("encoder.layers.")
    firsts = [f"encoder.layers.{stage}.blocks.0.attention.self" for stage in range(stages)]
    windows = None
    if name == "swin":
        tables = [shapes[f"{first}.{TABLE}"] for first in firsts]
        windows, columns = [table_side(table[0]) for table in tables], [table[1] for table in tables]
    else:
        columns = [shapes[f"{first}.logit_scale"][0] for first in firsts]
    pairs = {
        "embed_dim": (shapes[f"{PATCHES}.weight"][0], width),
        "depths": (tuple(shapes.count(f"encoder.layers.{stage}.blocks.") for stage in range(stages)), depths),
        "num_heads": (tuple(columns), heads),
        "window_size": (windows and windows[0], window),
    }
    check_agreement(pairs, weights.where)
    if epsilon != 1e-5:
        fix = "transformers always has 1e-5 in the patch embedding and in merging; our encoder has one value for all"
        raise CheckpointError(f"layer_norm_eps {epsilon:g}", weights.where, fix)
    encoder = {
        "name": name,
        "width": width,
        "depths": depths,
        "num_heads": heads,
        "window": window,
        "patch_size": _patch_size(weights, shapes, 4),
        "mlp_ratio": _positive_float(weights, "mlp_ratio", 4.0),
        "qkv_bias": {"swin": "qkv", "swinv2": "qv"}[name] if _field(weights, "qkv_bias", True) else "none",
        "absolute_position": "learned" if "embeddings.position_embeddings" in shapes else "none",
        "patch_norm": "embeddings.norm.weight" in shapes,
        "final_norm": "layernorm.weight" in shapes,
        "norm_epsilon": epsilon,
    }
    if name == "swinv2":
        pretrained = tuple(weights.config.get("pretrained_window_sizes") or ())
        encoder["pretrained_windows"] = pretrained if any(pretrained) else ()
        image_size = _image_size(weights)
        if rounds_down(image_size, encoder["patch_size"], window, depths):
            raise CheckpointError(ROUNDED_DOWN.format("x".join(map(str, image_size))), weights.where)
    windows = tuple(windows) if windows and None not in windows else None
    return WeightSpec(NAME, encoder, _objective(weights, fc_norm=False), None, 3, prefix, windows=windows)


def rounds_down(image_size: tuple[int, int], patch_size: int, window: int, depths: tuple[int, ...]) -> bool:
    """Whether transformers' Swinv2, which computes windows for maps rounded down, has other windows than its maps."""
    for stage, grid in enumerate(stage_grids(image_size, patch_size, len(depths))):
        down = tuple(size // patch_size // 2**stage for size in image_size)
        shifted = depths[stage] > 1
        if min(down) < 1 or window_and_shift(down, window, shifted) != window_and_shift(grid, window, shifted):
            return True
    return False


def model_type(encoder) -> str:
    """The model type of this encoder in transformers."""
    name = type(encoder).__name__.lower()
    if name == "vit" and (encoder.relative_position != "none" or encoder.layer_scale or encoder.qkv_bias == "qv"):
        return "beit"
    return name


def exported_objective(encoder, objective: dict) -> dict:
    """The objective, without the pixel decoder for a BEiT, which has none in transformers."""
    return {"name": "none"} if model_type(encoder) == "beit" and objective["name"] == "simmim" else objective


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why transformers cannot hold the model, or ""."""
    kind = model_type(encoder)
    if kind in ("resnet", "convnext"):
        return f"a {kind} is exported for transformers only as a backbone; timm can hold it"
    if not encoder.final_norm and not (kind == "beit" and objective["name"] != "simmim"):
        return f"the {kind} of transformers always has a final norm; in timm's and the official ViT it is optional"
    refuse = _swin_refusal if kind.startswith("swin") else _vit_refusal
    return refuse(kind, encoder, objective, image_size) or _head_refusal(kind, encoder, objective)


def _vit_refusal(kind: str, encoder, objective: dict, image_size: tuple[int, int]) -> str:
    if not encoder.class_token:
        return f"the {kind} of transformers always has a class token; in timm's ViT it is optional"
    if encoder.num_registers or not encoder.class_position:
        return f"the {kind} of transformers has no registers, and a position of the class token; timm can hold it"
    if kind == "vit" and encoder.absolute_position == "none":
        return "the ViT of transformers always has absolute positions; in timm's and the official one they are optional"
    if objective["name"] == "simmim" and kind == "vit" and image_size[0] != image_size[1]:
        return "masked image models of transformers are square; leave the head out with --allow head,mask_token"
    if kind == "beit" and encoder.qkv_bias != "qv":
        return "with LayerScale or relative positions it is a BEiT, which has biases only on queries and values"
    return ""


def _swin_refusal(kind: str, encoder, objective: dict, image_size: tuple[int, int]) -> str:
    if not math.isclose(encoder.norm_epsilon, 1e-5, rel_tol=1e-6):
        epsilon = f"{encoder.norm_epsilon:g}"
        return f"norm_epsilon is {epsilon}, but some norms of the {kind} there always have 1e-5; stablehlo can hold it"
    if not encoder.patch_norm:
        return f"the {kind} of transformers always has a norm after the patches; in the official one it is optional"
    grids = stage_grids(image_size, encoder.patch_size, len(encoder.depths))
    if kind == "swin" and any(min(grid) < encoder.window for grid in grids):
        return (
            f"transformers does not shrink a window of {encoder.window} to a feature map of {min(grids[-1])}, so its "
            "Swin fails; the official format and timm can hold it"
        )
    if kind == "swinv2" and rounds_down(image_size, encoder.patch_size, encoder.window, encoder.depths):
        return ROUNDED_DOWN.format("x".join(map(str, image_size)))
    if image_size[0] != image_size[1]:
        return "masked image models of transformers are square; the official format works for any image size"
    return ""


def _head_refusal(kind: str, encoder, objective: dict) -> str:
    if objective["name"] != "classify":
        return ""
    reads_token = reads_class_token(encoder, objective)
    if kind == "vit" and not reads_token:
        return f"the classifier does not read the class token; {pooled_fix(encoder)}"
    if reason := head_refusal(type(encoder).__name__, encoder, objective):
        return reason
    if kind == "beit" and not reads_token and encoder.norm_epsilon != 1e-6:
        epsilon = f"{encoder.norm_epsilon:g}"
        return f"the norm after pooling has epsilon 1e-6 here, {epsilon} in transformers; {WITHOUT_HEAD}"
    return ""


def export_prefix(objective: str) -> str:
    """The prefix of the encoder's names, with a gap for the model type, which `rules` fills."""
    return "" if objective == "none" else "{}."


def export_notes(encoder) -> tuple[str, ...]:
    """None: config.json contains everything."""
    return ()


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table for this encoder and objective."""
    prefix = prefix.format(model_type(encoder))
    is_vit = type(encoder).__name__ == "ViT"
    table = under_encoder((vit if is_vit else swin)(encoder, prefix, image_size))
    if objective["name"] == "simmim":
        table += one("mask_token", f"{prefix}embeddings.mask_token", TOKEN)
        return table + dense("head", "decoder.0", POINTWISE)
    if objective["name"] == "classify":
        if objective["fc_norm"]:
            table += norm("head/norm", f"{prefix}pooler.layernorm")
        return table + dense("head/logits", "classifier")
    return table


def vit(encoder, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """ViT and BEiT."""
    table = convolution("patch_embed", f"{prefix}{PATCHES}")
    if encoder.class_token:
        table += one("cls_token", f"{prefix}embeddings.cls_token", TOKEN)
    table += positions(encoder, prefix, image_size, "embeddings.position_embeddings")
    if encoder.relative_position == "shared":
        table += one("rel_pos_bias/table", f"{prefix}encoder.relative_position_bias.{TABLE}")
    for n in range(encoder.depth):
        ours, theirs = f"block_{n}", f"{prefix}encoder.layer.{n}"
        inner = f"{theirs}.attention.attention"
        table += attention(ours, inner, f"{theirs}.attention.output.dense", encoder.qkv_bias) + rest(ours, theirs)
        if encoder.relative_position == "per_block":
            table += one(f"{ours}/rel_pos_bias/table", f"{inner}.relative_position_bias.{TABLE}")
        if encoder.layer_scale:
            table += one(f"{ours}/scale_attn/gamma", f"{theirs}.lambda_1")
            table += one(f"{ours}/scale_mlp/gamma", f"{theirs}.lambda_2")
    return table + (norm("norm", f"{prefix}layernorm") if encoder.final_norm else [])


def attention(ours: str, inner: str, projection: str, qkv_bias: str) -> list[Rule]:
    """Separate query, key and value, and the output projection."""
    parts = [f"{inner}.{part}" for part in ("query", "key", "value")]
    table = three_dense(f"{ours}/attn/qkv", parts, bias=qkv_bias == "qkv")
    if qkv_bias == "qv":
        table += one(f"{ours}/attn/q_bias", f"{inner}.query.bias", VECTOR)
        table += one(f"{ours}/attn/v_bias", f"{inner}.value.bias", VECTOR)
    return table + dense(f"{ours}/attn/proj", projection, TO_WIDTH)


def rest(ours: str, theirs: str) -> list[Rule]:
    """A block without its attention. Swin V2 has the same names, although its norms follow their branches."""
    table = norm(f"{ours}/norm1", f"{theirs}.layernorm_before") + norm(f"{ours}/norm2", f"{theirs}.layernorm_after")
    table += dense(f"{ours}/mlp/fc1", f"{theirs}.intermediate.dense")
    return table + dense(f"{ours}/mlp/fc2", f"{theirs}.output.dense")


def swin(encoder, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """Swin and Swin V2."""
    table = convolution("patch_embed", f"{prefix}{PATCHES}")
    if encoder.patch_norm:
        table += norm("patch_norm", f"{prefix}embeddings.norm")
    if encoder.absolute_position == "learned":
        table += one("pos_embed", f"{prefix}embeddings.position_embeddings", POSITIONS)
    for stage, depth in enumerate(encoder.depths):
        for n in range(depth):
            ours, theirs = f"stage_{stage}_block_{n}", f"{prefix}encoder.layers.{stage}.blocks.{n}"
            inner = f"{theirs}.attention.self"
            table += attention(ours, inner, f"{theirs}.attention.output.dense", encoder.qkv_bias) + rest(ours, theirs)
            if type(encoder).__name__ == "SwinV2":
                table += one(f"{ours}/attn/logit_scale", f"{inner}.logit_scale", PER_HEAD)
                table += dense(f"{ours}/attn/cpb/fc1", f"{inner}.continuous_position_bias_mlp.0")
                table += dense(f"{ours}/attn/cpb/fc2", f"{inner}.continuous_position_bias_mlp.2", bias=False)
            else:
                table += one(f"{ours}/attn/rel_pos_bias/table", f"{inner}.{TABLE}")
        if stage < len(encoder.depths) - 1:
            theirs = f"{prefix}encoder.layers.{stage}.downsample"
            table += norm(f"stage_{stage}_merge/norm", f"{theirs}.norm")
            table += dense(f"stage_{stage}_merge/reduction", f"{theirs}.reduction", bias=False)
    return table + (norm("norm", f"{prefix}layernorm") if encoder.final_norm else [])
