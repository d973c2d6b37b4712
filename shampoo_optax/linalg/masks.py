"""Choices by a mask, and one flag for many entries, in few instructions."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.precisions import PRECISION


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

    Half a mean along each axis, by a product with a constant: what is not finite stays
    so, and no sum on the way is larger than what it sums. The array is read once, where
    XLA's CPU compiler writes out its absolute values to reduce them, its maximum passes
    over NaNs, and ``all`` takes it 50 ms for every shape.

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
    where = sorted(axis % array.ndim for axis in axes)
    for axis in reversed(where):
        size = array.shape[axis]
        shares = jnp.full(size, 0.5 / max(size, 1), array.dtype)
        dims = (((axis,), (0,)), ((), ()))
        array = lax.dot_general(array, shares, dims, precision=PRECISION)
    finite = jnp.isfinite(array)
    return jnp.expand_dims(finite, where) if keepdims else finite
