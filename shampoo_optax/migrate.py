"""Start an optimizer from the state of another that has trained the model so far."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from shampoo_optax import _checks
from shampoo_optax.layout.block_layout import BlockLayout, variants
from shampoo_optax.layout.split import split
from shampoo_optax.linalg import modes
from shampoo_optax.shardings import state_shardings
from shampoo_optax.transforms._numbers import wide
from shampoo_optax.transforms._spread import spread
from shampoo_optax.transforms._tree import Tree
from shampoo_optax.transforms.blockwise import BlockwiseState
from shampoo_optax.transforms.eigenbasis import EigenbasisState
from shampoo_optax.transforms.graft import GraftState

Arrays = dict[str, jax.Array]  # by a parameter's name, or by a stack's

# By the names of types, since Optax exports not all of them.
SOURCES = ["ScaleByAdamState", "ScaleByRmsState", "ScaleByRmsWithCountState"]
SOURCES += ["ScaleByRssState", "TraceState"]
KEEPERS = [*SOURCES, "FilterState", "MagnitudeState", "EigenbasisState"]
FIELDS = {"mu": "mu", "nu": "nu", "sum_of_squares": "nu", "trace": "trace"}
FACTORS = ["KroneckerState", "EigenbasisState"]
SCHEDULES = ["ScaleByScheduleState", "WrappedScheduleState"]
WHOLE = ["AveragingState", "InjectStatefulHyperparamsState", "MultiStepsState"]
COUNTERS = dict.fromkeys(SCHEDULES + WHOLE, "count")
COUNTERS["MultiStepsState"] = "gradient_step"
WORDS = {
    "mu": "a moving average of the gradient",
    "nu": "a second moment",
    "trace": "a momentum of finished steps",
}
ADVICE = {
    "mu": "Leave the average out of tx (b1=None), or start from Adam.",
    "nu": "Take grafting.sgd() for tx, or start from an optimizer that has one.",
    "trace": "Leave momentum out of tx: it would begin at nothing, and steps be short.",
}
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
    with :func:`shampoo` steps are Adam's own before the ``refresh.start``-th, and then
    Shampoo's, every block as long as Adam would have made it; :func:`warm_up` leaves
    the first part out. With :func:`soap` (``b3=b1``) they are Adam's until a refresh.

    This holds where the numbers agree, which states do not tell: ``b1``, the
    magnitude's ``b2`` and ``eps`` (``grafting.adam(b2, eps)``), the schedule and the
    weight decay. With ``grafting=None`` Shampoo has a length of its own. What
    ``optax.MultiSteps`` has accumulated of an unfinished step is left out.

    Args:
      state: of ``optax.adam`` or ``adamw``, inside any chain or wrapper. From
        ``rmsprop`` and ``adagrad`` a magnitude rule of the same kind inherits
        (``shampoo(b1=None, grafting=grafting.rmsprop())``), from ``sgd(momentum=m)``
        the same momentum (``shampoo(b1=None, grafting=grafting.sgd(), momentum=m)``).
      tx: what goes on: an alias, or our parts in ``chain``, ``partition``, ``masked``,
        ``MultiSteps``, ``inject_hyperparams``. Its own hyperparameters hold.
      params: as trained so far.
      layout: that of ``tx``. With ``block_axes`` the moments go to the devices that
        own the blocks, as gradients do.

    Returns:
      The state, in arrays of its own: ``state`` can still be used and donated.

    Raises:
      ValueError: ``state`` lacks what ``tx`` needs, has it twice, or is of other
        parameters; or the layout is not that of ``tx``.

    Example:
      >>> params, gradient = {"kernel": jnp.eye(3)}, {"kernel": jnp.ones((3, 3))}
      >>> adam, tx = optax.adamw(1e-3), shampoo(1e-3)
      >>> updates, state = adam.update(gradient, adam.init(params), params)
      >>> new = from_adam(state, tx, params)
      >>> ours, _ = tx.update(gradient, new, params)
      >>> updates, _ = adam.update(gradient, state, params)
      >>> assert jnp.allclose(ours["kernel"], updates["kernel"], rtol=1e-6)

    Source: Agarwal et al., `Disentangling Adaptive Gradient Methods from Learning
    Rates <https://arxiv.org/abs/2002.11803>`_, 2020.
    """

    def build(params: optax.Params, source: _Source) -> Any:
        return _Heir(source, params, layout).of(tx.init(params))

    if not layout.block_axes:
        return build(params, _read(state))
    where = state_shardings(tx, params, layout)
    return jax.jit(build, out_shardings=where)(params, _read(state))


