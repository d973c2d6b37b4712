"""Parts of blocks on many devices to whole blocks on their owners, and back.

Runs under ``shard_map``. A device holds a part of every block that crosses it; of the
blocks of one stack, each owner gets its share in one all_to_all. Where devices hold
copies, each takes its share of them, and the updates are gathered at the end. On one
device all of it is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.layout.plan import Axes, Group, Route


def to_owners(cells: Sequence[jax.Array], groups: Sequence[Group]) -> list[jax.Array]:
    """Whole blocks of one stack, a device's own.

    Args:
      cells: for each group ``[cells, *part]``, what this device holds.
      groups: of one stack.

    Returns:
      For each group ``[slots, *block]``.

    Example:
      >>> from shampoo_optax.layout.plan import Box, Pool
      >>> member = Pool((4, 2), (0,), (1,), ()), Box((0, 0), (2, 1), (2, 2), (2, 2))
      >>> whole = Group((member,), (), 0, 1, (), 1)
      >>> to_owners([jnp.ones((2, 2, 2))], [whole])[0].shape
      (2, 2, 2)
    """
    shares = [_share(x, group) for x, group in zip(cells, groups, strict=True)]
    parted = [i for i, group in enumerate(groups) if group.parts > 1]
    for together in _alike(shares, groups, parted):
        first = groups[together[0]]
        # [parts * slots, part, ...]: a chunk of slots for each owner.
        moved = [jnp.moveaxis(shares[i], groups[i].dim + 1, 1) for i in together]
        sent = [x.reshape(first.parts, -1, *x.shape[1:]) for x in moved]
        got = _all_to_all(joined(sent, 1), first, 0, 1)
        got = got.reshape(got.shape[0], -1, *got.shape[3:])
        slots = [groups[i].slots for i in together]
        for i, x in zip(together, pieces(got, slots), strict=True):
            shares[i] = jnp.moveaxis(x, 1, groups[i].dim + 1)
    return shares


def from_owners(
    blocks: Sequence[jax.Array], groups: Sequence[Group]
) -> list[jax.Array]:
    """The inverse of :func:`to_owners`.

    Example:
      >>> from shampoo_optax.layout.plan import Box, Pool
      >>> member = Pool((4, 2), (0,), (1,), ()), Box((0, 0), (2, 1), (2, 2), (2, 2))
      >>> whole = Group((member,), (), 0, 1, (), 1)
      >>> from_owners([jnp.ones((2, 2, 2))], [whole])[0].shape
      (2, 2, 2)
    """
    cells = list(blocks)
    away = [i for i, group in enumerate(groups) if group.parts > 1 or group.dealt]
    for together in _alike(cells, groups, away):
        first = groups[together[0]]
        moved = [jnp.moveaxis(cells[i], groups[i].dim + 1, 1) for i in together]
        sent = [x.reshape(x.shape[0], first.parts, -1, *x.shape[2:]) for x in moved]
        got = _all_to_all(joined(sent, 0), first, 1, 0)
        if first.dealt:  # [shares, parts, slots, part, ...]
            got = lax.all_gather(got, first.dealt, to="invarying")
        got = got.reshape(first.shares, first.parts, *got.shape[-len(moved[0].shape) :])
        slots = [groups[i].slots for i in together]
        for i, x in zip(together, pieces(got, slots, 2), strict=True):
            x = x.reshape(-1, *x.shape[3:])[: groups[i].cells]  # without dead ones
            cells[i] = jnp.moveaxis(x, 1, groups[i].dim + 1)
    return cells


def true_sizes(groups: Sequence[Group]) -> list[jax.Array] | None:
    """Sides of a device's own blocks, by dimension ``[slots]``, without the filling.

    None where nothing is filled. A dead block has those of the last.
    """
    if not any(group.filled for group in groups):
        return None
    found = []
    for group in groups:
        sides = [
            box.stacked for pool, box in group.members for _ in range(pool.cells(box))
        ]
        order = jnp.arange(group.slots, dtype=jnp.int32)
        if group.parts > 1:  # which chunk of the cells is this device's
            order += lax.axis_index(group.axes) % group.parts * group.slots
        if group.dealt:
            order += lax.axis_index(group.dealt) * (group.slots * group.parts)
        found.append(
            jnp.take(jnp.asarray(sides, jnp.int32), order, axis=0, mode="clip")
        )
    return [jnp.concatenate([x[:, dim] for x in found]) for dim in range(len(sides[0]))]


def gather(leaf: jax.Array, route: Route) -> jax.Array:
    """Make the dimensions whole that fit no other way."""
    for dim, axes in route.gathered:
        leaf = lax.all_gather(leaf, axes, axis=dim, tiled=True, to="invarying")
    return leaf


def ungather(leaf: jax.Array, route: Route) -> jax.Array:
    """A device's own shard again."""
    for dim, axes in reversed(route.gathered):
        size = leaf.shape[dim] // lax.axis_size(axes)
        start = lax.axis_index(axes) * size
        leaf = lax.dynamic_slice_in_dim(leaf, start, size, dim)
    return leaf


