"""Arrays to stacks of blocks and back.

Parameters of one folded shape are concatenated first and cut together, so a model
of a hundred equal layers costs one reshape, not a hundred.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.layout import exchange
from shampoo_optax.layout.plan import Box, Plan, Pool

Stacks = dict[str, jax.Array]


def split(leaves: Mapping[int, jax.Array], plan: Plan) -> Stacks:
    """Cut the blocked leaves of a flattened tree into stacks.

    Args:
      leaves: at least the blocked leaves, by position; under ``shard_map`` a device's
        own shards.
      plan: from :meth:`BlockLayout.plan`.

    Returns:
      ``{"1024x384": [n, 1024, 384], ...}``, each in the promoted dtype of its
      members.

    Example:
      >>> from shampoo_optax.layout.block_layout import BlockLayout
      >>> plan = BlockLayout(2).plan(["w"], [(4, 2)])
      >>> split({0: jnp.arange(8.0).reshape(4, 2)}, plan)["2x2"].shape
      (2, 2, 2)
    """
    cells: dict[tuple[Pool, Box], jax.Array] = {}
    for pool in plan.pools:
        shape = pool.held or pool.shape
        arrays = [
            jnp.reshape(exchange.gather(leaves[leaf], pool.route), (batch, *shape))
            for leaf, batch in zip(pool.leaves, pool.batches, strict=True)
        ]
        pooled = exchange.reshard(_concatenate(arrays, 0), pool.route)
        for box in pool.boxes:
            cells[pool, box] = _fill(_to_blocks(pooled, box), box)
    stacks = {}
    for key, groups in plan.groups.items():
        held = [_concatenate([cells[m] for m in group.members], 0) for group in groups]
        dtype = promoted(*(x.dtype for x in held))
        owned = exchange.to_owners([x.astype(dtype) for x in held], groups)
        stacks[key] = _concatenate(owned, 0)
    return stacks


def join(
    stacks: Stacks, plan: Plan, dtypes: Sequence[jnp.dtype]
) -> dict[int, jax.Array]:
    """Put stacks back together; the inverse of :func:`split`.

    Args:
      stacks: as :func:`split` returned them.
      plan: the same plan.
      dtypes: of all leaves, in the plan's order.

    Returns:
      The blocked leaves by position, in their shapes and dtypes.

    Example:
      >>> from shampoo_optax.layout.block_layout import BlockLayout
      >>> plan = BlockLayout(2).plan(["w"], [(4, 3)])
      >>> w = jnp.arange(12.0).reshape(4, 3)
      >>> bool((join(split({0: w}, plan), plan, [w.dtype])[0] == w).all())
      True
    """
    cells: dict[tuple[Pool, Box], jax.Array] = {}
    for key, groups in plan.groups.items():
        owned = exchange.pieces(stacks[key], [group.slots for group in groups])
        for group, held in zip(
            groups, exchange.from_owners(owned, groups), strict=True
        ):
            start = 0
            for pool, box in group.members:  # its blocks, without what fills them
                stop = start + pool.cells(box)
                cells[pool, box] = _sliced(held, (start, 0), (stop, *box.part))
                start = stop
    leaves = {}
    traced = any(isinstance(stack, jax.core.Tracer) for stack in stacks.values())
    starts = opaque(_starts(plan)) if traced else {}
    for pool in plan.pools:
        boxes = [_from_blocks(cells[pool, box], box) for box in pool.boxes]
        pooled = exchange.reshard(_assemble(boxes, pool), pool.route, back=True)
        arrays = _unpool(pooled, pool.batches, starts)
        for leaf, array in zip(pool.leaves, arrays, strict=True):
            whole = jnp.reshape(array, plan.leaves[leaf].local)
            leaves[leaf] = exchange.ungather(whole, pool.route).astype(dtypes[leaf])
    return leaves


def promoted(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The common dtype, on purpose and therefore under strict promotion too.

    Example:
      >>> promoted(jnp.bfloat16, jnp.float32)
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _to_blocks(pooled: jax.Array, box: Box) -> jax.Array:
    """``[n, ...]`` to ``[n * blocks, *block]``, blocks of one array together."""
    piece = _sliced(pooled, (0, *box.start), (pooled.shape[0], *box.stop))
    order = len(box.block)
    sides = list(range(2, 2 * order + 1, 2))
    if box.turned:
        sides.reverse()
    elif math.prod(box.grid) == 1:
        return piece
    shape = (size for side in zip(box.grid, box.block, strict=True) for size in side)
    gridded = piece.reshape(-1, *shape)
    axes = (0, *range(1, 2 * order, 2), *sides)
    return lax.transpose(gridded, axes).reshape(-1, *box.part)


def _from_blocks(blocks: jax.Array, box: Box) -> jax.Array:
    """The inverse of :func:`_to_blocks`, of one box."""
    if math.prod(box.grid) == 1 and not box.turned:
        return blocks
    order = len(box.block)
    gridded = blocks.reshape(-1, *box.grid, *box.part)
    axes = [0]
    for dim in range(order):
        axes += [1 + dim, 1 + order + (order - 1 - dim if box.turned else dim)]
    shape = (g * b for g, b in zip(box.grid, box.block, strict=True))
    return lax.transpose(gridded, axes).reshape(-1, *shape)


def _fill(cells: jax.Array, box: Box) -> jax.Array:
    """Zeros up to the shape of the stack, but not along a dimension that is split."""
    if box.within is None:
        return cells
    pairs = zip(box.within, box.stacked, strict=True)
    # Not jnp.pad: it is a function of its own for every shape.
    edges = [(0, 0, 0), *((0, slot - own, 0) for slot, own in pairs)]
    return lax.pad(cells, jnp.zeros((), cells.dtype), edges)


def _sliced(x: jax.Array, start: Sequence[int], stop: Sequence[int]) -> jax.Array:
    """Some rows, columns and so on; no slice where that is all of them."""
    start = (*start, *(0,) * (x.ndim - len(start)))
    if not any(start) and tuple(stop) == x.shape:
        return x
    return lax.slice(x, start, stop)


def _assemble(boxes: list[jax.Array], pool: Pool) -> jax.Array:
    """Concatenate the boxes of a pool, last dimension first."""
    starts = [
        sorted({box.start[dim] for box in pool.boxes}) for dim in range(len(pool.shape))
    ]
    for dim in reversed(range(len(pool.shape))):
        run = len(starts[dim])
        boxes = [
            _concatenate(boxes[i : i + run], dim + 1) for i in range(0, len(boxes), run)
        ]
    return boxes[0]


def _starts(plan: Plan) -> list[int]:
    """Where leaves begin in pools that hold several, each place once."""
    starts = {
        start
        for pool in plan.pools
        if len(pool.leaves) > 1
        for start in itertools.accumulate(pool.batches[:-1], initial=0)
    }
    return sorted(starts)


def opaque(numbers: list[int]) -> dict[int, jax.Array]:
    """Numbers as scalars whose value XLA's CPU compiler does not see.

    A slice at a constant place is a kernel of its own there, 12 ms of LLVM for each
    parameter; slices at places given as data are one kernel, compiled once. What
    comes out of a branch is data, and the barrier keeps the branch. Other backends
    copy a constant slice without compiling it, and get constants.
    """
    if not numbers:
        return {}

    def plain() -> list[jax.Array]:
        return [jnp.asarray(number, jnp.uint32) for number in numbers]

    def hidden() -> list[jax.Array]:
        return lax.cond(lax.optimization_barrier(False), plain, plain)

    scalars = lax.platform_dependent(cpu=hidden, default=plain)
    return dict(zip(numbers, scalars, strict=True))


def _unpool(
    pooled: jax.Array, batches: Sequence[int], starts: Mapping[int, jax.Array]
) -> list[jax.Array]:
    """Cut a pool along its first axis into the arrays of its leaves."""
    if len(batches) == 1:
        return [pooled]
    places = itertools.accumulate(batches[:-1], initial=0)
    return [
        lax.dynamic_slice_in_dim(pooled, starts.get(place, place), batch)
        for place, batch in zip(places, batches, strict=True)
    ]


def _concatenate(arrays: list[jax.Array], axis: int) -> jax.Array:
    """Concatenate, promoting dtypes on purpose; one array comes back as it is."""
    dtype = promoted(*(array.dtype for array in arrays))
    return exchange.joined([array.astype(dtype) for array in arrays], axis)
