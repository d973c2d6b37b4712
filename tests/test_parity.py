"""Golden trajectories of the reference system, step by step."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from tests.parity import build

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