def warm_up(
    tx: optax.GradientTransformation,
    state: Any,
    params: optax.Params,
    gradients: Iterable[optax.Updates],
) -> Any:
    """Measure factors before the first step: no parameter and no moment moves.

    Equals ``tx.update`` on every gradient, of which factors, roots, bases and the count
    that begins grafting are kept. With ``refresh.start - 1`` gradients or more (times
    the steps of ``optax.MultiSteps``) the next step is Shampoo's already. Bases of
    :func:`eigenbasis` need as many as its frequency; its second moment is turned with
    them, as though entries were uncorrelated.

    Args:
      tx: the optimizer.
      state: its state, for example of :func:`from_adam`; it is not consumed.
      params: where the gradients were taken.
      gradients: of different batches; a generator computes one at a time.

    Returns:
      The state with the factors.

    Raises:
      ValueError: there are no factors in the state, or no gradients.

    Example:
      >>> params, tx = {"kernel": jnp.eye(3)}, shampoo(1e-3, refresh=Refresh(2))
      >>> state = warm_up(tx, tx.init(params), params, [params])
      >>> updates, _ = tx.update(params, state, params)  # grafted, at step 2 of 2
    """
    if not _nodes(state, FACTORS):
        raise ValueError(
            "warm_up(state=...): there are no factors in it to measure; wanted the "
            "state of shampoo, soap or others with factors. The rest need no warm-up."
        )
    update = optax.with_extra_args_support(tx).update
    measure = jax.jit(lambda g, state, params: update(g, state, params)[1])
    after = state
    for gradient in gradients:
        after = measure(gradient, after, params)
    if after is state:
        raise ValueError("warm_up(gradients=...): there was none; wanted at least one.")
    return jax.jit(_measured)(state, after)


def _measured(old: Any, new: Any) -> Any:
    """The old state with the factors of the new one."""

    def of(old: Any, new: Any) -> Any:
        if isinstance(old, GraftState):
            return GraftState(new.count, *_measured(old[1:], new[1:]))
        if not isinstance(old, EigenbasisState):
            return new if _is(FACTORS)(old) else old
        bases = {key: (old.bases[key], new.bases[key]) for key in old.nu}
        nu = {key: _turned(moment, *bases[key]) for key, moment in old.nu.items()}
        return new._replace(count=old.count, nu=nu)

    return jax.tree.map(of, old, new, is_leaf=_is([*FACTORS, "GraftState"]))


def _turned(nu: jax.Array, old: Arrays, new: Arrays) -> jax.Array:
    """A second moment in other bases, of entries without correlation."""
    shares, dtype = {}, wide(nu.dtype)
    for dim, basis in new.items():
        back, before = (x.astype(dtype).mT for x in (basis, old[dim]))
        turn = modes.mode_products(back, {1: before})
        shares[int(dim)] = turn * turn
    return modes.mode_products(nu.astype(dtype), shares).astype(nu.dtype)


def _is(kinds: Collection[str]) -> Callable[[Any], bool]:
    return lambda node: type(node).__name__ in kinds


def _nodes(tree: Any, kinds: Collection[str]) -> list[Any]:
    """Nodes whose types have one of these names, the outermost of each branch."""
    is_one = _is(kinds)
    return list(filter(is_one, jax.tree.leaves(tree, is_leaf=is_one)))


def _by_name(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf)
    return {_checks.name_of(path): leaf for path, leaf in leaves}


def _read(state: Any) -> _Source:
    """The moments in a state; raise unless there is one of each kind at most."""
    call = "from_adam(state=...)"
    if not (found := _nodes(state, SOURCES)):
        raise ValueError(
            f"{call}: there is nothing in it that an optimizer could inherit; wanted "
            "that of optax.adam, adamw, rmsprop, adagrad or sgd(momentum=...)."
        )
    moments, count = dict[str, Arrays](), None
    for node in found:
        for field in FIELDS.keys() & {*node._fields}:
            if (moment := FIELDS[field]) in moments:
                names = ", ".join(type(node).__name__ for node in found)
                raise ValueError(
                    f"{call}: {WORDS[moment]} stands in it more than once ({names}); "
                    "wanted one. Pass the part of the state that is to go on."
                )
            moments[moment] = _by_name(getattr(node, field))
        if "count" in node._fields:  # a tuple has a method of this name
            count = node.count
    if "trace" in moments and "nu" in moments and "mu" not in moments:
        del moments["trace"]  # RMSProp's holds steps that the rate has multiplied
    places = _nodes(state, SCHEDULES)
    return _Source(moments, count, places[0].count if places else count)


