"""Averages of the iterates: train at one point, evaluate at another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from shampoo_optax import _checks
from shampoo_optax.transforms._numbers import scalar

# (count, weight_sum) -> (how much the old average counts, new weight_sum)
Retain = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


class AveragingState(NamedTuple):
    """State of :func:`primal_averaging` and :func:`schedule_free`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    weight_sum: jax.Array  # [], sum of the weights of past iterates
    train_interpolation: jax.Array  # []
    z: Any  # like the parameters: the sequence that takes the steps
    inner: Any
    decay: Any


def primal_averaging(
    inner: optax.GradientTransformation,
    eval_interpolation: ArrayLike = 0.9,
    train_interpolation: ArrayLike = 0.8,
    *,
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Generalised primal averaging around an optimizer.

    With the step :math:`P` of ``inner`` (its learning rate included) at the training
    parameters :math:`y`, equals

    .. math::
        y &\leftarrow \mu_x y + (1 - \mu_x) z + (1 - \mu_x \mu_y) P \\
        z &\leftarrow z + P

    where :math:`\mu_x` is ``eval_interpolation`` and :math:`\mu_y`
    ``train_interpolation``; :func:`eval_params` gives the average :math:`x` with
    :math:`y = \mu_y x + (1 - \mu_y) z`. ``mu_y = 1`` is heavy-ball momentum
    :math:`\mu_x` at the rate :math:`(1 - \mu_x) \eta`.

    Args:
      inner: an optimizer with its learning rate, without weight decay.
      eval_interpolation: how much of the old average stays, in [0, 1).
      train_interpolation: how much of the average is in the training parameters, in
        (0, 1].
      decay: what shrinks ``z`` before a step: it is given zero updates and ``z`` as
        parameters, for example ``optax.chain(add_weight_decay(0.1, rate),
        optax.scale_by_learning_rate(rate))``.

    Returns:
      The optimizer; the parameters it moves are the training parameters.

    Raises:
      ValueError, TypeError: a coefficient is out of range (at construction), or
        parameters are missing (at update).

    Example:
      >>> tx = primal_averaging(optax.sgd(0.5), 0.5, 0.5)
      >>> params = jnp.array(1.0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array(1.0), state, params)
      >>> params = params + updates
      >>> [float(v) for v in (params, state.z, eval_params(state, params))]  # y, z, x
      [0.625, 0.5, 0.75]

    Source: Defazio et al., `Smoothing DiLoCo with Primal Averaging
    <https://arxiv.org/abs/2512.17131>`_, 2025.
    """
    call = "primal_averaging"
    within = _checks.Range(0.0, 1.0, open_low=True)
    _checks.number(call, "eval_interpolation", eval_interpolation, _checks.DECAY)
    _checks.number(call, "train_interpolation", train_interpolation, within)

    def retain(_: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        return scalar(eval_interpolation, total.dtype), total

    return _averaged(call, inner, retain, train_interpolation, decay)


def schedule_free(
    inner: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    train_interpolation: ArrayLike = 0.8,
    *,
    weight_lr_power: float = 2.0,
    decay: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Schedule-free averaging in the reference system's form.

    Equals :func:`primal_averaging` with :math:`\mu_x = 1 - \eta_t^p / \sum_{s \le t}
    \eta_s^p`: a weighted mean of all iterates. ``optax.contrib.schedule_free`` says
    the same for a constant learning rate without decay; it differs by weighing with
    the largest rate so far in place of the present one, and by taking weight decay
    from ``inner``, where it counts :math:`1 - \mu_x \mu_y` and not :math:`1 - \mu_x`.

    Args:
      inner: an optimizer with its learning rate, without weight decay.
      learning_rate: that of ``inner``; a number or a schedule.
      train_interpolation: how much of the average is in the training parameters, in
        (0, 1].
      weight_lr_power: the power ``p``.
      decay: see :func:`primal_averaging`.

    Returns:
      The optimizer; the parameters it moves are the training parameters.

    Raises:
      ValueError, TypeError: see :func:`primal_averaging`.

    Example:
      >>> tx = schedule_free(optax.sgd(0.5), 0.5)
      >>> params = jnp.array(1.0)
      >>> updates, state = tx.update(jnp.array(1.0), tx.init(params), params)
      >>> eval_params(state, params + updates)  # the mean of one iterate
      Array(0.5, dtype=float32)

    Source: Defazio et al., `The Road Less Scheduled
    <https://arxiv.org/abs/2405.15682>`_, 2024.
    """
    call = "schedule_free"
    within = _checks.Range(0.0, 1.0, open_low=True)
    _checks.numbers(call, learning_rate=learning_rate)
    _checks.number(call, "train_interpolation", train_interpolation, within)

    def retain(count: jax.Array, total: jax.Array) -> tuple[jax.Array, jax.Array]:
        rate = learning_rate(count) if callable(learning_rate) else learning_rate
        weight = scalar(rate, total.dtype) ** weight_lr_power
        total = total + weight
        # A warm-up that begins at zero has no weight yet: nothing is averaged.
        share = jnp.where(total > 0, weight / jnp.where(total > 0, total, 1.0), 1.0)
        return 1.0 - share, total

    return _averaged(call, inner, retain, train_interpolation, decay)


def eval_params(state: Any, params: optax.Params) -> optax.Params:
    r"""The average :math:`x = y + (1 - 1 / \mu_y)(z - y)`, for evaluation.

    Args:
      state: of an optimizer that holds one :class:`AveragingState`, at any depth.
      params: the training parameters.

    Returns:
      The parameters to evaluate and to ship.

    Raises:
      ValueError: there is none, or more than one.

    Example:
      >>> tx = optax.chain(optax.clip(1.0), primal_averaging(optax.sgd(0.1)))
      >>> eval_params(tx.init(jnp.ones(2)), jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """

    def is_state(node: Any) -> bool:
        return isinstance(node, AveragingState)

    found = [s for s in jax.tree.leaves(state, is_leaf=is_state) if is_state(s)]
    if len(found) != 1:
        raise ValueError(
            f"eval_params: the state holds {len(found)} averages; wanted one, of "
            "primal_averaging or schedule_free. Pass the part of the state that is it."
        )
    (average,) = found

    def evaluated(y: jax.Array, z: jax.Array) -> jax.Array:
        rest = 1.0 - 1.0 / average.train_interpolation.astype(jnp.result_type(y))
        return y + rest * (z - y)

    return jax.tree.map(evaluated, params, average.z)


def _averaged(
    call: str,
    inner: optax.GradientTransformation,
    retain: Retain,
    train_interpolation: ArrayLike,
    decay: optax.GradientTransformation | None,
) -> optax.GradientTransformationExtraArgs:
    inner = optax.with_extra_args_support(inner)
    decay = optax.with_extra_args_support(decay or optax.identity())

    def init_fn(params: optax.Params) -> AveragingState:
        return AveragingState(
            jnp.zeros([], jnp.int32),
            jnp.zeros([]),
            scalar(train_interpolation, jnp.result_type(float)),
            jax.tree.map(jnp.array, params),
            inner.init(params),
            decay.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: AveragingState,
        params: optax.Params | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, AveragingState]:
        if params is None:
            raise ValueError(f"{call}.update averages parameters: pass params.")
        mu_x, total = retain(state.count, state.weight_sum)
        mu_y = scalar(train_interpolation, total.dtype)
        step, inner_state = inner.update(updates, state.inner, params, **extra)
        nothing = jax.tree.map(jnp.zeros_like, step)
        shrink, decay_state = decay.update(nothing, state.decay, state.z, **extra)
        z_old = jax.tree.map(lambda z, d: z + d, state.z, shrink)

        def move(y: jax.Array, z: jax.Array, p: jax.Array) -> jax.Array:
            x, xy = (scalar(mu, y.dtype) for mu in (mu_x, mu_x * mu_y))
            return ((1.0 - x) * (z - y) + (1.0 - xy) * p).astype(p.dtype)

        moved = jax.tree.map(move, params, z_old, step)
        z = jax.tree.map(lambda z, p: (z + p).astype(z.dtype), z_old, step)
        return moved, AveragingState(
            optax.safe_increment(state.count),
            total,
            mu_y,
            z,
            inner_state,
            decay_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
