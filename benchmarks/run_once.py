"""A run compiles once and never talks to the host: 1,000 steps, counted.

A small model with matrices, a convolution and biases trains for 1,000 jitted steps
with donated buffers. Counted are the programs that XLA built in that time, as JAX's
own monitoring reports them, and the entries of the jitted function's cache.
All steps run under ``jax.transfer_guard("disallow")``, which raises at any implicit
copy between host and device. (On CPU JAX may alias in place of copying, which the
guard does not see; on an accelerator it sees all.) Inside the program there is no
host either: the optimised HLO has no infeed, outfeed, send or callback.
"""

from __future__ import annotations

import re
import time
from typing import Any

import jax

from benchmarks import common, optimizers, shapes

COMPILED = "/jax/core/compile/backend_compile_duration"
HOST = re.compile(r"infeed|outfeed|\bsend\(|\brecv\(|callback|host-transfer", re.I)


def host_calls(hlo: str) -> list[str]:
    """Instructions of a program that talk to the host."""
    instructions = [line for line in hlo.splitlines() if " = " in line]
    # Metadata names source functions, which may be called anything.
    bare = [line.split(", metadata=")[0] for line in instructions]
    return [line.strip() for line in bare if HOST.search(line)]


class Compilations:
    """Counts what XLA builds from now on."""

    def __init__(self) -> None:
        self.number = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def _heard(self, event: str, duration: float, **_: Any) -> None:
        del duration
        self.number += event == COMPILED


def run(name: str, steps: int) -> dict[str, Any]:
    """Train with one optimizer."""
    with optimizers.quiet():
        tree = {"mlp": shapes.mlp(32), "convnet": shapes.convnet((8, 16), 1)}
        tx = optimizers.known()[name]()
        params, gradient = shapes.random(tree, 0), shapes.random(tree, 1)
        state = jax.block_until_ready(tx.init(params))
        step = optimizers.step_of(tx)
        counter = Compilations()
        begin = time.perf_counter()
        with jax.transfer_guard("disallow"):
            for _ in range(steps):
                params, state = step(params, state, gradient)
            jax.block_until_ready((params, state))
        seconds = time.perf_counter() - begin
        built = counter.number
        hlo = step.lower(params, state, gradient).compile().as_text()
    finite = all(bool((x == x).all()) for x in jax.tree.leaves(params))
    return {
        "steps": steps,
        "compilations": built,
        "cache_entries": step._cache_size(),
        "host_calls_in_hlo": len(host_calls(hlo)),
        "finite": finite,
        "seconds": seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """Run, print, write; fails where something was compiled again."""
    parser = common.arguments(__doc__, "run_once")
    args = parser.parse_args(arguments)
    env = common.environment()
    print(common.heading(env) + "\n")
    names = ["adamw", "shampoo"]
    results = {name: run(name, 30 if args.quick else 1000) for name in names}
    headers = ["optimizer", *results["shampoo"]]
    print(common.table(headers, [[k, *r.values()] for k, r in results.items()]))
    common.save(args, "run_once", {"environment": env, "optimizers": results})
    ours = results["shampoo"]
    if (ours["compilations"], ours["host_calls_in_hlo"]) != (1, 0):
        raise SystemExit("shampoo compiled more than once, or called the host")


if __name__ == "__main__":
    main()
