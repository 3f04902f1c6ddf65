"""python -m simmim_jax.tools.predict RUN IMAGE [IMAGE ...] [options]

Apply a run to single images. A classifier prints their likeliest classes, a segmentation run the classes of their
pixels; a pretraining run draws, with --out, their reconstructions.
"""

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from simmim_jax.errors import CheckpointError, ConfigError, DataError, Parser
from simmim_jax.tools import cli

EXAMPLES = """\
examples:
  the five likeliest classes of two images, by a fine-tuned run or a probe:
    python -m simmim_jax.tools.predict runs/finetuned cat.jpg dog.jpg
  as JSON, a list with an object for each image:
    python -m simmim_jax.tools.predict runs/finetuned cat.jpg --top=1 --json
  a class for each pixel, by a segmentation run: as an overlay in street_classes.png, and as numbers in
  street_classes_mask.png:
    python -m simmim_jax.tools.predict runs/segments street.jpg --out=street_classes.png
  the reconstruction of an image by a pretraining run:
    python -m simmim_jax.tools.predict runs/pretrained cat.jpg --out=cat_reconstructed.png
"""
MAX_BATCH = 64  # images per batch
ROWS = 256  # image rows that are painted at a time: a photograph as float64 is large
GAP = 8  # pixels between an image and its overlay
NEXT = "fine-tune or probe it (configs/*_finetune.py, configs/*_linear.py), or give --out=FILE.png to reconstruct"


def make_parser() -> Parser:
    parser = cli.make_parser("predict", "Classes of images or of their pixels; reconstructions of images.", EXAMPLES)
    add = parser.add_argument
    add("run", type=cli.path, metavar="RUN", help="workdir of a run, or a step in it")
    add("images", metavar="IMAGE", nargs="+", help="files: JPEG, PNG, WebP, AVIF, BMP, TIFF, GIF")
    add("--top", type=cli.number(int, 1), default=5, metavar="N", help="number of classes per image (default: 5)")
    add("--json", action="store_true", help="print JSON")
    cli.add_image_size(parser)
    add(
        "--out", type=os.path.expanduser, default="", metavar="FILE.png",
        help="write a picture (pretraining, segmentation); segmentation also writes FILE_mask.png, and for several "
        "images FILE_1.png, FILE_1_mask.png, ...",
    )  # fmt: skip
    cli.add_seed(parser, "of a reconstruction's masks")
    cli.add_overwrite(parser)
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError, and DataError for an image that does not exist."""
    options = cli.parse_known(make_parser(), argv)
    if options.out and Path(options.out).suffix != ".png":
        raise ConfigError(f"--out={options.out}", "command line", "give a file that ends in .png")
    for image in options.images:
        if os.path.isdir(image):
            raise DataError(
                "a folder, not an image", image, "give files; python -m simmim_jax.tools.embed takes folders"
            )
        if not os.path.exists(image):
            raise DataError("no such image", image, "give the path of a file")
    return options


def run(argv: list[str]) -> None:
    """Predict, by the command line."""
    options = parse(argv)
    from simmim_jax.runs.finished import load_run, make_run_objective
    from simmim_jax.runtime import compilation

    compilation.enable_cache()
    run = load_run(options.run, options.image_size)
    objective = make_run_objective(run)
    commands = {"accuracy": classify, "segmentation": segment, "reconstruction": reconstruct}
    command = next((commands[name] for name in objective.evals if name in commands), None)
    if not command:
        raise CheckpointError(f"a run of {run.objective_name}", str(run.folder), "give a classifier's workdir")
    answers = []
    with cli.translate_errors(ConfigError, options.out, "free space, or give another --out", "give fewer images"):
        for answer, lines in command(run, objective, options):
            answers.append(answer)
            if not options.json:
                print(*lines, sep="\n", flush=True)
        if options.json:
            print(json.dumps(answers, indent=2))
    if len(answers) < len(options.images):
        what = f"{len(options.images) - len(answers)} of {len(options.images)} images cannot be read"
        raise DataError(what, "they are named above", "see the reason of each")


# Each command yields (the answer as JSON, the same as lines of text) for each image that can be read.


def classify(run, objective, options: argparse.Namespace) -> Iterator[tuple[dict, list[str]]]:
    """The likeliest classes of each image."""
    import numpy as np

    from simmim_jax.tools.images import class_names

    if options.out:
        raise ConfigError("--out for a classifier", str(run.folder), "leave it out, or add --json and > FILE")
    classes = class_names(run)
    if not classes:
        print("classes are given by number: neither config.json nor the run's images name them", file=sys.stderr)
    for i, out in apply(run, objective, options):
        logits = out["logits"].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        ranked = [
            {"class": classes[n] if classes else n, "label": n, "probability": float(probabilities[n])}
            for n in np.argsort(-probabilities, kind="stable")[: options.top].tolist()
        ]
        lines = [f"  {each['probability']:7.2%}  {each['class']}" for each in ranked]
        yield {"image": options.images[i], "predictions": ranked}, [options.images[i], *lines]


def reconstruct(run, objective, options: argparse.Namespace) -> Iterator[tuple[dict, list[str]]]:
    """The loss of each image. Draw its visible part, the prediction, and both pasted together."""
    from simmim_jax.evals.reconstruction import draw_reconstructions
    from simmim_jax.evals.sheet import save_png

    if not options.out:
        raise CheckpointError("a pretraining run, which predicts no classes", str(run.folder), NEXT)
    cli.check_output(options.out, overwrite=options.overwrite, inputs=options.images)
    rows = []
    for i, out in apply(run, objective, options):
        rows.append((out["image"], out["mask"], out["prediction"]))
        loss = float(out["loss"])
        yield {"image": options.images[i], "masked_loss": loss}, [f"{options.images[i]}: masked_loss {loss:.4f}"]
    if rows:
        save_png(options.out, draw_reconstructions(rows, run.pixels))


def segment(run, objective, options: argparse.Namespace) -> Iterator[tuple[dict, list[str]]]:
    """The largest classes of each image and their parts of it; with --out write an overlay and a mask."""
    import numpy as np

    from simmim_jax.data.decode import decode
    from simmim_jax.data.pixels import Pixels
    from simmim_jax.evals.segmentation import palette
    from simmim_jax.evals.sheet import save_png

    names, pixels = run.config.get("classes") or (), Pixels.from_record(run.config)
    outputs = segmentation_files(options)
    for path in (path for pair in outputs for path in pair):
        cli.check_output(path, overwrite=options.overwrite, inputs=options.images)
    for i, prediction, num_classes in segment_images(run, objective, options):
        image, shares = options.images[i], np.bincount(prediction.ravel()) / prediction.size
        colors = ["#" + bytes(color).hex() for color in palette(num_classes)]
        largest = [n for n in np.argsort(-shares, kind="stable")[: options.top].tolist() if shares[n]]
        ranked = [
            {"class": names[n] if names else n, "label": n, "share": float(shares[n]), "color": colors[n]}
            for n in largest
        ]
        lines = [f"  {each['share']:7.2%}  {each['class']}  {each['color']}" for each in ranked]
        if outputs:
            stored = decode(Path(image).read_bytes(), run.channels, samples=pixels.samples)
            save_png(outputs[i][0], overlay(pixels.display(stored), prediction, num_classes))
            save_png(outputs[i][1], prediction.astype(np.uint8 if num_classes <= 256 else np.uint16))
            lines += [f"  {path}" for path in outputs[i]]
        yield {"image": image, "classes": ranked}, [image, *lines]


def segmentation_files(options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(overlay, mask) to write for each image of a segmentation run; [] without --out."""
    if not options.out:
        return []
    path, several = Path(options.out), len(options.images) > 1
    paths = [path.with_stem(f"{path.stem}_{n + 1}") if several else path for n in range(len(options.images))]
    return [(path, path.with_stem(f"{path.stem}_mask")) for path in paths]


