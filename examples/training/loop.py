"""The loop: one compiled step, evaluations off the clock, checkpoints, resuming."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import optax
from rich.console import Console

import shampoo_optax as so
from examples.training.checkpoints import Checkpoints
from examples.training.interrupts import Stopped, deferred_interrupt
from examples.training.progress import progress
from examples.training.task import (
    PyTree,
    Record,
    Schedule,
    Settings,
    Task,
    TrainingState,
)

CompiledStep = Callable[[TrainingState, PyTree], tuple[TrainingState, jax.Array]]


def _ignore(step: int) -> None:
    pass


def compile_step(
    task: Task, state: TrainingState, batch: PyTree
) -> tuple[CompiledStep, float]:
    """Compiles the train step ahead of time.

    The result takes these shapes only: a step that would compile twice raises instead.

    Args:
      task: whose step.
      state: an example; it is not consumed.
      batch: an example.

    Returns:
      The compiled step, which consumes its state, and the seconds it took to make.
    """
    start = time.perf_counter()
    where = jax.tree.map(lambda leaf: leaf.sharding, state)  # it stays where it lies
    jitted = jax.jit(task.step, donate_argnums=0, out_shardings=(where, None))
    step = jitted.lower(state, batch).compile()
    return step, time.perf_counter() - start


def advance(
    step: CompiledStep, state: TrainingState, batch: PyTree, record: Record
) -> tuple[TrainingState, float]:
    """Takes one step, on the clock.

    Args:
      step: as compiled.
      state: consumed.
      batch: of this step.
      record: its step and seconds move on.

    Returns:
      The new state, and the loss before the step.

    Raises:
      FloatingPointError: if the loss is not finite.
    """
    start = time.perf_counter()
    state, loss = jax.block_until_ready(step(state, batch))
    record.train_seconds += time.perf_counter() - start
    record.step += 1
    if not np.isfinite(loss):
        raise FloatingPointError(
            f"the training loss is {loss} at step {record.step}: "
            "the learning rate is likely too high."
        )
    return state, float(loss)


def _run_steps(
    task: Task,
    state: TrainingState,
    record: Record,
    schedule: Schedule,
    *,
    name: str,
    console: Console,
    save: Callable[[TrainingState, Record], None],
    on_step: Callable[[int], None],
) -> TrainingState:
    step, seconds = compile_step(task, state, task.batch(record.step))
    record.compile_seconds = record.compile_seconds or seconds
    if record.step == 0:
        record.add_evaluation(task.evaluate(state.params))
    session = Record(record.settings, record.step, record.train_seconds)
    with (
        deferred_interrupt() as interrupted,
        progress(console, name, record.step, schedule.steps) as show,
    ):
        while record.step < schedule.steps:
            state, loss = advance(step, state, task.batch(record.step), record)
            if schedule.evaluates_after(record.step):
                record.add_evaluation(task.evaluate(state.params))
            if schedule.saves_after(record.step):
                save(state, record)
            steps = record.step - session.step
            show(
                record.step,
                loss=loss,
                validation=record.final["loss"],
                speed=steps / (record.train_seconds - session.train_seconds),
            )
            on_step(record.step)
            if interrupted() and record.step < schedule.steps:
                save(state, record)
                raise Stopped(record.step)
    return state


def train(
    task: Task,
    optimizer: optax.GradientTransformationExtraArgs,
    schedule: Schedule,
    *,
    name: str,
    directory: Path,
    settings: Settings,
    console: Console,
    layout: so.BlockLayout,
    on_step: Callable[[int], None] = _ignore,
) -> tuple[TrainingState, Record]:
    """Trains to the end, from the newest checkpoint if there is one.

    Args:
      task: what to train on.
      optimizer: what to train with.
      schedule: for how long.
      name: of the run, in the progress bar.
      directory: of the run's checkpoints.
      settings: what must be the same for a checkpoint to be resumed.
      console: where to show progress.
      layout: of the optimizer's blocks, which checkpoints are saved by.
      on_step: called after each step with how many are done.

    Returns:
      The last state, and the record of the whole run, over all its sessions.

    Raises:
      Stopped: on Ctrl-C, after a checkpoint of the last whole step.
    """
    with Checkpoints(directory, layout) as checkpoints:
        state, record = checkpoints.restore(task.start(optimizer), settings)
        if record.step < schedule.steps:
            state = _run_steps(
                task,
                state,
                record,
                schedule,
                name=name,
                console=console,
                save=checkpoints.save,
                on_step=on_step,
            )
    return state, record
