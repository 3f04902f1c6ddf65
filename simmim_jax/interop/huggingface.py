"""Hugging Face transformers: folders of ViT, BEiT, Swin and Swinv2, masked image models, classifiers or bare.

The names are the classic ones that `save_pretrained` writes; those of `state_dict()` in transformers 5 are others. The
ViT of transformers is the plain one; an official ViT, with relative positions, LayerScale or biases on queries and
values alone, is a BEiT there, which has no pixel decoder. config.json has the last word on what weights do not tell,
and is refused where they tell otherwise.
"""

import json
import math

from simmim_jax.errors import CheckpointError, choose
from simmim_jax.interop.official import (
    class_token_classifier,
    position_type,
    positions,
    reads_class_token,
    under_encoder,
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
from simmim_jax.interop.weight_spec import (
    Shapes,
    WeightSpec,
    check_agreement,
    find_prefix,
    mlp_ratio_from,
    square,
    table_side,
    without_prefix,
)
from simmim_jax.models.windows import stage_grids, window_and_shift

NAME = "huggingface"
MODEL_TYPES = {"vit": "vit", "beit": "vit", "swin": "swin", "swinv2": "swinv2"}
PATCHES = "embeddings.patch_embeddings.projection"
TABLE = "relative_position_bias_table"


def recognize(weights: Weights) -> str | None:
    """The encoder that config.json names. Raises CheckpointError for a model type that has no place here."""
    if not weights.config and find_prefix(weights.arrays, f"{PATCHES}.weight") is not None:
        raise CheckpointError(
            "a Hugging Face model without its config.json", weights.where, "give the folder that has both"
        )
    model_type = weights.config.get("model_type")
    model_type = model_type if model_type is None else str(model_type)[:100]
    if not weights.config or (model_type is None and "architecture" in weights.config):  # timm's folders on the hub
        return None
    if model_type not in MODEL_TYPES:
        raise CheckpointError(
            f"model_type {model_type!r} in config.json", weights.where, f"one of {', '.join(MODEL_TYPES)} can be read"
        )
    if find_prefix(weights.arrays, f"{PATCHES}.weight") is None:
        names = ", ".join(sorted(weights.arrays)[:3])
        raise CheckpointError(
            f"no {PATCHES}.weight among the names ({names})", weights.where,
            "give what save_pretrained writes, not a state_dict() of transformers 5",
        )  # fmt: skip
    return MODEL_TYPES[model_type]


def detect(name: str, weights: Weights) -> WeightSpec:
    """The model, by config.json; what the weights say of it must be the same."""
    prefix = find_prefix(weights.arrays, f"{PATCHES}.weight")
    shapes = without_prefix({n: x.shape for n, x in weights.arrays.items()}, prefix, weights.where)
    if weights.config.get("hidden_act", "gelu") != "gelu":
        raise CheckpointError(f"hidden_act {weights.config['hidden_act']!r}", weights.where, "only gelu is here")
    found = (_detect_vit if name == "vit" else _detect_swin)(name, weights, shapes, prefix)
    return found._replace(image_size=_image_size(weights), channels=_positive_int(weights, "num_channels", 3))


def _field(weights: Weights, field: str, default=None):
    """A field of config.json; `default` is that of transformers, which leaves out nothing else."""
    value = weights.config.get(field, default)
    if value is None:
        raise CheckpointError(f"no {field!r} in config.json", weights.where, "add it")
    return value


def _positive_int(weights: Weights, field: str, default=None) -> int:
    """A field that is a whole number above 0."""
    value = _field(weights, field, default)
    if type(value) is not int or value < 1:
        raise CheckpointError(f"{field} {str(value)[:100]!r} in config.json", weights.where, "make it a whole number")
    return value


def _positive_float(weights: Weights, field: str, default: float) -> float:
    """A field that is a finite number above 0."""
    value = _field(weights, field, default)
    if type(value) not in (int, float) or not 0 < value < math.inf:
        raise CheckpointError(f"{field} {str(value)[:100]!r} in config.json", weights.where, "make it a number above 0")
    return float(value)


def _image_size(weights: Weights) -> tuple[int, int]:
    """(height, width): one number or two."""
    size = _field(weights, "image_size", 224)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) != 2 or not all(type(side) is int and side > 0 for side in sides):
        raise CheckpointError(
            f"image_size {str(size)[:100]!r} in config.json", weights.where, "make it a whole number, or a list of two"
        )
    return tuple(sides)


