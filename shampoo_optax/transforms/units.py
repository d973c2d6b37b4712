"""The matrices of one refresh: all of them, or a share of them at every step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from shampoo_optax.linalg.masks import chosen
from shampoo_optax.transforms._in_turn import LARGE
from shampoo_optax.transforms.factors import Matrices
from shampoo_optax.transforms.refresh import Refresh

# A GPU is filled by several matrices of 1024 at once: so many elements.
GPU_BATCH = 2**25

T = TypeVar("T")
Member = tuple[str, str]  # stack and dimension


class Units:
    """Matrices of one size that are solved in one batched call.

    Args:
      matrices: ``{stack: {dimension: [n, ...]}}``, of which the members' are taken.
      members: which.
      first: the place of the first among them, traced; None for all.
      size: how many from there.
    """

    def __init__(
        self,
        matrices: Matrices,
        members: list[Member],
        first: jax.Array | None = None,
        size: int | None = None,
    ) -> None:
        """Find the members' places in the batch."""
        self.matrices, self.members, self.first = matrices, members, first
        self.sizes = [matrices[key][dim].shape[0] for key, dim in members]
        self.size = sum(self.sizes) if size is None else size

    def one_of(self, matrices: Matrices) -> jax.Array:
        """All matrices of one of the members: for their dtype and how they are kept."""
        key, dim = self.members[0]
        return matrices[key][dim]

    def take(self, matrices: Matrices) -> jax.Array:
        """These units' rows as one batch ``[size, ...]``; past the end, copies."""
        arrays = [matrices[key][dim] for key, dim in self.members]
        if self.first is None:
            return jnp.concatenate(arrays)
        taken = None
        for array, (index, inside) in zip(arrays, self._places(), strict=True):
            rows = _rows(array, index)
            taken = (
                rows if taken is None else jnp.where(_over(inside, rows), rows, taken)
            )
        assert taken is not None  # a group has members
        return taken

    def put(
        self, matrices: Matrices, rows: jax.Array, accepted: jax.Array | None = None
    ) -> None:
        """Put new rows into a tree of copies, in place of the old ones.

        Args:
          matrices: a tree that may be changed.
          rows: ``[size, ...]``.
          accepted: ``[size]``, which of them; None for all.
        """
        start = 0
        for (key, dim), (index, _) in zip(self.members, self._places(), strict=True):
            old = matrices[key][dim]
            if self.first is None:
                own = slice(start, start + len(old))
                start += len(old)
                new, good = rows[own], None if accepted is None else accepted[own]
                matrices[key][dim] = _where(good, new, old)
                continue
            # As many rows of the old as there are new ones, where most of these lie.
            size = min(self.size, len(old))
            place = jnp.clip(index[0], 0, len(old) - size)
            at = place - index[0] + jnp.arange(size, dtype=jnp.int32)
            good = (at >= 0) & (at < self.size)
            new = rows if self.size == 1 else _rows(rows, at)
            if accepted is not None:
                good &= accepted[jnp.clip(at, 0, self.size - 1)]
            window = jax.lax.dynamic_slice_in_dim(old, place, size)
            new = _where(good, new, window)
            matrices[key][dim] = jax.lax.dynamic_update_slice_in_dim(old, new, place, 0)

    def run(self, solve: Callable[[T, Units], T], old: T) -> T:
        """Solve them, all in one call or one after another."""
        side = self.one_of(self.matrices).shape[-2]
        if side < LARGE or self.size == 1:
            return solve(old, self)
        one_by_one = partial(self._in_batches, solve, 1)
        batches = partial(self._in_batches, solve, max(1, GPU_BATCH // side**2))
        return jax.lax.platform_dependent(
            old, cuda=batches, rocm=batches, default=one_by_one
        )

    def _in_batches(self, solve: Callable[[T, Units], T], size: int, old: T) -> T:
        """Solve ``size`` at a time, and last those that are left."""
        first = jnp.zeros([], jnp.int32) if self.first is None else self.first

        def batch(i: jax.Array | int, so_far: T, count: int = size) -> T:
            units = Units(self.matrices, self.members, first + i * size, count)
            return solve(so_far, units)

        whole, left = divmod(self.size, size)
        old = jax.lax.fori_loop(0, whole, batch, old)
        return batch(whole, old, left) if left else old

    def _places(self) -> list[tuple[jax.Array, jax.Array]]:
        """For each member the units' places in it, and which of them are its own."""
        places, start = [], 0
        order = jnp.arange(self.size, dtype=jnp.int32)
        for size in self.sizes:
            index = order + (0 if self.first is None else self.first) - start
            places.append((index, (index >= 0) & (index < size)))
            start += size
        return places


def _rows(array: jax.Array, index: jax.Array) -> jax.Array:
    """Rows at some places, moved inside where they are not."""
    index = jnp.clip(index, 0, len(array) - 1)
    if len(index) == 1:
        return jax.lax.dynamic_slice_in_dim(array, index[0], 1)
    return jnp.take(array, index, axis=0)


def _where(mask: jax.Array | None, new: jax.Array, old: jax.Array) -> jax.Array:
    return new if mask is None else chosen(_over(mask, new), new, old)


def _over(mask: jax.Array, rows: jax.Array) -> jax.Array:
    return mask.reshape(-1, *(1,) * (rows.ndim - 1))


class Share:
    """One of equal shares of the matrices of every size; or all of them.

    Args:
      phase: which share, traced; None for all.
      phases: how many there are.
    """

    def __init__(self, phase: jax.Array | None, phases: int) -> None:
        """Keep them."""
        self.phase, self.phases = phase, phases

    def run(
        self,
        matrices: Matrices,
        members: list[Member],
        solve: Callable[[T, Units], T],
        old: T,
    ) -> T:
        """Solve the share of some members."""
        if self.phase is None:
            return Units(matrices, members).run(solve, old)
        total = Units(matrices, members).size
        # Shares begin at equal distances and overlap where they do not divide.
        first, size = self.phase * total // self.phases, -(-total // self.phases)
        units = Units(matrices, members, first, size)
        if total >= self.phases:
            return units.run(solve, old)
        # A small group's share is often that of the phase before.
        new = self.phase * total % self.phases < total
        return jax.lax.cond(new, lambda x: units.run(solve, x), lambda x: x, old)


def grouped(
    matrices: Matrices, static: dict[str, dict[int, Any]] | None = None
) -> list[list[Member]]:
    """Members of one size, dtype and static value: one batched call for each group."""
    groups: dict[Any, list[Member]] = {}
    for key, by_dim in matrices.items():
        for dim, matrix in by_dim.items():
            value = None if static is None else static[key][int(dim)]
            # Both sides: two sizes may be equally wide where they are packed.
            same = (matrix.shape[-2:], matrix.dtype, value)
            groups.setdefault(same, []).append((key, dim))
    return list(groups.values())


def refreshed(
    refresh: Refresh,
    count: jax.Array,
    solve: Callable[[Share, T], T],
    old: T,
    *,
    at_once: bool = False,
) -> T:
    """What a refresh makes of the old results at this step.

    Args:
      refresh: the schedule.
      count: of this step.
      solve: maps a share and results to results.
      old: results so far.
      at_once: all of them, if refreshes have begun.

    Returns:
      The results; the old ones where nothing is due.
    """
    if at_once:
        begun = count >= min(refresh.start, jnp.iinfo(count.dtype).max)
        return jax.lax.cond(begun, lambda: solve(Share(None, 1), old), lambda: old)
    if not refresh.staggered:
        due = refresh.due(count)
        return jax.lax.cond(due, lambda: solve(Share(None, 1), old), lambda: old)
    first, stop = refresh.phases(count)

    def phase(i: jax.Array, so_far: T) -> T:
        return solve(Share(i, refresh.shares), so_far)

    return jax.lax.fori_loop(first, stop, phase, old)
