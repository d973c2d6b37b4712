"""Which way a sharded parameter's blocks take to their owners: algebra, no arrays.

A dimension that lies on several devices *fits* where the boundaries of blocks and
shards nest. Whole blocks in every shard need no exchange. Parts of blocks need one
all_to_all among the neighbours that hold a block together. Where a dimension does not
fit, its parameter is resharded along another one that does; where none does, it is
gathered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from shampoo_optax.layout.plan import Axes, Leaf, Route, Shape

Spec = tuple[Axes, ...]  # by dimension, the axes over which it lies


@dataclass(frozen=True)
class Devices:
    """A mesh as far as routes need it."""

    sizes: Mapping[str, int]  # of all its axes
    block_axes: Axes

    def number(self, axes: Axes) -> int:
        """How many devices lie along some axes."""
        return math.prod(self.sizes[axis] for axis in axes)


def fits(size: int, block: int, shards: int) -> bool:
    """Whether the boundaries of blocks and shards nest.

    Example:
      >>> fits(2048, 1024, 256), fits(2048, 1024, 2), fits(5504, 1024, 16)
      (True, True, False)
    """
    if shards == 1:
        return True
    if size % shards or size % block:
        return False
    local = size // shards
    return local % block == 0 or block % local == 0


def groups_of(shape: Shape, dims: Shape) -> list[list[int]]:
    """Which dimensions of an array a folded dimension is made of.

    Example:
      >>> groups_of((3, 3, 64, 128), (576, 128)), groups_of((1, 5), (5,))
      ([[0, 1, 2], [3]], [[0, 1]])
    """
    groups: list[list[int]] = [[] for _ in dims]
    now, size = 0, 1
    for position, length in enumerate(shape):
        if dims and size == dims[now] and length != 1 and now + 1 < len(dims):
            now, size = now + 1, 1
        size *= length
        if dims:
            groups[now].append(position)
    return groups


def route_leaf(
    shape: Shape,
    batch_axes: int,
    dims: Shape,
    sides: Shape,
    spec: Spec,
    devices: Devices,
) -> Leaf:
    """The way of one parameter.

    Args:
      shape: of the parameter.
      batch_axes: how many leading ones hold separate arrays.
      dims: folded shape of one of them.
      sides: of its blocks.
      spec: where it lies, by dimension of ``shape``.
      devices: the mesh.

    Returns:
      The leaf with its route.

    Example:
      >>> mesh = Devices({"data": 2, "fsdp": 4}, ("data", "fsdp"))
      >>> leaf = route_leaf((8, 6), 0, (8, 6), (4, 6), (("fsdp",), ()), mesh)
      >>> leaf.route.shards, leaf.route.dealt
      ((('fsdp',), ()), ('data',))
    """
    held, gathered = _foldable(shape, batch_axes, dims, spec, devices)
    shards, resharded, odd = _choose(dims, sides, held, devices)
    for dim in odd:
        position = _leading(
            groups_of(shape[batch_axes:], dims)[dim], shape[batch_axes:]
        )
        gathered.append((batch_axes + position, held[dim]))
        shards[dim] = ()
    whole = dict(gathered)
    local = tuple(
        size if i in whole else size // devices.number(axes)
        for i, (size, axes) in enumerate(zip(shape, spec, strict=True))
    )
    batch = math.prod(local[:batch_axes])
    used = {axis for i in range(batch_axes) if i not in whole for axis in spec[i]}
    used |= {axis for axes in shards for axis in axes}
    dealt = tuple(axis for axis in devices.block_axes if axis not in used)
    # Of the spec, not of what becomes of it: the same on every mesh.
    by_columns = len(dims) == 2 and not held[0] and bool(held[1])
    route = Route(tuple(gathered), resharded, tuple(shards), dealt, by_columns)
    return Leaf(shape, local, batch, dims, route)


def _leading(group: list[int], shape: Shape) -> int:
    """The dimension of a group that may be cut: the first that is not of size one."""
    return next((i for i in group if shape[i] != 1), group[0])


def _foldable(
    shape: Shape, batch_axes: int, dims: Shape, spec: Spec, devices: Devices
) -> tuple[list[Axes], list[tuple[int, Axes]]]:
    """Axes by folded dimension, and what must be gathered before the folding.

    Only the leading dimension of a folded group may stay cut, over axes that blocks
    are spread over; along other axes every device needs the whole.
    """
    held: list[Axes] = [() for _ in dims]
    leading = {
        batch_axes + _leading(group, shape[batch_axes:]): dim
        for dim, group in enumerate(groups_of(shape[batch_axes:], dims))
        if group
    }
    gathered = []
    for i, axes in enumerate(spec):
        inside = set(axes) <= set(devices.block_axes)
        if not axes or (inside and i < batch_axes):
            continue
        if inside and i in leading:
            held[leading[i]] = axes
        else:
            gathered.append((i, axes))
    return held, gathered


def _choose(
    dims: Shape, sides: Shape, held: list[Axes], devices: Devices
) -> tuple[list[Axes], tuple[Axes, int, int] | None, list[int]]:
    """Shards after all, a resharding, and the dimensions that must be gathered."""
    shards = list(held)
    cut = [dim for dim, axes in enumerate(held) if axes]

    def nests(dim: int, axes: Axes) -> bool:
        return fits(dims[dim], sides[dim], devices.number(axes))

    odd = [dim for dim in cut if not nests(dim, held[dim])]
    if len(cut) == 1 and odd:
        others = (dim for dim in range(len(dims)) if dim != cut[0])
        for other in others:
            if nests(other, held[cut[0]]):
                shards[other], shards[cut[0]] = held[cut[0]], ()
                return shards, (held[cut[0]], cut[0], other), []
    # One exchange puts one dimension together; a second cut one is gathered.
    parts = [
        dim
        for dim in cut
        if dim not in odd and dims[dim] // devices.number(held[dim]) < sides[dim]
    ]
    return shards, None, odd + sorted(parts, key=lambda dim: -dims[dim])[1:]
