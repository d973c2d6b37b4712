"""``scale_by_*``: the parts put together, without a learning rate."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.linalg import bases, orthogonal, roots
from shampoo_optax.transforms import grafting as magnitudes
from shampoo_optax.transforms.blockwise import blockwise
from shampoo_optax.transforms.eigenbasis import eigenbasis
from shampoo_optax.transforms.exponents import Exponents
from shampoo_optax.transforms.factors import Correction
from shampoo_optax.transforms.filtering import filter_gradient
from shampoo_optax.transforms.graft import SCOPES, Scope, graft
from shampoo_optax.transforms.kronecker import kronecker
from shampoo_optax.transforms.moment import NullSpace
from shampoo_optax.transforms.refresh import Refresh
from shampoo_optax.transforms.spectral import spectral
from shampoo_optax.transforms.state_dtypes import StateDtypes

# Whole matrices, however large: an orthogonal factor is one of the whole.
UNCUT = BlockLayout(max_preconditioner_dim=math.inf, one_sided_above=math.inf)


def scale_by_shampoo(
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
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
      graft_scope: what has one norm, a ``"block"`` (Meta) or an ``"array"`` (Google).
      exponents: overrides of the roots' exponents, see :func:`kronecker`.
      correction: ``"kl"`` for KL-Shampoo, see :func:`kronecker`.
      bias_correction: of the average and of the factors (the magnitude rule has its
        own).
      mu_dtype: of the stored average; None means the parameters' dtype.
      state_dtypes: of all that is stored, see :class:`StateDtypes`.
      precision: of products on a GPU or TPU, see :func:`kronecker`.

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
    _checks.choice("scale_by_shampoo", "graft_scope", graft_scope, SCOPES)
    direction = kronecker(
        b2,
        eps,
        eps_rel,
        root=root,
        refresh=refresh,
        exponents=exponents,
        largest_factor=layout.largest_factor,
        bias_correction=bias_correction,
        correction=correction,
        state_dtypes=state_dtypes,
        precision=precision,
    )
    grafting = _stored(grafting, state_dtypes)
    if exponents is not None:  # they may tell rows from columns
        layout = dataclasses.replace(layout, turn_wide_blocks=False)
    mu_dtype = _momentum("scale_by_shampoo", mu_dtype, state_dtypes)
    average = _Average(b1, b3, bias_correction, mu_dtype)
    if grafting is not None and graft_scope == "array":
        whole = blockwise(direction, layout, rest=grafting)
        grafted = graft(whole, grafting, scope="array", start=refresh.start)
        return average.of(grafted)
    return _assembled(direction, grafting, refresh, layout, average)


def scale_by_soap(
    b1: ArrayLike | None = 0.9,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    b3: ArrayLike | None = None,
    layout: BlockLayout = BlockLayout(),
    refresh: Refresh = Refresh(),
    basis: bases.BasisMethod = bases.Auto(),
    grafting: optax.GradientTransformation | None = None,
    null_space: NullSpace = "share",
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates by Adam in the eigenbases of Shampoo's factors: SOAP.

    Equals ``blockwise(filter_gradient(eigenbasis(...)), layout)``, with
    ``filter_gradient(grafting.adam(b2, eps))`` for what the layout does not block.

    Args:
      b1: decay of the gradient's moving average; None for none.
      b2: decay of the factors and of the second moment.
      eps: added to the root of the second moment, in units of the gradient.
      b3: decay of the average used in this step only; None means ``b1**2``, Nesterov's
        momentum, and ``b1`` is none.
      layout: which blocks.
      refresh: when bases are computed anew; with no start named, first at step 2.
      basis: how, for example ``bases.CholeskyQR2()``.
      grafting: a magnitude rule; None keeps SOAP's own, which is Adam's already.
      null_space: see :func:`eigenbasis`.
      bias_correction: of the average, the factors and the second moment.
      mu_dtype: of the stored average; None means the parameters' dtype.
      state_dtypes: of all that is stored, see :class:`StateDtypes`.
      precision: of products on a GPU or TPU, see :func:`kronecker`.

    Returns:
      The transformation; its updates have the unit of Adam's.

    Raises:
      ValueError, TypeError: see :func:`soap`.

    Example:
      >>> tx = scale_by_soap(refresh=Refresh(1))
      >>> params = {"kernel": jnp.eye(3), "bias": jnp.ones(3)}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["kernel"].round(3).trace()
      Array(3., dtype=float32)

    Source: Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024.
    """
    if refresh.start_preconditioning_step is None:
        # Not at step 1: in the basis of its one gradient all but the diagonal is
        # rounding, and its second moment would make steps of that.
        refresh = dataclasses.replace(refresh, start_preconditioning_step=2)
    direction = eigenbasis(
        b2,
        eps,
        basis=basis,
        refresh=refresh,
        largest_factor=layout.largest_factor,
        bias_correction=bias_correction,
        null_space=null_space,
        state_dtypes=state_dtypes,
        precision=precision,
    )
    mu_dtype = _momentum("scale_by_soap", mu_dtype, state_dtypes)
    average = _Average(b1, _ahead(b1, b3), bias_correction, mu_dtype)
    rest = magnitudes.adam(b2, eps) if grafting is None else grafting
    grafting, rest = (_stored(rule, state_dtypes) for rule in (grafting, rest))
    return _assembled(direction, grafting, refresh, layout, average, rest)


