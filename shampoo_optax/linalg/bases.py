"""Eigenbases of stacks of symmetric positive semi-definite matrices.

The object that is passed is the object that runs: a basis method is a frozen dataclass
with one method, ``solve``. :func:`new_basis` does what all methods share (exact
prescale, ridge, the gate).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_optax.linalg.auto_basis import Auto as Auto
from shampoo_optax.linalg.basis_methods import QR as QR
from shampoo_optax.linalg.basis_methods import Basis as Basis
from shampoo_optax.linalg.basis_methods import BasisMethod as BasisMethod
from shampoo_optax.linalg.basis_methods import CholeskyQR2 as CholeskyQR2
from shampoo_optax.linalg.basis_methods import Eigh as Eigh
from shampoo_optax.linalg.basis_methods import Jacobi as Jacobi
from shampoo_optax.linalg.basis_methods import checked as checked
from shampoo_optax.linalg.basis_methods import off_diagonal as off_diagonal
from shampoo_optax.linalg.masks import chosen
from shampoo_optax.linalg.precisions import identity_like, whole
from shampoo_optax.linalg.scaling import prescale, unscale


class NewBasis(NamedTuple):
    """Bases that may be used, the old ones where not."""

    vectors: jax.Array  # [n, d, d]
    values: jax.Array  # [n, d]: diagonal of Q^T A Q, without the ridge
    null: jax.Array  # [n, d], bool: directions the matrix has nothing of
    accepted: jax.Array  # [n], bool


def new_basis(
    method: BasisMethod, matrices: jax.Array, basis: jax.Array, *, ridge: ArrayLike = 0
) -> NewBasis:
    """Eigenbases of ``A + ridge I``, where they may be used.

    Args:
      method: how, for example :class:`Eigh`.
      matrices: ``[n, d, d]``, symmetric positive semi-definite up to rounding.
      basis: ``[n, d, d]``, in use so far.
      ridge: in the units of ``matrices``; only the QR algorithm sees it.

    Returns:
      The bases; the old one where the input was not finite or zero, or the new one
      is not finite. A direction is *null* where the matrix has at most ``d *
      finfo.eps`` of its largest value there: its place in the null space is rounding.

    Example:
      >>> matrices = jnp.diag(jnp.array([4.0, 0.0]))[None]
      >>> found = new_basis(Eigh(), matrices, jnp.eye(2)[None])
      >>> jnp.abs(found.vectors[0]), found.null[0]
      (Array([[0., 1.],
             [1., 0.]], dtype=float32), Array([ True, False], dtype=bool))
    """
    scaled, dtype = prescale(matrices), matrices.dtype
    shift = unscale(jnp.asarray(ridge, dtype), -scaled.exponent)
    eye = identity_like(matrices)
    found = method.solve(scaled.matrix + shift[:, None, None] * eye, basis)
    values = found.values - shift[:, None]
    largest = jnp.max(values, axis=-1, keepdims=True)
    null = values <= matrices.shape[-1] * jnp.finfo(dtype).eps * largest
    accepted = scaled.usable & scaled.nonzero & found.finite
    vectors = chosen(accepted[:, None, None], found.vectors, basis)
    values = unscale(values, scaled.exponent[:, None])
    return NewBasis(vectors, values, null & accepted[:, None], accepted)


def straightened(basis: jax.Array) -> jax.Array:
    """A basis in float32, orthogonal again where it was kept in bfloat16.

    One Newton-Schulz step squares the distance from orthogonal, here 2**-9 an entry.
    Without it the QR algorithm, which turns the basis in use, would add up what every
    refresh rounds.

    Example:
      >>> turn = jnp.array([[[0.6, -0.8], [0.8, 0.6]]])
      >>> back = straightened(turn.astype(jnp.bfloat16))
      >>> (back @ jnp.swapaxes(back, 1, 2)).round(4)
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)
    """
    if basis.dtype != jnp.bfloat16:
        return basis
    basis = basis.astype(jnp.float32)
    return 1.5 * basis - 0.5 * whole(basis, whole(jnp.swapaxes(basis, -2, -1), basis))
