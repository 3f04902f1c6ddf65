"""SimMIM of a ViT-S/16 on a folder of your own images.

    python -m simmim_jax.main --config configs/folder_vit_small.py --config.data.path=DIR --workdir runs/mine

Flat or by class, nested or not; JPEG, PNG, WebP, BMP, TIFF, GIF. A folder with train/ and val/ (or validation/, test/)
is used as it says; of any other, two images in a hundred are held out. Where every image lies in a folder of its class,
kNN and linear probe watch the run (--config.online_probes=false: not), by forward passes of less than 3 % of its work;
`--config configs/folder_vit_small.py:probes` insists on them, and has them read block 8, not the output.

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
