"""python -m simmim_jax.tools.probe RUN OUT [options]

How well classes can be read off the frozen features of each block: linear and ridge probes, k-NN, few-shot.
"""

import argparse
import os
from pathlib import Path

from simmim_jax.errors import BusyError, ConfigError, DataError, Parser, check_minimum, choose
from simmim_jax.files import lock_folder
from simmim_jax.tools.cli import check_fraction, check_seed, parse_known, parse_size, start

EXAMPLES = """\
examples:
  a run, on its own images, every block and every probe:
    python -m simmim_jax.tools.probe runs/mine probes/mine
  imported weights, on a folder with train/<class>/ and val/<class>/:
    python -m simmim_jax.tools.probe runs/swin_b probes/swin_b --data=DIR --train-split=train --test-split=val
  a first look, in a minute: k-NN and ridge alone, on 2,000 images of each part:
    python -m simmim_jax.tools.probe runs/mine probes/look --only=knn,ridge --limit=2000
  ImageNet of TFDS, three blocks, as half-size numbers on the disk:
    python -m simmim_jax.tools.probe runs/vit_b probes/vit_b --data=tfds:imagenet2012 --test-split=validation \\
      --blocks=7,8,9 --dtype=float16 --batch-size=512 --threads=16

OUT/ then has results.csv and results.json (a row for each method, block and pooling), blocks.png, and features/, which
the next call with the same weights and images reads again. Rows are written after each block: the same command goes on
after an interruption, and one with other probes or blocks adds to them. Settings are chosen by images taken out of the
training images; the test images are looked at once, with what was chosen. Where that is the highest or lowest that was
tried, a line says so, and what to try then. The linear, ridge and logistic probes are then fitted to all training
images. A few-shot probe is fitted to the drawn images alone, a fraction being one of all training images of each class;
the features' mean and scale are those of all training images, whose labels that takes not. But the validation images
choose its block too, so that their labels count besides those drawn: the table's "paper" row, of a block that nothing
chooses, stands beside it.

A probe that is asked for again with other options is computed anew: the earlier results are then in OUT/earlier_N/,
and the rows of other probes stay.
"""
METHODS = ("linear", "logistic", "ridge", "knn", "fewshot")
POOLS = ("patches", "class_token", "both", "all")
DTYPES = ("float32", "float16")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.probe",
        description="Linear probe, logistic and ridge regression, k-NN and few-shot accuracy of each block's features.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="a workdir or step of ours, or an import")
    parser.add_argument("out", metavar="OUT", help="folder for the results; features are kept in it")
    parser.add_argument(
        "--data", default="", help="folder or file of images, digits, or tfds:NAME (default: the run's)"
    )
    parser.add_argument("--train-split", help="to fit to (default: the run's own, or train)")
    parser.add_argument("--test-split", help="to report on (default: the run's own, or test)")
    parser.add_argument("--pool", default="patches", help=f"one of {', '.join(POOLS)} (default: patches)")
    parser.add_argument(
        "--blocks", default="all", help="like 1,8,0 with 0 for the output after the norm (default: all)"
    )
    parser.add_argument("--image-size", help="H or H,W in pixels (default: the run's)")
    parser.add_argument("--crop-fraction", help="of a resized image's side that is kept (default: the run's)")
    parser.add_argument("--interpolation", default="", help="bilinear, bicubic, ... (default: the run's)")
    parser.add_argument("--limit", default="0", help="so many images of each part, evenly spread (default: 0, all)")
    parser.add_argument("--only", default=",".join(METHODS), help=f"some of {', '.join(METHODS)} (default: all)")
    parser.add_argument("--shots", default="1,5,10", help="images per class of few-shot draws (default: 1,5,10)")
    parser.add_argument("--fractions", default="0.01,0.1", help="of all training images, likewise (default: 0.01,0.1)")
    parser.add_argument("--seeds", default="5", help="draws of each few-shot setting (default: 5)")
    parser.add_argument("--seed", default="0", help="of the validation images and of the order (default: 0)")
    parser.add_argument("--validation-fraction", default="0.1", help="of the training images (default: 0.1)")
    parser.add_argument(
        "--learning-rates", default="0.01,0.03,0.1,0.3,1,3,10", help="of the linear probe, per 256 images"
    )
    parser.add_argument("--weight-decays", default="0,0.0001,0.001", help="of the linear probe")
    parser.add_argument(
        "--inverse-regularizations", default="1e-4,1e-3,1e-2,0.1,1,10,100,1e3,1e4",
        help="of logistic regression, scikit-learn's C (default: powers of ten from 1e-4 to 1e4)",
    )  # fmt: skip
    parser.add_argument(
        "--regularizations", default="1,0.1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7,1e-8",
        help="of ridge regression, on standardized features (default: powers of ten from 1e-8 to 1)",
    )  # fmt: skip
    parser.add_argument("--epochs", default="100", help="of the linear probe (default: 100)")
    parser.add_argument("--probe-batch-size", default="1024", help="at most, of the linear probe (default: 1024)")
    parser.add_argument("--neighbors", default="10,20,100,200", help="of k-NN (default: DINO's 10,20,100,200)")
    parser.add_argument("--temperature", default="0.07", help="of k-NN (default: DINO's 0.07)")
    parser.add_argument("--dtype", default="float32", help="of features on the disk: float32 or float16")
    parser.add_argument("--batch-size", default="64", help="of the pass over the images (default: 64)")
    parser.add_argument("--threads", help="that decode images (default: as many as cores, 16 at most)")
    parser.add_argument("--max-bad-fraction", default="0.01", help="of images that cannot be read (default: 0.01)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options, as numbers where they are numbers. Raises ConfigError."""
    options = parse_known(make_parser(), argv)
    options.run, options.out = map(os.path.expanduser, (options.run, options.out))
    choose("pool", options.pool, POOLS)
    choose("dtype", options.dtype, DTYPES)
    options.only = tuple(choose("probe", name, METHODS) for name in options.only.split(",") if name)
    if not options.only:
        raise ConfigError("--only= leaves no probe", "command line", f"give some of {', '.join(METHODS)}")
    options.blocks = None if options.blocks == "all" else _numbers("blocks", options.blocks, int, 0)
    options.image_size = parse_size(options.image_size)
    options.shots = _numbers("shots", options.shots, int, 1)
    options.fractions = _numbers("fractions", options.fractions, float, 0, strict=True)
    options.learning_rates = _numbers("learning-rates", options.learning_rates, float, 0, strict=True, needed=True)
    options.weight_decays = _numbers("weight-decays", options.weight_decays, float, 0, needed=True)
    for name, falling in (("inverse_regularizations", False), ("regularizations", True)):
        numbers = _numbers(name.replace("_", "-"), getattr(options, name), float, 0, strict=True, needed=True)
        setattr(options, name, tuple(sorted(numbers, reverse=falling)))  # the strongest first: it is chosen of equals
    options.neighbors = _numbers("neighbors", options.neighbors, int, 1, needed=True)
    for name, least in (("limit", 0), ("seeds", 1), ("seed", 0), ("epochs", 1), ("probe_batch_size", 1),
                        ("batch_size", 1), ("threads", 0)):  # fmt: skip
        if (given := getattr(options, name)) is not None:
            setattr(options, name, _number(name, given, int, least))
    check_seed(options.seed)
    for name in ("validation_fraction", "temperature", "crop_fraction"):
        if (given := getattr(options, name)) is not None:
            setattr(options, name, _number(name, given, float, 0, strict=True))
    options.max_bad_fraction = _number("max_bad_fraction", options.max_bad_fraction, float, 0)
    check_fraction("--max-bad-fraction", options.max_bad_fraction)
    if options.crop_fraction is not None:
        check_fraction("--crop-fraction", options.crop_fraction, of_crop=True)
    for name, value in (("validation-fraction", options.validation_fraction),
                        *(("fractions", fraction) for fraction in options.fractions)):  # fmt: skip
        if value >= 1:
            raise ConfigError(f"--{name}={value:g}", "command line", "give numbers below 1")
    most = max(options.fractions, default=0) if "fewshot" in options.only else 0
    if most + options.validation_fraction > 1 + 1e-9:
        raise ConfigError(
            f"--fractions={most:g} and --validation-fraction={options.validation_fraction:g} are more than all images",
            "command line", "give numbers that add up to 1 at most: images that validate are not drawn",
        )  # fmt: skip
    return options


def _number(name: str, text: str, kind: type, least: int, *, strict: bool = False) -> int | float:
    found = _numbers(name.replace("_", "-"), text, kind, least, strict=strict, needed=True)
    if len(found) > 1:
        raise ConfigError(f"--{name.replace('_', '-')}={text}", "command line", "give one number")
    return found[0]


def _numbers(name: str, text: str, kind: type, least: int, *, strict: bool = False, needed: bool = False) -> tuple:
    """The comma-separated numbers of an option, without repetition. Raises ConfigError if they are none."""
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",") if part.strip()))
    except ValueError as error:
        example = "numbers" if kind is float else "whole numbers"
        raise ConfigError(f"--{name}={text}", "command line", f"give {example} with commas between") from error
    if needed and not values:
        raise ConfigError(f"--{name} is empty", "command line", "give a number")
    for value in values:
        check_minimum(f"--{name}", value, least, strict=strict)
    if kind is float and any(value == float("inf") for value in values):
        raise ConfigError(f"--{name}={text}", "command line", "give finite numbers")
    return values


def run(argv: list[str]) -> None:
    """Probe RUN as the command line says."""
    options = parse(argv)
    import jax  # only here: help and mistakes are told without it

    from simmim_jax.tools.probe import probing

    try:
        os.makedirs(options.out, exist_ok=True)
        with lock_folder(Path(options.out)):
            probing.probe(options)
    except BrokenPipeError:
        raise
    except BusyError as error:
        raise BusyError("OUT is in use", error.where, "wait for it, or give another OUT") from error
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DataError(
            "not enough memory for these features or probes", options.run,
            "lower --batch-size or --limit, give fewer of --only, or set JAX_PLATFORMS=cpu; what is whole is kept",
        ) from error  # fmt: skip
    except OSError as error:
        raise ConfigError(
            f"cannot read or write: {error.strerror or error}", str(error.filename or options.out),
            "make room, or give another OUT; what was read of the images is kept",
        ) from error  # fmt: skip


if __name__ == "__main__":
    start(run)
