"""Who may import whom: strictly down the floors, at the top of the file, and the config in train.py alone."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "simmim_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The highest prefix that fits counts. `errors` is below all: it imports nothing.
FLOORS = {
    "errors": -2, "stacking": -1,
    "config": -1, "flags": 0,
    "compilation": 0, "costs": 0, "masking": 0, "mixing": 0, "optim": 0, "processes": 0, "sharding": 0,
    "train_step": 0,
    "models.layers": 1, "models.windows": 1, "models.pyramid": 1, "data.": 1, "objectives.pixels": 0,
    "objectives.features": 1, "evals.features": 1, "checkpoint": 1, "metrics": 1, "pretrained": 1,
    "models.": 2, "objectives.": 2, "evals.": 2,
    "workdirs": 2, "models": 3, "objectives": 3, "evals": 3, "data": 3, "interop.": 3, "interop": 3,
    "train": 4, "trained": 4,
    "main": 5, "tools.": 5,
}  # fmt: skip
# they tell --help and a mistake in a flag before JAX comes in
COMMANDS = (
    "main", "tools.convert", "tools.embed", "tools.evaluate", "tools.map", "tools.plan", "tools.predict",
    "tools.prepare", "tools.preview", "tools.probe",
)  # fmt: skip
HEAVY = {"torch", "tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "pyarrow"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {f"simmim_jax.{module_name(path)}" for path in MODULES}


def floor_of(name: str) -> int:
    fitting = [prefix for prefix in FLOORS if name == prefix or (prefix.endswith(".") and name.startswith(prefix))]
    return FLOORS[max(fitting, key=len)]


def imports_of(tree: ast.AST):
    """(imported module, node) of every import statement; of ours, without the package's name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in OURS else node.module), node


@pytest.mark.parametrize("path", [p for p in MODULES if module_name(p)], ids=lambda p: module_name(p))
def test_imports_point_down_and_stand_at_the_top(path):
    tree, name = ast.parse(path.read_text()), module_name(path)
    top = set(map(id, tree.body))
    for imported, node in imports_of(tree):
        root, _, rest = imported.partition(".")
        if root == "simmim_jax":
            own_folder = rest.split(".")[0] == name.split(".")[0]
            assert floor_of(rest) < floor_of(name) or (own_folder and floor_of(rest) <= floor_of(name)), (name, rest)
        late = id(node) not in top
        assert not late or root in HEAVY or name in COMMANDS, f"{name} imports {imported} inside a function"
        if name.startswith("data"):
            assert root not in ("jax", "flax"), name


def test_only_train_and_main_have_seen_a_config():
    readers = {
        module_name(p)
        for p in MODULES
        if any("ml_collections" in module for module, _ in imports_of(ast.parse(p.read_text())))
    }
    assert readers == {"config", "flags", "main", "train"}


def test_there_is_no_drawer_for_everything():
    assert not {p.stem for p in MODULES} & {"utils", "common", "base", "helpers"}


def test_main_stays_short():
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 60
