"""A number for each array that any flipped bit changes, the same on every mesh."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Shape = tuple[int, ...]
# Knuth's (2**32 over the golden ratio), which spreads neighbours' weights; odd.
MULTIPLIER = 2654435761
MASK = 2**32 - 1
CACHED = 2**18  # words that stay in a core's cache for a second look


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
    weights = index * jnp.uint32(MULTIPLIER) | jnp.uint32(1)
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
    leaves = jax.tree.leaves(tree)
    made = [None if _here(leaf) else in_turn(digest(leaf)) for leaf in leaves]
    with futures.ThreadPoolExecutor() as pool:  # NumPy's sums leave other threads free
        here = {i: pool.submit(_on_host, leaves[i]) for i in _places(made, None)}
        return [
            here[i].result() if number is None else int(number)
            for i, number in enumerate(jax.device_get(made))
        ]


def _places(items: list[Any], item: Any) -> list[int]:
    return [i for i, other in enumerate(items) if other is item]


def _here(leaf: Any) -> bool:
    """Whether the host can read it in place, which is faster than XLA there."""
    if isinstance(leaf, np.ndarray):
        return True
    cpu = all(device.platform == "cpu" for device in leaf.devices())
    return cpu and leaf.is_fully_addressable


def _on_host(array: np.ndarray | jax.Array) -> int:
    """The same number, by sums of rows and of columns, which are fast everywhere."""
    if isinstance(array, np.ndarray):
        return _of_piece(array, (0,) * array.ndim, array.shape)
    total, seen = 0, set()
    for shard in array.addressable_shards:
        starts = tuple(index.start or 0 for index in shard.index)
        if starts not in seen:  # the others hold copies
            seen.add(starts)
            total += _of_piece(np.asarray(shard.data), starts, array.shape)
    return total & MASK


def _of_piece(piece: np.ndarray, starts: Shape, shape: Shape) -> int:
    r"""What a piece of an array adds to its digest.

    The weight of word :math:`i = rC + c` (row, width, column) is :math:`iK | 1`, that
    is :math:`iK`, and one more where :math:`i` is even: :math:`K` is odd. So a digest
    is :math:`K(C \sum_r r\,b_r + \sum_c c\,b_c)`, of the sums of rows and of columns,
    and the sum of the even words.
    """
    words, each = _host_words(piece)
    *lead, width = shape or (1,)
    width, begin = width * each, (starts[-1] if starts else 0) * each
    rows = _row_numbers(piece.shape[:-1], starts, lead)
    columns = np.arange(begin, begin + words.shape[1], dtype=np.uint32)
    weighted, even = 0, 0
    step = max(1, CACHED // len(columns))
    for low in range(0, len(rows), step):
        part, index = words[low : low + step], rows[low : low + step]
        weighted += width * int(np.dot(part.sum(1, dtype=np.uint32), index))
        halves = [(part, 0)]
        if width % 2:  # even words are elsewhere in every other row
            halves = [(part[index % 2 == odd], odd) for odd in (0, 1)]
        for half, odd in halves:
            sums = half.sum(0, dtype=np.uint32)
            weighted += int(np.dot(sums, columns))
            even += int(sums[columns % 2 == odd].sum(dtype=np.uint32))
    return (MULTIPLIER * weighted + even) & MASK


def _row_numbers(piece: Shape, starts: Shape, whole: Sequence[int]) -> np.ndarray:
    """The places of a piece's rows among all rows of an array."""
    rows = np.zeros(piece, np.uint32)
    for dim, (size, own) in enumerate(zip(whole, piece, strict=False)):
        along = np.arange(starts[dim], starts[dim] + own, dtype=np.uint32)
        rows = rows * np.uint32(size) + along.reshape(
            -1, *(1,) * (len(piece) - dim - 1)
        )
    return rows.reshape(-1)


def _host_words(piece: np.ndarray) -> tuple[np.ndarray, int]:
    """The bits in rows of unsigned words, and how many of them an element has."""
    flat = np.ascontiguousarray(piece).reshape(-1, piece.shape[-1] if piece.ndim else 1)
    if flat.dtype.itemsize < 4:
        return flat.view(f"u{flat.dtype.itemsize}"), 1
    return flat.view(np.uint32), flat.dtype.itemsize // 4


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
