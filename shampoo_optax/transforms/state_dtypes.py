"""In which precision a state is kept, and symmetric matrices in half of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from shampoo_optax.linalg import codes, packing
from shampoo_optax.transforms._numbers import wide

KEPT = (jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16))
CODED = (jnp.dtype(jnp.int8),)


@dataclass(frozen=True)
class StateDtypes:
    """How much memory a state takes. All mathematics is in float32 at least.

    A dtype is ``jnp.float32`` or ``jnp.bfloat16``; None leaves it as without this
    object: float32 at least, and the parameters' own for momentum. What is averaged
    (all but roots) is rounded to bfloat16 up or down so that it is right on average,
    see :mod:`linalg.rounding`; to the nearest, an average with decay 0.999 would stand
    still. Roots and bases are rounded to the nearest.

    Args:
      momentum: of the gradient's moving average.
      second_moment: of the magnitude rule, and of SOAP.
      factors: of the Kronecker factors; ``jnp.int8``, too.
      roots: of their inverse roots, of SOAP's bases.
      packed: keep one triangle of factors and roots, ``[n, d + 1, ceil(d / 2)]`` in
        place of ``[n, d, d]``, see :mod:`linalg.packing`. Exact. Bases are not
        symmetric, and stay whole.

    Raises:
      ValueError: a dtype is another one.

    Example:
      >>> lean = StateDtypes(momentum=jnp.bfloat16, roots=jnp.bfloat16, packed=True)
      >>> leanest = StateDtypes(*[jnp.bfloat16] * 4, packed=True)
      >>> tx = scale_by_shampoo(state_dtypes=leanest)
      >>> state = tx.init({"w": jnp.zeros((8, 8))})
      >>> state.blocks.inner.direction.factors["8x8"]["0"].shape
      (1, 9, 4)

    Source: ``docs/memory.md`` has bytes and losses.
    """

    momentum: DTypeLike | None = None
    second_moment: DTypeLike | None = None
    factors: DTypeLike | None = None
    roots: DTypeLike | None = None
    packed: bool = False

    @property
    def rounds_factors(self) -> bool:
        """Whether rounding leaves factors with negative eigenvalues.

        In bfloat16, down to -0.003 of the largest. In int8 it is known how far, and a
        ridge makes up for it, see :mod:`linalg.codes`.
        """
        return self.factors is not None and jnp.dtype(self.factors) == jnp.bfloat16

    def __post_init__(self) -> None:
        """Check the dtypes."""
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "packed" or value is None:
                continue
            coded = field.name == "factors"
            also = ", jnp.int8" if coded else ""
            if not (_is_one_of(KEPT, value) or (coded and _is_one_of(CODED, value))):
                raise ValueError(
                    f"StateDtypes({field.name}={value!r}): {field.name} must be "
                    f"jnp.float32, jnp.bfloat16{also} or None."
                )


def _is_one_of(dtypes: Sequence[jnp.dtype], dtype: Any) -> bool:
    try:
        return jnp.dtype(dtype) in dtypes
    except TypeError:
        return False


def stored(
    matrices: jax.Array, dtype: DTypeLike | None, *, packed: bool = False
) -> jax.Array:
    """Matrices as a state keeps them: packed where wanted, rounded to the nearest.

    Args:
      matrices: ``[n, d, d]``; symmetric to be packed.
      dtype: None for their own.
      packed: keep one triangle; of int8 always.

    Returns:
      ``[n, d, d]``, packed ``[n, d + 1, ceil(d / 2)]`` or codes.

    Example:
      >>> stored(jnp.eye(4)[None], jnp.bfloat16, packed=True).shape
      (1, 5, 2)
    """
    if dtype is not None and jnp.dtype(dtype) == jnp.int8:
        return codes.encoded(packing.pack(matrices))
    matrices = packing.pack(matrices) if packed else matrices
    return matrices.astype(dtype or matrices.dtype)


def restored(kept: jax.Array) -> jax.Array:
    """What :func:`stored` was given, in float32 at least.

    Example:
      >>> restored(stored(jnp.eye(2)[None], jnp.bfloat16, packed=True))
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)
    """
    if codes.is_coded(kept):
        return packing.unpack(codes.decoded(kept))
    wider = kept.astype(wide(kept.dtype))
    return packing.unpack(wider) if packing.is_packed(kept) else wider


def certain(kept: jax.Array) -> jax.Array:
    """The same, for roots: with the noise of int8 on the diagonal.

    Example:
      >>> certain(stored(jnp.eye(2)[None], jnp.bfloat16))
      Array([[[1., 0.],
              [0., 1.]]], dtype=float32)
    """
    return codes.certain(kept) if codes.is_coded(kept) else restored(kept)


def stored_like(matrices: jax.Array, like: jax.Array) -> jax.Array:
    """Matrices as others are kept."""
    return stored(matrices, like.dtype, packed=packing.is_packed(like))
