"""Basis methods side by side: how diagonal a factor becomes in them, and their time.

A factor is the moving average, decay 0.95, of Gram matrices of gradients whose
covariance has eigenvalues over six decades and turns: in `TURN` radians a step. Bases
are found anew every ten steps, each method from its own last one. Off the diagonal: the
share of the factor's Frobenius norm that is off the diagonal in the basis, just after a
refresh and just before the next; the mean of the last ten of twenty refreshes.
Orthogonality: the largest entry of `Q^T Q - I`. Times are medians, all methods in turn
within a repetition, over that of one float32 product of the same size.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import common
from benchmarks.roots import seconds
from shampoo_optax.linalg import bases

B2, EVERY, REFRESHES, TURN = 0.95, 10, 20, 1e-3
METHODS: dict[str, Any] = {
    "eigh float64": bases.Eigh(),
    "eigh float32": bases.Eigh(double_precision=False),
    "Jacobi": bases.Jacobi(),
    "QR, 1 step": bases.QR(),
    "CholeskyQR2, 1 step": bases.CholeskyQR2(),
    "CholeskyQR2, 2 steps": bases.CholeskyQR2(iterations=2),
}


def factors(size: int) -> Iterator[jax.Array]:
    """The factor at each refresh, and what it has become by the next."""
    rng = np.random.default_rng(size)
    basis, _ = np.linalg.qr(rng.normal(size=(size, size)))
    scales = np.geomspace(1.0, 1e-3, size)  # of gradients: six decades of a factor
    # A random turn: the exponential of a skew matrix of norm about TURN.
    skew = rng.normal(size=(size, size))
    skew = TURN * (skew - skew.T) / np.linalg.norm(skew - skew.T, 2)
    turn = np.eye(size) + skew + 0.5 * skew @ skew
    turn, _ = np.linalg.qr(turn)
    turn *= np.sign(np.diag(turn))

    @jax.jit
    def grow(factor: jax.Array, gradient: jax.Array) -> jax.Array:
        gram = jnp.matmul(gradient, gradient.T, precision="highest")
        return B2 * factor + (1 - B2) * gram / size

    factor = jnp.zeros((size, size))
    for _ in range(REFRESHES * EVERY):
        basis = turn @ basis
        gradient = (basis * scales) @ rng.normal(size=(size, size))
        factor = grow(factor, jnp.asarray(gradient, jnp.float32))
        yield factor


def measure(size: int, repetitions: int) -> dict[str, Any]:
    """All methods on one size."""
    eye = jnp.eye(size)[None]
    solvers = {
        name: jax.jit(lambda a, q, m=method: bases.new_basis(m, a, q).vectors)
        for name, method in METHODS.items()
    }

    @jax.jit
    def beside(factor: jax.Array, q: jax.Array) -> jax.Array:
        half = jnp.matmul(factor, q, precision="highest")
        rotated = jnp.matmul(jnp.swapaxes(q, 1, 2), half, precision="highest")
        return bases.off_diagonal(rotated)[0]

    own = dict.fromkeys(METHODS, eye)
    after: dict[str, list[float]] = {name: [] for name in METHODS}
    before: dict[str, list[float]] = {name: [] for name in METHODS}
    for step, factor in enumerate(factors(size)):
        if step % EVERY:
            continue
        common.say(f"{size} x {size}: refresh {step // EVERY + 1} of {REFRESHES}")
        for name, solve in solvers.items():
            before[name].append(float(beside(factor[None], own[name])))
            own[name] = solve(factor[None], own[name])
            after[name].append(float(beside(factor[None], own[name])))
    last = factor[None]
    calls = {
        name: lambda s=solve, q=own[name]: s(last, q) for name, solve in solvers.items()
    }
    product = jax.jit(lambda a: jnp.matmul(a, a, precision="highest"))
    times = seconds({"product": lambda: product(last), **calls}, repetitions)
    found = {}
    for name, q in own.items():
        gram = jnp.matmul(jnp.swapaxes(q, 1, 2), q, precision="highest")
        found[name] = {
            "off_diagonal_after": statistics.mean(after[name][-10:]),
            "off_diagonal_before": statistics.mean(before[name][-10:]),
            "orthogonality": float(jnp.abs(gram - eye).max()),
            "seconds": times[name],
            "time_over_product": times[name] / times["product"],
        }
    return {"product_seconds": times["product"], "methods": found}


def show(size: int, results: dict[str, Any]) -> str:
    """The table of one size."""
    headers = ["basis", "off the diagonal", "ten steps later", "Q^T Q - I", "products"]
    rows = [
        [
            name,
            f"{found['off_diagonal_after']:.1e}",
            f"{found['off_diagonal_before']:.1e}",
            f"{found['orthogonality']:.0e}",
            found["time_over_product"],
        ]
        for name, found in results["methods"].items()
    ]
    title = f"Bases of {size} x {size}; time in products of that size"
    return f"{title}\n{common.table(headers, rows)}"


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write."""
    parser = common.arguments(__doc__ or "", "bases")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024])
    args = parser.parse_args(argv)
    env = common.environment()
    print(common.heading(env))
    results: dict[str, Any] = {"environment": env, "sizes": {}}
    for size in [16] if args.quick else args.sizes:
        results["sizes"][str(size)] = measure(size, 1 if args.quick else 3)
        print(f"\n{show(size, results['sizes'][str(size)])}", flush=True)
        common.save(args, "bases", results)


if __name__ == "__main__":
    main()
