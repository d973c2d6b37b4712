"""Products in fewer bits: exact enough where they run, and float32 on a CPU."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_optax as so
from shampoo_optax.linalg import modes, precisions
from shampoo_optax.linalg.minimax import Minimax, _double, _residual, _solve
from tests import helpers

FEWER = [name for name in precisions.PRECISIONS if name != "highest"]


def _symmetric(seed: int, size: int = 96) -> np.ndarray:
    x = np.random.default_rng(seed).normal(size=(2, size, size)) / size**0.5
    return (x + np.swapaxes(x, -2, -1)).astype(np.float32)


def _error(found: Any, exact: np.ndarray) -> float:
    off = np.asarray(found, np.float64) - exact
    return float(np.linalg.norm(off) / np.linalg.norm(exact))


def test_parts_of_float16_keep_what_float32_does() -> None:
    a, b = _symmetric(0), _symmetric(1)
    split, whole = precisions.arithmetic("fp16x3"), precisions.arithmetic("highest")
    double = a.astype(np.float64), b.astype(np.float64)
    for lhs, rhs in ((a, b), (1000 * a, b), (a, 0.3 * b)):
        exact = lhs.astype(np.float64) @ rhs.astype(np.float64)
        assert _error(split.product(lhs, rhs), exact) <= 6e-7
    assert _error(split.square(a), double[0] @ double[0]) <= 6e-7
    # One part alone would not: the test can tell.
    assert (
        _error(a.astype(np.float16) @ b.astype(np.float16), double[0] @ double[1])
        > 1e-4
    )
    for square in (split.square(a), whole.square(a)):
        np.testing.assert_array_equal(square, np.swapaxes(square, -2, -1))


@pytest.mark.parametrize("p", [2, 4, 8])
def test_roots_of_float16_parts(p: int) -> None:
    """What a GPU runs, but for how its units add."""
    for matrix, exact in helpers.exact_roots(96, p):
        found = _solve(
            jnp.asarray(matrix)[None],
            lambda largest: 1e-6 * largest,
            Minimax().row(p).steps,
            p,
            precisions.arithmetic("fp16x3"),
            _double,
        )
        assert _error(found.root[0], exact) <= 5e-3
        assert float(found.residual[0]) <= 1e-2


def test_the_residual_is_that_of_the_whole() -> None:
    """Columns of signs tell the Frobenius norm within a factor of two."""
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.3):
        off = rng.normal(size=(5, 64, 64)).astype(np.float32) * np.float32(scale) / 8
        coupled = np.eye(64, dtype=np.float32) + 0.5 * (off + np.swapaxes(off, 1, 2))
        last = np.broadcast_to(np.eye(64, dtype=np.float32), coupled.shape)
        exact = np.linalg.norm(coupled - last, axis=(1, 2)) / 8
        found = _residual(jnp.asarray(coupled), jnp.asarray(last), 4)
        assert ((found > exact / 2) & (found < 2 * exact)).all()


@pytest.mark.parametrize("name", FEWER)
def test_on_a_cpu_every_precision_is_float32(name: str) -> None:
    for make in (so.scale_by_shampoo, so.scale_by_soap):
        updates = []
        for precision in (name, "highest"):
            tx = make(refresh=so.Refresh(1, 1), precision=precision)
            params = {"w": jnp.asarray(_symmetric(3, 12)[0])}
            updates.append(jax.jit(tx.update)(params, tx.init(params), params)[0]["w"])
        np.testing.assert_array_equal(*updates)


@pytest.mark.parametrize("name", ["tf32", "bf16x3"])
def test_elsewhere_products_are_as_said(name: str) -> None:
    """Four of a block: two Gram matrices, two products with roots. Not of bfloat16."""
    params = {"w": jax.ShapeDtypeStruct((12, 8), jnp.float32)}
    tx = so.scale_by_shampoo(refresh=so.Refresh(10, 5), precision=name)
    state = jax.eval_shape(tx.init, params)
    traced = jax.jit(tx.update).trace(params, state)
    program = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("algorithm = <lhs_precision_type") == 4
    half = jax.ShapeDtypeStruct((3, 8, 8), jnp.bfloat16)
    gram = jax.jit(lambda x: modes.gram(x, 0, jnp.float32, precision=name))
    program = gram.trace(half).lower(lowering_platforms=("cuda",)).as_text()
    assert "algorithm = <lhs_precision_type" not in program


def test_other_names_are_refused() -> None:
    for make in (so.shampoo, so.soap, so.kl_shampoo):
        with pytest.raises(ValueError, match=r"precision='fp8'.*'tf32'"):
            make(1e-3, precision="fp8")
