"""Grafting: the direction of one method with the magnitude of another."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.linalg.masks import chosen
from shampoo_optax.transforms._numbers import NORM_EPS, block_norm

Scope = Literal["block", "array"]
SCOPES = ("block", "array")


class GraftState(NamedTuple):
    """State of :func:`graft`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    direction: Any
    magnitude: Any


def graft(
    direction: optax.GradientTransformation,
    magnitude: optax.GradientTransformation,
    *,
    scope: Scope = "block",
    start: int | float = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Move along ``direction`` as far as ``magnitude`` would.

    Equals :math:`\|m\| / (\|d\| + 10^{-16}) \cdot d` with the updates :math:`d` and
    :math:`m` of the two; before step ``start``, :math:`m` itself. Where both
    agree on a learning rate, so does the result: its unit is the magnitude's.

    Args:
      direction: for example :func:`kronecker`.
      magnitude: for example ``grafting.adam()``, or any Optax transformation.
      scope: what has one norm. ``"block"``: each entry along the leading axis, for
        stacks, inside :func:`blockwise` (Meta). ``"array"``: each whole array,
        around :func:`blockwise` (Google).
      start: the first step that is grafted, counted from 1; ``math.inf`` leaves the
        magnitude alone.

    Returns:
      The transformation.

    Raises:
      ValueError: ``scope`` is unknown or ``start`` is below 1.

    Example:
      >>> tx = graft(optax.scale(100.0), grafting.sgd(), scope="array")
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0]
      Array([3., 4.], dtype=float32)

    Source: Agarwal et al., `Disentangling Adaptive Gradient Methods from Learning
    Rates <https://arxiv.org/abs/2002.11803>`_, 2020.
    """
    _checks.choice("graft", "scope", scope, SCOPES)
    _checks.whole("graft", "start", start, low=1, infinite=True)
    direction = optax.with_extra_args_support(direction)
    magnitude = optax.with_extra_args_support(magnitude)
    batch_axes = 1 if scope == "block" else 0

    def init_fn(params: optax.Params) -> GraftState:
        count = jnp.zeros([], jnp.int32)
        return GraftState(count, direction.init(params), magnitude.init(params))

    def update_fn(
        updates: optax.Updates,
        state: GraftState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, GraftState]:
        count = optax.safe_increment(state.count)
        d, d_state = direction.update(updates, state.direction, params, **extra)
        m, m_state = magnitude.update(updates, state.magnitude, params, **extra)
        early = None if start in (1, math.inf) else count < start

        def combine(d: jax.Array, m: jax.Array) -> jax.Array:
            target, own = (block_norm(x, batch_axes=batch_axes) for x in (m, d))
            grafted = (d.astype(own.dtype) * (target / (own + NORM_EPS))).astype(
                m.dtype
            )
            return grafted if early is None else chosen(early, m, grafted)

        grafted = m if start == math.inf else jax.tree.map(combine, d, m)
        return grafted, GraftState(count, d_state, m_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
