"""Shampoo's direction: one factor and one inverse root per dimension of a block."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from shampoo_optax import _checks
from shampoo_optax.linalg import bases, modes, roots
from shampoo_optax.linalg.masks import chosen
from shampoo_optax.transforms import factors as statistics
from shampoo_optax.transforms._in_turn import in_turn
from shampoo_optax.transforms.exponents import (
    Exponents,
    ExponentTable,
    Marks,
    marked,
)
from shampoo_optax.transforms.factors import Correction, Matrices, Stacks, Statistics
from shampoo_optax.transforms.refresh import Refresh
from shampoo_optax.transforms.state_dtypes import (
    StateDtypes,
    certain,
    restored,
    stored_like,
)
from shampoo_optax.transforms.units import Share, Units, grouped, refreshed

Refreshed = tuple[Matrices, Matrices, Matrices | None]  # roots, failures, bases
Solved = tuple[jax.Array, jax.Array, jax.Array | None]  # root, accepted, basis
Solver = Callable[[jax.Array, jax.Array | None, float], Solved]  # matrices, old basis


class KroneckerState(NamedTuple):
    """State of :func:`kronecker`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    factors: Matrices  # sums or averages of Gram matrices
    roots: Matrices  # inverse roots of the factors, the identity at first
    failures: Matrices  # [n], int32: refused refreshes in a row
    bases: Matrices | None  # eigenvectors in columns, where roots are made of them
    exponents: Marks = ()  # of the roots, without arrays; see exponents.marked


