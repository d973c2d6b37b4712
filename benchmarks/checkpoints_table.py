"""Fills the table of docs/checkpoints.md from what `make soak` and the timings found.

python -m benchmarks.checkpoints_table          prints it
python -m benchmarks.checkpoints_table --write  puts it into the page
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "checkpoints.md"
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
BEGIN, END = "<!-- from benchmarks/checkpoints_table.py -->\n", "<!-- end -->\n"
ROWS = {
    "kill": (
        "kill -9 at random points, also during saves, resumed on 8, 4, 1, 8, 2, 3, 5, "
        "6 devices, against the run that was never killed",
        "tests/test_kill.py",
    ),
    "walk": ("walk 8 → 4 → 1 → 8 → 2, deterministic", "tests/test_checkpoint.py"),
    "mesh": (
        "one device's state on 2, 3, 5, 8 devices, FSDP, ZeRO-1, HSDP, "
        "tensor-parallel: the view bitwise, the next step within",
        "tests/test_view.py",
    ),
    "flip": (
        "single flipped bits, anywhere in a step's files",
        "tests/test_checkpoint.py",
    ),
    "damage": ("broken files: in our words, every one", "tests/test_checkpoint.py"),
    "hostile": (
        "hostile specs (huge and negative shapes, unknown dtypes, `..`, dots, missing "
        "parts): refused, nothing written outside",
        "tests/test_checkpoint.py",
    ),
    "memory": ("memory that they take", "tests/test_checkpoint.py"),
    "processes": ("saved by two processes of four devices", "tests/test_processes.py"),
}


def table(results: Path = RESULTS) -> str:
    """The table as Markdown.

    Raises:
      KeyError: a row has no result.
    """
    found: dict[str, list[str]] = {}
    for line in (results / "soak.jsonl").read_text().splitlines():
        said = json.loads(line)
        found.setdefault(said["name"], []).append(said["result"])
    found["mesh"] = [f"{max(map(float, found['mesh'])):.1e} of the largest"]
    found["hostile"] = [f"{len(found['hostile'])} of {len(found['hostile'])}"]
    rows = ["| | result | by |", "|---|---|---|"]
    for name, (what, test) in ROWS.items():
        rows.append(f"| {what} | {', '.join(sorted(set(found[name])))} | `{test}` |")
    times = json.loads((results / "checkpoints.json").read_text())
    size = times["ours"]["bytes"] / 1e9
    labels = {"save": "save", "restore": "restore", "peak_over_state": "peak memory"}
    for key, label in labels.items():
        ours, orbax = times["ours"][key], times["orbax"][key]
        unit = "of the state" if key == "peak_over_state" else "s"
        rows.append(
            f"| {label}, {size:.2f} GB | {ours:.2f} {unit}, Orbax's own of the raw "
            f"trees {orbax:.2f}: {ours / orbax:.2f}x | `benchmarks/checkpoints.py` |"
        )
    return "\n".join(rows) + "\n"


def filled(page: str, rows: str) -> str:
    """The page with the table between its marks."""
    before, rest = page.split(BEGIN)
    return before + BEGIN + rows + END + rest.split(END)[1]


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(filled(PAGE.read_text(), table()))
    else:
        print(table(), end="")
