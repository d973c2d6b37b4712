"""How large the program of a model is in which no two arrays are alike."""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shampoo_optax as so
from benchmarks import shapes
from shampoo_optax.linalg import scaling
from shampoo_optax.linalg.masks import all_finite


def _program(tx: Any) -> str:
    """One step on 200 arrays of 198 shapes, lowered and not compiled."""
    params = shapes.varied()

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    return jax.jit(step).lower(params, state, params).as_text()


@pytest.fixture(scope="module")
def adamw() -> int:
    """Bytes of AdamW's program."""
    return len(_program(optax.adamw(1e-3)))


@pytest.mark.parametrize(
    ("alias", "most"), [(so.shampoo, 1.1), (so.soap, 1.4)], ids=["shampoo", "soap"]
)
def test_no_two_arrays_alike(alias: Any, most: float, adamw: int) -> None:
    program = _program(alias(1e-3))
    assert len(program) <= most * adamw
    assert len(re.findall("@lapack", program)) <= 8  # one for every size of a factor


def test_no_function_for_every_shape() -> None:
    """What jnp makes a function of its own in a program, once for every shape."""
    names = re.findall(r"func private @(\w+?)(?:_\d+)?\(", _program(so.shampoo(1e-3)))
    assert names.count("_where") <= 2  # of scalars, of two dtypes
    assert not {"_pad", "floor_divide"} & set(names)


@pytest.mark.parametrize("side", [1, 8, 33, 56, 128])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_flags_of_entries(side: int, bad: float) -> None:
    """XLA's maximum does not see every NaN on a CPU, and a sum overflows."""
    rng = np.random.default_rng(0)
    matrices = rng.standard_normal((24, side, side)).astype(np.float32)
    for i in range(16):  # one entry, then several, then all of them
        matrices[i, rng.integers(side), rng.integers(side)] = bad
        if i % 4 == 1:
            matrices[i, rng.integers(side), rng.integers(side)] = np.inf
        if i % 4 == 2:
            matrices[i] = bad
    wanted = np.isfinite(matrices).all((1, 2))
    flags = jax.jit(lambda x: (all_finite(x, (1, 2)), scaling.prescale(x).usable))
    for found in flags(matrices):
        np.testing.assert_array_equal(found, wanted)


def test_sides_of_many_shapes() -> None:
    params = shapes.varied()
    names, arrays = zip(*params.items(), strict=True)
    stacks = so.BlockLayout().plan(names, [x.shape for x in arrays]).stacks
    assert len({side for _, *sides in stacks.values() for side in sides}) <= 8
    filled = sum(n * rows * columns for n, rows, columns in stacks.values())
    assert filled <= 1.4 * shapes.number(params)
