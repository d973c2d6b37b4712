"""LAPACK on stacks: on a CPU by single calls, beside each other where they can be."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# XLA's CPU runtime gives half of its work to another thread where more than eight
# operations are ready: ten calls, of which it has begun one, go to two threads, and
# twenty to four. Each call is written out, which takes a compiler's time.
ENOUGH = 10
# Smaller ones would gain (64 rows: 0.6 of the time), but come in many sizes, and every
# chunk makes a program larger. Of larger ones a chunk takes much memory in float64, and
# two will do: a copy that several threads write ends on any of them, and the call goes
# on there. For that it must not be small.
SMALL, LARGE = 128, 384
PAIR, PAIRED = 2, 256


def per_matrix_on_cpu(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """``function(*stacks)``, matrix by matrix where the program runs on a CPU.

    XLA spreads a batch of LAPACK calls over its thread pool and waits for them on a
    thread of that same pool, so two batches at once can wait for each other for ever
    (seen on two cores); and the work on one matrix stays in the cache. Single calls
    beside each other wait for nothing, but want a LAPACK that keeps to one thread: with
    ``OMP_NUM_THREADS=1`` (or ``OPENBLAS_NUM_THREADS=1``) they come in chunks.

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
    return lax.platform_dependent(
        *stacks, cpu=partial(in_turn, singly(function)), default=function
    )


def singly(call: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, written out for every matrix where it is given a chunk of them.

    Example:
      >>> singly(jax.numpy.linalg.inv)(2.0 * jax.numpy.ones((3, 1, 1))).ravel()
      Array([0.5, 0.5, 0.5], dtype=float32)
    """

    def alone(*xs: jax.Array) -> Any:
        found = call(*(lax.squeeze(x, [0]) for x in xs))
        return jax.tree.map(lambda x: lax.expand_dims(x, [0]), found)

    @jax.jit  # a program of many calls holds it once
    def at(i: jax.Array, *xs: jax.Array) -> Any:
        return alone(*(_rows(x, i, 1) for x in xs))

    def each(*xs: jax.Array) -> Any:
        if xs[0].ndim < 3:
            return call(*xs)
        if len(xs[0]) == 1:
            return alone(*xs)
        found = [at(i, *xs) for i in range(len(xs[0]))]
        return jax.tree.map(lambda *parts: lax.concatenate(parts, 0), *found)

    return each


def in_turn(function: Callable[..., Any], *stacks: jax.Array) -> Any:
    """What :func:`per_matrix_on_cpu` does on a CPU.

    Args:
      function: calls LAPACK by :func:`singly` only.
      *stacks: as there.

    Example:
      >>> in_turn(singly(jax.numpy.linalg.inv), 2.0 * jax.numpy.eye(2)[None])
      Array([[[0.5, 0. ],
              [0. , 0.5]]], dtype=float32)
    """
    number, size = stacks[0].shape[0], stacks[0].shape[-1]
    chunk = 1
    if _lapack_has_one_thread():
        chunk = chunk_size(number, size, os.cpu_count() or 1)
    if number == 0:
        some = [jnp.zeros_like(x, shape=(1, *x.shape[1:])) for x in stacks]
        return jax.tree.map(lambda x: x[:0], in_turn(function, *some))
    # Each call of a pair follows what it needs alone, on another thread.
    run = singly(function) if chunk <= PAIR else function

    def step(i: jax.Array, out: Any) -> Any:
        first = i * chunk if chunk > 1 else i
        if number % chunk:  # the last begins early: what it does anew runs beside it
            first = jnp.minimum(first, number - chunk)

        def put(into: jax.Array, new: jax.Array) -> jax.Array:
            return lax.dynamic_update_slice_in_dim(
                into, new, first, 0, allow_negative_indices=False
            )

        return jax.tree.map(put, out, run(*(_rows(x, first, chunk) for x in stacks)))

    some = jax.eval_shape(run, *(x[:chunk] for x in stacks))
    out = jax.tree.map(
        lambda x: jnp.zeros_like(stacks[0], x.dtype, (number, *x.shape[1:])), some
    )
    return lax.fori_loop(0, -(-number // chunk), step, out)


def chunk_size(number: int, size: int, cores: int) -> int:
    """How many of ``number`` matrices of ``size`` rows one turn of a loop takes.

    Example:
      >>> [chunk_size(n, 256, 2) for n in (1, 7, 14, 24, 41)]
      [1, 2, 14, 12, 14]
      >>> chunk_size(41, 256, 8), chunk_size(41, 1024, 8)
      (21, 2)
    """
    least = ENOUGH if number < 2 * ENOUGH or cores < 4 else 2 * ENOUGH
    if number >= least and SMALL <= size < LARGE:
        # As few as can be are done twice, and in few turns: their ends wait.
        fits = range(least, 2 * least)
        return min(fits, key=lambda chunk: (-number % chunk, -chunk))
    return PAIR if number >= PAIR and size >= PAIRED else 1


def _rows(stack: jax.Array, first: jax.Array, number: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(stack, first, number, allow_negative_indices=False)


def _lapack_has_one_thread() -> bool:
    names = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")  # the first that is set counts
    said = [os.environ[name] for name in names if os.environ.get(name)]
    return said[:1] == ["1"]
