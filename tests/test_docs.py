"""The documentation: links and named files exist, commands are run by CI, and the prose uses plain American words."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from bench import load_program

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", ROOT / "benchmarks" / "README.md"]
PAGES += sorted((ROOT / "docs").glob("*.md"))
TOPICS = (
    *("install", "data", "scientific-images", "pretrain", "evaluate", "finetune", "segment", "convert", "multi-host"),
    *("configs", "outputs", "errors", "extending", "results", "benchmarks"),
)


def load_runner():
    """The program of CI that runs the commands of the documentation, as a module."""
    spec = importlib.util.spec_from_file_location("readme", ROOT / ".ci" / "readme.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchor(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def test_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_readme_links_to_every_page():
    text = (ROOT / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == {f"{topic}.md" for topic in TOPICS}
    assert [page for page in sorted(pages) if f"(docs/{page})" not in text] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if re.match(r"https?:|mailto:", target):
            continue
        name, _, fragment = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", without_code(file.read_text()), re.MULTILINE)
            assert fragment in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text() if page.name != "CHANGELOG.md" else ""  # which names what was
    paths = re.findall(r"(?<![\w/.{}])((?:configs|launch|benchmarks|tests|docs|\.ci)/[\w./-]*\w)", text)
    modules = re.findall(r"python -m (simmim_jax[\w.]*)", text)
    missing = [path for path in paths if "DATE-DEVICE" not in path and not (ROOT / path).exists()]
    missing += [name for name in modules if not any(map(Path.exists, module_files(name)))]
    assert missing == []


def module_files(name: str) -> list[Path]:
    path = ROOT / name.replace(".", "/")
    return [path.with_suffix(".py"), path / "__main__.py"]


def test_ci_knows_every_command_of_the_documentation():
    runner = load_runner()
    for command in runner.commands():
        if not runner.why_not_run(command):
            runner.concrete(runner.small(command))


def test_ci_names_no_command_that_the_documentation_does_not_show():
    runner = load_runner()
    commands = runner.commands()
    assert [start for start in runner.NOT_RUN if not any(c.startswith(start) for c in commands)] == []
    assert [pattern for pattern, _ in runner.SMALL if not any(re.search(pattern, c) for c in commands)] == []


def test_every_run_that_a_command_reads_is_written_by_another():
    runner = load_runner()
    commands = [command for command in runner.commands() if not runner.why_not_run(command)]
    written = set().union(*(runner.files(command)[1] for command in commands))
    assert {name for command in commands for name in runner.files(command)[0]} <= written


BANNED = re.compile(
    r"\b(told|mend|mended|anew|heed|heeds|nonetheless|besides?|thereof|whichever)\b"
    r"|colour|normalise|centre|\bgrey|neighbour|initialise|regularis|parallelise|behaviour",
    re.IGNORECASE,
)


def prose_files() -> list[Path]:
    files = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *(ROOT / "benchmarks").glob("*.py")]
    for folder in ("simmim_jax", "configs", "launch", "docs"):
        files += [path for path in (ROOT / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return sorted(files)


def test_prose_uses_plain_american_words():
    found = []
    for path in prose_files():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found += [f"{path.relative_to(ROOT)}:{number}: {match[0]}" for match in BANNED.finditer(line)]
    assert found == []


RESULT_FILE = re.compile(r"benchmarks/results/[\w-]+/\w+\.json")
# A number that claims a measurement: with a decimal point, or of seconds, minutes or images per second.
CLAIM = re.compile(r"(?<![\w.,`:/-])(\d[\d,]*(?:\.\d+)?)(?![\w.,-]*\w)(?: (s|seconds|minutes|images/s)\b)?")
SETTING = re.compile(r"layer decay(?: of|[^.\d]*,)? 0\.75|10,000")


MACHINE = ("config", "losses", "load_average", "versions", "memory", "describe")  # in the names of other numbers


def numbers(tree, *, times: bool) -> list[float]:
    """The measured numbers in the content of a JSON file: whole durations in seconds, or everything but durations."""

    def walk(value, name="", inside=False):
        if isinstance(value, dict):
            own = {key: x for key, x in value.items() if not any(word in key for word in MACHINE)}
            parts = [walk(x, key, inside or "seconds" in key) for key, x in own.items()]
        elif isinstance(value, list):
            parts = [walk(x, name, inside) for x in value]
        else:
            is_wanted = name in ("total", "seconds") if times else not inside
            return [value] if isinstance(value, int | float) and is_wanted else []
        return [x for part in parts for x in part]

    return walk(tree)


def measured(path: Path, times: bool) -> list[float]:
    """The numbers that a page may quote from a result. Of the many probes of cifar10.json, those in its table."""
    report = json.loads(path.read_text())
    if path.stem != "cifar10":
        return numbers(report, times=times)
    table = [float(x) for x in re.findall(r"\d+\.\d+", load_program("cifar10").table(report))]
    return table + numbers({name: report[name] for name in ("pretraining", "records")}, times=times)


def wrong_claims(text: str, files: set[Path]) -> list[str]:
    """The numbers in `text` that round no number in the files: durations, fractions or percent, and rates."""
    found = {times: [x for path in sorted(files) for x in measured(path, times)] for times in (False, True)}
    claims = [(n.replace(",", ""), unit) for n, unit in CLAIM.findall(SETTING.sub("", text)) if "." in n or unit]
    assert claims
    wrong = []
    for number, unit in claims:
        is_time, decimals = unit not in ("", "images/s"), len(number.partition(".")[2])
        scales = (1 / 60,) if unit == "minutes" else (1,) if is_time else (1, 100)
        if not any(f"{x * scale:.{decimals}f}" == number for x in found[is_time] for scale in scales):
            wrong.append(f"{number} {unit}".strip())
    return wrong


@pytest.mark.parametrize("page", ["results", "benchmarks"])
def test_each_number_of_a_results_page_is_in_a_committed_file(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    prose = re.sub(r"```.*?```|\]\([^)]*\)|\d{4}-\d\d-\d\d|Zen \d", "", text, flags=re.DOTALL)
    assert wrong_claims(prose, {ROOT / path for path in RESULT_FILE.findall(text)}) == []


def test_each_result_of_the_readme_is_in_a_committed_file():
    (section,) = re.findall(r"^## Results\n(.*?)^## ", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)
    page = (ROOT / "docs" / "results.md").read_text()
    assert wrong_claims(section, {ROOT / path for path in RESULT_FILE.findall(page)}) == []


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.stem)
def test_each_measured_number_of_a_config_is_in_the_file_that_it_names(config):
    docstring = config.read_text().split('"""')[1]
    _, word, claim = docstring.partition("; measured on ")
    if not word:
        assert "not yet run" in docstring
        return
    (path,) = RESULT_FILE.findall(claim)
    assert wrong_claims(claim.partition("):")[2], {ROOT / path}) == []


def test_results_page_shows_the_committed_table():
    text = (ROOT / "docs" / "results.md").read_text()
    (path,) = {ROOT / path for path in RESULT_FILE.findall(text) if path.endswith("cifar10.json")}
    assert load_program("cifar10").table(json.loads(path.read_text())) in text
