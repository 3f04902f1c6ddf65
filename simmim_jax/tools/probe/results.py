"""The results of a probe: rows on disk that later calls extend, and their report on the screen."""

import json
import math
from argparse import Namespace
from collections.abc import Iterable, Iterator
from pathlib import Path

from simmim_jax.errors import ConfigError
from simmim_jax.files import write_atomically
from simmim_jax.tools.cli import to_csv

# options that decide all rows, next to the features, and options that decide the rows of one method
DECIDING_ALL = ("seed", "validation_fraction")
DECIDING = {
    "linear": ("learning_rates", "weight_decays", "epochs", "probe_batch_size"),
    "logistic": ("C",),
    "ridge": ("regularizations",),
    "knn": ("neighbors", "temperature"),
    "fewshot": ("shots", "fractions", "seeds", "temperature"),
}
POOLS = ("patches", "class_token", "both")
COLUMNS = (
    "method", "images", "pool", "block", "paper", "chosen", "setting", "validation_top1", "top1", "top5", "draws",
    "top1_std", "top1_min", "top1_max", "train_images", "test_images", "seconds", "edge",
)  # fmt: skip


def row_method(row: dict) -> str:
    """Return the name of the row's method in `--only`."""
    return row["method"] if row["images"] == "all" else "fewshot"


def block_name(block: int) -> str:
    return f"block {block}" if block else "output"


def deciding_options(options: dict, methods: Iterable[str]) -> dict[str, dict]:
    """Return, for each method, the options that decide its rows, as JSON."""
    as_json = json.loads(json.dumps(options))
    return {name: {key: as_json.get(key) for key in (*DECIDING_ALL, *DECIDING[name])} for name in methods}


def read_results(folder: Path) -> dict:
    """Return results.json, or {} if there is none. Raises ConfigError for files that are not results of a probe."""
    path, fix = folder / "results.csv", "give another OUT"
    if path.exists():
        with open(path, encoding="utf-8-sig", errors="replace") as file:
            if file.readline().strip().split(",") != [*COLUMNS]:
                raise ConfigError("not the results of a probe", str(path), fix)
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text())
        if all(row.keys() == set(COLUMNS) for row in results["rows"]) and results["options_by_method"].keys():
            return results
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError("not the results of a probe", str(path), fix)


class Results:
    """The rows in a folder. header: everything else in results.json."""

    def __init__(self, folder: Path, header: dict, earlier: dict, options: Namespace):
        """Keep the rows of `earlier`, unless other features or options decided them.

        Raises ConfigError if there are such rows and no --overwrite.
        """
        now = deciding_options(vars(options), options.only)
        before = earlier.get("options_by_method", {})
        same = {name for name in before if now.get(name, before[name]) == before[name]}
        if earlier.get("features") != header["features"]:
            same = set()
        self.rows = [row for row in earlier.get("rows", []) if row_method(row) in same]
        if len(self.rows) < len(earlier.get("rows", [])) and not options.overwrite:
            replaced = ", ".join(name for name in before if name not in same)
            what = f"results ({replaced}) of other weights, images or options exist"
            raise ConfigError(what, str(folder), "give --overwrite, or another OUT")
        if self.rows:
            print(f"keeping {len(self.rows)} earlier results", flush=True)
        kept = {name: before[name] for name in before if name in map(row_method, self.rows)}
        self.folder, self.header = folder, header | {"options_by_method": kept | now}

    def missing(self, pool: str, blocks: list[int], methods: tuple[str, ...]) -> dict[int, list[str]]:
        """Return the methods without rows, for each block."""
        there = {(row["block"], row_method(row)) for row in self.rows if row["pool"] == pool}
        return {block: [name for name in methods if (block, name) not in there] for block in blocks}

    def add(self, rows: list[dict]) -> None:
        self.rows += [{name: row.get(name) for name in COLUMNS} for row in rows]

    def write(self) -> None:
        """Sort the rows, mark the best ones and write both files."""
        methods = tuple(DECIDING)
        self.rows.sort(
            key=lambda row: (POOLS.index(row["pool"]), row["block"] or math.inf, methods.index(row_method(row)))
        )
        best = best_rows(self.rows)
        for row in self.rows:
            row["chosen"] = row is best.get((row["method"], row["images"]))
        content = self.header | {"edges": [*edges(self.rows)], "rows": self.rows}
        write_atomically(self.folder / "results.json", json.dumps(content, indent=2) + "\n")
        text = to_csv([COLUMNS, *([row[name] for name in COLUMNS] for row in self.rows)])
        write_atomically(self.folder / "results.csv", text)


def best_rows(rows: list[dict]) -> dict[tuple[str, str], dict]:
    """Return the row with the best validation accuracy for each (method, images), unless all of them diverged."""
    best: dict[tuple[str, str], dict] = {}
    for row in rows:
        key, value = (row["method"], row["images"]), row["validation_top1"]
        if value is not None and (key not in best or value > best[key]["validation_top1"]):
            best[key] = row
    return best


def edges(rows: list[dict]) -> Iterator[str]:
    """Yield a line for each grid that ended too early, with the blocks that it concerns."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.get("edge"):
            found.setdefault((row["method"], row["edge"]), []).append(f"{block_name(row['block'])} of {row['pool']}")
    for (method, edge), where in found.items():
        yield f"{method}, {', '.join(where)}: {edge}"


def block_summary(rows: list[dict]) -> str:
    """Return one line for a block: the best top-1 of each method on all training images, or else on few."""
    shown = [row for row in rows if row["images"] == "all"] or rows
    best, parts = best_rows(shown), []
    for method, images in dict.fromkeys((row["method"], row["images"]) for row in shown):
        row = best.get((method, images))
        name = method if images == "all" else f"{method} {images}"
        parts.append(f"{name} {100 * row['top1']:.1f}" if row else f"{name} diverged")
    seconds = sum({(row["method"], row["images"]): row["seconds"] for row in rows}.values())
    return f"{block_name(rows[0]['block'])}, {rows[0]['pool']}: {', '.join(parts)} ({seconds:.1f} s)"


def table(rows: list[dict], paper: int, depth: int) -> Iterator[str]:
    """Yield lines: for each method, the accuracy of the paper's block and of the block that validation chose."""
    yield f"\npaper: block {paper} of {depth}, mean of patch tokens; best: the block that the validation images choose"
    yield f"{'method':10}{'images':13}{'paper top-1':>17}{'top-5':>8}   {'best top-1':>17}{'top-5':>8}   setting"
    of_paper, of_all = best_rows([row for row in rows if row["paper"]]), best_rows(rows)
    for key in dict.fromkeys((row["method"], row["images"]) for row in rows):
        best = of_all.get(key)
        setting = f"{block_name(best['block'])}, {best['pool']}, {best['setting']}" if best else "diverged everywhere"
        yield f"{key[0]:10}{key[1]:13}{_percent(of_paper.get(key))}   {_percent(best)}   {setting}"


def _percent(row: dict | None) -> str:
    if row is None:
        return f"{'-':>17}{'-':>8}"
    spread = f" +- {100 * row['top1_std']:4.2f}" if row["top1_std"] is not None else ""
    top5 = f"{100 * row['top5']:.2f}" if row["top5"] is not None else "-"
    top1 = f"{100 * row['top1']:.2f}{spread}"
    return f"{top1:>17}{top5:>8}"
