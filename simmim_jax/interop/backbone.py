"""Backbones for the detectors and segmenters of transformers: an encoder and a feature map per stage. Export only.

The map of a stage is our encoder's at the end of the stage, before merging. For a ViT it is that of a block, without
the class token. transformers adds a LayerNorm to each map of Swin and ConvNeXt, which our encoders do not have. It is
written with scale 1 and bias 0, except that Swin's last one is our final norm, so that the last map is our output. The
norms of all stages are written, for any `out_features`.

A ViT without relative positions is a Dinov2 there, which is the plain ViT with LayerScale. One with them is a BEiT.
"""

import math
import re

import numpy as np

from simmim_jax.interop import folder, huggingface, tables, timm
from simmim_jax.interop.rules import POSITIONS, SAME, TOKEN, Layout, Rule, convolution, dense, norm, one

CLASSES = {
    "beit": "BeitBackbone",
    "convnext": "ConvNextBackbone",
    "dinov2": "Dinov2Backbone",
    "resnet": "ResNetBackbone",
    "swin": "SwinBackbone",
    "swinv2": "Swinv2Backbone",
}
BARE = {"name": "none"}
NOWHERE = Layout(lambda x: [], lambda y, shape: np.zeros(shape))
TWICE = Layout(lambda x: [x, x], lambda y, shape: y[0])
ALTERNATIVE = "stablehlo can hold it, and the embed tool writes its maps"

CONVNEXT = {  # names in transformers, by part, as `tables.CONVNEXT`
    "patch_embed": "embeddings.patch_embeddings",
    "patch_norm": "embeddings.layernorm",
    "down_norm": "encoder.stages.{stage}.downsampling_layer.0",
    "down_conv": "encoder.stages.{stage}.downsampling_layer.1",
    "block": "encoder.stages.{stage}.layers.{n}",
    "conv": "dwconv",
    "fc1": "pwconv1",
    "fc2": "pwconv2",
}
RESNET = (  # patterns of timm's names, and their replacements
    (r"^conv1\.", "embedder.embedder.convolution."),
    (r"^bn1\.", "embedder.embedder.normalization."),
    (r"^layer(\d)\.", lambda found: f"encoder.stages.{int(found[1]) - 1}.layers."),
    (r"\.conv(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.convolution."),
    (r"\.bn(\d)\.", lambda found: f".layer.{int(found[1]) - 1}.normalization."),
    (r"\.downsample\.0\.", ".shortcut.convolution."),
    (r"\.downsample\.1\.", ".shortcut.normalization."),
)


def backbone_type(encoder) -> str:
    """The model type of this encoder's backbone in transformers."""
    name = type(encoder).__name__.lower()
    return name if name != "vit" else "dinov2" if encoder.relative_position == "none" else "beit"


def refusal(encoder, objective: dict, image_size: tuple[int, int]) -> str:
    """Why transformers has no backbone for this encoder, or ""."""
    kind = backbone_type(encoder)
    if kind in ("swin", "swinv2"):
        return huggingface.refusal(encoder, BARE, image_size)
    if kind in ("resnet", "convnext"):
        epsilon = {"resnet": 1e-5, "convnext": 1e-6}[kind]
        if not math.isclose(encoder.norm_epsilon, epsilon, rel_tol=1e-6):
            return f"norm_epsilon is {encoder.norm_epsilon:g}, but always {epsilon:g} in a {kind} there; {ALTERNATIVE}"
        return ""
    if encoder.num_registers or not encoder.class_position:
        return f"a {kind} of transformers has no registers, and a position of the class token; {ALTERNATIVE}"
    if not encoder.class_token:
        return f"a {kind} of transformers always has a class token; {ALTERNATIVE}"
    if image_size[0] != image_size[1]:
        return f"a {kind} of transformers takes square images only; {ALTERNATIVE}"
    if kind == "beit" and encoder.qkv_bias != "qv":
        return f"with relative positions it is a BEiT, which has biases only on queries and values; {ALTERNATIVE}"
    if kind == "dinov2" and not float(encoder.mlp_ratio).is_integer():
        return f"mlp_ratio is {encoder.mlp_ratio:g}, but a whole number in a Dinov2; {ALTERNATIVE}"
    return ""


