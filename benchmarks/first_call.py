"""The first call where no two arrays are alike: 200 arrays, 132 different sides.

Trace, lower and compile one step (`update` and `apply_updates`), all of JAX's caches
cleared before; optimizers in turn, medians of the rounds.
"""

from __future__ import annotations

import statistics
import sys
import time
from typing import Any

import jax
import optax

import shampoo_optax as so
from benchmarks import common, shapes

OPTIMIZERS: dict[str, Any] = {
    "adamw": lambda: optax.adamw(1e-3),
    "shampoo": lambda: so.shampoo(1e-3),
    "soap": lambda: so.soap(1e-3),
}


def first_call(tx: Any, params: Any) -> tuple[float, float]:
    """Seconds until there is a compiled program, and megabytes of StableHLO."""
    jax.clear_caches()
    begin = time.perf_counter()
    state = jax.eval_shape(tx.init, params)

    def step(gradients: Any, state: Any, params: Any) -> Any:
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params)
    traced = time.perf_counter() - begin
    size = len(lowered.as_text()) / 1e6
    begin = time.perf_counter()
    lowered.compile()
    return traced + time.perf_counter() - begin, size


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON."""
    parser = common.arguments(__doc__ or "", "first_call")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args(argv)
    params = shapes.varied(*((6, 4) if args.quick else ()))
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in OPTIMIZERS}
    for _ in range(1 if args.quick else args.rounds):
        for name, make in OPTIMIZERS.items():
            found[name].append(first_call(make(), params))
    results = {
        name: {"seconds": statistics.median(s for s, _ in runs), "MB": runs[0][1]}
        for name, runs in found.items()
    }
    base = results["adamw"]["seconds"]
    rows = [[k, r["seconds"], r["seconds"] / base, r["MB"]] for k, r in results.items()]
    env = common.environment()
    print(common.heading(env))
    print(common.table(["optimizer", "first call s", "x adamw", "StableHLO MB"], rows))
    common.save(args, "first_call", {"environment": env, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
