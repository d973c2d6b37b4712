r"""Symmetric matrices in a byte for each entry of a triangle, and what that loses.

Of a positive semi-definite matrix :math:`A` the diagonal is kept in float32, and beside
it codes of its correlations :math:`C_{ij} = A_{ij} / \sqrt{A_{ii} A_{jj}}`, off the
diagonal: :math:`q = \pm 127 \sqrt{|C|}`. Most correlations are small, and near zero the
unit of these codes is 6e-5, where that of 255 equal steps is 8e-3. They are rounded up
or down so that :math:`C`, not its root, is right on average (:mod:`linalg.rounding`).

A moving average moves by less than a unit a step, so what rounding adds up to is a walk
of its own: it would make small eigenvalues negative, and roots of those are noise. How
far it has come is known, for what each rounding adds to the variance is, and the sum of
each row's is kept beside the diagonal. Noise of independent entries moves no eigenvalue
by more than twice the root of that, which :func:`certain` puts on the diagonal: what is
below the noise counts as noise.

All this is one array: packed codes (:mod:`linalg.packing`), and below them 8 rows whose
bytes are the diagonal's, and 8 that are the variances'.

Source: Gupta et al., `Deep Learning with Limited Numerical Precision
<https://arxiv.org/abs/1502.02551>`_, 2015; the edge of such noise's spectrum is that of
Wigner, `On the Distribution of the Roots of Certain Symmetric Matrices
<https://doi.org/10.2307/1970008>`_, 1958.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg import packing
from shampoo_optax.linalg.rounding import drawn

STEPS = 127  # codes on either side of zero
FLOATS = 8  # rows of bytes that hold a float32 for each row of a matrix: 8 h >= 4 d
BELOW = 2 * FLOATS + 1  # rows that an array of codes has more than its matrix


class Coded(NamedTuple):
    """What an array of codes holds."""

    codes: jax.Array  # [..., d + 1, h], int8; packed
    diagonal: jax.Array  # [..., d], float32
    variance: jax.Array  # [..., d], float32: the sums of the rows of the noise's


def is_coded(kept: jax.Array) -> bool:
    """Whether matrices are kept as codes: their dtype says it.

    Example:
      >>> is_coded(jnp.zeros((7, 21, 2), jnp.int8)), is_coded(jnp.zeros((7, 4, 4)))
      (True, False)
    """
    return kept.dtype == jnp.int8


def coded_shape(size: int) -> tuple[int, int]:
    """The sides of an array of codes.

    Example:
      >>> coded_shape(1024), coded_shape(5)
      ((1041, 512), (22, 3))
    """
    return size + BELOW, -(-size // 2)


def parted(kept: jax.Array) -> Coded:
    """The parts of an array of codes.

    Example:
      >>> parted(jnp.zeros((1, 22, 3), jnp.int8)).diagonal
      Array([[0., 0., 0., 0., 0.]], dtype=float32)
    """
    size = kept.shape[-2] - BELOW
    codes, first, second = jnp.split(kept, [size + 1, size + 1 + FLOATS], axis=-2)
    return Coded(codes, _floats(first, size), _floats(second, size))


def joined(parts: Coded) -> jax.Array:
    """One array again; inverse of :func:`parted`, to the bit.

    Example:
      >>> kept = jnp.ones((1, 21, 2), jnp.int8)
      >>> bool((joined(parted(kept)) == kept).all())
      True
    """
    half = parts.codes.shape[-1]
    floats = [_bytes(x, half) for x in (parts.diagonal, parts.variance)]
    return jnp.concatenate([parts.codes, *floats], -2)


def decoded(kept: jax.Array) -> jax.Array:
    """The packed matrices that codes stand for, in float32.

    Example:
      >>> matrix = jnp.array([[[4.0, 1.0], [1.0, 1.0]]])
      >>> packing.unpack(decoded(encoded(packing.pack(matrix)))).round(2)
      Array([[[4., 1.],
              [1., 1.]]], dtype=float32)
    """
    codes, diagonal, _ = parted(kept)
    steps = codes.astype(jnp.float32)
    correlations = steps * jnp.abs(steps) * (1.0 / STEPS**2)
    over, beside = _sides(jnp.sqrt(diagonal))
    return _with_diagonal(correlations * over * beside, diagonal)


def certain(kept: jax.Array) -> jax.Array:
    """The matrices, each row's noise added to its diagonal: ``[..., d, d]``.

    Example:
      >>> kept = encoded(packing.pack(jnp.array([[[4.0, 1.0], [1.0, 1.0]]])))
      >>> noisy = joined(parted(kept)._replace(variance=jnp.full((1, 2), 0.01)))
      >>> bool(jnp.allclose(jnp.diagonal(certain(noisy)[0]), jnp.array([4.8, 1.2])))
      True
    """
    _, diagonal, variance = parted(kept)
    noise = 2.0 * jnp.sqrt(variance) * diagonal
    matrices = packing.unpack(decoded(kept))
    return matrices + noise[..., None] * _eye(matrices)


def encoded(
    packed: jax.Array,
    count: jax.Array | None = None,
    carried: jax.Array | None = None,
) -> jax.Array:
    """Codes of packed positive semi-definite matrices.

    Args:
      packed: ``[n, d + 1, ceil(d / 2)]``.
      count: of the step, by which codes are rounded up or down; None: to the nearest.
      carried: ``[n, d]``, the variances of the noise in them; zero if None.

    Returns:
      ``[n, d + 17, ceil(d / 2)]``, int8. What belongs to a row whose diagonal is not
      positive is zero.

    Example:
      >>> encoded(packing.pack(jnp.eye(4)[None])).shape
      (1, 21, 2)
    """
    packed = packed.astype(jnp.float32)
    diagonal = packing.diagonal(packed)
    normal = diagonal >= jnp.finfo(jnp.float32).tiny
    inverse = lax.rsqrt(jnp.where(normal, diagonal, jnp.ones_like(diagonal)))
    inverse = jnp.where(normal, inverse, jnp.zeros_like(inverse))
    over, beside = _sides(inverse)
    correlations = _with_diagonal(packed * over * beside, jnp.zeros_like(diagonal))
    # An overflow is seen on the diagonal; a NaN would be any code.
    finite = correlations == correlations
    size = jnp.where(finite, jnp.abs(correlations), jnp.zeros_like(correlations))
    squares = jnp.minimum(size, 1.0) * STEPS**2
    low = jnp.clip(jnp.floor(jnp.sqrt(squares)), 0, STEPS - 1)
    unit = 2 * low + 1
    fraction = jnp.clip((squares - low * low) / unit, 0.0, 1.0)
    if count is None:
        up = fraction >= 0.5
        lost = jnp.square(jnp.minimum(fraction, 1 - fraction))
    else:
        places = drawn((1, *[packed.shape[-2] - 1] * 2), count, packed=True)
        up = (places >> 8).astype(jnp.float32) * 2.0**-24 < fraction
        lost = fraction * (1 - fraction)  # on average
    lost = lost * jnp.square(unit * (1.0 / STEPS**2))
    variance = jnp.sum(packing.unpack(lost), -1)
    if carried is not None:
        variance = variance + carried
    found = low + up.astype(low.dtype)
    codes = jnp.where(correlations < 0, -found, found).astype(jnp.int8)
    return joined(Coded(codes, diagonal, variance))


def moved(
    old: jax.Array, decay: jax.Array, new: jax.Array, count: jax.Array
) -> jax.Array:
    """``decay * old + new`` in codes, with what is known of the noise of old.

    Args:
      old: in codes.
      decay: a scalar, in the dtype of ``new``.
      new: packed matrices.
      count: of the step.

    Returns:
      Like ``old``.

    Example:
      >>> zero = jnp.zeros((1, 21, 2), jnp.int8)
      >>> new = moved(zero, jnp.float32(0.9), packing.pack(jnp.eye(4)[None]), 1)
      >>> parted(new).diagonal
      Array([[1., 1., 1., 1.]], dtype=float32)
    """
    packed = decay * decoded(old).astype(new.dtype) + new
    _, before, variance = parted(old)
    after = packing.diagonal(packed).astype(before.dtype)
    one = jnp.ones_like(after)
    share = decay.astype(before.dtype) * before / jnp.where(after > 0, after, one)
    return encoded(packed, count, share * share * variance)


def resized(kept: jax.Array, size: int) -> jax.Array:
    """Matrices cut to their first rows and columns, or filled with zeros: no rounding.

    Example:
      >>> resized(jnp.ones((1, 21, 2), jnp.int8), 5).shape
      (1, 22, 3)
    """
    codes, *floats = parted(kept)
    own = min(size, codes.shape[-2] - 1)
    fill = size - own
    square = jnp.pad(
        packing.unpack(codes)[..., :own, :own],
        [*[(0, 0)] * (codes.ndim - 2), (0, fill), (0, fill)],
    )
    rows = [
        jnp.pad(x[..., :own], [*[(0, 0)] * (x.ndim - 1), (0, fill)]) for x in floats
    ]
    return joined(Coded(packing.pack(square), *rows))


def _sides(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Of numbers ``[..., d]`` those of each packed entry's row, and of its column.

    Their product for every pair would leave float32 where a matrix's entries do not.
    """
    square = (*rows.shape, rows.shape[-1])
    return (
        packing.pack(jnp.broadcast_to(rows[..., :, None], square)),
        packing.pack(jnp.broadcast_to(rows[..., None, :], square)),
    )


