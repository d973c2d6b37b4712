"""Trains a small convnet on scikit-learn's digits, with Shampoo and with AdamW.

The same as train_lm.py in Flax Linen, with a TrainState, in under a minute.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# XLA solves many small eigenproblems side by side; with a pool of threads inside each
# of them, LAPACK is tens of times slower. It reads this when NumPy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from sklearn.datasets import load_digits

if not __package__:  # run as a file, not as python -m examples.NAME
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import shampoo_optax as so
from examples.training.command import Recipe, compare, new_parser
from examples.training.task import PyTree, Schedule, Task

SCHEDULE = Schedule(steps=200, eval_every=10, save_every=100)
BATCH = 64
VALIDATION = 360  # of 1797 images
FREQUENCY = 10
LARGEST = 256  # of a factor; 512 inputs fall into two blocks
LAYOUT = so.BlockLayout(max_preconditioner_dim=LARGEST)
LEARNING_RATES = {"adamw": 4e-3, "shampoo": 4e-3}


class ConvNet(nn.Module):
    """Two convolutions and two dense layers, for images of eight by eight."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(16, (3, 3))(images))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def cosine(peak: float, steps: int) -> optax.Schedule:
    """Makes the schedule of both optimizers."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, max(1, steps // 10), steps)


def adamw(learning_rate: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes the baseline."""
    return optax.adamw(cosine(learning_rate, steps))


def shampoo(learning_rate: float, steps: int) -> optax.GradientTransformationExtraArgs:
    """Makes Shampoo, with AdamW's arguments and two of its own."""
    return so.shampoo(
        cosine(learning_rate, steps),
        weight_decay=1e-4,
        layout=LAYOUT,
        refresh=so.Refresh(precondition_frequency=FREQUENCY),
    )


RECIPES: dict[str, Recipe] = {"adamw": adamw, "shampoo": shampoo}


def digits(seed: int) -> Task:
    """Makes the task: images to digits, one in five held out for validation."""
    pixels, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(seed).permutation(len(labels))
    images = jnp.asarray(pixels[order].reshape(-1, 8, 8, 1) / 16, jnp.float32)
    labels = jnp.asarray(labels[order], jnp.int32)
    model = ConvNet()
    params = model.init(jax.random.key(seed), images[:1])["params"]

    def start(tx: optax.GradientTransformationExtraArgs) -> TrainState:
        own = jax.tree.map(jnp.copy, params)  # the first step donates it
        # TrainState.create counts with a Python int, which becomes an array in the
        # first step and would have the second one compiled again.
        zero = jnp.zeros((), jnp.int32)
        return TrainState(zero, model.apply, own, tx, jax.jit(tx.init)(own))

    def step(
        state: TrainState, batch: tuple[jax.Array, jax.Array]
    ) -> tuple[TrainState, jax.Array]:
        def loss(params: PyTree) -> jax.Array:
            logits = state.apply_fn({"params": params}, batch[0])
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, batch[1]
            ).mean()

        value, gradient = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=gradient), value

    def batch(step: int) -> tuple[jax.Array, jax.Array]:
        generator = np.random.default_rng((seed, step))
        picked = generator.integers(VALIDATION, len(labels), size=BATCH)
        return images[picked], labels[picked]

    @jax.jit
    def validate(params: PyTree) -> dict[str, jax.Array]:
        logits = jnp.asarray(model.apply({"params": params}, images[:VALIDATION]))
        wanted = labels[:VALIDATION]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
        right = jnp.argmax(logits, axis=-1) == wanted
        return {"loss": losses.mean(), "accuracy": right.mean()}

    def evaluate(params: PyTree) -> dict[str, float]:
        return {name: float(value) for name, value in validate(params).items()}

    return Task(start, step, batch, evaluate)


def main(
    argv: Sequence[str] | None = None, on_step: Callable[[int], None] = lambda _: None
) -> int:
    """Trains, and returns the exit code."""
    parser = new_parser(
        __doc__, run_dir="runs/digits", schedule=SCHEDULE, learning_rates=LEARNING_RATES
    )
    arguments = parser.parse_args(argv)
    return compare(
        digits(arguments.seed),
        RECIPES,
        arguments,
        title=f"digits, {arguments.steps} steps",
        learning_rates=LEARNING_RATES,
        settings={"batch": BATCH},
        layout=LAYOUT,
        period=FREQUENCY,
        on_step=on_step,
    )


if __name__ == "__main__":
    sys.exit(main())
