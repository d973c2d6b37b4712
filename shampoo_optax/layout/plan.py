"""Which blocks a model is cut into: pure algebra on shapes, no arrays.

Three steps: *fold* a parameter's dimensions into those of a matrix, *pool* the
parameters of one folded shape, *cut* each pooled shape into boxes of equal blocks.
Blocks of one shape, of every parameter, make one stack.
"""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

Shape = tuple[int, ...]
Axes = tuple[str, ...]  # of a mesh


@dataclass(frozen=True)
class Route:
    """How the blocks of an array come to lie whole on the devices that own them.

    All empty on one device. See :mod:`shampoo_optax.layout.routes`.
    """

    gathered: tuple[tuple[int, Axes], ...] = ()  # dimensions of the array, made whole
    resharded: tuple[Axes, int, int] | None = None  # folded: axes move from, to
    shards: tuple[Axes, ...] = ()  # after that, by folded dimension
    dealt: Axes = ()  # axes that hold copies: they share the blocks out
    by_columns: bool = False  # the folded matrix came cut along its columns alone


@dataclass(frozen=True)
class Leaf:
    """A parameter as the plan sees it."""

    shape: Shape
    local: Shape  # what a device holds, after `route.gathered`
    batch: int  # arrays in its batch axes, on one device
    dims: Shape | None  # folded, whole; None where it is not blocked
    route: Route = Route()


@dataclass(frozen=True)
class Box:
    """A box of a folded shape that is cut into a grid of equal blocks."""

    start: Shape  # corner of the box
    grid: Shape  # blocks along each dimension
    block: Shape  # shape of one block, or of the part of it that a device holds
    whole: Shape  # shape of one block
    turned: bool = False  # the stack holds it transposed
    within: Shape | None = None  # the stack's shape, where zeros fill the block to it

    @property
    def stop(self) -> Shape:
        """The far corner."""
        sizes = zip(self.start, self.grid, self.block, strict=True)
        return tuple(s + g * b for s, g, b in sizes)

    @property
    def part(self) -> Shape:
        """Shape of a device's part of a block, as the stack has it."""
        return self.block[::-1] if self.turned else self.block

    @property
    def stacked(self) -> Shape:
        """Shape of a block as the stack has it, without filling."""
        return self.whole[::-1] if self.turned else self.whole

    @property
    def slot(self) -> Shape:
        """Shape of the stack's blocks."""
        return self.within or self.stacked

    @property
    def key(self) -> str:
        """The stack its blocks belong to, for example ``1024x384``."""
        return "x".join(map(str, self.slot))


@dataclass(frozen=True)
class Pool:
    """All parameters of one folded shape that take one route."""

    shape: Shape  # folded, without batch axes, as a device holds it
    leaves: Shape  # positions in the flattened tree
    batches: Shape  # how many arrays of this shape each leaf holds
    boxes: tuple[Box, ...]  # first dimension slowest
    route: Route = Route()
    held: Shape | None = None  # the same before `route.resharded`; None where equal

    def cells(self, box: Box) -> int:
        """Blocks (or parts of them) of one of its boxes that a device holds."""
        return sum(self.batches) * math.prod(box.grid)


