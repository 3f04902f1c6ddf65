"""python -m simmim_jax.tools.predict RUN IMAGE [IMAGE ...] [options]

What a run says of single images: a classifier its likeliest classes, a segmentation run the classes of their pixels, a
pretraining run, with --out, its reconstruction.
"""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from simmim_jax.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    Parser,
    check_minimum,
)
from simmim_jax.files import write_atomically
from simmim_jax.tools.cli import check_seed, parse_known, parse_size, start

EXAMPLES = """\
examples:
  the five likeliest classes of two images, by a run that was fine-tuned or probed:
    python -m simmim_jax.tools.predict runs/finetuned cat.jpg dog.jpg
  as JSON, a list with an object for each image:
    python -m simmim_jax.tools.predict runs/finetuned cat.jpg --top=1 --json
  which part of an image each class has, by a segmentation run; in colors beside the image in street_classes.png, and
  as numbers from 0 on, as the run has them, in street_classes_mask.png:
    python -m simmim_jax.tools.predict runs/segments street.jpg --out=street_classes.png
  what a pretraining run makes of the hidden parts of an image:
    python -m simmim_jax.tools.predict runs/pretrained cat.jpg --out=cat_reconstructed.png
"""
BATCH = 64  # images at a time, of many
MARK = ("Software", "simmim_jax.tools.predict")  # in each picture that is written here
NEXT = "fine-tune or probe it (configs/*_finetune.py, configs/*_linear.py), or give --out=FILE.png for what it rebuilds"


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.predict",
        description="Classes of images or, by a segmentation run, of pixels; reconstructions by a pretraining run.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="workdir of a run, or a step in it")
    add("images", metavar="IMAGE", nargs="+", help="files: JPEG, PNG, WebP, BMP, TIFF, GIF")
    add("--top", type=int, default=5, metavar="N", help="how many classes of each image (default: 5)")
    add("--json", action="store_true", help="print JSON")
    add("--image-size", metavar="H[,W]", help="in pixels (default: that of the run); positions are resized to it")
    add(
        "--out",
        default="",
        metavar="FILE.png",
        help="of pretraining and segmentation: the picture to write; of several images of the latter FILE_1.png, ..., "
        "and for each FILE_mask.png; of what is there, only what predict has written is replaced, and no IMAGE",
    )
    add("--seed", type=int, default=0, metavar="N", help="of the masks of a reconstruction (default: 0)")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError for what is not one, with the nearest."""
    options = parse_known(make_parser(), argv)
    if not options.run:
        raise ConfigError("an empty RUN", "command line", "see --help")
    options.run, options.out = map(os.path.expanduser, (options.run, options.out))
    options.image_size = parse_size(options.image_size)
    check_minimum("--top", options.top, 1)
    check_seed(options.seed)
    if options.out and Path(options.out).suffix != ".png":
        raise ConfigError(f"--out={options.out}", "command line", "give a file that ends in .png")
    for image in options.images:
        if os.path.isdir(image):
            fix = "give files, or a folder to python -m simmim_jax.tools.embed"
            raise DataError("a folder, no image", image, fix)
        if not os.path.exists(image):
            raise DataError("no such image", image, "give the path of a file")
    return options


class Files:
    """A source (see `simmim_jax.data.sources`) of files, by their paths."""

    def __init__(self, paths: list[str]):
        self.paths, self.classes = paths, ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> dict:
        return {"image": Path(self.paths[i]).read_bytes(), "label": -1, "name": self.paths[i]}

    def name(self, i: int) -> str:
        return self.paths[i]

    def describe(self) -> str:
        return f"{len(self)} files"


def run(argv: list[str]) -> None:
    """Predict, as the command line says."""
    options = parse(argv)
    from simmim_jax.runs import finished  # JAX comes in here: help and mistakes are told without it
    from simmim_jax.runtime import compilation

    compilation.keep_compiled()
    model = finished.load_run(options.run, options.image_size)
    name = (model.config.get("objective") or {"name": "none"})["name"]
    if name == "classify":
        if options.out:
            raise ConfigError("--out for a classifier", str(model.folder), "leave it out, or add --json and > FILE")
        classify(model, options)
    elif name == "segment":
        segment(model, options)
    elif name == "simmim":
        if not options.out:
            raise CheckpointError("a pretraining run, which knows no classes", str(model.folder), NEXT)
        reconstruct(model, options)
    else:
        finished.objective_of(model)  # which refuses an encoder alone
        raise CheckpointError(f"a run of {name}, which gives no classes", str(model.folder), "give one of classify")


def classify(model, options: argparse.Namespace) -> None:
    """Print the likeliest classes of each image. Raises DataError in the end if some cannot be read."""
    import numpy as np

    from simmim_jax.runs import finished

    classes = finished.class_names(model)
    if not classes:
        print("classes are told by number: neither config.json nor the run's images name them", file=sys.stderr)
    answers = []
    for position, out in outputs(model, options):
        logits = out["logits"].astype(np.float64)
        likely = np.exp(logits - logits.max())
        likely /= likely.sum()
        best = np.argsort(-likely, kind="stable")[: options.top].tolist()
        ranked = [{"class": classes[n] if classes else n, "label": n, "probability": float(likely[n])} for n in best]
        answers.append({"image": options.images[position], "predictions": ranked})
        if not options.json:
            print(options.images[position])
            for each in ranked:
                print(f"  {each['probability']:7.2%}  {each['class']}", flush=True)
    if options.json:
        print(json.dumps(answers, indent=2))
    refuse_unread(options, len(answers))


def reconstruct(model, options: argparse.Namespace) -> None:
    """Draw each image, its visible part, what the run predicts, and that pasted into the visible part."""
    from simmim_jax.evals.reconstruction import draw_reconstructions

    rows, lines = [], []
    refuse_replacing([Path(options.out)], options.images)
    make_folder_of(options.out)
    for position, out in outputs(model, options):
        rows.append((out["image"], out["mask"], out["prediction"]))
        lines.append({"image": options.images[position], "masked_loss": float(out["loss"])})
    if rows:
        write_picture(Path(options.out), draw_reconstructions(rows))
    if options.json:
        print(json.dumps(lines, indent=2))
    else:
        for line in lines:
            print(f"{line['image']}: loss of what is hidden {line['masked_loss']:.4f}")
        print(f"{options.out}: {len(rows)} rows")
    refuse_unread(options, len(rows))


def segment(model, options: argparse.Namespace) -> None:
    """Print which part of each image its largest classes have; with --out draw all of them, and write their numbers."""
    import numpy as np

    from simmim_jax.data.decode import decode
    from simmim_jax.evals.segmentation import palette
    from simmim_jax.tools.evaluate import segments

    names = model.config.get("classes") or ()
    answers = []
    targets = files_of(options)
    refuse_replacing([path for pair in targets for path in pair], options.images)
    make_folder_of(options.out)
    for position, prediction, num_classes in segments.segment_images(model, Files(options.images)):
        image, shares = options.images[position], np.bincount(prediction.ravel()) / prediction.size
        colors = ["#" + bytes(color).hex() for color in palette(num_classes)]
        ranked = [
            {"class": names[n] if names else n, "label": n, "share": float(shares[n]), "color": colors[n]}
            for n in np.argsort(-shares, kind="stable")[: options.top].tolist() if shares[n]
        ]  # fmt: skip
        answers.append({"image": image, "classes": ranked})
        written = targets[position] if targets else ()
        if written:
            pixels = decode(Path(image).read_bytes(), model.channels)
            write_picture(written[0], segments.overlay(pixels, prediction, num_classes))
            write_picture(written[1], prediction.astype(np.uint8 if num_classes <= 256 else np.uint16))
        if not options.json:
            print(image)
            for each in ranked:
                print(f"  {each['share']:7.2%}  {each['class']}  {each['color']}")
            print("".join(f"  {file}\n" for file in written), end="", flush=True)
    if options.json:
        print(json.dumps(answers, indent=2))
    refuse_unread(options, len(answers))


def files_of(options: argparse.Namespace) -> list[tuple[Path, Path]]:
    """(the picture, the mask) to write of each image, of a segmentation run; nothing without --out."""
    if not options.out:
        return []
    path, several = Path(options.out), len(options.images) > 1
    paths = [path.with_stem(f"{path.stem}_{n + 1}") if several else path for n in range(len(options.images))]
    return [(path, path.with_stem(f"{path.stem}_mask")) for path in paths]


def refuse_replacing(paths: list[Path], images: list[str]) -> None:
    """Raise ConfigError if one of these files is there, and is one of the images, or was not written by predict."""
    mark, given = b"tEXt" + "\0".join(MARK).encode(), {identity_of(image) for image in images}
    for path in paths:
        with told_unwritten(str(path)):
            if not path.exists():
                continue
            is_image = identity_of(path) in given
            with open(path, "rb") as file:
                written_here = mark in file.read(1000)
        if is_image or not written_here:
            what = "one of the images" if is_image else "there is a file that predict has not written"
            raise ConfigError(what, str(path), "give another --out, or move it away")


def identity_of(path: str | Path) -> tuple[int, int]:
    """Of a file, by whatever name."""
    about = os.stat(path)
    return about.st_dev, about.st_ino


def make_folder_of(out: str) -> None:
    with told_unwritten(out):
        Path(out).parent.mkdir(parents=True, exist_ok=True)


def write_picture(path: Path, pixels) -> None:
    """A PNG of uint8 [h, w, 3], or of uint8 or uint16 [h, w]."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    about.add_text(*MARK)
    with told_unwritten(str(path)):
        write_atomically(path, lambda partial: Image.fromarray(pixels).save(partial, format="PNG", pnginfo=about))


