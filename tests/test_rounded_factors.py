"""Factors in bfloat16 have negative eigenvalues: who takes them, on which platform."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so

BLOCK = 16
ROUNDED = so.StateDtypes(factors=jnp.bfloat16)


def _program(tx: optax.GradientTransformationExtraArgs, platform: str) -> str:
    params = {"w": jnp.ones((BLOCK, BLOCK))}
    traced = jax.jit(tx.update).trace(params, jax.eval_shape(tx.init, params))
    return traced.lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("platform", "call"), [("tpu", "@Eigh"), ("cuda", "syevd")])
def test_the_default_decomposes_them_everywhere(platform: str, call: str) -> None:
    refresh = so.Refresh(1)
    for dtypes in (ROUNDED, so.StateDtypes(*[jnp.bfloat16] * 4, packed=True)):
        rounded = so.scale_by_shampoo(refresh=refresh, state_dtypes=dtypes)
        assert call in _program(rounded, platform)
    for dtypes in (so.StateDtypes(), so.StateDtypes(roots=jnp.bfloat16, packed=True)):
        exact = so.scale_by_shampoo(refresh=refresh, state_dtypes=dtypes)
        assert call not in _program(exact, platform)
    # What is chosen by hand is what runs.
    chosen = so.scale_by_shampoo(
        refresh=refresh, state_dtypes=ROUNDED, root=so.roots.Minimax()
    )
    assert call not in _program(chosen, platform)


def _refused(root: so.roots.RootMethod, dtypes: so.StateDtypes) -> int:
    """Of two factors, after 60 steps whose gradients have a quarter of all directions.

    Small ones in all others, as gradients do: where rounding is larger than they are.
    """
    tx = so.scale_by_shampoo(
        b2=0.99, refresh=so.Refresh(20), root=root, state_dtypes=dtypes
    )
    rng = np.random.default_rng(0)
    scale = np.r_[np.ones(BLOCK // 4), np.full(3 * BLOCK // 4, 1e-3)]
    basis, _ = np.linalg.qr(rng.normal(size=(BLOCK, BLOCK)))
    state = tx.init({"w": jnp.zeros((BLOCK, BLOCK))})
    update = jax.jit(tx.update)
    for _ in range(60):
        middle = scale[:, None] * rng.normal(size=(BLOCK, BLOCK)) * scale
        gradient = jnp.asarray(basis @ middle @ basis.T, jnp.float32)
        _, state = update({"w": gradient}, state)
    failures = jax.tree.leaves(state.blocks.inner.direction.failures)
    return sum(int((f > 0).sum()) for f in failures)


def test_iterations_refuse_what_eigh_clips() -> None:
    float32 = so.StateDtypes()
    assert _refused(so.roots.Minimax(), float32) == 0
    assert _refused(so.roots.Minimax(), ROUNDED) == 2
    assert _refused(so.roots.Auto(), ROUNDED) == 0
