"""python -m simmim_jax.tools.preview --config configs/X.py [--config.a.b=value ...] [--out=preview.png]

What a run of this config feeds its model, as a picture and in numbers, and whether the images come fast enough.
"""

import io
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from absl import app, flags, logging
from jaxtyping import Bool, Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from simmim_jax.errors import ConfigError, check_minimum, exit_with_message
from simmim_jax.files import printable, write_atomically
from simmim_jax.flags import define_config_flag, parse_flags

BAND = (10.0, 20.0)  # pixels of AvgDist that serve best, on images of 192 (paper section 4.1.2, figure 3)
MEASURED = 128  # crops, at least, that means, deviations and masks are measured on
OFF = 0.1  # by which mean or std may differ from the config's before it is worth a line
PART = 2**23  # bytes of pixels in a part of a batch: parts of larger ones are timed, in the same order
SIDES = (96, 160)  # pixels that the shorter side of a tile has on the sheet
GAP, LINE = 6, 16  # pixels between tiles, and of a line of text
FONT_SIZE = 11


def define_flags() -> None:
    """The flags: those of `simmim_jax.main`, and what is to be shown and measured."""
    define_config_flag()
    flags.declare_key_flag("config")
    flags.DEFINE_string("out", "preview.png", "picture to write")
    flags.DEFINE_string("json", "", "file for the numbers, if wanted")
    flags.DEFINE_integer("images", 32, "on the picture", lower_bound=1)
    flags.DEFINE_integer("start-step", 0, "whose images and masks are shown", lower_bound=0)
    flags.DEFINE_float("seconds", 5.0, "for which each, the images and the step, is timed", lower_bound=0.0)
    flags.DEFINE_bool("step", True, "time the training step too, on the devices that are here")
    flags.DEFINE_string("workdir", "", "not used: a command of simmim_jax.main will do as it stands")


