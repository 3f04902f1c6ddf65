"""Maps and neighbor sheets of embeddings: points, pictures and neighbors belong to their image; names stay text."""

import base64
import html.parser
import io
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors
from tiny_trained import CLASSES, make_images

from simmim_jax.errors import ConfigError, DataError, UserError
from simmim_jax.evals.sheet import GAP, LINE
from simmim_jax.tools.embed import embeddings, parts
from simmim_jax.tools.map import __main__ as tool
from simmim_jax.tools.map import neighbors, page, pictures
from simmim_jax.tools.map.vectors import nearest_rows, project, to_unit

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028'\"@DATA@"


def write_embeddings(path, names, vectors, labels=None, classes=(), source=None, part=7):
    """Write a file as embed does."""
    folder = path.with_name(path.name + ".parts")
    folder.mkdir()
    for number, start in enumerate(range(0, len(names), part)):
        here = slice(start, start + part)
        index = np.arange(len(names))[here]
        rows = embeddings.Rows(index, names[here], None if labels is None else labels[here], vectors[here])
        parts.write_part(folder, number, rows, classes, [])
    about = {
        "made_by": "a test", "what": "numbers", "step": 7, "run": "a <run>", "shape": list(vectors.shape[1:]),
        "dtype": "float32", "classes": list(classes), "count": len(names), "left_out": 0, "source": source,
    }  # fmt: skip
    parts.join(folder, number + 1, path, about)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(file of embeddings of 30 images in three clusters, their folder, names, labels, vectors)."""
    tmp_path = tmp_path_factory.mktemp("map")
    folder = tmp_path / "images"
    names = make_images(folder, 30)
    labels = np.array([CLASSES.index(name.split("/")[0]) for name in names], np.int32)
    rng = np.random.default_rng(0)
    vectors = np.float32(10 * np.eye(8)[labels] + rng.standard_normal((30, 8)))
    source = {"source": "folder", "path": str(folder), "name": "", "data_dir": "", "heldout_fraction": 0.0,
              "split": "train"}  # fmt: skip
    write_embeddings(tmp_path / "x.parquet", names, vectors, labels, CLASSES, source)
    return tmp_path / "x.parquet", folder, names, labels, vectors


class Page(html.parser.HTMLParser):
    """The elements, texts and data of a page, parsed as a browser would."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.inside, self.texts = [], None, {}
        self.feed(path.read_text())

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.inside = (tag, dict(attributes).get("id"))

    def handle_data(self, text):
        self.texts[self.inside] = self.texts.get(self.inside, "") + text

    @property
    def data(self):
        return json.loads(self.texts["script", "data"])

    @property
    def sprite(self):
        (source,) = [each["src"] for tag, each in self.elements if tag == "img"]
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.removeprefix("data:image/jpeg;base64,")))))


