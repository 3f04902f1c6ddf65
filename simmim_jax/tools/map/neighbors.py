"""The sheet of nearest neighbors: images, each followed by the images with the most similar embeddings."""

from argparse import Namespace
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from simmim_jax.evals.sheet import Tile, add_frame, save_png, sheet
from simmim_jax.tools.embed.embeddings import Listing
from simmim_jax.tools.map.pictures import ReadPicture, square_tile
from simmim_jax.tools.map.vectors import evenly_spaced, nearest_rows

SIDE = 96  # pixels of a picture
QUERY_FRAME = (0, 0, 0)
FRAMES = {True: (60, 169, 81), False: (214, 40, 40), None: (150, 150, 150)}  # same class, another class, unknown


def choose_queries(labels: Int[np.ndarray, " n"], count: int) -> Int[np.ndarray, " q"]:
    """Choose rows, evenly spaced over the classes and within them, sorted by class."""
    order = np.argsort(labels, kind="stable")
    count = min(count, len(order))
    return order[evenly_spaced(len(order), count) + len(order) // (2 * count)]


def write_neighbors(listing: Listing, path: Path, options: Namespace, read_picture: ReadPicture) -> None:
    """Write the sheet. Print the fraction of neighbors of the query's class."""
    queries = choose_queries(listing.labels, options.queries)
    rows, similarities = nearest_rows(path, queries, min(options.nearest, len(listing.names) - 1))
    save_png(options.neighbors, draw_neighbors(listing, queries, rows, similarities, read_picture))
    line = f"{options.neighbors}: {len(queries)} images with {rows.shape[1]} nearest of {len(listing.names):,}"
    known = listing.labels[queries] >= 0
    if known.any():
        same = (listing.labels[rows] == listing.labels[queries][:, None])[known]
        line += f"; {same.mean():.0%} of the same class"
    print(line)


def draw_neighbors(
    listing: Listing,
    queries: Int[np.ndarray, " q"],
    rows: Int[np.ndarray, "q k"],
    similarities: Float[np.ndarray, "q k"],
    read_picture: ReadPicture,
) -> Tile:
    """Draw a row for each query: the image, then its neighbors with similarity, class and name."""
    classes, labels = listing.about["classes"], listing.labels

    def tile(row: int, color: tuple[int, int, int]) -> Tile:
        return add_frame(square_tile(read_picture(row, SIDE), SIDE), color)

    def caption(row: int, similarity: str = "") -> str:
        class_name = classes[labels[row]] if labels[row] >= 0 else ""
        return "\n".join(" ".join(text.split()) for text in (f"{similarity} {class_name}", listing.names[row]))

    tiles, captions = [], []
    for query, nearest, cosines in zip(queries.tolist(), rows.tolist(), similarities.tolist(), strict=True):
        same = [bool(labels[query] == labels[row]) if min(labels[query], labels[row]) >= 0 else None for row in nearest]
        tiles.append([tile(query, QUERY_FRAME), *(tile(row, FRAMES[s]) for row, s in zip(nearest, same, strict=True))])
        pairs = zip(nearest, cosines, strict=True)
        captions.append([caption(query), *(caption(row, f"{cosine:.4f}") for row, cosine in pairs)])
    legend = "; green: same class, red: another class" if classes else ""
    return sheet(tiles, captions, title=f"black: image; then its nearest by cosine similarity{legend}")
