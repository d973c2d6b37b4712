"""The optimizers people name: chains, as in ``optax.adamw``."""

# Annotations stay objects here: Optax's contract suite reads that of learning_rate.
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax._chain import Decay, chained
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.linalg import roots
from shampoo_optax.scale_by import (
    scale_by_shampoo,
)
from shampoo_optax.transforms import grafting as magnitudes
from shampoo_optax.transforms.exponents import Exponents
from shampoo_optax.transforms.factors import Correction
from shampoo_optax.transforms.graft import Scope
from shampoo_optax.transforms.refresh import Refresh
from shampoo_optax.transforms.state_dtypes import StateDtypes
from shampoo_optax.transforms.weight_decay import Kind


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
    weight_decay: ArrayLike | None = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    b3: ArrayLike | None = None,
    layout: BlockLayout = BlockLayout(),
    refresh: Refresh = Refresh(),
    root: roots.RootMethod = roots.Auto(),
    grafting: optax.GradientTransformation | None = magnitudes.adam(),
    graft_scope: Scope = "block",
    exponents: Exponents | None = None,
    correction: Correction | None = None,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
    weight_decay_type: Kind = "decoupled",
    peak_learning_rate: ArrayLike | None = None,
    momentum: ArrayLike | None = None,
    dampening: ArrayLike = 0.0,
    nesterov: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """Shampoo with grafting: a drop-in for ``optax.adamw``.

    Equals ``optax.chain(scale_by_shampoo(...), add_weight_decay(...),
    optax.scale_by_learning_rate(learning_rate))``. With the default grafting every
    block moves exactly as far as Adam would have moved it, so AdamW's learning rate,
    schedule and weight decay are the place to begin.

    Args:
      learning_rate: a number or a schedule, in AdamW's unit.
      b1: decay of the gradient's moving average; None for none.
      b2: decay of the Kronecker factors; 1 sums them (AdaGrad).
      eps: absolute damping of the factors, in units of squared gradients.
      eps_rel: damping relative to a factor's largest eigenvalue.
      weight_decay: coefficient; None for none.
      mask: which parameters decay, as in ``optax.adamw``.
      b3: decay of the average used in this step only; None means ``b1``.
      layout: which blocks, see :class:`BlockLayout`.
      refresh: when roots are computed anew, see :class:`Refresh`.
      root: how they are computed, for example ``roots.Eigh()``.
      grafting: the magnitude rule, for example ``grafting.adam(b2, eps)``; None uses
        Shampoo's own magnitude.
      graft_scope: what has one norm, a ``"block"`` (Meta) or an ``"array"`` (Google).
      exponents: overrides of the roots' exponents, see :func:`kronecker`.
      correction: ``"kl"`` for KL-Shampoo, see :func:`kronecker`.
      bias_correction: of the average and of the factors.
      mu_dtype: of the stored average; None means the parameters' dtype.
      state_dtypes: of all that is stored, see :class:`StateDtypes`.
      precision: of products on a GPU or TPU, see :func:`kronecker`.
      weight_decay_type: ``"l2"``, ``"decoupled"``, ``"corrected"`` or
        ``"independent"``, see :func:`add_weight_decay`.
      peak_learning_rate: for the last two with a schedule.
      momentum: heavy-ball momentum on the finished direction, after weight decay;
        None for none.
      dampening: the direction enters that momentum times ``1 - dampening``.
      nesterov: look ahead, as ``optax.trace`` does.

    Returns:
      The optimizer.

    Raises:
      ValueError: a number is out of range or NaN, or an option is unknown (at
        construction); shapes or trees are not those of init (at update).
      TypeError: a number is not one, or a parameter is not a real floating-point
        array (at init). Numbers that arrive traced (``optax.inject_hyperparams``)
        are not checked.

    Example:
      >>> tx = shampoo(1e-3, weight_decay=0.1)  # was: optax.adamw(1e-3, ...)
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> params = optax.apply_updates(params, updates)
      >>> params["bias"].round(4)
      Array([0.9989, 0.9989, 0.9989], dtype=float32)

    Source: Gupta, Koren and Singer, `Shampoo <https://arxiv.org/abs/1802.09568>`_,
    2018; Shi et al., `A Distributed Data-Parallel PyTorch Implementation of the
    Distributed Shampoo Optimizer <https://arxiv.org/abs/2309.06497>`_, 2023.
    """
    _checks.numbers(
        "shampoo",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        b3=b3,
        eps=eps,
        eps_rel=eps_rel,
        weight_decay=weight_decay,
        momentum=momentum,
        dampening=dampening,
    )
    decay = Decay(weight_decay, weight_decay_type, peak_learning_rate, mask)
    scaled = scale_by_shampoo(
        b1,
        b2,
        eps,
        eps_rel,
        b3=b3,
        layout=layout,
        refresh=refresh,
        root=root,
        grafting=grafting,
        graft_scope=graft_scope,
        exponents=exponents,
        correction=correction,
        bias_correction=bias_correction,
        mu_dtype=mu_dtype,
        state_dtypes=state_dtypes,
        precision=precision,
    )
    after: list[optax.GradientTransformation] = []
    if momentum is not None:
        trace = optax.trace(momentum, nesterov, state_dtypes.momentum)
        after = [optax.scale(1.0 - dampening), trace]
    return chained("shampoo", scaled, learning_rate, decay, after)


