"""The largest eigenvalue from below and from above, by matrix products alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.precisions import whole

Square = Callable[[jax.Array], jax.Array]

# Thin products with A^4, each worth four steps of a power method: first of that, then
# of Chebyshev's, from a few columns, of which one may have little of the eigenvector.
# The estimate of spread spectra is then 1e-3 too low in the median and 1e-2 at worst
# (tests/test_minimax.py), from one column twice to four times that.
POWER_STEPS, CHEBYSHEV_STEPS, COLUMNS = 4, 5, 8
# For the rounding of the bound; TOP in tools/minimax_coefficients.py is above this.
MARGIN = 1.01


class Spectrum(NamedTuple):
    """What a matrix's second and fourth power say of its largest eigenvalue."""

    estimate: jax.Array  # [...]: a lower bound, near it
    bound: jax.Array  # [...]: an upper bound, up to rounding


def spectrum(matrices: jax.Array, squares: jax.Array, square: Square) -> Spectrum:
    """The largest eigenvalue from below and from above.

    The bound decides how many steps are needed. The Frobenius norm may be ``sqrt(d)``
    lambda_max where the spectrum is flat, and that is a step more, 5 products at ``p =
    4``. One product gives ``A^4``. The traces of ``A^4`` and ``A^8`` tell the mean
    ``m`` and the standard deviation ``s`` of its eigenvalues, and none is above ``m + s
    sqrt(d - 1)``. For lambda_max that is at most ``((1 + sqrt(d)) / 2)^(1/4)`` too
    much, 2.0 at 1024 and 2.5 at 5,900; and exact for a flat spectrum and for one of
    rank one. A power method bounds from below only.

    Args:
      matrices: ``[..., d, d]``, symmetric positive semi-definite.
      squares: their squares.
      square: the square of a stack.

    Returns:
      Both bounds.

    Example:
      >>> found = spectrum(4.0 * jnp.eye(3), 16.0 * jnp.eye(3), lambda x: x @ x)
      >>> [round(float(x), 2) for x in found]
      [4.0, 4.04]

    Source: Wolkowicz and Styan, `Bounds for eigenvalues using traces
    <https://doi.org/10.1016/0024-3795(80)90258-X>`_, 1980, theorem 2.1.
    """
    size = matrices.shape[-1]
    tiny = jnp.finfo(matrices.dtype).tiny
    total = jnp.maximum(norm(squares), tiny)  # trace of A^4, its square root
    shares = squares / total[..., None, None]
    fourth = square(shares)  # its eigenvalues sum to 1
    mean, mean_square = 1 / size, norm(fourth) ** 2 / size
    deviation = jnp.sqrt(jnp.maximum(mean_square - mean**2, 0.0))
    largest = mean + deviation * (size - 1) ** 0.5
    bound = MARGIN * jnp.sqrt(total) * jnp.sqrt(jnp.sqrt(largest))
    vectors = _leading(fourth)
    images = whole(matrices, vectors)
    estimate = jnp.max(jnp.sum(vectors * images, axis=-2), axis=-1)
    return Spectrum(estimate, bound)


def _leading(matrices: jax.Array) -> jax.Array:
    """Unit vectors ``[..., d, c]``, of which one is near the leading eigenvector."""
    size = matrices.shape[-1]
    diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    _, start = lax.top_k(diagonal, min(COLUMNS, size))
    vectors = jnp.take_along_axis(matrices, start[..., None, :], axis=-1)

    def power(_: jax.Array, v: jax.Array) -> jax.Array:
        return _unit(whole(matrices, v))

    def chebyshev(_: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple:
        old, v = at
        new = 2.0 * image(v) - old
        norm = jnp.maximum(_lengths(new), tiny)
        return v / norm, new / norm

    def image(v: jax.Array) -> jax.Array:
        """Maps eigenvalues from 0 to the first estimate to [-1, 1]: the rest grows."""
        return 2.0 * whole(matrices, v) / first - v

    tiny = jnp.finfo(matrices.dtype).tiny
    vectors = lax.fori_loop(0, POWER_STEPS, power, _unit(vectors))
    lengths = jnp.sum(vectors * whole(matrices, vectors), axis=-2, keepdims=True)
    first = jnp.maximum(jnp.max(lengths, axis=-1, keepdims=True), tiny)
    state = vectors, image(vectors)
    return _unit(lax.fori_loop(0, CHEBYSHEV_STEPS, chebyshev, state)[1])


def _unit(vectors: jax.Array) -> jax.Array:
    return vectors / jnp.maximum(_lengths(vectors), jnp.finfo(vectors.dtype).tiny)


def _lengths(vectors: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(vectors * vectors, axis=-2, keepdims=True))


def norm(matrices: jax.Array) -> jax.Array:
    """Frobenius norms ``[...]``.

    Example:
      >>> norm(jnp.array([[3.0, 0.0], [0.0, 4.0]]))
      Array(5., dtype=float32)
    """
    return jnp.sqrt(jnp.sum(matrices * matrices, axis=(-2, -1)))
