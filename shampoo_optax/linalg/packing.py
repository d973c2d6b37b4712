r"""Symmetric matrices in half the memory, by slices, masks and transposes alone.

A symmetric matrix of size ``d`` is cut into :math:`\begin{pmatrix} A & B^T \\ B & C
\end{pmatrix}` with ``h = ceil(d / 2)`` rows in ``A``. Packed it is ``[d + 1, h]``:
first ``B``, then a square with ``A`` in its lower and ``C`` in its upper triangle, then
the diagonal of ``C``. For even ``d`` nothing is wasted. The indices of a triangle would
be a gather, which is what an accelerator does worst.

Source: Gustavson et al., `Rectangular Full Packed Format for Cholesky's Algorithm
<https://doi.org/10.1145/1731022.1731028>`_, 2010, in another order.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def packed_shape(size: int) -> tuple[int, int]:
    """The sides of a packed matrix.

    Example:
      >>> packed_shape(1024), packed_shape(5)
      ((1025, 512), (6, 3))
    """
    return size + 1, -(-size // 2)


def pack(matrices: jax.Array) -> jax.Array:
    """Symmetric matrices ``[..., d, d]`` to ``[..., d + 1, ceil(d / 2)]``.

    Only the lower triangle is read. Any dtype; for odd ``d`` the gaps are zero.

    Example:
      >>> pack(jnp.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]]))
      Array([[3, 5],
             [1, 0],
             [2, 4],
             [6, 0]], dtype=int32)
    """
    size = matrices.shape[-1]
    half = -(-size // 2)
    top = matrices[..., :half, :half]
    below = matrices[..., half:, :half]
    last = matrices[..., half:, half:]
    gap = 2 * half - size
    last = jnp.pad(last, [*[(0, 0)] * (last.ndim - 2), (0, gap), (0, gap)])
    lower, eye = _masks(half, last.ndim)
    square = jnp.where(lower, top, jnp.swapaxes(last, -2, -1))
    diagonal = jnp.sum(jnp.where(eye, last, jnp.zeros_like(last)), -2, keepdims=True)
    return jnp.concatenate([below, square, diagonal.astype(last.dtype)], -2)


def unpack(packed: jax.Array) -> jax.Array:
    """The matrices again; inverse of :func:`pack`.

    Example:
      >>> matrix = jnp.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]])
      >>> bool((unpack(pack(matrix)) == matrix).all())
      True
    """
    size, half = packed.shape[-2] - 1, packed.shape[-1]
    rest = size - half
    below, square = packed[..., :rest, :], packed[..., rest:size, :]
    diagonal = packed[..., size:, :]  # a row
    lower, eye = _masks(half, square.ndim)
    mirror = jnp.swapaxes(square, -2, -1)
    top = jnp.where(lower, square, mirror)
    last = jnp.where(eye, diagonal, jnp.where(lower, mirror, square))
    above = jnp.concatenate([top, jnp.swapaxes(below, -2, -1)], -1)
    under = jnp.concatenate([below, last[..., :rest, :rest]], -1)
    return jnp.concatenate([above, under], -2)


def diagonal(packed: jax.Array) -> jax.Array:
    """The diagonals ``[..., d]`` of packed matrices.

    Example:
      >>> diagonal(pack(jnp.array([[1, 2, 3], [2, 4, 5], [3, 5, 6]])))
      Array([1, 4, 6], dtype=int32)
    """
    size, half = packed.shape[-2] - 1, packed.shape[-1]
    square = packed[..., size - half : size, :]
    _, eye = _masks(half, square.ndim)
    first = jnp.sum(jnp.where(eye, square, jnp.zeros_like(square)), -1)
    last = packed[..., size, : size - half]
    return jnp.concatenate([first.astype(packed.dtype), last], -1)


def is_packed(matrices: jax.Array) -> bool:
    """Whether matrices are packed: their shape says it, that of others is square.

    Example:
      >>> is_packed(jnp.zeros((7, 5, 2))), is_packed(jnp.zeros((7, 4, 4)))
      (True, False)
    """
    return matrices.shape[-2] != matrices.shape[-1]


def _masks(size: int, ndim: int) -> tuple[jax.Array, jax.Array]:
    """The lower triangle with its diagonal, and the diagonal."""
    shape = (1,) * (ndim - 2) + (size, size)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, ndim - 2)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, ndim - 1)
    return row >= column, row == column
