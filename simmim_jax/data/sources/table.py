"""Tables of images, such as the CSV files of Kaggle and pandas, turned into the lines of a list.

A table has a heading, quotes, an index column, or another delimiter than a comma. A heading declares the columns of the
image and of the label, and the others are reported. Without a heading, there may be one label after the image.
"""

import contextlib
import csv
import itertools
import os
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from simmim_jax.data.decode import EXTENSIONS as PICTURE_EXTENSIONS
from simmim_jax.data.rasters import ARRAY_EXTENSIONS
from simmim_jax.data.sources.names import Column
from simmim_jax.data.sources.unread import Unread, report
from simmim_jax.errors import DataError

CHUNK = 2**14  # rows converted at a time
MAX_HEAD = 100  # lines before the first row
HEAD = 2**16  # characters read to detect a table
PATH_NAMES = (
    "path", "file_path", "filepath", "image_path", "img_path", "file_name", "filename", "file", "image_name",
    "img_name", "image", "img", "image_id", "img_id", "imageid", "id_code", "id", "name", "key",
)  # fmt: skip
LABEL_NAMES = (
    "label", "class", "class_name", "category", "target", "label_name", "labels", "classes", "class_id", "label_id",
    "category_id", "category_name", "classname", "diagnosis", "breed", "species", "level", "tags", "y",
)  # fmt: skip
EXTENSIONS = PICTURE_EXTENSIONS + ARRAY_EXTENSIONS
INDEX_NAMES = ("", "index", "unnamed:_0", "idx", "row")
WITH_IMAGE = re.compile(rf"(?:{'|'.join(map(re.escape, EXTENSIONS))})\s", re.IGNORECASE)


class MissingImage(DataError):
    """An image that is named without an ending does not exist."""


class Columns(NamedTuple):
    """How a table is read. heading: names of the columns, or (). label: -1 if there is none."""

    delimiter: str
    heading: tuple[str, ...]
    path: int
    label: int
    others: tuple[int, ...]  # columns that are not read, except an index


def is_image_name(text: str) -> bool:
    return text.strip().lower().endswith(EXTENSIONS)


def find_columns(path: str) -> Columns | None:
    """The columns of a table; None if a file is none. Raises DataError if the label may be in one of several."""
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        lines = file.read(HEAD).splitlines()
    lines = [line for line in lines if line.strip() and not line.startswith("#")][:100]
    if not lines or "\0" in lines[0]:
        return None
    splits = {each: next(csv.reader(lines[:1], delimiter=each, skipinitialspace=True)) for each in ",;\t|"}
    delimiter = max(splits, key=lambda each: (any(map(is_image_name, splits[each])), len(splits[each])))
    rows = list(csv.reader(lines, delimiter=delimiter, skipinitialspace=True))
    first = [field.strip() for field in rows[0]]
    if any(map(is_image_name, first)):
        images = [n for n, field in enumerate(first) if is_image_name(field)]
        others = [n for n in range(len(first)) if n not in images]
        index = [n for n in others if n < images[0] and first[n].isdigit()]
        if len(images) > 1 or (not index and '"' not in lines[0] and delimiter in ",\t"):
            return None  # a list, or a name with commas
        others = [n for n in others if n not in index]
        return Columns(delimiter, (), images[0], _only(others, path, lines[0]), ())
    if any(WITH_IMAGE.search(field) for field in first):
        return None
    heading = [re.sub(r"\s+", "_", field.casefold()) for field in first]
    rows = rows[1:]
    whole = rows[:-1] or rows  # the last one may be cut
    holds = [n for n in range(len(first)) if rows and all(n < len(row) and is_image_name(row[n]) for row in whole)]
    named = [n for name in PATH_NAMES for n, each in enumerate(heading) if each == name]
    image = next((n for n in named if n in holds), next(iter(holds or named), -1))
    if image < 0 or not rows or len(heading) != len(rows[0]):
        return None
    others = [n for n in range(len(first)) if n != image]
    index = [n for n in others if heading[n] in INDEX_NAMES]
    others = [n for n in others if n not in index]
    labels = [n for n in others if heading[n] in LABEL_NAMES]
    label = min(labels, key=lambda n: LABEL_NAMES.index(heading[n])) if labels else _only(others, path, lines[0])
    return Columns(delimiter, tuple(first), image, label, tuple(n for n in others if n != label))


