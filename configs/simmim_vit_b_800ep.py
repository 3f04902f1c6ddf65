"""The official SimMIM pretraining of ViT-B/16: ImageNet-1K, 224 pixels, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_vit_b_800ep.py --config.data.data_dir=DIR --workdir runs/vit_b

DIR holds TFDS's imagenet2012, prepared as array_record. For a folder with train/<class>/ and val/<class>/ add
--config.data.source=folder --config.data.path=DIR. On few devices --config.microbatches=N keeps batch and recipe.

Every number is that of simmim_pretrain__vit_base__img224__800ep.yaml and config.py of microsoft/SimMIM d3e29bc: base
rate 1e-4, warm-up rate 5e-7 over 10 epochs, both times batch / 512; a tenth of the rate after epoch 700; AdamW (0.9,
0.999, 1e-8), weight decay 0.05 (mask token and bias table decay too), clip 5.0; stochastic depth 0.1; LayerScale 0.1;
one relative-position table for all blocks, no absolute positions, a class token; blocks of 32 pixels, ratio 0.6; crop
scale 0.67 to 1, bilinear; flip 0.5. Precision there is float16 with loss scaling (apex O1), here bfloat16.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 83.8 % top-1 after fine-tuning;
56.7 % linear, on features of block 8, mean over patches (microsoft/SimMIM README; issues 14 and 36).
"""

from ml_collections import ConfigDict

from simmim_jax.config import pretrain_config


def get_config() -> ConfigDict:
    c = pretrain_config()
    c.epochs = 800.0
    c.batch_size = 2048
    c.base_learning_rate = 1e-4
    c.optim.schedule = "multistep"
    c.optim.milestones, c.optim.gamma = (700.0,), 0.1
    c.optim.warmup_epochs = 10.0
    c.optim.late = 1  # official code sets the rate after the update
    c.optim.min_learning_rate = 0.0  # unused by this schedule

    c.data.source, c.data.name = "tfds", "imagenet2012"
    c.data.workers = 16

    c.encoder.size = "b"
    c.encoder.drop_path = 0.1
    c.encoder.dtype = "bfloat16"

    c.eval_every = 6250  # ten epochs
    c.save_every = 3125  # five epochs, as there
    c.log_every = 100
    return c
