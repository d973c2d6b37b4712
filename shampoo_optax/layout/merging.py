"""Which stacks are worth joining on many devices: the planner, no arrays.

Every stack is padded to a whole number of slots on each device. A stack of four blocks
costs 256 devices as much as one of 256. So blocks of neighbouring shapes may share a
stack, filled with zeros to its shape, where that lowers the sum of slots times cost.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence

from shampoo_optax.layout.plan import Axes, Box, Group, Plan, Pool, Shape

Stack = tuple[Shape, tuple[Group, ...]]
# Shapes are laid in shelves of so many rows, by columns within a shelf.
WIDTHS = (1, 8, 32, 128, 512)
DOUBLINGS = 32  # of a stack's price; parts of blocks may not let stacks join at any


def cost(shape: Shape) -> int:
    """Elements of a block's state: two matrices for each side, two moments.

    Example:
      >>> cost((4, 2))
      56
    """
    return 2 * sum(side * side for side in shape) + 2 * math.prod(shape)


def merged(plan: Plan) -> Plan:
    """The plan with neighbouring stacks joined where that costs less.

    Exact among all ways to cut the sorted shapes into runs.

    Example:
      >>> from shampoo_optax.layout.plan import Leaf, Route, make_plan
      >>> copies = Route(shards=((), ()), dealt=("d",))
      >>> shapes = (8, 8), (8, 7), (8, 1)
      >>> leaves = tuple(Leaf(shape, shape, 1, shape, copies) for shape in shapes)
      >>> plan = make_plan(leaves, 8, axis_sizes=(("d", 16),), block_axes=("d",))
      >>> merged(plan).stacks
      {'8x8': (16, 8, 8)}
    """
    stacks = sorted(_stacks(plan), key=lambda s: s[0], reverse=True)
    into: dict[Shape, Shape] = {}
    for run in _best_runs(stacks)[1]:
        into |= dict.fromkeys((own for own, _ in run), _hull([own for own, _ in run]))
    return _joined(plan, into)


@functools.lru_cache(maxsize=16)
def at_most(plan: Plan, number: int, sides: int, largest: float) -> Plan:
    """The plan with about ``number`` stacks, joined where that fills the least.

    A program is compiled for every stack, and for every size of a factor one with its
    roots, so that two hundred shapes take minutes. Every stack is given a price of its
    own, the lowest for which few enough remain; their sides are then rounded up, and on
    one device every block goes to the smallest stack that holds it.

    Args:
      plan: of all.
      number: of stacks of matrices that may remain.
      sides: how many different ones they may have.
      largest: stacks with a longer side stay as they are: it has no factor.

    Example:
      >>> from shampoo_optax.layout.plan import Leaf, make_plan
      >>> shapes = (8, 8), (8, 7), (3, 2), (2, 2)
      >>> leaves = tuple(Leaf(shape, shape, 1, shape) for shape in shapes)
      >>> at_most(make_plan(leaves, 8), 2, 2, 8).stacks
      {'8x8': (2, 8, 8), '3x3': (2, 3, 3)}
    """
    stacks = [stack for stack in _stacks(plan) if max(stack[0]) <= largest]
    orders = [sorted(stacks, key=_by_rows(width)) for width in WIDTHS]
    alone = sum(price for stack in stacks for _, price in _prices([stack]))
    each = alone / (8 * number)
    runs: Sequence[Sequence[Stack]] = []
    for _ in range(DOUBLINGS):
        ways = [_best_runs(order, each) for order in orders]
        _, runs = min(ways, key=operator.itemgetter(0))
        if len(runs) <= number:
            break
        each *= 2
    shapes = _with_few_sides(runs, sides)
    into = {own: to for to, run in zip(shapes, runs, strict=True) for own, _ in run}
    if plan.devices == 1:  # on several, slots would come and go
        for own in into:
            into[own] = min((s for s in shapes if _hull([own, s]) == s), key=cost)
    return _joined(plan, into)


def _with_few_sides(runs: Sequence[Sequence[Stack]], most: int) -> list[Shape]:
    """Shapes of the runs with so many different sides.

    Parts of blocks are exchanged along a side of one length, which stays.
    """
    hulls = [_hull([shape for shape, _ in run]) for run in runs]
    groups = [[group for _, of in run for group in of] for run in runs]
    stay = [{group.dim for group in of if group.parts > 1} for of in groups]
    blocks: dict[int, int] = {}
    for hull, of, fixed in zip(hulls, groups, stay, strict=True):
        for dim, side in enumerate(hull):
            if dim not in fixed:
                number = sum(group.slots for group in of)
                blocks[side] = blocks.get(side, 0) + number
    up = rounded_up(blocks, most)
    return [
        tuple(s if dim in fixed else up[s] for dim, s in enumerate(hull))
        for hull, fixed in zip(hulls, stay, strict=True)
    ]


def rounded_up(weights: Mapping[int, int], most: int) -> dict[int, int]:
    """Numbers moved up, so that at most so many different ones remain.

    Exact: of all ways that with the least sum of weights times squares.

    Example:
      >>> rounded_up({2: 1, 3: 9, 7: 1, 8: 1}, 2)
      {2: 3, 3: 3, 7: 8, 8: 8}
    """
    numbers = sorted(weights)
    before = [0, *itertools.accumulate(weights[n] for n in numbers)]
    # Of the first so many numbers: the price, and what they are moved to.
    never = math.inf, ()
    ways: list[tuple[float, Shape]] = [(0, ()), *[never] * len(numbers)]
    for _ in range(min(most, len(numbers))):
        ways = [never] + [
            min(
                (price + (before[stop] - before[start]) * top**2, (*tops, top))
                for start, (price, tops) in enumerate(ways[:stop])
            )
            for stop, top in enumerate(numbers, 1)
        ]
    tops = ways[-1][1]
    return {n: tops[bisect.bisect_left(tops, n)] for n in numbers}


def _by_rows(width: int) -> Callable[[Stack], tuple[int, ...]]:
    return lambda stack: (-(-stack[0][0] // width), stack[0][1], stack[0][0])


def _stacks(plan: Plan) -> list[Stack]:
    """The shapes and groups of stacks of matrices."""
    found = [
        (groups[0].members[0][1].stacked, groups) for groups in plan.groups.values()
    ]
    return [stack for stack in found if len(stack[0]) == 2]


def _joined(plan: Plan, into: Mapping[Shape, Shape]) -> Plan:
    """The plan with the stacks of some shapes filled up to others."""
    return dataclasses.replace(
        plan, pools=tuple(_moved(pool, into) for pool in plan.pools)
    )


def _best_runs(
    stacks: Sequence[Stack], each: float = 0.0
) -> tuple[float, list[Sequence[Stack]]]:
    """The cheapest way to cut the list into runs, from that of every beginning."""
    best: list[tuple[float, int, int]] = [(0.0, 0, 0)]  # price, runs, the last's start
    for stop in range(1, len(stacks) + 1):
        ways = []
        for start, price in _prices(stacks[:stop]):
            before, number, _ = best[start]
            ways.append((before + price + each, number + 1, start))
        # Of equal ones that with more runs: nothing is filled without gain.
        best.append(min(ways, key=lambda way: (way[0], -way[1])))
    runs: list[Sequence[Stack]] = []
    stop = len(stacks)
    while stop:
        start = best[stop][2]
        runs.append(stacks[start:stop])
        stop = start
    return best[-1][0], runs[::-1]


def _prices(stacks: Sequence[Stack]) -> Iterator[tuple[int, float]]:
    """For the last of a list, the last two, and so on: where they begin, their price.

    That is slots of a device times the cost of one, if the run were one stack.
    """
    rows: list[tuple[Shape, Group]] = []
    cells: dict[tuple[Axes, int, int, Axes, int], int] = {}
    shape: Shape = (0, 0)
    for start in range(len(stacks) - 1, -1, -1):
        own, groups = stacks[start]
        shape = _hull([shape, own])
        for group in groups:
            alike = group.axes, group.dim, group.parts, group.dealt, group.shares
            cells[alike] = cells.get(alike, 0) + group.cells
            if group.parts > 1:
                rows.append((own, group))
        # Parts are exchanged along a side of one length.
        if any(own[group.dim] != shape[group.dim] for own, group in rows):
            yield start, math.inf
            continue
        slots = sum(-(-n // (k[2] * k[4])) for k, n in cells.items())
        yield start, slots * cost(shape)


def _hull(shapes: Sequence[Shape]) -> Shape:
    return tuple(max(sides) for sides in zip(*shapes, strict=True))


def _moved(pool: Pool, into: Mapping[Shape, Shape]) -> Pool:
    def moved(box: Box) -> Box:
        shape = into.get(box.stacked, box.stacked)
        return box if shape == box.stacked else dataclasses.replace(box, within=shape)

    return dataclasses.replace(pool, boxes=tuple(moved(box) for box in pool.boxes))
