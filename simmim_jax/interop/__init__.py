"""Other people's weights, both ways.

The contract. A format is a module with

    recognize(weights) -> encoder               its name if the names in the file are this format's; else None
    detect(encoder, weights) -> WeightSpec         options, objective and image size as far as the file tells them
    rules(encoder, objective, prefix, image_size) -> [Rule]
                                                which array of ours is which of theirs: one table, read both ways
and, where we write it too,

    refusal(encoder, objective, image_size)     why the format cannot hold a model, or ""
    exported_objective(encoder, objective)      what of the objective it has a place for
    export_prefix(objective) -> prefix          what the encoder's names begin with
    export_notes(encoder) -> notes              what whoever reads the file must say, as the file does not

where `encoder` is a module of `simmim_jax.models` (in `recognize` and `describe`, its name), and `objective` a dict
{"name": "simmim", "classify" or "none", options}. A file that has been read is `Weights` (`reading`), what it is is
`WeightSpec` (`found`), and how arrays are laid out is in `rules`. Nothing in a file is ever run; see `pickles`.

A new format is one file, and one line in `FORMATS`; they are asked in this order, those with the most telling names
first.
"""

import dataclasses

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop import backbone, huggingface, mae, official, timm
from simmim_jax.interop.reading import Weights, read_weights
from simmim_jax.interop.rules import Rule, skip, to_ours, to_theirs
from simmim_jax.interop.weight_spec import WeightSpec
from simmim_jax.models import convnext, resnet, swin, swinv2, vit
from simmim_jax.models.windows import stage_windows

__all__ = [
    "EXPORTS",
    "FORMATS",
    "MAX_IMAGE",
    "WeightSpec",
    "Weights",
    "detect",
    "encoder_fields",
    "find_normalization",
    "make_rules",
    "read_weights",
    "resolve",
    "skip",
    "to_ours",
    "to_theirs",
    "why_invalid",
]

CLASSES = {
    "convnext": convnext.ConvNeXt,
    "resnet": resnet.ResNet,
    "swin": swin.Swin,
    "swinv2": swinv2.SwinV2,
    "vit": vit.ViT,
}
MAX_IMAGE = 16384  # pixels of a side
FORMATS = {"huggingface": huggingface, "mae": mae, "official": official, "timm": timm}
EXPORTS = {"backbone": backbone} | {name: FORMATS[name] for name in ("huggingface", "official", "timm")}
SUPPORTED = (
    "supported are official SimMIM, Swin, Swin V2 and ConvNeXt files; timm's vit, beit, swin, swinv2, convnext and "
    "resnet of bottleneck blocks; Hugging Face folders of ViT, BEiT, Swin and Swinv2; MAE files"
)


def detect(weights: Weights) -> WeightSpec:
    """What `weights` are. Raises CheckpointError, with some of the names, if no format knows them."""
    formats = [FORMATS.get(weights.made["names"])] if weights.made else FORMATS.values()
    for format in filter(None, formats):
        if encoder := format.recognize(weights):
            try:
                found = format.detect(encoder, weights)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"shapes or fields that no {encoder} has ({type(error).__name__}: {error})",
                    weights.where,
                    SUPPORTED,
                ) from error
            found = found._replace(notes=(*weights.notes, *found.notes))
            return _as_made(found, weights) if weights.made else found
    names = sorted(weights.arrays)
    raise CheckpointError(
        f"unknown weights: {len(names)} arrays with names like {', '.join(names[:3])}" if names else "no weights",
        weights.where, SUPPORTED,
    )  # fmt: skip


def _as_made(found: WeightSpec, weights: Weights) -> WeightSpec:
    """`found`, of a file of ours, with all that its metadata says in place of what was taken or guessed."""
    made, name = weights.made, found.encoder["name"]
    said = {field: tuple(x) if isinstance(x, list) else x for field, x in made["encoder"].items()}
    defaults = encoder_fields(name)
    fields = {field for field in said.keys() & defaults.keys() if field in found.encoder or field == "norm_momentum"}
    if said.get("name") != name or any(why_invalid(said[field], defaults[field]) for field in fields):
        raise CheckpointError("its metadata is of another model", weights.where, "export it again")
    return found._replace(
        encoder=found.encoder | {field: said[field] for field in sorted(fields)},
        image_size=tuple(made["image_size"]),
        notes=weights.notes,
    )


def encoder_fields(name: str) -> dict:
    """The fields of an encoder and their defaults."""
    return {f.name: f.default for f in dataclasses.fields(CLASSES[name]) if f.name not in ("parent", "name")}


