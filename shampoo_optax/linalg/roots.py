"""Inverse p-th roots of stacks of symmetric positive semi-definite matrices.

The object that is passed is the object that runs: a root method is a frozen
dataclass with one method, ``solve``. :func:`inverse_root` does what all methods
share (exact prescale, symmetrisation, one definition of damping, the gate).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_optax.linalg import coupled
from shampoo_optax.linalg.modes import PRECISION
from shampoo_optax.linalg.scaling import (
    Damping,
    largest_eigenvalue,
    prescale,
    unscale,
)


class Solution(NamedTuple):
    """What a method found."""

    root: jax.Array  # [..., d, d]
    residual: jax.Array  # [...]: max |A X^p - I|, or 0 where a method cannot fail


class InverseRoot(NamedTuple):
    """Inverse roots and whether each may be used."""

    root: jax.Array  # [..., d, d]
    accepted: jax.Array  # [...], bool


class RootMethod(Protocol):
    """A way to compute ``(A + delta I)^(-1/p)``, ``delta`` from a :class:`Damping`."""

    @property
    def max_residual(self) -> float:
        """Above this residual a root is refused and the old one kept."""

    def check(self, p: float) -> None:
        """Raise ValueError where this method cannot take this root."""

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """Roots of ``[..., d, d]``, damped by ``damping.ridge(lambda_max)``.

        ``unit [...]`` is what 1.0 in the caller's units is in those of
        ``matrices`` (they come prescaled), for absolute thresholds.
        """


@dataclass(frozen=True)
class PseudoInverse:
    """Give eigenvalues up to ``max(rank_rtol * lambda_max, rank_atol)`` the value 0.

    Args:
      rank_rtol: relative cut-off; None means ``d * finfo(dtype).eps``.
      rank_atol: absolute cut-off, in the units of the matrices.
    """

    rank_rtol: float | None = 0.0
    rank_atol: float = 0.0


@dataclass(frozen=True)
class Eigh:
    """Roots by eigendecomposition: exact, any real ``p``; the default.

    Equals ``V diag((max(w, 0) + delta)^(-1/p)) V^T``.

    Args:
      double_precision: decompose in float64, also where jax_enable_x64 is off. In
        float32 LAPACK's eigenvalues are wrong by 1e-7 of the largest, which is a
        relative error of 2e-2 in the root at ``eps_rel = 1e-6``.
      shift: where an eigenvalue is negative, shift the whole spectrum up by it
        (Meta's rule) in place of clipping it.
      pseudo_inverse: drop small eigenvalues and add no damping.
    """

    double_precision: bool = True
    shift: bool = False
    pseudo_inverse: PseudoInverse | None = None
    max_residual: float = math.inf

    def check(self, p: float) -> None:
        """Every positive root works."""

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        exact = jnp.zeros_like(unit)
        if not self.double_precision:
            return Solution(self._roots(matrices, damping, p, unit), exact)
        with jax.enable_x64(True):
            wide = matrices.astype(jnp.float64)
            root = self._roots(wide, damping, p, unit).astype(matrices.dtype)
        return Solution(root, exact)

    def _roots(
        self, matrices: jax.Array, damping: Damping, p: float, unit: jax.Array
    ) -> jax.Array:
        """One matrix at a time on a CPU.

        XLA spreads a batch of LAPACK calls over its thread pool and waits for them on
        a thread of that same pool, so two batches at once can wait for each other for
        ever (seen on two cores); and one matrix stays in the cache.
        """

        def batched(a: jax.Array, absolute: jax.Array, u: jax.Array) -> jax.Array:
            return self._root(a, damping._replace(absolute=absolute), p, u)

        def one_by_one(*stacks: jax.Array) -> jax.Array:
            return jax.lax.map(lambda xs: batched(*xs), stacks)

        flat = matrices.reshape(-1, *matrices.shape[-2:])
        numbers = damping.absolute.reshape(-1), unit.reshape(-1)
        root = jax.lax.platform_dependent(
            flat, *numbers, cpu=one_by_one, default=batched
        )
        return root.reshape(matrices.shape)

    def _root(
        self,
        matrices: jax.Array,
        damping: Damping,
        p: float,
        unit: jax.Array,
    ) -> jax.Array:
        w, v = jnp.linalg.eigh(matrices, symmetrize_input=False)
        tiny = jnp.finfo(w.dtype).tiny
        # LAPACK and its kin give the eigenvalues in ascending order.
        lowest = jnp.minimum(w[..., :1], 0.0)
        largest = jnp.maximum(w[..., -1:], 0.0)
        if self.pseudo_inverse is None:
            w = w - lowest if self.shift else jnp.maximum(w, 0.0)
            delta = damping.ridge(largest[..., 0])[..., None]
            powers = jnp.maximum(w + delta, tiny) ** (-1.0 / p)
        else:
            rtol = self.pseudo_inverse.rank_rtol
            rtol = (
                w.shape[-1] * float(jnp.finfo(unit.dtype).eps) if rtol is None else rtol
            )
            atol = self.pseudo_inverse.rank_atol * unit[..., None].astype(w.dtype)
            keep = w > jnp.maximum(rtol * largest, atol)
            powers = jnp.where(keep, jnp.maximum(w, tiny) ** (-1.0 / p), 0.0)
        return jnp.matmul(
            v * powers[..., None, :], jnp.swapaxes(v, -2, -1), precision=PRECISION
        )


@dataclass(frozen=True)
class CoupledNewton:
    """Roots by the coupled Newton iteration; integer ``p``, matrix products only.

    Args:
      max_iterations: steps at most.
      tolerance: a matrix is done when ``max |M - I|`` is at most this.
      max_growth: a matrix stops when that error grows by more than this factor.
      max_residual: with a larger error the root is refused.
    """

    max_iterations: int = 100
    tolerance: float = 1e-6
    max_growth: float = 1.2
    max_residual: float = 0.1

    def check(self, p: float) -> None:
        """Only whole roots."""
        if coupled.as_fraction(p).denominator != 1:
            raise ValueError(
                f"roots.CoupledNewton takes whole roots only, but the exponent "
                f"{1 / p:g} asks for the root {p:g}: use roots.Eigh or "
                "roots.CoupledHigherOrder, or another exponent."
            )

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        del unit
        degree = coupled.as_fraction(p).numerator
        ridged = _ridged(matrices, damping.ridge(largest_eigenvalue(matrices)))
        # ||A||_F >= lambda_max, so M starts with its spectrum in (0, (p+1)/2], well
        # inside the (0, p+1) where the iteration converges.
        norm = jnp.sqrt(jnp.sum(ridged * ridged, axis=(-2, -1)))
        begin = coupled.start(ridged, (degree + 1) / (2.0 * _positive(norm)), degree)
        end = coupled.iterate(
            begin,
            coupled.newton_correction(degree),
            degree,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            max_growth=self.max_growth,
            stagnation=1e-3,
        )
        return Solution(end.root, end.error)


@dataclass(frozen=True)
class CoupledHigherOrder:
    """Roots by a higher-order coupled iteration; rational ``p``.

    Args:
      rel_epsilon: with ``abs_epsilon``, replaces the shared damping by
        ``max(rel_epsilon * ||A||_inf, abs_epsilon)`` (Meta's rule); None keeps it.
      abs_epsilon: see ``rel_epsilon``, in the units of the matrices.
      order: terms of the series; 2 is Newton.
      tolerance: a matrix is done when ``max |M - I|`` is at most this.
      max_iterations: steps at most.
      max_residual: with a larger ``max |A X^p - I|`` the root is refused.
    """

    rel_epsilon: float | None = None
    abs_epsilon: float | None = None
    order: int = 3
    tolerance: float = 1e-8
    max_iterations: int = 100
    max_residual: float = 0.1

    def __post_init__(self) -> None:
        """Check the order."""
        if self.order < 2:
            raise ValueError(
                f"roots.CoupledHigherOrder(order={self.order}): the order must be at "
                "least 2 (2 is Newton's method)."
            )

    def check(self, p: float) -> None:
        """Rational roots with small terms."""
        fraction = coupled.as_fraction(p)
        if abs(float(fraction) - p) > 1e-9 * p or fraction.numerator > 64:
            raise ValueError(
                f"roots.CoupledHigherOrder takes small fractions, but the exponent "
                f"{1 / p:g} asks for the root {p:g}: use roots.Eigh."
            )

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        fraction = coupled.as_fraction(p)
        degree = fraction.numerator
        if self.rel_epsilon is not None or self.abs_epsilon is not None:
            norm = jnp.max(jnp.sum(jnp.abs(matrices), axis=-1), axis=-1)
            delta = jnp.maximum(
                (self.rel_epsilon or 0.0) * norm, (self.abs_epsilon or 0.0) * unit
            )
        else:
            delta = damping.ridge(largest_eigenvalue(matrices))
        ridged = _ridged(matrices, delta)
        trace = jnp.trace(ridged, axis1=-2, axis2=-1)
        begin = coupled.start(ridged, 1.0 / _positive(trace), degree)
        # One plain Newton step brings the spectrum to where every order converges.
        begin = coupled.advance(begin, coupled.newton_correction(degree), degree)
        end = coupled.iterate(
            begin,
            coupled.series_correction(degree, self.order),
            degree,
            tolerance=self.tolerance,
            max_iterations=self.max_iterations,
            max_growth=1.2,
            stagnation=1e-3,
        )
        error = coupled.residual(
            coupled.product(ridged, coupled.power(end.root, degree))
        )
        return Solution(coupled.power(end.root, fraction.denominator), error)


def inverse_root(
    method: RootMethod,
    matrices: jax.Array,
    p: float,
    *,
    eps: ArrayLike = 0.0,
    eps_rel: ArrayLike = 1e-6,
) -> InverseRoot:
    """``(A + delta I)^(-1/p)`` with ``delta = max(eps, eps_rel * lambda_max)``.

    Args:
      method: how, for example :class:`Eigh`.
      matrices: ``[..., d, d]``, symmetric positive semi-definite up to rounding.
      p: the root, static.
      eps: absolute damping, in the units of ``matrices``.
      eps_rel: damping relative to the largest eigenvalue.

    Returns:
      The roots and, per matrix, whether the root may be used: the input was
      finite and not zero, the output is finite, and the residual is within
      ``method.max_residual``. A zero matrix is refused only where the damping
      is relative (it then has no scale); with ``eps_rel=0`` its root is
      ``eps^(-1/p) I``.

    Raises:
      ValueError: the method cannot take this root.

    Example:
      >>> inverse_root(Eigh(), 16.0 * jnp.eye(2), 4, eps_rel=0.0).root
      Array([[0.5, 0. ],
             [0. , 0.5]], dtype=float32)
    """
    method.check(p)
    scaled, dtype = prescale(matrices), matrices.dtype
    unit = unscale(jnp.ones(scaled.exponent.shape, dtype), -scaled.exponent)
    relative = jnp.asarray(eps_rel, dtype)
    absolute = unscale(jnp.asarray(eps, dtype), -scaled.exponent)
    damping = Damping(absolute, relative)
    solution = method.solve(scaled.matrix, damping, p, unit=unit)
    # The whole part of the scale's root is exact: in float32, 2**-25.5 would not be.
    back = -scaled.exponent.astype(dtype) / p
    whole = jnp.floor(back)
    back = unscale(jnp.exp2(back - whole), whole.astype(jnp.int32))
    root = solution.root * back[..., None, None]
    root = 0.5 * (root + jnp.swapaxes(root, -2, -1))
    accepted = (
        scaled.usable
        & (scaled.nonzero | (relative == 0))
        & jnp.all(jnp.isfinite(root), axis=(-2, -1))
        & (solution.residual <= method.max_residual)
    )
    return InverseRoot(root, accepted)


def _ridged(matrices: jax.Array, delta: jax.Array) -> jax.Array:
    return matrices + delta[..., None, None] * coupled.identity_like(matrices)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
