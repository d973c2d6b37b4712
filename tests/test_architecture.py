"""The rooms of ARCHITECTURE.md: who imports whom, and how large things may grow.

Imports are read with ``ast`` in every module of the package, wherever they stand: at
the top, in a function or under ``TYPE_CHECKING``.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

import shampoo_optax as so

PACKAGE = Path(so.__file__).parent
SOURCES = {
    ".".join(["shampoo_optax", *path.relative_to(PACKAGE).with_suffix("").parts]): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Front doors: the package's own re-exports everything, those of the rooms are empty.
DOORS = [name for name in SOURCES if name.endswith("__init__")]
PUBLIC = ["shampoo_optax.__init__", "shampoo_optax.checkpoint.__init__"]
MODULES = [name for name in SOURCES if name not in DOORS]
# From the roof down. A room may import from any room below it, and from itself.
FLOORS = [
    ["report", "checkpoint", "migrate"],
    ["alias", "family", "shardings"],
    ["scale_by", "_chain"],
    ["transforms"],
    ["layout", "linalg"],
    ["_checks", "_paths"],
]
LONGEST_FILE, LONGEST_FUNCTION = 350, 60


@functools.cache
def _tree(module: str) -> ast.Module:
    return ast.parse(SOURCES[module].read_text())


def _imports(module: str) -> set[str]:
    """Absolute names of what a module imports; of ours, the modules themselves."""
    found = set()
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import hides its room"
            assert node.module is not None
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"
                found.add(inside if inside in SOURCES else node.module)
    return found


def _ours(module: str) -> set[str]:
    return {name for name in _imports(module) if name.split(".")[0] == "shampoo_optax"}


def _room(module: str) -> str:
    return module.split(".")[1]


def _floor(room: str) -> int:
    (floor,) = (i for i, rooms in enumerate(FLOORS) if room in rooms)
    return floor


def test_every_module_has_a_room_and_every_room_a_module() -> None:
    assert {_room(module) for module in MODULES} == {r for rs in FLOORS for r in rs}
    assert len(MODULES) > 15


@pytest.mark.parametrize("module", MODULES)
def test_imports_only_go_down(module: str) -> None:
    for other in _ours(module):
        assert other in MODULES, f"{module} imports a front door: {other}"
        here, there = _room(module), _room(other)
        # Rooms of one floor (layout, linalg) know nothing of each other.
        assert here == there or _floor(here) < _floor(there), f"{module} -> {other}"


def test_no_module_imports_itself_through_others() -> None:
    graph = {module: _ours(module) for module in MODULES}
    assert any(graph.values())
    graphlib.TopologicalSorter(graph).prepare()  # raises on a cycle


@pytest.mark.parametrize("module", SOURCES)
def test_the_core_imports_jax_and_optax_only(module: str) -> None:
    others = {name.split(".")[0] for name in _imports(module)} - {"shampoo_optax"}
    others -= sys.stdlib_module_names
    allowed = {"jax", "optax"}
    if module.startswith("shampoo_optax.linalg."):
        allowed = {"jax"}
    on_host = ("host", "digest", "moves", "read", "reblock", "reference", "stacks")
    if module in {f"shampoo_optax.checkpoint.{name}" for name in on_host}:
        allowed = {"jax", "numpy"}  # JAX's own dependency: arrays of one process
    if module == "shampoo_optax.layout.owners":
        allowed = {"jax", "numpy"}  # tables of rows
    if module in {
        f"shampoo_optax.checkpoint.{x}" for x in ("store", "opening", "read")
    }:
        allowed |= {"optax", "orbax"}  # an extra
    if module == "shampoo_optax.layout.plan":
        allowed = set()  # algebra on shapes
    assert others <= allowed, module


def test_importing_the_package_imports_no_extra() -> None:
    code = "import sys, shampoo_optax; print(*{n.split('.')[0] for n in sys.modules})"
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert {"jax", "optax", "shampoo_optax"} <= loaded
    assert not loaded & {"flax", "orbax", "chex", "matplotlib", "rich", "sklearn"}


@pytest.mark.parametrize("module", SOURCES)
def test_sizes(module: str) -> None:
    lines = len(SOURCES[module].read_text().splitlines())
    assert lines <= LONGEST_FILE, f"{module} has {lines} lines"
    for node in ast.walk(_tree(module)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            documented = ast.get_docstring(node) is not None
            body = node.body[documented:]
            length = (body[-1].end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert length <= LONGEST_FUNCTION, f"{module}.{node.name}: {length} lines"


def test_the_front_doors() -> None:
    """The package re-exports explicitly, and the rooms' doors hold no code."""
    for door in DOORS:
        for node in _tree(door).body:
            if door not in PUBLIC:
                assert isinstance(node, ast.Expr), f"{door} is for its docstring"
            elif isinstance(node, ast.ImportFrom) and "shampoo" in str(node.module):
                for alias in node.names:
                    assert alias.asname == alias.name, alias.name


def _public() -> dict[str, object]:
    """What the front door re-exports, and the functions of modules among it."""
    names = [
        alias.name
        for node in _tree("shampoo_optax.__init__").body
        if isinstance(node, ast.ImportFrom) and "shampoo" in str(node.module)
        for alias in node.names
    ]
    found: dict[str, object] = {name: getattr(so, name) for name in names}
    for name, module in list(found.items()):
        if isinstance(module, types.ModuleType):
            for inside, value in inspect.getmembers(module, inspect.isfunction):
                if value.__module__ == module.__name__ and inside[0] != "_":
                    found[f"{name}.{inside}"] = value
    return found


@pytest.mark.parametrize(("name", "thing"), _public().items(), ids=_public())
def test_public_names_have_an_example(name: str, thing: object) -> None:
    doc = inspect.getdoc(thing)
    assert doc, name
    if isinstance(thing, types.ModuleType):
        return
    if isinstance(thing, type) and issubclass(thing, tuple):
        assert thing.__name__.endswith("State") and hasattr(thing, "_fields")
        assert not doc.startswith(thing.__name__), f"{name} has NamedTuple's own text"
        return
    # Examples are doctests: they run with the other tests.
    assert "\nExample:\n" in doc and ">>> " in doc, f"{name}: no example"
