"""MAE's files (facebookresearch/mae): timm's ViT, and a transformer decoder that has no place here.

Its encoder goes on as a ViT with fixed sine-cosine positions; the decoder, whose mask token is its own, must be left
out by name: the error says how. Bare encoders and fine-tuned models, without a decoder, are timm's ViT in every name.
"""

from simmim_jax.interop import official, timm
from simmim_jax.interop.reading import Weights
from simmim_jax.interop.weight_spec import WeightSpec

NAME = "mae"
rules = timm.rules


def recognize(weights: Weights) -> str | None:
    """ "vit" if a MAE's decoder is there."""
    return "vit" if any(name.startswith(("decoder_embed.", "decoder_blocks.")) for name in weights.arrays) else None


def detect(name: str, weights: Weights) -> WeightSpec:
    """The encoder."""
    return official.detect_vit(weights, NAME)._replace(objective={"name": "none"})
