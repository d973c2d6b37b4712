"""What Shampoo cannot do without: its products, and a refresh's decompositions."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import shampoo_optax as so
from benchmarks import shapes
from shampoo_optax.linalg import modes, roots
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


def stacks_of(tree: shapes.Tree, block: int) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's stacks."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    layout = so.BlockLayout(max_preconditioner_dim=block)
    return dict(layout.plan(names, [leaf.shape for _, leaf in leaves]).stacks)


def operations(tree: shapes.Tree, block: int) -> int:
    """What a step of Shampoo must multiply and add, see step.py."""
    total = 0
    for number, *sides in stacks_of(tree, block).values():
        elements = number
        for side in sides:
            elements *= side
        total += 4 * elements * sum(sides)
    return total


class Products:
    """The products of a step and nothing else, as XLA computes them here.

    The same batches in one jitted function: what is above the floor in there is not
    ours to take away without another library of matrix products.
    """

    def __init__(self, tree: shapes.Tree, block: int) -> None:
        """Compiles."""
        self.seconds: list[float] = []
        self.stacks = {
            key: jax.random.normal(jax.random.key(0), shape)
            for key, shape in stacks_of(tree, block).items()
        }
        self.roots = {
            key: {
                dim: jax.random.normal(jax.random.key(1), (len(x), size, size))
                for dim, size in enumerate(x.shape[1:])
            }
            for key, x in self.stacks.items()
        }

        @jax.jit
        def products(stacks: Any, roots: Any) -> Any:
            return {
                key: (
                    [modes.gram(x, dim, x.dtype) for dim in roots[key]],
                    modes.mode_products(x, roots[key]),
                )
                for key, x in stacks.items()
            }

        self.call = products
        jax.block_until_ready(products(self.stacks, self.roots))

    def measure(self, *, times: int, record: bool) -> None:
        """Times them."""
        for _ in range(times):
            begin = time.perf_counter()
            jax.block_until_ready(self.call(self.stacks, self.roots))
            if record:
                self.seconds.append(time.perf_counter() - begin)

    def milliseconds(self) -> float:
        """The median."""
        return 1e3 * statistics.median(self.seconds)


def decompose(batch: jax.Array, p: float) -> Any:
    """The float64 ``eigh`` of every matrix, as a refresh calls it, and nothing else."""
    del p

    def one(matrix: jax.Array) -> tuple[jax.Array, ...]:
        w, v = jnp.linalg.eigh(matrix, symmetrize_input=False)
        # All are computed; of the vectors two rows are kept, for XLA runs pairs of a
        # loop of eight operations or fewer one by one, and a refresh has more.
        return w, v[..., 0, :], v[..., -1, :]

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


class Seconds(NamedTuple):
    """Of the clock, and of this process in all its threads."""

    clock: float
    cpu: float

    @classmethod
    def now(cls) -> Seconds:
        """Since some time ago."""
        return cls(time.perf_counter(), time.process_time())

    def __sub__(self, other: Seconds) -> Seconds:
        """Of the time between."""
        return Seconds(self.clock - other.clock, self.cpu - other.cpu)


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
        self.over: list[float] = []  # by the clock
        self.cpu: dict[str, list[float]] = {name: [] for name in (*PIECES, "refresh")}
        self.calls = {name: jax.jit(_of_groups(call)) for name, call in PIECES.items()}

    def measure(self, state: Any, refresh: Seconds, *, record: bool) -> None:
        """Times each piece once, after a refresh that took so long itself."""
        is_part = lambda x: isinstance(x, KroneckerState)  # noqa: E731
        parts = jax.tree.leaves(state, is_leaf=is_part)
        (part,) = [part for part in parts if is_part(part)]
        found = {"refresh": refresh}
        for name, call in self.calls.items():
            begin = Seconds.now()
            jax.block_until_ready(call(part.factors))
            found[name] = Seconds.now() - begin
        if record:
            self.over.append(refresh.clock / found["eigh"].clock)
            for name, seconds in found.items():
                self.cpu[name].append(seconds.cpu)

    def result(self) -> dict[str, Any]:
        """A refresh over its floor: the median of the ratios, round by round.

        The pieces are in seconds of the process in all its threads, which other
        processes disturb less: their differences are small.
        """
        if not self.over:
            return {}
        total = {name: 1e3 * statistics.median(self.cpu[name]) for name in self.cpu}
        eigh, product, scaling, refresh = total.values()
        return {
            "refresh_over_eigh": statistics.median(self.over),
            "refresh_over_eigh_cpu": refresh / eigh,
            "refresh_parts_cpu_ms": {
                "eigh": eigh,
                "product": product - eigh,
                "scaling": scaling - product,
                "rest": refresh - scaling,  # blocks taken and put back, the branch
            },
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
