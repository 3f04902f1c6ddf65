"""The official SimMIM pretraining of Swin-B, short: ImageNet-1K, 192 pixels, 100 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swin_b_100ep.py --config.data.data_dir=DIR --workdir runs/swin_b

The paper's ablations (section 4.1) are this run with one thing changed. `simmim_swin_b_800ep.py` says what DIR is, and
where the numbers are from that both share. This one's own are those of
simmim_pretrain__swin_base__img192_window6__100ep.yaml: base rate 2e-4, warm-up from 1e-6 over 10 epochs, cosine to
1e-5, all times batch / 512. Their cosine runs over the whole length, warm-up included ("cosine_global"), so that the
rate drops to 0.976 of its peak when the warm-up ends; --config.optim.schedule=cosine has no such step.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 82.8 % top-1 after fine-tuning at
192 pixels, 83.5 % at 224 (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict, FieldReference

from configs.simmim_swin_b_800ep import get_config as swin_b_800ep


def get_config() -> ConfigDict:
    c = swin_b_800ep()
    c.epochs = 100.0
    c.base_learning_rate = 2e-4
    c.optim.schedule = "cosine_global"
    c.optim.milestones = ()
    c.optim.warmup_learning_rate = FieldReference(1e-6) * c.get_ref("batch_size") / 512
    c.optim.min_learning_rate = FieldReference(1e-5) * c.get_ref("batch_size") / 512
    return c
