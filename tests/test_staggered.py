"""Refreshing a share of the matrices at every step."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shampoo_optax as so
from tests import helpers

LIKE = {"a": jnp.zeros((12, 8)), "b": jnp.zeros((8, 6))}
PARTS = {
    "roots": lambda refresh: so.kronecker(0.9, refresh=refresh),
    "bases": lambda refresh: so.eigenbasis(0.9, refresh=refresh),
}


def _changes(make: Any, what: str, refresh: so.Refresh, steps: int) -> list[list[int]]:
    """Which of all matrices changed at each step, by a number of its own."""
    tx = so.blockwise(make(refresh), so.BlockLayout(4))
    state, update, found = tx.init(LIKE), helpers.jit(tx.update), []
    for step in range(1, steps + 1):
        _, new = update(helpers.gradients(LIKE, step), state)
        pairs = zip(
            jax.tree.leaves(getattr(new.blocks, what)),
            jax.tree.leaves(getattr(state.blocks, what)),
            strict=True,
        )
        changed = np.concatenate([np.any(np.asarray(a != b), (1, 2)) for a, b in pairs])
        found.append(np.flatnonzero(changed).tolist())
        state = new
    return found


@pytest.mark.parametrize(("what", "make"), PARTS.items(), ids=PARTS)
@pytest.mark.parametrize("frequency", [2, 3, 5, 30])
def test_all_at_first_then_each_once_in_a_period(
    what: str, make: Any, frequency: int
) -> None:
    start = 2
    refresh = so.Refresh(frequency, start, staggered=True)
    steps = _changes(make, what, refresh, start + 2 * frequency)
    # Six blocks and two of 4x4, two of 4x2: 18 matrices of 4, two of 2.
    everything = list(range(20))
    assert steps[0] == [] and steps[1] == everything
    for period in (steps[2 : 2 + frequency], steps[2 + frequency :]):
        seen = [unit for step in period for unit in step]
        assert sorted(set(seen)) == everything
        # One share may overlap the next by the remainder of the division.
        sizes = [-(-number // frequency) for number in (18, 2)]
        assert max(len(step) for step in period) <= sum(sizes)
        if frequency == 30:
            assert len(seen) == len(everything)


@pytest.mark.parametrize("make", PARTS.values(), ids=PARTS)
def test_a_period_of_one_step_is_no_staggering(make: Any) -> None:
    plain, staggered = (
        so.blockwise(make(so.Refresh(1, 2, staggered=flag)), so.BlockLayout(4))
        for flag in (False, True)
    )
    wanted, found = (helpers.run(tx, LIKE, 5)[0] for tx in (plain, staggered))
    helpers.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_a_share_is_solved_from_the_factors_of_its_step() -> None:
    """Each new root is the root of the factor as it is then."""
    refresh = so.Refresh(4, 1, staggered=True)
    tx = so.blockwise(so.kronecker(0.9, refresh=refresh), so.BlockLayout(4))
    state, update = tx.init(LIKE), helpers.jit(tx.update)
    for step in range(1, 8):
        _, new = update(helpers.gradients(LIKE, step), state)
        correction = 1 - 0.9**step
        for key, by_dim in new.blocks.roots.items():
            for dim, root in by_dim.items():
                factors = new.blocks.factors[key][dim] / correction
                exact = so.roots.inverse_root(so.roots.Eigh(), factors, 4).root
                old = state.blocks.roots[key][dim]
                for mine, wanted, before in zip(root, exact, old, strict=True):
                    if not np.array_equal(mine, before):
                        np.testing.assert_allclose(mine, wanted, rtol=1e-3, atol=1e-4)
        state = new


def test_large_matrices_are_solved_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from shampoo_optax.transforms import units

    wanted = {
        (flag, name): helpers.run(
            so.blockwise(make(so.Refresh(3, 2, staggered=flag)), so.BlockLayout(4)),
            LIKE,
            6,
        )[0]
        for flag in (False, True)
        for name, make in PARTS.items()
    }
    monkeypatch.setattr(units, "LARGE", 2)
    for (flag, name), one in wanted.items():
        tx = so.blockwise(
            PARTS[name](so.Refresh(3, 2, staggered=flag)), so.BlockLayout(4)
        )
        found = helpers.run(tx, LIKE, 6)[0]
        helpers.assert_close(found, one, rtol=1e-4, atol=1e-4)
