"""The only door between parameters and stacks of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.layout import exchange
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.split import join, split
from shampoo_optax.transforms import _since_init
from shampoo_optax.transforms._spread import (
    Body,
    Leaves,
    one_by_one,
    place_blocks,
    spread,
)
from shampoo_optax.transforms._tree import Tree


class BlockwiseState(NamedTuple):
    """State of :func:`blockwise`."""

    blocks: Any  # the inner state, in stacks
    rest: Any  # state of what is not blocked, in the parameters' own layout
    blocked: Any = ()  # the parameters' tree without arrays: EmptyState where blocked


def blockwise(
    inner: optax.GradientTransformation,
    layout: BlockLayout = BlockLayout(),
    *,
    rest: optax.GradientTransformation | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Run ``inner`` on stacks of blocks, and give parameters back.

    ``inner`` sees ``{"1024x384": [n, 1024, 384], ...}`` with the blocks of every
    parameter, for updates, ``params`` and ``raw_gradient`` alike, and its state is in
    stacks. So the program grows with the number of block shapes, not of parameters.

    Args:
      inner: acts on stacks, for example :func:`kronecker`. Its ``init`` is traced, as
        under ``jax.jit``.
      layout: which blocks.
      rest: acts on the parameters that the layout does not block (scalars, vectors,
        empty arrays), in their own shapes; None passes them through.

    Returns:
      The transformation. Updates keep their shapes, dtypes and shardings.

    Raises:
      TypeError: a parameter is not a real floating-point array (at init).
      ValueError: shapes or trees are not those of init (at update).

    Example:
      >>> tx = blockwise(kronecker(), BlockLayout(max_preconditioner_dim=4))
      >>> state = tx.init({"w": jnp.zeros((10, 4)), "b": jnp.zeros(4)})
      >>> jax.tree.map(jnp.shape, state.blocks.factors)
      {'2x4': {'0': (1, 2, 2), '1': (1, 4, 4)}, '4x4': {'0': (2, 4, 4), '1': (2, 4, 4)}}
    """
    inner = optax.with_extra_args_support(inner)
    outer = optax.with_extra_args_support(optax.identity() if rest is None else rest)
    init_blocks = jax.jit(inner.init)  # one program, where it would be many small ones

    def init_fn(params: optax.Params) -> BlockwiseState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _checks.leaf("blockwise.init", path, leaf)
        return state_for(Tree(params, layout))

    def state_for(tree: Tree) -> BlockwiseState:
        if not tree.leaves:
            # optax.tree.map_params asks for the state of a tree without leaves, and
            # takes it for a prefix of the real one: an array stands for any stacks.
            rest = outer.init(tree.rest())
            return BlockwiseState(jnp.zeros([]), rest, tree.marks())
        dtypes = tree.stack_dtypes()
        stacks = {
            key: jnp.zeros(shape, dtypes[key])
            for key, shape in tree.plan.stacks.items()
        }
        blocks = place_blocks(init_blocks(stacks), tree)
        return BlockwiseState(blocks, outer.init(tree.rest()), tree.marks())

    def update_fn(
        updates: optax.Updates,
        state: BlockwiseState,
        params: optax.Params | None = None,
        *,
        raw_gradient: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, BlockwiseState]:
        tree = Tree(updates, layout)
        # Nothing of init is kept in Python: what it would make now tells what changed.
        wanted = jax.eval_shape(
            lambda like: state_for(Tree(like, layout, tree.specs)), tree.abstract()
        )
        _since_init.check(state, wanted, tree.names, tree.plan)
        if not tree.leaves:
            return updates, state
        model = None if params is None else tree.sibling(params, "params")
        given, loose_extra = {"updates": tree.blocked()}, dict(extra)
        if model is not None:
            given["params"] = model.blocked()
        if raw_gradient is not None:
            raw = tree.sibling(raw_gradient, "raw_gradient")
            given["raw_gradient"] = raw.blocked()
            loose_extra["raw_gradient"] = raw.rest()

        body = _on_blocks(inner, tree, extra)
        joined, blocks = spread(body, tree, given, state.blocks)
        loose, rest_state = outer.update(
            tree.rest(),
            state.rest,
            None if model is None else model.rest(),
            **loose_extra,
        )
        state = BlockwiseState(blocks, rest_state, state.blocked)
        return tree.rebuild(joined, loose), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _on_blocks(
    inner: optax.GradientTransformationExtraArgs, tree: Tree, extra: dict[str, Any]
) -> Body:
    """What every device does: cut, update its own blocks, put together."""
    layout, plan = tree.layout, tree.plan
    update = one_by_one(inner.update) if layout.deterministic else inner.update
    dtypes = [jnp.result_type(leaf) for leaf in tree.leaves]

    def body(given: dict[str, Leaves], blocks: Any) -> tuple[Leaves, Any]:
        inside: dict[str, Any] = {k: split(leaves, plan) for k, leaves in given.items()}
        stacks, params = inside.pop("updates"), inside.pop("params", None)
        sizes = {
            key: {str(dim): sides for dim, sides in enumerate(by_dim)}
            for key, groups in plan.groups.items()
            if (by_dim := exchange.true_sizes(groups)) is not None
        }
        if sizes:
            inside["sizes"] = sizes
        # The leading axis holds blocks: a norm in there is that of a block.
        stacks, blocks = update(stacks, blocks, params, **extra, **inside, stacked=True)
        if tree.mesh is not None and layout.exchange_dtype is not None:
            stacks = {k: x.astype(layout.exchange_dtype) for k, x in stacks.items()}
        return join(stacks, plan, dtypes), blocks

    return body
