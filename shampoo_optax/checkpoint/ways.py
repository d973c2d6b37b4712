"""How blocks reach a checkpoint and come back: through the host, or on the devices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from shampoo_optax.checkpoint import host, moves
from shampoo_optax.checkpoint.entries import Cut
from shampoo_optax.checkpoint.view import Give, Take, home_of
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Shape


class Way(NamedTuple):
    """The three moves of a way; see :mod:`host` and :mod:`moves`."""

    take: Take
    give: Give
    ask: Callable[[Shape, Any], Any]  # what Orbax is asked for: shape, dtype


def way_of(layout: BlockLayout) -> Way:
    """Through the memory of a process that has all devices; else on the devices."""
    if jax.process_count() == 1:
        return Way(_shared, host.given, host.unread)
    home = home_of(layout)
    return Way(
        lambda entry, stack: moves.taken(entry, stack, home),
        lambda entry, parts, stack: moves.given(entry, parts, stack, home),
        lambda shape, dtype: jax.ShapeDtypeStruct(
            shape, dtype, sharding=home.aside(shape)
        ),
    )


def _shared(entry: Cut, stack: jax.Array) -> Sequence[Any]:
    """Parts as JAX's arrays on a CPU: Orbax copies NumPy's once more, not those."""
    parts = host.taken(entry, stack)
    if jax.default_backend() != "cpu":
        return parts
    return jax.device_put(parts, jax.devices("cpu")[0], may_alias=True)
