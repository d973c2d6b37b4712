"""Step times with all roots refreshed together, and a share of them at every step.

Eight CPU devices hold 160 blocks of 128 in ZeRO-1; roots come due every ten steps. Each
of the ten phases is timed over several periods, by its median: the worst phase over the
median one is what a pod would wait for.
"""

from __future__ import annotations

import os
import statistics
import sys
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp

import shampoo_optax as so
from benchmarks import common

FREQUENCY, PERIODS, BLOCK, BLOCKS = 10, 7, 128, 160


def phases(refresh: so.Refresh, block: int, blocks: int, periods: int) -> list[float]:
    """Median seconds of each step of a period."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    layout = so.BlockLayout(block, mesh=mesh, block_axes=("data",))
    tx = so.scale_by_shampoo(layout=layout, refresh=refresh)
    params = {"w": jnp.zeros((block * 8, block * blocks // 8))}
    state = jax.jit(tx.init, out_shardings=so.state_shardings(tx, params, layout))(
        params
    )
    gradient = {"w": jax.random.normal(jax.random.key(0), params["w"].shape)}
    step = jax.jit(tx.update, donate_argnums=1)
    times: list[list[float]] = [[] for _ in range(FREQUENCY)]
    # The first two periods hold the compilation and the refresh of everything.
    for t in range((periods + 2) * FREQUENCY):
        start = time.perf_counter()
        _, state = step(gradient, state)
        jax.block_until_ready(state)
        if t >= 2 * FREQUENCY:
            times[t % FREQUENCY].append(time.perf_counter() - start)
    return [statistics.median(phase) for phase in times]


def main(argv: list[str] | None = None) -> int:
    """Measure both schedules, print the table, write the JSON."""
    args = common.arguments(__doc__ or "", "staggered").parse_args(argv)
    block, blocks, periods = (16, 16, 2) if args.quick else (BLOCK, BLOCKS, PERIODS)
    results, rows = {}, []
    for name, flag in (("together", False), ("staggered", True)):
        found = phases(so.Refresh(FREQUENCY, staggered=flag), block, blocks, periods)
        middle = statistics.median(found)
        results[name] = {
            "phase_ms": [1e3 * x for x in found],
            "worst_over_median": max(found) / middle,
        }
        mean = 1e3 * statistics.mean(found)
        rows.append([name, 1e3 * middle, 1e3 * max(found), max(found) / middle, mean])
    env = common.environment()
    print(common.heading(env))
    print(
        common.table(
            ["refresh", "median ms", "worst ms", "worst / median", "mean ms"], rows
        )
    )
    common.save(args, "staggered", {"environment": env, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(main())
