"""Linear evaluation of a digits run: a linear classifier on the mean patch feature of block 3 of 4.

The encoder is frozen. The second command is the baseline, the same encoder with random weights.

    python -m simmim_jax.main --config configs/digits_linear.py --config.init_from=runs/digits \
        --workdir runs/digits_linear
    python -m simmim_jax.main --config configs/digits_linear.py --config.init_from="" --workdir runs/digits_untrained

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
38 s; top-1 78.6 %, top-5 99.7 % of the 360 held-out digits; with random weights 12.5 % and 58.6 %.
"""

from ml_collections import ConfigDict

from simmim_jax.config import linear_config


def get_config() -> ConfigDict:
    c = linear_config()
    c.epochs = 60.0
    c.batch_size = 128
    c.base_learning_rate = 1.0

    c.data.source, c.data.heldout_split = "digits", "test"
    c.data.flip = 0.0
    c.data.crop_scale, c.data.crop_fraction = (0.67, 1.0), 1.0
    c.data.interpolation = "bilinear"  # as in pretraining
    c.image_size = (32, 32)
    c.mean, c.std = (0.305,), (0.376,)

    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 96, 4, (3,)  # the encoder of digits_vit_tiny.py
    c.encoder.patch_size = 4
    c.encoder.class_token = False
    c.encoder.absolute_position = "sincos"
    c.objective.num_classes, c.objective.block = 10, 3

    c.log_every = 60
    c.save_every = 330
    return c
