"""Minimax roots: the table's guarantee, fresh spectra, real factors, and Auto.

The oracle is float64 ``eigh`` of the float32 matrix as given, with its own largest
eigenvalue, and without clipping what rounding made negative: no iteration can.
*Root error*: Frobenius, relative. *Direction error*: of the root applied to gradients
``G`` with ``E[G G^T] = A``, Frobenius, relative; it bounds the angle. *Floor*: both, of
the exact root after one change of basis in float32, there and back. It is near ``6e-8
condition / 10`` and grows with the size; where it is above the bar, it is the bar.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_optax as so
from shampoo_optax.linalg import roots
from shampoo_optax.linalg.minimax_table import TABLE, Row
from shampoo_optax.linalg.scaling import Damping
from shampoo_optax.linalg.spectrum import spectrum

ROOTS = list(TABLE)


def _matrix(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    matrix = (q * values) @ q.T
    return (0.5 * (matrix + matrix.T)).astype(np.float32)


def _half_zero(size: int, rng: np.random.Generator) -> np.ndarray:
    matrix = np.zeros((size, size), np.float32)
    half = size // 2
    matrix[:half, :half] = _matrix(10 ** rng.uniform(-4, 0, half), rng)
    return matrix


SPECTRA: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "log-uniform": lambda n, rng: _matrix(10 ** rng.uniform(-9, 0, n), rng),
    "clustered": lambda n, rng: _matrix(np.repeat([1.0, 1e-7], n // 2), rng),
    "rank 7": lambda n, rng: _matrix(
        np.r_[np.zeros(n - 7), rng.uniform(0.1, 1, 7)], rng
    ),
    "rank 1": lambda n, rng: _matrix(np.r_[np.zeros(n - 1), 1.0], rng),
    "flat": lambda n, rng: _matrix(np.ones(n), rng),
    "power law": lambda n, rng: _matrix(np.arange(1, n + 1) ** -2.0, rng),
    "half-zero diagonal": _half_zero,
    "tiny": lambda n, rng: _matrix(10 ** rng.uniform(-9, 0, n) * 1e-30, rng),
    "huge": lambda n, rng: _matrix(10 ** rng.uniform(-9, 0, n) * 1e30, rng),
}


class Errors(NamedTuple):
    root: float
    direction: float


SINGLE = roots.Minimax(double_first_step=False)  # as on a TPU
BARS = Errors(root=5e-3, direction=1e-3)


def _eigh(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.linalg.eigh(np.asarray(matrix, np.float64))


def _exact(matrix: np.ndarray, p: int, eps_rel: float) -> np.ndarray:
    w, v = _eigh(matrix)
    return (v * (w + eps_rel * w[-1]) ** (-1 / p)) @ v.T


@functools.partial(jax.jit, static_argnums=(0, 2))
def _solve(method: Any, matrices: Any, p: float, eps_rel: Any, eps: Any = 0.0) -> Any:
    return roots.inverse_root(method, matrices, p, eps=eps, eps_rel=eps_rel)


def _errors(found: Any, matrix: np.ndarray, p: int, eps_rel: float) -> Errors:
    w, v = _eigh(matrix)
    normal = np.random.default_rng(7).normal(size=matrix.shape)
    gradients = (v * np.sqrt(np.maximum(w / w[-1], 0.0))) @ normal
    wanted = _exact(matrix, p, eps_rel)
    off = np.asarray(found, np.float64) - wanted
    pairs = (off, wanted), (off @ gradients, wanted @ gradients)
    return Errors(*(float(np.linalg.norm(x) / np.linalg.norm(y)) for x, y in pairs))


def _floor(matrix: np.ndarray, p: int, eps_rel: float) -> Errors:
    rng, scale = np.random.default_rng(5), np.abs(matrix).max()
    q, _ = np.linalg.qr(rng.normal(size=matrix.shape))
    q, scaled = q.astype(np.float32), matrix / scale
    # In one go: the basis is not orthogonal but to rounding, which goes out of it.
    there = q.T @ scaled @ q
    back = np.linalg.inv(q.astype(np.float64)).astype(np.float32)
    turned = back.T @ there @ back
    return _errors(
        _exact(0.5 * (turned + turned.T) * scale, p, eps_rel), matrix, p, eps_rel
    )


def _check(method: Any, matrix: np.ndarray, p: int, eps_rel: float, why: Any) -> Errors:
    """Both errors are within the bars, or the floor."""
    found = _solve(method, jnp.asarray(matrix), p, eps_rel)
    assert bool(found.accepted), why
    np.testing.assert_array_equal(found.root, found.root.T)
    errors = _errors(found.root, matrix, p, eps_rel)
    floor = _floor(matrix, p, eps_rel)
    for error, bar, least in zip(errors, BARS, floor, strict=True):
        assert error <= max(bar, least), (why, errors, floor)
    return errors


# --- the table ---------------------------------------------------------------------

ROWS = [(p, decade) for p, rows in TABLE.items() for decade in rows]


def _run(row: Row, t: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    root = np.ones_like(t)
    for a, b, c in row.steps:
        h = a + t * (b + t * c)
        root, t = root * h, h**p * t
    return root, t


@pytest.mark.parametrize(("p", "decade"), ROWS)
def test_the_table_keeps_what_it_guarantees(p: int, decade: int) -> None:
    """On scalars, in float64: more of them and others than the design's."""
    row = TABLE[p][decade]
    rng = np.random.default_rng(p + decade)
    low, high = np.log(row.lowest), np.log(1.02)
    t = np.exp(np.r_[low, high, rng.uniform(low, high, 200_000)])
    root, coupled = _run(row, t, p)
    assert np.abs(coupled - 1).max() <= row.residual
    assert np.abs(t ** (1 / p) * root - 1).max() <= row.error
    assert row.error <= 2.7e-4 and row.residual <= 2e-3
    # float32 holds every coefficient exactly, and less damping takes more steps.
    steps = np.array(row.steps)
    np.testing.assert_array_equal(steps.astype(np.float32), steps.astype("f4"))
    np.testing.assert_allclose(steps.astype(np.float32), steps, rtol=1e-8)
    assert row.lowest <= 10.0**-decade / 2.5
    assert decade == 2 or len(row.steps) >= len(TABLE[p][decade - 1].steps)


