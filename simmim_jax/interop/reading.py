"""Reading weights as others store them: names and arrays, without running anything that a file says.

PyTorch files go through the restricted unpickler of `pickles`; safetensors hold no code.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from simmim_jax.errors import CheckpointError
from simmim_jax.interop import pickles

PICKLED = (".pth", ".pt", ".tar", ".bin")
SUPPORTED = "give a .pth, .pt, .pth.tar, .bin or .safetensors file, or a Hugging Face folder with a config.json"

# What a model works out from its sizes and stores all the same. "k_bias": zeros beside a q_bias and a v_bias.
DERIVED = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked|k_bias)$")


class Weights(NamedTuple):
    """What a file or folder holds: float32 arrays by their names there; `derived` apart, of any type.

    config, pixels: config.json and preprocessor_config.json of a Hugging Face folder, else empty.
    notes: what was changed in reading. sha256: of the weight files, one after another.
    """

    arrays: dict[str, np.ndarray]
    derived: dict[str, np.ndarray]
    config: dict
    pixels: dict
    where: str
    sha256: str
    notes: tuple[str, ...] = ()


def read_weights(path: str) -> Weights:
    """Names and arrays of a file, or of a Hugging Face folder. Raises CheckpointError if it is no such thing."""
    root = Path(path).expanduser()
    if not root.exists():
        raise CheckpointError("no such file or folder", path, SUPPORTED)
    files = _weight_files(root) if root.is_dir() else [root]
    arrays = {}
    for file in files:
        arrays |= _read(file)
    folder = root if root.is_dir() else root.parent
    is_hugging_face = root.is_dir() or root.name in ("model.safetensors", "pytorch_model.bin")
    config = _read_json(folder / "config.json") if is_hugging_face else {}
    if root.is_dir() and not config:
        raise CheckpointError("no config.json", path, "give the folder that save_pretrained wrote, or one weight file")
    arrays, notes = _tidy(arrays)
    derived = {name: x for name, x in arrays.items() if DERIVED.search(name) and not _is_key_bias(name, x)}
    return Weights(
        arrays={name: x for name, x in arrays.items() if name not in derived},
        derived=derived,
        config=config,
        pixels=_read_json(folder / "preprocessor_config.json") if config else {},
        where=str(path),
        sha256=_sha256(files),
        notes=notes,
    )


def _is_key_bias(name: str, x: np.ndarray) -> bool:
    return name.endswith("k_bias") and bool(np.any(x))


def _weight_files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name]
        if (index := folder / f"{name}.index.json").is_file():
            shards = sorted(set(_read_json(index).get("weight_map", {}).values()))
            files = [folder / Path(shard).name for shard in shards]
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(f"{len(missing)} of {len(files)} shards missing: {missing[0]}", str(folder))
            return files
    raise CheckpointError("no model.safetensors or pytorch_model.bin", str(folder), SUPPORTED)


def _read(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"damaged safetensors file: {str(error)[:200]}", str(file), "download or write it again"
            ) from error
    if file.suffix in PICKLED:
        return pickles.state_dict(pickles.read_pth(str(file)), str(file))
    raise CheckpointError(f"unknown kind of file {file.suffix or file.name!r}", str(file), SUPPORTED)


def _tidy(arrays: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Floats as float32; without the prefix of a data-parallel wrapper; old names as new ones."""
    notes = []
    types = {x.dtype.name for name, x in arrays.items() if not DERIVED.search(name)} - {"float32"}
    if types:
        notes.append(f"converted {', '.join(sorted(types))} to float32")
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): x for name, x in arrays.items()}
    if any(".rpe_mlp." in name for name in arrays):  # early Swin V2 files; official load_pretrained renames them too
        arrays = {name.replace(".rpe_mlp.", ".cpb_mlp."): x for name, x in arrays.items()}
        notes.append("took rpe_mlp for cpb_mlp, its later name")
    return {name: x if DERIVED.search(name) else np.asarray(x, dtype=np.float32) for name, x in arrays.items()}, tuple(
        notes
    )


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text()) if path.is_file() else {}
    except (ValueError, OSError):
        content = None
    if not isinstance(content, dict):
        raise CheckpointError("not a JSON object", str(path), "download or write it again")
    return content


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