def _patch_size(weights: Weights, shapes: Shapes, default: int) -> int:
    size = _field(weights, "patch_size", default)
    patch = shapes[f"{PATCHES}.weight"]
    sides = size if isinstance(size, list) else [size, size]
    check_agreement({
        "patch_size": (list(patch[2:]), sides), "num_channels": (patch[1], _positive_int(weights, "num_channels", 3))
    }, weights.where)  # fmt: skip
    return square(patch, weights.where)


def _detect_vit(name: str, weights: Weights, shapes: Shapes, prefix: str) -> WeightSpec:
    beit = weights.config["model_type"] == "beit"
    width, depth = _positive_int(weights, "hidden_size", 768), _positive_int(weights, "num_hidden_layers", 12)
    heads = _positive_int(weights, "num_attention_heads", 12)
    patch_size = _patch_size(weights, shapes, 16)
    table = shapes.first(TABLE)
    shared = f"encoder.relative_position_bias.{TABLE}" in shapes
    said = "shared" if weights.config.get("use_shared_relative_position_bias") else None
    said = said or ("per_block" if weights.config.get("use_relative_position_bias") else "none")
    (size, width_in_pixels), grid = _image_size(weights), None
    if size == width_in_pixels:
        grid = size // patch_size
    side_in_table = table_side(table[0] - 3) if table and grid else None
    check_agreement({
        "hidden_size": (shapes[f"{PATCHES}.weight"][0], width),
        "num_hidden_layers": (shapes.count("encoder.layer."), depth),
        "num_attention_heads": (table[1] if table else None, heads),
        "relative positions": ("shared" if shared else "per_block" if table else "none", said),
        "image_size": (side_in_table and side_in_table * patch_size, size if grid else None),
    }, weights.where)  # fmt: skip
    inner = "encoder.layer.0.attention.attention"
    bias = "qkv" if f"{inner}.key.bias" in shapes else "qv" if f"{inner}.query.bias" in shapes else "none"
    scale = weights.config.get("layer_scale_init_value", 0.1) if beit and shapes.any("lambda_1") else 0.0
    encoder = {
        "name": "vit",
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio_from(_positive_int(weights, "intermediate_size", 3072), width),
        "patch_size": patch_size,
        "class_token": "embeddings.cls_token" in shapes,
        "absolute_position": position_type(weights.arrays.get(f"{prefix}embeddings.position_embeddings"), True),
        "relative_position": said,
        "qkv_bias": bias,
        "layer_scale": scale,
        "final_norm": "layernorm.weight" in shapes,
        "norm_epsilon": _positive_float(weights, "layer_norm_eps", 1e-12),
    }
    objective, notes = {"name": "none"}, []
    if "decoder.0.weight" in weights.arrays:
        objective = {"name": "simmim"}
    elif "classifier.weight" in weights.arrays:
        classes = weights.arrays["classifier.weight"].shape[0]
        of_patches = "pooler.layernorm.weight" in shapes
        objective = {"name": "classify", "num_classes": classes, "fc_norm": True}
        if not of_patches:
            objective = class_token_classifier(classes)
        elif encoder["norm_epsilon"] != 1e-6:
            notes.append(f"the norm after pooling has epsilon 1e-6 here, {encoder['norm_epsilon']:g} there")
    return WeightSpec(NAME, encoder, objective, None, 3, prefix, tuple(notes))


def _detect_swin(name: str, weights: Weights, shapes: Shapes, prefix: str) -> WeightSpec:
    depths, heads = tuple(_field(weights, "depths")), tuple(_field(weights, "num_heads"))
    width, window = _positive_int(weights, "embed_dim", 96), _positive_int(weights, "window_size", 7)
    epsilon = _positive_float(weights, "layer_norm_eps", 1e-5)
    stages = shapes.count("encoder.layers.")
    firsts = [f"encoder.layers.{stage}.blocks.0.attention.self" for stage in range(stages)]
    if name == "swin":
        tables = [shapes[f"{first}.{TABLE}"] for first in firsts]
        windows, columns = [table_side(table[0]) for table in tables], [table[1] for table in tables]
    else:
        windows, columns = [None], [shapes[f"{first}.logit_scale"][0] for first in firsts]
    check_agreement({
        "embed_dim": (shapes[f"{PATCHES}.weight"][0], width),
        "depths": (tuple(shapes.count(f"encoder.layers.{stage}.blocks.") for stage in range(stages)), depths),
        "num_heads": (tuple(columns), heads),
        "window_size": (windows[0], window),
    }, weights.where)  # fmt: skip
    if epsilon != 1e-5:
        raise CheckpointError(
            f"layer_norm_eps {epsilon:g}", weights.where,
            "transformers has 1e-5 in the patch embedding and in merging whatever this says; ours is one for all",
        )  # fmt: skip
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
    objective = {"name": "none"}
    if "decoder.0.weight" in weights.arrays:
        objective = {"name": "simmim"}
    elif "classifier.weight" in weights.arrays:
        classes = weights.arrays["classifier.weight"].shape[0]
        objective = {"name": "classify", "num_classes": classes, "fc_norm": False}
    return WeightSpec(
        NAME, encoder, objective, None, 3, prefix, windows=tuple(windows) if None not in windows else None
    )


