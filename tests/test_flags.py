"""JAX's global switches: every optimizer runs under each of them, across refreshes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from tests import helpers

REFRESH = so.Refresh(precondition_frequency=2, start_preconditioning_step=1)
LEANEST = so.StateDtypes(*[jnp.bfloat16] * 4, packed=True)
OPTIMIZERS = {
    "shampoo": lambda: so.scale_by_shampoo(refresh=REFRESH),
    "parts": lambda: so.blockwise(
        so.filter_gradient(
            so.graft(so.kronecker(refresh=REFRESH), so.grafting.adam(), start=2),
            b3=0.5,
            mu_dtype=jnp.bfloat16,
        ),
        so.BlockLayout(max_preconditioner_dim=4, precondition_vectors=True),
    ),
    "newton": lambda: so.scale_by_shampoo(
        b2=1.0,
        refresh=REFRESH,
        root=so.roots.CoupledNewton(),
        grafting=so.grafting.adagrad(),
    ),
    "higher_order": lambda: so.scale_by_shampoo(
        refresh=REFRESH,
        root=so.roots.CoupledHigherOrder(),
        grafting=so.grafting.rmsprop(),
    ),
    "minimax": lambda: so.scale_by_shampoo(refresh=REFRESH, root=so.roots.Minimax()),
    "single_precision": lambda: so.scale_by_shampoo(
        refresh=REFRESH,
        root=so.roots.Eigh(
            double_precision=False, pseudo_inverse=so.roots.PseudoInverse(1e-3)
        ),
        grafting=None,
    ),
    "thin": lambda: so.scale_by_shampoo(
        refresh=so.Refresh(2, 1, statistics_frequency=2),
        layout=so.BlockLayout(4, one_sided_above=5),
        grafting=so.grafting.normalized(so.grafting.adam()),
        graft_scope="array",
    ),
    "kl": lambda: so.scale_by_shampoo(refresh=REFRESH, correction="kl"),
    "soap": lambda: so.scale_by_soap(refresh=REFRESH),
    "cholesky": lambda: so.scale_by_soap(
        refresh=REFRESH, basis=so.bases.CholeskyQR2(), null_space="drop"
    ),
    "qr": lambda: so.scale_by_soap(
        refresh=REFRESH, basis=so.bases.QR(), grafting=so.grafting.adam()
    ),
    "spectral": lambda: so.scale_by_spectral_descent(),
    "lean": lambda: so.scale_by_shampoo(
        refresh=REFRESH, correction="kl", state_dtypes=LEANEST
    ),
    "int8": lambda: so.scale_by_shampoo(
        refresh=REFRESH, state_dtypes=so.StateDtypes(factors=jnp.int8)
    ),
    "lean_soap": lambda: so.scale_by_soap(
        refresh=REFRESH, basis=so.bases.QR(), state_dtypes=LEANEST
    ),
}
# A matrix, a kernel that folds to the same one, a vector and a scalar: few shapes,
# because eager mode compiles every primitive for each of them, under each flag.
SHAPES = {"kernel": (6, 4), "conv": (3, 2, 2, 2), "bias": (5,), "scale": ()}
# The whole alias: optax's own weight decay and learning rate take part, which do
# not promise strict promotion.
ALIAS = {
    "alias": lambda: so.shampoo(1e-2, refresh=REFRESH, momentum=0.9),
    "averaged": lambda: so.primal_averaging(so.soap(1e-2, refresh=REFRESH)),
}
FLAGS: dict[str, dict[str, Any]] = {
    "rank_promotion": {"jax_numpy_rank_promotion": "raise"},
    "strict_promotion": {"jax_numpy_dtype_promotion": "strict"},
    "debug_nans": {"jax_debug_nans": True},
    "tracer_leaks": {"jax_check_tracer_leaks": True},
    "x64": {"jax_enable_x64": True},
    "all": {
        "jax_numpy_dtype_promotion": "strict",
        "jax_debug_nans": True,
        "jax_enable_x64": True,
    },
}


def _parameters(dtype: Any = jnp.float32) -> dict[str, jax.Array]:
    like = {name: jnp.zeros(shape, dtype) for name, shape in SHAPES.items()}
    return helpers.gradients(like, step=10_000)


@contextlib.contextmanager
def _set(flags: dict[str, Any]) -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in flags}
    try:
        for name, value in flags.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


def _check(tx: optax.GradientTransformation, dtype: Any, *, jit: bool) -> None:
    params = _parameters(dtype)
    # Every operation of an eager `init` is compiled anew under each flag.
    init, update = (helpers.jit(tx.init), helpers.jit(tx.update)) if jit else tx
    state = init(params)
    for step in range(3):
        before = state
        grads = helpers.gradients(params, step)
        updates, state = update(grads, state, params)
        assert not helpers.type_changes(before, state)
        for name, u in updates.items():
            assert u.dtype == dtype, name
            assert np.all(np.isfinite(np.asarray(u, np.float64))), name
            assert np.any(np.asarray(u, np.float64) != 0), name


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("flags", FLAGS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_jit(name: str, flags: str, dtype: Any) -> None:
    with _set(FLAGS[flags]):
        _check(OPTIMIZERS[name](), dtype, jit=True)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("flags", FLAGS)
def test_eager(flags: str, dtype: Any) -> None:
    with _set(FLAGS[flags]):
        _check(OPTIMIZERS["parts"](), dtype, jit=False)


@pytest.mark.parametrize("flags", [f for f in FLAGS if "strict" not in str(FLAGS[f])])
@pytest.mark.parametrize("name", ALIAS)
def test_alias(name: str, flags: str) -> None:
    with _set(FLAGS[flags]):
        _check(ALIAS[name](), jnp.float32, jit=True)


@pytest.mark.parametrize("name", OPTIMIZERS | ALIAS)
def test_no_transfer(name: str) -> None:
    """A step, with its arguments in place, moves nothing between host and device."""
    tx = (OPTIMIZERS | ALIAS)[name]()
    params = _parameters()
    grads = [helpers.gradients(params, step) for step in range(4)]
    state, update = tx.init(params), helpers.jit(tx.update)
    # The first call compiles, and may place constants of the program.
    _, state = update(grads[0], state, params)
    with _set({"jax_transfer_guard": "disallow"}):
        for g in grads[1:]:
            updates, state = update(g, state, params)
        jax.block_until_ready(updates)
    assert int(optax.tree.get_all_with_path(state, "count")[0][1]) == 4


def test_the_transfer_guard_guards() -> None:
    with (
        _set({"jax_transfer_guard": "disallow"}),
        pytest.raises(Exception, match="Disallowed host-to-device transfer"),
    ):
        jax.jit(jnp.sin)(np.ones(3, np.float32)).block_until_ready()


def test_the_flags_take_effect() -> None:
    """Each flag forbids what it should: the tests above could otherwise not fail."""
    with _set(FLAGS["rank_promotion"]), pytest.raises(ValueError, match="rank"):
        jnp.ones((2, 2)) + jnp.ones(2)
    with _set(FLAGS["strict_promotion"]), pytest.raises(Exception, match="promotion"):
        jnp.ones(2) + jnp.ones(2, jnp.int32)
    with _set(FLAGS["debug_nans"]), pytest.raises(FloatingPointError):
        jax.jit(jnp.log)(-jnp.ones(())).block_until_ready()
    with _set(FLAGS["x64"]):
        assert jnp.ones(2, "float64").dtype == jnp.float64
