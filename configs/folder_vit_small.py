"""SimMIM pretraining of a ViT-S/16 on a folder of your own images.

    python -m simmim_jax.main --config configs/folder_vit_small.py --config.data.path=DIR --workdir runs/mine

The folder may be flat or by class, and nested. Formats: JPEG, PNG, WebP, BMP, TIFF and GIF. If it has train/ and val/
(or validation/, test/), these are the training and held-out images. Otherwise 2 % of the images are held out. If every
image is in a folder of its class, kNN and linear probes follow the run; they take less than 3 % of its work, and
--config.online_probes=false turns them off. `configs/folder_vit_small.py:probes` requires classes, and probes block 8
instead of the output.

Hardware: one GPU, with --config.encoder.dtype=bfloat16; a laptop to try it out, with --config.batch_size=32
--config.steps=200. Time and result: not yet run to the end.
"""

from ml_collections import ConfigDict

from simmim_jax.config import pretrain_config


def get_config(argument: str = "") -> ConfigDict:
    c = pretrain_config()
    c.epochs = 400.0
    c.batch_size = 256
    c.base_learning_rate = 2e-4
    c.encoder.size = "s"
    if argument == "probes":
        c.probe_block = 8
        c.evals.knn = c.evals.linear = ConfigDict({})
    elif argument:
        raise ValueError(f"unknown argument {argument!r}: give none, or probes")
    return c
