"""SOAP's direction: Adam in the eigenbases of Shampoo's factors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from shampoo_optax import _checks
from shampoo_optax.linalg import bases, modes
from shampoo_optax.linalg.masks import chosen
from shampoo_optax.linalg.rounding import rounded
from shampoo_optax.transforms import factors as statistics
from shampoo_optax.transforms._in_turn import in_turn
from shampoo_optax.transforms._numbers import wide
from shampoo_optax.transforms.factors import Matrices, Stacks, Statistics
from shampoo_optax.transforms.moment import Moment, NullSpace
from shampoo_optax.transforms.refresh import Refresh
from shampoo_optax.transforms.state_dtypes import StateDtypes, restored
from shampoo_optax.transforms.units import Share, Units, grouped, refreshed

Refreshed = tuple[Matrices, Matrices, Matrices]  # bases, null spaces, failures


class EigenbasisState(NamedTuple):
    """State of :func:`eigenbasis`."""

    count: jax.Array  # type: ignore[assignment]  # [], int32: steps taken
    factors: Matrices  # sums or averages of Gram matrices
    bases: Matrices  # eigenvectors of the factors in columns, the identity at first
    null: Matrices  # {stack: {dimension: [n, d]}}, bool: columns of the null space
    nu: Stacks  # second moments in the basis, float32 at least where not told
    failures: Matrices  # [n], int32: refused refreshes in a row


def eigenbasis(
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    basis: bases.BasisMethod = bases.Auto(),
    refresh: Refresh = Refresh(),
    exponents: Mapping[int, float] | None = None,
    ignored_dims: Mapping[int, Sequence[int]] | None = None,
    largest_factor: int | float = math.inf,
    bias_correction: bool = True,
    weighted: bool = True,
    null_space: NullSpace = "share",
    ridge: ArrayLike = 0.0,
    state_dtypes: StateDtypes = StateDtypes(),
    precision: str = "highest",
) -> optax.GradientTransformationExtraArgs:
    r"""Adam's second moment in the eigenbases of the Kronecker factors: SOAP.

    For a block :math:`G` with bases :math:`Q_i` (the identity before the first
    refresh), equals

    .. math::
        A_i &\leftarrow b_2 A_i + (1 - b_2)\, G_{(i)} G_{(i)}^T, \quad
        Q_i \leftarrow \text{eigenvectors}(A_i) \quad \text{(when due)} \\
        \nu &\leftarrow b_2 \nu + (1 - b_2)\, (G \times_i Q_i^T)^2 \\
        u &\leftarrow \left( (F \times_i Q_i^T) / ((\nu / (1 - b_2^t))^{1/2} +
        \text{eps}) \right) \times_i Q_i

    where :math:`F` is the incoming update. The second moment moves at every step, in
    the basis of that step. In the identity basis it is Adam. Linear in ``updates``,
    and descends. Statistics are measured on ``raw_gradient`` (on ``updates`` where it
    is None).

    A factor of a few gradients has a null space, in which no basis is better than
    another and rounding chooses. By default its directions share one second moment
    (its mean over them), which makes the update the same for every choice.

    Acts on stacks: use it inside :func:`blockwise`.

    Args:
      b2: decay of the factors and of the second moment; 1 sums them.
      eps: added to the root of the second moment, in units of the gradient.
      basis: how eigenbases are computed; by default as suits the platform.
      refresh: when.
      exponents: by the order of a block, the power of ``nu`` in place of 1/2.
      ignored_dims: by the order of a block, dimensions that keep the identity and
        have no factor.
      largest_factor: a dimension above this is ignored, too.
      bias_correction: of the factors and of the second moment.
      weighted: give a new sample the weight ``1 - b2``; otherwise 1, and no bias
        correction (Meta's ``drop_weighting_factor_on_gsquare``).
      null_space: ``"share"`` as above; ``"drop"`` gives updates nothing there (the
        pseudo-inverse); ``"plain"`` as the reference system, at rounding's mercy.
      ridge: added to a factor's diagonal before its basis is computed, in units of
        squared gradients. Only :class:`bases.QR` sees it: Meta's ``epsilon``.
      state_dtypes: in what precision factors, bases (``roots``) and the second moment
        are kept, and whether factors are packed.
      precision: of Gram matrices and changes of basis, as in :func:`kronecker`.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: an argument is out of range (at construction), or the
        updates are not stacks (at init).

    Example:
      >>> tx = blockwise(eigenbasis(refresh=Refresh(1)))
      >>> params = {"w": jnp.array([[3.0, 0.0], [0.0, 0.1]])}
      >>> updates, _ = tx.update(params, tx.init(params))
      >>> updates["w"].round(3)
      Array([[1., 0.],
             [0., 1.]], dtype=float32)

    Source: Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024, algorithm 3;
    Eschenhagen et al., `Purifying Shampoo <https://arxiv.org/abs/2506.03595>`_, 2025.
    """
    call = "eigenbasis"
    _checks.numbers(call, b2=b2, eps=eps)
    _checks.whole(call, "largest_factor", largest_factor, low=1, infinite=True)
    _checks.number(call, "ridge", ridge, _checks.NON_NEGATIVE)
    moment = Moment(b2, eps, bias_correction, weighted, exponents or {}, null_space)
    moment.check(call)
    ignored = {
        order: _dims(call, order, d) for order, d in (ignored_dims or {}).items()
    }
    measured = Statistics(b2, bias_correction, weighted, precision=precision)
    measured.check(call)

    def init_fn(stacks: Stacks) -> EigenbasisState:
        statistics.check_stacks(call, stacks)
        dims = {
            key: _kept(x.shape[1:], largest_factor, ignored)
            for key, x in stacks.items()
        }
        factors = statistics.zeros(stacks, dims, state_dtypes)
        first = statistics.identities(stacks, dims, state_dtypes.roots)
        return EigenbasisState(
            jnp.zeros([], jnp.int32),
            factors,
            first,
            jax.tree.map(lambda a: jnp.zeros(a.shape[:2], bool), first),
            {k: _moment(x, state_dtypes.second_moment) for k, x in stacks.items()},
            statistics.no_failures(factors),
        )

    def update_fn(
        updates: Stacks,
        state: EigenbasisState,
        params: Any = None,
        *,
        raw_gradient: Stacks | None = None,
        sizes: Matrices | None = None,
        **extra: Any,
    ) -> tuple[Stacks, EigenbasisState]:
        del params, extra
        gradients = updates if raw_gradient is None else raw_gradient
        count = optax.safe_increment(state.count)
        seen = gradients, state.factors, state.bases
        measure = partial(measured.measure, *seen, count=count)
        factors, samples = refresh.measured(count, measure, state.factors)
        target = partial(measured.target, count=samples, eps=eps)

        def solve(share: Share, old: Refreshed) -> Refreshed:
            return _refresh(share, factors, target, old, basis, ridge, sizes or {})

        old = state.bases, state.null, state.failures
        q, null, failures = refreshed(refresh, count, solve, old)
        turned = partial(_turned, moment, precision, count)
        new = {
            key: turned(update, state.nu[key], (gradients[key], q[key], null[key]))
            for key, update in updates.items()
        }
        updates, nu = ({key: x[i] for key, x in new.items()} for i in range(2))
        return updates, EigenbasisState(count, factors, q, null, nu, failures)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _moment(stack: jax.Array, dtype: DTypeLike | None) -> jax.Array:
    return jnp.zeros(stack.shape, dtype or wide(stack.dtype))


def _dims(call: str, order: int, dims: Sequence[int]) -> tuple[int, ...]:
    if len(set(dims)) < len(dims) or any(d not in range(order) for d in dims):
        raise ValueError(
            f"{call}(ignored_dims={{{order}: {list(dims)!r}}}): wanted different "
            f"dimensions of a block of order {order}, 0 to {order - 1}."
        )
    return tuple(dims)


def _kept(
    shape: tuple[int, ...], largest: float, ignored: Mapping[int, Sequence[int]]
) -> list[int]:
    """The dimensions of a block that have a factor."""
    skipped = ignored.get(len(shape), ())
    return [d for d, size in enumerate(shape) if size <= largest and d not in skipped]


def _turned(
    moment: Moment,
    precision: str,
    count: jax.Array,
    update: jax.Array,
    nu: jax.Array,
    seen: tuple[jax.Array, dict[str, jax.Array], dict[str, jax.Array]],
) -> tuple[jax.Array, jax.Array]:
    """Adam's step in the bases of one stack: the update and the second moment.

    ``seen`` are the gradient, the bases and what of them is null space.
    """
    turn = partial(modes.mode_products, precision=precision)

    def one(
        old: tuple[jax.Array, jax.Array], given: Any
    ) -> tuple[jax.Array, jax.Array]:
        (update, kept), (gradient, basis, null) = old, given
        nu = kept.astype(wide(kept.dtype))
        out_of = {int(d): m.astype(nu.dtype) for d, m in basis.items()}
        into = {d: jnp.swapaxes(m, -2, -1) for d, m in out_of.items()}
        nu = moment.accumulate(turn(gradient.astype(nu.dtype), into), nu, null)
        turned = turn(update.astype(nu.dtype), into)
        turned = moment.divide(turned, nu, null, count)
        turned = turn(turned, out_of).astype(update.dtype)
        return turned, rounded(nu, kept.dtype, count, stacked=True)

    return in_turn(one, (update, nu), seen, seen[1].values())


def _refresh(
    share: Share,
    factors: Matrices,
    target: Callable[[jax.Array], jax.Array],
    old: Refreshed,
    basis: bases.BasisMethod,
    ridge: ArrayLike,
    sizes: Matrices,
) -> Refreshed:
    """Bases anew, one batched call per size; the old ones where refused."""
    for members in grouped(factors):

        def solve(old: Refreshed, units: Units) -> Refreshed:
            vectors, null, failures = jax.tree.map(lambda x: x, old)  # to change
            before = units.take(vectors)
            seen = restored(units.take(factors))
            batch = target(seen)
            if any(key in sizes for key, _ in units.members):
                batch = statistics.apart(batch, units.take(_all(vectors, sizes)))
            found = bases.new_basis(
                basis, batch, bases.straightened(before), ridge=ridge
            )
            good = found.accepted
            was, count = units.take(null), units.take(failures)
            units.put(vectors, found.vectors.astype(before.dtype))
            units.put(null, chosen(good[:, None], found.null, was))
            failed = ~good & statistics.measured_any(seen)
            units.put(failures, chosen(failed, count + 1, jnp.zeros_like(count)))
            return vectors, null, failures

        old = share.run(factors, members, solve, old)
    return old


def _all(vectors: Matrices, sizes: Matrices) -> Matrices:
    """Sides of every block, also in stacks where nothing is filled."""
    return {
        key: {
            dim: jnp.full(len(basis), basis.shape[-1], jnp.int32)
            if key not in sizes
            else sizes[key][dim]
            for dim, basis in by_dim.items()
        }
        for key, by_dim in vectors.items()
    }