def _with_diagonal(packed: jax.Array, diagonal: jax.Array) -> jax.Array:
    size = diagonal.shape[-1]
    eye = packing.pack(_eye(jnp.zeros((1,) * (packed.ndim - 2) + (size, size))))
    over, _ = _sides(diagonal)
    return jnp.where(eye > 0, over, packed)


def _eye(like: jax.Array) -> jax.Array:
    size, ndim = like.shape[-1], like.ndim
    return jnp.eye(size, dtype=like.dtype).reshape(*(1,) * (ndim - 2), size, size)


def _bytes(numbers: jax.Array, half: int) -> jax.Array:
    """float32 ``[..., d]`` as ``[..., 8, h]`` bytes; zeros where ``d`` is odd."""
    found = lax.bitcast_convert_type(numbers, jnp.int8)
    found = found.reshape(*numbers.shape[:-1], -1)
    gap = FLOATS * half - found.shape[-1]
    found = jnp.pad(found, [*[(0, 0)] * (found.ndim - 1), (0, gap)])
    return found.reshape(*numbers.shape[:-1], FLOATS, half)


def _floats(rows: jax.Array, size: int) -> jax.Array:
    """Inverse of :func:`_bytes`."""
    words = rows.reshape(*rows.shape[:-2], -1, 4)
    return lax.bitcast_convert_type(words, jnp.float32)[..., :size]
