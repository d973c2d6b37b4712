"""What every process of test_processes runs: one program over the devices of all.

python -m tests.processes SCENARIO PORT PROCESS FOLDER
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.layout.placement import sharding
from tests import helpers

PROCESSES, DEVICES = 2, 4  # of each process
BLOCK = 8
SPECS = {
    "rows": P("fsdp"),
    "columns": P(None, "fsdp"),
    "whole": P("fsdp"),
    "kept": P(),
    "bias": P("fsdp"),
}
# Blocks lie across devices in the first two (and across processes in "columns"), on
# one device each in the third, everywhere in the fourth, and the last has none.
FSDP = {
    "rows": (16, 12),
    "columns": (12, 16),
    "whole": (64, 8),
    "kept": (12, 12),
    "bias": (16,),
}
FAILING = {"rows": (16, 8), "whole": (64, 8)}
SICK = slice(48, 56)  # rows of "whole": a block of device 6, of the second process
HEALS = 5  # the step from which its gradient is like the others
Arrays = dict[str, np.ndarray]


def fsdp(mesh: Mesh | None) -> tuple[optax.GradientTransformation, so.BlockLayout]:
    """Shampoo on parameters that are spread over all devices; None for one device."""
    layout = _layout(mesh)
    return so.shampoo(1e-2, layout=layout, refresh=so.Refresh(5)), layout


def failing(mesh: Mesh | None) -> tuple[optax.GradientTransformation, so.BlockLayout]:
    """The same with roots that give up early: at a condition of a million."""
    layout = _layout(mesh)
    root = so.roots.CoupledNewton(max_iterations=15, max_residual=1e-3)
    tx = so.shampoo(1e-2, b2=0.5, layout=layout, refresh=so.Refresh(2), root=root)
    return tx, layout


def _layout(mesh: Mesh | None) -> so.BlockLayout:
    if mesh is None:
        return so.BlockLayout(BLOCK)
    return so.BlockLayout(BLOCK, mesh=mesh, block_axes=("fsdp",), param_specs=SPECS)


def fsdp_gradients() -> list[Arrays]:
    like = {name: np.zeros(shape, np.float32) for name, shape in FSDP.items()}
    return [jax.tree.map(np.asarray, helpers.gradients(like, i)) for i in range(6)]


def failing_gradients(sick: bool) -> list[Arrays]:
    """Orthogonal blocks, whose factors are the identity; not so the sick one."""
    steps = []
    for step in range(6):
        rng = np.random.default_rng(step)
        gradients = {
            name: np.concatenate(
                [
                    np.linalg.qr(rng.normal(size=(BLOCK, BLOCK)))[0]
                    for _ in range(rows // BLOCK)
                ]
            ).astype(np.float32)
            for name, (rows, _) in FAILING.items()
        }
        if sick and step + 1 < HEALS:
            gradients["whole"][SICK] = 1 / np.sqrt(BLOCK)  # as long, of rank one
        steps.append(gradients)
    return steps


class Run:
    """Steps of one optimizer on one device, or on all of all processes."""

    def __init__(self, made: Any, mesh: Mesh | None) -> None:
        self.tx, self.layout = made(mesh)
        self.mesh = mesh
        self.update = jax.jit(self.tx.update)

    def steps(self, gradients: Sequence[Arrays]) -> tuple[list[Arrays], list[Any], Any]:
        """Updates of every step, each refused refresh as seen here, the last state."""
        params = self._place({k: np.ones_like(x) for k, x in gradients[0].items()})
        where = None
        if self.mesh is not None:
            where = so.state_shardings(self.tx, params, self.layout)
        state = jax.jit(self.tx.init, out_shardings=where)(params)
        history, failures = [], []
        for each in gradients:
            updates, state = self.update(self._place(each), state, params)
            params = optax.apply_updates(params, updates)
            history.append(self.whole(updates))
            failures.append(_failures(state))
        return history, failures, (params, state)

    def _place(self, arrays: Arrays) -> dict[str, jax.Array]:
        if self.mesh is None:
            return jax.tree.map(jax.numpy.asarray, arrays)
        return {
            name: jax.make_array_from_callback(
                x.shape, sharding(self.mesh, SPECS[name], x.ndim), x.__getitem__
            )
            for name, x in arrays.items()
        }

    def whole(self, tree: Any) -> Any:
        """Every array, gathered from all processes."""
        if self.mesh is not None:
            everywhere = NamedSharding(self.mesh, P())
            tree = jax.jit(lambda x: x, out_shardings=everywhere)(tree)
        return jax.tree.map(np.asarray, tree)


def _failures(state: Any) -> list[int]:
    """Refused refreshes in a row of the blocks that lie on this process's devices."""
    counts = jax.tree.leaves(optax.tree.get(state, "failures"))
    return [
        int(n) for x in counts for shard in x.addressable_shards for n in shard.data
    ]


def digest(run: Run, tree: Any) -> str:
    """Of all bits: of what is spread, and of every copy that this process holds."""
    found = hashlib.sha256()
    for leaf in jax.tree.leaves(run.whole(tree)):
        found.update(leaf.tobytes())
    for leaf in jax.tree.leaves(tree):
        if leaf.sharding.is_fully_replicated:
            for shard in leaf.addressable_shards:
                found.update(np.asarray(shard.data).tobytes())
    return found.hexdigest()


def reopened(run: Run, end: Any, folder: Path) -> bool:
    """Saves from all processes, opens it again, and compares every bit."""
    params, state = end
    shapes = jax.eval_shape(run.tx.init, params)
    with checkpoint.manager(folder) as manager:
        checkpoint.save(manager, 6, params, state, run.layout)
        manager.wait_until_finished()
        found = checkpoint.restore(manager, params, shapes, run.layout)
    views = [
        digest(run, (p, checkpoint.to_param_view(s, p, run.layout)))
        for p, s in ((params, state), (found.params, found.state))
    ]
    return views[0] == views[1]


def main(scenario: str, port: int, process: int, folder: Path) -> None:
    """Join the others, run, and write what came out."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.distributed.initialize(
        f"127.0.0.1:{port}", PROCESSES, process, initialization_timeout=30
    )
    devices = PROCESSES * DEVICES
    mesh = jax.make_mesh((devices,), ("fsdp",), axis_types=(AxisType.Auto,))
    run = Run({"fsdp": fsdp, "failing": failing}[scenario], mesh)
    runs = (
        {"": fsdp_gradients()}
        if scenario == "fsdp"
        else {"sick_": failing_gradients(True), "": failing_gradients(False)}
    )
    arrays, said = {}, {}
    for kind, gradients in runs.items():
        history, failures, end = run.steps(gradients)
        for step, updates in enumerate(history):
            arrays |= {f"{kind}{step}_{name}": x for name, x in updates.items()}
        said[f"{kind}failures"] = failures
        said[f"{kind}digest"] = digest(run, end)
        if scenario == "fsdp":
            said["reopened"] = reopened(run, end, folder / "run")
    said["compilations"] = run.update._cache_size()
    np.savez(folder / f"{process}.npz", **arrays)
    (folder / f"{process}.json").write_text(json.dumps(said))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
