"""The runs of convergence.py: trained once, kept in a file, found there again."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from benchmarks import convergence_report
from examples import sweep_lm
from examples.training.command import Recipe
from examples.training.loop import advance, compile_step
from examples.training.task import Record, Schedule, Task


@dataclass(frozen=True)
class Problem:
    """A task, and how long it is trained for the sweep and for the figures."""

    make: Callable[[int], Task]  # from the seed
    settings: dict[str, Any]
    recipes: Mapping[str, Recipe]
    sweep: Schedule
    sweep_seeds: int
    final: Schedule
    goals: tuple[convergence_report.Goal, ...]


class Key(NamedTuple):
    """What makes a run the same run."""

    task: str
    optimizer: str
    rate: float
    steps: int
    eval_every: int
    seed: int


class Runs:
    """The validation losses of every run so far, kept in a file."""

    def __init__(self, path: Path | None, settings: dict[str, Any]) -> None:
        """Reads the file, if there is one; refuses that of other settings."""
        self._path = path
        self.content: dict[str, Any] = {"settings": settings, "costs": {}}
        self._losses: dict[Key, list[float]] = {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if found["settings"] != settings:
                raise SystemExit(f"{path} has other settings; give another --out")
            for run in found.pop("runs"):
                losses = run.pop("losses")
                self._losses[Key(**run)] = losses
            self.content = found

    def __contains__(self, key: Key) -> bool:
        """Says whether this run is done."""
        return key in self._losses

    def __getitem__(self, key: Key) -> list[float]:
        """The losses of a run, by evaluation; those it diverged before are missing."""
        return self._losses[key]

    def __setitem__(self, key: Key, losses: Iterable[float]) -> None:
        """Notes a run, and writes the file."""
        self._losses[key] = [float(f"{loss:.6g}") for loss in losses]
        self.write()

    def write(self) -> None:
        """Writes the file, a line for each run."""
        if self._path is None:
            return
        runs = (
            json.dumps(key._asdict() | {"losses": self._losses[key]})
            for key in sorted(self._losses)
        )
        head = json.dumps(self.content, indent=1)[:-2]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        beside = self._path.with_suffix(".new")  # an interrupt must not cut the file
        beside.write_text(head + ',\n "runs": [\n' + ",\n".join(runs) + "\n ]\n}\n")
        beside.replace(self._path)


def train(task: Task, recipe: Recipe, rate: float, schedule: Schedule) -> list[float]:
    """Trains once, and returns the validation losses until it ends or diverges."""
    state = task.start(recipe(rate, schedule.steps))
    step, _ = compile_step(task, state, task.batch(0))
    record = Record({})
    losses: list[float] = []
    while record.step < schedule.steps:
        try:
            state, _ = advance(step, state, task.batch(record.step), record)
        except FloatingPointError:
            break
        if schedule.evaluates_after(record.step):
            losses.append(task.evaluate(state.params)["loss"])
    return losses if all(map(math.isfinite, losses)) else []


@dataclass(frozen=True)
class Trainer:
    """Trains what has not been trained before."""

    name: str
    problem: Problem
    runs: Runs
    console: Console

    def curves(
        self, optimizer: str, rate: float, schedule: Schedule, seeds: int
    ) -> list[list[float]]:
        """The losses of each seed."""
        plan = (rate, schedule.steps, schedule.eval_every)
        keys = [Key(self.name, optimizer, *plan, seed) for seed in range(seeds)]
        for key in keys:
            if key not in self.runs:
                self._run(key, schedule)
        return [self.runs[key] for key in keys]

    def best_rate(self, optimizer: str) -> float:
        """Sweeps, and returns the rate with the lowest mean loss at the end."""
        schedule, seeds = self.problem.sweep, self.problem.sweep_seeds

        def loss_at(rate: float) -> float:
            curves = self.curves(optimizer, short(rate), schedule, seeds)
            return convergence_report.mean(curves, schedule)[-1]

        return short(sweep_lm.search(loss_at))

    def _run(self, key: Key, schedule: Schedule) -> None:
        label = f"{key.task} {key.optimizer} {key.rate} seed {key.seed}"
        start = time.perf_counter()
        with self.console.status(f"{label}, {key.steps} steps"):
            task = self.problem.make(key.seed)
            recipe = self.problem.recipes[key.optimizer]
            losses = train(task, recipe, key.rate, schedule)
        self.runs[key] = losses
        end = f"{losses[-1]:.4f}" if losses else "diverged"
        self.console.print(f"{label}: {end}, {time.perf_counter() - start:.1f} s")


def short(rate: float) -> float:
    """Rounds a rate to what a reader would type."""
    return float(f"{rate:.3g}")
