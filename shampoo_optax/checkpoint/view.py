"""The parameter view: an optimizer's state by parameter, without mesh and padding."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import optax
from jax.sharding import Mesh, Sharding

from shampoo_optax._paths import escaped, keys_of
from shampoo_optax.checkpoint import moves
from shampoo_optax.checkpoint.compare import WHOLE, compare
from shampoo_optax.checkpoint.entries import Cut, Own, Shared, box_of, entries_of
from shampoo_optax.layout import placement
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Shape

View = dict[str, Any]
Take = Callable[[Cut, Any], Sequence[Any]]  # a leaf in stacks to its members' parts
Give = Callable[[Cut, Sequence[Any], Shape], Any]  # and back


def to_param_view(state: Any, params: optax.Params, layout: BlockLayout) -> View:
    """A state by parameter: the same on every mesh, and what checkpoints compare.

    Returns ``{"parameters": {path: {block shape: {slot: [blocks, ...]}}}, "shared":
    {slot: array}, "version": 1}``. A slot is named by the fields of the state, for
    example ``blocks/inner/direction/factors/0``: factors and roots ``[blocks, d, d]``
    by the folded parameter's own dimension, moments ``[blocks, rows, columns]``. Blocks
    are counted batch first, then row by row. What is not blocked stands under
    ``"whole"`` in the parameter's shape; counters and hyperparameters are shared.
    Nothing in it knows a mesh, a number of devices or an empty slot, and nothing is of
    size zero. A path's keys are joined by ``/``; a dot in one is written ``%2E``.

    Works through ``chain``, ``partition``, ``masked``, ``MultiSteps`` and
    ``inject_hyperparams``; the places of a chain are no part of a name. On a mesh the
    arrays are spread over ``layout.block_axes``, by one all-to-all for each leaf of the
    state; an array none of whose sides they divide is whole on every device.

    Args:
      state: of any optimizer with this layout in it, or shapes of one.
      params: what it was made for, or ``jax.ShapeDtypeStruct`` of them.
      layout: which blocks, and the mesh that the state lies on.

    Returns:
      The view; its inverse is :func:`from_param_view`.

    Raises:
      ValueError: the state does not fit the parameters and the layout.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> tx = blockwise(kronecker(), layout)
      >>> params = {"w": jnp.ones((10, 4))}
      >>> view = to_param_view(tx.init(params), params, layout)["parameters"]["w"]
      >>> {block: slots["blocks/factors/1"].shape for block, slots in view.items()}
      {'2x4': (1, 4, 4), '4x4': (2, 4, 4)}
    """
    home = home_of(layout)

    def take(entry: Cut, stack: Any) -> Sequence[Any]:
        return moves.taken(entry, stack, home, home.rows())

    return view_by(take, state, params, layout)


def view_by(
    take: Take | None, state: Any, params: optax.Params, layout: BlockLayout
) -> View:
    """The view, with stacks taken apart by ``take`` (None: without them)."""
    view = _empty(home_of(layout))
    entries = entries_of(state, params, layout)
    for entry, leaf in zip(entries, jax.tree.leaves(state), strict=True):
        if isinstance(entry, Cut):
            if take is None:
                continue
            parts = take(entry, leaf)
            named = zip(entry.members, entry.names, parts, strict=True)
            for member, name, part in named:
                box = box_of(member)
                _put(view, (name, box, entry.slot_of(member)), part)
        elif leaf.size:
            _put(view, _where(entry), leaf)
    return view


def from_param_view(
    view: View, state_like: Any, params: optax.Params, layout: BlockLayout
) -> Any:
    """A state from its parameter view, on any mesh; inverse of :func:`to_param_view`.

    Args:
      view: as :func:`to_param_view` gave it, on whatever mesh.
      state_like: what ``tx.init(params)`` gives, or its shapes
        (``jax.eval_shape(tx.init, params)``).
      params: or shapes of them; where they carry shardings, state in their shape gets
        those.
      layout: which blocks, and the mesh that the state is to lie on.

    Returns:
      The state, bitwise what the view was made of, laid out as
      :func:`state_shardings` says. Empty slots are as ``init`` leaves them.

    Raises:
      ValueError: the view lacks something, or has it in another shape or dtype.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> tx = blockwise(kronecker(), layout)
      >>> params = {"w": jnp.ones((10, 4))}
      >>> state = tx.init(params)
      >>> view = to_param_view(state, params, layout)
      >>> again = from_param_view(view, state, params, layout)
      >>> jax.tree.all(jax.tree.map(jnp.array_equal, state, again))
      True
    """
    compare(view, abstract_view(state_like, params, layout))
    home = home_of(layout)
    view = {**view, "parameters": _copied(view["parameters"])}

    def give(entry: Cut, parts: Sequence[Any], stack: Shape) -> Any:
        return moves.given(entry, parts, stack, home)

    return state_by(give, view, state_like, params, layout)


def state_by(
    give: Give,
    view: View,
    state_like: Any,
    params: optax.Params,
    layout: BlockLayout,
    ready: Mapping[int, Any] = MappingProxyType({}),
) -> Any:
    """The state, with stacks put together by ``give``; see :func:`from_param_view`.

    Takes blocks out of ``view`` as it goes, so that there is no second state at the
    end of it. Of leaves that are ``ready``, by place, the view holds nothing.
    """
    home = home_of(layout)
    leaves, treedef = jax.tree.flatten(state_like)
    made = []
    entries = entries_of(state_like, params, layout)
    for place, (entry, like) in enumerate(zip(entries, leaves, strict=True)):
        if place in ready:
            made.append(ready[place])
        elif isinstance(entry, Cut):
            parts = [
                view["parameters"][name][box_of(member)].pop(entry.slot_of(member))
                for member, name in zip(entry.members, entry.names, strict=True)
            ]
            stack = give(entry, parts, tuple(like.shape))
            del parts  # before the next one is made
            made.append(moves.placed(stack, home.typed(stack.ndim)))
        else:
            where = _lies(entry, like, params, home)
            if math.prod(like.shape) == 0:  # not saved: there is nothing in it
                made.append(moves.constant(moves.nothing(like), where))
            else:
                made.append(moves.placed(_get(view, _where(entry)), where))
    return jax.tree.unflatten(treedef, made)


def abstract_view(state_like: Any, params: optax.Params, layout: BlockLayout) -> View:
    """The shapes, dtypes and places of a view, before there is one.

    With Orbax a view can be restored into them: every device reads its share. Arguments
    are those of :func:`from_param_view`.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> tx = blockwise(kronecker(), layout)
      >>> params = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
      >>> view = abstract_view(jax.eval_shape(tx.init, params), params, layout)
      >>> view["parameters"]["w"]["4x3"]["blocks/roots/1"].shape
      (1, 3, 3)
    """
    home = home_of(layout)
    return abstract_by(
        lambda shape, dtype: _shape(shape, dtype, home.aside(shape)),
        state_like,
        params,
        layout,
    )


def abstract_by(
    leaf_of: Callable[[Shape, Any], Any],
    state_like: Any,
    params: optax.Params,
    layout: BlockLayout,
) -> View:
    """The same with blocks as ``leaf_of`` has them; see :func:`abstract_view`."""
    home = home_of(layout)
    view = _empty(home)
    version = view["version"]
    everywhere = home.everywhere(0)
    view["version"] = _shape(version.shape, version.dtype, everywhere)
    entries = entries_of(state_like, params, layout)
    for entry, like in zip(entries, jax.tree.leaves(state_like), strict=True):
        if isinstance(entry, Cut):
            for member, name in zip(entry.members, entry.names, strict=True):
                leaf = leaf_of(moves.shape_of(entry, member, like.shape), like.dtype)
                _put(view, (name, box_of(member), entry.slot_of(member)), leaf)
        elif like.size:
            where = _lies(entry, like, params, home)
            _put(view, _where(entry), _shape(like.shape, like.dtype, where))
    return view


def home_of(layout: BlockLayout) -> moves.Home:
    """The devices of a layout's blocks."""
    mesh = placement.mesh_of(layout.mesh, layout.block_axes)
    if mesh is not None and not isinstance(mesh, Mesh):
        mesh = jax.sharding.get_mesh()
    return moves.Home(mesh, layout.block_axes)


