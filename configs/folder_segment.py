"""Semantic segmentation of a folder of images and index maps, with the encoder of any run or imported model.

    python -m simmim_jax.main --config configs/folder_segment.py --config.init_from=RUN --config.data.path=DIR \
        --config.objective.num_classes=N --workdir runs/segmented
    python -m simmim_jax.main --config configs/folder_segment.py:upernet --config.init_from=RUN --config.data.path=DIR \
        --config.objective.num_classes=N --workdir runs/upernet

The first is the dense counterpart of linear evaluation: the encoder is frozen, and one linear map reads the features of
a block (--config.objective.block, 0 for the last). The second trains UPerNet and the encoder with it.

DIR has images/train/a.jpg with masks/train/a.png (or annotations/, labels/) and images/val, or train/images with
train/masks, or images/ and masks/ alone, of which a tenth is then held out; a map has one value for each pixel, 0 to
N - 1, or 255 where there is no class. --config.data.maps.reduce_zero_label=true is for maps in which 0 means none and
classes begin at 1, as in ADE20K. Images with an EXIF orientation are turned upright, and their maps where the sizes say
that these must be; where the sizes leave it open, a pair counts as a bad image. classes.txt, a name on each line, names
the rows of figures/segmentation.csv. Masks of 0 and 255 are refused: there 255 would be no class; write 1 for it.
Images are scaled so that their shorter side is the crop's (--config.data.maps.short_side, -1: not at all); windows of
--config.image_size slide over them in evaluation.

    python -m simmim_jax.tools.evaluate runs/segmented
    python -m simmim_jax.tools.predict runs/segmented IMAGE --out=FILE.png

The first gives the numbers of the last evaluation again, or with --data=DIR those of other images with maps. The second
draws the classes over an image, and writes them as a mask to FILE_mask.png.

Rates follow :linear and :upernet, and not --config.objective.head. They are for large encoders and long runs. Hardware:
one GPU; on real photographs not yet run. Tried on two CPU cores, beside other work, measured 2026-11-22: 11 classes,
the ink of scikit-learn's digits at random places of 34 to 40 pixels, windows of 32, after 400 steps of
configs/digits_vit_tiny.py: mIoU 0.015 -> 0.159 for the linear head (block 3, 400 steps of 64, rate 2e-2), 0.005 ->
0.394 for UPerNet (64 channels, 400 steps of 32, rate 4e-3), of 120 images.
"""

from ml_collections import ConfigDict

from simmim_jax.config import segment_config


def get_config(head: str = "linear") -> ConfigDict:
    c = segment_config(head)
    c.epochs = 50.0
    c.eval_every = 2000
    return c
