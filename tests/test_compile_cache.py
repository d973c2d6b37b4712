"""With JAX's compilation cache a second process start compiles nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROGRAM = """
import collections, sys
import jax, jax.numpy as jnp, optax
import shampoo_optax as so

events = collections.Counter()
jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
make = {"shampoo": so.shampoo, "soap": so.soap}[sys.argv[1]]
params = {"w": jnp.ones((12, 8)), "v": jnp.ones((6, 20)), "b": jnp.ones(5)}
tx = make(1e-3, layout=so.BlockLayout(8), refresh=so.Refresh(2, staggered=True))

@jax.jit
def step(gradients, state, params):
    updates, state = tx.update(gradients, state, params)
    return optax.apply_updates(params, updates), state

state = jax.jit(tx.init)(params)
for _ in range(3):
    params, state = step(params, state, params)
print(*(events[f"/jax/compilation_cache/cache_{kind}"] for kind in ("hits", "misses")))
"""


@pytest.mark.parametrize("alias", ["shampoo", "soap"])
def test_a_second_process_compiles_nothing(alias: str, tmp_path: Path) -> None:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    found = []
    for seed in ("1", "2"):  # names and sets in another order
        run = subprocess.run(
            [sys.executable, "-c", PROGRAM, alias],
            cwd=ROOT,
            env=environment | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stderr[-2000:]
        found.append([int(number) for number in run.stdout.split()[-2:]])
    (hits, misses), (hits_again, misses_again) = found
    assert misses > 0 and misses_again == 0
    assert hits_again == hits + misses
