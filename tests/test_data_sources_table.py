"""Tables as Kaggle and pandas write them: headings, quotes, delimiters, index columns, names without an ending."""

import pytest
from source_files import everything, labels, names, write_images

from simmim_jax.data import make_source, share_images
from simmim_jax.data.sources.list_file import is_list
from simmim_jax.errors import DataError, warn_once

LABELS = ["cat", "dog", "cat"]


def table(root, text: str, name="list.csv", **options):
    (root / name).write_text(text, encoding="utf-8")
    return everything("auto", root / name, **options)


@pytest.mark.parametrize(
    "text",
    [
        "file_name,label\n{0},cat\n{1},dog\n{2},cat\n",
        "file_name;label\n{0};cat\n{1};dog\n{2};cat\n",
        "{0};cat\n{1};dog\n{2};cat\n",
        "filepath\tclass\n{0}\tcat\n{1}\tdog\n{2}\tcat",
        '"id","breed"\r\n"{0}","cat"\r\n"{1}","dog"\r\n"{2}","cat"\r\n',
        '"{0}","cat"\n"{1}","dog"\n"{2}","cat"\n',
        ",image,target\n0,{0},cat\n1,{1},dog\n2,{2},cat\n",
        "0,{0},cat\n1,{1},dog\n2,{2},cat\n",
        "Unnamed: 0|Image Index|Finding Labels\n0|{0}|cat\n1|{1}|dog\n2|{2}|cat\n",
        "label,path\ncat,{0}\ndog,{1}\ncat,{2}\n",
        "\ufeffImage , Id\n{0}, cat\n{1}, dog\n{2}, cat\n\n",
        "# made by a tool\nfile_name,width,height,label\n{0},4,4,cat\n{1},4,4,dog\n{2},4,4,cat\n",
        'file_name,caption,label\n{0},"a cat, sitting\non a mat",cat\n{1},"a dog",dog\n{2},"",cat\n',
    ],
)
@pytest.mark.parametrize("paths", [("a.png", "x y.png", "#c.png"), ("d/a,b.png", "d/é.PNG", "z.jpg.png")])
def test_table_is_read_like_a_list(text, paths, tmp_path):
    write_images(tmp_path, *paths)
    if (
        "," in paths[0]
        and '"{0}"' not in text
        and text.count(",") > text.count(";") + text.count("\t") + text.count("|")
    ):
        text = text.replace("{0}", '"{0}"')
    if not text.startswith('"{0}"') and text.startswith("{0},"):
        pytest.skip("a plain list")
    source = table(tmp_path, text.format(*paths))
    assert [name.removeprefix("./") for name in names(source)] == list(paths)
    assert source.classes == ("cat", "dog")
    assert labels(source) == [0, 1, 0]
    assert all(source[i]["image"] for i in range(3))


@pytest.mark.parametrize("folder", ["", "train", "train_images", "pictures"])
def test_names_without_an_ending_are_completed(folder, tmp_path):
    write_images(tmp_path / folder, "000c1434d8d7.png", "0001.v2.png", "12.png")
    (tmp_path / "test_images").mkdir()
    source = table(tmp_path, "id_code,diagnosis\n000c1434d8d7,2\n0001.v2,0\n12,10\n", name="train.csv")
    assert names(source) == ["000c1434d8d7.png", "0001.v2.png", "12.png"]
    assert (labels(source), len(source.classes)) == ([2, 0, 10], 11)
    assert source[2]["image"]


