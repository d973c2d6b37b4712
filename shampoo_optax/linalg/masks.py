"""A choice by a mask, in one instruction."""

from __future__ import annotations

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
