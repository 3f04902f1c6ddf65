"""Start from the parameters of another run: convert them to other windows, image sizes or position tables."""

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.files import read_json
from simmim_jax.models import make_encoder
from simmim_jax.runs import checkpoint
from simmim_jax.runs.resize import resize_bias_table, resize_positions, square
from simmim_jax.runtime.processes import log0

EXECUTION = ("remat", "scan", "attention")  # encoder fields that change how it runs, but not its outputs
FREE = ("size", "dtype", *EXECUTION, "drop_path", "init_truncation", "norm_momentum")  # fields that may differ
CONVERTED = ("window", "pretrained_windows", "relative_position", "final_norm")  # fields that `fit` converts
HEAD_INPUTS = {"pool": "patches", "block": 0, "head": "", "blocks": ()}  # objective options that a head depends on


def architecture(encoder: dict) -> dict:
    """The encoder options of a config.json, without those that only change how the encoder runs."""
    options = {name: value for name, value in encoder.items() if name not in EXECUTION}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def refuse_other_encoder(saved: dict, now: dict, where: str) -> None:
    """Raise CheckpointError if a saved encoder, or its normalization, differs in a way that `fit` cannot convert.

    saved, now: config.json of the two runs, with all fields of the encoder.
    """

    def fields(config):
        values = {f"encoder.{name}": value for name, value in config.get("encoder", {}).items()}
        if "encoder.layer_scale" in values:  # the initial value may differ, but both or neither must have LayerScale
            values["encoder.layer_scale"] = bool(values["encoder.layer_scale"])
        values |= {f"pixels.{name}": value for name, value in (config.get("pixels") or {}).items()}
        return values | {name: config[name] for name in ("mean", "std") if name in config}

    then, here = fields(saved), fields(now)
    converted = {f"encoder.{name}" for name in FREE + CONVERTED}
    different = [name for name in here if name in then and name not in converted and then[name] != here[name]]
    tables = tuple(side.get("encoder.relative_position") for side in (then, here))
    if None not in tables and tables[0] != tables[1] and tables != ("shared", "per_block"):
        different.append("encoder.relative_position")
    if here.get("encoder.final_norm") and not then.get("encoder.final_norm", True):
        different.append("encoder.final_norm")
    if different:
        examples = ", ".join(f"{name}: {then.get(name)!r} there, {here.get(name)!r} here" for name in different[:3])
        raise CheckpointError(f"another encoder ({examples})", where, "give these fields the values of that run")