def reshard(pooled: jax.Array, route: Route, *, back: bool = False) -> jax.Array:
    """Move the cut of ``[n, ...]`` from one folded dimension to another."""
    if route.resharded is None:
        return pooled
    axes, here, there = route.resharded
    if back:
        here, there = there, here
    return lax.all_to_all(pooled, axes, there + 1, here + 1, tiled=True)


def _share(cells: jax.Array, group: Group) -> jax.Array:
    """This device's share of what several hold copies of."""
    dead = group.padded - cells.shape[0]
    if dead:
        edges = [(0, dead, 0)] + [(0, 0, 0)] * (cells.ndim - 1)
        cells = lax.pad(cells, jnp.zeros((), cells.dtype), edges)
    if not group.dealt:
        return cells
    size = group.padded // group.shares
    return lax.dynamic_slice_in_dim(cells, lax.axis_index(group.dealt) * size, size)


def _alike(
    arrays: Sequence[jax.Array], groups: Sequence[Group], which: Sequence[int]
) -> list[list[int]]:
    """Groups that one exchange serves, of some."""
    found: dict[tuple[Axes, int, Axes, tuple[int, ...]], list[int]] = {}
    for i in which:
        group = groups[i]
        rest = tuple(s for d, s in enumerate(arrays[i].shape[1:]) if d != group.dim)
        same = group.axes, group.parts, group.dealt, rest
        found.setdefault(same, []).append(i)
    return list(found.values())


def _all_to_all(x: jax.Array, group: Group, split: int, concat: int) -> jax.Array:
    """Among the neighbours that hold blocks together; the axis ``split`` is theirs."""
    if group.parts == 1:
        return jnp.moveaxis(x, split, concat)
    devices = lax.axis_size(group.axes)
    neighbours = None
    if group.parts < devices:
        order = range(0, devices, group.parts)
        neighbours = [list(range(i, i + group.parts)) for i in order]
    # XLA's CPU compiler cuts the operand into one for each neighbour, and where it
    # does so through a transpose it gives them different layouts and stops.
    x = lax.optimization_barrier(x)
    return lax.all_to_all(x, group.axes, split, concat, axis_index_groups=neighbours)


def joined(arrays: Sequence[jax.Array], axis: int) -> jax.Array:
    """Arrays of one dtype behind one another; one alone comes back as it is."""
    return arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, axis)


def pieces(x: jax.Array, sizes: Sequence[int], axis: int = 0) -> list[jax.Array]:
    """Consecutive slices of these sizes."""
    if len(sizes) == 1 and sizes[0] == x.shape[axis]:
        return [x]
    found, start = [], 0
    for size in sizes:
        found.append(lax.slice_in_dim(x, start, start + size, axis=axis))
        start += size
    return found
