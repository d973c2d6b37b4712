"""Rounding to bfloat16 that is right on average, so that slow averages do not stall.

A moving average with decay 0.999 moves by a thousandth a step, and bfloat16 has 8 bits:
rounded to the nearest, it stays where it is. Rounded up with the probability of the
fraction that is lost, it is right on average.

The draws are not random: each entry has a phase of its own, and goes on from there by
the golden ratio at every step (Weyl's sequence, whose first n points leave no gap above
about 1 / n). So what rounding adds up to stays near one unit where a coin's would grow
like the root of the number of steps; and it is a function of the step and of the place
in a block, the same on every device and mesh.

Source: Gupta et al., `Deep Learning with Limited Numerical Precision
<https://arxiv.org/abs/1502.02551>`_, 2015, section 3 (stochastic rounding); Weyl,
`Über die Gleichverteilung von Zahlen mod. Eins
<https://doi.org/10.1007/BF01475864>`_, 1916.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from shampoo_optax.linalg import packing

GOLDEN = 0x9E3779B9  # 2**32 over the golden ratio
DROPPED = 16  # bits of a float32 that bfloat16 has not


def rounded(
    array: jax.Array,
    dtype: DTypeLike,
    count: jax.Array,
    *,
    stacked: bool,
    packed: bool = False,
) -> jax.Array:
    """An array in another dtype; rounded to either side where that is bfloat16.

    Args:
      array: any floating-point array.
      dtype: bfloat16 is rounded to as above; others as ``astype`` does.
      count: of the step, ``int32``.
      stacked: the leading axis counts blocks, whose draws are the same: in which order
        they lie depends on the mesh.
      packed: the array is of :func:`packing.pack`. Its draws are those of the matrices.

    Returns:
      The array in ``dtype``. What bfloat16 holds exactly stays as it is, and so do
      infinities and NaNs.

    Example:
      >>> x = jnp.full(1000, 1.0 + 2.0**-9)  # a quarter of the way to the next
      >>> up = rounded(x, jnp.bfloat16, jnp.int32(7), stacked=False) > 1
      >>> round(float(up.mean()), 1)
      0.2
    """
    if jnp.dtype(dtype) != jnp.bfloat16 or array.dtype == jnp.bfloat16:
        return array.astype(dtype)
    array = array.astype(jnp.float32)
    shape = list(array.shape)
    if stacked:
        shape[0] = 1
    if packed:
        shape[-2:] = [shape[-2] - 1] * 2
    draws = drawn(shape, count, packed=packed)
    bits = lax.bitcast_convert_type(array, jnp.uint32)
    bits = (bits + (draws >> DROPPED)) >> DROPPED
    found = lax.bitcast_convert_type(bits.astype(jnp.uint16), jnp.bfloat16)
    # Of a NaN, the carry could make a number.
    return jnp.where(jnp.isnan(array), array.astype(jnp.bfloat16), found)


def drawn(
    shape: Sequence[int], count: jax.typing.ArrayLike, *, packed: bool = False
) -> jax.Array:
    """The draws of a step: ``uint32``, as likely to be below any part of 2**32.

    Args:
      shape: of the array; of the matrices, where they are packed.
      count: of the step.
      packed: whether they are.

    Example:
      >>> drawn((1, 4, 4), 7, packed=True).shape
      (1, 5, 2)
    """
    start = packing.pack(phases(shape)) if packed else phases(shape)
    return start + jnp.asarray(count).astype(jnp.uint32) * jnp.uint32(GOLDEN)


def phases(shape: Sequence[int]) -> jax.Array:
    """A phase for every place of an array: ``uint32``, by the indices in any order.

    That of ``[i, j]`` is that of ``[j, i]``: a block may lie transposed.

    Example:
      >>> bool((phases((3, 5)) == phases((5, 3)).T).all())
      True
    """
    total = jnp.zeros((1,) * len(shape), jnp.uint32)
    for dim in range(len(shape)):
        index = lax.broadcasted_iota(jnp.uint32, tuple(shape), dim)
        total = total + _mixed(index + jnp.uint32(GOLDEN))
    return _mixed(total)


def _mixed(x: jax.Array) -> jax.Array:
    """The finaliser of MurmurHash3: every bit of the result hangs on every bit."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
