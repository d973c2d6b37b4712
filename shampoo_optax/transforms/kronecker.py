"""Shampoo's direction: one factor and one inverse root per dimension of a block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from shampoo_optax import _checks
from shampoo_optax.linalg import modes, roots
from shampoo_optax.transforms._numbers import (
    bias_correction as correction_of,
)
from shampoo_optax.transforms._numbers import block_norm, new_weight, scalar, wide
from shampoo_optax.transforms.refresh import Refresh

# {stack: {dimension: [n, d, d]}}; dimensions are strings so that a checkpoint can
# name them.
Matrices = dict[str, dict[str, jax.Array]]
Exponents = Mapping[int, float | Mapping[int, float]]


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    factors: Matrices  # sums or averages of Gram matrices
    roots: Matrices  # inverse roots of the factors, the identity at first
    failures: dict[str, jax.Array]  # [n], int32: refused refreshes in a row


def kronecker(
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
    *,
    root: roots.RootMethod = roots.Eigh(),
    refresh: Refresh = Refresh(),
    exponents: Exponents | None = None,
    bias_correction: bool = True,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition stacks of blocks by Kronecker factors: Shampoo's direction.

    For a block :math:`G` of order :math:`k` with mode-:math:`i` unfolding
    :math:`G_{(i)}`, equals

    .. math::
        A_i &\leftarrow b_2 A_i + (1 - b_2)\, G_{(i)} G_{(i)}^T \\
        R_i &= (A_i / (1 - b_2^t) + \delta_i I)^{-1/(2k)} \quad \text{(when due)} \\
        u &\leftarrow F \times_1 R_1 \times_2 \dots \times_k R_k

    where :math:`F` is the incoming update and :math:`\delta_i = \max(\text{eps},
    \text{eps\_rel} \cdot \lambda_{max}(A_i))`. Statistics are measured on
    ``raw_gradient`` (on ``updates`` where it is None). Linear in ``updates``, and
    descends: ``<u, P u> >= 0``.

    Acts on stacks ``{"1024x384": [n, 1024, 384], ...}``: use it inside
    :func:`blockwise`. Factors and roots are float32 at least.

    A root that fails (non-finite, or a residual above ``root.max_residual``) is not
    used: its block keeps the old one and ``failures`` counts. A non-finite gradient
    leaves the factors of its block as they were.

    Args:
      b2: decay of the factors; 1 sums them (AdaGrad).
      eps: absolute damping, in units of squared gradients. Meta's ``epsilon`` with
        ``eps_rel=0``.
      eps_rel: damping relative to the largest eigenvalue.
      root: how inverse roots are computed.
      refresh: when they are computed.
      exponents: by the order of a block, the exponent of its roots (for all
        dimensions, or by dimension) in place of ``1 / (2 * order)``; 0 leaves a
        dimension without a factor.
      bias_correction: divide factors by ``1 - b2**t`` before a root.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: an argument is out of range (at construction), a root
        method cannot take an exponent, or the updates are not stacks (at init).

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=256)
      >>> tx = blockwise(kronecker(refresh=Refresh(1)), layout)
      >>> params = {"w": jnp.eye(2)}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].round(3)  # any gradient times any scale gives this: G / |G|
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source: Gupta, Koren and Singer, `Shampoo: Preconditioned Stochastic Tensor
    Optimization <https://arxiv.org/abs/1802.09568>`_, 2018, algorithm 2; Anil et al.,
    `Scalable Second Order Optimization for Deep Learning
    <https://arxiv.org/abs/2002.09018>`_, 2020.
    """
    _checks.numbers("kronecker", b2=b2, eps=eps, eps_rel=eps_rel)
    powers = _Exponents(exponents or {})

    def init_fn(stacks: dict[str, jax.Array]) -> KroneckerState:
        _check_stacks(stacks)
        factors: Matrices = {}
        identities: Matrices = {}
        for key, stack in stacks.items():
            dtype = wide(stack.dtype)
            factors[key], identities[key] = {}, {}
            for dim, power in powers.of(stack).items():
                root.check(1.0 / power)
                size = stack.shape[dim + 1]
                shape = (stack.shape[0], size, size)
                factors[key][str(dim)] = jnp.zeros(shape, dtype)
                identity = jnp.broadcast_to(jnp.eye(size, dtype=dtype), shape)
                identities[key][str(dim)] = jnp.array(identity)
        failures = {k: jnp.zeros(x.shape[0], jnp.int32) for k, x in stacks.items()}
        return KroneckerState(jnp.zeros([], jnp.int32), factors, identities, failures)

    def update_fn(
        updates: dict[str, jax.Array],
        state: KroneckerState,
        params: Any = None,
        *,
        raw_gradient: dict[str, jax.Array] | None = None,
        **extra: Any,
    ) -> tuple[dict[str, jax.Array], KroneckerState]:
        del params, extra
        gradients = updates if raw_gradient is None else raw_gradient
        count = optax.safe_increment(state.count)
        factors = {
            key: _measure(gradients[key], old, b2) for key, old in state.factors.items()
        }

        def refreshed() -> tuple[Matrices, dict[str, jax.Array]]:
            decay = b2 if bias_correction else 1.0
            targets = _targets(factors, decay, count)
            orders = {key: powers.of(stack) for key, stack in updates.items()}
            return _refresh(targets, orders, state, root, eps, eps_rel)

        def kept() -> tuple[Matrices, dict[str, jax.Array]]:
            return state.roots, state.failures

        new_roots, failures = jax.lax.cond(refresh.due(count), refreshed, kept)
        updates = {key: _apply(x, new_roots[key]) for key, x in updates.items()}
        return updates, KroneckerState(count, factors, new_roots, failures)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Exponents:
    """Exponents of the roots of a stack, by dimension; none where it is 0."""

    def __init__(self, overrides: Exponents) -> None:
        self._by_order = {
            order: self._expand(order, x) for order, x in overrides.items()
        }

    def of(self, stack: jax.Array) -> dict[int, float]:
        order = stack.ndim - 1
        default = 1.0 / (2 * order)
        override = self._by_order.get(order, {})
        powers = {dim: override.get(dim, default) for dim in range(order)}
        return {dim: power for dim, power in powers.items() if power > 0}

    @staticmethod
    def _expand(order: int, value: float | Mapping[int, float]) -> dict[int, float]:
        _checks.whole("kronecker", "exponents key", order, low=1, infinite=False)
        by_dim = (
            dict(value)
            if isinstance(value, Mapping)
            else dict.fromkeys(range(order), value)
        )
        for dim, power in by_dim.items():
            if dim not in range(order):
                raise ValueError(
                    f"kronecker(exponents={{{order}: ...}}): a block of order {order} "
                    f"has no dimension {dim!r}; wanted 0 to {order - 1}."
                )
            name = f"exponents[{order}][{dim}]"
            _checks.number("kronecker", name, power, _checks.NON_NEGATIVE)
        return by_dim


