"""Orbax checkpoints of parameters and optimizer: saved, verified, opened anywhere."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import optax
import orbax.checkpoint as ocp

from shampoo_optax.checkpoint import spec as specs
from shampoo_optax.checkpoint import stacks
from shampoo_optax.checkpoint.entries import entries_of
from shampoo_optax.checkpoint.exponents import exponents_of
from shampoo_optax.checkpoint.names import Names, by_name
from shampoo_optax.checkpoint.opening import Restored, Wanted, open_step
from shampoo_optax.checkpoint.read import read_spec
from shampoo_optax.checkpoint.spec import DamagedCheckpoint
from shampoo_optax.checkpoint.view import view_by
from shampoo_optax.layout.block_layout import BlockLayout


def manager(directory: str | Path, *, max_to_keep: int = 3) -> ocp.CheckpointManager:
    """Orbax's manager with the options that survive a kill.

    Retention renames a step before it deletes it, so that a process that dies half-way
    leaves no half of a step behind. Saving is asynchronous: use it as a context manager
    or call its ``close()``, which wait for the last step.

    Args:
      directory: made where it is not there.
      max_to_keep: how many steps stay.

    Returns:
      An ``orbax.checkpoint.CheckpointManager``; any other serves the functions here,
      too.
    """
    options = ocp.CheckpointManagerOptions(
        max_to_keep=max_to_keep,
        todelete_subdir="to_delete",
        cleanup_tmp_directories=True,
    )
    return ocp.CheckpointManager(Path(directory).absolute(), options=options)


def items(
    params: optax.Params, state: Any, layout: BlockLayout, *, extra: Any = None
) -> dict[str, Any]:
    """Orbax arguments of one step, for a Composite of one's own.

    Args:
      params: on any mesh.
      state: of the optimizer.
      layout: which blocks, and the mesh they lie on.
      extra: anything that JSON can hold, for example the position in the data.

    Returns:
      ``{"params": StandardSave, "optimizer": StandardSave, "spec": JsonSave}``.

    Raises:
      ValueError: the state does not fit, see :func:`to_param_view`.
    """
    entries = entries_of(state, params, layout)
    view = view_by(None, state, params, layout)
    view["stacks"] = stacks.by_leaf(entries, jax.tree.leaves(state))
    leaves = by_name(params)
    arrays = {
        "params": {name: leaf for name, leaf in leaves.items() if leaf.size},
        "optimizer": {key: node for key, node in view.items() if not _empty(node)},
    }
    args = {name: ocp.args.StandardSave(tree) for name, tree in arrays.items() if tree}
    powers, table = exponents_of(entries), stacks.table_of(entries)
    said = specs.spec_of(arrays, layout, extra, powers, table)
    return {**args, "spec": ocp.args.JsonSave(said)}


def save(
    manager: ocp.CheckpointManager,
    step: int,
    params: optax.Params,
    state: Any,
    layout: BlockLayout,
    *,
    extra: Any = None,
) -> bool:
    """Save parameters and optimizer state after ``step`` steps.

    On disk: parameters by name, the optimizer's state as it lies, and a JSON spec:
    whose blocks its rows are, the exponents of its roots, a digest of every array.
    Arguments are those of :func:`items`.

    Returns:
      Whether it saved: a manager may skip steps, and one that is there stays.

    Example:
      >>> import tempfile
      >>> layout = BlockLayout()
      >>> tx = shampoo(1e-3, layout=layout)
      >>> params = {"w": jnp.ones((4, 3))}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     with checkpoint.manager(folder) as steps:
      ...         _ = checkpoint.save(steps, 7, params, tx.init(params), layout)
      ...         steps.wait_until_finished()
      ...         like = jax.eval_shape(tx.init, params)
      ...         checkpoint.restore(steps, params, like, layout).step
      7
    """
    if step in manager.all_steps() or not manager.should_save(step):
        return False
    args = ocp.args.Composite(**items(params, state, layout, extra=extra))
    return bool(manager.save(step, args=args))


def restore(
    manager: ocp.CheckpointManager,
    params_like: optax.Params,
    state_like: Any,
    layout: BlockLayout,
    *,
    step: int | None = None,
    fresh: str | None = None,
    renamed: Mapping[str, str] | None = None,
    reblock: optax.GradientTransformationExtraArgs | None = None,
) -> Restored:
    """Open a checkpoint on this mesh, whatever mesh it was saved on.

    Structure, shapes and dtypes are compared with ``params_like`` and ``state_like``
    before an array is read, and digests before one is used.

    Args:
      manager: from :func:`manager`, or one of your own that :func:`items` went to.
      params_like: parameters, or their shapes with the shardings that are wanted.
      state_like: ``tx.init(params)`` or its shapes.
      layout: which blocks, and the mesh the state is to lie on.
      step: which; None takes the newest that is whole, and warns of newer ones.
      fresh: a regular expression: parameters whose path matches, and their state, are
        not read but taken from ``params_like`` and ``state_like``, which hold arrays
        then. For new layers, or a new head.
      renamed: ``{new path: old path}`` of parameters, or of whatever they begin with.
      reblock: the optimizer that goes on, where its blocks, or the exponents of its
        roots, are others than those that were saved. Moments are cut anew, factors as
        far as the old ones tell (see docs/checkpoints.md), and all roots computed anew
        with :func:`shampoo_optax.refresh_now`. Blocks of one layout have to nest in
        those of the other; a second moment in an eigenbasis (SOAP) cannot be cut.

    Returns:
      The step, the parameters, the state, and the extra that was saved.

    Raises:
      FileNotFoundError: there is no step.
      DamagedCheckpoint: the step, or every step, is not what was saved.
      ValueError: the checkpoint is of another optimizer, layout or model; it says which
        leaf, what is there and what is wanted.
    """
    manager.wait_until_finished()  # a step under way is none yet
    known = sorted(manager.all_steps(), reverse=True)
    if not known or (step is not None and step not in known):
        raise FileNotFoundError(
            f"checkpoint: {manager.directory} has steps {known[::-1]}; wanted "
            f"{'any' if step is None else step}."
        )
    names = Names(fresh, renamed or {})
    wanted = Wanted(params_like, state_like, layout, names, reblock)
    for candidate in known if step is None else [step]:
        try:
            return open_step(manager, candidate, wanted)
        except DamagedCheckpoint as damage:
            if step is not None or candidate == known[-1]:
                raise
            warnings.warn(f"{damage} Trying the one before.", stacklevel=2)
    raise AssertionError  # the last of them raises or returns


def read_extra(manager: ocp.CheckpointManager, step: int) -> Any:
    """What was saved as ``extra`` with a step, before any array is read.

    Raises:
      DamagedCheckpoint: the step's spec is not what was saved.
    """
    return read_spec(manager, step, f"step {step} of {manager.directory}")["extra"]


def latest_verified_step(
    manager: ocp.CheckpointManager,
    params_like: optax.Params,
    state_like: Any,
    layout: BlockLayout,
) -> int | None:
    """The newest step whose every array has the digest that it was saved with.

    Reads whole steps, newest first. Arguments are those of :func:`restore`.

    Returns:
      The step; None where there is none.
    """
    manager.wait_until_finished()
    wanted = Wanted(params_like, state_like, layout, Names(None, {}))
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            open_step(manager, step, wanted)
        except DamagedCheckpoint:
            continue
        return int(step)
    return None


def _empty(node: Any) -> bool:
    return isinstance(node, Mapping) and not node
