"""TO: what `convert` may write over, and how what it writes takes its place.

What a conversion has written bears a mark, and `--overwrite` replaces that and nothing else: "imported" in the
config.json of a workdir that has not been trained in, "made_by" in the metadata of safetensors, which
`save_pretrained` does not hand on, and the name of the function in a StableHLO program.
"""

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.interop import stablehlo
from simmim_jax.interop.reading import MADE_BY, read_json, read_metadata

MAKE_ROOM = "make room or mend the folder, or give another TO; what was there is as it was"
OURS = {  # all that a conversion puts into a folder
    "workdir": {"checkpoints", "config.json"},
    "huggingface": {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"},
}


def check_target(options: argparse.Namespace, kind: str) -> None:
    """Refuse a TO that is FROM, or that holds anything, unless told to overwrite what a conversion has written.

    kind: of what will be written, "workdir" or a format.
    """
    source, target = _real(options.source), _real(options.target)
    if source == target or source in target.parents or target in source.parents:
        raise ConfigError("FROM and TO are the same, or one lies in the other", options.target, "give another TO")
    if target.is_dir() and kind not in OURS:
        raise ConfigError(f"a folder, where {kind} is one file", options.target, "give another TO")
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not options.overwrite:
        raise ConfigError("there is something already", options.target, "give another TO, or --overwrite")
    if reason := _not_ours(target, kind):
        raise ConfigError(f"{reason}, so --overwrite leaves it", options.target, "give another TO")


def _real(path: str) -> Path:
    """The path that links lead to; `Path.resolve` raises where they lead in a circle."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _not_ours(target: Path, kind: str) -> str:
    """Why `target` is not what a conversion of this `kind` wrote; empty if it is."""
    if kind not in OURS:
        is_ours = stablehlo.is_ours(target) if kind == "stablehlo" else read_metadata(target).get("made_by") == MADE_BY
        return "" if is_ours else f"no conversion to {kind} has written this file"
    if not target.is_dir():
        return "no folder"
    if any((target / name).exists() for name in ("metrics.jsonl", "summary.json")):
        return "a run has gone on in this folder"
    if kind == "workdir":
        try:
            is_ours = "imported" in read_json(target / "config.json")
        except CheckpointError:
            is_ours = False
    else:
        is_ours = read_metadata(target / "model.safetensors").get("made_by") == MADE_BY
    if not is_ours:
        what = "import" if kind == "workdir" else f"conversion to {kind}"
        return f"no {what} has written this folder"
    surplus = sorted(path.name for path in target.iterdir() if path.name not in OURS[kind])
    return f"it holds {surplus[0]!r} too, which no conversion has written" if surplus else ""


@contextlib.contextmanager
def replaced(options: argparse.Namespace) -> Iterator[Path]:
    """A path beside TO to write to; what is there takes TO's place when all is written, and is gone if it is not."""
    target = _real(options.target)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    old = target.with_name(f".{target.name}.{os.getpid()}.old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        if target.is_dir():
            target.rename(old)
        try:
            partial.replace(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror or error}", options.target, MAKE_ROOM) from error
    except SafetensorError as error:  # what its writer says of a full disk
        raise CheckpointError(f"cannot write: {str(error)[:200]}", options.target, MAKE_ROOM) from error
    finally:
        for path in (partial, old):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            elif path.exists():
                path.unlink()
