"""The official SimMIM pretraining of Swin-L: ImageNet-1K, 192 pixels, windows of 12, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swin_l_800ep.py --config.data.data_dir=DIR --workdir runs/swin_l

DIR is TFDS's data folder with imagenet2012, prepared as array_record. For a folder with train/<class>/ and val/<class>/
add --config.data.path=DIR. On few devices --config.microbatches=N keeps batch size and recipe.

Numbers with a source in their comment are official. "yaml" is
simmim_pretrain__swin_large__img192_window12__800ep.yaml; the other files are in microsoft/SimMIM d3e29bc.

The map of the last stage has 6 x 6 tokens, so the windows of that stage do, too.

The relative position bias tables decay in official pretraining, although `no_weight_decay_keywords` names them: its
prefix "encoder." matches no parameter. --config.optim.decay_rule=intended excludes them, as official fine-tuning does.

Hardware: eight or more GPUs, or a TPU slice; --config.encoder.remat=full saves memory. Time and result: not yet run.
Official result: 85.4 % top-1 after fine-tuning at 224 pixels with windows of 14 (microsoft/SimMIM README).
"""

from ml_collections import ConfigDict

from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD, encoder_config, pretrain_config, scale_with_batch


def get_config() -> ConfigDict:
    c = pretrain_config()
    c.epochs = 800.0  # yaml: EPOCHS
    c.batch_size = 2048  # README.md: 16 GPUs x 128 images
    c.base_learning_rate = 1e-4  # yaml: BASE_LR; main_simmim.py scales all rates by batch / 512
    c.optim.schedule = "multistep"  # yaml: LR_SCHEDULER.NAME
    c.optim.milestones, c.optim.gamma = (700.0,), 0.1  # yaml: MULTISTEPS, GAMMA
    c.optim.min_learning_rate = scale_with_batch(c, 5e-6)  # yaml: MIN_LR, which this schedule does not use
    c.optim.warmup_epochs = 10.0  # yaml: WARMUP_EPOCHS
    c.optim.warmup_learning_rate = scale_with_batch(c, 5e-7)  # yaml: WARMUP_LR
    c.optim.lr_step_offset = 1  # main_simmim.py sets the rate after the update
    c.optim.name, c.optim.betas, c.optim.epsilon = "adamw", (0.9, 0.999), 1e-8  # config.py: OPTIMIZER
    c.optim.weight_decay = 0.05  # yaml: WEIGHT_DECAY
    c.optim.decay_rule = "official"  # optimizer.py: bias tables decay too
    c.optim.grad_clip_norm = 5.0  # config.py: CLIP_GRAD

    c.objective.mask = "random"  # data_simmim.py: MaskGenerator
    c.objective.mask_patch_size = 32  # yaml: MASK_PATCH_SIZE
    c.objective.mask_ratio = 0.6  # yaml: MASK_RATIO
    c.objective.norm_window = 0  # off; an option of the Swin V2 code

    c.data.name = "imagenet2012"
    c.image_size = (192, 192)  # yaml: IMG_SIZE
    c.mean, c.std = IMAGENET_MEAN, IMAGENET_STD  # data_simmim.py
    c.data.crop_scale, c.data.crop_ratio = (0.67, 1.0), (3 / 4, 4 / 3)  # data_simmim.py
    c.data.interpolation = "bilinear"  # data_simmim.py: default of RandomResizedCrop
    c.data.flip = 0.5  # data_simmim.py: default of RandomHorizontalFlip

    c.encoder = encoder_config("swin", "l")  # yaml: EMBED_DIM 192, DEPTHS 2, 2, 18, 2, NUM_HEADS 6, 12, 24, 48
    c.encoder.window = 12  # yaml: WINDOW_SIZE
    c.encoder.patch_size, c.encoder.mlp_ratio = 4, 4.0  # config.py: PATCH_SIZE, MLP_RATIO
    c.encoder.qkv_bias = "qkv"  # config.py: QKV_BIAS
    c.encoder.absolute_position, c.encoder.patch_norm = "none", True  # config.py: APE, PATCH_NORM
    c.encoder.drop_path = 0.0  # yaml: DROP_PATH_RATE
    c.encoder.dtype = "bfloat16"  # official: float16 with loss scaling (apex O1)

    c.eval_every = 6250  # ten epochs
    c.eval_images = 50_000  # the whole validation set; for probes also 50 training images per class
    c.save_every = 3125  # yaml: SAVE_FREQ, five epochs
    c.log_every = 100  # yaml: PRINT_FREQ
    return c