def kronecker(
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    eps_rel: ArrayLike = 1e-6,
    *,
    root: roots.RootMethod = roots.Auto(),
    refresh: Refresh = Refresh(),
    exponents: Exponents | None = None,
    largest_factor: int | float = math.inf,
    bias_correction: bool = True,
    weighted: bool = True,
    trace_scaling: float | None = None,
    correction: Correction | None = None,
    basis: bases.BasisMethod | None = None,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
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
    :func:`blockwise`. Factors and roots are float32 at least, but where
    ``state_dtypes`` says otherwise.

    A root that fails (non-finite, or a residual above ``root.max_residual``) is not
    used: its block keeps the old one and ``failures`` counts. A non-finite gradient
    leaves the factors of its block as they were.

    Args:
      b2: decay of the factors; 1 sums them (AdaGrad).
      eps: absolute damping, in units of squared gradients. Meta's ``epsilon`` with
        ``eps_rel=0``.
      eps_rel: damping relative to the largest eigenvalue.
      root: how inverse roots are computed; by default as suits the platform, and by
        eigendecomposition where factors are kept in bfloat16.
      refresh: when they are computed.
      exponents: by the order of a block, the exponent of its roots (for all
        dimensions, or by dimension) in place of ``1 / (2 * order)``; 0 leaves a
        dimension without a factor.
      largest_factor: a dimension above this has no factor, and :math:`k` counts the
        others: a thin matrix gets one factor with exponent 1/2.
      bias_correction: divide factors by ``1 - b2**t`` before a root.
      weighted: give a new sample the weight ``1 - b2``; otherwise 1, and no bias
        correction (Meta's ``drop_weighting_factor_on_gsquare``).
      trace_scaling: an exponent in (0, 1]: multiply each factor by ``max(trace,
        eps)`` to minus this power before a root; None for none.
      correction: ``"kl"`` measures each dimension on the gradient preconditioned
        along all others, divided by their size: KL-Shampoo, with exponent 1/2.
        ``"kl_reference"`` is Meta's reading: no division, the usual exponents.
      basis: where roots are made of a cached eigenbasis, how it is refreshed, for
        example ``bases.QR()`` (Meta's eigendecomposed form); ``root`` is then an
        :class:`roots.Eigh` (or an :class:`roots.Auto` with one for CPUs), which says
        what the eigenvalues become.
      state_dtypes: in what precision factors and roots (with a ``basis``, that too)
        are kept, and whether packed.
      precision: of Gram matrices and products with the roots on a GPU or TPU, where
        their operands are float32: ``"bf16x6"``, ``"bf16x3"``, ``"tf32x3"`` (GPU),
        ``"tf32"`` (GPU) or ``"bf16"`` keep fewer bits and cost less.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: an argument is out of range (at construction), a root
        method cannot take an exponent, the updates are not stacks (at init), or the
        state is one of other exponents (at update).

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
    <https://arxiv.org/abs/2002.09018>`_, 2020; Lin et al., `Understanding and
    Improving Shampoo and SOAP via Kullback-Leibler Minimization
    <https://arxiv.org/abs/2509.03378>`_, 2025 (correction).
    """
    call = "kronecker"
    _checks.numbers(call, eps=eps, eps_rel=eps_rel)
    _checks.whole(call, "largest_factor", largest_factor, low=1, infinite=True)
    measured = Statistics(
        b2, bias_correction, weighted, trace_scaling, correction, precision
    )
    measured.check(call)
    solver = _solver(_suited(root, state_dtypes), basis, eps, eps_rel)
    # Each factor of KL-Shampoo is a covariance: its whitening has exponent 1/2.
    table = ExponentTable(
        call,
        exponents,
        lambda k: 0.5 if correction == "kl" else 1 / (2 * k),
        largest_factor,
    )

    def init_fn(stacks: Stacks) -> KroneckerState:
        statistics.check_stacks(call, stacks)
        powers = {key: table.of(stack) for key, stack in stacks.items()}
        for power in {power for of in powers.values() for power in of.values()}:
            root.check(1.0 / power)
        factors = statistics.zeros(stacks, powers, state_dtypes)
        eye = partial(statistics.identities, stacks, powers, state_dtypes.roots)
        return KroneckerState(
            jnp.zeros([], jnp.int32),
            factors,
            eye(packed=state_dtypes.packed),
            statistics.no_failures(factors),
            None if basis is None else eye(),
            marked(powers),
        )

    def update_fn(
        updates: Stacks,
        state: KroneckerState,
        params: Any = None,
        *,
        raw_gradient: Stacks | None = None,
        sizes: Matrices | None = None,
        refresh_only: bool = False,
        **extra: Any,
    ) -> tuple[Stacks, KroneckerState]:
        gradients = updates if raw_gradient is None else raw_gradient
        count, seen = state.count, (gradients, state.factors, state.roots, sizes)
        measure: Callable[[], Matrices] = partial(dict, state.factors)
        if not refresh_only:  # see refresh_now
            count = optax.safe_increment(count)
            measure = partial(measured.measure, *seen, count=count)
        factors, samples = refresh.measured(count, measure, state.factors)
        target = partial(measured.target, count=samples, eps=eps)
        powers = table.as_in(state.exponents, updates)

        def solve(share: Share, old: Refreshed) -> Refreshed:
            return _refresh(share, factors, target, powers, old, solver)

        new = refreshed(refresh, count, solve, state[2:5], at_once=refresh_only)
        updates = {k: _apply(x, new[0][k], precision) for k, x in updates.items()}
        return updates, KroneckerState(count, factors, *new, state.exponents)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _suited(root: roots.RootMethod, state_dtypes: StateDtypes) -> roots.RootMethod:
    """A method that was not chosen by hand takes factors as they are kept."""
    if isinstance(root, roots.Auto) and state_dtypes.rounds_factors:
        return root.clipping()
    return root


def _solver(
    root: roots.RootMethod,
    basis: bases.BasisMethod | None,
    eps: ArrayLike,
    eps_rel: ArrayLike,
) -> Solver:
    """Roots of a batch, directly or from a cached basis."""
    if basis is None:

        def direct(batch: jax.Array, old: jax.Array | None, power: float) -> Solved:
            del old
            p = 1.0 / power
            found = roots.inverse_root(root, batch, p, eps=eps, eps_rel=eps_rel)
            return found.root, found.accepted, None

        return direct
    values = root.cpu if isinstance(root, roots.Auto) else root
    if not isinstance(values, roots.Eigh):
        raise ValueError(
            f"kronecker(basis={basis!r}, root={root!r}): a root is made of a basis by "
            "roots.Eigh(...) only, which says what the eigenvalues become."
        )

    def cached(batch: jax.Array, old: jax.Array | None, power: float) -> Solved:
        assert old is not None  # init made one, since there is a method
        new = bases.new_basis(basis, batch, old, ridge=eps)
        made = roots.from_basis(
            values, new.vectors, new.values, 1.0 / power, eps=eps, eps_rel=eps_rel
        )
        return made, new.accepted, new.vectors

    return cached


def _refresh(
    share: Share,
    factors: Matrices,
    target: Callable[[jax.Array], jax.Array],
    powers: dict[str, dict[int, float]],
    old: Refreshed,
    solver: Solver,
) -> Refreshed:
    """Roots anew, one batched call per size and exponent; the old where refused."""
    for members in grouped(factors, powers):
        power = powers[members[0][0]][int(members[0][1])]

        def solve(old: Refreshed, units: Units, power: float = power) -> Refreshed:
            roots, failures, cached = jax.tree.map(lambda x: x, old)  # to change
            vectors = None if cached is None else units.take(cached)
            batch = certain(units.take(factors))
            basis = None if vectors is None else bases.straightened(vectors)
            found = solver(target(batch), basis, power)
            root = stored_like(found[0], units.one_of(roots))
            units.put(roots, root, found[1])
            failed = ~found[1] & statistics.measured_any(batch)
            more = units.take(failures) + 1
            units.put(failures, chosen(failed, more, jnp.zeros_like(more)))
            if cached is not None and vectors is not None and found[2] is not None:
                units.put(cached, found[2].astype(vectors.dtype))
            return roots, failures, cached

        old = share.run(factors, members, solve, old)
    return old


def _apply(
    updates: jax.Array, by_dim: dict[str, jax.Array], precision: str
) -> jax.Array:
    """Multiply the roots onto a stack, in their precision; its dtype comes back."""
    if not by_dim:
        return updates

    def one(updates: jax.Array, by_dim: dict[str, jax.Array]) -> jax.Array:
        matrices = {int(dim): restored(matrix) for dim, matrix in by_dim.items()}
        dtype = next(iter(matrices.values())).dtype
        new = modes.mode_products(updates.astype(dtype), matrices, precision=precision)
        return new.astype(updates.dtype)

    return in_turn(one, updates, by_dim, by_dim.values())
