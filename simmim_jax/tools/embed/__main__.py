"""python -m simmim_jax.tools.embed RUN DATA OUT [options]

Write the embedding of each image of DATA to one Parquet or NPZ file.

The file has one row per image, in the order of the source (file names are sorted):

    index       index of the record in the source
    name        file name, relative to the folder of images
    label       class number, if images have labels
    class_name  name of the class, if classes have names (Parquet only; NPZ has an array `classes`)
    embedding   a list of fixed size in Parquet, an array [n, d] in NPZ

Unreadable images are left out and named on stderr and in the metadata. The metadata is JSON: the key "simmim_jax" of a
Parquet file, the array "about" of an NPZ file. It names the run, step, block, pooling, image size and normalization.

With --pool=map an embedding is a token map [k, l, d], as multimodal models read it. It is flat, row by row from the top
left, in Parquet and [n, k, l, d] in NPZ. Images are resized to cover image size / crop fraction, center-cropped to the
image size and normalized as (pixel / 255 - mean) / std; a run's value range replaces 0 to 255. Tokens are the output of
a block. Block 0 is the encoder's output after its final norm. --normalize divides each embedding, or each token of a
map, by its Euclidean length. Outside the encoder all numbers are float32; --dtype=float16 rounds them at the end.
"""

import argparse
import os
from pathlib import Path

from simmim_jax.errors import ConfigError, DataError, Parser, choose
from simmim_jax.files import utf8_name
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  features of a folder of images, with or without classes:
    python -m simmim_jax.tools.embed runs/mine DIR mine.parquet
  unit-length features of block 8 for the test images, as numpy arrays:
    python -m simmim_jax.tools.embed runs/mine DIR mine.npz --split=test --block=8 --normalize
  a token map for each image, for a multimodal model:
    python -m simmim_jax.tools.embed runs/mine DIR maps.parquet --pool=map --dtype=float16
  features of the run's training images:
    python -m simmim_jax.tools.embed runs/mine '' mine.parquet

After an interruption, run the same command again: it continues from OUT.parts and writes the same bytes. With
--overwrite, the old OUT stays until the new one is complete.
"""
POOLS = ("patches", "class_token", "both", "map")


def make_parser() -> Parser:
    parser = cli.make_parser("embed", "Embed images with the encoder of a run, into a .parquet or .npz file.", EXAMPLES)
    add, path, count = parser.add_argument, os.path.expanduser, cli.number(int, 0)
    add("run", type=cli.path, metavar="RUN", help="workdir of a run, or a step in it")
    add("data", type=path, metavar="DATA", help="a data.path, digits, or tfds:NAME; '': the run's training images")
    add("out", type=cli.path, metavar="OUT", help="file to write: .parquet or .npz")
    add("--block", type=count, metavar="N", help="1 to depth; 0: the encoder's output (default: probe_block)")
    add("--pool", default="patches", help=f"{', '.join(POOLS)} (default: patches, their mean)")
    add("--split", default="", metavar="NAME", help="train, val, test, ... (default: train, or the run's for '')")
    add("--limit", type=count, default=0, metavar="N", help="number of images, evenly spaced; 0: all")
    add("--normalize", action="store_true", help="scale to Euclidean length 1, for cosine similarity")
    add("--dtype", default="float32", help="float32 or float16")
    cli.add_image_options(parser)
    cli.add_overwrite(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options. Raises ConfigError for unknown or invalid ones."""
    options = cli.parse_known(make_parser(), argv)
    out, options.out = options.out, Path(options.out)
    if options.out.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"OUT is {out}", "command line", "give a file that ends in .parquet or .npz")
    if utf8_name(out) != out:  # a limit of Arrow
        raise ConfigError(f"OUT is {utf8_name(out)}", "command line", "give a path that is UTF-8")
    choose("pool", options.pool, set(POOLS))
    choose("dtype", options.dtype, {"float32", "float16"})
    return options


def run(argv: list[str]) -> None:
    """Embed images as the command line says."""
    options = parse(argv)
    from simmim_jax.tools.embed import export

    fix = "fix that and run the same command again: finished parts are kept"
    with cli.translate_errors(DataError, str(options.out), fix, "lower --batch-size and run again"):
        export.export(options)


if __name__ == "__main__":
    cli.start(run)
