"""Two streams out of one: the averaged gradient to act on, the raw one to measure."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax.linalg.rounding import rounded
from shampoo_optax.transforms._numbers import over, scalar, wide


class FilterState(NamedTuple):
    """State of :func:`filter_gradient`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    mu: Any  # like the updates: moving average of the gradient
    inner: Any


def filter_gradient(
    inner: optax.GradientTransformation,
    b1: ArrayLike = 0.9,
    b3: ArrayLike | None = None,
    *,
    bias_correction: bool = True,
    mu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Feed ``inner`` a moving average of the gradient, and the gradient itself.

    With the gradient :math:`G` of step :math:`t` and the old average :math:`\mu`,
    ``inner`` gets as ``updates``

    .. math:: F = (b_3 \mu + (1 - b_3) G) / (1 - b_3 b_1^{t-1})

    and as ``raw_gradient`` :math:`G`; then :math:`\mu \leftarrow b_1 \mu + (1 - b_1)
    G`. With ``b3 = b1`` (the default) :math:`F` is Adam's bias-corrected momentum.

    Args:
      inner: a transformation that takes ``raw_gradient``, for example :func:`graft`.
      b1: decay of the average.
      b3: decay of the average that is used in this step only, as in Lion and NAdam;
        None means ``b1``.
      bias_correction: divide by ``1 - b3 * b1**(t - 1)``.
      mu_dtype: of the stored average; None means the dtype of the gradient. Where
        bfloat16 is asked for, it is rounded so that it is right on average, see
        :class:`StateDtypes`.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: a decay is not in [0, 1).

    Example:
      >>> tx = filter_gradient(grafting.adam(b2=0.999, eps=1e-8), b1=0.9)
      >>> params = jnp.array([1.0, -2.0])
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates.round(3)
      Array([ 1., -1.], dtype=float32)
    """
    _checks.numbers("filter_gradient", b1=b1, b3=b3)
    inner = optax.with_extra_args_support(inner)

    def init_fn(params: optax.Params) -> FilterState:
        def zeros(p: Any) -> jax.Array:
            # Like the parameter in sharding, too.
            return jnp.zeros_like(p, mu_dtype or jnp.result_type(p))

        mu = jax.tree.map(zeros, params)
        return FilterState(jnp.zeros([], jnp.int32), mu, inner.init(params))

    def update_fn(
        updates: optax.Updates,
        state: FilterState,
        params: optax.Params | None = None,
        *,
        stacked: bool = False,
        **extra: Any,
    ) -> tuple[optax.Updates, FilterState]:
        count = optax.safe_increment(state.count)

        @functools.cache  # once, not for each of the arrays
        def correction(dtype: jnp.dtype) -> jax.Array:
            before = scalar(b1, dtype) ** (count - 1).astype(dtype)
            return 1.0 - scalar(b1 if b3 is None else b3, dtype) * before

        def average(decay: ArrayLike, mu: jax.Array, g: jax.Array) -> jax.Array:
            dtype = wide(jnp.result_type(g))
            old, new = scalar(decay, dtype), scalar(1.0 - decay, dtype)
            return old * mu.astype(dtype) + new * jnp.asarray(g, dtype)

        def corrected(f: jax.Array, g: jax.Array) -> jax.Array:
            if bias_correction:
                f = over(f, correction(f.dtype))
            return f.astype(jnp.result_type(g))

        mu = jax.tree.map(lambda m, g: average(b1, m, g), state.mu, updates)
        if b3 is None:
            filtered = mu
        else:
            filtered = jax.tree.map(lambda m, g: average(b3, m, g), state.mu, updates)
        filtered = jax.tree.map(corrected, filtered, updates)

        def kept(new: jax.Array, old: jax.Array) -> jax.Array:
            if mu_dtype is None:  # the parameters' own: to the nearest, as Optax does
                return new.astype(old.dtype)
            return rounded(new, old.dtype, count, stacked=stacked)

        mu = jax.tree.map(kept, mu, state.mu)
        extra["raw_gradient"] = updates
        if stacked:
            extra["stacked"] = True
        updates, inner_state = inner.update(filtered, state.inner, params, **extra)
        return updates, FilterState(count, mu, inner_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
