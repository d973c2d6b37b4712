"""What an optimizer's step costs: times AdamW's, and times the arithmetic floor.

For each set of shapes every optimizer's ``update`` and ``apply_updates`` run as one
jitted function with donated parameters and state, on the same normal gradients.

- first call: trace, compile and one step, all JAX caches cleared before; the median
  of three in turn (one where it takes longer than 20 s);
- steps: rounds of one period (10 steps) of each optimizer in turn, each step timed on
  its own to ``block_until_ready``; medians over the rounds, apart for the steps with
  a refresh and those without; two rounds of warm-up;
- floor: what Shampoo must multiply, the Gram matrices and mode products of its
  blocks, 4 m n (m + n) operations for a block m x n, at the best rate of a float32
  matrix product in this run (batched 256 x 256, or 1024 x 1024, the higher).

The machine is rarely quiet: only ratios within one run mean something. `make bench`
has glibc keep its memory between steps, for every optimizer alike; without that (`make
bench KEEP_MEMORY=`) the system takes a large program's arrays away after each step and
clears new ones in the next. Faults are the pages it had to bring in a plain step.
"""

from __future__ import annotations

import functools
import resource
import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp

import shampoo_optax as so
from benchmarks import common, optimizers, shapes

# Plain steps in units of AdamW's, measured elsewhere on the same kind of machine.
META = {"mlp": 31.0, "convnet": 17.0, "transformer": 13.0, "small": 32.0}
COLUMNS = (
    "optimizer",
    "plain ms",
    "x adamw",
    "x floor",
    "refresh ms",
    "x adamw",
    "average ms",
    "x adamw",
    "x floor",
    "faults",
    "first s",
    "x adamw",
    "state B/param",
)


# Its program for 200 arrays was not compiled after three minutes and 4 GB.
TOO_SLOW = {("small", "psgdax kron")}


def models(quick: bool) -> dict[str, shapes.Tree]:
    """The sets of shapes, by name."""
    if quick:
        return {"small": shapes.small(2)}
    return {
        "mlp": shapes.mlp(),
        "convnet": shapes.convnet(),
        "transformer": shapes.transformer(),
        "small": shapes.small(),
    }


def matmul_rates(quick: bool) -> dict[str, float]:
    """Best rate of float32 matrix products, in 1e9 operations per second."""
    sizes = {"32 of 256x256": (32, 256), "1 of 1024x1024": (1, 1024)}
    rates = {}
    for name, (number, size) in sizes.items():
        matrices = jnp.ones((number, 32 if quick else size, 32 if quick else size))
        multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
        seconds = []
        for _ in range(3 if quick else 40):
            begin = time.perf_counter()
            multiply(matrices, matrices).block_until_ready()
            seconds.append(time.perf_counter() - begin)
        operations = 2 * number * matrices.shape[-1] ** 3
        rates[name] = operations / min(seconds) / 1e9
    return rates


