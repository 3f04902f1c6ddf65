"""timm state dicts: `vit_*` (also BEiT), `swin_*`, `swinv2_*`, `resnet*` and `convnext*` of timm 1.0.

timm's models have no pixel head: a pretrained SimMIM is exported as an encoder. In timm's Swin, merging begins a stage;
in the official one it ends a stage. timm pads a feature map after rolling it. We pad before, as the official detection
code and transformers do. Features then differ if windows do not tile a map.
"""

import re

from simmim_jax.errors import CheckpointError
from simmim_jax.interop import official, tables
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.rules import Rule, batch_norm, convolution, dense, norm
from simmim_jax.interop.weight_spec import WeightSpec, find_prefix, shapes_below
from simmim_jax.models.windows import stage_grids, stage_windows

NAME = "timm"
LAYER_SCALE = 1e-5  # initial value in timm's ViTs, which trained weights do not determine
PADDED = (
    "windows do not tile the feature maps of these images: timm pads a map after rolling it, this code before, so that "
    "features differ; give an --image_size whose maps the windows tile, or train further"
)
ANTI_ALIASED = (
    "timm's anti-aliased ResNets (resnetaa*, resnetblur*) have the same names; they give other features here and are "
    "not supported"
)
VARIANTS = {  # patterns in timm's `architecture` for models with the same names and another forward pass
    r"resnet(aa|blur)|seresnetaa": "pools for anti-aliasing where a plain ResNet has strides",
    "quickgelu": "has another GELU",
}


def recognize(weights: Weights) -> str | None:
    """The encoder with these names, or None if they are not timm's."""
    names = weights.arrays.keys()
    if find_prefix(names, "layer1.0.conv1.weight") is not None:
        return "resnet"
    if find_prefix(names, "stages.0.blocks.0.conv_dw.weight") is not None:
        return "convnext"
    prefix = find_prefix(names, "patch_embed.proj.weight")
    if prefix is None:
        return None
    if any(name.startswith(f"{prefix}layers.0.") for name in names):
        return "swinv2" if any(name.endswith("logit_scale") for name in names) else "swin"
    return "vit" if any(name.startswith(f"{prefix}blocks.0.") for name in names) else None


def detect(name: str, weights: Weights) -> WeightSpec:
    """The model, as far as the weights determine it."""
    check_variant(weights)
    if name == "vit":
        found = official.detect_vit(weights, NAME, layer_scale=LAYER_SCALE)
    elif name in ("swin", "swinv2"):
        found = _detect_swin(name, weights)
    elif name == "convnext":
        found = official.detect_convnext(weights, NAME, CONVNEXT, "head.fc")
    else:
        found = _detect_resnet(weights)
    if name == "resnet" and not weights.config and not weights.made:
        found = found._replace(notes=(*found.notes, ANTI_ALIASED))
    size = weights.config.get("pretrained_cfg", {}).get("input_size")  # in timm's folders on the Hugging Face hub
    return found._replace(image_size=tuple(size[1:])) if size else found


def check_variant(weights: Weights) -> None:
    """Raise CheckpointError if a timm folder holds a variant with the same names and another forward pass."""
    architecture, arguments = weights.config.get("architecture", ""), weights.config.get("model_args") or {}
    for pattern, why in VARIANTS.items():
        if re.search(pattern, str(architecture)):
            raise CheckpointError(f"architecture {architecture!r}", weights.where, f"it {why}, which is not supported")
    for name in ("aa_layer", "act_layer", "norm_layer", "output_stride", "block_args"):
        if arguments.get(name) is not None:
            what = f"model_args has {name} {str(arguments[name])[:100]!r}"
            raise CheckpointError(what, weights.where, "models with it are not supported")


def pads(image_size: tuple[int, int], patch_size: int, window: int, stages: int) -> bool:
    """Whether there is a stage whose feature map the windows do not tile."""
    grids, windows = stage_grids(image_size, patch_size, stages), stage_windows(image_size, patch_size, stages, window)
    return any(size % side for grid, side in zip(grids, windows, strict=True) for size in grid)


def _detect_swin(name: str, weights: Weights) -> WeightSpec:
    found = official.detect_swin(weights, NAME, name)
    found = found._replace(objective=official.classifier(weights, "head.fc", fc_norm=False))
    if name == "swinv2":
        note = (
            "assumed that pretraining had the same windows, which timm's weights do not determine: if it had others, "
        )
        note += "give --encoder.pretrained_windows, like 12,12,12,6"
        found = found._replace(notes=(*found.notes, note))
    return found


def _detect_resnet(weights: Weights) -> WeightSpec:
    prefix = find_prefix(weights.arrays, "layer1.0.conv1.weight")
    shapes = shapes_below(weights.arrays, prefix, weights.where)
    if "layer1.0.conv3.weight" not in shapes or "conv1.weight" not in shapes:
        raise CheckpointError(
            "a ResNet with basic blocks or a deep stem", weights.where, "give one with bottleneck blocks, like resnet50"
        )
    stem = shapes["conv1.weight"]
    encoder = {
        "name": "resnet",
        "depths": tuple(shapes.count(f"layer{stage + 1}.") for stage in range(4)),
        "width": stem[0],
        "norm_epsilon": 1e-5,
    }
    return WeightSpec(NAME, encoder, official.classifier(weights, "fc", fc_norm=False), None, stem[1], prefix)


