"""The official SimMIM fine-tuning of Swin-B on ImageNet-1K: 100 epochs, batch 2048, after 800 epochs of pretraining.

    python -m simmim_jax.main --config configs/simmim_swin_b_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/swin_b_tuned

RUN is the workdir of `simmim_swin_b_800ep.py`, or one that `python -m simmim_jax.tools.convert` wrote from the official
file. DIR is TFDS's data folder with imagenet2012, prepared as array_record. For a folder with train/<class>/ and
val/<class>/ add --config.data.path=DIR. On few devices --config.microbatches=N keeps batch size and recipe.
--config.ema_decay=0.9999 evaluates an average of the parameters, which official code does not.

`configs/simmim_swin_b_finetune.py:100ep` follows `simmim_swin_b_100ep.py`, and `:100ep_192` does so at the resolution
and window of pretraining.

Numbers with a source in their comment are official. "yaml" is
simmim_finetune__swin_base__img224_window7__800ep.yaml (or __100ep, img192_window6); the other files are in
microsoft/SimMIM d3e29bc.

Position tables are resized to new windows as in official code. Official code reports the best epoch's accuracy;
`evaluations.jsonl` has that of every fifth epoch.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Official result: 84.0 % top-1; after 100
epochs of pretraining 83.5 %, at 192 pixels 82.8 % (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD, encoder_config, finetune_config, scale_with_batch


def get_config(argument: str = "") -> ConfigDict:
    variants = {"": (224, 7, 0.8), "100ep": (224, 7, 0.9), "100ep_192": (192, 6, 0.9)}  # image, window, layer decay
    if argument not in variants:
        raise ValueError(f"unknown argument {argument!r}: give none, or {' or '.join(list(variants)[1:])}")
    image, window, layer_decay = variants[argument]

    c = finetune_config()
    c.epochs = 100.0  # yaml: EPOCHS
    c.batch_size = 2048  # README.md: 16 GPUs x 128 images
    c.base_learning_rate = 1.25e-3  # yaml: BASE_LR; main_finetune.py scales all rates by batch / 512
    c.optim.schedule = "cosine_global"  # config.py: LR_SCHEDULER.NAME; lr_scheduler.py counts from step 0
    c.optim.warmup_epochs = 20.0  # yaml: WARMUP_EPOCHS
    c.optim.warmup_learning_rate = scale_with_batch(c, 2.5e-7)  # yaml: WARMUP_LR
    c.optim.min_learning_rate = scale_with_batch(c, 2.5e-7)  # yaml: MIN_LR
    c.optim.lr_step_offset = 1  # main_finetune.py sets the rate after the update
    c.optim.name, c.optim.betas, c.optim.epsilon = "adamw", (0.9, 0.999), 1e-8  # config.py: OPTIMIZER
    c.optim.weight_decay = 0.05  # yaml: WEIGHT_DECAY
    c.optim.decay_rule = "official"  # optimizer.py: not of the parameters in no_weight_decay_keywords
    c.optim.layer_decay = layer_decay  # yaml: LAYER_DECAY
    c.optim.grad_clip_norm = 5.0  # config.py: CLIP_GRAD

    c.data.name = "imagenet2012"
    c.image_size = (image, image)  # yaml: IMG_SIZE
    c.mean, c.std = IMAGENET_MEAN, IMAGENET_STD  # data_finetune.py
    c.data.crop_scale, c.data.crop_ratio = (0.08, 1.0), (3 / 4, 4 / 3)  # timm: defaults of create_transform
    c.data.interpolation = "bicubic"  # config.py: INTERPOLATION
    c.data.flip = 0.5  # timm: default of create_transform
    c.data.augment = "rand-m9-mstd0.5-inc1"  # config.py: AUTO_AUGMENT
    c.data.color_jitter = 0.0  # config.py: COLOR_JITTER 0.4, which timm skips next to RandAugment
    c.data.crop_fraction = 0.875  # data_finetune.py: 224 of 256 pixels
    c.objective.reprob, c.objective.remode, c.objective.recount = 0.25, "pixel", 1  # config.py: REPROB and others
    c.objective.mixup, c.objective.cutmix = 0.8, 1.0  # config.py: MIXUP, CUTMIX
    c.objective.mixup_prob, c.objective.mixup_switch_prob = 1.0, 0.5  # config.py: MIXUP_PROB, MIXUP_SWITCH_PROB
    c.objective.mixup_mode = "batch"  # config.py: MIXUP_MODE
    c.objective.mixup_group = 128  # README.md: batch of one GPU, which is mixed within itself

    c.encoder = encoder_config("swin", "b")  # yaml: EMBED_DIM 128, DEPTHS 2, 2, 18, 2, NUM_HEADS 4, 8, 16, 32
    c.encoder.window = window  # yaml: WINDOW_SIZE
    c.encoder.patch_size, c.encoder.mlp_ratio = 4, 4.0  # config.py: PATCH_SIZE, MLP_RATIO
    c.encoder.qkv_bias = "qkv"  # config.py: QKV_BIAS
    c.encoder.absolute_position, c.encoder.patch_norm = "none", True  # config.py: APE, PATCH_NORM
    c.encoder.drop_path = 0.1  # yaml: DROP_PATH_RATE
    c.encoder.dtype = "bfloat16"  # official: float16 with loss scaling (apex O1)
    c.objective.num_classes = 1000
    c.objective.label_smoothing = 0.1  # config.py: LABEL_SMOOTHING
    c.objective.head_init_scale = 1.0  # main_finetune.py does not scale the head of a Swin

    c.eval_every = 3125  # five epochs
    c.save_every = 625
    c.log_every = 100  # yaml: PRINT_FREQ
    return c
