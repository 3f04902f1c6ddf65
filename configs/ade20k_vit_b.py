"""UPerNet on ADE20K with a SimMIM ViT-B/16: 512 pixels, batch 16, 160,000 steps.

    python -m simmim_jax.main --config configs/ade20k_vit_b.py --config.init_from=RUN --config.data.path=DIR \
        --workdir runs/ade20k

RUN is a workdir of pretraining, or what `python -m simmim_jax.tools.convert` made of released weights. DIR is
ADEChallengeData2016 as it is unpacked: images/training, annotations/training, images/validation and
annotations/validation; in its maps 0 has no class and 1 to 150 are the classes.

The numbers are those of upernet_beit_base_12_512_slide_160k_ade20k_pt.py of microsoft/unilm (beit), which is for a BEiT
that has seen no labels: AdamW, rate 7e-4 for a batch of 16, layer decay 0.65, weight decay 0.05, stochastic depth 0.1,
no clipping, 1,500 steps of warm-up and then a line down to 0, blocks 4, 6, 8 and 12, 768 channels, windows every 341
pixels (here 340: whole logits). What differs: group norms stand in the head where theirs are batch norms over all
devices; their line starts at step 0 and not where the warm-up ends; logits of overlapping windows are averaged before
they are enlarged; the loss is a mean over the pixels that have a class, where theirs divides by all pixels. TFDS's
scene_parse150 is built from the archive annotations_instance, not from these maps: its maps have several channels, of
which --config.data.maps.channel chooses one; that is not yet run.

Hardware: eight GPUs or a TPU slice. Time and result: not yet run. The paper has no such number for SimMIM's ViT-B.
"""

from ml_collections import ConfigDict

from simmim_jax.config import segment_config

IMAGES = 20_210


def get_config() -> ConfigDict:
    c = segment_config("upernet")
    c.data.maps.reduce_zero_label = True
    c.objective.num_classes = 150
    c.objective.blocks, c.objective.channels = (4, 6, 8, 12), 768
    c.evals.segmentation.step = 341
    c.encoder.name, c.encoder.size = "vit", "b"
    c.encoder.drop_path, c.encoder.dtype = 0.1, "bfloat16"
    c.encoder.relative_position, c.encoder.final_norm = "per_block", False

    c.steps = 160_000
    c.base_learning_rate = 7e-4 * 512 / 16
    c.optim.warmup_epochs = 1500 / (IMAGES // 16)
    c.optim.layer_decay, c.optim.grad_clip_norm = 0.65, 0.0
    c.save_every, c.eval_every = 4000, 16_000
    return c
