"""Fine-tuning of any pretrained or imported encoder on a folder of images by class.

    python -m simmim_jax.main --config configs/folder_finetune.py --config.init_from=RUN --config.data.path=DIR \
        --config.objective.num_classes=N --workdir runs/finetuned

RUN is a workdir of pretraining, or what `python -m simmim_jax.tools.convert` has made of somebody's weights; the
architecture is the one there. At another resolution give --config.image_size=224,224, and for a Swin its windows, like
--config.encoder.window=7: tables and positions are resized as official code does, and each is told. Where RUN was
trained with other pixel statistics than ImageNet's, give --config.mean and --config.std.

`folder_finetune.py:vit` is for a ViT as official SimMIM fine-tunes it: each block gets its own copy of the shared bias
table, and the norm stands after pooling instead of before. Rates, schedule, decay, heads, RandAugment, erasing, Mixup
and CutMix are theirs for both (`simmim_swin_b_finetune.py` lists them); the layer decay is 0.65 for ViT-B, 0.8 or 0.9
for Swin-B, 0.7 for Swin-L, 0.75 for Swin V2-B: --config.optim.layer_decay.

Less than all of it: --config.optim.frozen_layers=N keeps the lowest layers as they are (1: what embeds, n: that and
n - 1 blocks); --config.optim.frozen=encoder/ --config.objective.train_encoder=false trains the head alone. From
scratch: leave RUN out and name an encoder, like --config.encoder.name=vit --config.encoder.size=s, which learns in all
its layers alike: --config.optim.layer_decay=1. For a small data set shorten the warm-up, --config.optim.warmup_epochs,
and mix less: --config.objective.mixup_prob=0.5.
Hardware: one GPU. Time and result: not yet run.
"""

from ml_collections import ConfigDict

from simmim_jax.config import finetune_config


def get_config(argument: str = "") -> ConfigDict:
    c = finetune_config()
    c.batch_size = 256
    c.eval_every = 2000
    if argument == "vit":
        c.encoder.relative_position = "per_block"
        c.encoder.final_norm = False
        c.objective.head_init_scale = 0.001
        c.optim.layer_decay = 0.65
    elif argument:
        raise ValueError(f"unknown argument {argument!r}: give none, or vit")
    return c