ROUNDED_DOWN = (
    "for images of {} the Swinv2 of transformers has windows for maps rounded down at each halving, and maps that are "
    "rounded up: no other code has those"
)


def rounds_down(image_size: tuple[int, int], patch_size: int, window: int, depths: tuple[int, ...]) -> bool:
    """Whether the windows of transformers' Swinv2, which halves maps rounding down, are not those of its maps."""
    for stage, grid in enumerate(stage_grids(image_size, patch_size, len(depths))):
        down = tuple(size // patch_size // 2**stage for size in image_size)
        shifted = depths[stage] > 1
        if min(down) < 1 or window_and_shift(down, window, shifted) != window_and_shift(grid, window, shifted):
            return True
    return False


def model_type(encoder) -> str:
    """The model of transformers that this encoder is."""
    name = type(encoder).__name__.lower()
    if name == "vit" and (encoder.relative_position != "none" or encoder.layer_scale or encoder.qkv_bias == "qv"):
        return "beit"
    return name


def exported_objective(encoder, objective: dict) -> dict:
    """The objective that is left in a folder: BEiT has no pixel decoder in transformers."""
    return {"name": "none"} if model_type(encoder) == "beit" and objective["name"] == "simmim" else objective


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why transformers cannot hold the model; empty if it can."""
    kind = model_type(encoder)
    if kind in ("resnet", "convnext"):
        return f"a {kind} is exported for transformers as a backbone alone; timm has its names"
    if not encoder.final_norm and not (kind == "beit" and objective["name"] != "simmim"):
        return f"the {kind} of transformers always has a final norm; timm's and the official ViT need not"
    if kind in ("vit", "beit"):
        if not encoder.class_token:
            return f"the {kind} of transformers always has a class token; timm's ViT need not"
        if kind == "vit" and encoder.absolute_position == "none":
            return "the ViT of transformers always has absolute positions; timm's and the official one need not"
        if objective["name"] == "simmim" and kind == "vit" and image_size[0] != image_size[1]:
            return "the masked image models of transformers are square; leave the head out with --allow head,mask_token"
        if kind == "beit" and encoder.qkv_bias != "qv":
            return (
                "LayerScale or relative positions make it a BEiT there, which has biases on queries and values alone; "
                "timm's ViT takes LayerScale with other biases"
            )
    else:
        if not math.isclose(encoder.norm_epsilon, 1e-5, rel_tol=1e-6):
            return (
                f"norm_epsilon is {encoder.norm_epsilon:g}, and some norms of the {kind} of transformers always have "
                "1e-5; stablehlo holds it"
            )
        if not encoder.patch_norm:
            return f"the {kind} of transformers always has a norm after the patches; the official one need not"
        grids = stage_grids(image_size, encoder.patch_size, len(encoder.depths))
        if kind == "swin" and any(min(grid) < encoder.window for grid in grids):
            return (
                f"transformers does not shrink a table of window {encoder.window} to a map of {min(grids[-1])}, so its "
                "Swin fails there; the official and timm's formats hold it"
            )
        if kind == "swinv2" and rounds_down(image_size, encoder.patch_size, encoder.window, encoder.depths):
            return ROUNDED_DOWN.format("x".join(map(str, image_size)))
        if image_size[0] != image_size[1]:
            return "the masked image models of transformers are square; the official format says nothing of image sizes"
    if objective["name"] != "classify":
        return ""
    hint = "leave the classifier out with --allow head"
    if objective.get("block", 0):
        return f"the classifier reads block {objective['block']}, theirs reads the output; {hint}"
    if kind in ("vit", "beit") and reads_class_token(encoder, objective):
        return ""
    if kind == "vit":
        read = {"patches": "the mean of the patches"}.get(objective.get("pool", "patches"), "something else")
        return f"the classifier reads {read}, that of transformers the class token; timm's can; {hint}"
    if objective.get("pool", "patches") != "patches":
        return f"the classifier reads {objective['pool']}, theirs the class token after one final norm; {hint}"
    if kind == "beit" and (encoder.final_norm or not objective["fc_norm"]):
        return f"BEiT's classifier has one norm, after pooling: final_norm=False and fc_norm=True; {hint}"
    if kind == "beit" and encoder.norm_epsilon != 1e-6:
        return f"the norm after pooling has epsilon 1e-6 here, and {encoder.norm_epsilon:g} there; {hint}"
    if kind.startswith("swin") and objective["fc_norm"]:
        return f"the {kind} of transformers has no norm after pooling (fc_norm); {hint}"
    return ""


def export_prefix(objective: str) -> str:
    """Names of a bare model have no prefix; others that of their kind, which `rules` completes."""
    return "" if objective == "none" else "{}."


def export_notes(encoder) -> tuple[str, ...]:
    """config.json tells all."""
    return ()


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table of this encoder and objective."""
    prefix = prefix.format(model_type(encoder))
    is_vit = type(encoder).__name__ == "ViT"
    table = under_encoder((vit if is_vit else swin)(encoder, prefix, image_size))
    if objective["name"] == "simmim":
        return (
            table + one("mask_token", f"{prefix}embeddings.mask_token", TOKEN) + dense("head", "decoder.0", POINTWISE)
        )
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
    """Query, key and value apart, and the last linear map."""
    table = three_dense(f"{ours}/attn/qkv", (f"{inner}.{part}" for part in ("query", "key", "value")),
                        bias=qkv_bias == "qkv")  # fmt: skip
    if qkv_bias == "qv":
        table += one(f"{ours}/attn/q_bias", f"{inner}.query.bias", VECTOR)
        table += one(f"{ours}/attn/v_bias", f"{inner}.value.bias", VECTOR)
    return table + dense(f"{ours}/attn/proj", projection, TO_WIDTH)


def rest(ours: str, theirs: str) -> list[Rule]:
    """A block without its attention. Swin V2's norms, which follow their branch, have the names all the same."""
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


ARCHITECTURES = {
    "none": {"vit": "ViTModel", "beit": "BeitModel", "swin": "SwinModel", "swinv2": "Swinv2Model"},
    "simmim": {kind: f"{cls}ForMaskedImageModeling" for kind, cls in
               (("vit", "ViT"), ("swin", "Swin"), ("swinv2", "Swinv2"))},
    "classify": {kind: f"{cls}ForImageClassification" for kind, cls in
                 (("beit", "Beit"), ("swin", "Swin"), ("swinv2", "Swinv2"), ("vit", "ViT"))},
}  # fmt: skip


def make_config(encoder, objective: dict, image_size: tuple[int, int], channels: int) -> dict:
    """config.json of the folder."""
    kind = model_type(encoder)
    config = {
        "model_type": kind,
        "architectures": [ARCHITECTURES[objective["name"]][kind]],
        "dtype": "float32",
        "image_size": image_size[0] if image_size[0] == image_size[1] else list(image_size),
        "patch_size": encoder.patch_size,
        "num_channels": channels,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": encoder.norm_epsilon,
    }
    if kind in ("vit", "beit"):
        config |= {
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "intermediate_size": int(encoder.width * encoder.mlp_ratio),
        }
    if kind == "vit":
        config |= {"qkv_bias": encoder.qkv_bias == "qkv", "encoder_stride": encoder.feature_stride}
    elif kind == "beit":
        config |= {
            "layer_scale_init_value": encoder.layer_scale,
            "use_absolute_position_embeddings": encoder.absolute_position != "none",
            "use_relative_position_bias": encoder.relative_position == "per_block",
            "use_shared_relative_position_bias": encoder.relative_position == "shared",
            "use_mask_token": False,
            "use_mean_pooling": not encoder.final_norm,
            "drop_path_rate": encoder.drop_path,
        }
    else:
        config |= {
            "embed_dim": encoder.width,
            "depths": list(encoder.depths),
            "num_heads": list(encoder.num_heads),
            "window_size": encoder.window,
            "mlp_ratio": encoder.mlp_ratio,
            "qkv_bias": encoder.qkv_bias != "none",
            "use_absolute_embeddings": encoder.absolute_position == "learned",
            "drop_path_rate": encoder.drop_path,
            "encoder_stride": encoder.feature_stride,
            "hidden_size": encoder.width * 2 ** (len(encoder.depths) - 1),
        }
    if kind == "swinv2":
        config["pretrained_window_sizes"] = list(encoder.pretrained_windows or [0] * len(encoder.depths))
    if objective["name"] == "classify":
        labels = range(objective["num_classes"])
        config |= {"id2label": {str(n): f"LABEL_{n}" for n in labels}, "label2id": {f"LABEL_{n}": n for n in labels}}
    return config


RESAMPLE = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}  # Pillow's numbers


