"""What goes on from Adam's state: steps of Adam's length, at Adam's place."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import shampoo_optax as so
from shampoo_optax.layout.split import split
from shampoo_optax.migrate import from_adam, warm_up
from shampoo_optax.transforms._tree import Tree
from tests import helpers

K, STEPS, START = 7, 15, 3  # steps of Adam, steps after, where Shampoo begins
SHAPES = {"tall": (12, 6), "small": (4, 3), "bias": (5,), "layers": (3, 10, 6)}


def batch_axes(path: str, shape: tuple[int, ...]) -> int:
    return int(path.endswith("layers"))


LAYOUT = so.BlockLayout(4, batch_axes=batch_axes)
REFRESH = so.Refresh(START)
NUMBERS = {"b1": 0.9, "weight_decay": 0.01}
SHAMPOO = NUMBERS | {
    "layout": LAYOUT,
    "refresh": REFRESH,
    "grafting": so.grafting.adam(0.99, 1e-8),
}
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.1, 4, 2 * K + STEPS)


def params() -> dict[str, jax.Array]:
    like = {name: jnp.zeros(shape) for name, shape in SHAPES.items()}
    return helpers.gradients(like, 99)


def adamw(rate: Any = SCHEDULE) -> optax.GradientTransformation:
    return optax.adamw(rate, b2=0.99, **NUMBERS)


def shampoo(rate: Any = SCHEDULE, **options: Any) -> optax.GradientTransformation:
    return so.shampoo(rate, **(SHAMPOO | options))


def trained(tx: optax.GradientTransformation, steps: int = K) -> Any:
    return helpers.run(tx, params(), steps)[1]


def follow(
    tx: optax.GradientTransformation, state: Any, steps: int = STEPS, **options: Any
) -> list[Any]:
    """The updates of later gradients; the parameters stand still, or decay differs."""
    update, like, history = helpers.jit(tx.update), params(), []
    for step in range(steps):
        gradient = helpers.gradients(like, 1000 + step, **options)
        updates, state = update(gradient, state, like)
        history.append(updates)
    return history


def norms(updates: Any) -> list[np.ndarray]:
    """By block, and by array of what is not blocked."""
    tree = Tree(updates, LAYOUT)
    stacks = split(tree.blocked(), tree.plan)
    rest = [tree.leaves[i][None] for i in tree.plan.rest]
    flat = [np.asarray(x, np.float64).reshape(len(x), -1) for x in stacks.values()]
    flat += [np.asarray(x, np.float64).reshape(1, -1) for x in rest]
    return [np.linalg.norm(x, axis=1) for x in flat]


def same(found: list[Any], wanted: list[Any], rtol: float = 1e-6) -> None:
    """To a relative error of each array's largest entry."""
    for step, (ours, its) in enumerate(zip(found, wanted, strict=True)):
        for name in its:
            x, y = np.asarray(ours[name]), np.asarray(its[name])
            assert np.abs(x - y).max() <= rtol * np.abs(y).max(), (step, name)


def same_norms(found: list[Any], wanted: list[Any]) -> None:
    for ours, its in zip(found, wanted, strict=True):
        for x, y in zip(norms(ours), norms(its), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-6)


@pytest.mark.parametrize("scope", so.transforms.graft.SCOPES)
def test_steps_are_as_long_as_adams(scope: Any) -> None:
    """Without weight decay, which is not grafted, over the start of Shampoo."""
    plain: dict[str, Any] = {"weight_decay": None}
    adam = optax.adam(SCHEDULE, b2=0.99)
    state = trained(adam)
    tx = shampoo(**plain, graft_scope=scope)
    ours, its = follow(tx, from_adam(state, tx, params(), LAYOUT)), follow(adam, state)
    same(ours[: START - 1], its[: START - 1])
    parted = [
        np.abs(x["tall"] - y["tall"]).max() for x, y in zip(ours, its, strict=True)
    ]
    assert min(parted[START - 1 :]) > 1e-3 * np.abs(its[-1]["tall"]).max()
    if scope == "block":
        return same_norms(ours, its)
    for x, y in zip(ours, its, strict=True):
        for name in x:
            lengths = [np.linalg.norm(np.asarray(v[name], np.float64)) for v in (x, y)]
            np.testing.assert_allclose(*lengths, rtol=1e-6)


def test_without_the_state_they_are_not() -> None:
    adam = optax.adam(SCHEDULE, b2=0.99)
    state, tx = trained(adam), shampoo(weight_decay=None)
    with pytest.raises(AssertionError):
        same_norms(follow(tx, tx.init(params())), follow(adam, state))