def test_points_have_the_position_name_class_and_thumbnail_of_their_image(made, tmp_path):
    path, folder, names, labels, vectors = made
    tool.run([str(path), str(tmp_path / "x.html"), "--method=pca"])
    content = Page(tmp_path / "x.html")
    data = content.data
    assert data["name"] == names
    assert data["label"] == labels.tolist()
    assert data["classes"] == list(CLASSES)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    left, values, _ = np.linalg.svd(unit - unit.mean(axis=0), full_matrices=False)
    expected = left[:, :2] * values[:2]
    for n, axis in enumerate("xy"):
        ours = np.array(data[axis])
        assert abs(np.corrcoef(ours, expected[:, n])[0, 1]) == pytest.approx(1, abs=1e-5)
        assert np.abs(ours).max() <= 1
    assert np.ptp(data["x"]) / np.ptp(data["y"]) == pytest.approx(
        np.ptp(expected[:, 0]) / np.ptp(expected[:, 1]), rel=1e-3
    )
    side = data["tile"]
    for n, name in enumerate(names):
        row, column = divmod(n, data["columns"])
        tile = content.sprite[row * side : (row + 1) * side, column * side : (column + 1) * side].astype(int)
        shown = np.asarray(Image.open(folder / name)).repeat(side // 16, axis=0).repeat(side // 16, axis=1)
        others = np.asarray(Image.open(folder / names[n - 1])).repeat(side // 16, axis=0).repeat(side // 16, axis=1)
        assert np.abs(tile - shown).mean() < 0.6 * np.abs(tile - others).mean()  # JPEG blurs colors of random pixels
    for tag, attributes in content.elements:  # the page loads nothing
        assert tag not in ("link", "iframe", "object")
        assert not (tag == "script" and "src" in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert "default-src 'none'" in next(each["content"] for _, each in content.elements if "http-equiv" in each)
    assert "http" not in content.texts["script", None] + content.texts["style", None]


def test_names_that_are_html_stay_text(tmp_path):
    names, classes = [HOSTILE, *(f"{n}.png" for n in range(5))], (HOSTILE, "b")
    write_embeddings(tmp_path / "x.npz", names, np.eye(6, dtype=np.float32), np.zeros(6, np.int32), classes)
    tool.run([str(tmp_path / "x.npz"), str(tmp_path / "x.html"), "--method=pca", "--no-images", f"--title={HOSTILE}"])
    content = Page(tmp_path / "x.html")
    assert content.data["name"] == names
    assert content.data["classes"] == list(classes)
    assert [tag for tag, _ in content.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in content.elements]
    assert "onerror" not in str(content.elements)
    assert content.texts["title", None].rstrip() == HOSTILE
    assert "innerHTML" not in page.PAGE


@pytest.mark.skipif(not shutil.which("node"), reason="needs node to run the program of the page")
def test_the_program_of_the_page_finds_zooms_and_hides_points(made, tmp_path):
    tool.run([str(made[0]), str(tmp_path / "x.html"), "--method=pca", "--no-images"])
    texts = Page(tmp_path / "x.html").texts
    (tmp_path / "x.cjs").write_text(BROWSER % json.dumps(texts["script", "data"]) + texts["script", None] + USE)
    done = subprocess.run(["node", tmp_path / "x.cjs"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["found"] == list(range(30))  # at the position of each point
    assert report["stays"] < 1e-6  # zooming keeps the point under the pointer
    assert report["moved"] == [30, -10]
    assert report["shown"] == [20, 10, 30, 1]
    assert report["legend"] == [*CLASSES]


# the parts of a browser that the program uses
BROWSER = """
const made = {};
function element(tag) {
  const context = new Proxy({}, {get: (_, name) => () => 0, set: () => true});
  return {tag, style: {}, dataset: {}, children: [], attributes: {}, clientWidth: 800, clientHeight: 600,
    offsetWidth: 90, offsetHeight: 90, textContent: "", complete: true, value: "", checked: false,
    getContext: () => context, append(...parts) { this.children.push(...parts); },
    addEventListener(name, does) { this["on" + name] = does; }, setPointerCapture() {},
    setAttribute(name, value) { this.attributes[name] = value; }};
}
const document = {createElement: element, getElementById(id) { return made[id] ??= element(id); }};
const window = {devicePixelRatio: 1};
made.data = {textContent: %s};
made.tip = element("div");
made.tip.append(element("canvas"), element("b"), element("span"));
"""
USE = """
const all = D.name.map((_, n) => n), count = () => all.filter(isShown).length, report = {shown: []};
report.found = all.map(n => nearest(...place(n)));
const [x, y] = place(3);
map.onwheel({deltaY: -700, deltaMode: 0, offsetX: x, offsetY: y, preventDefault() {}});
const there = place(3);
report.stays = Math.hypot(there[0] - x, there[1] - y) + (zoom > 2 ? 0 : 1);
map.onpointerdown({offsetX: 10, offsetY: 20, pointerId: 1});
map.onpointermove({offsetX: 40, offsetY: 10});
map.onpointerup({});
report.moved = place(3).map((value, n) => Math.round(value - there[n]));
const legend = get("legend").children;
report.legend = legend.map(button => button.children[1].textContent);
legend[0].onclick();
report.shown.push(count());
legend[1].ondblclick();
report.shown.push(count());
get("all").onclick();
report.shown.push(count());
get("filter").oninput({target: {value: D.name[4].toUpperCase()}});
report.shown.push(count());
console.log(JSON.stringify(report));
"""


def test_limit_spaces_points_evenly_over_the_file(made, tmp_path):
    tool.run([str(made[0]), str(tmp_path / "x.html"), "--method=pca", "--limit=7", "--no-images"])
    data = Page(tmp_path / "x.html").data
    assert data["name"] == [made[2][n * 30 // 7] for n in range(7)]


@pytest.mark.slow
def test_tsne_keeps_clusters_apart_and_is_the_same_each_time(made):
    labels, vectors = made[3:]
    unit = to_unit(vectors)
    places = project("tsne", unit, 0)
    np.testing.assert_array_equal(places, project("tsne", unit, 0))
    centers = np.array([places[labels == n].mean(axis=0) for n in range(3)])
    assert (np.linalg.norm(places[:, None] - centers, axis=2).argmin(axis=1) == labels).all()
    assert np.abs(places).max() == 1


def test_embeddings_of_one_dimension_have_a_map():
    places = project("pca", np.array([[1.0], [-1.0], [1.0]], np.float32), 0)
    assert places[:, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embeddings_of_a_collapsed_encoder_are_refused(method):
    with pytest.raises(DataError, match=r"the same - x\.npz"):
        project(method, np.full((6, 4), 0.5, np.float32), 0, "x.npz")


def test_classes_without_names_are_numbers_and_names_that_are_not_utf8_are_escaped(tmp_path):
    path = tmp_path / "caf\udce9.npz"
    labels = np.array([0, 2, 2, 0, -1, 11], np.int32)
    names = [f"{n}\n.png" for n in range(6)]
    write_embeddings(tmp_path / "x.npz", names, np.eye(6, dtype=np.float32), labels)
    (tmp_path / "x.npz").rename(path)
    tool.run([str(path), str(tmp_path / "x.html"), "--method=pca", "--no-images", "--nearest=2",
              f"--neighbors={tmp_path / 'x.png'}"])  # fmt: skip
    content = Page(tmp_path / "x.html")
    assert (content.data["label"], content.data["classes"]) == (labels.tolist(), [str(n) for n in range(12)])
    assert content.texts["title", None].rstrip() == "caf\\xe9.npz"
    assert (tmp_path / "x.png").exists()


def test_neighbors_are_those_of_an_independent_search(made):
    path, _, _, _, vectors = made
    queries = np.array([17, 2, 29])
    rows, similarities = nearest_rows(path, queries, 6)
    search = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(vectors)
    distances, expected = search.kneighbors(vectors[queries])
    np.testing.assert_array_equal(rows, expected[:, 1:])  # the first is the query itself
    np.testing.assert_allclose(similarities, 1 - distances[:, 1:], atol=1e-6)


def test_queries_are_of_all_classes():
    labels = np.array([2] * 5 + [0] * 50 + [1] * 5)
    assert sorted(labels[neighbors.choose_queries(labels, 60)]) == sorted(labels)
    assert set(labels[neighbors.choose_queries(labels, 12)]) == {0, 1, 2}
    assert len(set(neighbors.choose_queries(labels, 12))) == 12


def test_the_sheet_shows_query_and_neighbors_framed_by_class(made, tmp_path, capsys):
    _, folder, names, labels, vectors = made
    labels = labels.copy()
    labels[5] = 2  # its neighbors are of another class
    source = {"source": "folder", "path": str(folder), "split": "train", "heldout_fraction": 0.0}
    write_embeddings(tmp_path / "y.parquet", names, vectors, labels, CLASSES, source)
    tool.run([str(tmp_path / "y.parquet"), f"--neighbors={tmp_path / 'x.png'}", "--queries=30", "--nearest=3"])
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    queries = neighbors.choose_queries(labels, 30)
    rows, _ = nearest_rows(tmp_path / "y.parquet", queries, 3)
    side, frame = neighbors.SIDE, 3
    width, height = side + 2 * frame + GAP, side + 2 * frame + 2 * LINE + GAP
    colors = set()
    for n, query in enumerate(queries):
        for column, row in enumerate((query, *rows[n])):
            x, y = GAP + column * width, LINE + GAP + n * height
            color = tuple(sheet[y, x].tolist())
            colors.add(color)
            same = bool(labels[row] == labels[query])
            assert color == (neighbors.FRAMES[same] if column else neighbors.QUERY_FRAME)
            tile = sheet[y + frame :, x + frame :][:side:6, :side:6]
            np.testing.assert_array_equal(tile, np.asarray(Image.open(folder / names[row])))
    assert len(colors) == 3
    assert f"{(labels[rows] == labels[queries][:, None]).mean():.0%} of the same class" in capsys.readouterr().out


def test_pictures_of_other_images_are_not_shown(made, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(made[1], folder)
    listing = embeddings.read_listing(made[0])
    listing.about["source"]["path"] = str(folder)
    assert pictures.open_pictures(listing, "")(3, 8).size == (8, 8)
    make_images(tmp_path / "other", 30, classes=("a", "b"))
    assert pictures.open_pictures(listing, str(tmp_path / "other"))(3, 8) is None
    assert "is not" in capsys.readouterr().err
    moved = folder.rename(tmp_path / "moved")
    assert pictures.open_pictures(listing, "")(3, 8) is None
    assert "give --images=DATA" in capsys.readouterr().err
    assert pictures.open_pictures(listing, str(moved))(3, 8).size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["x.parquet"], ConfigError, "nothing to write"),
        (["x.csv", "x.html"], ConfigError, "x.csv"),
        (["caf\udce9.parquet", "x.html"], ConfigError, r"caf\\xe9.parquet"),
        (["x.parquet", "x.png"], ConfigError, "x.png"),
        (["x.parquet", "--neighbors=x.html"], ConfigError, "x.html"),
        (["x.parquet", "x.html", "--method=tsen"], ConfigError, "did you mean tsne"),
        (["x.parquet", "x.html", "--limit=20001"], ConfigError, "at most 20000"),
        (["x.parquet", "x.html", "--images=a", "--no-images"], ConfigError, "--no-images"),
        (["gone.parquet", "x.html"], DataError, r"no such file.*tools\.embed"),
        (["gone.npz", "x.html"], DataError, r"no such file.*tools\.embed"),
        (["text.npz", "x.html"], DataError, "not a file of embeddings"),
        (["text.parquet", "x.html"], DataError, "not a file of embeddings"),
        (["others.npz", "x.html"], DataError, "not a file of embeddings"),
        (["maps.npz", "x.html"], DataError, "maps of shape"),
        (["x.parquet", "x.html", "--images=gone"], DataError, "gone does not exist"),
        (["x.parquet", "text.npz/x.html", "--method=pca"], ConfigError, "cannot write"),
        (["x.parquet", "mine.html"], ConfigError, "exists"),
        (["x.parquet", "mine.html", "--overwrite"], ConfigError, "exists"),
        (["x.parquet", "x.html", "--limit=4"], ConfigError, "tsne of 4 images"),
        (["x.parquet", "x.html", "--limit=1", "--method=pca"], ConfigError, "1 image"),
    ],
)
def test_a_mistake_is_one_line(made, tmp_path, monkeypatch, arguments, kind, message):
    for name in ("text.npz", "text.parquet", "mine.html"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "others.npz", embedding=np.eye(3))
    write_embeddings(tmp_path / "maps.npz", ["a", "b"], np.zeros((2, 2, 2, 4), np.float32))
    (tmp_path / "x.parquet").symlink_to(made[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        tool.run(arguments)
    assert type(error.value) is kind
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("x.html"))
    assert (tmp_path / "mine.html").read_text() == "text"


def test_overwrite_replaces_our_own_files(made, tmp_path):
    outs = [str(tmp_path / "x.html"), f"--neighbors={tmp_path / 'x.png'}"]
    tool.run([str(made[0]), *outs, "--method=pca", "--no-images", "--limit=9"])
    with pytest.raises(ConfigError, match="--overwrite"):
        tool.run([str(made[0]), *outs])
    tool.run([str(made[0]), *outs, "--method=pca", "--no-images", "--limit=5", "--overwrite"])
    assert len(Page(tmp_path / "x.html").data["name"]) == 5


def test_umap_that_is_not_installed_is_reported_first(monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install umap-learn"):
        tool.run(["gone.parquet", "x.html", "--method=umap"])
