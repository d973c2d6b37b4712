"""The kernels of benchmarks/fused.py, interpreted, and what they become for a GPU."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.fused import Fused, _place, fused
from shampoo_optax.linalg import roots
from shampoo_optax.linalg.minimax import _double, _solve
from shampoo_optax.linalg.precisions import arithmetic
from tests import helpers

OURS = fused(tile=16, depth=8, interpret=True)


def _polynomials(seed: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two stacks that commute, of eigenvalues as an iteration meets them."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(2, size, size)))
    values = rng.uniform(0, 1, size=(2, 1, size))
    both = ((q * f) @ np.swapaxes(q, -2, -1) for f in (values, 3 - values**2))
    first, second = (x.astype(np.float32) for x in both)
    return first, second


@pytest.mark.parametrize("size", [16, 48])
def test_products_are_those_of_float32_and_symmetric(size: int) -> None:
    a, b = _polynomials(size, size)
    step = jnp.array([1.5, -0.25, 2.0])
    wide_a, wide_b = a.astype(np.float64), b.astype(np.float64)
    for found, exact in (
        (OURS.multiplied(a, b), wide_a @ wide_b),
        (OURS.squared(a), wide_a @ wide_a),
        (
            OURS.free(OURS.quadratic(step, OURS.hold(a))),
            1.5 * np.eye(size) - 0.25 * wide_a + 2.0 * wide_a @ wide_a,
        ),
    ):
        assert np.abs(found - exact).max() <= 2e-6 * np.abs(exact).max()
        np.testing.assert_array_equal(found, np.swapaxes(found, -2, -1))


def test_the_parts_of_one_product_are_not_enough() -> None:
    """The tolerance above can tell a part that is left out."""
    a, b = _polynomials(0, 48)
    held = OURS.hold(a)
    rough = OURS.free(OURS.product(held._replace(low=0 * held.low), OURS.hold(b)))
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert np.abs(rough - exact).max() > 2e-5 * np.abs(exact).max()


def test_every_tile_on_and_above_the_diagonal_once() -> None:
    across = 64
    rows, columns = _place(jnp.arange(across * (across + 1) // 2))
    found = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert found == {(i, j) for j in range(across) for i in range(j + 1)}


@pytest.mark.parametrize("p", [2, 4, 8])
def test_roots(p: int) -> None:
    for matrix, exact in helpers.exact_roots(64, p):
        errors = []
        for products in (OURS, arithmetic("fp16x3")):
            solve = partial(
                _solve,
                ridge=lambda largest: 1e-6 * largest,
                steps=Fused().row(p).steps,
                degree=p,
                products=products,
                outer=_double,
            )
            found = jax.jit(solve)(jnp.asarray(matrix)[None])
            error = np.linalg.norm(found.root[0] - exact) / np.linalg.norm(exact)
            errors.append(float(error))
            assert float(found.residual[0]) <= 1e-2
        assert errors[0] <= min(5e-3, 1.25 * errors[1])


def _root(method: Any, matrices: jax.Array) -> Any:
    return roots.inverse_root(method, matrices, 4, eps_rel=1e-6).root


def test_on_a_cpu_they_are_minimax() -> None:
    a, _ = _polynomials(1, 128)
    np.testing.assert_array_equal(
        jax.jit(partial(_root, Fused()))(a),
        jax.jit(partial(_root, roots.Minimax()))(a),
    )


# From JAX 0.12 on; a candidate may, the library would not.
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
def test_every_product_of_a_gpu_is_a_kernel() -> None:
    """Two squares, one power, five in a step, two at the end; sides of whole tiles."""
    device = AbstractDevice("NVIDIA H200", 132, "gpu")
    mesh = AbstractMesh((8,), ("x",), (AxisType.Auto,), abstract_device=device)

    def kernels(size: int) -> int:
        stack = jax.ShapeDtypeStruct((8, size, size), jnp.float32)
        solve = jax.shard_map(
            partial(_root, Fused()), in_specs=P("x"), out_specs=P("x")
        )
        with jax.sharding.use_abstract_mesh(mesh):
            lowered = jax.jit(solve).trace(stack).lower(lowering_platforms=("cuda",))
        return lowered.as_text().count("__gpu$xla.gpu.triton")

    assert kernels(256) == 10
    assert kernels(192) == 0
