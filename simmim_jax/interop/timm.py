"""timm's state dicts: `vit_*` (also BEiT), `swin_*`, `swinv2_*`, `resnet*` and `convnext*` of timm 1.0.

timm's models have no pixel head: of a pretrained SimMIM the encoder goes out alone. Swin merges at the start of a stage
there, at the end of the one before in the official code. timm pads a map after it has rolled it, ours before, as the
official detection code and transformers do: where windows do not tile a map, features differ.
"""

import re

from simmim_jax.errors import CheckpointError
from simmim_jax.interop import official
from simmim_jax.interop.official import under_encoder
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.rules import Rule, batch_norm, convolution, dense, norm
from simmim_jax.interop.weight_spec import WeightSpec, find_prefix, without_prefix
from simmim_jax.models.windows import stage_grids, stage_windows

NAME = "timm"
LAYER_SCALE = 1e-5  # the initial value of timm's ViTs that have it; trained weights do not tell it
PADDED = (
    "windows do not tile the maps of these images: timm pads a map after it is rolled, this code before, so that "
    "features differ; give an --image_size whose maps the windows tile, or train further"
)
ANTI_ALIASED = (
    "the names do not tell whether it is an anti-aliased ResNet (resnetaa*, resnetblur*) of timm: those give other "
    "features here, and are not supported"
)
OTHER_KINDS = {  # what timm's `architecture` may say of models that have the names of those here
    r"resnet(aa|blur)|seresnetaa": "pools for anti-aliasing where a plain ResNet has strides",
    "quickgelu": "has another GELU",
}


def recognize(weights: Weights) -> str | None:
    """The encoder that these names are of; None if they are not timm's."""
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
    """The model that these weights are, as far as they tell."""
    check_variant(weights)
    if name == "vit":
        found = official.detect_vit(weights, NAME, layer_scale=LAYER_SCALE)
    elif name in ("swin", "swinv2"):
        found = _detect_swin(name, weights)
    else:
        found = _detect_resnet(weights) if name == "resnet" else _detect_convnext(weights)
    if name == "resnet" and not weights.config and not weights.made:
        found = found._replace(notes=(*found.notes, ANTI_ALIASED))
    size = weights.config.get("pretrained_cfg", {}).get("input_size")  # of timm's folders on the Hugging Face hub
    return found._replace(image_size=tuple(size[1:])) if size else found


def check_variant(weights: Weights) -> None:
    """Raise CheckpointError if a timm folder says that its model is another one with the same names."""
    architecture, arguments = weights.config.get("architecture", ""), weights.config.get("model_args") or {}
    for pattern, why in OTHER_KINDS.items():
        if re.search(pattern, str(architecture)):
            raise CheckpointError(f"architecture {architecture!r}", weights.where, f"it {why}, which is not supported")
    for name in ("aa_layer", "act_layer", "norm_layer", "output_stride", "block_args"):
        if arguments.get(name) is not None:
            raise CheckpointError(
                f"model_args has {name} {str(arguments[name])[:100]!r}", weights.where,
                "models with it are not supported",
            )  # fmt: skip


def pads(image_size: tuple[int, int], patch_size: int, window: int, stages: int) -> bool:
    """Whether windows do not tile the map of every stage."""
    grids, windows = stage_grids(image_size, patch_size, stages), stage_windows(image_size, patch_size, stages, window)
    return any(size % side for grid, side in zip(grids, windows, strict=True) for size in grid)


def _detect_swin(name: str, weights: Weights) -> WeightSpec:
    found = official.detect_swin(weights, NAME, name)
    found = found._replace(objective=_classifier(weights, "head.fc", fc_norm=False))
    if name == "swinv2":
        note = "took the windows for those of pretraining, which timm's weights do not tell: after fine-tuning with "
        note += "others give --encoder.pretrained_windows, like 12,12,12,6"
        found = found._replace(notes=(*found.notes, note))
    return found


def _classifier(weights: Weights, name: str, *, fc_norm: bool) -> dict:
    if f"{name}.weight" not in weights.arrays:
        return {"name": "none"}
    return {"name": "classify", "num_classes": weights.arrays[f"{name}.weight"].shape[0], "fc_norm": fc_norm}


def _detect_resnet(weights: Weights) -> WeightSpec:
    prefix = find_prefix(weights.arrays, "layer1.0.conv1.weight")
    shapes = without_prefix({n: x.shape for n, x in weights.arrays.items()}, prefix, weights.where)
    if "layer1.0.conv3.weight" not in shapes or "conv1.weight" not in shapes:
        raise CheckpointError(
            "a ResNet of basic blocks, or with a deep stem", weights.where, "give one of bottleneck blocks, like 50"
        )
    stem = shapes["conv1.weight"]
    encoder = {
        "name": "resnet",
        "depths": tuple(shapes.count(f"layer{stage + 1}.") for stage in range(4)),
        "width": stem[0],
        "norm_epsilon": 1e-5,
    }
    return WeightSpec(NAME, encoder, _classifier(weights, "fc", fc_norm=False), None, stem[1], prefix)


