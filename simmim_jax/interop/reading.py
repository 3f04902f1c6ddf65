"""Read files of weights: names and arrays. Nothing in a file is run; see `pickles`."""

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
from simmim_jax.interop import pth, selection

MADE_BY = "simmim_jax"  # "made_by" in the metadata of safetensors that we write
PICKLED = (".pth", ".pt", ".tar", ".bin", ".ckpt")
SUPPORTED = "give a .pth, .pt, .pth.tar, .ckpt, .bin or .safetensors file, or a Hugging Face folder with a config.json"
AGAIN = "download or write it again"

# Buffers that follow from a model's sizes. "k_bias": zeros that are stored next to a q_bias and a v_bias.
DERIVED = re.compile(
    r"(^|\.)(relative_position_index|relative_coords_table|attn_mask|num_batches_tracked|n_averaged|k_bias)$"
)


class Weights(NamedTuple):
    """The content of a file or folder.

    arrays: float32, by the names in the file. Integers keep their type; `rules.to_ours` refuses them.
    derived: buffers that are no weights, of any type.
    config, preprocessor: config.json and preprocessor_config.json of a Hugging Face folder, else {}.
    where: the path, for error messages.
    sha256: of the weight files, one after another.
    notes: which weights of several were taken, and what was changed on reading.
    key: where they are in the file; "" if it holds nothing else.
    made: the model that our own export wrote into the metadata, else {}.
    """

    arrays: dict[str, np.ndarray]
    derived: dict[str, np.ndarray]
    config: dict
    preprocessor: dict
    where: str
    sha256: str
    notes: tuple[str, ...] = ()
    key: str = ""
    made: dict = {}  # noqa: RUF012 - the default of a NamedTuple; nothing writes to it


def read_weights(path: str, key: str = "", average: bool | None = None) -> Weights:
    """Read a file of weights or a Hugging Face folder. Raises CheckpointError.

    key, average: which weights of several in the file, see `selection.select`.
    """
    root = Path(path).expanduser()
    if not root.exists():
        raise CheckpointError("no such file or folder", path, SUPPORTED)
    paths, weight_map = _weight_files(root) if root.is_dir() else ([root], {})
    sets = {"": _read_shards(paths, weight_map)} if len(paths) > 1 else _read(paths[0])
    taken = selection.select(sets, str(path), key, average)
    pth.check_expanded_size(taken.arrays, paths)
    folder = root if root.is_dir() else root.parent
    is_hugging_face = root.is_dir() or root.name in ("model.safetensors", "pytorch_model.bin")
    config = read_json(folder / "config.json") if is_hugging_face else {}
    if root.is_dir() and not config:
        raise CheckpointError("no config.json", path, "give the folder that save_pretrained wrote, or one weight file")
    arrays, notes = _normalize(taken.arrays, str(path))
    derived = {name: x for name, x in arrays.items() if DERIVED.search(name) and not _is_key_bias(name, x)}
    return Weights(
        arrays={name: x for name, x in arrays.items() if name not in derived},
        derived=derived,
        config=config,
        preprocessor=read_json(folder / "preprocessor_config.json") if config else {},
        where=str(path),
        sha256=_sha256(paths),
        notes=(taken.note, *notes) if taken.note else notes,
        key=taken.key,
        made=_made(paths[0]) if len(paths) == 1 else {},
    )


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} if it has none, or cannot be read."""
    try:
        with safe_open(file, framework="numpy") as opened:
            return opened.metadata() or {}
    except (SafetensorError, OSError, ValueError):
        return {}


def read_json(path: Path) -> dict:
    """A JSON object, or {} if the file does not exist. Raises CheckpointError for anything else."""
    return files.read_json(path, CheckpointError, AGAIN)


def _made(file: Path) -> dict:
    """The model in the metadata of a file that we wrote, else {}."""
    metadata = read_metadata(file) if file.suffix == ".safetensors" else {}
    if metadata.get("made_by") != MADE_BY or "model" not in metadata:
        return {}
    try:
        made = json.loads(metadata["model"])
        types = {"encoder": dict, "objective": dict, "image_size": list, "mean": list, "std": list}
        if all(type(made[name]) is kind for name, kind in types.items()):
            return made | {"names": metadata["names"]}
    except (ValueError, LookupError, TypeError, RecursionError):
        pass
    raise CheckpointError("damaged metadata in a file that simmim_jax wrote", str(file), "export it again")


def _is_key_bias(name: str, x: np.ndarray) -> bool:
    return name.endswith("k_bias") and bool(np.any(x))


def _weight_files(folder: Path) -> tuple[list[Path], dict[str, str]]:
    """The weight files of a folder, and the file of each array if there is an index."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return [folder / name], {}
        if (index := folder / f"{name}.index.json").is_file():
            weight_map = read_json(index).get("weight_map")
            is_map = isinstance(weight_map, dict) and weight_map
            if not is_map or not all(isinstance(file, str) and Path(file).name == file for file in weight_map.values()):
                raise CheckpointError("its weight_map does not give the file of each array", str(index), AGAIN)
            paths = [folder / shard for shard in sorted(set(weight_map.values()))]
            if missing := [path.name for path in paths if not path.is_file()]:
                what = f"{len(missing)} of {len(paths)} shards missing: {missing[0]}"
                raise CheckpointError(what, str(folder), "download the rest")
            return paths, weight_map
    raise CheckpointError("no model.safetensors or pytorch_model.bin", str(folder), SUPPORTED)