@contextlib.contextmanager
def told_unwritten(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        fix = "mend the disk, or give another --out"
        raise ConfigError(f"cannot write: {error.strerror or error}", where, fix) from error


def outputs(model, options: argparse.Namespace):
    """(place in `options.images`, what the objective makes of it) of each image that can be read."""
    import jax

    from simmim_jax.evals.features import jit_on_mesh
    from simmim_jax.runs import finished
    from simmim_jax.runtime import sharding

    objective = finished.objective_of(model)
    key, mesh = jax.random.key(options.seed), sharding.make_mesh()
    run_batch = jit_on_mesh(lambda params, batch: objective.predict(params, batch, key), mesh)
    params = jax.device_put(model.params, sharding.replicated(mesh))
    source = Files(options.images)
    for batch in finished.make_pass(model, source, mesh, batch_size=min(BATCH, len(source))):
        out = run_batch(params, batch)
        for row, (position, valid) in enumerate(zip(out["batch_index"].tolist(), out["valid"], strict=True)):
            if valid:
                yield position, {name: value[row] for name, value in out.items()}


def refuse_unread(options: argparse.Namespace, read: int) -> None:
    missing = len(options.images) - read
    if missing:
        what = f"{missing} of {len(options.images)} images cannot be read"
        raise DataError(what, "they are named above", "give JPEG, PNG, WebP, BMP, TIFF or GIF files")


if __name__ == "__main__":
    start(run)
