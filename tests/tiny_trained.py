"""A workdir with random weights, and folders of images, small enough for a test of the tools that read them."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from simmim_jax.models import make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint

PIXELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)}
SIZE = (16, 16)
ENCODER = {
    "name": "vit", "size": "ti", "width": 16, "depth": 2, "num_heads": 2, "patch_size": 8, "class_token": True,
    "absolute_position": "learned", "relative_position": "none",
}  # fmt: skip
SIMMIM = {"name": "simmim", "mask": "random", "mask_patch_size": 8, "mask_ratio": 0.5}
CLASSES = ("cat", "dog", "owl")


def make_run(folder, objective=SIMMIM, *, seed=0, **config) -> tuple[str, object, dict]:
    """(workdir, encoder, parameters), as of a run that stopped at step 7."""
    encoder = make_encoder(**ENCODER)
    init = make_objective(encoder=encoder, image_size=SIZE, **PIXELS, **objective).init
    # random throughout: initial values are zero here and there, which would hide what is mixed up
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(init, jax.random.key(0))
    params = jax.tree.map(lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), shapes)
    config = {"encoder": ENCODER, "objective": objective, "image_size": SIZE, **PIXELS, **config}
    checkpoint.write_params(str(folder), params, json.loads(json.dumps(config)), step=7)
    return str(folder), encoder, jax.tree.map(jnp.asarray, params)


def keep_fingerprints(workdir, **sources) -> None:
    """Write into a workdir's one checkpoint of which images ("source", "heldout") it is, as a run does."""
    (path,) = Path(workdir).glob("checkpoints/*/meta/metadata")
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(kept | {"data": {name: each.fingerprint() for name, each in sources.items()}}))


def random_weights(abstract) -> dict:
    """Arrays for an abstract tree of parameters, none hidden at zero or one: scales about 1, variances above it."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        name = jax.tree_util.keystr(path)
        base = 1.0 if "'scale'" in name or "'var'" in name else np.log(10) if "logit_scale" in name else 0.0
        spread = rng.random(x.shape) if "'var'" in name else rng.standard_normal(x.shape)
        return np.float32(base + 0.05 * spread)

    return jax.tree_util.tree_map_with_path(draw, abstract)


def make_images(folder, count=20, classes=CLASSES, size=SIZE, bad=()) -> list[str]:
    """PNG images of random pixels in `folder`/<class>/, those with numbers in `bad` cut off; their names, sorted."""
    rng, names = np.random.default_rng(0), []
    for n in range(count):
        name = f"{classes[n * len(classes) // count]}/{n:03d}.png" if classes else f"{n:03d}.png"
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
        if n in bad:
            path.write_bytes(path.read_bytes()[:100])
        names.append(name)
    return names


def image_pixels(folder, names) -> jax.Array:
    """uint8 [n, y, x, 3]."""
    return jnp.stack([jnp.asarray(Image.open(folder / name)) for name in names])
