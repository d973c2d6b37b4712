"""Which row of a stack holds which block of which parameter: algebra, no arrays.

On many devices the blocks of one parameter lie scattered over the rows of their stack,
by the mesh and by the way the parameter lies on it. Here they are counted as the
parameter counts them, batch first, then row by row of its grid: the same on any mesh.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from shampoo_optax.layout.plan import Axes, Box, Group, Plan, Pool
from shampoo_optax.layout.routes import Spec

Rows = np.ndarray  # [blocks], int: row of the stack, by block of the parameter


@dataclass(frozen=True, eq=False)
class Held:
    """The equal blocks of one parameter in one stack."""

    leaf: int  # position of the parameter in the flattened tree
    box: Box  # as a device has it
    rows: Rows


@dataclass(frozen=True)
class _Place:
    """A device's place among the owners."""

    coordinates: Mapping[str, int]
    sizes: Mapping[str, int]

    def along(self, axes: Axes) -> int:
        """The place along some axes, the first the slowest, as ``lax.axis_index``."""
        index = 0
        for axis in axes:
            index = index * self.sizes[axis] + self.coordinates[axis]
        return index


def held(
    plan: Plan, specs: Sequence[Spec] | None, batch_axes: Sequence[int]
) -> dict[str, list[Held]]:
    """The rows of every parameter's blocks, by stack.

    Args:
      plan: of the parameters.
      specs: where they lie; None for one device.
      batch_axes: how many of their leading axes hold separate arrays.

    Returns:
      For each stack its members; every live row belongs to one of them.

    Example:
      >>> from shampoo_optax.layout.block_layout import BlockLayout
      >>> plan = BlockLayout(2).plan(["a", "b"], [(4, 2), (2, 2)])
      >>> [(m.leaf, m.rows.tolist()) for m in held(plan, None, [0, 0])["2x2"]]
      [(0, [0, 1]), (1, [2])]
    """
    sizes = dict(plan.axis_sizes)
    places = [
        _Place(dict(zip(plan.block_axes, at, strict=True)), sizes)
        for at in itertools.product(*(range(sizes[axis]) for axis in plan.block_axes))
    ]
    found: dict[str, list[Held]] = {}
    for key, groups in plan.groups.items():
        rows: dict[tuple[int, Box], dict[int, int]] = {}
        row = 0
        for place in places:
            for group in groups:
                cells = _cells(plan, group, place, specs, batch_axes)
                for slot, cell in enumerate(cells):
                    if cell is not None:
                        leaf, box, block = cell
                        rows.setdefault((leaf, box), {})[block] = row + slot
                row += group.slots
        found[key] = [
            Held(leaf, box, np.array([by_block[i] for i in range(len(by_block))]))
            for (leaf, box), by_block in rows.items()
        ]
    return found


Cell = tuple[int, Box, int]  # leaf, box, number of the block among the leaf's


def _cells(
    plan: Plan,
    group: Group,
    place: _Place,
    specs: Sequence[Spec] | None,
    batch_axes: Sequence[int],
) -> list[Cell | None]:
    """What the slots of one device hold, of one group; None where they are dead."""
    before = [
        (leaf, box, block)
        for pool, box in group.members
        for leaf in pool.leaves
        for block in _blocks(plan, pool, box, leaf, place, specs, batch_axes)
    ]
    first = (
        place.along(group.dealt) * group.parts + place.along(group.axes) % group.parts
    )
    chosen = before[first * group.slots : (first + 1) * group.slots]
    return chosen + [None] * (group.slots - len(chosen))


def _blocks(
    plan: Plan,
    pool: Pool,
    box: Box,
    leaf: int,
    place: _Place,
    specs: Sequence[Spec] | None,
    batch_axes: Sequence[int],
) -> list[int]:
    """Numbers of the blocks that cross a device, in the order in which it cuts them."""
    known = plan.leaves[leaf]
    gathered = {dim for dim, _ in known.route.gathered}
    starts, local, whole = [], [], []
    for dim in range(batch_axes[leaf]):
        axes = () if specs is None or dim in gathered else specs[leaf][dim]
        starts.append(place.along(axes) * known.local[dim])
        local.append(known.local[dim])
        whole.append(known.shape[dim])
    for dim, side in enumerate(box.whole):
        axes = pool.route.shards[dim] if pool.route.shards else ()
        # A shard begins at a block's boundary, or inside one block.
        starts.append(place.along(axes) * pool.shape[dim] // side)
        local.append(box.grid[dim])
        shards = plan.along(axes)
        whole.append(box.grid[dim] if shards == 1 else shards * pool.shape[dim] // side)
    grid = np.indices(local).reshape(len(local), -1)
    moved = grid + np.array(starts).reshape(-1, 1)
    return [int(i) for i in np.ravel_multi_index(tuple(moved), tuple(whole))]
