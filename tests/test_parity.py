"""Golden trajectories of the reference system, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from tests import reference
from tests.parity import build
from tests.vocabulary import configurations

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    data = np.load(GOLDEN / f"{name}.npz")
    with jax.enable_x64(case["dtype"] == "float64"):
        worst = _worst_difference(case, data)
    assert worst <= case["tol"], f"{name}: {worst:.2e} > {case['tol']:.2e}"


def _worst_difference(case: dict, data: np.lib.npyio.NpzFile) -> float:
    names = list(case["params"])
    tx, _ = build(case)
    params = {p: jax.numpy.asarray(data[f"init/{p}"], case["dtype"]) for p in names}
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    worst = 0.0
    for t in range(case["steps"]):
        grads = {p: data[f"grad/{p}"][t].astype(case["dtype"]) for p in names}
        params, state = step(params, state, grads)
        for p in names:
            difference = np.abs(np.asarray(params[p]) - data[f"params/{p}"][t])
            worst = max(worst, float(difference.max()))
    return worst


def _run(case: dict, init: dict, grads: dict) -> dict[str, np.ndarray]:
    tx, _ = build(case)
    params = {name: jax.numpy.asarray(value) for name, value in init.items()}
    state = tx.init(params)

    @jax.jit
    def scan(params, state):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, state), grads)[1]

    return jax.tree.map(np.asarray, scan(params, state))


@pytest.mark.parametrize("name", ["o05_graft_adam_blocks", "o12_coupled_newton"])
def test_reference_agrees_with_golden(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    data = np.load(GOLDEN / f"{name}.npz")
    init = {p: data[f"init/{p}"].astype(float) for p in case["params"]}
    grads = {p: data[f"grad/{p}"].astype(float) for p in case["params"]}
    for p, found in reference.run(case, init, grads).items():
        np.testing.assert_allclose(found, data[f"params/{p}"], rtol=0, atol=1e-9)


@hypothesis.given(case=configurations(), seed=st.integers(0, 2**31))
@hypothesis.settings(max_examples=25, deadline=None, derandomize=True)
def test_random_configuration(case: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = case["params"].items()
    init = {p: rng.normal(size=shape) for p, shape in shapes}
    grads = {p: rng.normal(size=(case["steps"], *shape)) for p, shape in shapes}
    with jax.enable_x64(True):
        found = _run(case, init, grads)
    for p, wanted in reference.run(case, init, grads).items():
        np.testing.assert_allclose(found[p], wanted, rtol=0, atol=1e-9, err_msg=p)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"preconditioner": {"type": "eigenvalue_corrected"}}, "eigenvalue_corrected"),
        ({"preconditioner": {"type": "root_inv_kl"}}, "root_inv_kl"),
        (
            {"preconditioner": {"type": "root_inv", "use_trace_scaling": True}},
            "use_trace_scaling",
        ),
        (
            {
                "preconditioner": {
                    "type": "eigendecomposed",
                    "matrix_function": {"type": "qr"},
                }
            },
            "qr",
        ),
        ({"iterate_averaging": {"type": "schedule_free"}}, "schedule_free"),
        ({"no_such_key": 1}, "no_such_key"),
    ],
)
def test_what_is_not_built_is_named(change: dict, word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        build({"optimizer": {"lr": [0.1]} | change, "peak_lr": 0.1})
