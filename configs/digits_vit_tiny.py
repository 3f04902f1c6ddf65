"""WIP"""
from simmim_jax.config import pretrain_config
from ml_collections import ConfigDict

def get_config():
    c = pretrain_config()
    c.data.source = "digits"
    c.data.heldout_split = "test"
    c.image_size = (32, 32)
    c.mean, c.std = (0.305,), (0.376,)
    c.data.flip = 0.0
    c.encoder.size = "ti"
    c.encoder.width, c.encoder.depth, c.encoder.heads, c.encoder.patch_size = 96, 4, 3, 4
    c.objective.block_size = 8
    c.batch_size = 64
    c.epochs = 40.0
    c.base_learning_rate = 4e-3
    c.optim.warmup_epochs = 4.0
    c.eval_images = 0
    c.evals.knn = ConfigDict({"neighbours": 20})
    c.evals.linear = ConfigDict({})
    c.log_every = 50
    c.save_every = 200
    return c