def scale_by_spectral_descent(
    b1: ArrayLike | None = 0.95,
    *,
    b3: ArrayLike | None = None,
    method: orthogonal.Orthogonalization = orthogonal.NewtonSchulz(),
    scale: orthogonal.ScaleRule = orthogonal.MatchRMS(),
    layout: BlockLayout = UNCUT,
    rest: optax.GradientTransformation = magnitudes.adam(),
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Replace the average of every matrix by its orthogonal factor: Muon.

    Equals ``blockwise(filter_gradient(spectral(method, scale)), layout)``, with
    ``filter_gradient(rest)`` for vectors and scalars.

    Args:
      b1: decay of the gradient's moving average; None for none.
      b3: decay of the average used in this step only; None means ``b1**2``, Nesterov's
        momentum (as in Muon), and ``b1`` is none.
      method: how orthogonal factors are computed.
      scale: how long they are; the default gives entries the size of Adam's.
      layout: which matrices; by default nothing is cut.
      rest: a magnitude rule for vectors and scalars.
      mu_dtype: of the stored average; None means the parameters' dtype.

    Returns:
      The transformation; with the default scale its updates have the unit of Adam's.

    Raises:
      ValueError, TypeError: a number is out of range.

    Example:
      >>> tx = scale_by_spectral_descent(method=orthogonal.SVD())
      >>> params = {"kernel": jnp.diag(jnp.array([4.0, 0.1]))}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> (updates["kernel"] / (0.2 * 2**0.5)).round(3)  # MatchRMS of the identity
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source: Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """
    average = _Average(b1, _ahead(b1, b3), True, mu_dtype)
    direction = spectral(method, scale)
    # Scale rules look at the sides of a matrix.
    layout = dataclasses.replace(layout, turn_wide_blocks=False, merge_stacks=False)
    return _assembled(direction, None, Refresh(), layout, average, rest)


def _ahead(b1: ArrayLike | None, b3: ArrayLike | None) -> ArrayLike | None:
    """The decay of Nesterov's momentum, where no other is given."""
    return b1 * b1 if b3 is None and b1 is not None else b3


def _momentum(
    call: str, mu_dtype: DTypeLike | None, state_dtypes: StateDtypes
) -> DTypeLike | None:
    """The dtype of the average, which two arguments may say."""
    if mu_dtype is not None and state_dtypes.momentum is not None:
        raise ValueError(
            f"{call}(mu_dtype={mu_dtype!r}, state_dtypes={state_dtypes!r}): both say "
            "how the average is stored; wanted one of mu_dtype and "
            "StateDtypes(momentum=...)."
        )
    return state_dtypes.momentum if mu_dtype is None else mu_dtype


def _stored(
    grafting: optax.GradientTransformation | None, state_dtypes: StateDtypes
) -> optax.GradientTransformation | None:
    if grafting is None or state_dtypes.second_moment is None:
        return grafting
    return magnitudes.stored(grafting, state_dtypes.second_moment)


class _Average(NamedTuple):
    """Arguments of ``filter_gradient``."""

    b1: ArrayLike | None
    b3: ArrayLike | None
    bias_correction: bool
    mu_dtype: DTypeLike | None

    def of(
        self, inner: optax.GradientTransformation
    ) -> optax.GradientTransformationExtraArgs:
        """``inner`` behind the average."""
        if self.b1 is None:
            return optax.with_extra_args_support(inner)
        return filter_gradient(
            inner,
            self.b1,
            self.b3,
            bias_correction=self.bias_correction,
            mu_dtype=self.mu_dtype,
        )


def _assembled(
    direction: optax.GradientTransformation,
    grafting: optax.GradientTransformation | None,
    refresh: Refresh,
    layout: BlockLayout,
    average: _Average,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    if grafting is not None:
        direction = graft(direction, grafting, start=refresh.start)
    if rest is None:
        rest = magnitudes.sgd() if grafting is None else grafting
    return blockwise(average.of(direction), layout, rest=average.of(rest))
