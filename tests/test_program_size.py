"""How large the program of a model is in which no two arrays are alike."""

from __future__ import annotations

import re
from typing import Any

import jax
import optax
import pytest

import shampoo_optax as so
from benchmarks import shapes


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
    assert names.count("_where") <= 1  # of scalars, in optax.safe_increment
    assert not {"_pad", "floor_divide"} & set(names)


def test_sides_of_many_shapes() -> None:
    params = shapes.varied()
    names, arrays = zip(*params.items(), strict=True)
    stacks = so.BlockLayout().plan(names, [x.shape for x in arrays]).stacks
    assert len({side for _, *sides in stacks.values() for side in sides}) <= 8
    filled = sum(n * rows * columns for n, rows, columns in stacks.values())
    assert filled <= 1.4 * shapes.number(params)
