"""The official SimMIM fine-tuning of ViT-B/16 on ImageNet-1K: 100 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_vit_b_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/vit_b_tuned

RUN is the workdir of `simmim_vit_b_800ep.py` or an imported official file. The recipe is that of
`simmim_swin_b_finetune.py`, which says what DIR is; its numbers stand likewise in
simmim_finetune__vit_base__img224__800ep.yaml of microsoft/SimMIM d3e29bc, which adds: layer decay 0.65; a bias table of
its own for each block, begun as a copy of the shared one; no norm at the end, but one after the mean over the patches
(`fc_norm`); the head's initial weights times 0.001. Of a ViT the bias tables decay too (microsoft/SimMIM#26).

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 83.8 % top-1 (microsoft/SimMIM
README).
"""

from ml_collections import ConfigDict

from configs.simmim_swin_b_finetune import official_finetuning


def get_config() -> ConfigDict:
    c = official_finetuning("vit", "b", layer_decay=0.65)
    c.encoder.relative_position, c.encoder.final_norm = "per_block", False
    c.objective.fc_norm, c.objective.head_init_scale = True, 0.001
    c.optim.decay_bias_tables = True
    return c
