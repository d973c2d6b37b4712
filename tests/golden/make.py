"""Makes the golden checkpoint of the present layout version.

    python -m tests.golden.make

Run it once for every new version of the view, and never again for an old one: a test
opens all of them for ever.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint.spec import VERSION
from tests import helpers

HERE = Path(__file__).resolve().parent
LAYOUT = so.BlockLayout(4)
LIKE = {"w": jnp.zeros((10, 4)), "a.b": jnp.zeros((3, 3, 2, 2)), "bias": jnp.zeros(3)}
STEPS = 3
# By name: what was saved, each with whatever slots it has.
SAVED: dict[str, optax.GradientTransformationExtraArgs] = {
    "shampoo": so.shampoo(
        optax.constant_schedule(1e-2),
        layout=LAYOUT,
        refresh=so.Refresh(2),
        momentum=0.9,
    ),
    "soap": so.soap(1e-2, layout=LAYOUT, refresh=so.Refresh(2)),
}


def folder(version: int, name: str) -> Path:
    """Where one is kept."""
    return HERE / f"v{version}" / name


def facts(
    params: Any, state: Any, layout: so.BlockLayout = LAYOUT
) -> dict[str, list[float]]:
    """Sums that tell what was saved, apart from what the checkpoint says of itself."""
    view = checkpoint.to_param_view(state, params, layout)
    pairs = jax.tree_util.tree_leaves_with_path({"params": params, "view": view})
    return {
        jax.tree_util.keystr(path): [float(jnp.sum(x)), float(jnp.sum(jnp.abs(x)))]
        for path, x in pairs
    }


def main() -> None:
    """Trains a little, saves, and writes what it was."""
    for name, tx in SAVED.items():
        where = folder(VERSION, name)
        shutil.rmtree(where, ignore_errors=True)
        params = helpers.gradients(LIKE, 1000)
        state = tx.init(params)
        for step in range(STEPS):
            updates, state = tx.update(helpers.gradients(LIKE, step), state, params)
            params = optax.apply_updates(params, updates)
        with checkpoint.manager(where) as manager:
            checkpoint.save(manager, STEPS, params, state, LAYOUT)
        for mark in where.rglob("commit_success.txt"):  # Orbax notes where it was made
            mark.write_text("committed\n")
        text = json.dumps(facts(params, state), indent=1)
        (where.parent / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
