"""The command line the examples share: several optimizers from the same start."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import optax

import shampoo_optax as so
from examples.training.interrupts import EXIT_CODE, Stopped
from examples.training.loop import train
from examples.training.measure import optimizer_milliseconds, state_bytes_per_parameter
from examples.training.progress import new_console
from examples.training.report import Result, report
from examples.training.task import Schedule, Settings, Task

# From a peak learning rate and the number of steps to an optimizer.
Recipe = Callable[[float, int], optax.GradientTransformationExtraArgs]


def positive(text: str) -> int:
    """Parses a whole number of at least one."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def _names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = list(dict.fromkeys(text.split(",")))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"there is no {name!r} here, only {', '.join(known)}"
                )
        return names

    return parse


def _override(known: Mapping[str, object]) -> Callable[[str], tuple[str, float]]:
    def parse(text: str) -> tuple[str, float]:
        name, _, value = text.partition("=")
        if name not in known:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not NAME=VALUE with a NAME out of {', '.join(known)}"
            )
        return name, float(value)

    return parse


def new_parser(
    description: str | None,
    *,
    run_dir: str,
    schedule: Schedule,
    learning_rates: Mapping[str, float],
) -> argparse.ArgumentParser:
    """Makes a parser with the flags that every example has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=positive, default=schedule.steps, help="of each optimizer")
    add(
        "--optimizers",
        type=_names(learning_rates),
        default=list(learning_rates),
        metavar="NAME,NAME",
        help="which ones, one after the other",
    )
    add(
        "--learning-rate",
        type=_override(learning_rates),
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="peak learning rate of one optimizer, instead of the tuned one",
    )
    add("--seed", type=int, default=0, help="of parameters and batches")
    add("--eval-every", type=positive, default=schedule.eval_every, help="in steps")
    add("--save-every", type=positive, default=schedule.save_every, help="in steps")
    add("--run-dir", type=Path, default=Path(run_dir), help="checkpoints and results")
    add("--fresh", action="store_true", help="delete earlier checkpoints first")
    return parser


def compare(
    task: Task,
    recipes: Mapping[str, Recipe],
    arguments: argparse.Namespace,
    *,
    title: str,
    learning_rates: Mapping[str, float],
    settings: Settings,
    layout: so.BlockLayout,
    period: int,
    on_step: Callable[[int], None],
) -> int:
    """Trains with each optimizer in turn and reports; the body of an example's main.

    Args:
      task: what to train on.
      recipes: how to make each optimizer.
      arguments: as parsed by ``new_parser``.
      title: of the table and the picture.
      learning_rates: the tuned peak learning rate of each optimizer.
      settings: of the task, for refusing the checkpoints of another one.
      layout: of Shampoo's blocks, which checkpoints are saved by.
      period: steps from one refresh of Shampoo's roots to the next.
      on_step: called after each step with how many are done.

    Returns:
      The exit code.
    """
    console = new_console()
    schedule = Schedule(arguments.steps, arguments.eval_every, arguments.save_every)
    rates = {**learning_rates, **dict(arguments.learning_rate)}
    results = {}
    try:
        for name in arguments.optimizers:
            directory = arguments.run_dir / name
            if arguments.fresh:
                shutil.rmtree(directory, ignore_errors=True)
            optimizer = recipes[name](rates[name], schedule.steps)
            state, record = train(
                task,
                optimizer,
                schedule,
                name=name,
                directory=directory,
                settings=settings
                | {
                    "steps": schedule.steps,
                    "eval_every": schedule.eval_every,
                    "learning_rate": rates[name],
                    "seed": arguments.seed,
                },
                console=console,
                layout=layout,
                on_step=on_step,
            )
            results[name] = Result(
                record,
                optimizer_milliseconds(optimizer, state, period=period),
                state_bytes_per_parameter(state),
            )
        report(console, title, results, arguments.run_dir)
    except Stopped as stopped:
        console.print(str(stopped), soft_wrap=True)
        return EXIT_CODE
    except KeyboardInterrupt:
        console.print("stopped between runs; run the same command to resume")
        return EXIT_CODE
    return 0
