"""blocks.png: top-1 accuracy over the blocks of an encoder."""

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from simmim_jax.files import write_atomically

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe and Ito
MAX_TICKS = 14


def write_chart(path: Path, rows: list[dict], paper: int) -> None:
    """Draw a panel for each pooling and kind of training set: all images, and few-shot subsets.

    paper: the block of the paper's linear evaluation, marked by a dashed line.
    """
    rows = [row for row in rows if row["top1"] is not None]
    if not rows:
        return
    blocks = sorted({row["block"] for row in rows}, key=lambda block: block or math.inf)
    panels: dict[tuple[str, bool], list[dict]] = {}
    for row in rows:
        panels.setdefault((row["pool"], row["images"] != "all"), []).append(row)
    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(7 * columns, 3.8 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for n, axes in enumerate(grid.flat):
        if n >= len(panels):
            axes.set_visible(False)
            continue
        (pool, few), own = list(panels.items())[n]
        draw_panel(axes, own, blocks)
        axes.set_title(
            f"{pool}: {'few labels, mean and range over draws' if few else 'all training images'}", loc="left"
        )
        if paper in blocks and pool == "patches":
            axes.axvline(blocks.index(paper), color="gray", linestyle="--", linewidth=1, zorder=0)
            axes.text(blocks.index(paper), 0.99, " paper", color="gray", va="top", transform=axes.get_xaxis_transform())
    write_atomically(path, lambda partial: figure.savefig(partial, format="png", dpi=100))


def draw_panel(axes: Axes, rows: list[dict], blocks: list[int]) -> None:
    """Draw a curve for each method and setting. Few-shot curves: one color per training set, hollow points for k-NN."""
    curves: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        detail = row["images"] if row["images"] != "all" else row["setting"] if row["method"] == "knn" else ""
        curves.setdefault((row["method"], detail), []).append(row)
    details = list(dict.fromkeys(detail for _, detail in curves))
    for n, ((method, detail), own) in enumerate(curves.items()):
        few = own[0]["images"] != "all"
        top1 = [100 * row["top1"] for row in own]
        low, high = ([100 * (row[key] if few else row["top1"]) for row in own] for key in ("top1_min", "top1_max"))
        hollow = few and method == "knn"
        axes.errorbar(
            [blocks.index(row["block"]) for row in own],
            top1,
            yerr=([a - b for a, b in zip(top1, low, strict=True)], [a - b for a, b in zip(high, top1, strict=True)]),
            color=COLORS[(details.index(detail) if few else n) % len(COLORS)],
            linewidth=1 if hollow else 2,
            elinewidth=1,
            marker="o",
            markersize=5,
            markerfacecolor="white" if hollow else None,
            label=f"{method} {detail}".strip(),
        )
    every = -(-len(blocks) // MAX_TICKS)
    ticks = [n for n in range(len(blocks)) if n % every == 0 or n == len(blocks) - 1]
    axes.set_xticks(ticks, [str(blocks[n]) if blocks[n] else "out" for n in ticks])
    axes.set_xlabel("block")
    axes.set_ylabel("top-1 in %")
    axes.grid(axis="y", color="#e4e4e4")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
