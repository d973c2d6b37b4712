"""What each leaf of a state is: of a parameter's blocks, of a parameter, or shared.

A leaf is named by the fields and keys on its way, without the places in chains: so a
transformation without state (a clip) may come or go, and names stay.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax._paths import Keys, Path, escaped, keys_of, owner_of
from shampoo_optax.layout.block_layout import BlockLayout, variants
from shampoo_optax.layout.owners import Held, held
from shampoo_optax.layout.plan import Plan, Shape
from shampoo_optax.linalg import codes, packing
from shampoo_optax.transforms._tree import Tree
from shampoo_optax.transforms.blockwise import BlockwiseState
from shampoo_optax.transforms.exponents import read
from shampoo_optax.transforms.kronecker import KroneckerState

Kind = Literal["sides", "packed", "codes", "block", "number"]
MATRICES = re.compile(r"\d+(x\d+)+")  # a stack's key, whatever the plan


@dataclass(frozen=True, eq=False)
class Cut:
    """A leaf in stacks: ``[rows, ...]``."""

    slot: str
    key: str  # of its stack
    dim: int | None  # of the stack's blocks, where it belongs to one
    kind: Kind  # what the other axes are: of the block, square in a side, ...
    members: tuple[Held, ...]
    names: tuple[str, ...]  # of the members' parameters
    exponent: float | None = None  # of roots

    def slot_of(self, member: Held) -> str:
        """The name in the member's own orientation."""
        if self.dim is None:
            return self.slot
        last = len(member.box.whole) - 1
        dim = last - self.dim if member.box.turned else self.dim
        return f"{self.slot}/{dim}"


@dataclass(frozen=True)
class Own:
    """A leaf in the shape of a parameter."""

    slot: str
    name: str


@dataclass(frozen=True)
class Shared:
    """A leaf of no parameter: a counter, a hyperparameter."""

    slot: str


Entry = Cut | Own | Shared


def box_of(member: Held) -> str:
    """The shape of a parameter's blocks, as a view names them."""
    return "x".join(map(str, member.box.whole))


def entries_of(state: Any, params: optax.Params, layout: BlockLayout) -> list[Entry]:
    """One entry for each leaf of a state, in the order of ``jax.tree.leaves``.

    Args:
      state: of any optimizer with blockwise transformations of one layout in it.
      params: what it was made for, or shapes of them.
      layout: which blocks.

    Returns:
      The entries.

    Raises:
      ValueError: two parameters have one name, or the state does not fit the
        parameters and the layout.
    """
    reader = _Reader(params, layout)
    paths, _ = jax.tree_util.tree_flatten_with_path(
        state, is_leaf=lambda node: isinstance(node, BlockwiseState)
    )
    for path, node in paths:
        if isinstance(node, BlockwiseState):
            reader.blocks(path, node)
            rest, _ = jax.tree_util.tree_flatten_with_path(node.rest)
            for inside, leaf in rest:
                where = jax.tree_util.GetAttrKey("rest")
                reader.leaf((*path, where, *inside), leaf)
        else:
            reader.leaf(path, node)
    return reader.entries


