"""Which parameters an optimizer takes, and what it says to those it does not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import shampoo_optax as so
from tests import helpers

OPTIMIZERS = {
    "shampoo": so.shampoo(1e-3),
    "vectors": so.scale_by_shampoo(layout=so.BlockLayout(precondition_vectors=True)),
}
LEAVES = {
    "int32": (jnp.ones((4, 4), jnp.int32), ["int32", "optax.masked"]),
    "uint8": (np.ones((4, 4), np.uint8), ["uint8", "optax.masked"]),
    "bool": (jnp.ones((4, 4), bool), ["bool", "optax.masked"]),
    "python_int": (3, ["int32", "floating"]),
    "string": ("relu", ["'relu'", "str", "floating"]),
    "object": (object(), ["object", "floating"]),
    "complex": (jnp.ones((4, 4), jnp.complex64), ["complex64", "split_real"]),
}


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("leaf", "words"), LEAVES.values(), ids=LEAVES)
def test_leaves_that_are_not_parameters(tx: Any, leaf: Any, words: list[str]) -> None:
    params = {"layers": [{"kernel": jnp.ones((4, 4)), "odd": leaf}]}
    with pytest.raises(TypeError) as caught:
        tx.init(params)
    for word in ["blockwise.init", "'layers/0/odd'", *words]:
        assert word in str(caught.value), str(caught.value)


BEFORE = {"a": jnp.ones((4, 3)), "b": jnp.ones(3), "c": jnp.ones((5, 2))}
CHANGED = {
    "shape": (BEFORE | {"a": jnp.ones((4, 5))}, ["'a'"]),
    "vector": (BEFORE | {"b": jnp.ones(7)}, ["b'"]),
    "transposed": (BEFORE | {"a": jnp.ones((3, 4))}, ["'a'"]),
    "rank": (BEFORE | {"a": jnp.ones((3, 2, 2))}, ["'a'"]),
    "to_vector": (BEFORE | {"a": jnp.ones(12)}, ["'a'"]),
    "one_more": (BEFORE | {"d": jnp.ones((2, 2))}, ["'d'"]),
    "one_more_vector": (BEFORE | {"d": jnp.ones(2)}, ["d'"]),
    "same_again": (BEFORE | {"d": jnp.ones((4, 3))}, ["'a'", "'d'"]),
    "one_less": ({"a": BEFORE["a"], "b": BEFORE["b"]}, ["5x2"]),
    "one_vector_less": ({"a": BEFORE["a"], "c": BEFORE["c"]}, ["b'"]),
    "broadcasting": (BEFORE | {"b": jnp.ones(1)}, ["b'"]),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(("now", "words"), CHANGED.values(), ids=CHANGED)
def test_parameters_that_changed_since_init(
    now: Any, words: list[str], jit: bool
) -> None:
    tx = so.shampoo(1e-3)
    state = tx.init(BEFORE)
    update = helpers.jit(tx.update) if jit else tx.update
    with pytest.raises(ValueError) as caught:
        update(now, state, now)
    for word in ["blockwise.update", "init", *words]:
        assert word in str(caught.value), str(caught.value)


def test_all_parameters_gone_or_another_layout() -> None:
    tx = so.shampoo(1e-3)
    with pytest.raises(ValueError, match=r"blockwise\.update.*'blocks/mu/4x3'.*init"):
        tx.update({}, tx.init(BEFORE), {})
    cut = so.shampoo(1e-3, layout=so.BlockLayout(2))
    with pytest.raises(ValueError, match=r"blockwise\.update.*'c' of shape.*layout"):
        cut.update(BEFORE, tx.init(BEFORE), BEFORE)
    bare = so.shampoo(1e-3)
    with pytest.raises(
        ValueError, match=r"blockwise\.update.*\(7,\).*init made \(3,\)"
    ):
        bare.update(jnp.ones(7), bare.init(jnp.ones(3)), jnp.ones(7))


adam = optax.scale_by_adam()
# Any transformation may be inside: (it, has it arrays like its parameters).
INSIDE: dict[str, tuple[Any, bool]] = {
    "stateless": (optax.scale(0.5), False),
    "counter": (optax.scale_by_schedule(lambda count: 0.5), False),
    "random": (optax.add_noise(0.1, 0.5, key=0), False),
    "adam": (adam, True),
    "chain": (optax.chain(optax.trace(0.9), optax.scale_by_rss()), True),
    # Some of its arrays have the shape (1,), whatever the parameter.
    "factored": (optax.scale_by_factored_rms(), True),
    "masked": (optax.masked(adam, lambda p: jax.tree.map(lambda x: True, p)), True),
    "injected": (optax.inject_hyperparams(optax.scale_by_rms)(decay=0.9), True),
    "several_steps": (optax.MultiSteps(adam, 2).gradient_transformation(), True),
}


@pytest.mark.parametrize(("inner", "knows"), INSIDE.values(), ids=INSIDE)
def test_any_transformation_inside(inner: Any, knows: bool) -> None:
    tx = so.blockwise(inner, rest=inner)
    state, update = tx.init(BEFORE), helpers.jit(tx.update)
    for _ in range(2):
        updates, state = update(BEFORE, state, BEFORE)
        assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, BEFORE)
    for name in ("shape", "vector", "one_vector_less"):
        now, words = CHANGED[name]
        if not knows:
            updates, _ = tx.update(now, state, now)
            assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, now)
            continue
        with pytest.raises(ValueError) as caught:
            tx.update(now, state, now)
        for word in ["blockwise.update", "init", *words]:
            assert word in str(caught.value), str(caught.value)


def test_boxes_of_flax() -> None:
    """NNX hands boxed leaves to init and bare ones to update."""
    trees = []

    def keep(tree: Any, *rest: Any) -> Any:
        trees.append(
            [jax.tree_util.keystr(p) for p, _ in jax.tree.leaves_with_path(tree)]
        )
        return (tree, *rest[:1]) if rest else optax.EmptyState()

    seen = optax.GradientTransformation(keep, keep)
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1))
    )
    tx = optax.chain(seen, so.shampoo(1e-3))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    for step in range(2):
        gradient = helpers.gradients(nnx.state(model, nnx.Param), step)
        optimizer.update(model, gradient)
    assert trees[0] != trees[1] and len(trees[0]) == len(trees[1]) == 4
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    for x, y in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.all(np.asarray(x) != np.asarray(y))


@pytest.mark.parametrize(
    ("params", "words"),
    [
        (BEFORE | {"a": jnp.ones((3, 4))}, ["'a'", "(4, 3)", "(3, 4)", "params"]),
        ({"a": BEFORE["a"], "b": BEFORE["b"]}, ["'c'", "params"]),
        (BEFORE | {"d": jnp.ones(2)}, ["'d'", "params"]),
    ],
)
def test_updates_and_parameters_of_two_models(params: Any, words: list[str]) -> None:
    tx = so.scale_by_shampoo()
    with pytest.raises(ValueError) as caught:
        tx.update(BEFORE, tx.init(BEFORE), params)
    for word in ["blockwise.update", *words]:
        assert word in str(caught.value), str(caught.value)


def test_raw_gradient_of_another_model() -> None:
    tx = so.blockwise(so.kronecker())
    with pytest.raises(ValueError, match=r"blockwise\.update.*raw_gradient"):
        tx.update(BEFORE, tx.init(BEFORE), raw_gradient={"a": BEFORE["a"]})


def test_kronecker_outside_blockwise() -> None:
    for params in (BEFORE, jnp.ones((3, 3))):
        with pytest.raises(TypeError, match=r"kronecker.*init.*blockwise\(kronecker"):
            so.kronecker().init(params)


@pytest.mark.parametrize("exponent", [0.3, 0.7])
def test_a_root_that_a_method_cannot_take(exponent: float) -> None:
    root = so.roots.CoupledNewton()
    tx = so.shampoo(1e-3, root=root, exponents={2: exponent})
    with pytest.raises(ValueError, match=r"roots\.CoupledNewton takes") as e:
        tx.init(BEFORE)
    assert f"{exponent:g}" in str(e.value) and "roots.Eigh" in str(e.value)


def test_weight_decay_without_parameters() -> None:
    tx = so.shampoo(1e-3, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(BEFORE, tx.init(BEFORE))


LEAVES_THAT_WORK = {
    "none": {"a": None, "w": jnp.ones((3, 2))},
    "masked": {"a": optax.MaskedNode(), "w": jnp.ones((3, 2))},
    "scalar": jnp.ones(()),
    "ones": {"a": jnp.ones((1,)), "b": jnp.ones((1, 1)), "c": jnp.ones((1, 5, 1))},
    "zero_size": {"a": jnp.ones((0,)), "b": jnp.ones((0, 4))},
    "nested_empty": {"a": {}, "b": [(), {}], "w": jnp.ones((3, 2))},
    "kernel_5d": jnp.ones((2, 1, 3, 2, 4)),
    "python_float": {"a": 1.0, "w": 2.0},
    "numpy": {"a": np.ones((3, 2), np.float32), "b": np.float32(2.0)},
    "dtypes": {
        "a": jnp.ones((3, 2), jnp.bfloat16),
        "b": jnp.ones((3, 2), jnp.float16),
        "c": jnp.ones((3, 2)),
        "d": jnp.ones(4, jnp.bfloat16),
    },
}
WORKS = {
    "together": LEAVES_THAT_WORK,
    "bare": jnp.ones((3, 2)),
    "bare_float": 1.0,
    "only_zero_size": {"b": jnp.ones((4, 0, 2))},
    "empty": {},
    "empty_list": [],
}


def _check_works(params: Any, tx: Any, *, jit: bool) -> None:
    init, update = (helpers.jit(tx.init), helpers.jit(tx.update)) if jit else tx
    state = init(params)
    for step in range(2):
        updates, state = update(helpers.gradients(params, step), state, params)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        for u, p in zip(jax.tree.leaves(updates), jax.tree.leaves(params), strict=True):
            assert jnp.shape(u) == jnp.shape(p)
            assert jnp.result_type(u) == jnp.result_type(p)
            assert np.all(np.isfinite(np.asarray(u, np.float64)))
            assert np.all(np.asarray(u, np.float64) != 0)


@pytest.mark.parametrize("tx", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("params", WORKS.values(), ids=WORKS)
def test_parameters_that_work(params: Any, tx: Any) -> None:
    _check_works(params, tx, jit=True)


def test_parameters_that_work_eagerly() -> None:
    # Outside jit leaves come as they are: no array, or not one of JAX.
    _check_works(LEAVES_THAT_WORK, OPTIMIZERS["vectors"], jit=False)


def test_double_precision_parameters() -> None:
    with jax.enable_x64(True):
        params = helpers.parameters(jnp.float64)
        (updates, *_), _ = helpers.run(so.shampoo(1e-3), params, 1)
        assert {u.dtype for u in updates.values()} == {jnp.dtype("float64")}
