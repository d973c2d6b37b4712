"""How soon each optimizer has AdamW's losses, each at its own best learning rate.

Two tasks of the examples: digits (a convolutional network, 200 steps) and lm (a small
transformer on bytes of Python's library, 500 steps). For every optimizer the same
sweep of peak rates (examples/sweep_lm.py: a factor two apart until the best lies
between two worse, then its neighbours at the square root of two), by the validation
loss after 200 steps: three seeds of digits, one of lm. At the best rate three seeds
are trained to the end. Batches, start, schedule, weight decay, clip are the same.

Seconds are steps times the milliseconds of a whole training step, measured at the end
of all, in rounds of ten steps of each optimizer in turn (one refresh a round).

Every run is written to the JSON file as it ends; what is there is not run again.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import jax
from rich.console import Console

from benchmarks import common, contenders, convergence_report
from benchmarks.convergence_runs import Key, Problem, Runs, Trainer
from examples import sweep_lm, train_digits, train_lm
from examples.lm.data import load_corpus
from examples.lm.task import language_model
from examples.training.loop import advance, compile_step
from examples.training.measure import state_bytes_per_parameter
from examples.training.progress import new_console
from examples.training.task import Record, Schedule, Task

SWEEP_SEEDS = 3  # of digits; further seeds (--seeds 10) have no say in the rates
# Of ten steps each, when steps are timed: a second or two of each optimizer, or more.
ROUNDS = {"digits": 100, "lm": 12}
NAMES = tuple(contenders.makers(1))


def problems(seeds: int, *, quick: bool) -> dict[str, Problem]:
    """Makes both, by name; tiny ones to see whether the script still runs."""
    shape, batch = train_lm.SHAPE, train_lm.BATCH
    if quick:
        shape = shape._replace(context=16, width=16, layers=1, hidden=16)
    corpus = load_corpus()

    def lm(seed: int) -> Task:
        return language_model(corpus, shape, batch_size=batch, seed=seed)

    def steps(number: int, every: int) -> Schedule:
        return Schedule(number, every, number) if not quick else Schedule(10, 5, 10)

    return {
        "digits": Problem(
            train_digits.digits,
            {"batch": train_digits.BATCH, "clip": None},
            contenders.recipes(train_digits.LARGEST, clip=None),
            sweep=steps(200, 5),
            sweep_seeds=min(seeds, SWEEP_SEEDS),
            final=steps(200, 5),
            goals=convergence_report.DIGITS_GOALS,
        ),
        "lm": Problem(
            lm,
            shape._asdict()
            | {"batch": batch, "clip": 1.0, "corpus": len(corpus.train)},
            contenders.recipes(train_lm.LARGEST, clip=1.0),
            sweep=steps(200, 200),
            sweep_seeds=1,
            final=steps(500, 10),
            goals=convergence_report.LM_GOALS,
        ),
    }


def borrow(runs: Runs, problem: Problem) -> None:
    """Takes over what examples/sweep_lm.json knows: the same sweep of two of them."""
    shape = {name: problem.settings[name] for name in train_lm.SHAPE._fields}
    settings = shape | {"batch": train_lm.BATCH, "steps": 200, "seeds": 1}
    if problem.sweep.steps != 200:
        return
    for optimizer, tried in sweep_lm.load(sweep_lm.RESULTS, settings).items():
        for rate, loss in tried.items():
            key = Key("lm", optimizer, float(rate), 200, problem.sweep.eval_every, 0)
            if key not in runs:
                runs[key] = [loss]


def costs(
    problem: Problem, rates: Mapping[str, float], console: Console, *, rounds: int
) -> dict[str, dict[str, float]]:
    """Times whole training steps of all optimizers in turn, and weighs their states."""
    task = problem.make(0)
    states, steps, records = {}, {}, {}
    for name, rate in rates.items():
        with console.status(f"compiling {name}"):
            states[name] = task.start(problem.recipes[name](rate, problem.final.steps))
            steps[name], _ = compile_step(task, states[name], task.batch(0))
            records[name] = Record({})
    bytes_each = {name: state_bytes_per_parameter(states[name]) for name in rates}
    milliseconds: dict[str, list[float]] = {name: [] for name in rates}
    for number in range(rounds + 1):
        for name, record in records.items():
            before = record.train_seconds
            with console.status(f"timing {name}, round {number} of {rounds}"):
                for _ in range(contenders.FREQUENCY):
                    batch = jax.block_until_ready(task.batch(record.step))
                    states[name], _ = advance(steps[name], states[name], batch, record)
            each = (record.train_seconds - before) / contenders.FREQUENCY
            milliseconds[name].append(1e3 * each)
    return {
        name: {
            # The first round warms up.
            "ms_per_step": statistics.median(milliseconds[name][1:]),
            "state_bytes_per_parameter": bytes_each[name],
        }
        for name in rates
    }


def compare(
    trainer: Trainer, names: Iterable[str], seeds: int, *, again: bool, rounds: int
) -> dict[str, convergence_report.Contender]:
    """Sweeps, trains and times one task's optimizers."""
    problem, known = trainer.problem, trainer.runs.content["costs"]
    if trainer.name == "lm":
        borrow(trainer.runs, problem)
    rates, curves = {}, {}
    for name in names:
        rates[name] = trainer.best_rate(name)
        curves[name] = trainer.curves(name, rates[name], problem.final, seeds)
    if again or rates.keys() - known.get(trainer.name, {}).keys():
        known[trainer.name] = costs(problem, rates, trainer.console, rounds=rounds)
    return {
        name: convergence_report.Contender(
            rates[name], curves[name], problem.final, **known[trainer.name][name]
        )
        for name in rates
    }


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = common.arguments(__doc__, "convergence")
    add = parser.add_argument
    add("--task", choices=("digits", "lm", "all"), default="all")
    add("--seeds", type=int, default=3, help="trained at the best rate, default 3")
    add("--optimizers", nargs="*", choices=NAMES, default=NAMES, metavar="NAME")
    add("--time-again", action="store_true", help="measure milliseconds anew")
    add("--picture", type=Path, help="PNG file; default none")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Trains, prints, writes."""
    args = parse(arguments)
    seeds = 1 if args.quick else args.seeds
    # Others are measured by AdamW's losses, so it is always there.
    names = [name for name in NAMES if name in {"adamw", *args.optimizers}]
    console = new_console()
    env = common.environment()
    console.print(common.heading(env), soft_wrap=True)
    path = args.out
    if path is None and not args.quick:
        path = common.RESULTS / env["platform"] / "convergence.json"
    every = problems(seeds, quick=args.quick)
    settings = {
        "weight_decay": contenders.WEIGHT_DECAY,
        "precondition_frequency": contenders.FREQUENCY,
        **{name: problem.settings for name, problem in every.items()},
    }
    runs = Runs(path, settings)
    runs.content["environment"] = env
    found = {}
    with tempfile.TemporaryDirectory() as cache:
        # Seeds of one rate are one program: the second finds it compiled.
        jax.config.update("jax_compilation_cache_dir", cache)
        for name, problem in every.items():
            if args.task in (name, "all"):
                found[name] = compare(
                    Trainer(name, problem, runs, console),
                    names[:3] if args.quick else names,
                    seeds,
                    again=args.time_again,
                    rounds=1 if args.quick else ROUNDS[name],
                )
    for name, contestants in found.items():
        goals = every[name].goals
        figures = convergence_report.figures(contestants, goals)
        runs.content.setdefault("figures", {})[name] = figures
        convergence_report.show(console, name, figures, goals)
    runs.write()
    if args.picture is not None:
        goals_of = {name: problem.goals for name, problem in every.items()}
        convergence_report.save_picture(args.picture, found, goals_of)


if __name__ == "__main__":
    main()
