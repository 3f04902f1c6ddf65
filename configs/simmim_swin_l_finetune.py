"""The official SimMIM fine-tuning of Swin-L on ImageNet-1K: 100 epochs, batch 2048, windows of 14 tokens.

    python -m simmim_jax.main --config configs/simmim_swin_l_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/swin_l_tuned

RUN is the workdir of `simmim_swin_l_800ep.py` or an imported official file. The recipe is that of
`simmim_swin_b_finetune.py`, which says what DIR is; its numbers stand likewise in
simmim_finetune__swin_large__img224_window14__800ep.yaml of microsoft/SimMIM d3e29bc, which adds: windows of 14 tokens,
layer decay 0.7, stochastic depth 0.2.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 85.4 % top-1 (microsoft/SimMIM
README).
"""

from ml_collections import ConfigDict

from configs.simmim_swin_b_finetune import official_finetuning


def get_config() -> ConfigDict:
    c = official_finetuning("swin", "l", layer_decay=0.7, drop_path=0.2)
    c.encoder.window = 14
    return c
