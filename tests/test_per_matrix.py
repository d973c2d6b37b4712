"""LAPACK two by two: the same numbers, no batch, and only where it has one thread."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shampoo_optax.linalg import per_matrix
from shampoo_optax.linalg.per_matrix import per_matrix_on_cpu

NAMES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")


def _eigh(matrices: jax.Array, scale: jax.Array) -> dict[str, jax.Array]:
    values, vectors = jnp.linalg.eigh(matrices)
    return {"values": scale[..., None] * values, "vectors": vectors}


def _stack(number: int) -> tuple[jax.Array, jax.Array]:
    x = np.random.default_rng(number).normal(size=(number, 6, 6))
    return jnp.asarray(x @ np.swapaxes(x, 1, 2), "f"), jnp.arange(1.0, number + 1)


@pytest.mark.parametrize("threads", ["1", "2", None])
@pytest.mark.parametrize("number", [1, 2, 3, 6, 7])
def test_each_matrix_is_alone(
    number: int, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_matrix, "LARGE", 6)
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    if threads is not None:
        monkeypatch.setenv(NAMES[1], threads)
    matrices, scale = _stack(number)
    run = jax.jit(lambda a, b: per_matrix_on_cpu(_eigh, a, b))
    found = run(matrices, scale)
    alone = [_eigh(matrices[i], scale[i]) for i in range(number)]
    for name, wanted in _eigh(matrices, scale).items():
        assert found[name].shape == wanted.shape
        one_by_one = jnp.stack([each[name] for each in alone])
        np.testing.assert_allclose(found[name], one_by_one, rtol=1e-6, atol=1e-6)
    by_two = threads == "1" and number > 1
    assert _calls(run, matrices, scale) == (2 + number % 2 if by_two else 1)


def _calls(run: Any, *arrays: jax.Array) -> int:
    """How many calls of LAPACK the program has, none of which may be of a batch."""
    program = run.lower(*arrays).compile().as_text()
    calls = re.findall(
        r"\(f32\[([0-9,]+)\].*custom_call_target=.lapack_ssyevd", program
    )
    assert set(calls) == {"6,6"}
    return len(calls)


def test_the_more_special_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_matrix, "LARGE", 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    assert _calls(jax.jit(lambda a, b: per_matrix_on_cpu(_eigh, a, b)), *_stack(4)) == 1


def test_small_ones_come_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    assert _calls(jax.jit(lambda a, b: per_matrix_on_cpu(_eigh, a, b)), *_stack(4)) == 1
