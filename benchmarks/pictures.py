"""Pictures of the results: what a step costs, and what roots cost for their error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from benchmarks import summary

OURS, OTHERS = "#c2410c", "#64748b"
DPI = 130


def save(folder: Path, found: dict[str, dict[str, Any]]) -> list[str]:
    """Draws what there are results for; the files' names."""
    drawn = []
    for name, draw in PICTURES.items():
        if name in found:
            draw(found[name], folder / f"{name}.png")
            drawn.append(f"{name}.png")
    return drawn


def step(results: dict[str, Any], path: Path) -> None:
    """A panel for each model: plain and average step, in units of AdamW's."""
    models = {
        name: of["optimizers"]
        for name, of in results.items()
        if isinstance(of, dict) and "optimizers" in of
    }
    longest = max(len(_measured(each)) for each in models.values())
    rows = (len(models) + 1) // 2
    figure, panels = plt.subplots(
        rows,
        min(2, len(models)),
        figsize=(6.2 * min(2, len(models)), rows * (1.5 + 0.36 * longest)),
        squeeze=False,
    )
    for panel, (model, each) in zip(panels.flat, models.items(), strict=False):
        _bars(panel, _measured(each), results["meta_times_adamw"].get(model))
        panel.set_title(model, loc="left", fontweight="bold")
    for panel in list(panels.flat)[len(models) :]:
        panel.set_axis_off()
    handles = [Patch(color=OURS, label="ours: plain step")]
    handles.append(Patch(color=OTHERS, label="others: plain step"))
    handles.append(Patch(color=OTHERS, alpha=0.35, label="average with refreshes"))
    figure.legend(handles=handles, ncols=3, loc="lower center", frameon=False)
    env = results["environment"]
    figure.suptitle(
        "Time of an optimizer's step over AdamW's of the same framework\n"
        f"{env['device']} ({env['cpu']}), {env['cores']} cores",
        fontsize=11,
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _measured(each: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Plain and average step of all but the units themselves, over their unit."""
    found = {}
    for name, r in each.items():
        if "failure" not in r and name != r.get("base", "adamw"):
            unit = each[r.get("base", "adamw")]["plain_ms"]
            found[name] = r["plain_ms"] / unit, r["average_ms"] / unit
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _bars(
    panel: Axes, each: dict[str, tuple[float, float]], elsewhere: float | None
) -> None:
    for y, (name, (plain, average)) in enumerate(each.items()):
        color = OURS if name in summary.OURS else OTHERS
        panel.barh(y, average, color=color, alpha=0.35, height=0.72)
        panel.barh(y, plain, color=color, height=0.4)
        text = f"{_short(plain)}, {_short(average)}"
        white = {"facecolor": "white", "alpha": 0.8, "pad": 0.5, "linewidth": 0}
        place = 1.06 * max(plain, average)
        panel.text(place, y, text, va="center", fontsize=8, bbox=white, zorder=3)
    panel.set_yticks(range(len(each)), list(each), fontsize=8)
    for label in panel.get_yticklabels():
        if label.get_text() in summary.OURS:
            label.set(color=OURS, fontweight="bold")
    largest = max(max(pair) for pair in each.values())
    panel.set_xscale("log")
    least = min(min(pair) for pair in each.values())
    panel.set_xlim(0.6 * min(1.0, least), largest * 6)
    if elsewhere is not None:
        panel.axvline(elsewhere, color="black", linestyle=":", linewidth=1.2)
        where = (elsewhere, len(each) - 0.45)
        label = "Meta's, plain"
        panel.annotate(label, where, fontsize=7, ha="center", va="bottom")
    panel.set_ylim(-0.6, len(each) - 0.1)
    panel.spines[["top", "right"]].set_visible(False)


def _short(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def roots(results: dict[str, Any], path: Path) -> None:
    """A panel for each size: worst errors over products of matrices."""
    sizes = results["sizes"]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(1.5 + 4.2 * len(sizes), 5), squeeze=False, sharey=True
    )
    for panel, (size, found) in zip(panels.flat, sizes.items(), strict=True):
        _errors(panel, found["methods"])
        panel.set_title(f"{size} x {size}", loc="left", fontweight="bold")
        panel.set_xlabel("products of matrices; of eigh, its time in products")
    panels[0, 0].set_ylabel("worst error over all spectra")
    figure.suptitle("Inverse fourth roots", fontsize=11)
    marks = [
        Line2D(
            [],
            [],
            color="black",
            marker="o",
            linestyle="",
            label="error of a direction",
        ),
        Line2D(
            [],
            [],
            color="black",
            marker="o",
            markerfacecolor="white",
            linestyle="",
            label="error of the root",
        ),
    ]
    lines = [line for line in panels[0, 0].lines if line.get_label()[0] != "_"]
    figure.legend(
        handles=[*lines, *marks],
        ncols=4,
        fontsize=8,
        frameon=False,
        loc="lower center",
    )
    figure.tight_layout(rect=(0, 0.09, 1, 1))
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _errors(panel: Axes, methods: dict[str, Any]) -> None:
    for i, (name, method) in enumerate(methods.items()):
        color, kinds = f"C{i}", method["kinds"].values()
        x = method["products"]
        x = method["time_over_product"] if x is None else x
        low, high = (max(k[what] for k in kinds) for what in ("direction", "root"))
        panel.plot([x, x], [low, high], color=color, linewidth=1, alpha=0.6)
        panel.plot(x, high, "o", color=color, markerfacecolor="white")
        panel.plot(x, low, "o", color=color, label=name)
    panel.set_xlim(left=0)
    panel.set_yscale("log")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "step": step,
    "roots": roots,
}
