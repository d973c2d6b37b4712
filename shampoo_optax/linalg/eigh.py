"""Roots by eigendecomposition."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax.linalg.method import Solution
from shampoo_optax.linalg.per_matrix import in_turn, singly
from shampoo_optax.linalg.precisions import PRECISION, symmetric
from shampoo_optax.linalg.scaling import Damping

# Of symmetric matrices: eigenvectors, and eigenvalues in ascending order.
Decomposition = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


@dataclass(frozen=True)
class PseudoInverse:
    """Give eigenvalues up to ``max(rank_rtol * lambda_max, rank_atol)`` the value 0.

    Args:
      rank_rtol: relative cut-off; None means ``d * finfo(dtype).eps``.
      rank_atol: absolute cut-off, in the units of the matrices.
    """

    rank_rtol: float | None = 0.0
    rank_atol: float = 0.0


@dataclass(frozen=True)
class Eigh:
    """Roots by eigendecomposition: exact, any real ``p``; the default on CPUs.

    Equals ``V diag((max(w, 0) + delta)^(-1/p)) V^T``. On a TPU, by Jacobi's rotations.

    Args:
      double_precision: decompose in float64, also where jax_enable_x64 is off; not on
        TPUs, which have none. In float32 LAPACK's eigenvalues are wrong by 1e-7 of the
        largest, which is a relative error of 2e-2 in the root at ``eps_rel = 1e-6``.
      shift: where an eigenvalue is negative, shift the whole spectrum up by it
        (Meta's rule) in place of clipping it.
      pseudo_inverse: drop small eigenvalues and add no damping.
    """

    double_precision: bool = True
    shift: bool = False
    pseudo_inverse: PseudoInverse | None = None
    max_residual: float = math.inf

    def check(self, p: float) -> None:
        """Every positive root works."""

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        own = matrices.dtype
        wide = jnp.float64 if self.double_precision else own

        def half(
            a: jax.Array,
            absolute: jax.Array,
            u: jax.Array,
            eigh: Decomposition = lapack,
            wide: DTypeLike = wide,
        ) -> jax.Array:
            # Wide one by one, where it is one by one: the stack stays as it is.
            v, w = eigh(a.astype(wide))
            given = damping._replace(absolute=absolute)
            powers = self.powers(w, given, p, u, ascending=True)
            return v * jnp.sqrt(powers)[..., None, :]

        def root(half: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
            # S S^T: a quarter quicker than V f(w) V^T, which has two operands.
            s = half(*arrays)
            square = jnp.matmul(s, jnp.swapaxes(s, -2, -1), precision=PRECISION)
            # Both triangles are sums of the same products: they differ, if at all, in a
            # last bit of float64, and a pass over all matrices would be for that bit.
            return square.astype(own) if square.dtype != own else symmetric(square)

        flat = matrices.reshape(-1, *matrices.shape[-2:])
        numbers = damping.absolute.reshape(-1), unit.reshape(-1)
        with jax.enable_x64(True) if self.double_precision else nullcontext():
            found = lax.platform_dependent(
                flat,
                *numbers,
                cpu=partial(in_turn, partial(root, singly(half))),
                tpu=partial(root, partial(half, eigh=jacobi, wide=own)),
                default=partial(root, half),
            )
        return Solution(found.reshape(matrices.shape), jnp.zeros_like(unit))

    def powers(
        self,
        w: jax.Array,
        damping: Damping,
        p: float,
        unit: jax.Array,
        *,
        ascending: bool = False,
    ) -> jax.Array:
        """What the eigenvalues ``w [..., d]``, in ascending order or not, become."""
        tiny = jnp.finfo(w.dtype).tiny
        if ascending:
            first, last = w[..., :1], w[..., -1:]
        else:
            first = jnp.min(w, axis=-1, keepdims=True)
            last = jnp.max(w, axis=-1, keepdims=True)
        lowest, largest = jnp.minimum(first, 0.0), jnp.maximum(last, 0.0)
        if self.pseudo_inverse is None:
            w = w - lowest if self.shift else jnp.maximum(w, 0.0)
            delta = damping.ridge(largest[..., 0])[..., None]
            return jnp.maximum(w + delta, tiny) ** (-1.0 / p)
        rtol = self.pseudo_inverse.rank_rtol
        if rtol is None:
            rtol = w.shape[-1] * float(jnp.finfo(unit.dtype).eps)
        atol = self.pseudo_inverse.rank_atol * unit[..., None].astype(w.dtype)
        keep = w > jnp.maximum(rtol * largest, atol)
        return jnp.where(keep, jnp.maximum(w, tiny) ** (-1.0 / p), 0.0)


def from_basis(
    method: Eigh,
    vectors: jax.Array,
    values: jax.Array,
    p: float,
    *,
    eps: ArrayLike = 0.0,
    eps_rel: ArrayLike = 1e-6,
) -> jax.Array:
    """The root that :class:`Eigh` makes of a basis and its values, exact or not.

    Args:
      method: says what values become.
      vectors: ``[..., d, d]``, directions in columns.
      values: ``[..., d]``, what the matrix has of each.
      p: the root, static.
      eps: absolute damping, in the units of ``values``.
      eps_rel: damping relative to the largest value.

    Returns:
      ``[..., d, d]``.

    Example:
      >>> from_basis(Eigh(), jnp.eye(2), jnp.array([4.0, 16.0]), 2, eps_rel=0.0)
      Array([[0.5 , 0.  ],
             [0.  , 0.25]], dtype=float32)
    """
    absolute = jnp.broadcast_to(jnp.asarray(eps, values.dtype), values.shape[:-1])
    damping = Damping(absolute, jnp.asarray(eps_rel, values.dtype))
    unit = jnp.ones_like(absolute)
    return rebuilt(vectors, method.powers(values, damping, p, unit))


def lapack(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors and ascending eigenvalues, as a platform has them by default.

    Example:
      >>> lapack(jnp.diag(jnp.array([2.0, 1.0])))[1]
      Array([1., 2.], dtype=float32)
    """
    # LAPACK keeps columns together: transposed, a symmetric matrix is there already.
    transposed = jnp.swapaxes(matrices, -2, -1)
    w, v = jnp.linalg.eigh(transposed, symmetrize_input=False)
    return v, w


def jacobi(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same by rotations, which GPUs and TPUs have, at any size.

    A TPU's default divides and conquers, one matrix after another, and takes minutes
    to compile.
    """
    implementation = lax.linalg.EighImplementation.JACOBI
    v, w = lax.linalg.eigh(
        matrices, symmetrize_input=False, implementation=implementation
    )
    return v, w


def rebuilt(vectors: jax.Array, powers: jax.Array) -> jax.Array:
    """``V diag(powers) V^T``.

    Example:
      >>> rebuilt(jnp.eye(2), jnp.array([1.0, 2.0])).trace()
      Array(3., dtype=float32)
    """
    transposed = jnp.swapaxes(vectors, -2, -1)
    return jnp.matmul(vectors * powers[..., None, :], transposed, precision=PRECISION)
