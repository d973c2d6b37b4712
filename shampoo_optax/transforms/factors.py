"""Kronecker factors of stacks: how they are measured, and what is taken from them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax.layout.split import promoted
from shampoo_optax.linalg import codes, modes, packing
from shampoo_optax.linalg.masks import chosen
from shampoo_optax.linalg.precisions import PRECISIONS
from shampoo_optax.linalg.rounding import rounded
from shampoo_optax.transforms._in_turn import in_turn
from shampoo_optax.transforms._numbers import bias_correction as correction_of
from shampoo_optax.transforms._numbers import (
    block_squares,
    new_weight,
    over,
    scalar,
    wide,
)
from shampoo_optax.transforms.state_dtypes import StateDtypes, restored, stored

Stacks = dict[str, jax.Array]
# {stack: {dimension: [n, d, d]}}; dimensions are strings so that a checkpoint can
# name them.
Matrices = dict[str, dict[str, jax.Array]]
Correction = Literal["kl", "kl_reference"]
CORRECTIONS = ("kl", "kl_reference")


class _Step(NamedTuple):
    """What all factors of one step share."""

    count: jax.Array  # type: ignore[assignment]
    weights: dict[jnp.dtype, jax.Array]  # of the new sample


@dataclass(frozen=True)
class Statistics:
    """How factors are averaged, and how a target is made of them; see kronecker."""

    b2: ArrayLike
    bias_correction: bool = True
    weighted: bool = True
    trace_scaling: float | None = None
    correction: Correction | None = None
    precision: str = "highest"

    def check(self, call: str) -> None:
        """Raise where an option is out of range."""
        _checks.numbers(call, b2=self.b2)
        _checks.choice(call, "precision", self.precision, list(PRECISIONS))
        if self.correction is not None:
            _checks.choice(call, "correction", self.correction, CORRECTIONS)
        if self.trace_scaling is not None:
            within = _checks.Range(0.0, 1.0, open_low=True)
            _checks.number(call, "trace_scaling", self.trace_scaling, within)

    def measure(
        self,
        gradients: Stacks,
        factors: Matrices,
        roots: Matrices,
        sizes: Matrices | None = None,
        *,
        count: jax.Array,
    ) -> Matrices:
        """One step of the moving averages of the Gram matrices.

        Args:
          gradients: raw gradients.
          factors: the averages so far, as they are kept.
          roots: the inverse roots in use; only a correction looks at them.
          sizes: sides of the blocks ``[n]``, of stacks where zeros fill some.
          count: of the step.

        Returns:
          The new averages; those of a block whose gradient is not finite stay.
        """
        weight = self.b2 if self.weighted else 1.0
        dtypes = [
            self._dtype(old, gradients[key])
            for key, by_dim in factors.items()
            for old in by_dim.values()
        ]
        # Once, not for each of the factors.
        weights = {of: new_weight(weight, of) for of in dict.fromkeys(dtypes)}
        step = _Step(count, weights)
        return {
            key: self._measure(
                gradients[key], old, roots[key], (sizes or {}).get(key), step
            )
            for key, old in factors.items()
        }

    def _dtype(self, factor: jax.Array, gradients: jax.Array) -> jnp.dtype:
        return promoted(wide(factor.dtype), gradients.dtype)

    def _measure(
        self,
        gradients: jax.Array,
        factors: dict[str, jax.Array],
        roots: dict[str, jax.Array],
        sizes: dict[str, jax.Array] | None,
        step: _Step,
    ) -> dict[str, jax.Array]:
        # The sum of squares is the trace of every Gram matrix of a block: one pass
        # over the gradient finds each NaN, Inf and overflow before it reaches a factor.
        # Of the stack as it lies there: XLA would put it together again to square it.
        whole = lax.optimization_barrier(gradients)
        finite = jnp.isfinite(block_squares(whole, batch_axes=1)).reshape(-1, 1, 1)
        new = {}
        for dim, factor in factors.items():
            others = {o: r for o, r in roots.items() if o != dim}
            given = gradients, finite, others if self.correction else {}, sizes

            def one(old: jax.Array, given: Any, dim: int = int(dim)) -> jax.Array:
                return self._averaged(old, *given, dim=dim, step=step)

            new[dim] = in_turn(one, factor, given, [factor])
        return new

    def _averaged(
        self,
        old: jax.Array,
        gradients: jax.Array,
        finite: jax.Array,
        others: dict[str, jax.Array],
        sizes: dict[str, jax.Array] | None,
        *,
        dim: int,
        step: _Step,
    ) -> jax.Array:
        """The average of one dimension's Gram matrices; ``others``: roots, for KL."""
        dtype = self._dtype(old, gradients)
        packed = packing.is_packed(old)
        if others:  # KL looks through the other dimensions' roots
            through = {int(other): restored(root) for other, root in others.items()}
            gradients = gradients.astype(next(iter(through.values())).dtype)
            gradients = modes.mode_products(
                gradients, through, precision=self.precision
            )
        gram = modes.gram(gradients, dim, dtype, precision=self.precision)
        if self.correction == "kl":
            gram = gram * _one_over_others(gradients, dim, sizes, dtype)
        # Packed before they meet: the average is never unpacked here.
        gram = packing.pack(gram) if packed else gram
        decay, new = scalar(self.b2, dtype), step.weights[dtype] * gram
        if codes.is_coded(old):
            return chosen(finite, codes.moved(old, decay, new, step.count), old)
        decayed = decay * old.astype(dtype) + new
        kept = rounded(decayed, old.dtype, step.count, stacked=True, packed=packed)
        return chosen(finite, kept, old)

    def target(self, factors: jax.Array, count: jax.Array, eps: ArrayLike) -> jax.Array:
        """The matrices whose roots or bases are wanted, after ``count`` samples."""
        dtype = factors.dtype
        if self.bias_correction and self.weighted:
            factors = over(factors, correction_of(self.b2, count, dtype))
        if self.trace_scaling is not None:
            trace = jnp.trace(factors, axis1=-2, axis2=-1)
            scale = jnp.maximum(trace, scalar(eps, dtype)) ** -self.trace_scaling
            factors = factors * scale[:, None, None]
        return factors


