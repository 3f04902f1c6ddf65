"""List files: lines, labels, roots, and errors with the line number."""

import os
import random

import pytest
from source_files import everything, labels, names, write_images

from simmim_jax.data import make_source
from simmim_jax.data.decode import BadImage
from simmim_jax.data.sources import list_file
from simmim_jax.errors import DataError


def listed(root, text: bytes | str, **options):
    (root / "list.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    return everything("list", root / "list.txt", **options)


def test_line_is_a_path_and_optionally_a_label(tmp_path):
    write_images(tmp_path, "a.png", "b c.JPG", "d.png e/f, g.tiff", "x é 猫.webp")
    lines = ["a.png\t3", "b c.JPG 0", "", "# a comment.png 5", "d.png e/f, g.tiff,1", "   ", "x é 猫.webp \t 2  "]
    source = listed(tmp_path, "\n".join(lines))
    assert names(source) == ["a.png", "b c.JPG", "d.png e/f, g.tiff", "x é 猫.webp"]
    assert labels(source) == [3, 0, 1, 2]
    assert source.classes == ("0", "1", "2", "3")
    before = names(source), source.fingerprint()
    other = listed(tmp_path, b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as Windows writes it
    assert (names(other), other.fingerprint()) == before
    name = os.fsdecode(b"caf\xe9.png")
    write_images(tmp_path, name)
    assert listed(tmp_path, b"caf\xe9.png 0\n")[0]["name"] == name


@pytest.mark.parametrize(
    ("text", "classes", "expected"),
    [
        ("a.png,tabby cat\nb.png , 7\nc.png\tdog\n", ("7", "dog", "tabby cat"), [2, 0, 1]),
        ("a.png 002.X\nb.png 001.Black_foot\nc.png 002.X", ("001.Black_foot", "002.X"), [1, 0, 1]),
        ("a.png\nb.png ,\nc.png \n", (), [-1, -1, -1]),
    ],
)
def test_labels_may_be_names_of_classes_or_missing(text, classes, expected, tmp_path):
    write_images(tmp_path, "a.png", "b.png", "c.png")
    source = listed(tmp_path, text)
    assert source.classes == classes
    assert labels(source) == expected


def test_classes_are_those_of_both_splits(tmp_path):
    write_images(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "train.txt").write_text("1.png cat\n2.png emu\n")
    (tmp_path / "val.txt").write_text("3.png dog\n")
    train, val = (make_source("list", path=str(tmp_path), split=split) for split in ("train", "val"))
    assert train.classes == val.classes == ("cat", "dog", "emu")
    assert [train[1]["label"], val[0]["label"]] == [2, 1]
    before = train.fingerprint()
    (tmp_path / "val.txt").write_text("3.png ant\n")  # renumbers the classes of the other split
    assert make_source("list", path=str(tmp_path)).fingerprint() != before
    (tmp_path / "val.txt").write_text("3.png 5")
    with pytest.raises(DataError, match="has numbers for labels"):
        make_source("list", path=str(tmp_path))


def test_paths_start_at_the_list_the_folder_of_its_split_or_data_dir(tmp_path):
    write_images(tmp_path, "train/n01/1.png", "val/2.png", "far/train/3.png")
    for split, name in (("train", "n01/1.png"), ("val", "2.png")):
        (tmp_path / f"{split}_map.txt").write_text(f"{name}\t0\n")
        assert make_source("list", path=str(tmp_path), split=split)[0]["image"]
    (tmp_path / "train_map.txt").write_text("3.png\t0\n")
    for part in ("{split}", "train"):
        assert make_source("list", path=str(tmp_path), data_dir=str(tmp_path / "far" / part))[0]["image"]
    (tmp_path / "train_map.txt").write_text(f"{tmp_path}/val/2.png\n")
    source = everything("list", tmp_path / "train_map.txt", data_dir="/nowhere")
    assert source[0]["name"] == f"{tmp_path}/val/2.png"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a.png 1\nnotes.txt 2\n", r"'notes\.txt 2' .*list\.txt, line 2"),
        ('a.png 1\n"b.png",2\n', r"line 2"),
        ("a.png,,1\n", r"line 1"),
        ("a.png 1\n\n# x\nb.png\n", r"line 4 has no label, and line 1 has one"),
        ("a.png\nb.png 1\n", r"line 1 has no label, and line 2 has one"),
        ("a.png,0,640\n", r"'0,640' .*line 1 "),
        ("a.png cat\na.png dog, small\n", r"'dog, small' .*line 2"),
        ("a.png 1\na.png 0 # good one\n", r"'0 # good one' .*line 2"),
        ("# x\na.png 0.0\na.png 1.0\na.png 10.0\n", r"'0\.0' .*line 2 "),
        ("a.png 1\na.png -1\n", r"label -1 - .*line 2"),
        ("a.png 1\na.png 99999999999999999999999999\n", r"label 9999.*line 2"),
        ("a.png\nb/../../x.png\n", r"'b/\.\./\.\./x\.png' .*line 2"),
        ("a.png\n..\n", r"line 2"),
        ("../a.png\n", r"line 1"),
        ("zzz.png 0\n", r"zzz\.png .*line 1.*data\.data_dir"),
        ("# x\n/zzz/z.png 0\n", r"/zzz/z\.png .*line 2"),
        ("# nothing\n\n", r"lists 0 images"),
        ("a.png\nb\0.png\n", r"zero bytes - .*line 2"),
        ("a.png\n" + 70_000 * "x", r"65536 bytes - .*at byte 6"),
        (b"\xff\xfea\0.\0", r"is UTF-16"),
        (random.Random(0).randbytes(2000).replace(b"\n", b""), r"."),
    ],
)
def test_invalid_list_is_reported_with_the_line(text, says, tmp_path):
    write_images(tmp_path, "a.png")
    with pytest.raises(DataError, match=says):
        listed(tmp_path, text)


def test_only_the_first_image_is_checked_and_a_pipe_does_not_hang(tmp_path):
    write_images(tmp_path, "a.png")
    os.mkfifo(tmp_path / "p.png")
    (tmp_path / "x").mkdir()
    source = listed(tmp_path, "a.png\nmissing.png\np.png\nx/../a.png\n")
    with pytest.raises(FileNotFoundError):
        source[1]
    with pytest.raises(BadImage):
        source[2]
    assert source[3]["image"] == source[0]["image"]


def test_lines_across_blocks_are_read_correctly(tmp_path, monkeypatch):
    write_images(tmp_path, "a.png")
    rng = random.Random(0)
    for block in (64, 1000, 2**22):
        monkeypatch.setattr(list_file, "BLOCK", block)
        lines, expected = [], []
        for i in range(300):
            lines += rng.choice([[], [], ["", "# x"], ["#" * 100]])
            expected.append(f"{i}{'x' * rng.randrange(30)}.png" if i else "a.png")
            lines.append(expected[-1] + " 1")
        for text in ("\n".join(lines), "\r\n".join([*lines, ""])):
            assert names(listed(tmp_path, text)) == expected


@pytest.mark.parametrize("is_open", [True, False])
def test_list_that_changes_during_a_run_is_refused(is_open, tmp_path):
    write_images(tmp_path, "a.png")
    source = listed(tmp_path, "a.png\na.png\n")
    if is_open:
        source[0]
    (tmp_path / "list.txt").write_text("a.png\n")
    with pytest.raises(DataError, match="has changed"):
        source[1]
