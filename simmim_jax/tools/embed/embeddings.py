"""Files of embeddings: written in parts, joined to one Parquet or NPZ file, and read again. No JAX.

OUT.parts/ beside the file OUT holds what is done while it grows: `manifest.json` says of what it is made, and each
`part-N.parquet` has the rows of `part_rows` records. A part is there whole or not at all, and so is OUT.
Shape letters: n images, d the width of an embedding, k l the grid of a map.
"""

import itertools
import json
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, Shaped

from simmim_jax.errors import ConfigError, DataError
from simmim_jax.files import utf8_name, write_atomically

KEY = b"simmim_jax"  # of our JSON in a Parquet file's metadata
ENDINGS = (".parquet", ".npz")
MAX_NAMED = 100  # images left out that the file itself names
ANEW = "give the same, or another OUT, or --overwrite to begin anew"


class Rows(NamedTuple):
    """Some images and their embeddings. index: of the record in its source; labels: None where images have none."""

    index: Int[np.ndarray, " n"]
    names: list[str]
    labels: Int[np.ndarray, " n"] | None
    embeddings: Float[np.ndarray, "n ..."]


class LeftOut(NamedTuple):
    """An image that could not be read."""

    index: int
    name: str


# --- parts


def begin(folder: Path, made_from: dict, part_rows: int) -> int:
    """Make `folder` one of parts made from this, or check that it is: the records of each part, as it was begun.

    Raises ConfigError or DataError, naming the difference, if it was begun from something else.
    """
    path = folder / "manifest.json"
    if path.exists():
        manifest = json.loads(path.read_text())
        refuse_difference(manifest["made_from"], made_from, str(folder))
        return manifest["part_rows"]
    if any(child.name != "LOCK" and not child.name.endswith(".partial") for child in folder.iterdir()):
        raise ConfigError("a folder that embed has not begun", str(folder), "move it away, or give another OUT")
    text = json.dumps({"made_from": made_from, "part_rows": part_rows}, indent=2)
    write_atomically(path, lambda partial: partial.write_text(text + "\n"))
    return part_rows


def refuse_difference(before: dict, now: dict, where: str) -> None:
    """Raise ConfigError, or DataError for other images, if an earlier command made it of something else."""
    now = json.loads(json.dumps(now))
    changed = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
    if not changed:
        return
    told = [name for name in changed if name not in ("weights", "data", "encoder")]
    whole = {"weights": "other weights", "data": "other images", "encoder": "another encoder"}
    told = [f"{name} {json.dumps(before.get(name))} then, {json.dumps(now.get(name))} now" for name in told]
    what = ", ".join([whole[name] for name in changed if name in whole] + told)
    kind = DataError if changed == ["data"] else ConfigError
    raise kind(f"begun with something else: {what}", where, ANEW)


def part_path(folder: Path, number: int) -> Path:
    return folder / f"part-{number:06d}.parquet"


def parts_done(folder: Path) -> int:
    """How many parts are whole, from the first on; what is not, or comes after a gap, is removed."""
    import pyarrow
    import pyarrow.parquet

    for number in itertools.count():
        try:
            left_out_of(part_path(folder, number))
        except (OSError, pyarrow.ArrowException, ValueError, KeyError, TypeError):
            break
    for path in folder.glob("part-*"):
        if path.name.endswith(".partial") or path.name >= part_path(folder, number).name:
            path.unlink()
    return number


def write_part(folder: Path, number: int, rows: Rows, classes: tuple[str, ...], left_out: list[LeftOut]) -> None:
    """Write part `number`, whole or not at all."""
    import pyarrow.parquet

    table = table_of(rows, classes).replace_schema_metadata({KEY: json.dumps(left_out)})
    write_atomically(part_path(folder, number), lambda partial: pyarrow.parquet.write_table(table, partial))


def left_out_of(path: Path) -> list[LeftOut]:
    """The images that are missing in a part."""
    import pyarrow.parquet

    left_out = json.loads(pyarrow.parquet.read_schema(path).metadata[KEY])
    return [LeftOut(*each) for each in left_out]


def table_of(rows: Rows, classes: tuple[str, ...]):
    """An Arrow table: index, name, label where images have one, class_name where classes do, embedding, flat."""
    import pyarrow

    columns = {"index": pyarrow.array(rows.index, pyarrow.int64())}
    columns["name"] = pyarrow.array([utf8_name(name) for name in rows.names], pyarrow.string())
    if rows.labels is not None:
        columns["label"] = pyarrow.array(rows.labels, pyarrow.int32())
    if rows.labels is not None and classes:
        names = [classes[label] if 0 <= label < len(classes) else None for label in rows.labels.tolist()]
        columns["class_name"] = pyarrow.array([name and utf8_name(name) for name in names], pyarrow.string())
    flat = pyarrow.array(np.ascontiguousarray(rows.embeddings).reshape(-1))
    width = int(np.prod(rows.embeddings.shape[1:]))
    columns["embedding"] = pyarrow.FixedSizeListArray.from_arrays(flat, width)
    return pyarrow.table(columns)


# --- the whole


def join(folder: Path, parts: int, out: Path, about: dict) -> None:
    """Write OUT of all parts, and `about` into it; a part at a time is in memory."""
    paths = [part_path(folder, number) for number in range(parts)]
    write_atomically(folder / "whole", lambda partial: JOINERS[out.suffix](paths, partial, about))
    (folder / "whole").replace(out)
    shutil.rmtree(folder)


