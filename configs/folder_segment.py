"""Semantic segmentation of a folder of images and label maps with the encoder of any run or imported model.

    python -m simmim_jax.main --config configs/folder_segment.py --config.init_from=RUN --config.data.path=DIR \
        --config.objective.num_classes=N --workdir runs/segmented
    python -m simmim_jax.main --config configs/folder_segment.py:upernet --config.init_from=RUN --config.data.path=DIR \
        --config.objective.num_classes=N --workdir runs/upernet

The first command is the dense counterpart of linear evaluation: the encoder is frozen, and one linear layer reads the
features of a block (--config.objective.block, 0 for the last). The second trains UPerNet and the encoder.

DIR has one of these layouts:

- images/train/a.jpg with masks/train/a.png (or annotations/, labels/), and the same for val
- train/images with train/masks, and the same for val
- images/ and masks/, of which 10 % are held out

A label map has one value per pixel: 0 to N - 1, or 255 for no class. For maps in which 0 means no class and classes
begin at 1, as in ADE20K, give --config.data.maps.reduce_zero_label=true. Maps of 0 and 255 only are refused, because
255 would not be a class; write 1 instead. Images with an EXIF orientation are turned upright, and their maps if their
sizes show that these must be turned too. If the sizes do not decide, the pair counts as a bad image. classes.txt, one
name per line, names the rows of figures/segmentation.csv.

Images are scaled until the shorter side is that of the crop (--config.data.maps.short_side; -1: no scaling). In
evaluation, windows of --config.image_size slide over them.

    python -m simmim_jax.tools.evaluate runs/segmented
    python -m simmim_jax.tools.predict runs/segmented IMAGE --out=FILE.png

`evaluate` repeats the numbers of the last evaluation, or with --data=DIR evaluates other images with maps. `predict`
draws the classes over an image and writes them as a map to FILE_mask.png.

The rates belong to :linear and :upernet, and do not follow --config.objective.head. They are for large encoders and
long runs.

Hardware: one GPU; not yet run on real photographs. A small trial on two CPU cores, measured 2026-11-22: 11 classes,
the ink of scikit-learn's digits at random places in images of 34 to 40 pixels, windows of 32, after 400 steps of
configs/digits_vit_tiny.py. mIoU on 120 images: 0.015 -> 0.159 for the linear head (block 3, 400 steps of 64, rate
2e-2), 0.005 -> 0.394 for UPerNet (64 channels, 400 steps of 32, rate 4e-3).
"""

from ml_collections import ConfigDict

from simmim_jax.config import segment_config


def get_config(head: str = "linear") -> ConfigDict:
    c = segment_config(head)
    c.epochs = 50.0
    c.eval_every = 2000
    return c
