"""Rows of stacks to blocks by parameter and back, in the memory of one process.

What :mod:`moves` does on the devices, for a process that has them all: what a
checkpoint holds passes through its memory anyhow. Blocks that lie next to each other
are taken without a copy, nothing is compiled, and the devices hold no second state.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shampoo_optax.checkpoint.entries import Cut
from shampoo_optax.checkpoint.moves import (
    FOLDED,
    begins_as_identity,
    cut,
    filled_up,
    neighbours,
    nothing_in,
    sides_of,
    turned,
)
from shampoo_optax.layout.plan import Shape


def taken(entry: Cut, stack: jax.Array | np.ndarray) -> list[np.ndarray]:
    """The members' parts of a leaf in stacks, as :func:`moves.taken` gives them.

    A part may share the stack's memory: it is for reading, while the stack is there.
    """
    pieces, parts, packed = _pieces(stack), [], entry.kind in FOLDED
    for member, turn in zip(entry.members, turned(entry), strict=True):
        own = sides_of(entry, member, stack.shape, own=False)
        part = _rows(pieces, member.rows)
        if packed and part.shape[1:] != own:
            part = np.asarray(cut(jnp.asarray(part), own, packed))
        part = part[(slice(None), *map(slice, own))]
        parts.append(part.swapaxes(1, 2) if turn else part)
    return parts


def given(entry: Cut, parts: Sequence[Any], stack: Shape) -> np.ndarray:
    """A leaf in stacks from the members' parts; the inverse of :func:`taken`."""
    shapes = [
        (len(member.rows), *sides_of(entry, member, stack, own=False))
        for member in entry.members
    ]
    packed, eye = entry.kind in FOLDED, begins_as_identity(entry, stack)
    filled = all(shape[1:] == stack[1:] for shape in shapes)
    made = np.empty(stack, parts[0].dtype)
    if not filled or sum(shape[0] for shape in shapes) != stack[0]:
        made[:] = np.asarray(nothing_in(stack[1:], made.dtype, packed, eye))
    kinds = zip(entry.members, parts, shapes, turned(entry), strict=True)
    for member, part, shape, turn in kinds:
        array = np.asarray(part)
        if packed and shape[1:] != stack[1:]:
            array = np.asarray(filled_up(jnp.asarray(part), stack[1:], packed, eye))
        inside = tuple(map(slice, array.shape[:0:-1] if turn else array.shape[1:]))
        made[(_run(member.rows), *inside)] = array.swapaxes(1, 2) if turn else array
    return made


def unread(shape: Shape, dtype: Any) -> np.ndarray:
    """What asks Orbax for an array on the host; it takes no memory."""
    return np.broadcast_to(np.zeros((), dtype), shape)


def _pieces(stack: jax.Array | np.ndarray) -> dict[int, np.ndarray]:
    """What the devices hold of a stack, by first row; on CPUs without a copy."""
    if isinstance(stack, np.ndarray):
        return {0: stack}
    found: dict[int, np.ndarray] = {}
    for shard in stack.addressable_shards:
        if shard.data.shape[1:] != stack.shape[1:]:
            return {0: np.asarray(stack)}  # cut along a side, by whoever placed it
        first = shard.index[0].start or 0
        if first not in found:
            found[first] = np.asarray(shard.data)
    return found


def _rows(pieces: dict[int, np.ndarray], rows: np.ndarray) -> np.ndarray:
    """Some rows of all; without a copy where they are neighbours in one piece."""
    for first, piece in pieces.items():
        inside = (rows >= first) & (rows < first + len(piece))
        if inside.all():
            return piece[_run(rows - first)]
    some = next(iter(pieces.values()))
    found = np.empty((len(rows), *some.shape[1:]), some.dtype)
    for first, piece in pieces.items():
        inside = (rows >= first) & (rows < first + len(piece))
        found[inside] = piece[rows[inside] - first]
    return found


def _run(rows: np.ndarray) -> slice | np.ndarray:
    """Rows as a slice where they are neighbours in order."""
    return slice(rows[0], rows[0] + len(rows)) if neighbours(rows) else rows
