"""What our checkpoints cost beyond Orbax's own, at about a gigabyte of state.

The same parameters and state, three ways:

    orbax  plain Orbax, the raw trees: few large arrays, which no other mesh opens
    view   plain Orbax, the arrays of the parameter view, made beforehand
    ours   shampoo_optax.checkpoint: verified by digests, opened by any mesh

``elsewhere`` is a restore for which every block has to be moved, as on another mesh.
Every save and every restore is measured in processes of their own, the ways in turn.
Seconds are the median of warm calls, with the disk's cache warm, ``cpu`` what all
threads were busy in them, ``first`` the first call of a process. Memory is the peak of
a process's resident pages in its first call beyond what it had before it, as the kernel
counts it, in parts of parameters and state. A restore holds what it read: Orbax's own
is at least 1.
"""

from __future__ import annotations

import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
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

LAYERS, WIDTH, ROUNDS, CALLS = 12, 512, 3, 3
HOW = ("orbax", "view", "ours")
WHAT = ("save", "restore", "elsewhere")
FIGURES = ("seconds", "cpu", "first", "memory")


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


class Way:
    """One way to save and to restore."""

    def __init__(self, how: str, layers: int, width: int) -> None:
        """Make what is saved."""
        self.ours = how == "ours"
        self.params, self.state, self.tx, self.layout = trees(layers, width)
        self.made = {"params": self.params, "state": self.state}
        self.bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(self.made))
        if how == "view":
            view = checkpoint.to_param_view(self.state, self.params, self.layout)
            self.made["state"] = view
            self.state = None  # the view's arrays are others
        jax.block_until_ready(self.made)

    def save(self, manager: ocp.CheckpointManager, step: int) -> None:
        """To the end."""
        if self.ours:
            checkpoint.save(manager, step, self.params, self.state, self.layout)
        else:
            args = {k: ocp.args.StandardSave(tree) for k, tree in self.made.items()}
            manager.save(step, args=ocp.args.Composite(**args))
        manager.wait_until_finished()

    def elsewhere(self, manager: ocp.CheckpointManager, step: int) -> Any:
        """The arrays, which do not lie as they are wanted."""
        # Who asks for other blocks gets blocks one by one, these here as they are.
        return self.restore(manager, step, reblock=self.tx)

    def restore(self, manager: ocp.CheckpointManager, step: int, **how: Any) -> Any:
        """The arrays, when they are there."""
        if self.ours:
            shapes = jax.eval_shape(self.tx.init, self.params)
            found: Any = checkpoint.restore(
                manager, self.params, shapes, self.layout, step=step, **how
            )[1:3]
        else:
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, self.made)
            args = {k: ocp.args.StandardRestore(tree) for k, tree in like.items()}
            found = manager.restore(step, args=ocp.args.Composite(**args))
            found = dict(found.items())
        return jax.block_until_ready(found)


def resident(field: str) -> int:
    """Bytes of this process's memory, by a field of Linux's ``/proc``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def peak(call: Callable[[], Any]) -> int:
    """What a call takes at most, beyond what the process holds before it."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    kept = call()
    found = resident("VmHWM") - before
    del kept
    return found


def run(how: str, what: str, folder: Path, size: tuple[int, ...]) -> dict[str, Any]:
    """One way to save or to restore, in this process."""
    layers, width, _, calls = size
    way = Way(how, layers, width)
    with checkpoint.manager(folder, max_to_keep=1) as manager:
        last = manager.latest_step() or 0
        seconds: list[float] = []
        cpu: list[float] = []

        def once() -> Any:
            start, busy = time.perf_counter(), time.process_time()
            step = last + len(seconds) + 1 if what == "save" else last
            made = getattr(way, what)(manager, step)
            seconds.append(time.perf_counter() - start)
            cpu.append(time.process_time() - busy)
            return made

        memory = peak(once)
        for _ in range(calls):
            once()
    return {
        "bytes": way.bytes,
        "arrays": len(jax.tree.leaves(way.made)),
        "first": seconds[0],
        "seconds": statistics.median(seconds[1:]),
        "cpu": statistics.median(cpu[1:]),
        "memory": memory / way.bytes,
    }


def measured(quick: bool, size: tuple[int, ...]) -> dict[str, Any]:
    """Medians over the rounds: by save and restore, by way, by figure."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(size[2]):
            for what, how in itertools.product(WHAT, HOW):
                if what != "elsewhere" or how == "ours":
                    command = [sys.executable, "-m", "benchmarks.checkpoints"]
                    command += ["--run", how, what, f"{folder}/{how}"]
                    command += ["--quick"] if quick else []
                    done = subprocess.run(
                        command, check=True, capture_output=True, text=True
                    )
                    said = json.loads(done.stdout.splitlines()[-1])
                    found.setdefault(what, {}).setdefault(how, []).append(said)
    return {
        what: {
            how: {k: statistics.median(said[k] for said in rounds) for k in rounds[0]}
            for how, rounds in by_how.items()
        }
        for what, by_how in found.items()
    }


def main(arguments: list[str] | None = None) -> None:
    """Measures all, each in a process of its own, and prints."""
    parser = common.arguments(__doc__, "checkpoints")
    parser.add_argument(
        "--run",
        nargs=3,
        metavar=("HOW", "WHAT", "FOLDER"),
        help="measure one, in this process",
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of all ways")
    args = parser.parse_args(arguments)
    size = (2, 32, 1, 1) if args.quick else (LAYERS, WIDTH, args.rounds, CALLS)
    if args.run:
        how, what, folder = args.run
        print(json.dumps(run(how, what, Path(folder), size)))  # for the one above
        return
    found = measured(args.quick, size)
    env = common.environment()
    console = Console()
    console.print(common.heading(env), soft_wrap=True)
    size_said = f"{found['save']['ours']['bytes'] / 1e9:.2f} GB"
    table = Table("", *HOW, "of orbax", "of view", title=size_said)
    for what, by_how in found.items():
        by_how = {**found["restore"], **by_how}  # elsewhere beside Orbax's one way
        for figure in FIGURES:
            each = [by_how[how][figure] for how in HOW]
            cells = [f"{value:.2f}" for value in each]
            ratios = [f"{each[-1] / other:.2f}" for other in each[:-1]]
            table.add_row(f"{what} {figure}", *cells, *ratios)
    console.print(table)
    path = args.out
    if path is None and not args.quick:
        path = common.RESULTS / env["platform"] / "checkpoints.json"
    if path is not None:
        path.write_text(json.dumps({"environment": env, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