def test_labeled_train_and_unlabeled_test_of_kaggle(tmp_path, caplog):
    """The labels are in train.csv. test.csv has none, and sample_submission.csv invented ones."""
    write_images(tmp_path, *(f"train/{n}.png" for n in range(20)), *(f"test/{n}.png" for n in range(50, 55)))
    rows = "".join(f"{n},{LABELS[n % 3]}\n" for n in range(20))
    (tmp_path / "train.csv").write_text("id,label\n" + rows)
    (tmp_path / "sample_submission.csv").write_text("id,label\n" + "".join(f"{n},cat\n" for n in range(50, 55)))
    folder = make_source("auto", path=str(tmp_path))
    assert (len(folder), folder.classes) == (20, ())
    assert f"set data.path={tmp_path}/train.csv" in caplog.text
    assert f"{tmp_path}/train.csv" in folder.unlabeled
    train, held_out = (make_source("auto", path=f"{tmp_path}/train.csv", split=split) for split in ("train", "val"))
    assert (len(train), len(held_out), train.classes) == (18, 2, ("cat", "dog"))
    assert not share_images(train, held_out)
    (tmp_path / "test.csv").write_text("id\n" + "".join(f"{n}\n" for n in range(50, 55)))
    warn_once.cache_clear()
    train, test = (make_source("list", path=f"{tmp_path}/{{split}}.csv", split=split) for split in ("train", "test"))
    assert (train.classes, test.classes) == (("cat", "dog"), ())
    assert "without labels" in caplog.text
    assert test[0]["image"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("image_id,healthy,rust,scab\na.png,1,0,0\n", "several columns that may be the label"),
        ("0,a.png,cat,7\n", "several columns that may be the label"),
        ('"a.png",0,7\n', "several columns that may be the label"),
        ("image,label\na.png,0\nb.png,0 1\n", r"'0 1' .*line 3 - .*one class"),
        ("image,tag\na.png,cat\nb.png,dog\n#c.png,cat dog\n", r"'cat dog' .*line 4 - .*one class"),
        ("image,labels\na.png,cat\nb.png,dog\n#c.png,cat|dog\n", r"'cat\|dog' .*line 4"),
        ("image,label\na.png,cat|dog\nb.png,emu\n", r"'cat\|dog' .*line 2"),
        ("image,tags\na.png,haze primary\nb.png,cloudy\n", r"'haze primary' .*'tags' .*line 2"),
        ("image,label\na.png,0.0\nb.png,1.0\n", r"'0\.0' .*line 2 - give integers"),
        ("image,label\na.png,cat\nb.png,\n", r"line 3 has no label, and line 2 has one"),
        ("image,label\na.png,cat\nb.png,dog,7\n", r"3 columns instead of 2 - .*line 3"),
        ('image,caption,label\na.png,"two\nlines",cat\n,x,dog\n', r"line 4 - give a path"),
        ("id,label\nzzz,1\n", r"zzz has no ending.*line 2.*data\.data_dir"),
        ("image,label\na.png,cat\nb.png,cat\na.png,dog\n", r"a\.png has the labels cat and dog - .*lines 2 and 4"),
        ("image,label\n../a.png,1\n", r"leaves the folder.*line 2"),
        ("path,label\n", r"'path,label' is not the path.*line 1"),
    ],
)
def test_invalid_table_is_reported_with_its_line(text, says, tmp_path):
    write_images(tmp_path, "a.png", "b.png", "#c.png")
    with pytest.raises(DataError, match=says):
        table(tmp_path, text)


@pytest.mark.parametrize("line", ["a.png 0 1", "a.png cat 640", "a.png\t0\t1", "a.png,0,1", "a.png 0 1.5 2"])
def test_second_label_or_column_of_a_list_is_refused(line, tmp_path):
    write_images(tmp_path, "a.png", "b.png")
    with pytest.raises(DataError, match=r"is not the label of an image - .*line 2"):
        table(tmp_path, f"b.png 0\n{line}\n", "list.txt")


def test_columns_that_are_not_read_are_named(tmp_path, caplog):
    write_images(tmp_path, "a.png")
    table(tmp_path, "file_name,x,y2,label\na.png,4,4,cat\n")
    assert "2 columns (list.csv/x, list.csv/y2)" in caplog.text


def test_only_lists_of_images_are_taken_for_lists(tmp_path):
    write_images(tmp_path, "a.png", "train/7.png")
    for text, expected in {
        "a.png 0\n": True, "file_name,label\nb.png,0\n": True, "id,label\n7,cat\n": True, "id,label\n0,cat\n": False,
        "cat\ndog\n": False, "a.png\tn01\t0\t32\n": False,
        "some words. a.png\n": True, "": False, "id,name\n": False, "0,cat\n1,dog\n": False,
    }.items():  # fmt: skip
        (tmp_path / "x.csv").write_text(text)
        assert is_list(str(tmp_path / "x.csv")) == expected, text
