"""Reading weights as others store them: names and arrays, without running anything that a file says.

PyTorch files go through the restricted unpickler of `pickles`; safetensors hold no code.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from simmim_jax import files
from simmim_jax.errors import CheckpointError
from simmim_jax.interop import pth

MADE_BY = "simmim_jax"  # in the metadata of the safetensors that we write
PICKLED = (".pth", ".pt", ".tar", ".bin")
SUPPORTED = "give a .pth, .pt, .pth.tar, .bin or .safetensors file, or a Hugging Face folder with a config.json"

# What a model works out from its sizes and stores all the same. "k_bias": zeros beside a q_bias and a v_bias.
DERIVED = re.compile(r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked|k_bias)$")


class Weights(NamedTuple):
    """What a file or folder holds: float32 arrays by their names there; `derived` apart, of any type.

    config, pixels: config.json and preprocessor_config.json of a Hugging Face folder, else empty.
    notes: what was changed in reading. sha256: of the weight files, one after another. made: where we wrote the file,
    what its metadata says of the model, as exports put it there; else empty.
    """

    arrays: dict[str, np.ndarray]
    derived: dict[str, np.ndarray]
    config: dict
    pixels: dict
    where: str
    sha256: str
    notes: tuple[str, ...] = ()
    made: dict = {}  # noqa: RUF012 - a NamedTuple's default, never written to


def read_weights(path: str) -> Weights:
    """Names and arrays of a file, or of a Hugging Face folder. Raises CheckpointError if it is no such thing."""
    root = Path(path).expanduser()
    if not root.exists():
        raise CheckpointError("no such file or folder", path, SUPPORTED)
    files, weight_map = _weight_files(root) if root.is_dir() else ([root], {})
    arrays = _read_shards(files, weight_map) if len(files) > 1 else _read(files[0])
    folder = root if root.is_dir() else root.parent
    is_hugging_face = root.is_dir() or root.name in ("model.safetensors", "pytorch_model.bin")
    config_json = read_json(folder / "config.json") if is_hugging_face else {}
    if root.is_dir() and not config_json:
        raise CheckpointError("no config.json", path, "give the folder that save_pretrained wrote, or one weight file")
    arrays, notes = _tidy(arrays, str(path))
    derived = {name: x for name, x in arrays.items() if DERIVED.search(name) and not _is_key_bias(name, x)}
    return Weights(
        arrays={name: x for name, x in arrays.items() if name not in derived},
        derived=derived,
        config=config_json,
        pixels=read_json(folder / "preprocessor_config.json") if config_json else {},
        where=str(path),
        sha256=_sha256(files),
        notes=notes,
        made=_made(files[0]) if len(files) == 1 else {},
    )


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty where there is none, or no such file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return {}


def _made(file: Path) -> dict:
    """What the metadata of a file of ours says of its model."""
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    if metadata.get("made_by") != MADE_BY or "model" not in metadata:
        return {}
    try:
        made = json.loads(metadata["model"])
        whole = {"encoder": dict, "objective": dict, "image_size": list, "mean": list, "std": list}
        if all(type(made[name]) is kind for name, kind in whole.items()):
            return made | {"names": metadata["names"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise CheckpointError("damaged metadata of a file that simmim_jax wrote", str(file), "export it again")


def _is_key_bias(name: str, x: np.ndarray) -> bool:
    return name.endswith("k_bias") and bool(np.any(x))


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The files of a folder, and in which of them each array is, where an index says it."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name], {}
        if (index := folder / f"{name}.index.json").is_file():
            weight_map = read_json(index).get("weight_map")
            is_map = isinstance(weight_map, dict) and weight_map
            if not is_map or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
                raise CheckpointError(
                    "its weight_map does not give the file of each array", str(index), "download or write it again"
                )
            files = [folder / shard for shard in sorted(set(weight_map.values()))]
            if missing := [file.name for file in files if not file.is_file()]:
                raise CheckpointError(
                    f"{len(missing)} of {len(files)} shards missing: {missing[0]}", str(folder), "download the rest"
                )
            return files, weight_map
    raise CheckpointError("no model.safetensors or pytorch_model.bin", str(folder), SUPPORTED)


def _read_shards(files: list[Path], weight_map: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of all files, each from the one that the index names."""
    arrays, found_in = {}, {}
    for file in files:
        for name, array in _read(file).items():
            if weight_map.get(name, file.name) != file.name:
                continue
            if name in arrays:
                raise CheckpointError(
                    f"{name} is in both {found_in[name]} and {file.name}, and the index does not say which it is",
                    str(file.parent), "give the folder as save_pretrained wrote it",
                )  # fmt: skip
            arrays[name], found_in[name] = array, file.name
    if missing := sorted(weight_map.keys() - arrays.keys()):
        raise CheckpointError(
            f"{len(missing)} arrays are not in the files that the index names: {missing[0]} is not in "
            f"{weight_map[missing[0]]}", str(files[0].parent), "download or write it again",
        )  # fmt: skip
    return arrays


def _read(file: Path) -> dict[str, np.ndarray]:
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                f"damaged safetensors file: {str(error)[:200]}", str(file), "download or write it again"
            ) from error
    if file.suffix in PICKLED:
        arrays = pth.state_dict(pth.read_pth(str(file)), str(file))
        pth.check_expanded_size(arrays, file)
        return arrays
    raise CheckpointError(f"unknown kind of file {file.suffix or file.name!r}", str(file), SUPPORTED)


def _tidy(arrays: dict[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Floats as float32; without the prefix of a data-parallel wrapper; old names as new ones.

    Integers stay what they are: `rules.to_ours` refuses those that a model would need.
    """
    notes = []
    if arrays and all(name.startswith("module.") for name in arrays):
        arrays = {name.removeprefix("module."): x for name, x in arrays.items()}
    if any(".rpe_mlp." in name for name in arrays):  # early Swin V2 files; official load_pretrained renames them too
        if any(".cpb_mlp." in name for name in arrays):
            raise CheckpointError(
                "both rpe_mlp and cpb_mlp, two names of one thing", where, "give a file with one of them"
            )
        arrays = {name.replace(".rpe_mlp.", ".cpb_mlp."): x for name, x in arrays.items()}
        notes.append("took rpe_mlp for cpb_mlp, its later name")
    floats = {name for name, x in arrays.items() if x.dtype.kind not in "biuc" and not DERIVED.search(name)}
    types = {arrays[name].dtype.name for name in floats} - {"float32"}
    if types:
        notes.insert(0, f"converted {', '.join(sorted(types))} to float32")
    with np.errstate(over="ignore"):  # float64 beyond float32: told below
        arrays = {name: np.asarray(x, dtype=np.float32) if name in floats else x for name, x in arrays.items()}
    if broken := [name for name in sorted(floats) if not np.isfinite(arrays[name]).all()]:
        notes.append(f"not all finite: {len(broken)} arrays have NaN or infinite values, like {broken[0]}")
    return arrays, tuple(notes)


def read_json(path: Path) -> dict:
    """A JSON object; empty where there is no such file. Raises CheckpointError if it is anything else."""
    return files.read_json(path, CheckpointError, "download or write it again")


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
