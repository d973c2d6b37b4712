"""What every benchmark shares: command line, environment, tables, JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"
NOW = "... "  # what a line of progress begins with
PACKAGES = ("jax", "jaxlib", "optax", "numpy", "psgdax")


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    """The flags that every script has: ``--quick`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="tiny sizes: does the script still run?"
    )
    where = f"benchmarks/results/<platform>/{name}.json"
    parser.add_argument(
        "--out", type=Path, help=f"JSON file; default {where}, none with --quick"
    )
    return parser


def say(what: str) -> None:
    """Progress, for one who waits; `make bench` shows the last of it."""
    print(NOW + what, file=sys.stderr, flush=True)


def environment() -> dict[str, Any]:
    """Versions and the hardware: what a reader needs to judge a figure."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "python": platform.python_version(),
        "versions": versions,
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.machine()


def heading(env: dict[str, Any]) -> str:
    """The environment in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in env["versions"].items() if v)
    return f"{env['device']} ({env['cpu']}), {env['cores']} cores, {versions}"


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A plain table: first column to the left, numbers to the right."""
    cells = [list(headers)] + [[_show(value) for value in row] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(headers))]
    lines = []
    for row in cells:
        first, *others = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *others]).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _show(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def save(args: argparse.Namespace, name: str, results: dict[str, Any]) -> None:
    """Write the results as JSON and say where."""
    path = args.out
    if path is None:
        if args.quick:
            return
        path = RESULTS / jax.default_backend() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    print(f"\nwritten: {os.path.relpath(path)}")
