"""Fine-tuning of a digits run: every layer of the encoder is trained on.

    python -m simmim_jax.main --config configs/digits_finetune.py --config.init_from=runs/digits \
        --workdir runs/digits_finetuned

The architecture is that of the run that `init_from` names.
Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
78 s; top-1 96.4 % of the 360 held-out digits; from random weights, with the same budget, 91.9 %.
"""

from ml_collections import ConfigDict

from configs.digits_vit_tiny import get_config as pretraining
from simmim_jax.config import finetune_config


def get_config() -> ConfigDict:
    c, run = finetune_config(), pretraining()
    c.image_size, c.mean, c.std = run.image_size, run.mean, run.std
    c.data.source, c.data.heldout_split, c.data.flip = "digits", "test", 0.0
    c.data.crop_scale = (0.67, 1.0)
    c.data.interpolation = "bilinear"
    c.data.crop_fraction = 1.0
    c.data.augment = ""  # an inverted or a mixed digit helps no one in 30 epochs
    c.objective.mixup = c.objective.cutmix = c.objective.reprob = 0.0
    c.objective.num_classes = 10
    c.objective.fc_norm, c.objective.head_init_scale = True, 0.001  # a ViT's head, here after the encoder's own norm
    c.optim.lr_step_offset = 0

    c.epochs = 30.0
    c.batch_size = 64
    c.base_learning_rate = 8e-3
    c.optim.warmup_epochs = 3.0
    c.optim.layer_decay = 0.75
    c.log_every = 60
    c.save_every = 330
    return c
