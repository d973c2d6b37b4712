"""The matrices of one refresh: all of them, or a share of them at every step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from shampoo_optax.transforms.factors import Matrices
from shampoo_optax.transforms.refresh import Refresh

T = TypeVar("T")
Member = tuple[str, str]  # stack and dimension


class Units:
    """Matrices of one size that are solved in one batched call.

    Args:
      matrices: ``{stack: {dimension: [n, ...]}}``, of which the members' are taken.
      members: which.
      phase: which share of them, a traced whole number; None for all.
      phases: how many shares there are.
    """

    def __init__(
        self,
        matrices: Matrices,
        members: list[Member],
        phase: jax.Array | None,
        phases: int,
    ) -> None:
        """Find the share's place."""
        self.members = members
        self.sizes = [matrices[key][dim].shape[0] for key, dim in members]
        self.phase, self.phases, self.total = phase, phases, sum(self.sizes)
        self.size = -(-self.total // phases)
        # Shares begin at equal distances and overlap where they do not divide.
        self.first = None if phase is None else phase * self.total // phases

    def run(self, solve: Callable[[T], T], old: T) -> T:
        """Solve, unless the share is that of the phase before: a small group's is."""
        if self.phase is None or self.total >= self.phases:
            return solve(old)
        new = self.phase * self.total % self.phases < self.total
        return jax.lax.cond(new, solve, lambda x: x, old)

    def take(self, matrices: Matrices) -> jax.Array:
        """The share as one batch ``[size, ...]``; past the end, copies of some."""
        arrays = [matrices[key][dim] for key, dim in self.members]
        if self.first is None:
            return jnp.concatenate(arrays)
        taken = None
        for array, (index, inside) in zip(arrays, self._places(), strict=True):
            rows = jnp.take(array, jnp.clip(index, 0, len(array) - 1), axis=0)
            mask = inside.reshape(-1, *(1,) * (rows.ndim - 1))
            taken = rows if taken is None else jnp.where(mask, rows, taken)
        assert taken is not None  # a group has members
        return taken

    def put(self, matrices: Matrices, rows: jax.Array) -> None:
        """Put the share's new rows into a tree of copies, in place of the old ones."""
        start = 0
        for (key, dim), size, (index, inside) in zip(
            self.members, self.sizes, self._places(), strict=True
        ):
            if self.first is None:
                matrices[key][dim] = rows[start : start + size]
                start += size
                continue
            place = jnp.where(inside, index, size)  # outside: dropped
            old = matrices[key][dim]
            matrices[key][dim] = old.at[place].set(rows, mode="drop")

    def _places(self) -> list[tuple[jax.Array, jax.Array]]:
        """For each member the share's places in it, and which of them are its own."""
        places, start = [], 0
        order = jnp.arange(self.size, dtype=jnp.int32)
        for size in self.sizes:
            index = order + (0 if self.first is None else self.first) - start
            places.append((index, (index >= 0) & (index < size)))
            start += size
        return places


def grouped(
    matrices: Matrices, static: dict[str, dict[int, Any]] | None = None
) -> list[list[Member]]:
    """Members of one size, dtype and static value: one batched call for each group."""
    groups: dict[Any, list[Member]] = {}
    for key, by_dim in matrices.items():
        for dim, matrix in by_dim.items():
            value = None if static is None else static[key][int(dim)]
            same = (matrix.shape[-1], matrix.dtype, value)
            groups.setdefault(same, []).append((key, dim))
    return list(groups.values())


def refreshed(
    refresh: Refresh,
    count: jax.Array,
    solve: Callable[[jax.Array | None, T], T],
    old: T,
) -> T:
    """What a refresh makes of the old results at this step.

    Args:
      refresh: the schedule.
      count: of this step.
      solve: maps a share (None for everything) and results to results.
      old: results so far.

    Returns:
      The results; the old ones where nothing is due.
    """
    if not refresh.staggered:
        return jax.lax.cond(refresh.due(count), lambda: solve(None, old), lambda: old)
    first, stop = refresh.phases(count)
    return jax.lax.fori_loop(first, stop, solve, old)
