"""Magnitude rules: diagonal methods whose step size grafting borrows.

Each takes the direction's incoming update (usually a moving average of the gradient)
and divides it by a second moment of the *raw* gradient. They act on any tree of
arrays, stacks or parameters, and stand alone as optimizers: with momentum in front,
``adam`` is Adam.
"""

from __future__ import annotations

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax.linalg.rounding import rounded
from shampoo_optax.transforms._numbers import (
    NORM_EPS,
    block_norm,
    new_weight,
    over,
    scalar,
    wide,
)
from shampoo_optax.transforms._numbers import bias_correction as correction_of


class MagnitudeState(NamedTuple):
    """State of :func:`adagrad`, :func:`rmsprop` and :func:`adam`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    nu: Any  # like the updates, float32 at least where not told: second moments


def sgd() -> optax.GradientTransformationExtraArgs:
    """The norm of the incoming update itself: the identity, without state.

    Example:
      >>> sgd().update(jnp.ones(2), sgd().init(jnp.ones(2)))[0]
      Array([1., 1.], dtype=float32)
    """
    return optax.with_extra_args_support(optax.identity())


def adagrad(
    eps: ArrayLike = 1e-10, *, initial_accumulator_value: float = 0.0
) -> optax.GradientTransformationExtraArgs:
    r"""AdaGrad: :math:`F / (\sqrt{\sum_t G_t^2} + eps)`.

    Equals ``optax.scale_by_rss`` on the raw gradient, but with ``eps`` outside the
    root.

    Args:
      eps: added to the root of the sum, in units of the gradient.
      initial_accumulator_value: where the sums begin.

    Returns:
      The transformation.

    Example:
      >>> updates, _ = adagrad().update(jnp.array([3.0]), adagrad().init(jnp.zeros(1)))
      >>> updates
      Array([1.], dtype=float32)

    Source: Duchi, Hazan and Singer, `Adaptive Subgradient Methods
    <https://jmlr.org/papers/v12/duchi11a.html>`_, 2011.
    """
    _checks.numbers(
        "grafting.adagrad",
        eps=eps,
        initial_accumulator_value=initial_accumulator_value,
    )
    return _second_moment(1.0, eps, initial=initial_accumulator_value)


def rmsprop(
    b2: ArrayLike = 0.99, eps: ArrayLike = 1e-8, *, weighted: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""RMSProp: :math:`F / (\sqrt{\nu} + eps)`, :math:`\nu` without bias correction.

    Equals ``optax.scale_by_rms(b2, eps, eps_in_sqrt=False)`` on the raw gradient.

    Args:
      b2: decay of the second moment; 1 sums it.
      eps: added to the root, in units of the gradient.
      weighted: give a new sample the weight ``1 - b2``; otherwise 1 (Meta's
        ``drop_weighting_factor_on_gsquare``).

    Returns:
      The transformation.

    Example:
      >>> tx = rmsprop(b2=0.75)
      >>> tx.update(jnp.array([3.0]), tx.init(jnp.zeros(1)))[0]
      Array([2.], dtype=float32)

    Source: Tieleman and Hinton, `Lecture 6.5
    <https://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf>`_, 2012.
    """
    _checks.numbers("grafting.rmsprop", b2=b2, eps=eps)
    return _second_moment(b2, eps, weighted=weighted)


