"""Which weights of a file are taken, and their names without the prefixes of wrappers.

A file of a training run can hold several sets of weights: under keys, like "model" and "model_ema", or side by side in
one state dict, like "student.*" and "teacher.*". Trainers and compilers prefix names, like "module." (DataParallel),
"_orig_mod." (torch.compile) and "model." (Lightning).
"""

import re
from typing import NamedTuple

import numpy as np

from simmim_jax.errors import CheckpointError, suggest
from simmim_jax.interop.pickles import one_line
from simmim_jax.interop.rebuild import Dropped
from simmim_jax.interop.weight_spec import find_prefix

Arrays = dict[str, np.ndarray]

TRAINED = ("model", "state_dict", "module", "net", "network", "student", "encoder", "backbone")  # first choice first
# A word in the key of a moving average.
AVERAGE = re.compile(r"(?:^|_)(ema|teacher|momentum|target|swa|avg|averaged?|shadow)(?:_|$)", re.IGNORECASE)
INSERTED = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")  # anywhere in a name
LEADING = ("model", "net", "network", "backbone", "base_encoder", "student")  # at its start
ANCHORS = (  # one name of every encoder that our formats hold, without its prefix
    "patch_embed.proj.weight", "layer1.0.conv1.weight", "stages.0.blocks.0.conv_dw.weight",
    "downsample_layers.0.0.weight",
)  # fmt: skip
CLASSIFIERS = ("head.weight", "head.fc.weight", "fc.weight")
HEADS = (*CLASSIFIERS, "decoder.0.weight")


class Selected(NamedTuple):
    """key: where the arrays are in the file; "" if it holds nothing else. note: what else is in it, or ""."""

    key: str
    arrays: Arrays
    note: str


def state_dicts(content: object, where: str) -> dict[str, Arrays]:
    """All sets of arrays by parameter name in the content of a PyTorch file, by key; "" for the content itself.

    A set that is a whole object, which cannot be read, is empty. Raises CheckpointError, with the keys of the content,
    if there is no other.
    """
    fix = "give a file with a state dict, or one with it under 'model' or 'state_dict'"
    if isinstance(content, Dropped):
        raise CheckpointError(f"a whole object of {one_line(content.name)}, not a state dict", where, fix)
    if not isinstance(content, dict):
        raise CheckpointError(f"a {type(content).__name__}, not a state dict", where, fix)
    if _is_state_dict(content):
        return {"": content}
    known = {name: x for name, x in content.items() if name in TRAINED or AVERAGE.search(str(name))}
    found = {key: value for key, value in content.items() if isinstance(key, str) and _is_state_dict(value)}
    for key, value in known.items():  # like {"ema": {"decay": 0.99, "module": ...}}
        inner = value.items() if isinstance(value, dict) and key not in found else ()
        found |= {f"{key}.{name}": x for name, x in inner if _is_state_dict(x)}
    if found:
        return found | {name: {} for name, value in known.items() if isinstance(value, Dropped)}
    for name, value in known.items():
        if isinstance(value, Dropped):
            what = f"{one_line(name)!r} is a whole object of {one_line(value.name)}"
            raise CheckpointError(what, where, fix)
        other = [item for item in value.items() if not _is_entry(*item)] if isinstance(value, dict) else []
        if other:
            entry, found = other[0]
            kind = found.name if isinstance(found, Dropped) else type(found).__name__
            what = f"{one_line(name)!r} is no state dict: {one_line(entry)} is {one_line(kind)}, not an array"
            raise CheckpointError(what, where, fix)
    raise CheckpointError(f"no state dict among the keys {_keys(content) or '(none)'}", where, fix)


def _is_entry(name: object, value: object) -> bool:
    return isinstance(name, str) and isinstance(value, np.ndarray)


def _is_state_dict(value: object) -> bool:
    return isinstance(value, dict) and bool(value) and all(_is_entry(*item) for item in value.items())


def _keys(names) -> str:
    names = list(names)
    return ", ".join(one_line(name) for name in names[:20]) + (", ..." if len(names) > 20 else "")