def _read_shards(paths: list[Path], weight_map: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of all files, each from the file that the index names."""
    arrays, found_in = {}, {}
    for path in paths:
        for name, array in next(iter(_read(path).values())).items():
            if weight_map.get(name, path.name) != path.name:
                continue
            if name in arrays:
                what = f"{name} is in both {found_in[name]} and {path.name}, and the index does not have it"
                raise CheckpointError(what, str(path.parent), "give the folder as save_pretrained wrote it")
            arrays[name], found_in[name] = array, path.name
    if missing := sorted(weight_map.keys() - arrays.keys()):
        what = f"{len(missing)} arrays are not in the file that the index names: {missing[0]} is not in "
        raise CheckpointError(what + weight_map[missing[0]], str(paths[0].parent), AGAIN)
    return arrays


def _read(file: Path) -> dict[str, dict[str, np.ndarray]]:
    """All state dicts in a file, by key."""
    if file.suffix == ".safetensors":
        try:
            return {"": load_file(file)}
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"damaged safetensors file: {str(error)[:200]}", str(file), AGAIN) from error
    if file.suffix in PICKLED:
        return selection.state_dicts(pth.read_pth(str(file)), str(file))
    raise CheckpointError(f"unknown kind of file {file.suffix or file.name!r}", str(file), SUPPORTED)


def _normalize(arrays: dict[str, np.ndarray], where: str) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """(arrays with floats as float32 and with current names; notes)."""
    notes = []
    if any(".rpe_mlp." in name for name in arrays):  # early Swin V2 files; the official load_pretrained renames it too
        if any(".cpb_mlp." in name for name in arrays):
            what = "both rpe_mlp and cpb_mlp, which are two names of one module"
            raise CheckpointError(what, where, "give a file with one of them")
        arrays = {name.replace(".rpe_mlp.", ".cpb_mlp."): x for name, x in arrays.items()}
        notes.append("renamed rpe_mlp to cpb_mlp, its later name")
    if "register_tokens" in arrays and "reg_token" not in arrays:  # DINOv2's name
        arrays = {"reg_token" if name == "register_tokens" else name: x for name, x in arrays.items()}
        notes.append("renamed register_tokens to reg_token, timm's name")
    floats = {name for name, x in arrays.items() if x.dtype.kind not in "biuc" and not DERIVED.search(name)}
    types = {arrays[name].dtype.name for name in floats} - {"float32"}
    if types:
        notes.insert(0, f"converted {', '.join(sorted(types))} to float32")
    with np.errstate(over="ignore"):  # float64 beyond float32 becomes infinite, which is noted below
        arrays = {name: np.asarray(x, dtype=np.float32) if name in floats else x for name, x in arrays.items()}
    if broken := [name for name in sorted(floats) if not np.isfinite(arrays[name]).all()]:
        notes.append(f"not all finite: {len(broken)} arrays have NaN or infinite values, like {broken[0]}")
    return arrays, tuple(notes)


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()
