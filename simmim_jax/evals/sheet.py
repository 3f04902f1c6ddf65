"""Sheets: tiles of images in rows, with captions.

Shape letters: y x pixels of an image, c channels.
"""

import io
import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8, UInt16
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from simmim_jax.files import write_atomically

GAP, LINE, FONT_SIZE = 8, 15, 11  # pixels between tiles, per line of text, and of a letter
MADE_BY = "simmim_jax"  # "Software" of every PNG that the package writes

Tile = UInt8[np.ndarray, "_ _ 3"]  # RGB of any size


def sheet(
    rows: Sequence[Sequence[Tile]],
    captions: Sequence[Sequence[str]] = (),
    *,
    titles: Sequence[str] = (),
    title: str = "",
) -> Tile:
    """Draw tiles of any sizes in rows and columns.

    captions: for each row, the text below each of its tiles, which may have several lines.
    titles: the text above each column. title: a line above everything.
    A line that is too long for its column loses its beginning: the end of a path says most.
    """
    font = ImageFont.load_default(FONT_SIZE)
    columns = itertools.zip_longest(*rows)
    widths = [max(tile.shape[1] for tile in column if tile is not None) for column in columns]
    lefts = [*itertools.accumulate((width + GAP for width in widths), initial=GAP)]
    texts = [[caption.split("\n") for caption in row] for row in captions] or [[]] * len(rows)
    tile_heights = [max(tile.shape[0] for tile in row) for row in rows]
    heights = [
        height + LINE * max(map(len, row), default=0) + GAP for height, row in zip(tile_heights, texts, strict=True)
    ]
    header = LINE * (bool(title) + bool(titles)) + GAP
    canvas = Image.new("RGB", (lefts[-1], header + sum(heights)), "white")
    pen = ImageDraw.Draw(canvas)

    def write(x: int, y: int, text: str, width: int) -> None:
        pen.text((x, y), shorten(text, width, font), fill="black", font=font)

    write(GAP, 3, title, canvas.width - 2 * GAP)
    for left, width, text in zip(lefts, widths, titles, strict=False):
        write(left, header - LINE - 3, text, width)
    top = header
    for row, of_row, tile_height, height in zip(rows, texts, tile_heights, heights, strict=True):
        for left, tile in zip(lefts, row, strict=False):
            canvas.paste(Image.fromarray(tile), (left, top))
        for left, width, lines in zip(lefts, widths, of_row, strict=False):
            for n, line in enumerate(lines):
                write(left, top + tile_height + n * LINE, line, width)
        top += height
    return np.asarray(canvas)


def grid(tiles: Sequence[Tile], captions: Sequence[str], *, title: str = "") -> Tile:
    """A sheet of tiles of one size in so many columns that it is a little wider than high and mostly full."""
    lines = max(caption.count("\n") + 1 for caption in captions)
    height, width = tiles[0].shape[0] + LINE * lines + GAP, tiles[0].shape[1] + GAP

    def misfit(columns: int) -> float:
        rows = -(-len(tiles) // columns)
        empty = (rows * columns - len(tiles)) / len(tiles)
        return abs(math.log(columns * width / (rows * height) / 1.25)) + 6 * empty

    columns = min(range(1, len(tiles) + 1), key=misfit)
    starts = range(0, len(tiles), columns)
    return sheet([tiles[n : n + columns] for n in starts], [captions[n : n + columns] for n in starts], title=title)


def make_tile(
    image: UInt8[np.ndarray, "y x c"] | Float[np.ndarray, "y x c"], min_side: int = 96, max_side: int = 512
) -> Tile:
    """An image as RGB of a size to look at. Floats are in 0..1.

    A small image is enlarged pixel by pixel until its shorter side has `min_side` pixels, if the longer has no more
    than `max_side` then. A large one is reduced until the longer side has `max_side` pixels.
    """
    pixels = to_rgb(image)
    if pixels.dtype != np.uint8:
        pixels = np.round(pixels * 255).astype(np.uint8)
    height, width = tile_size(*pixels.shape[:2], min_side, max_side)
    method = Image.Resampling.BOX if height < len(pixels) else Image.Resampling.NEAREST
    return np.asarray(Image.fromarray(pixels).resize((width, height), method))


def tile_size(height: int, width: int, min_side: int = 96, max_side: int = 512) -> tuple[int, int]:
    """(height, width) of the tile of an image; see `make_tile`."""
    scale = min(-(-min_side // min(height, width)), max_side // max(height, width))
    if scale < 1:
        scale = max_side / max(height, width)
    return max(1, round(height * scale)), max(1, round(width * scale))


def add_frame(tile: Tile, color: tuple[int, int, int], width: int = 3) -> Tile:
    """A tile inside a frame of `width` pixels."""
    framed = np.empty((tile.shape[0] + 2 * width, tile.shape[1] + 2 * width, 3), np.uint8)
    framed[:] = color
    framed[width:-width, width:-width] = tile
    return framed


def to_rgb(image: UInt8[np.ndarray, "y x c"] | Float[np.ndarray, "y x c"]) -> np.ndarray:
    """The first three channels, or the first one three times if there are fewer."""
    return image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)


def shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """The end of a text that fits into `width` pixels, in letters that the font has."""
    text = " ".join(text.split()).encode("latin-1", "replace").decode("latin-1")
    starts = range(max(0, len(text) - 200), len(text))
    parts = (f"..{text[start:]}" if start else text for start in starts)
    return next((part for part in parts if font.getlength(part) <= width), "")


def save_png(path: str | Path, pixels: Tile | UInt8[np.ndarray, "_ _"] | UInt16[np.ndarray, "_ _"]) -> None:
    """Write a PNG that says who made it, whole or not at all; make its folder."""
    about, file = PngInfo(), io.BytesIO()
    about.add_text("Software", MADE_BY)
    Image.fromarray(pixels).save(file, format="PNG", pnginfo=about)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_atomically(Path(path), file.getvalue())
