"""A second moment in a rotated basis, with care for directions nobody has seen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_optax import _checks
from shampoo_optax.linalg.masks import all_finite, chosen
from shampoo_optax.transforms._numbers import bias_correction as correction_of
from shampoo_optax.transforms._numbers import new_weight, over, scalar

NullSpace = Literal["share", "drop", "plain"]
NULL_SPACES = ("share", "drop", "plain")


@dataclass(frozen=True)
class Moment:
    """How a second moment is averaged and divided by; see eigenbasis."""

    b2: ArrayLike
    eps: ArrayLike
    bias_correction: bool
    weighted: bool
    exponents: Mapping[int, float]
    null_space: NullSpace

    def check(self, call: str) -> None:
        """Raise where an option is out of range."""
        _checks.numbers(call, b2=self.b2, eps=self.eps)
        _checks.choice(call, "null_space", self.null_space, NULL_SPACES)
        for order, power in self.exponents.items():
            _checks.number(call, f"exponents[{order}]", power, _checks.POSITIVE)

    def accumulate(
        self, seen: jax.Array, old: jax.Array, null: dict[str, jax.Array]
    ) -> jax.Array:
        """The moment after a gradient that was turned into the basis.

        Args:
          seen: the gradient in the basis, ``[n, d_1, ..., d_k]``.
          old: the moment so far, in the dtype of ``seen``.
          null: by dimension ``[n, d]``, directions of the null space.

        Returns:
          The new moment; that of a block whose gradient is not finite stays.
        """
        weight = new_weight(self.b2 if self.weighted else 1.0, old.dtype)
        nu = scalar(self.b2, old.dtype) * old + weight * seen * seen
        # A gradient that is not finite would stay in the moment for ever.
        axes = tuple(range(1, nu.ndim))
        nu = chosen(all_finite(nu, axes, keepdims=True), nu, old)
        return _shared(nu, null) if self.null_space == "share" else nu

    def divide(
        self,
        turned: jax.Array,
        nu: jax.Array,
        null: dict[str, jax.Array],
        count: jax.Array,
    ) -> jax.Array:
        """An update in the basis over the root of the moment."""
        decay = self.b2 if self.bias_correction and self.weighted else 1.0
        nu = over(nu, correction_of(decay, count, nu.dtype))
        power = self.exponents.get(nu.ndim - 1, 0.5)
        root = jnp.sqrt(nu) if power == 0.5 else nu**power
        turned = turned / (root + scalar(self.eps, nu.dtype))
        return _dropped(turned, null) if self.null_space == "drop" else turned


def _mask(null: jax.Array, dim: str, ndim: int) -> jax.Array:
    """``[n, d]`` as it stands in a stack ``[n, d_1, ..., d_k]``."""
    shape = [null.shape[0]] + [1] * (ndim - 1)
    shape[int(dim) + 1] = null.shape[1]
    return null.reshape(shape)


def _shared(nu: jax.Array, null: dict[str, jax.Array]) -> jax.Array:
    """The mean over the null space in place of the moments there."""
    for dim, columns in null.items():
        mask = _mask(columns, dim, nu.ndim)
        inside = chosen(mask, nu, jnp.zeros_like(nu))
        # Counted in the dtype of the moment, exactly: for sums of it XLA has a kernel.
        number = jnp.sum(mask.astype(nu.dtype), int(dim) + 1, keepdims=True)
        mean = jnp.sum(inside, int(dim) + 1, keepdims=True) / jnp.maximum(number, 1)
        nu = chosen(mask, jnp.broadcast_to(mean, nu.shape), nu)
    return nu


def _dropped(turned: jax.Array, null: dict[str, jax.Array]) -> jax.Array:
    for dim, columns in null.items():
        mask = _mask(columns, dim, turned.ndim)
        turned = chosen(mask, jnp.zeros_like(turned), turned)
    return turned