def operations(tree: shapes.Tree, block: int) -> int:
    """What a step of Shampoo must multiply and add, see the top of the file."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    layout = so.BlockLayout(max_preconditioner_dim=block)
    plan = layout.plan(names, [leaf.shape for _, leaf in leaves])
    total = 0
    for number, *sides in plan.stacks.values():
        elements = number
        for side in sides:
            elements *= side
        total += 4 * elements * sum(sides)
    return total


class Runner:
    """One optimizer on one set of shapes, and what was measured of it."""

    def __init__(self, name: str, tree: shapes.Tree) -> None:
        self.make = optimizers.known()[name]
        self.tree = tree
        self.first: list[float] = []
        self.plain: list[float] = []
        self.refresh: list[float] = []
        self.faults: list[int] = []

    def first_call(self) -> None:
        """Start anew: a new function, new state, JAX's caches cleared."""
        if self.first and self.first[0] > 20.0:
            return
        jax.clear_caches()
        with optimizers.quiet():
            tx = self.make()
            self.params = shapes.random(self.tree, 0)
            self.gradient = shapes.random(self.tree, 1)
            # A copy: kron's init hands out the same arrays twice, which are donated.
            self.state = jax.tree.map(jnp.copy, tx.init(self.params))
            self.step = optimizers.step_of(tx)
            jax.block_until_ready((self.params, self.gradient, self.state))
            self.count = 0
            self.first.append(self.once())

    def once(self) -> float:
        """One step, in seconds."""
        begin = time.perf_counter()
        self.params, self.state = self.step(self.params, self.state, self.gradient)
        jax.block_until_ready((self.params, self.state))
        self.count += 1
        return time.perf_counter() - begin

    def period(self, *, record: bool) -> None:
        """The steps up to and including the next refresh."""
        seconds, faults = [], []
        while not seconds or self.count % optimizers.FREQUENCY:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            seconds.append(self.once())
            after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            faults.append(after - before)
        if record:
            self.faults += faults[:-1]
            self.plain += seconds[:-1]
            self.refresh.append(seconds[-1])

    def result(self) -> dict[str, float]:
        """Medians."""
        plain = 1e3 * statistics.median(self.plain)
        refresh = 1e3 * statistics.median(self.refresh)
        every = optimizers.FREQUENCY
        state = sum(leaf.nbytes for leaf in jax.tree.leaves(self.state))
        return {
            "plain_ms": plain,
            "refresh_ms": refresh,
            "average_ms": ((every - 1) * plain + refresh) / every,
            "faults": int(statistics.median(self.faults)),
            "first_s": statistics.median(self.first),
            "state_bytes_per_parameter": state / shapes.number(self.tree),
        }


def measure(tree: shapes.Tree, names: list[str], rounds: int) -> dict[str, Any]:
    """All optimizers on one set of shapes."""
    runners = {name: Runner(name, tree) for name in names}
    for _ in range(3):
        for runner in runners.values():
            runner.first_call()
    for i in range(rounds + 2):
        for runner in runners.values():
            runner.period(record=i >= 2)
    return {name: runner.result() for name, runner in runners.items()}


def rows(results: dict[str, Any], floor_ms: float) -> list[list[Any]]:
    """The table of one set of shapes; only Shampoo has that floor."""
    base = results["adamw"]
    table = []
    for name, r in results.items():
        floor = floor_ms if name == "shampoo" else None
        row: list[Any] = [name]
        for key, over_floor in (("plain", True), ("refresh", False), ("average", True)):
            value = r[f"{key}_ms"]
            row += [value, value / base["plain_ms"]]
            if over_floor:
                row.append(value / floor if floor else None)
        row += [r["faults"], r["first_s"], r["first_s"] / base["first_s"]]
        table.append([*row, r["state_bytes_per_parameter"]])
    return table


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.arguments(__doc__, "step")
    parser.add_argument("--rounds", type=int, help="periods timed, default 8")
    parser.add_argument("--only", nargs="*", help="names of shape sets")
    parser.add_argument("--optimizers", nargs="*", help="adamw is always there")
    args = parser.parse_args(arguments)
    names = list(optimizers.known())
    if args.quick:
        names = ["adamw", "shampoo"]
    if args.optimizers:
        names = [n for n in names if n == "adamw" or n in args.optimizers]
    env = common.environment()
    print(common.heading(env))
    rates = matmul_rates(args.quick)
    rate = max(rates.values())
    print("matmul, 1e9/s:", ", ".join(f"{k}: {v:.1f}" for k, v in rates.items()))
    out = {"environment": env, "matmul_rates": rates, "meta_times_adamw": META}
    rounds = args.rounds or (1 if args.quick else 8)
    for model, tree in models(args.quick).items():
        if args.only and model not in args.only:
            continue
        floor = operations(tree, optimizers.BLOCK) / rate / 1e6
        results = measure(
            tree, [n for n in names if (model, n) not in TOO_SLOW], rounds
        )
        size = f"{shapes.number(tree) / 1e6:.2f}M parameters"
        print(f"\n{model}: {size}, floor {floor:.2f} ms, Meta {META[model]:g} x adamw")
        print(common.table(COLUMNS, rows(results, floor)), flush=True)
        out[model] = {"floor_ms": floor, "optimizers": results}
    common.save(args, "step", out)


if __name__ == "__main__":
    main()
