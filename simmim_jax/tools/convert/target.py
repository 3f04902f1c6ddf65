"""TO: when `convert` may overwrite it, and how the output replaces what exists.

All output of a conversion is marked, and --overwrite replaces nothing else:

- a workdir has "imported" in its config.json, and no files of a training run;
- safetensors have "made_by" in their metadata, which `save_pretrained` does not copy;
- a StableHLO program has the name of our function.
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
from simmim_jax.tools.cli import check_overwrite

MAKE_ROOM = "make room or fix the folder, or give another TO; nothing that existed has changed"
FOLDERS = {  # the files that a conversion writes to a folder, by kind
    "workdir": {"checkpoints", "config.json"},
    "huggingface": {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"},
}


def check_target(options: argparse.Namespace, kind: str) -> None:
    """Raise ConfigError if TO overlaps with FROM, or exists and must not be replaced.

    kind: the kind of output: "workdir", "huggingface" (any folder for transformers), "safetensors" or "stablehlo".
    """
    source, target = _real(options.source), _real(options.target)
    if source == target or source in target.parents or target in source.parents:
        raise ConfigError("FROM and TO are the same, or one is inside the other", options.target, "give another TO")
    if target.is_dir() and kind not in FOLDERS:
        raise ConfigError(f"a folder, and {kind} is one file", options.target, "give another TO")
    if target.is_dir() and not any(target.iterdir()):
        return
    if target.exists():
        check_overwrite(options.target, overwrite=options.overwrite, is_ours=_is_ours(target, kind))


def _real(path: str) -> Path:
    """The path with links resolved; unlike `Path.resolve` it does not raise for a circle of links."""
    return Path(os.path.realpath(Path(path).expanduser()))


def _is_ours(target: Path, kind: str) -> bool:
    """Whether a conversion has written all of `target`."""
    if kind == "stablehlo":
        return stablehlo.is_ours(target)
    if kind == "safetensors":
        return read_metadata(target).get("made_by") == MADE_BY
    if not target.is_dir() or not {path.name for path in target.iterdir()} <= FOLDERS[kind]:
        return False
    if kind == "huggingface":
        return read_metadata(target / "model.safetensors").get("made_by") == MADE_BY
    try:
        return "imported" in read_json(target / "config.json")
    except CheckpointError:
        return False


@contextlib.contextmanager
def replaced(options: argparse.Namespace) -> Iterator[Path]:
    """A path next to TO to write to. It replaces TO if all goes well; otherwise it is removed and TO stays."""
    target = _real(options.target)
    partial, old = (target.with_name(f".{target.name}.{os.getpid()}.{part}") for part in ("partial", "old"))
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
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write: {error.strerror or error}", options.target, MAKE_ROOM) from error
    except SafetensorError as error:  # raised by its writer on a full disk
        raise CheckpointError(f"cannot write: {str(error)[:200]}", options.target, MAKE_ROOM) from error
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        elif partial.exists():
            partial.unlink()
