"""python -m simmim_jax.tools.preview --config configs/X.py [--config.a.b=value ...] [--out=preview.png]

Preview a run of this config: the images and masks of its first steps as a picture, statistics of pixels and masks, and
whether the input pipeline keeps up with the training step.
"""

import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool, Num, UInt8

from simmim_jax.errors import ConfigError, exit_with_message
from simmim_jax.files import printable, write_json
from simmim_jax.flags import define_config_flag, parse_flags
from simmim_jax.tools.cli import check_output, translate_errors

GOOD_DISTANCE = (10.0, 20.0)  # AvgDist in pixels that works best on images of 192 px (paper section 4.1.2, figure 3)
MIN_MEASURED = 128  # crops that means, deviations and masks are measured on
MAX_OFFSET = 0.1  # difference between a measured mean or std and the config's, above which a warning is printed
PART_BYTES = 2**23  # bytes of pixels in a part of a batch; larger batches are timed in parts, in the same order
TILE_SIDES = (96, 160)  # least and largest shorter side of a tile on the sheet, in pixels


def define_flags() -> None:
    """Define the config flags of `simmim_jax.main` and those of this command."""
    define_config_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_string("out", "preview.png", "picture to write")
    flags.DEFINE_string("json", "", "file to write the numbers to, if any")
    flags.DEFINE_bool("overwrite", False, "replace existing output, if this package has written it")
    flags.DEFINE_integer("images", 32, "images on the picture", lower_bound=1)
    flags.DEFINE_integer("start-step", 0, "first step to show", lower_bound=0)
    flags.DEFINE_float("seconds", 5.0, "how long the pipeline and the step are timed, each", lower_bound=0.0)
    flags.DEFINE_bool("step", True, "also time the training step, on the devices of this machine")
    flags.DEFINE_string("workdir", "", "ignored, so that a command of simmim_jax.main can be reused")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX logs much at the level below
    out, json_path = (os.path.expanduser(path) for path in (given.out, given.json))
    for path in filter(None, (out, json_path)):
        check_output(path, overwrite=given.overwrite)
    options = {"images": given.images, "start_step": given["start-step"].value, "seconds": given.seconds}
    with translate_errors(ConfigError, out, "free space, or give another path", "give fewer --images"):
        numbers = preview(given.config, out=out, **options, time_step=given.step)
        if json_path:
            write_json(Path(json_path), numbers)


