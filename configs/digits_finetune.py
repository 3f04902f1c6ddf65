"""Fine-tuning of a digits run: all layers of the encoder are trained.

    python -m simmim_jax.main --config configs/digits_finetune.py --config.init_from=runs/digits \
        --workdir runs/digits_finetuned

The architecture is that of the run that `init_from` names.

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
78 s; top-1 96.4 % of the 360 held-out digits; from random weights, with the same budget, 91.9 %.
Random weights had the same layer decay of 0.75, which holds their lower layers back. docs/results.md has them without.
"""

from ml_collections import ConfigDict

from simmim_jax.config import finetune_config


def get_config() -> ConfigDict:
    c = finetune_config()
    c.epochs = 30.0
    c.batch_size = 64
    c.base_learning_rate = 8e-3
    c.optim.lr_step_offset = 0
    c.optim.warmup_epochs = 3.0
    c.optim.layer_decay = 0.75

    c.data.source, c.data.heldout_split = "digits", "test"
    c.data.flip = 0.0
    c.data.crop_scale, c.data.crop_fraction = (0.67, 1.0), 1.0
    c.data.interpolation = "bilinear"
    c.data.augment = ""  # inverted digits do not help in 30 epochs, and neither does mixing
    c.objective.mixup = c.objective.cutmix = c.objective.reprob = 0.0
    c.image_size = (32, 32)
    c.mean, c.std = (0.305,), (0.376,)

    c.objective.num_classes = 10
    c.objective.fc_norm, c.objective.head_init_scale = (
        True,
        0.001,
    )  # the head of a ViT, here after the encoder's final norm

    c.log_every = 60
    c.save_every = 330
    return c
