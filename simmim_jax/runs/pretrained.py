"""Parameters of one model taken into another: of other windows, another image size, shared tables or one per block.

Relative-position tables are resized as official `load_pretrained` does (utils.py of microsoft/SimMIM and
microsoft/Swin-Transformer), absolute ones bicubically; Swin V2's continuous bias needs `pretrained_windows` instead.
Shape letters: r rows of a table (displacements, and three for a class token), h heads, n positions, d width.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float
from scipy.interpolate import RectBivariateSpline

from simmim_jax.errors import CheckpointError, ConfigError
from simmim_jax.files import read_json
from simmim_jax.models import make_encoder
from simmim_jax.runs import checkpoint
from simmim_jax.runtime.processes import log0

# Encoder fields that say nothing of what its parameters mean, and those that `fit` can bridge.
EXECUTION = ("remat", "scan", "attention")
FREE = ("size", "dtype", *EXECUTION, "drop_path", "init_truncation", "norm_momentum")
BRIDGED = ("window", "pretrained_windows", "relative_position", "final_norm")


def architecture(encoder: dict) -> dict:
    """The options of an encoder that a config.json holds, without those that say how it was run there."""
    options = {name: value for name, value in encoder.items() if name not in EXECUTION}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}


def progression(source: int, target: int) -> Float[np.ndarray, " s"]:
    """Where the `source` displacements of one axis stand on the axis of `target` displacements, both odd.

    They stand at 0, 1, 1 + q, 1 + q + q**2, ... and their negatives, with the q for which the last reaches the target's
    last, (target - 1) / 2; q lies between 1.01 and 1.5, found by halving as official code does.
    """
    reach, low, high = source // 2, 1.01, 1.5
    while high - low > 1e-6:
        q = (low + high) / 2
        low, high = (low, q) if (1 - q**reach) / (1 - q) > target // 2 else (q, high)
    steps = list(itertools.accumulate(q**power for power in range(reach)))
    return np.array([-step for step in reversed(steps)] + [0.0] + steps)


def resize_bias_table(
    table: Float[np.ndarray, "r h"], source: tuple[int, int], target: tuple[int, int], extra: int = 0
) -> Float[np.ndarray, "rows h"]:
    """A relative-position table for windows of another size, by a bicubic spline through each head's displacements.

    source, target: (rows, columns) of tokens of the windows. The last `extra` rows of the table, which are no
    displacements, stay as they are. Beyond the outermost displacement of the source its value is held.
    """
    if source == target:
        return table
    sizes = [2 * side - 1 for side in source]  # displacements along each axis
    displacements, rest = np.split(table, [sizes[0] * sizes[1]])
    at = [progression(size, 2 * side - 1) for size, side in zip(sizes, target, strict=True)]
    wanted = [
        np.clip(np.arange(1 - side, side), places[0], places[-1]) for side, places in zip(target, at, strict=True)
    ]
    degrees = [min(3, size - 1) for size in sizes]  # three displacements, of 2 tokens, carry no more than a parabola
    if min(degrees) == 0:  # of one token there is one, and nothing to interpolate
        maps = [np.full([len(places) for places in wanted], values.mean()) for values in displacements.T]
    else:
        maps = [
            RectBivariateSpline(*at, values.reshape(sizes), kx=degrees[0], ky=degrees[1], s=0)(*wanted)
            for values in displacements.T.astype(np.float64)
        ]
    resized = np.stack(maps, axis=-1).reshape(-1, table.shape[1])
    return np.concatenate([resized, rest]).astype(table.dtype)


def cubic_weights(source: int, target: int) -> Float[np.ndarray, "t s"]:
    """Rows of weights that resample `source` values at `target` places, bicubically (a = -0.75), pixels as areas.

    As PyTorch's `interpolate(mode="bicubic", align_corners=False)`: no antialiasing, borders repeated.
    """
    a = -0.75
    places = (np.arange(target) + 0.5) * source / target - 0.5
    first = np.floor(places).astype(int) - 1
    weights = np.zeros((target, source))
    for tap in range(4):
        distance = np.abs(places - (first + tap))
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
        np.add.at(weights, (np.arange(target), np.clip(first + tap, 0, source - 1)), np.where(distance <= 1, near, far))
    return weights


def resize_positions(
    table: Float[np.ndarray, "n d"], source: tuple[int, int], target: tuple[int, int], extra: int = 0
) -> Float[np.ndarray, "m d"]:
    """An absolute position embedding for another grid of patches, bicubically.

    source, target: (rows, columns) of patches. The first `extra` rows of the table, which are no patches, stay as they
    are.
    """
    if source == target:
        return table
    rest, patches = np.split(table, [extra])
    down, across = (cubic_weights(*sides) for sides in zip(source, target, strict=True))
    resized = np.einsum("as,bt,std->abd", down, across, patches.reshape(*source, -1).astype(np.float64))
    return np.concatenate([rest, resized.reshape(target[0] * target[1], -1)]).astype(table.dtype)


def square(rows: int, of: str) -> tuple[int, int]:
    """The sides of a square of so many rows of a table. Raises ValueError if they are those of none."""
    side = math.isqrt(rows)
    if side**2 != rows:
        raise ValueError(f"{rows} {of} are not those of a square, and no config.json says of what")
    return side, side


def refuse_other_encoder(saved: dict, now: dict, where: str) -> None:
    """Raise CheckpointError if the encoder of a run was built, or fed, in a way that `fit` cannot bridge.

    saved, now: the configs of the two runs as config.json has them, with all of the encoder's fields.
    """

    def sides(config):
        fields = {f"encoder.{name}": value for name, value in config.get("encoder", {}).items()}
        if "encoder.layer_scale" in fields:  # what it starts from does not matter, only whether it is there
            fields["encoder.layer_scale"] = bool(fields["encoder.layer_scale"])
        return fields | {name: config[name] for name in ("mean", "std") if name in config}

    then, here = sides(saved), sides(now)
    bridged = {f"encoder.{name}" for name in FREE + BRIDGED}
    different = [name for name in here if name in then and name not in bridged and then[name] != here[name]]
    tables = tuple(side.get("encoder.relative_position") for side in (then, here))
    if None not in tables and tables[0] != tables[1] and tables != ("shared", "per_block"):
        different.append("encoder.relative_position")
    if here.get("encoder.final_norm") and not then.get("encoder.final_norm", True):
        different.append("encoder.final_norm")
    if different:
        examples = ", ".join(f"{name}: {then.get(name)!r} there, {here.get(name)!r} here" for name in different[:3])
        raise CheckpointError(f"another encoder ({examples})", where, "give these fields as that run had them")


def refuse_other_windows(there: tuple[int, ...], here: tuple[int, ...], where: str) -> None:
    """Raise CheckpointError unless Swin V2's displacements are measured by the same windows, stage by stage."""
    if there != here:
        sides = ",".join(map(str, there))
        raise CheckpointError(
            f"trained with windows of {sides} tokens by stage, here displacements are measured by "
            f"{','.join(map(str, here))}", where, f"give --config.encoder.pretrained_windows={sides}",
        )  # fmt: skip


