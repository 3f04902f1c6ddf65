"""UPerNet on ADE20K with a SimMIM ViT-B/16: 512 pixels, batch 16, 160,000 steps.

    python -m simmim_jax.main --config configs/ade20k_vit_b.py --config.init_from=RUN --config.data.path=DIR \
        --workdir runs/ade20k

RUN is a workdir of pretraining, or one that `python -m simmim_jax.tools.convert` wrote from released weights. DIR is
the unpacked ADEChallengeData2016 with images/training, annotations/training, images/validation and
annotations/validation. In its maps 0 means no class and 1 to 150 are the classes.

The numbers are those of upernet_beit_base_12_512_slide_160k_ade20k_pt.py and the files that it includes in
microsoft/unilm, beit/semantic_segmentation ("mmseg" in the comments). That recipe is for a BEiT pretrained without
labels. Differences:

- The head has group norms instead of batch norms over all devices.
- The linear schedule counts from the end of the warm-up. The official one counts from step 0.
- Logits of overlapping windows are averaged before they are enlarged. Windows are 340 pixels apart, a multiple of the
  logits' stride; the official distance is 341.
- The loss is the mean over pixels with a class. The official one divides by all pixels.

TFDS's scene_parse150 is built from the archive annotations_instance. Its maps have several channels, of which
--config.data.maps.channel selects one; that is not yet run.

Hardware: eight GPUs or a TPU slice. Time and result: not yet run. The paper has no such number for SimMIM's ViT-B.
"""

from ml_collections import ConfigDict

from simmim_jax.config import encoder_config, segment_config

IMAGES = 20_210  # training images of ADE20K


def get_config() -> ConfigDict:
    c = segment_config("upernet")
    c.steps = 160_000  # mmseg: max_iters
    c.batch_size = 16  # mmseg: 8 GPUs x samples_per_gpu 2
    c.base_learning_rate = 7e-4 * 512 / 16  # mmseg: lr 7e-4 for a batch of 16
    c.optim.schedule = "linear"  # mmseg: poly of power 1
    c.optim.warmup_epochs = 1500 / (IMAGES // 16)  # mmseg: warmup_iters 1500
    c.optim.warmup_learning_rate = 0.0  # mmseg: warmup_ratio 1e-6
    c.optim.min_learning_rate = 0.0  # mmseg: min_lr
    c.optim.betas, c.optim.weight_decay = (0.9, 0.999), 0.05  # mmseg: AdamW
    c.optim.layer_decay = 0.65  # mmseg: layer_decay_rate
    c.optim.grad_clip_norm = 0.0  # mmseg: grad_clip None

    c.image_size = (512, 512)  # mmseg: crop_size
    c.data.maps.reduce_zero_label = True  # mmseg: LoadAnnotations
    c.data.maps.scale = (0.5, 2.0)  # mmseg: ratio_range
    c.data.maps.most_of_one = 0.75  # mmseg: cat_max_ratio
    c.data.maps.photometric = True  # mmseg: PhotoMetricDistortion
    c.data.flip = 0.5  # mmseg: RandomFlip
    c.evals.segmentation.step = 341  # mmseg: test_cfg stride

    c.encoder = encoder_config("vit", "b")  # mmseg: embed_dim 768, depth 12, num_heads 12
    c.encoder.relative_position, c.encoder.final_norm = "per_block", False  # mmseg: use_rel_pos_bias
    c.encoder.drop_path = 0.1  # mmseg: drop_path_rate
    c.encoder.dtype = "bfloat16"
    c.objective.num_classes = 150
    c.objective.blocks = (4, 6, 8, 12)  # mmseg: out_indices 3, 5, 7, 11
    c.objective.channels = 768  # mmseg: decode_head.channels
    c.objective.auxiliary_weight = 0.4  # mmseg: auxiliary_head loss_weight

    c.save_every, c.eval_every = 4000, 16_000
    return c
