"""Laws of the preconditioner ``P``: each holds for every input."""

from __future__ import annotations

import functools
from typing import Any

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import shampoo_optax as so
from shampoo_optax.layout.split import split
from tests import helpers

ALWAYS = so.Refresh(1)
SHAPES = {"matrix": (6, 4), "kernel": (3, 2, 4), "vector": (5,)}
# The last keeps a kernel's three dimensions: factors of order three.
LAYOUTS = {
    "whole": so.BlockLayout(precondition_vectors=True),
    "cut": so.BlockLayout(3, precondition_vectors=True),
    "orders": so.BlockLayout(
        4, target_parameter_dimensionality=4, precondition_vectors=True
    ),
}


def _like(dtype: Any = jnp.float64) -> dict[str, jax.Array]:
    return {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}


def _measured(tx: Any, grads: list[Any]) -> Any:
    """The state after some gradients."""
    state, update = tx.init(grads[0]), jax.jit(tx.update)
    for g in grads:
        _, state = update(g, state)
    return state


def _apply(tx: Any, state: Any, updates: Any, raw: Any) -> Any:
    return jax.jit(tx.update)(updates, state, raw_gradient=raw)[0]


def _inner(x: Any, y: Any) -> float:
    return float(sum(jax.tree.leaves(jax.tree.map(jnp.vdot, x, y))))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize(
    "root", [so.roots.Eigh(), so.roots.CoupledHigherOrder()], ids=["eigh", "coupled"]
)
def test_linear_and_descending(layout: so.BlockLayout, root: Any) -> None:
    with jax.enable_x64(True):
        like = _like()
        tx = so.blockwise(so.kronecker(root=root, refresh=ALWAYS), layout)
        state = _measured(tx, [helpers.gradients(like, i) for i in range(3)])
        raw, u, v = (helpers.gradients(like, i) for i in (10, 11, 12))
        mixed = jax.tree.map(lambda x, y: 2.0 * x - 3.0 * y, u, v)
        pu, pv, pm = (_apply(tx, state, x, raw) for x in (u, v, mixed))
        wanted = jax.tree.map(lambda x, y: 2.0 * x - 3.0 * y, pu, pv)
        helpers.assert_close(pm, wanted, rtol=1e-9, atol=1e-9)
        for name in like:
            assert _inner(u[name], pu[name]) > 0
        # Symmetric: <v, P u> = <u, P v>.
        np.testing.assert_allclose(_inner(v, pu), _inner(u, pv), rtol=1e-9)


@functools.cache
def _descending() -> tuple[Any, Any]:
    """Compiled once for all examples."""
    tx = so.blockwise(so.kronecker(refresh=ALWAYS), LAYOUTS["cut"])
    return tx, jax.jit(tx.update)


@hypothesis.given(st.integers(0, 2**31), st.floats(-30, 30))
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
def test_descends_in_float32(seed: int, exponent: float) -> None:
    tx, update = _descending()
    like = _like(jnp.float32)
    g = helpers.gradients(like, seed, scale=2.0**exponent)
    u = helpers.gradients(like, seed + 1)
    pu, _ = update(u, tx.init(like), raw_gradient=g)
    for name in like:
        assert _inner(u[name], pu[name]) > 0, name


def _rotation(size: int, seed: int) -> jax.Array:
    rng = np.random.default_rng(seed)
    return jnp.asarray(np.linalg.qr(rng.normal(size=(size, size)))[0])


