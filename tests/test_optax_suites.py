"""Optax's own contract suites, run on our optimizers from the installed wheel.

The suites are read from the wheel when the tests are collected; of each only the list
of optimizers is replaced (and, in the sharding suite, two lines that keep it from
running at all). Nothing in them is copied or reduced.
"""

from __future__ import annotations

import ast
import importlib.util
import types
import unittest
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding

import shampoo_optax as so
from tests import helpers

VECTORS = so.BlockLayout(precondition_vectors=True, max_preconditioner_dim=2)

# name: one of our optimizers and its keyword arguments.
OURS: dict[str, tuple[Any, dict[str, Any]]] = {
    "default": (so.shampoo, {"learning_rate": 1e-2}),
    "vectors": (so.shampoo, {"learning_rate": 1e-2, "layout": VECTORS}),
    # Shampoo's own magnitude, with no stale root: the suite begins at the minimum of
    # one coordinate, where a root of tiny gradients outlives them by nine steps.
    "no_grafting": (
        so.shampoo,
        {
            "learning_rate": 1e-2,
            "grafting": None,
            "layout": VECTORS,
            "refresh": so.Refresh(1),
        },
    ),
    "coupled_newton": (
        so.shampoo,
        {
            "learning_rate": 1e-1,
            "grafting": so.grafting.adagrad(),
            "layout": VECTORS,
            "root": so.roots.CoupledNewton(),
            "momentum": 0.5,
            "weight_decay": None,
        },
    ),
    "kl": (so.kl_shampoo, {"learning_rate": 1e-2}),
    "soap": (so.soap, {"learning_rate": 1e-2, "layout": VECTORS}),
    "spectral": (so.spectral_descent, {"learning_rate": 1e-2}),
}


def _source(module: str) -> ast.Module:
    """A module of the installed wheel, parsed but not run."""
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None
    return ast.parse(Path(spec.origin).read_text())


def _execute(tree: ast.Module, names: dict[str, Any], title: str) -> types.ModuleType:
    module = types.ModuleType(title)
    vars(module).update(names)
    code = compile(ast.fix_missing_locations(tree), title, "exec")
    exec(code, vars(module))
    return module


def _never_skip(case: type[unittest.TestCase]) -> type[unittest.TestCase]:
    """A suite that skips what it should check must fail."""

    def skip(self: unittest.TestCase, reason: str) -> None:
        self.fail(f"the suite skipped a test: {reason}")

    case.skipTest = skip  # type: ignore[assignment]
    return case


def _mentions(statement: ast.stmt, names: set[str]) -> bool:
    nodes = (n for n in ast.walk(statement) if isinstance(n, ast.Name))
    return any(node.id in names for node in nodes)


def _contrib_suite() -> type[unittest.TestCase]:
    lists = {
        "_MAIN_OPTIMIZERS_UNDER_TEST",
        "_OTHER_OPTIMIZERS_UNDER_TEST",
        "_ALL_OPTIMIZERS_UNDER_TEST",
        "_BASE_OPTIMIZERS",
    }
    tree = _source("optax.contrib._common_test")
    # The lists are made by statements of the module; the test class only reads them.
    kept = [
        s for s in tree.body if isinstance(s, ast.ClassDef) or not _mentions(s, lists)
    ]
    assert len(tree.body) - len(kept) == 7, "the suite makes its lists in another way"
    tree.body = kept
    cases = tuple(
        {
            "opt_name": f"shampoo_{name}",
            "opt_kwargs": kwargs,
            "wrapper_name": None,
            "wrapper_kwargs": None,
        }
        for name, (_, kwargs) in OURS.items()
    )
    names = {
        "_MAIN_OPTIMIZERS_UNDER_TEST": cases,
        "_ALL_OPTIMIZERS_UNDER_TEST": cases,
    }
    module = _execute(tree, names, "contrib_suite")
    # The suite looks factories up by name in `contrib`; the factory itself is ours,
    # with its real signature, which the suite inspects.
    factories = {f"shampoo_{name}": factory for name, (factory, _) in OURS.items()}
    module.contrib = types.SimpleNamespace(**factories)  # type: ignore[attr-defined]
    return _never_skip(module.ContribTest)


class _Patched(ast.NodeTransformer):
    """Drop the suite's own list and device count, and its version comparisons."""

    def __init__(self) -> None:
        self.removed, self.versions = 0, 0

    def visit_Assign(self, node: ast.Assign) -> ast.stmt | None:
        if _mentions(node, {"os"}) or _mentions(node, {"OPTIMIZERS"}):
            self.removed += 1
            return None
        return node

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        # Versions are compared as strings there: '0.10.2' < '0.7.2' skips the test.
        if "jax.__version__" in ast.unparse(node):
            self.versions += 1
            return ast.Constant(False)
        return node


