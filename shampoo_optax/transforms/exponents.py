"""Which exponent each dimension of a block has."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from shampoo_optax import _checks

DefaultExponent = Callable[[int], float]
# {order: exponent of every dimension, or {dimension: exponent}}
Exponents = Mapping[int, float | Mapping[int, float]]
# {stack: {dimension: {"0.25": EmptyState()}}}, or () where a state does not say.
Marks = Any


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

    def as_in(
        self, marks: Marks, stacks: Mapping[str, jax.Array]
    ) -> dict[str, dict[int, float]]:
        """The exponents of all stacks; raise where a state says others.

        Raises:
          ValueError: naming the stack and the dimension.
        """
        powers = {key: self.of(stack) for key, stack in stacks.items()}
        there, wanted = read(marks), read(marked(powers))
        for key, dim in sorted(there.keys() & wanted.keys()):
            found, asked = there[key, dim], wanted[key, dim]
            if found != asked:
                raise ValueError(
                    f"{self._call}.update: roots of stack '{key}', dimension {dim}, "
                    f"were made with exponent {found:.6g} in this state, and the "
                    f"optimizer wants {asked:.6g}. Pass the state of its own init, or "
                    "compute all roots anew: state = refresh_now(tx, state, params)."
                )
        return powers

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


def marked(powers: Mapping[str, Mapping[int, float]]) -> Marks:
    """Exponents as a tree without leaves, of containers that every library knows.

    An exponent is the key of an empty node: so it is part of a state's structure, where
    JAX, Optax, Orbax and Flax keep it without looking, and takes no array.

    Example:
      >>> marked({"4x3": {0: 0.25}})
      {'4x3': {'0': {'0.25': EmptyState()}}}
    """
    return {
        key: {
            str(dim): {repr(float(power)): optax.EmptyState()}
            for dim, power in by_dim.items()
        }
        for key, by_dim in powers.items()
    }


def read(marks: Marks) -> dict[tuple[str, str], float]:
    """What :func:`marked` was given, by stack and dimension; nothing of ``()``.

    Example:
      >>> read(marked({"4x3": {0: 0.25}}))
      {('4x3', '0'): 0.25}
    """
    return {
        (key, dim): float(power)
        for key, by_dim in (marks or {}).items()
        for dim, by_power in by_dim.items()
        for power in by_power
    }
