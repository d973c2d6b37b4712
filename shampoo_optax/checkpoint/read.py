"""Orbax's restore, with what it raises on broken files in our words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from shampoo_optax.checkpoint import spec as specs
from shampoo_optax.checkpoint.moves import Home
from shampoo_optax.checkpoint.spec import DamagedCheckpoint

LARGEST_SPEC = 2**28  # bytes; that of 100,000 arrays has a tenth of it


def read_spec(manager: ocp.CheckpointManager, step: int, where: str) -> specs.Spec:
    """The spec of a step, checked; one too large to be ours is not read."""
    folder = Path(manager.directory) / str(step) / "spec"
    size = sum(file.stat().st_size for file in folder.glob("*") if file.is_file())
    if size > LARGEST_SPEC:
        raise DamagedCheckpoint(
            f"checkpoint: {where} has a spec of {size} bytes; wanted at most "
            f"{LARGEST_SPEC}."
        )
    args = ocp.args.Composite(spec=ocp.args.JsonRestore())
    spec = _guarded(manager, step, args, where)["spec"]
    specs.check(spec, where)
    return spec


def read_arrays(
    manager: ocp.CheckpointManager,
    step: int,
    there: dict[str, Any],
    wanted: dict[str, Any],
    home: Home,
    where: str,
) -> dict[str, Any]:
    """All arrays, those that are wanted to where they are wanted."""

    def target(said: Any, asked: Any) -> Any:
        if isinstance(said, Mapping):
            return {k: target(v, (asked or {}).get(k)) for k, v in said.items()}
        if isinstance(asked, np.ndarray):
            return asked
        if asked is None:  # begun anew in spite of it
            return _abstract(said, home.everywhere(len(said.shape)))
        return _abstract(asked, getattr(asked, "sharding", None))

    trees = {name: target(there[name], wanted[name]) for name in there if there[name]}
    args = {name: ocp.args.StandardRestore(tree) for name, tree in trees.items()}
    found = _guarded(manager, step, ocp.args.Composite(**args), where)
    return {name: found[name] if name in trees else {} for name in there}


def _abstract(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    # Unless told, Orbax asks for the devices that the array was saved on.
    where = where or jnp.zeros(()).sharding
    return jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf), sharding=where)


def _guarded(manager: ocp.CheckpointManager, step: int, args: Any, where: str) -> Any:
    """Orbax's restore; whatever it raises on a broken file, in our words."""
    try:
        return manager.restore(step, args=args)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0][:300]
        raise DamagedCheckpoint(
            f"checkpoint: {where} cannot be read ({type(error).__name__}: {first}). "
            "Restore another step."
        ) from error
