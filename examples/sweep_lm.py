"""Tunes the learning rates of train_lm.py, by the same rule for each optimizer.

Three rates a factor of two apart, then further ones until the best lies between two
worse, then its two neighbours at a factor of the square root of two. Every run has the
same start, the same batches and the same number of steps, and ends with the mean
validation loss of its seeds. What is in the file already is not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# XLA solves many small eigenproblems side by side; with a pool of threads inside each
# of them, LAPACK is tens of times slower. It reads this when NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file, not as python -m examples.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from examples.lm.data import load_corpus
from examples.lm.task import language_model
from examples.train_lm import BATCH, RECIPES, SHAPE
from examples.training.command import Recipe, positive
from examples.training.loop import advance, compile_step
from examples.training.progress import new_console, progress
from examples.training.task import Record, Task

CENTRE = 4e-3
FURTHEST = 8  # half powers of two away from the centre
RESULTS = Path(__file__).with_name("sweep_lm.json")

Losses = dict[str, dict[str, float]]  # optimizer, then learning rate


def final_loss(
    task: Task, recipe: Recipe, rate: float, steps: int, label: str, console: Console
) -> float:
    """Trains once, and returns the last validation loss; infinity if it diverged."""
    state = task.start(recipe(rate, steps))
    step, _ = compile_step(task, state, task.batch(0))
    record = Record({})
    with progress(console, label, 0, steps) as show:
        while record.step < steps:
            try:
                state, loss = advance(step, state, task.batch(record.step), record)
            except FloatingPointError:
                return float("inf")
            speed = record.step / record.train_seconds
            show(record.step, loss=loss, speed=speed)
    return task.evaluate(state.params)["loss"]


def search(loss_at: Callable[[float], float]) -> float:
    """Follows the rule above, and returns the best learning rate."""
    losses: dict[int, float] = {}  # by half powers of two away from the centre

    def look(place: int) -> None:
        if place not in losses:
            losses[place] = loss_at(CENTRE * 2 ** (place / 2))

    def best() -> int:
        return min(losses, key=losses.__getitem__)

    for place in (-2, 0, 2):
        look(place)
    while best() in (min(losses), max(losses)) and abs(best()) < FURTHEST:
        look(best() + (2 if best() == max(losses) else -2))
    middle = best()
    look(middle - 1)
    look(middle + 1)
    return CENTRE * 2 ** (best() / 2)


def tune(
    name: str,
    tasks: Sequence[Task],
    steps: int,
    tried: Mapping[str, float],
    note: Callable[[str, str, float], None],
    console: Console,
) -> None:
    """Searches for one optimizer's rate, and notes every loss as it comes."""

    def loss_at(rate: float) -> float:
        key = f"{rate:.3g}"
        if key not in tried:
            label = f"{name} {key}"
            runs = [
                final_loss(task, RECIPES[name], rate, steps, label, console)
                for task in tasks
            ]
            note(name, key, sum(runs) / len(runs))
        return tried[key]

    search(loss_at)


def show(console: Console, losses: Losses) -> None:
    """Prints every rate tried, with the best of each optimizer marked."""
    table = Table(title="validation loss by peak learning rate")
    table.add_column("learning rate", justify="right")
    for name in losses:
        table.add_column(name, justify="right")
    rates = sorted({rate for tried in losses.values() for rate in tried}, key=float)
    for rate in rates:
        cells = []
        for tried in losses.values():
            mark = " *" if rate == min(tried, key=tried.__getitem__) else "  "
            cells.append(f"{tried[rate]:.4f}{mark}" if rate in tried else "")
        table.add_row(rate, *cells)
    console.print(table)


def load(path: Path, settings: dict[str, object]) -> Losses:
    """Reads what an earlier sweep with the same settings found."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text())
    return found["losses"] if found["settings"] == settings else {}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=positive, default=200, help="of each run")
    parser.add_argument("--seeds", type=positive, default=1, help="for each rate")
    parser.add_argument("--results", type=Path, default=RESULTS, help="JSON file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Searches for each optimizer in turn, and returns the exit code."""
    arguments = parse(argv)
    console = new_console()
    settings: dict[str, object] = SHAPE._asdict() | {
        "batch": BATCH,
        "steps": arguments.steps,
        "seeds": arguments.seeds,
    }
    losses = load(arguments.results, settings)
    corpus = load_corpus()
    tasks = [
        language_model(corpus, SHAPE, batch_size=BATCH, seed=seed)
        for seed in range(arguments.seeds)
    ]

    def note(name: str, rate: str, loss: float) -> None:
        losses[name][rate] = loss
        text = json.dumps({"settings": settings, "losses": losses}, indent=2)
        arguments.results.write_text(text + "\n")

    for name in RECIPES:
        tune(name, tasks, arguments.steps, losses.setdefault(name, {}), note, console)
    show(console, losses)
    return 0


if __name__ == "__main__":
    sys.exit(main())
