"""Checkpoints of a run: parameters, optimizer and the record, one set per step."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from pathlib import Path

import jax
import jax.numpy as jnp

import shampoo_optax as so
from examples.training.task import Record, Settings, TrainingState
from shampoo_optax import checkpoint

KEPT = 2  # the newest, and one to fall back on
WAYS_OUT = "Pass --fresh to delete it and start over, or --run-dir to leave it alone."


class Checkpoints:
    """The checkpoints of one run, as a context manager.

    Saving is asynchronous: the loop goes on while Orbax writes. Leaving the context
    waits for the last one, so that an exit never cuts a checkpoint short. A run may go
    on on other devices than it began on.
    """

    def __init__(self, directory: Path, layout: so.BlockLayout):
        # Orbax announces every checkpoint at length, in the middle of the bar.
        logging.getLogger("absl").setLevel(logging.WARNING)
        self._directory, self._layout = directory.resolve(), layout
        self._manager = checkpoint.manager(self._directory, max_to_keep=KEPT)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def save(self, state: TrainingState, record: Record) -> None:
        """Writes the state after ``record.step`` steps, unless it is there already."""
        arrays = state.params, state.opt_state
        extra = dataclasses.asdict(record)
        checkpoint.save(self._manager, record.step, *arrays, self._layout, extra=extra)

    def restore(
        self, start: TrainingState, settings: Settings
    ) -> tuple[TrainingState, Record]:
        """Reads the newest whole checkpoint, or begins at ``start`` where is none.

        Args:
          start: a state of the right shapes, dtypes and devices.
          settings: what this run was asked to do.

        Returns:
          The state and the record to go on from.

        Raises:
          SystemExit: if the checkpoint belongs to a run with other settings.
        """
        step = self._manager.latest_step()
        if step is None:
            return start, Record(settings)
        # The settings first: with other ones the arrays would not fit, and what does
        # not fit would be the answer.
        with contextlib.suppress(checkpoint.DamagedCheckpoint):
            there = Record(**checkpoint.read_extra(self._manager, step))
            self._refuse_other(there.settings, settings)
        try:
            found = checkpoint.restore(
                self._manager, start.params, start.opt_state, self._layout
            )
        except checkpoint.DamagedCheckpoint as damage:
            raise SystemExit(f"{damage} {WAYS_OUT}") from None
        self._refuse_other(Record(**found.extra).settings, settings)
        state = start.replace(
            step=jnp.full_like(start.step, found.step),
            params=found.params,
            opt_state=jax.tree.map(_like, found.state, start.opt_state),
        )
        return state, Record(**found.extra)

    def _refuse_other(self, there: Settings, here: Settings) -> None:
        names = sorted(there.keys() | here.keys())
        different = [
            f"{name} is {there.get(name)} there and {here.get(name)} here"
            for name in names
            if there.get(name) != here.get(name)
        ]
        if different:
            raise SystemExit(
                f"{self._directory} holds a run with other settings "
                f"({'; '.join(different)}): {WAYS_OUT}"
            )


def _like(leaf: jax.Array, model: jax.Array) -> jax.Array:
    """An array where the compiled step expects it."""
    return jax.device_put(leaf, model.sharding)
