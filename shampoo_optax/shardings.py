"""Where every leaf of an optimizer's state lies, before there is one."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from shampoo_optax import _checks
from shampoo_optax._paths import keys_of, owner_of
from shampoo_optax.layout import placement
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.transforms._spread import block_spec
from shampoo_optax.transforms.blockwise import BlockwiseState

Path = tuple[Any, ...]


def state_shardings(
    tx: optax.GradientTransformation, params: optax.Params, layout: BlockLayout
) -> Any:
    """The shardings of a whole optimizer state, for ``out_shardings`` and restores.

    Stacks of blocks are spread over ``layout.block_axes``, state that has the shape of
    a parameter lies as the parameter does, and counters are everywhere. A state that
    is made so keeps its shardings through ``update``, and a training step compiles
    once.

    Args:
      tx: any optimizer with this layout in it: an alias, or a chain, ``partition``,
        ``masked``, ``MultiSteps`` around our transformations.
      params: or ``jax.ShapeDtypeStruct`` of their shapes; Flax boxes are fine.
      layout: with a mesh (or under ``jax.set_mesh``) and ``block_axes``.

    Returns:
      A tree like ``tx.init(params)`` with a ``NamedSharding`` in every place.

    Raises:
      ValueError: the layout has no block axes or no mesh, or a spec does not fit.

    Example:
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> layout = BlockLayout(mesh=mesh, block_axes=("data",))
      >>> tx = blockwise(kronecker(), layout)
      >>> params = {"w": jax.ShapeDtypeStruct((4, 3), jnp.float32)}
      >>> where = state_shardings(tx, params, layout)
      >>> where.blocks.factors["4x3"]["0"].spec[0]
      'data'
      >>> state = jax.jit(tx.init, out_shardings=where)({"w": jnp.ones((4, 3))})
    """
    mesh = placement.mesh_of(layout.mesh, layout.block_axes)
    if mesh is None:
        raise ValueError(
            "state_shardings(layout=...): the layout has no block_axes, so one device "
            "holds the whole state; wanted BlockLayout(mesh=..., block_axes=(...))."
        )
    if not isinstance(mesh, Mesh):
        mesh = jax.sharding.get_mesh()

    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [_checks.name_of(path) for path, _ in paths]
    leaves = [leaf for _, leaf in paths]
    specs = placement.specs_of(names, leaves, mesh, layout.param_specs)
    assert specs is not None  # there is a mesh
    owners = {
        keys_of(path): (
            tuple(jnp.shape(leaf)),
            placement.sharding(mesh, placement.partition_spec(spec), jnp.ndim(leaf)),
        )
        for (path, leaf), spec in zip(paths, specs, strict=True)
    }

    def blocks(leaf: Any) -> NamedSharding:
        spec = block_spec(leaf, layout.block_axes)
        return placement.sharding(mesh, spec, jnp.ndim(leaf))

    def of(path: Path, node: Any) -> Any:
        if isinstance(node, BlockwiseState):
            rest = jax.tree_util.tree_map_with_path(of, node.rest)
            return BlockwiseState(jax.tree.map(blocks, node.blocks), rest, node.blocked)
        own = owner_of(keys_of(path), tuple(node.shape), owners)
        return own or placement.sharding(mesh, PartitionSpec(), node.ndim)

    state = jax.eval_shape(tx.init, params)
    return jax.tree_util.tree_map_with_path(
        of, state, is_leaf=lambda node: isinstance(node, BlockwiseState)
    )