def segment_images(run, objective, options: argparse.Namespace) -> Iterator[tuple]:
    """(index in `options.images`, class of each pixel [h, w], number of classes) of each image that can be read."""
    from functools import partial

    from simmim_jax.evals.segmentation import segment_all

    eval_inputs, state = make_inputs(run, objective, options, run.config["eval_batch_size"])
    read = partial(eval_inputs["read_windows"], state.params)
    how = (eval_inputs[name] for name in ("whole", "window", "window_batch", "fill"))
    settings = run.config.get("evals", {}).get("segmentation") or {}
    for record, prediction, num_classes in segment_all(read, *how, settings.get("step", 0)):
        yield record["index"], prediction, num_classes


def overlay(image, prediction, num_classes: int):
    """An image [h, w, c], and to its right the same under the colors of its classes: uint8 [h, _, 3]."""
    import numpy as np

    from simmim_jax.evals.segmentation import paint
    from simmim_jax.evals.sheet import to_rgb

    parts = []
    for first in range(0, len(image), ROWS):
        rows = to_rgb(image[first : first + ROWS])
        gap = np.full((len(rows), GAP, 3), 255, np.uint8)
        parts.append(np.concatenate([rows, gap, paint(rows, prediction[first : first + ROWS], num_classes)], axis=1))
    return np.concatenate(parts)


def apply(run, objective, options: argparse.Namespace) -> Iterator[tuple]:
    """(index in `options.images`, the objective's prediction for it) of each image that can be read."""
    eval_inputs, state = make_inputs(run, objective, options, min(MAX_BATCH, len(options.images)))
    for batch in eval_inputs["heldout"]:
        out = eval_inputs["predict"](state.params, batch)
        for row, (i, valid) in enumerate(zip(out["batch_index"].tolist(), out["valid"], strict=True)):
            if valid:
                yield i, {name: value[row] for name, value in out.items()}


def make_inputs(run, objective, options: argparse.Namespace, batch_size: int) -> tuple:
    """(the inputs of evaluators for `options.images`, the run's state)."""
    import jax

    from simmim_jax import data
    from simmim_jax.data.decode import BadImage, decode
    from simmim_jax.evaluation import make_eval_inputs, make_run_subject
    from simmim_jax.runs.finished import make_state
    from simmim_jax.tools import images

    source, crop, loading = images.Files(options.images), images.make_crop(run), images.make_loading(None)
    if len(source) == 1:
        try:
            decode(source[0]["image"], crop.channels, crop.max_pixels, crop.samples)
        except (BadImage, OSError) as error:
            fix = "give an image that can be read, like those that the model was trained on"
            raise DataError(str(error), source.name(0), fix) from error
    data.check_pixels(run.pixels, source)
    subject = make_run_subject(run, objective, source, crop=crop, batch_size=batch_size, limit=0, loading=loading)
    subject = subject._replace(key=jax.random.key(options.seed))
    return make_eval_inputs(subject), make_state(run, subject.mesh)


if __name__ == "__main__":
    cli.start(run)
