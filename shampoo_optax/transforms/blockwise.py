"""The only door between parameters and stacks of blocks."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.layout import placement
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Plan
from shampoo_optax.layout.split import join, promoted, split
from shampoo_optax.transforms import _since_init


class BlockwiseState(NamedTuple):
    """State of :func:`blockwise`."""

    blocks: Any  # the inner state, in stacks
    rest: Any  # state of what is not blocked, in the parameters' own layout


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

    def init_fn(params: optax.Params) -> BlockwiseState:
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            _checks.leaf("blockwise.init", path, leaf)
        return state_for(params)

    def state_for(params: optax.Params) -> BlockwiseState:
        tree = _Tree(params, layout)
        if not tree.leaves:
            # optax.tree.map_params asks for the state of a tree without leaves, and
            # takes it for a prefix of the real one: an array stands for any stacks.
            return BlockwiseState(jnp.zeros([]), outer.init(params))
        dtypes = tree.stack_dtypes()
        stacks = {
            key: jnp.zeros(shape, dtypes[key])
            for key, shape in tree.plan.stacks.items()
        }
        return BlockwiseState(inner.init(stacks), outer.init(tree.rest()))

    def update_fn(
        updates: optax.Updates,
        state: BlockwiseState,
        params: optax.Params | None = None,
        *,
        raw_gradient: optax.Updates | None = None,
        **extra: Any,
    ) -> tuple[optax.Updates, BlockwiseState]:
        tree = _Tree(updates, layout)
        # Nothing of init is kept in Python: what it would make now tells what changed.
        wanted = jax.eval_shape(state_for, tree.abstract())
        _since_init.check(state, wanted, tree.names, tree.plan)
        if not tree.leaves:
            return updates, state
        model = None if params is None else tree.sibling(params, "params")
        # Inside, the leading axis holds blocks: a norm there is that of a block.
        extras = {**extra, "stacked": True}, dict(extra)
        if raw_gradient is not None:
            raw = tree.sibling(raw_gradient, "raw_gradient")
            extras[0]["raw_gradient"], extras[1]["raw_gradient"] = (
                raw.stacks(),
                raw.rest(),
            )
        stacks, blocks = inner.update(
            tree.stacks(),
            state.blocks,
            None if model is None else model.stacks(),
            **extras[0],
        )
        loose, rest_state = outer.update(
            tree.rest(),
            state.rest,
            None if model is None else model.rest(),
            **extras[1],
        )
        return tree.rebuild(stacks, loose), BlockwiseState(blocks, rest_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Tree:
    """A flattened tree with its plan: what the door knows while it is open."""

    def __init__(self, tree: Any, layout: BlockLayout) -> None:
        paths, self.treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.names = [_checks.name_of(path) for path, _ in paths]
        self.leaves = [leaf for _, leaf in paths]
        self.layout = layout
        shapes = [tuple(jnp.shape(leaf)) for leaf in self.leaves]
        self.plan: Plan = layout.plan(self.names, shapes)

    def abstract(self) -> Any:
        """The tree's shapes and dtypes, which a state is made for."""
        leaves = [
            jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf))
            for leaf in self.leaves
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def stack_dtypes(self) -> dict[str, jnp.dtype]:
        """The dtype of each stack: promoted over its members."""
        members: dict[str, list[Any]] = {}
        for pool, box in self.plan.members:
            dtypes = [jnp.result_type(self.leaves[i]) for i in pool.leaves]
            members.setdefault(box.key, []).extend(dtypes)
        return {key: promoted(*dtypes) for key, dtypes in members.items()}

    def stacks(self) -> dict[str, jax.Array]:
        """The blocked leaves, cut."""
        leaves = {
            i: placement.replicated(jnp.asarray(self.leaves[i]))
            for pool in self.plan.pools
            for i in pool.leaves
        }
        return split(leaves, self.plan)

    def rest(self) -> Any:
        """The tree with the blocked leaves masked, as ``optax.masked`` does it."""
        loose = set(self.plan.rest)
        leaves = [
            leaf if i in loose else optax.MaskedNode()
            for i, leaf in enumerate(self.leaves)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def rebuild(self, stacks: dict[str, jax.Array], loose: Any) -> Any:
        """The tree back from its two parts."""
        dtypes = [jnp.result_type(leaf) for leaf in self.leaves]
        joined = join(stacks, self.plan, dtypes)
        leaves = dict(zip(self.plan.rest, jax.tree.leaves(loose), strict=True))
        for i, leaf in joined.items():
            leaves[i] = placement.like(leaf, jnp.asarray(self.leaves[i]))
        return jax.tree.unflatten(self.treedef, [leaves[i] for i in range(len(leaves))])

    def sibling(self, tree: Any, what: str) -> _Tree:
        """Another tree of the same parameters; raise where it is not."""
        other = _Tree(tree, self.layout)
        if other.names != self.names:
            odd = sorted(set(other.names) ^ set(self.names)) or other.names
            raise ValueError(
                f"blockwise.update: updates and {what} are different trees; first "
                f"difference at parameter '{odd[0]}'. Pass gradients and parameters of "
                "one model."
            )
        for name, mine, its in zip(
            self.names, self.plan.shapes, other.plan.shapes, strict=True
        ):
            if mine != its:
                raise ValueError(
                    f"blockwise.update: parameter '{name}' has shape {mine} in updates "
                    f"and {its} in {what}; wanted one shape."
                )
        return other
