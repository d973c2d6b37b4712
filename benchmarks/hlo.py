"""What a compiled program sends between devices, read from its optimised HLO.

Bytes are those that one device receives in a step. Loops count as often as they run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "send",
)
WIDTHS = {"pred": 1, "bf16": 2, "f8e4m3fn": 1, "f8e5m2": 1}
SHAPE = re.compile(r"\b(pred|bf16|f8\w+|[fsu]\d+)\[([\d,]*)\]")
INSTRUCTION = re.compile(r"(?:ROOT )?%?[\w.-]+ = (.*?) ([a-z][\w-]*)\((.*)")


@dataclass(frozen=True)
class Collective:
    """One collective of a program."""

    kind: str
    group: int  # devices that take part
    payload: float  # bytes of its result on one device
    times: int  # a step
    inside: bool  # of a branch or a loop

    @property
    def wire(self) -> float:
        """Bytes that a device receives in a step."""
        n, b = self.group, self.payload
        share = {
            "all-gather": b * (n - 1) / n,
            "all-reduce": 2 * b * (n - 1) / n,
            "reduce-scatter": b * (n - 1),
            "all-to-all": b * (n - 1) / n,
        }
        return self.times * share.get(self.kind, b)


def lines(text: str) -> int:
    """Instructions of a program, in all its computations."""
    return sum(1 for line in text.splitlines() if INSTRUCTION.match(line.strip()))


def collectives(text: str) -> list[Collective]:
    """Every collective that a step runs; of an asynchronous pair the beginning."""
    computations, entry = _computations(text)
    found = list(_walk(computations, entry, 1, False))
    seen, once = set(), []
    for channel, one in found:
        # A fusion repeats the text of a gather it contains.
        if channel is None or one.kind != "all-gather" or (channel, one) not in seen:
            once.append(one)
        seen.add((channel, one))
    return once


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, body = "", None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.-]+) .*\{\s*$", line)
        if head and not line.startswith(" "):
            body = computations.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif line.startswith("}"):
            body = None
        elif body is not None:
            body.append(line.strip())
    return computations, entry


def _walk(
    computations: dict[str, list[str]], name: str, times: int, inside: bool
) -> Iterator[tuple[str | None, Collective]]:
    for line in computations.get(name, []):
        parts = INSTRUCTION.match(line)
        if not parts:
            continue
        shape, op, _ = parts.groups()
        kind = op.removesuffix("-start")
        if kind in KINDS:
            channel = re.search(r"channel_id=(\d+)", line)
            payload = _payload(shape, kind, op != kind)
            yield (
                channel and channel[1],
                Collective(kind, _group(line), payload, times, inside),
            )
        deeper, often = inside, times
        if op == "while":
            count = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            deeper, often = True, times * (int(count[1]) if count else 1)
        for called in _called(line):
            yield from _walk(computations, called, often, deeper or op == "conditional")


def _called(line: str) -> list[str]:
    names = re.findall(
        r"(?:body|calls|to_apply|true_computation|false_computation)=%?([\w.-]+)", line
    )
    for listed in re.findall(r"(?:branch|called)_computations=\{([^}]*)\}", line):
        names += [name.strip().lstrip("%") for name in listed.split(",")]
    return names


def _payload(shape: str, kind: str, begins: bool) -> float:
    sizes = []
    for dtype, dims in SHAPE.findall(shape):
        width = WIDTHS.get(dtype) or int(re.sub(r"\D", "", dtype)) / 8
        sizes.append(width * math.prod(int(d) for d in dims.split(",") if d))
    if begins and kind in ("all-gather", "collective-permute", "all-reduce"):
        return max(sizes)  # operand, result and context
    if kind == "send":
        return max(sizes)
    return sum(sizes)


def _group(line: str) -> int:
    mesh = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if mesh:
        sizes = dict(re.findall(r"'?([\w]+)'?=(\d+)", mesh[1]))
        group = 1
        for axis in mesh[2].split(","):
            sub = re.match(r"\s*'?(\w+)'?(?::\(\d+\)(\d+))?", axis)
            group *= int(sub[2] or sizes[sub[1]]) if sub else 1
        return group
    listed = re.search(r"replica_groups=(\[[\d,]+\]|\{\{[\d,]*\})", line)
    if not listed:
        return 1
    if listed[1].startswith("["):
        return int(listed[1].strip("[]").split(",")[-1])
    return listed[1].count(",") + 1
