"""The format of prepared folders, which `tools.prepare` writes and `data.sources.array_record` reads.

A prepared folder holds ArrayRecord shards, and a manifest with the number of records of each shard, so that no shard
has to be opened at the start. The manifest is written last. Until then, the folder has a plan.
"""

import json
import os
import re

import msgpack
import numpy as np

from simmim_jax.data.decode import BadImage
from simmim_jax.data.rasters import SAMPLE_TYPES
from simmim_jax.errors import DataError

HEAD = {"format": "simmim_jax.prepared", "version": 1}  # of plans and manifests
MANIFEST, PLAN = "manifest.json", ".prepare.json"
SHARD = re.compile(r"part-\d{5,}-of-\d{5,}\.array_record")
PREPARE = "prepare the folder again: python -m simmim_jax.tools.prepare"


def pack_record(record: dict) -> bytes:
    """The bytes of {"image": file or raw pixels, "label": int, "name": str}, and "shape", "dtype" of raw pixels."""
    return msgpack.packb(record, unicode_errors="surrogateescape")


def unpack_record(raw: bytes, num_classes: int | None) -> dict:
    """The record of a source. Raises BadImage if it is damaged, or its label is not below `num_classes` (None: any)."""
    try:
        record = msgpack.unpackb(raw, raw=False, unicode_errors="surrogateescape")
        image, label, name = record["image"], record["label"], record["name"]
        shape, dtype = record.get("shape"), record.get("dtype", "uint8")
    except Exception as error:  # the bytes are untrusted
        raise BadImage("its record is damaged") from error
    valid = isinstance(image, bytes) and isinstance(name, str) and isinstance(label, int)
    if not valid or label < -1 or (num_classes is not None and label >= num_classes):
        raise BadImage("its record is damaged")
    if shape is not None:
        try:
            image = np.frombuffer(image, np.dtype(dtype) if dtype in SAMPLE_TYPES else None).reshape(shape)
        except (TypeError, ValueError) as error:
            raise BadImage(f"its record has {len(image)} bytes of pixels for the shape {shape!r}"[:200]) from error
    return {"image": image, "label": label, "name": name}


def read_manifest(folder: str) -> dict | None:
    """The manifest of a prepared folder; None if it has none, or one of another program.

    Raises DataError if the manifest is damaged or has another version.
    """
    path = os.path.join(folder, MANIFEST)
    try:
        with open(path, encoding="utf-8") as file:
            manifest = json.load(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read", reason, PREPARE) from error
    if not isinstance(manifest, dict) or manifest.get("format") != HEAD["format"]:
        return None
    if manifest.get("version") != HEAD["version"]:
        what = f"{path} has version {manifest.get('version')!r}, and this program reads version {HEAD['version']}"
        raise DataError(what, "data.path", "update simmim_jax, or prepare the folder again")
    if not _is_valid(manifest):
        raise DataError(f"{path} is damaged", "a field is missing or has a wrong type", PREPARE)
    return manifest


def _is_valid(manifest: dict) -> bool:
    try:
        valid = _is_count(manifest["count"]) and all(isinstance(name, str) for name in manifest["classes"])
        for shard in manifest["shards"]:
            name = shard["file"]
            valid &= isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")
            valid &= isinstance(shard["sha256"], str) and _is_count(shard["count"]) and _is_count(shard["bytes"])
    except (KeyError, TypeError):
        return False
    return valid


def _is_count(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
