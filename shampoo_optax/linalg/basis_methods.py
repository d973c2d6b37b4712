"""Ways to compute eigenbases of ``[n, d, d]``; see :mod:`bases` for what they share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.eigh import Decomposition, jacobi, lapack
from shampoo_optax.linalg.masks import all_finite
from shampoo_optax.linalg.per_matrix import in_turn, per_matrix_on_cpu, singly
from shampoo_optax.linalg.precisions import identity_like, whole


class Basis(NamedTuple):
    """A basis and how much a matrix has of each of its directions."""

    vectors: jax.Array  # [..., d, d]: directions are columns
    values: jax.Array  # [..., d]: the diagonal of Q^T A Q
    finite: jax.Array  # [...], bool: whether all vectors are


def checked(vectors: jax.Array, values: jax.Array) -> Basis:
    """A basis with its flag, as every method returns it.

    Args:
      vectors: ``[..., d, d]``, directions in columns.
      values: ``[..., d]``.

    Example:
      >>> checked(jnp.full((1, 2, 2), jnp.nan), jnp.zeros((1, 2))).finite
      Array([False], dtype=bool)
    """
    return Basis(vectors, values, all_finite(vectors, (-2, -1)))


class BasisMethod(Protocol):
    """A way to compute an eigenbasis."""

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """An eigenbasis of ``[n, d, d]``, with the basis in use as a start."""


@dataclass(frozen=True)
class Eigh:
    """Eigenbases by eigendecomposition: exact; the default on CPUs and GPUs.

    On a TPU, as :class:`Jacobi`.

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
                new.finite | ~stale,
            )

        def kept() -> Basis:
            return Basis(basis, _diagonal(rotated), jnp.ones_like(stale))

        # One decision for a stack, on the device: all of it, or nothing.
        return lax.cond(jnp.any(stale), refreshed, kept)

    def _exact(self, matrices: jax.Array) -> Basis:
        wide = jnp.float64 if self.double_precision else matrices.dtype

        def by(eigh: Decomposition) -> Callable[[jax.Array], Basis]:
            def basis(a: jax.Array) -> Basis:
                vectors, values = eigh(a.astype(wide))
                return checked(vectors.astype(a.dtype), values.astype(a.dtype))

            return basis

        with jax.enable_x64(True) if self.double_precision else nullcontext():
            return lax.platform_dependent(
                matrices,
                cpu=partial(in_turn, by(singly(lapack))),
                tpu=_by_rotations,
                default=by(lapack),
            )


@dataclass(frozen=True)
class Jacobi:
    """Eigenbases by Jacobi's rotations, all matrices of a stack at once.

    On GPUs and TPUs, whose libraries have them, in float32; LAPACK's eigenvectors on a
    CPU. Directions in ascending order of their values, as of :class:`Eigh`.

    Source: Golub and Van Loan, Matrix Computations, 4th edition, 2013, section 8.5.
    """

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        del basis
        one_by_one = partial(in_turn, lambda a: checked(*singly(lapack)(a)))
        return lax.platform_dependent(matrices, cpu=one_by_one, default=_by_rotations)


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
            new = whole(r, s), whole(vectors, s)
            return tuple(
                jnp.where(going, x, old) for x, old in zip(new, at, strict=True)
            )

        at = _rotate(matrices, basis), basis
        at = lax.fori_loop(0, self.max_iterations, step, at)
        values = _diagonal(at[0])
        order = jnp.argsort(values, axis=-1, stable=True)
        vectors = jnp.take_along_axis(at[1], order[:, None, :], axis=-1)
        return checked(vectors, jnp.take_along_axis(values, order, axis=-1))


