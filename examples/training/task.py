"""What the loop needs to know of a problem, and what it remembers of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, Self, TypeVar

import jax
import optax

PyTree = Any
Settings = dict[str, Any]


class TrainingState(Protocol):
    """What ``flax.training.train_state.TrainState`` looks like to the loop."""

    @property
    def step(self) -> Any: ...

    @property
    def params(self) -> PyTree: ...

    @property
    def opt_state(self) -> optax.OptState: ...

    def replace(self, **changes: Any) -> Self: ...


State = TypeVar("State", bound=TrainingState)


@dataclasses.dataclass(frozen=True)
class Task(Generic[State]):
    """A problem to train on; the optimizer arrives later, so every one gets the same.

    Attributes:
      start: makes the state of step 0; the parameters depend on nothing but the seed.
      step: maps ``(state, batch)`` to ``(state, loss)``; pure, compiled by the loop.
      batch: draws the batch of a step; a pure function of the step.
      evaluate: maps parameters to measures on the validation set, one named ``loss``.
    """

    start: Callable[[optax.GradientTransformationExtraArgs], State]
    step: Callable[[State, PyTree], tuple[State, jax.Array]]
    batch: Callable[[int], PyTree]
    evaluate: Callable[[PyTree], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How long to train, and how often to look and to save."""

    steps: int
    eval_every: int
    save_every: int

    def evaluates_after(self, step: int) -> bool:
        """Says whether the validation set is looked at after this many steps."""
        return step % self.eval_every == 0 or step == self.steps

    def saves_after(self, step: int) -> bool:
        """Says whether a checkpoint is written after this many steps."""
        return step % self.save_every == 0 or step == self.steps


@dataclasses.dataclass
class Record:
    """What a run remembers beside its arrays; saved with them in every checkpoint.

    Attributes:
      settings: whatever must be the same for a run to be resumed.
      step: how many steps are done.
      train_seconds: the wall time of those steps; no evaluation, no compilation.
      compile_seconds: lowering and compiling the train step, in the first session.
      evaluations: one dictionary for each: step, seconds, and the task's measures.
    """

    settings: Settings
    step: int = 0
    train_seconds: float = 0.0
    compile_seconds: float = 0.0
    evaluations: list[dict[str, float]] = dataclasses.field(default_factory=list)

    def add_evaluation(self, measures: dict[str, float]) -> None:
        """Notes what the validation set said after the steps done so far."""
        now = {"step": self.step, "seconds": self.train_seconds}
        self.evaluations.append(now | measures)

    @property
    def final(self) -> dict[str, float]:
        """The last evaluation."""
        return self.evaluations[-1]
