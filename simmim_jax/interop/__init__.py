"""Other people's weights, both ways.

The contract. A format is a module with

    recognise(weights) -> encoder               its name if the names in the file are this format's; else None
    describe(encoder, weights) -> Found         options, objective and image size as far as the file tells them
    rules(encoder, objective, prefix, image_size) -> [Rule]
                                                which array of ours is which of theirs: one table, read both ways
and, where we write it too,

    refusal(encoder, objective, image_size)     why the format cannot hold a model, or ""
    exported_objective(encoder, objective)      what of the objective it has a place for
    export_prefix(objective) -> prefix          what the encoder's names begin with

where `encoder` is a module of `simmim_jax.models` (in `recognise` and `describe`, its name), and `objective` a dict
{"name": "simmim", "classify" or "none", options}. A file that has been read is `Weights` (`reading`), what it is is
`Found` (`found`), and how arrays are laid out is in `rules`. Nothing in a file is ever run; see `pickles`.

A new format is one file, and one line in `FORMATS`; they are asked in this order, those with the most telling names
first.
"""

from simmim_jax.errors import CheckpointError
from simmim_jax.interop import huggingface, mae, official, timm
from simmim_jax.interop.found import Found
from simmim_jax.interop.reading import Weights, read_weights
from simmim_jax.interop.rules import Rule, skip, to_ours, to_theirs
from simmim_jax.models.windows import stage_grids, window_and_shift

__all__ = [
    "EXPORTS",
    "FORMATS",
    "Found",
    "Weights",
    "describe",
    "pixels_of",
    "read_weights",
    "rules_of",
    "settle",
    "skip",
    "to_ours",
    "to_theirs",
]

FORMATS = {"huggingface": huggingface, "mae": mae, "official": official, "timm": timm}
EXPORTS = {name: FORMATS[name] for name in ("huggingface", "official", "timm")}
SUPPORTED = (
    "supported are official SimMIM, Swin, Swin V2 and ConvNeXt files; timm's vit, beit, swin, swinv2, convnext and "
    "resnet of bottleneck blocks; Hugging Face folders of ViT, BEiT, Swin and Swinv2; MAE files"
)


def describe(weights: Weights) -> Found:
    """What `weights` are. Raises CheckpointError, with some of the names, if no format knows them."""
    for format in FORMATS.values():
        if encoder := format.recognise(weights):
            try:
                found = format.describe(encoder, weights)
            except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
                raise CheckpointError(
                    f"shapes or fields that no {encoder} has ({type(error).__name__}: {error})",
                    weights.where,
                    SUPPORTED,
                ) from error
            return found._replace(notes=(*weights.notes, *found.notes))
    names = sorted(weights.arrays)
    raise CheckpointError(
        f"unknown weights: {len(names)} arrays with names like {', '.join(names[:3])}", weights.where, SUPPORTED
    )


def pixels_of(weights: Weights) -> dict:
    """mean and std of the images, as far as the files beside the weights tell them."""
    timms = weights.config.get("pretrained_cfg", {})
    told = {
        "mean": weights.pixels.get("image_mean") or timms.get("mean"),
        "std": weights.pixels.get("image_std") or timms.get("std"),
    }
    return {name: tuple(values) for name, values in told.items() if values}


def rules_of(format: str, encoder, objective: dict, prefix: str, image_size: tuple[int, int]) -> list[Rule]:
    """The table of a format for a model."""
    return FORMATS[format].rules(encoder, objective, prefix, image_size)


def settle(found: Found, given: dict, image_size: tuple[int, int] | None, where: str) -> Found:
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
    if found.windows:
        grids = stage_grids(image_size, encoder["patch_size"], len(encoder["depths"]))
        windows = tuple(window_and_shift(grid, encoder["window"], False)[0] for grid in grids)
        if windows != found.windows:
            raise CheckpointError(
                f"windows disagree: {list(found.windows)} by stage in the file; {list(windows)} follow from window "
                f"{encoder['window']} and images of {'x'.join(map(str, image_size))}",
                where, "give the right --encoder.window or --image_size",
            )  # fmt: skip
    return found._replace(encoder=encoder, image_size=tuple(image_size), notes=tuple(notes))
