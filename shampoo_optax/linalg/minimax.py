"""Roots by minimax quadratics: a fixed, small number of matrix products.

The coupled iteration ``X -> X h(M), M -> h(M)^p M`` with a quadratic of its own for
each step, computed beforehand for the whole interval in which the spectrum can lie
(``tools/minimax_coefficients.py`` says how). Nothing depends on the data: no stopping
test, no ``while``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from shampoo_optax.linalg.method import Solution
from shampoo_optax.linalg.minimax_table import TABLE, Row
from shampoo_optax.linalg.precisions import (
    PRECISION,
    SPLIT,
    Arithmetic,
    Product,
    arithmetic,
    identity_like,
    symmetric,
    whole,
)
from shampoo_optax.linalg.scaling import Damping
from shampoo_optax.linalg.spectrum import spectrum

# What the steps converge with; on a GPU, and on any accelerator.
PRECISIONS_OF_ROOTS = ("highest", "bf16x6", "bf16x3", "tf32x3", SPLIT)
# Columns of signs on which the residual is measured.
PROBES = 8


@dataclass(frozen=True)
class Minimax:
    """Roots by precomputed minimax quadratics; ``p`` 2, 4, 6 and 8.

    Equals ``X h_1(M_0) h_2(M_1) ...`` with ``M_{k+1} = h_k(M_k)^p M_k`` and ``M_0 = (A
    + delta I) / s``, ``s >= lambda_max``. For ``p = 4`` and ``smallest_eps_rel=1e-6``
    it takes 27 products of whole matrices, the residual and ``s`` included, where
    :class:`CoupledNewton` takes 70. The residual is ``||M - I||_F / sqrt(d)`` after the
    last step, as eight columns of signs tell it.

    Args:
      smallest_eps_rel: the smallest damping, relative to the largest eigenvalue, for
        which the steps suffice; from 1e-7 (float32 keeps no more) to 1e-2. It fixes
        their number. More damping converges as well; with less, directions below
        it are damped as if they were there, and where there are many of those the
        residual tells, and the root is refused.
      precision: of the products: ``"highest"`` (float32), or on a GPU or TPU
        ``"bf16x6"``, ``"bf16x3"``, and on a GPU ``"tf32x3"`` or ``"fp16x3"``: sums of
        three or six products in fewer bits. ``"bf16x3"`` wants relative damping of
        1e-4. On a CPU all are float32.
      double_first_step: compute two products of the first step in float64. All but a
        hundredth of the rounding arises there. None, the default, does so everywhere
        but on TPUs, which have no float64; False is for GPUs where it is slow (data
        centre GPUs do it at half the speed of float32 and more).
      max_residual: with a larger residual the root is refused.

    Raises:
      ValueError: a field is out of range.

    Example:
      >>> method = Minimax()
      >>> method.matmuls(2), method.matmuls(4), method.matmuls(8)
      (30, 27, 32)

    Source: the coupled iteration is that of Guo and Higham, `A Schur-Newton Method for
    the Matrix pth Root and its Inverse <https://doi.org/10.1137/050643374>`_, 2006; the
    steps are designed as in Amsel et al., `The Polar Express
    <https://arxiv.org/abs/2505.16932>`_, 2025.
    """

    smallest_eps_rel: float = 1e-6
    precision: str = "highest"
    double_first_step: bool | None = None
    max_residual: float = 0.05

    def __post_init__(self) -> None:
        """Check the fields."""
        if not 1e-7 <= self.smallest_eps_rel <= 1.0:
            raise ValueError(
                f"roots.Minimax(smallest_eps_rel={self.smallest_eps_rel}): there are "
                "steps for 1e-7 and more; below that use roots.Eigh."
            )
        if self.precision not in PRECISIONS_OF_ROOTS:
            raise ValueError(
                f"roots.Minimax(precision={self.precision!r}): choose one of "
                f"{', '.join(map(repr, PRECISIONS_OF_ROOTS))}; with fewer bits the "
                "iteration does not converge."
            )

    def check(self, p: float) -> None:
        """Only the roots of the table."""
        if p not in TABLE:
            raise ValueError(
                f"roots.Minimax has steps for the roots {', '.join(map(str, TABLE))}, "
                f"but the exponent {1 / p:g} asks for the root {p:g}: use roots.Auto, "
                "roots.Eigh or roots.CoupledHigherOrder, or another exponent."
            )

    def row(self, p: float) -> Row:
        """The steps for this root, and what they guarantee in exact arithmetic.

        Example:
          >>> row = Minimax().row(4)
          >>> len(row.steps), row.error <= 2.5e-4
          (6, True)
        """
        self.check(p)
        rows = TABLE[int(p)]
        # 10**-6 is 1e-6 up to its last bit only.
        enough = [d for d in rows if 10.0**-d <= self.smallest_eps_rel * (1 + 1e-9)]
        return rows[min(enough)]

    def matmuls(self, p: float) -> int:
        """How many products of whole matrices ``solve`` takes, all included.

        Example:
          >>> Minimax(smallest_eps_rel=1e-4).matmuls(4)
          22
        """
        # A step: M^2, X H, H^(p/2), and M between two of these. In the first, X H is
        # H; a fourth power for the bound takes its place. The last needs no new M.
        powers = {2: 0, 4: 1, 6: 2, 8: 2}[int(p)]
        return len(self.row(p).steps) * (4 + powers) - (2 + powers)

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        del unit
        steps, degree = self.row(p).steps, int(p)

        def solve(
            products: Arithmetic, matrices: jax.Array, absolute: jax.Array
        ) -> Solution:
            outer: Product = partial(_either, products.multiplied)
            if self.double_first_step is not None:
                outer = _double if self.double_first_step else products.multiplied
            ridge = damping._replace(absolute=absolute).ridge
            return _solve(matrices, ridge, steps, degree, products, outer)

        arguments = matrices, damping.absolute
        if self.precision == "highest" or matrices.dtype != jnp.float32:
            return solve(arithmetic("highest"), *arguments)
        by_platform = {
            platform: partial(solve, products)
            for platform, products in self.products(matrices.shape[-1]).items()
        }
        return lax.platform_dependent(*arguments, **by_platform)

    def products(self, size: int) -> dict[str, Arithmetic]:
        """How each platform multiplies float32 matrices of a size.

        Example:
          >>> sorted(Minimax(precision="fp16x3").products(1024))
          ['cpu', 'default', 'tpu']
        """
        del size
        full = arithmetic("highest")
        others = {"cpu": full, "default": arithmetic(self.precision)}
        # A TPU has no units for float16.
        return others | ({"tpu": full} if self.precision == SPLIT else {})


def _solve(
    matrices: jax.Array,
    ridge: Callable[[jax.Array], jax.Array],
    steps: tuple[tuple[float, float, float], ...],
    degree: int,
    products: Arithmetic,
    outer: Product,
) -> Solution:
    """All steps; ``outer`` is the product around the matrix in the first of them."""
    identity = identity_like(matrices)
    squares = products.squared(matrices)
    largest = spectrum(matrices, squares, products.squared)
    delta = ridge(largest.estimate)
    scale = jnp.maximum(largest.bound + delta, jnp.finfo(matrices.dtype).tiny)
    # The first step in powers of A, not of M = (A + delta I) / s: adding delta would
    # round the diagonal, dividing every entry.
    share, over = (x[..., None, None] for x in (delta / scale, 1 / scale))
    a, b, c = steps[0]
    constant = a + share * (b + share * c)
    linear, quadratic = (b + 2 * c * share) * over, c * over * over
    root = constant * identity + linear * matrices + quadratic * squares
    held = products.hold(root)
    half = products.free(_power(held, degree // 2, products))
    inside = outer(matrices, half) + delta[..., None, None] * half
    coupled = symmetric(outer(half, inside) * over)

    def step(state: tuple[Any, Any], step: jax.Array) -> tuple:
        root, coupled = state
        new = products.quadratic(step, coupled)
        half = _power(new, degree // 2, products)
        # From both sides, half a power each: what rounding leaves in M is then damped
        # on both, and the direction of the root is 4 times nearer than from one side.
        coupled = products.product(half, products.product(coupled, half))
        return (products.product(root, new), products.symmetric(coupled)), None

    others = jnp.asarray(steps[1:], matrices.dtype)
    state = held, products.hold(coupled)
    (held, coupled), _ = lax.scan(step, state, others[:-1])
    last = products.quadratic(others[-1], coupled)
    back = scale ** (-1.0 / degree)
    root = symmetric(products.free(products.product(held, last)))
    residual = _residual(products.free(coupled), products.free(last), degree)
    return Solution(root * back[..., None, None], residual)


def _residual(coupled: jax.Array, last: jax.Array, degree: int) -> jax.Array:
    """``||h(M)^p M - I||_F / sqrt(d)`` of the last step, from columns of signs.

    For signs ``v`` at random the mean of ``|R v|^2`` is ``||R||_F^2``, so ``p + 1``
    thin products say what three of whole matrices would.

    Source: Hutchinson, `A stochastic estimator of the trace of the influence matrix
    <https://doi.org/10.1080/03610918908812806>`_, 1989.
    """
    signs = _signs(coupled.shape[-1], coupled.dtype)
    columns = jnp.broadcast_to(signs, (*coupled.shape[:-1], PROBES))
    images = whole(coupled, columns)
    for _ in range(degree):
        images = whole(last, images)
    return jnp.sqrt(jnp.mean((images - columns) ** 2, axis=(-2, -1)))


def _signs(rows: int, dtype: DTypeLike) -> jax.Array:
    """``[rows, PROBES]`` of -1 and 1: bits of the hash that ends MurmurHash3."""
    bits = lax.iota(jnp.uint32, rows) + 1
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(factor)
    columns = bits[:, None] >> lax.iota(jnp.uint32, PROBES)[None]
    return (2 * (columns & 1).astype(jnp.int32) - 1).astype(dtype)


def _power(matrices: Any, exponent: int, products: Arithmetic) -> Any:
    """``matrices**exponent`` for 1 to 4, held."""
    if exponent == 1:
        return matrices
    even = products.square(_power(matrices, exponent // 2, products))
    return products.product(even, matrices) if exponent % 2 else even


def _double(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """The product in float64, rounded once."""
    stack = tuple(range(lhs.ndim - 2))
    sides = (lhs.ndim - 1,), (lhs.ndim - 2,)
    with jax.enable_x64(True):
        # Not jnp.matmul: it asks for its dtype, which vmap then refuses outside.
        both = lhs.astype(jnp.float64), rhs.astype(jnp.float64)
        product = lax.dot_general(*both, (sides, (stack, stack)), precision=PRECISION)
        return product.astype(lhs.dtype)


def _either(product: Product, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """In float64 where the program's platform has it."""
    return lax.platform_dependent(lhs, rhs, tpu=product, default=_double)
