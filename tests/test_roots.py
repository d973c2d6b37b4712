"""Inverse roots against float64 NumPy: accuracy, scales, damping, the gate."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_optax.linalg import roots
from shampoo_optax.linalg.scaling import Damping, largest_eigenvalue, prescale, unscale

METHODS: dict[str, Any] = {
    "auto": roots.Auto(),
    "eigh": roots.Eigh(),
    "eigh_float32": roots.Eigh(double_precision=False),
    "eigh_shift": roots.Eigh(shift=True),
    "newton": roots.CoupledNewton(),
    "higher_order": roots.CoupledHigherOrder(),
    "higher_order_2": roots.CoupledHigherOrder(order=2),
}
# Relative to the largest entry of the root, at a condition number of 1e3: float64
# inside leaves the rounding of the result, float32 loses up to the condition number.
ACCURACY = {"auto": 1e-6, "eigh": 1e-6, "eigh_shift": 1e-6}
ROOTS = [1, 2, 4, 8]
EPS = float(np.finfo(np.float32).eps)


def _power(matrix: np.ndarray, exponent: float) -> np.ndarray:
    w, v = np.linalg.eigh(np.asarray(matrix, np.float64))
    return (v * w**exponent) @ v.T


def _spd(size: int, condition: float, seed: int = 0) -> np.ndarray:
    """A random matrix with eigenvalues from 1 down to ``1 / condition``."""
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    matrix = (q * np.geomspace(1.0, 1.0 / condition, size)) @ q.T
    return (0.5 * (matrix + matrix.T)).astype(np.float32)


def _tridiagonal(size: int, diagonal: float, beside: float) -> np.ndarray:
    off = np.full(size - 1, beside)
    matrix = np.diag(np.full(size, diagonal)) + np.diag(off, 1) + np.diag(off, -1)
    return matrix.astype(np.float32)


def _solve(method: Any, matrix: np.ndarray, p: float, **damping: float) -> Any:
    damping = {"eps": 0.0, "eps_rel": 0.0} | damping
    return roots.inverse_root(method, jnp.asarray(matrix), p, **damping)


def _error(found: Any, wanted: np.ndarray) -> float:
    difference = np.abs(np.asarray(found, np.float64) - wanted)
    return float(difference.max() / np.abs(wanted).max())


@pytest.mark.parametrize("p", ROOTS)
@pytest.mark.parametrize("name", METHODS)
def test_random_matrices(name: str, p: int) -> None:
    for size, seed in [(1, 0), (2, 1), (5, 2), (16, 3)]:
        matrix = _spd(size, 1e3, seed)
        found = _solve(METHODS[name], matrix, p)
        assert bool(found.accepted)
        bound = ACCURACY.get(name, 1e-3)
        assert _error(found.root, _power(matrix, -1.0 / p)) <= bound, (size, seed)
        np.testing.assert_array_equal(found.root, found.root.T)


@pytest.mark.parametrize("name", ["eigh", "higher_order"])
@pytest.mark.parametrize("p", [8 / 3, 4 / 3, 3.0])
def test_rational_roots(name: str, p: float) -> None:
    matrix = _spd(5, 1e3)
    found = _solve(METHODS[name], matrix, p)
    assert _error(found.root, _power(matrix, -1.0 / p)) <= ACCURACY.get(name, 1e-3)


@pytest.mark.parametrize("p", [2.5, 8 / 3, 1.1])
def test_newton_refuses_other_than_whole_roots(p: float) -> None:
    with pytest.raises(ValueError, match=r"roots\.CoupledNewton.*whole roots"):
        _solve(roots.CoupledNewton(), _spd(3, 10.0), p)


def test_higher_order_refuses_irrational_roots() -> None:
    with pytest.raises(ValueError, match=r"roots\.CoupledHigherOrder.*small fractions"):
        _solve(roots.CoupledHigherOrder(), _spd(3, 10.0), 2.0**0.5)


FAMILIES = {
    "identity": lambda n: np.eye(n, dtype=np.float32),
    # Eigenvalues 1 + cos(k pi / (n + 1)): condition number 4e3 at n = 100.
    "laplace": lambda n: _tridiagonal(n, 1.0, 0.5),
    # Eigenvalues within 0.25 and 2.25: condition number 9.
    "dominant": lambda n: _tridiagonal(n, 1.25, -0.5),
}


@pytest.mark.parametrize("p", ROOTS)
@pytest.mark.parametrize("size", [10, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_tridiagonal_families(family: str, size: int, p: int) -> None:
    """``X**-p`` gives the matrix back, for every method, in float32."""
    matrix = FAMILIES[family](size)
    condition = np.linalg.cond(matrix.astype(np.float64))
    bound = 1e-6 if family == "identity" else 1e-4
    for name in ("eigh", "newton", "higher_order"):
        found = _solve(METHODS[name], matrix, p)
        back = _power(found.root, -float(p))
        norm = max(1.0, np.abs(matrix).sum(axis=1).max())
        error = np.abs(back - matrix).sum(axis=1).max() / norm
        # Iterations in float32 cannot do better than the condition number allows.
        limit = bound if name == "eigh" else max(bound, EPS * condition)
        assert bool(found.accepted) and error <= limit, (name, error)


SCALES = [1e-30, 1e-10, 2.0**-60, 2.0**60, 1e10, 1e30]


@pytest.mark.parametrize("p", [2, 4])
@pytest.mark.parametrize("name", METHODS)
def test_scales(name: str, p: int) -> None:
    """``root(c A) = c**(-1/p) root(A)``: the prescale costs no digit."""
    condition = 100.0
    matrix = _spd(5, condition)
    base = np.asarray(_solve(METHODS[name], matrix, p).root, np.float64)
    for scale in SCALES:
        found = _solve(METHODS[name], matrix * np.float32(scale), p)
        assert bool(found.accepted)
        factor = float(np.float32(scale)) ** (-1.0 / p)
        # A power of two leaves the matrix as it is; another scale rounds its entries.
        exact = np.log2(scale) % 1 == 0 and name in ACCURACY
        bound = 1e-6 if exact else EPS * condition
        error = _error(np.asarray(found.root, np.float64) / factor, base)
        assert error <= bound, (scale, error)


@pytest.mark.parametrize("name", METHODS)
def test_rank_deficient_with_damping(name: str) -> None:
    x = np.random.default_rng(0).normal(size=(6, 2)).astype(np.float32)
    matrix = x @ x.T
    found = _solve(METHODS[name], matrix, 2, eps=1e-2)
    wanted = _power(matrix.astype(np.float64) + 1e-2 * np.eye(6), -0.5)
    assert bool(found.accepted)
    assert _error(found.root, wanted) <= (1e-5 if name in ACCURACY else 1e-3)


def test_damping_is_the_larger_of_the_two() -> None:
    """In the units of the prescaled matrix: both scale with it, one after the root."""
    for seed in range(5):
        matrix = _spd(8, 1e4, seed) * 3.0
        scaled = prescale(jnp.asarray(matrix))
        unit = 2.0 ** -float(scaled.exponent)
        largest = np.linalg.eigvalsh(matrix.astype(np.float64))[-1]
        estimate = largest_eigenvalue(scaled.matrix)
        found = float(estimate) / unit
        assert 0.9 * largest <= found <= (1 + 1e-6) * largest
        for eps, wanted in [(1e-9, 0.1 * found), (2.0, 2.0)]:
            absolute = unscale(jnp.float32(eps), -scaled.exponent)
            ridge = Damping(absolute, jnp.float32(0.1)).ridge(estimate)
            np.testing.assert_allclose(float(ridge), wanted * unit, rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_damps_by_the_larger_of_the_two(name: str) -> None:
    """The ridge, read back from the root: ``X**-1 - A`` is ``delta I``."""
    for seed in range(3):
        matrix = _spd(8, 1e4, seed) * 3.0
        largest = np.linalg.eigvalsh(matrix.astype(np.float64))[-1]
        # By the eigenvalue itself, or by an estimate that may be a tenth too low.
        lowest = (1.0 if name == "auto" or "eigh" in name else 0.9) * largest
        for eps, low, high in [(1e-9, 0.1 * lowest, 0.1 * largest), (2.0, 2.0, 2.0)]:
            found = _solve(METHODS[name], matrix, 1, eps=eps, eps_rel=0.1)
            ridge = _power(found.root, -1.0) - matrix.astype(np.float64)
            delta = np.diag(ridge)
            assert (1 - 1e-3) * low <= delta.min() <= delta.max() <= (1 + 1e-3) * high
            assert np.abs(ridge - np.diag(delta)).max() <= 1e-3 * low


@pytest.mark.parametrize("name", METHODS)
def test_relative_damping(name: str) -> None:
    matrix = np.diag([4.0, 1.0, 0.0]).astype(np.float32)
    found = _solve(METHODS[name], matrix, 2, eps_rel=0.25)
    wanted = np.diag(np.array([5.0, 2.0, 1.0]) ** -0.5)
    assert _error(found.root, wanted) <= 1e-5


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("double", [True, False])
def test_pseudo_inverse(p: int, double: bool) -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(6, 3))
    matrix = (x @ x.T).astype(np.float32)
    cut = roots.PseudoInverse(rank_rtol=None)
    found = _solve(roots.Eigh(double, pseudo_inverse=cut), matrix, p)
    inverse = np.linalg.pinv(matrix.astype(np.float64), rcond=1e-5, hermitian=True)
    w, v = np.linalg.eigh(inverse)
    wanted = (v * np.maximum(w, 0.0) ** (1.0 / p)) @ v.T
    assert _error(found.root, wanted) <= (1e-5 if double else 1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_pseudo_inverse_cut_offs(scale: float) -> None:
    matrix = (np.diag([1.0, 0.1, 1e-3]) * scale).astype(np.float32)
    for cut, kept in [
        (roots.PseudoInverse(rank_rtol=1e-2), 2),
        (roots.PseudoInverse(rank_rtol=0.5), 1),
        (roots.PseudoInverse(rank_rtol=0.0, rank_atol=0.05 * scale), 2),
        (roots.PseudoInverse(rank_rtol=0.5, rank_atol=0.05 * scale), 1),
        (roots.PseudoInverse(), 3),
    ]:
        root = np.asarray(_solve(roots.Eigh(pseudo_inverse=cut), matrix, 1).root)
        diagonal = 1.0 / np.diag(matrix.astype(np.float64))
        diagonal[kept:] = 0.0
        np.testing.assert_allclose(np.diag(root), diagonal, rtol=1e-6)


def test_shift_and_clip_of_a_negative_eigenvalue() -> None:
    matrix = np.diag([2.0, -0.5]).astype(np.float32)
    clipped = _solve(roots.Eigh(), matrix, 1, eps=0.5)
    shifted = _solve(roots.Eigh(shift=True), matrix, 1, eps=0.5)
    np.testing.assert_allclose(np.diag(clipped.root), [1 / 2.5, 1 / 0.5], rtol=1e-6)
    np.testing.assert_allclose(np.diag(shifted.root), [1 / 3.0, 1 / 0.5], rtol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_a_zero_matrix_has_a_root_with_absolute_damping_only(name: str) -> None:
    zero = np.zeros((3, 3), np.float32)
    assert not bool(_solve(METHODS[name], zero, 2, eps=1e-30, eps_rel=1e-6).accepted)
    found = _solve(METHODS[name], zero, 2, eps=1e-4)
    assert bool(found.accepted)
    np.testing.assert_allclose(found.root, 100.0 * np.eye(3), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_a_stack_gives_what_its_matrices_give(name: str) -> None:
    """Also beside neighbours that are not finite, zero, or converge later."""
    stack = [_spd(4, 10.0**k, k) * np.float32(10.0**k) for k in range(5)]
    stack += [np.zeros((4, 4), np.float32), np.full((4, 4), np.nan, np.float32)]
    stack.append(np.diag(np.full(4, np.inf, np.float32)))
    together = _solve(METHODS[name], np.stack(stack), 4, eps=1e-30, eps_rel=1e-6)
    assert together.accepted.tolist() == [True] * 5 + [False] * 3
    for i in range(5):
        alone = _solve(METHODS[name], stack[i], 4, eps=1e-30, eps_rel=1e-6)
        assert bool(alone.accepted)
        assert _error(together.root[i], np.asarray(alone.root, np.float64)) <= 1e-6


def test_a_large_residual_is_refused() -> None:
    matrix = _spd(4, 1e4)
    short = roots.CoupledNewton(max_iterations=1, max_residual=1e-3)
    assert not bool(_solve(short, matrix, 4).accepted)
    assert bool(_solve(roots.CoupledNewton(), matrix, 4).accepted)
