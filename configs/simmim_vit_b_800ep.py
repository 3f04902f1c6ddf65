"""The official SimMIM pretraining of ViT-B/16: ImageNet-1K, 224 pixels, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_vit_b_800ep.py --config.data.data_dir=DIR --workdir runs/vit_b

The recipe is that of `simmim_swin_b_800ep.py`, which says what DIR is; its numbers stand likewise in
simmim_pretrain__vit_base__img224__800ep.yaml and config.py of microsoft/SimMIM d3e29bc, which add: 224 pixels;
stochastic depth 0.1; LayerScale 0.1; one relative-position table for all blocks, no absolute positions, a class token;
biases on queries and values alone; initial normals cut at one deviation. Of a ViT, mask token and bias table decay too
(microsoft/SimMIM#26). The paper describes a cosine and a longer warm-up; the released file has this (#16).

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 83.8 % top-1 after fine-tuning;
56.7 % linear, on features of block 8, mean over patches (microsoft/SimMIM README; issues 14 and 36).
"""

from ml_collections import ConfigDict

from configs.simmim_swin_b_800ep import get_config as swin_b_800ep
from simmim_jax.config import encoder_config


def get_config() -> ConfigDict:
    c = swin_b_800ep()
    c.image_size = (224, 224)
    c.encoder = encoder_config("vit", "b")
    c.encoder.drop_path = 0.1
    c.encoder.dtype = "bfloat16"
    c.probe_block = 8  # of its output, a linear probe tells little (microsoft/SimMIM#14)
    c.optim.decay_mask_token = c.optim.decay_bias_tables = True
    return c