def refuse_other_windows(there: tuple[int, ...], here: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless Swin V2 measures displacements in the same windows in each stage."""
    if there != here:
        sides = ",".join(map(str, there))
        what = f"displacements are measured in windows of {sides} tokens there, {','.join(map(str, here))} here"
        raise CheckpointError(what, where, f"give --config.encoder.pretrained_windows={sides}")


def fit(
    saved: dict, abstract: dict, where: str, grids: tuple[tuple[int, int], tuple[int, int]] | None = None
) -> tuple[dict, list[tuple[str, str]]]:
    """Convert `saved` to the paths and shapes of `abstract`; return (parameters, [(path, change)]).

    `saved` is a nested dict of numpy arrays. Position tables are resized. A shared table is copied to blocks that have
    their own tables. A final norm that is not in `abstract` is dropped. Raises CheckpointError, with examples from both
    sides, if anything else differs.

    grids: token grids of whole images in the saved and the new model, for position tables of the whole image; None:
    these tables are square.
    """
    have, want = (flatten_dict(tree, sep="/") for tree in (saved, abstract))
    has_class_token = any(name.endswith("cls_token") for name in want)
    changes, taken, used, failed = [], {}, set(), []
    for name, x in want.items():
        source = name if name in have else re.sub(r"block_\d+/rel_pos_bias/", "rel_pos_bias/", name)
        if source not in have:
            failed.append(f"{name} is absent there and {dtype_and_shape(x)} here")
            continue
        used.add(source)
        value = have[source]
        try:
            if name.endswith(("pos_embed", "rel_pos_bias/table")) and value.shape[1:] == x.shape[1:]:
                value = resize_table(name, value, len(x), has_class_token, grids)
        except ValueError as error:
            failed.append(f"{name}: {error}")
            continue
        if value.shape != x.shape:
            failed.append(f"{name} is {dtype_and_shape(value)} there and {dtype_and_shape(x)} here")
            continue
        if value is not have[source]:
            changes.append((name, f"resized from {len(have[source])} to {len(value)} rows"))
        if source != name:
            changes.append((name, f"copied from {source}"))
        taken[name] = np.asarray(value, x.dtype)
    for name in [name for name in have if name not in used]:
        if name.removeprefix("encoder/").startswith("norm/"):
            changes.append((name, "dropped, this encoder has no final norm"))
        else:
            failed.append(f"{name} is {dtype_and_shape(have[name])} there and absent here")
    if failed:
        more = f", and {len(failed) - 3} more" if len(failed) > 3 else ""
        fix = (
            "set config.encoder and config.objective to those of its config.json, or take fewer parts with "
            "--config.init_parts=encoder"
        )
        raise CheckpointError(f"another model: {'; '.join(failed[:3])}{more}", where, fix)
    return unflatten_dict(taken, sep="/"), changes


def resize_table(name: str, value: np.ndarray, rows: int, has_class_token: bool, grids: tuple | None) -> np.ndarray:
    """Resize a position table to `rows` rows. grids: as in `fit`; a table with "attn" in its path is of a window."""
    counts = (len(value), rows)
    if name.endswith("pos_embed"):
        extra = len(value) - math.prod(grids[0]) if grids else int(has_class_token)  # rows of the class token
        return resize_positions(value, *(grids or [square(count - extra, "positions") for count in counts]), extra)
    extra = 3 if has_class_token else 0
    if grids and "/attn/" not in name:
        return resize_bias_table(value, *grids, extra)
    windows = [tuple((n + 1) // 2 for n in square(count - extra, "displacements")) for count in counts]
    return resize_bias_table(value, *windows, extra)


def dtype_and_shape(x) -> str:
    """Like "float32[2, 3]"."""
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"


def config_of(step_folder: Path) -> dict:
    """The config.json of the run that a step's folder belongs to; {} if there is none."""
    return read_json(step_folder.parent.parent / "config.json")


def check_init_from(step_folder: Path, now: dict) -> None:
    """Raise CheckpointError if `fit` cannot convert the encoder of `init_from` to that of the config.json `now`."""
    saved = config_of(step_folder)
    refuse_other_encoder(saved, now, str(step_folder))
    if "pretrained_windows" in saved.get("encoder", {}) and saved.get("image_size"):
        refuse_other_windows(measuring_windows(saved), measuring_windows(now), str(step_folder))


def measuring_windows(config: dict) -> tuple[int, ...]:
    """The window sides that scale the displacements of a Swin V2, for each stage. config: a config.json."""
    encoder = make_encoder(**architecture(config["encoder"]))
    return encoder.pretrained_windows or encoder.stage_windows(tuple(config["image_size"]))


def take_params(step_folder: Path, now: dict, abstract: dict, init_parts: tuple[str, ...], stride: int) -> dict:
    """Read parameters of another run, and convert them to the shapes and shardings of `abstract`.

    now: config.json of the new run. init_parts: top-level parts to take; (): all parts if both runs have the same
    objective, otherwise the encoder. By default, a head for other features or other classes is not taken.
    stride: pixels per token. Raises ConfigError and CheckpointError.
    """
    saved, saved_config = checkpoint.read_params(str(step_folder))
    same = saved_config.get("objective", {}).get("name") == now["objective"]["name"]
    if same and "head" in saved and not init_parts and (reason := other_head(saved_config, now)):
        same = False
        log0(f"the head is not taken: in that run {reason} (--config.init_parts=encoder,head takes it anyway)")
    parts = init_parts or (tuple(name for name in abstract if name in saved) if same else ("encoder",))
    for part in parts:
        for side in (saved, abstract):
            if part not in side:
                fix = f"choose from {', '.join(sorted(saved.keys() & abstract.keys()))}"
                raise ConfigError(f"no {part!r} among {', '.join(sorted(side))}", f"init_parts, {step_folder}", fix)
    wanted = {part: abstract[part] for part in parts}
    sizes = (saved_config.get("image_size"), now["image_size"])
    grids = tuple(tuple(side // stride for side in size) for size in sizes) if sizes[0] else None
    taken, changes = fit({part: saved[part] for part in parts}, wanted, str(step_folder), grids)
    log0(f"{', '.join(parts)}: taken from {step_folder}")
    paths = {}
    for path, change in changes:
        paths.setdefault(change, []).append(path)
    for change, changed in paths.items():
        log0(f"  {change}: {changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}")

    def put(value, x):
        return jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])

    return jax.tree.map(put, taken, wanted)


def other_head(saved: dict, now: dict) -> str:
    """The reason why the head of a run with the same objective does not fit; "" if it fits. Both are config.json."""
    for name, default in HEAD_INPUTS.items():
        sides = [json.dumps(config["objective"].get(name, default)) for config in (saved, now)]
        if sides[0] != sides[1]:
            return f"objective.{name} is {sides[0]}"
    known: Sequence[str] = saved.get("classes") or ()
    if not known or not now.get("classes") or list(known) == list(now["classes"]):
        return ""
    return f"it knows {len(known)} classes: {', '.join(known[:3])}, ..."
