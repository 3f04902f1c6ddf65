"""The official fine-tuning of a Swin V2-B that SimMIM pretrained: ImageNet-1K, 100 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swinv2_b_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/swinv2_b_tuned

RUN is the workdir of `simmim_swinv2_b_800ep.py` or an imported official file. The recipe is that of
`simmim_swin_b_finetune.py`, which says what DIR is; it stands in microsoft/Swin-Transformer f82860b
(simmim_finetune__swinv2_base__img224_window14__800ep.yaml, config.py), which adds: windows of 14 tokens, displacements
measured by those of pretraining; layer decay 0.75; a cosine that begins after the warm-up.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 85.0 % top-1, of the model that was
pretrained for 500,000 steps (microsoft/Swin-Transformer MODELHUB).
"""

from ml_collections import ConfigDict

from configs.simmim_swin_b_finetune import official_finetuning


def get_config() -> ConfigDict:
    c = official_finetuning("swinv2", "b", layer_decay=0.75)
    c.encoder.window = 14
    c.encoder.pretrained_windows = (12, 12, 12, 6)
    c.optim.schedule = "cosine"
    return c
