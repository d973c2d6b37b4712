"""The orthogonal factor ``U V^T`` of stacks of matrices, and how long it should be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp

from shampoo_optax.linalg.precisions import PRECISION

Quintic = tuple[float, float, float]

# Jordan et al., 2024: five steps bring singular values of [0.01, 1] into [0.7, 1.2].
MUON: Quintic = (3.4445, -4.7750, 2.0315)
# Amsel et al., 2025, table of section 4: the minimax polynomials for [1e-3, 1], whose
# last repeats for ever. Each but the last is divided by 1.01 against rounding upwards.
_MINIMAX: tuple[Quintic, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845749493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)


class Orthogonalization(Protocol):
    """A way to compute ``U V^T``."""

    def solve(self, matrices: jax.Array) -> jax.Array:
        """Orthogonal factors of ``[..., m, n]``."""


@dataclass(frozen=True)
class NewtonSchulz:
    """Orthogonal factors by a fixed odd polynomial; matrix products only.

    Equals, from ``X = A / max(|A|_F, eps)``, repeating ``X <- a X + b X (X^T X) +
    c X (X^T X)^2``: with the default coefficients Muon's approximation, whose
    singular values scatter around one.

    Args:
      coefficients: ``(a, b, c)``.
      num_iterations: how often.
      eps: smallest norm that is divided by.

    Example:
      >>> x = NewtonSchulz().solve(jnp.diag(jnp.array([3.0, 1.0])))
      >>> bool(jnp.all(jnp.abs(jnp.diag(x) - 1) < 0.3))
      True

    Source: Jordan et al., `Muon <https://kellerjordan.github.io/posts/muon/>`_, 2024.
    """

    coefficients: Quintic = MUON
    num_iterations: int = 5
    eps: float = 1e-8

    def solve(self, matrices: jax.Array) -> jax.Array:
        """See :class:`Orthogonalization`."""
        steps = (self.coefficients,) * self.num_iterations
        return _quintics(matrices, steps, eps=self.eps)


@dataclass(frozen=True)
class PolarExpress:
    """Orthogonal factors by the best odd polynomial of each step.

    Converges: after ``num_iterations = 8`` the singular values of ``[1e-3, 1]`` are
    within 2e-2 of one, where :class:`NewtonSchulz` never comes closer than 0.3.

    Args:
      num_iterations: how many steps; from the eighth on the last one repeats.
      safety: divides the argument of all steps but the last against rounding.

    Example:
      >>> x = PolarExpress().solve(jnp.diag(jnp.array([3.0, 0.1])))
      >>> bool(jnp.all(jnp.abs(jnp.diag(x) - 1) < 0.02))
      True

    Source: Amsel et al., `The Polar Express <https://arxiv.org/abs/2505.16932>`_, 2025.
    """

    num_iterations: int = 8
    safety: float = 1.01

    def solve(self, matrices: jax.Array) -> jax.Array:
        """See :class:`Orthogonalization`."""
        damped = [
            (a / self.safety, b / self.safety**3, c / self.safety**5)
            for a, b, c in _MINIMAX[:-1]
        ]
        last = _MINIMAX[-1]
        steps = tuple((damped + [last] * self.num_iterations)[: self.num_iterations])
        return _quintics(matrices, steps, eps=1e-30, scale=self.safety)


@dataclass(frozen=True)
class SVD:
    """Orthogonal factors by singular value decomposition: exact.

    Args:
      scale_by_nuclear_norm: multiply by the sum of the singular values, the steepest
        descent direction in the spectral norm.

    Example:
      >>> SVD().solve(jnp.diag(jnp.array([3.0, 0.1]))).round(4)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)
    """

    scale_by_nuclear_norm: bool = False

    def solve(self, matrices: jax.Array) -> jax.Array:
        """See :class:`Orthogonalization`."""
        u, s, vt = jnp.linalg.svd(matrices, full_matrices=False)
        factor = jnp.matmul(u, vt, precision=PRECISION)
        if self.scale_by_nuclear_norm:
            factor = factor * jnp.sum(s, axis=-1)[..., None, None]
        return factor


class ScaleRule(Protocol):
    """How long an orthogonal factor should be, by its shape."""

    def factor(self, rows: int, columns: int) -> float:
        """What a factor ``[rows, columns]`` is multiplied by."""


@dataclass(frozen=True)
class Unscaled:
    """One, whatever the shape.

    Example:
      >>> Unscaled().factor(8, 2)
      1.0
    """

    def factor(self, rows: int, columns: int) -> float:
        """See :class:`ScaleRule`."""
        del rows, columns
        return 1.0


@dataclass(frozen=True)
class AspectRatio:
    """``sqrt(max(1, outputs / inputs))``: Muon's rule.

    Args:
      output_dimension: which dimension counts outputs: 1 in Flax kernels ``[in,
        out]``, 0 in PyTorch's ``[out, in]``.

    Example:
      >>> AspectRatio().factor(2, 8), AspectRatio(output_dimension=0).factor(2, 8)
      (2.0, 1.0)
    """

    output_dimension: int = 1

    def factor(self, rows: int, columns: int) -> float:
        """See :class:`ScaleRule`."""
        sides = rows, columns
        ratio = sides[self.output_dimension] / sides[1 - self.output_dimension]
        return max(1.0, ratio) ** 0.5


@dataclass(frozen=True)
class MatchRMS:
    """``rms * sqrt(max(rows, columns))``: entries as large as Adam's usually are.

    Args:
      rms: root mean square of the update's entries.

    Example:
      >>> MatchRMS().factor(100, 25)
      2.0

    Source: Liu et al., `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_, 2025, section 2.2.
    """

    rms: float = 0.2

    def factor(self, rows: int, columns: int) -> float:
        """See :class:`ScaleRule`."""
        return self.rms * max(rows, columns) ** 0.5


def _quintics(
    matrices: jax.Array, steps: tuple[Quintic, ...], *, eps: float, scale: float = 1.0
) -> jax.Array:
    """Odd quintic polynomials one after the other, on the narrow side."""
    tall = matrices.shape[-2] >= matrices.shape[-1]
    x = matrices if tall else jnp.swapaxes(matrices, -2, -1)
    # Prescaling by the largest entry keeps the squares of the norm in range.
    largest = jnp.max(jnp.abs(x), axis=(-2, -1), keepdims=True)
    tiny = jnp.finfo(x.dtype).tiny
    x = x / jnp.maximum(largest, tiny)
    norm = jnp.sqrt(jnp.sum(x * x, axis=(-2, -1), keepdims=True))
    floor = jnp.maximum(eps / jnp.maximum(largest, tiny), tiny)
    x = x / (scale * jnp.maximum(norm, floor))
    for a, b, c in steps:
        gram = _product(jnp.swapaxes(x, -2, -1), x)
        x = a * x + _product(x, b * gram + c * _product(gram, gram))
    return x if tall else jnp.swapaxes(x, -2, -1)


def _product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return jnp.matmul(lhs, rhs, precision=PRECISION)
