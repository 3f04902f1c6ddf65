"""The documentation: links and named files exist, commands are run by CI, and the prose uses plain American words."""

import importlib.util
import re
from pathlib import Path

import pytest

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
