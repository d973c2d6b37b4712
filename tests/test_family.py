"""SOAP, KL-Shampoo, spectral descent and the averages: laws and NumPy."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from tests import helpers

ALWAYS, NEVER = so.Refresh(1), so.Refresh(3, math.inf)
VECTORS = so.BlockLayout(4, precondition_vectors=True)
ALIASES = {
    "shampoo": so.shampoo,
    "kl_shampoo": so.kl_shampoo,
    "soap": so.soap,
    "spectral_descent": so.spectral_descent,
}


@pytest.mark.parametrize("how", ["never", "ignored"])
def test_soap_in_the_identity_basis_is_adam(how: str) -> None:
    options: dict[str, Any] = {"refresh": NEVER}
    if how == "ignored":
        options = {"refresh": ALWAYS, "ignored_dims": {1: [0], 2: [0, 1]}}
    direction = so.eigenbasis(0.95, 1e-3, **options)
    ours = so.blockwise(so.filter_gradient(direction, 0.8), VECTORS)
    params = helpers.parameters()
    found, _ = helpers.run(ours, params, 6)
    wanted, _ = helpers.run(optax.scale_by_adam(0.8, 0.95, 1e-3), params, 6)
    helpers.assert_close(found, wanted, rtol=2e-5, atol=1e-6)


def test_soap_moves_its_second_moment_at_every_step() -> None:
    """Between refreshes too; a moment that waits for the next one is frozen."""
    b2 = 0.9
    with jax.enable_x64(True):
        like = jnp.zeros((4, 3))
        tx = so.blockwise(so.eigenbasis(b2, refresh=so.Refresh(4)))
        state, nu, frozen = tx.init(like), np.zeros((4, 3)), np.zeros((4, 3))
        for t in range(1, 9):
            g = helpers.gradients(like, t)
            _, state = helpers.jit(tx.update)(g, state)
            left, right = (state.blocks.bases["4x3"][d][0] for d in "01")
            sample = (1 - b2) * np.asarray(left.T @ g @ right) ** 2
            nu = b2 * nu + sample
            if t % 4 == 0:
                frozen = b2 * frozen + sample
            found = np.asarray(state.blocks.nu["4x3"][0])
            np.testing.assert_allclose(found, nu, rtol=1e-12)
        assert np.abs(found - frozen).max() > 0.05


def _perturbed(null_space: Any, size: float) -> np.ndarray:
    """The fifth update of a vector of 48 whose factor has seen four gradients."""
    tx = so.blockwise(
        so.eigenbasis(0.9, refresh=so.Refresh(4), null_space=null_space),
        so.BlockLayout(precondition_vectors=True),
    )
    like = jnp.zeros(48)
    state, update = tx.init(like), helpers.jit(tx.update)
    for t in range(5):
        g = helpers.gradients(like, t)
        noise = helpers.gradients(like, 100 + t)
        u, state = update(g * (1 + size * noise), state)
    return np.asarray(u)


def test_a_null_space_does_not_magnify_rounding() -> None:
    with jax.enable_x64(True):
        for null_space in ("share", "drop"):
            moved = _perturbed(null_space, 1e-14) - _perturbed(null_space, 0.0)
            assert np.abs(moved).max() < 1e-9, null_space
        # Where rounding chooses the basis, it chooses the update.
        moved = _perturbed("plain", 1e-14) - _perturbed("plain", 0.0)
        assert np.abs(moved).max() > 1e-2


def _soap(**options: Any) -> Any:
    return so.blockwise(so.eigenbasis(refresh=ALWAYS, **options))


def test_soap_is_linear_and_descends() -> None:
    with jax.enable_x64(True):
        like = {"a": jnp.zeros((6, 4)), "b": jnp.zeros((4, 5))}
        tx = _soap()
        state, update = tx.init(like), helpers.jit(tx.update)
        for t in range(3):
            _, state = update(helpers.gradients(like, t), state)
        raw, u, v = (helpers.gradients(like, t) for t in (10, 11, 12))
        mixed = jax.tree.map(lambda x, y: 2 * x - 3 * y, u, v)
        pu, pv, pm = (update(x, state, raw_gradient=raw)[0] for x in (u, v, mixed))
        wanted = jax.tree.map(lambda x, y: 2 * x - 3 * y, pu, pv)
        helpers.assert_close(pm, wanted, rtol=1e-9, atol=1e-9)
        for name in like:
            assert float(jnp.vdot(u[name], pu[name])) > 0


@pytest.mark.parametrize("name", ["soap", "kl", "spectral"])
def test_orthogonal_equivariance(name: str) -> None:
    """``P(U G V) = U P(G) V``, with factors of full rank and without."""
    parts = {
        # In the basis of one gradient all but a diagonal is rounding, over eps.
        "soap": so.eigenbasis(eps=1e-4, refresh=ALWAYS),
        "kl": so.kronecker(eps=1e-3, eps_rel=0.0, refresh=ALWAYS, correction="kl"),
        "spectral": so.spectral(),
    }
    with jax.enable_x64(True):
        tx = so.blockwise(parts[name])
        rng = np.random.default_rng(5)
        left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (6, 4))
        like = jnp.zeros((6, 4))
        states, update = [tx.init(like)] * 2, helpers.jit(tx.update)
        for t in range(4):
            g = helpers.gradients(like, t)
            plain, states[0] = update(g, states[0])
            turned, states[1] = update(left @ g @ right, states[1])
            helpers.assert_close(turned, left @ plain @ right, rtol=0, atol=1e-8)


def test_kl_by_hand() -> None:
    b2, eps = 0.9, 1e-3

    def power(a: np.ndarray) -> np.ndarray:
        w, v = np.linalg.eigh(a + eps * np.eye(len(a)))
        return v * w**-0.5 @ v.T

    with jax.enable_x64(True):
        like = jnp.zeros((5, 3))
        direction = so.kronecker(b2, eps, 0.0, refresh=ALWAYS, correction="kl")
        tx = so.blockwise(direction)
        state = tx.init(like)
        a, b, left, right = np.zeros((5, 5)), np.zeros((3, 3)), np.eye(5), np.eye(3)
        for t in range(1, 5):
            g = np.asarray(helpers.gradients(like, t))
            seen = (g @ right) @ (g @ right).T / 3, (left @ g).T @ (left @ g) / 5
            a, b = (b2 * x + (1 - b2) * s for x, s in zip((a, b), seen, strict=True))
            left, right = (power(x / (1 - b2**t)) for x in (a, b))
            found, state = tx.update(jnp.asarray(g), state)
            np.testing.assert_allclose(found, left @ g @ right, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
def test_orthogonal_factors(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    a = jnp.asarray((u * np.geomspace(1, 0.02, min(shape))) @ vt, jnp.float32)[None]
    for scale in (1e-30, 1.0, 1e30):
        a_scaled = a * jnp.float32(scale)
        for method in (so.orthogonal.SVD(), so.orthogonal.PolarExpress()):
            np.testing.assert_allclose(method.solve(a_scaled)[0], u @ vt, atol=1e-3)
        # No absolute floor here: the least gradient has a direction, too.
        near = so.orthogonal.NewtonSchulz(eps=1e-37).solve(a_scaled)[0]
        values = np.linalg.svd(np.asarray(near), compute_uv=False)
        assert values.min() > 0.6 and values.max() < 1.25
    nuclear = so.orthogonal.SVD(scale_by_nuclear_norm=True).solve(a)[0]
    total = np.geomspace(1, 0.02, min(shape)).sum()
    np.testing.assert_allclose(nuclear, total * u @ vt, atol=1e-4)


def test_spectral_descent_is_optax_muon() -> None:
    kernel = jnp.zeros((4, 6))
    aspect = so.orthogonal.AspectRatio()
    ours = so.scale_by_spectral_descent(0.95, b3=0.95, scale=aspect)
    shape = optax.contrib.MuonDimensionNumbers()
    muon = optax.contrib.scale_by_muon(
        beta=0.95, nesterov=False, weight_dimension_numbers=shape
    )
    (found, _), (wanted, _) = (helpers.run(t, kernel, 4) for t in (ours, muon))
    # There the factor of the shape is in the chain around it.
    scaled = [(6 / 4) ** 0.5 * u for u in wanted]
    helpers.assert_close(found, scaled, rtol=1e-4, atol=1e-5)


def test_primal_averaging_is_heavy_ball() -> None:
    beta, rate = 0.7, 0.1
    params = helpers.parameters()
    ours = so.primal_averaging(optax.sgd(rate / (1 - beta)), beta, 1.0)
    theirs = optax.chain(optax.trace(beta), optax.scale(-rate))
    (found, state), (wanted, _) = (helpers.run(t, params, 6) for t in (ours, theirs))
    # The two differ in where a run begins: the first step counts once in both.
    helpers.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    helpers.assert_equal(so.eval_params(state, params), params)  # x = y


def test_schedule_free_is_optax_at_a_constant_rate() -> None:
    params = helpers.parameters()
    ours = so.schedule_free(optax.sgd(0.1), 0.1, 0.9)
    theirs = optax.contrib.schedule_free(optax.sgd(0.1), 0.1, b1=0.9)
    (found, state), (wanted, other) = (
        helpers.run(t, params, 5) for t in (ours, theirs)
    )
    helpers.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    at = params
    for updates in found:
        at = optax.apply_updates(at, updates)
    shown = optax.contrib.schedule_free_eval_params(other, at)
    helpers.assert_close(so.eval_params(state, at), shown, rtol=1e-4, atol=1e-5)


def test_eval_params_wants_one_average() -> None:
    params = jnp.ones(2)
    with pytest.raises(ValueError, match="holds 0 averages"):
        so.eval_params(optax.sgd(0.1).init(params), params)


def _least_squares(name: str, dtype: Any) -> float:
    """The loss after 200 steps on a regression with noise, parameters in ``dtype``."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(48, 8)) * np.geomspace(1, 3, 8)
    y = x @ rng.normal(size=(8, 6)) + rng.normal(size=(48, 6))
    x, y = (jnp.asarray(v, jnp.float32) for v in (x, y))

    def loss(w: jax.Array) -> jax.Array:
        return jnp.mean((x @ w.astype(jnp.float32) - y) ** 2)

    rate = optax.cosine_decay_schedule(0.1, 200)
    tx = ALIASES[name](rate, weight_decay=None)
    w = jnp.zeros((8, 6), dtype)
    state = tx.init(w)
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        if "factors" in jax.tree_util.keystr(path):
            assert leaf.dtype == jnp.float32

    def step(carry: Any, _: None) -> tuple[Any, None]:
        w, state = carry
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        assert updates.dtype == dtype
        return (optax.apply_updates(w, updates), state), None

    (w, _), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, 200))((w, state))
    assert w.dtype == dtype
    return float(loss(w))


@pytest.mark.parametrize("name", ALIASES)
def test_bfloat16_reaches_the_float32_loss(name: str) -> None:
    full, half = (_least_squares(name, dtype) for dtype in (jnp.float32, jnp.bfloat16))
    assert full < 1.2  # near the noise, from about 200
    assert abs(half - full) <= 0.01 * full