def _detect_convnext(weights: Weights) -> WeightSpec:
    prefix = find_prefix(weights.arrays, "stages.0.blocks.0.conv_dw.weight")
    shapes = without_prefix({n: x.shape for n, x in weights.arrays.items()}, prefix, weights.where)
    stages = shapes.count("stages.")
    encoder = {
        "name": "convnext",
        "depths": tuple(shapes.count(f"stages.{stage}.blocks.") for stage in range(stages)),
        "widths": tuple(shapes[f"stages.{stage}.blocks.0.conv_dw.weight"][0] for stage in range(stages)),
        "layer_scale": 1e-6 if shapes.any("gamma") else 0.0,
        "norm_epsilon": 1e-6,
    }
    objective = _classifier(weights, "head.fc", fc_norm=True)
    return WeightSpec(NAME, encoder, objective, None, shapes["stem.0.weight"][1], prefix)


def exported_objective(encoder, objective: dict) -> dict:
    """timm has no pixel head."""
    return {"name": "none"} if objective["name"] == "simmim" else objective


def export_prefix(objective: str) -> str:
    """timm's names have no prefix."""
    return ""


def export_notes(encoder) -> tuple[str, ...]:
    """What whoever reads the file must say, as the file does not."""
    if not encoder.pretrained_windows:
        return ()
    windows = tuple(encoder.pretrained_windows)
    return (f"the file does not tell the windows of pretraining: give pretrained_window_sizes={windows} to timm",)


def is_beit(encoder) -> bool:
    """Whether timm's class for this ViT is BEiT, whose names are the official ones."""
    return encoder.relative_position != "none" or encoder.qkv_bias == "qv"


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why this format cannot hold the model; empty if it can."""
    name = type(encoder).__name__
    if name == "ViT" and is_beit(encoder):
        if not encoder.class_token:
            return "timm's BEiT always has a class token"
        if encoder.qkv_bias == "qkv":
            return "timm's BEiT, which has the relative positions, has no bias on keys"
    if name in ("Swin", "SwinV2"):
        if encoder.absolute_position != "none":
            return "timm's Swin has no absolute positions; the official format has"
        if not (encoder.patch_norm and encoder.final_norm):
            return "timm's Swin always has a norm after the patches and a final one"
        grids = stage_grids(image_size, encoder.patch_size, len(encoder.depths))
        if image_size[0] != image_size[1] and any(min(grid) <= encoder.window for grid in grids):
            return (
                "timm's Swin shrinks the two sides of a window apart; the official format says nothing of image sizes"
            )
        if pads(image_size, encoder.patch_size, encoder.window, len(encoder.depths)):
            return (
                f"windows of {encoder.window} do not tile the maps of these images, and timm pads maps elsewhere; "
                "the official and transformers' names hold it"
            )
    return official.norm_refusal(encoder) or official.head_refusal(name, encoder, objective)


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table of this encoder and objective."""
    name = type(encoder).__name__
    if name == "ViT":
        scales = ("gamma_1", "gamma_2") if is_beit(encoder) else ("ls1.gamma", "ls2.gamma")
        table = official.vit(encoder, prefix, image_size, scales)
    elif name in ("Swin", "SwinV2"):
        table = official.swin(encoder, prefix, image_size, merge_at=1)
    elif name == "ConvNeXt":
        table = official.convnext(encoder, prefix, image_size, CONVNEXT)
    else:
        table = resnet(encoder, prefix)
    table = under_encoder(table)
    if objective["name"] != "classify":
        return table
    head, head_norm = {"ViT": ("head", "fc_norm"), "ResNet": ("fc", ""), "ConvNeXt": ("head.fc", "head.norm")}.get(
        name, ("head.fc", "")
    )
    if objective["fc_norm"]:
        table += norm("head/norm", f"{prefix}{head_norm}")
    return table + dense("head/logits", f"{prefix}{head}")


def resnet(encoder, prefix: str) -> list[Rule]:
    """Bottleneck ResNets, torchvision's and timm's. A block has a shortcut convolution where it changes the shape."""
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


CONVNEXT = {  # as `official.CONVNEXT`
    "patch_embed": "stem.0",
    "patch_norm": "stem.1",
    "down_norm": "stages.{stage}.downsample.0",
    "down_conv": "stages.{stage}.downsample.1",
    "block": "stages.{stage}.blocks.{n}",
    "conv": "conv_dw",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
}
