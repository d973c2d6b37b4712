"""What our checkpoints cost beyond Orbax's own, at about a gigabyte of state.

The same parameters and state, saved and restored by plain Orbax (the raw trees) and by
shampoo_optax.checkpoint (view, digests, verified), in turn, each in processes of its
own for the memory. Seconds are the median of some rounds; the disk's cache is warm.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from rich.console import Console
from rich.table import Table

import shampoo_optax as so
from benchmarks import common
from shampoo_optax import checkpoint

LAYERS, WIDTH, ROUNDS = 12, 512, 5
HOW = ("orbax", "ours")


def trees(layers: int, width: int) -> tuple[Any, Any, Any, Any]:
    """A model of per-layer arrays, with a state that is not all zeros."""
    shapes = {"q": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        f"layer{i}": {
            name: jax.random.normal(jax.random.key(i), shape)
            for name, shape in shapes.items()
        }
        for i in range(layers)
    }
    layout = so.BlockLayout(width)
    tx = so.shampoo(1e-3, layout=layout)
    key = jax.random.key(0)

    def filled(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim else leaf

    state = jax.tree.map(
        lambda x: filled(x) if x.dtype == jnp.float32 else x, tx.init(params)
    )
    return params, state, tx, layout


def once(how: str, folder: Path, made: tuple[Any, Any, Any, Any]) -> dict[str, float]:
    """Seconds of one save to its end, and of one restore."""
    params, state, tx, layout = made
    with checkpoint.manager(folder) as manager:
        start = time.perf_counter()
        if how == "ours":
            checkpoint.save(manager, 1, params, state, layout)
        else:
            save = ocp.args.StandardSave
            args = ocp.args.Composite(params=save(params), state=save(state))
            manager.save(1, args=args)
        manager.wait_until_finished()
        saved = time.perf_counter()
        if how == "ours":
            shapes = jax.eval_shape(tx.init, params)
            found = checkpoint.restore(manager, params, shapes, layout)
            jax.block_until_ready((found.params, found.state))
        else:
            target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (params, state))
            load = ocp.args.StandardRestore
            args = ocp.args.Composite(params=load(target[0]), state=load(target[1]))
            found = manager.restore(1, args=args)
            jax.block_until_ready((found["params"], found["state"]))
        return {"save": saved - start, "restore": time.perf_counter() - saved}


def run(how: str, layers: int, width: int, rounds: int) -> dict[str, Any]:
    """Rounds of one way, in this process."""
    made = trees(layers, width)
    jax.block_until_ready(made[:2])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            times.append(once(how, Path(folder) / "run", made))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(made[:2]))
    return {
        "bytes": size,
        "first_save": times[0]["save"],
        "first_restore": times[0]["restore"],
        "save": statistics.median(t["save"] for t in times[1:]),
        "restore": statistics.median(t["restore"] for t in times[1:]),
        "peak_over_state": (peak - before) * 1024 / size,
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures both, each in a process of its own, and prints."""
    parser = common.arguments(__doc__, "checkpoints")
    parser.add_argument("--how", choices=HOW, help="measure one, in this process")
    args = parser.parse_args(arguments)
    size = (2, 32, 1) if args.quick else (LAYERS, WIDTH, ROUNDS)
    if args.how:
        print(json.dumps(run(args.how, *size)))  # for the process above
        return
    found = {}
    for how in HOW:
        flags = ["--quick"] if args.quick else []
        command = [sys.executable, "-m", "benchmarks.checkpoints", "--how", how, *flags]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found[how] = json.loads(done.stdout.splitlines()[-1])
    env = common.environment()
    console = Console()
    console.print(common.heading(env), soft_wrap=True)
    title = f"{found['ours']['bytes'] / 1e9:.2f} GB of parameters and state"
    table = Table("", *HOW, "ours over Orbax's", title=title)
    for name in ("save", "restore", "first_save", "first_restore", "peak_over_state"):
        each = [found[how][name] for how in HOW]
        cells = [f"{value:.2f}" for value in each]
        table.add_row(name, *cells, f"{each[1] / each[0]:.2f}")
    console.print(table)
    path = args.out
    if path is None and not args.quick:
        path = common.RESULTS / env["platform"] / "checkpoints.json"
    if path is not None:
        path.write_text(json.dumps({"environment": env, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
