"""One program on every device's own blocks, under ``shard_map``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from shampoo_optax.layout import placement
from shampoo_optax.layout.split import Stacks, opaque
from shampoo_optax.transforms._tree import Tree

Leaves = dict[int, jax.Array]
Body = Callable[[dict[str, Leaves], Any], tuple[Leaves, Any]]


def block_spec(leaf: Any, block_axes: tuple[str, ...]) -> PartitionSpec:
    """Where a leaf of a state in stacks lies: spread by blocks; counters everywhere.

    Example:
      >>> block_spec(jnp.zeros((8, 4, 4)), ("a",)) == PartitionSpec("a")
      True
    """
    spec = (block_axes,) if jnp.ndim(leaf) else ()
    return placement.partition_spec(spec)


def place_blocks(blocks: Any, tree: Tree) -> Any:
    """A state in stacks, laid out over the devices that own it."""
    if tree.mesh is None:
        return blocks
    mesh, axes = tree.mesh, tree.layout.block_axes
    return jax.tree.map(
        lambda leaf: placement.placed(leaf, mesh, block_spec(leaf, axes)), blocks
    )


def spread(body: Body, tree: Tree, given: dict[str, Leaves], blocks: Any) -> Any:
    """Run ``body(given, blocks)``, on every device with what is its own.

    No collective runs in it but the exchange of blocks; ``check_vma`` holds that
    counters come out the same everywhere.
    """
    if tree.mesh is None or tree.specs is None:
        return body(given, blocks)
    specs = {
        i: placement.partition_spec(tree.specs[i])
        for i in next(iter(given.values()), {})
    }
    axes = tree.layout.block_axes
    of_blocks = jax.tree.map(lambda leaf: block_spec(leaf, axes), blocks)
    run = jax.shard_map(
        body,
        mesh=tree.mesh,
        in_specs=(dict.fromkeys(given, specs), of_blocks),
        out_specs=(specs, of_blocks),
    )
    return run(given, place_blocks(blocks, tree))


def one_by_one(update: Callable[..., Any]) -> Callable[..., Any]:
    """The same update, block after block: every device runs one and the same program.

    Batched kernels choose their order of summation by the size of the batch, which
    depends on the number of devices. Those of one block do not.
    """

    def mapped(
        updates: Stacks, blocks: Any, params: Stacks | None, **extra: Any
    ) -> tuple[Stacks, Any]:
        raw = extra.pop("raw_gradient", None)
        new_updates: Stacks = {}
        new_blocks = blocks
        for key in updates:
            own = {key: updates[key]}
            of = [None if x is None else {key: x[key]} for x in (params, raw)]
            state = _only(blocks, key, updates)
            found, state = _map(update, (own, *of), state, extra)
            new_updates[key] = found[key]
            new_blocks = _with(new_blocks, state, key, updates)
        return new_updates, new_blocks

    return mapped


def _map(update: Callable[..., Any], stacks: Any, state: Any, extra: Any) -> Any:
    """Run ``update`` on one block after another.

    XLA unrolls a loop of few turns, takes what every turn does out of it, and fuses
    across them, and rounds otherwise; so it must not see how many there are, nor that
    a slice is all there is.
    """
    (key,) = stacks[0]
    number = len(stacks[0][key])
    if number == 1:
        stacks, state = jax.tree.map(_doubled, (stacks, state))
    updates, params, raw = stacks
    leaves, treedef = jax.tree.flatten(state)
    own = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf)]
    turns = opaque([number])[number].astype(jnp.int32)

    def row(tree: Any, i: jax.Array) -> Any:
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=i, slice_size=1)
        return jax.tree.map(take, tree)

    def one(i: jax.Array, so_far: tuple[jax.Array, list[Any]]) -> Any:
        done, now = so_far
        mine = [row(x, i) if j in own else leaves[j] for j, x in enumerate(now)]
        options = extra if raw is None else {**extra, "raw_gradient": row(raw, i)}
        found, new = update(
            row(updates, i),
            jax.tree.unflatten(treedef, mine),
            row(params, i),
            **options,
        )

        def put(into: jax.Array, x: jax.Array) -> jax.Array:
            x = x.astype(into.dtype)
            return jax.lax.dynamic_update_slice_in_dim(into, x, i, 0)

        flat = jax.tree.leaves(new)
        now = [put(now[j], x) if j in own else x for j, x in enumerate(flat)]
        return put(done, found[key]), now

    done, now = jax.lax.fori_loop(0, turns, one, (updates[key], leaves))
    now = [x[:number] if j in own else x for j, x in enumerate(now)]
    return {key: done[:number]}, jax.tree.unflatten(treedef, now)


def _doubled(x: jax.Array) -> jax.Array:
    return jnp.concatenate([x, x]) if jnp.ndim(x) else x


def _is_by_stack(stacks: Stacks) -> Callable[[Any], bool]:
    return lambda node: isinstance(node, dict) and node.keys() == stacks.keys()


def _only(blocks: Any, key: str, stacks: Stacks) -> Any:
    """A state of all stacks as if there were one."""
    by_stack = _is_by_stack(stacks)
    return jax.tree.map(
        lambda node: {key: node[key]} if by_stack(node) else node,
        blocks,
        is_leaf=by_stack,
    )


def _with(blocks: Any, one: Any, key: str, stacks: Stacks) -> Any:
    """A state of all stacks with that of one put in."""
    by_stack = _is_by_stack(stacks)
    return jax.tree.map(
        lambda node, new: {**node, key: new[key]} if by_stack(node) else new,
        blocks,
        one,
        is_leaf=by_stack,
    )
