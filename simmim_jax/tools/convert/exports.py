"""Export: write the newest weights of a run in another format. `options` are the result of `convert.parse`."""

import argparse
import json
import os
import re
from pathlib import Path
from typing import NamedTuple

import jax
from safetensors.numpy import save_file

from simmim_jax import interop
from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.files import utf8_name
from simmim_jax.interop import backbone, folder, official, stablehlo
from simmim_jax.interop.reading import MADE_BY, read_json
from simmim_jax.runs.finished import Run, load_run
from simmim_jax.tools.convert.target import check_target, replaced
from simmim_jax.tools.convert.weights import print_names

FOLDERS = ("backbone", "huggingface")  # formats that are folders for transformers
ENCODER_ONLY = ("backbone", "stablehlo")  # formats without heads
STABLEHLO = (".stablehlo", ".jax_exported")
EPSILON = "norm_epsilon"  # in --allow: export a model whose epsilon differs from that of the format's models
CONTENTS = {"none": "encoder only"}  # by the objective of an export
READ_WITH = {
    "backbone": "transformers.CLASS.from_pretrained(FILE)(pixel_values).feature_maps",
    "huggingface": "transformers.AutoModel.from_pretrained(FILE)",
    "official": "model.load_state_dict(safetensors.torch.load_file(FILE), strict=False); it has no buffers",
    "stablehlo": "jax.export.deserialize(bytearray(open(FILE, 'rb').read())).call(images)",
    "timm": "model.load_state_dict(safetensors.torch.load_file(FILE))",
}


class Export(NamedTuple):
    """What is written. run: without the heads that are left out.

    unsupported, allowed: heads left out because the format has no place for them, and because of --allow.
    """

    run: Run
    format: str
    objective: dict
    unsupported: list[str]
    allowed: list[str]
    notes: tuple[str, ...]


def export_run(options: argparse.Namespace) -> None:
    """Write the newest checkpoint of the run `options.source` in another format."""
    format = options.format or infer_format(options.target)
    kinds = dict.fromkeys(FOLDERS, "huggingface") | {"stablehlo": "stablehlo"}
    check_target(options, kinds.get(format, "safetensors"))
    export = make_export(load_run(options.source), format, options.allow, str(options.source))
    run = export.run
    with replaced(options) as partial:
        if format == "stablehlo":
            params = run.params["encoder"]
            program = stablehlo.serialize(run.encoder, params, image_size=run.image_size, **run.normalization)
            partial.write_bytes(program)
        elif format in FOLDERS:
            write_folder(partial, export)
        else:
            write_state_dict(partial, export)

    count = sum(x.size for x in jax.tree.leaves(run.params))
    name = run.config["encoder"]["name"]
    kind = CONTENTS.get(export.objective["name"], export.objective["name"])
    print(f"{format} {name} ({kind}): {count:,} parameters, written to {options.target}")
    for note in export.notes:
        print(f"note: {note}")
    print_names("left out by --allow", export.allowed)
    print_names(f"left out, {format} has no place for it", export.unsupported)
    read_with = READ_WITH[format].replace("FILE", repr(options.target))
    if export.objective["name"] == "classify":
        read_with = read_with.replace("AutoModel.", "AutoModelForImageClassification.")
    if format == "backbone":
        read_with = read_with.replace("CLASS", backbone.CLASSES[backbone.backbone_type(run.encoder)])
    print(f"read it with {read_with}")


def make_export(run: Run, format: str, allow: list[str], where: str) -> Export:
    """What to write. Raises CheckpointError if the format cannot hold the model."""
    encoder, notes = run.encoder, ()
    if EPSILON in allow and format in ("official", "timm") and official.norm_refusal(encoder):
        allow = [pattern for pattern in allow if pattern != EPSILON]
        encoder = encoder.clone(norm_epsilon=official.EPSILONS[type(encoder).__name__])
    objective, allowed = exported_objective(run, allow, where, format)
    if format != "stablehlo":
        module = interop.EXPORTS[format]
        if reason := module.refusal(encoder, objective, run.image_size):
            what, fix = reason, ""
            if official.WITHOUT_HEAD in reason:
                what, _, fix = reason.rpartition("; ")
            others = [
                f"give --format={name}" for name, other in interop.EXPORTS.items()
                if name not in (format, *ENCODER_ONLY) and not other.refusal(encoder, objective, run.image_size)
            ]  # fmt: skip
            fix = " or ".join(others) or fix or "give --format=stablehlo, which holds any encoder, without its head"
            raise CheckpointError(f"{format} cannot hold this model: {what}", where, fix)
        objective, notes = module.exported_objective(run.encoder, objective), module.export_notes(run.encoder)
        notes += (official.epsilon_note(run.encoder, objective),) if encoder is not run.encoder else ()
        notes += folder.squash_note(run.image_size) if format in FOLDERS else ()
        if run.pixels.value_range:
            notes += (
                f"before this model, scale images to 0..1 by their value range and clip them: {run.pixels.scale}",
            )
    left_out = sorted(run.params.keys() - {"encoder"}) if objective["name"] == "none" else []
    run = run._replace(params={name: part for name, part in run.params.items() if name not in left_out})
    if allowed:  # a model without one of its heads is exported as an encoder
        return Export(run, format, objective, [], left_out, notes)
    return Export(run, format, objective, left_out, [], notes)


