"""When factors are measured, and roots computed anew."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import jax
import jax.numpy as jnp

from shampoo_optax import _checks

T = TypeVar("T")


@dataclass(frozen=True)
class Refresh:
    """A schedule of refreshes, counted in steps from 1.

    Roots are computed at ``start_preconditioning_step`` and from then on at every
    multiple of ``precondition_frequency``: with frequency 3 and start 5 at the steps
    5, 6, 9, 12. A refresh uses the gradient of its own step.

    Args:
      precondition_frequency: steps from one refresh to the next. Larger is cheaper
        and staler.
      start_preconditioning_step: the first refresh; before it a grafted update is
        the magnitude rule alone. None means the frequency, ``math.inf`` never.
      statistics_frequency: steps from one measurement of the factors to the next; the
        first step measures. 1, the default, uses every gradient.

      staggered: refresh a share of the matrices at every step, so that each comes due
        once in ``precondition_frequency`` steps and all steps take equally long; the
        first refresh is of all. Which matrix comes when depends on how many a device
        owns.

    Raises:
      ValueError, TypeError: a number is below 1 or not whole.

    Example:
      >>> refresh = Refresh(precondition_frequency=3, start_preconditioning_step=5)
      >>> [t for t in range(1, 13) if refresh.due(jnp.int32(t))]
      [5, 6, 9, 12]
    """

    precondition_frequency: int = 10
    start_preconditioning_step: int | float | None = None
    statistics_frequency: int = 1
    staggered: bool = False

    def __post_init__(self) -> None:
        """Check the numbers."""
        frequency, start = self.precondition_frequency, self.start_preconditioning_step
        name = "Refresh"
        _checks.whole(name, "precondition_frequency", frequency, low=1, infinite=False)
        if start is not None:
            which = "start_preconditioning_step"
            _checks.whole(name, which, start, low=1, infinite=True)
        which, every = "statistics_frequency", self.statistics_frequency
        _checks.whole(name, which, every, low=1, infinite=False)

    @property
    def start(self) -> int | float:
        """The first step that is preconditioned."""
        start = self.start_preconditioning_step
        return self.precondition_frequency if start is None else start

    def due(self, count: jax.Array) -> jax.Array:
        """Whether roots are computed at this step (a traced boolean)."""
        if self.start == math.inf:
            return jnp.zeros_like(count, bool)
        regular = (count % self.precondition_frequency == 0) & (count > self.start)
        return regular | (count == self.start)

    @property
    def shares(self) -> int:
        """In how many shares matrices come due."""
        return self.precondition_frequency if self.staggered else 1

    def phases(self, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Which shares are due at this step, the first and the one after the last.

        Example:
          >>> refresh = Refresh(3, start_preconditioning_step=2, staggered=True)
          >>> [tuple(map(int, refresh.phases(jnp.int32(t)))) for t in range(1, 7)]
          [(0, 0), (0, 3), (0, 1), (1, 2), (2, 3), (0, 1)]
        """
        if self.start == math.inf:
            return jnp.zeros_like(count), jnp.zeros_like(count)
        since = count - jnp.int32(self.start)
        turn = jnp.where(since > 0, (since - 1) % self.shares, 0)
        stop = jnp.where(since > 0, turn + 1, jnp.where(since == 0, self.shares, 0))
        return turn, stop.astype(turn.dtype)

    def measured(
        self, count: jax.Array, new: Callable[[], T], old: T
    ) -> tuple[T, jax.Array]:
        """New factors where this step measures, else the old; how many measured.

        Example:
          >>> refresh = Refresh(statistics_frequency=3)
          >>> [int(refresh.measured(jnp.int32(t), int, 0)[1]) for t in range(1, 8)]
          [1, 1, 1, 2, 2, 2, 3]
        """
        if self.statistics_frequency == 1:
            return new(), count
        before, since = jnp.divmod(count - 1, self.statistics_frequency)
        return jax.lax.cond(since == 0, new, lambda: old), before + 1
