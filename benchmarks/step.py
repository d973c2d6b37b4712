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
  matrix product in this run (batched 256 x 256, or 1024 x 1024, the higher);
- refresh over eigh, on a CPU: what a refresh adds to a plain step, over the time of its
  float64 eigendecompositions alone, of the same factors in the same calls right after
  it; and what a refresh is made of, in CPU time of all threads, each piece timed with
  all before it (floor.py: the product V f(w) V^T, then prescale, symmetrisation and
  gate; the rest is taking blocks and putting them back);
- PyTorch's optimizers, where an interpreter has them (``--torch-python``, or the
  variable ``TORCH_PYTHON``): in processes of their own, in turn with ours, in units of
  PyTorch's AdamW. Their refresh is the slowest of ten steps. The first call of those
  is not an optimizer compiled anew, so it is measured once.

The machine is rarely quiet: only ratios within one run mean something. `make bench`
has glibc keep its memory between steps, for every optimizer alike; without that (`make
bench KEEP_MEMORY=`) the system takes a large program's arrays away after each step and
clears new ones in the next. Faults are the pages it had to bring in a plain step.
"""

from __future__ import annotations

import resource
import statistics
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import common, floor, optimizers, peers, shapes

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


class Runner:
    """One optimizer on one set of shapes, and what was measured of it."""

    base = "adamw"  # what it is measured by

    def __init__(self, name: str, tree: shapes.Tree) -> None:
        self.make = optimizers.known()[name]
        self.tree = tree
        self.first: list[float] = []
        self.plain: list[float] = []
        self.refresh: list[float] = []
        self.faults: list[int] = []
        # Elsewhere roots are not made by eigendecomposition.
        on_cpu = name == "shampoo" and jax.default_backend() == "cpu"
        self.floor = floor.RefreshFloor() if on_cpu else None

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
            self.first.append(self.once().clock)

    def once(self) -> floor.Seconds:
        """One step."""
        begin = floor.Seconds.now()
        self.params, self.state = self.step(self.params, self.state, self.gradient)
        jax.block_until_ready((self.params, self.state))
        self.count += 1
        return floor.Seconds.now() - begin

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
            self.plain += [each.clock for each in seconds[:-1]]
            self.refresh.append(seconds[-1].clock)
        if self.floor is not None and len(seconds) > 1:
            plain = map(statistics.median, zip(*seconds[:-1], strict=True))
            added = seconds[-1] - floor.Seconds(*plain)
            self.floor.measure(self.state, added, record=record)

    def result(self) -> dict[str, Any]:
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
            **(self.floor.result() if self.floor is not None else {}),
        }

    def close(self) -> None:
        """Let its arrays go."""
        del self.params, self.gradient, self.state


def measure(
    tree: shapes.Tree, names: list[str], rounds: int, torch: tuple[str, list[str]]
) -> dict[str, Any]:
    """All optimizers on one set of shapes; ``torch``: an interpreter, and its peers."""
    runners: dict[str, Runner | peers.TorchRunner] = {
        name: Runner(name, tree) for name in names
    }
    runners |= {name: peers.TorchRunner(name, tree, torch[0]) for name in torch[1]}
    for i in range(3):
        for name, runner in runners.items():
            common.say(f"first call, {i + 1} of 3: {name}")
            runner.first_call()
    products = floor.Products(tree, optimizers.BLOCK)
    for i in range(rounds + 2):
        for name, runner in runners.items():
            common.say(f"round {i + 1} of {rounds + 2}: {name}")
            runner.period(record=i >= 2)
        products.measure(times=optimizers.FREQUENCY - 1, record=i >= 2)
    found: dict[str, Any] = {}
    for name, runner in runners.items():
        found[name] = {"base": runner.base, **runner.result()}
        runner.close()
    return {"products_ms": products.milliseconds(), "optimizers": found}


def rows(results: dict[str, Any], floor_ms: float) -> list[list[Any]]:
    """The table of one set of shapes; only Shampoo has that floor."""
    table = []
    for name, r in results.items():
        if "failure" in r:
            continue
        base = results[r["base"]]
        floor = floor_ms if name == "shampoo" else None
        row: list[Any] = [name]
        for key, over_floor in (("plain", True), ("refresh", False), ("average", True)):
            value = r[f"{key}_ms"]
            row += [value, value / base["plain_ms"]]
            if over_floor:
                row.append(value / floor if floor else None)
        row += [r.get("faults"), r["first_s"], r["first_s"] / base["first_s"]]
        table.append([*row, r["state_bytes_per_parameter"]])
    return table


def notes(results: dict[str, Any]) -> list[str]:
    """What does not fit into the table."""
    lines = []
    for name, r in results.items():
        if "failure" in r:
            lines.append(f"{name}: left out: {r['failure'].splitlines()[0]}")
        if "refresh_over_eigh" in r:
            parts = [f"{k} {v:.1f}" for k, v in r["refresh_parts_cpu_ms"].items()]
            clock, cpu = r["refresh_over_eigh"], r["refresh_over_eigh_cpu"]
            lines.append(
                f"refresh over eigh: {clock:.2f}; in CPU time {cpu:.2f}, "
                f"of which ms: {', '.join(parts)}"
            )
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.arguments(__doc__, "step")
    parser.add_argument("--rounds", type=int, help="periods timed, default 8")
    parser.add_argument("--only", nargs="*", help="names of shape sets")
    parser.add_argument("--optimizers", nargs="*", help="adamw is always there")
    parser.add_argument("--torch-python", help="an interpreter with PyTorch's peers")
    args = parser.parse_args(arguments)
    names = list(optimizers.known())
    if args.quick:
        names = ["adamw", "shampoo"]
    if args.optimizers:
        names = [n for n in names if n == "adamw" or n in args.optimizers]
    python, others, versions = peers.available(args.torch_python)
    if args.quick or args.optimizers:
        others = [n for n in others if n in (peers.BASE, *(args.optimizers or ()))]
    env = common.environment()
    env["versions"] |= {k: v for k, v in versions.items() if v}
    print(common.heading(env))
    rates = floor.matmul_rates(args.quick)
    rate = max(rates.values())
    print("matmul, 1e9/s:", ", ".join(f"{k}: {v:.1f}" for k, v in rates.items()))
    out = {"environment": env, "matmul_rates": rates, "meta_times_adamw": META}
    rounds = args.rounds or (1 if args.quick else 8)
    for model, tree in models(args.quick).items():
        if args.only and model not in args.only:
            continue
        floor_ms = floor.operations(tree, optimizers.BLOCK) / rate / 1e6
        fit = [n for n in names if (model, n) not in TOO_SLOW]
        results = measure(tree, fit, rounds, (python, others))
        size = f"{shapes.number(tree) / 1e6:.2f}M parameters"
        print(
            f"\n{model}: {size}, floor {floor_ms:.2f} ms, Meta {META[model]:g} x adamw"
        )
        print(common.table(COLUMNS, rows(results["optimizers"], floor_ms)))
        alone = results["products_ms"]
        print(f"products alone: {alone:.2f} ms, {alone / floor_ms:.2f} x floor")
        print("\n".join(notes(results["optimizers"])), flush=True)
        out[model] = {"floor_ms": floor_ms, **results}
        common.save(args, "step", out)  # what there is, should it be stopped


if __name__ == "__main__":
    main()