def make_preprocessor_config(
    image_size: tuple[int, int], mean: tuple, std: tuple, interpolation: str, crop_fraction: int | float = 1.0
) -> dict:
    """preprocessor_config.json: of a decoded image the pixels that `resize_and_center_crop` gives here, normalized.

    But for rounding (1 of 255; nearest may take another pixel, and lanczos is bicubic where transformers resizes by an
    older torchvision), and for a shift by a pixel where what is cut off on a side is 1.5, 3.5, ... pixels: transformers
    rounds that down, we up. It resizes to cover squares alone: for other sizes, the whole image is squashed (see
    `squashed`). BitImageProcessor reads all of this in transformers 4 and 5; the ViTImageProcessor of 4 refuses a
    shortest edge.
    """
    height, width = image_size
    square = height == width
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": len(mean) == 3,
        "do_resize": True,
        "size": {"shortest_edge": math.floor(height / crop_fraction)} if square else {"height": height, "width": width},
        "resample": choose("interpolation", interpolation, RESAMPLE),
        "do_center_crop": square,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def squashed(image_size: tuple[int, int]) -> tuple[str, ...]:
    """A note that an exported folder makes other pixels of images than we do, where it does."""
    height, width = image_size
    if height == width:
        return ()
    told = f"preprocessor_config.json squashes images to {height} x {width}, as transformers crops to squares alone"
    return (f"{told}; the run resized them to cover that, and cropped",)