def kl_shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
    weight_decay: ArrayLike | None = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    b3: ArrayLike | None = None,
    layout: BlockLayout = BlockLayout(),
    refresh: Refresh = Refresh(),
    root: roots.RootMethod = roots.Auto(),
    grafting: optax.GradientTransformation | None = magnitudes.adam(),
    graft_scope: Scope = "block",
    mu_dtype: DTypeLike | None = None,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
    weight_decay_type: Kind = "decoupled",
    peak_learning_rate: ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """KL-Shampoo: each factor is measured through the others.

    Equals ``shampoo(..., correction="kl")``: factors that fit the gradient's
    covariance best as a Kronecker product, with exponent 1/2 each.

    Args:
      learning_rate: a number or a schedule, in AdamW's unit.
      b1: see :func:`shampoo`, as all that follow.
      b2: decay of the factors.
      eps: absolute damping.
      eps_rel: relative damping.
      weight_decay: coefficient; None for none.
      mask: which parameters decay.
      b3: decay of the average used in this step only.
      layout: which blocks.
      refresh: when roots are computed anew.
      root: how they are computed.
      grafting: the magnitude rule; None uses KL-Shampoo's own magnitude.
      graft_scope: what has one norm.
      mu_dtype: of the stored average.
      state_dtypes: of all that is stored.
      precision: of products on a GPU or TPU, see :func:`kronecker`.
      weight_decay_type: see :func:`add_weight_decay`.
      peak_learning_rate: see :func:`add_weight_decay`.

    Returns:
      The optimizer.

    Raises:
      ValueError, TypeError: see :func:`shampoo`.

    Example:
      >>> tx = kl_shampoo(1e-3, refresh=Refresh(5))
      >>> state = tx.init({"kernel": jnp.ones((4, 3))})

    Source: Lin et al., `Understanding and Improving Shampoo and SOAP via
    Kullback-Leibler Minimization <https://arxiv.org/abs/2509.03378>`_, 2025.
    """
    return shampoo(
        learning_rate,
        b1,
        b2,
        eps,
        eps_rel,
        weight_decay,
        mask,
        b3=b3,
        layout=layout,
        refresh=refresh,
        root=root,
        grafting=grafting,
        graft_scope=graft_scope,
        correction="kl",
        mu_dtype=mu_dtype,
        state_dtypes=state_dtypes,
        precision=precision,
        weight_decay_type=weight_decay_type,
        peak_learning_rate=peak_learning_rate,
    )
