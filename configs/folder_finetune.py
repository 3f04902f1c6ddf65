"""Fine-tuning of any pretrained or imported encoder on a folder of images by class.

    python -m simmim_jax.main --config configs/folder_finetune.py --config.init_from=RUN --config.data.path=DIR \
        --workdir runs/finetuned

RUN is a workdir of pretraining, or one that `python -m simmim_jax.tools.convert` wrote from released weights. The
architecture is that of RUN.

- Another resolution: --config.image_size=224,224, and for a Swin its window, like --config.encoder.window=7. Position
  embeddings and bias tables are resized as in official code, and each is logged.
- Mean, standard deviation, bands and value range of the images are those of RUN.
- Official fine-tuning of a ViT: `configs/folder_finetune.py:vit`. Each block gets its own copy of the shared bias
  table, and the norm follows pooling instead of preceding it.
- Layer decay, --config.optim.layer_decay: officially 0.65 for ViT-B, 0.8 or 0.9 for Swin-B, 0.7 for Swin-L and 0.75
  for Swin V2-B.
- Fewer trained layers: --config.optim.frozen_layers=N freezes the lowest layers (1: patch embedding, n: also n - 1
  blocks). --config.optim.frozen=encoder/ --config.objective.train_encoder=false trains only the head.
- From scratch: leave out RUN and name an encoder, like --config.encoder.name=vit --config.encoder.size=s, with the same
  rate for all layers, --config.optim.layer_decay=1.
- A small dataset: a shorter warm-up, --config.optim.warmup_epochs, and less mixing, --config.objective.mixup_prob=0.5.

Rates, schedule, head, RandAugment, erasing, Mixup and CutMix are the official ones, listed in
configs/simmim_swin_b_finetune.py.

Hardware: one GPU. Time and result: not yet run.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simmim_jax.config import finetune_config


def get_config(argument: str = "") -> ConfigDict:
    c = finetune_config()
    c.image_size = placeholder(tuple)
    c.batch_size = placeholder(int)
    c.objective.num_classes = placeholder(int)
    c.eval_every = 2000
    if argument == "vit":
        c.encoder.relative_position = "per_block"
        c.encoder.final_norm = False
        c.objective.head_init_scale = 0.001
        c.optim.layer_decay = 0.65
    elif argument:
        raise ValueError(f"unknown argument {argument!r}: give none, or vit")
    return c
