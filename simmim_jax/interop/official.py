"""Official state dicts of microsoft/SimMIM, microsoft/Swin-Transformer and facebookresearch/ConvNeXt.

Pretraining files have the prefix "encoder.", a `mask_token` and a `decoder.0`. Fine-tuned files have no prefix and a
`head` (a ViT also `fc_norm`). timm's BEiT has the names of the official ViT, and its Swin has nearly those of the
official Swin: the module `timm` shares these tables. `pickles` drops the yacs config in the files.
"""

import math

import numpy as np

from simmim_jax.errors import CheckpointError
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.rules import POINTWISE, TOKEN, Rule, dense, norm, one
from simmim_jax.interop.tables import CONVNEXT, convnext, swin, under_encoder, vit
from simmim_jax.interop.weight_spec import (
    Shapes,
    WeightSpec,
    find_prefix,
    integer_sqrt,
    mlp_ratio_from,
    patch_side,
    shapes_below,
    table_side,
)
from simmim_jax.models.vit import SIZES, sincos_position

NAME = "official"
BEIT = ("gamma_1", "attn.q_bias", "relative_position_bias_table")  # endings that timm's plain ViT does not have
WITHOUT_HEAD = "leave the classifier out with --allow head"
LAYER_SCALE = 0.1  # initial value in every official ViT, which trained weights do not determine


def recognize(weights: Weights) -> str | None:
    """The encoder with these names, or None if they are not official."""
    names = weights.arrays.keys()
    prefix = find_prefix(names, "patch_embed.proj.weight")
    if prefix is None:
        return "convnext" if find_prefix(names, "downsample_layers.0.0.weight") is not None else None
    if any(name.startswith(f"{prefix}layers.0.downsample.") for name in names) or (
        prefix == "encoder." and any(name.startswith(f"{prefix}layers.0.") for name in names)
    ):
        return "swinv2" if any(name.endswith("logit_scale") for name in names) else "swin"
    if any(name.startswith(f"{prefix}blocks.0.") for name in names) and (
        prefix == "encoder." or any(name.endswith(BEIT) for name in names)
    ):
        return "vit"
    return None


def detect(name: str, weights: Weights) -> WeightSpec:
    """The model, as far as the weights determine it."""
    if name == "convnext":
        return detect_convnext(weights, NAME, CONVNEXT, "head")
    return detect_vit(weights, NAME) if name == "vit" else detect_swin(weights, NAME, name)


def detect_vit(weights: Weights, format: str, layer_scale: float = LAYER_SCALE) -> WeightSpec:
    """A ViT or BEiT whose blocks are named `blocks.0`."""
    prefix = find_prefix(weights.arrays, "patch_embed.proj.weight")
    shapes = shapes_below(weights.arrays, prefix, weights.where)
    patch = shapes["patch_embed.proj.weight"]
    width, notes = patch[0], []
    table, shared = shapes.first("relative_position_bias_table"), "rel_pos_bias.relative_position_bias_table" in shapes
    depth, heads = shapes.count("blocks."), table[1] if table else None
    if heads is None:
        heads = guess_num_heads(width, depth)
        if heads:
            notes.append(f"assumed {heads} heads, which these weights do not determine: see --encoder.num_heads")
    class_token, registers = "cls_token" in shapes, shapes.get("reg_token", (1, 0, width))[1]
    class_position = has_class_position(shapes, registers)
    encoder = {
        "name": "vit",
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": mlp_ratio_from(shapes["blocks.0.mlp.fc1.weight"][0], width),
        "patch_size": patch_side(patch, weights.where),
        "class_token": class_token,
        "num_registers": registers,
        "absolute_position": position_type(weights.arrays.get(f"{prefix}pos_embed"), class_position),
        "class_position": class_position,
        "relative_position": "shared" if shared else "per_block" if table else "none",
        "qkv_bias": "qv" if shapes.any("attn.q_bias") else "qkv" if shapes.any("attn.qkv.bias") else "none",
        "layer_scale": layer_scale if shapes.any("gamma_1") or shapes.any("ls1.gamma") else 0.0,
        "final_norm": "norm.weight" in shapes,
        "norm_epsilon": 1e-6,
    }
    extra = 3 if class_token else 0
    side = table_side(table[0] - extra) if table else None
    if "pos_embed" in shapes:
        side = integer_sqrt(shapes["pos_embed"][1] - (class_token and class_position))
    image_size = (side * encoder["patch_size"],) * 2 if side else None
    objective = detect_objective(weights, shapes, prefix, encoder["final_norm"], of_patches="fc_norm.weight")
    return WeightSpec(format, encoder, objective, image_size, patch[1], prefix, tuple(notes))