WRAPPED = {
    "plain": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
    "steps": lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": adamw(0.01)},
        {name: "b" if name in ("small", "bias") else "a" for name in SHAPES},
    ),
    "finite": lambda tx: optax.apply_if_finite(tx, 3),
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_wrappers(wrap: Any) -> None:
    """Adam's own updates while Shampoo has not begun, weight decay and all."""
    late = wrap(shampoo(refresh=so.Refresh(100)))
    adam = wrap(adamw())
    old = adamw() if wrap is WRAPPED["partition"] else adam
    state = trained(old, 2 * K)
    new = from_adam(state, late, params(), LAYOUT)
    if wrap is WRAPPED["partition"]:
        adam_state = from_adam(state, adam, params(), LAYOUT)
    else:
        adam_state = state
    same(follow(late, new), follow(adam, adam_state))
    assert not helpers.type_changes(late.init(params()), new)


def test_injected_hyperparameters_and_their_schedule() -> None:
    adam = optax.inject_hyperparams(optax.adam)(SCHEDULE, b2=0.99)
    make = optax.inject_hyperparams(so.shampoo)
    tx = make(SCHEDULE, **(SHAMPOO | {"weight_decay": None}))
    state = trained(adam)
    for source, its in ((state, adam), (trained(optax.adam(SCHEDULE, b2=0.99)), adam)):
        new = from_adam(source, tx, params(), LAYOUT)
        ours, wanted = follow(tx, new), follow(its, state)
        same(ours[: START - 1], wanted[: START - 1], rtol=2e-6)  # b1 is traced
        for x, y in zip(ours, wanted, strict=True):
            for a, b in zip(norms(x), norms(y), strict=True):
                np.testing.assert_allclose(a, b, rtol=2e-6)


def test_masked_parameters_are_found() -> None:
    """By number of dimensions, as people mask; what is blocked shows in no leaf."""

    def matrices(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)

    def others(tree: Any) -> Any:
        return jax.tree.map(lambda x: jnp.ndim(x) != 2, tree)

    late = shampoo(refresh=so.Refresh(100))
    tx = optax.chain(optax.masked(late, matrices), optax.masked(adamw(), others))
    state = trained(adamw())
    same(follow(tx, from_adam(state, tx, params(), LAYOUT)), follow(adamw(), state))


def test_soap_is_adam_until_its_first_refresh() -> None:
    adam = optax.adamw(SCHEDULE, b1=0.9, b2=0.99, weight_decay=0.01)
    tx = so.soap(
        SCHEDULE, 0.9, 0.99, b3=0.9, weight_decay=0.01, layout=LAYOUT,
        refresh=so.Refresh(6, start_preconditioning_step=K + 6),
    )  # fmt: skip
    state = trained(adam)
    ours, its = follow(tx, from_adam(state, tx, params(), LAYOUT)), follow(adam, state)
    same(ours[:5], its[:5])
    assert np.abs(ours[5]["tall"] - its[5]["tall"]).max() > 1e-3


def test_spectral_descent_inherits_the_average() -> None:
    tx = so.spectral_descent(SCHEDULE, 0.9)
    state = trained(adamw())
    new = from_adam(state, tx, params())
    found = new[0].blocks.mu["12x6"][0]
    np.testing.assert_array_equal(found, state[0].mu["tall"])
    np.testing.assert_array_equal(new[0].rest.inner.nu["bias"], state[0].nu["bias"])


def test_momentum_of_sgd_goes_on() -> None:
    sgd = optax.sgd(SCHEDULE, momentum=0.9)
    plain = optax.sgd(0.1, momentum=0.9)
    for old, rate in ((sgd, SCHEDULE), (plain, 0.1)):
        tx = so.shampoo(
            rate, None, weight_decay=None, layout=LAYOUT, refresh=so.Refresh(100),
            grafting=so.grafting.sgd(), momentum=0.9,
        )  # fmt: skip
        state = trained(old)
        same(follow(tx, from_adam(state, tx, params(), LAYOUT)), follow(old, state))


