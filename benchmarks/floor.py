"""What Shampoo cannot do without: its products, and a refresh's decompositions."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import shampoo_optax as so
from benchmarks import shapes
from shampoo_optax.linalg import roots
from shampoo_optax.linalg.per_matrix import per_matrix_on_cpu
from shampoo_optax.linalg.scaling import Damping
from shampoo_optax.transforms.kronecker import KroneckerState
from shampoo_optax.transforms.units import grouped

EPS, EPS_REL = 1e-30, 1e-6  # kronecker's own


def matmul_rates(quick: bool) -> dict[str, float]:
    """Best rate of float32 matrix products, in 1e9 operations per second."""
    sizes = {"32 of 256x256": (32, 256), "1 of 1024x1024": (1, 1024)}
    rates = {}
    for name, (number, size) in sizes.items():
        matrices = jnp.ones((number, 32 if quick else size, 32 if quick else size))
        multiply = jax.jit(functools.partial(jnp.matmul, precision="highest"))
        seconds = []
        for _ in range(3 if quick else 40):
            begin = time.perf_counter()
            multiply(matrices, matrices).block_until_ready()
            seconds.append(time.perf_counter() - begin)
        operations = 2 * number * matrices.shape[-1] ** 3
        rates[name] = operations / min(seconds) / 1e9
    return rates


def operations(tree: shapes.Tree, block: int) -> int:
    """What a step of Shampoo must multiply and add, see step.py."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    layout = so.BlockLayout(max_preconditioner_dim=block)
    plan = layout.plan(names, [leaf.shape for _, leaf in leaves])
    total = 0
    for number, *sides in plan.stacks.values():
        elements = number
        for side in sides:
            elements *= side
        total += 4 * elements * sum(sides)
    return total


def decompose(batch: jax.Array, p: float) -> Any:
    """The float64 ``eigh`` of every matrix, as a refresh calls it, and nothing else."""
    del p

    def one(matrix: jax.Array) -> tuple[jax.Array, jax.Array]:
        w, v = jnp.linalg.eigh(matrix, symmetrize_input=False)
        return w, v[..., 0, :]  # all are computed; of the vectors, a row is kept

    with jax.enable_x64(True):
        return per_matrix_on_cpu(one, batch.astype(jnp.float64))


def decompose_and_multiply(batch: jax.Array, p: float) -> Any:
    """The same with ``V f(w) V^T``: a root method without what all methods share."""
    zeros = jnp.zeros(batch.shape[:1], batch.dtype)
    damping = Damping(zeros + EPS, jnp.asarray(EPS_REL, batch.dtype))
    return roots.Eigh().solve(batch, damping, p, unit=zeros + 1).root


def whole_root(batch: jax.Array, p: float) -> Any:
    """The same with the prescale, the symmetrisation and the gate."""
    return roots.inverse_root(roots.Eigh(), batch, p, eps=EPS, eps_rel=EPS_REL)


# Each has all of the one before it.
PIECES = {
    "eigh": decompose,
    "product": decompose_and_multiply,
    "scaling": whole_root,
}


class RefreshFloor:
    """Times the pieces of a refresh, alone, on the factors that it had.

    The same float32 matrices in the same groups, in one jitted function for each piece.
    """

    def __init__(self) -> None:
        """Nothing is compiled yet."""
        self.seconds: dict[str, list[float]] = {name: [] for name in PIECES}
        self.over: list[float] = []
        self.refresh: list[float] = []
        self.calls = {name: jax.jit(_of_groups(call)) for name, call in PIECES.items()}

    def measure(self, state: Any, refresh: float, *, record: bool) -> None:
        """Times each piece once, after a refresh that took so long itself."""
        is_part = lambda x: isinstance(x, KroneckerState)  # noqa: E731
        parts = jax.tree.leaves(state, is_leaf=is_part)
        (part,) = [part for part in parts if is_part(part)]
        for name, call in self.calls.items():
            begin = time.perf_counter()
            jax.block_until_ready(call(part.factors))
            if record:
                self.seconds[name].append(time.perf_counter() - begin)
        if record:
            self.refresh.append(refresh)
            self.over.append(refresh / self.seconds["eigh"][-1])

    def result(self) -> dict[str, Any]:
        """A refresh over its floor: the median of the ratios, round by round.

        Of the pieces the least of all rounds: their differences are small.
        """
        if not self.over:
            return {}
        total = [1e3 * min(self.seconds[name]) for name in PIECES]
        total.append(1e3 * min(self.refresh))
        names = [*PIECES, "rest"]  # blocks taken and put back, and the branch
        pairs = zip(names, [0.0, *total], total, strict=False)
        return {
            "refresh_over_eigh": statistics.median(self.over),
            "refresh_parts_ms": {name: now - before for name, before, now in pairs},
        }


def _of_groups(call: Callable[[jax.Array, float], Any]) -> Callable[[Any], Any]:
    """Applies it to all factors of one size and root at once, as a refresh does."""

    def all_of(factors: Any) -> Any:
        powers = {
            key: {int(dim): 2.0 * len(by_dim) for dim in by_dim}
            for key, by_dim in factors.items()
        }
        found = []
        for members in grouped(factors, powers):
            key, dim = members[0]
            batch = jnp.concatenate([factors[key][dim] for key, dim in members])
            found.append(call(batch, powers[key][int(dim)]))
        return found

    return all_of