def _asked(tree: Any) -> dict[str, Arrays]:
    """The moments that a state keeps, at any depth."""
    found: dict[str, Arrays] = {}
    for node in _nodes(tree, KEEPERS):
        for field, part in node._asdict().items():
            moment = FIELDS.get(field)
            found |= {moment: _by_name(part)} if moment else _asked(part)
    return found


def _tree_of(node: BlockwiseState, params: Any, layout: BlockLayout) -> Tree:
    """The parameters that a state in blocks was made for, without the others."""
    names, mask = _by_name(node.blocked, _is(["EmptyState"])), optax.MaskedNode()
    blocked = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if _checks.name_of(path) in names else mask, params
    )
    stacks = next(iter(_asked(node.blocks).values()))
    wanted = {key: jnp.shape(stack) for key, stack in stacks.items()}
    for tree in (Tree(blocked, one) for one in variants(layout)):
        if tree.plan.stacks == wanted:
            return tree
    raise ValueError(
        f"from_adam(layout={layout!r}): it cuts other blocks than tx, whose stacks are "
        f"{sorted(wanted)}; wanted the layout that tx was made with."
    )


class _Heir:
    """Puts what a source has into a fresh state, in the state's own dtypes."""

    def __init__(self, source: _Source, params: Any, layout: BlockLayout) -> None:
        """Keep the source, and what tells how it is cut."""
        self.source, self.params, self.layout = source, params, layout

    def of(self, fresh: Any) -> Any:
        """The state with everything inherited."""
        known = _is([*KEEPERS, *COUNTERS, "BlockwiseState"])
        return jax.tree.map(
            lambda node: self._one(node) if known(node) else node, fresh, is_leaf=known
        )

    def _one(self, node: Any) -> Any:
        if isinstance(node, BlockwiseState):
            blocks = self._in_blocks(node).of(node.blocks)
            return node._replace(blocks=blocks, rest=self.of(node.rest))
        name, parts = type(node).__name__, node._asdict()
        for field, part in parts.items():
            if name in KEEPERS and field in FIELDS:
                parts[field] = self._moment(part, FIELDS[field])
            elif name in KEEPERS and field == "count":
                parts[field] = self._count(part, self.source.count, name)
            elif field == COUNTERS.get(name):
                parts[field] = self._count(part, self.source.position, name)
            else:
                parts[field] = self.of(part)
        return type(node)(**parts)

    def _moment(self, like: Any, moment: str) -> Any:
        """Arrays of a moment in place of others, each in the other's dtype."""
        arrays, what = self.source.moments.get(moment), WORDS[moment]
        if arrays is None:
            has = " and ".join(WORDS[found] for found in self.source.moments)
            raise ValueError(
                f"from_adam(state=...): it holds {has}, and tx goes on with {what}. "
                f"{ADVICE[moment]}"
            )

        def inherited(path: Any, leaf: Any) -> jax.Array:
            name, shape = _checks.name_of(path), jnp.shape(leaf)
            came = jnp.shape(arrays[name]) if name in arrays else None
            if came == shape:
                return _own(arrays[name], leaf)
            there = "is not in it" if came is None else f"has shape {came} in it"
            raise ValueError(
                f"from_adam(state=...): {what} of '{name}' {there}, and the parameter "
                f"has {shape}; wanted the state that trained these parameters."
            )

        return jax.tree_util.tree_map_with_path(inherited, like)

    def _count(self, like: jax.Array, count: Any, name: str) -> jax.Array:
        if count is not None or name in WHOLE:
            return _own(like if count is None else count, like)
        if name in (*SCHEDULES, "EigenbasisState"):
            raise ValueError(
                f"from_adam(state=...): it does not count steps, and a {name} of tx "
                "goes on from one; wanted a state with a count or a schedule in it."
            )
        return _own(UNSEEN, like)

    def _in_blocks(self, node: BlockwiseState) -> _Heir:
        """The heir of what is kept in stacks; they are cut where gradients are."""
        asked = {moment: like for moment, like in _asked(node.blocks).items() if like}
        if not asked:
            return self
        tree = _tree_of(node, self.params, self.layout)
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, wide(x.dtype)), tree.abstract()
        )
        given = {
            moment: Tree(self._moment(like, moment), tree.layout, tree.specs).blocked()
            for moment in asked
        }

        def cut(given: dict[str, Any], _: Any) -> Any:
            stacks = {moment: split(x, tree.plan) for moment, x in given.items()}
            return next(iter(given.values())), stacks

        _, stacks = spread(cut, tree, given, asked)
        source = self.source._replace(moments=stacks)
        return _Heir(source, self.params, self.layout)


def _own(value: Any, like: jax.Array) -> jax.Array:
    # A copy: a step may donate either state.
    return jnp.array(value, jnp.result_type(like), copy=True)