def _sharding_suite() -> type[unittest.TestCase]:
    patch = _Patched()
    tree = patch.visit(_source("optax._src.sharding_test"))
    assert (patch.removed, patch.versions) == (2, 3), "the suite has changed"
    optimizers = {name: factory(**kwargs) for name, (factory, kwargs) in OURS.items()}
    module = _execute(tree, {"OPTIMIZERS": optimizers}, "sharding_suite")
    # No optimizer takes part in this one: Optax's own, and it fails on these versions
    # once it is no longer skipped (a reshape without out_sharding).
    del module.ShardingTest.test_microbatch_with_explicit_sharding_replicated
    del module.ShardingTest.test_microbatch_with_explicit_sharding_sharded
    return _never_skip(module.ShardingTest)


ContribTest = _contrib_suite()
ShardingTest = _sharding_suite()


def _cases(suite: type[unittest.TestCase]) -> list[str]:
    return list(unittest.defaultTestLoader.getTestCaseNames(suite))


def test_every_case_is_collected() -> None:
    # Per optimizer: extra args 2, targets 4, injection 1, dtype 2, accumulation 2,
    # stability 4, schedule 1.
    assert len(_cases(ContribTest)) == 16 * len(OURS)
    # Per optimizer: abstract, eager, jit.
    assert len(_cases(ShardingTest)) == 3 * len(OURS)


SPECS = {"rows": jax.P("x"), "columns": jax.P(None, "x"), "none": jax.P()}
SHAPES = {"matrix": (8, 8), "tall": (16, 8), "kernel": (8, 8, 4), "vector": (8,)}
# One tree with every shape in every place: one program, and blocks of unlike places
# meet in one stack.
PLACES = {
    f"{shape}_{spec}": (SHAPES[shape], SPECS[spec])
    for shape in SHAPES
    for spec in SPECS
    if len(SPECS[spec]) <= len(SHAPES[shape])
}
LAYOUT = so.BlockLayout(max_preconditioner_dim=8)


def _placed(dtype: Any, mesh: Any, step: int) -> dict[str, jax.Array]:
    like = {name: jnp.zeros(shape, dtype) for name, (shape, _) in PLACES.items()}
    arrays = helpers.gradients(like, step)
    if mesh is None:
        return arrays
    return {
        name: jax.device_put(array, NamedSharding(mesh, PLACES[name][1]))
        for name, array in arrays.items()
    }


def _steps(tx: Any, mesh: Any, dtype: Any, *, jit: bool) -> tuple[list[Any], Any]:
    """The states from init on, and the last updates."""
    init, update = (helpers.jit(tx.init), helpers.jit(tx.update)) if jit else tx
    params, grads = _placed(dtype, mesh, 1), _placed(dtype, mesh, 2)
    states = [init(params)]
    # It waits for each operation: on a busy machine many in flight, with their
    # exchanges among eight devices, wait for each other for ever.
    with jax.debug_nans(not jit):
        for _ in range(2):
            updates, state = update(grads, states[-1], params)
            states.append(state)
    return states, updates


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float32])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_types_and_numbers_on_a_mesh(kind: AxisType, dtype: Any) -> None:
    # Strong damping: the comparison is of programs, not of ill-conditioned roots.
    tx = so.shampoo(1.0, eps_rel=1e-2, layout=LAYOUT, refresh=so.Refresh(1))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        params = _placed(dtype, mesh, 1)
        eager = _steps(tx, mesh, dtype, jit=False)
        jitted = _steps(tx, mesh, dtype, jit=True)
    for states, updates in (eager, jitted):
        assert not helpers.type_changes(states[0], states[1])
        assert not helpers.type_changes(states[1], states[2])
        assert not helpers.type_changes(params, updates)
    assert not helpers.type_changes(eager[0], jitted[0])
    # One rounding of the updates' dtype; they are of about one.
    rounding = float(jnp.finfo(dtype).eps)
    helpers.assert_close(eager[1], jitted[1], rtol=0, atol=max(rounding, 1e-5))
    _, alone = _steps(tx, None, dtype, jit=True)
    on_host = jax.device_get(jitted[1])
    helpers.assert_close(on_host, alone, rtol=0, atol=max(rounding, 1e-5))
