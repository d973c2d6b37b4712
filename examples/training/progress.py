"""Shows how far a run is: a live bar in a terminal, now and then a line elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

LINES = 10  # in a log, for a whole run


class Display(Protocol):
    """Called after every step."""

    def __call__(
        self, step: int, *, loss: float, speed: float, validation: float | None = None
    ) -> None: ...


def new_console() -> Console:
    """Makes a console that does not redraw where nobody can watch."""
    watched = None if os.environ.get("CI", "").lower() in ("", "0", "false") else False
    return Console(force_terminal=watched, highlight=False)


def _text(loss: float, speed: float, validation: float | None) -> str:
    seen = "" if validation is None else f"  validation {validation:.3f}"
    return f"loss {loss:.3f}{seen}  {speed:.1f} steps/s"


@contextmanager
def _bar(console: Console, name: str, first: int, steps: int) -> Iterator[Display]:
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[text]}"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task(name, total=steps, completed=first, text="")

        def show(
            step: int, *, loss: float, speed: float, validation: float | None = None
        ) -> None:
            text = _text(loss, speed, validation)
            progress.update(bar, completed=step, text=text)

        yield show


@contextmanager
def _lines(console: Console, name: str, first: int, steps: int) -> Iterator[Display]:
    every = max(1, steps // LINES)
    if first:
        console.print(f"{name}: resumes after step {first}", soft_wrap=True)

    def show(
        step: int, *, loss: float, speed: float, validation: float | None = None
    ) -> None:
        if step % every == 0 or step == steps:
            text = _text(loss, speed, validation)
            console.print(f"{name} {step}/{steps}  {text}", soft_wrap=True)

    yield show


def progress(
    console: Console, name: str, first: int, steps: int
) -> AbstractContextManager[Display]:
    """Opens the display of one run.

    Args:
      console: where to show it.
      name: of the run.
      first: how many steps were done before.
      steps: how many there are in all.

    Returns:
      A context manager that yields a ``Display``.
    """
    show = _bar if console.is_terminal else _lines
    return show(console, name, first, steps)
