"""Which stacks are worth joining on many devices: the planner, no arrays.

Every stack is padded to a whole number of slots on each device. A stack of four blocks
costs 256 devices as much as one of 256. So blocks of neighbouring shapes may share a
stack, filled with zeros to its shape, where that lowers the sum of slots times cost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from shampoo_optax.layout.plan import Axes, Box, Group, Plan, Pool, Shape


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
    stacks = [
        (groups[0].members[0][1].stacked, groups) for groups in plan.groups.values()
    ]
    stacks = sorted(
        (stack for stack in stacks if len(stack[0]) == 2),
        key=lambda s: s[0],
        reverse=True,
    )
    into: dict[Shape, Shape] = {}
    for run in _best_runs(stacks):
        shape = _hull([stacks[i][0] for i in run])
        into |= {stacks[i][0]: shape for i in run}
    pools = tuple(_moved(pool, into) for pool in plan.pools)
    return dataclasses.replace(plan, pools=pools)


def _best_runs(stacks: Sequence[tuple[Shape, tuple[Group, ...]]]) -> list[range]:
    """The cheapest way to cut the list into runs, from that of every beginning."""
    best: list[tuple[float, list[range]]] = [(0.0, [])]
    for stop in range(1, len(stacks) + 1):
        ways = []
        for start in range(stop):
            price = _price(stacks[start:stop])
            ways.append((best[start][0] + price, [*best[start][1], range(start, stop)]))
        # Of equal ones that with more runs: nothing is filled without gain.
        best.append(min(ways, key=lambda way: (way[0], -len(way[1]))))
    return best[-1][1]


def _price(run: Sequence[tuple[Shape, tuple[Group, ...]]]) -> float:
    """Slots of a device times the cost of one, if the run were one stack."""
    shape = _hull([shape for shape, _ in run])
    cells: dict[tuple[Axes, int, int, Axes, int], int] = {}
    for own, groups in run:
        for group in groups:
            if group.parts > 1 and own[group.dim] != shape[group.dim]:
                return math.inf  # parts are exchanged along a side of one length
            alike = group.axes, group.dim, group.parts, group.dealt, group.shares
            cells[alike] = cells.get(alike, 0) + group.cells
    slots = sum(
        -(-n // (parts * shares)) for (_, _, parts, _, shares), n in cells.items()
    )
    return slots * cost(shape)


def _hull(shapes: Sequence[Shape]) -> Shape:
    return tuple(max(sides) for sides in zip(*shapes, strict=True))


def _moved(pool: Pool, into: dict[Shape, Shape]) -> Pool:
    def moved(box: Box) -> Box:
        shape = into.get(box.stacked, box.stacked)
        return box if shape == box.stacked else dataclasses.replace(box, within=shape)

    return dataclasses.replace(pool, boxes=tuple(moved(box) for box in pool.boxes))
