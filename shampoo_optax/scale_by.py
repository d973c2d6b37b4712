"""``scale_by_*``: the parts put together, without a learning rate."""

from __future__ import annotations

import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.linalg import roots
from shampoo_optax.transforms import grafting as magnitudes
from shampoo_optax.transforms.blockwise import blockwise
from shampoo_optax.transforms.exponents import Exponents
from shampoo_optax.transforms.filtering import filter_gradient
from shampoo_optax.transforms.graft import graft
from shampoo_optax.transforms.kronecker import kronecker
from shampoo_optax.transforms.refresh import Refresh


def scale_by_shampoo(
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
    *,
    b3: ArrayLike | None = None,
    layout: BlockLayout = BlockLayout(),
    refresh: Refresh = Refresh(),
    root: roots.RootMethod = roots.Eigh(),
    grafting: optax.GradientTransformation | None = magnitudes.adam(),
    exponents: Exponents | None = None,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates according to Shampoo, with grafting.

    Equals ``blockwise(filter_gradient(graft(kronecker(...), grafting)), layout)``,
    with ``filter_gradient(grafting)`` for what the layout does not block: each part
    is documented, and can be put together otherwise, in its own place.

    Args:
      b1: decay of the gradient's moving average; None for no average and no state.
      b2: decay of the Kronecker factors; 1 sums them.
      eps: absolute damping of the factors, in units of squared gradients.
      eps_rel: damping relative to a factor's largest eigenvalue.
      b3: decay of the average used in this step only; None means ``b1``.
      layout: which blocks.
      refresh: when roots are computed anew.
      root: how they are computed.
      grafting: the magnitude rule, for example ``grafting.adam(b2, eps)``; None uses
        Shampoo's own magnitude, and leaves vectors and scalars as they come.
      exponents: overrides of the roots' exponents, see :func:`kronecker`.
      bias_correction: of the average and of the factors (the magnitude rule has its
        own).
      mu_dtype: of the stored average; None means the parameters' dtype.

    Returns:
      The transformation; its updates have the unit of the magnitude rule's.

    Raises:
      ValueError, TypeError: see :func:`shampoo`.

    Example:
      >>> tx = optax.chain(scale_by_shampoo(), optax.scale_by_learning_rate(1e-3))
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.zeros(3)}
      >>> updates, state = tx.update(params, tx.init(params))
      >>> jax.tree.map(jnp.shape, updates)
      {'bias': (3,), 'kernel': (4, 3)}

    Source: Gupta, Koren and Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_,
    2018; Shi et al., `A Distributed Data-Parallel PyTorch Implementation of the
    Distributed Shampoo Optimizer <https://arxiv.org/abs/2309.06497>`_, 2023.
    """
    direction: optax.GradientTransformation = kronecker(
        b2,
        eps,
        eps_rel,
        root=root,
        refresh=refresh,
        exponents=exponents,
        bias_correction=bias_correction,
    )
    magnitude = magnitudes.sgd() if grafting is None else grafting
    if grafting is not None:
        direction = graft(direction, grafting, start=refresh.start)

    def filtered(
        inner: optax.GradientTransformation,
    ) -> optax.GradientTransformationExtraArgs:
        if b1 is None:
            return optax.with_extra_args_support(inner)
        return filter_gradient(
            inner, b1, b3, bias_correction=bias_correction, mu_dtype=mu_dtype
        )

    return blockwise(filtered(direction), layout, rest=filtered(magnitude))
