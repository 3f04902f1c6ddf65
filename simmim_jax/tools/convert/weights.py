"""Import: write a file or folder of weights as a workdir. `options` are the result of `convert.parse`."""

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

IMAGENET = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD}


def import_weights(options: argparse.Namespace, fields: dict) -> None:
    """Write the weights of `options.source` as a workdir."""
    check_target(options, "workdir")
    weights = interop.read_weights(options.source, options.key, options.ema)
    weights, skipped = without(weights, options.allow)
    spec = interop.detect(weights)
    name = spec.encoder["name"]
    check_fields(name, fields)
    spec = interop.resolve(spec, fields, options.image_size, weights.where)
    normalization = resolve_normalization(options, weights, spec.channels)

    encoder_config = {"name": name, "size": nearest_size(ENCODERS[name][1], spec.encoder)}
    encoder_config |= {field: value for field, value in spec.encoder.items() if field != "name"}
    encoder, abstract = abstract_model(encoder_config, spec.objective, spec.image_size, normalization)
    rules = interop.make_rules(spec.format, encoder, spec.objective, spec.prefix, spec.image_size)
    params = interop.to_ours(rules, weights.arrays, abstract, weights.where)
    config = {
        "encoder": encoder_config,
        "objective": spec.objective,
        "image_size": list(spec.image_size),
        **{n: list(values) for n, values in normalization.items()},
        **({"pixels": weights.made["pixels"]} if "pixels" in weights.made else {}),
        "imported": {"from": options.source, "key": weights.key, "format": spec.format, "sha256": weights.sha256},
    }
    with replaced(options) as partial:
        try:
            checkpoint.write_params(str(partial), params, json.loads(json.dumps(config)))
        except CheckpointError as error:  # it names the temporary folder, and gives a fix for runs
            raise CheckpointError(error.what, options.target, MAKE_ROOM) from error

    count = sum(x.size for x in jax.tree.leaves(params))
    size = encoder_config["size"]
    print(f"{spec.format} {name} ({spec.objective['name']}), nearest size {size}: {count:,} parameters")
    if weights.key:
        print(f"  weights: those under {weights.key!r} in the file")
    shown = {field: value for field, value in encoder_config.items() if field not in ("name", "size")}
    shown |= {"image_size": spec.image_size, **normalization}
    print("  " + " ".join(f"{field}={value}" for field, value in shown.items()))
    for note in spec.notes:
        print(f"note: {note}")
    print_names("left out by --allow", skipped)
    print_names("left out, not weights", sorted(weights.derived))
    print_next(options.target, spec.image_size)


def print_next(target: str, image_size: tuple[int, int]) -> None:
    """Print the commands that train from the workdir, with its mean and std."""
    size = ",".join(map(str, image_size))
    flags = f"--config.init_from={target} --config.image_size={size} --config.data.path=DIR --workdir runs/NEW"
    print(f"written to {target}; to fine-tune it, or (second line) to continue pretraining:")
    print(f"  python -m simmim_jax.main --config configs/folder_finetune.py --config.objective.num_classes=N {flags}")
    print(f"  python -m simmim_jax.main --config configs/folder_vit_small.py --config.encoder.name= {flags}")


def without(weights: interop.Weights, allow: list[str]) -> tuple[interop.Weights, list[str]]:
    """(weights without the arrays that match a pattern of `allow`, the names of those)."""
    skipped = interop.skip(weights.arrays, allow)
    kept = {name: x for name, x in weights.arrays.items() if name not in set(skipped)}
    if skipped and not kept:
        what = f"--allow {','.join(allow)!r} leaves out all {len(skipped)} arrays"
        raise ConfigError(what, weights.where, "leave out fewer")
    heads = sorted(name for name in kept if name.startswith("decoder."))
    for token in skipped:
        if token.rpartition(".")[2] == "mask_token" and heads:
            what = f"--allow leaves out {token} but not {', '.join(heads[:2])}, which is useless without it"
            raise ConfigError(what, weights.where, f"give --allow '{token},decoder.*', or neither")
    return weights._replace(arrays=kept), skipped


def resolve_normalization(options: argparse.Namespace, weights: interop.Weights, channels: int) -> dict:
    """mean and std: from the command line, else from the files, else ImageNet's for three channels."""
    given = {name: getattr(options, name) for name in IMAGENET if getattr(options, name)}
    found = interop.find_normalization(weights, channels, tuple(name for name in IMAGENET if name not in given))
    normalization = (IMAGENET if channels == 3 else {}) | found | given
    for name in IMAGENET:
        if len(normalization.get(name, ())) != channels:
            fix = f"give --{name} with {channels} number(s)"
            raise ConfigError(f"no {name} for {channels} channel(s)", weights.where, fix)
    return normalization


def print_names(title: str, names: list[str], limit: int = 20) -> None:
    """Print all names; if there are more than `limit`, count them by their last or first part."""
    if not names:
        return
    if len(names) > limit:
        kinds = [name.rpartition(".")[2] for name in names]
        if len(set(kinds)) > limit:
            kinds = [name.partition(".")[0] for name in names]
        names = [f"{kinds.count(kind)} x {kind}" for kind in sorted(set(kinds))]
    print(f"{title}: {', '.join(names)}")


def check_fields(name: str, fields: dict) -> None:
    """Raise ConfigError for a field that the encoder does not have, or an invalid value."""
    defaults = interop.encoder_fields(name)
    for field, value in fields.items():
        if why := interop.why_invalid(value, choose(f"{name} field", field, defaults)):
            raise ConfigError(f"--encoder.{field}={value}", "command line", why)


def nearest_size(sizes: dict[str, dict], fields: dict) -> str:
    """The size with the most equal fields, then with the nearest width."""

    def width(options: dict) -> int:
        return options["width"] if "width" in options else options["widths"][0]

    def distance(size: str) -> tuple:
        options = sizes[size]
        different = sum(fields[field] != value for field, value in options.items())
        return different, abs(width(options) - width(fields))

    return min(sizes, key=distance)


def abstract_model(encoder_config: dict, objective: dict, image_size: tuple[int, int], normalization: dict):
    """(encoder, shapes of all parameters)."""
    encoder = make_encoder(**encoder_config)
    if objective["name"] == "none":
        images = jnp.zeros((1, *image_size, len(normalization["mean"])))
        variables = jax.eval_shape(encoder.init, jax.random.key(0), images)
        return encoder, {"encoder": variables["params"]}
    options = {"mask_patch_size": encoder.feature_stride} if objective["name"] == "simmim" else {}
    made = make_objective(encoder=encoder, image_size=image_size, **normalization, **objective, **options)
    return encoder, jax.eval_shape(made.init, jax.random.key(0))
