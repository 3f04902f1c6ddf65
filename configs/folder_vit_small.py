"""SimMIM pretraining on a folder of your own images.

    python -m simmim_jax.main --config configs/folder_vit_small.py --config.data.path=DIR --workdir runs/mine

The folder may be flat or by class, and nested. Formats: JPEG, PNG, WebP, BMP, TIFF and GIF. If it has train/ and val/
(or validation/, test/), these are the training and held-out images. Otherwise 2 % of the images are held out, at least
8. If every image is in a folder of its class, kNN and linear probes follow the run; they take less than 3 % of its
work, and --config.online_probes=false turns them off. `configs/folder_vit_small.py:probes` requires classes, and probes
block 8 instead of the output.

The encoder's size, the image size, the mask patch size, the batch size, the number of epochs and the learning rate are
chosen from the number of images and the machine, unless you give them. The log lists each with the reason. On a GPU or
TPU: ViT-S at 224 pixels. Without one: ViT-Ti at 64 pixels, for a first result in less than ten minutes on two cores.

Hardware: any; measured on a Zen 4, 2026-11-30 (benchmarks/results/2026-11-30-cpu-zen4-2cores/photos.json): two CPU
cores, 250 photographs: held-out masked loss 1.106 -> 0.701 in 249 s. On a GPU: not yet run.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simmim_jax.config import pretrain_config


def get_config(argument: str = "") -> ConfigDict:
    c = pretrain_config()
    c.encoder.size = placeholder(str)
    c.image_size = placeholder(tuple)
    c.objective.mask_patch_size = placeholder(int)
    c.batch_size = placeholder(int)
    c.epochs = placeholder(float)
    c.base_learning_rate = placeholder(float)
    c.save_every = 500
    if argument == "probes":
        c.probe_block = 8
        c.evals.knn = c.evals.linear = ConfigDict({})
    elif argument:
        raise ValueError(f"unknown argument {argument!r}: give none, or probes")
    return c
