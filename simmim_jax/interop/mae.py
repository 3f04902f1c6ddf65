"""MAE files (facebookresearch/mae): timm's ViT with fixed sine-cosine positions, and a transformer decoder.

Only the encoder is imported. The decoder and its mask token must be left out by name; the error message shows how.
Bare encoders and fine-tuned models have no decoder, and are recognized as timm's ViT.
"""

from simmim_jax.interop import official, timm
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.weight_spec import WeightSpec

NAME = "mae"
rules = timm.rules


def recognize(weights: Weights) -> str | None:
    """ "vit" if the file has a MAE decoder."""
    return "vit" if any(name.startswith(("decoder_embed.", "decoder_blocks.")) for name in weights.arrays) else None


def detect(name: str, weights: Weights) -> WeightSpec:
    """The encoder."""
    return official.detect_vit(weights, NAME)._replace(objective={"name": "none"})
