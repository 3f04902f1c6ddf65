"""The official SimMIM fine-tuning of ViT-B/16 on ImageNet-1K: 100 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_vit_b_finetune.py --config.init_from=RUN \
        --config.data.data_dir=DIR --workdir runs/vit_b_tuned

RUN is the workdir of `simmim_vit_b_800ep.py`, or one that `python -m simmim_jax.tools.convert` wrote from the official
file. DIR is TFDS's data folder with imagenet2012, prepared as array_record. For a folder with train/<class>/ and
val/<class>/ add --config.data.path=DIR. On few devices --config.microbatches=N keeps batch size and recipe.
--config.ema_decay=0.9999 evaluates an average of the parameters, which official code does not.

Numbers with a source in their comment are official. "yaml" is simmim_finetune__vit_base__img224__800ep.yaml; the
other files are in microsoft/SimMIM d3e29bc.

Each block gets its own copy of the shared bias table. Official code reports the best epoch's accuracy;
`evaluations.jsonl` has that of every fifth epoch.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Official result: 83.8 % top-1
(microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD, encoder_config, finetune_config, scale_with_batch


def get_config() -> ConfigDict:
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
    c.optim.decay_rule = "official"  # optimizer.py: bias tables decay too (microsoft/SimMIM#26)
    c.optim.layer_decay = 0.65  # yaml: LAYER_DECAY
    c.optim.grad_clip_norm = 5.0  # config.py: CLIP_GRAD

    c.data.name = "imagenet2012"
    c.image_size = (224, 224)  # yaml: IMG_SIZE
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

    c.encoder = encoder_config("vit", "b")  # yaml: EMBED_DIM 768, DEPTH 12, NUM_HEADS 12
    c.encoder.patch_size, c.encoder.mlp_ratio = 16, 4.0  # config.py: PATCH_SIZE, MLP_RATIO
    c.encoder.qkv_bias = "qv"  # config.py: QKV_BIAS, in vision_transformer.py on queries and values
    c.encoder.layer_scale = 0.1  # config.py: INIT_VALUES
    c.encoder.class_token = True  # vision_transformer.py
    c.encoder.absolute_position, c.encoder.relative_position = "none", "per_block"  # yaml: USE_APE, USE_RPB
    c.encoder.final_norm = False  # vision_transformer.py: fc_norm replaces it (yaml: USE_MEAN_POOLING)
    c.encoder.drop_path = 0.1  # yaml: DROP_PATH_RATE
    c.encoder.dtype = "bfloat16"  # official: float16 with loss scaling (apex O1)
    c.objective.num_classes = 1000
    c.objective.label_smoothing = 0.1  # config.py: LABEL_SMOOTHING
    c.objective.pool, c.objective.fc_norm = "patches", True  # yaml: USE_MEAN_POOLING
    c.objective.head_init_scale = 0.001  # vision_transformer.py: init_scale

    c.eval_every = 3125  # five epochs
    c.save_every = 625
    c.log_every = 100  # yaml: PRINT_FREQ
    return c
