"""Products of matrices in fewer bits than float32's, where a device has units for them.

On a CPU every product is float32. A name says into how many parts of which format each
operand is cut, and how many products of parts are summed, in float32: ``"bf16x3"``
keeps 16 bits, ``"fp16x3"`` 22, ``"bf16x6"`` all 24.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Product = Callable[[jax.Array, jax.Array], jax.Array]
# Statistics decide the direction of every later step, and the accelerators' ambient
# default keeps only 8 bits of the mantissa: the precision is said everywhere.
PRECISION = lax.Precision.HIGHEST
PRECISIONS: dict[str, lax.PrecisionLike] = {
    "highest": PRECISION,
    "bf16x6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
    "bf16x3": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
    "tf32": lax.DotAlgorithmPreset.TF32_TF32_F32,
    "bf16": lax.DotAlgorithmPreset.BF16_BF16_F32,
}
SPLIT = "fp16x3"
# Entries of a root go up to eps_rel**(-1/p), 5,000 at p = 2 and 4e-8; of float16 to
# 65,504. Eight times as large they fit, and the least bit of a part is 2**-27.
SCALE = 8.0


def whole(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product of two stacks in all their bits.

    Example:
      >>> whole(jnp.ones((1, 2)), jnp.ones((2, 1)))
      Array([[2.]], dtype=float32)
    """
    return jnp.matmul(lhs, rhs, precision=PRECISION)


def contraction(
    lhs: jax.Array,
    rhs: jax.Array,
    dims: Any,
    precision: str,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    """``lax.dot_general`` in a precision; on CPUs, and of other than float32, in all.

    Args:
      lhs: one operand.
      rhs: the other, of the same dtype.
      dims: as ``lax.dot_general`` takes them.
      precision: a name of ``PRECISIONS``.
      dtype: in which to accumulate.

    Returns:
      The contraction.

    Example:
      >>> contraction(jnp.ones(2), jnp.ones(2), (((0,), (0,)), ((), ())), "tf32")
      Array(2., dtype=float32)
    """

    def contract(name: str, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        algorithm = PRECISIONS[name]
        return lax.dot_general(
            lhs, rhs, dims, precision=algorithm, preferred_element_type=dtype
        )

    full = partial(contract, "highest")
    if precision == "highest" or not lhs.dtype == rhs.dtype == jnp.float32:
        return full(lhs, rhs)
    fewer = partial(contract, precision)
    return lax.platform_dependent(lhs, rhs, cpu=full, default=fewer)


class Arithmetic(NamedTuple):
    """Products of stacks of symmetric matrices, held in a form of their own.

    Every operation but ``hold`` takes what ``hold`` gives, and all but ``free`` give
    such a thing again.
    """

    product: Callable[[Any, Any], Any]
    square: Callable[[Any], Any]  # exactly symmetric
    quadratic: Callable[[jax.Array, Any], Any]  # (a, b, c), M: a I + b M + c M^2
    symmetric: Callable[[Any], Any]
    hold: Callable[[jax.Array], Any]
    free: Callable[[Any], jax.Array]

    def squared(self, matrices: jax.Array) -> jax.Array:
        """The squares of matrices that are not held."""
        return self.free(self.square(self.hold(matrices)))

    def multiplied(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """The product of matrices that are not held."""
        return self.free(self.product(self.hold(lhs), self.hold(rhs)))


def arithmetic(name: str) -> Arithmetic:
    """The products of a name; on whatever platform, so keep a CPU to ``"highest"``.

    Example:
      >>> import numpy as np
      >>> rounded, whole = arithmetic("fp16x3"), arithmetic("highest")
      >>> a = jnp.asarray(np.random.default_rng(0).normal(size=(1, 32, 32)), "f")
      >>> error = jnp.abs(rounded.product(a, a) - whole.product(a, a)).max()
      >>> bool(error < 1e-5)
      True
    """
    if name == SPLIT:
        return _of(_in_parts, _square_in_parts)
    product = partial(jnp.matmul, precision=PRECISIONS[name])
    return _of(product, lambda x: symmetric(product(x, x)))


def _of(product: Product, square: Callable[[jax.Array], jax.Array]) -> Arithmetic:
    """Matrices are held as they are."""

    def quadratic(step: jax.Array, x: jax.Array) -> jax.Array:
        return step[0] * identity_like(x) + step[1] * x + step[2] * square(x)

    def same(x: jax.Array) -> jax.Array:
        return x

    return Arithmetic(product, square, quadratic, symmetric, same, same)


def identity_like(matrices: jax.Array) -> jax.Array:
    """The identity for every matrix of a stack, in its dtype.

    Example:
      >>> identity_like(jnp.zeros((1, 2, 2)))
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)
    """
    identity = jnp.eye(matrices.shape[-1], dtype=matrices.dtype)
    return jnp.broadcast_to(identity, matrices.shape)


def symmetric(matrices: jax.Array) -> jax.Array:
    """Mean of ``[..., d, d]`` and their transposes.

    Example:
      >>> symmetric(jnp.array([[1.0, 2.0], [0.0, 1.0]]))
      Array([[1., 1.],
             [1., 1.]], dtype=float32)
    """
    return 0.5 * (matrices + jnp.swapaxes(matrices, -2, -1))


def float16_parts(matrices: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What float16 keeps of ``SCALE`` times the matrices, and what of the rest.

    Example:
      >>> [float(part) for part in float16_parts(jnp.float32(0.125 + 2**-15))]
      [1.0, 0.000244140625]
    """
    scaled = SCALE * matrices
    # Not a cast there and back, which XLA may take out as excess precision.
    high = lax.reduce_precision(scaled, exponent_bits=5, mantissa_bits=10)
    return high.astype(jnp.float16), (scaled - high).astype(jnp.float16)


def _in_parts(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """All products of parts but that of the rests, as one of three times the depth.

    Source: Ootomo and Yokota, `Recovering single precision accuracy from Tensor Cores
    <https://arxiv.org/abs/2203.03341>`_, 2022 (the parts).
    """
    (a, b), (c, d) = float16_parts(lhs), float16_parts(rhs)
    return _deep([a, b, a], [c, c, d])


def _square_in_parts(matrices: jax.Array) -> jax.Array:
    """``(a + b)^2`` but for ``b^2``: ``a (a / 2 + b)`` and its transpose."""
    a, b = float16_parts(matrices)
    half = _deep([a, a], [0.5 * a, b])
    return half + jnp.swapaxes(half, -2, -1)


def _deep(lhs: list[jax.Array], rhs: list[jax.Array]) -> jax.Array:
    deep = jnp.concatenate(lhs, axis=-1), jnp.concatenate(rhs, axis=-2)
    found = jnp.matmul(*deep, preferred_element_type=jnp.float32)
    return found * SCALE**-2