def main(argv: list[str]) -> None:
    given = flags.FLAGS
    if not given["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # JAX tells much at the level below
    preview(
        given.config, out=given.out, json_path=given.json, images=given.images, start_step=given["start-step"].value,
        seconds=given.seconds, step=given.step,
    )  # fmt: skip


def preview(
    config, *, out: str, json_path: str = "", images: int = 32, start_step: int = 0, seconds: float = 5.0, step=True
) -> dict:
    """Draw `images` samples of the config's step `start_step` to `out`; print, write and return the numbers.

    step: whether to compile and time the training step too. Raises UserError as a run of the config would.
    """
    check_minimum("images", images, 1)
    check_minimum("start-step", start_step, 0)
    check_minimum("seconds", seconds, 0)
    paths = [Path(os.path.expanduser(path)) for path in (out, json_path) if path]
    for path in paths:
        check_writable(path)
    from simmim_jax import data, train  # JAX comes in here: help and mistakes are told without it
    from simmim_jax.models import make_encoder
    from simmim_jax.objectives import make_objective

    train.check_numbers(config)
    encoder = make_encoder(**train.resolve_encoder(config, ""))
    objective = make_objective(
        encoder=encoder, image_size=config.image_size, mean=config.mean, std=config.std, **config.objective
    )
    source, _ = train.make_sources(config)
    batch_spec, loading = train.batch_options(config)
    data.check_batches(source, batch_spec, loading)
    _, step_key, _ = train.make_keys(config.seed)
    classes = tuple(source.classes)
    tell("source", f"{source.describe()}; {of_classes(classes)}")

    # Parts of the batches, as one of many processes has them: the same images at the same places.
    parts = parts_of(config.batch_size, math.prod(config.image_size) * len(config.mean))
    batches = data.make_batches(source, batch_spec, start_step=start_step, shard=data.Shard(0, parts), loading=loading)
    try:
        drawn = list(itertools.islice(batches, -(-max(images, MEASURED) * parts // config.batch_size)))
        hidden = [None] * len(drawn)
        if config.objective.name == "simmim":
            mask = make_mask(objective, step_key)
            hidden = [mask(batch, start_step + n) for n, batch in enumerate(drawn)]
        samples = list(samples_of(drawn, hidden, start_step))
        shown = samples[:images]
        for sample in shown:
            sample["name"] = source.name(sample["index"])
        steps = f"step {start_step}" + (f" to {shown[-1]['step']}" if shown[-1]["step"] > start_step else "")
        title = f"{steps}: {images} crops{'' if hidden[0] is None else ', and what the masks leave of them'}"
        captions = [caption_of(sample, classes) for sample in shown]
        sheet = draw([(sample["image"], sample["hidden"]) for sample in shown], captions, title)
        write_whole(paths[0], png_of(sheet))
        tell("picture", f"{paths[0]}: {images} crops of {steps}")
        masks = mask_numbers([sample["hidden"] for sample in samples], config.objective)
        pixels = pixel_numbers([sample["image"] for sample in samples], config.mean, config.std)
        for name, line in (*mask_lines(masks), *pixel_lines(pixels)):
            tell(name, line)
        waiting = max(loading.workers, 1) * (2 * loading.prefetch + loading.threads)
        timed = time_data(batches, seconds, warm_up=waiting - len(drawn))
    finally:
        batches.close()
    timed["read"] += len(samples)
    timed["bad_images"] += sum(sample["replaced"] for sample in samples)
    timed |= {name: getattr(loading, name) for name in ("workers", "threads", "prefetch")}
    tell(*data_line(timed))

    numbers = {"source": source.describe(), "images": len(source), "classes": list(classes)}
    numbers["shown"] = [{k: v for k, v in sample.items() if k not in ("image", "hidden")} for sample in shown]
    numbers |= {"masks": masks, "pixels": pixels, "data": timed}
    if step:
        tell("step", f"compiling it for batches of {config.batch_size} (--nostep leaves it out)")
        step_numbers = time_step(config, len(source), seconds)
        tell(
            "", "{images_per_second:.0f} images/s on {devices} {device} device(s), without data".format(**step_numbers)
        )
        rates = (timed["images_per_second"], step_numbers["images_per_second"])
        numbers |= {"step": step_numbers, "waiting": max(0.0, 1 - rates[0] / rates[1])}
        numbers["verdict"] = verdict(*rates, data.advice(source, workers=loading.workers))
        tell("verdict", numbers["verdict"])
        if step_numbers["platform"] == "cpu":
            tell("", "both were timed alone: in a run on CPUs they share the cores, and each is slower")
    if json_path:
        write_whole(paths[1], (json.dumps(numbers, indent=2) + "\n").encode())
    return numbers


def tell(name: str, line: str) -> None:
    print(f"{name:9}{' '.join(line.split())}", flush=True)


def parts_of(batch_size: int, image_bytes: int) -> int:
    """In how many equal parts a batch is read, that a part has about `PART` bytes; 1 where the whole has no more."""
    ideal = batch_size * image_bytes / PART
    if ideal <= 1:
        return 1
    return min((n for n in range(1, batch_size + 1) if batch_size % n == 0), key=lambda n: abs(math.log(n / ideal)))


def make_mask(objective, key) -> Callable[[dict, int], Bool[np.ndarray, "b y x"]]:
    """A function (batch, step) -> which pixels the compiled step would hide: by its key, and what the objective does.

    key: of all steps, as the training has it.
    """
    import jax
    import jax.numpy as jnp

    @jax.jit
    def mask(key, image, batch_index):
        shapes = jax.eval_shape(objective.init, key)
        params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # no mask depends on them: dead code
        return objective.predict(params, {"image": image, "batch_index": batch_index}, key)["mask"]

    def mask_of_step(batch, step):
        return np.asarray(mask(jax.random.fold_in(key, step), batch["image"], batch["batch_index"]))

    return mask_of_step


def samples_of(batches: list[dict], hidden_by_step: list, start_step: int) -> Iterator[dict]:
    """The rows of the batches one by one: "image" uint8 [y, x, c], "hidden" bool [y, x] or None, and who they are."""
    for n, (batch, hidden) in enumerate(zip(batches, hidden_by_step, strict=True)):
        for row in range(len(batch["image"])):
            whole = {name: int(batch[name][row]) for name in ("index", "batch_index", "label")}
            whole |= {"step": start_step + n, "replaced": bool(batch["replaced"][row])}
            yield whole | {"image": batch["image"][row], "hidden": None if hidden is None else hidden[row]}


def mask_numbers(hidden: list, objective) -> dict | None:
    """The share of pixels that masks hide, and AvgDist in pixels; None where nothing is masked."""
    from simmim_jax.masking.distance import average_distance

    if hidden[0] is None:
        return None
    block = objective.mask_patch_size
    blocks = (hidden[0].shape[0] // block) * (hidden[0].shape[1] // block)
    distances = [average_distance(mask) for mask in hidden if not mask.all()]
    ratio = float(np.mean([mask.mean() for mask in hidden]))
    return {
        "count": len(hidden),
        "asked": objective.mask_ratio,
        "ratio": ratio,
        "blocks": blocks,
        "average_distance": float(np.mean(distances)) if distances else None,
    }


def band_of(distance: float) -> str:
    """Where an AvgDist is by the band that the paper found good."""
    return "below" if distance < BAND[0] else "above" if distance > BAND[1] else "inside"


def mask_lines(masks: dict | None) -> list[tuple[str, str]]:
    if masks is None:
        return []
    blocks, ratio = masks["blocks"], masks["ratio"]
    line = f"{ratio:.4f} hidden, {ratio * blocks:.4g} of {blocks} blocks (asked: {masks['asked']:g})"
    distance = masks["average_distance"]
    if distance is None:
        return [("masks", line), ("warning", "nothing is left visible: give a lower --config.objective.mask_ratio")]
    band = f"{band_of(distance)} the {BAND[0]:g} to {BAND[1]:g} that the paper found good, on images of 192 px"
    return [("masks", f"{line}, AvgDist {distance:.1f} px: {band}")]


def pixel_numbers(crops: list[UInt8[np.ndarray, "y x c"]], mean: tuple, std: tuple) -> dict:
    """Mean and deviation of each channel over all pixels of the crops, on the scale 0..1, beside the config's."""
    total, squares, count = 0.0, 0.0, 0
    for crop in crops:
        values = crop.reshape(-1, crop.shape[-1]).astype(np.float64) / 255
        total, squares, count = total + values.sum(0), squares + (values**2).sum(0), count + len(values)
    measured = total / count
    spread = np.sqrt(np.maximum(squares / count - measured**2, 0))
    return {
        "count": len(crops), "mean": measured.tolist(), "std": spread.tolist(),
        "config_mean": list(mean), "config_std": list(std),
    }  # fmt: skip


def pixel_lines(pixels: dict) -> list[tuple[str, str]]:
    """Means and deviations beside those of the config, and what to change where they are far off."""
    lines = []
    for name in ("mean", "std"):
        found, given = ([round(value, 3) for value in pixels[key]] for key in (name, f"config_{name}"))
        lines.append((name, f"{spelled(found)} per channel of {pixels['count']} crops (config: {spelled(given)})"))
        if max(abs(a - b) for a, b in zip(pixels[name], pixels[f"config_{name}"], strict=True)) > OFF:
            values = ",".join(f"{value:.3f}" for value in pixels[name]) + ("," if len(found) == 1 else "")
            lines.append(
                ("warning", f"{name} is off by more than {OFF}: these crops have about --config.{name}={values}")
            )
    return lines


def spelled(values: list[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def time_data(batches: Iterator[dict], seconds: float, *, warm_up: int) -> dict:
    """Images per second that the pipeline yields to one who never lets it wait, over at least `seconds` and one part.

    warm_up: parts to read first, so that those that were waiting already are not counted; `seconds` long at most.
    """
    read = bad = 0

    def take() -> int:
        nonlocal read, bad
        batch = next(batches)
        read += len(batch["image"])
        bad += int(batch["replaced"].sum())
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
    return {"images_per_second": images / took, "seconds": took, "read": read, "bad_images": bad}


def data_line(timed: dict) -> tuple[str, str]:
    how = f"workers {timed['workers']}, threads {timed['threads']}, prefetch {timed['prefetch']}"
    bad = f"{timed['bad_images']} of {timed['read']} read were bad"
    return "data", f"{timed['images_per_second']:.0f} images/s ({how}; over {timed['seconds']:.1f} s); {bad}"


def time_step(config, images: int, seconds: float) -> dict:
    """Images per second that the compiled training step takes on this machine's devices when it waits for none.

    images: how many the data have. Measured over at least `seconds` and one step, after a first.
    """
    import jax

    from simmim_jax import train

    built = train.build(config, *train.run_length(config, images))
    mesh, abstract, step_key = built["mesh"], built["abstract"], built["key"]
    shapes = train.abstract_batch(config)
    batch = {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}
    batch["image"] = np.random.default_rng(0).integers(0, 256, shapes["image"].shape, np.uint8)
    batch["batch_index"] = np.arange(config.batch_size, dtype=np.int32)
    try:
        start = time.perf_counter()
        step = train.compile_training(
            config, built["objective"], built["tx"], abstract, step_key, mesh, built["encoder"]
        )
        compiling = time.perf_counter() - start
        state = jax.jit(built["make_state"], out_shardings=train.places(abstract))()
        batch = train.to_device(batch, mesh)
        state, before = step(state, batch, step_key)
        jax.block_until_ready(before)
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < seconds:
            state, values = step(state, batch, step_key)
            jax.block_until_ready(before)  # one step late, as in training
            before, done = values, done + 1
        jax.block_until_ready(before)
        took = time.perf_counter() - start
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ConfigError(
            f"a step of batch_size {config.batch_size} does not fit into the memory of {mesh.size} device(s)",
            "batch_size", "give --config.microbatches, a lower --config.batch_size, or --nostep",
        ) from error  # fmt: skip
    device = jax.devices()[0]
    return {
        "images_per_second": done * config.batch_size / took, "seconds": took, "steps": done,
        "compile_seconds": compiling, "batch_size": config.batch_size,
        "platform": device.platform, "device": device.device_kind, "devices": mesh.size,
    }  # fmt: skip


def verdict(data_rate: float, step_rate: float, advice: str) -> str:
    """Whether the images come as fast as the step takes them, both per second, and the `advice` where not."""
    rates = f"data {data_rate:.0f} images/s, step needs {step_rate:.0f}"
    if data_rate >= step_rate:
        return f"{rates}: the pipeline keeps up ({data_rate / step_rate:.1f}x)"
    return f"{rates}: the device would wait {1 - data_rate / step_rate:.0%} of the time: {advice}"


def of_classes(classes: tuple[str, ...]) -> str:
    """How many classes there are, and the first of them."""
    if not classes:
        return "no classes"
    named = ", ".join(map(printable, classes[:5]))
    return f"{len(classes)} classes: {named}{', ...' if len(classes) > 5 else ''}"


def caption_of(sample: dict, classes: tuple[str, ...]) -> str:
    """The name of the file; where what is learned are classes, that of its class."""
    if sample["hidden"] is not None:
        return printable(sample["name"])
    return printable(classes[sample["label"]]) if 0 <= sample["label"] < len(classes) else "no class"


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of an image on the sheet: small ones enlarged by a whole number, large ones reduced."""
    short = min(height, width)
    if short > SIDES[1]:
        return max(1, round(height * SIDES[1] / short)), max(1, round(width * SIDES[1] / short))
    scale = -(-SIDES[0] // short)
    return height * scale, width * scale


def columns_of(count: int, height: int, width: int) -> int:
    """Columns of a sheet of `count` cells: a little wider than high, and with few places left empty."""

    def unfit(columns: int) -> float:
        rows = -(-count // columns)
        return abs(math.log(columns * width / (rows * height) / 1.25)) + 6 * (rows * columns - count) / count

    return min(range(1, count + 1), key=unfit)


def draw(
    samples: list[tuple[UInt8[np.ndarray, "y x c"], Bool[np.ndarray, "y x"] | None]], captions: list[str], title: str
) -> UInt8[np.ndarray, "h w 3"]:
    """A sheet of the crops, each with what is left of it beside it where a mask hides the rest, and its caption."""
    from simmim_jax.evals.sheet import to_rgb

    height, width = tile_size(*samples[0][0].shape[:2])
    panels = 1 if samples[0][1] is None else 2
    cell_height, cell_width = height + LINE + GAP, panels * (width + 1) + 2 * GAP
    columns = columns_of(len(samples), cell_height, cell_width)
    rows = -(-len(samples) // columns)
    font = ImageFont.load_default(FONT_SIZE)
    sheet = Image.new("RGB", (columns * cell_width + GAP, LINE + GAP + rows * cell_height), "white")
    pen = ImageDraw.Draw(sheet)
    pen.text((GAP, 3), shortened(title, sheet.width - 2 * GAP, font), fill="black", font=font)
    for n, ((image, hidden), caption) in enumerate(zip(samples, captions, strict=True)):
        x, y = GAP + n % columns * cell_width, LINE + GAP + n // columns * cell_height
        pixels = to_rgb(image / np.float32(255))
        shown = [pixels] if hidden is None else [pixels, np.where(hidden[..., None], np.float32(0.5), pixels)]
        for panel, values in enumerate(shown):
            sheet.paste(tile(values, (height, width)), (x + panel * (width + 1), y))
        text = shortened(caption, panels * (width + 1) - 1, font)
        pen.text((x, y + height + 1), text, fill="dimgray", font=font)
    return np.asarray(sheet)


def tile(values: Float[np.ndarray, "y x 3"], size: tuple[int, int]) -> Image.Image:
    """An image in 0..1 at (height, width), enlarged pixel by pixel or reduced by means."""
    picture = Image.fromarray(np.round(values * 255).astype(np.uint8))
    way = Image.Resampling.BOX if size[0] < len(values) else Image.Resampling.NEAREST
    return picture.resize(size[::-1], way)


def shortened(text: str, width: int, font) -> str:
    """As much of the text's end, which of a path tells most, as `width` pixels take."""
    for start in range(max(0, len(text) - 200), len(text)):
        part = text[start:] if start == 0 else f"..{text[start:]}"
        if font.getlength(part) <= width:
            return part
    return ""


def png_of(sheet: UInt8[np.ndarray, "h w 3"]) -> bytes:
    """The sheet as the bytes of a PNG file."""
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "PNG")
    return file.getvalue()


def check_writable(path: Path) -> None:
    """Raise ConfigError, before any work is done, if a file cannot be written there; makes its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot write there: {error.strerror}", str(path), "give another path") from error
    if path.is_dir():
        raise ConfigError("a folder where a file is to be written", str(path), f"give a file, like {path}/preview.png")
    if not os.access(path.parent, os.W_OK):
        raise ConfigError("cannot write there: Permission denied", str(path), "give another path")


def write_whole(path: Path, content: bytes) -> None:
    """`path` holds all of `content`, or what it held before."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise ConfigError(
            f"cannot write: {error.strerror}", str(path), "mend the disk, or give another path"
        ) from error


def run() -> None:
    """Run `main`; end as `errors` promises: one line and an exit code for what the user can mend."""
    sys.stdout.reconfigure(errors="backslashreplace")  # a folder may be named in bytes that are no UTF-8
    if any(argument.startswith("--jax") for argument in sys.argv):
        import jax

        jax.config.config_with_absl()
    define_flags()
    with exit_with_message():
        app.run(main, flags_parser=partial(parse_flags, needs_workdir=False))


if __name__ == "__main__":
    run()
