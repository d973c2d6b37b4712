"""Spectral and sign descent: directions without statistics."""

from __future__ import annotations

from typing import Any

import jax
import optax

from shampoo_optax.linalg import orthogonal
from shampoo_optax.transforms._numbers import wide
from shampoo_optax.transforms.factors import Stacks, check_stacks


def spectral(
    method: orthogonal.Orthogonalization = orthogonal.NewtonSchulz(),
    scale: orthogonal.ScaleRule = orthogonal.AspectRatio(),
) -> optax.GradientTransformationExtraArgs:
    r"""Replace every matrix of a stack by its orthogonal factor: Muon's direction.

    Equals :math:`s(m, n) \cdot U V^T` for a block :math:`F = U \Sigma V^T` of shape
    :math:`m \times n`. Scale-invariant, not linear. With ``AspectRatio()`` and a
    Nesterov momentum in front it is ``optax.contrib.muon``'s matrix part.

    Acts on stacks of matrices ``{"1024x384": [n, 1024, 384], ...}``: use it inside
    :func:`blockwise` with ``BlockLayout(math.inf)``, which leaves whole matrices.

    Args:
      method: how the factor is computed.
      scale: how long it is; the update's unit is that of ``s`` per singular value.

    Returns:
      The transformation, without state.

    Raises:
      TypeError, ValueError: the updates are not stacks of matrices (at init).

    Example:
      >>> tx = spectral(orthogonal.SVD())
      >>> stacks = {"2x2": jnp.diag(jnp.array([5.0, 0.1]))[None]}
      >>> tx.update(stacks, tx.init(stacks))[0]["2x2"].round(3)
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)

    Source: Carlson et al., `Preconditioned Spectral Descent
    <https://papers.nips.cc/paper/2015/hash/f50a6c02a3fc5a3a5d4d9391f05f3efc>`_, 2015;
    Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """

    def init_fn(stacks: Stacks) -> optax.EmptyState:
        check_stacks("spectral", stacks, order=2)
        return optax.EmptyState()

    def update_fn(
        updates: Stacks, state: optax.EmptyState, params: Any = None, **extra: Any
    ) -> tuple[Stacks, optax.EmptyState]:
        del params, extra

        def direction(stack: jax.Array) -> jax.Array:
            factor = method.solve(stack.astype(wide(stack.dtype)))
            return (scale.factor(*stack.shape[1:]) * factor).astype(stack.dtype)

        return jax.tree.map(direction, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def sign() -> optax.GradientTransformationExtraArgs:
    """The sign of every entry: steepest descent in the largest entry.

    Equals ``optax.scale_by_sign()``; acts on any tree. Under :func:`graft` it takes
    another rule's length.

    Example:
      >>> sign().update(jnp.array([2.0, -0.1]), sign().init(jnp.zeros(2)))[0]
      Array([ 1., -1.], dtype=float32)

    Source: Bernstein et al., `signSGD <https://arxiv.org/abs/1802.04434>`_, 2018.
    """
    return optax.with_extra_args_support(optax.scale_by_sign())