def _join_parquet(paths: list[Path], out: Path, about: dict) -> None:
    import pyarrow.parquet

    parquet = pyarrow.parquet
    schema = parquet.read_schema(paths[0]).with_metadata({KEY: json.dumps(about)})
    packed = [name for name in schema.names if name in ("name", "class_name")]
    with parquet.ParquetWriter(out, schema, compression="zstd", use_dictionary=packed) as writer:
        for path in paths:
            table = parquet.ParquetFile(path).read().replace_schema_metadata(schema.metadata)
            if len(table):
                writer.write_table(table, row_group_size=len(table))


def _join_npz(paths: list[Path], out: Path, about: dict) -> None:
    import pyarrow.parquet

    count, width, labeled = 0, 1, "label" in pyarrow.parquet.read_schema(paths[0]).names
    for path in paths:
        names = pyarrow.parquet.ParquetFile(path).read(["name"]).column("name").to_pylist()
        count, width = count + len(names), max(width, *map(len, names), 1)

    def column(name: str, dtype, shape: tuple[int, ...] = ()) -> Iterator[np.ndarray]:
        for path in paths:
            values = pyarrow.parquet.ParquetFile(path).read([name]).column(name).combine_chunks()
            values = values.flatten().to_numpy() if shape else np.array(values.to_pylist())
            yield values.astype(dtype).reshape(-1, *shape)

    # a fixed date in the zip: the same arrays are the same bytes
    with zipfile.ZipFile(out, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        shape = tuple(about["shape"])
        _write_array(archive, "embedding", about["dtype"], (count, *shape), column("embedding", about["dtype"], shape))
        _write_array(archive, "index", np.int64, (count,), column("index", np.int64))
        _write_array(archive, "name", f"<U{width}", (count,), column("name", f"<U{width}"))
        if labeled:
            _write_array(archive, "label", np.int32, (count,), column("label", np.int32))
        if about["classes"]:
            classes = np.array(about["classes"])
            _write_array(archive, "classes", classes.dtype, classes.shape, [classes])
        text = np.array(json.dumps(about))
        _write_array(archive, "about", text.dtype, (), [text])


def _write_array(archive: zipfile.ZipFile, name: str, dtype, shape: tuple[int, ...], chunks: Iterable) -> None:
    """One array of an NPZ file, from chunks along its first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


JOINERS = {".parquet": _join_parquet, ".npz": _join_npz}


# --- reading


class Listing(NamedTuple):
    """All of a file but its embeddings. labels: -1 where there is none; classes without names have numbers."""

    about: dict
    index: Int[np.ndarray, " n"]
    names: list[str]
    labels: Int[np.ndarray, " n"]


def read_about(path: Path) -> dict:
    """What a file of embeddings says of itself. Raises DataError if `path` is none."""
    import pyarrow
    import pyarrow.parquet

    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                about = json.loads(str(arrays["about"]))
        else:
            about = json.loads((pyarrow.parquet.read_schema(path).metadata or {})[KEY])
        if not {"made_by", "shape", "dtype", "classes", "count"} <= about.keys():
            raise KeyError("shape")
    except (KeyError, ValueError, AttributeError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        fix = "give a .parquet or .npz file that python -m simmim_jax.tools.embed has written"
        raise DataError("no file of embeddings", str(path), fix) from error
    return about


def read_listing(path: Path) -> Listing:
    """What a file of embeddings says of its images."""
    import pyarrow.parquet

    about = read_about(path)
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            index, names, labels = arrays["index"], arrays["name"].tolist(), arrays.get("label")
    else:
        opened = pyarrow.parquet.ParquetFile(path)
        wanted = [name for name in ("index", "name", "label") if name in opened.schema_arrow.names]
        columns = {name: opened.read([name]).column(name) for name in wanted}
        index, names = columns["index"].to_numpy(), columns["name"].to_pylist()
        labels = columns["label"].to_numpy() if "label" in columns else None
    if labels is None:
        labels = np.full(len(index), -1, np.int32)
    classes = about["classes"] or [str(n) for n in range(labels.max(initial=-1) + 1)]
    return Listing(about | {"classes": classes}, index, names, labels)


def read_embeddings(path: Path, rows: int = 4096) -> Iterator[Shaped[np.ndarray, "n ..."]]:
    """The embeddings of a file, in order, so many rows at a time (those of a group, of Parquet)."""
    import pyarrow.parquet

    about = read_about(path)
    shape = tuple(about["shape"])
    if path.suffix == ".npz":
        size = int(np.prod(shape)) * np.dtype(about["dtype"]).itemsize
        with zipfile.ZipFile(path) as archive, archive.open("embedding.npy") as file:
            np.lib.format.read_magic(file)
            np.lib.format.read_array_header_2_0(file)
            while content := file.read(rows * size):
                yield np.frombuffer(content, about["dtype"]).reshape(-1, *shape)
        return
    opened = pyarrow.parquet.ParquetFile(path)
    for number in range(opened.num_row_groups):
        column = opened.read_row_group(number, columns=["embedding"]).column("embedding").combine_chunks()
        yield column.flatten().to_numpy().reshape(-1, *shape)
