"""Bad input is a sentence: which call, which parameter, what came, what to do."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so

NAN = math.nan
g = so.grafting

# (call, argument, what came, exception, what is wanted): all refused at construction.
NUMBERS: list[tuple[str, Callable, str, list[Any], str]] = [
    (
        "shampoo",
        so.shampoo,
        "learning_rate",
        [-1e-3, NAN, math.inf, -math.inf],
        "[0, inf)",
    ),
    ("shampoo", so.shampoo, "b1", [-0.1, 1.0, 1.5, NAN], "[0, 1)"),
    ("shampoo", so.shampoo, "b2", [-0.1, 1.5, NAN], "[0, 1]"),
    ("shampoo", so.shampoo, "b3", [-0.1, 1.0, NAN], "[0, 1)"),
    ("shampoo", so.shampoo, "eps", [0.0, -1e-8, NAN, math.inf], "(0, inf)"),
    ("shampoo", so.shampoo, "eps_rel", [-1e-6, 1.0, NAN], "[0, 1)"),
    ("shampoo", so.shampoo, "weight_decay", [-0.1, NAN, math.inf], "[0, inf)"),
    ("shampoo", so.shampoo, "momentum", [-0.1, 1.0, NAN], "[0, 1)"),
    ("shampoo", so.shampoo, "dampening", [-0.1, 1.0, NAN], "[0, 1)"),
    ("kronecker", so.kronecker, "b2", [-0.1, 1.5, NAN], "[0, 1]"),
    ("kronecker", so.kronecker, "eps", [0.0, -1.0, NAN], "(0, inf)"),
    ("kronecker", so.kronecker, "eps_rel", [-1.0, 1.0, NAN], "[0, 1)"),
    ("grafting.adagrad", g.adagrad, "eps", [0.0, -1.0, NAN], "(0, inf)"),
    (
        "grafting.adagrad",
        g.adagrad,
        "initial_accumulator_value",
        [-1.0, NAN],
        "[0, inf)",
    ),
    ("grafting.rmsprop", g.rmsprop, "b2", [-0.1, 1.5, NAN], "[0, 1]"),
    ("grafting.rmsprop", g.rmsprop, "eps", [0.0, -1.0, NAN], "(0, inf)"),
    ("grafting.adam", g.adam, "b2", [-0.1, 1.5, NAN], "[0, 1]"),
    ("grafting.adam", g.adam, "eps", [0.0, -1.0, NAN], "(0, inf)"),
]
SHAMPOO_NUMBERS = [name for call, _, name, _, _ in NUMBERS if call == "shampoo"]


def _construct(factory: Callable, name: str, value: Any) -> Any:
    arguments = {name: value}
    if factory in (so.shampoo, so.add_weight_decay):
        arguments = {"learning_rate": 1e-3} | arguments
    if factory is so.add_weight_decay:
        arguments = {"weight_decay": 0.1} | arguments
    return factory(**arguments)


@pytest.mark.parametrize(
    ("call", "factory", "name", "value", "wanted"),
    [(c, f, n, v, w) for c, f, n, values, w in NUMBERS for v in values],
)
def test_numbers_out_of_range(
    call: str, factory: Callable, name: str, value: float, wanted: str
) -> None:
    with pytest.raises(ValueError) as caught:
        _construct(factory, name, value)
    message = str(caught.value)
    assert message.startswith(f"{call}({name}={value!r}): {name} must be"), message
    assert wanted in message, message


@pytest.mark.parametrize("value", ["0.9", True, 1j, [0.9]], ids=repr)
@pytest.mark.parametrize(
    ("call", "factory", "name"), [(c, f, n) for c, f, n, _, _ in NUMBERS]
)
def test_numbers_that_are_none(
    call: str, factory: Callable, name: str, value: Any
) -> None:
    with pytest.raises(TypeError) as caught:
        _construct(factory, name, value)
    assert str(caught.value).startswith(f"{call}({name}={value!r}): {name} must be")


@pytest.mark.parametrize("value", [-1.0, NAN, "1e-3"], ids=repr)
@pytest.mark.parametrize(
    ("factory", "name"),
    [
        (so.add_weight_decay, "weight_decay"),
        (so.add_weight_decay, "learning_rate"),
        (so.add_weight_decay, "peak_learning_rate"),
        (so.filter_gradient, "b1"),
        (so.filter_gradient, "b3"),
    ],
)
def test_numbers_of_the_parts(factory: Callable, name: str, value: Any) -> None:
    call = factory.__name__
    error = TypeError if isinstance(value, str) else ValueError
    with pytest.raises(error) as caught:
        if factory is so.filter_gradient:
            factory(g.adam(), **{name: value})
        else:
            _construct(factory, name, value)
    assert str(caught.value).startswith(f"{call}({name}={value!r}): {name} must be")


WHOLE = [
    ("Refresh", so.Refresh, "precondition_frequency", False),
    ("Refresh", so.Refresh, "start_preconditioning_step", True),
    ("BlockLayout", so.BlockLayout, "max_preconditioner_dim", True),
    ("BlockLayout", so.BlockLayout, "target_parameter_dimensionality", True),
    ("graft", lambda start: so.graft(g.sgd(), g.sgd(), start=start), "start", True),
]


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (0, ValueError),
        (-1, ValueError),
        (-math.inf, TypeError),
        (NAN, TypeError),
        (2.5, TypeError),
        (8.0, TypeError),
        (True, TypeError),
        (False, TypeError),
        ("8", TypeError),
        ([8], TypeError),
    ],
    ids=repr,
)
@pytest.mark.parametrize(("call", "factory", "name", "infinite"), WHOLE)
def test_whole_numbers(
    call: str,
    factory: Callable,
    name: str,
    infinite: bool,
    value: Any,
    error: type[Exception],
) -> None:
    with pytest.raises(error) as caught:
        factory(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{call}({name}={value!r}): {name} must be"), message
    assert "whole number of at least 1" in message
    assert ("math.inf" in message) == infinite


@pytest.mark.parametrize(("call", "factory", "name", "infinite"), WHOLE)
def test_infinity_and_numpy_integers(
    call: str, factory: Callable, name: str, infinite: bool
) -> None:
    factory(**{name: np.int64(3)})
    if infinite:
        factory(**{name: math.inf})
        return
    with pytest.raises(TypeError, match=name):
        factory(**{name: math.inf})


def test_a_traced_whole_number_says_where_to_leave_it() -> None:
    with pytest.raises(TypeError, match="cannot be traced") as caught:
        so.Refresh(jnp.asarray(3))
    assert "Refresh(precondition_frequency" in str(caught.value)
    assert "frozen object" in str(caught.value)


@pytest.mark.parametrize(
    ("construct", "words"),
    [
        (
            lambda: so.shampoo(1e-3, weight_decay_type="adamw"),
            ["shampoo(weight_decay_type='adamw')", "'decoupled'", "'independent'"],
        ),
        (
            lambda: so.add_weight_decay(0.1, 1e-3, kind="L2"),
            ["add_weight_decay(kind='L2')", "'l2'", "'corrected'"],
        ),
        (
            lambda: so.graft(g.sgd(), g.sgd(), scope="tensor"),
            ["graft(scope='tensor')", "'block'", "'array'"],
        ),
        (
            lambda: so.shampoo(
                optax.constant_schedule(0.1), weight_decay_type="corrected"
            ),
            ["add_weight_decay(kind='corrected')", "peak_learning_rate"],
        ),
        (
            lambda: so.kronecker(exponents={2: {5: 0.5}}),
            ["kronecker(exponents={2: ...})", "5", "0 to 1"],
        ),
        (
            lambda: so.kronecker(exponents={2: -0.5}),
            ["kronecker(exponents[2][0]=-0.5)", "[0, inf)"],
        ),
        (
            lambda: so.kronecker(exponents={0: 0.5}),
            ["kronecker(exponents key=0)", "at least 1"],
        ),
        (
            lambda: so.roots.CoupledHigherOrder(order=1),
            ["roots.CoupledHigherOrder(order=1)", "at least 2"],
        ),
        (
            lambda: so.BlockLayout(batch_axes=lambda path, shape: 3).plan(
                ["w"], [(4, 4)]
            ),
            ["BlockLayout(batch_axes=...)", "3", "'w'", "(4, 4)", "0 to 2"],
        ),
        (
            lambda: so.BlockLayout(batch_axes=lambda path, shape: -1).plan(
                ["w"], [(4, 4)]
            ),
            ["BlockLayout(batch_axes=...)", "-1", "'w'"],
        ),
    ],
)
def test_choices(construct: Callable[[], Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        construct()
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("name", SHAMPOO_NUMBERS)
def test_traced_numbers_are_not_checked(name: str) -> None:
    # 2.0 is out of range nearly everywhere; a schedule may not look at it, though.
    tx = optax.inject_hyperparams(so.shampoo)(**{"learning_rate": 1e-3, name: 2.0})
    params = {"w": jnp.ones((3, 2))}
    state = jax.jit(tx.init)(params)
    updates, state = jax.jit(tx.update)(params, state, params)
    assert updates["w"].shape == (3, 2)
    assert float(state.hyperparams[name]) == 2.0
