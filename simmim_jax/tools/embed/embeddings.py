"""The file format of embeddings: one Parquet or NPZ file, joined from parts and read back. No JAX.

Shape letters: n images, d embedding width, k l token grid.
"""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
from jaxtyping import Float, Int, Shaped

from simmim_jax.errors import DataError
from simmim_jax.files import utf8_name

KEY = b"simmim_jax"  # of the JSON in the metadata of a Parquet file


class Rows(NamedTuple):
    """Some images and their embeddings. index: record in the source. labels: None if images have no labels."""

    index: Int[np.ndarray, " n"]
    names: list[str]
    labels: Int[np.ndarray, " n"] | None
    embeddings: Float[np.ndarray, "n ..."]


def make_table(rows: Rows, classes: tuple[str, ...]) -> pyarrow.Table:
    """Return an Arrow table with the columns of a file; embeddings are flat."""
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


def _join_parquet(paths: list[Path], out: Path, about: dict) -> None:
    schema = pyarrow.parquet.read_schema(paths[0]).with_metadata({KEY: json.dumps(about)})
    packed = [name for name in schema.names if name in ("name", "class_name")]
    with pyarrow.parquet.ParquetWriter(out, schema, compression="zstd", use_dictionary=packed) as writer:
        for path in paths:
            table = pyarrow.parquet.ParquetFile(path).read().replace_schema_metadata(schema.metadata)
            if len(table):
                writer.write_table(table, row_group_size=len(table))


def _join_npz(paths: list[Path], out: Path, about: dict) -> None:
    count, width, labeled = 0, 1, "label" in pyarrow.parquet.read_schema(paths[0]).names
    for path in paths:
        names = pyarrow.parquet.ParquetFile(path).read(["name"]).column("name").to_pylist()
        count, width = count + len(names), max(width, *map(len, names), 1)

    def column(name: str, dtype, shape: tuple[int, ...] = ()) -> Iterator[np.ndarray]:
        for path in paths:
            values = pyarrow.parquet.ParquetFile(path).read([name]).column(name).combine_chunks()
            values = values.flatten().to_numpy() if shape else np.array(values.to_pylist())
            yield values.astype(dtype).reshape(-1, *shape)

    # ZipInfo has a fixed date: the same arrays give the same bytes
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
    """Write one array of an NPZ file, from chunks along its first axis."""
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
        np.lib.format.write_array_header_2_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk, dtype).tobytes())


# by the ending of the file: (paths of parts, file to write, metadata)
JOINERS: dict[str, Callable[[list[Path], Path, dict], None]] = {".parquet": _join_parquet, ".npz": _join_npz}


class Listing(NamedTuple):
    """A file without its embeddings. labels: -1 for none. Classes without names are named by their numbers."""

    about: dict
    index: Int[np.ndarray, " n"]
    names: list[str]
    labels: Int[np.ndarray, " n"]


def read_about(path: Path) -> dict:
    """Return the metadata of a file of embeddings. Raises DataError if `path` is another kind of file."""
    try:
        if path.suffix == ".npz":
            with np.load(path) as arrays:
                about = json.loads(str(arrays["about"]))
        else:
            about = json.loads((pyarrow.parquet.read_schema(path).metadata or {})[KEY])
        if not {"made_by", "shape", "dtype", "classes", "count"} <= about.keys():
            raise KeyError("shape")
    except (KeyError, ValueError, AttributeError, pyarrow.ArrowException, zipfile.BadZipFile) as error:
        fix = "give a .parquet or .npz file of python -m simmim_jax.tools.embed"
        raise DataError("not a file of embeddings", str(path), fix) from error
    return about


def read_listing(path: Path) -> Listing:
    """Return everything in a file of embeddings except the embeddings."""
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
    """Yield the embeddings of a file in order: `rows` rows at a time of an NPZ file, a row group of a Parquet file."""
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