@dataclass(frozen=True)
class Group:
    """Blocks of one stack that are exchanged alike."""

    members: tuple[tuple[Pool, Box], ...]
    axes: Axes  # over which parts of one block lie
    dim: int  # the dimension they are parts of, in the stack
    parts: int  # devices that hold a block together, neighbours on `axes`
    dealt: Axes
    shares: int  # devices along `dealt`

    @property
    def cells(self) -> int:
        """What a device holds before the exchange."""
        return sum(pool.cells(box) for pool, box in self.members)

    @property
    def filled(self) -> bool:
        """Whether zeros fill some of its blocks."""
        return any(box.within is not None for _, box in self.members)

    @property
    def slots(self) -> int:
        """Blocks that a device owns after it; some may be dead."""
        return -(-self.cells // (self.parts * self.shares))

    @property
    def padded(self) -> int:
        """Cells with the dead ones."""
        return self.slots * self.parts * self.shares


@dataclass(frozen=True)
class Plan:
    """How a flattened tree of parameters becomes stacks."""

    leaves: tuple[Leaf, ...]
    pools: tuple[Pool, ...]
    rest: Shape  # positions of the leaves that are not blocked
    axis_sizes: tuple[tuple[str, int], ...] = ()  # of the mesh
    block_axes: Axes = ()  # over which stacks are spread

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """Of all leaves."""
        return tuple(leaf.shape for leaf in self.leaves)

    @property
    def devices(self) -> int:
        """How many devices own different blocks."""
        return self.along(self.block_axes)

    def along(self, axes: Axes) -> int:
        """How many devices lie along some axes of the mesh."""
        return _size(axes, self.axis_sizes)

    @property
    def stacks(self) -> dict[str, Shape]:
        """Shape of every stack, for example ``{"8x6": (3, 8, 6)}``."""
        return {
            key: (
                self.devices * sum(group.slots for group in groups),
                *groups[0].members[0][1].slot,
            )
            for key, groups in self.groups.items()
        }

    @property
    def members(self) -> list[tuple[Pool, Box]]:
        """Every box with its pool, in the order in which stacks are filled."""
        return [(pool, box) for pool in self.pools for box in pool.boxes]

    @functools.cached_property
    def groups(self) -> dict[str, tuple[Group, ...]]:
        """The blocks of every stack, by what their exchange has in common."""
        found: dict[str, dict[tuple[Axes, int, int, Axes], list[tuple[Pool, Box]]]] = {}
        for pool, box in self.members:
            pairs = zip(box.part, box.stacked, strict=True)
            split = [dim for dim, (part, whole) in enumerate(pairs) if part < whole]
            dim = split[0] if split else 0
            axes: Axes = ()
            if split:
                folded = len(box.whole) - 1 - dim if box.turned else dim
                axes = pool.route.shards[folded]
            parts = box.stacked[dim] // box.part[dim]
            alike = axes, dim, parts, pool.route.dealt
            found.setdefault(box.key, {}).setdefault(alike, []).append((pool, box))
        return {
            key: tuple(
                Group(tuple(boxes), axes, dim, n, dealt, self.along(dealt))
                for (axes, dim, n, dealt), boxes in groups.items()
            )
            for key, groups in found.items()
        }


def _size(axes: Axes, axis_sizes: tuple[tuple[str, int], ...]) -> int:
    sizes = dict(axis_sizes)
    return math.prod(sizes[axis] for axis in axes)


def block_sides(
    shape: Shape, block_size: float, *, one_sided_above: float = math.inf
) -> Shape:
    """The size of a block along each dimension.

    The longer side of a matrix is left whole where it is above ``one_sided_above``.

    Example:
      >>> block_sides((10, 4), 8), block_sides((10, 4), 2, one_sided_above=9)
      ((8, 4), (10, 2))
    """
    longest = max(shape, default=0)
    whole = len(shape) == 2 and longest > one_sided_above
    uncut = shape.index(longest) if whole else None
    return tuple(
        size if dim == uncut or block_size >= size else int(block_size)
        for dim, size in enumerate(shape)
    )


def cut(
    shape: Shape,
    sides: Shape,
    *,
    shards: Shape | None = None,
    turn: bool = False,
    by_columns: bool = False,
) -> tuple[Box, ...]:
    """Cut a shape into boxes of equal blocks; the last block may be smaller.

    Args:
      shape: whole.
      sides: of a block, from :func:`block_sides`.
      shards: in how many pieces each dimension lies on several devices; the boxes are
        those of one device.
      turn: let stacks hold a wide matrix transposed, so that ``384x1024`` and
        ``1024x384`` are one stack.
      by_columns: with ``turn``, a square one too: its array lies cut along its
        columns, and parts of blocks are exchanged along the first dimension.

    Returns:
      The boxes.

    Example:
      >>> [(box.grid, box.block) for box in cut((10, 4), (4, 4))]
      [((2, 1), (4, 4)), ((1, 1), (2, 4))]
      >>> [(box.block, box.whole) for box in cut((8, 4), (4, 4), shards=(4, 1))]
      [((2, 4), (4, 4))]
    """
    by_dim: list[list[tuple[int, int, int, int]]] = []
    pieces = shards or (1,) * len(shape)
    for size, block, number in zip(shape, sides, pieces, strict=True):
        local = size // number
        if local < block:  # a device holds a part of one block
            by_dim.append([(0, 1, local, block)])
            continue
        full, edge = divmod(local, block)
        side = [(0, full, block, block)]
        by_dim.append(side + ([(full * block, 1, edge, edge)] if edge else []))
    boxes = []
    for chosen in itertools.product(*by_dim):
        start, grid, part, whole = (tuple(side[i] for side in chosen) for i in range(4))
        wide = len(whole) == 2 and whole[0] < whole[1] + by_columns
        turned = turn and wide
        boxes.append(Box(start, grid, part, whole, turned))
    return tuple(boxes)


@functools.lru_cache(maxsize=256)
def make_plan(
    leaves: tuple[Leaf, ...],
    block_size: float,
    one_sided_above: float = math.inf,
    *,
    turn: bool = False,
    axis_sizes: tuple[tuple[str, int], ...] = (),
    block_axes: Axes = (),
) -> Plan:
    """Pool folded leaves and cut the pools.

    Args:
      leaves: with their folded shapes and routes.
      block_size: largest dimension of a block, may be infinite.
      one_sided_above: see :func:`block_sides`.
      turn: see :func:`cut`.
      axis_sizes: of the mesh.
      block_axes: over which stacks are spread.

    Returns:
      The plan; the same object for the same arguments.

    Example:
      >>> scanned = Leaf((2, 8, 6), (2, 8, 6), 2, (8, 6))
      >>> make_plan((scanned, Leaf((8, 6), (8, 6), 1, (8, 6))), 8).stacks
      {'8x6': (3, 8, 6)}
    """
    pools: dict[tuple[Shape, Route], list[tuple[int, int]]] = {}
    rest = []
    for position, leaf in enumerate(leaves):
        if leaf.dims is None:
            rest.append(position)
        else:
            member = position, leaf.batch
            pools.setdefault((leaf.dims, leaf.route), []).append(member)
    made = []
    for (dims, route), members in pools.items():
        sides = block_sides(dims, block_size, one_sided_above=one_sided_above)
        shards = tuple(_size(axes, axis_sizes) for axes in route.shards)
        shards = shards or (1,) * len(dims)
        local = tuple(d // n for d, n in zip(dims, shards, strict=True))
        made.append(
            Pool(
                shape=local,
                leaves=tuple(leaf for leaf, _ in members),
                batches=tuple(batch for _, batch in members),
                boxes=cut(
                    dims,
                    sides,
                    shards=shards,
                    turn=turn,
                    by_columns=route.by_columns,
                ),
                route=route,
                held=_before(local, route, axis_sizes),
            )
        )
    return Plan(leaves, tuple(made), tuple(rest), axis_sizes, block_axes)


def _before(
    shape: Shape, route: Route, axis_sizes: tuple[tuple[str, int], ...]
) -> Shape | None:
    """A folded shape on one device before it was cut along another dimension."""
    if route.resharded is None:
        return None
    axes, here, there = route.resharded
    number = _size(axes, axis_sizes)
    return tuple(
        size // number if dim == here else size * number if dim == there else size
        for dim, size in enumerate(shape)
    )
