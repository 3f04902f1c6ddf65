"""WIP cifar"""

from ml_collections import ConfigDict

from simmim_jax.config import pretrain_config


def get_config():
    c = pretrain_config()
    c.data.source, c.data.name = "tfds", "cifar10"
    c.data.heldout_split = "test"
    c.image_size = (32, 32)
    c.mean, c.std = (0.491, 0.482, 0.447), (0.247, 0.244, 0.262)
    c.encoder.size = "ti"
    c.encoder.width, c.encoder.depth, c.encoder.heads, c.encoder.patch_size = 128, 6, 4, 4
    c.encoder.class_token, c.encoder.absolute_position = False, "sincos"
    c.objective.block_size, c.objective.ratio = 8, 0.6
    c.batch_size = 128
    c.epochs = 10.0
    c.base_learning_rate = 6e-3
    c.optim.warmup_epochs = 0.5
    c.eval_every, c.eval_images = 600, 5000
    c.probe_block = 4
    c.evals.knn = ConfigDict({"neighbours": 20})
    c.evals.linear = ConfigDict({"iterations": 300})
    c.log_every = 50
    c.save_every = 500
    return c
