"""What every alias ends with: weight decay, momentum and the learning rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import optax
from jax.typing import ArrayLike

from shampoo_optax import _checks
from shampoo_optax.transforms.weight_decay import KINDS, Kind, add_weight_decay


class Decay(NamedTuple):
    """Arguments of ``add_weight_decay``."""

    weight_decay: ArrayLike | None
    kind: Kind
    peak_learning_rate: ArrayLike | None
    mask: Any


def chained(
    call: str,
    scaled: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    decay: Decay,
    after: Sequence[optax.GradientTransformation] = (),
) -> optax.GradientTransformationExtraArgs:
    """The direction with weight decay where its kind wants it, and the rate."""
    _checks.choice(call, "weight_decay_type", decay.kind, KINDS)
    parts = [scaled]
    if decay.weight_decay is not None:
        shrink = add_weight_decay(
            decay.weight_decay,
            learning_rate,
            kind=decay.kind,
            peak_learning_rate=decay.peak_learning_rate,
            mask=decay.mask,
        )
        parts.insert(0 if decay.kind == "l2" else 1, shrink)
    parts += [*after, optax.scale_by_learning_rate(learning_rate)]
    return optax.with_extra_args_support(optax.chain(*parts))
