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


@dataclass(frozen=True)
class Box:
    """A box of a folded shape that is cut into a grid of equal blocks."""

    start: Shape  # corner of the box
    grid: Shape  # blocks along each dimension
    block: Shape  # shape of one block

    @property
    def stop(self) -> Shape:
        """The far corner."""
        sizes = zip(self.start, self.grid, self.block, strict=True)
        return tuple(s + g * b for s, g, b in sizes)

    @property
    def key(self) -> str:
        """The stack its blocks belong to, for example ``1024x384``."""
        return "x".join(map(str, self.block))


@dataclass(frozen=True)
class Pool:
    """All parameters of one folded shape."""

    shape: Shape  # folded, without batch axes
    leaves: Shape  # positions in the flattened tree
    batches: Shape  # how many arrays of this shape each leaf holds
    boxes: tuple[Box, ...]  # first dimension slowest


@dataclass(frozen=True)
class Plan:
    """How a flattened tree of parameters becomes stacks."""

    shapes: tuple[Shape, ...]  # of all leaves
    pools: tuple[Pool, ...]
    rest: Shape  # positions of the leaves that are not blocked

    @property
    def stacks(self) -> dict[str, Shape]:
        """Shape of every stack, for example ``{"8x6": (3, 8, 6)}``."""
        counts: dict[str, Shape] = {}
        for pool, box in self.members:
            number = sum(pool.batches) * math.prod(box.grid)
            number += counts.get(box.key, (0,))[0]
            counts[box.key] = (number, *box.block)
        return counts

    @property
    def members(self) -> list[tuple[Pool, Box]]:
        """Every box with its pool, in the order in which stacks are filled."""
        return [(pool, box) for pool in self.pools for box in pool.boxes]


def fold(shape: Shape) -> Shape:
    """The default folding: an array of three or more dimensions becomes a matrix.

    Dimensions of size one are dropped. Of all ways to cut the others into a left
    and a right group the one nearest to a square is taken, the later cut on a tie.
    A matrix stays a matrix, whatever its size.

    Args:
      shape: of the parameter, without batch axes.

    Returns:
      No, one or two dimensions.

    Example:
      >>> fold((3, 3, 64, 128)), fold((512, 8, 64)), fold((1, 5))
      ((576, 128), (512, 512), (5,))
    """
    dims = tuple(d for d in shape if d != 1)
    if len(dims) < 3:
        return dims
    cuts = [
        (math.prod(dims[:i]), math.prod(dims[i:])) for i in range(len(dims) - 1, 0, -1)
    ]
    return min(cuts, key=lambda cut: max(cut) / min(cut))


def merge(shape: Shape, *, threshold: float, target: float) -> Shape:
    """The reference folding: Meta's ``merge_small_dims``.

    Dimensions of size one are dropped; then, from the last to the first, a
    dimension joins its right neighbour while the product stays within
    ``threshold`` and the number of dimensions above ``target``.

    Args:
      shape: of the parameter.
      threshold: largest merged dimension, may be infinite.
      target: dimensionality at which merging stops; infinite keeps the shape.

    Returns:
      The merged shape; ``(1,)`` for a scalar.

    Example:
      >>> merge((64, 3, 7, 7), threshold=1024, target=1)
      (64, 147)
      >>> merge((10, 20), threshold=1024, target=1)
      (200,)
    """
    if target == math.inf:
        return shape or (1,)
    dims = [d for d in shape if d != 1] or [1]
    merged = [dims.pop()]
    while dims:
        size = dims[-1] * merged[0]
        if len(merged) + len(dims) > target and size <= threshold:
            merged[0] = size
        else:
            merged.insert(0, dims[-1])
        dims.pop()
    return tuple(merged)


def cut(
    shape: Shape, block_size: float, *, one_sided_above: float = math.inf
) -> tuple[Box, ...]:
    """Cut a shape into boxes of equal blocks; the last block may be smaller.

    The longer side of a matrix is left whole where it is above ``one_sided_above``.

    Example:
      >>> [(box.grid, box.block) for box in cut((10, 4), 4)]
      [((2, 1), (4, 4)), ((1, 1), (2, 4))]
      >>> [(box.grid, box.block) for box in cut((10, 8), 4, one_sided_above=9)]
      [((1, 2), (10, 4))]
    """
    longest = max(shape, default=0)
    whole = len(shape) == 2 and longest > one_sided_above
    uncut = shape.index(longest) if whole else None
    sides = []
    for dim, size in enumerate(shape):
        block = size if dim == uncut or block_size >= size else int(block_size)
        full, edge = divmod(size, block)
        side = [(0, full, block)] + ([(full * block, 1, edge)] if edge else [])
        sides.append(side)
    return tuple(Box(*zip(*side, strict=True)) for side in itertools.product(*sides))


@functools.lru_cache(maxsize=256)
def make_plan(
    folded: tuple[tuple[Shape, int, Shape | None], ...],
    block_size: float,
    one_sided_above: float = math.inf,
) -> Plan:
    """Pool folded leaves and cut the pools.

    Args:
      folded: for each leaf its shape, the number of arrays its batch axes hold, and
        its folded shape, or None where it is not blocked.
      block_size: largest dimension of a block, may be infinite.
      one_sided_above: see :func:`cut`.

    Returns:
      The plan; the same object for the same arguments.

    Example:
      >>> make_plan((((2, 8, 6), 2, (8, 6)), ((8, 6), 1, (8, 6))), 8).stacks
      {'8x6': (3, 8, 6)}
    """
    pools: dict[Shape, list[tuple[int, int]]] = {}
    rest = []
    for position, (_, batch, dims) in enumerate(folded):
        if dims is None:
            rest.append(position)
        else:
            pools.setdefault(dims, []).append((position, batch))
    return Plan(
        shapes=tuple(shape for shape, _, _ in folded),
        pools=tuple(
            Pool(
                shape=dims,
                leaves=tuple(leaf for leaf, _ in members),
                batches=tuple(batch for _, batch in members),
                boxes=cut(dims, block_size, one_sided_above=one_sided_above),
            )
            for dims, members in pools.items()
        ),
        rest=tuple(rest),
    )
