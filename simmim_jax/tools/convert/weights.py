"""What `convert` does with other people's weights: a workdir of them.

options: those that `convert.parse` gives.
"""

import argparse
import json

import jax
import jax.numpy as jnp

from simmim_jax import interop
from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD
from simmim_jax.errors import CheckpointError, ConfigError, choose
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.objectives import make_objective
from simmim_jax.runs import checkpoint
from simmim_jax.tools.convert.target import MAKE_ROOM, check_target, replaced


def import_weights(options: argparse.Namespace, fields: dict) -> None:
    """Write the weights of `options.source` as a workdir."""
    check_target(options, "workdir")
    weights = interop.read_weights(options.source)
    weights, skipped = without(weights, options.allow)
    found = interop.detect(weights)
    name = found.encoder["name"]
    check_fields(name, fields)
    found = interop.resolve(found, fields, options.image_size, weights.where)
    pixels = resolve_normalization(options, weights, found.channels)

    encoder_config = {"name": name, "size": nearest_size(ENCODERS[name][1], found.encoder)}
    encoder_config |= {field: value for field, value in found.encoder.items() if field != "name"}
    encoder, abstract = abstract_model(encoder_config, found.objective, found.image_size, pixels)
    rules = interop.make_rules(found.format, encoder, found.objective, found.prefix, found.image_size)
    params = interop.to_ours(rules, weights.arrays, abstract, weights.where)
    config = {
        "encoder": encoder_config,
        "objective": found.objective,
        "image_size": list(found.image_size),
        **{n: list(values) for n, values in pixels.items()},
        "imported": {"from": str(options.source), "format": found.format, "sha256": weights.sha256},
    }
    with replaced(options) as partial:
        try:
            checkpoint.write_params(str(partial), params, json.loads(json.dumps(config)))
        except CheckpointError as error:  # it names the folder beside TO, and the checkpoints of a run
            raise CheckpointError(error.what, options.target, MAKE_ROOM) from error

    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{found.format} {name} ({found.objective['name']}), nearest size {encoder_config['size']}: "
          f"{count:,} parameters")  # fmt: skip
    told = {field: value for field, value in encoder_config.items() if field not in ("name", "size")}
    told |= {"image_size": found.image_size, **pixels}
    print("  " + " ".join(f"{field}={value}" for field, value in told.items()))
    for note in found.notes:
        print(f"note: {note}")
    print_names("skipped, as --allow says", skipped)
    print_names("not weights, left out", sorted(weights.derived))
    print(f"written to {options.target}; to fine-tune it, or (second line) to pretrain it further:")
    size = ",".join(map(str, found.image_size))
    of_it = f"--config.init_from={options.target} --config.image_size={size} --config.data.path=DIR --workdir runs/NEW"
    if pixels != {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}:
        statistics = (f"--config.{name}={','.join(map(str, values))}," for name, values in pixels.items())
        of_it = f"{' '.join(statistics)} {of_it}"
    print(f"  python -m simmim_jax.main --config configs/folder_finetune.py --config.objective.num_classes=N {of_it}")
    print(f"  python -m simmim_jax.main --config configs/folder_vit_small.py --config.encoder.name= {of_it}")


def without(weights: interop.Weights, allow: list[str]) -> tuple[interop.Weights, list[str]]:
    """(weights without those that a pattern of `allow` fits, their names)."""
    skipped = interop.skip(weights.arrays, allow)
    kept = {name: x for name, x in weights.arrays.items() if name not in set(skipped)}
    if skipped and not kept:
        raise ConfigError(
            f"--allow {','.join(allow)!r} leaves out all {len(skipped)} arrays", weights.where, "leave out fewer"
        )
    for token in skipped:
        heads = [name for name in kept if name.startswith("decoder.")]
        if token.rpartition(".")[2] == "mask_token" and heads:
            raise ConfigError(
                f"--allow leaves out {token}, and not {', '.join(sorted(heads)[:2])}, which is of no use without it",
                weights.where, f"give --allow '{token},decoder.*', or neither",
            )  # fmt: skip
    return weights._replace(arrays=kept), skipped


def resolve_normalization(options: argparse.Namespace, weights: interop.Weights, channels: int) -> dict:
    """mean and std: the user's, else the files', else ImageNet's for three channels."""
    given = {name: getattr(options, name) for name in ("mean", "std") if getattr(options, name)}
    imagenet = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if channels == 3 else {}
    told = interop.find_normalization(weights, channels, tuple(name for name in ("mean", "std") if name not in given))
    pixels = imagenet | told | given
    for name in ("mean", "std"):
        if len(pixels.get(name, ())) != channels:
            raise ConfigError(
                f"no {name} for {channels} channel(s)", weights.where, f"give --{name} with so many numbers"
            )
    return pixels


def print_names(what: str, names: list[str], most: int = 20) -> None:
    """Every name of a few; of many, how many end alike."""
    if not names:
        return
    if len(names) > most:
        kinds = [name.rpartition(".")[2] for name in names]
        if len(set(kinds)) > most:
            kinds = [name.partition(".")[0] for name in names]
        names = [f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))]
    print(f"{what}: {', '.join(names)}")


def check_fields(name: str, fields: dict) -> None:
    """Raise ConfigError for a field that the encoder does not have, or a value that it cannot have."""
    defaults = interop.encoder_fields(name)
    for field, value in fields.items():
        if why := interop.why_invalid(value, choose(f"{name} field", field, defaults)):
            raise ConfigError(f"--encoder.{field}={value}", "command line", why)


def nearest_size(sizes: dict[str, dict], fields: dict) -> str:
    """The size with the most fields in common, then the nearest width."""

    def distance(size: str) -> tuple:
        numbers = sizes[size]
        width = numbers["width"] if "width" in numbers else numbers["widths"][0]
        ours = fields["width"] if "width" in fields else fields["widths"][0]
        return sum(fields[field] != value for field, value in numbers.items()), abs(width - ours)

    return min(sizes, key=distance)


def abstract_model(encoder_config: dict, objective: dict, image_size: tuple[int, int], pixels: dict):
    """(encoder, shapes of all parameters) of a model."""
    encoder = make_encoder(**encoder_config)
    if objective["name"] == "none":
        images = jnp.zeros((1, *image_size, len(pixels["mean"])))
        variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
        return encoder, {"encoder": variables["params"]}
    options = {"mask_patch_size": encoder.feature_stride} if objective["name"] == "simmim" else {}
    made = make_objective(encoder=encoder, image_size=image_size, **pixels, **objective, **options)
    return encoder, jax.eval_shape(made.init, jax.random.key(0))
