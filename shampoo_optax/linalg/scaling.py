"""What every root method shares: an exact prescale and one definition of damping."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.masks import all_finite, chosen
from shampoo_optax.linalg.precisions import PRECISION

# Power steps for lambda_max: from the column of the largest diagonal entry eight
# steps were within 9 % on every factor of three trained models (worst 0.91).
POWER_STEPS = 8


class Scaled(NamedTuple):
    """Symmetric matrices ``matrix * 2**exponent`` with entries near one."""

    matrix: jax.Array  # [..., d, d]
    exponent: jax.Array  # [...], int32
    usable: jax.Array  # [...], bool: the input was finite
    nonzero: jax.Array  # [...], bool: the input was above the smallest normals


class Damping(NamedTuple):
    """The ridge of every method: ``max(eps, eps_rel * lambda_max)``."""

    absolute: jax.Array  # [...], in the units of the prescaled matrices
    relative: jax.Array  # []

    def ridge(self, largest: jax.Array) -> jax.Array:
        """The ridge of matrices whose largest eigenvalue is ``largest [...]``.

        Example:
          >>> Damping(jnp.array([0.1]), jnp.array(0.25)).ridge(jnp.array([4.0]))
          Array([1.], dtype=float32)
        """
        relative = self.relative.astype(largest.dtype)
        return jnp.maximum(relative * largest, self.absolute.astype(largest.dtype))


def prescale(matrices: jax.Array) -> Scaled:
    """Bring symmetric matrices near one by an exact power of two.

    Nothing over- or underflows afterwards, LAPACK never sees a NaN, and the
    scale comes back without rounding.

    Args:
      matrices: ``[..., d, d]``, symmetric up to rounding.

    Returns:
      The scaled, symmetrised matrices (zeros where the input was not usable).

    Example:
      >>> scaled = prescale(jnp.array([[6e30]]))
      >>> float(scaled.matrix[0, 0]), int(scaled.exponent)
      (0.5916456580162048, 103)
    """
    # On the diagonal, where no entry is negative: not of absolute values, which XLA's
    # CPU compiler would write out first.
    largest = jnp.max(matrices, axis=(-2, -1), initial=0.0)
    usable = all_finite(matrices, (-2, -1))
    nonzero = usable & (largest >= 4 * jnp.finfo(matrices.dtype).tiny)
    exponent = _exponent(chosen(nonzero, largest, jnp.ones_like(largest)))
    safe = chosen(usable[..., None, None], matrices, jnp.zeros_like(matrices))
    scaled = unscale(safe, -exponent[..., None, None])
    scaled = 0.5 * (scaled + jnp.swapaxes(scaled, -2, -1))
    return Scaled(scaled, exponent, usable, nonzero)


def largest_eigenvalue(matrices: jax.Array) -> jax.Array:
    """Rayleigh estimate of the largest eigenvalue; a lower bound of it.

    Good enough to define damping, never to scale an iteration by.

    Args:
      matrices: ``[..., d, d]``, symmetric positive semi-definite.

    Returns:
      ``[...]``.

    Example:
      >>> largest_eigenvalue(jnp.diag(jnp.array([1.0, 4.0])))
      Array(4., dtype=float32)
    """
    diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    start = jnp.argmax(diagonal, axis=-1)[..., None, None]
    vector = jnp.take_along_axis(matrices, start, axis=-1)
    tiny = jnp.finfo(matrices.dtype).tiny

    def normalise(v: jax.Array) -> jax.Array:
        norm = jnp.sqrt(jnp.sum(v * v, axis=(-2, -1), keepdims=True))
        return v / jnp.maximum(norm, tiny)

    def step(_: jax.Array, v: jax.Array) -> jax.Array:
        return normalise(jnp.matmul(matrices, v, precision=PRECISION))

    vector = lax.fori_loop(0, POWER_STEPS, step, normalise(vector))
    image = jnp.matmul(matrices, vector, precision=PRECISION)
    return jnp.sum(vector * image, axis=(-2, -1))


def unscale(values: jax.Array, exponent: jax.Array) -> jax.Array:
    """``values * 2**exponent``, in two exact factors (either may be subnormal alone).

    Example:
      >>> unscale(jnp.array(3.0), jnp.array(4))
      Array(48., dtype=float32)
    """
    half = exponent >> 1  # a floor; `//` is a function of its own for every shape
    return (
        values
        * _power_of_two(half, values.dtype)
        * _power_of_two(exponent - half, values.dtype)
    )


def _bits(dtype: jax.typing.DTypeLike) -> tuple[jnp.dtype, int, int]:
    """The integer of the same width, the bits of the mantissa, the exponent's bias."""
    info = jnp.finfo(dtype)
    return jnp.dtype(f"int{info.bits}"), info.nmant, 1 - info.minexp


def _exponent(x: jax.Array) -> jax.Array:
    """``e`` with ``2**(e - 1) <= x < 2**e``, of positive normal numbers.

    As ``jnp.frexp``, read from the number's bits: a tenth of its program.
    """
    integer, mantissa, bias = _bits(x.dtype)
    bits = lax.bitcast_convert_type(x, integer)
    return (bits >> mantissa).astype(jnp.int32) - (bias - 1)


def _power_of_two(exponent: jax.Array, dtype: jax.typing.DTypeLike) -> jax.Array:
    """``2**exponent`` exactly, for the exponents of normal numbers."""
    integer, mantissa, bias = _bits(dtype)
    bits = (exponent.astype(integer) + bias) << mantissa
    return lax.bitcast_convert_type(bits, dtype)
