"""Fine-tuning of a CIFAR-10 run: all layers of the encoder are trained. The second command is the baseline.

    python -m simmim_jax.main --config configs/cifar10_finetune.py --config.init_from=runs/cifar10 \
        --workdir runs/cifar10_finetuned
    python -m simmim_jax.main --config configs/cifar10_finetune.py --config.init_from="" --workdir runs/cifar10_scratch

`configs/cifar10_finetune.py:folder` with --config.data.path=DIR reads a folder instead of TFDS.

The recipe is the official one for Swin with changes for 32 pixels and five epochs of a small model: larger crops, a
shorter warm-up, layer decay 0.75, less mixing, no RandAugment and no stochastic depth.

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/cifar10.json):
top-1 57.5 % of the 10,000 test images in 1,888 s, from random weights 48.6 % in 1,143 s, on one core next to other
jobs. Random weights had the same layer decay of 0.75, which holds their lower layers back: see docs/results.md.
"""

from ml_collections import ConfigDict

from simmim_jax.config import encoder_config, finetune_config


def get_config(argument: str = "") -> ConfigDict:
    c = finetune_config()
    c.epochs = 5.0
    c.batch_size = 128
    c.base_learning_rate = 4e-3
    c.optim.schedule, c.optim.lr_step_offset = "cosine", 0
    c.optim.warmup_epochs = 0.5
    c.optim.layer_decay = 0.75

    if argument not in ("", "folder"):
        raise ValueError(f"unknown argument {argument!r}: give none, or folder")
    c.data.source, c.data.name = ("folder", "") if argument else ("tfds", "cifar10")
    c.data.heldout_split = "test"
    c.image_size = (32, 32)
    c.mean, c.std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    c.data.crop_scale, c.data.crop_fraction = (0.35, 1.0), 1.0
    c.data.interpolation = "bilinear"  # as in pretraining
    c.data.augment = ""
    c.objective.mixup_prob = 0.5
    c.objective.reprob = 0.0

    c.encoder = encoder_config("vit", "b")  # the encoder of cifar10_vit_tiny.py
    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 128, 4, (4,)
    c.encoder.patch_size = 4
    c.encoder.class_token = False
    c.encoder.absolute_position = "sincos"
    c.objective.num_classes = 10
    c.objective.fc_norm, c.objective.head_init_scale = True, 0.001

    c.eval_every = 390
    c.log_every, c.save_every = 50, 390
    return c
