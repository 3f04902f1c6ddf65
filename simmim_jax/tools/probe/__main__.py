"""python -m simmim_jax.tools.probe RUN OUT [options]

Measure how well classes can be read off the frozen features of each block: linear, logistic and ridge probes, k-NN and
few-shot classification.
"""

import argparse
import os
from functools import partial
from pathlib import Path

from simmim_jax.errors import ConfigError, DataError, Parser, choose
from simmim_jax.files import lock_folder
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  a run on its own images, all blocks and methods:
    python -m simmim_jax.tools.probe runs/mine probes/mine
  imported weights on a folder with train/<class>/ and val/<class>/:
    python -m simmim_jax.tools.probe runs/swin_b probes/swin_b --data=DIR --train-split=train --test-split=val
  a first look in a minute: k-NN and ridge regression on 2,000 images of each split:
    python -m simmim_jax.tools.probe runs/mine probes/look --only=knn,ridge --limit=2000
  ImageNet from TFDS, three blocks, features on disk as float16:
    python -m simmim_jax.tools.probe runs/vit_b probes/vit_b --data=tfds:imagenet2012 --test-split=validation \\
      --blocks=7,8,9 --dtype=float16 --batch-size=512 --threads=16

OUT/ gets results.csv and results.json (one row per method, block and pooling), blocks.png, and features/, which later
calls with the same weights and images reuse. Rows are written after each block. After an interruption, run the same
command again. A call with other methods or blocks adds rows. Other options for a method that has rows already need
--overwrite, which replaces these rows.

Validation images, taken out of the training images, choose the settings and the best block. Test images only measure
the result. If the best setting is the largest or smallest of its grid, a line suggests further values. After the
choice, the linear, logistic and ridge probes are fitted to all training images. A few-shot probe is fitted to the drawn
images only; a fraction counts all training images of a class. Mean and scale of the features always come from all
training images, without labels. The table's "paper" column is a fixed block, so no validation labels enter it.
"""
METHODS = ("linear", "logistic", "ridge", "knn", "fewshot")
POOLS = ("patches", "class_token", "both", "all")


def make_parser() -> Parser:
    description = "Linear probe, logistic and ridge regression, k-NN and few-shot accuracy of each block's features."
    parser = cli.make_parser("probe", description, EXAMPLES)
    add, number, grid = parser.add_argument, cli.number, partial(cli.numbers, distinct=True)
    blocks, positive = grid(int, 0, empty=True), grid(float, 0, strict=True)
    add("run", type=cli.path, metavar="RUN", help="workdir of a run or an import, or a step in it")
    add("out", type=cli.path, metavar="OUT", help="folder for results and features")
    add("--data", default="", help="folder or file of images, digits, or tfds:NAME (default: the run's images)")
    add("--train-split", help="images to fit to (default: the run's, or train)")
    add("--test-split", help="images to test on (default: the run's, or test)")
    add("--pool", default="patches", help=f"one of {', '.join(POOLS)} (default: patches)")
    add(
        "--blocks", type=lambda text: () if text == "all" else blocks(text), default="all",
        help="like 1,8,0; 0: the output after the final norm (default: all)",
    )  # fmt: skip
    add("--limit", type=number(int, 0), default=0, help="images of each split, evenly spaced (default: 0, all)")
    add("--only", default=",".join(METHODS), help=f"some of {', '.join(METHODS)} (default: all)")
    add("--shots", type=grid(int, 1, empty=True), default="1,5,10", help="few-shot images per class")
    add(
        "--fractions", type=grid(float, 0, strict=True, empty=True), default="0.01,0.1",
        help="few-shot fractions of the training images of each class (default: 0.01,0.1)",
    )  # fmt: skip
    add("--seeds", type=number(int, 1), default=5, help="draws of each few-shot setting (default: 5)")
    cli.add_seed(parser, "of validation images and batch order")
    validation = number(float, 0, strict=True)
    add("--validation-fraction", type=validation, default=0.1, help="of the training images (default: 0.1)")
    add(
        "--learning-rates", type=positive, default="0.01,0.03,0.1,0.3,1,3,10",
        help="of the linear probe, per 256 images (default: 0.01 to 10)",
    )  # fmt: skip
    add("--weight-decays", type=grid(float, 0), default="0,0.0001,0.001", help="of the linear probe")
    add(
        "--C", type=positive, default="1e-4,1e-3,1e-2,0.1,1,10,100,1e3,1e4",
        help="inverse regularization of logistic regression, as in scikit-learn (default: 1e-4 to 1e4)",
    )  # fmt: skip
    add(
        "--regularizations", type=positive, default="1,0.1,1e-2,1e-3,1e-4,1e-5,1e-6,1e-7,1e-8",
        help="of ridge regression, for standardized features (default: 1e-8 to 1)",
    )  # fmt: skip
    add("--epochs", type=number(int, 1), default=100, help="of the linear probe (default: 100)")
    add("--probe-batch-size", type=number(int, 1), default=1024, help="maximum, of the linear probe (default: 1024)")
    add("--neighbors", type=grid(int, 1), default="10,20,100,200", help="k of k-NN (default: 10,20,100,200)")
    add("--temperature", type=number(float, 0, strict=True), default=0.07, help="of k-NN (default: 0.07)")
    add("--dtype", default="float32", help="of features on disk: float32 or float16 (default: float32)")
    cli.add_image_options(parser)
    cli.add_overwrite(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options. Raises ConfigError."""
    options = cli.parse_known(make_parser(), argv)
    choose("pool", options.pool, POOLS)
    choose("dtype", options.dtype, ("float32", "float16"))
    options.only = tuple(choose("method", name, METHODS) for name in options.only.split(",") if name)
    if not options.only:
        raise ConfigError("--only= leaves no method", "command line", f"give some of {', '.join(METHODS)}")
    options.C = tuple(sorted(options.C))  # the strongest regularization first: the first of equally good ones wins
    options.regularizations = tuple(sorted(options.regularizations, reverse=True))
    largest = max(options.fractions, default=0) if "fewshot" in options.only else 0
    if options.validation_fraction >= 1 or largest + options.validation_fraction > 1 + 1e-9:
        raise ConfigError(
            f"--fractions={largest:g} and --validation-fraction={options.validation_fraction:g} exceed all images",
            "command line",
            "lower one of them: validation images are not drawn",
        )
    return options


def run(argv: list[str]) -> None:
    """Probe RUN as the command line says."""
    options = parse(argv)
    from simmim_jax.tools.probe import probing

    fix = "free space or give another OUT; extracted features are kept"
    memory_fix = "lower --batch-size or --limit, give fewer methods to --only, or set JAX_PLATFORMS=cpu; then run again"
    with cli.translate_errors(DataError, options.out, fix, memory_fix):
        os.makedirs(options.out, exist_ok=True)
        with lock_folder(Path(options.out), what="OUT is in use"):
            probing.probe(options)


if __name__ == "__main__":
    cli.start(run)
