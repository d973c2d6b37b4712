"""Everything side by side: `make bench`, or `python -m benchmarks`.

Each part is a process of its own, one after another; within a part all optimizers take
turns. Writes a JSON file for each part, summary.json and pictures into
benchmarks/results/<platform>/. Ctrl-C ends it with a summary of what there is.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

from benchmarks import common, pictures, summary
from examples.training.progress import new_console


@dataclass(frozen=True)
class Part:
    """A script of this folder, and what is asked of it."""

    what: str
    module: str
    flags: tuple[str, ...] = ()
    default: bool = True


LEARN = ("--task", "digits", "--seeds", "3", "--time-again", "--optimizers")
PARTS = {
    "roots": Part("root methods: error, products, time", "roots"),
    "bases": Part("basis methods: how diagonal, how orthogonal, time", "bases"),
    "step": Part("a step, beside every peer", "step"),
    "compile": Part("the program of 96 layers against 12", "compile"),
    "first_call": Part("the first call, 200 different arrays", "first_call"),
    "run_once": Part("one compilation in 1,000 steps", "run_once"),
    "staggered": Part("refreshes together and staggered, on fake devices", "staggered"),
    "memory": Part("bytes of state a parameter", "lean", ("--weigh",)),
    "digits": Part(
        "steps to AdamW's loss on digits, three seeds",
        "convergence",
        (*LEARN, "adamw", "muon", "shampoo", "soap"),
    ),
    # About an hour each; what is in their files is not run again.
    "convergence": Part("steps to AdamW's losses", "convergence", default=False),
    "lean": Part("losses with a lean state", "lean", default=False),
    "checkpoints": Part("save and restore", "checkpoints", default=False),
}


def run(
    part: Part, flags: list[str], console: Console, now: Callable[[str], None]
) -> int:
    """One part to its end, its lines as they come; its exit status.

    ``now`` is told what it is at, which is not printed.
    """
    command = [sys.executable, "-m", f"benchmarks.{part.module}", *part.flags, *flags]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                text = line.rstrip("\n")
                if text.startswith(common.NOW):
                    now(text.removeprefix(common.NOW))
                    continue
                console.print(text, markup=False, highlight=False, soft_wrap=True)
            return process.wait()
        finally:
            process.kill()


def run_all(
    parts: dict[str, Part], folder: Path, args: argparse.Namespace, console: Console
) -> dict[str, str]:
    """All parts in turn; what went wrong, by part."""
    failed: dict[str, str] = {}
    now = TextColumn("{task.fields[now]}", style="dim", markup=False)
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(20), now
    with Progress(*columns, Elapsed(), console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(parts), now="")
        for number, (name, part) in enumerate(parts.items(), 1):
            label = f"{number} of {len(parts)}: {part.what}"
            progress.update(bar, description=label, completed=number - 1, now="")
            progress.console.rule(label, align="left")
            flags = ["--out", str(folder / f"{name}.json")]
            flags += ["--quick"] if args.quick else []
            if name == "step" and args.torch_python:
                flags += ["--torch-python", args.torch_python]
            begin = time.monotonic()
            try:
                status = run(
                    part, flags, progress.console, lambda x: progress.update(bar, now=x)
                )
            except KeyboardInterrupt:
                failed[name] = "stopped"
                return failed
            if status:
                failed[name] = f"exit status {status}"
            seconds = time.monotonic() - begin
            progress.console.print(f"{name}: {seconds:.0f} s", style="dim")
    return failed


def platform() -> str:
    """JAX's default backend, asked elsewhere: this process holds no device."""
    code = "import jax; print(jax.default_backend())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"JAX finds no device:\n{done.stderr.strip()}")
    return done.stdout.split()[-1]


def load(folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    """The results that there are, by part."""
    paths = {name: folder / f"{name}.json" for name in names}
    return {name: json.loads(p.read_text()) for name, p in paths.items() if p.exists()}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser("benchmarks", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--all", action="store_true", help="also what takes hours: convergence, lean")
    add("--quick", action="store_true", help="tiny: does it all still run?")
    add("--results", type=Path, help="folder; default benchmarks/results/<platform>")
    add("--torch-python", help="an interpreter with PyTorch and its optimizers")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Runs, prints, writes; the exit status is 1 where a part failed."""
    args = parse(arguments)
    console = new_console()
    chosen = [name for name, part in PARTS.items() if part.default or args.all]
    parts = {name: PARTS[name] for name in (args.only or chosen)}
    folder = args.results
    if folder is None and args.quick:
        folder = Path(tempfile.mkdtemp(prefix="bench-"))
    folder = folder or common.RESULTS / platform()
    folder.mkdir(parents=True, exist_ok=True)
    failed = run_all(parts, folder, args, console)
    found = load(folder, list(PARTS))
    figures = summary.figures(found)
    console.print(summary.table(figures), soft_wrap=True)
    summary.write(folder / "summary.json", figures, found, failed)
    written = ["summary.json", *pictures.save(folder, found)]
    console.print(f"written: {', '.join(written)} in {folder}", soft_wrap=True)
    for name, why in failed.items():
        console.print(f"{name}: {why}", style="red")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
