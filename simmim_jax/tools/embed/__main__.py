"""python -m simmim_jax.tools.embed RUN DATA OUT [options]

What a trained encoder makes of each image of DATA, in one Parquet or NPZ file.

A row for each image, in the order of the source (file names are sorted): `index` of the record in the source, `name`
(of a file: relative to its folder), `label` where images have one, and, in Parquet, `class_name` where classes have
names, and `embedding`. In Parquet that is a list of fixed size, in NPZ an array [n, d], beside `classes`. Images that
cannot be read are left out and named: on stderr, and in the metadata. The metadata are JSON: in Parquet the file's key
"simmim_jax", in NPZ the array "about". They say of what run, step, block, pooling, image size and normalization the
numbers are, and in what shape they are.

With --pool=map an embedding is the map of tokens [k, l, d], row by row from the top left, flat in Parquet and
[n, k, l, d] in NPZ: what a multimodal model takes as its image features, k * l tokens of width d. Images are resized to
cover the image size / crop fraction, center-cropped to the image size, and normalized as (pixel / 255 - mean) / std,
all of which the metadata say. Tokens are those of a block as it leaves them; of block 0, those after the encoder's
final norm, where it has one. --normalize divides each embedding, of a map each token, by its Euclidean length. Numbers
are computed in float32 outside of the encoder, and float16 rounds them in the end.
"""

import argparse
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from simmim_jax.errors import (
    ConfigError,
    DataError,
    NonFiniteError,
    Parser,
    UserError,
    check_minimum,
    choose,
)
from simmim_jax.files import lock_folder, utf8_name
from simmim_jax.tools.cli import add_context, check_fraction, parse_known, parse_size, start

EXAMPLES = """\
examples:
  features of a folder of images, by class or not, by the encoder of a run:
    python -m simmim_jax.tools.embed runs/mine DIR mine.parquet
  those of block 8 of the images to test on, of length 1, as numpy arrays:
    python -m simmim_jax.tools.embed runs/mine DIR mine.npz --split=test --block=8 --normalize
  a map of tokens for each image, for a multimodal model:
    python -m simmim_jax.tools.embed runs/mine DIR maps.parquet --pool=map --dtype=float16
  of the images that the run was trained on:
    python -m simmim_jax.tools.embed runs/mine '' mine.parquet

Interrupted? The same command goes on, from what is in OUT.parts, and ends with the same bytes. With --overwrite too:
OUT stays as it is until all is there.
"""
POOLS = ("patches", "class_token", "both", "map")
PART_ROWS, PART_BYTES = 1024, 2**25  # of a part: about so many rows, and not more bytes
NAMED = 3  # images that an error names


