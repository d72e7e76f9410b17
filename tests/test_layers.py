"""The layers: who may import whom, and how long a file may be."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import torchrl_mouse

PACKAGE = Path(torchrl_mouse.__file__).parent
RANKS = {
    "schema": 0,
    "functional": 0,
    "streams": 1,
    "checkpoints": 1,
    "modules": 2,
    "objectives": 2,
    "data": 2,
    "envs": 2,
    "config": 3,
    "models": 4,
    "evaluation": 5,
    "recipes": 6,
}
MAX_LINES = 450

FILES = {
    ".".join(("torchrl_mouse", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
}


def imports(source, name, is_package, modules):
    """Returns the modules that a module imports, those under TYPE_CHECKING or in functions included."""
    found = set()
    package = name if is_package else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")
                base = ".".join([*parents[: len(parents) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                found.add(submodule if submodule in modules else base)
    return found


def layer(name):
    return name.split(".")[1] if "." in name else ""


IMPORTS = {
    name: imports(file.read_text(encoding="utf-8"), name, file.name == "__init__.py", FILES)
    for name, file in FILES.items()
}
OURS = {name: {other for other in found if other.split(".")[0] == "torchrl_mouse"} for name, found in IMPORTS.items()}


def may_import(importer, imported):
    if importer == imported:
        return True
    return importer in RANKS and imported in RANKS and RANKS[imported] < RANKS[importer]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from torchrl_mouse import schema", {"torchrl_mouse.schema"}),
        ("from torchrl_mouse.data import DatasetStore", {"torchrl_mouse.data"}),
        ("import torchrl_mouse.models as m", {"torchrl_mouse.models"}),
        ("from . import heads", {"torchrl_mouse.modules.heads"}),
        ("from ..models import MouseModel", {"torchrl_mouse.models"}),
        ("if TYPE_CHECKING:\n    from torchrl_mouse.envs import TaskEnv", {"torchrl_mouse.envs"}),
        ("def f():\n    import torchrl_mouse.recipes", {"torchrl_mouse.recipes"}),
    ],
)
def test_the_reader_sees_every_kind_of_import(source, expected):
    modules = {"torchrl_mouse.schema", "torchrl_mouse.modules.heads"}
    assert imports(source, "torchrl_mouse.modules.trunk", False, modules) == expected


@pytest.mark.parametrize(
    ("importer", "imported", "allowed"),
    [
        ("modules", "schema", True),
        ("recipes", "evaluation", True),
        ("models", "data", True),
        ("data", "data", True),
        ("modules", "objectives", False),
        ("envs", "data", False),
        ("data", "models", False),
        ("evaluation", "recipes", False),
        ("schema", "modules", False),
        ("modules", "unknown", False),
    ],
)
def test_the_rule_itself(importer, imported, allowed):
    assert may_import(importer, imported) is allowed


@pytest.mark.parametrize("name", [name for name in FILES if name != "torchrl_mouse"])
def test_imports_only_from_lower_layers(name):
    wrong = {other for other in OURS[name] if not may_import(layer(name), layer(other))}
    assert not wrong, f"{name} is in layer {layer(name)!r} and must not import {sorted(wrong)}"


def test_no_cycles():
    # A package's own modules are imported by it, never through it.
    TopologicalSorter({name: found - {name} for name, found in OURS.items()}).prepare()


@pytest.mark.parametrize("name", FILES)
def test_imports_nothing_from_outside_the_package(name):
    assert not {other for other in IMPORTS[name] if other.split(".")[0] in ("tests", "examples", "conftest")}


@pytest.mark.parametrize("name", FILES)
def test_files_stay_short(name):
    assert len(FILES[name].read_text(encoding="utf-8").splitlines()) < MAX_LINES
