"""Eigenbases: what each method finds, and what it calls on which platform."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_optax as so


def _spd(n: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    q, _ = np.linalg.qr(rng.normal(size=(n, n)))
    return (q * np.geomspace(1.0, 1e-3, n)) @ q.T


BASES = {
    "eigh": so.bases.Eigh(),
    "qr": so.bases.QR(max_iterations=60),
    "cholesky": so.bases.CholeskyQR2(cold_iterations=60),
    "jacobi": so.bases.Jacobi(),
    "auto": so.bases.Auto(),
}


@pytest.mark.parametrize("name", BASES)
def test_bases_diagonalise(name: str) -> None:
    matrices = np.stack([_spd(8, s) * 10.0 ** (4 * s) for s in range(3)])
    eye = jnp.broadcast_to(jnp.eye(8), (3, 8, 8))
    a = jnp.asarray(matrices, jnp.float32)
    found = so.bases.new_basis(BASES[name], a, eye)
    assert found.accepted.all() and not found.null.any()
    for q, matrix in zip(np.asarray(found.vectors, float), matrices, strict=True):
        np.testing.assert_allclose(q.T @ q, np.eye(8), atol=5e-6)
        rotated = q.T @ matrix @ q
        off = rotated - np.diag(np.diag(rotated))
        assert np.linalg.norm(off) <= 1e-5 * np.linalg.norm(rotated)
        values = np.sort(np.diag(rotated))
        wanted = np.linalg.eigvalsh(matrix)
        np.testing.assert_allclose(values, wanted, rtol=1e-2)


def _solvers(method: so.bases.BasisMethod, size: int, platform: str) -> set[str]:
    """What a program calls to decompose, on a platform that need not be there."""
    traced = jax.jit(lambda x: method.solve(x, x)).trace(jnp.ones((2, size, size)))
    program = traced.lower(lowering_platforms=(platform,)).as_text()
    found = r"stablehlo\.cholesky|custom_call @.*?\}|custom_call @Eigh.*?\".*?\""
    return {re.sub(r"\(.*?\)", "", call) for call in re.findall(found, program)}


def test_auto_chooses_by_platform_and_size() -> None:
    methods = so.bases
    for size, platform, method in (
        (8, "cpu", methods.Eigh()),
        (8, "cuda", methods.Eigh()),
        (8, "tpu", methods.Jacobi()),
        (256, "tpu", methods.Jacobi()),
        (257, "tpu", methods.CholeskyQR2()),
        (512, "cpu", methods.Eigh()),
    ):
        own = _solvers(method, size, platform)
        assert own and _solvers(methods.Auto(), size, platform) == own
    chosen = methods.Auto(cpu=methods.CholeskyQR2())
    assert _solvers(chosen, 8, "cpu") == _solvers(methods.CholeskyQR2(), 8, "cpu")
    assert _solvers(chosen, 8, "cpu") != _solvers(methods.Auto(), 8, "cpu")


def test_jacobi_rotates_where_there_are_rotations() -> None:
    method = so.bases.Jacobi()
    (tpu,), (cuda,), (cpu,) = (
        _solvers(method, 8, platform) for platform in ("tpu", "cuda", "cpu")
    )
    assert "@Eigh" in tpu  # the TPU's call is Jacobi's
    assert "algorithm = 2" in cuda and "ssyevd" in cpu  # cuSOLVER's third, LAPACK's


@pytest.mark.parametrize("name", ["qr", "cholesky"])
def test_one_warm_step_comes_nearer(name: str) -> None:
    method = {"qr": so.bases.QR(), "cholesky": so.bases.CholeskyQR2()}[name]
    rng = np.random.default_rng(1)
    a = _spd(8, 0)
    start = np.linalg.eigh(a)[1][:, ::-1]
    moved = a + 0.02 * np.diag(rng.uniform(size=8))
    before = start.T @ moved @ start
    moved, start = (jnp.asarray(x, jnp.float32)[None] for x in (moved, start.copy()))
    found = so.bases.new_basis(method, moved, start)
    q = np.asarray(found.vectors[0], float)
    after = q.T @ np.asarray(moved[0], float) @ q

    def off(x: np.ndarray) -> float:
        return float(np.linalg.norm(x - np.diag(np.diag(x))))

    assert off(after) < 0.7 * off(before)


@pytest.mark.parametrize("name", BASES)
def test_a_basis_that_fails_is_kept(name: str) -> None:
    bad = [np.full((4, 4), np.nan), np.zeros((4, 4)), np.diag([1.0, np.inf, 1, 1])]
    stack = jnp.asarray(np.stack([*bad, _spd(4, 0)]), jnp.float32)
    old, _ = np.linalg.qr(np.random.default_rng(2).normal(size=(4, 4)))
    old = jnp.broadcast_to(jnp.asarray(old, jnp.float32), (4, 4, 4))
    found = so.bases.new_basis(BASES[name], stack, old)
    assert found.accepted.tolist() == [False] * 3 + [True]
    np.testing.assert_array_equal(found.vectors[:3], old[:3])
    assert np.isfinite(found.vectors).all() and not found.null[:3].any()


def test_an_adaptive_basis_is_kept_block_by_block() -> None:
    a = jnp.asarray(np.stack([_spd(5, 0), _spd(5, 1)]), jnp.float32)
    own = jnp.stack([jnp.linalg.eigh(a[0])[1][:, ::-1], jnp.eye(5)])
    found = so.bases.new_basis(so.bases.Eigh(tolerance=0.05), a, own)
    np.testing.assert_array_equal(found.vectors[0], own[0])  # still diagonal: kept
    exact = np.asarray(jnp.linalg.eigh(a[1])[1])
    overlap = np.abs(exact.T @ np.asarray(found.vectors[1]))
    np.testing.assert_allclose(overlap, np.eye(5), atol=1e-3)


SPECTRA = {
    "six decades": np.geomspace(1.0, 1e-6, 64),
    "rank 16": np.r_[np.geomspace(1.0, 1e-2, 16), np.zeros(48)],
    "rank 1": np.r_[1.0, np.zeros(63)],
    "half": np.repeat([1.0, 1e-7], 32),
    "flat": np.ones(64),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_orthogonal_iteration_from_the_identity(kind: str) -> None:
    basis, _ = np.linalg.qr(np.random.default_rng(3).normal(size=(64, 64)))
    a = jnp.asarray((basis * SPECTRA[kind]) @ basis.T, jnp.float32)[None]
    solve = jax.jit(
        lambda q: so.bases.new_basis(so.bases.CholeskyQR2(cold_iterations=40), a, q)
    )
    found = solve(jnp.eye(64)[None])
    q = np.asarray(found.vectors[0], float)
    np.testing.assert_allclose(q.T @ q, np.eye(64), atol=5e-6)
    rotated = q.T @ np.asarray(a[0], float) @ q
    off = rotated - np.diag(np.diag(rotated))
    assert np.linalg.norm(off) <= 1e-3 * np.linalg.norm(rotated)


def test_orthogonal_iteration_equals_householder() -> None:
    """Step by step from the identity, six decades: both as QR factorisations say."""
    a = _spd(16, 5)
    q, wanted = jnp.eye(16)[None], np.eye(16)
    for _ in range(6):
        method = so.bases.CholeskyQR2(cold_iterations=1)
        q = so.bases.new_basis(method, jnp.asarray(a, jnp.float32)[None], q).vectors
        wanted, r = np.linalg.qr(a @ wanted)
        wanted *= np.sign(np.diag(r))
        np.testing.assert_allclose(q[0], wanted, atol=2e-3)


def test_a_dead_slot_makes_no_stack_begin_anew() -> None:
    a = jnp.asarray(_spd(8, 0), jnp.float32)[None]
    old = jnp.linalg.eigh(jnp.asarray(_spd(8, 1), jnp.float32))[1][None]
    method = so.bases.CholeskyQR2()
    alone = so.bases.new_basis(method, a, old).vectors
    dead = jnp.concatenate([a, jnp.zeros_like(a)])
    both = so.bases.new_basis(method, dead, jnp.concatenate([old, jnp.eye(8)[None]]))
    np.testing.assert_allclose(both.vectors[0], alone[0], atol=1e-5)  # one step
    ten = so.bases.new_basis(so.bases.CholeskyQR2(iterations=10), a, old).vectors
    assert np.abs(ten - alone).max() > 0.1
    np.testing.assert_array_equal(both.vectors[1], jnp.eye(8))
