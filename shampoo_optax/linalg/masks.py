"""Choices by a mask, and one flag for many entries, in few instructions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax


def chosen(mask: jax.Array, yes: jax.Array, no: jax.Array) -> jax.Array:
    """``jnp.where`` for two arrays of one shape and dtype.

    ``jnp.where`` is a function of its own in a program for every shape it meets.

    Args:
      mask: a scalar, or of the arrays' order, with a side of 1 where it does not vary.
      yes: where it is true.
      no: where it is not.

    Returns:
      Like both.

    Example:
      >>> chosen(jnp.array([[True], [False]]), jnp.ones((2, 2)), jnp.zeros((2, 2)))
      Array([[1., 1.],
             [0., 0.]], dtype=float32)
    """
    return lax.select(jnp.broadcast_to(mask, yes.shape) if mask.ndim else mask, yes, no)


def all_finite(
    array: jax.Array, axes: Sequence[int], *, keepdims: bool = False
) -> jax.Array:
    """``jnp.isfinite(array).all(axes)``, exactly.

    For maxima and sums of float32 XLA's CPU compiler has kernels, where ``all`` takes
    it 50 ms for every shape. Its maximum passes over NaNs, which the sum does not; the
    sum may overflow, where the maximum is finite.

    Args:
      array: of floating-point numbers.
      axes: over which.
      keepdims: leave them, of size one.

    Returns:
      One flag for each of the other entries.

    Example:
      >>> all_finite(jnp.array([[3e38, 3e38], [0, jnp.nan], [0, jnp.inf]]), [1])
      Array([ True, False, False], dtype=bool)
    """
    size, axis = jnp.abs(array), tuple(axes)
    largest = jnp.max(size, axis=axis, keepdims=keepdims, initial=0.0)
    total = jnp.sum(size, axis=axis, keepdims=keepdims)
    return jnp.isfinite(largest) & ~jnp.isnan(total)
