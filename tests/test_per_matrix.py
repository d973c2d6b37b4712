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
@pytest.mark.parametrize("number", [1, 2, 3, 7, 10, 13, 21, 37])
@pytest.mark.parametrize("chunks", [False, True])
def test_each_matrix_is_alone(
    number: int, chunks: bool, threads: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(per_matrix, "PAIRED", 6)
    monkeypatch.setattr(per_matrix, "SMALL", 6 if chunks else 7)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
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
    wanted = min(number, 2)
    if chunks:
        wanted = {10: 10, 13: 13, 21: 11, 37: 19}.get(number, wanted)
    assert _calls(run, matrices, scale) == (wanted if threads == "1" else 1)


def test_none_at_all() -> None:
    found = per_matrix_on_cpu(_eigh, jnp.zeros((0, 6, 6)), jnp.zeros(0))
    assert {k: x.shape for k, x in found.items()} == {
        "values": (0, 6),
        "vectors": (0, 6, 6),
    }


@pytest.mark.parametrize("cores", [1, 2, 4, 96])
def test_few_are_done_twice(cores: int) -> None:
    for number in range(1, per_matrix.ENOUGH):
        assert per_matrix.chunk_size(number, 256, cores) == min(number, 2)
    for number in (*range(per_matrix.ENOUGH, 100), 199, 1000):
        chunk = per_matrix.chunk_size(number, 256, cores)
        # Enough are ready at once, so that XLA gives half of them to another thread.
        enough = 20 if cores >= 4 and number >= 20 else 10
        assert enough <= chunk <= number
        assert -number % chunk <= max(1, number / 15)


@pytest.mark.parametrize("number", [13, 37])
def test_varying_over_devices(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_matrix, "SMALL", 6)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    stacks = [jnp.concatenate([x, x]) for x in _stack(number)]
    spread = jax.jit(
        jax.shard_map(
            lambda a, b: per_matrix_on_cpu(_eigh, a, b),
            mesh=mesh,
            in_specs=jax.P("x"),
            out_specs=jax.P("x"),
        )
    )
    found, wanted = spread(*stacks), _eigh(*stacks)
    np.testing.assert_allclose(found["values"], wanted["values"], rtol=1e-5, atol=1e-6)


def _calls(run: Any, *arrays: jax.Array) -> int:
    """How many calls of LAPACK the program has, none of which may be of a batch."""
    program = run.lower(*arrays).compile().as_text()
    calls = re.findall(
        r"\(f32\[([0-9,]+)\].*custom_call_target=.lapack_ssyevd", program
    )
    assert set(calls) == {"6,6"}
    return len(calls)


def test_the_more_special_name_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_matrix, "PAIRED", 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "4")
    assert _calls(jax.jit(lambda a, b: per_matrix_on_cpu(_eigh, a, b)), *_stack(4)) == 1


@pytest.mark.parametrize("number", [4, 40])
def test_small_ones_come_one_by_one(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    run = jax.jit(lambda a, b: per_matrix_on_cpu(_eigh, a, b))
    assert _calls(run, *_stack(number)) == 1
