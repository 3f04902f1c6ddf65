"""Which classes a classifier takes for which: the matrix, a table and a picture of it, and the images it is wrong on.

Shape letters: c classes, n images, y x pixels. Rows are what an image is, columns what it is taken for.
"""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from simmim_jax.evals.accuracy import TOP, Answers
from simmim_jax.evals.sheet import to_rgb

COLUMNS = ("class", "images", "top1", "top5", "most_confused_with", "times")
MOST = 2000  # classes, of which there is a matrix: of more it takes gigabytes, and nobody sees it
FEW = 40  # classes, up to which each has its name and each cell its number in the picture
WIDEST = 28  # characters of a class's name in a picture
TILE = 128  # pixels, at least, of an image's shorter side on a sheet


def confusion_matrix(answers: Answers, classes: int) -> Int[np.ndarray, "c c"]:
    """How many images of each class (row) were taken for each (column). Its diagonal sums to the top-1 hits."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (answers.label, answers.predicted), 1)
    return matrix


def confused_with(answers: Answers, classes: int) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """(the other class that images of each class are most often taken for, -1 where none is; how often)."""
    wrong = answers.label != answers.predicted
    pairs, counts = np.unique(np.stack([answers.label[wrong], answers.predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    labels, first = np.unique(pairs[0, order], return_index=True)
    others, times = np.full(classes, -1, np.int64), np.zeros(classes, np.int64)
    others[labels], times[labels] = pairs[1, order][first], counts[order][first]
    return others, times


def matrix_csv(matrix: Int[np.ndarray, "c c"], names: Sequence[str]) -> str:
    """The matrix as CSV, with the classes' names above and in front."""
    return written([["class", *names], *([name, *row] for name, row in zip(names, matrix.tolist(), strict=True))])


def classes_csv(answers: Answers, names: Sequence[str]) -> str:
    """A row for each class, `COLUMNS`: accuracies in per cent, empty where there are no images or no five classes."""
    images = np.bincount(answers.label, minlength=len(names))
    hits = {k: np.bincount(answers.label[answers.rank < k], minlength=len(names)) for k in (1, TOP)}
    confused, times = confused_with(answers, len(names))
    rows = []
    for n, name in enumerate(names):
        shares = [f"{100 * hits[k][n] / images[n]:.2f}" if images[n] and k < len(names) else "" for k in (1, TOP)]
        other = names[confused[n]] if confused[n] >= 0 else ""
        rows.append([name, int(images[n]), *shares, other, int(times[n])])
    return written([COLUMNS, *rows])


def written(rows: Iterable[Sequence]) -> str:
    """Rows as CSV, a line each: what would break a line becomes a space."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([" ".join(x.split()) if isinstance(x, str) else x for x in row] for row in rows)
    return text.getvalue()


def draw_confusion(
    matrix: Int[np.ndarray, "c c"], names: Sequence[str], pairs: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """A picture of the matrix, each row as shares of its class, and the `pairs` that are most often confused
    (0: as many as there is room for).

    Blue is right and red is wrong, the deeper the more. Up to 40 classes have their names and numbers in it; of more,
    a cell is a square of pixels, and the axes count classes.
    """
    count = len(names)
    few = count <= FEW
    cell = 34 if few else max(2, 1000 // count)
    side, line_height = cell * count, 18 if few else 28
    font, small = font_of(13 if few else 22), font_of(11)
    labels = [shortened(name) for name in names]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = 24 + int(max(ruler.textlength(label, font) for label in labels) if few else 60)
    listed = most_confused(matrix, names, pairs or (30 if few else side // line_height))
    list_width = int(max([ruler.textlength(line, font) for line in [*listed, "most often confused"]])) + 40
    height = max(margin + side + 24, 60 + line_height * (len(listed) + 2))
    picture = Image.new("RGB", (margin + side + list_width, height), "white")

    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    picture.paste(Image.fromarray(colors(shares)).resize((side, side), Image.Resampling.NEAREST), (margin, margin))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((margin - 1, margin - 1, margin + side, margin + side), outline="black")
    ticks = range(0, count, 1 if few else next((s for s in (10, 20, 50, 100, 200, 500, 1000) if s * 12 > count), count))
    for n in ticks:
        middle = margin + n * cell + cell // 2
        label = labels[n] if few else str(n)
        pen.text((margin - 6, middle), label, fill="black", font=font, anchor="rm")
        stand(picture, label, font, (middle, margin - 6))
        if not few:
            pen.line((margin - 4, middle, margin, middle), fill="black")
            pen.line((middle, margin - 4, middle, margin), fill="black")
    for n, m in np.argwhere(matrix) if few else ():
        place = (margin + m * cell + cell // 2, margin + n * cell + cell // 2)
        dark = shares[n, m] > 0.45
        pen.text(place, str(matrix[n, m]), fill="white" if dark else "black", font=small, anchor="mm")
    pen.text((4, 4), "is \\ taken for", fill="black", font=small if few else font)
    left = margin + side + 20
    for line, text in enumerate(["most often confused", *listed]):
        pen.text((left, 20 + line_height * line), text, fill="black" if line else "darkred", font=font)
    return np.asarray(picture)


def most_confused(matrix: Int[np.ndarray, "c c"], names: Sequence[str], pairs: int) -> list[str]:
    """A line for each of the `pairs` of (is, taken for) with the most images."""
    others = matrix.copy()
    np.fill_diagonal(others, 0)
    order = np.argsort(-others, axis=None, kind="stable")[:pairs]
    places = [np.unravel_index(place, others.shape) for place in order if others.flat[place]]
    numbers = (lambda n: f"{n} ") if len(names) > FEW else (lambda n: "")
    return [
        f"{others[n, m]} x  {numbers(n)}{shortened(names[n])}  as  {numbers(m)}{shortened(names[m])}" for n, m in places
    ]


def colors(shares: Float[np.ndarray, "c c"]) -> UInt8[np.ndarray, "c c 3"]:
    """White for nothing; blue on the diagonal and red beside it, by the square root, so that little is seen too."""
    depth = np.sqrt(shares)[..., None]
    deepest = np.where(np.eye(len(shares), dtype=bool)[..., None], (20, 60, 160), (170, 0, 20))
    return np.round(255 + (deepest - 255) * depth).astype(np.uint8)


def stand(picture: Image.Image, label: str, font, place: tuple[int, int]) -> None:
    """Write `label` upwards, with its beginning at (x of its middle, y)."""
    box = font.getbbox(label)
    upright = Image.new("L", (int(box[2]) + 2, int(box[3]) + 2), 0)
    ImageDraw.Draw(upright).text((0, 0), label, fill=255, font=font)
    upright = upright.rotate(90, expand=True)
    corner = (place[0] - upright.width // 2, place[1] - upright.height)
    picture.paste(Image.new("RGB", upright.size, "black"), corner, upright)


def font_of(size: int):
    """Pillow's own font; where it was built without FreeType, the one size that it has."""
    return ImageFont.load_default(size)


