"""results.csv: a row for each evaluation of a classifier.

The columns are timm's, accuracies in percent and parameters in millions, followed by ours. Rows may be appended by
several processes at once. A process that is killed leaves a whole file.
"""

import csv
import datetime
import fcntl
import importlib.metadata
import io
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import jax

from simmim_jax.errors import ConfigError, DataError
from simmim_jax.files import utf8_name
from simmim_jax.models import ENCODERS
from simmim_jax.runs.finished import Run, format_size

TIMM_COLUMNS = ("model", "img_size", "top1", "top1_err", "top5", "top5_err", "param_count", "crop_pct", "interpolation")
COLUMNS = (*TIMM_COLUMNS, "images", "run", "step", "data", "date", "version")


def make_row(run: Run, metrics: dict[str, float], given: dict[str, str]) -> dict[str, str]:
    """A row by column. metrics: "images", "top1" and, for more than five classes, "top5". given: other columns."""
    row = {}
    for name in ("top1", "top5"):
        percent = 100 * metrics[name] if name in metrics else None
        row[name] = "" if percent is None else f"{percent:.3f}"
        row[f"{name}_err"] = "" if percent is None else f"{100 - percent:.3f}"
    return (
        row
        | {
            "model": model_name(run),
            "img_size": format_size(run.image_size),
            "param_count": f"{count_parameters(run.params) / 1e6:.2f}",
            "images": f"{metrics['images']:.0f}",
            "step": str(run.step),
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            "version": version(),
        }
        | given
    )


def model_name(run: Run) -> str:
    """Name and size, like vit_b; only the name if the encoder differs from the size's table."""
    name, size = run.config["encoder"]["name"], run.config["encoder"].get("size")
    sizes = ENCODERS[name][1]
    same = size in sizes and sizes[size].items() <= run.encoder.options().items()
    return f"{name}_{size}" if same else name


def count_parameters(params) -> int:
    """The number of learned parameters, without the running statistics of batch norm."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return sum(x.size for path, x in leaves if path[-1].key not in ("mean", "var"))


def version() -> str:
    """The commit of this code, with + if files are changed; outside a git repository its version."""
    root = Path(__file__).parents[3]
    if (root / ".git").exists():
        try:
            git = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
            return subprocess.run(git, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            pass
    try:
        return importlib.metadata.version("simmim_jax")
    except importlib.metadata.PackageNotFoundError:
        return ""


def format_line(values: Sequence[str]) -> str:
    """A line of CSV. Line breaks in a value become spaces."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([" ".join(utf8_name(value).split()) for value in values])
    return text.getvalue()


def check_results(path: Path) -> None:
    """Raise ConfigError, before anything is computed, if no row can be appended to the file."""
    if path.is_dir():
        raise ConfigError("a folder", str(path), "give a file, like --results=results.csv")
    existing = next(each for each in (path, *path.absolute().parents) if each.exists())
    if existing != path and not existing.is_dir():
        raise ConfigError("no folder", str(existing), "give another --results")
    if not os.access(existing, os.W_OK):
        raise ConfigError("no permission to write", str(existing), "give another --results")
    if existing == path:
        with open(path, "rb") as file:
            check_header(path, file.readline())


def check_header(path: Path, line: bytes) -> None:
    """Raise ConfigError unless `line`, the first of a file, is empty or that of `COLUMNS`."""
    columns = next(csv.reader([line.decode("utf-8-sig", "replace").strip()]), [])
    if line and tuple(columns) != COLUMNS:
        other = next((name for name in columns if name not in COLUMNS), "") or "too few"
        raise ConfigError(f"a file with other columns ({other[:40]})", str(path), "give another --results")


def append_row(path: Path, row: dict[str, str]) -> None:
    """Append a line, after the header if the file is new: in one write, under a lock, or not at all.

    Raises DataError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            check_header(path, file.readline())
            file.seek(max(size - 1, 0))
            unfinished = size and file.read(1) != b"\n"
            text = format_line([row[name] for name in COLUMNS])
            text = ("\n" if unfinished else "" if size else format_line(COLUMNS)) + text
            try:
                if file.write(text.encode()) != len(text.encode()):
                    raise OSError(28, "No space left on device", str(path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        what = f"no row was added: {error.strerror or error}"
        raise DataError(what, str(path), "free space; the file is unchanged") from error
