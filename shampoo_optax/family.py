"""Shampoo's relatives under the names people know, as :mod:`alias` has Shampoo."""

# Annotations stay objects here: Optax's contract suite reads that of learning_rate.
from collections.abc import Callable
from typing import Any

import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax._chain import Decay, chained
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.linalg import bases, orthogonal
from shampoo_optax.scale_by import (
    UNCUT,
    scale_by_soap,
    scale_by_spectral_descent,
)
from shampoo_optax.transforms import grafting as magnitudes
from shampoo_optax.transforms.moment import NullSpace
from shampoo_optax.transforms.refresh import Refresh
from shampoo_optax.transforms.state_dtypes import StateDtypes
from shampoo_optax.transforms.weight_decay import Kind


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike | None = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    weight_decay_type: Kind = "decoupled",
    peak_learning_rate: ArrayLike | None = None,
    b3: ArrayLike | None = None,
    layout: BlockLayout = BlockLayout(),
    refresh: Refresh = Refresh(),
    basis: bases.BasisMethod = bases.Auto(),
    grafting: optax.GradientTransformation | None = None,
    null_space: NullSpace = "share",
    mu_dtype: DTypeLike | None = None,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """SOAP: Adam in the eigenbases of Shampoo's factors.

    Equals ``optax.chain(scale_by_soap(...), add_weight_decay(...),
    optax.scale_by_learning_rate(learning_rate))``. With Nesterov's momentum
    and bases from the second step on, which needed fewer steps than either without
    (``docs/choosing.md``). Its best learning rate is two to three times AdamW's.

    Args:
      learning_rate: a number or a schedule, in AdamW's unit.
      b1: decay of the gradient's moving average; None for none.
      b2: decay of the factors and of the second moment.
      eps: added to the root of the second moment, in units of the gradient.
      weight_decay: coefficient; None for none.
      mask: which parameters decay, as in ``optax.adamw``.
      weight_decay_type: see :func:`add_weight_decay`.
      peak_learning_rate: see :func:`add_weight_decay`.
      b3: decay of the average used in this step only; None means ``b1**2``, Nesterov's
        momentum, and ``b1`` is none.
      layout: which blocks.
      refresh: when bases are computed anew; with no start named, first at step 2.
      basis: how, for example ``bases.QR()``.
      grafting: a magnitude rule; None keeps SOAP's own.
      null_space: see :func:`eigenbasis`.
      mu_dtype: of the stored average; None means the parameters' dtype.
      state_dtypes: of all that is stored, see :class:`StateDtypes`.
      precision: of products on a GPU or TPU, see :func:`kronecker`.

    Returns:
      The optimizer.

    Raises:
      ValueError, TypeError: see :func:`shampoo`.

    Example:
      >>> tx = soap(3e-3, weight_decay=0.1)
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024.
    """
    _checks.numbers(
        "soap",
        learning_rate=learning_rate,
        b1=b1,
        b2=b2,
        eps=eps,
        weight_decay=weight_decay,
    )
    decay = Decay(weight_decay, weight_decay_type, peak_learning_rate, mask)
    scaled = scale_by_soap(
        b1,
        b2,
        eps,
        b3=b3,
        layout=layout,
        refresh=refresh,
        basis=basis,
        grafting=grafting,
        null_space=null_space,
        mu_dtype=mu_dtype,
        state_dtypes=state_dtypes,
        precision=precision,
    )
    return chained("soap", scaled, learning_rate, decay)


def spectral_descent(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike | None = 0.95,
    weight_decay: ArrayLike | None = 1e-4,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    weight_decay_type: Kind = "decoupled",
    peak_learning_rate: ArrayLike | None = None,
    b3: ArrayLike | None = None,
    method: orthogonal.Orthogonalization = orthogonal.NewtonSchulz(),
    scale: orthogonal.ScaleRule = orthogonal.MatchRMS(),
    layout: BlockLayout = UNCUT,
    rest: optax.GradientTransformation = magnitudes.adam(),
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Spectral descent: momentum's orthogonal factor, Adam for the rest. Muon.

    Equals ``optax.chain(scale_by_spectral_descent(...), add_weight_decay(...),
    optax.scale_by_learning_rate(learning_rate))``.

    Args:
      learning_rate: a number or a schedule, in AdamW's unit with the default scale.
      b1: decay of the gradient's moving average; None for none.
      weight_decay: coefficient; None for none.
      mask: which parameters decay, as in ``optax.adamw``.
      weight_decay_type: see :func:`add_weight_decay`.
      peak_learning_rate: see :func:`add_weight_decay`.
      b3: decay of the average used in this step only; None means ``b1**2``, Nesterov's
        momentum, and ``b1`` is none.
      method: how orthogonal factors are computed.
      scale: how long they are, for example ``orthogonal.AspectRatio()`` (Muon's).
      layout: which matrices.
      rest: a magnitude rule for vectors and scalars.
      mu_dtype: of the stored average; None means the parameters' dtype.

    Returns:
      The optimizer.

    Raises:
      ValueError, TypeError: a number is out of range.

    Example:
      >>> tx = spectral_descent(1e-3, scale=orthogonal.AspectRatio())
      >>> params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
      >>> updates, state = tx.update(params, tx.init(params), params)

    Source: Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    _checks.numbers(
        "spectral_descent",
        learning_rate=learning_rate,
        b1=b1,
        weight_decay=weight_decay,
    )
    decay = Decay(weight_decay, weight_decay_type, peak_learning_rate, mask)
    scaled = scale_by_spectral_descent(
        b1,
        b3=b3,
        method=method,
        scale=scale,
        layout=layout,
        rest=rest,
        mu_dtype=mu_dtype,
    )
    return chained("spectral_descent", scaled, learning_rate, decay)
