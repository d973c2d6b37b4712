"""Coupled iterations for inverse p-th roots: matrix products only.

Both carry ``X -> A^(-1/p)`` and ``M = X^p A -> I`` through a stack at once; each
matrix stops on its own and is then left untouched, so a stack gives what its
matrices would give one by one.

Sources: Guo and Higham, `A Schur-Newton Method for the Matrix pth Root and its
Inverse <https://doi.org/10.1137/050643374>`_, 2006; Lakic, `On the Computation of
the Matrix k-th Root
<https://doi.org/10.1002/(SICI)1521-4001(199803)78:3%3C167::AID-ZAMM167%3E3.0.CO;2-R>`_,
1998 (the higher orders).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.precisions import PRECISION, identity_like


class Iteration(NamedTuple):
    """One coupled iteration in flight over a stack."""

    root: jax.Array  # [..., d, d]: X
    coupled: jax.Array  # [..., d, d]: M
    error: jax.Array  # [...]: max |M - I|
    active: jax.Array  # [...], bool
    steps: jax.Array  # [], int32


def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Batched matrix product in full precision (said here, never ambient)."""
    return jnp.matmul(lhs, rhs, precision=PRECISION)


def power(matrices: jax.Array, exponent: int) -> jax.Array:
    """``matrices**exponent`` for a positive integer, by repeated squaring."""
    result = None
    while exponent:
        if exponent & 1:
            result = matrices if result is None else product(result, matrices)
        exponent >>= 1
        if exponent:
            matrices = product(matrices, matrices)
    if result is None:
        raise ValueError("power() takes an exponent of at least 1.")
    return result


def start(matrices: jax.Array, scale: jax.Array, p: int) -> Iteration:
    """``X = scale^(1/p) I``, ``M = scale A``."""
    scale = scale[..., None, None]
    coupled = scale * matrices
    root = scale ** (1.0 / p) * identity_like(matrices)
    error = residual(coupled)
    return Iteration(root, coupled, error, jnp.isfinite(error), jnp.int32(0))


def residual(coupled: jax.Array) -> jax.Array:
    """``max |M - I|`` of each matrix."""
    return jnp.max(jnp.abs(coupled - identity_like(coupled)), axis=(-2, -1))


def advance(
    state: Iteration, correction: Callable[[jax.Array], jax.Array], p: int
) -> Iteration:
    """``X <- X T, M <- T^p M`` with ``T = correction(M)``, where still active."""
    factor = correction(state.coupled)
    live = state.active[..., None, None]
    root = jnp.where(live, product(state.root, factor), state.root)
    coupled = jnp.where(live, product(power(factor, p), state.coupled), state.coupled)
    error = jnp.where(state.active, residual(coupled), state.error)
    return Iteration(root, coupled, error, state.active, state.steps + 1)


def iterate(
    state: Iteration,
    correction: Callable[[jax.Array], jax.Array],
    p: int,
    *,
    tolerance: float,
    max_iterations: int,
    max_growth: float,
    stagnation: float,
) -> Iteration:
    """Advance until every matrix has converged, grown, stagnated or run out.

    Args:
      state: where to begin.
      correction: the polynomial ``T(M)``.
      p: the root.
      tolerance: a matrix is done when its error is at most this.
      max_iterations: total number of steps, ``state.steps`` included.
      max_growth: a matrix stops when its error grows by more than this factor.
      stagnation: below this error a matrix stops when its error stands still.

    Returns:
      The final iteration.
    """

    def going(state: Iteration) -> jax.Array:
        return jnp.any(state.active) & (state.steps < max_iterations)

    def step(state: Iteration) -> Iteration:
        new = advance(state, correction, p)
        grown = new.error > max_growth * state.error
        stuck = (new.error == state.error) & (state.error < stagnation)
        # A NaN compares false everywhere, and so stops its matrix.
        going_on = (new.error > tolerance) & ~grown & ~stuck
        return new._replace(active=state.active & going_on)

    begin = state._replace(active=state.active & (state.error > tolerance))
    return lax.while_loop(going, step, begin)


def newton_correction(p: int) -> Callable[[jax.Array], jax.Array]:
    """``T(M) = (1 + 1/p) I - M/p``."""
    return lambda m: (1.0 + 1.0 / p) * identity_like(m) - m / p


def series_correction(p: int, order: int) -> Callable[[jax.Array], jax.Array]:
    """The first ``order`` terms of ``(1 - B)^(-1/p)`` in ``B = I - M``, by Horner."""
    coefficients = [
        math.prod((1 + (j - 1) * p) / (j * p) for j in range(1, i + 1))
        for i in range(order)
    ]

    def correction(m: jax.Array) -> jax.Array:
        identity = identity_like(m)
        base = identity - m
        total = coefficients[-1] * base + coefficients[-2] * identity
        for coefficient in reversed(coefficients[:-2]):
            total = product(total, base) + coefficient * identity
        return total

    return correction


def as_fraction(p: float) -> Fraction:
    """The small fraction that a root such as 4.0 or 2.6666666666666665 stands for."""
    return Fraction(p).limit_denominator(64)
