"""Arrays to stacks of blocks and back.

Parameters of one folded shape are concatenated first and cut together, so a model
of a hundred equal layers costs one reshape, not a hundred.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.layout.plan import Box, Plan, Pool

Stacks = dict[str, jax.Array]


def split(leaves: Mapping[int, jax.Array], plan: Plan) -> Stacks:
    """Cut the blocked leaves of a flattened tree into stacks.

    Args:
      leaves: at least the blocked leaves, by position.
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
    pieces: dict[str, list[jax.Array]] = {}
    for pool in plan.pools:
        arrays = [
            jnp.reshape(leaves[leaf], (batch, *pool.shape))
            for leaf, batch in zip(pool.leaves, pool.batches, strict=True)
        ]
        pooled = _concatenate(arrays, 0)
        for box in pool.boxes:
            pieces.setdefault(box.key, []).append(_to_blocks(pooled, box))
    return {key: _concatenate(blocks, 0) for key, blocks in pieces.items()}


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
    taken = dict.fromkeys(stacks, 0)
    leaves = {}
    traced = any(isinstance(stack, jax.core.Tracer) for stack in stacks.values())
    starts = _opaque(_starts(plan)) if traced else {}
    for pool in plan.pools:
        boxes = []
        for box in pool.boxes:
            number = sum(pool.batches) * _number(box)
            begin = taken[box.key]
            blocks = lax.slice_in_dim(stacks[box.key], begin, begin + number)
            taken[box.key] = begin + number
            boxes.append(_from_blocks(blocks, box))
        arrays = _unpool(_assemble(boxes, pool), pool.batches, starts)
        for leaf, array in zip(pool.leaves, arrays, strict=True):
            leaves[leaf] = jnp.reshape(array, plan.shapes[leaf]).astype(dtypes[leaf])
    return leaves


def promoted(*dtypes: jax.typing.DTypeLike) -> jnp.dtype:
    """The common dtype, on purpose and therefore under strict promotion too.

    Example:
      >>> promoted(jnp.bfloat16, jnp.float32)
      dtype('float32')
    """
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def _number(box: Box) -> int:
    number = 1
    for size in box.grid:
        number *= size
    return number


def _to_blocks(pooled: jax.Array, box: Box) -> jax.Array:
    """``[n, ...]`` to ``[n * blocks, *block]``, blocks of one array together."""
    piece = lax.slice(pooled, (0, *box.start), (pooled.shape[0], *box.stop))
    if _number(box) == 1:
        return piece
    order = len(box.block)
    sides = zip(box.grid, box.block, strict=True)
    gridded = piece.reshape(-1, *(size for side in sides for size in side))
    axes = (0, *range(1, 2 * order, 2), *range(2, 2 * order + 1, 2))
    return lax.transpose(gridded, axes).reshape(-1, *box.block)


def _from_blocks(blocks: jax.Array, box: Box) -> jax.Array:
    """The inverse of :func:`_to_blocks`, of one box."""
    if _number(box) == 1:
        return blocks
    order = len(box.block)
    gridded = blocks.reshape(-1, *box.grid, *box.block)
    axes = [0]
    for dim in range(order):
        axes += [1 + dim, 1 + order + dim]
    shape = (g * b for g, b in zip(box.grid, box.block, strict=True))
    return lax.transpose(gridded, axes).reshape(-1, *shape)


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


def _opaque(numbers: list[int]) -> dict[int, jax.Array]:
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
    arrays = [array.astype(dtype) for array in arrays]
    return arrays[0] if len(arrays) == 1 else lax.concatenate(arrays, axis)
