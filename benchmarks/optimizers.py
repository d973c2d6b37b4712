"""The optimizers that are compared, made the way their users make them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

import shampoo_optax as so

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 1e-4
FREQUENCY = 10
BLOCK = 256


def shampoo(block: int = BLOCK) -> optax.GradientTransformation:
    """Ours, with the defaults of ``so.shampoo`` but for the block size."""
    return so.shampoo(LEARNING_RATE, **_given(block))


def soap(block: int = BLOCK) -> optax.GradientTransformation:
    """Ours, with the defaults of ``so.soap`` but for the block size."""
    return so.soap(LEARNING_RATE, **_given(block))


def _given(block: int) -> dict[str, Any]:
    return {
        "weight_decay": WEIGHT_DECAY,
        "layout": so.BlockLayout(max_preconditioner_dim=block),
        "refresh": so.Refresh(precondition_frequency=FREQUENCY),
    }


def adamw() -> optax.GradientTransformation:
    """``optax.adamw``."""
    return optax.adamw(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def muon() -> optax.GradientTransformation:
    """``optax.contrib.muon``; by its defaults only matrices are orthogonalised."""
    return optax.contrib.muon(LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def kron() -> optax.GradientTransformation:
    """PSGD Kron of psgdax, with its defaults but for when it refreshes.

    It draws lots at every step; a probability of one at every tenth step and of zero
    at the others makes it refresh when the others do.
    """
    with quiet():
        import psgdax

        def probability(count: jax.Array) -> jax.Array:
            return jnp.where(count % FREQUENCY == 0, 1.0, 0.0)

        return psgdax.kron(
            LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            preconditioner_update_probability=probability,
        )


def known() -> dict[str, Callable[[], optax.GradientTransformation]]:
    """By name; psgdax only where it is installed."""
    makers = {"adamw": adamw, "shampoo": shampoo, "soap": soap, "muon": muon}
    if importlib.util.find_spec("psgdax") is not None:
        makers["psgdax kron"] = kron
    return makers


def quiet() -> contextlib.AbstractContextManager[Any]:
    """Some peers print while they are traced."""
    return contextlib.redirect_stdout(io.StringIO())


Step = Callable[[Any, Any, Any], tuple[Any, Any]]


def step_of(tx: optax.GradientTransformation) -> Step:
    """``(params, state, gradient) -> (params, state)``, jitted, the first two donated.

    Every call returns a function that JAX has not seen, so it compiles again.
    """

    def step(params: Any, state: Any, gradient: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1))
