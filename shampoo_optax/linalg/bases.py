"""Eigenbases of stacks of symmetric positive semi-definite matrices.

The object that is passed is the object that runs: a basis method is a frozen dataclass
with one method, ``solve``. :func:`new_basis` does what all methods share (exact
prescale, ridge, the gate).
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from shampoo_optax.linalg.masks import chosen
from shampoo_optax.linalg.per_matrix import per_matrix_on_cpu
from shampoo_optax.linalg.precisions import PRECISION
from shampoo_optax.linalg.scaling import prescale, unscale


class Basis(NamedTuple):
    """A basis and how much a matrix has of each of its directions."""

    vectors: jax.Array  # [..., d, d]: directions are columns
    values: jax.Array  # [..., d]: the diagonal of Q^T A Q


class NewBasis(NamedTuple):
    """Bases that may be used, the old ones where not."""

    vectors: jax.Array  # [n, d, d]
    values: jax.Array  # [n, d]: diagonal of Q^T A Q, without the ridge
    null: jax.Array  # [n, d], bool: directions the matrix has nothing of
    accepted: jax.Array  # [n], bool


class BasisMethod(Protocol):
    """A way to compute an eigenbasis."""

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """An eigenbasis of ``[n, d, d]``, with the basis in use as a start."""


@dataclass(frozen=True)
class Eigh:
    """Eigenbases by eigendecomposition: exact; the default.

    Args:
      tolerance: keep a basis in which the part of the matrix off the diagonal is at
        most this share of its norm; 0 keeps none.
      double_precision: decompose in float64, also where jax_enable_x64 is off.

    Source: Eschenhagen et al., `Purifying Shampoo
    <https://arxiv.org/abs/2506.03595>`_, 2025 (the criterion).
    """

    tolerance: float = 0.0
    double_precision: bool = True

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        if not self.tolerance:
            return self._exact(matrices)
        rotated = _rotate(matrices, basis)
        stale = off_diagonal(rotated) > self.tolerance

        def refreshed() -> Basis:
            new = self._exact(matrices)
            return Basis(
                jnp.where(stale[:, None, None], new.vectors, basis),
                jnp.where(stale[:, None], new.values, _diagonal(rotated)),
            )

        def kept() -> Basis:
            return Basis(basis, _diagonal(rotated))

        # One decision for a stack, on the device: all of it, or nothing.
        return lax.cond(jnp.any(stale), refreshed, kept)

    def _exact(self, matrices: jax.Array) -> Basis:
        wide = jnp.float64 if self.double_precision else matrices.dtype

        def eigh(a: jax.Array) -> tuple[jax.Array, jax.Array]:
            values, vectors = jnp.linalg.eigh(a.astype(wide), symmetrize_input=False)
            return vectors.astype(a.dtype), values.astype(a.dtype)

        with jax.enable_x64(True) if self.double_precision else nullcontext():
            return Basis(*per_matrix_on_cpu(eigh, matrices))


@dataclass(frozen=True)
class QR:
    """Eigenbases by the QR algorithm, warm-started from the basis in use.

    Equals ``B = Q^T A Q``, repeating ``B -> R S, Q -> Q S`` with ``S R = B``, then
    the columns in ascending order of the diagonal of ``B``: the reference system's
    ``QREigendecompositionConfig``.

    Args:
      max_iterations: how often at most.
      tolerance: a basis is done when the part of the matrix off the diagonal is at
        most this share of its norm.
    """

    max_iterations: int = 1
    tolerance: float = 0.0

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""

        def step(_: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple:
            rotated, vectors = at
            going = (off_diagonal(rotated) > self.tolerance)[:, None, None]
            s, r = per_matrix_on_cpu(lambda b: tuple(jnp.linalg.qr(b)), rotated)
            new = _product(r, s), _product(vectors, s)
            return tuple(
                jnp.where(going, x, old) for x, old in zip(new, at, strict=True)
            )

        at = _rotate(matrices, basis), basis
        at = lax.fori_loop(0, self.max_iterations, step, at)
        values = _diagonal(at[0])
        order = jnp.argsort(values, axis=-1, stable=True)
        vectors = jnp.take_along_axis(at[1], order[:, None, :], axis=-1)
        return Basis(vectors, jnp.take_along_axis(values, order, axis=-1))


@dataclass(frozen=True)
class CholeskyQR2:
    """Eigenbases by orthogonal iteration, warm-started; matrix products and Cholesky.

    Equals ``Q -> orth(A Q)``, columns normalised first, orthogonalised twice by a
    damped Cholesky factor: numerically Householder QR near an eigenbasis, where LAPACK
    has no fast QR. Columns keep their places, so moments kept in the basis stay theirs.

    Args:
      iterations: steps from a basis in use.
      cold_iterations: steps from the identity, where no basis was found yet.
      damping: share of the trace added to the first Gram matrix, so that columns
        of the null space are not rounding noise.

    Source: Yamamoto et al., `Roundoff error analysis of the CholeskyQR2 algorithm
    <https://etna.ricam.oeaw.ac.at/volumes/2011-2020/vol44/abstract.php?vol=44&pages=306-326>`_,
    2015.
    """

    iterations: int = 1
    cold_iterations: int = 10
    damping: float = 1e-6

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        cold = jnp.any(jnp.all(basis == _eye(basis), axis=(-2, -1)))
        steps = jnp.where(cold, self.cold_iterations, self.iterations)

        def step(_: jax.Array, q: jax.Array) -> jax.Array:
            new = _normalised(_product(matrices, q))
            new = _orthogonalised(new, self.damping)
            new = _orthogonalised(new, 0.0)
            # The second pass shows what the first left: far from one it has failed.
            residual = jnp.max(jnp.abs(_gram(new) - _eye(new)), axis=(-2, -1))
            fine = (residual < 1e-3)[:, None, None]  # a NaN is not
            return jnp.where(fine, new, q)

        vectors = lax.fori_loop(0, steps, step, basis)
        return Basis(vectors, _diagonal(_rotate(matrices, vectors)))


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
    eye = _eye(matrices)
    found = method.solve(scaled.matrix + shift[:, None, None] * eye, basis)
    values = found.values - shift[:, None]
    largest = jnp.max(values, axis=-1, keepdims=True)
    null = values <= matrices.shape[-1] * jnp.finfo(dtype).eps * largest
    accepted = (
        scaled.usable
        & scaled.nonzero
        & jnp.all(jnp.isfinite(found.vectors), axis=(-2, -1))
    )
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
    return 1.5 * basis - 0.5 * _product(basis, _gram(basis))


def off_diagonal(matrices: jax.Array) -> jax.Array:
    """The share of a matrix's norm that is off its diagonal.

    Example:
      >>> off_diagonal(jnp.array([[[3.0, 0.0], [4.0, 0.0]]]))
      Array([0.8], dtype=float32)
    """
    total = jnp.sum(matrices * matrices, axis=(-2, -1))
    beside = jnp.where(_eye(matrices) == 1, jnp.zeros_like(matrices), matrices)
    rest = jnp.sum(beside * beside, axis=(-2, -1))
    return jnp.sqrt(rest / jnp.maximum(total, jnp.finfo(total.dtype).tiny))


def _rotate(matrices: jax.Array, basis: jax.Array) -> jax.Array:
    return _product(jnp.swapaxes(basis, -2, -1), _product(matrices, basis))


def _gram(x: jax.Array) -> jax.Array:
    return _product(jnp.swapaxes(x, -2, -1), x)


def _normalised(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def _orthogonalised(x: jax.Array, damping: float) -> jax.Array:
    gram = _gram(x)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]

    def solve(gram: jax.Array, x: jax.Array) -> jax.Array:
        factor = jnp.linalg.cholesky(gram, symmetrize_input=False)
        return lax.linalg.triangular_solve(factor, x, transpose_a=True, lower=True)

    return per_matrix_on_cpu(solve, gram + damping * trace * _eye(gram), x)


def _diagonal(x: jax.Array) -> jax.Array:
    return jnp.diagonal(x, axis1=-2, axis2=-1)


def _eye(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(x.shape[-1], dtype=x.dtype), x.shape)


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.matmul(lhs, rhs, precision=PRECISION)
