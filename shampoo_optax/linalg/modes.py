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

from shampoo_optax.linalg.precisions import contraction


def gram(
    stack: jax.Array,
    dim: int,
    dtype: jax.typing.DTypeLike,
    *,
    precision: str = "highest",
) -> jax.Array:
    """Gram matrix of every block along one of its dimensions.

    Equals ``X_(dim) X_(dim)^T`` for each block ``X`` with mode-``dim``
    unfolding ``X_(dim)``.

    Args:
      stack: blocks, ``[n, d_1, ..., d_k]``.
      dim: which dimension of a block, counted from 0.
      dtype: in which to accumulate; products of bfloat16 are exact in float32.
      precision: of the product, see :mod:`precisions`. With one part (``"tf32"``) it is
        the exact Gram matrix of what that format keeps of a block.

    Returns:
      ``[n, d, d]`` with ``d`` the size of that dimension, in ``dtype``.

    Example:
      >>> import jax.numpy as jnp
      >>> gram(jnp.array([[[1.0, 2.0], [0.0, 1.0]]]), 0, jnp.float32)
      Array([[[5., 2.],
              [2., 1.]]], dtype=float32)
    """
    axes = tuple(a for a in range(1, stack.ndim) if a != dim + 1)
    dims = ((axes, axes), ((0,), (0,)))
    return contraction(stack, stack, dims, precision, dtype)


def mode_products(
    stack: jax.Array, matrices: Mapping[int, jax.Array], *, precision: str = "highest"
) -> jax.Array:
    """Apply one matrix to each named dimension of every block.

    Equals ``M_1 X M_2^T`` for matrices ``X``; dimensions without a matrix stay
    as they are. Linear in ``stack``.

    Args:
      stack: blocks, ``[n, d_1, ..., d_k]``.
      matrices: for a dimension (counted from 0) the stack of matrices
        ``[n, e, d]`` that acts on it.
      precision: of the products, see :mod:`precisions`.

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
            stack = _product(stack, dim + 1, matrix, 2, precision)
        elif dim == 0:
            stack = _product(matrix, 2, stack, 1, precision)
        else:
            moved = _product(stack, dim + 1, matrix, 2, precision)
            order = list(range(stack.ndim - 1))
            order.insert(dim + 1, stack.ndim - 1)
            stack = lax.transpose(moved, order)
    return stack


def _product(
    lhs: jax.Array, lhs_axis: int, rhs: jax.Array, rhs_axis: int, precision: str
) -> jax.Array:
    dims = (((lhs_axis,), (rhs_axis,)), ((0,), (0,)))
    return contraction(lhs, rhs, dims, precision)
