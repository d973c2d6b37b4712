"""How the compiled program grows with layers: 96 against 12.

The model has per layer 128x128, 128x512, 512x128 and a bias, in blocks of 64. The
optimizer's ``update`` is traced, lowered and compiled from shapes alone, nothing
runs. Three ways to write it:

- stacked: one array per kernel with the layers on its leading axis (a scanned
  model), named by ``so.BlockLayout(batch_axes=...)``;
- per layer: one array per kernel and layer;
- loop: the same maths as a Python loop over parameters and blocks (naive.py). It is
  compiled at few layers and reported per block, since it takes minutes at 96.

Lines are those of ``lowered.as_text()`` (StableHLO) and ``compiled.as_text()``
(optimised HLO). Seconds are of the clock, CPU seconds those of the process in all
its threads, both for trace, lower and compile together where not said otherwise.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import optax

import shampoo_optax as so
from benchmarks import common, naive, shapes

BLOCK, FREQUENCY = 64, 10
COLUMNS = (
    "program",
    "layers",
    "arrays",
    "state leaves",
    "of blocks",
    "StableHLO",
    "HLO",
    "trace s",
    "lower s",
    "compile s",
    "CPU s",
)


def optimizer(stacked: bool) -> optax.GradientTransformationExtraArgs:
    """Ours, with defaults but for the layout."""

    def batch_axes(path: str, shape: tuple[int, ...]) -> int:
        return 1

    layout = so.BlockLayout(BLOCK, batch_axes=batch_axes if stacked else None)
    return so.shampoo(1e-3, layout=layout, refresh=so.Refresh(FREQUENCY))


def block_leaves(state: Any) -> int | None:
    """Leaves of the state of preconditioned parameters; None where nobody knows."""
    parts = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, so.BlockwiseState))
    parts = [part for part in parts if isinstance(part, so.BlockwiseState)]
    if not parts:
        return None
    return sum(len(jax.tree.leaves(part.blocks)) for part in parts)


def measure(
    update: Callable[..., Any], state: Any, params: Any, layers: int
) -> dict[str, Any]:
    """Trace, lower and compile one update."""
    jax.clear_caches()
    cpu = time.process_time()
    clock = [time.perf_counter()]
    traced = jax.jit(update).trace(params, state, params)
    clock.append(time.perf_counter())
    lowered = traced.lower()
    clock.append(time.perf_counter())
    compiled = lowered.compile()
    clock.append(time.perf_counter())
    return {
        "layers": layers,
        "arrays": len(jax.tree.leaves(params)),
        "state_leaves": len(jax.tree.leaves(state)),
        "block_state_leaves": block_leaves(state),
        "stablehlo_lines": len(lowered.as_text().splitlines()),
        "hlo_lines": len(compiled.as_text().splitlines()),
        "trace_s": clock[1] - clock[0],
        "lower_s": clock[2] - clock[1],
        "compile_s": clock[3] - clock[2],
        "cpu_s": time.process_time() - cpu,
    }


def ours(layers: int, width: int, *, stacked: bool) -> dict[str, Any]:
    """Our update of a model of so many layers."""
    params = shapes.stack(layers, stacked=stacked, width=width)
    tx = optimizer(stacked)
    return measure(tx.update, jax.eval_shape(tx.init, params), params, layers)


def loop(layers: int, width: int) -> dict[str, Any]:
    """The loop's update, and how many blocks it visits."""
    params = jax.tree.leaves(shapes.stack(layers, stacked=False, width=width))
    state = jax.eval_shape(functools.partial(naive.init, size=BLOCK), params)
    update = functools.partial(naive.update, size=BLOCK, frequency=FREQUENCY)
    result = measure(update, state, params, layers)
    result["blocks"] = sum(len(naive.blocks_of(p.shape, BLOCK)) for p in params)
    return result


def ratios(results: dict[str, dict[str, Any]], few: int, many: int) -> dict[str, float]:
    """The figures that have a bar."""
    stacked = [results[f"stacked {n}"] for n in (few, many)]
    layered = [results[f"per layer {n}"] for n in (few, many)]
    extra = layered[1]["arrays"] - layered[0]["arrays"]
    naive_one = results["loop"]
    per_block = naive_one["hlo_lines"] / naive_one["blocks"]
    needed = per_block * naive_one["blocks"] / naive_one["layers"] * many

    def grown(pair: list[dict[str, Any]], key: str) -> float:
        return pair[1][key] / pair[0][key]

    return {
        "stacked: StableHLO lines, many / few": grown(stacked, "stablehlo_lines"),
        "stacked: HLO lines, many / few": grown(stacked, "hlo_lines"),
        "stacked: CPU seconds, many / few": grown(stacked, "cpu_s"),
        "per layer: HLO lines per extra array": (
            layered[1]["hlo_lines"] - layered[0]["hlo_lines"]
        )
        / extra,
        "per layer: StableHLO lines per extra array": (
            layered[1]["stablehlo_lines"] - layered[0]["stablehlo_lines"]
        )
        / extra,
        "per layer: CPU seconds, many / few": grown(layered, "cpu_s"),
        "per layer: block state leaves, many / few": grown(
            layered, "block_state_leaves"
        ),
        "loop: HLO lines per block": per_block,
        "loop: CPU seconds per block": naive_one["cpu_s"] / naive_one["blocks"],
        "per layer / loop, HLO lines (loop scaled to many)": layered[1]["hlo_lines"]
        / needed,
    }


BARS = {
    "stacked: StableHLO lines, many / few": 1.1,
    "per layer: HLO lines per extra array": 20.0,
    "per layer: block state leaves, many / few": 1.0,
    "per layer / loop, HLO lines (loop scaled to many)": 0.1,
}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.arguments(__doc__, "compile")
    parser.add_argument("--loop-layers", type=int, default=1)
    args = parser.parse_args(arguments)
    few, many, width = (2, 4, 64) if args.quick else (12, 96, 128)
    env = common.environment()
    print(common.heading(env))
    ours(1, 64, stacked=True)  # what JAX does once is nobody's cost
    results = {}
    for name, stacked in (("stacked", True), ("per layer", False)):
        for layers in (few, many):
            results[f"{name} {layers}"] = ours(layers, width, stacked=stacked)
    results["loop"] = loop(args.loop_layers, width)
    table = [[name.rsplit(" ", 1)[0], *_cells(r)] for name, r in results.items()]
    print("\n" + common.table(COLUMNS, table))
    figures = ratios(results, few, many)
    print(f"\nfew = {few} layers, many = {many}; the loop at {args.loop_layers}")
    lines = [[key, value, BARS.get(key)] for key, value in figures.items()]
    print(common.table(("ratio", "measured", "at most"), lines))
    out = {"environment": env, "programs": results, "ratios": figures, "bars": BARS}
    common.save(args, "compile", out)


def _cells(result: dict[str, Any]) -> list[Any]:
    return [value for key, value in result.items() if key != "blocks"]


if __name__ == "__main__":
    main()
