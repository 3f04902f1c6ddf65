"""Weights of other projects: import and export.

A format is a module with these functions:

    recognize(weights) -> encoder               its name, if the names in the file belong to the format, or None
    detect(encoder, weights) -> WeightSpec      options, objective and image size, as far as the file determines them
    rules(encoder, objective, prefix, image_size) -> [Rule]
                                                names and layouts, in one table for both directions

and, for formats that we also write:

    refusal(encoder, objective, image_size)     why the format cannot hold the model, or ""
    exported_objective(encoder, objective)      the part of the objective that the format has a place for
    export_prefix(objective) -> prefix          prefix of the encoder's names
    export_notes(encoder) -> notes              what a reader needs to know, in addition to the file

`encoder` is a module of `simmim_jax.models`; in `recognize` and `detect` it is its name. `objective` is a dict
{"name": "simmim", "classify" or "none", options}. `reading` reads a file into `Weights`, `weight_spec` holds
`WeightSpec`, and `rules` defines the layouts. Nothing in a file is run; see `pickles`.

A new format is one file and one line in `FORMATS`. Formats are asked in this order, so that those with the most
specific names come first.
"""

import dataclasses

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop import backbone, huggingface, mae, official, timm
from simmim_jax.interop.reading import Weights, read_weights
from simmim_jax.interop.rules import Rule, skip, to_ours, to_theirs
from simmim_jax.interop.weight_spec import WeightSpec
from simmim_jax.models import ENCODERS
from simmim_jax.models.windows import stage_windows

