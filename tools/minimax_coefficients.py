"""Makes shampoo_optax/linalg/minimax_table.py: quadratics for coupled inverse roots.

    python -m tools.minimax_coefficients          # write it
    python -m tools.minimax_coefficients --check  # does the stored one come out again?

The iteration ``X -> X h(M), M -> h(M)^p M`` maps every eigenvalue ``t`` of ``M`` by
itself, so a step is designed on scalars. On the interval ``[l, u]`` that holds the
spectrum, the best quadratic minimises ``max |t^(1/p) h(t) - 1|``: a linear programme
in its three coefficients on a grid. Then ``[l, u]`` is pushed through the step that
was found, coefficients rounded to float32, and the next one is designed.

*Cushion*: the best quadratic for ``l`` near 0 dips to almost 0 between its peaks and
throws large eigenvalues to where rounding eats them. So a step is designed on
``[max(l, cushion^p u), u]`` (what lies below still grows, by the slope at 0), and the
true interval is pushed through it.

Source: Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025
(greedy minimax steps and the cushion, for the polar factor).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from scipy.optimize import linprog

TABLE = Path(__file__).parents[1] / "shampoo_optax" / "linalg" / "minimax_table.py"
ROOTS = (2, 4, 6, 8)
DECADES = range(2, 8)
# The upper bound of lambda_max that scales a matrix is at most 2.5 lambda_max (sides
# up to 5,900); the rest is for a low estimate of lambda_max and for rounding, which
# makes the smallest eigenvalues slightly negative.
SPREAD = 4.0
# The bound's own rounding: the spectrum may reach this far.
TOP = 1.02
# Share of the root that the steps may leave; a tenth and less of what float32 leaves
# at the same damping.
TOLERANCE = 2.5e-4
# The largest that needs no more steps than the smallest is taken: rounding of large
# eigenvalues falls with it (direction error 2e-3 without one, 2e-4 at 0.2).
CUSHIONS = (0.3, 0.25, 0.2)

Step = tuple[float, float, float]


def grid(low: float, high: float, points: int) -> np.ndarray:
    """Points of an interval, half of them even in the logarithm."""
    even = np.linspace(low, high, points)
    return np.unique(np.concatenate([np.geomspace(low, high, points), even]))


def quadratic(p: int, low: float, high: float) -> Step:
    """Argmin over quadratics h of ``max |t^(1/p) h(t) - 1|`` on ``[low, high]``."""
    t = grid(low, high, 600)
    weight = t ** (1 / p)
    values = np.stack([weight * (t / high) ** i for i in range(3)], axis=1)
    bound = np.ones((len(t), 1))
    found = linprog(
        [0, 0, 0, 1],
        A_ub=np.block([[values, -bound], [-values, -bound]]),
        b_ub=np.concatenate([bound, -bound]).ravel(),
        bounds=[(None, None)] * 3 + [(0, None)],
        method="highs",
    )
    a, b, c, _ = found.x
    rounded = np.float32([a, b / high, c / high**2])
    return tuple(float(digits(x)) for x in rounded)


def digits(x: float) -> str:
    """As many as give a float32 back."""
    return f"{x:.9g}"


def push(step: Step, t: np.ndarray, p: int) -> tuple[np.ndarray, np.ndarray]:
    """``h(t)`` and ``h(t)^p t``."""
    a, b, c = step
    h = a + t * (b + t * c)
    return h, h**p * t


def design(p: int, low: float, cushion: float) -> tuple[list[Step], float, float]:
    """Steps until the root is within the tolerance; their residual and its error."""
    start = grid(low, TOP, 100_000)
    t, root = start, np.ones_like(start)
    steps: list[Step] = []
    while True:
        high = t.max()
        steps.append(quadratic(p, max(t.min(), cushion**p * high), high))
        h, t = push(steps[-1], t, p)
        assert h.min() > 0 and len(steps) < 20, (p, low, cushion)
        root = root * h
        error = np.abs(start ** (1 / p) * root - 1).max()
        if error <= TOLERANCE:
            return steps, float(np.abs(t - 1).max()), float(error)


def row(p: int, low: float) -> tuple[list[Step], float, float]:
    """The design with the largest cushion among those with the fewest steps."""
    designs = [design(p, low, cushion) for cushion in CUSHIONS]
    fewest = min(len(steps) for steps, _, _ in designs)
    return next(d for d in designs if len(d[0]) == fewest)


def above(x: float) -> str:
    """Two digits, rounded up."""
    return f"{x * 1.05:.1e}"


def source() -> str:
    """The data module."""
    lines = [
        '"""Quadratics of the minimax roots; made by tools/minimax_coefficients.py."""',
        "",
        "from __future__ import annotations",
        "",
        "from typing import NamedTuple",
        "",
        "",
        "class Row(NamedTuple):",
        '    """Steps for spectra in ``[lowest, 1.02]``, and what they leave there."""',
        "",
        "    lowest: float",
        "    residual: float  # max |M - 1|",
        "    error: float  # max |t^(1/p) X - 1|: of the root, relative",
        "    steps: tuple[tuple[float, float, float], ...]  # a + b t + c t^2",
        "",
        "",
        "# By root, then by the decade of the relative damping: 10^-2 to 10^-7.",
        "TABLE: dict[int, dict[int, Row]] = {",
    ]
    for p in ROOTS:
        lines.append(f"    {p}: {{")
        for decade in DECADES:
            low = float(f"{10.0**-decade / SPREAD:.3g}")
            steps, residual, error = row(p, low)
            lines += [
                f"        {decade}: Row(",
                f"            {low!r},",
                f"            {above(residual)},",
                f"            {above(error)},",
                "            (",
            ]
            lines += [
                f"                ({a:.9g}, {b:.9g}, {c:.9g})," for a, b, c in steps
            ]
            lines += ["            ),", "        ),"]
        lines.append("    },")
    return "\n".join([*lines, "}", ""])


def main() -> None:
    """Write the table, or compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare, do not write")
    made = source()
    if not parser.parse_args().check:
        TABLE.write_text(made)
    elif TABLE.read_text() != made:
        raise SystemExit(f"{TABLE.name} is not what this script makes")


if __name__ == "__main__":
    main()
