"""Inverse p-th roots of stacks of symmetric positive semi-definite matrices.

The object that is passed is the object that runs: a root method is a frozen
dataclass with one method, ``solve``. :func:`inverse_root` does what all methods
share (exact prescale, symmetrisation, one definition of damping, the gate).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_optax.linalg.auto import Auto as Auto
from shampoo_optax.linalg.coupled_roots import CoupledHigherOrder as CoupledHigherOrder
from shampoo_optax.linalg.coupled_roots import CoupledNewton as CoupledNewton
from shampoo_optax.linalg.eigh import Eigh as Eigh
from shampoo_optax.linalg.eigh import PseudoInverse as PseudoInverse
from shampoo_optax.linalg.eigh import from_basis as from_basis
from shampoo_optax.linalg.masks import all_finite
from shampoo_optax.linalg.method import RootMethod as RootMethod
from shampoo_optax.linalg.method import Solution as Solution
from shampoo_optax.linalg.minimax import Minimax as Minimax
from shampoo_optax.linalg.scaling import Damping, prescale, unscale


class InverseRoot(NamedTuple):
    """Inverse roots and whether each may be used."""

    root: jax.Array  # [..., d, d]
    accepted: jax.Array  # [...], bool


def inverse_root(
    method: RootMethod,
    matrices: jax.Array,
    p: float,
    *,
    eps: ArrayLike = 0.0,
    eps_rel: ArrayLike = 1e-6,
) -> InverseRoot:
    """``(A + delta I)^(-1/p)`` with ``delta = max(eps, eps_rel * lambda_max)``.

    Args:
      method: how, for example :class:`Eigh`.
      matrices: ``[..., d, d]``, symmetric positive semi-definite up to rounding.
      p: the root, static.
      eps: absolute damping, in the units of ``matrices``.
      eps_rel: damping relative to the largest eigenvalue.

    Returns:
      The roots and, per matrix, whether the root may be used: the input was
      finite and not zero, the output is finite, and the residual is within
      ``method.max_residual``. A zero matrix is refused only where the damping
      is relative (it then has no scale); with ``eps_rel=0`` its root is
      ``eps^(-1/p) I``.

    Raises:
      ValueError: the method cannot take this root.

    Example:
      >>> inverse_root(Eigh(), 16.0 * jnp.eye(2), 4, eps_rel=0.0).root
      Array([[0.5, 0. ],
             [0. , 0.5]], dtype=float32)
    """
    method.check(p)
    scaled, dtype = prescale(matrices), matrices.dtype
    unit = unscale(jnp.ones(scaled.exponent.shape, dtype), -scaled.exponent)
    relative = jnp.asarray(eps_rel, dtype)
    absolute = unscale(jnp.asarray(eps, dtype), -scaled.exponent)
    damping = Damping(absolute, relative)
    solution = method.solve(scaled.matrix, damping, p, unit=unit)
    # The whole part of the scale's root is exact: in float32, 2**-25.5 would not be.
    back = -scaled.exponent.astype(dtype) / p
    whole = jnp.floor(back)
    back = unscale(jnp.exp2(back - whole), whole.astype(jnp.int32))
    root = solution.root * back[..., None, None]
    accepted = (
        scaled.usable
        & (scaled.nonzero | (relative == 0))
        & all_finite(root, (-2, -1))
        & (solution.residual <= method.max_residual)
    )
    return InverseRoot(root, accepted)
