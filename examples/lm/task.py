"""Next-byte prediction as a task for the loop."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct

from examples.lm import data
from examples.lm.model import Decoder, Shape
from examples.training.spread import Spread
from examples.training.task import PyTree, Task

VALIDATION_WINDOWS = 256
VALIDATION_BATCH = 64


class LanguageModelState(struct.PyTreeNode):
    """Parameters as ``nnx.split`` gives them, and the optimizer's state."""

    step: jax.Array
    params: nnx.State
    opt_state: optax.OptState
    tx: optax.GradientTransformationExtraArgs = struct.field(pytree_node=False)


def language_model(
    corpus: data.Corpus,
    shape: Shape,
    *,
    batch_size: int,
    seed: int,
    spread: Spread | None = None,
) -> Task:
    """Makes the task: predict the next byte of the standard library's sources.

    Args:
      corpus: train and validation bytes.
      shape: of the model.
      batch_size: windows in a train batch.
      seed: of the parameters and the batches.
      spread: where everything lies on several devices; None for one.

    Returns:
      The task; evaluation is the mean cross-entropy, in nats for each byte.
    """
    graphdef, params = nnx.split(Decoder(shape, rngs=nnx.Rngs(seed)), nnx.Param)
    windows = data.validation_windows(
        corpus.validation, VALIDATION_WINDOWS, shape.context
    ).reshape(-1, VALIDATION_BATCH, shape.context + 1)

    def rows(tokens: jax.Array) -> jax.Array:
        return tokens if spread is None else spread.rows(tokens)

    def loss(params: nnx.State, tokens: jax.Array) -> jax.Array:
        logits = nnx.merge(graphdef, params)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    def start(tx: optax.GradientTransformationExtraArgs) -> LanguageModelState:
        zero = jnp.zeros((), jnp.int32)
        # A copy: the first step donates it, and the next optimizer starts here too.
        if spread is None:
            own = jax.tree.map(jnp.copy, params)
            return LanguageModelState(zero, own, jax.jit(tx.init)(own), tx)
        own = spread.place(params)
        return LanguageModelState(
            spread.everywhere(zero), own, spread.init(tx, own), tx
        )

    def step(
        state: LanguageModelState, tokens: jax.Array
    ) -> tuple[LanguageModelState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(state.params, tokens)
        updates, opt_state = state.tx.update(gradient, state.opt_state, state.params)
        changes: dict[str, Any] = {
            "step": state.step + 1,
            "params": optax.apply_updates(state.params, updates),
            "opt_state": opt_state,
        }
        return state.replace(**changes), value

    def batch(step: int) -> jax.Array:
        tokens = data.train_batch(corpus.train, seed, step, batch_size, shape.context)
        return rows(jnp.asarray(tokens))

    @jax.jit
    def validate(params: nnx.State) -> jax.Array:
        # One batch after the other: all at once would need much memory at once.
        return jax.lax.map(lambda tokens: loss(params, rows(tokens)), windows).mean()

    def evaluate(params: PyTree) -> dict[str, float]:
        return {"loss": float(validate(params))}

    return Task(start, step, batch, evaluate)
