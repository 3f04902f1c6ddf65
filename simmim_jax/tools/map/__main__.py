"""python -m simmim_jax.tools.map EMBEDDINGS [OUT.html] [options]

Show embeddings: a map as one HTML page, and a sheet of images with their nearest neighbors.

Similarity is cosine similarity: all embeddings are first scaled to length 1. Pictures are read from the images that
EMBEDDINGS was made from, or from --images.
"""

import argparse
import importlib.util
import os
from pathlib import Path

from simmim_jax.errors import ConfigError, DataError, Parser, choose
from simmim_jax.files import utf8_name
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  a page with a point for each of 5,000 images, for a browser:
    python -m simmim_jax.tools.map mine.parquet mine.html
  images that moved, by principal components (takes a second):
    python -m simmim_jax.tools.map mine.parquet mine.html --images=DIR --method=pca
  a sheet of ten images, each with its eight nearest neighbors:
    python -m simmim_jax.tools.map mine.parquet --neighbors=nearest.png --queries=10
"""
METHODS = ("pca", "tsne", "umap")
MAX_POINTS = 20_000  # more make the page slow


def make_parser() -> Parser:
    parser = cli.make_parser("map", "A map of embeddings as one HTML file; nearest neighbors as a picture.", EXAMPLES)
    add, path, count = parser.add_argument, os.path.expanduser, cli.number(int, 1)
    add("embeddings", type=path, metavar="EMBEDDINGS", help="a .parquet or .npz file of the embed command")
    add("out", type=path, metavar="OUT.html", nargs="?", default="", help="the page to write")
    add("--method", default="tsne", help="pca, tsne or umap (default: tsne)")
    add("--images", type=path, default="", metavar="DATA", help="where the images are now (default: where they were)")
    add("--no-images", action="store_true", help="points only, without thumbnails")
    limit = cli.number(int, 1, MAX_POINTS)
    add("--limit", type=limit, default=5000, metavar="N", help="points, evenly spaced over the images (default: 5000)")
    cli.add_seed(parser, "of tsne and umap")
    add("--title", default="", help="of the page (default: the name of EMBEDDINGS)")
    add("--neighbors", type=path, default="", metavar="OUT.png", help="the sheet of nearest neighbors to write")
    add("--queries", type=count, default=8, metavar="N", help="rows of the sheet (default: 8)")
    add("--nearest", type=count, default=8, metavar="N", help="neighbors in a row (default: 8)")
    cli.add_overwrite(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the options. Raises ConfigError for unknown or invalid ones."""
    options = cli.parse_known(make_parser(), argv)
    path = Path(options.embeddings)
    if path.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"EMBEDDINGS is {path}", "command line", "give a .parquet or .npz file")
    if path.suffix == ".parquet" and utf8_name(options.embeddings) != options.embeddings:  # a limit of Arrow
        what = f"EMBEDDINGS is {utf8_name(options.embeddings)}"
        raise ConfigError(what, "command line", "move it to a path that is UTF-8")
    if not options.out and not options.neighbors:
        raise ConfigError("nothing to write", "command line", "give OUT.html, or --neighbors=OUT.png, or both")
    for name, out, ending in (("OUT", options.out, ".html"), ("--neighbors", options.neighbors, ".png")):
        if out and Path(out).suffix != ending:
            raise ConfigError(f"{name} is {out}", "command line", f"give a file that ends in {ending}")
    if options.images and options.no_images:
        raise ConfigError("--images and --no-images", "command line", "give one of them")
    choose("method", options.method, set(METHODS))
    if options.out and options.method == "umap" and not importlib.util.find_spec("umap"):
        fix = "pip install umap-learn, or give --method=tsne"
        raise ConfigError("umap-learn is not installed", "--method=umap", fix)
    return options


def run(argv: list[str]) -> None:
    """Write the page, the sheet, or both."""
    options = parse(argv)
    from simmim_jax.tools.embed import embeddings
    from simmim_jax.tools.map import neighbors, page, pictures

    path = Path(options.embeddings)
    if not path.exists():
        fix = "make it with python -m simmim_jax.tools.embed RUN DATA EMBEDDINGS"
        raise DataError("no such file", options.embeddings, fix)
    fix = "fix that and run again"
    with cli.translate_errors(DataError, options.embeddings, fix, "lower --limit, or give another --method"):
        listing = embeddings.read_listing(path)
        shape, count = listing.about["shape"], len(listing.names)
        if len(shape) != 1:
            what, fix = f"token maps of shape {shape}", "embed with --pool=patches, one vector per image"
            raise DataError(what, options.embeddings, fix)
        if count < 2:
            raise DataError(f"{count} embedding: a map needs two", options.embeddings, "embed more images")
        for out in filter(None, (options.out, options.neighbors)):
            cli.check_output(out, overwrite=options.overwrite)
        read_picture = pictures.open_pictures(listing, options.images, skip=options.no_images)
        if options.out:
            page.write_page(listing, path, options, read_picture)
        if options.neighbors:
            neighbors.write_neighbors(listing, path, options, read_picture)


if __name__ == "__main__":
    cli.start(run)
