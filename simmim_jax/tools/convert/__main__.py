"""python -m simmim_jax.tools.convert FROM TO [options]

Import weights of other projects as a workdir for `init_from`, or export a run to their formats.
"""

import argparse
import ast
import math
import os
from pathlib import Path

from simmim_jax.errors import CheckpointError, ConfigError, Parser, choose
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  import an official file, to continue pretraining, fine-tune or evaluate:
    python -m simmim_jax.tools.convert simmim_pretrain__swin_base__img192_window6__800ep.pth runs/swin_b
  import a timm state dict without its classifier; it does not hold the image size:
    python -m simmim_jax.tools.convert swin_tiny.safetensors runs/swin_t --image-size=224 --allow 'head.*'
  import the encoder of a MAE:
    python -m simmim_jax.tools.convert mae_pretrain_vit_base_full.pth runs/mae --allow 'decoder_*,mask_token'
  export a run to transformers (for AutoModel.from_pretrained), to timm, or to a program that needs none of our code:
    python -m simmim_jax.tools.convert runs/mine exported/mine
    python -m simmim_jax.tools.convert runs/mine mine.safetensors --format=timm
    python -m simmim_jax.tools.convert runs/mine mine.stablehlo
  export a backbone for the detectors and segmenters of transformers, with a feature map per stage:
    python -m simmim_jax.tools.convert runs/mine exported/pyramid --format=backbone
"""
FORMATS = ("backbone", "huggingface", "official", "stablehlo", "timm")


def make_parser() -> Parser:
    description = "Import weights of official files, timm, Hugging Face and MAE; export runs to these and StableHLO."
    parser = cli.make_parser("convert", description, EXAMPLES)
    add, path = parser.add_argument, os.path.expanduser
    add("source", type=path, metavar="FROM", help="a workdir or step folder to export; anything else is imported")
    add("target", type=path, metavar="TO", help="the workdir to make, or the file or folder to export to")
    add("--format", help=f"export format: {', '.join(FORMATS)} (default: by TO's ending; huggingface for a folder)")
    add("--encoder.FIELD", metavar="VALUE", dest="_", help="an encoder field that is not in the weights, or is wrong")
    cli.add_image_size(parser, "if the weights do not determine it")
    add("--mean", type=cli.numbers(float, -math.inf), metavar="R,G,B", help="of training images (default: ImageNet's)")
    add("--std", type=cli.numbers(float, 0, strict=True), metavar="R,G,B", help="the same")
    meaning = "names of arrays to leave out, with * and ?; comma-separated or repeated. In an export: head, mask_token "
    meaning += "or norm_epsilon to export a model with another epsilon than the models of the format"
    add("--allow", metavar="PATTERN", action="append", default=[], help=meaning)
    add("--key", default="", metavar="NAME", help="import the weights under this key of the file, like model_ema")
    help = "import the moving average, or not, if the file has both (default: for classifiers, as timm does)"
    add("--ema", action=argparse.BooleanOptionalAction, help=help)
    cli.add_overwrite(parser)
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """(options, encoder fields). Raises ConfigError for anything unknown, with the nearest name."""
    fields, rest = {}, []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--encoder."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--encoder.").partition("=")
        fields[name] = parse_value(value if equals else next(arguments, ""))
    options = cli.parse_known(make_parser(), rest)
    if options.format:
        choose("format", options.format, set(FORMATS))
    options.allow = [pattern for given in options.allow for pattern in given.split(",") if pattern]
    return options, fields


def parse_value(text: str):
    """The number, bool or tuple that `text` is in Python, or `text` itself."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def is_ours(path: Path) -> bool:
    """Whether `path` is a workdir, a `checkpoints` folder or a step folder of simmim_jax."""
    return any((path / name).is_dir() for name in ("checkpoints", "params")) or any(
        (child / "params").is_dir() for child in path.glob("[0-9]*")
    )


def run(argv: list[str]) -> None:
    """Import or export, depending on FROM."""
    options, fields = parse(argv)
    is_export = is_ours(Path(options.source))
    if is_export:
        names = ("image_size", "mean", "std", "key", "ema")
        given = [f"--{name.replace('_', '-')}" for name in names if getattr(options, name) not in (None, "")]
        given += [f"--encoder.{name}" for name in fields]
        if given:
            fix = "leave it out: it is for imports, and the run's own files have it"
            raise ConfigError(f"{given[0]} in an export", "command line", fix)
    elif options.format:
        what = f"--format in an import: {options.source} is not a run of simmim_jax"
        raise ConfigError(what, "command line", "leave it out")
    # These import JAX; help and mistakes on the command line do not need it.
    from simmim_jax.tools.convert import exports, weights

    memory_fix = "run it on a machine with more, or give a smaller model"
    with cli.translate_errors(CheckpointError, options.source, "fix that and run again", memory_fix):
        if is_export:
            exports.export_run(options)
        else:
            weights.import_weights(options, fields)


if __name__ == "__main__":
    cli.start(run)