def why_invalid(value, default) -> str:
    """Why `value` cannot be that of a field with this default; empty if it can."""
    if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
        return f"give a {type(default).__name__}, like {default!r}"
    least = 0 if default == () else 1  # Swin V2's windows of pretraining may be 0, which is none
    numbers = value if isinstance(value, tuple) else (value,) if type(value) is int and type(default) is int else ()
    if not all(type(n) is int and least <= n <= MAX_IMAGE for n in numbers):
        return f"give whole numbers from {least} to {MAX_IMAGE}"
    return "give a number from 0 to 1000" if isinstance(default, float) and not 0 <= value <= 1000 else ""  # nor NaN


def find_normalization(weights: Weights, channels: int = 3, names: tuple[str, ...] = ("mean", "std")) -> dict:
    """Those of mean and std of the images that the files beside the weights, or our metadata, tell.

    Raises CheckpointError if they are no numbers that can be those of so many channels.
    """
    timms = weights.config.get("pretrained_cfg")
    timms = timms if isinstance(timms, dict) else {}
    told = {}
    for name in names:
        sources = ((weights.made, name), (weights.pixels, f"image_{name}"), (timms, name))
        for source, key in sources:
            if key in source:
                told[name] = _statistic(name, source[key], channels, weights.where)
                break
    return told


def _statistic(name: str, values, channels: int, where: str) -> tuple[float, ...]:
    values = values if isinstance(values, list | tuple) else [values] * channels
    real = all(type(x) in (int, float) and abs(x) < 1e30 and (name == "mean" or x > 0) for x in values)
    if not real or len(values) != channels:
        raise CheckpointError(
            f"{name} {str(values)[:100]} is not {channels} number(s)" + (" above 0" if name == "std" else ""),
            where, f"give --{name} with so many numbers",
        )  # fmt: skip
    return tuple(map(float, values))


def make_rules(format: str, encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table of a format for a model."""
    return FORMATS[format].rules(encoder, objective, prefix, image_size)


def resolve(found: WeightSpec, given: dict, image_size: tuple[int, int] | None, where: str) -> WeightSpec:
    """`found` with the encoder's fields and the image size that the user gives, which have the last word.

    Raises CheckpointError if something is still unknown, with the options that say it, or if the windows of a Swin in
    the file are not those that it would have.
    """
    encoder, notes = found.encoder | given, list(found.notes)
    image_size = image_size or found.image_size
    if image_size is None and encoder["name"] in ("resnet", "convnext"):
        image_size = (224, 224)
        notes.append("took images of 224 pixels, on which no weight of this model depends: see --image_size")
    unknown = [f"--encoder.{field}=VALUE" for field, value in encoder.items() if value is None]
    unknown += ["--image_size=HEIGHT,WIDTH (like 224,224)"] if image_size is None else []
    if unknown:
        raise CheckpointError("these weights do not tell all that the model needs", where, f"give {', '.join(unknown)}")
    if not all(type(side) is int and 0 < side <= MAX_IMAGE for side in image_size) or len(image_size) != 2:
        raise ConfigError(
            f"image size {str(tuple(image_size))[:100]}", where, f"give two whole numbers from 1 to {MAX_IMAGE}"
        )
    if reason := next((f"{f}={encoder[f]!r}: {why}" for f, why in _misfits(encoder)), ""):
        raise CheckpointError(f"a field that no {encoder['name']} has, {reason}", where, "see --encoder.FIELD")
    if found.windows:
        windows = stage_windows(image_size, encoder["patch_size"], len(encoder["depths"]), encoder["window"])
        if windows != found.windows:
            raise CheckpointError(
                f"windows disagree: {list(found.windows)} by stage in the file; {list(windows)} follow from window "
                f"{encoder['window']} and images of {'x'.join(map(str, image_size))}",
                where, "give the right --encoder.window or --image_size",
            )  # fmt: skip
    if found.format == "timm" and encoder["name"] in ("swin", "swinv2"):
        sizes = tuple(image_size), encoder["patch_size"], encoder["window"], len(encoder["depths"])
        notes += [timm.PADDED] if timm.pads(*sizes) else []
    return found._replace(encoder=encoder, image_size=tuple(image_size), notes=tuple(notes))


def _misfits(encoder: dict):
    defaults = encoder_fields(encoder["name"])
    for field, value in encoder.items():
        if field != "name" and (why := why_invalid(value, defaults[field])):
            yield field, why
