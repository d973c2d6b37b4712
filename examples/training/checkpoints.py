"""Orbax checkpoints: parameters, optimizer state and the record, one set per step."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from examples.training.task import Record, Settings, TrainingState

KEPT = 2  # the newest, and one to fall back on


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Saving is asynchronous: the loop goes on while Orbax writes. Leaving the context
    waits for the last one, so that an exit never cuts a checkpoint short.
    """

    def __init__(self, directory: Path):
        # Orbax announces every checkpoint at length, in the middle of the bar.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._directory = directory.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=KEPT,
            # A rename is quick and whole where deleting a tree is neither.
            todelete_subdir="to_delete",
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainingState, record: Record) -> None:
        """Writes the state after ``record.step`` steps, unless it is there already."""
        if self._manager.latest_step() == record.step:
            return
        items = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            opt_state=ocp.args.StandardSave(state.opt_state),
            record=ocp.args.JsonSave(dataclasses.asdict(record)),
        )
        self._manager.save(record.step, args=items)

    def restore(
        self, start: TrainingState, settings: Settings
    ) -> tuple[TrainingState, Record]:
        """Reads the newest checkpoint, or begins at ``start`` where there is none.

        Args:
          start: a state of the right shapes, dtypes and devices.
          settings: what this run was asked to do.

        Returns:
          The state and the record to go on from.

        Raises:
          SystemExit: if the checkpoint belongs to a run with other settings, or on
            other devices.
        """
        step = self._manager.latest_step()
        if step is None:
            return start, Record(settings)
        # The record first: with other settings the arrays would not fit, and Orbax
        # could only say that shapes differ.
        saved = self._manager.restore(
            step, args=ocp.args.Composite(record=ocp.args.JsonRestore())
        )
        record = Record(**saved["record"])
        self._refuse_other(record.settings, settings)
        target = jax.tree.map(
            ocp.utils.to_shape_dtype_struct, (start.params, start.opt_state)
        )
        arrays = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target[0]),
                opt_state=ocp.args.StandardRestore(target[1]),
            ),
        )
        state = start.replace(
            step=jnp.full_like(start.step, step),
            params=arrays["params"],
            opt_state=arrays["opt_state"],
        )
        return state, record

    def _refuse_other(self, there: Settings, here: Settings) -> None:
        ways_out = "pass --fresh to delete it and start over, or --run-dir to leave it "
        ways_out += "alone."
        devices = [s.get("devices", "one device") for s in (there, here)]
        if devices[0] != devices[1]:
            raise SystemExit(
                f"{self._directory} holds a run on {devices[0]}, and this one is on "
                f"{devices[1]}; a run is resumed on the devices it began on: "
                f"{ways_out}"
            )
        names = sorted(there.keys() | here.keys())
        different = [
            f"{name} is {there.get(name)} there and {here.get(name)} here"
            for name in names
            if there.get(name) != here.get(name)
        ]
        if different:
            raise SystemExit(
                f"{self._directory} holds a run with other settings "
                f"({'; '.join(different)}): {ways_out}"
            )
