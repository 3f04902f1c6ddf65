"""results.csv: a row for each evaluation of a classifier.

The columns are timm's, accuracies in percent and parameters in millions, followed by ours. Rows may be appended by
several processes at once. A process that is killed leaves a whole file.
"""

import datetime
import fcntl
import importlib.metadata
import os
import subprocess
from pathlib import Path

import jax

from simmim_jax.errors import DataError
from simmim_jax.models import ENCODERS
from simmim_jax.runs.finished import Run, format_size
from simmim_jax.tools.cli import to_csv

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


def is_ours(path: Path) -> bool:
    """Whether rows can be appended to an existing file: it is empty or has our columns. Raises OSError."""
    with open(path, "r+b") as file:  # fails if it is read-only
        line = file.readline()
    return not line or line.decode("utf-8-sig", "replace").strip() == ",".join(COLUMNS)


def append_row(path: Path, row: dict[str, str]) -> None:
    """Append a line, after the header if the file is new: in one write, under a lock, or not at all.

    Raises DataError.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b", buffering=0) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not is_ours(path):  # it has appeared during the evaluation
                raise DataError("exists, and simmim_jax has not written it", str(path), "give another --results")
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            unfinished = size and file.read(1) != b"\n"
            lines = [[row[name] for name in COLUMNS]]
            text = ("\n" if unfinished else "") + to_csv(lines if size else [COLUMNS, *lines])
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
