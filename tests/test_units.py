"""Matrices of several stacks as one batch: what is taken, put back, and solved."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_optax.transforms.units import Units

NUMBERS = {"a": 5, "b": 2, "c": 9}
MEMBERS = [(key, "0") for key in NUMBERS]


def _matrices(scale: float = 1.0) -> dict[str, dict[str, jax.Array]]:
    values, start = {}, 0
    for key, number in NUMBERS.items():
        rows = scale * np.arange(start, start + number, dtype=np.float32)
        values[key] = {
            "0": jnp.asarray(np.broadcast_to(rows[:, None, None], (number, 2, 2)))
        }
        start += number
    return values


def _flat(matrices: Any) -> np.ndarray:
    return np.concatenate([np.asarray(matrices[key]["0"])[:, 0, 0] for key in NUMBERS])


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, None])
def test_what_is_put_is_what_was_taken_and_accepted(size: int | None) -> None:
    """Against one flat array, for every place to begin, past the end as well."""
    total = sum(NUMBERS.values())

    @jax.jit
    def turn(first: jax.Array, accepted: jax.Array) -> Any:
        matrices = _matrices()
        units = Units(matrices, MEMBERS, None if size is None else first, size)
        copies = jax.tree.map(lambda x: x, matrices)
        units.put(copies, 100.0 + units.take(matrices), accepted)
        return copies

    rng = np.random.default_rng(0)
    for first in range(total if size else 1):
        count = size or total
        accepted = rng.random(count) < 0.7
        wanted = np.arange(total, dtype=np.float32)
        for i in range(first, min(first + count, total)):
            wanted[i] += 100.0 * accepted[i - first]
        found = turn(jnp.int32(first), jnp.asarray(accepted))
        np.testing.assert_array_equal(_flat(found), wanted, err_msg=str(first))


@pytest.mark.parametrize("first", [None, 3])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 13])
def test_batches_solve_what_the_whole_does(first: int | None, size: int) -> None:
    """Each matrix once: it is how GPUs go through many large ones."""
    matrices = _matrices()
    start = None if first is None else jnp.int32(first)
    units = Units(matrices, MEMBERS, start, None if first is None else 13)

    def solve(old: Any, units: Units) -> Any:
        new = jax.tree.map(lambda x: x, old)
        units.put(new, units.take(old) + units.take(matrices) + 1.0)
        return new

    zeros = jax.tree.map(jnp.zeros_like, matrices)
    whole = solve(zeros, units)
    batches = jax.jit(lambda old: units._in_batches(solve, size, old))(zeros)
    np.testing.assert_array_equal(_flat(batches), _flat(whole))