def _only(columns: list[int], path: str, line: str) -> int:
    """The only one of several columns, or -1. Raises DataError if there are several."""
    if len(columns) > 1:
        what = f"{path} has several columns that may be the label: {line[:200]}"
        fix = "give an image one label: name the columns of the image and its class file_name and label, in a heading"
        raise DataError(what, "data.source=list", fix)
    return columns[0] if columns else -1


def read_table(path: str, columns: Columns, roots: tuple[str, ...]) -> Column:
    """The lines of a list, `path<tab>label`, as bytes. A row has the number of its (last) line in the table.

    roots: folders in which images are searched, to complete names without an ending.
    """
    text, unread = Column(np.uint8), Unread()
    for n in columns.others:
        unread.add("columns", os.path.join(path, columns.heading[n] or f"column {n + 1}"))
    report(os.path.dirname(path), unread, path)
    lines = _lines(path, columns, roots)
    while chunk := b"".join(itertools.islice(lines, CHUNK)):
        text.append(np.frombuffer(chunk, np.uint8))
    return text


def _lines(path: str, columns: Columns, roots: tuple[str, ...]) -> Iterator[bytes]:
    name = columns.heading[columns.label] if columns.heading and columns.label >= 0 else ""
    plural = name if re.search("(label|tag|attribute|class|categorie|target)e?s$", name.casefold()) else ""
    number, width, ending, begun = 0, len(columns.heading), "", False
    with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        rows = csv.reader(file, delimiter=columns.delimiter, skipinitialspace=True)
        try:
            for row in rows:
                where = f"{path}, line {rows.line_num}"
                yield b"\n" * (rows.line_num - number - 1)
                number = rows.line_num
                is_heading = bool(columns.heading) and tuple(field.strip() for field in row) == columns.heading
                is_comment = not begun and row and row[0].startswith("#")
                begun |= bool(row) and not is_comment
                if not any(map(str.strip, row)) or is_heading or is_comment:
                    yield b"\n"
                    continue
                width = width or len(row)
                if len(row) != width:
                    what = f"{len(row)} columns instead of {width}"
                    raise DataError(what, where, "put values that contain the delimiter into quotes")
                image = row[columns.path].strip()
                if not image or "\n" in image:
                    raise DataError(f"{image!r} is not the path of an image", where, "give a path in each row")
                if not is_image_name(image):
                    ending = ending or find_ending(image, roots)
                    if not ending:
                        what = f"{image} has no ending, and no image of this name exists"
                        fix = "set data.data_dir to the folder of the images"
                        raise MissingImage(what, f"{where}, looked in {', '.join(roots[:9])}", fix)
                    image += ending
                image = f"./{image}" if image.startswith("#") else image
                label = " ".join(row[columns.label].split()) if columns.label >= 0 else ""
                if plural and " " in label:
                    fix = "give an image one label; if it is one, name the column 'label'"
                    raise DataError(f"{label!r} in the column {plural!r} may be several labels", where, fix)
                yield f"{image}\t{label}\n".encode(errors="surrogateescape")
        except csv.Error as error:
            raise DataError(
                "the table cannot be read", f"{path}, line {rows.line_num}: {error}", "repair it"
            ) from error


def find_ending(image: str, roots: tuple[str, ...]) -> str:
    """The ending of an image that is named without one; "" if it is in none of these folders."""
    endings = (*EXTENSIONS, *map(str.upper, EXTENSIONS))
    return next((e for root in roots for e in endings if os.path.exists(os.path.join(root, image + e))), "")


def first_line(path: str, columns: Columns, roots: tuple[str, ...]) -> bytes:
    """The line of the first row; b"" if it names an image that does not exist, without an ending.

    Raises DataError for several labels.
    """
    lines = itertools.islice(_lines(path, columns, roots), MAX_HEAD)
    with contextlib.suppress(MissingImage):
        return next((line.strip() for line in lines if line.strip()), b"")
    return b""
