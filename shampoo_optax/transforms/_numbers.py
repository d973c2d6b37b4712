"""Small arithmetic that several transformations share."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from shampoo_optax.layout.split import promoted

# Meta's constant: keeps 0/0 apart from 0 and changes no other quotient.
NORM_EPS = 1e-16


def scalar(value: ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """A number, possibly traced, in the dtype of the arrays it meets."""
    return jnp.asarray(value).astype(dtype)


def wide(dtype: jax.typing.DTypeLike) -> jnp.dtype:
    """The dtype in which statistics of ``dtype`` are kept: float32 at least."""
    return promoted(dtype, jnp.float32)


def bias_correction(
    decay: ArrayLike, count: jax.Array, dtype: jax.typing.DTypeLike
) -> jax.Array:
    """``1 - decay**count``, as Optax computes it; 1 where ``decay`` is 1.

    A decay of 1 stands for a plain sum (AdaGrad), which has no bias.
    """
    decay = scalar(decay, dtype)
    correction = 1.0 - decay ** count.astype(dtype)
    return jnp.where(decay < 1, correction, jnp.ones_like(correction))


def over(array: jax.Array, number: jax.Array) -> jax.Array:
    """An array over a scalar, as a product with its reciprocal.

    XLA divides, or multiplies by the reciprocal, as the rest of the program has it;
    the two differ in the last bit, and so would programs for one and for two devices.
    """
    return array * (1.0 / number)


def new_weight(decay: ArrayLike, dtype: jax.typing.DTypeLike) -> jax.Array:
    """The weight of the new sample: ``1 - decay``, or 1 where ``decay`` is 1."""
    # 1 - decay is taken before the cast: in float32, 1 - 0.999 has four digits.
    rest = scalar(1.0 - decay, dtype)
    return jnp.where(rest > 0, rest, jnp.ones_like(rest))


def block_norm(blocks: jax.Array, *, batch_axes: int) -> jax.Array:
    """Frobenius norm over all but the leading axes, which stay (as size one)."""
    return jnp.sqrt(block_squares(blocks, batch_axes=batch_axes))


def block_squares(blocks: jax.Array, *, batch_axes: int) -> jax.Array:
    """The square of :func:`block_norm`."""
    axes = tuple(range(batch_axes, blocks.ndim))
    blocks = blocks.astype(wide(blocks.dtype))
    return jnp.sum(blocks * blocks, axis=axes, keepdims=True)
