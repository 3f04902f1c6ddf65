"""Tables of ViT, Swin and ConvNeXt that the official code, timm and transformers' backbones share."""

from simmim_jax.interop.rules import PER_HEAD, POSITIONS, TO_WIDTH, TOKEN, VECTOR, Rule, convolution, dense, norm, one
from simmim_jax.models.vit import sincos_position

CONVNEXT = {  # names in facebookresearch/ConvNeXt, by part
    "patch_embed": "downsample_layers.0.0",
    "patch_norm": "downsample_layers.0.1",
    "down_norm": "downsample_layers.{stage}.0",
    "down_conv": "downsample_layers.{stage}.1",
    "block": "stages.{stage}.{n}",
    "conv": "dwconv",
    "fc1": "pwconv1",
    "fc2": "pwconv2",
}


def under_encoder(table: list[Rule]) -> list[Rule]:
    """The rules of an encoder for the parameters of a whole model."""
    return [rule._replace(ours=f"encoder/{rule.ours}") for rule in table]


def positions(encoder, prefix: str, image_size: tuple[int, int], name: str) -> list[Rule]:
    """The absolute positions of a ViT. The format stores them even if they are fixed here."""
    if encoder.absolute_position == "learned":
        return one("pos_embed", f"{prefix}{name}", POSITIONS)
    if encoder.absolute_position == "sincos":
        grid = tuple(size // encoder.patch_size for size in image_size)
        fixed = sincos_position(grid, encoder.width, encoder.class_token and encoder.class_position)
        return [Rule("", (f"{prefix}{name}",), POSITIONS, fixed)]
    return []


def block(ours: str, theirs: str, qkv_bias: str) -> list[Rule]:
    """A block of a ViT or Swin, without its relative positions."""
    table = norm(f"{ours}/norm1", f"{theirs}.norm1") + norm(f"{ours}/norm2", f"{theirs}.norm2")
    table += dense(f"{ours}/attn/qkv", f"{theirs}.attn.qkv", bias=qkv_bias == "qkv")
    if qkv_bias == "qv":
        table += one(f"{ours}/attn/q_bias", f"{theirs}.attn.q_bias", VECTOR)
        table += one(f"{ours}/attn/v_bias", f"{theirs}.attn.v_bias", VECTOR)
    table += dense(f"{ours}/attn/proj", f"{theirs}.attn.proj", TO_WIDTH)
    return table + dense(f"{ours}/mlp/fc1", f"{theirs}.mlp.fc1") + dense(f"{ours}/mlp/fc2", f"{theirs}.mlp.fc2")


def vit(encoder, prefix: str, image_size: tuple[int, int], scales: tuple = ("gamma_1", "gamma_2")) -> list[Rule]:
    """ViT and BEiT. scales: the names of LayerScale."""
    table = convolution("patch_embed", f"{prefix}patch_embed.proj")
    if encoder.class_token:
        table += one("cls_token", f"{prefix}cls_token", TOKEN)
    if encoder.num_registers:
        table += one("registers", f"{prefix}reg_token", POSITIONS)
    table += positions(encoder, prefix, image_size, "pos_embed")
    if encoder.relative_position == "shared":
        table += one("rel_pos_bias/table", f"{prefix}rel_pos_bias.relative_position_bias_table")
    for n in range(encoder.depth):
        ours, theirs = f"block_{n}", f"{prefix}blocks.{n}"
        table += block(ours, theirs, encoder.qkv_bias)
        if encoder.relative_position == "per_block":
            table += one(f"{ours}/rel_pos_bias/table", f"{theirs}.attn.relative_position_bias_table")
        if encoder.layer_scale:
            table += one(f"{ours}/scale_attn/gamma", f"{theirs}.{scales[0]}")
            table += one(f"{ours}/scale_mlp/gamma", f"{theirs}.{scales[1]}")
    return table + (norm("norm", f"{prefix}norm") if encoder.final_norm else [])


def swin(encoder, prefix: str, image_size: tuple[int, int], merge_at: int = 0) -> list[Rule]:
    """Swin and Swin V2. merge_at: 0 if merging ends a stage, 1 if it begins the next one (timm)."""
    second = type(encoder).__name__ == "SwinV2"
    table = convolution("patch_embed", f"{prefix}patch_embed.proj")
    if encoder.patch_norm:
        table += norm("patch_norm", f"{prefix}patch_embed.norm")
    if encoder.absolute_position == "learned":
        table += one("pos_embed", f"{prefix}absolute_pos_embed", POSITIONS)
    for stage, depth in enumerate(encoder.depths):
        for n in range(depth):
            ours, theirs = f"stage_{stage}_block_{n}", f"{prefix}layers.{stage}.blocks.{n}"
            table += block(ours, theirs, encoder.qkv_bias)
            if second:
                table += one(f"{ours}/attn/logit_scale", f"{theirs}.attn.logit_scale", PER_HEAD)
                table += dense(f"{ours}/attn/cpb/fc1", f"{theirs}.attn.cpb_mlp.0")
                table += dense(f"{ours}/attn/cpb/fc2", f"{theirs}.attn.cpb_mlp.2", bias=False)
            else:
                table += one(f"{ours}/attn/rel_pos_bias/table", f"{theirs}.attn.relative_position_bias_table")
        if stage < len(encoder.depths) - 1:
            theirs = f"{prefix}layers.{stage + merge_at}.downsample"
            table += norm(f"stage_{stage}_merge/norm", f"{theirs}.norm")
            table += dense(f"stage_{stage}_merge/reduction", f"{theirs}.reduction", bias=False)
    return table + (norm("norm", f"{prefix}norm") if encoder.final_norm else [])


def convnext(encoder, prefix: str, image_size: tuple[int, int], names: dict[str, str] = CONVNEXT) -> list[Rule]:
    """ConvNeXt. names: the names of its parts, as in `CONVNEXT`."""

    def named(part: str, **numbers: int) -> str:
        return prefix + names[part].format(**numbers)

    table = convolution("patch_embed", named("patch_embed")) + norm("patch_norm", named("patch_norm"))
    for stage, depth in enumerate(encoder.depths):
        if stage:
            table += norm(f"stage_{stage}_down/norm", named("down_norm", stage=stage))
            table += convolution(f"stage_{stage}_down/conv", named("down_conv", stage=stage))
        for n in range(depth):
            ours, theirs = f"stage_{stage}_block_{n}", named("block", stage=stage, n=n)
            table += convolution(f"{ours}/conv", f"{theirs}.{names['conv']}") + norm(f"{ours}/norm", f"{theirs}.norm")
            for layer in ("fc1", "fc2"):
                table += dense(f"{ours}/mlp/{layer}", f"{theirs}.{names[layer]}")
            if encoder.layer_scale:
                table += one(f"{ours}/scale/gamma", f"{theirs}.gamma")
    return table
