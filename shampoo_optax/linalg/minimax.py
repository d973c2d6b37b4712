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

import jax
import jax.numpy as jnp
from jax import lax

from shampoo_optax.linalg.coupled import identity_like
from shampoo_optax.linalg.method import Solution
from shampoo_optax.linalg.minimax_table import TABLE, Row
from shampoo_optax.linalg.modes import PRECISION
from shampoo_optax.linalg.scaling import Damping
from shampoo_optax.linalg.spectrum import Product, norm, spectrum

PRECISIONS: dict[str, lax.PrecisionLike] = {
    "highest": PRECISION,
    "bf16x3": lax.DotAlgorithmPreset.BF16_BF16_F32_X3,
    "bf16x6": lax.DotAlgorithmPreset.BF16_BF16_F32_X6,
    "tf32x3": lax.DotAlgorithmPreset.TF32_TF32_F32_X3,
}


@dataclass(frozen=True)
class Minimax:
    """Roots by precomputed minimax quadratics; ``p`` 2, 4, 6 and 8.

    Equals ``X h_1(M_0) h_2(M_1) ...`` with ``M_{k+1} = h_k(M_k)^p M_k`` and ``M_0 = (A
    + delta I) / s``, ``s >= lambda_max``. For ``p = 4`` and ``smallest_eps_rel=1e-6``
    it takes 30 products of whole matrices, the residual and ``s`` included, where
    :class:`CoupledNewton` takes 70. The residual is ``||M - I||_F / sqrt(d)``.

    Args:
      smallest_eps_rel: the smallest damping, relative to the largest eigenvalue, for
        which the steps suffice; from 1e-7 (float32 keeps no more) to 1e-2. It fixes
        their number. More damping converges as well; with less, directions below
        it are damped as if they were there, and where there are many of those the
        residual tells, and the root is refused.
      precision: of the products: ``"highest"`` (float32), or on a GPU or TPU
        ``"bf16x6"``, ``"bf16x3"``, and on a GPU ``"tf32x3"``: sums of three or six
        products in fewer bits. With three, relative damping below 1e-4 costs a percent
        of the direction. On a CPU all are float32.
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
      (32, 30, 36)

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
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"roots.Minimax(precision={self.precision!r}): choose one of "
                f"{', '.join(map(repr, PRECISIONS))}; with fewer bits the iteration "
                "does not converge."
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
          25
        """
        # A step: M^2, X H, H^(p/2), and M between two of these. In the first, X H is
        # H; a fourth power for the bound takes its place.
        return len(self.row(p).steps) * (4 + {2: 0, 4: 1, 6: 2, 8: 2}[int(p)])

    def solve(
        self, matrices: jax.Array, damping: Damping, p: float, *, unit: jax.Array
    ) -> Solution:
        """See :class:`RootMethod`."""
        del unit
        steps, degree = self.row(p).steps, int(p)

        def solve(algorithm: str, matrices: jax.Array, absolute: jax.Array) -> Solution:
            product = partial(_product, PRECISIONS[algorithm])
            outer: Product = partial(_either, product)
            if self.double_first_step is not None:
                outer = _double if self.double_first_step else product
            ridge = damping._replace(absolute=absolute).ridge
            return _solve(matrices, ridge, steps, degree, product, outer)

        arguments = matrices, damping.absolute
        if self.precision == "highest":
            return solve("highest", *arguments)
        return lax.platform_dependent(
            *arguments,
            cpu=partial(solve, "highest"),
            default=partial(solve, self.precision),
        )


def _solve(
    matrices: jax.Array,
    ridge: Callable[[jax.Array], jax.Array],
    steps: tuple[tuple[float, float, float], ...],
    degree: int,
    product: Product,
    outer: Product,
) -> Solution:
    """All steps; ``outer`` is the product around the matrix in the first of them."""
    identity = identity_like(matrices)
    squares = product(matrices, matrices)
    largest = spectrum(matrices, squares, product)
    delta = ridge(largest.estimate)
    scale = jnp.maximum(largest.bound + delta, jnp.finfo(matrices.dtype).tiny)
    # The first step in powers of A, not of M = (A + delta I) / s: adding delta would
    # round the diagonal, dividing every entry.
    share, over = (x[..., None, None] for x in (delta / scale, 1 / scale))
    a, b, c = steps[0]
    constant = a + share * (b + share * c)
    linear, quadratic = (b + 2 * c * share) * over, c * over * over
    root = _symmetric(constant * identity + linear * matrices + quadratic * squares)
    half = _power(root, degree // 2, product)
    inside = outer(matrices, half) + delta[..., None, None] * half
    coupled = _symmetric(outer(half, inside) * over)

    def step(state: tuple[jax.Array, jax.Array], step: jax.Array) -> tuple:
        root, coupled = state
        square = product(coupled, coupled)
        factor = _symmetric(step[0] * identity + step[1] * coupled + step[2] * square)
        half = _power(factor, degree // 2, product)
        # From both sides, half a power each: what rounding leaves in M is then damped
        # on both, and the direction of the root is 4 times nearer than from one side.
        coupled = product(half, product(coupled, half))
        return (product(root, factor), _symmetric(coupled)), None

    others = jnp.asarray(steps[1:], matrices.dtype)
    (root, coupled), _ = lax.scan(step, (root, coupled), others)
    residual = norm(coupled - identity) / matrices.shape[-1] ** 0.5
    back = scale ** (-1.0 / degree)
    return Solution(_symmetric(root) * back[..., None, None], residual)


def _power(matrices: jax.Array, exponent: int, product: Product) -> jax.Array:
    """``matrices**exponent`` for 1 to 4."""
    if exponent == 1:
        return matrices
    half = _power(matrices, exponent // 2, product)
    square = product(half, half)
    return product(square, matrices) if exponent % 2 else square


def _product(algorithm: lax.PrecisionLike, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.matmul(lhs, rhs, precision=algorithm)


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


def _symmetric(matrices: jax.Array) -> jax.Array:
    return 0.5 * (matrices + jnp.swapaxes(matrices, -2, -1))