def has_class_position(shapes: Shapes, registers: int) -> bool:
    """Whether the position embedding has a row for the class token. Raises CheckpointError for rows of other tokens."""
    if "dist_token" in shapes:
        what = "a distilled DeiT, which has a distillation token"
        raise CheckpointError(what, shapes.where, "give one without, like deit_small_patch16_224 or a DeiT III")
    if "pos_embed" not in shapes:
        return True
    rows, class_token = shapes["pos_embed"][1], "cls_token" in shapes
    is_square, is_square_and_one = integer_sqrt(rows) is not None, class_token and integer_sqrt(rows - 1) is not None
    if registers and not (is_square or is_square_and_one):
        what = f"{rows} positions for {registers} registers and the patches of a square image"
        fix = "give a model whose registers have no positions (timm's no_embed_class); others are not supported"
        raise CheckpointError(what, shapes.where, fix)
    return not (class_token and is_square)


def guess_num_heads(width: int, depth: int) -> int | None:
    """The heads of the known ViT of this width and depth, else one per 64 channels, else None."""
    known = [size["num_heads"] for size in SIZES.values() if (size["width"], size["depth"]) == (width, depth)]
    return known[0] if known else width // 64 if width % 64 == 0 else None


def position_type(table: np.ndarray | None, class_token: bool) -> str:
    """The kind of an absolute position embedding [1, n, d]: "sincos" if it has exactly those values."""
    if table is None:
        return "none"
    side = integer_sqrt(table.shape[1] - class_token)
    if side and table.shape[2] % 4 == 0:
        fixed = sincos_position((side, side), table.shape[2], class_token)
        if np.allclose(table[0], fixed, rtol=0, atol=1e-5):
            return "sincos"
    return "learned"


def detect_objective(weights: Weights, shapes: Shapes, prefix: str, final_norm: bool, of_patches: str = "") -> dict:
    """The objective that the heads in the file belong to.

    of_patches: for a ViT, the name of the norm that exists if the classifier pools patches. Without this norm it reads
    the class token after the final norm. Raises CheckpointError for a classifier that does neither.
    """
    if "decoder.0.weight" in weights.arrays:
        return {"name": "simmim"}
    found = classifier(weights, "head", fc_norm=bool(of_patches))
    if found["name"] == "none":
        return found
    if of_patches and of_patches not in shapes and final_norm and "cls_token" in shapes:
        return class_token_classifier(found["num_classes"])
    if of_patches and (of_patches not in shapes or final_norm):
        what = "unsupported classifier: it reads neither fc_norm of the patches' mean nor the final norm's class token"
        raise CheckpointError(what, weights.where, "leave it out with --allow 'head.*'")
    return found


def classifier(weights: Weights, name: str, *, fc_norm: bool) -> dict:
    """The objective of the classifier with this name, or of a bare encoder if there is none."""
    if f"{name}.weight" not in weights.arrays:
        return {"name": "none"}
    return {"name": "classify", "num_classes": weights.arrays[f"{name}.weight"].shape[0], "fc_norm": fc_norm}


def class_token_classifier(classes: int) -> dict:
    """The objective of a classifier that reads the class token."""
    return {"name": "classify", "num_classes": classes, "fc_norm": False, "pool": "class_token"}


def reads_class_token(encoder, objective: dict) -> bool:
    """Whether a ViT's classifier reads the class token after the final norm, with no norm of its own."""
    return objective.get("pool") == "class_token" and encoder.final_norm and not objective["fc_norm"]


