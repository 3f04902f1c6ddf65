"""What is next to the folders of splits, and files of labels that a folder of images may have."""

import os
import re

from simmim_jax.data.decode import EXTENSIONS
from simmim_jax.data.sources.list_file import LISTS, list_kind
from simmim_jax.data.sources.listing import folders, has_files, is_file, peek
from simmim_jax.data.sources.splits import EVALUATION, SIDES, STANDARD, class_like, side_of, split_or_class
from simmim_jax.data.sources.unread import Unread, report

LABEL_FILES = (*LISTS, "metadata.jsonl", "annotations.json")
MAX_LISTS = 50  # text files in a folder that may be lists of images
WORD = re.compile(rf"(?<![a-z0-9])({'|'.join(STANDARD)})(?![a-z0-9])", re.IGNORECASE)


def report_neighbors(path: str, found: dict[str, str]) -> None:
    """Report what is next to the folders of splits. Raises DataError if the only one may be a class like the others."""
    splits = [found[side] for side in STANDARD if side in found]
    if not splits:
        return
    others = [name for name in folders(path) if os.path.join(path, name) not in splits]
    others = [name for name in others if has_files(os.path.join(path, name), EXTENSIONS)]
    split = os.path.basename(splits[0])
    both = len(set(splits)) > 1 or any(side_of(name) not in ("", side_of(split)) for name in others)
    classes = [] if both else class_like(others, split)
    if classes and _is_like(splits[0], os.path.join(path, classes[0])):
        inside = os.path.join(path, "train")
        if_class = f"move all of them into {inside}, as {inside}/{classes[0]} and {inside}/{split}"
        if_split = f"set data.path={os.path.join(path, split)}"
        if side_of(split) != "train":
            if_split = "name the training images train/"
        raise split_or_class(path, f"{split}/", [f"{name}/" for name in classes], if_class, if_split)
    unread = Unread()
    for name in others:
        is_evaluation = side_of(name) == "evaluation" and not any(side in found for side in EVALUATION)
        fix = f"name {name}/ val/ to evaluate on it" if is_evaluation else ""
        unread.add("folders", os.path.join(path, name, ""), fix)
    for entry in peek(path):
        if entry.name.lower().endswith(EXTENSIONS) and is_file(entry):
            unread.add("images next to the folders of splits", entry.path)
        elif is_file(entry):
            unread.add_file(path, entry.name)
    add_lists(unread, path)
    report(path, unread)


def _is_like(split: str, other: str) -> bool:
    """Whether the folder of a split has images as a class has them: itself, or in folders of the same names."""
    is_flat = any(entry.name.lower().endswith(EXTENSIONS) for entry in peek(split))
    return is_flat or bool(set(folders(split)) & set(folders(other)))


def add_lists(unread: Unread, path: str) -> list[str]:
    """Add the files of labels in `path`, which the user may have meant. Returns the data.path that reads the lists."""
    names = sorted(entry.name for entry in peek(path) if entry.name.lower().endswith(LABEL_FILES) and is_file(entry))
    if len(names) > MAX_LISTS:  # captions, or other texts of single images
        return []
    kinds = {name: list_kind(os.path.join(path, name)) for name in names}
    kinds = {name: kind for name, (kind, image) in kinds.items() if not image or os.path.exists(image)}
    lists = [name for name, kind in kinds.items() if kind == "lists"]
    sides = {side: [name for name in lists if side in map(side_of, WORD.findall(name))] for side in SIDES}
    best = next(iter(sides["train"] or lists), "")
    template = os.path.join(path, WORD.sub("{split}", best, count=1) if all(sides.values()) else best)
    fixes = {"lists": f"to read them, set data.path={template}"}
    for name, kind in kinds.items():
        if kind:
            unread.add(
                kind, os.path.join(path, name), fixes.get(kind, "to use the labels, write `path,label` to a .csv")
            )
    return [template] if lists else []