def adam(
    b2: ArrayLike = 0.999, eps: ArrayLike = 1e-8, *, weighted: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Adam: :math:`F / (\sqrt{\nu / (1 - b_2^t)} + eps)`.

    With ``filter_gradient(adam(b2, eps), b1)`` equals ``optax.scale_by_adam(b1, b2,
    eps)``. The default magnitude: a learning rate tuned for Adam stays right.

    Args:
      b2: decay of the second moment; 1 sums it.
      eps: added to the root, in units of the gradient.
      weighted: give a new sample the weight ``1 - b2``; otherwise 1, and no bias
        correction (Meta's ``drop_weighting_factor_on_gsquare``).

    Returns:
      The transformation.

    Example:
      >>> updates, _ = adam().update(jnp.array([3.0]), adam().init(jnp.zeros(1)))
      >>> updates.round(3)
      Array([1.], dtype=float32)

    Source: Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2014.
    """
    _checks.numbers("grafting.adam", b2=b2, eps=eps)
    return _second_moment(b2, eps, weighted=weighted, bias_correction=weighted)


def sqrt_n() -> optax.GradientTransformationExtraArgs:
    """The root of the number of entries, whatever the gradient: its signs.

    Example:
      >>> sqrt_n().update(jnp.array([-3.0, 0.1]), sqrt_n().init(jnp.zeros(2)))[0]
      Array([-1.,  1.], dtype=float32)

    Source: ``SQRT_N`` of Anil et al., `Scalable Second Order Optimization for Deep
    Learning <https://arxiv.org/abs/2002.09018>`_, 2020 (their published code).
    """
    return optax.with_extra_args_support(optax.stateless_with_tree_map(_sign))


def _sign(u: jax.Array, _: Any) -> jax.Array:
    return jnp.sign(u)


def normalized(
    magnitude: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
    r"""A magnitude rule on gradients of norm one: blind to the loss's scale.

    Equals ``magnitude`` with :math:`G / \|G\|` and :math:`F / \|F\|` in place of the
    gradient and the incoming update. A norm is that of a block inside
    :func:`blockwise`, elsewhere of a whole array.

    Args:
      magnitude: for example ``grafting.rmsprop()``.

    Returns:
      The transformation.

    Example:
      >>> tx = normalized(adagrad())
      >>> tx.update(jnp.array([3.0, 4.0]), tx.init(jnp.zeros(2)))[0]
      Array([1., 1.], dtype=float32)

    Source: ``RMSPROP_NORMALIZED`` and ``ADAGRAD_NORMALIZED`` of Anil et al., `Scalable
    Second Order Optimization for Deep Learning <https://arxiv.org/abs/2002.09018>`_,
    2020 (their published code).
    """
    inner = optax.with_extra_args_support(magnitude)

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        raw_gradient: optax.Updates | None = None,
        stacked: bool = False,
        **extra: Any,
    ) -> tuple[optax.Updates, Any]:
        def unit(x: jax.Array) -> jax.Array:
            norm = block_norm(x, batch_axes=1 if stacked else 0)
            return (x.astype(norm.dtype) / (norm + NORM_EPS)).astype(x.dtype)

        if raw_gradient is not None:
            extra["raw_gradient"] = jax.tree.map(unit, raw_gradient)
        updates = jax.tree.map(unit, updates)
        return inner.update(updates, state, params, stacked=stacked, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update_fn)


def stored(
    magnitude: optax.GradientTransformation, dtype: DTypeLike
) -> optax.GradientTransformationExtraArgs:
    """The same rule with its second moment in another dtype.

    Updates are made of the moment before it is rounded; to bfloat16 it is rounded so
    that it is right on average, see :class:`StateDtypes`.

    Args:
      magnitude: one of the rules of this module.
      dtype: ``jnp.float32`` or ``jnp.bfloat16``.

    Returns:
      The transformation.

    Raises:
      ValueError: the rule has a state, and none of this module (at init).

    Example:
      >>> stored(adam(), jnp.bfloat16).init(jnp.zeros(2)).nu
      Array([0, 0], dtype=bfloat16)
    """

    def ours(node: Any) -> bool:
        return isinstance(node, MagnitudeState)

    def init_fn(params: optax.Params) -> Any:
        state = magnitude.init(params)
        nodes = jax.tree.leaves(state, is_leaf=ours)
        if not all(map(ours, nodes)):
            raise ValueError(
                f"grafting.stored(..., {jnp.dtype(dtype).name}).init: the rule keeps "
                f"{type(state).__name__}, whose update would give another dtype back; "
                "wanted a rule of shampoo_optax.grafting. Leave the dtype of others to "
                "them."
            )

        def cast(node: MagnitudeState) -> MagnitudeState:
            nu = jax.tree.map(lambda x: x.astype(dtype), node.nu)
            return node._replace(nu=nu)

        return jax.tree.map(cast, state, is_leaf=ours)

    update = optax.with_extra_args_support(magnitude).update
    return optax.GradientTransformationExtraArgs(init_fn, update)


def _second_moment(
    b2: ArrayLike,
    eps: ArrayLike,
    *,
    weighted: bool = True,
    bias_correction: bool = False,
    initial: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    def init_fn(params: optax.Params) -> MagnitudeState:
        def zeros(p: Any) -> jax.Array:
            return jnp.full_like(p, initial, wide(jnp.result_type(p)))

        return MagnitudeState(jnp.zeros([], jnp.int32), jax.tree.map(zeros, params))

    def update_fn(
        updates: optax.Updates,
        state: MagnitudeState,
        params: optax.Params | None = None,
        *,
        raw_gradient: optax.Updates | None = None,
        stacked: bool = False,
        **extra: Any,
    ) -> tuple[optax.Updates, MagnitudeState]:
        del params, extra
        gradient = updates if raw_gradient is None else raw_gradient
        count = optax.safe_increment(state.count)
        # Once, not for each of the arrays.
        weight_in = functools.cache(partial(new_weight, b2 if weighted else 1.0))
        correction = functools.cache(partial(correction_of, b2, count))

        def accumulate(nu: jax.Array, g: jax.Array) -> jax.Array:
            nu = nu.astype(wide(nu.dtype))
            g = jnp.asarray(g, nu.dtype)
            return scalar(b2, nu.dtype) * nu + weight_in(nu.dtype) * (g * g)

        def scale(u: jax.Array, nu: jax.Array) -> jax.Array:
            if bias_correction:
                nu = over(nu, correction(nu.dtype))
            scaled = jnp.asarray(u, nu.dtype) / (jnp.sqrt(nu) + scalar(eps, nu.dtype))
            return scaled.astype(jnp.result_type(u))

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            return rounded(new, old.dtype, count, stacked=stacked)

        nu = jax.tree.map(accumulate, state.nu, gradient)
        updates = jax.tree.map(scale, updates, nu)
        return updates, MagnitudeState(count, jax.tree.map(kept, nu, state.nu))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
