"""Root methods side by side: error, residual, products of matrices, time.

Inverse fourth roots with relative damping 1e-6 of float32 matrices of several spectra.
The truth is float64 ``eigh`` of the same float32 matrix, by NumPy. Root error:
Frobenius, relative. Direction error: of the root applied to gradients ``G`` with
``E[G G^T] = A``, Frobenius, relative (it bounds the angle). Times are medians, all
methods in turn within a repetition, over that of one float32 product of the same size.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from shampoo_optax.linalg import roots

P, EPS_REL = 4, 1e-6
METHODS: dict[str, Any] = {
    "minimax": roots.Minimax(),
    "minimax, as on a TPU": roots.Minimax(double_first_step=False),
    "eigh float64": roots.Eigh(),
    "eigh float32": roots.Eigh(double_precision=False),
    "coupled Newton": roots.CoupledNewton(tolerance=1e-3),
    "coupled order 3": roots.CoupledHigherOrder(tolerance=1e-3),
}


def _matrix(values: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    q, _ = np.linalg.qr(rng.normal(size=(len(values), len(values))))
    matrix = (q * values) @ q.T
    return (0.5 * (matrix + matrix.T)).astype(np.float32)


def _half_zero(n: int, rng: np.random.Generator) -> np.ndarray:
    matrix = np.zeros((n, n), np.float32)
    matrix[: n // 2, : n // 2] = _matrix(10 ** rng.uniform(-4, 0, n // 2), rng)
    return matrix


KINDS: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    "log-uniform": lambda n, g: _matrix(10 ** g.uniform(-9, 0, n), g),
    "half 1, half 1e-7": lambda n, g: _matrix(np.repeat([1.0, 1e-7], n // 2), g),
    "rank 7": lambda n, g: _matrix(np.r_[np.zeros(n - 7), g.uniform(0.1, 1, 7)], g),
    "flat": lambda n, g: _matrix(np.ones(n), g),
    "power law": lambda n, g: _matrix(np.arange(1, n + 1) ** -2.0, g),
    "half-zero diagonal": _half_zero,
    "6 decades * 1e-30": lambda n, g: _matrix(10 ** g.uniform(-36, -30, n), g),
    "6 decades * 1e30": lambda n, g: _matrix(10 ** g.uniform(24, 30, n), g),
}


class Truth:
    """The exact root of one matrix, and gradients that have it for a factor."""

    def __init__(self, matrix: np.ndarray) -> None:
        w, v = np.linalg.eigh(matrix.astype(np.float64))
        w = np.maximum(w, 0.0) / w[-1]
        self.scale = float(np.linalg.norm(matrix.astype(np.float64), 2)) ** (1 / P)
        self.root = (v * (w + EPS_REL) ** (-1 / P)) @ v.T
        normal = np.random.default_rng(1).normal(size=(len(w), 64))
        self.gradients = (v * np.sqrt(w)) @ normal
        self.images = self.root @ self.gradients

    def errors(self, found: Any) -> tuple[float, float]:
        off = np.asarray(found, np.float64) * self.scale - self.root
        root = np.linalg.norm(off) / np.linalg.norm(self.root)
        direction = np.linalg.norm(off @ self.gradients) / np.linalg.norm(self.images)
        return float(root), float(direction)


def solver(method: Any) -> Callable[[jax.Array], Any]:
    """The root with everything that belongs to it, compiled."""
    return jax.jit(lambda a: roots.inverse_root(method, a, P, eps_rel=EPS_REL))


def products(method: Any, matrix: jax.Array) -> int | None:
    """Products of whole matrices; of an iteration, until its root stands still."""
    if isinstance(method, roots.Minimax):
        return method.matmuls(P)
    if isinstance(method, roots.Eigh):
        return None
    last = solver(method)(matrix).root
    low, high = 1, method.max_iterations
    while low < high:
        middle = (low + high) // 2
        found = solver(replace(method, max_iterations=middle))(matrix).root
        low, high = (low, middle) if bool((found == last).all()) else (middle + 1, high)
    # A Newton step: T^4 is two, and X T and T^4 M. A step of order 3 has T's own, too;
    # one Newton step stands before, and the residual A X^4 takes three.
    return 4 * low if isinstance(method, roots.CoupledNewton) else 4 + 5 * (low - 1) + 3


def seconds(calls: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Medians, the calls in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repetitions + 1):
        for name, call in calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def measure(size: int, repetitions: int) -> dict[str, Any]:
    """All methods on all kinds of one size."""
    rng = np.random.default_rng(size)
    matrices = {kind: make(size, rng) for kind, make in KINDS.items()}
    truths = {kind: Truth(matrix) for kind, matrix in matrices.items()}
    first = jnp.asarray(next(iter(matrices.values())))
    solvers = {name: solver(method) for name, method in METHODS.items()}
    calls = {name: lambda s=s: s(first) for name, s in solvers.items()}
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    times = seconds({"product": lambda: product(first)} | calls, repetitions)
    results = {}
    for name, method in METHODS.items():
        common.say(f"{size} x {size}: {name}")
        kinds = {}
        for kind, matrix in matrices.items():
            found = solvers[name](jnp.asarray(matrix))
            root, direction = truths[kind].errors(found.root)
            accepted = bool(found.accepted)
            kinds[kind] = {"root": root, "direction": direction, "accepted": accepted}
        results[name] = {
            "products": products(method, first),
            "seconds": times[name],
            "time_over_product": times[name] / times["product"],
            "kinds": kinds,
        }
    return {"product_seconds": times["product"], "methods": results}


def show(size: int, results: dict[str, Any]) -> None:
    """Two tables: cost with the worst errors, and the root error by kind."""
    print(f"\n{size} x {size}, p = {P}, eps_rel = {EPS_REL:g}; worst over all kinds")
    rows, by_kind = [], []
    for name, found in results["methods"].items():
        kinds = found["kinds"].values()
        worst = [max(kind[what] for kind in kinds) for what in ("root", "direction")]
        refused = sum(not kind["accepted"] for kind in kinds)
        cost = found["products"], found["time_over_product"]
        rows.append([name, *(f"{x:.1e}" for x in worst), refused, *cost])
        by_kind.append(
            [name, *(f"{k['root']:.0e}/{k['direction']:.0e}" for k in kinds)]
        )
    headers = [
        "method",
        "root error",
        "direction",
        "refused",
        "products",
        "time/product",
    ]
    print(common.table(headers, rows))
    print("\nroot error / direction error")
    print(common.table(["method", *KINDS], by_kind))


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.arguments(__doc__, "roots")
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 512, 1024])
    args = parser.parse_args(argv)
    env = common.environment()
    print(common.heading(env))
    results = {}
    for size in [16] if args.quick else args.sizes:
        results[str(size)] = measure(size, 1 if args.quick else 3)
        show(size, results[str(size)])
    common.save(args, "roots", {"environment": env, "sizes": results})


if __name__ == "__main__":
    main()
