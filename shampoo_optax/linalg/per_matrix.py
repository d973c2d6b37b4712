"""LAPACK on stacks: one matrix at a time on a CPU, or two."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# On two cores, roots of 256 to 1024 take 0.6 of the time two by two; three or four at
# once, 0.7 to 0.9 (docs/log.md).
TOGETHER = 2
# With smaller ones XLA does not run a loop's calls beside each other (128: no gain).
LARGE = 256


def per_matrix_on_cpu(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """``function(*stacks)``, matrix by matrix where the program runs on a CPU.

    XLA spreads a batch of LAPACK calls over its thread pool and waits for them on a
    thread of that same pool, so two batches at once can wait for each other for ever
    (seen on two cores); and the work on one matrix stays in the cache. Two single calls
    beside each other wait for nothing, but want a LAPACK that keeps to one thread: with
    ``OMP_NUM_THREADS=1`` (or ``OPENBLAS_NUM_THREADS=1``) large ones come two by two.

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
    return jax.lax.platform_dependent(
        *stacks, cpu=partial(in_turn, function), default=function
    )


def in_turn(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """What :func:`per_matrix_on_cpu` does on a CPU.

    Example:
      >>> in_turn(jax.numpy.linalg.inv, 2.0 * jax.numpy.eye(2)[None])
      Array([[[0.5, 0. ],
              [0. , 0.5]]], dtype=float32)
    """
    number = len(stacks[0])
    pairs = number // TOGETHER
    small = stacks[0].shape[-1] < LARGE
    if pairs == 0 or small or not _lapack_has_one_thread():
        return jax.lax.map(lambda xs: function(*xs), stacks)
    even = pairs * TOGETHER

    def both(xs: list[jax.Array]) -> Any:
        found = [function(*(x[i] for x in xs)) for i in range(TOGETHER)]
        return jax.tree.map(lambda *parts: jnp.stack(parts), *found)

    first = [x[:even].reshape(pairs, TOGETHER, *x.shape[1:]) for x in stacks]
    found = jax.lax.map(both, first)
    found = jax.tree.map(lambda x: x.reshape(even, *x.shape[2:]), found)
    if even == number:
        return found
    last = function(*(x[-1] for x in stacks))
    return jax.tree.map(lambda x, y: jnp.concatenate([x, y[None]]), found, last)


def _lapack_has_one_thread() -> bool:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # the first that is set counts
    said = [os.environ[name] for name in names if os.environ.get(name)]
    return said[:1] == ["1"]
