"""Pictures of the results: what a step costs, and what roots cost for their error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

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
    handles = [Patch(color=OURS, label="shampoo: plain step")]
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
        if "failure" not in r and name != r["base"]:
            unit = each[r["base"]]["plain_ms"]
            found[name] = r["plain_ms"] / unit, r["average_ms"] / unit
    return dict(sorted(found.items(), key=lambda item: -item[1][1]))


def _bars(
    panel: Axes, each: dict[str, tuple[float, float]], elsewhere: float | None
) -> None:
    for y, (name, (plain, average)) in enumerate(each.items()):
        color = OURS if name == "shampoo" else OTHERS
        panel.barh(y, average, color=color, alpha=0.35, height=0.72)
        panel.barh(y, plain, color=color, height=0.4)
        text = f" {plain:.3g}, {average:.3g}"
        panel.text(max(plain, average), y, text, va="center", fontsize=8)
    panel.set_yticks(range(len(each)), list(each), fontsize=8)
    for label in panel.get_yticklabels():
        if label.get_text() == "shampoo":
            label.set(color=OURS, fontweight="bold")
    largest = max(max(pair) for pair in each.values())
    panel.set_xscale("log")
    panel.set_xlim(min(0.8, *(min(pair) for pair in each.values())), largest * 6)
    if elsewhere is not None:
        panel.axvline(elsewhere, color=OURS, linestyle=":", linewidth=1.2)
        where = (elsewhere, len(each) - 0.45)
        label = "Meta's, plain"
        panel.annotate(label, where, fontsize=7, color=OURS, ha="center", va="bottom")
    panel.set_ylim(-0.6, len(each) - 0.1)
    panel.spines[["top", "right"]].set_visible(False)


def roots(results: dict[str, Any], path: Path) -> None:
    """A panel for each size: worst errors over products of matrices."""
    sizes = results["sizes"]
    figure, panels = plt.subplots(
        1, len(sizes), figsize=(1.5 + 4.2 * len(sizes), 4.4), squeeze=False, sharey=True
    )
    for panel, (size, found) in zip(panels.flat, sizes.items(), strict=True):
        _errors(panel, found["methods"])
        panel.set_title(f"{size} x {size}", loc="left", fontweight="bold")
        panel.set_xlabel("time over that of one product")
    panels[0, 0].set_ylabel("worst error over all spectra")
    figure.suptitle(
        "Inverse fourth roots: ● of the direction, ○ of the root; "
        "number: products of matrices",
        fontsize=11,
    )
    figure.tight_layout()
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def _errors(panel: Axes, methods: dict[str, Any]) -> None:
    colors = plt.get_cmap("tab10").colors
    for color, (name, method) in zip(colors, methods.items(), strict=False):
        kinds = method["kinds"].values()
        x = method["time_over_product"]
        low, high = (max(k[what] for k in kinds) for what in ("direction", "root"))
        panel.plot([x, x], [low, high], color=color, linewidth=1, alpha=0.6)
        panel.plot(x, high, "o", color=color, markerfacecolor="white")
        number = method["products"]
        label = name if number is None else f"{name} ({number})"
        panel.plot(x, low, "o", color=color, label=label)
    panel.set_xscale("log")
    panel.set_yscale("log")
    panel.legend(fontsize=7, frameon=False, loc="best")
    panel.grid(alpha=0.25)
    panel.spines[["top", "right"]].set_visible(False)


PICTURES: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "step": step,
    "roots": roots,
}
