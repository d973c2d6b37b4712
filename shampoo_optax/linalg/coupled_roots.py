"""Roots by coupled iterations: matrix products only."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from shampoo_optax.linalg import coupled
from shampoo_optax.linalg.method import Solution
from shampoo_optax.linalg.precisions import identity_like, symmetric
from shampoo_optax.linalg.scaling import Damping, largest_eigenvalue


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
        return Solution(symmetric(end.root), end.error)


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
        root = coupled.power(end.root, fraction.denominator)
        return Solution(symmetric(root), error)


def _ridged(matrices: jax.Array, delta: jax.Array) -> jax.Array:
    return matrices + delta[..., None, None] * identity_like(matrices)


def _positive(x: jax.Array) -> jax.Array:
    return jnp.maximum(x, jnp.finfo(x.dtype).tiny)
