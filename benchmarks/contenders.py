"""The optimizers whose convergence is compared, each as a recipe for the examples.

All have the schedule of the examples (a tenth of warm-up, then a cosine to zero), the
same weight decay, clip, blocks and refreshes; the rest are each one's own defaults.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import optax

import shampoo_optax as so
from examples.train_lm import warmup_cosine
from examples.training.command import Recipe

WEIGHT_DECAY = 1e-4
FREQUENCY = 10
BASELINES = ("adamw", "muon")

Maker = Callable[[optax.Schedule], optax.GradientTransformation]


def muon(rate: optax.Schedule) -> optax.GradientTransformation:
    """``optax.contrib.muon``: matrices orthogonalised, AdamW for the rest.

    One rate serves both halves only if both are in AdamW's unit, so its updates have
    AdamW's usual length, by the option and the number that Optax recommends for that.
    """
    return optax.contrib.muon(
        rate,
        weight_decay=WEIGHT_DECAY,
        adam_weight_decay=WEIGHT_DECAY,
        consistent_rms=0.2,
    )


def makers(largest: int) -> dict[str, Maker]:
    """How to make each optimizer from its schedule, by name; ``largest`` factor."""
    given: dict[str, Any] = {
        "weight_decay": WEIGHT_DECAY,
        "layout": so.BlockLayout(max_preconditioner_dim=largest),
        "refresh": so.Refresh(precondition_frequency=FREQUENCY),
    }
    return {
        "adamw": lambda rate: optax.adamw(rate, weight_decay=WEIGHT_DECAY),
        "muon": muon,
        "shampoo": lambda rate: so.shampoo(rate, **given),
        "shampoo, array": lambda rate: so.shampoo(rate, graft_scope="array", **given),
        "kl_shampoo": lambda rate: so.kl_shampoo(rate, **given),
        "soap": lambda rate: so.soap(rate, **given),
        "spectral_descent": lambda rate: so.spectral_descent(
            rate, weight_decay=WEIGHT_DECAY
        ),
    }


def recipes(largest: int, clip: float | None) -> dict[str, Recipe]:
    """The same with their schedule, behind a clip of the gradient's global norm."""

    def recipe(make: Maker) -> Recipe:
        def build(peak: float, steps: int) -> optax.GradientTransformationExtraArgs:
            optimizer = make(warmup_cosine(peak, steps))
            before = [] if clip is None else [optax.clip_by_global_norm(clip)]
            return optax.chain(*before, optimizer)

        return build

    return {name: recipe(make) for name, make in makers(largest).items()}
