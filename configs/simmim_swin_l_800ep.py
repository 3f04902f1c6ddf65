"""The official SimMIM pretraining of Swin-L: ImageNet-1K, 192 pixels, windows of 12, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swin_l_800ep.py --config.data.data_dir=DIR --workdir runs/swin_l

The recipe is that of `simmim_swin_b_800ep.py`, which says what DIR is and where its numbers are from; size and window
are those of simmim_pretrain__swin_large__img192_window12__800ep.yaml. The last stage's map is 6 x 6 tokens, so its
windows are, too.

Hardware: eight or more GPUs, or a TPU slice; --config.encoder.remat=full saves memory. Time and result: not yet run.
Theirs: 85.4 % top-1 after fine-tuning at 224 pixels with windows of 14 (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from configs.simmim_swin_b_800ep import get_config as swin_b_800ep


def get_config() -> ConfigDict:
    c = swin_b_800ep()
    c.encoder.size = "l"
    c.encoder.window = 12
    return c
