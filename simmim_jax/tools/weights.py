"""What `convert` does once its command line is read: weights in, weights out.

options, in each function: those that `convert.parse` gives.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
from safetensors.numpy import save_file

from simmim_jax import checkpoint, interop
from simmim_jax.config import IMAGENET_MEAN, IMAGENET_STD
from simmim_jax.errors import CheckpointError, ConfigError, choose
from simmim_jax.interop import huggingface, stablehlo
from simmim_jax.models import ENCODERS, make_encoder
from simmim_jax.objectives import make_objective


def import_weights(options: argparse.Namespace, fields: dict) -> None:
    """Write the weights of `options.source` as a workdir."""
    check_target(options)
    weights = interop.read_weights(options.source)
    skipped = interop.skip(weights.arrays, options.allow)
    weights = weights._replace(arrays={name: x for name, x in weights.arrays.items() if name not in set(skipped)})
    found = interop.describe(weights)
    name = found.encoder["name"]
    encoder_class, sizes = ENCODERS[name]
    check_fields(encoder_class, name, fields)
    found = interop.settle(found, fields, options.image_size, weights.where)

    imagenet = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if found.channels == 3 else {}
    pixels = imagenet | interop.pixels_of(weights)
    pixels |= {n: getattr(options, n) for n in ("mean", "std") if getattr(options, n)}
    for statistic in ("mean", "std"):
        if len(pixels.get(statistic, ())) != found.channels:
            raise ConfigError(
                f"no {statistic} for {found.channels} channel(s)",
                weights.where,
                f"give --{statistic} with so many numbers",
            )

    encoder_config = {"name": name, "size": nearest_size(sizes, found.encoder)}
    encoder_config |= {field: value for field, value in found.encoder.items() if field != "name"}
    encoder, abstract = abstract_model(encoder_config, found.objective, found.image_size, pixels)
    rules = interop.rules_of(found.format, encoder, found.objective, found.prefix, found.image_size)
    params = interop.to_ours(rules, weights.arrays, abstract, weights.where)
    config = {
        "encoder": encoder_config,
        "objective": found.objective,
        "image_size": list(found.image_size),
        **{n: list(values) for n, values in pixels.items()},
        "imported": {"from": str(options.source), "format": found.format, "sha256": weights.sha256},
    }
    with replaced(options) as partial:
        checkpoint.write_params(str(partial), params, json.loads(json.dumps(config)))

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


def check_fields(encoder_class: type, name: str, fields: dict) -> None:
    """Raise ConfigError for a field that the encoder does not have, or a value of another kind than its default."""
    defaults = {f.name: f.default for f in dataclasses.fields(encoder_class) if f.name not in ("parent", "name")}
    for field, value in fields.items():
        default = choose(f"{name} field", field, defaults)
        fits = type(value) is type(default) or (isinstance(default, float) and type(value) is int)
        if not fits:
            raise ConfigError(
                f"--encoder.{field}={value}", "command line", f"give a {type(default).__name__}, like {default!r}"
            )


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
    options = {"block_size": encoder.feature_stride} if objective["name"] == "simmim" else {}
    made = make_objective(encoder=encoder, image_size=image_size, **pixels, **objective, **options)
    return encoder, jax.eval_shape(made.init, jax.random.key(0))


def export_run(options: argparse.Namespace) -> None:
    """Write the newest checkpoint of the run `options.source` in another format."""
    format = options.format or inferred_format(options.target)
    check_target(options)
    params, config = checkpoint.read_params(options.source)
    where = str(options.source)
    if "encoder" not in params or not {"encoder", "image_size", "mean", "std"} <= config.keys():
        raise CheckpointError(
            "no encoder, or no config.json that tells what it is", where, "give the workdir of a run, or a step in it"
        )
    fields = {name: tuple(v) if isinstance(v, list) else v for name, v in config["encoder"].items()}
    encoder = make_encoder(**fields)
    image_size, mean, std = (tuple(config[name]) for name in ("image_size", "mean", "std"))
    objective = exported_objective(config, params, options.allow, where)
    if format == "stablehlo":
        objective = {"name": "none"}
    else:
        if reason := interop.EXPORTS[format].refusal(encoder, objective, image_size):
            raise CheckpointError(f"{format} cannot hold this model: {reason}", where, "choose another --format")
        objective = interop.EXPORTS[format].exported_objective(encoder, objective)
    left_out = sorted(params.keys() - {"encoder"}) if objective["name"] == "none" else []
    params = {name: part for name, part in params.items() if name not in left_out}

    if format == "stablehlo":
        program = stablehlo.serialise(encoder, params["encoder"], image_size=image_size, mean=mean, std=std)
        with replaced(options) as partial:
            partial.write_bytes(program)
        how = "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images)"
    else:
        chosen = interop.EXPORTS[format]
        rules = chosen.rules(encoder, objective, chosen.export_prefix(objective["name"]), image_size)
        arrays = interop.to_theirs(rules, params)
        with replaced(options) as partial:
            if format == "huggingface":
                summary = read_json(checkpoint.find_step(options.source).parent.parent / "summary.json")
                interpolation = config.get("data", {}).get("interpolation", "")
                files = {
                    "config.json": huggingface.config_of(encoder, objective, image_size, len(mean)),
                    "preprocessor_config.json": huggingface.preprocessor_config_of(
                        image_size, mean, std, interpolation
                    ),
                }
                partial.mkdir()
                for name, content in files.items():
                    (partial / name).write_text(json.dumps(content, indent=2) + "\n")
                (partial / "README.md").write_text(
                    huggingface.model_card(encoder, objective, config, summary, left_out)
                )
                save_file(arrays, partial / "model.safetensors", metadata={"format": "pt"})
            else:
                told = {"encoder": fields, "objective": objective, "image_size": image_size, "mean": mean, "std": std}
                metadata = {"format": "pt", "names": format, "made_by": "simmim_jax", "model": json.dumps(told)}
                save_file(arrays, partial, metadata=metadata)
        how = {
            "huggingface": "transformers.AutoModel.from_pretrained(FILE)",
            "timm": "model.load_state_dict(safetensors.torch.load_file(FILE))",
            "official": "model.load_state_dict(safetensors.torch.load_file(FILE), strict=False), as it has no buffers",
        }[format]
    count = sum(x.size for x in jax.tree.leaves(params))
    print(
        f"{format} {config['encoder']['name']} ({objective['name']}): {count:,} parameters, written to {options.target}"
    )
    print_names("left out", left_out)
    print(f"read it with {how.replace('FILE', repr(options.target))}")


def inferred_format(target: str) -> str:
    """The format that TO is plainly of. Raises ConfigError if it is not plain."""
    suffix = Path(target).suffix
    if suffix == ".safetensors":
        raise ConfigError("a state dict under whose names?", target, "give --format=official or --format=timm")
    return {".stablehlo": "stablehlo", ".jax_exported": "stablehlo"}.get(suffix, "huggingface")


def exported_objective(config: dict, params: dict, allow: list[str], where: str) -> dict:
    """The objective whose heads the checkpoint has; "none" if it has none, or `allow` leaves one out."""
    objective = config.get("objective") or {}
    heads = sorted(params.keys() - {"encoder"})
    if not heads or interop.skip(heads, allow):
        return {"name": "none"}
    if objective.get("name") == "simmim":
        return {"name": "simmim"}
    if objective.get("name") == "classify":
        head = params["head"]
        found = {"num_classes": head["logits"]["kernel"].shape[-1], "pool_norm": "norm" in head}
        return {"name": "classify", "block": objective.get("block", 0), **found}
    raise CheckpointError(
        f"heads of an unknown objective {objective.get('name')!r}: {', '.join(heads)}", where,
        f"leave them out with --allow {','.join(heads)}",
    )  # fmt: skip


def read_json(path: Path) -> dict:
    """A JSON object; empty if there is none, or it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def check_target(options: argparse.Namespace) -> None:
    """Refuse a TO that holds anything, unless told to overwrite it, and then what no conversion has written."""
    target = Path(options.target)
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not options.overwrite:
        raise ConfigError("there is something already", options.target, "give another TO, or --overwrite")
    if target.is_dir():
        config = read_json(target / "config.json")
        if "imported" not in config and not ("model_type" in config and (target / "model.safetensors").exists()):
            raise ConfigError(
                "no conversion has written this folder, so --overwrite leaves it", options.target, "give another TO"
            )
        if (target / "metrics.jsonl").exists() or (target / "summary.json").exists():
            raise ConfigError(
                "a run has gone on in this folder, so --overwrite leaves it", options.target, "give another TO"
            )


@contextlib.contextmanager
def replaced(options: argparse.Namespace) -> Iterator[Path]:
    """A path beside TO to write to; what is there takes TO's place when all is written, and is gone if it is not."""
    target = Path(options.target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if target.is_dir():
            target.rename(old)
        try:
            partial.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise CheckpointError(
            f"cannot write: {error.strerror or error}", options.target, "mend the disk or folder, or give another TO"
        ) from error
    finally:
        for path in (partial, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.exists():
                path.unlink()
