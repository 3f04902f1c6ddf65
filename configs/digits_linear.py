"""Linear evaluation of a digits run.

The encoder, frozen, and a linear classifier on the mean patch feature of block 3 of 4. The second command is the
baseline: the same encoder with random weights.

    python -m simmim_jax.main --config configs/digits_linear.py --config.init_from=runs/digits \
        --workdir runs/digits_linear
    python -m simmim_jax.main --config configs/digits_linear.py --config.init_from="" --workdir runs/digits_untrained

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
38 s; top-1 78.6 %, top-5 99.7 % of the 360 held-out digits; with random weights 12.5 % and 58.6 %.
"""

from ml_collections import ConfigDict

from configs.digits_vit_tiny import get_config as pretraining
from simmim_jax.config import linear_config


def get_config() -> ConfigDict:
    c, run = linear_config(), pretraining()
    c.encoder = run.encoder
    c.image_size, c.mean, c.std = run.image_size, run.mean, run.std
    c.data.source, c.data.heldout_split, c.data.flip = "digits", "test", 0.0
    c.data.crop_scale = (0.67, 1.0)
    c.data.interpolation = "bilinear"  # as in pretraining
    c.data.crop_fraction = 1.0
    c.objective.num_classes, c.objective.block = 10, 3

    c.epochs = 60.0
    c.batch_size = 128
    c.base_learning_rate = 1.0
    c.log_every = 60
    c.save_every = 330
    return c