def write_state_dict(path: Path, export: Export) -> None:
    """Safetensors with the names of timm or the official code. The metadata hold the fields that names do not."""
    run = export.run
    model = {
        "encoder": {"name": run.config["encoder"]["name"], **run.encoder.options()},
        "objective": export.objective,
        "image_size": run.image_size,
        **run.pixels.as_record(),
    }
    metadata = {"format": "pt", "names": export.format, "made_by": MADE_BY, "model": json.dumps(model)}
    save_file(exported_arrays(export), path, metadata=metadata)


def write_folder(path: Path, export: Export) -> None:
    """A folder for transformers, with a model card made from the run's own files."""
    run = export.run
    if export.format == "backbone":
        config = backbone.make_config(run.encoder, run.image_size, run.channels)
    else:
        config = folder.make_config(run.encoder, export.objective, run.image_size, run.channels)
        names = [utf8_name(name) for name in run.config.get("classes") or ()]
        if "id2label" in config and len(names) == len(config["id2label"]):
            config["id2label"] = {str(n): name for n, name in enumerate(names)}
            config["label2id"] = {name: n for n, name in enumerate(names)}
    pixels = run.pixels
    preprocessor = folder.make_preprocessor_config(
        run.image_size, pixels.mean, pixels.std, interpolation=run.interpolation, crop_fraction=run.crop_fraction
    ) | ({"do_rescale": False, "do_convert_rgb": False} if pixels.value_range else {})
    card = folder.model_card(
        type(run.encoder).__name__,
        export.objective,
        run.config,
        step=int(run.folder.name) if run.folder.name.isdigit() else None,
        summary=read_json(run.folder.parent.parent / "summary.json"),
        left_out={"this format has no place for": export.unsupported, "the user left out": export.allowed},
        notes=export.notes,
    )
    path.mkdir()
    for name, content in {"config.json": config, "preprocessor_config.json": preprocessor}.items():
        (path / name).write_text(json.dumps(content, indent=2) + "\n")
    (path / "README.md").write_text(card)
    save_file(exported_arrays(export), path / "model.safetensors", metadata={"format": "pt", "made_by": MADE_BY})


def exported_arrays(export: Export) -> dict:
    """The run's arrays with the names and layouts of the format."""
    run, module = export.run, interop.EXPORTS[export.format]
    prefix = module.export_prefix(export.objective["name"])
    return interop.to_theirs(module.rules(run.encoder, export.objective, prefix, run.image_size), run.params)


def infer_format(target: str) -> str:
    """The format for a TO with this ending. Raises ConfigError if several formats have it, or none."""
    suffix = Path(target).suffix
    if suffix in STABLEHLO:
        return "stablehlo"
    if suffix == ".safetensors":
        raise ConfigError("two formats have such files", target, "give --format=official or --format=timm")
    if re.fullmatch(r"\.[A-Za-z]\w*", suffix) and not os.path.isdir(target):
        fix = "give FILE.safetensors (official and timm), FILE.stablehlo, or --format=huggingface for a folder"
        raise ConfigError(f"no format has files that end in {suffix}", target, fix)
    return "huggingface"


def exported_objective(run: Run, allow: list[str], where: str, format: str) -> tuple[dict, list[str]]:
    """(the objective whose heads to export, the heads that `allow` leaves out).

    The objective is "none" if there are no heads, the format has none, or `allow` leaves one out. Raises
    CheckpointError for a pattern that matches nothing, and for heads that no format can hold.
    """
    objective = run.config.get("objective") or {}
    heads = sorted(run.params.keys() - {"encoder"})
    if not heads and allow:
        what = f"--allow {','.join(allow)!r} matches nothing: the run has an encoder and no heads"
        raise CheckpointError(what, where, "leave it out")
    allowed = interop.skip(heads, allow)
    if not heads or allowed or format in ENCODER_ONLY:
        return {"name": "none"}, allowed
    if objective.get("name") == "simmim":
        return {"name": "simmim"}, []
    if objective.get("name") == "classify":
        head = run.params["head"]
        shape = {"num_classes": head["logits"]["kernel"].shape[-1], "fc_norm": "norm" in head}
        pool = {"pool": objective["pool"]} if objective.get("pool", "patches") != "patches" else {}
        return {"name": "classify", "block": objective.get("block", 0), **shape, **pool}, []
    what = f"{format} has no place for the heads of objective {objective.get('name')!r}: {', '.join(heads)}"
    raise CheckpointError(what, where, f"leave them out with --allow {','.join(heads)}")
