"""The official SimMIM fine-tuning of Swin-B on ImageNet-1K: 100 epochs, batch 2048, after 800 epochs of pretraining.

    python -m simmim_jax.main --config configs/simmim_swin_b_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/swin_b_tuned

RUN is the workdir of `simmim_swin_b_800ep.py`, or what `python -m simmim_jax.tools.convert` made of the official file;
DIR as there. `simmim_swin_b_finetune.py:100ep` is for `simmim_swin_b_100ep.py`: layer decay 0.9 instead of 0.8;
`:100ep_192` is that at the resolution and window of pretraining, 192 and 6. On few devices --config.microbatches=N
keeps batch and recipe; --config.ema_decay=0.9999 evaluates an average of the parameters (theirs has none).

Numbers are those of simmim_finetune__swin_base__img224_window7__800ep.yaml (and __100ep, img192_window6), or where they
are silent of config.py, data_finetune.py and main_finetune.py of microsoft/SimMIM d3e29bc: base rate 1.25e-3, warm-up
from 2.5e-7 over 20 epochs and cosine to 2.5e-7, all times batch / 512; cosine over all steps, each step at the rate of
the one before; each layer's peak is layer_decay times that of the one above, its first and last rate the same;
stochastic depth 0.1; weight decay 0.05; clip 5.0; label smoothing 0.1; crops of 8 to 100 % of the image, bicubic; flip
0.5; RandAugment rand-m9-mstd0.5-inc1; erasing 0.25; Mixup 0.8 or CutMix 1.0, one of them by a coin, for each 128 images
and among them, as in each process there. Evaluated on the center: 224 of 256 pixels. Tables of windows are resized as
there. Precision there is float16 with loss scaling, here bfloat16. They report the best epoch's accuracy;
`evaluations.jsonl` has each fifth epoch's.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Theirs: 84.0 % top-1; after 100 epochs of
pretraining 83.5 %, at 192 pixels 82.8 % (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from simmim_jax.config import encoder_config, finetune_config


def official_finetuning(encoder: str, size: str, *, layer_decay: float, drop_path: float = 0.1) -> ConfigDict:
    """What the four official recipes share."""
    c = finetune_config()
    c.data.name = "imagenet2012"
    c.encoder = encoder_config(encoder, size)
    c.encoder.drop_path, c.encoder.dtype = drop_path, "bfloat16"
    c.optim.layer_decay = layer_decay
    c.objective.mixup_group = 128
    c.eval_every = 3125  # five epochs
    c.save_every = 625
    c.log_every = 100
    return c


def get_config(argument: str = "") -> ConfigDict:
    variants = {"": (224, 7, 0.8), "100ep": (224, 7, 0.9), "100ep_192": (192, 6, 0.9)}  # image, window, layer decay
    if argument not in variants:
        raise ValueError(f"unknown argument {argument!r}: give none, or {' or '.join(list(variants)[1:])}")
    image, window, layer_decay = variants[argument]
    c = official_finetuning("swin", "b", layer_decay=layer_decay)
    c.image_size, c.encoder.window = (image, image), window
    return c