@dataclass(frozen=True)
class CholeskyQR2:
    """Eigenbases by orthogonal iteration, warm-started; matrix products and Cholesky.

    Equals ``Q -> orth(A Q)``, columns normalised first, orthogonalised by a damped
    Cholesky factor and then a plain one: numerically Householder QR near an eigenbasis,
    where LAPACK has no fast QR. Far from one, as in the first steps from the identity,
    that fails; such a step is taken with three damped and two plain factors. Columns
    keep their places, so moments kept in the basis stay theirs.

    Args:
      iterations: steps from a basis in use.
      cold_iterations: steps from the identity, where no basis was found yet.
      damping: share of the trace added to a damped Gram matrix, so that columns of the
        null space are not rounding noise.

    Source: Yamamoto et al., `Roundoff error analysis of the CholeskyQR2 algorithm
    <https://etna.ricam.oeaw.ac.at/volumes/2011-2020/vol44/abstract.php?vol=44&pages=306-326>`_,
    2015; Fukaya et al., `Shifted Cholesky QR for Computing the QR Factorization of
    Ill-Conditioned Matrices <https://arxiv.org/abs/1809.11085>`_, 2020 (damping).
    """

    iterations: int = 1
    cold_iterations: int = 10
    damping: float = 1e-6

    def solve(self, matrices: jax.Array, basis: jax.Array) -> Basis:
        """See :class:`BasisMethod`."""
        # Zero, as a dead slot, or not finite: without a basis, whatever is tried.
        hopeless = ~(jnp.trace(matrices, axis1=-2, axis2=-1) > 0)
        begins = jnp.all(basis == identity_like(basis), axis=(-2, -1))
        cold = jnp.any(begins & ~hopeless)
        steps = jnp.where(cold, self.cold_iterations, self.iterations)

        def unfinished(at: _Iteration) -> jax.Array:
            return at.count < steps

        def step(at: _Iteration) -> _Iteration:
            moved = _normalised(whole(matrices, at.vectors))
            damped, plain = jnp.where(at.rough, 3, 1), jnp.where(at.rough, 2, 1)

            def orthogonalise(i: jax.Array, x: jax.Array) -> jax.Array:
                damping = jnp.where(i < damped, self.damping, 0.0).astype(x.dtype)
                return _orthogonalised(x, damping)

            new = lax.fori_loop(0, damped + plain, orthogonalise, moved)
            # The last pass shows what the one before left: far from one it has failed.
            residual = jnp.max(jnp.abs(_gram(new) - identity_like(new)), axis=(-2, -1))
            fine = residual < 1e-3  # a NaN is not
            vectors = jnp.where(fine[:, None, None], new, at.vectors)
            # Where one failed that can be found, all are tried again, thoroughly.
            again = ~at.rough & ~jnp.all(fine | hopeless)
            count = at.count + jnp.where(again, 0, 1)
            return _Iteration(count, at.rough | again, vectors)

        begin = _Iteration(jnp.zeros_like(steps), cold, basis)
        vectors = lax.while_loop(unfinished, step, begin).vectors
        return checked(vectors, _diagonal(_rotate(matrices, vectors)))


class _Iteration(NamedTuple):
    """Where an orthogonal iteration is."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    rough: jax.Array  # [], bool: whether two factors were not enough
    vectors: jax.Array


def off_diagonal(matrices: jax.Array) -> jax.Array:
    """The share of a matrix's norm that is off its diagonal.

    Example:
      >>> off_diagonal(jnp.array([[[3.0, 0.0], [4.0, 0.0]]]))
      Array([0.8], dtype=float32)
    """
    total = jnp.sum(matrices * matrices, axis=(-2, -1))
    beside = jnp.where(identity_like(matrices) == 1, jnp.zeros_like(matrices), matrices)
    rest = jnp.sum(beside * beside, axis=(-2, -1))
    return jnp.sqrt(rest / jnp.maximum(total, jnp.finfo(total.dtype).tiny))


def _by_rotations(matrices: jax.Array) -> Basis:
    return checked(*jacobi(matrices))


def _rotate(matrices: jax.Array, basis: jax.Array) -> jax.Array:
    return whole(jnp.swapaxes(basis, -2, -1), whole(matrices, basis))


def _gram(x: jax.Array) -> jax.Array:
    return whole(jnp.swapaxes(x, -2, -1), x)


def _normalised(x: jax.Array) -> jax.Array:
    norm = jnp.sqrt(jnp.sum(x * x, axis=-2, keepdims=True))
    return x / jnp.maximum(norm, jnp.finfo(x.dtype).tiny)


def _orthogonalised(x: jax.Array, damping: jax.Array) -> jax.Array:
    gram = _gram(x)
    trace = jnp.trace(gram, axis1=-2, axis2=-1)[..., None, None]

    def solve(gram: jax.Array, x: jax.Array) -> jax.Array:
        factor = jnp.linalg.cholesky(gram, symmetrize_input=False)
        return lax.linalg.triangular_solve(factor, x, transpose_a=True, lower=True)

    return per_matrix_on_cpu(solve, gram + damping * trace * identity_like(gram), x)


def _diagonal(x: jax.Array) -> jax.Array:
    return jnp.diagonal(x, axis1=-2, axis2=-1)
