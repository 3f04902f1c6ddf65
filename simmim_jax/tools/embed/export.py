"""One export: the embeddings of a source of images, from a run to a finished file."""

import hashlib
import json
import math
from argparse import Namespace
from functools import partial

from simmim_jax import data
from simmim_jax.data.transforms import INTERPOLATIONS
from simmim_jax.errors import DataError, choose
from simmim_jax.files import lock_folder, utf8_name
from simmim_jax.objectives.features import check_readable
from simmim_jax.runs import checkpoint, finished, pretrained
from simmim_jax.runs.finished import Run
from simmim_jax.runtime import compilation, sharding
from simmim_jax.tools import images
from simmim_jax.tools.cli import add_context
from simmim_jax.tools.embed import embeddings, encoding, parts

MAX_NAMED = 100  # unreadable images that the metadata names


def export(options: Namespace) -> None:
    """Write OUT. Continue from the parts that an interrupted command left."""
    compilation.enable_cache()
    run = finished.load_run(options.run, options.image_size)
    if options.block is None:
        options.block = run.config.get("probe_block", 0)
    crop = images.make_crop(run, options.crop_fraction, options.interpolation)
    options.crop_fraction, options.interpolation = crop.crop_fraction, crop.interpolation
    choose("interpolation", options.interpolation, INTERPOLATIONS)
    check_readable(run.encoder, options.block, "patches" if options.pool == "map" else options.pool, "--block, --pool")
    default_split = "train" if options.data else run.config.get("data", {}).get("split", "train")
    source_options = images.source_options(run, options.data, heldout_fraction=0.0, as_divided=False)
    source_options |= {"split": options.split or default_split}
    with add_context():
        source = data.make_source(**source_options)
    images.refuse_label_maps(source)
    data.check_pixels(run.pixels, source)
    count = min(options.limit or len(source), len(source))
    made_from = origin(run, options, source)

    about = embeddings.read_about(options.out) if options.out.exists() else None
    if about and not options.overwrite:
        parts.refuse_difference(about.get("made_from", {}), made_from, str(options.out))
    folder = options.out.with_name(options.out.name + ".parts")
    folder.mkdir(parents=True, exist_ok=True)
    with lock_folder(folder):
        if about and not options.overwrite:
            parts.remove_parts(folder)
            (folder / "LOCK").unlink()
            if not any(folder.iterdir()):
                folder.rmdir()
            print(f"{options.out} is complete: {summary(about)}")
            return
        mesh, shape = sharding.make_mesh(), encoding.embedding_shape(run, options)
        options.batch_size = images.round_up(options.batch_size, mesh)
        part_size = parts.begin(folder, made_from, parts.part_size(shape, options.batch_size), options.overwrite)
        batches = partial(encoding.embed_batches, run, options, mesh=mesh)
        left_out = parts.write_parts(folder, source, count, part_size, batches, options)
        if len(left_out) == count:
            raise DataError("none of the images can be read", source.describe(), "see the warning for each image")
        about = metadata(run, options, source, made_from) | {
            "source": source_options,
            "shape": list(shape),
            "count": count - len(left_out),
            "left_out": len(left_out),
            "left_out_names": [utf8_name(each.name) for each in left_out[:MAX_NAMED]],
            "made_from": made_from,
        }
        parts.join(folder, -(-count // part_size), options.out, about)
    print(f"{options.out}: {summary(about)}")


def origin(run: Run, options: Namespace, source) -> dict:
    """Return everything that decides the numbers in OUT, as JSON."""
    weights = json.dumps(checkpoint.checksums(run.params["encoder"]), sort_keys=True)
    return {
        "weights": hashlib.sha256(weights.encode()).hexdigest(),
        "step": run.step,
        "encoder": json.loads(json.dumps(pretrained.architecture(run.config["encoder"]))),
        **run.pixels.as_record(),
        "image_size": list(run.image_size),
        "crop_fraction": options.crop_fraction,
        "interpolation": options.interpolation,
        "block": options.block,
        "pool": options.pool,
        "normalize": options.normalize,
        "dtype": options.dtype,
        "limit": options.limit,
        "data": source.fingerprint(),
    }


def metadata(run: Run, options: Namespace, source, made_from: dict) -> dict:
    """Return the metadata that does not depend on which images could be read, as JSON."""
    names = ("step", "dtype", "block", "pool", "image_size", "crop_fraction", "interpolation", "mean", "std", "pixels")
    height, width = run.image_size
    cover = [math.floor(side / options.crop_fraction) for side in run.image_size]
    unit = "clip((x - low) / (high - low), 0, 1)" if run.pixels.value_range else "pixel / 255"
    block = f"block {options.block}" if options.block else "the encoder's output"
    content = {
        "patches": f"mean of the patch tokens of {block}",
        "class_token": f"class token of {block}",
        "both": f"class token of {block}, then the mean of its patch tokens",
        "map": f"tokens of {block}, [rows, columns, width] from the top left, flat in Parquet",
    }
    return {
        "made_by": "simmim_jax.tools.embed",
        "run": options.run,
        **{name: made_from[name] for name in names if name in made_from},
        "encoder": run.config["encoder"]["name"],
        "objective": run.objective_name,
        "what": content[options.pool] + (", of Euclidean length 1" if options.normalize else ""),
        "images": (
            f"resized ({options.interpolation}) to cover {cover[0]} x {cover[1]} pixels, center-cropped to {height} x "
            f"{width}, ({unit} - mean) / std"
        ),
        "normalized": options.normalize,
        "data": source.describe(),
        "classes": [utf8_name(name) for name in source.classes],
    }


def summary(about: dict) -> str:
    """Describe the content of a file in one line."""
    size = " x ".join(map(str, about["shape"]))
    left_out = f"; {about['left_out']} unreadable images left out" if about["left_out"] else ""
    content = f"{about['count']:,} images, each {size} of {about['dtype']}: {about['what']}, step {about['step']}"
    return content + left_out
