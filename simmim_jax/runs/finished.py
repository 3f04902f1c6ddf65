"""Load a finished run, or one of its checkpoints: weights, encoder, and the config that it was trained with."""

from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import numpy as np

from simmim_jax.data.pixels import Pixels
from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.models import make_encoder
from simmim_jax.objectives import Objective, make_objective
from simmim_jax.runs import checkpoint, pretrained
from simmim_jax.runtime import sharding

# Defaults for imported models, as in the official `build_transform`: the fraction of a side that the center crop keeps,
# and the image size in pixels up to which it keeps everything.
CROP_FRACTION, SMALL = 0.875, 32


class Run(NamedTuple):
    """A run's weights and config.

    params: nested dicts of numpy arrays, for "encoder" and the heads of the objective; blocks are not stacked.
    config: content of config.json.
    folder: folder of the step in the run's workdir.
    image_size: (height, width) in pixels that the position embeddings fit.
    """

    params: dict
    config: dict
    encoder: nn.Module
    folder: Path
    image_size: tuple[int, int]

    def __repr__(self) -> str:
        return f"Run({self.config['encoder']['name']} at {format_size(self.image_size)} pixels, {self.folder})"

    @property
    def pixels(self) -> Pixels:
        """Type, bands, value range and normalization of the images."""
        return Pixels.from_record(self.config)

    @property
    def normalization(self) -> dict:
        """The mean and std of each channel on the scale 0..1, and how stored samples become numbers on it."""
        return self.pixels.normalization

    @property
    def channels(self) -> int:
        return len(self.config["mean"])

    @property
    def objective_name(self) -> str:
        """The objective that the run was trained for; "none" for an imported encoder."""
        return (self.config.get("objective") or {"name": "none"})["name"]

    @property
    def needs(self) -> tuple[str, ...]:
        """The batch entries that the run's objective reads."""
        return ("image",) if self.objective_name == "none" else make_run_objective(self).needs

    @property
    def crop_fraction(self) -> int | float:
        """The fraction of a resized image's side that the center crop keeps. Imported models have a default."""
        own = self.config.get("data", {})
        return own.get("crop_fraction", 1.0 if own or max(self.image_size) <= SMALL else CROP_FRACTION)

    @property
    def interpolation(self) -> str:
        return self.config.get("data", {}).get("interpolation", "bicubic")

    @property
    def step(self) -> int:
        return int(self.folder.name) if self.folder.name.isdigit() else 0


class State(NamedTuple):
    """The fields of a training state that evaluators read."""

    step: int
    params: dict


def load_run(path: str, image_size: tuple[int, int] | None = None) -> Run:
    """Load the newest checkpoint of a workdir, or the step whose folder `path` is.

    If the run keeps an EMA of its parameters, the EMA is loaded. image_size: (height, width) in pixels to use the model
    at; None: the run's own. For another size, position embeddings are resized, and Swin V2 keeps the scale of its
    displacements. Raises CheckpointError if the folder has no encoder or no config.json.
    """
    folder = checkpoint.find_step(path, hint="")  # once: a run in progress saves newer steps, and removes this one
    params, config = checkpoint.read_params(str(folder))
    if "encoder" not in params or not {"encoder", "image_size", "mean", "std"} <= config.keys():
        raise CheckpointError("no encoder, or no config.json", path, "give the workdir of a run, or a step in it")
    encoder = make_encoder(**pretrained.architecture(config["encoder"]))
    before = tuple(config["image_size"])
    now = tuple(image_size or before)
    if now != before:
        stride = encoder.token_stride
        if any(side % stride for side in now):
            raise ConfigError(f"image size {now}", "image_size", f"give multiples of {stride} pixels")
        if encoder.pretrained_windows == ():
            encoder = encoder.clone(pretrained_windows=encoder.stage_windows(before))
        images = jax.ShapeDtypeStruct((1, *now, len(config["mean"])), np.float32)
        abstract = jax.eval_shape(encoder.init, jax.random.key(0), images)["params"]
        grids = tuple(tuple(side // stride for side in size) for size in (before, now))
        fitted, _ = pretrained.fit({"encoder": params["encoder"]}, {"encoder": abstract}, path, grids)
        params = params | fitted
    return Run(params, config, encoder, folder, now)


def make_run_objective(run: Run) -> Objective:
    """The objective that a run was trained for. Raises CheckpointError for an imported encoder without a head."""
    if run.objective_name == "none":
        raise CheckpointError("an encoder without a head", str(run.folder), "give a run that was fine-tuned or probed")
    options = run.config["objective"]
    return make_objective(encoder=run.encoder, image_size=run.image_size, **run.normalization, **options)


def make_state(run: Run, mesh: jax.sharding.Mesh) -> State:
    """The run's step and parameters, on every device."""
    return State(run.step, jax.device_put(run.params, sharding.replicated(mesh)))


def format_size(size: tuple[int, int]) -> str:
    """A size as text: "224" for a square, as in timm, otherwise "224x192"."""
    return "x".join(map(str, dict.fromkeys(size)))