def _check_stacks(stacks: Any) -> None:
    if not hasattr(stacks, "items") or any(
        getattr(stack, "ndim", 0) < 2 for stack in stacks.values()
    ):
        raise TypeError(
            "kronecker(...).init takes stacks of blocks {'8x6': [n, 8, 6]}, not "
            "parameters: wrap it, blockwise(kronecker(...), layout)."
        )


def _measure(
    gradients: jax.Array, factors: dict[str, jax.Array], b2: ArrayLike
) -> dict[str, jax.Array]:
    """One step of the moving averages of the Gram matrices of a stack."""
    new = {}
    # The sum of squares is the trace of every Gram matrix of a block: one pass over
    # the gradient finds each NaN, Inf and overflow before it reaches a factor.
    squares = block_norm(gradients, batch_axes=1).reshape(-1, 1, 1)
    finite = jnp.isfinite(squares)
    for dim, factor in factors.items():
        dtype = factor.dtype
        gram = modes.gram(gradients, int(dim), dtype)
        decayed = scalar(b2, dtype) * factor + new_weight(b2, dtype) * gram
        new[dim] = jnp.where(finite, decayed, factor)
    return new


def _targets(factors: Matrices, decay: ArrayLike, count: jax.Array) -> Matrices:
    """The factors whose roots are wanted: without the bias of a short average."""

    def corrected(factor: jax.Array) -> jax.Array:
        return factor / correction_of(decay, count, factor.dtype)

    return jax.tree.map(corrected, factors)


def _refresh(
    targets: Matrices,
    powers: dict[str, dict[int, float]],
    state: KroneckerState,
    root: roots.RootMethod,
    eps: ArrayLike,
    eps_rel: ArrayLike,
) -> tuple[Matrices, dict[str, jax.Array]]:
    """All roots anew, one batched call per size and exponent; the old where refused."""
    groups: dict[tuple[int, float, Any], list[tuple[str, str]]] = {}
    for key, by_dim in targets.items():
        for dim, target in by_dim.items():
            same = (target.shape[-1], powers[key][int(dim)], target.dtype)
            groups.setdefault(same, []).append((key, dim))
    new: Matrices = {key: {} for key in targets}
    refused = {key: jnp.zeros(n.shape, bool) for key, n in state.failures.items()}
    for (_, power, _), members in groups.items():
        batch = jnp.concatenate([targets[key][dim] for key, dim in members])
        found = roots.inverse_root(root, batch, 1.0 / power, eps=eps, eps_rel=eps_rel)
        first = 0
        for key, dim in members:
            old = state.roots[key][dim]
            here = slice(first, first + old.shape[0])
            first += old.shape[0]
            accepted = found.accepted[here]
            new[key][dim] = jnp.where(accepted[:, None, None], found.root[here], old)
            refused[key] |= ~accepted
    failures = {
        key: jnp.where(refused[key], n + 1, 0) for key, n in state.failures.items()
    }
    return new, failures


def _apply(updates: jax.Array, by_dim: dict[str, jax.Array]) -> jax.Array:
    """Multiply the roots onto a stack, in their precision; its dtype comes back."""
    matrices = {int(dim): matrix for dim, matrix in by_dim.items()}
    if not matrices:
        return updates
    dtype = next(iter(matrices.values())).dtype
    return modes.mode_products(updates.astype(dtype), matrices).astype(updates.dtype)