def exported_objective(encoder, objective: dict) -> dict:
    """The objective without a pixel head, which timm does not have."""
    return {"name": "none"} if objective["name"] == "simmim" else objective


def export_prefix(objective: str) -> str:
    """timm's names have no prefix."""
    return ""


def export_notes(encoder) -> tuple[str, ...]:
    """The windows of pretraining, which the file does not contain."""
    if type(encoder).__name__ == "ViT" and (encoder.num_registers or not encoder.class_position):
        return (f"make timm's model with reg_tokens={encoder.num_registers}, no_embed_class=True",)
    if not encoder.pretrained_windows:
        return ()
    windows = tuple(encoder.pretrained_windows)
    return (f"the file does not contain the windows of pretraining: give timm pretrained_window_sizes={windows}",)


def is_beit(encoder) -> bool:
    """Whether this ViT is a BEiT in timm, with the official names."""
    return encoder.relative_position != "none" or encoder.qkv_bias == "qv"


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why this format cannot hold the model, or ""."""
    name = type(encoder).__name__
    if name == "ViT" and encoder.num_registers and encoder.class_token and encoder.class_position:
        return "timm's ViT with registers has no position of the class token (class_position=False)"
    if name == "ViT" and is_beit(encoder):
        if encoder.num_registers or not encoder.class_position:
            what = "with relative positions or qkv_bias=qv it is timm's BEiT"
            return f"{what}, which has no registers, and a position of the class token"
        if not encoder.class_token:
            return "timm's BEiT always has a class token"
        if encoder.qkv_bias == "qkv":
            return "timm's BEiT, the ViT with relative positions, has no bias on keys"
    if name in ("Swin", "SwinV2"):
        if encoder.absolute_position != "none":
            return "timm's Swin has no absolute positions; the official one has"
        if not (encoder.patch_norm and encoder.final_norm):
            return "timm's Swin always has a norm after the patches and a final one"
        grids = stage_grids(image_size, encoder.patch_size, len(encoder.depths))
        if image_size[0] != image_size[1] and any(min(grid) <= encoder.window for grid in grids):
            return "timm's Swin shrinks each side of a window by itself; the official format works for any image size"
        if pads(image_size, encoder.patch_size, encoder.window, len(encoder.depths)):
            return (
                f"windows of {encoder.window} do not tile the feature maps of these images, which timm pads at another "
                "point; the official format and transformers can hold it"
            )
    return official.norm_refusal(encoder) or official.head_refusal(name, encoder, objective)


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table for this encoder and objective."""
    name = type(encoder).__name__
    if name == "ViT":
        scales = ("gamma_1", "gamma_2") if is_beit(encoder) else ("ls1.gamma", "ls2.gamma")
        table = tables.vit(encoder, prefix, image_size, scales)
    elif name in ("Swin", "SwinV2"):
        table = tables.swin(encoder, prefix, image_size, merge_at=1)
    elif name == "ConvNeXt":
        table = tables.convnext(encoder, prefix, image_size, CONVNEXT)
    else:
        table = resnet(encoder, prefix)
    table = tables.under_encoder(table)
    if objective["name"] != "classify":
        return table
    head, head_norm = {"ViT": ("head", "fc_norm"), "ResNet": ("fc", ""), "ConvNeXt": ("head.fc", "head.norm")}.get(
        name, ("head.fc", "")
    )
    if objective["fc_norm"]:
        table += norm("head/norm", f"{prefix}{head_norm}")
    return table + dense("head/logits", f"{prefix}{head}")


def resnet(encoder, prefix: str) -> list[Rule]:
    """ResNets with bottleneck blocks, as in torchvision and timm."""
    table = convolution("stem_conv", f"{prefix}conv1", bias=False) + batch_norm("stem_norm", f"{prefix}bn1")
    for stage, depth in enumerate(encoder.depths):
        for n in range(depth):
            ours, theirs = f"stage_{stage}_block_{n}", f"{prefix}layer{stage + 1}.{n}"
            for number in (1, 2, 3):
                table += convolution(f"{ours}/conv{number}", f"{theirs}.conv{number}", bias=False)
                table += batch_norm(f"{ours}/norm{number}", f"{theirs}.bn{number}")
            if n == 0:
                table += convolution(f"{ours}/shortcut_conv", f"{theirs}.downsample.0", bias=False)
                table += batch_norm(f"{ours}/shortcut_norm", f"{theirs}.downsample.1")
    return table


CONVNEXT = {  # names in timm, by part, as `tables.CONVNEXT`
    "patch_embed": "stem.0",
    "patch_norm": "stem.1",
    "down_norm": "stages.{stage}.downsample.0",
    "down_conv": "stages.{stage}.downsample.1",
    "block": "stages.{stage}.blocks.{n}",
    "conv": "conv_dw",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
