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
LABELS = {
    "save": "save",
    "restore": "restore",
    "elsewhere": "restore, every block moved",
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
    size = times["save"]["ours"]["bytes"] / 1e9
    for what, label in LABELS.items():
        ours = times[what]["ours"]
        raw, same = (
            ({**times["restore"], **times[what]})[how] for how in ("orbax", "view")
        )
        for figure, unit in (("seconds", " s"), ("memory", " of the state")):
            each = (
                f"{other[figure]:.2f} {of}: {ours[figure] / other[figure]:.2f}x"
                for other, of in ((raw, "of the raw trees"), (same, "of the view"))
            )
            name = label if figure == "seconds" else f"{label}: peak memory"
            rows.append(
                f"| {name}, {size:.2f} GB | {ours[figure]:.2f}{unit}; Orbax's own "
                f"{', '.join(each)} | `benchmarks/checkpoints.py` |"
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
