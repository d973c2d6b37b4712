"""Trains a language model with AdamW, then goes on twice: with AdamW and with Shampoo.

Shampoo starts from AdamW's state (shampoo_optax.migrate), at the same place of the same
schedule and with AdamW's own learning rate. Both see the same batches. What is looked
at is whether the validation loss ever rises above AdamW's own after the switch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # see train_lm
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import optax
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

if not __package__:  # run as a file, not as python -m examples.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shampoo_optax as so
from examples.lm.data import load_corpus
from examples.lm.task import language_model
from examples.train_lm import BATCH, LEARNING_RATES, SHAPE, adamw, warmup_cosine
from examples.training.command import positive
from examples.training.loop import advance, compile_step
from examples.training.progress import new_console, progress
from examples.training.task import Record, Task, TrainingState
from shampoo_optax.migrate import from_adam, warm_up

STEPS, SWITCH, EVAL_EVERY = 500, 200, 10
WARM_UP = 0  # gradients; see --warm-up
DIRECTORY = Path("runs/switch")
Optimizer = optax.GradientTransformationExtraArgs


def shampoo(learning_rate: float, steps: int) -> Optimizer:
    """Makes the chain of ``adamw`` with Shampoo in its place, everything default."""
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        so.shampoo(warmup_cosine(learning_rate, steps), weight_decay=1e-4),
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=positive, default=STEPS, help="in all")
    add("--switch", type=positive, default=SWITCH, help="steps of AdamW before it")
    add("--warm-up", type=int, default=WARM_UP, help="gradients that only measure")
    add("--eval-every", type=positive, default=EVAL_EVERY, help="in steps")
    add("--seed", type=int, default=0, help="of parameters and batches")
    rate = LEARNING_RATES["adamw"]
    add("--learning-rate", type=float, default=rate, help="of both, at its peak")
    add("--batch", type=positive, default=BATCH, help="in windows")
    for name in ("context", "width", "heads", "layers", "hidden"):
        add(f"--{name}", type=positive, default=getattr(SHAPE, name), help="of a model")
    add("--picture", type=Path, default=DIRECTORY / "switch.png", help="PNG to write")
    add("--json", type=Path, default=DIRECTORY / "switch.json", help="figures to write")
    arguments = parser.parse_args(argv)
    if arguments.switch >= arguments.steps:
        parser.error(f"--switch {arguments.switch} is not before --steps.")
    return arguments


def run(
    task: Task,
    state: TrainingState,
    record: Record,
    arguments: argparse.Namespace,
    *,
    name: str,
    until: int,
    console: Console,
) -> tuple[TrainingState, Record]:
    """Trains on from a record; neither the state nor the record is consumed."""
    state = jax.tree.map(jnp.copy, state)  # a step donates its own
    record = Record(record.settings, record.step, evaluations=[*record.evaluations])
    step, record.compile_seconds = compile_step(task, state, task.batch(record.step))
    first = record.step
    with progress(console, name, first, until) as show:
        while record.step < until:
            state, loss = advance(step, state, task.batch(record.step), record)
            if record.step % arguments.eval_every == 0 or record.step == until:
                record.add_evaluation(task.evaluate(state.params))
            speed = (record.step - first) / record.train_seconds
            seen = record.final["loss"] if record.evaluations else None
            show(record.step, loss=loss, speed=speed, validation=seen)
    return state, record


def switched(
    task: Task, state: TrainingState, tx: Optimizer, arguments: argparse.Namespace
) -> TrainingState:
    """Puts Shampoo in AdamW's place, from AdamW's state."""
    opt_state = from_adam(state.opt_state, tx, state.params)
    new = state.replace(opt_state=opt_state, tx=tx)
    if not arguments.warm_up:
        return new
    # The loop's own gradients: what a step of plain descent takes away.
    descent = optax.sgd(1.0)
    still = state.replace(opt_state=descent.init(state.params), tx=descent)

    @jax.jit
    def gradient(tokens: jax.Array) -> optax.Updates:
        moved, _ = task.step(still, tokens)
        return jax.tree.map(jnp.subtract, state.params, moved.params)

    # Batches of steps that will never come.
    steps = range(arguments.steps, arguments.steps + arguments.warm_up)
    gradients = (gradient(task.batch(step)) for step in steps)
    return new.replace(opt_state=warm_up(tx, opt_state, state.params, gradients))


def compared(records: dict[str, Record], switch: int) -> dict[str, float]:
    """What Shampoo's validation loss has over AdamW's, at equal steps."""
    pairs = zip(*(r.evaluations for r in records.values()), strict=True)
    after = {a["step"]: b["loss"] - a["loss"] for a, b in pairs if a["step"] > switch}
    worst = max(after, key=lambda step: after[step])
    last = max(after)
    return {
        "evaluations after the switch": len(after),
        "largest difference": after[worst],
        "at step": worst,
        "evaluations above AdamW": sum(x > 0 for x in after.values()),
        "last difference": after[last],
    }


def save_picture(path: Path, records: dict[str, Record], switch: int) -> None:
    """Draws both curves, and their difference below."""
    figure = Figure(figsize=(7, 6), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    curves = {}
    for name, record in records.items():
        steps, losses = zip(
            *((row["step"], row["loss"]) for row in record.evaluations), strict=True
        )
        curves[name] = losses
        label = f"{name}: {losses[-1]:.3f}"
        above.plot(steps, losses, marker=".", markersize=4, label=label)
    first, second = curves.values()
    over = [b - a for a, b in zip(first, second, strict=True)]
    below.plot(steps, over, marker=".", markersize=4, color="black")
    below.axhline(0.0, color="grey", linewidth=1)
    for panel in (above, below):
        panel.axvline(switch, color="grey", linestyle=":", linewidth=1)
        panel.grid(alpha=0.3)
    above.legend(title="final loss")
    above.set_ylabel("validation loss")
    below.set_ylabel("Shampoo over AdamW")
    below.set_xlabel("training steps")
    figure.suptitle(f"AdamW's state handed to Shampoo after {switch} steps")
    figure.savefig(path, dpi=120)


def report(
    console: Console, records: dict[str, Record], arguments: argparse.Namespace
) -> None:
    """Prints the table, and writes the picture and the figures."""
    figures = compared(records, arguments.switch)
    table = Table(title=f"{arguments.switch} of {arguments.steps} steps of AdamW, then")
    table.add_column("")
    for name in records:
        table.add_column(name, justify="right")
    for label, cell in (
        ("validation loss", lambda r: f"{r.final['loss']:.4f}"),
        ("training seconds since", lambda r: f"{r.train_seconds:.1f}"),
    ):
        table.add_row(label, *(cell(r) for r in records.values()))
    for label, figure in figures.items():
        form = "+.4f" if isinstance(figure, float) else "d"
        table.add_row(label, "", f"{figure:{form}}")
    console.print(table)
    for path in (arguments.picture, arguments.json):
        path.parent.mkdir(parents=True, exist_ok=True)
    save_picture(arguments.picture, records, arguments.switch)
    settings = {name: str(value) for name, value in vars(arguments).items()}
    curves = {name: record.evaluations for name, record in records.items()}
    found = {"settings": settings, "compared": figures, "evaluations": curves}
    arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"picture: {arguments.picture}", soft_wrap=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, and returns the exit code."""
    arguments = parse(argv)
    console = new_console()
    sizes = {name: getattr(arguments, name) for name in SHAPE._fields[1:]}
    task = language_model(
        load_corpus(),
        SHAPE._replace(**sizes),
        batch_size=arguments.batch,
        seed=arguments.seed,
    )
    old, new = (
        make(arguments.learning_rate, arguments.steps) for make in (adamw, shampoo)
    )

    def on(state: TrainingState, record: Record, name: str, until: int):
        return run(
            task, state, record, arguments, name=name, until=until, console=console
        )

    state, record = on(task.start(old), Record({}), "adamw", arguments.switch)
    states = {"adamw": state, "shampoo": switched(task, state, new, arguments)}
    records = {
        name: on(start, record, name, arguments.steps)[1]
        for name, start in states.items()
    }
    report(console, records, arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
