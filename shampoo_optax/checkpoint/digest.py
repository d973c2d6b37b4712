"""A number for each array that any flipped bit changes, the same on every mesh."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


@jax.jit
def digest(array: jax.Array) -> jax.Array:
    r"""An unsigned 32-bit number of an array's bits.

    Equals :math:`\sum_i w_i b_i \bmod 2^{32}` over the array's 32-bit words :math:`b_i`
    with odd weights :math:`w_i`: an odd number times a power of two is not zero modulo
    :math:`2^{32}`, so one flipped bit always changes it, and sums of integers are the
    same in any order, so every mesh gives one number. It finds accidents; it is no
    cryptographic hash.

    Args:
      array: of any shape, sharding and dtype of at most 8 bytes (no random keys).

    Returns:
      A scalar ``uint32``.

    Example:
      >>> int(digest(jnp.arange(3, dtype=jnp.uint32)))  # 1*w_1 + 2*w_2
      387276919
    """
    words = _words(array)
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index = index * jnp.uint32(size) + place
    # Knuth's multiplier (2**32 over the golden ratio) spreads neighbours' weights.
    weights = index * jnp.uint32(2654435761) | jnp.uint32(1)
    return jnp.sum(words * weights, dtype=jnp.uint32)


def in_turn(made: Any) -> Any:
    """What a program made, done where it has to be before the next one begins.

    On CPUs of several processes the collectives of programs in flight at once wait for
    each other for ever.
    """
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        jax.block_until_ready(made)
    return made


def digests(tree: Any) -> list[int]:
    """Those of all leaves, on the host; every process of a mesh has to call it."""
    made = [in_turn(digest(leaf)) for leaf in jax.tree.leaves(tree)]
    return [int(number) for number in jax.device_get(made)]


def _words(array: jax.Array) -> jax.Array:
    """The bits as ``uint32``; a last axis of two for eight bytes."""
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag], axis=-1)
    if array.dtype == jnp.bool_:
        return array.astype(jnp.uint32)
    size = array.dtype.itemsize
    if size >= 4:
        return lax.bitcast_convert_type(array, jnp.uint32)
    narrow = lax.bitcast_convert_type(array, {1: jnp.uint8, 2: jnp.uint16}[size])
    return narrow.astype(jnp.uint32)
