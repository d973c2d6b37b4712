"""What convergence.py says at the end: figures, a table, a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator
from rich.console import Console
from rich.table import Table

from benchmarks.contenders import BASELINES
from examples.training.task import Schedule

Curve = Sequence[float]
BASELINE = "adamw"
TITLES = {
    "digits": "digits: small convolutional network",
    "lm": "lm: small transformer on bytes of Python",
}
# Colours that differ in brightness, too (Okabe and Ito); the baselines are greys.
COLOURS = {
    "adamw": "black",
    "muon": "#888888",
    "shampoo": "#0072B2",
    "shampoo, array": "#56B4E9",
    "kl_shampoo": "#009E73",
    "soap": "#D55E00",
    "spectral_descent": "#CC79A7",
}
# Where no block is cut, the two scopes are one curve: both must show.
STYLES = {**dict.fromkeys(BASELINES, "--"), "shampoo, array": "-."}
TICKS = {
    "digits": (0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5, 1),
    "lm": (1.5, 1.6, 1.8, 2, 2.25, 2.5, 3),
}


@dataclasses.dataclass(frozen=True)
class Goal:
    """A loss of AdamW's, and the share of its steps that we hope to need for it."""

    title: str
    place: Callable[[Curve], int]  # which of AdamW's evaluations
    bar: float


@dataclasses.dataclass(frozen=True)
class Contender:
    """One optimizer's runs at its best rate, and what its steps cost."""

    learning_rate: float
    curves: Sequence[Curve]  # one for each seed
    schedule: Schedule
    ms_per_step: float
    state_bytes_per_parameter: float


def _lowest(curve: Curve) -> int:
    return min(range(len(curve)), key=curve.__getitem__)


def _half_way(curve: Curve) -> int:
    return len(curve) // 2 - 1


def _last(curve: Curve) -> int:
    return len(curve) - 1


DIGITS_GOALS = (Goal("AdamW's best loss", _lowest, 0.64),)
LM_GOALS = (
    Goal("AdamW's loss half-way", _half_way, 0.6),
    Goal("AdamW's final loss", _last, 0.8),
)


def mean(curves: Sequence[Curve], schedule: Schedule) -> list[float]:
    """The mean over seeds; infinite from the first evaluation one of them lacks."""
    number = schedule.steps // schedule.eval_every
    whole = [[*curve, *[math.inf] * (number - len(curve))] for curve in curves]
    return [sum(losses) / len(losses) for losses in zip(*whole, strict=True)]


def share(curve: Curve, baseline: Curve, goal: Goal) -> float | None:
    """Steps to the goal over the baseline's steps to it; None where not reached."""
    place = goal.place(baseline)
    reached = (i for i, loss in enumerate(curve) if loss <= baseline[place])
    first = next(reached, None)
    return None if first is None else (first + 1) / (place + 1)


def _reach(contender: Contender, base: Contender, goal: Goal) -> dict[str, Any]:
    """When the mean curve and each seed's reach a goal."""
    schedule, ours = contender.schedule, mean(contender.curves, contender.schedule)
    theirs = mean(base.curves, schedule)
    adamw_steps = (goal.place(theirs) + 1) * schedule.eval_every
    of_mean = share(ours, theirs, goal)
    steps = None if of_mean is None else round(of_mean * adamw_steps)
    return {
        "loss": theirs[goal.place(theirs)],
        "adamw_steps": adamw_steps,
        "steps": steps,
        "share": of_mean,
        "share_by_seed": [
            share(curve, other, goal)
            for curve, other in zip(contender.curves, base.curves, strict=True)
        ],
        "seconds": None if steps is None else steps * contender.ms_per_step / 1e3,
    }


def figures(
    contenders: Mapping[str, Contender], goals: Sequence[Goal]
) -> dict[str, dict[str, Any]]:
    """Everything in the table, to be read by a program."""
    base = contenders[BASELINE]
    return {
        name: {
            "learning_rate": each.learning_rate,
            "final_loss": mean(each.curves, each.schedule)[-1],
            "best_loss": min(mean(each.curves, each.schedule)),
            "final_loss_by_seed": [curve[-1] for curve in each.curves if curve],
            "ms_per_step": each.ms_per_step,
            "state_bytes_per_parameter": each.state_bytes_per_parameter,
            "goals": {goal.title: _reach(each, base, goal) for goal in goals},
        }
        for name, each in contenders.items()
    }


