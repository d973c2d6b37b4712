"""What a root method is."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax

from shampoo_optax.linalg.scaling import Damping


class Solution(NamedTuple):
    """What a method found."""

    root: jax.Array  # [..., d, d], symmetric to the last bit
    residual: jax.Array  # [...]: max |A X^p - I|, or 0 where a method cannot fail


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
