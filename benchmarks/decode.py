"""CPU time of a photograph on one core: to decode, to crop and resize, and in each part of our pipeline.

    pip install -r requirements.txt
    pip install opencv-python-headless==5.0.0.93 imagecodecs==2026.3.6 kornia-rs==0.2.0 av==18.1.0      # the others
    python benchmarks/decode.py --path=PHOTOGRAPHS --shards-path=SHARDS --out=decode.json
    python benchmarks/decode.py --path=PHOTOGRAPHS --images=32 --rounds=2                               # a quick try

There are three tables: decoders (from JPEG bytes to RGB), filters (from decoded pixels to a random crop of 224 x 224),
and the parts of `simmim_jax.data` (from a record to an image of a batch). Each row processes all photographs, in an
order that each round reverses. The first round is discarded. A ratio is the median over the rounds of the ratios within
a round, because machines drift. The times are CPU time of this process, which is pinned to one core. Before that,
pixels are compared with Pillow's.
"""

import argparse
import importlib.metadata
import io
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from cykooz_resizer import ImageData, PixelType, ResizeOptions, Resizer
from input import FLIP, RATIO, SCALE, in_turns, markdown
from PIL import Image
from step import ROOT, describe, run_text

sys.path.insert(0, str(ROOT))
from simmim_jax.data import make_source, transforms
from simmim_jax.data.decode import MAX_PIXELS, BadImage, Picture
from simmim_jax.errors import DataError

PACKAGES = (
    "numpy", "pillow", "simplejpeg", "cykooz_resizer", "opencv_python_headless", "imagecodecs", "kornia_rs", "av",
)  # fmt: skip
HALF = "Pillow, at a half (draft)"
COMPARED = {"simplejpeg, at a half": HALF, HALF: HALF}  # reference rows other than the first


class Photograph(NamedTuple):
    """A photograph at every stage, as input of the rows."""

    index: int  # in the source
    name: str
    content: bytes
    picture: Picture
    box: tuple[int, int, int, int]  # left, top, right, bottom
    pixels: np.ndarray
    pillow: Image.Image
    read: tuple[np.ndarray, tuple]  # our decoded pixels for this box, perhaps at reduced size, and the box in them
    resized: np.ndarray


