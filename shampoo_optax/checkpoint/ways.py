"""How blocks leave a checkpoint or reach a state: through the host, or on devices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from shampoo_optax.checkpoint import host, moves
from shampoo_optax.checkpoint.view import Give, Take, home_of
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.plan import Shape


class Way(NamedTuple):
    """The moves of a way; see :mod:`host` and :mod:`moves`."""

    take: Take  # from a state
    read: Take  # from what Orbax was asked for
    give: Give
    ask: Callable[[Shape, Any], Any]  # what Orbax is asked for: shape, dtype


# In the memory of this process.
ON_HOST = Way(host.taken, host.taken, host.given, host.unread)


def way_of(layout: BlockLayout) -> Way:
    """Through the memory of a process that has all devices; else on the devices."""
    if jax.process_count() == 1:
        return ON_HOST
    home = home_of(layout)
    return Way(
        lambda entry, stack: moves.taken(entry, stack, home, home.rows()),
        lambda entry, stack: moves.taken(entry, stack, home, home.aside(stack.shape)),
        lambda entry, parts, stack: moves.given(entry, parts, stack, home),
        lambda shape, dtype: jax.ShapeDtypeStruct(
            shape, dtype, sharding=home.aside(shape)
        ),
    )
