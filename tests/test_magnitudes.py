"""Grafting that never begins is the magnitude rule: Optax's own optimizers."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from tests import helpers

g = so.grafting
NEVER = so.Refresh(3, math.inf)
LATE = so.Refresh(3, 100)
PAIRS = {
    "sgd": (None, g.sgd(), optax.identity()),
    "sgd_momentum": (0.9, g.sgd(), optax.ema(0.9)),
    "adagrad": (None, g.adagrad(1e-30), optax.scale_by_rss(0.0, 1e-30)),
    "adagrad_initial": (
        None,
        g.adagrad(1e-30, initial_accumulator_value=0.1),
        optax.scale_by_rss(0.1, 1e-30),
    ),
    "rmsprop": (
        None,
        g.rmsprop(0.95, 1e-3),
        optax.scale_by_rms(0.95, 1e-3, eps_in_sqrt=False),
    ),
    "adam": (0.8, g.adam(0.95, 1e-3), optax.scale_by_adam(0.8, 0.95, 1e-3)),
    "adam_default": (0.9, g.adam(), optax.scale_by_adam()),
    "adam_no_momentum": (0.0, g.adam(), optax.scale_by_adam(0.0)),
}


@pytest.mark.parametrize("refresh", [NEVER, LATE], ids=["never", "late"])
@pytest.mark.parametrize("name", PAIRS)
def test_before_its_start_grafting_is_the_magnitude(
    name: str, refresh: so.Refresh
) -> None:
    b1, rule, wanted = PAIRS[name]
    layout = so.BlockLayout(3, precondition_vectors=True)
    ours = so.scale_by_shampoo(b1, grafting=rule, refresh=refresh, layout=layout)
    params = helpers.parameters()
    (found, _), (expected, _) = (helpers.run(tx, params, 6) for tx in (ours, wanted))
    helpers.assert_close(found, expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_lifted_adam_is_adam(dtype: Any) -> None:
    with jax.enable_x64(dtype == jnp.float64):
        params = helpers.parameters(dtype)
        inner = so.filter_gradient(g.adam(0.999, 1e-8), 0.9)
        lifted = so.blockwise(inner, so.BlockLayout(3), rest=inner)
        found, _ = helpers.run(lifted, params, 10)
        wanted, _ = helpers.run(optax.scale_by_adam(0.9, 0.999, 1e-8), params, 10)
        helpers.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_the_magnitude_ends_where_grafting_starts() -> None:
    params = helpers.parameters()
    ours = so.scale_by_shampoo(refresh=so.Refresh(2, 3))
    found, _ = helpers.run(ours, params, 4)
    adam, _ = helpers.run(optax.scale_by_adam(), params, 4)
    helpers.assert_close(found[:2], adam[:2], rtol=2e-6, atol=1e-7)
    for step in (2, 3):
        difference = np.abs(np.asarray(found[step]["kernel"] - adam[step]["kernel"]))
        assert difference.max() > 1e-2


def test_alias_is_adamw() -> None:
    params = helpers.parameters()
    schedule = optax.linear_schedule(1e-2, 1e-3, 6)
    mask = {"kernel": True, "conv": True, "bias": False, "scale": False}
    ours = so.shampoo(schedule, weight_decay=0.1, mask=mask, refresh=NEVER)
    theirs = optax.adamw(schedule, weight_decay=0.1, mask=mask)
    (found, _), (wanted, _) = (helpers.run(tx, params, 6) for tx in (ours, theirs))
    helpers.assert_close(found, wanted, rtol=2e-6, atol=1e-9)


RATES = [0.1, 0.2, 0.2, 0.05, 0.01]
PEAK, DECAY = 0.2, 0.3


def _by_hand(
    kind: str, momentum: float | None, dampening: float, nesterov: bool
) -> list[np.ndarray]:
    """Parameters of Adam with one kind of decay, in a plain loop."""
    w = np.asarray(helpers.gradients(jnp.zeros((4, 3)), 50))
    m, v, buffer, history = np.zeros_like(w), np.zeros_like(w), np.zeros_like(w), []
    for t, rate in enumerate(RATES, start=1):
        grad = np.asarray(helpers.gradients(jnp.zeros((4, 3)), t))
        grad = grad + DECAY * w if kind == "l2" else grad
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        step = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        factor = {"decoupled": 1.0, "corrected": rate / PEAK, "independent": 1 / PEAK}
        step = step + DECAY * factor.get(kind, 0.0) * w
        if momentum is not None:
            buffer = momentum * buffer + (1 - dampening) * step
            step = (1 - dampening) * step + momentum * buffer if nesterov else buffer
        w = w - rate * step
        history.append(w)
    return history


@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"),
    [(None, 0.0, False), (0.7, 0.0, False), (0.7, 0.25, False), (0.7, 0.25, True)],
)
@pytest.mark.parametrize("kind", ["l2", "decoupled", "corrected", "independent"])
def test_weight_decay_and_momentum_by_hand(
    kind: Any, momentum: float | None, dampening: float, nesterov: bool
) -> None:
    with jax.enable_x64(True):
        wanted = _by_hand(kind, momentum, dampening, nesterov)
        tx = so.shampoo(
            lambda count: jnp.asarray(RATES)[count],
            weight_decay=DECAY,
            weight_decay_type=kind,
            peak_learning_rate=PEAK,
            momentum=momentum,
            dampening=dampening,
            nesterov=nesterov,
            refresh=NEVER,
        )
        w = helpers.gradients(jnp.zeros((4, 3)), 50)
        state, update = tx.init(w), jax.jit(tx.update)
        for t, target in enumerate(wanted, start=1):
            grad = helpers.gradients(jnp.zeros((4, 3)), t)
            updates, state = update(grad, state, w)
            w = optax.apply_updates(w, updates)
            np.testing.assert_allclose(w, target, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["corrected", "independent"])
def test_the_peak_of_a_constant_rate_is_the_rate(kind: Any) -> None:
    params = helpers.parameters()
    given, found = (
        so.shampoo(PEAK, weight_decay_type=kind, peak_learning_rate=peak, refresh=NEVER)
        for peak in (PEAK, None)
    )
    histories = [helpers.run(tx, params, 2)[0] for tx in (given, found)]
    helpers.assert_equal(*histories)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_optax_trace(nesterov: bool) -> None:
    params = helpers.parameters()
    common = {"weight_decay": 0.1, "refresh": so.Refresh(2)}
    ours = so.shampoo(0.1, momentum=0.9, nesterov=nesterov, **common)
    direction = so.shampoo(1.0, **common)
    theirs = optax.chain(direction, optax.trace(0.9, nesterov), optax.scale(0.1))
    (found, _), (wanted, _) = (helpers.run(tx, params, 5) for tx in (ours, theirs))
    helpers.assert_close(found, wanted, rtol=2e-6, atol=1e-7)