def _range(shares: Sequence[float | None]) -> str:
    """The least and the most over seeds; a seed that never got there is the most."""
    reached = [value for value in shares if value is not None]
    if not reached:
        return ""
    most = f"{max(reached):.2f}" if len(reached) == len(shares) else "never"
    return f"{min(reached):.2f}-{most}"


def _bold(values: Sequence[float | None], form: str) -> list[str]:
    """A column, the least of it in bold."""
    least = min((value for value in values if value is not None), default=None)
    texts = ["never" if value is None else format(value, form) for value in values]
    return [
        f"[bold]{text}[/bold]" if value is not None and value == least else text
        for value, text in zip(values, texts, strict=True)
    ]


def show(
    console: Console, name: str, figures: Mapping[str, Any], goals: Sequence[Goal]
) -> None:
    """Prints a table for each goal of a task, with the best of each column in bold."""
    rows = list(figures.values())
    for goal in goals:
        reach = [row["goals"][goal.title] for row in rows]
        table = Table(
            title=f"{TITLES[name]}: to {goal.title}, {reach[0]['loss']:.4f}",
            caption=f"mean curve of {len(reach[0]['share_by_seed'])} seeds; (range of "
            "the seeds, each against AdamW's own); share wanted of the best: at most "
            f"{goal.bar:g}",
        )
        columns = {
            "optimizer": list(figures),
            "rate": [f"{row['learning_rate']:g}" for row in rows],
            "final loss": _bold([row["final_loss"] for row in rows], ".4f"),
            "steps": _bold([each["steps"] for each in reach], "d"),
            "share": _bold([each["share"] for each in reach], ".2f"),
            "(range)": [_range(each["share_by_seed"]) for each in reach],
            "seconds": _bold([each["seconds"] for each in reach], ".2f"),
            "ms a step": _bold([row["ms_per_step"] for row in rows], ".2f"),
            "state B/param": _bold(
                [row["state_bytes_per_parameter"] for row in rows], ".1f"
            ),
        }
        for title in columns:
            table.add_column(title, justify="left" if title == "optimizer" else "right")
        for cells in zip(*columns.values(), strict=True):
            table.add_row(*cells)
        console.print(table)


def _draw(
    axes: Axes, name: str, contenders: Mapping[str, Contender], goals: Sequence[Goal]
) -> None:
    """One task: the mean curves, and AdamW's losses as dotted lines."""
    curves = {key: mean(each.curves, each.schedule) for key, each in contenders.items()}
    every = contenders[BASELINE].schedule.eval_every
    for key in sorted(curves, key=lambda key: curves[key][-1]):
        curve = curves[key]
        steps = [every * (i + 1) for i in range(len(curve))]
        label = f"{key}: {curve[-1]:.3f}"
        style = STYLES.get(key, "-")
        axes.plot(steps, curve, style, color=COLOURS[key], linewidth=1.6, label=label)
    for goal in goals:
        loss = curves[BASELINE][goal.place(curves[BASELINE])]
        axes.axhline(loss, color="black", linestyle=":", linewidth=1)
        note = f"{goal.title}: {loss:.3f}"
        axes.annotate(
            note,
            (0, loss),
            xytext=(0, -2),
            textcoords="offset points",
            fontsize=7,
            va="top",
        )
    low = min(map(min, curves.values()))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(FixedLocator(TICKS[name]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.set_ylim(0.93 * low, TICKS[name][-1])
    axes.set_title(TITLES[name], fontsize=11)
    axes.set_xlabel("training steps")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(title="final loss", fontsize=8)


def save_picture(
    path: Path,
    found: Mapping[str, Mapping[str, Contender]],
    goals: Mapping[str, Sequence[Goal]],
) -> None:
    """Draws a panel for each task."""
    figure = Figure(figsize=(5.5 * len(found), 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(found), squeeze=False)[0]
    for axes, (name, contenders) in zip(panels, found.items(), strict=True):
        _draw(axes, name, contenders, goals[name])
    panels[0].set_ylabel("validation loss")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