def fit(
    saved: dict, abstract: dict, where: str, grids: tuple[tuple[int, int], tuple[int, int]] | None = None
) -> tuple[dict, list[tuple[str, str]]]:
    """(`saved` in the paths and shapes of `abstract`, [(path, what was done to it)]): nested dicts of numpy arrays.

    Tables are resized, a shared table is copied to each block that wants its own, and a final norm that `abstract` does
    not have is left out. Raises CheckpointError, with examples from both sides, if anything else differs.

    grids: the maps of tokens there and here, by which positions of the whole image are resized; where nothing says them
    they must be squares.
    """
    have, want = (flatten_dict(tree, sep="/") for tree in (saved, abstract))
    notes, taken, used, failed = [], {}, set(), []
    class_positions, class_rows = (1, 3) if any(name.endswith("cls_token") for name in want) else (0, 0)

    def resized(name, value, rows):
        """A table of positions, or of displacements: in an "attn" those of a window, which is a square, else of all."""
        counts = (len(value), rows)
        if name.endswith("pos_embed"):
            sides = grids or [square(count - class_positions, "positions") for count in counts]
            return resize_positions(value, *sides, class_positions)
        if grids and "/attn/" not in name:
            sides = grids
        else:
            sides = [tuple((n + 1) // 2 for n in square(count - class_rows, "displacements")) for count in counts]
        return resize_bias_table(value, *sides, class_rows)

    for name, x in want.items():
        source = name if name in have else re.sub(r"block_\d+/rel_pos_bias/", "rel_pos_bias/", name)
        if source not in have:
            failed.append(f"{name} is absent there and {dtype_and_shape(x)} here")
            continue
        used.add(source)
        value = have[source]
        try:
            if name.endswith(("pos_embed", "rel_pos_bias/table")) and value.shape[1:] == x.shape[1:]:
                value = resized(name, value, len(x))
        except ValueError as error:
            failed.append(f"{name}: {error}")
            continue
        if value.shape != x.shape:
            failed.append(f"{name} is {dtype_and_shape(value)} there and {dtype_and_shape(x)} here")
            continue
        if value is not have[source]:
            notes.append((name, f"resized from {len(have[source])} to {len(value)} rows"))
        if source != name:
            notes.append((name, f"a copy of {source}"))
        taken[name] = np.asarray(value, x.dtype)
    left = [name for name in have if name not in used]
    for name in left:
        if name.removeprefix("encoder/").startswith("norm/"):
            notes.append((name, "left out, as this encoder has no final norm"))
        else:
            failed.append(f"{name} is {dtype_and_shape(have[name])} there and absent here")
    if failed:
        more = f", and {len(failed) - 3} more" if len(failed) > 3 else ""
        raise CheckpointError(
            f"another model: {'; '.join(failed[:3])}{more}", where,
            "set config.encoder and config.objective to those of its config.json, or take fewer parts with "
            "--config.init_parts=encoder",
        )  # fmt: skip
    return unflatten_dict(taken, sep="/"), notes


def dtype_and_shape(x) -> str:
    return f"{np.dtype(x.dtype).name}{list(x.shape)}"


# --- starting from another run

HEAD_INPUTS = {"pool": "patches", "block": 0, "head": "", "blocks": ()}  # objective options that a head depends on


def config_of(step_folder: Path) -> dict:
    """The config.json of the run that a step's folder belongs to; {} if it has none."""
    return read_json(step_folder.parent.parent / "config.json")


def check_init_from(step_folder: Path, now: dict) -> None:
    """Raise CheckpointError if the encoder of `init_from` cannot be fitted to the one of the config.json `now`."""
    saved = config_of(step_folder)
    refuse_other_encoder(saved, now, str(step_folder))
    if "pretrained_windows" in saved.get("encoder", {}) and saved.get("image_size"):
        refuse_other_windows(measuring_windows(saved), measuring_windows(now), str(step_folder))


def measuring_windows(config: dict) -> tuple[int, ...]:
    """The window side by which each stage of a Swin V2 measures its displacements. config: of config.json."""
    encoder = make_encoder(**architecture(config["encoder"]))
    return encoder.pretrained_windows or encoder.stage_windows(tuple(config["image_size"]))


def take_params(step_folder: Path, now: dict, abstract: dict, init_parts: tuple[str, ...], stride: int) -> dict:
    """Read parameters of another run, fitted to the shapes and shardings of `abstract`.

    now: config.json of the new run. init_parts: top-level parts to take; (): all parts if both runs have the same
    objective, else the encoder. A head that read other features or knew other classes is left out by default.
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
                raise ConfigError(
                    f"no {part!r} among {', '.join(sorted(side))}",
                    f"init_parts, {step_folder}",
                    f"choose from {', '.join(sorted(saved.keys() & abstract.keys()))}",
                )
    wanted = {part: abstract[part] for part in parts}
    sizes = (saved_config.get("image_size"), now["image_size"])
    grids = tuple(tuple(side // stride for side in size) for size in sizes) if sizes[0] else None
    taken, notes = fit({part: saved[part] for part in parts}, wanted, str(step_folder), grids)
    log0(f"{', '.join(parts)}: taken from {step_folder}")
    paths = {}  # by what was done to them
    for path, done in notes:
        paths.setdefault(done, []).append(path)
    for done, changed in paths.items():
        log0(f"  {done}: {changed[0]}{f' and {len(changed) - 1} more' if len(changed) > 1 else ''}")
    put = lambda value, x: jax.make_array_from_callback(x.shape, x.sharding, lambda index: value[index])  # noqa: E731
    return jax.tree.map(put, taken, wanted)


def other_head(saved: dict, now: dict) -> str:
    """Why the head of a run with the same objective does not fit this one; "" if it does. Both: of config.json."""
    for name, default in HEAD_INPUTS.items():
        sides = [json.dumps(config["objective"].get(name, default)) for config in (saved, now)]
        if sides[0] != sides[1]:
            return f"objective.{name} is {sides[0]}"
    known: Sequence[str] = saved.get("classes") or ()
    if not known or not now.get("classes") or list(known) == list(now["classes"]):
        return ""
    return f"it knows {len(known)} classes: {', '.join(known[:3])}, ..."
