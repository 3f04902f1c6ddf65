"""Linear evaluation of a CIFAR-10 run: a linear classifier on the mean patch feature of block 3 of 4.

The encoder is frozen. The second command is the baseline, the same encoder with random weights.

    python -m simmim_jax.main --config configs/cifar10_linear.py --config.init_from=runs/cifar10 \
        --workdir runs/cifar10_linear
    python -m simmim_jax.main --config configs/cifar10_linear.py --config.init_from="" --workdir runs/cifar10_untrained

`configs/cifar10_linear.py:folder` with --config.data.path=DIR reads a folder instead of TFDS.

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
top-1 39.2 %, top-5 87.9 % of the 10,000 test images; with random weights 25.4 % and 77.7 %. 298 s on one core.
"""

from ml_collections import ConfigDict

from simmim_jax.config import linear_config


def get_config(argument: str = "") -> ConfigDict:
    c = linear_config()
    c.epochs = 5.0
    c.batch_size = 512
    c.base_learning_rate = 2e-2

    if argument not in ("", "folder"):
        raise ValueError(f"unknown argument {argument!r}: give none, or folder")
    c.data.source, c.data.name = ("folder", "") if argument else ("tfds", "cifar10")
    c.data.heldout_split = "test"
    c.image_size = (32, 32)
    c.mean, c.std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)
    c.data.crop_scale, c.data.crop_fraction = (0.67, 1.0), 1.0
    c.data.interpolation = "bilinear"  # as in pretraining

    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 128, 4, (4,)  # the encoder of cifar10_vit_tiny.py
    c.encoder.patch_size = 4
    c.encoder.class_token = False
    c.encoder.absolute_position = "sincos"
    c.objective.num_classes, c.objective.block = 10, 3

    c.log_every, c.save_every = 50, 200
    return c
