"""What `convert` does with a run of ours: its newest weights in another format.

options, in each function: those that `convert.parse` gives.
"""

import argparse
import json
import os
import re
from pathlib import Path

import jax
from safetensors.numpy import save_file

from simmim_jax import interop
from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop import backbone, huggingface, stablehlo
from simmim_jax.interop.reading import MADE_BY, read_json
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.tools.convert.target import check_target, replaced
from simmim_jax.tools.convert.weights import print_names

FOLDERS = ("backbone", "huggingface")  # of transformers
STABLEHLO = (".stablehlo", ".jax_exported")
ENCODERS_ALONE = ("backbone", "stablehlo")
READ_IT_WITH = {
    "backbone": "transformers.CLASS.from_pretrained(FILE)(pixel_values).feature_maps",
    "huggingface": "transformers.AutoModel.from_pretrained(FILE)",
    "official": "model.load_state_dict(safetensors.torch.load_file(FILE), strict=False), as it has no buffers",
    "stablehlo": "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images)",
    "timm": "model.load_state_dict(safetensors.torch.load_file(FILE))",
}


def export_run(options: argparse.Namespace) -> None:
    """Write the newest checkpoint of the run `options.source` in another format."""
    format = options.format or inferred_format(options.target)
    kinds = dict.fromkeys(FOLDERS, "huggingface") | {"stablehlo": "stablehlo"}
    check_target(options, kinds.get(format, "safetensors"))
    run = load_run(options.source)
    where = str(options.source)
    objective, allowed = exported_objective(run, options.allow, where, format)
    notes = ()
    if format != "stablehlo":
        chosen = interop.EXPORTS[format]
        if reason := chosen.refusal(run.encoder, objective, run.image_size):
            raise CheckpointError(f"{format} cannot hold this model: {reason}", where, "choose another --format")
        objective, notes = chosen.exported_objective(run.encoder, objective), chosen.export_notes(run.encoder)
        notes += huggingface.squashed(run.image_size) if format in FOLDERS else ()
    left_out = sorted(run.params.keys() - {"encoder"}) if objective["name"] == "none" else []
    no_place = [] if allowed else left_out  # a model without one of its heads is a bare encoder
    run = run._replace(params={name: part for name, part in run.params.items() if name not in left_out})

    with replaced(options) as partial:
        if format == "stablehlo":
            program = stablehlo.serialize(
                run.encoder, run.params["encoder"], image_size=run.image_size, **run.normalization
            )
            partial.write_bytes(program)
        elif format in FOLDERS:
            allowed_out = left_out if allowed else []
            write_folder(partial, run, objective, format, no_place=no_place, allowed=allowed_out, notes=notes)
        else:
            write_state_dict(partial, run, objective, format)

    count = sum(x.size for x in jax.tree.leaves(run.params))
    name = run.config["encoder"]["name"]
    print(f"{format} {name} ({objective['name']}): {count:,} parameters, written to {options.target}")
    for note in notes:
        print(f"note: {note}")
    print_names("left out, as --allow says", left_out if allowed else [])
    print_names(f"left out, as {format} has no place for it", no_place)
    read_it = READ_IT_WITH[format].replace("FILE", repr(options.target))
    if format == "backbone":
        read_it = read_it.replace("CLASS", backbone.CLASSES[backbone.backbone_type(run.encoder)])
    print(f"read it with {read_it}")


def write_state_dict(path: Path, run: Run, objective: dict, format: str) -> None:
    """Safetensors under the names of timm or the official code, and in the metadata all that the names do not tell."""
    told = {
        "encoder": {"name": run.config["encoder"]["name"], **run.encoder.options()},
        "objective": objective,
        "image_size": run.image_size,
        **run.normalization,
    }
    metadata = {"format": "pt", "names": format, "made_by": MADE_BY, "model": json.dumps(told)}
    save_file(exported_arrays(run, objective, format), path, metadata=metadata)


def write_folder(
    path: Path, run: Run, objective: dict, format: str, *, no_place: list[str], allowed: list[str],
    notes: tuple[str, ...],
) -> None:  # fmt: skip
    """A folder of transformers, with a card of what the run's own files say."""
    if format == "backbone":
        config = backbone.make_config(run.encoder, run.image_size, run.channels)
    else:
        config = huggingface.make_config(run.encoder, objective, run.image_size, run.channels)
    files = {
        "config.json": config,
        "preprocessor_config.json": huggingface.make_preprocessor_config(
            run.image_size, **run.normalization, interpolation=run.interpolation, crop_fraction=run.crop_fraction
        ),
    }
    card = huggingface.model_card(
        run.encoder,
        objective,
        run.config,
        step=int(run.folder.name) if run.folder.name.isdigit() else None,
        summary=read_json(run.folder.parent.parent / "summary.json"),
        no_place=no_place,
        allowed=allowed,
        notes=notes,
    )
    path.mkdir()
    for name, content in files.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    (path / "README.md").write_text(card)
    metadata = {"format": "pt", "made_by": MADE_BY}
    save_file(exported_arrays(run, objective, format), path / "model.safetensors", metadata=metadata)


def exported_arrays(run: Run, objective: dict, format: str) -> dict:
    """The run's arrays under their names."""
    chosen = interop.EXPORTS[format]
    rules = chosen.rules(run.encoder, objective, chosen.export_prefix(objective["name"]), run.image_size)
    return interop.to_theirs(rules, run.params)


def inferred_format(target: str) -> str:
    """The format that TO is plainly of. Raises ConfigError if it is not plain, or TO is a file of none."""
    suffix = Path(target).suffix
    if suffix in STABLEHLO:
        return "stablehlo"
    if suffix == ".safetensors":
        raise ConfigError("a state dict under whose names?", target, "give --format=official or --format=timm")
    if re.fullmatch(r"\.[A-Za-z]\w*", suffix) and not os.path.isdir(target):
        fix = "give FILE.safetensors (of official and timm), FILE.stablehlo, or --format=huggingface for such a folder"
        raise ConfigError(f"no format has files that end in {suffix}", target, fix)
    return "huggingface"


def exported_objective(run: Run, allow: list[str], where: str, format: str) -> tuple[dict, list[str]]:
    """(the objective whose heads the checkpoint has, the heads that `allow` leaves out).

    It is "none" if there are no heads, the format has none, or `allow` leaves one out. Raises CheckpointError for a
    pattern that fits none, and heads that no other format has.
    """
    objective = run.config.get("objective") or {}
    heads = sorted(run.params.keys() - {"encoder"})
    if not heads and allow:
        raise CheckpointError(
            f"--allow {','.join(allow)!r} fits nothing: the run has an encoder and no heads", where, "leave it out"
        )
    allowed = interop.skip(heads, allow)
    if not heads or allowed or format in ENCODERS_ALONE:
        return {"name": "none"}, allowed
    if objective.get("name") == "simmim":
        return {"name": "simmim"}, []
    if objective.get("name") == "classify":
        head = run.params["head"]
        found = {"num_classes": head["logits"]["kernel"].shape[-1], "fc_norm": "norm" in head}
        pool = {"pool": objective["pool"]} if objective.get("pool", "patches") != "patches" else {}
        return {"name": "classify", "block": objective.get("block", 0), **found, **pool}, []
    raise CheckpointError(
        f"{format} has no place for the heads of objective {objective.get('name')!r}: {', '.join(heads)}", where,
        f"leave them out with --allow {','.join(heads)}",
    )  # fmt: skip
