"""Mode products of stacked blocks: the two contractions Shampoo is made of.

A *stack* is an array ``[n, d_1, ..., d_k]``: ``n`` blocks of order ``k``. The
mode-``i`` Gram matrix measures a block along dimension ``i``; the mode product
applies one matrix to each dimension. Both are one batched matrix product for
the whole stack.

Source: Kolda and Bader, `Tensor Decompositions and Applications
<https://doi.org/10.1137/07070111X>`_, 2009, section 2.5.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
from jax import lax

# Statistics decide the direction of every later step, and the accelerators'
# ambient default keeps only 8 bits of the mantissa: the precision is said here.
PRECISION = lax.Precision.HIGHEST


def gram(stack: jax.Array, dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """Gram matrix of every block along one of its dimensions.

    Equals ``X_(dim) X_(dim)^T`` for each block ``X`` with mode-``dim``
    unfolding ``X_(dim)``.

    Args:
      stack: blocks, ``[n, d_1, ..., d_k]``.
      dim: which dimension of a block, counted from 0.
      dtype: in which to accumulate; products of bfloat16 are exact in float32.

    Returns:
      ``[n, d, d]`` with ``d`` the size of that dimension, in ``dtype``.

    Example:
      >>> import jax.numpy as jnp
      >>> gram(jnp.array([[[1.0, 2.0], [0.0, 1.0]]]), 0, jnp.float32)
      Array([[[5., 2.],
              [2., 1.]]], dtype=float32)
    """
    axes = tuple(a for a in range(1, stack.ndim) if a != dim + 1)
    return lax.dot_general(
        stack,
        stack,
        ((axes, axes), ((0,), (0,))),
        precision=PRECISION,
        preferred_element_type=dtype,
    )


def mode_products(stack: jax.Array, matrices: Mapping[int, jax.Array]) -> jax.Array:
    """Apply one matrix to each named dimension of every block.

    Equals ``M_1 X M_2^T`` for matrices ``X``; dimensions without a matrix stay
    as they are. Linear in ``stack``.

    Args:
      stack: blocks, ``[n, d_1, ..., d_k]``.
      matrices: for a dimension (counted from 0) the stack of matrices
        ``[n, e, d]`` that acts on it.

    Returns:
      ``[n, e_1, ..., e_k]``.

    Example:
      >>> import jax.numpy as jnp
      >>> double = 2.0 * jnp.eye(2)[None]
      >>> mode_products(jnp.ones((1, 2, 3)), {0: double}).sum()
      Array(12., dtype=float32)
    """
    for dim, matrix in matrices.items():
        # A matrix on the last dimension leaves the product in place; any other
        # product puts its new dimension last (or first), from where it moves back.
        if dim + 2 == stack.ndim:
            stack = _product(stack, dim + 1, matrix, 2)
        elif dim == 0:
            stack = _product(matrix, 2, stack, 1)
        else:
            moved = _product(stack, dim + 1, matrix, 2)
            order = list(range(stack.ndim - 1))
            order.insert(dim + 1, stack.ndim - 1)
            stack = lax.transpose(moved, order)
    return stack


def _product(lhs: jax.Array, lhs_axis: int, rhs: jax.Array, rhs_axis: int) -> jax.Array:
    dims = (((lhs_axis,), (rhs_axis,)), ((0,), (0,)))
    return lax.dot_general(lhs, rhs, dims, precision=PRECISION)