def detect_swin(weights: Weights, format: str, name: str) -> WeightSpec:
    """A Swin or Swin V2 whose stages are named `layers.0`."""
    prefix = find_prefix(weights.arrays, "patch_embed.proj.weight")
    shapes = shapes_below(weights.arrays, prefix, weights.where)
    derived = {n.removeprefix(prefix): x for n, x in weights.derived.items()}
    patch, stages = shapes["patch_embed.proj.weight"], shapes.count("layers.")
    patch_size = patch_side(patch, weights.where)
    firsts = [f"layers.{stage}.blocks.0" for stage in range(stages)]
    encoder = {
        "name": name,
        "width": patch[0],
        "depths": tuple(shapes.count(f"layers.{stage}.blocks.") for stage in range(stages)),
        "patch_size": patch_size,
        "mlp_ratio": mlp_ratio_from(shapes["layers.0.blocks.0.mlp.fc1.weight"][0], patch[0]),
        "absolute_position": "learned" if "absolute_pos_embed" in shapes else "none",
        "patch_norm": "patch_embed.norm.weight" in shapes,
        "final_norm": "norm.weight" in shapes,
        "norm_epsilon": 1e-5,
    }
    if name == "swin":
        tables = [shapes[f"{first}.attn.relative_position_bias_table"] for first in firsts]
        windows = [table_side(table[0]) for table in tables]
        encoder["num_heads"] = tuple(table[1] for table in tables)
        encoder["qkv_bias"] = "qkv" if shapes.any("attn.qkv.bias") else "none"
    else:
        encoder["num_heads"] = tuple(shapes[f"{first}.attn.logit_scale"][0] for first in firsts)
        encoder["qkv_bias"] = "qv" if shapes.any("attn.q_bias") else "none"
        coordinates = [derived.get(f"{first}.attn.relative_coords_table") for first in firsts]
        indices = [derived.get(f"{first}.attn.relative_position_index") for first in firsts]
        windows = [
            (c.shape[1] + 1) // 2 if c is not None else integer_sqrt(i.shape[0]) if i is not None else None
            for c, i in zip(coordinates, indices, strict=True)
        ]
        encoder["pretrained_windows"] = pretrained_windows(coordinates, windows)
    known = None not in windows
    encoder["window"] = max(windows) if known else None
    grid = None  # of the first stage
    if "absolute_pos_embed" in shapes:
        grid = integer_sqrt(shapes["absolute_pos_embed"][1])
    elif mask := shifted_map(derived):
        grid = mask
    elif known and min(windows) < encoder["window"]:
        stage = next(s for s in range(stages) if windows[s] < encoder["window"])
        grid = windows[stage] * 2**stage  # a window shrinks to the size of its map
    objective = detect_objective(weights, shapes, prefix, encoder["final_norm"])
    image_size, windows = (grid * patch_size,) * 2 if grid else None, tuple(windows) if known else None
    return WeightSpec(format, encoder, objective, image_size, patch[1], prefix, windows=windows)


def shifted_map(derived: dict[str, np.ndarray]) -> int | None:
    """The side of the first stage's map, from the attention mask [windows, n, n] of a shifted block in it."""
    for name, mask in sorted(derived.items()):
        if name.endswith("attn_mask") and name.startswith("layers.0.") and mask.ndim == 3:
            return integer_sqrt(mask.shape[0] * mask.shape[1])
    return None


def pretrained_windows(coordinates: list[np.ndarray | None], windows: list[int | None]) -> tuple[int, ...]:
    """Swin V2's PRETRAINED_WINDOW_SIZES, from the scaled coordinates of each stage; () if they equal its windows."""
    sides = []
    for table, window in zip(coordinates, windows, strict=True):
        if table is None or window is None or window < 2:
            return ()
        reach = 2 ** (float(np.max(table)) * math.log2(8)) - 1  # 8 * (window - 1) / (pretrained window - 1)
        sides.append(round(1 + 8 * (window - 1) / reach))
    return () if sides == windows else tuple(sides)


def detect_convnext(weights: Weights, format: str, names: dict[str, str], head: str) -> WeightSpec:
    """A ConvNeXt. names: those of its parts, as in `tables.CONVNEXT`. head: the name of the classifier."""
    block, conv = names["block"], f"{names['conv']}.weight"
    prefix = find_prefix(weights.arrays, f"{block.format(stage=0, n=0)}.{conv}")
    shapes = shapes_below(weights.arrays, prefix, weights.where)
    stages = range(shapes.count("stages."))
    encoder = {
        "name": "convnext",
        "depths": tuple(shapes.count(block.format(stage=stage, n="")) for stage in stages),
        "widths": tuple(shapes[f"{block.format(stage=stage, n=0)}.{conv}"][0] for stage in stages),
        "layer_scale": 1e-6 if shapes.any("gamma") else 0.0,
        "norm_epsilon": 1e-6,
    }
    objective = classifier(weights, head, fc_norm=True)
    if "decoder.0.weight" in weights.arrays:
        objective = {"name": "simmim"}
    return WeightSpec(format, encoder, objective, None, shapes[f"{names['patch_embed']}.weight"][1], prefix)


def exported_objective(encoder, objective: dict) -> dict:
    """All of the objective."""
    return objective


def export_prefix(objective: str) -> str:
    """The prefix of the encoder's names in files that we write."""
    return "encoder." if objective == "simmim" else ""