@pytest.mark.parametrize("p", ROOTS)
def test_the_generator_makes_the_table(p: int) -> None:
    pytest.importorskip("scipy")
    from tools import minimax_coefficients as tool

    row = TABLE[p][4]
    steps, residual, error = tool.row(p, row.lowest)
    np.testing.assert_allclose(steps, row.steps, rtol=1e-3)
    assert residual <= row.residual and error <= row.error


# --- cost --------------------------------------------------------------------------


def _products(jaxpr: Any, size: int) -> int:
    """Products of whole matrices, those in loops as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        shapes = [tuple(v.aval.shape)[-2:] for v in equation.invars]
        if equation.primitive.name == "dot_general":
            total += shapes == [(size, size)] * 2
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", None)
            if inner is not None:
                turns = equation.params.get("length", 1)
                total += turns * _products(inner, size)
    return total


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("p", "decade"), ROWS)
def test_products_are_as_many_as_said(p: int, decade: int, double: bool) -> None:
    method = roots.Minimax(10.0**-decade, double_first_step=double)
    matrices = jax.ShapeDtypeStruct((2, 16, 16), jnp.float32)
    jaxpr = jax.make_jaxpr(lambda x: _solve(method, x, p, 1e-3))(matrices)
    assert _products(jaxpr.jaxpr, 16) == method.matmuls(p)


def test_fewer_than_thirty_products() -> None:
    assert roots.Minimax(smallest_eps_rel=1e-6).matmuls(4) == 27


# --- accuracy ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("kind", SPECTRA)
def test_fresh_spectra(kind: str, size: int) -> None:
    """Flat ones and those with half of it at the damping converge, too."""
    matrix = SPECTRA[kind](size, np.random.default_rng(size))
    for p in ROOTS:
        _check(SINGLE, matrix, p, 1e-6, p)
        errors = _check(roots.Minimax(), matrix, p, 1e-6, p)
        # With two products in float64 the bar holds by itself.
        assert errors.root <= BARS.root, (p, errors)
        assert p == 2 or errors.direction <= BARS.direction, (p, errors)


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("decade", TABLE[4])
def test_every_damping_has_its_steps(decade: int, p: int) -> None:
    eps_rel = 10.0**-decade
    for kind, make in SPECTRA.items():
        matrix = make(64, np.random.default_rng(decade))
        _check(replace(SINGLE, smallest_eps_rel=eps_rel), matrix, p, eps_rel, kind)


@pytest.mark.parametrize("decade", [2, 4, 6])
def test_more_damping_than_the_smallest_converges(decade: int) -> None:
    for kind in ("log-uniform", "clustered", "flat"):
        matrix = SPECTRA[kind](32, np.random.default_rng(0))
        _check(SINGLE, matrix, 4, 10.0**-decade, kind)


def test_absolute_damping_is_in_the_matrix_own_units() -> None:
    matrix = SPECTRA["rank 7"](32, np.random.default_rng(0)) * np.float32(1e-8)
    found = _solve(roots.Minimax(), jnp.asarray(matrix), 4, 0.0, 1e-12)
    w, v = _eigh(matrix)
    wanted = (v * (w + 1e-12) ** -0.25) @ v.T
    error = np.linalg.norm(found.root - wanted) / np.linalg.norm(wanted)
    assert bool(found.accepted) and error <= BARS.root


@pytest.mark.parametrize("kind", SPECTRA)
def test_bounds_of_the_largest_eigenvalue(kind: str) -> None:
    for size in (1, 2, 7, 64):
        make = SPECTRA[kind]
        if size < 8 and kind not in ("flat", "log-uniform", "power law", "rank 1"):
            continue
        matrix = make(size, np.random.default_rng(size))
        matrix = matrix / np.abs(matrix).max()
        largest = np.linalg.eigvalsh(matrix.astype(np.float64))[-1]
        x = jnp.asarray(matrix)[None]
        found = spectrum(x, x @ x, lambda x: x @ x)
        assert largest <= found.bound[0]
        assert found.bound[0] <= 1.02 * ((1 + size**0.5) / 2) ** 0.25 * largest
        assert 0.98 * largest <= found.estimate[0] <= (1 + 1e-5) * largest


def test_the_estimate_where_many_eigenvalues_are_near_the_largest() -> None:
    """Spectra even in the logarithm, over one to nine decades."""
    short = []
    for seed in range(18):
        rng = np.random.default_rng(seed)
        matrix = _matrix(10 ** rng.uniform(-1 - seed % 9, 0, 256), rng)
        x = jnp.asarray(matrix)[None]
        estimate = float(spectrum(x, x @ x, lambda x: x @ x).estimate[0])
        short.append(1 - estimate / np.linalg.eigvalsh(matrix.astype(np.float64))[-1])
    assert np.median(short) <= 1e-3 and max(short) <= 1e-2, short


# --- factors of models that the generator never saw ---------------------------------


def _mlp(params: Any, x: jax.Array) -> jax.Array:
    return jnp.tanh(jnp.tanh(x @ params["a"]) @ params["b"]) @ params["c"]


def _convnet(params: Any, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 8, 8, 1)
    for name in ("a", "b"):
        x = jax.lax.conv_general_dilated(
            x, params[name], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        x = jax.nn.relu(x)
    return x.mean((1, 2)) @ params["c"]


def _transformer(params: Any, x: jax.Array) -> jax.Array:
    x = x.reshape(-1, 8, 8) @ params["a"]
    q, k, v = jnp.split(x @ params["b"], 3, axis=-1)
    weights = jax.nn.softmax(q @ jnp.swapaxes(k, -2, -1) / 5.0)
    return (x + weights @ v).mean(1) @ params["c"]


MODELS: dict[str, Any] = {
    "mlp": (_mlp, {"a": (64, 48), "b": (48, 48), "c": (48, 10)}),
    "convnet": (_convnet, {"a": (3, 3, 1, 12), "b": (3, 3, 12, 24), "c": (24, 10)}),
    "transformer": (_transformer, {"a": (8, 32), "b": (32, 96), "c": (32, 10)}),
}


def _factors(name: str) -> list[np.ndarray]:
    """Averages of Gram matrices over 40 steps of gradient descent, both sides."""
    apply, shapes = MODELS[name]
    rng = np.random.default_rng(11)
    params = {
        key: jnp.asarray(rng.normal(size=s) / np.prod(s[:-1]) ** 0.5, jnp.float32)
        for key, s in shapes.items()
    }
    # Images with dark borders: inputs of low rank, and some that are always zero.
    basis = rng.normal(size=(6, 64)) * (np.arange(64) % 8 > 0)
    latent = rng.normal(size=(256, 6))
    x = jnp.asarray(latent @ basis + 0.01 * (basis[0] != 0), jnp.float32)
    y = jnp.asarray(np.argmax(latent @ rng.normal(size=(6, 10)), axis=1))

    def loss(params: Any) -> jax.Array:
        logits = jax.nn.log_softmax(apply(params, x))
        return -jnp.take_along_axis(logits, y[:, None], 1).mean()

    gradient, averages = jax.jit(jax.grad(loss)), {}
    for _ in range(40):
        found = gradient(params)
        params = jax.tree.map(lambda p, g: p - 0.2 * g, params, found)
        for key, g in found.items():
            flat = np.asarray(g).reshape(-1, g.shape[-1])
            for side, gram in (("L", flat @ flat.T), ("R", flat.T @ flat)):
                old = averages.get(key + side, np.zeros_like(gram))
                averages[key + side] = np.float32(0.95) * old + np.float32(0.05) * gram
    return list(averages.values())


@pytest.mark.parametrize("name", MODELS)
def test_factors_of_models(name: str) -> None:
    for matrix in _factors(name):
        for p in (2, 4):
            _check(SINGLE, matrix, p, 1e-6, (matrix.shape, p))
        errors = _check(roots.Minimax(), matrix, 4, 1e-6, matrix.shape)
        assert errors.root <= BARS.root, (matrix.shape, errors)
        assert errors.direction <= BARS.direction, (matrix.shape, errors)


# --- what may be used, and what not --------------------------------------------------


def test_a_mixed_stack_gives_what_its_matrices_give() -> None:
    rng = np.random.default_rng(0)
    stack = [make(16, rng) for make in SPECTRA.values()]
    good = len(stack)
    stack += [np.zeros((16, 16), np.float32), np.full((16, 16), np.nan, np.float32)]
    stack += [np.diag(np.r_[np.inf, np.ones(15)]).astype(np.float32)]
    x = jnp.asarray(np.stack(stack))
    together = _solve(roots.Minimax(), x, 4, 1e-6, 1e-38)
    assert together.accepted.tolist() == [True] * good + [False] * 3
    mapped = jax.vmap(lambda a: _solve(roots.Minimax(), a, 4, 1e-6, 1e-38))(x)
    assert mapped.accepted.tolist() == together.accepted.tolist()
    for i in range(good):
        alone = _solve(roots.Minimax(), x[i], 4, 1e-6, 1e-38)
        assert bool(alone.accepted)
        scale = np.abs(alone.root).max()
        for other in (together.root[i], mapped.root[i]):
            # Other kernels round otherwise, by no more than the floor.
            assert np.abs(other - alone.root).max() <= 5e-3 * scale


def test_a_zero_matrix_has_a_root_with_absolute_damping_only() -> None:
    zero = jnp.zeros((3, 3))
    assert not bool(_solve(roots.Minimax(), zero, 2, 1e-6, 1e-30).accepted)
    found = _solve(roots.Minimax(), zero, 2, 0.0, 1e-4)
    assert bool(found.accepted)
    np.testing.assert_allclose(found.root, 100.0 * np.eye(3), rtol=1e-3)


def test_far_less_damping_than_the_smallest_is_refused() -> None:
    matrix = jnp.asarray(SPECTRA["rank 1"](32, np.random.default_rng(0)))
    found = _solve(roots.Minimax(1e-2), matrix, 4, 1e-7)
    assert not bool(found.accepted)
    # And a clearly negative eigenvalue: it is no statistic.
    matrix = jnp.asarray(_matrix(np.r_[-0.5, np.ones(7)], np.random.default_rng(0)))
    assert not bool(_solve(roots.Minimax(), matrix, 4, 1e-6).accepted)


@pytest.mark.parametrize("p", [1, 3, 8 / 3, 16])
def test_other_roots_are_refused(p: float) -> None:
    with pytest.raises(
        ValueError, match=r"roots\.Minimax has steps .* use roots\.Auto"
    ):
        roots.inverse_root(roots.Minimax(), jnp.eye(2), p)


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match=r"smallest_eps_rel=1e-08.*roots\.Eigh"):
        roots.Minimax(smallest_eps_rel=1e-8)
    with pytest.raises(ValueError, match=r"precision='bf16'.*'bf16x3'"):
        roots.Minimax(precision="bf16")


@pytest.mark.parametrize("precision", ["bf16x3", "bf16x6", "tf32x3"])
def test_precisions_are_float32_on_a_cpu(precision: str) -> None:
    x = jnp.asarray(SPECTRA["power law"](16, np.random.default_rng(0)))
    cheap, full = (
        _solve(roots.Minimax(precision=name), x, 4, 1e-4).root
        for name in (precision, "highest")
    )
    np.testing.assert_array_equal(cheap, full)
    program = _lowered(roots.Minimax(precision=precision), 4, "cuda")
    assert program.count("algorithm = <lhs_precision_type") > 5


# --- Auto ----------------------------------------------------------------------------


def _lowered(method: Any, p: float, platform: str) -> str:
    matrices = jax.ShapeDtypeStruct((3, 16, 16), jnp.float32)
    traced = _solve.trace(method, matrices, p, 1e-6)
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("p", [1, 2, 8 / 3, 4])
def test_auto_is_eigh_bitwise_on_a_cpu(p: float) -> None:
    rng = np.random.default_rng(0)
    stack = np.stack([make(16, rng) for make in SPECTRA.values()])
    stack[-1] = np.nan
    auto, eigh = (_solve(m, stack, p, 1e-6) for m in (roots.Auto(), roots.Eigh()))
    np.testing.assert_array_equal(auto.accepted, eigh.accepted)
    np.testing.assert_array_equal(auto.root, eigh.root)


def test_auto_keeps_one_method_in_a_program() -> None:
    """The platform's that it is lowered for, in not much more text than alone."""
    auto = roots.Auto()
    for platform in ("cpu", "cuda", "tpu"):
        method = auto.cpu if platform == "cpu" else auto.accelerator
        text, alone = _lowered(auto, 4, platform), _lowered(method, 4, platform)
        assert text.count("dot_general") == alone.count("dot_general")
        assert text.lower().count("eigh") == alone.lower().count("eigh")
        assert len(text) <= len(alone) + 2500
        assert ("eigh" in _lowered(auto, 3, platform).lower()) or platform == "cpu"
    assert "f64" in _lowered(auto, 4, "cuda") and "f64" not in _lowered(auto, 4, "tpu")