__all__ = [
    "EXPORTS",
    "FORMATS",
    "MAX_IMAGE",
    "WeightSpec",
    "Weights",
    "describe",
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

MAX_IMAGE = 16384  # pixels per side
FORMATS = {"huggingface": huggingface, "mae": mae, "official": official, "timm": timm}
EXPORTS = {"backbone": backbone} | {name: FORMATS[name] for name in ("huggingface", "official", "timm")}
SUPPORTED = (
    "supported are official SimMIM, Swin, Swin V2 and ConvNeXt files; timm's vit, beit, swin, swinv2, convnext and "
    "resnet with bottleneck blocks; Hugging Face folders of ViT, BEiT, Swin and Swinv2; MAE files"
)


def detect(weights: Weights) -> WeightSpec:
    """The model in `weights`. Raises CheckpointError if no format recognizes the names."""
    formats = [FORMATS.get(weights.made["names"])] if weights.made else FORMATS.values()
    for format in filter(None, formats):
        if encoder := format.recognize(weights):
            try:
                spec = format.detect(encoder, weights)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                what = f"shapes or fields that no {encoder} has ({type(error).__name__}: {error})"
                raise CheckpointError(what, weights.where, SUPPORTED) from error
            spec = spec._replace(notes=(*weights.notes, *spec.notes))
            return _with_metadata(spec, weights) if weights.made else spec
    names = sorted(weights.arrays)
    what = f"unknown weights: {len(names)} arrays with names like {', '.join(names[:3])}" if names else "no weights"
    raise CheckpointError(what, weights.where, SUPPORTED)


describe = detect  # its earlier name, which scripts of users have


def _with_metadata(spec: WeightSpec, weights: Weights) -> WeightSpec:
    """`spec` with the fields that our own export wrote into the metadata."""
    made, name = weights.made, spec.encoder["name"]
    saved = {field: tuple(x) if isinstance(x, list) else x for field, x in made["encoder"].items()}
    defaults = encoder_fields(name)
    fields = {field for field in saved.keys() & defaults.keys() if field in spec.encoder or field == "norm_momentum"}
    if saved.get("name") != name or any(why_invalid(saved[field], defaults[field]) for field in fields):
        raise CheckpointError("its metadata describe another model", weights.where, "export it again")
    return spec._replace(
        encoder=spec.encoder | {field: saved[field] for field in sorted(fields)},
        image_size=tuple(made["image_size"]),
        notes=weights.notes,
    )


def encoder_fields(name: str) -> dict:
    """The fields of an encoder and their defaults."""
    return {f.name: f.default for f in dataclasses.fields(ENCODERS[name][0]) if f.name not in ("parent", "name")}


def why_invalid(value, default) -> str:
    """How to fix `value`, if a field with this default cannot have it; else ""."""
    if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
        return f"give a {type(default).__name__}, like {default!r}"
    minimum = 0 if default in ((), 0) else 1  # Swin V2's pretrained_windows and a ViT's registers may be 0: none
    numbers = value if isinstance(value, tuple) else (value,) if type(value) is int and type(default) is int else ()
    if not all(type(n) is int and minimum <= n <= MAX_IMAGE for n in numbers):
        return f"give whole numbers from {minimum} to {MAX_IMAGE}"
    return "give a number from 0 to 1000" if isinstance(default, float) and not 0 <= value <= 1000 else ""  # nor NaN


def find_normalization(weights: Weights, channels: int = 3, names: tuple[str, ...] = ("mean", "std")) -> dict:
    """The mean and std of the images, from our metadata or the files next to the weights; without those not found.

    Raises CheckpointError for values that are not one number per channel.
    """
    timm_config = weights.config.get("pretrained_cfg")
    timm_config = timm_config if isinstance(timm_config, dict) else {}
    found = {}
    for name in names:
        sources = ((weights.made, name), (weights.preprocessor, f"image_{name}"), (timm_config, name))
        values = next((source[key] for source, key in sources if key in source), found)
        if values is not found:
            found[name] = _per_channel(name, values, channels, weights.where)
    return found


def _per_channel(name: str, values, channels: int, where: str) -> tuple[float, ...]:
    values = values if isinstance(values, list | tuple) else [values] * channels
    is_valid = all(type(x) in (int, float) and abs(x) < 1e30 and (name == "mean" or x > 0) for x in values)
    if not is_valid or len(values) != channels:
        what = f"{name} {str(values)[:100]} is not {channels} number(s)" + (" above 0" if name == "std" else "")
        raise CheckpointError(what, where, f"give --{name} with {channels} number(s)")
    return tuple(map(float, values))


def make_rules(format: str, encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table of a format for a model."""
    return FORMATS[format].rules(encoder, objective, prefix, image_size)


def resolve(spec: WeightSpec, given: dict, image_size: tuple[int, int] | None, where: str) -> WeightSpec:
    """`spec` completed and overridden by the encoder fields and the image size that the user gives.

    Raises CheckpointError, with the options to give, if something is still unknown, or if the windows of a Swin differ
    from those in the file.
    """
    encoder, notes = spec.encoder | given, list(spec.notes)
    image_size = image_size or spec.image_size
    if image_size is None and encoder["name"] in ("resnet", "convnext"):
        image_size = (224, 224)
        notes.append("assumed images of 224 pixels, on which no weight of this model depends: see --image_size")
    unknown = [f"--encoder.{field}=VALUE" for field, value in encoder.items() if value is None]
    unknown += ["--image_size=HEIGHT,WIDTH (like 224,224)"] if image_size is None else []
    if unknown:
        what = "these weights do not determine all that the model needs"
        raise CheckpointError(what, where, f"give {', '.join(unknown)}")
    if not all(type(side) is int and 0 < side <= MAX_IMAGE for side in image_size) or len(image_size) != 2:
        fix = f"give two whole numbers from 1 to {MAX_IMAGE}"
        raise ConfigError(f"image size {str(tuple(image_size))[:100]}", where, fix)
    defaults = encoder_fields(encoder["name"])
    for field, value in encoder.items():
        if field != "name" and (why := why_invalid(value, defaults[field])):
            what = f"a field that no {encoder['name']} has, {field}={value!r}: {why}"
            raise CheckpointError(what, where, "see --encoder.FIELD")
    if spec.windows:
        _check_windows(spec.windows, encoder, image_size, where)
    if spec.format == "timm" and encoder["name"] in ("swin", "swinv2"):
        sizes = tuple(image_size), encoder["patch_size"], encoder["window"], len(encoder["depths"])
        notes += [timm.PADDED] if timm.pads(*sizes) else []
    return spec._replace(encoder=encoder, image_size=tuple(image_size), notes=tuple(notes))


def _check_windows(saved: tuple[int, ...], encoder: dict, image_size: tuple[int, int], where: str) -> None:
    windows = stage_windows(image_size, encoder["patch_size"], len(encoder["depths"]), encoder["window"])
    if windows != saved:
        size = "x".join(map(str, image_size))
        what = (
            f"windows disagree: {list(saved)} by stage in the file; {list(windows)} by stage for window "
            f"{encoder['window']} and images of {size}"
        )
        raise CheckpointError(what, where, "give the right --encoder.window or --image_size")
