"""Large blocks one after another, in the memory of one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

from shampoo_optax.linalg import packing
from shampoo_optax.transforms._numbers import wide

T = TypeVar("T")

# From this size on one matrix product fills a device, and a batch of them gains
# nothing: matrices are solved one after another, in the memory of one.
LARGE = 512


def in_turn(
    do: Callable[[T, Any], T], old: T, others: Any, matrices: Iterable[jax.Array]
) -> T:
    """``do(old, others)``; block after block where matrices are lean and large.

    A state in half the bytes saves nothing where a step holds all of it in float32
    beside: what is unpacked is one block, and its result takes the old one's place.

    Args:
      do: maps blocks and what belongs to them to blocks, each by itself.
      old: a tree of arrays ``[n, ...]``.
      others: the same.
      matrices: as the state keeps them, which ``do`` makes whole.

    Returns:
      Like ``old``.

    Example:
      >>> kept = jnp.ones((2, 512, 512), jnp.bfloat16)
      >>> in_turn(lambda x, m: x + m.sum((1, 2)), jnp.zeros(2), kept, [kept])
      Array([262144., 262144.], dtype=float32)
    """
    number = len(jax.tree.leaves(old)[0])
    if number == 1 or not any(map(_lean_and_large, matrices)):
        return do(old, others)

    def one(i: jax.Array, so_far: T) -> T:
        def row(x: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice_in_dim(x, i, 1)

        def put(x: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(x, new, i, 0)

        new = do(jax.tree.map(row, so_far), jax.tree.map(row, others))
        return jax.tree.map(put, so_far, new)

    return jax.lax.fori_loop(0, number, one, old)


def _lean_and_large(kept: jax.Array) -> bool:
    lean = packing.is_packed(kept) or kept.dtype != wide(kept.dtype)
    return lean and kept.shape[-2] >= LARGE