def _one_over_others(
    gradients: jax.Array,
    dim: int,
    sizes: dict[str, jax.Array] | None,
    dtype: jnp.dtype,
) -> ArrayLike:
    """One over the product of a block's other sides."""
    if sizes is None:
        return gradients.shape[dim + 1] / math.prod(gradients.shape[1:])
    others = [size for other, size in sizes.items() if int(other) != dim]
    product = math.prod(size.astype(dtype) for size in others)
    return jnp.reshape(1.0 / product, (-1, 1, 1))


def apart(matrices: jax.Array, sizes: jax.Array) -> jax.Array:
    """Matrices whose filled part is a multiple of the identity, above all the rest.

    Its directions are then eigenvectors of their own, and none of the null space.

    Example:
      >>> apart(jnp.zeros((1, 2, 2)).at[0, 0, 0].set(3.0), jnp.array([1]))
      Array([[[3., 0.],
              [0., 6.]]], dtype=float32)
    """
    places = jnp.arange(matrices.shape[-1])
    diagonal = jnp.diagonal(matrices, axis1=-2, axis2=-1)
    above = 2.0 * jnp.max(jnp.abs(diagonal), axis=-1, keepdims=True)
    filled = jnp.where(places[None] >= sizes[:, None], above, jnp.zeros_like(above))
    return matrices + filled[:, None] * jnp.eye(len(places), dtype=matrices.dtype)[None]


def zeros(
    stacks: Stacks, dims: Mapping[str, Iterable[int]], kept: StateDtypes
) -> Matrices:
    """Factors before the first step: zero, in float32 at least where not told."""

    def zero(stack: jax.Array, dim: int) -> jax.Array:
        number, side, _ = shape = _shape(stack, dim)
        dtype = jnp.dtype(kept.factors or wide(stack.dtype))
        if dtype == jnp.int8:
            shape = (number, *codes.coded_shape(side))
        elif kept.packed:
            shape = (number, *packing.packed_shape(side))
        return jnp.zeros(shape, dtype)

    return {
        key: {str(dim): zero(stacks[key], dim) for dim in of}
        for key, of in dims.items()
    }


def identities(
    stacks: Stacks,
    dims: Mapping[str, Iterable[int]],
    dtype: DTypeLike | None = None,
    *,
    packed: bool = False,
) -> Matrices:
    """Roots or bases before the first refresh: the identity."""

    def identity(stack: jax.Array, dim: int) -> jax.Array:
        shape = _shape(stack, dim)
        eye = jnp.eye(shape[-1], dtype=wide(stack.dtype))
        eye = stored(eye[None], dtype, packed=packed)
        return jnp.array(jnp.broadcast_to(eye, (shape[0], *eye.shape[1:])))

    return {
        key: {str(dim): identity(stacks[key], dim) for dim in of}
        for key, of in dims.items()
    }


def _shape(stack: jax.Array, dim: int) -> tuple[int, int, int]:
    return stack.shape[0], stack.shape[dim + 1], stack.shape[dim + 1]


def check_stacks(call: str, stacks: Any, *, order: int | None = None) -> None:
    """Raise where init was called on parameters in place of stacks of blocks."""
    if not hasattr(stacks, "items") or any(
        getattr(stack, "ndim", 0) < 2 for stack in stacks.values()
    ):
        raise TypeError(
            f"{call}(...).init takes stacks of blocks {{'8x6': [n, 8, 6]}}, not "
            f"parameters: wrap it, blockwise({call}(...), layout)."
        )
    for key, stack in stacks.items():
        if order is not None and stack.ndim != order + 1:
            raise ValueError(
                f"{call}(...).init: a block of shape {key} has {stack.ndim - 1} "
                f"dimensions; wanted {order}. Fold parameters into matrices with "
                "BlockLayout(), and leave vectors to the rest."
            )


def measured_any(factors: jax.Array) -> jax.Array:
    """Which of ``[n, d, d]`` have seen anything.

    A factor of zeros (a dead slot, a parameter without a gradient so far) has no root,
    and that it has none is no failure.

    Example:
      >>> measured_any(jnp.zeros((1, 2, 2)))
      Array([False], dtype=bool)
    """
    return jnp.sum(jnp.abs(factors), axis=(-2, -1)) != 0


def no_failures(factors: Matrices) -> Matrices:
    """Refused refreshes in a row, of every matrix, before the first step."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape[0], jnp.int32), factors)