def _copied(tree: Any) -> Any:
    return {k: _copied(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _empty(home: moves.Home) -> View:
    version = moves.constant(moves.VERSION, home.everywhere(0))
    return {"parameters": {}, "shared": {}, "version": version}


def _where(entry: Own | Shared) -> tuple[str, ...]:
    return (entry.name, WHOLE, entry.slot) if isinstance(entry, Own) else (entry.slot,)


def _put(view: View, where: tuple[str, ...], leaf: Any) -> None:
    *path, last = where
    node = view["parameters" if path else "shared"]
    for key in path:
        node = node.setdefault(key, {})
    node[last] = leaf


def _get(view: View, where: tuple[str, ...]) -> Any:
    node = view["parameters" if len(where) > 1 else "shared"]
    for key in where:
        node = node[key]
    return node


def _lies(
    entry: Own | Shared, like: Any, params: optax.Params, home: moves.Home
) -> Sharding | None:
    """Where a leaf outside of stacks lies: with its parameter, or everywhere."""
    if isinstance(entry, Own):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if escaped(keys_of(path)) == entry.name:
                return getattr(leaf, "sharding", None) or home.everywhere(like.ndim)
    return home.everywhere(like.ndim) or getattr(like, "sharding", None)


def _shape(shape: Shape, dtype: Any, where: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=where)
