"""Golden trajectories of the reference system, step by step."""

from __future__ import annotations

import contextlib
import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from tests import helpers, reference
from tests.parity import build
from tests.vocabulary import configurations

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))


def _loaded(name: str) -> dict[str, np.ndarray]:
    """All arrays of a case: the file is closed here, not by chance in another test."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", CASES)
def test_golden_trajectory(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    data = _loaded(name)
    with jax.enable_x64(case["dtype"] == "float64"):
        worst = _worst_difference(case, data)
    assert worst <= case["tol"], f"{name}: {worst:.2e} > {case['tol']:.2e}"


def _worst_difference(case: dict, data: dict[str, np.ndarray]) -> float:
    names = list(case["params"])
    tx, evaluate = build(case)
    averaged = [key for key in data if key.startswith("eval")]
    assert (evaluate is None) == (not averaged)
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
        pairs = [(params[p], data[f"params/{p}"][t]) for p in names]
        if f"eval{t + 1}/{names[0]}" in averaged:
            shown = evaluate(state, params)
            pairs += [(shown[p], data[f"eval{t + 1}/{p}"]) for p in names]
        for found, wanted in pairs:
            worst = max(worst, float(np.abs(np.asarray(found) - wanted).max()))
    return worst


def _run(case: dict, init: dict, grads: dict) -> dict[str, np.ndarray]:
    tx, _ = build(case)

    # Each configuration is a program of its own, most of whose time was its compiling:
    # without optimisations and new emitters it takes a fifth, and the arithmetic is
    # that of float64 all the same.
    @functools.partial(jax.jit, compiler_options=PLAIN)
    def scan(params):
        def step(carry, grads):
            params, state = carry
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(step, (params, tx.init(params)), grads)[1]

    return jax.tree.map(np.asarray, scan(init))


@pytest.mark.parametrize("name", [c for c in CASES if "float32" not in c])
def test_reference_agrees_with_golden(name: str) -> None:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    data = _loaded(name)
    init = {p: data[f"init/{p}"].astype(float) for p in case["params"]}
    grads = {p: data[f"grad/{p}"].astype(float) for p in case["params"]}
    for p, found in reference.run(case, init, grads).items():
        np.testing.assert_allclose(found, data[f"params/{p}"], rtol=0, atol=1e-9)


PLAIN = helpers.known(
    {
        "xla_backend_optimization_level": 0,
        "xla_llvm_disable_expensive_passes": True,
        "xla_cpu_use_fusion_emitters": False,
    }
)


@contextlib.contextmanager
def _nothing_kept() -> Iterator[None]:
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, math.inf)
    try:
        yield
    finally:
        jax.config.update(name, before)


# In four parts, so that processes share them: 200 configurations in all.
@pytest.mark.parametrize("part", range(4))
def test_random_configurations(part: int) -> None:
    @hypothesis.seed(part)
    @hypothesis.settings(max_examples=50, deadline=None, database=None)
    @hypothesis.given(case=configurations(), seed=st.integers(0, 2**31))
    def agrees(case: dict, seed: int) -> None:
        _check_random(case, seed)

    agrees()


def _check_random(case: dict, seed: int) -> None:
    rng = np.random.default_rng(seed)
    shapes = case["params"].items()
    init = {p: rng.normal(size=shape) for p, shape in shapes}
    grads = {p: rng.normal(size=(case["steps"], *shape)) for p, shape in shapes}
    # Not kept in the folder of programs: one without optimisations that was read back
    # from there ended a process.
    with jax.enable_x64(True), _nothing_kept():
        found = _run(case, init, grads)
    for p, wanted in reference.run(case, init, grads).items():
        np.testing.assert_allclose(found[p], wanted, rtol=0, atol=1e-9, err_msg=p)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"no_such_key": 1}, "no_such_key"),
        ({"preconditioner": {"type": "no_such_type"}}, "no_such_type"),
        ({"preconditioner": {"type": "root_inv", "no_such": 1}}, "no_such"),
        ({"preconditioner": {"matrix_function": {"type": "nothing"}}}, "nothing"),
        ({"iterate_averaging": {"type": "no_average"}}, "no_average"),
        ({"grafting": {"type": "no_graft"}}, "no_graft"),
    ],
)
def test_what_is_outside_the_vocabulary_is_named(change: dict, word: str) -> None:
    with pytest.raises(NotImplementedError, match=word):
        build({"optimizer": {"lr": [0.1]} | change, "peak_lr": 0.1})


@pytest.mark.parametrize("kind", ["eigenvalue_corrected", "root_inv"])
def test_what_the_reference_refuses_is_refused(kind: str) -> None:
    stability = {"type": "pseudo_inverse"}
    function = {"type": "eigh_root", "rank_deficient_stability": stability}
    given = {"preconditioner": {"type": kind, "matrix_function": function}}
    with pytest.raises(ValueError, match="pseudo"):
        build({"optimizer": {"lr": [0.1], "epsilon": 1e-3} | given, "peak_lr": 0.1})