@pytest.mark.parametrize("root", [so.roots.Eigh(), so.roots.CoupledNewton()])
def test_orthogonal_equivariance(root: Any) -> None:
    """``P(U G V) = U P(G) V``: the basis of a whole matrix does not matter."""
    with jax.enable_x64(True):
        # Absolute damping: the estimate of the largest eigenvalue sees the basis.
        tx = so.blockwise(
            so.kronecker(eps=1e-3, eps_rel=0.0, root=root, refresh=ALWAYS)
        )
        left, right = _rotation(6, 1), _rotation(4, 2)
        grads = [helpers.gradients(jnp.zeros((6, 4)), i) for i in range(4)]
        turned = [left @ g @ right for g in grads]
        raw, raw_turned = grads[-1], turned[-1]
        u = helpers.gradients(jnp.zeros((6, 4)), 20)
        plain = _apply(tx, _measured(tx, grads), u, raw)
        rotated = _apply(tx, _measured(tx, turned), left @ u @ right, raw_turned)
        tolerance = 1e-10 if isinstance(root, so.roots.Eigh) else 1e-5
        helpers.assert_close(rotated, left @ plain @ right, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "scale", [1e-12, 1e-6, 1e-3, 2.0**-20, 2.0**20, 1e3, 1e6, 1e12]
)
def test_scale(scale: float) -> None:
    """Statistics of ``c G`` divide the step by ``c``, over 24 decades, in float32."""
    like = {"w": jnp.zeros((6, 4)), "v": jnp.zeros((4, 6))}
    tx = so.blockwise(so.kronecker(refresh=ALWAYS), so.BlockLayout(4))
    # Enough gradients for factors of full rank: nothing rests on the damping.
    grads = [helpers.gradients(like, i) for i in range(12)]
    scaled = [jax.tree.map(lambda x: x * jnp.float32(scale), g) for g in grads]
    u = helpers.gradients(like, 30)
    plain = _apply(tx, _measured(tx, grads[:-1]), u, grads[-1])
    found = _apply(tx, _measured(tx, scaled[:-1]), u, scaled[-1])
    found = jax.tree.map(lambda x: x * jnp.float32(scale), found)
    helpers.assert_close(found, plain, rtol=1e-4, atol=1e-5)


def test_one_gradient_becomes_orthogonal() -> None:
    """The first step of a square matrix is ``U V^T`` of its singular vectors."""
    with jax.enable_x64(True):
        g = helpers.gradients(jnp.zeros((4, 4)), 3)
        tx = so.blockwise(so.kronecker(eps_rel=0.0, eps=1e-24, refresh=ALWAYS))
        found, _ = tx.update(g, tx.init(g))
        u, _, vt = np.linalg.svd(np.asarray(g))
        np.testing.assert_allclose(found, u @ vt, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_block_moves_as_far_as_its_magnitude(layout: so.BlockLayout) -> None:
    with jax.enable_x64(True):
        like = _like()
        rule = so.grafting.adam()
        grafted = so.blockwise(
            so.filter_gradient(so.graft(so.kronecker(refresh=ALWAYS), rule)), layout
        )
        alone = so.blockwise(so.filter_gradient(rule), layout)
        names, shapes = list(like), [x.shape for x in jax.tree.leaves(like)]
        plan = layout.plan(sorted(names), shapes)
        (*_, moved), _ = helpers.run(grafted, like, 4)
        (*_, length), _ = helpers.run(alone, like, 4)
        both = (dict(enumerate(jax.tree.leaves(x))) for x in (moved, length))
        stacks = [split(leaves, plan) for leaves in both]
        assert stacks[0].keys() == plan.stacks.keys()
        for key, blocks in stacks[0].items():
            axes = tuple(range(1, blocks.ndim))
            norms = [np.sqrt(np.sum(np.square(x[key]), axis=axes)) for x in stacks]
            np.testing.assert_allclose(*norms, rtol=1e-12, err_msg=key)
            # Same length, another direction (a vector of one has no other).
            if blocks[0].size > 1:
                assert np.abs(stacks[0][key] - stacks[1][key]).max() > 1e-3


def test_the_scope_of_an_array_is_the_whole_array() -> None:
    rule = so.grafting.adam()
    params = helpers.parameters()
    layout = so.BlockLayout(3)
    direction = so.blockwise(so.kronecker(refresh=ALWAYS), layout)
    tx = so.filter_gradient(so.graft(direction, rule, scope="array"))
    (*_, moved), _ = helpers.run(tx, params, 3)
    (*_, length), _ = helpers.run(so.filter_gradient(rule), params, 3)
    for name in ("kernel", "conv"):
        norms = [np.linalg.norm(np.ravel(x[name])) for x in (moved, length)]
        np.testing.assert_allclose(*norms, rtol=1e-5, err_msg=name)