def make_parser() -> Parser:
    """The command line."""
    parser = Parser(
        prog="python -m simmim_jax.tools.embed",
        description="Embed images with the encoder of a run, into a .parquet or .npz file.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("run", metavar="RUN", help="workdir of a run, or a step in it")
    add("data", metavar="DATA", help="a data.path, or digits, or tfds:NAME; '' for the images of the run")
    add("out", metavar="OUT", help="the file to write: .parquet or .npz")
    add("--block", type=int, metavar="N", help="1 to depth; 0: the encoder's output (default: the run's probe_block)")
    add("--pool", default="patches", help=f"{', '.join(POOLS)} (default: patches, their mean)")
    add("--image-size", metavar="H[,W]", help="in pixels (default: that of the run); positions are resized to it")
    add("--crop-fraction", type=float, metavar="R",
        help="of the resized side that is kept (default: the run's; imports: 0.875, up to 32 pixels 1)")  # fmt: skip
    add("--interpolation", default="", help="bilinear, bicubic, ... (default: the run's; imports: bicubic)")
    add("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    add("--threads", type=int, metavar="N", help="that decode a batch each (default: as many as cores, up to 16)")
    add("--split", default="", metavar="NAME",
        help="where DATA has parts: train, val, test, ... (default: train; of '', the run's)")  # fmt: skip
    add("--limit", type=int, default=0, metavar="N", help="so many images, evenly spread; 0: all")
    add("--normalize", action="store_true", help="to Euclidean length 1, as for cosine similarity")
    add("--dtype", default="float32", help="float32 or float16")
    add("--max-bad-fraction", type=float, default=0.01, metavar="R",
        help="of images that may be unreadable, rounded up (default: 0.01)")  # fmt: skip
    add("--overwrite", action="store_true", help="in place of an OUT that embed has written of something else")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The options. Raises ConfigError for what is not one, with the nearest."""
    options = parse_known(make_parser(), argv)
    for name in ("run", "out"):
        if not getattr(options, name):
            raise ConfigError(f"an empty {name.upper()}", "command line", "see --help")
    options.run, options.data, out = map(os.path.expanduser, (options.run, options.data, options.out))
    options.out = Path(out)
    if options.out.suffix not in (".parquet", ".npz"):
        raise ConfigError(f"OUT is {out}", "command line", "give a file that ends in .parquet or .npz")
    if utf8_name(out) != out:  # Arrow's limit
        raise ConfigError(f"OUT is {utf8_name(out)}", "command line", "give a path that is UTF-8")
    choose("pool", options.pool, set(POOLS))
    choose("dtype", options.dtype, {"float32", "float16"})
    options.image_size = parse_size(options.image_size)
    check_minimum("--batch-size", options.batch_size, 1)
    check_minimum("--threads", options.threads or 0, 0)
    check_minimum("--limit", options.limit, 0)
    if options.block is not None:
        check_minimum("--block", options.block, 0)
    if options.crop_fraction is not None:
        check_fraction("--crop-fraction", options.crop_fraction, of_crop=True)
    check_fraction("--max-bad-fraction", options.max_bad_fraction)
    return options


def run(argv: list[str]) -> None:
    """Embed, as the command line says."""
    options = parse(argv)
    try:
        embed(options)
    except BrokenPipeError:
        raise
    except OSError as error:
        what, where = f"cannot read or write: {error.strerror or error}", str(error.filename or options.out)
        raise DataError(what, where, "mend that and run the same command again: what is done stays") from error
    except MemoryError as error:
        raise DataError("not enough memory", str(options.out), "set --batch-size lower, and run again") from error


class View:
    """Records of a source: `count` of them evenly spread, from the one at `start` on."""

    def __init__(self, source, count: int, start: int):
        self.source, self.count, self.start, self.classes = source, count, start, source.classes

    def index(self, i: int) -> int:
        """Of a record in the source."""
        return (self.start + i) * len(self.source) // self.count

    def __len__(self) -> int:
        return self.count - self.start

    def __getitem__(self, i: int) -> dict:
        return self.source[self.index(i)]

    def name(self, i: int) -> str:
        return self.source.name(self.index(i))

    def describe(self) -> str:
        return self.source.describe()


def embed(options: argparse.Namespace) -> None:
    """Write OUT, from where an earlier command stopped."""
    from simmim_jax import data  # JAX comes in here: help and mistakes are told without it
    from simmim_jax.data.transforms import INTERPOLATIONS
    from simmim_jax.objectives.features import check_readable
    from simmim_jax.runs.finished import load_run
    from simmim_jax.runtime import compilation, sharding
    from simmim_jax.tools import images
    from simmim_jax.tools.embed import embeddings

    compilation.enable_cache()
    model = load_run(options.run, options.image_size)
    if options.block is None:
        options.block = model.config.get("probe_block", 0)
    vars(options).update(images.crop_options(model, options.crop_fraction, options.interpolation))
    choose("interpolation", options.interpolation, INTERPOLATIONS)
    pooling = "patches" if options.pool == "map" else options.pool
    check_readable(model.encoder, options.block, pooling, "--block and --pool")
    own = model.config.get("data", {})
    split = options.split or ("train" if options.data else own.get("split", "train"))
    where = images.source_options(model, options.data, heldout_fraction=0.0, as_divided=False) | {"split": split}
    with add_context():
        source = data.make_source(**where)
    images.refuse_label_maps(source)
    count = min(options.limit or len(source), len(source))
    made_from = origin(model, options, source)

    finished = options.out.exists() and embeddings.read_about(options.out)
    if finished and not options.overwrite:
        embeddings.refuse_difference(finished.get("made_from", {}), made_from, str(options.out))
    folder = options.out.with_name(options.out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        if options.overwrite:
            forget(folder, made_from)
        elif finished:
            remove(folder)
            print(f"{options.out} is finished: {summary(finished)}")
            return
        mesh, shape = sharding.make_mesh(), shape_of(model, options)
        ways = sharding.num_batch_shards(mesh)
        options.batch_size = -(-options.batch_size // ways) * ways
        rows_of_part = embeddings.begin(folder, made_from, part_rows(shape, options.batch_size))
        batches = partial(compute, model, options, mesh=mesh)
        left_out = write_parts(folder, source, count, rows_of_part, batches, options)
        parts = -(-count // rows_of_part)
        if len(left_out) == count:
            raise DataError("none of the images can be read", source.describe(), "look at what is said of each")
        about = description(model, options, source, where, shape, count, left_out) | {"made_from": made_from}
        embeddings.join(folder, parts, options.out, about)
    print(f"{options.out}: {summary(about)}")


def origin(model, options: argparse.Namespace, source) -> dict:
    """What decides the numbers in OUT, as JSON."""
    from simmim_jax.runs import checkpoint, pretrained

    weights = json.dumps(checkpoint.checksums(model.params["encoder"]), sort_keys=True)
    return {
        "weights": hashlib.sha256(weights.encode()).hexdigest(),
        "step": model.step,
        "encoder": json.loads(json.dumps(pretrained.architecture(model.config["encoder"]))),
        "mean": list(model.config["mean"]),
        "std": list(model.config["std"]),
        "image_size": list(model.image_size),
        "crop_fraction": options.crop_fraction,
        "interpolation": options.interpolation,
        "block": options.block,
        "pool": options.pool,
        "normalize": options.normalize,
        "dtype": options.dtype,
        "limit": options.limit,
        "data": source.fingerprint(),
    }


def part_rows(shape: tuple[int, ...], batch_size: int) -> int:
    """How many records a part has: whole batches, so that one that is gone on with has the batches of one unbroken."""
    rows = min(PART_ROWS, PART_BYTES // (4 * math.prod(shape)))
    return max(1, rows // batch_size) * batch_size


def compute(model, options: argparse.Namespace, view: View, mesh) -> Iterator[tuple]:
    """(batch_index in `view`, valid, label, embedding) of the records of each batch, arrays with b in front."""
    import jax

    from simmim_jax.evals.features import jit_on_mesh
    from simmim_jax.runtime import sharding
    from simmim_jax.tools import images

    run_batch = jit_on_mesh(make_embedding(model, options), mesh)
    params = jax.device_put(model.params["encoder"], sharding.replicated(mesh))
    batches = images.make_pass(
        model, view, mesh, batch_size=options.batch_size, crop_fraction=options.crop_fraction,
        interpolation=options.interpolation, threads=options.threads,
    )  # fmt: skip
    for batch in batches:
        out = run_batch(params, batch)
        here = slice(0, max(0, len(view) - int(out["batch_index"][0])))  # without what fills up the last batch
        yield tuple(out[name][here] for name in ("batch_index", "valid", "label", "embedding"))


def shape_of(model, options: argparse.Namespace) -> tuple[int, ...]:
    """The shape of one embedding: [d], or [k, l, d] of a map."""
    import jax
    import numpy as np

    image = jax.ShapeDtypeStruct((1, *model.image_size, model.channels), np.uint8)
    out = jax.eval_shape(make_embedding(model, options), model.params["encoder"], {"image": image})
    return out["embedding"].shape[1:]


def make_embedding(model, options: argparse.Namespace):
    """A function (encoder's params, batch) -> {"embedding": float32 [b, d], or [b, k, l, d] of maps}."""
    import jax.numpy as jnp

    from simmim_jax.objectives.features import make_features
    from simmim_jax.objectives.pixels import normalize

    if options.pool != "map":
        pooled = make_features(model.encoder, **model.normalization, block=options.block, pool=options.pool)

    def embedding(params, batch):
        if options.pool == "map":
            images = normalize(batch["image"], **model.normalization)
            x, seen = model.encoder.apply({"params": params}, images, mutable=["intermediates"])
            x = seen["intermediates"]["blocks"][options.block - 1] if options.block else x
        else:
            x, _ = pooled(params, batch["image"])
        x = x.astype(jnp.float32)
        if options.normalize:
            x /= jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
        return {"embedding": x}

    return embedding


def write_parts(
    folder: Path, source, count: int, rows_of_part: int, batches: Callable, options: argparse.Namespace
) -> list:
    """Write the parts that are missing; the images that are left out, of all of them.

    batches(view): as `compute` yields them.
    """
    from simmim_jax.tools import images
    from simmim_jax.tools.embed import embeddings
    from simmim_jax.tools.prepare.__main__ import Progress

    done = embeddings.parts_done(folder)
    left_out = [each for n in range(done) for each in embeddings.left_out_of(embeddings.part_path(folder, n))]
    allowed = math.ceil(options.max_bad_fraction * count)
    refuse_many(left_out, allowed, source)
    start = min(done * rows_of_part, count)
    if start == count:
        return left_out
    if start:
        print(f"going on from image {start:,} of {count:,}", file=sys.stderr)
    view, labeled = View(source, count, start), bool(source.classes) or images.has_labels(source)
    progress = Progress("embed", count, start, len(left_out))
    waiting = []  # batches that a part is not yet full of
    try:
        for batch in batches(view):
            waiting.append(batch)
            of_view = int(batch[0][-1]) + 1
            while done * rows_of_part < count and start + of_view >= min((done + 1) * rows_of_part, count):
                last = min((done + 1) * rows_of_part, count) - start  # of the view
                rows, faults, rest = cut(waiting, last, view, labeled, options)
                left_out += faults
                refuse_many(left_out, allowed, source)  # what may pass, as a disk that is gone, is in no part
                embeddings.write_part(folder, done, rows, source.classes, faults)
                progress.add(last + start - progress.done, len(faults))
                done, waiting = done + 1, [rest]
    finally:
        progress.bar.close()
    return left_out


def cut(batches: list[tuple], last: int, view: View, labeled: bool, options: argparse.Namespace) -> tuple:
    """(rows of the records before batch_index `last`, those of them that are left out, the rest as a batch)."""
    import numpy as np

    from simmim_jax.tools.embed.embeddings import LeftOut, Rows

    arrays = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
    keep = arrays[0] < last
    batch_index, valid, labels, embedding = (array[keep] for array in arrays)
    index = np.array([view.index(i) for i in batch_index.tolist()], np.int64)
    names = [view.name(i) for i in batch_index.tolist()]
    faults = [LeftOut(int(n), name) for n, name, good in zip(index, names, valid, strict=True) if not good]
    names = [name for name, good in zip(names, valid, strict=True) if good]
    numbers = in_dtype(embedding[valid], options.dtype, names)
    rows = Rows(index[valid], names, labels[valid] if labeled else None, numbers)
    return rows, faults, tuple(array[~keep] for array in arrays)


def in_dtype(numbers, dtype: str, names: list[str]):
    """Rounded to `dtype`. Raises NonFiniteError, naming an image, for what is not finite, or is not any more."""
    import numpy as np

    largest = np.abs(numbers).max(axis=tuple(range(1, numbers.ndim)), initial=0.0)  # of each image
    for name, value in zip(names, largest, strict=True):
        if not np.isfinite(value):
            raise NonFiniteError("embeddings are not finite", name, "look at the run: did it learn?")
        if dtype == "float16" and value >= 65520:
            raise NonFiniteError("numbers that float16 cannot hold", name, "give --normalize, or --dtype=float32")
    return numbers.astype(dtype)


def refuse_many(left_out: list, allowed: int, source) -> None:
    """Raise DataError if more images than `allowed` are left out."""
    if len(left_out) > allowed:
        named = ", ".join(repr(each.name) for each in left_out[-NAMED:])
        what = f"{len(left_out)} images cannot be read, of at most {allowed}, the last being {named}"
        raise DataError(what, source.describe(), "mend them, or raise --max-bad-fraction and run again to go on")


def description(
    model, options: argparse.Namespace, source, where: dict, shape: tuple[int, ...], count: int, left_out: list
) -> dict:
    """What OUT says of itself, as JSON."""
    from simmim_jax.tools.embed import embeddings

    height, width = model.image_size
    cover = [math.floor(side / options.crop_fraction) for side in model.image_size]
    block = f"block {options.block}" if options.block else "the encoder's output"
    pooled = {
        "patches": f"the mean of the patches of {block}",
        "class_token": f"the class token of {block}",
        "both": f"the class token of {block}, and then the mean of its patches",
        "map": f"the tokens of {block}, [rows, columns, width] from the top left, flat in Parquet",
    }
    return {
        "made_by": "simmim_jax.tools.embed",
        "run": options.run,
        "step": model.step,
        "encoder": model.config["encoder"]["name"],
        "objective": (model.config.get("objective") or {"name": "none"})["name"],
        "what": pooled[options.pool] + (", of Euclidean length 1" * options.normalize),
        "images": (
            f"resized ({options.interpolation}) to cover {cover[0]} x {cover[1]} pixels, center-cropped to {height} x "
            f"{width}, (pixel / 255 - mean) / std"
        ),
        "shape": list(shape),
        "dtype": options.dtype,
        "block": options.block,
        "pool": options.pool,
        "normalized": options.normalize,
        "image_size": list(model.image_size),
        "crop_fraction": options.crop_fraction,
        "interpolation": options.interpolation,
        "mean": list(model.config["mean"]),
        "std": list(model.config["std"]),
        "data": source.describe(),
        "source": where,
        "classes": [utf8_name(name) for name in source.classes],
        "count": count - len(left_out),
        "left_out": len(left_out),
        "left_out_names": [utf8_name(each.name) for each in left_out[: embeddings.MAX_NAMED]],
    }


def summary(about: dict) -> str:
    """A line of what a file holds."""
    size = " x ".join(map(str, about["shape"]))
    left = f"; left out, as they cannot be read: {about['left_out']}" if about["left_out"] else ""
    return f"{about['count']:,} images, each {size} of {about['dtype']}: {about['what']}, step {about['step']}{left}"


def forget(folder: Path, made_from: dict) -> None:
    """Remove the parts that an earlier command has written, unless it made them from the same."""
    from simmim_jax.tools.embed import embeddings

    manifest = folder / "manifest.json"
    if not manifest.exists():
        return
    try:
        embeddings.refuse_difference(json.loads(manifest.read_text())["made_from"], made_from, str(folder))
    except (UserError, ValueError, KeyError):
        for path in sorted(folder.iterdir(), key=lambda path: path == manifest):  # by which they are known to be parts
            if path.name != "LOCK":
                path.unlink()


def remove(folder: Path) -> None:
    """Remove a folder of parts that are joined; one with anything else in it stays."""
    for path in [*folder.glob("part-*"), *folder.glob("manifest.json*"), *folder.glob("whole*"), folder / "LOCK"]:
        path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


if __name__ == "__main__":
    start(run)