def exported_objective(encoder, objective: dict) -> dict:
    """None: a backbone has no heads."""
    return BARE


def export_prefix(objective: str) -> str:
    """No prefix."""
    return ""


def export_notes(encoder) -> tuple[str, ...]:
    """What the maps are, and which warnings of transformers are harmless."""
    kind = backbone_type(encoder)
    normed = "each with a LayerNorm of scale 1"
    maps = {
        "swin": f"the outputs of our stages, {normed}; the last has our final norm and is the encoder's output",
        "convnext": f"the outputs of our stages, {normed}",
        "swinv2": "the outputs of our stages; the final norm is left out",
        "resnet": "the outputs of our stages",
        "beit": "the outputs of our blocks, before the final norm",
        "dinov2": "the outputs of our blocks; with apply_layernorm=True, after the final norm",
    }[kind]
    notes = [f"its maps are {maps}"]
    if kind in ("swin", "convnext"):
        notes.append("with fewer stages, transformers warns of unused hidden_states_norms, which is harmless")
    notes.append(
        f"load the folder with {CLASSES[kind]}.from_pretrained; AutoBackbone.from_pretrained of transformers 5.23 "
        "loads only models of the hub"
    )
    return tuple(notes)


def out_features(encoder) -> list[str]:
    """The default maps: all four stages, or for a ViT four evenly spaced blocks."""
    parts = 4 if backbone_type(encoder) not in ("beit", "dinov2") else encoder.depth
    return [f"stage{n}" for n in sorted({-(-parts * quarter // 4) for quarter in (1, 2, 3, 4)})]


def stage_ends(encoder) -> tuple[int, ...]:
    """The number of blocks up to the end of each stage. Each block of a ViT is a stage."""
    if backbone_type(encoder) in ("beit", "dinov2"):
        return tuple(range(1, encoder.depth + 1))
    return tuple(sum(encoder.depths[: stage + 1]) for stage in range(len(encoder.depths)))


def rules(encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table for this encoder. Raises LookupError for one that has no backbone; see `refusal`."""
    return tables.under_encoder(TABLES[backbone_type(encoder)](encoder, image_size))


def make_config(encoder, image_size: tuple[int, int], channels: int) -> dict:
    """config.json."""
    kind = backbone_type(encoder)
    config = {
        "model_type": kind,
        "architectures": [CLASSES[kind]],
        "dtype": "float32",
        "image_size": image_size[0] if image_size[0] == image_size[1] else list(image_size),
        "num_channels": channels,
        "out_features": out_features(encoder),
    }
    if kind == "resnet":
        return config | {
            "embedding_size": encoder.width,
            "hidden_sizes": [4 * encoder.width * 2**stage for stage in range(4)],
            "depths": list(encoder.depths),
            "layer_type": "bottleneck",
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
        }
    if kind == "convnext":
        return config | {
            "hidden_sizes": list(encoder.widths),
            "depths": list(encoder.depths),
            "num_stages": len(encoder.depths),
            "patch_size": encoder.token_stride,
            "hidden_act": "gelu",
            "layer_norm_eps": encoder.norm_epsilon,
            "layer_scale_init_value": encoder.layer_scale,
            "drop_path_rate": encoder.drop_path,
        }
    if kind == "dinov2":
        return config | {
            "hidden_size": encoder.width,
            "num_hidden_layers": encoder.depth,
            "num_attention_heads": encoder.num_heads,
            "mlp_ratio": int(encoder.mlp_ratio),
            "patch_size": encoder.patch_size,
            "hidden_act": "gelu",
            "layer_norm_eps": encoder.norm_epsilon,
            "qkv_bias": encoder.qkv_bias != "none",
            "layerscale_value": encoder.layer_scale or 1.0,
            "drop_path_rate": encoder.drop_path,
            "use_swiglu_ffn": False,
            "use_mask_token": False,
            "apply_layernorm": False,
        }
    return folder.make_config(encoder, BARE, image_size, channels) | config


def fixed(value: float, theirs: str, shape: tuple[int, ...]) -> list[Rule]:
    """An array of equal values that is no parameter here."""
    return [Rule("", (theirs,), SAME, np.full(shape, value, np.float32))]


def unscaled_norm(theirs: str, width: int) -> list[Rule]:
    """A LayerNorm with scale 1 and bias 0."""
    return fixed(1.0, f"{theirs}.weight", (width,)) + fixed(0.0, f"{theirs}.bias", (width,))


def swin(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """Swin, whose final norm is also the norm of the last map."""
    table = []
    last = f"hidden_states_norms.stage{len(encoder.depths)}"
    for rule in huggingface.swin(encoder, "swin.", image_size):
        if rule.ours.startswith("norm/"):
            theirs = rule.theirs[0]
            rule = rule._replace(theirs=(theirs, f"{last}.{theirs.rpartition('.')[2]}"), layout=TWICE)
        table.append(rule)
    for stage in range(len(encoder.depths) - 1):
        table += unscaled_norm(f"hidden_states_norms.stage{stage + 1}", encoder.width * 2**stage)
    return table


def swinv2(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """Swin V2, without its final norm."""
    return [
        rule._replace(theirs=(), layout=NOWHERE) if rule.ours.startswith("norm/") else rule
        for rule in huggingface.swin(encoder, "", image_size)
    ]


def convnext(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """ConvNeXt with a norm for each map."""

    def named(name: str) -> str:
        return re.sub(r"\.norm\.", ".layernorm.", re.sub(r"\.gamma$", ".layer_scale_parameter", name))

    table = [
        rule._replace(theirs=tuple(map(named, rule.theirs)))
        for rule in tables.convnext(encoder, "", image_size, CONVNEXT)
    ]
    for stage, width in enumerate(encoder.widths):
        table += unscaled_norm(f"hidden_states_norms.stage{stage + 1}", width)
    return table


def resnet(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """A ResNet with bottleneck blocks, and num_batches_tracked, which changes nothing."""

    def named(name: str) -> str:
        for pattern, replacement in RESNET:
            name = re.sub(pattern, replacement, name)
        return name

    table = [rule._replace(theirs=tuple(map(named, rule.theirs))) for rule in timm.resnet(encoder, "")]
    names = [name for rule in table for name in rule.theirs if name.endswith("running_mean")]
    seen = [name.replace("running_mean", "num_batches_tracked") for name in names]
    return table + [Rule("", (name,), SAME, np.zeros((), np.int64)) for name in seen]


def beit(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """A ViT with relative positions."""
    return huggingface.vit(encoder, "beit.", image_size)


def dinov2(encoder, image_size: tuple[int, int]) -> list[Rule]:
    """A ViT without relative positions. Parts that only Dinov2 has are written with values that change nothing."""
    width = encoder.width
    table = convolution("patch_embed", huggingface.PATCHES) + one("cls_token", "embeddings.cls_token", TOKEN)
    name = "embeddings.position_embeddings"
    table += tables.positions(encoder, "", image_size, name)
    if encoder.absolute_position == "none":
        patches = math.prod(size // encoder.patch_size for size in image_size)
        table += [Rule("", (name,), POSITIONS, np.zeros((patches + 1, width), np.float32))]
    for n in range(encoder.depth):
        ours, theirs = f"block_{n}", f"encoder.layer.{n}"
        inner = f"{theirs}.attention.attention"
        table += huggingface.attention(ours, inner, f"{theirs}.attention.output.dense", encoder.qkv_bias)
        if encoder.qkv_bias == "qv":
            table += fixed(0.0, f"{inner}.key.bias", (width,))
        for number, scale in ((1, "attn"), (2, "mlp")):
            table += norm(f"{ours}/norm{number}", f"{theirs}.norm{number}")
            table += dense(f"{ours}/mlp/fc{number}", f"{theirs}.mlp.fc{number}")
            place = f"{theirs}.layer_scale{number}.lambda1"
            table += one(f"{ours}/scale_{scale}/gamma", place) if encoder.layer_scale else fixed(1.0, place, (width,))
    return table + (norm("norm", "layernorm") if encoder.final_norm else unscaled_norm("layernorm", width))


TABLES = {"beit": beit, "convnext": convnext, "dinov2": dinov2, "resnet": resnet, "swin": swin, "swinv2": swinv2}
