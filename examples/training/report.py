"""The end of a run: a table, a picture, and the same figures as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter
from rich.console import Console
from rich.table import Table

from examples.training.task import Record

BASELINE = "adamw"


@dataclasses.dataclass(frozen=True)
class Result:
    """One optimizer's run and what it cost."""

    record: Record
    optimizer_milliseconds: float
    state_bytes_per_parameter: float


def first_at_or_below(record: Record, loss: float) -> dict[str, float] | None:
    """Finds the first evaluation that is as good as ``loss``, if there is one."""
    return next((row for row in record.evaluations if row["loss"] <= loss), None)


def _rows(results: Mapping[str, Result]) -> list[tuple[str, list[str]]]:
    """Lays out the table: a name, and a cell for each optimizer."""
    each = list(results.values())
    rows = [("validation loss", [f"{r.record.final['loss']:.4f}" for r in each])]
    for name in sorted(each[0].record.final.keys() - {"step", "seconds", "loss"}):
        cells = [f"{r.record.final[name]:.4f}" for r in each]
        rows.append((f"validation {name}", cells))
    if BASELINE in results:
        goal = results[BASELINE].record.final["loss"]
        reached = [first_at_or_below(r.record, goal) for r in each]
        for unit, form in (("step", ".0f"), ("seconds", ".1f")):
            cells = [f"{row[unit]:{form}}" if row else "never" for row in reached]
            label = "steps" if unit == "step" else unit
            rows.append((f"{label} to AdamW's final loss", cells))
    rows += [
        ("training seconds", [f"{r.record.train_seconds:.1f}" for r in each]),
        ("optimizer ms per step", [f"{r.optimizer_milliseconds:.2f}" for r in each]),
        (
            "state bytes per parameter",
            [f"{r.state_bytes_per_parameter:.1f}" for r in each],
        ),
        ("compile seconds", [f"{r.record.compile_seconds:.1f}" for r in each]),
    ]
    return rows


def show_table(console: Console, title: str, results: Mapping[str, Result]) -> None:
    """Prints one column for each optimizer."""
    table = Table(title=title, caption="Seconds are those of training steps alone.")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for name, cells in _rows(results):
        table.add_row(name, *cells)
    console.print(table)


def save_picture(path: Path, title: str, results: Mapping[str, Result]) -> None:
    """Draws validation loss over steps and over seconds."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title)
    panels = figure.subplots(1, 2, sharey=True)
    axes = (("step", "training steps"), ("seconds", "seconds of training steps"))
    for panel, (key, label) in zip(panels, axes, strict=True):
        for name, result in results.items():
            rows = result.record.evaluations
            x, y = [row[key] for row in rows], [row["loss"] for row in rows]
            final = f"{name}: {y[-1]:.3f}"
            panel.plot(x, y, marker=".", markersize=4, label=final)
        panel.set_xlabel(label)
        panel.set_yscale("log")
        for axis in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
            axis(FormatStrFormatter("%g"))
        panel.grid(which="both", alpha=0.3)
        if BASELINE in results:
            goal = results[BASELINE].record.final["loss"]
            panel.axhline(goal, color="grey", linestyle=":", linewidth=1)
    panels[0].set_ylabel("validation loss")
    panels[0].legend(title="final loss")
    figure.savefig(path, dpi=120)


def save_figures(path: Path, results: Mapping[str, Result]) -> None:
    """Writes everything in the table and the picture, to be read by a program."""
    figures = {name: dataclasses.asdict(result) for name, result in results.items()}
    path.write_text(json.dumps(figures, indent=2) + "\n")


def report(
    console: Console, title: str, results: Mapping[str, Result], directory: Path
) -> None:
    """Prints the table, and writes ``loss.png`` and ``results.json``."""
    show_table(console, title, results)
    save_figures(directory / "results.json", results)
    save_picture(directory / "loss.png", title, results)
    console.print(f"picture: {directory / 'loss.png'}", soft_wrap=True)