def shortened(name: str) -> str:
    """A name in one line of at most WIDEST characters, that any font can write."""
    name = " ".join(name.split()).encode("latin-1", "replace").decode("latin-1")
    return name if len(name) <= WIDEST else name[: WIDEST - 3] + "..."


class Mistake(NamedTuple):
    """An image that was taken for another class. image: as the model saw it. confidence: in that class, 0..1."""

    confidence: float
    batch_index: int
    label: int
    predicted: int
    image: UInt8[np.ndarray, "y x _"]


class Mistakes:
    """The `most` mistakes with the highest confidence of all that are shown to it, batch by batch."""

    def __init__(self, most: int):
        self.most, self.kept = most, []

    def see(self, images: UInt8[np.ndarray, "n y x _"], answers: Answers) -> None:
        """images: those of `answers`."""
        for n in np.flatnonzero(answers.rank > 0):
            what = (float(answers.confidence[n]), int(answers.batch_index[n]), int(answers.label[n]))
            self.kept.append(Mistake(*what, int(answers.predicted[n]), images[n].copy()))  # a view holds its batch
        self.kept = sorted(self.kept, key=lambda mistake: (-mistake.confidence, mistake.batch_index))[: self.most]


def draw_mistakes(mistakes: Sequence[Mistake], names: Sequence[str]) -> UInt8[np.ndarray, "height width 3"]:
    """A sheet of images: under each the class it was taken for and how surely, and the class that it is."""
    font, gap, lines = font_of(12), 8, 36
    height, width = mistakes[0].image.shape[:2]
    scale = max(1, -(-TILE // min(height, width)))
    tile = (width * scale, height * scale)
    step = (max(tile[0], 150) + gap, tile[1] + lines + gap)
    columns = min(len(mistakes), max(1, min(8, 1600 // step[0])))
    rows = -(-len(mistakes) // columns)
    sheet = Image.new("RGB", (gap + columns * step[0], gap + rows * step[1]), "white")
    pen = ImageDraw.Draw(sheet)
    for n, mistake in enumerate(mistakes):
        left, upper = gap + n % columns * step[0], gap + n // columns * step[1]
        image = Image.fromarray(np.round(to_rgb(mistake.image / 255) * 255).astype(np.uint8))
        sheet.paste(image.resize(tile, Image.Resampling.NEAREST), (left, upper))
        told = f"{shortened(names[mistake.predicted])} {mistake.confidence:.2f}"
        pen.text((left, upper + tile[1] + 3), told, fill="darkred", font=font)
        pen.text((left, upper + tile[1] + 18), f"is {shortened(names[mistake.label])}", fill="black", font=font)
    return np.asarray(sheet)
