"""Where arrays lie while one device's program works on them.

On a mesh with explicit axes JAX refuses to cut or contract a sharded dimension
unless told where the result lies. Until blocks are sharded, every device works on
whole arrays: they are replicated before the split, and the result takes its
parameter's sharding again.
"""

from __future__ import annotations

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def replicated(array: jax.Array) -> jax.Array:
    """Replicate an array that lies on an explicit mesh; others come back as they are.

    Example:
      >>> import jax.numpy as jnp
      >>> replicated(jnp.ones(2))
      Array([1., 1.], dtype=float32)
    """
    sharding = jax.typeof(array).sharding
    if not _explicit(sharding) or not any(sharding.spec):
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
    if not _explicit(sharding) or not any(sharding.spec):
        return array
    return jax.reshard(array, sharding)


def _explicit(sharding: NamedSharding) -> bool:
    return AxisType.Explicit in sharding.mesh.axis_types
