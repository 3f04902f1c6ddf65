"""The confusion matrix of a classifier, as tables and a picture, and the images with the most confident mistakes.

Shape letters: c classes, n images, y x pixels. Rows are true classes, columns are predicted classes.
"""

import io
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from simmim_jax.evals.accuracy import TOP, Answers
from simmim_jax.evals.sheet import Tile, grid, make_tile
from simmim_jax.tools.cli import to_csv

COLUMNS = ("class", "images", "top1", "top5", "most_confused_with", "times")
MAX_CLASSES = 2000  # a matrix of more classes takes gigabytes
MAX_NAMED = 40  # classes up to which the picture has names and numbers
MAX_LETTERS = 28  # of a class name in a picture
CELL = 0.34  # inches, with names
SIDE = 10.0  # inches of a matrix without names
LINE = 16  # points per line of the list
MIN_TILE = 128  # pixels of the shorter side of a mistake


def confusion_matrix(answers: Answers, classes: int) -> Int[np.ndarray, "c c"]:
    """Count the images of each true class (row) and predicted class (column)."""
    matrix = np.zeros((classes, classes), np.int64)
    np.add.at(matrix, (answers.label, answers.predicted), 1)
    return matrix


def most_confused_with(answers: Answers, classes: int) -> tuple[Int[np.ndarray, " c"], Int[np.ndarray, " c"]]:
    """Return, for each class, (the most frequent wrong prediction, or -1; its count)."""
    wrong = answers.label != answers.predicted
    pairs, counts = np.unique(np.stack([answers.label[wrong], answers.predicted[wrong]]), axis=1, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    labels, first = np.unique(pairs[0, order], return_index=True)
    others, times = np.full(classes, -1, np.int64), np.zeros(classes, np.int64)
    others[labels], times[labels] = pairs[1, order][first], counts[order][first]
    return others, times


def classes_csv(answers: Answers, names: Sequence[str]) -> str:
    """Return a row of `COLUMNS` for each class. Accuracies are percentages, empty if they are undefined."""
    images = np.bincount(answers.label, minlength=len(names))
    hits = {k: np.bincount(answers.label[answers.rank < k], minlength=len(names)) for k in (1, TOP)}
    others, times = most_confused_with(answers, len(names))
    rows = []
    for n, name in enumerate(names):
        top = [f"{100 * hits[k][n] / images[n]:.2f}" if images[n] and k < len(names) else "" for k in (1, TOP)]
        rows.append([name, int(images[n]), *top, names[others[n]] if others[n] >= 0 else "", int(times[n])])
    return to_csv([COLUMNS, *rows])


def draw_confusion(matrix: Int[np.ndarray, "c c"], names: Sequence[str]) -> Tile:
    """Draw the matrix, each row as fractions of its class, and list the most confused pairs.

    Correct cells are blue and wrong ones are red. Up to `MAX_NAMED` classes have names and numbers.
    """
    count = len(names)
    named = count <= MAX_NAMED
    side = CELL * count if named else SIDE
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))
    fractions = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    axes.imshow(cell_colors(fractions), interpolation="nearest", aspect="auto")
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if named:
        labels = [short_name(name) for name in names]
        axes.set_xticks(range(count), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(count), labels, parse_math=False)
        for n, m in np.argwhere(matrix):
            color = "white" if fractions[n, m] > 0.45 else "black"
            axes.text(m, n, str(matrix[n, m]), color=color, ha="center", va="center", fontsize=8)
    else:
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(12, integer=True))
    lines = most_confused_pairs(matrix, names, max(10, int(side * 72 / LINE) - 1))
    for line, text in enumerate(["true → predicted", *lines] if lines else []):
        offset = (15, -LINE * line)
        where = {"xy": (1, 1), "xycoords": "axes fraction", "xytext": offset, "textcoords": "offset points"}
        axes.annotate(text, **where, va="top", weight="normal" if line else "bold", parse_math=False)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    return np.asarray(Image.open(file).convert("RGB"))


def most_confused_pairs(matrix: Int[np.ndarray, "c c"], names: Sequence[str], limit: int) -> list[str]:
    """Return a line for each of the `limit` wrong cells with the most images."""
    wrong = matrix * ~np.eye(len(matrix), dtype=bool)
    order = np.argsort(-wrong, axis=None, kind="stable")[:limit]
    cells = [np.unravel_index(index, wrong.shape) for index in order if wrong.flat[index]]
    number = (lambda n: f"{n} ") if len(names) > MAX_NAMED else (lambda n: "")
    label = lambda n: number(n) + short_name(names[n])  # noqa: E731
    return [f"{wrong[n, m]} x {label(n)} → {label(m)}" for n, m in cells]


def cell_colors(fractions: Float[np.ndarray, "c c"]) -> UInt8[np.ndarray, "c c 3"]:
    """Return white for 0, blue on the diagonal, red elsewhere. The square root makes small fractions visible."""
    darkest = np.where(np.eye(len(fractions), dtype=bool)[..., None], (20, 60, 160), (170, 0, 20))
    return np.round(255 + (darkest - 255) * np.sqrt(fractions)[..., None]).astype(np.uint8)


def short_name(name: str) -> str:
    """Return a name on one line, in at most `MAX_LETTERS` letters that every font has."""
    name = " ".join(name.split()).encode("latin-1", "replace").decode("latin-1")
    return name if len(name) <= MAX_LETTERS else name[: MAX_LETTERS - 3] + "..."


class Mistake(NamedTuple):
    """An image with a wrong prediction. image: as the model received it. confidence: of the prediction, 0..1."""

    confidence: float
    batch_index: int
    label: int
    predicted: int
    image: UInt8[np.ndarray, "y x _"]


class Mistakes:
    """The `limit` most confident mistakes, collected batch by batch."""

    def __init__(self, limit: int):
        self.limit, self.kept = limit, []

    def add(self, images: UInt8[np.ndarray, "n y x _"], answers: Answers) -> None:
        """Add the mistakes of a batch. images: those of `answers`."""
        for n in np.flatnonzero(answers.rank > 0):
            answer = (float(answers.confidence[n]), int(answers.batch_index[n]), int(answers.label[n]))
            image = images[n].copy()  # a view would keep the whole batch in memory
            self.kept.append(Mistake(*answer, int(answers.predicted[n]), image))
        self.kept = sorted(self.kept, key=lambda mistake: (-mistake.confidence, mistake.batch_index))[: self.limit]


def draw_mistakes(mistakes: Sequence[Mistake], names: Sequence[str]) -> Tile:
    """Draw a sheet of images, each with the predicted class, its confidence and the true class."""
    captions = [f"{names[m.predicted]} {m.confidence:.2f}\nis {names[m.label]}" for m in mistakes]
    return grid([make_tile(mistake.image, MIN_TILE) for mistake in mistakes], captions)