def model_card(
    encoder, objective: dict, config: dict, *, step: int | None, summary: dict, no_place: list[str], allowed: list[str],
    notes: tuple[str, ...] = (),
) -> str:  # fmt: skip
    """README.md: what the model is, how it was made, and what was measured, by its run's own files.

    config: the run's config.json. summary: its summary.json, or empty; no number comes from elsewhere, and none of
    another step than that of the weights. no_place, allowed: what was left out because this format has no place for
    it, and because the user said so. notes: what else its reader should know.
    """
    imported, parts = config.get("imported"), []
    what = {"simmim": "pretrained by masked image modeling", "classify": "an image classifier", "none": "an encoder"}
    parts.append(f"A {type(encoder).__name__}, {what[objective['name']]}, as simmim_jax exported it.")
    if isinstance(imported, dict):
        parts.append(
            f"Its weights were imported from `{imported.get('from')}` ({imported.get('format')}, sha256 "
            f"`{imported.get('sha256')}`); how they were trained is not known here."
        )
    elif step is not None:
        parts.append(f"These are its weights after {step} steps of training.")
    if config.get("init_from"):
        parts.append(f"Training began with the weights of `{config['init_from']}`.")
    if no_place:
        parts.append(f"Left out, because this format has no place for it: {', '.join(no_place)}.")
    if allowed:
        parts.append(f"Left out at the export, as its user chose: {', '.join(allowed)}.")
    parts += [f"Note: {note}." for note in notes]
    data = {
        name: value for name, value in config.get("data", {}).items() if name in ("source", "name", "split") and value
    }
    if data:
        parts += ["## Data", "\n".join(f"- {name}: `{value}`" for name, value in data.items())]
    if "optim" in config:
        told = ("objective", "encoder", "optim", "epochs", "steps", "batch_size", "image_size", "mean", "std")
        recipe = {name: config[name] for name in told if name in config}
        parts += ["## Recipe", f"```json\n{json.dumps(recipe, indent=2)}\n```"]
    about = ("step", "images_per_second")
    metrics = {name: value for name, value in summary.items() if isinstance(value, int | float) and name not in about}
    if metrics and step is not None and summary.get("step") == step:
        parts += ["## Metrics", f"On held-out images, as the run measured them at step {step}:"]
        parts.append("\n".join(f"- {name}: {value}" for name, value in metrics.items()))
    header = "---\nlibrary_name: transformers\ntags:\n- simmim\n- masked-image-modeling\n---\n"
    return header + "\n# " + type(encoder).__name__ + "\n\n" + "\n\n".join(parts) + "\n"