def test_auto_gates_with_each_methods_own_bound() -> None:
    """Residuals come in units of what their method allows."""
    strict = roots.Auto(cpu=roots.CoupledNewton(max_iterations=1, max_residual=1e-3))
    matrix = jnp.asarray(SPECTRA["power law"](8, np.random.default_rng(0)))
    assert not bool(_solve(strict, matrix, 4, 1e-6).accepted)
    loose = roots.Auto(cpu=roots.CoupledNewton(max_iterations=1, max_residual=2.0))
    assert bool(_solve(loose, matrix, 4, 1e-6).accepted)


@pytest.mark.parametrize("alias", [so.shampoo, so.kl_shampoo])
def test_defaults_are_those_of_eigh_bitwise(alias: Any) -> None:
    params = {"w": jnp.eye(6)[:, :4]}
    layout = so.BlockLayout(4, one_sided_above=np.inf)
    results = []
    for root in ({}, {"root": roots.Eigh()}):
        tx = alias(0.1, layout=layout, refresh=so.Refresh(2), **root)
        state, step = tx.init(params), jax.jit(tx.update)
        for i in range(4):
            g = {"w": jax.random.normal(jax.random.key(i), (6, 4))}
            updates, state = step(g, state, params)
        results.append((updates, state))
    jax.tree.map(np.testing.assert_array_equal, *results)


def test_damping_is_shared_with_the_other_methods() -> None:
    """The ridge, read back from the root: ``X**-p - A`` is ``delta I``."""
    matrix = SPECTRA["power law"](32, np.random.default_rng(0))
    x = jnp.asarray(matrix)[None]
    for absolute, wanted in [(1e-9, 0.01), (0.5, 0.5)]:
        damping = Damping(jnp.full([1], absolute), jnp.float32(0.01))
        found = roots.Minimax().solve(x, damping, 2, unit=jnp.ones([1]))
        w, _ = _eigh(np.linalg.matrix_power(np.float64(found.root[0]), 2))
        ridge = 1 / w[-1] - np.linalg.eigvalsh(matrix.astype(np.float64))[0]
        assert abs(ridge / wanted - 1) <= 2e-2
