"""Has the tree changed since init? The state's own shapes tell."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from shampoo_optax import _checks
from shampoo_optax.layout.plan import Plan, Shape

Shapes = dict[str, Shape]  # of the leaves of a state, by name

ADVICE = (
    "The parameters or the layout changed since init: call init again, or restore "
    "the old ones."
)


def check(state: Any, wanted: Any, names: Sequence[str], plan: Plan) -> None:
    """Raise unless a state has the shapes that init would give it now.

    Leaves are compared by name, without a box's ``value``: Flax NNX boxes the leaves
    of one tree and not of the other. An inner transformation without state has no
    shapes, and nothing is compared.

    Args:
      state: a :class:`BlockwiseState`.
      wanted: the state that init makes for the updates, concrete or abstract.
      names: of the parameters.
      plan: their blocks.

    Raises:
      ValueError: naming the parameters, what they ask for, and what init made.
    """
    made, asked = _shapes(state), _shapes(wanted)
    if names and (missing := _without(asked, made)):
        name, shape = missing[0]
        found = f"{made[name]}" if name in made else "none"
        raise ValueError(
            f"blockwise.update: {_askers(name, names, plan)} for a state '{name}' of "
            f"shape {shape}, and init made {found}. {ADVICE}"
        )
    if spare := _without(made, asked):
        name, shape = spare[0]
        raise ValueError(
            f"blockwise.update: init made a state '{name}' of shape {shape}, and no "
            f"parameter in the updates asks for it. {ADVICE}"
        )


def _shapes(state: Any) -> Shapes:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {_checks.name_of(path): tuple(jnp.shape(leaf)) for path, leaf in leaves}


def _without(some: Shapes, others: Shapes) -> list[tuple[str, Shape]]:
    """What others lack or have in another shape; counters, which tell least, last."""
    pairs = [pair for pair in some.items() if pair not in others.items()]
    return sorted(pairs, key=lambda pair: pair[1] == ())


def _askers(name: str, names: Sequence[str], plan: Plan) -> str:
    """The parameters that a leaf of the state belongs to: ``parameter 'b' ... asks``.

    Stacks have their key in the path, other parameters end it with their own name.
    """
    where, *inside = name.split("/")
    if where == "blocks":
        members = (pool.leaves for pool, box in plan.members if box.key in inside)
        owners = sorted({leaf for leaves in members for leaf in leaves})
    else:
        owners = [leaf for leaf in plan.rest if name.endswith(f"/{names[leaf]}")]
        owners = sorted(owners, key=lambda leaf: len(names[leaf]))[-1:]
    listed = ", ".join(
        f"'{names[leaf]}' of shape {plan.shapes[leaf]}" for leaf in owners
    )
    if not owners:
        return "the updates ask"
    return f"parameters {listed} ask" if len(owners) > 1 else f"parameter {listed} asks"
