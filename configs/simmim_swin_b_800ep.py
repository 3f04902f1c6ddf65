"""The official SimMIM pretraining of Swin-B: ImageNet-1K, 192 pixels, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swin_b_800ep.py --config.data.data_dir=DIR --workdir runs/swin_b

DIR holds TFDS's imagenet2012, prepared as array_record. For a folder with train/<class>/ and val/<class>/ add
--config.data.path=DIR. On few devices --config.microbatches=N keeps batch and recipe.

Every number is that of simmim_pretrain__swin_base__img192_window6__800ep.yaml, or where that is silent of config.py, of
microsoft/SimMIM d3e29bc: base rate 1e-4, warm-up from 5e-7 over 10 epochs, both times batch / 512; a tenth of the rate
after epoch 700; each step at the rate of the one before (main_simmim.py steps the schedule after the update); AdamW
(0.9, 0.999, 1e-8), weight decay 0.05 but not of mask token, bias tables and what has one dimension, clip 5.0; no
stochastic depth; windows of 6 tokens; blocks of 32 pixels, ratio 0.6; crop scale 0.67 to 1, ratio 3/4 to 4/3, bilinear;
flip 0.5; ImageNet mean and deviation; a checkpoint every 5 epochs. Precision there is float16 with loss scaling (apex
O1), here bfloat16.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 84.0 % top-1 after fine-tuning at
224 pixels (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from simmim_jax.config import encoder_config, pretrain_config


def get_config() -> ConfigDict:
    c = pretrain_config()
    c.epochs = 800.0
    c.batch_size = 2048
    c.base_learning_rate = 1e-4
    c.optim.schedule = "multistep"
    c.optim.milestones, c.optim.gamma = (700.0,), 0.1
    c.optim.warmup_epochs = 10.0
    c.optim.lr_step_offset = 1
    c.optim.decay_mask_token = c.optim.decay_bias_tables = False
    c.optim.min_learning_rate = 0.0  # unused by this schedule

    c.data.name = "imagenet2012"
    c.image_size = (192, 192)

    c.encoder = encoder_config("swin", "b")
    c.encoder.window = 6
    c.encoder.dtype = "bfloat16"

    c.eval_every = 6250  # ten epochs
    c.eval_images = 50_000  # all that validate, and for the probes 50 of each class
    c.save_every = 3125
    c.log_every = 100
    return c
