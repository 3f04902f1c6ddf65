"""The official SimMIM pretraining of Swin V2-B: ImageNet-1K, 192 pixels, windows of 12, 800 epochs, batch 2048.

    python -m simmim_jax.main --config configs/simmim_swinv2_b_800ep.py --config.data.data_dir=DIR --workdir runs/swinv2

DIR is TFDS's data folder with imagenet2012, prepared as array_record. For a folder with train/<class>/ and val/<class>/
add --config.data.path=DIR. On few devices --config.microbatches=N keeps batch size and recipe.

Numbers with a source in their comment are official. "yaml" is
simmim_pretrain__swinv2_base__img192_window12__800ep.yaml; the other files are in microsoft/Swin-Transformer f82860b.

The target is normalized by the mean and deviation of the 47 x 47 pixels around each pixel, so the reported masked loss
is that of normalized pixels. Fine-tuning with other windows needs --config.encoder.pretrained_windows=12,12,12,6.

logit_scale and the kernels of cpb_mlp decay in official pretraining, although `no_weight_decay_keywords` names them:
its prefix "encoder." matches no parameter. --config.optim.decay_rule=intended excludes them, as official fine-tuning
does.

Hardware: eight or more GPUs, or a TPU slice. Time and result: not yet run. Official result: held-out masked loss
0.4588, and 85.04 % top-1 after fine-tuning for a run of about the same length (swinv2-b-1k-500k of MODELHUB.md).
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
    c.optim.decay_rule = "official"  # optimizer.py: logit_scale and cpb_mlp decay too
    c.optim.grad_clip_norm = 5.0  # config.py: CLIP_GRAD

    c.objective.mask = "random"  # data_simmim.py: MaskGenerator
    c.objective.mask_patch_size = 32  # yaml: MASK_PATCH_SIZE
    c.objective.mask_ratio = 0.6  # yaml: MASK_RATIO
    c.objective.norm_window = 47  # yaml: NORM_TARGET.PATCH_SIZE

    c.data.name = "imagenet2012"
    c.image_size = (192, 192)  # yaml: IMG_SIZE
    c.mean, c.std = IMAGENET_MEAN, IMAGENET_STD  # data_simmim.py
    c.data.crop_scale, c.data.crop_ratio = (0.67, 1.0), (3 / 4, 4 / 3)  # data_simmim.py
    c.data.interpolation = "bilinear"  # data_simmim.py: default of RandomResizedCrop
    c.data.flip = 0.5  # data_simmim.py: default of RandomHorizontalFlip

    c.encoder = encoder_config("swinv2", "b")  # yaml: EMBED_DIM 128, DEPTHS 2, 2, 18, 2, NUM_HEADS 4, 8, 16, 32
    c.encoder.window = 12  # yaml: WINDOW_SIZE
    c.encoder.patch_size, c.encoder.mlp_ratio = 4, 4.0  # config.py: PATCH_SIZE, MLP_RATIO
    c.encoder.qkv_bias = "qv"  # config.py: QKV_BIAS of Swin V2, on queries and values
    c.encoder.absolute_position, c.encoder.patch_norm = "none", True  # config.py: APE, PATCH_NORM
    c.encoder.drop_path = 0.1  # yaml: DROP_PATH_RATE
    c.encoder.dtype = "bfloat16"  # official: float16 with loss scaling (apex O1)

    c.eval_every = 6250  # ten epochs
    c.eval_images = 50_000  # the whole validation set; for probes also 50 training images per class
    c.save_every = 3125  # yaml: SAVE_FREQ, five epochs
    c.log_every = 100  # yaml: PRINT_FREQ
    return c