def export_notes(encoder) -> tuple[str, ...]:
    """The windows of pretraining, which the file does not contain."""
    if not encoder.pretrained_windows:
        return ()
    windows = list(encoder.pretrained_windows)
    return (f"the file does not contain the windows of pretraining: give PRETRAINED_WINDOW_SIZES={windows}",)


EPSILONS = {"ViT": 1e-6, "ConvNeXt": 1e-6, "Swin": 1e-5, "SwinV2": 1e-5, "ResNet": 1e-5}


def norm_refusal(encoder) -> str:
    """Why official and timm models, whose norms have a fixed epsilon, cannot hold the encoder, or ""."""
    theirs = EPSILONS[type(encoder).__name__]
    if math.isclose(encoder.norm_epsilon, theirs, rel_tol=1e-6):
        return ""
    return (
        f"norm_epsilon is {encoder.norm_epsilon:g}, but {theirs:g} in their models; stablehlo can hold it, or add "
        "--allow norm_epsilon and make their model with this epsilon"
    )


def epsilon_note(encoder, objective: dict) -> str:
    """What a reader of an export with another epsilon needs to know."""
    norm_class = "BatchNorm2d" if type(encoder).__name__ == "ResNet" else "LayerNorm"
    note = f"make their model with norm_layer=functools.partial(torch.nn.{norm_class}, eps={encoder.norm_epsilon:g})"
    return note + "; the norm after pooling has 1e-6 here" * bool(objective.get("fc_norm"))


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why this format cannot hold the model, or ""."""
    name = type(encoder).__name__
    if name == "ResNet":
        return "there is no official ResNet; timm has one"
    if name == "ViT":
        if not encoder.class_token:
            return "the official ViT always has a class token; in timm's it is optional"
        if encoder.num_registers or not encoder.class_position:
            return "the official ViT has no registers, and a position of the class token; timm's has both options"
        if encoder.qkv_bias == "qkv":
            return "the official ViT has no bias on keys; timm's ViT without relative positions has one"
    elif name in ("Swin", "SwinV2") and not encoder.final_norm:
        return "the official Swin always has a final norm"
    return norm_refusal(encoder) or head_refusal(name, encoder, objective)


def head_refusal(name: str, encoder, objective: dict) -> str:
    """Why official and timm models cannot hold the classifier, or ""."""
    if objective["name"] != "classify":
        return ""
    if objective.get("block", 0):
        return f"the classifier reads block {objective['block']}, but theirs reads the output; {WITHOUT_HEAD}"
    if name == "ViT" and reads_class_token(encoder, objective):
        return ""
    if objective.get("pool", "patches") != "patches":
        return f"the classifier reads {objective['pool']}, but theirs the class token; {WITHOUT_HEAD}"
    if name == "ViT" and (encoder.final_norm or not objective["fc_norm"]):
        return f"theirs has one norm, after pooling (final_norm=False, fc_norm=True); {pooled_fix(encoder)}"
    if name in ("Swin", "SwinV2", "ResNet") and objective["fc_norm"]:
        return f"theirs has no norm after pooling (fc_norm); {WITHOUT_HEAD}"
    if name == "ConvNeXt" and not objective["fc_norm"]:
        return f"theirs has a norm after pooling (fc_norm); {WITHOUT_HEAD}"
    return ""


def pooled_fix(encoder) -> str:
    """How to get a ViT classifier of pooled patches that a format can hold: as official BEiT, or as timm's ViT."""
    timm = "--config.encoder.final_norm=false, for --format=timm"
    recipe = timm if encoder.qkv_bias == "qkv" else "configs/folder_finetune.py:vit"
    return f"fine-tune with {recipe}, or {WITHOUT_HEAD}"


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table for this encoder and objective."""
    table = {"ViT": vit, "Swin": swin, "SwinV2": swin, "ConvNeXt": convnext}[type(encoder).__name__]
    encoder_rules = under_encoder(table(encoder, prefix, image_size))
    if objective["name"] == "simmim":
        return encoder_rules + one("mask_token", f"{prefix}mask_token", TOKEN) + dense("head", "decoder.0", POINTWISE)
    if objective["name"] == "classify":
        norm_name = f"{prefix}norm" if type(encoder).__name__ == "ConvNeXt" else f"{prefix}fc_norm"
        head_norm = norm("head/norm", norm_name) if objective["fc_norm"] else []
        return encoder_rules + head_norm + dense("head/logits", "head")
    return encoder_rules
