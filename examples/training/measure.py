"""What an optimizer costs: time and memory, apart from the model it serves."""

from __future__ import annotations

import statistics
import time

import jax
import optax

from examples.training.task import PyTree, TrainingState

ROUNDS = 5


def _bytes(tree: PyTree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def state_bytes_per_parameter(state: TrainingState) -> float:
    """Divides the bytes of the optimizer's state by the number of parameters."""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return _bytes(state.opt_state) / parameters


def optimizer_milliseconds(
    optimizer: optax.GradientTransformationExtraArgs,
    state: TrainingState,
    *,
    period: int,
) -> float:
    """Times the update and its application, jitted alone, on the real shapes.

    Args:
      optimizer: to be timed.
      state: where training ended; it is not consumed.
      period: steps from one refresh to the next, so that each round pays for one.

    Returns:
      Milliseconds a step: the mean over a period, the median over some periods. The
      gradients are random numbers of the real shapes.
    """

    def update(
        params: PyTree, opt_state: PyTree, gradient: PyTree
    ) -> tuple[PyTree, PyTree]:
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    params, opt_state = state.params, state.opt_state
    where = jax.tree.map(lambda leaf: leaf.sharding, (params, opt_state))
    gradient = optax.tree.random_like(jax.random.key(0), params)
    gradient = jax.device_put(gradient, where[0])
    jitted = jax.jit(update, out_shardings=where)
    step = jitted.lower(params, opt_state, gradient).compile()
    rounds = []
    for _ in range(ROUNDS + 1):
        start = time.perf_counter()
        for _ in range(period):
            params, opt_state = step(params, opt_state, gradient)
        jax.block_until_ready(params)
        rounds.append((time.perf_counter() - start) / period)
    return 1e3 * statistics.median(rounds[1:])  # the first one warms up