@pytest.mark.parametrize(
    ("old", "rule"),
    [
        (optax.rmsprop(0.1, 0.9, 1e-8, eps_in_sqrt=False), so.grafting.rmsprop(0.9)),
        (optax.rmsprop(0.1, 0.9, 1e-8, eps_in_sqrt=False), so.grafting.adam(0.9)),
        (
            optax.rmsprop(0.1, 0.9, 1e-8, eps_in_sqrt=False, bias_correction=True),
            so.grafting.adam(0.9),
        ),
        (optax.adagrad(0.1, 0.0, eps=1e-30), so.grafting.adagrad(1e-15)),
    ],
    ids=["rmsprop", "rmsprop to adam", "rmsprop with count", "adagrad"],
)
def test_second_moments_alone(old: Any, rule: Any) -> None:
    tx = shampoo(0.1, b1=None, weight_decay=None, grafting=rule)
    state = trained(old)
    same_norms(follow(tx, from_adam(state, tx, params(), LAYOUT)), follow(old, state))


def test_dtypes_are_those_of_the_new_state() -> None:
    tx = shampoo(mu_dtype=jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        like = jax.tree.map(lambda x, d=dtype: x.astype(d), params())
        state = from_adam(adamw().init(like), tx, like, LAYOUT)
        assert not helpers.type_changes(tx.init(like), state)
        assert state[0].blocks.mu["4x4"].dtype == jnp.bfloat16
        assert state[0].blocks.inner.magnitude.nu["4x4"].dtype == jnp.float32


def test_both_states_can_be_donated() -> None:
    state, like = trained(adamw()), params()
    tx = shampoo(graft_scope="array")
    new = from_adam(state, tx, like, LAYOUT)
    kept = jax.tree.map(np.asarray, state)
    helpers.jit(tx.update, donate_argnums=1)(like, new, like)
    helpers.assert_equal(jax.tree.map(np.asarray, state), kept)


def moments(state: Any) -> Any:
    blocks, rest = state[0].blocks, state[0].rest
    kept = blocks._replace(inner=None), blocks.inner.magnitude, rest, state[1:]
    return jax.tree.map(np.asarray, kept)


@pytest.mark.parametrize("number", [START - 1, START + 4])
def test_warm_up_measures_and_moves_nothing_else(number: int) -> None:
    adam, tx = optax.adam(SCHEDULE, b2=0.99), shampoo(weight_decay=None)
    state, like = trained(adam), params()
    cold = from_adam(state, tx, like, LAYOUT)
    drawn = (helpers.gradients(like, 500 + i) for i in range(number))
    warm = warm_up(tx, cold, like, drawn)
    helpers.assert_equal(moments(warm), moments(cold))
    assert not helpers.type_changes(cold, warm)
    graft = warm[0].blocks.inner
    assert graft.count == graft.direction.count == number
    for factor in jax.tree.leaves(graft.direction.factors):
        assert (jnp.abs(factor).max(axis=(1, 2)) > 0).all()
    ours, its = follow(tx, warm), follow(adam, state)
    same_norms(ours, its)  # and Shampoo's from the first on
    assert np.abs(ours[0]["tall"] - its[0]["tall"]).max() > 1e-3


def test_warm_up_turns_the_second_moment_of_soap() -> None:
    tx = so.soap(0.1, 0.9, 0.99, layout=LAYOUT, refresh=so.Refresh(4))
    like = params()
    cold = from_adam(trained(adamw()), tx, like, LAYOUT)
    drawn = [helpers.gradients(like, 500 + i) for i in range(4)]
    old, new = (s[0].blocks for s in (cold, warm_up(tx, cold, like, drawn)))
    assert new.inner.count == old.inner.count == K
    helpers.assert_equal(new.mu, old.mu)
    for key, nu in old.inner.nu.items():
        turns = [np.asarray(new.inner.bases[key][d], np.float64) ** 2 for d in "01"]
        wanted = np.einsum("nab,nac,ncd->nbd", turns[0], np.asarray(nu), turns[1])
        np.testing.assert_allclose(new.inner.nu[key], wanted, rtol=1e-5)
        assert np.abs(turns[0] - np.eye(len(turns[0][0]))).max() > 0.1


def test_warm_up_under_multi_steps() -> None:
    tx = optax.MultiSteps(shampoo(), 2).gradient_transformation()
    like = params()
    cold = tx.init(like)
    drawn = [helpers.gradients(like, 500 + i) for i in range(2 * START)]
    warm = warm_up(tx, cold, like, drawn)
    helpers.assert_equal(warm.acc_grads, cold.acc_grads)
    assert warm.mini_step == warm.gradient_step == 0
    assert warm.inner_opt_state[0].blocks.inner.count == START


@pytest.mark.parametrize("spec", [P("a"), P()], ids=["fsdp", "zero1"])
@pytest.mark.parametrize("alias", [so.shampoo, so.soap, so.spectral_descent])
def test_sharded_is_unsharded(alias: Any, spec: P) -> None:
    mesh = jax.make_mesh((4,), ("a",), devices=jax.devices()[:4])
    like = helpers.gradients({"tall": jnp.zeros((16, 12)), "wide": jnp.zeros((8, 20))})
    where = {"tall": spec, "wide": P(None, *spec)}
    sharded = so.BlockLayout(8, mesh=mesh, block_axes=("a",), param_specs=where)
    placed = {
        name: jax.device_put(x, NamedSharding(mesh, where[name]))
        for name, x in like.items()
    }
    options = {} if alias is so.spectral_descent else {"refresh": so.Refresh(20)}
    results = []
    for params, layout in ((like, so.BlockLayout(8)), (placed, sharded)):
        state = adamw().init(params)
        for step in range(K):
            gradient = jax.device_put(
                helpers.gradients(like, step),
                jax.tree.map(lambda x: x.sharding, params),
            )
            _, state = helpers.jit(adamw().update)(gradient, state, params)
        tx = alias(0.1, layout=layout, **options)
        new = from_adam(state, tx, params, layout)
        updates, after = helpers.jit(tx.update)(gradient, new, params)
        assert helpers.jit(tx.update)(gradient, after, params)
        results.append(jax.tree.map(np.asarray, updates))
        if layout.mesh is not None:
            its = so.state_shardings(tx, params, layout)
            for leaf, sharding in zip(
                jax.tree.leaves(new), jax.tree.leaves(its), strict=True
            ):
                assert leaf.sharding == sharding
            for stack in jax.tree.leaves(new[0].blocks.mu):
                assert stack.sharding.spec[0] == "a"
            if alias is so.shampoo:
                warm = warm_up(tx, new, params, [gradient] * 3)
                assert not helpers.type_changes(new, warm)
    same(results[1:], results[:1], rtol=5e-6)


REFUSED = {
    "nothing": (optax.sgd(0.1), {}, "nothing in it that an optimizer could inherit"),
    "two": (optax.chain(adamw(), adamw()), {}, "more than once .*Pass the part"),
    "no average": (optax.rmsprop(0.1), {}, "holds a second moment, and .*b1=None"),
    "no second moment": (
        optax.sgd(0.1, momentum=0.9),
        {"b1": None},
        "holds a momentum of finished steps, and .*grafting.sgd",
    ),
    "no decay": (
        optax.sgd(0.1, momentum=0.9),
        {"grafting": so.grafting.sgd()},
        "holds a momentum .* goes on with a moving average .*b1=None",
    ),
    "no momentum": (adamw(), {"momentum": 0.9}, "Leave momentum out of tx"),
    "scaled momentum": (
        optax.rmsprop(0.1, momentum=0.9),
        {"b1": None, "momentum": 0.9},
        "Leave momentum out of tx",
    ),
    "no steps": (optax.rmsprop(0.1), {"b1": None}, "ScaleByScheduleState .*count"),
    "layout": (adamw(), {"layout": so.BlockLayout(5)}, "cuts other blocks than tx"),
}


@pytest.mark.parametrize(("old", "options", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_a_sentence(old: Any, options: Any, words: str) -> None:
    tx = shampoo(**options)
    with pytest.raises(ValueError, match=rf"(?s)from_adam\(.*{words}"):
        from_adam(old.init(params()), tx, params(), LAYOUT)


def test_other_parameters_are_refused() -> None:
    state, tx = adamw().init(params()), shampoo()
    other = params() | {"bias": jnp.zeros(6)}
    with pytest.raises(ValueError, match=r"'bias' has shape \(5,\) .* has \(6,\)"):
        from_adam(state, tx, other, LAYOUT)
    other = params() | {"small": jnp.zeros((3, 4))}
    with pytest.raises(ValueError, match=r"'small' has shape \(4, 3\) "):
        from_adam(state, tx, other, LAYOUT)
    more = params() | {"new": jnp.zeros((4, 4))}
    with pytest.raises(ValueError, match="of 'new' is not in it"):
        from_adam(state, tx, more, LAYOUT)


def test_a_warm_up_of_nothing_is_refused() -> None:
    like = params()
    with pytest.raises(ValueError, match="no factors"):
        warm_up(adamw(), adamw().init(like), like, [like])
    with pytest.raises(ValueError, match="there was none"):
        warm_up(shampoo(), shampoo().init(like), like, [])
