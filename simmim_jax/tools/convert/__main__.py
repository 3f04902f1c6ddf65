"""python -m simmim_jax.tools.convert FROM TO [options]

Other people's weights into a workdir that init_from takes, and a run of ours out into their formats.
"""

import argparse
import ast
import math
import os
from pathlib import Path

from simmim_jax.errors import CheckpointError, ConfigError, Parser, choose
from simmim_jax.tools.cli import parse_known, parse_size, start

EXAMPLES = """\
examples:
  an official file, to pretrain on from, to fine-tune or to evaluate:
    python -m simmim_jax.tools.convert simmim_pretrain__swin_base__img192_window6__800ep.pth runs/swin_b
  a timm state dict, without its classifier; its image size is nowhere in it:
    python -m simmim_jax.tools.convert swin_tiny.safetensors runs/swin_t --image-size=224 --allow 'head.*'
  an encoder of a MAE:
    python -m simmim_jax.tools.convert mae_pretrain_vit_base_full.pth runs/mae --allow 'decoder_*,mask_token'
  a run, to transformers (AutoModel.from_pretrained takes the folder), timm, or a program that needs no code of ours:
    python -m simmim_jax.tools.convert runs/mine exported/mine
    python -m simmim_jax.tools.convert runs/mine mine.safetensors --format=timm
    python -m simmim_jax.tools.convert runs/mine mine.stablehlo
  its maps of each stage, as a backbone for the detectors and segmenters of transformers:
    python -m simmim_jax.tools.convert runs/mine exported/pyramid --format=backbone
"""
FORMATS = ("backbone", "huggingface", "official", "stablehlo", "timm")


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.convert",
        description="Import weights of official files, timm, Hugging Face and MAE; export runs to these and StableHLO.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="FROM", help="a workdir or step of ours is exported; all else is imported")
    parser.add_argument("target", metavar="TO", help="workdir to make, or file or folder to export to")
    parser.add_argument("--format", help=f"to export to: {', '.join(FORMATS)}; a folder is huggingface's by default")
    parser.add_argument(
        "--encoder.FIELD", metavar="VALUE", dest="_", help="a field that the weights do not tell, or tell wrongly"
    )
    parser.add_argument("--image-size", metavar="H[,W]", help="in pixels, where the weights do not tell it")
    parser.add_argument("--mean", metavar="R,G,B", help="of the images it was trained on (default: ImageNet's)")
    parser.add_argument("--std", metavar="R,G,B", help="of the images it was trained on (default: ImageNet's)")
    parser.add_argument(
        "--allow", metavar="PATTERN", action="append", default=[],
        help="names of theirs to leave out, with * and ?; comma-separated or repeated. In an export: head, mask_token",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier conversion wrote to TO")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, dict]:
    """The options, and the encoder's fields among them. Raises ConfigError for what is not one, with the nearest."""
    fields, rest = {}, []
    arguments = iter(argv)
    for argument in arguments:
        if not argument.startswith("--encoder."):
            rest.append(argument)
            continue
        name, equals, value = argument.removeprefix("--encoder.").partition("=")
        fields[name] = parse_value(value if equals else next(arguments, ""))
    options = parse_known(make_parser(), rest)
    options.source, options.target = map(os.path.expanduser, (options.source, options.target))
    if options.format:
        choose("format", options.format, set(FORMATS))
    options.image_size = parse_size(options.image_size)
    options.mean, options.std = numbers("mean", options.mean, above=-math.inf), numbers("std", options.std, above=0)
    options.allow = [pattern for given in options.allow for pattern in given.split(",") if pattern]
    return options, fields


def parse_value(text: str):
    """A number, a bool or a tuple where `text` is one in Python, else `text`."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text
    return tuple(value) if isinstance(value, list) else value


def numbers(name: str, text: str | None, *, above: int | float) -> tuple[float, ...] | None:
    """The comma-separated numbers of an option, each larger than `above`. Raises ConfigError if they are none."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.strip("()").split(",") if part.strip())
    except ValueError:
        values = ()
    if not values or not all(above < value < math.inf for value in values):
        bound = "numbers" if above < 0 else f"numbers above {above}"
        raise ConfigError(f"--{name}={text}", "command line", f"give {bound} with commas between, like 0.5,0.5,0.5")
    return values


def is_ours(path: Path) -> bool:
    """Whether `path` is a workdir, a `checkpoints` folder or a step of simmim_jax."""
    return any((path / name).is_dir() for name in ("checkpoints", "params")) or any(
        (child / "params").is_dir() for child in path.glob("[0-9]*")
    )


def run(argv: list[str]) -> None:
    """Import or export, as FROM says."""
    options, fields = parse(argv)
    try:
        convert(options, fields)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CheckpointError(
            f"cannot read or write: {error.strerror or error}", str(error.filename or options.source),
            "mend that and run again",
        ) from error  # fmt: skip
    except MemoryError as error:
        raise CheckpointError(
            "not enough memory", options.source, "run it on a machine with more, or give a smaller model"
        ) from error


def convert(options: argparse.Namespace, fields: dict) -> None:
    """Import or export, by options that have been read."""
    is_export = is_ours(Path(options.source))
    if is_export:
        given = [f"--{name.replace('_', '-')}" for name in ("image_size", "mean", "std") if getattr(options, name)]
        given += [f"--encoder.{name}" for name in fields]
        if given:
            raise ConfigError(
                f"{given[0]} in an export", "command line", "a run's own config.json says it: leave it out"
            )
    elif options.format:
        raise ConfigError(f"--format in an import: {options.source} is no run of ours", "command line", "leave it out")
    from simmim_jax.tools import exports, weights  # JAX comes in here: help and mistakes are told without it

    if is_export:
        exports.export_run(options)
    else:
        weights.import_weights(options, fields)


if __name__ == "__main__":
    start(run)
