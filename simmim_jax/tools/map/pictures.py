"""Pictures of the images in a file of embeddings."""

import sys
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from simmim_jax.data.decode import BadImage, Picture
from simmim_jax.data.pixels import Pixels
from simmim_jax.data.sources import make_source
from simmim_jax.errors import UserError
from simmim_jax.evals.sheet import to_rgb
from simmim_jax.files import utf8_name
from simmim_jax.tools.embed.embeddings import Listing

MISSING = (238, 238, 238)  # color of a tile without a picture

# (row, side in pixels) -> a picture of at most side x side pixels, or None if it cannot be read
ReadPicture = Callable[[int, int], Image.Image | None]


def open_pictures(listing: Listing, images: str, *, skip: bool = False) -> ReadPicture:
    """Return a reader of the pictures.

    images: a data.path; "": the images that the embeddings were made from. A picture is found by its index in the
    source, and used if its name is that of the row. skip: read none.
    """
    if skip:
        return lambda row, side: None
    where = listing.about["source"]
    if images:
        options = {"split": where["split"], "heldout_fraction": where["heldout_fraction"]}
        where = {"source": "auto", "path": images, **options}
    try:
        source = make_source(**where)
    except UserError as error:
        if images:
            raise
        print(f"no thumbnails: {error.what}; give --images=DATA", file=sys.stderr)
        return lambda row, side: None
    pixels = Pixels.from_record(listing.about) if "pixels" in listing.about else Pixels()
    mismatches = []

    def read(row: int, side: int) -> Image.Image | None:
        index = int(listing.index[row])
        if index >= len(source) or utf8_name(source.name(index)) != listing.names[row]:
            if not mismatches:
                what = f"record {index} is not {listing.names[row]!r}"
                print(f"{source.describe()}: {what}: images that do not match are not shown", file=sys.stderr)
            mismatches.append(row)
            return None
        try:
            picture = Picture(source[index]["image"], pixels.channels, samples=pixels.samples)
            reduce = max((n for n in (1, 2, 4, 8) if min(picture.height, picture.width) >= 2 * n * side), default=1)
            image = Image.fromarray(to_rgb(pixels.display(picture.read(reduce))))
        except (BadImage, OSError):
            return None
        scale = side / max(image.size)
        size = tuple(max(1, round(length * scale)) for length in image.size)
        return image.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR)

    return read


def square_tile(picture: Image.Image | None, side: int) -> UInt8[np.ndarray, "side side 3"]:
    """Return a square with the picture in its center; light gray if there is none."""
    tile = Image.new("RGB", (side, side), MISSING)
    if picture is not None:
        tile.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return np.asarray(tile)
