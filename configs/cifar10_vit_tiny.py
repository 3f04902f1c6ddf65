"""SimMIM pretraining of a small ViT on CIFAR-10.

    python -m simmim_jax.main --config configs/cifar10_vit_tiny.py --workdir runs/cifar10
    python -m simmim_jax.main --config configs/cifar10_vit_tiny.py:folder --config.data.path=DIR --workdir runs/cifar10

The first command reads TFDS's cifar10. If the dataset is not prepared, the run prints the command that prepares it.
The second command reads a folder with train/<class>/ and test/<class>/.

Hardware: two CPU cores; measured on a Zen 5, 2026-11-23 (benchmarks/results/2026-11-23-cpu-zen5-2cores/cifar10.json):
1,391 s, 380 images/s. Untrained -> trained: held-out masked loss 0.952 -> 0.434. Probes: docs/results.md.
"""

from ml_collections import ConfigDict

from simmim_jax.config import pretrain_config


def get_config(argument: str = "") -> ConfigDict:
    c = pretrain_config()
    c.epochs = 10.0
    c.batch_size = 128
    c.base_learning_rate = 6e-3
    c.optim.warmup_epochs = 0.5

    if argument not in ("", "folder"):
        raise ValueError(f"unknown argument {argument!r}: give none, or folder")
    c.data.source, c.data.name = ("folder", "") if argument else ("tfds", "cifar10")
    c.data.heldout_split = "test"
    c.image_size = (32, 32)
    c.mean, c.std = (0.491, 0.482, 0.447), (0.247, 0.243, 0.262)

    c.encoder.width, c.encoder.depth, c.encoder.num_heads = 128, 4, (4,)
    c.encoder.patch_size = 4
    c.encoder.class_token = False
    c.encoder.absolute_position = "sincos"
    c.objective.mask_patch_size = 8

    c.eval_every, c.eval_images = 780, 5000
    c.probe_block = 3
    c.evals.knn = ConfigDict({"k": 20})
    c.evals.linear = ConfigDict({"iterations": 2000})
    c.log_every = 50
    c.save_every = 780
    return c
