"""python -m simmim_jax.tools.map EMBEDDINGS [OUT.html] [options]

Embeddings that one can look at: a map of them as a page of one file, and a sheet of images with their nearest ones.

Similarity is the cosine: embeddings are scaled to length 1 before anything else. Pictures come from the images that
EMBEDDINGS were made of, where they still are, or from --images.
"""

import argparse
import base64
import importlib.util
import io
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from PIL import Image, ImageDraw, ImageFont

from simmim_jax.errors import (
    ConfigError,
    DataError,
    Parser,
    UserError,
    check_minimum,
    choose,
)
from simmim_jax.files import utf8_name, write_atomically
from simmim_jax.tools.cli import check_seed, parse_known, start
from simmim_jax.tools.embed import embeddings
from simmim_jax.tools.map.map_page import make_page

EXAMPLES = """\
examples:
  a page with a point for each of 5,000 images, to be opened in a browser:
    python -m simmim_jax.tools.map mine.parquet mine.html
  of images that were moved since, by principal components, which takes a second:
    python -m simmim_jax.tools.map mine.parquet mine.html --images=DIR --method=pca
  a sheet of ten images, each with its eight nearest of all:
    python -m simmim_jax.tools.map mine.parquet --neighbors=nearest.png --queries=10
"""
METHODS = ("pca", "tsne", "umap")
MAX_POINTS = 20_000  # that a page is still quick with
SPRITE_SIDE = 64  # pixels of a thumbnail
SHEET_SIDE = 96
FRAMES = {True: (60, 169, 81), False: (214, 40, 40), None: (150, 150, 150)}  # same class, another, not known


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.map",
        description="A map of embeddings as one HTML file; nearest neighbors as a picture.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("embeddings", metavar="EMBEDDINGS", help="a .parquet or .npz file of python -m simmim_jax.tools.embed")
    add("out", metavar="OUT.html", nargs="?", default="", help="the page to write")
    add("--method", default="tsne", help="pca, tsne or umap (default: tsne)")
    add("--images", default="", metavar="DATA", help="where the images are now (default: where they were)")
    add("--no-images", action="store_true", help="points alone, without thumbnails")
    add("--limit", type=int, default=5000, metavar="N", help="points, evenly spread over the images (default: 5000)")
    add("--seed", type=int, default=0, metavar="N", help="of tsne and umap (default: 0)")
    add("--title", default="", help="of the page (default: the name of EMBEDDINGS)")
    add("--neighbors", default="", metavar="OUT.png", help="a sheet of images and their nearest to write")
    add("--queries", type=int, default=8, metavar="N", help="rows of the sheet (default: 8)")
    add("--nearest", type=int, default=8, metavar="N", help="neighbors of each (default: 8)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError for what is not one, with the nearest."""
    options = parse_known(make_parser(), argv)
    for name in ("embeddings", "out", "images", "neighbors"):
        setattr(options, name, os.path.expanduser(getattr(options, name)))
    if Path(options.embeddings).suffix not in embeddings.ENDINGS:
        raise ConfigError(f"EMBEDDINGS is {options.embeddings}", "command line", "give a .parquet or .npz file")
    told = utf8_name(options.embeddings)
    if told != options.embeddings and not told.endswith(".npz"):  # Arrow's limit
        raise ConfigError(f"EMBEDDINGS is {told}", "command line", "move it to a path that is UTF-8")
    if not options.out and not options.neighbors:
        raise ConfigError("nothing to write", "command line", "give OUT.html, or --neighbors=OUT.png, or both")
    for name, path, ending in (("OUT", options.out, ".html"), ("--neighbors", options.neighbors, ".png")):
        if path and Path(path).suffix != ending:
            raise ConfigError(f"{name} is {path}", "command line", f"give a file that ends in {ending}")
    if options.images and options.no_images:
        raise ConfigError("--images and --no-images", "command line", "give one of them")
    choose("method", options.method, set(METHODS))
    if options.out and options.method == "umap" and not importlib.util.find_spec("umap"):
        raise ConfigError(
            "umap-learn is not installed", "--method=umap", "pip install umap-learn, or give --method=tsne"
        )
    for name in ("queries", "nearest", "limit"):
        check_minimum(f"--{name}", getattr(options, name), 1)
    check_seed(options.seed)
    if options.limit > MAX_POINTS:
        raise ConfigError(f"--limit={options.limit}", "command line", f"give at most {MAX_POINTS}, for a quick page")
    return options


def run(argv: list[str]) -> None:
    """Write the page, the sheet, or both."""
    options = parse(argv)
    try:
        draw_all(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        what, where = f"cannot read or write: {error.strerror or error}", str(error.filename or options.embeddings)
        raise DataError(what, where, "mend that and run again") from error


def draw_all(options: argparse.Namespace) -> None:
    """As `run`, of options that have been read."""
    path = Path(options.embeddings)
    listing = embeddings.read_listing(path)
    shape, count = listing.about["shape"], len(listing.names)
    if len(shape) != 1:
        raise DataError(f"maps of shape {shape}", str(path), "embed with --pool=patches, one vector for each image")
    if count < 2:
        raise DataError(f"{count} embedding, and nothing beside it", str(path), "embed more images")
    picture = (lambda row, side: None) if options.no_images else open_pictures(listing, options.images)
    if options.out:
        rows = spread(count, options.limit)
        write_map(listing, rows, path, options, picture)
    if options.neighbors:
        write_neighbors(listing, path, options, picture)


def spread(count: int, limit: int) -> Int[np.ndarray, " n"]:
    """`limit` rows of `count`, evenly spread; all where that is more."""
    limit = min(limit, count)
    return np.arange(limit, dtype=np.int64) * count // limit


def unit_vectors(path: Path, rows: Int[np.ndarray, " n"]) -> Float[np.ndarray, "n d"]:
    """Of these rows, which ascend, scaled to length 1; a chunk of the file at a time is in memory."""
    taken, start = [], 0
    for chunk in embeddings.read_embeddings(path):
        first, last = np.searchsorted(rows, (start, start + len(chunk)))
        taken.append(to_unit(chunk[rows[first:last] - start]))
        start += len(chunk)
    return np.concatenate(taken)


def to_unit(vectors: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n d"]:
    vectors = vectors.astype(np.float32)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# --- pictures


def open_pictures(listing: embeddings.Listing, images: str) -> Callable:
    """A function (row, side) -> a picture of at most `side` x `side` pixels, or None where it cannot be had.

    images: a data.path; "": what the embeddings were made of. Images are found by their place in it, and are taken if
    their names are those of the rows.
    """
    from simmim_jax.data.decode import BadImage, Picture
    from simmim_jax.data.sources import make_source

    of_about = listing.about["source"]
    if images:
        where = {"source": "auto", "path": images, "split": of_about["split"]}
        where["heldout_fraction"] = of_about["heldout_fraction"]
    else:
        where = of_about
    try:
        source = make_source(**where)
    except UserError as error:
        if images:
            raise
        print(f"no thumbnails: {error.what}; give --images=DATA", file=sys.stderr)
        return lambda row, side: None
    told = []

    def picture(row: int, side: int):
        index = int(listing.index[row])
        if index >= len(source) or utf8_name(source.name(index)) != listing.names[row]:
            if not told:
                told.append(row)
                print(
                    f"{source.describe()}: its record {index} is not {listing.names[row]!r}: other images, which are "
                    "not shown", file=sys.stderr,
                )  # fmt: skip
            return None
        try:
            opened = Picture(source[index]["image"], 3)
            reduce = max((n for n in (1, 2, 4, 8) if min(opened.height, opened.width) >= 2 * n * side), default=1)
            pixels = Image.fromarray(opened.read(reduce))
        except (BadImage, OSError):
            return None
        scale = side / max(pixels.size)
        size = tuple(max(1, round(length * scale)) for length in pixels.size)
        return pixels.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)

    return picture


def tile_of(picture, side: int) -> Image.Image:
    """A square with the picture in its middle; light gray where there is none."""
    tile = Image.new("RGB", (side, side), (238, 238, 238))
    if picture is not None:
        tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return tile


# --- the map


def write_map(
    listing: embeddings.Listing, rows: Int[np.ndarray, " n"], path: Path, options: argparse.Namespace, picture: Callable
) -> None:
    """Write the page of these rows."""
    positions = project(options.method, unit_vectors(path, rows), options.seed, where=str(path))
    columns = math.ceil(math.sqrt(len(rows)))
    about = listing.about
    data = {
        "x": np.round(positions[:, 0], 4).tolist(),
        "y": np.round(positions[:, 1], 4).tolist(),
        "label": listing.labels[rows].tolist(),
        "name": [listing.names[row] for row in rows],
        "classes": about["classes"],
        "tile": SPRITE_SIDE,
        "columns": columns,
        "method": {"pca": "PCA", "tsne": "t-SNE", "umap": "UMAP"}[options.method],
        "what": f"{about['what']}, step {about['step']} of {about['run']}",
    }
    page = make_page(data, make_sprite(rows, columns, picture), utf8_name(options.title or path.name))
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda partial: partial.write_text(page, encoding="utf-8"))
    print(f"{out}: {len(rows):,} of {len(listing.names):,} images, {out.stat().st_size / 2**20:.1f} MiB")


def project(method: str, vectors: Float[np.ndarray, "n d"], seed: int, where: str = "") -> Float[np.ndarray, "n 2"]:
    """Places on a plane, centerd, within -1..1.

    Raises ConfigError for fewer vectors than the method needs, and DataError where all are the same.
    """
    if len(vectors) < 2:
        raise ConfigError(f"a map of {len(vectors)} image", "--limit", "give 2 or more")
    if len(vectors) < 5 and method != "pca":
        raise ConfigError(f"{method} of {len(vectors)} images", "--method", "give --method=pca")
    if not np.ptp(vectors, axis=0).any():  # of which t-SNE ends in a segmentation fault
        raise DataError("all embeddings are the same", where, "look at the run: did it collapse?")
    from sklearn.decomposition import PCA

    def components(count: int) -> np.ndarray:
        count = min(count, *vectors.shape)
        return PCA(count, svd_solver="full" if len(vectors) < 2000 else "randomized", random_state=seed).fit_transform(
            vectors
        )

    if method == "tsne":
        from sklearn.manifold import TSNE
        from threadpoolctl import threadpool_limits  # scikit-learn's own

        perplexity, few = min(30.0, (len(vectors) - 1) / 3), max(1, (os.cpu_count() or 1) // 2)
        with threadpool_limits(few, user_api="openmp"):  # where a core is shared, the threads wait for one another
            places = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(components(50))
    elif method == "umap":
        import umap

        neighbors = min(15, len(vectors) - 1)
        places = umap.UMAP(n_neighbors=neighbors, random_state=seed, n_jobs=1).fit_transform(vectors)
    else:
        places = components(2)
        places = np.pad(places, ((0, 0), (0, 2 - places.shape[1])))
    places = np.asarray(places, np.float64)
    places -= (places.max(axis=0) + places.min(axis=0)) / 2
    return places / max(np.abs(places).max(), 1e-12)


def make_sprite(rows: Int[np.ndarray, " n"], columns: int, picture: Callable) -> str:
    """The thumbnails of all rows in one JPEG, as a data URI; "" where none can be had."""
    sheet = Image.new("RGB", (columns * SPRITE_SIDE, -(-len(rows) // columns) * SPRITE_SIDE), "white")
    found = 0
    for n, row in enumerate(rows.tolist()):
        shown = picture(row, SPRITE_SIDE)
        found += shown is not None
        sheet.paste(tile_of(shown, SPRITE_SIDE), (n % columns * SPRITE_SIDE, n // columns * SPRITE_SIDE))
    if not found:
        return ""
    buffer = io.BytesIO()
    sheet.save(buffer, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


# --- nearest neighbors


def nearest_rows(
    path: Path, queries: Int[np.ndarray, " q"], count: int
) -> tuple[Int[np.ndarray, "q k"], Float[np.ndarray, "q k"]]:
    """(rows, cosine similarities) of the `count` nearest of all other rows of each query, the nearest first.

    Of equals, the first rows. A chunk of the file at a time is in memory.
    """
    own = unit_vectors(path, np.sort(queries))[np.argsort(np.argsort(queries))]
    rows, similarities = np.empty((len(queries), 0), np.int64), np.empty((len(queries), 0), np.float32)
    start = 0
    for chunk in embeddings.read_embeddings(path):
        here = np.arange(start, start + len(chunk))
        found = own @ to_unit(chunk).T
        found[queries[:, None] == here] = -np.inf  # itself
        rows = np.concatenate([rows, np.broadcast_to(here, found.shape)], axis=1)
        similarities = np.concatenate([similarities, found], axis=1)
        best = np.argsort(-similarities, axis=1, kind="stable")[:, :count]
        rows, similarities = np.take_along_axis(rows, best, 1), np.take_along_axis(similarities, best, 1)
        start += len(chunk)
    return rows, similarities


def choose_queries(labels: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " q"]:
    """Rows, evenly spread over the classes and within them, by class."""
    order = np.argsort(labels, kind="stable")
    count = min(count, len(order))
    return order[spread(len(order), count) + len(order) // (2 * count)]


def write_neighbors(listing: embeddings.Listing, path: Path, options: argparse.Namespace, picture: Callable) -> None:
    """Write the sheet, and print how many of the neighbors are of their query's class."""
    queries = choose_queries(listing.labels, options.queries)
    rows, similarities = nearest_rows(path, queries, min(options.nearest, len(listing.names) - 1))
    sheet = draw_neighbors(listing, queries, rows, similarities, picture)
    out = Path(options.neighbors)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda partial: sheet.save(partial, format="PNG"))
    line = f"{out}: {len(queries)} images with {rows.shape[1]} nearest of {len(listing.names):,}"
    known = listing.labels[queries] >= 0
    if known.any():
        same = (listing.labels[rows] == listing.labels[queries][:, None])[known]
        line += f"; {same.mean():.0%} of their class"
    print(line)


def draw_neighbors(
    listing: embeddings.Listing,
    queries: Int[np.ndarray, " q"],
    rows: Int[np.ndarray, "q k"],
    similarities: Float[np.ndarray, "q k"],
    picture: Callable,
) -> Image.Image:
    """A row for each query: itself, and its nearest, with similarity, class and name; frames tell whether classes are
    the same."""
    side, frame, line, gap = SHEET_SIDE, 3, 13, 8
    width, height = side + 2 * frame + gap, side + 2 * frame + 2 * line + gap
    header = 2 * line
    font = ImageFont.load_default()
    classes, labels = listing.about["classes"], listing.labels
    sheet = Image.new("RGB", ((1 + rows.shape[1]) * width + 2 * gap, header + len(queries) * height + gap), "white")
    pen = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str) -> None:
        text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")  # a line that the font surely has
        while text and pen.textlength(text, font=font) > width - 4:
            text = "." + text.lstrip(".")[1:]  # a name's end says more
        pen.text((x, y), text, fill="black", font=font)

    legend = [("same class", FRAMES[True]), ("another class", FRAMES[False])] if classes else []
    write_at = gap
    for text, color in (("image, and its nearest by cosine similarity", (0, 0, 0)), *legend):
        pen.text((write_at, 6), text, fill=color, font=font)
        write_at += int(pen.textlength(text, font=font)) + 2 * gap
    for n, query in enumerate(queries.tolist()):
        y = header + n * height
        for place, row in enumerate((query, *rows[n].tolist())):
            x = gap + place * width + (gap if place else 0)
            known = labels[query] >= 0 and labels[row] >= 0
            color = (0, 0, 0) if not place else FRAMES[bool(labels[query] == labels[row]) if known else None]
            pen.rectangle((x, y, x + side + 2 * frame - 1, y + side + 2 * frame - 1), fill=color)
            sheet.paste(tile_of(picture(row, side), side), (x + frame, y + frame))
            class_name = classes[labels[row]] if labels[row] >= 0 else ""
            below = y + side + 2 * frame
            write(x, below, class_name if not place else f"{similarities[n, place - 1]:.4f} {class_name}")
            write(x, below + line, listing.names[row])
    return sheet


if __name__ == "__main__":
    start(run)
