"""Linear evaluation of any run or imported encoder on a folder of images by class.

    python -m simmim_jax.main --config configs/folder_linear.py --config.init_from=RUN --config.data.path=DIR \
        --config.objective.block=8 --workdir runs/linear

The encoder is that of RUN, frozen. --config.objective.block is the block whose output is pooled; 0 is the last, after
the final norm. --config.image_size should be that of RUN. For the baseline leave out RUN and name an encoder:
--config.encoder.name=vit --config.encoder.size=s.

Hardware: one GPU. Time and result: not yet run.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from simmim_jax.config import encoder_config, linear_config


def get_config() -> ConfigDict:
    c = linear_config()
    c.epochs = 90.0
    c.image_size = placeholder(tuple)
    c.batch_size = placeholder(int)
    c.objective.num_classes = placeholder(int)
    c.base_learning_rate = 1e-2
    c.encoder = encoder_config("", "")
    c.objective.block = 0
    return c
