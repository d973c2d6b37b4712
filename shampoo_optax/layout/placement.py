"""Where arrays lie: meshes, the specs of parameters, and who must be told.

On a mesh with explicit axes JAX knows where every array lies and refuses to cut or
contract a sharded dimension unless told where the result lies. On automatic axes an
optimizer cannot see it: it has to be said.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from shampoo_optax import _checks
from shampoo_optax.layout.plan import Axes, Shape
from shampoo_optax.layout.routes import Spec

AnyMesh = Mesh | jax.sharding.AbstractMesh


def replicated(array: jax.Array) -> jax.Array:
    """Replicate an array that lies on an explicit mesh; others come back as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> replicated(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    sharding = jax.typeof(array).sharding
    if not _explicit(sharding.mesh) or not any(sharding.spec):
        return array
    return jax.reshard(array, NamedSharding(sharding.mesh, PartitionSpec()))


def like(array: jax.Array, model: jax.Array) -> jax.Array:
    """Give an array the explicit sharding of another of the same shape.

    Example:
      >>> import jax.numpy as jnp
      >>> like(jnp.ones(2), jnp.zeros(2))
      Array([1., 1.], dtype=float32)
    """
    sharding = jax.typeof(model).sharding
    if not _explicit(sharding.mesh) or not any(sharding.spec):
        return array
    return jax.reshard(array, sharding)


def placed(array: jax.Array, mesh: AnyMesh, spec: PartitionSpec) -> jax.Array:
    """Lay an array out on a mesh, whatever the type of its axes."""
    traced = isinstance(array, jax.core.Tracer)
    if not traced and not isinstance(mesh, Mesh):
        mesh = jax.sharding.get_mesh()  # the devices of the mesh in use
    sharding = NamedSharding(mesh, spec)
    if _explicit(mesh):
        return jax.reshard(array, sharding)
    if traced:
        return jax.lax.with_sharding_constraint(array, sharding)
    return array if array.sharding == sharding else jax.device_put(array, sharding)


def sharding(mesh: Mesh, spec: PartitionSpec, ndim: int) -> NamedSharding:
    """A sharding as a compiled step returns it, so that the next call is the same.

    On explicit axes every dimension has an entry, on automatic ones none at the end
    is empty; JAX compiles again for one in place of the other.
    """
    entries = list(spec) + [None] * (ndim - len(spec))
    while entries and entries[-1] is None and not _explicit(mesh):
        entries.pop()
    return NamedSharding(mesh, PartitionSpec(*entries))


def check_axes(mesh: Mesh | None, block_axes: Axes) -> None:
    """Raise unless the block axes are axes of the mesh.

    Example:
      >>> check_axes(None, "data")
      Traceback (most recent call last):
      ...
      TypeError: BlockLayout(block_axes='data'): wanted a tuple of axis names of the \
mesh, for example ('data',).
    """
    call = f"BlockLayout(block_axes={block_axes!r})"
    if not isinstance(block_axes, tuple):
        raise TypeError(
            f"{call}: wanted a tuple of axis names of the mesh, for example ('data',)."
        )
    if len(set(block_axes)) < len(block_axes):
        raise ValueError(f"{call}: an axis stands there twice.")
    if mesh is not None:
        _known(call, block_axes, mesh)
        if not block_axes:
            raise ValueError(
                f"{call} with a mesh of axes {tuple(mesh.shape)}: say over which of "
                "them blocks are spread, or leave the mesh out."
            )


def mesh_of(mesh: Mesh | None, block_axes: Axes) -> AnyMesh | None:
    """The mesh that blocks are spread over; None where they are not.

    Raises:
      ValueError: there are block axes, and no mesh is in use or it lacks them.
    """
    if not block_axes:
        return None
    if mesh is not None:
        return mesh
    ambient = jax.sharding.get_abstract_mesh()
    call = f"BlockLayout(block_axes={block_axes!r}, mesh=None)"
    if ambient.empty:
        raise ValueError(
            f"{call}: no mesh is in use. Pass mesh=..., or call init and update under "
            "jax.set_mesh(mesh)."
        )
    _known(call, block_axes, ambient)
    return ambient


def specs_of(
    names: Sequence[str],
    leaves: Sequence[Any],
    mesh: AnyMesh | None,
    param_specs: Any,
) -> list[Spec] | None:
    """Over which axes each dimension of each parameter lies; None for one device.

    Raises:
      ValueError: a parameter has no spec, or one that does not fit it.
    """
    if mesh is None:
        return None
    said = _by_name(param_specs)
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        shape = tuple(jax.numpy.shape(leaf))
        spec = _explicit_spec(name, leaf, mesh) if param_specs is None else None
        if callable(param_specs):
            spec = param_specs(name, shape)
        elif spec is None:
            if said is not None and name not in said:
                raise ValueError(
                    f"BlockLayout(param_specs=...): parameter '{name}' of shape "
                    f"{shape} has none; there are specs for {sorted(said)[:5]}. Wanted "
                    "a tree like the parameters'."
                )
            spec = PartitionSpec() if said is None else said[name]
        found.append(_normal(name, shape, spec, mesh))
    return found


def partition_spec(spec: Spec) -> PartitionSpec:
    """A spec as JAX writes it.

    Example:
      >>> partition_spec((("a", "b"), ())) == PartitionSpec(("a", "b"), None)
      True
    """
    entries = [axes[0] if len(axes) == 1 else axes or None for axes in spec]
    return PartitionSpec(*entries)


def _by_name(param_specs: Any) -> dict[str, PartitionSpec] | None:
    if param_specs is None or callable(param_specs):
        return None
    kinds = PartitionSpec, NamedSharding
    pairs = jax.tree_util.tree_leaves_with_path(
        param_specs, is_leaf=lambda x: isinstance(x, kinds)
    )
    return {
        _checks.name_of(path): spec.spec if isinstance(spec, NamedSharding) else spec
        for path, spec in pairs
    }


def _explicit_spec(name: str, leaf: Any, mesh: AnyMesh) -> PartitionSpec | None:
    """What explicit axes say of an array."""
    sharding = getattr(leaf, "sharding", None)
    if isinstance(leaf, jax.Array):
        sharding = jax.typeof(leaf).sharding
    if not isinstance(sharding, NamedSharding) or not _explicit(sharding.mesh):
        return None
    if dict(sharding.mesh.shape) != dict(mesh.shape):
        raise ValueError(
            f"BlockLayout(mesh=...): parameter '{name}' lies on a mesh "
            f"{dict(sharding.mesh.shape)}, the layout's is {dict(mesh.shape)}; wanted "
            "one mesh for both."
        )
    return sharding.spec


def _normal(name: str, shape: Shape, spec: Any, mesh: AnyMesh) -> Spec:
    call = (
        f"BlockLayout(param_specs=...): parameter '{name}' of shape {shape} has {spec}"
    )
    if not isinstance(spec, PartitionSpec):
        raise TypeError(
            f"{call}, of type {type(spec).__name__}; wanted a PartitionSpec."
        )
    if len(spec) > len(shape):
        raise ValueError(f"{call}, with more entries than dimensions.")
    entries = list(spec) + [None] * (len(shape) - len(spec))
    normal = []
    for size, entry in zip(shape, entries, strict=True):
        axes = () if entry is None else (entry,) if isinstance(entry, str) else entry
        _known(call, axes, mesh)
        number = math.prod(mesh.shape[axis] for axis in axes)
        if size % number:
            raise ValueError(
                f"{call}: a dimension of {size} cannot lie on {number} devices in "
                f"equal shares; the mesh has axes {dict(mesh.shape)}."
            )
        normal.append(tuple(axes))
    return tuple(normal)


def _known(call: str, axes: Axes, mesh: AnyMesh) -> None:
    for axis in axes:
        if axis not in mesh.shape:
            raise ValueError(
                f"{call}: the mesh has no axis {axis!r}; its axes are "
                f"{dict(mesh.shape)}."
            )


def _explicit(mesh: AnyMesh) -> bool:
    return AxisType.Explicit in mesh.axis_types
