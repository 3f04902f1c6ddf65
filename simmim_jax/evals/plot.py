"""Accuracy over the blocks of an encoder, as a picture."""

from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito's
WIDTH, HEIGHT = 700, 380  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 62, 170, 34, 46  # around its axes; the names of the curves are at the right
SHARPNESS = 3  # drawn so much larger, and reduced: Pillow's lines are not smooth


class Curve(NamedTuple):
    """points: (index of the block's tick, value, least, process_max) in percent. color: its place among `COLOURS`."""

    name: str
    points: list[tuple[int, float, float, float]]
    color: int
    hollow: bool = False  # points as rings on a thin line: for the second of two curves of one color


class Panel(NamedTuple):
    """marked: the tick of the block that the paper reads, marked by a dashed line."""

    title: str
    curves: list[Curve]
    marked: int | None = None


def draw_curves(panels: list[Panel], ticks: list[str], columns: int = 2) -> UInt8[np.ndarray, "h w 3"]:
    """The panels side by side, `columns` in a row, each with a scale of its own. ticks: names of the blocks."""
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    sheet = Image.new("RGB", (columns * WIDTH * SHARPNESS, rows * HEIGHT * SHARPNESS), "white")
    for n, panel in enumerate(panels):
        drawn = _draw_panel(panel, ticks)
        sheet.paste(drawn, (n % columns * drawn.width, n // columns * drawn.height))
    return np.asarray(sheet.resize((columns * WIDTH, rows * HEIGHT), Image.Resampling.LANCZOS))


def _draw_panel(content: Panel, ticks: list[str]) -> Image.Image:
    title, curves, marked = content
    s = SHARPNESS
    panel = Image.new("RGB", (WIDTH * s, HEIGHT * s), "white")
    pen = ImageDraw.Draw(panel)
    font, small = ImageFont.load_default(14 * s), ImageFont.load_default(12 * s)
    left, right, top, bottom = LEFT * s, (WIDTH - RIGHT) * s, TOP * s, (HEIGHT - BOTTOM) * s
    low, high, step = scale_of([value for curve in curves for point in curve.points for value in point[1:]])

    def place(tick: int | float, value: float) -> tuple[float, float]:
        across = (tick + 0.5) / len(ticks)
        return left + across * (right - left), bottom - (value - low) / (high - low) * (bottom - top)

    pen.text((left, 8 * s), title, fill="black", font=font)
    for value in np.arange(low, high + step / 2, step):
        y = place(0, value)[1]
        pen.line([(left, y), (right, y)], fill="#e4e4e4", width=s)
        pen.text((left - 6 * s, y), f"{value:g} %", fill="black", font=small, anchor="rm")
    every = -(-len(ticks) // 14)
    for n, tick in enumerate(ticks):
        if n % every == 0 or n == len(ticks) - 1:
            pen.text((place(n, low)[0], bottom + 6 * s), tick, fill="black", font=small, anchor="mt")
    pen.text(((left + right) / 2, bottom + 24 * s), "block", fill="black", font=small, anchor="mt")
    if marked is not None:
        x = place(marked, low)[0]
        for y in range(top, bottom, 8 * s):
            pen.line([(x, y), (x, min(y + 4 * s, bottom))], fill="#888888", width=s)
        pen.text((x + 4 * s, top), "paper", fill="#666666", font=small)
    pen.rectangle([left, top, right, bottom], outline="#888888", width=s)
    for n, curve in enumerate(curves):
        color, inside = COLOURS[curve.color % len(COLOURS)], "white" if curve.hollow else None
        width = s if curve.hollow else 2 * s
        pen.line([place(tick, value) for tick, value, _, _ in curve.points], fill=color, width=width, joint="curve")
        for tick, value, least, process_max in curve.points:
            x, y = place(tick, value)
            pen.line([place(tick, least), place(tick, process_max)], fill=color, width=s)
            box = [x - 3 * s, y - 3 * s, x + 3 * s, y + 3 * s]
            pen.ellipse(box, fill=inside or color, outline=color, width=s)
        y = top + (8 + 18 * n) * s
        pen.line([(right + 10 * s, y), (right + 28 * s, y)], fill=color, width=width)
        box = [right + 16 * s, y - 3 * s, right + 22 * s, y + 3 * s]
        pen.ellipse(box, fill=inside or color, outline=color, width=s)
        pen.text((right + 34 * s, y), curve.name, fill="black", font=small, anchor="lm")
    return panel


def scale_of(values: list[float]) -> tuple[float, float, float]:
    """(low, high, step) of an axis of percent that holds all values, with four to eight steps that are round."""
    low, high = min(values), max(values)
    step = next((s for s in (0.1, 0.2, 0.5, 1, 2, 5, 10) if (high - low) / s <= 6), 20)
    low = max(0.0, np.floor(low / step) * step)
    high = max(np.ceil(high / step) * step, low + step)
    return float(low), float(high), float(step)