def preview(
    config, *, out: str, images: int = 32, start_step: int = 0, seconds: int | float = 5.0, time_step: bool = True
) -> dict:
    """Draw `images` samples from `start_step` on to `out`; print and return the numbers.

    time_step: compile and time the training step too. Raises the errors that a run would raise.
    """
    from simmim_jax import data  # late: --help and mistakes on the command line need no JAX
    from simmim_jax.evals.sheet import save_png
    from simmim_jax.experiment import make_experiment, open_sources, with_settings

    if not time_step:  # the mesh may need devices that this machine lacks
        config = with_settings(config, {"mesh.data": -1, "mesh.fsdp": 1, "mesh.tensor": 1})
    if config.batch_size and config.batch_size > (count := len(open_sources(config)[0])):
        report("warning", f"batch_size {config.batch_size} is larger than the data, {count} images: a run refuses it")
        config = with_settings(config, {"batch_size": None})
    experiment = make_experiment(config)
    source, spec, loading = experiment.source, experiment.batches, experiment.loading
    classes = tuple(source.classes)
    report("source", f"{source.describe()}; {list_classes(classes)}")

    # Parts of the batches, read like the batches of one of several processes: the same images at the same rows.
    parts = count_parts(spec.batch_size, math.prod(spec.image_size) * spec.channels)
    shard = data.Shard(0, parts)
    batches = data.make_batches(source, spec, start_step=start_step, shard=shard, loading=loading)
    try:
        drawn = list(itertools.islice(batches, -(-max(images, MIN_MEASURED) * parts // spec.batch_size)))
        masks = [None] * len(drawn)
        if "mask" in experiment.objective.outputs:
            draw_masks = make_masks(experiment.objective, experiment.keys.step)
            masks = [draw_masks(batch, start_step + n) for n, batch in enumerate(drawn)]
        samples = list(iterate_samples(drawn, masks, start_step))
        shown = [sample | {"name": source.name(sample["index"])} for sample in samples[:images]]
        last = shown[-1]["step"]
        steps = f"step {start_step}" + (f" to {last}" if last > start_step else "")
        looks = experiment.pixels.caption()
        for sample in shown:
            sample["image"] = experiment.pixels.display(sample["image"])
        save_png(out, draw_samples(shown, classes, f"{steps}: {images} crops{looks and f' ({looks})'}"))
        report("picture", f"{out}: {images} crops of {steps}")
        mask_numbers = measure_masks([sample["mask"] for sample in samples], experiment.record["objective"])
        pixel_numbers = measure_pixels([sample["image"] for sample in samples], experiment.pixels)
        for name, line in (*format_masks(mask_numbers), *format_pixels(pixel_numbers)):
            report(name, line)
        waiting = max(loading.workers, 1) * (2 * loading.prefetch + loading.threads)
        timed = time_data(batches, seconds, warm_up=waiting - len(drawn))
    finally:
        batches.close()
    timed["read"] += len(samples)
    timed["bad_images"] += sum(sample["replaced"] for sample in samples)
    timed |= {name: getattr(loading, name) for name in ("workers", "threads", "prefetch")}
    report("data", format_timing(timed))

    numbers = {"made_by": "simmim_jax.tools.preview", "source": source.describe(), "images": len(source)}
    numbers["classes"] = list(classes)
    numbers["shown"] = [{k: v for k, v in sample.items() if k not in ("image", "mask")} for sample in shown]
    numbers |= {"masks": mask_numbers, "pixels": pixel_numbers, "data": timed}
    if time_step:
        report("step", f"compiling it for batches of {spec.batch_size} (--nostep skips it)")
        numbers["step"] = step = time_train_step(experiment, seconds)
        line = "{images_per_second:.0f} images/s on {devices} {device} device(s), without data"
        report("", line.format(**step))
        rates = (timed["images_per_second"], step["images_per_second"])
        numbers["waiting"] = max(0.0, 1 - rates[0] / rates[1])
        numbers["verdict"] = compare_rates(*rates, data.advice(source, workers=loading.workers))
        report("verdict", numbers["verdict"])
        if step["platform"] == "cpu":
            report("", "both were timed separately: in a run on CPUs they share the cores, and each is slower")
    return numbers


def report(name: str, line: str) -> None:
    print(f"{name:9}{' '.join(line.split())}", flush=True)


# --- samples


def count_parts(batch_size: int, image_bytes: int) -> int:
    """The number of equal parts in which a batch is read, so that a part has about `PART_BYTES`; at least 1."""
    ideal = batch_size * image_bytes / PART_BYTES
    if ideal <= 1:
        return 1
    return min((n for n in range(1, batch_size + 1) if batch_size % n == 0), key=lambda n: abs(math.log(n / ideal)))


def make_masks(objective, key) -> Callable[[dict, int], Bool[np.ndarray, "b y x"]]:
    """A function (batch, step) -> the masked pixels of each image, by the compiled objective. key: of all steps."""
    import jax
    import jax.numpy as jnp

    @jax.jit
    def predict_mask(key, image, batch_index):
        shapes = jax.eval_shape(objective.init, key)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # masks do not depend on them: dead code
        return objective.predict(params, {"image": image, "batch_index": batch_index}, key)["mask"]

    def draw(batch: dict, step: int) -> Bool[np.ndarray, "b y x"]:
        return np.asarray(predict_mask(jax.random.fold_in(key, step), batch["image"], batch["batch_index"]))

    return draw


def iterate_samples(batches: list[dict], masks: list, start_step: int) -> Iterator[dict]:
    """The rows of the batches one by one: "image" [y, x, c], "mask" bool [y, x] or None, and their indices."""
    for n, (batch, mask) in enumerate(zip(batches, masks, strict=True)):
        for row in range(len(batch["image"])):
            indices = {name: int(batch[name][row]) for name in ("index", "batch_index", "label")}
            indices |= {"step": start_step + n, "replaced": bool(batch["replaced"][row])}
            yield indices | {"image": batch["image"][row], "mask": None if mask is None else mask[row]}


def draw_samples(samples: list[dict], classes: tuple[str, ...], title: str) -> UInt8[np.ndarray, "h w 3"]:
    """A sheet of the crops. Next to each, its visible part, if there is a mask. Captions: file name, or else class."""
    from simmim_jax.evals.sheet import grid, make_tile

    height, width = samples[0]["image"].shape[:2]
    min_side, max_short_side = TILE_SIDES
    max_side = max_short_side * max(height, width) // min(height, width)
    tiles, captions = [], []
    for sample in samples:
        panels = [make_tile(sample["image"], min_side, max_side)]
        if sample["mask"] is not None:
            visible = np.where(sample["mask"][..., None], np.uint8(128), sample["image"])
            panels += [np.full((len(panels[0]), 1, 3), 255, np.uint8), make_tile(visible, min_side, max_side)]
        tiles.append(np.concatenate(panels, axis=1))
        captions.append(caption(sample, classes))
    if samples[0]["mask"] is not None:
        title += ", and what the masks leave visible"
    return grid(tiles, captions, title=title)


def caption(sample: dict, classes: tuple[str, ...]) -> str:
    """The name of the file; for supervised objectives, that of the class."""
    if sample["mask"] is not None:
        return printable(sample["name"])
    return printable(classes[sample["label"]]) if 0 <= sample["label"] < len(classes) else "no class"


def list_classes(classes: tuple[str, ...]) -> str:
    """The number of classes, and the first of them."""
    if not classes:
        return "no classes"
    return f"{len(classes)} classes: {', '.join(map(printable, classes[:5]))}{', ...' if len(classes) > 5 else ''}"


# --- numbers


def measure_masks(masks: list, options: dict) -> dict | None:
    """The masked part of the pixels, and AvgDist in pixels; None without masks. options: of the objective."""
    from simmim_jax.masking.distance import average_distance

    if masks[0] is None:
        return None
    side = options["mask_patch_size"]
    distances = [average_distance(mask) for mask in masks if not mask.all()]
    return {
        "count": len(masks),
        "asked": options["mask_ratio"],
        "ratio": float(np.mean([mask.mean() for mask in masks])),
        "mask_patches": (masks[0].shape[0] // side) * (masks[0].shape[1] // side),
        "average_distance": float(np.mean(distances)) if distances else None,
    }


def format_masks(masks: dict | None) -> list[tuple[str, str]]:
    if masks is None:
        return []
    count, ratio = masks["mask_patches"], masks["ratio"]
    line = f"{ratio:.4f} masked, {ratio * count:.4g} of {count} mask patches (mask_ratio: {masks['asked']:g})"
    distance = masks["average_distance"]
    if distance is None:
        return [("masks", line), ("warning", "nothing is visible: give a lower --config.objective.mask_ratio")]
    low, high = GOOD_DISTANCE
    where = "below" if distance < low else "above" if distance > high else "inside"
    return [("masks", f"{line}, AvgDist {distance:.1f} px: {where} {low:g} to {high:g}, the best on images of 192 px")]


def measure_pixels(crops: list[Num[np.ndarray, "y x c"]], pixels) -> dict:
    """Mean and standard deviation per channel over all pixels of the crops, in 0..1, and those of the run's `pixels`.

    Pixels without data are left out.
    """
    from simmim_jax.data.pixels import to_unit

    total, squares, count = 0.0, 0.0, 0
    for crop in crops:
        values = to_unit(crop, pixels.scale, np.nan).reshape(-1, crop.shape[-1]).astype(np.float64)
        total, squares = total + np.nansum(values, 0), squares + np.nansum(values**2, 0)
        count += np.maximum((~np.isnan(values)).sum(0), 1)
    measured = total / count
    deviation = np.sqrt(np.maximum(squares / count - measured**2, 0))
    config = {"config_mean": list(pixels.mean), "config_std": list(pixels.std)}
    return {"count": len(crops), "mean": measured.tolist(), "std": deviation.tolist(), **config}


def format_pixels(pixels: dict) -> list[tuple[str, str]]:
    """Means and deviations next to those of the config, and a warning if they are far off."""
    lines = []
    for name in ("mean", "std"):
        measured, given = pixels[name], pixels[f"config_{name}"]
        found, expected = (" ".join(f"{value:.3f}" for value in values) for values in (measured, given))
        lines.append((name, f"{found} per channel of {pixels['count']} crops (config: {expected})"))
        if max(abs(a - b) for a, b in zip(measured, given, strict=True)) > MAX_OFFSET:
            values = ",".join(f"{value:.3f}" for value in measured) + ("," if len(measured) == 1 else "")
            advice = f"{name} is off by more than {MAX_OFFSET}: the crops have about --config.{name}={values}"
            lines.append(("warning", advice))
    return lines


# --- timing


def time_data(batches: Iterator[dict], seconds: int | float, *, warm_up: int) -> dict:
    """Images per second that the pipeline yields to a consumer that never waits, over at least `seconds` and one part.

    warm_up: parts to read first, for at most `seconds`, so that parts that were already waiting are not counted.
    """
    counts = {"read": 0, "bad_images": 0}

    def take() -> int:
        batch = next(batches)
        counts["read"] += len(batch["image"])
        counts["bad_images"] += int(batch["replaced"].sum())
        return len(batch["image"])

    start = time.perf_counter()
    for _ in range(warm_up):
        if time.perf_counter() - start > seconds:
            break
        take()
    start, images = time.perf_counter(), 0
    while not images or time.perf_counter() - start < seconds:
        images += take()
    took = time.perf_counter() - start
    return {"images_per_second": images / took, "seconds": took, **counts}


def format_timing(timed: dict) -> str:
    how = f"workers {timed['workers']}, threads {timed['threads']}, prefetch {timed['prefetch']}"
    bad = f"{timed['bad_images']} of {timed['read']} images read were bad"
    return f"{timed['images_per_second']:.0f} images/s ({how}; over {timed['seconds']:.1f} s); {bad}"


def time_train_step(experiment, seconds: int | float) -> dict:
    """Images per second of the compiled training step on this machine, over at least `seconds` and one step."""
    import jax

    from simmim_jax.compiled import compile_train_step, make_state, to_device

    spec, mesh, key = experiment.batches, experiment.mesh, experiment.keys.step
    batch = {name: np.zeros(shape, dtype) for name, (shape, dtype) in spec.arrays().items()}
    drawn = np.random.default_rng(0).integers(0, 256, batch["image"].shape, np.uint8)
    batch["image"] = drawn.astype(batch["image"].dtype)
    batch["batch_index"] = np.arange(spec.batch_size, dtype=np.int32)
    try:
        start = time.perf_counter()
        step = compile_train_step(experiment)
        compile_seconds = time.perf_counter() - start
        batch = to_device(batch, 0, mesh)
        state, before = step(make_state(experiment), batch, key)
        jax.block_until_ready(before)
        start, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - start < seconds:
            state, metrics = step(state, batch, key)
            jax.block_until_ready(before)  # one step late, as in training
            before, steps = metrics, steps + 1
        jax.block_until_ready(before)
        took = time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        what = f"a step of batch_size {spec.batch_size} does not fit into the memory of {mesh.size} device(s)"
        fix = "give --config.microbatches, a lower --config.batch_size, or --nostep"
        raise ConfigError(what, "batch_size", fix) from error
    device = jax.devices()[0]
    return {
        "images_per_second": steps * spec.batch_size / took, "seconds": took, "steps": steps,
        "compile_seconds": compile_seconds, "batch_size": spec.batch_size,
        "platform": device.platform, "device": device.device_kind, "devices": mesh.size,
    }  # fmt: skip


def compare_rates(data_rate: float, step_rate: float, advice: str) -> str:
    """Whether the pipeline keeps up with the step, and the `advice` if not. Rates are in images per second."""
    rates = f"data {data_rate:.0f} images/s, step needs {step_rate:.0f}"
    if data_rate >= step_rate:
        return f"{rates}: the pipeline keeps up ({data_rate / step_rate:.1f}x)"
    return f"{rates}: the device would wait {1 - data_rate / step_rate:.0%} of the time: {advice}"


def run() -> None:
    """Run `main`. A user's mistake prints one line and exits with its code, as `errors` promises."""
    sys.stdout.reconfigure(errors="backslashreplace")  # file names may be bytes that are not UTF-8
    if any(argument.startswith("--jax") for argument in sys.argv):
        __import__("jax").config.config_with_absl()
    define_flags()
    with exit_with_message():
        app.run(main, flags_parser=partial(parse_flags, needs_workdir=False))


if __name__ == "__main__":
    run()
