"""A training run in a process of its own that can be killed at any time.

    python -m tests.resumable FOLDER STEPS DEVICES PAUSE

Says ``at STEP`` after every step, and a digest of all it ends with as its last line.
"""

from __future__ import annotations

import os
import sys
import time

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

EVERY = 5


def main(folder: str, steps: int, devices: int, pause: float, wait: bool) -> None:
    """Goes on from the newest whole step, and saves every fifth."""
    jax.config.update("jax_num_cpu_devices", devices)
    import shampoo_optax as so
    from shampoo_optax import checkpoint
    from tests import helpers

    mesh = jax.make_mesh((devices,), ("data",), (AxisType.Auto,))
    layout = so.BlockLayout(8, mesh=mesh, block_axes=("data",), deterministic=True)
    tx = so.shampoo(1e-2, layout=layout, refresh=so.Refresh(4))
    everywhere = NamedSharding(mesh, PartitionSpec())
    like = {"w": jnp.zeros((24, 16)), "b": jnp.zeros(16)}
    params = jax.device_put(helpers.gradients(like, 1000), everywhere)
    where = so.state_shardings(tx, params, layout)
    state = jax.jit(tx.init, out_shardings=where)(params)

    @jax.jit
    def advance(params, state, gradients):
        updates, state = tx.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    step = 0
    with checkpoint.manager(folder, max_to_keep=2) as manager:
        if manager.all_steps():
            shapes = jax.eval_shape(tx.init, params)
            found = checkpoint.restore(manager, params, shapes, layout)
            step, params, state = found.step, found.params, found.state
        print("from", step, flush=True)
        while step < steps:
            gradients = jax.device_put(helpers.gradients(like, step), everywhere)
            params, state = advance(params, state, gradients)
            step += 1
            if step % EVERY == 0:
                checkpoint.save(manager, step, params, state, layout)
                if wait:
                    manager.wait_until_finished()
            print("at", step, flush=True)
            time.sleep(pause)
    view = checkpoint.to_param_view(state, params, layout)
    print("end", *map(int, map(checkpoint.digest, jax.tree.leaves((params, view)))))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), float(sys.argv[4]), "wait" in sys.argv)
