"""LabelMapSpec and sheets of embeddings: each point, picture and neighbor is that of its image, and names are only text."""

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
from simmim_jax.tools.embed import embeddings
from simmim_jax.tools.map import __main__ as tool
from simmim_jax.tools.map import map_page

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\u2028'\"@DATA@"


def write_embeddings(path, names, vectors, labels=None, classes=(), source=None, part=7):
    """A file as embed writes it."""
    folder = path.with_name(path.name + ".parts")
    folder.mkdir()
    for number, start in enumerate(range(0, len(names), part)):
        here = slice(start, start + part)
        index = np.arange(len(names))[here]
        rows = embeddings.Rows(index, names[here], None if labels is None else labels[here], vectors[here])
        embeddings.write_part(folder, number, rows, classes, [])
    about = {
        "made_by": "a test", "what": "numbers", "step": 7, "run": "a <run>", "shape": list(vectors.shape[1:]),
        "dtype": "float32", "classes": list(classes), "count": len(names), "left_out": 0, "source": source,
    }  # fmt: skip
    embeddings.join(folder, number + 1, path, about)


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
    """What a browser makes of a page: its elements, its text and the data in it."""

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


def test_each_point_is_where_its_method_puts_it_with_its_name_class_and_thumbnail(made, tmp_path):
    path, folder, names, labels, vectors = made
    tool.run([str(path), str(tmp_path / "x.html"), "--method=pca"])
    page = Page(tmp_path / "x.html")
    data = page.data
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
        tile = page.sprite[row * side : (row + 1) * side, column * side : (column + 1) * side].astype(int)
        shown = np.asarray(Image.open(folder / name)).repeat(side // 16, axis=0).repeat(side // 16, axis=1)
        others = np.asarray(Image.open(folder / names[n - 1])).repeat(side // 16, axis=0).repeat(side // 16, axis=1)
        assert np.abs(tile - shown).mean() < 0.6 * np.abs(tile - others).mean()  # JPEG blurs colors of random pixels


def test_a_page_asks_no_network_and_holds_nothing_but_its_own_elements(made, tmp_path):
    tool.run([str(made[0]), str(tmp_path / "x.html"), "--method=pca"])
    page = Page(tmp_path / "x.html")
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object")
        assert not (tag == "script" and "src" in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    policy = next(each["content"] for tag, each in page.elements if "http-equiv" in each)
    assert "default-src 'none'" in policy
    assert "http" not in page.texts["script", None] + page.texts["style", None]


def test_names_that_are_html_stay_text(tmp_path):
    names, classes = [HOSTILE, *(f"{n}.png" for n in range(5))], (HOSTILE, "b")
    write_embeddings(tmp_path / "x.npz", names, np.eye(6, dtype=np.float32), np.zeros(6, np.int32), classes)
    tool.run([str(tmp_path / "x.npz"), str(tmp_path / "x.html"), "--method=pca", "--no-images", f"--title={HOSTILE}"])
    page = Page(tmp_path / "x.html")
    assert page.data["name"] == names
    assert page.data["classes"] == list(classes)
    assert [tag for tag, _ in page.elements].count("script") == 2
    assert "img" not in [tag for tag, _ in page.elements]
    assert "onerror" not in str(page.elements)
    assert page.texts["title", None].rstrip() == HOSTILE
    assert "innerHTML" not in map_page.PAGE


@pytest.mark.skipif(not shutil.which("node"), reason="there is no node to run the page's program")
def test_the_program_of_the_page_finds_zooms_and_hides_points(made, tmp_path):
    tool.run([str(made[0]), str(tmp_path / "x.html"), "--method=pca"])
    page = Page(tmp_path / "x.html")
    page_program, data = page.texts["script", None], page.texts["script", "data"]
    (tmp_path / "x.cjs").write_text(BROWSER % json.dumps(data) + page_program + USE)
    done = subprocess.run(["node", tmp_path / "x.cjs"], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["found"] == list(range(30))  # under the place of each point lies that point
    assert said["stays"] < 1e-6  # what is under the pointer stays there when it zooms
    assert said["moved"] == [30, -10]
    assert said["shown"] == [20, 10, 30, 1]
    assert said["legend"] == [*CLASSES]


# as much of a browser as the page's program touches
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
const all = D.name.map((_, n) => n), count = () => all.filter(isShown).length, said = {shown: []};
said.found = all.map(n => nearest(...place(n)));
const [x, y] = place(3);
map.onwheel({deltaY: -700, deltaMode: 0, offsetX: x, offsetY: y, preventDefault() {}});
const there = place(3);
said.stays = Math.hypot(there[0] - x, there[1] - y) + (zoom > 2 ? 0 : 1);
map.onpointerdown({offsetX: 10, offsetY: 20, pointerId: 1});
map.onpointermove({offsetX: 40, offsetY: 10});
map.onpointerup({});
said.moved = place(3).map((value, n) => Math.round(value - there[n]));
const legend = get("legend").children;
said.legend = legend.map(button => button.children[1].textContent);
legend[0].onclick();
said.shown.push(count());
legend[1].ondblclick();
said.shown.push(count());
get("all").onclick();
said.shown.push(count());
get("filter").oninput({target: {value: D.name[4].toUpperCase()}});
said.shown.push(count());
console.log(JSON.stringify(said));
"""


def test_points_are_spread_over_the_file_where_there_are_more_than_the_limit(made, tmp_path):
    tool.run([str(made[0]), str(tmp_path / "x.html"), "--method=pca", "--limit=7", "--no-images"])
    data = Page(tmp_path / "x.html").data
    assert data["name"] == [made[2][n * 30 // 7] for n in range(7)]


@pytest.mark.slow
def test_tsne_keeps_clusters_apart_and_is_the_same_each_time(made):
    labels, vectors = made[3:]
    unit = tool.to_unit(vectors)
    places = tool.project("tsne", unit, 0)
    np.testing.assert_array_equal(places, tool.project("tsne", unit, 0))
    centers = np.array([places[labels == n].mean(axis=0) for n in range(3)])
    assert (np.linalg.norm(places[:, None] - centers, axis=2).argmin(axis=1) == labels).all()
    assert np.abs(places).max() == 1


def test_embeddings_of_one_dimension_have_a_map_too():
    places = tool.project("pca", np.array([[1.0], [-1.0], [1.0]], np.float32), 0)
    assert places[:, 1].tolist() == [0, 0, 0]


@pytest.mark.parametrize("method", ["pca", "tsne"])
def test_embeddings_of_a_collapsed_encoder_are_told_and_not_drawn(tmp_path, method):
    write_embeddings(tmp_path / "x.npz", [f"{n}.png" for n in range(6)], np.full((6, 4), 0.5, np.float32))
    with pytest.raises(DataError, match=r"all embeddings are the same - .*x\.npz - .* did it collapse\?"):
        tool.run([str(tmp_path / "x.npz"), str(tmp_path / "x.html"), f"--method={method}", "--no-images"])


def test_classes_without_names_have_their_numbers_and_a_name_of_other_bytes_is_escaped(tmp_path):
    path = tmp_path / "caf\udce9.npz"
    labels = np.array([0, 2, 2, 0, -1, 11], np.int32)
    names = [f"{n}\n.png" for n in range(6)]  # of which the sheet makes a line
    write_embeddings(tmp_path / "x.npz", names, np.eye(6, dtype=np.float32), labels)
    (tmp_path / "x.npz").rename(path)
    tool.run([str(path), str(tmp_path / "x.html"), "--method=pca", "--no-images", "--nearest=2",
              f"--neighbors={tmp_path / 'x.png'}"])  # fmt: skip
    page = Page(tmp_path / "x.html")
    assert (page.data["label"], page.data["classes"]) == (labels.tolist(), [str(n) for n in range(12)])
    assert page.texts["title", None].rstrip() == "caf\\xe9.npz"
    assert (tmp_path / "x.png").exists()


def test_neighbors_are_those_of_an_independent_search(made):
    path, _, _, _, vectors = made
    queries = np.array([17, 2, 29])
    rows, similarities = tool.nearest_rows(path, queries, 6)
    search = NearestNeighbors(n_neighbors=7, metric="cosine", algorithm="brute").fit(vectors)
    distances, expected = search.kneighbors(vectors[queries])
    np.testing.assert_array_equal(rows, expected[:, 1:])  # the first is the query itself
    np.testing.assert_allclose(similarities, 1 - distances[:, 1:], atol=1e-6)


def test_queries_are_of_all_classes():
    labels = np.array([2] * 5 + [0] * 50 + [1] * 5)
    assert sorted(labels[tool.choose_queries(labels, 60)]) == sorted(labels)
    assert set(labels[tool.choose_queries(labels, 12)]) == {0, 1, 2}
    assert len(set(tool.choose_queries(labels, 12))) == 12


def test_the_sheet_shows_query_and_neighbors_framed_by_class(made, tmp_path, capsys):
    _, folder, names, labels, vectors = made
    labels = labels.copy()
    labels[5] = 2  # an image that lies among those of another class
    source = {"source": "folder", "path": str(folder), "split": "train", "heldout_fraction": 0.0}
    write_embeddings(tmp_path / "y.parquet", names, vectors, labels, CLASSES, source)
    tool.run([str(tmp_path / "y.parquet"), f"--neighbors={tmp_path / 'x.png'}", "--queries=30", "--nearest=3"])
    sheet = np.asarray(Image.open(tmp_path / "x.png"))
    queries = tool.choose_queries(labels, 30)
    rows, _ = tool.nearest_rows(tmp_path / "y.parquet", queries, 3)
    side, frame = tool.SHEET_SIDE, 3
    width, height = side + 2 * frame + 8, side + 2 * frame + 2 * 13 + 8
    seen = set()
    for n, query in enumerate(queries):
        for place, row in enumerate((query, *rows[n])):
            x, y = 8 + place * width + (8 if place else 0), 26 + n * height
            color = tuple(sheet[y, x].tolist())
            seen.add(color)
            assert color == ((0, 0, 0) if not place else tool.FRAMES[bool(labels[row] == labels[query])])
            tile = sheet[y + frame :, x + frame :][:side:6, :side:6]
            np.testing.assert_array_equal(tile, np.asarray(Image.open(folder / names[row])))
    assert len(seen) == 3
    same = (labels[rows] == labels[queries][:, None]).mean()
    assert f"{same:.0%} of their class" in capsys.readouterr().out


def test_pictures_of_other_images_are_not_shown(made, tmp_path, capsys):
    folder = tmp_path / "images"
    shutil.copytree(made[1], folder)
    listing = embeddings.read_listing(made[0])
    listing.about["source"]["path"] = str(folder)
    assert tool.open_pictures(listing, "")(3, 8).size == (8, 8)
    make_images(tmp_path / "other", 30, classes=("a", "b"))
    assert tool.open_pictures(listing, str(tmp_path / "other"))(3, 8) is None
    assert "other images, which are not shown" in capsys.readouterr().err
    moved = folder.rename(tmp_path / "moved")
    assert tool.open_pictures(listing, "")(3, 8) is None
    assert "give --images=DATA" in capsys.readouterr().err
    assert tool.open_pictures(listing, str(moved))(3, 8).size == (8, 8)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        (["x.parquet"], ConfigError, "give OUT.html, or --neighbors=OUT.png"),
        (["x.csv", "x.html"], ConfigError, "give a .parquet or .npz file"),
        (["caf\udce9.parquet", "x.html"], ConfigError, r"EMBEDDINGS is caf\\xe9.parquet .* a path that is UTF-8"),
        (["x.parquet", "x.png"], ConfigError, "ends in .html"),
        (["x.parquet", "--neighbors=x.html"], ConfigError, "ends in .png"),
        (["x.parquet", "x.html", "--method=tsen"], ConfigError, "did you mean tsne"),
        (["x.parquet", "x.html", "--limt=9"], ConfigError, "did you mean --limit"),
        (["x.parquet", "x.html", "--limit=20001"], ConfigError, "at most 20000"),
        (["x.parquet", "x.html", "--queries=0"], ConfigError, "at least 1"),
        (["x.parquet", "x.html", "--seed=4294967296"], ConfigError, "0 to 2"),
        (["x.parquet", "x.html", "--images=a", "--no-images"], ConfigError, "give one of them"),
        (["gone.parquet", "x.html"], DataError, "No such file"),
        (["gone.npz", "x.html"], DataError, "No such file"),
        (["text.npz", "x.html"], DataError, "no file of embeddings"),
        (["text.parquet", "x.html"], DataError, "no file of embeddings"),
        (["others.npz", "x.html"], DataError, "no file of embeddings"),
        (["maps.npz", "x.html"], DataError, "maps of shape .* one vector for each image"),
        (["x.parquet", "x.html", "--images=gone"], DataError, "gone does not exist"),
        (["x.parquet", "text.npz/x.html", "--method=pca"], DataError, "cannot read or write: "),
        (["x.parquet", "x.html", "--limit=4"], ConfigError, "tsne of 4 images"),
        (["x.parquet", "x.html", "--limit=1", "--method=pca"], ConfigError, "a map of 1 image - --limit"),
    ],
)
def test_a_mistake_is_told_in_one_line(made, tmp_path, monkeypatch, arguments, kind, message):
    for name in ("text.npz", "text.parquet"):
        (tmp_path / name).write_text("text")
    np.savez(tmp_path / "others.npz", embedding=np.eye(3))
    write_embeddings(tmp_path / "maps.npz", ["a", "b"], np.zeros((2, 2, 2, 4), np.float32))
    (tmp_path / "x.parquet").symlink_to(made[0])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message) as told:
        tool.run(arguments)
    assert type(told.value) is kind
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("x.html"))


def test_umap_that_is_not_installed_is_told_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"umap-learn is not installed .* pip install umap-learn"):
        tool.run(["gone.parquet", "x.html", "--method=umap"])
