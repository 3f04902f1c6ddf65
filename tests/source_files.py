"""The same small data set in the form of each source. Images are one color each, their shade, and labels shade % 3."""

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python.array_record_module import ArrayRecordWriter
from PIL import Image

from simmim_jax.data import make_source
from simmim_jax.data.prepared import HEAD, pack_record

SHARDED = ["list", "tar", "parquet", "array_record"]
EXTENSIONS = {"list": "txt"} | {kind: kind for kind in SHARDED[1:]}


def png(shade: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def shade_of(record: dict) -> int:
    image = record["image"]
    return int((np.asarray(Image.open(io.BytesIO(image))) if isinstance(image, bytes) else image).flat[0])


def shades(source) -> list[int]:
    return [shade_of(source[i]) for i in range(len(source))]


def labels(source) -> list[int]:
    return [source[i]["label"] for i in range(len(source))]


def names(source) -> list[str]:
    return [source.name(i) for i in range(len(source))]


def everything(kind: str, path, **options):
    """The source of all records."""
    return make_source(kind, path=str(path), **{"heldout_fraction": 0.0} | options)


def write_images(root: Path, *files: str, shade=0) -> str:
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(shade))
    return str(root)


def write_tar(file: Path, members: dict[str, bytes] | list[tuple[str, bytes]], mtime=0, **options) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(file, "w", **options) as archive:
        for name, data in members.items() if isinstance(members, dict) else members:
            add_member(archive, name, data, mtime=mtime)
    return str(file)


def add_member(archive: tarfile.TarFile, name: str, data: bytes = b"", **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    archive.addfile(info, io.BytesIO(data))


def samples(*shades: int) -> dict[str, bytes]:
    """Members of a WebDataset shard."""
    members = {}
    for shade in shades:
        members |= {f"{shade:04}.cls": b"%d" % (shade % 3), f"{shade:04}.png": png(shade)}
    return members


def write_parquet(file: Path, shades, *, classes=("a", "b", "c"), labels=None, group=2) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    images = [{"bytes": png(shade), "path": f"{shade}.png"} for shade in shades]
    labels = [shade % 3 for shade in shades] if labels is None else labels
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    features = {"label": {"names": list(classes), "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, file, row_group_size=group)
    return str(file)


def write_records(file: Path, records: list[bytes], options="group_size:1,uncompressed") -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    writer = ArrayRecordWriter(str(file), options)
    for record in records:
        writer.write(record)
    writer.close()
    return str(file)


def write_prepared(root: Path, *shards, records=None, classes=("a", "b", "c")) -> str:
    """A prepared folder with one shard for each list of shades, or with the given bytes of records."""
    listed = []
    for number, shard in enumerate(shards):
        file = root / f"part-{number:05}-of-{len(shards):05}.array_record"
        content = [pack_record({"image": png(s), "label": s % 3, "name": f"x/{s}.png"}) for s in shard]
        write_records(file, records or content)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        listed.append({"file": file.name, "count": len(shard), "bytes": file.stat().st_size, "sha256": digest})
    manifest = HEAD | {"count": sum(map(len, shards)), "classes": list(classes), "shards": listed}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return str(root)


def write_source(kind: str, root: Path, shades) -> str:
    """Write images in the form of a kind. Returns data.path."""
    shades = list(shades)
    if kind == "folder":
        for shade in shades:
            write_images(root, f"{'abc'[shade % 3]}/{shade:04}.png", shade=shade)
    elif kind == "list":
        return write_split(kind, root, "all.txt", "", shades)
    elif kind == "array_record":
        write_prepared(root, shades[:3], shades[3:])
    else:
        for number, part in enumerate((shades[:3], shades[3:])):
            write_split(kind, root, "{split}.{extension}", str(number), part)
    return str(root)


def write_labeled(kind: str, root: Path, splits: dict[str, list[tuple[int, str]]]) -> dict:
    """Write the same images, (shade, label or "") by split, in the form of a kind. Returns arguments of make_source."""
    names = sorted({label for records in splits.values() for _, label in records if label})
    for split, records in splits.items():
        if kind == "folder":
            for shade, label in records:
                write_images(root, f"{split}/{label}/{shade}.png", shade=shade)
        elif kind == "list":
            for shade, _ in records:
                write_images(root / "images", f"{shade}.png", shade=shade)
            (root / f"{split}.txt").write_text("".join(f"images/{s}.png\t{label}\n" for s, label in records))
        elif kind == "tar":
            members = {f"{s}.png": png(s) for s, _ in records} | {f"{s}.cls": x.encode() for s, x in records if x}
            write_tar(root / f"{split}.tar", dict(sorted(members.items())))
        elif kind == "parquet":
            root.mkdir(parents=True, exist_ok=True)
            labels = pa.array([label or None for _, label in records], pa.string())
            table = pa.table({"image": [png(shade) for shade, _ in records], "label": labels})
            pq.write_table(table, root / f"{split}.parquet")
        elif kind == "array_record":
            stored = [
                pack_record({"image": png(s), "label": names.index(x) if x else -1, "name": f"{s}.png"})
                for s, x in records
            ]
            write_prepared(root / split, [s for s, _ in records], records=stored, classes=names)
    return {"source": kind, "path": str(root)}


def write_split(kind: str, root: Path, layout: str, split: str, shades) -> str:
    """Write one file of a split of lists or shards."""
    file = root / layout.format(split=split, extension=EXTENSIONS[kind])
    if kind == "list":
        for shade in shades:
            write_images(file.parent, f"{shade:04}.png", shade=shade)
        file.write_text("".join(f"{shade:04}.png {shade % 3}\n" for shade in shades))
    elif kind == "tar":
        write_tar(file, samples(*shades))
    elif kind == "parquet":
        write_parquet(file, shades)
    else:
        write_records(file, [png(shade) for shade in shades])
    return str(file)