def select(sets: dict[str, Arrays], where: str, key: str = "", average: bool | None = None) -> Selected:
    """One of the sets of a file, with names without wrappers. Raises CheckpointError if there is no such set.

    key: its key. average: whether it is a moving average; None: yes for classifiers, as in timm, and for the teacher of
    a student, as in DINO; otherwise the trained weights.
    """
    unreadable = [name for name, arrays in sets.items() if name and not arrays]
    parts = {}
    for name, arrays in sets.items():
        if name in unreadable:
            continue
        for part, own in split_roles(unwrap(arrays)).items():
            parts[f"{name}.{part}" if name and part else name or part] = own
    if key:
        if key not in parts:
            what = f"no weights under {key!r}: the file has {_keys(filter(None, parts)) or 'weights without a key'}"
            raise CheckpointError(what, where, suggest(key, parts) if any(parts) else "leave --key out")
        taken, why = key, ""
    else:
        taken, why = _default(parts, where, average)
    others = [name for name in parts if name != taken]
    note = ""
    if others:
        note = f"took {one_line(taken)}{why}; the file also has {_keys(others)}: --key={one_line(others[0])} takes it"
    if unreadable:
        note += f"{'; ' * bool(note)}{_keys(unreadable)} in the file is a whole object, which cannot be read"
    return Selected(taken, parts[taken], note)


def _default(parts: dict[str, Arrays], where: str, average: bool | None) -> tuple[str, str]:
    """(key, reason)."""
    averages = [name for name in parts if is_average(name)]
    trained = [name for name in parts if name not in averages]
    last = lambda name: name.rpartition(".")[2]  # noqa: E731
    known = [name for word in TRAINED for name in trained if last(name) == word]
    if average is not None and not (averages if average else trained):
        kind = "averaged" if average else "trained"
        fix = f"leave {'--ema' if average else '--no-ema'} out"
        raise CheckpointError(f"no {kind} weights in the file: it has {_keys(parts)}", where, fix)
    if average:
        return averages[0], ""
    if not known and len(trained) > 1:
        what = f"{len(trained)} sets of weights: {_keys(trained)}"
        raise CheckpointError(what, where, f"choose with --key, like --key={one_line(trained[0])}")
    if not trained:
        return averages[0], ", a moving average"
    chosen = (known or trained)[0]
    if average is None and averages:
        if last(chosen) == "student":
            return averages[0], ", the average of the student"
        if all(any(name in CLASSIFIERS for name in parts[key]) for key in (chosen, averages[0])):
            return averages[0], ", the moving average, as timm does for classifiers"
    return chosen, ", the trained weights" if averages else ""


def is_average(key: str) -> bool:
    """Whether weights under this key are a moving average."""
    return any(AVERAGE.search(part) for part in key.split("."))


def split_roles(arrays: Arrays) -> dict[str, Arrays]:
    """The sets that stand side by side in one state dict, like "student.*" and "teacher.*", by role; {"": all} if one.

    Names keep their prefix unless it is a wrapper of the whole set.
    """
    roles = {}
    for name in arrays:
        if found := AVERAGE.search(name.partition(".")[0]):
            roles.setdefault(found[1], set()).add(name)
    roles = {role: names for role, names in roles.items() if _anchor_prefix(names) is not None}
    if not roles:
        return {"": arrays}
    averaged = set().union(*roles.values())
    rest = {name: x for name, x in arrays.items() if name not in averaged}
    trained = "student" if any(name.startswith("student") for name in rest) else "model"
    sets = {trained: rest} if _anchor_prefix(rest) is not None else {}
    sets |= {role: {name: arrays[name] for name in sorted(names)} for role, names in roles.items()}
    return {role: unwrap(own, whole=True) for role, own in sets.items()}


def _anchor_prefix(names) -> str | None:
    found = (find_prefix(names, anchor) for anchor in ANCHORS)
    return next((prefix for prefix in found if prefix is not None), None)


def unwrap(arrays: Arrays, whole: bool = False) -> Arrays:
    """The arrays with names without wrappers, for the encoder and for heads next to it.

    A wrapper is a prefix that a head of ours has too, or one of known names. whole: also a first part that names a
    role, like "teacher". Names that would become equal stay as they are.
    """
    renamed = {name: ".".join(part for part in name.split(".") if part not in INSERTED) for name in arrays}
    names, parts = set(renamed.values()), (_anchor_prefix(renamed.values()) or "").split(".")[:-1]
    of_head = (n for n in range(len(parts), 0, -1) if any(".".join((*parts[:n], head)) in names for head in HEADS))
    wrappers = parts[: next(of_head, 0)]
    for part in parts[len(wrappers) :]:
        is_role = whole and not wrappers and (AVERAGE.search(part) or part.startswith("student"))
        if part not in LEADING and not is_role:
            break
        wrappers.append(part)
    for name, new in renamed.items():
        for part in wrappers:
            if not new.startswith(f"{part}."):
                break
            new = new.removeprefix(f"{part}.")
        renamed[name] = new
    if len(set(renamed.values())) < len(arrays):
        return arrays
    return {renamed[name]: x for name, x in arrays.items()}
