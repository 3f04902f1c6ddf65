"""Values for the config fields that a recipe leaves open (None), chosen from the data and the machine.

A recipe for any folder of images cannot know how many images there are, or whether the machine has an accelerator.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

# Fields that a recipe may leave open, in the order in which they are chosen.
FIELDS = (
    "encoder.size", "image_size", "objective.mask_patch_size", "objective.num_classes", "batch_size", "epochs",
    "base_learning_rate",
)  # fmt: skip

MAX_BATCH_CPU, MAX_BATCH = 32, 256
CPU_UPDATES = 320  # on a CPU: four minutes for a ViT-Ti at 64 pixels on two cores of a Zen 4
UPDATES, EPOCHS = 20_000, (100, 1600)  # on an accelerator; fewest and most epochs
PEAK_RATES = ((1_000, 2e-3), (100_000, 4e-4))  # (updates, peak rate): the longer the run, the lower the rate


class Facts(NamedTuple):
    """What is known of the run.

    images: size of the training set; 0: unknown. classes: number of its classes.
    on_cpu: whether there is no accelerator.
    batch_unit: the batch size must be a multiple of it.
    sizes: names of the encoder's sizes, from the smallest.
    saved, init_from: the fields of this workdir's config.json if the run resumes, and of `init_from`; else {}.
    token_stride: ({field: value}) -> pixels per token of the encoder with these fields.
    """

    images: int
    classes: int
    on_cpu: bool
    batch_unit: int
    sizes: tuple[str, ...]
    saved: dict
    init_from: dict
    token_stride: Callable[[dict], int]


def choose(fields: dict, facts: Facts) -> dict[str, tuple[object, str]]:
    """{field: (value, reason)} for each of `FIELDS` that is None in `fields`, by dotted name."""
    unset = [name for name in FIELDS if name in fields and fields[name] is None]
    if not fields.get("encoder.name"):  # the encoder of init_from
        unset = [name for name in unset if name != "encoder.size"]
    known, choices = dict(fields), {}
    for name in unset:
        if name in facts.saved:
            names = (name, "encoder.patch_size") if name == "encoder.size" else (name,)  # as `_model` chooses both
            new = {
                each: (_as_field(facts.saved[each]), "as in this workdir")
                for each in names
                if each in facts.saved and known.get(each) is None
            }
        elif name == "image_size" and name in facts.init_from:
            new = {name: (_as_field(facts.init_from[name]), "as in init_from")}
        else:
            new = RULES[name](known, facts)
        choices |= new
        known |= {name: value for name, (value, _) in new.items()}
    return choices


def _as_field(value):
    return tuple(value) if isinstance(value, list) else value


def _model(known: dict, facts: Facts) -> dict:
    if not facts.on_cpu:
        size = "s" if "s" in facts.sizes else facts.sizes[0]
        return {"encoder.size": (size, "this machine has an accelerator")}
    size = {"encoder.size": (facts.sizes[0], "no accelerator")}
    small_patches = known["encoder.name"] == "vit" and not known["encoder.patch_size"] and not known["image_size"]
    return size | ({"encoder.patch_size": (8, "for images of 64 pixels")} if small_patches else {})


def _image_size(known: dict, facts: Facts) -> dict:
    if known.get("encoder.patch_size") == 8:
        return {"image_size": ((64, 64), "no accelerator; 224,224 is 12 times slower")}
    return {"image_size": ((224, 224), "the usual size")}


def _mask_patch_size(known: dict, facts: Facts) -> dict:
    """The largest multiple of the token stride that divides the sides; at most 32 pixels and a quarter of a side."""
    stride, sides = facts.token_stride(known), known["image_size"]
    sizes = range(stride, min(32, min(sides) // 4) + 1, stride)
    size = max((size for size in sizes if all(side % size == 0 for side in sides)), default=stride)
    return {"objective.mask_patch_size": (size, "at most 32 and a quarter of the image's side")}


def _num_classes(known: dict, facts: Facts) -> dict:
    # images without classes are refused later, with the reason
    return {"objective.num_classes": (max(facts.classes, 2), "the classes of the data")}


def _batch_size(known: dict, facts: Facts) -> dict:
    """The largest power of two times the unit that is at most a quarter of the images."""
    maximum = MAX_BATCH_CPU if facts.on_cpu else MAX_BATCH
    if facts.images:
        maximum = min(maximum, facts.images // 4)
    size = facts.batch_unit * 2 ** int(math.log2(max(maximum // facts.batch_unit, 1)))
    return {"batch_size": (size, f"{facts.images} images" if facts.images else "number of images unknown")}


def _epochs(known: dict, facts: Facts) -> dict:
    if known["steps"]:
        return {"epochs": (0.0, "steps is given")}
    per_epoch = max(facts.images // known["batch_size"], 1)
    if facts.on_cpu:
        epochs, reason = round(CPU_UPDATES / per_epoch, 3), "a first result in minutes; more epochs learn more"
    else:
        epochs, reason = float(min(max(round(UPDATES / per_epoch), EPOCHS[0]), EPOCHS[1])), "more epochs learn more"
    return {"epochs": (epochs, f"{round(epochs * per_epoch)} steps: {reason}")}


def _learning_rate(known: dict, facts: Facts) -> dict:
    """The base rate with a peak between `PEAK_RATES`, interpolated over the logarithm of the number of updates."""
    batch_size = known["batch_size"]
    updates = known["steps"] or round(known["epochs"] * (facts.images // batch_size))
    (few, high), (many, low) = PEAK_RATES
    part = min(max(math.log(max(updates, 1) / few) / math.log(many / few), 0), 1)
    peak = high * (low / high) ** part
    base = float(f"{peak * 512 / batch_size:.3g}")
    return {"base_learning_rate": (base, f"a peak of {peak:.2g}, for {updates} steps")}


RULES = {
    "encoder.size": _model,
    "image_size": _image_size,
    "objective.mask_patch_size": _mask_patch_size,
    "objective.num_classes": _num_classes,
    "batch_size": _batch_size,
    "epochs": _epochs,
    "base_learning_rate": _learning_rate,
}
