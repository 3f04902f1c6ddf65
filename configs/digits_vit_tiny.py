"""SimMIM pretraining on scikit-learn's handwritten digits: the smallest complete run.

    python -m simmim_jax.main --config configs/digits_vit_tiny.py --workdir runs/digits

It trains on 1,437 of the 1,797 digits (8x8 gray, enlarged to 32x32) and holds out 360. It needs no download and no
accelerator.

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/recipes.json):
101 s. Untrained -> trained: held-out masked loss 0.829 -> 0.234, kNN 30.8 -> 71.9 %, linear probe 28.3 -> 95.3 %.
"""

from ml_collections import ConfigDict

from simmim_jax.config import pretrain_config


def get_config() -> ConfigDict:
    c = pretrain_config()
    c.epochs = 40.0
    c.batch_size = 64
    c.base_learning_rate = 1.2e-2
    c.optim.warmup_epochs = 4.0

    c.data.source = "digits"
    c.data.heldout_split = "test"
    c.data.flip = 0.0  # a mirrored digit is not a digit
    c.image_size = (32, 32)
    c.mean, c.std = (0.305,), (0.376,)

    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 96, 4, (3,)
    c.encoder.patch_size = 4
    c.encoder.class_token = False
    c.encoder.absolute_position = "sincos"  # digits are centered, so the position of a stroke is informative
    c.objective.mask_patch_size = 8

    c.eval_images = 0
    c.probe_block = 3
    c.evals.knn = ConfigDict({"k": 20})
    c.evals.linear = ConfigDict({"C": 1.0})
    c.log_every = 40
    c.save_every = 220
    return c
