"""Every figure with a bar, from the results of all parts, in one table."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

Results = dict[str, dict[str, Any]]
REFRESH_OVER_EIGH = 1.2
STAGGERED = 1.3  # docs/scale.md
# Of a step on a CPU, blocks of 256: over its arithmetic, and on average over AdamW's.
PLAIN_OVER_FLOOR = {"mlp": 1.4, "transformer": 1.4, "convnet": 2.0, "small": 4.0}
AVERAGE_OVER_ADAMW = {"transformer": 6.0}
FIRST_CALL, FIRST_CALL_MB = 2.0, 1.0  # over AdamW's; of StableHLO
PRODUCTS, ROOT_ERROR, DIRECTION_ERROR = 30, 5e-3, 1e-3  # of minimax roots
BYTES = {"float32": 24.5, "lean": 12.1, "leanest": 8.1}  # a parameter, all in blocks
LEANEST_LOSS = 0.01  # over float32's
OURS = ("shampoo", "soap")
# Not preconditioned by Kronecker factors: no peers of ours in what they do.
CHEAP = ("adamw", "muon", "torch adamw", "torch adamw fused")


class Figure(NamedTuple):
    """One figure of one part."""

    part: str
    what: str
    value: float
    bar: float | None = None  # at most this

    @property
    def met(self) -> bool | None:
        """Whether it is within its bar; None where there is none."""
        return None if self.bar is None else self.value <= self.bar


def figures(found: Results) -> list[Figure]:
    """All of them, by part in the order of the results."""
    return [
        Figure(part, *figure)
        for part, results in found.items()
        for figure in OF_PART.get(part, lambda results: ())(results)
    ]


def table(found: list[Figure]) -> Table:
    """As one prints it."""
    shown = Table("part", "figure", title="All figures", title_justify="left")
    for column in ("measured", "at most", ""):
        shown.add_column(column, justify="right")
    before = None
    for figure in found:
        bar = "" if figure.bar is None else f"{figure.bar:.4g}"
        mark = {True: "[green]met[/]", False: "[red]missed[/]", None: ""}[figure.met]
        part = figure.part if figure.part != before else ""
        shown.add_row(part, figure.what, f"{figure.value:.4g}", bar, mark)
        before = figure.part
    return shown


def write(
    path: Path, found: list[Figure], results: Results, failed: dict[str, str]
) -> None:
    """The same as JSON, with the environment that each part ran in."""
    lines = [figure._asdict() | {"met": figure.met} for figure in found]
    environments = {part: each.get("environment") for part, each in results.items()}
    content = {"figures": lines, "failed": failed, "environments": environments}
    path.write_text(json.dumps(content, indent=1) + "\n")


Lines = Iterator[tuple[str, float] | tuple[str, float, float | None]]


def _roots(results: dict[str, Any]) -> Lines:
    size, largest = max(results["sizes"].items(), key=lambda each: int(each[0]))
    for name in ("minimax", "eigh float64"):
        method = largest["methods"][name]
        kinds = method["kinds"].values()
        title = f"{name}, {size}"
        if method["products"] is not None:
            yield f"{title}: products of matrices", method["products"], PRODUCTS
        for error, bar in (("root", ROOT_ERROR), ("direction", DIRECTION_ERROR)):
            worst = max(kind[error] for kind in kinds)
            yield f"{title}: {error} error, worst", worst, bar
        yield f"{title}: roots refused", sum(not k["accepted"] for k in kinds), 0


def _step(results: dict[str, Any]) -> Lines:
    for model, of in results.items():
        if not isinstance(of, dict) or "optimizers" not in of:
            continue
        each = {k: v for k, v in of["optimizers"].items() if "failure" not in v}
        ours, adamw = each["shampoo"], each["adamw"]
        plain, average = ours["plain_ms"], ours["average_ms"]
        elsewhere = results["meta_times_adamw"].get(model)
        yield f"{model}: plain step / AdamW's", plain / adamw["plain_ms"], elsewhere
        bar = PLAIN_OVER_FLOOR.get(model)
        yield f"{model}: plain step / floor", plain / of["floor_ms"], bar
        if "products_ms" in of:
            yield (
                f"{model}: its products alone / floor",
                of["products_ms"] / of["floor_ms"],
            )
        if "refresh_over_eigh" in ours:
            over = ours["refresh_over_eigh"]
            yield f"{model}: refresh / its eigh", over, REFRESH_OVER_EIGH
            over = ours["refresh_over_eigh_cpu"]
            yield f"{model}: the same in CPU time", over
        bar = AVERAGE_OVER_ADAMW.get(model)
        yield f"{model}: average step / AdamW's", average / adamw["plain_ms"], bar
        yield f"{model}: first call / AdamW's", ours["first_s"] / adamw["first_s"]
        if "soap" in each:
            over = each["soap"]["average_ms"] / adamw["plain_ms"]
            yield f"{model}: SOAP's average step / AdamW's", over
        for name, peer in each.items():
            if name not in (*CHEAP, *OURS):
                yield f"{model}: average ms / {name}'s", average / peer["average_ms"]


def _compile(results: dict[str, Any]) -> Lines:
    for name, value in results["ratios"].items():
        yield name, value, results["bars"].get(name)


def _first_call(results: dict[str, Any]) -> Lines:
    each = results["results"]
    for name in OURS:
        ratio = each[name]["seconds"] / each["adamw"]["seconds"]
        bars = (FIRST_CALL, FIRST_CALL_MB) if name == "shampoo" else (None, None)
        yield f"200 different arrays: {name} / AdamW's", ratio, bars[0]
        size = each[name]["MB"]
        yield f"200 different arrays: {name}, MB of StableHLO", size, bars[1]


def _run_once(results: dict[str, Any]) -> Lines:
    ours = results["optimizers"]["shampoo"]
    yield f"compilations in {ours['steps']} steps", ours["compilations"], 1
    yield "calls of the host in a step's program", ours["host_calls_in_hlo"], 0


def _staggered(results: dict[str, Any]) -> Lines:
    each = results["results"]
    for name, bar in (("staggered", STAGGERED), ("together", None)):
        yield f"{name}: worst step / median", each[name]["worst_over_median"], bar


def _memory(results: dict[str, Any]) -> Lines:
    held = results["bytes_per_parameter"]
    for name, bar in BYTES.items():
        title = f"1.3B in blocks, {name}: state bytes a parameter"
        yield title, held[f"shampoo {name}"]["1.3B square"], bar


def _lean(results: dict[str, Any]) -> Lines:
    loss = results.get("loss", {})
    if "shampoo leanest" in loss:
        rise = loss["shampoo leanest"] / loss["shampoo float32"] - 1.0
        yield "leanest: loss above float32's, share", rise, LEANEST_LOSS


def _learning(results: dict[str, Any]) -> Lines:
    for task, each in results.get("figures", {}).items():
        for name, found in each.items():
            for goal, reached in found["goals"].items():
                if name != "adamw":
                    share = reached["share"]
                    value = math.inf if share is None else share
                    yield f"{task}: {name}, steps to {goal} / AdamW's", value


OF_PART = {
    "roots": _roots,
    "step": _step,
    "compile": _compile,
    "first_call": _first_call,
    "run_once": _run_once,
    "staggered": _staggered,
    "memory": _memory,
    "lean": _lean,
    "digits": _learning,
    "convergence": _learning,
}