class _Reader:
    """Reads leaves one after another, and keeps their names apart."""

    def __init__(self, params: optax.Params, layout: BlockLayout) -> None:
        self.params, self.layout = params, layout
        self.entries: list[Entry] = []
        self._seen: Counter[tuple[str, ...]] = Counter()
        paths, _ = jax.tree_util.tree_flatten_with_path(params)
        self.owners = {
            keys_of(path): (tuple(jnp.shape(leaf)), escaped(keys_of(path)))
            for path, leaf in paths
        }
        if len(self.owners) < len(paths):
            twice = Counter(keys_of(path) for path, _ in paths).most_common(1)[0][0]
            raise ValueError(
                f"checkpoint: two parameters have the path '{escaped(twice)}' (keys "
                "that read alike, such as 1 and '1'); wanted different paths. Rename "
                "one."
            )

    def leaf(self, path: Path, leaf: Any) -> None:
        """Take a leaf outside of stacks."""
        keys, shape = keys_of(path), tuple(jnp.shape(leaf))
        name = owner_of(keys, shape, self.owners)
        if name is None:
            self.entries.append(Shared(self._once(_fields(path))))
            return
        own = len(name.split("/")) if name else 0
        slot = _fields(path[: len(path) - own] if keys == _plain(path) else path[:-1])
        self.entries.append(Own(self._once(slot, name), name))

    def blocks(self, path: Path, node: BlockwiseState) -> None:
        """Take all stacks of one blockwise transformation."""
        tree, plan = self._tree(node)
        named = zip(tree.names, plan.shapes, strict=True)
        axes = [self.layout.leading_axes(name, shape) for name, shape in named]
        members = {key: tuple(of) for key, of in held(plan, tree.specs, axes).items()}
        paths, _ = jax.tree_util.tree_flatten_with_path(tree.abstract())
        names = [escaped(keys_of(path)) for path, _ in paths]
        leaves, _ = jax.tree_util.tree_flatten_with_path(node.blocks)
        powers = _powers(node)
        for inside, leaf in leaves:
            where = (*path, jax.tree_util.GetAttrKey("blocks"), *inside)
            keys = [_dict_key(key) for key in where]
            found = [i for i, key in enumerate(keys) if key in plan.stacks]
            if not found:
                self.leaf(where, leaf)
                continue
            at = found[0]
            key, after = keys[at], keys[at + 1 :]
            dim = int(after[0]) if after and str(after[0]).isdigit() else None
            tail = where[at + 1 + (dim is not None) :]
            assert key is not None
            slot = self._once(_fields((*where[:at], *tail)), key, str(dim))
            kind = _kind(slot, leaf, plan.stacks[key], dim)
            of = members[key]
            owners = tuple(names[member.leaf] for member in of)
            power = powers.get(keys_of(inside))
            self.entries.append(Cut(slot, key, dim, kind, of, owners, power))

    def _tree(self, node: BlockwiseState) -> tuple[Tree, Plan]:
        """The parameters that a state's stacks are of: under a mask, not all."""
        marks, _ = jax.tree_util.tree_flatten_with_path(node.blocked, is_leaf=_is_mark)
        cut = {keys_of(p) for p, mark in marks if isinstance(mark, optax.EmptyState)}
        paths, treedef = jax.tree_util.tree_flatten_with_path(self.params)
        if lost := sorted(cut - self.owners.keys()):
            raise ValueError(
                f"checkpoint: the state has blocks of '{'/'.join(lost[0])}', and there "
                "is no such parameter. Pass the parameters that the state was made for."
            )
        leaves = [
            leaf if keys_of(path) in cut else optax.MaskedNode() for path, leaf in paths
        ]
        blocked = jax.tree.unflatten(treedef, leaves)
        trees = [Tree(blocked, layout) for layout in variants(self.layout)]
        for tree in trees:
            if _fits(node, tree):
                return tree, tree.plan
        raise ValueError(
            f"checkpoint: the state has stacks {_listed(node.blocks)}, and "
            f"{self.layout} makes {trees[0].plan.stacks} of these parameters. Pass the "
            "layout (and the mesh) that the state was made with."
        )

    def _once(self, slot: str, *where: str) -> str:
        """The slot, numbered where others have its name."""
        self._seen[slot, *where] += 1
        number = self._seen[slot, *where]
        return slot if number == 1 else f"{slot}#{number}"


def _fits(node: BlockwiseState, tree: Tree) -> bool:
    """Whether a state's stacks, if it has any, are those of a tree's plan."""
    plan = tree.plan
    if len({i for pool in plan.pools for i in pool.leaves}) < len(tree.leaves):
        return False
    stacks = {
        _dict_key(key): tuple(jnp.shape(leaf))[:1]
        for path, leaf in jax.tree_util.tree_leaves_with_path(node.blocks)
        for key in path
        if _dict_key(key) in plan.stacks or MATRICES.fullmatch(str(_dict_key(key)))
    }
    rows = {key: shape[:1] for key, shape in plan.stacks.items()}
    return not stacks or stacks == rows


def _powers(node: BlockwiseState) -> dict[Keys, float]:
    """The exponents of all roots, by their places in the state of the blocks."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(
        node.blocks, is_leaf=lambda inside: isinstance(inside, KroneckerState)
    )
    return {
        (*keys_of(path), "roots", key, dim): power
        for path, inside in nodes
        if isinstance(inside, KroneckerState)
        for (key, dim), power in read(inside.exponents).items()
    }


def _is_mark(node: Any) -> bool:
    return isinstance(node, optax.EmptyState | optax.MaskedNode)


def _dict_key(key: Any) -> Any:
    return key.key if isinstance(key, jax.tree_util.DictKey) else None


def _plain(path: Path) -> Keys:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def _fields(path: Sequence[Any]) -> str:
    """The named steps of a path."""
    kept = [key for key in path if not isinstance(key, jax.tree_util.SequenceKey)]
    return escaped(_plain(tuple(kept))) or "state"


def _kind(slot: str, leaf: Any, stack: Shape, dim: int | None) -> Kind:
    shape = tuple(jnp.shape(leaf))
    if shape[:1] == stack[:1]:
        rest = shape[1:]
        if all(size == 1 for size in rest):
            return "number"
        if dim is not None and set(rest) == {stack[dim + 1]}:
            return "sides"
        if dim is not None and codes.is_coded(leaf):
            if rest == codes.coded_shape(stack[dim + 1]):
                return "codes"
        elif dim is not None and rest == packing.packed_shape(stack[dim + 1]):
            return "packed"
        if dim is None and rest == stack[1:]:
            return "block"
    raise ValueError(
        f"checkpoint: state '{slot}' of a stack of shape {stack} has shape {shape}; "
        "wanted one entry a block, in the block's shape or square in one of its sides."
    )


def _listed(blocks: Any) -> dict[str, Shape]:
    leaves = jax.tree_util.tree_leaves_with_path(blocks)
    return {_checks.name_of(path): tuple(jnp.shape(leaf)) for path, leaf in leaves[:6]}
