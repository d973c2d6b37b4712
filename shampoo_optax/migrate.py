"""Start an optimizer from the state of another that has trained the model so far."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.layout.block_layout import BlockLayout
from shampoo_optax.layout.split import split
from shampoo_optax.linalg import modes
from shampoo_optax.shardings import state_shardings
from shampoo_optax.transforms._spread import spread
from shampoo_optax.transforms._tree import Tree
from shampoo_optax.transforms.blockwise import BlockwiseState
from shampoo_optax.transforms.eigenbasis import EigenbasisState
from shampoo_optax.transforms.factors import Matrices
from shampoo_optax.transforms.graft import GraftState
from shampoo_optax.transforms.kronecker import KroneckerState

Arrays = dict[str, jax.Array]  # by a parameter's name, or by a stack's

# Which field of a state is which moment. By name, since Optax exports not all of them.
MOMENTS = {
    "ScaleByAdamState": {"mu": "mu", "nu": "nu"},
    "ScaleByRmsState": {"nu": "nu"},
    "ScaleByRmsWithCountState": {"nu": "nu"},
    "ScaleByRssState": {"sum_of_squares": "nu"},
    "TraceState": {"trace": "trace"},
    "FilterState": {"mu": "mu"},
    "MagnitudeState": {"nu": "nu"},
    "EigenbasisState": {"nu": "nu"},
}
SOURCES = list(MOMENTS)[:5]
SCHEDULES = ("ScaleByScheduleState", "WrappedScheduleState")
# They count steps of the whole optimizer, under this name.
COUNTERS = dict.fromkeys((*SCHEDULES, "AveragingState"), "count")
COUNTERS |= {
    "InjectStatefulHyperparamsState": "count",
    "MultiStepsState": "gradient_step",
}
WORDS = {
    "mu": "a moving average of the gradient",
    "nu": "a second moment",
    "trace": "a momentum of finished steps",
}
WANTED = "Wanted the state of optax.adam, adamw, rmsprop, adagrad or sgd(momentum=...)"
UNSEEN = jnp.iinfo(jnp.int32).max  # a moment without a count has no bias to correct


class _Source(NamedTuple):
    """What a state has to give."""

    moments: dict[str, Arrays]  # "mu", "nu", "trace": by name
    count: jax.Array | None  # type: ignore[assignment]  # steps in the moments
    position: jax.Array | None  # of the schedules


def from_adam(
    state: optax.OptState,
    tx: optax.GradientTransformation,
    params: optax.Params,
    layout: BlockLayout = BlockLayout(),
) -> Any:
    """The state of an optimizer that goes on where Adam's is.

    Equals ``tx.init(params)`` with Adam's count and moments in place of zeros, cut
    into blocks where they are kept in blocks, and with schedules where Adam's are.
    What Adam has not measured (factors, bases, when to begin grafting) begins anew. So
    with :func:`shampoo` the steps are Adam's own until ``refresh.start`` of them are
    done, and from then on Shampoo's direction, every block as long as Adam would
    have made it; :func:`warm_up` leaves the first part out. With :func:`soap`
    (``b3=b1``) they are Adam's until the first refresh.

    This holds where the numbers agree: ``b1``, the magnitude's ``b2`` and ``eps``
    (``grafting.adam(b2, eps)``), the schedule and the weight decay. States do not
    hold them, so they cannot be compared. With ``grafting=None`` Shampoo has a length
    of its own, and does not go on with Adam's.

    Args:
      state: of ``optax.adam`` or ``adamw``, inside any chain or wrapper. From
        ``rmsprop`` and ``adagrad`` a magnitude rule of the same kind inherits
        (``shampoo(b1=None, grafting=grafting.rmsprop())``), from ``sgd(momentum=m)``
        the same momentum (``shampoo(b1=None, grafting=grafting.sgd(), momentum=m)``).
      tx: what goes on: an alias, or our parts in ``chain``, ``partition``, ``masked``,
        ``MultiSteps``, ``inject_hyperparams``. Its own hyperparameters hold.
      params: as trained so far.
      layout: that of ``tx``. With ``block_axes`` the moments go to the devices that
        own the blocks, as gradients do. :func:`spectral_descent` narrows its layout
        and is found by that; with ``exponents`` pass ``turn_wide_blocks=False``.

    Returns:
      The state, in arrays of its own: ``state`` can still be used and donated.

    Raises:
      ValueError: ``state`` lacks what ``tx`` needs, has it twice, or belongs to other
        parameters; or the layout is not that of ``tx``.

    Example:
      >>> params, gradient = {"kernel": jnp.eye(3)}, {"kernel": jnp.ones((3, 3))}
      >>> adam, tx = optax.adamw(1e-3), shampoo(1e-3)
      >>> updates, state = adam.update(gradient, adam.init(params), params)
      >>> new = from_adam(state, tx, params)
      >>> ours, _ = tx.update(gradient, new, params)
      >>> updates, _ = adam.update(gradient, state, params)
      >>> float(jnp.abs(ours["kernel"] - updates["kernel"]).max()) < 1e-8
      True

    Source: Agarwal et al., `Disentangling Adaptive Gradient Methods from Learning
    Rates <https://arxiv.org/abs/2002.11803>`_, 2020: a direction can be exchanged
    and the magnitude kept.
    """
    source = _read(state)
    _same_model(source, params)
    members = [_names_in(node) for node in _blockwise(_unblocked(tx, params))]

    def build(params: optax.Params, source: _Source) -> Any:
        fresh = tx.init(params)
        trees = iter(_trees(fresh, params, layout, members))
        return _Heir(source, trees).of(fresh)

    if not layout.block_axes:
        return build(params, source)
    where = state_shardings(tx, params, layout)
    return jax.jit(build, out_shardings=where)(params, source)


def warm_up(
    tx: optax.GradientTransformation,
    state: Any,
    params: optax.Params,
    gradients: Iterable[optax.Updates],
) -> Any:
    """Measure factors before the first step: no parameter and no moment moves.

    Equals ``tx.update`` on every gradient, of which only the factors, their roots and
    bases, and the count that begins grafting are kept. With ``refresh.start - 1``
    gradients or more the next step is Shampoo's already, as long as Adam's: a tenth
    of a second of gradients spares ``refresh.start`` steps of Adam. Take those of
    ten to twenty batches, at the parameters where training goes on; under
    ``optax.MultiSteps`` as many times more.

    The second moment of :func:`eigenbasis` is turned with its bases, as though the
    entries of a gradient were uncorrelated: it would be that of other directions.
    Its bases are refreshed at multiples of the frequency, so give it that many.

    Args:
      tx: the optimizer.
      state: its state, for example of :func:`from_adam`; it is not consumed.
      params: where the gradients were taken.
      gradients: like ``params``; a generator computes one at a time.

    Returns:
      The state with the factors.

    Raises:
      ValueError: there are no factors in the state, or no gradients.

    Example:
      >>> params, tx = {"kernel": jnp.eye(3)}, shampoo(1e-3, refresh=Refresh(2))
      >>> state = warm_up(tx, tx.init(params), params, [params])
      >>> updates, _ = tx.update(params, state, params)  # grafted, at step 2 of 2

    Source: the start of preconditioning of Shi et al., `Distributed Shampoo
    <https://arxiv.org/abs/2309.06497>`_, 2023, taken before a switch.
    """
    if not any(isinstance(n, FACTORS) for n in _nodes(state, KINDS)):
        raise ValueError(
            "warm_up(state=...): there are no factors in it to measure; wanted the "
            "state of an optimizer with kronecker or eigenbasis in it, such as "
            "shampoo or soap. Others need no warm-up."
        )
    update = optax.with_extra_args_support(tx).update
    measure = jax.jit(lambda g, state, params: update(g, state, params)[1])
    after = state
    for gradient in gradients:
        after = measure(gradient, after, params)
    if after is state:
        raise ValueError(
            "warm_up(gradients=...): there was none; wanted at least one, for example "
            "(grad(loss)(params, batch) for batch in batches)."
        )
    return jax.jit(_measured)(state, after)


FACTORS = (KroneckerState, EigenbasisState)
KINDS = (*FACTORS, GraftState)


def _measured(old: Any, new: Any) -> Any:
    """The old state with the factors of the new one."""

    def of(old: Any, new: Any) -> Any:
        if isinstance(old, KroneckerState):
            return new
        if isinstance(old, EigenbasisState):
            nu = {
                key: _turned(moment, old.bases[key], new.bases[key])
                for key, moment in old.nu.items()
            }
            return new._replace(count=old.count, nu=nu)
        if isinstance(old, GraftState):
            parts = _measured(old[1:], new[1:])
            return GraftState(new.count, *parts)
        return old

    return jax.tree.map(of, old, new, is_leaf=lambda node: isinstance(node, KINDS))


def _turned(nu: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
    """A second moment in other bases, of entries without correlation."""
    shares = {}
    for dim, basis in new.items():
        turn = modes.mode_products(
            jnp.swapaxes(basis, -2, -1), {1: jnp.swapaxes(old[dim], -2, -1)}
        )
        shares[int(dim)] = turn * turn
    return modes.mode_products(nu, shares)


def _nodes(tree: Any, kinds: Any) -> Iterator[Any]:
    """Nodes of some types (or names of types), the outermost of each branch."""

    def is_one(node: Any) -> bool:
        if isinstance(kinds, dict):
            return type(node).__name__ in kinds
        return isinstance(node, kinds)

    return filter(is_one, jax.tree.leaves(tree, is_leaf=is_one))


def _by_name(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {_checks.name_of(path): leaf for path, leaf in leaves}


def _read(state: Any) -> _Source:
    """The moments in a state; raise unless there is one of each kind at most."""
    call = "from_adam(state=...)"
    found = list(_nodes(state, dict.fromkeys(SOURCES)))
    names = [type(node).__name__ for node in found]
    if not found:
        raise ValueError(
            f"{call}: there is no state in it that an optimizer could inherit. "
            f"{WANTED}, as training left it."
        )
    moments: dict[str, Arrays] = {}
    count = None
    for node in found:
        for field, moment in MOMENTS[type(node).__name__].items():
            if moment in moments:
                raise ValueError(
                    f"{call}: {WORDS[moment]} stands in it more than once "
                    f"({', '.join(names)}); wanted one. Pass the part of the state "
                    "that is to go on."
                )
            moments[moment] = _by_name(getattr(node, field))
        count = getattr(node, "count", count)
    if "trace" in moments and "nu" in moments and "mu" not in moments:
        del moments["trace"]  # RMSProp's holds steps that the rate has multiplied
    places = list(_nodes(state, dict.fromkeys(SCHEDULES)))
    return _Source(moments, count, places[0].count if places else count)


def _same_model(source: _Source, params: Any) -> None:
    shapes = {name: jnp.shape(leaf) for name, leaf in _by_name(params).items()}
    for moment, arrays in source.moments.items():
        for name, array in arrays.items():
            wanted = shapes.get(name)
            if wanted != jnp.shape(array):
                there = "is not there" if wanted is None else f"has shape {wanted}"
                raise ValueError(
                    f"from_adam(params=...): parameter '{name}' {there}, and "
                    f"{WORDS[moment]} of shape {jnp.shape(array)} in the state; wanted "
                    "the parameters that the state was trained with."
                )


class _Heir:
    """Puts what a source has into a fresh state, in the state's own dtypes."""

    def __init__(self, source: _Source, trees: Iterator[Tree]) -> None:
        """Keep the source, and the trees of the blockwise states to come."""
        self.source, self.trees = source, trees

    def of(self, fresh: Any) -> Any:
        """The state with everything inherited."""

        def known(node: Any) -> bool:
            name = type(node).__name__
            return name in MOMENTS or name in COUNTERS or name == "BlockwiseState"

        return jax.tree.map(
            lambda node: self._one(node) if known(node) else node, fresh, is_leaf=known
        )

    def _one(self, node: Any) -> Any:
        if isinstance(node, BlockwiseState):
            blocks = self._in_blocks(next(self.trees)).of(node.blocks)
            return BlockwiseState(blocks, self.of(node.rest))
        name, parts = type(node).__name__, node._asdict()
        fields = MOMENTS.get(name, {})
        for field, part in parts.items():
            if field in fields:
                parts[field] = self._moment(part, name, fields[field])
            elif field == COUNTERS.get(name):
                parts[field] = self._position(part, name)
            elif field == "count" and fields:
                count = self.source.count
                parts[field] = _own(UNSEEN if count is None else count, part)
            elif name != "EigenbasisState":  # its factors have seen nothing
                parts[field] = self.of(part)
        return type(node)(**parts)

    def _moment(self, like: Any, name: str, moment: str) -> Any:
        arrays = self.source.moments.get(moment)
        if arrays is None:
            has = " and ".join(WORDS[found] for found in self.source.moments)
            raise ValueError(
                f"from_adam(state=...): it holds {has}, and a {name} of tx goes on "
                f"with {WORDS[moment]}. {ADVICE[moment]}"
            )

        def inherited(path: Any, leaf: jax.Array) -> jax.Array:
            key = _checks.name_of(path)
            if key not in arrays:
                raise ValueError(
                    f"from_adam(state=...): {WORDS[moment]} of '{key}' is not in it, "
                    f"and a {name} of tx wants it; wanted the state of an optimizer "
                    "that trained every parameter of tx."
                )
            return _own(arrays[key], leaf)

        return jax.tree_util.tree_map_with_path(inherited, like)

    def _position(self, like: jax.Array, name: str) -> jax.Array:
        position = self.source.position
        if position is None:
            raise ValueError(
                f"from_adam(state=...): it does not count steps, and a {name} of tx "
                "goes on from a step; wanted a state of a chain with a schedule."
            )
        return _own(position, like)

    def _in_blocks(self, tree: Tree) -> _Heir:
        """The heir of what is kept in stacks."""
        blocked = {i: tree.names[i] for pool in tree.plan.pools for i in pool.leaves}
        given, like = {}, {}
        for moment, arrays in self.source.moments.items():
            if blocked and all(name in arrays for name in blocked.values()):
                leaves = dict(enumerate(map(jnp.zeros_like, tree.leaves)))
                leaves |= {i: arrays[name] for i, name in blocked.items()}
                whole = jax.tree.unflatten(tree.treedef, list(leaves.values()))
                own = Tree(whole, tree.layout, tree.specs)
                given[moment], dtypes = own.blocked(), own.stack_dtypes()
                like[moment] = {
                    key: jnp.zeros(shape, dtypes[key])
                    for key, shape in tree.plan.stacks.items()
                }

        def cut(given: dict[str, Any], like: Any) -> Any:
            stacks = {moment: split(x, tree.plan) for moment, x in given.items()}
            return next(iter(given.values())), stacks

        stacks = spread(cut, tree, given, like)[1] if given else {}
        return _Heir(self.source._replace(moments=stacks), iter(()))


ADVICE = {
    "mu": "Leave the average out of tx (b1=None), or start from Adam.",
    "nu": "Take grafting.sgd() for tx, or start from an optimizer that has one.",
    "trace": "Leave momentum out of tx: it would begin at nothing, and steps be short.",
}


def _own(value: Any, like: jax.Array) -> jax.Array:
    """A copy in the dtype of another array: a step may donate either state."""
    return jnp.array(value, jnp.result_type(like), copy=True)


def _blockwise(state: Any) -> list[Any]:
    return list(_nodes(state, BlockwiseState))
