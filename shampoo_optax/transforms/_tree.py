"""A flattened tree of parameters with its plan: what the door to stacks knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.layout import placement
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Plan
from shampoo_optax.layout.routes import Spec
from shampoo_optax.layout.split import promoted


class Tree:
    """Names, leaves and plan of one tree, at one trace.

    Args:
      tree: of parameters, or like them.
      layout: which blocks, and on which devices.
      specs: where the leaves lie; None reads it from the layout and the leaves.
    """

    def __init__(
        self, tree: Any, layout: BlockLayout, specs: Sequence[Spec] | None = None
    ) -> None:
        """Flatten the tree and make its plan."""
        paths, self.treedef = jax.tree_util.tree_flatten_with_path(tree)
        self.names = [_checks.name_of(path) for path, _ in paths]
        self.leaves = [leaf for _, leaf in paths]
        self.layout = layout
        self.mesh = placement.mesh_of(layout.mesh, layout.block_axes)
        self.specs = specs
        if specs is None:
            self.specs = placement.specs_of(
                self.names, self.leaves, self.mesh, layout.param_specs
            )
        shapes = [tuple(jnp.shape(leaf)) for leaf in self.leaves]
        self.plan: Plan = layout.plan(self.names, shapes, self.specs)

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

    def blocked(self) -> dict[int, jax.Array]:
        """The leaves that are cut, by position, laid out as the plan wants them."""
        positions = sorted(i for pool in self.plan.pools for i in pool.leaves)
        leaves = {i: jnp.asarray(self.leaves[i]) for i in positions}
        if self.mesh is None or self.specs is None:
            return {i: placement.replicated(leaf) for i, leaf in leaves.items()}
        return {
            i: placement.placed(
                leaf, self.mesh, placement.partition_spec(self.specs[i])
            )
            for i, leaf in leaves.items()
        }

    def rest(self) -> Any:
        """The tree with the blocked leaves masked, as ``optax.masked`` does it."""
        loose = set(self.plan.rest)
        leaves = [
            leaf if i in loose else optax.MaskedNode()
            for i, leaf in enumerate(self.leaves)
        ]
        return jax.tree.unflatten(self.treedef, leaves)

    def marks(self) -> Any:
        """Which leaves are cut, without arrays: under a mask, not all of a model's."""
        loose = set(self.plan.rest)
        marks = [
            optax.MaskedNode() if i in loose else optax.EmptyState()
            for i in range(len(self.leaves))
        ]
        return jax.tree.unflatten(self.treedef, marks)

    def rebuild(self, joined: dict[int, jax.Array], loose: Any) -> Any:
        """The tree back from its two parts."""
        leaves = dict(zip(self.plan.rest, jax.tree.leaves(loose), strict=True))
        for i, leaf in joined.items():
            leaves[i] = placement.like(leaf, jnp.asarray(self.leaves[i]))
        return jax.tree.unflatten(self.treedef, [leaves[i] for i in range(len(leaves))])

    def sibling(self, tree: Any, what: str) -> Tree:
        """Another tree of the same parameters; raise where it is not."""
        other = Tree(tree, self.layout, self.specs)
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
