"""LAPACK on stacks: one matrix at a time on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax


def per_matrix_on_cpu(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """``function(*stacks)``, matrix by matrix where the program runs on a CPU.

    XLA spreads a batch of LAPACK calls over its thread pool and waits for them on a
    thread of that same pool, so two batches at once can wait for each other for ever
    (seen on two cores); and the work on one matrix stays in the cache.

    Args:
      function: takes and returns arrays with any leading axes.
      *stacks: arrays with one leading axis.

    Returns:
      What ``function`` returns for whole stacks.

    Example:
      >>> per_matrix_on_cpu(jax.numpy.linalg.inv, 2.0 * jax.numpy.eye(2)[None])
      Array([[[0.5, 0. ],
              [0. , 0.5]]], dtype=float32)
    """

    def one_by_one(*stacks: jax.Array) -> Any:
        return jax.lax.map(lambda xs: function(*xs), stacks)

    return jax.lax.platform_dependent(*stacks, cpu=one_by_one, default=function)
