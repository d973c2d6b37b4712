"""Shampoo as a loop over parameters and blocks: what compile.py compares with.

The same maths as ``so.shampoo`` with its defaults, written the obvious way: averages
of the Gram matrices, inverse fourth roots by ``eigh`` in a ``cond`` where a refresh
is due, the momentum between the roots, the norm of Adam's update, weight decay and
the learning rate. Every block is traced on its own.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

B1, B2, EPS, EPS_ROOT = 0.9, 0.999, 1e-8, 1e-6


def blocks_of(shape: tuple[int, ...], size: int) -> list[tuple[slice, ...]]:
    """Where the blocks of a matrix are; none of a vector."""
    if len(shape) != 2:
        return []
    rows, columns = (
        [slice(i, min(i + size, side)) for i in range(0, side, size)] for side in shape
    )
    return [(row, column) for row in rows for column in columns]


def init(params: list[jax.Array], size: int) -> dict[str, Any]:
    """Zero averages; for every block a pair of factors and a pair of roots."""
    pairs = []
    for p in params:
        here = [p[block].shape for block in blocks_of(p.shape, size)]
        pairs.append([(jnp.eye(m), jnp.eye(n)) for m, n in here])
    return {
        "count": jnp.int32(0),
        "mu": [jnp.zeros_like(p) for p in params],
        "nu": [jnp.zeros_like(p) for p in params],
        "factors": jax.tree.map(jnp.zeros_like, pairs),
        "roots": pairs,
    }


def inverse_root(factor: jax.Array) -> jax.Array:
    """``(A + 1e-6 lambda_max I)^(-1/4)`` by eigendecomposition."""
    w, v = jnp.linalg.eigh(factor)
    w = jnp.maximum(w, 0.0) + EPS_ROOT * jnp.max(w)
    return (v * w**-0.25) @ v.T


def precondition(
    gradient: jax.Array,
    momentum: jax.Array,
    adam: jax.Array,
    pair: tuple[Any, Any],
    due: jax.Array,
    debias: jax.Array,
) -> tuple[jax.Array, tuple[Any, Any]]:
    """One block: new factors and roots, and the grafted direction."""
    (left, right), old = pair
    left = B2 * left + (1 - B2) * gradient @ gradient.T
    right = B2 * right + (1 - B2) * gradient.T @ gradient
    factors = (left, right)

    def refreshed() -> tuple[jax.Array, jax.Array]:
        new = [inverse_root(factor / debias) for factor in factors]
        fine = [jnp.all(jnp.isfinite(root)) for root in new]
        first, second = (
            jnp.where(ok, root, before)
            for ok, root, before in zip(fine, new, old, strict=True)
        )
        return first, second

    roots = jax.lax.cond(due, refreshed, lambda: old)
    direction = roots[0] @ momentum @ roots[1]
    norms = jnp.linalg.norm(adam), jnp.linalg.norm(direction)
    return direction * norms[0] / (norms[1] + 1e-16), (factors, roots)


def update(
    gradients: list[jax.Array],
    state: dict[str, Any],
    params: list[jax.Array],
    size: int,
    frequency: int,
) -> tuple[list[jax.Array], dict[str, Any]]:
    """One step of all parameters."""
    count = state["count"] + 1
    t = count.astype(jnp.float32)
    due, grafted = count % frequency == 0, count >= frequency
    new: dict[str, Any] = {"count": count}
    new |= {key: [] for key in ("mu", "nu", "factors", "roots")}
    updates = []
    for i, (g, p) in enumerate(zip(gradients, params, strict=True)):
        mu = B1 * state["mu"][i] + (1 - B1) * g
        nu = B2 * state["nu"][i] + (1 - B2) * g * g
        momentum = mu / (1 - B1**t)
        adam = momentum / (jnp.sqrt(nu / (1 - B2**t)) + EPS)
        update, factors, roots = adam, [], []
        for j, block in enumerate(blocks_of(p.shape, size)):
            pair = state["factors"][i][j], state["roots"][i][j]
            direction, (factor, root) = precondition(
                g[block], momentum[block], adam[block], pair, due, 1 - B2**t
            )
            direction = jnp.where(grafted, direction, adam[block])
            update = update.at[block].set(direction)
            factors.append(factor)
            roots.append(root)
        updates.append(-1e-3 * (update + 1e-4 * p))
        for key, value in zip(
            ("mu", "nu", "factors", "roots"), (mu, nu, factors, roots), strict=True
        ):
            new[key].append(value)
    return updates, new
