"""Which exponent each dimension of a block has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax

from shampoo_optax import _checks

DefaultExponent = Callable[[int], float]
# {order: exponent of every dimension, or {dimension: exponent}}
Exponents = Mapping[int, float | Mapping[int, float]]


class ExponentTable:
    """Exponents by dimension of a block; a dimension whose exponent is 0 has no factor.

    Args:
      call: whose argument the overrides are, for error messages.
      overrides: by the order of a block.
      default: of each dimension of a block with this number of factors.
      largest: a dimension above this has no factor.

    Raises:
      ValueError, TypeError: a dimension or an exponent is out of range.

    Example:
      >>> table = ExponentTable("kronecker", {2: {1: 0.0}}, lambda order: 0.5 / order)
      >>> table.of(jnp.zeros((9, 4, 3)))
      {0: 0.25}
    """

    def __init__(
        self,
        call: str,
        overrides: Exponents | None,
        default: DefaultExponent,
        largest: float = math.inf,
    ) -> None:
        """Check the overrides."""
        self._call, self._default, self._largest = call, default, largest
        self._by_order = {
            order: self._expand(order, value)
            for order, value in (overrides or {}).items()
        }

    def of(self, stack: jax.Array) -> dict[int, float]:
        """The exponents of a stack ``[n, d_1, ..., d_k]``, those that are not 0."""
        order = stack.ndim - 1
        override = self._by_order.get(order, {})
        dims = [dim for dim in range(order) if stack.shape[dim + 1] <= self._largest]
        powers = {dim: override.get(dim, self._default(len(dims))) for dim in dims}
        return {dim: power for dim, power in powers.items() if power > 0}

    def _expand(
        self, order: int, value: float | Mapping[int, float]
    ) -> dict[int, float]:
        _checks.whole(self._call, "exponents key", order, low=1, infinite=False)
        by_dim = (
            dict(value)
            if isinstance(value, Mapping)
            else dict.fromkeys(range(order), value)
        )
        for dim, power in by_dim.items():
            if dim not in range(order):
                raise ValueError(
                    f"{self._call}(exponents={{{order}: ...}}): a block of order "
                    f"{order} has no dimension {dim!r}; wanted 0 to {order - 1}."
                )
            name = f"exponents[{order}][{dim}]"
            _checks.number(self._call, name, power, _checks.NON_NEGATIVE)
        return by_dim