def prepare(source, count: int, size: tuple[int, int]) -> list[Photograph]:
    """`count` photographs with their boxes, evenly spread over the source, because its first records may be of one
    class."""
    photographs, count = [], min(count, len(source))
    for index in (n * len(source) // count for n in range(count)):
        content, name = source[index]["image"], source.name(index)
        try:
            if not isinstance(content, bytes) or not content.startswith(b"\xff\xd8"):
                raise BadImage("is not a JPEG")
            picture = Picture(content, 3, MAX_PIXELS)
            pixels = picture.read()
            box = transforms._random_box(np.random.default_rng(index), picture.width, picture.height, SCALE, RATIO)
            read = transforms._read(picture, box, size, "bilinear")
        except BadImage as error:
            raise DataError(f"{name!r} {error}", source.describe(), "give a folder of undamaged JPEGs") from error
        pillow, resized = Image.fromarray(pixels), cut_and_resize(*read, size)
        photographs.append(Photograph(index, name, content, picture, box, pixels, pillow, read, resized))
    return photographs


def cut_and_resize(pixels: np.ndarray, box: tuple, size: tuple[int, int]) -> np.ndarray:
    """The second half of `transforms.random_resized_crop`. A test checks that they agree."""
    left, top, right, bottom = box
    rows, columns = slice(math.floor(top), math.ceil(bottom)), slice(math.floor(left), math.ceil(right))
    box = left - columns.start, top - rows.start, right - columns.start, bottom - rows.start
    return transforms.resize(pixels[rows, columns], size, "bilinear", box)


def decoders() -> dict[str, Callable]:
    """From bytes to RGB, in the form of the library: Pillow's rows end in Pillow images, as its crop needs them."""

    def pillow(one, half=False):
        image = Image.open(io.BytesIO(one.content))
        if half:
            image.draft(None, (image.width // 2, image.height // 2))
        return image.convert("RGB")

    def opencv(one):
        cv2 = import_module("cv2")
        how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        return cv2.imdecode(np.frombuffer(one.content, np.uint8), how)

    def kornia():
        return import_module("kornia_rs").io

    def to_rgb(pixels):  # gray photographs have one channel
        return pixels if pixels.shape[2] == 3 else pixels.repeat(3, axis=2)

    def pyav(one):
        av = import_module("av")
        codec = av.CodecContext.create("mjpeg", "r")
        codec.thread_count = 1
        frame = (codec.decode(av.Packet(one.content)) or codec.decode(None))[0]
        return frame.to_ndarray(format="rgb24")

    def fast(one):
        return simplejpeg.decode_jpeg(one.content, "RGB", fastdct=True, fastupsample=True)

    def at_a_half(one):
        height, width = simplejpeg.decode_jpeg_header(one.content)[:2]
        minimum = {"min_height": -(-height // 2), "min_width": -(-width // 2)}
        return simplejpeg.decode_jpeg(one.content, "RGB", min_factor=2, **minimum)

    return {
        "Pillow": pillow,
        "simplejpeg (ours)": lambda one: simplejpeg.decode_jpeg(one.content, "RGB"),
        "OpenCV": opencv,
        "imagecodecs": lambda one: import_module("imagecodecs").jpeg8_decode(one.content, outcolorspace="RGB"),
        "kornia-rs, libjpeg-turbo": lambda one: kornia().decode_image_jpegturbo(one.content, "rgb"),
        "kornia-rs": lambda one: to_rgb(kornia().decode_image_jpeg(one.content)),
        "PyAV": pyav,
        "simplejpeg, fastdct and fastupsample": fast,
        HALF: lambda one: pillow(one, half=True),
        "simplejpeg, at a half": at_a_half,
    }


def filters(size: tuple[int, int]) -> dict[str, Callable]:
    """From decoded pixels, in the form of the library, to an array of this size."""
    resizer, bilinear, width_height = Resizer(), Image.Resampling.BILINEAR, size[::-1]

    def cut(one):
        left, top, right, bottom = one.box
        return one.pixels[top:bottom, left:right]

    def in_one_call(one):
        part, small = cut(one), ImageData(size[1], size[0], PixelType.U8x3)
        whole = ImageData(part.shape[1], part.shape[0], PixelType.U8x3, part.tobytes())
        how = ResizeOptions(resize_alg=transforms.INTERPOLATIONS["bilinear"], use_alpha=False)
        resizer.resize(whole, small, how)
        return np.frombuffer(small.get_buffer(), np.uint8).reshape(*size, 3)

    def opencv(one, filter):
        cv2 = import_module("cv2")
        return cv2.resize(cut(one), width_height, interpolation=getattr(cv2, filter))

    return {
        "Pillow, crop and resize": lambda one: np.asarray(one.pillow.crop(one.box).resize(width_height, bilinear)),
        "Pillow, resize(box=)": lambda one: np.asarray(one.pillow.resize(width_height, bilinear, box=one.box)),
        "cykooz_resizer, across then down (ours)": lambda one: cut_and_resize(one.pixels, one.box, size),
        "cykooz_resizer, one call": in_one_call,
        "OpenCV, INTER_AREA": lambda one: opencv(one, "INTER_AREA"),
        "OpenCV, INTER_LINEAR": lambda one: opencv(one, "INTER_LINEAR"),
    }


def parts(source, size: tuple[int, int]) -> dict[str, Callable]:
    """The parts of `simmim_jax.data` that process a record. The first row is all of it."""
    rng = np.random.default_rng(0)

    def whole(one):
        picture = Picture(source[one.index]["image"], 3, MAX_PIXELS)
        image = transforms.random_resized_crop(picture, rng, size, SCALE, RATIO, "bilinear")
        return transforms.random_flip(image, rng, FLIP)

    return {
        "whole": whole,
        "record": lambda one: source[one.index],
        "header": lambda one: Picture(one.content, 3, MAX_PIXELS),
        "box": lambda one: transforms._random_box(rng, one.picture.width, one.picture.height, SCALE, RATIO),
        "decode": lambda one: transforms._read(one.picture, one.box, size, "bilinear"),
        "cut and resize": lambda one: cut_and_resize(*one.read, size),
        "flip": lambda one: transforms.random_flip(one.resized, rng, FLIP),
    }


def difference(own: Callable, reference: Callable, photographs: list[Photograph]) -> dict:
    """Max and mean difference, 0..255, and fraction of different values, over all values of all photographs."""
    greatest = total = differ = count = 0
    for one in photographs:
        pixels, wanted = np.asarray(own(one)), np.asarray(reference(one))
        if pixels.shape != wanted.shape:
            raise ValueError(f"has shape {list(pixels.shape)}, the reference {list(wanted.shape)}")
        apart = np.abs(pixels.astype(np.int16) - wanted)
        greatest, count = max(greatest, int(apart.max())), count + apart.size
        total, differ = total + int(apart.sum(dtype=np.int64)), differ + int((apart > 0).sum())
    return {"greatest": greatest, "mean": total / count, "share_that_differs": differ / count}


def measure(rows: dict[str, Callable], photographs: list[Photograph], rounds: int) -> list[dict]:
    """For each row, CPU milliseconds per photograph, and the ratio to the first row in the same round."""
    found = {name: [] for name in rows}
    for order in in_turns(list(rows), rounds + 1):
        for name in order:
            function, begun = rows[name], time.process_time()
            for one in photographs:
                function(one)
            found[name].append((time.process_time() - begun) / len(photographs) * 1000)
    found = {name: of_row[1:] for name, of_row in found.items()}
    first, summary = next(iter(found.values())), []
    for name, of_row in found.items():
        quotients = [own / other for own, other in zip(of_row, first, strict=True)]
        summary.append({
            "row": name, "milliseconds": spread(of_row), "times_first": spread(quotients), "rounds": of_row,
        })  # fmt: skip
    return summary


def spread(values: list[float]) -> list[float]:
    """[min, median, max]."""
    return [min(values), statistics.median(values), max(values)]


def compare(rows: dict[str, Callable], photographs: list[Photograph], rounds: int) -> tuple[list[dict], dict[str, str]]:
    """(rows of `measure` with the difference from the reference, missing rows with the reason)."""
    differences, missing = {}, {}
    for name, function in rows.items():
        try:
            differences[name] = difference(function, rows[COMPARED.get(name, next(iter(rows)))], photographs)
        except Exception as error:  # not installed, another version, or unsupported photographs
            missing[name] = " ".join(str(error).split())[:200] or type(error).__name__
    there = {name: function for name, function in rows.items() if name in differences}
    return [row | differences[row["row"]] for row in measure(there, photographs, rounds)], missing


def tables(report: dict) -> list[str]:
    """The results as Markdown tables; benchmarks/README.md explains the columns."""
    return [table(title, rows) for title, rows in report["tables"].items()]


def table(title: str, rows: list[dict]) -> str:
    compared = "greatest" in rows[0]
    lines = [[title, "ms", "x Pillow", "max", "mean", "differ"] if compared else [title, "ms", "of the whole"]]
    for row in rows:
        lines.append([row["row"], span(row["milliseconds"], 3), span(row["times_first"], 2)])
        if compared:
            lines[-1] += [str(row["greatest"]), f"{row['mean']:.3f}", f"{row['share_that_differs']:.2%}"]
    return markdown(lines)


def span(values: list[float], digits: int) -> str:
    low, median, high = (f"{value:.{digits}f}" for value in values)
    return f"{median} ({low}-{high})"


def versions() -> dict:
    there = {each.name.replace("-", "_"): each.version for each in importlib.metadata.distributions()}
    return {"python": platform.python_version()} | {name: there[name] for name in PACKAGES if name in there}


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--path", required=True, help="photographs: JPEGs in class folders")
    parser.add_argument("--shards-path", default="", help="shards of them from simmim_jax.tools.prepare")
    parser.add_argument(
        "--images", type=int, default=256, help="maximum number of photographs, which are held in memory"
    )
    parser.add_argument("--image", type=int, default=224, help="side of the crop in pixels")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds; one more is discarded")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    options = parser.parse_args(arguments)
    if not hasattr(os, "sched_setaffinity"):
        parser.exit(2, "no sched_setaffinity: run it on Linux\n")
    if min(options.rounds, options.images, options.image) < 1:
        parser.exit(2, "give --rounds, --images and --image of at least 1\n")
    for flag, path in (("path", options.path), ("shards-path", options.shards_path)):
        if (path or flag == "path") and not os.path.isdir(path):
            parser.exit(2, f"--{flag}={path} is not a folder\n")

    core = max(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})  # before libraries size their thread pools
    changed = run_text("git", "status", "--porcelain", "simmim_jax", "benchmarks/decode.py").splitlines()
    report = {"command": " ".join(["python benchmarks/decode.py", *arguments]), **describe(), "changed": changed}
    del report["gpu"]
    report |= {"versions": versions(), "core_used": core, "image": options.image, "images": {}, "tables": {}}
    report["missing"] = {} if options.shards_path else {"parts, from shards": "no --shards-path"}
    size, places = (options.image, options.image), [("photographs", "folder", options.path)]
    if options.shards_path:
        places.append(("shards", "array_record", options.shards_path))
    try:
        for of_what, kind, path in places:
            source = make_source(kind, path=path, split="train", heldout_fraction=0.0)
            photographs = prepare(source, options.images, size)
            report["images"][of_what] = len(photographs)
            if of_what == "photographs":
                for title, rows in {"decoder": decoders(), "filter": filters(size)}.items():
                    report["tables"][title], absent = compare(rows, photographs, options.rounds)
                    report["missing"] |= absent
            report["tables"][f"part, from {of_what}"] = measure(parts(source, size), photographs, options.rounds)
    except DataError as error:
        raise SystemExit(f"benchmarks/decode.py: {' '.join(str(error).split())}") from error
    report["load_average_end"] = os.getloadavg()
    print("\n\n".join(tables(report)))
    for name, why in report["missing"].items():
        print(f"\nnot measured: {name} ({why})")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
