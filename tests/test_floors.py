"""Which module may import which: strictly down the floors of the design, at the top of the file."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "simmim_jax"
MODULES = sorted(PACKAGE.rglob("*.py"))

# The longest prefix that fits counts; "x." covers the modules in folder x. A module imports modules of lower floors,
# and those of the same floor in its own folder.
FLOORS = {
    "main": 10, "tools": 10, "tools.": 10,
    "train": 9,
    "compiled": 7,
    "memory": 8, "evaluation": 8,
    "experiment": 6,  # the only reader of a config
    "interop": 5, "interop.": 5, "runs.": 5,
    "models": 4, "objectives": 4, "evals": 4, "data": 4,  # the registries
    "models.": 3, "objectives.": 3, "evals.": 3,
    "models.layers": 2, "data.": 2, "optim": 2,
    "masking": 2,  # a registry too, but on this floor, because the objective simmim reads it
    "masking.": 1, "runtime": 1, "runtime.": 1, "flags": 1,
    "config": 0, "train_step": 0, "files": 0, "automatic": 0,
    "errors": -1,
}  # fmt: skip
# Entry files of commands import late, so that --help and flag errors need no JAX.
COMMANDS = ("main", "tools.plan", "tools.predict", "tools.preview")
HEAVY = {
    "apache_beam",
    "torch",
    "tensorflow",
    "tensorflow_datasets",
    "matplotlib",
    "pillow_heif",
    "pydicom",
    "sklearn",
    "pyarrow",
    "umap",
}  # optional libraries
LONG = {"make_segmentation"}  # its parameters are the inputs of an evaluator, by name
CONFIG_READERS = {"config", "flags", "experiment", "main"}


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


OURS = {f"simmim_jax.{module_name(path)}" for path in MODULES}
NAMED = [pytest.param(path, id=module_name(path)) for path in MODULES if module_name(path)]


def floor(name: str) -> int:
    fitting = [prefix for prefix in FLOORS if name == prefix or (prefix.endswith(".") and name.startswith(prefix))]
    return FLOORS[max(fitting, key=len)]


def imports(tree: ast.AST):
    """(imported module, node) for every import statement."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield (whole if whole in OURS else node.module), node


def is_command(name: str, path: Path) -> bool:
    return name in COMMANDS or path.name == "__main__.py"


@pytest.mark.parametrize("path", NAMED)
def test_imports_point_down_and_are_at_the_top(path):
    tree, name = ast.parse(path.read_text()), module_name(path)
    top = set(map(id, tree.body))
    for imported, node in imports(tree):
        root, _, rest = imported.partition(".")
        if root == "simmim_jax":
            same_folder = "." in name and rest.split(".")[0] == name.split(".")[0]
            is_registry = path.name == "__init__.py" and rest.startswith(f"{name}.")
            assert floor(rest) < floor(name) or ((same_folder or is_registry) and floor(rest) <= floor(name)), rest
        assert id(node) in top or root in HEAVY or is_command(name, path), f"{imported} is imported inside a function"
        if name.startswith("data"):
            assert root not in ("jax", "flax"), imported


@pytest.mark.parametrize("path", NAMED)
def test_only_readers_of_the_config_have_parameters_of_its_type(path):
    if module_name(path) in CONFIG_READERS:
        return
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            annotations = [ast.unparse(each.annotation) for each in parameters if each.annotation]
            assert not any("ConfigDict" in annotation for annotation in annotations), node.name


@pytest.mark.parametrize("path", NAMED)
def test_no_function_has_more_than_eight_parameters_or_nonlocal_variables(path):
    for node in ast.walk(ast.parse(path.read_text())):
        assert not isinstance(node, ast.Nonlocal), f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            parameters = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            count = len([each for each in parameters if each.arg not in ("self", "cls")])
            assert count <= 8 or node.name in LONG, node.name


def test_tools_has_one_entry_per_command():
    entries = {path.stem for path in (PACKAGE / "tools").iterdir() if path.name != "__pycache__"}
    commands = {"prepare", "preview", "plan", "probe", "evaluate", "predict", "embed", "map", "convert"}
    assert entries == commands | {"__init__", "cli", "images"}
    assert not {path.stem for path in MODULES} & {"utils", "common", "base", "helpers"}


def test_entry_files_stay_short():
    assert len((PACKAGE / "main.py").read_text().splitlines()) <= 60
    assert len((PACKAGE / "train.py").read_text().splitlines()) <= 300
