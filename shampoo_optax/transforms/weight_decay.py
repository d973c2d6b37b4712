"""Four ways to add the parameters to the update.

All stand before the multiplication by the learning rate, like
``optax.add_decayed_weights``, which does the work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
import optax
from jax.typing import ArrayLike

from shampoo_optax import _checks

Kind = Literal["l2", "decoupled", "corrected", "independent"]
KINDS = ("l2", "decoupled", "corrected", "independent")


def add_weight_decay(
    weight_decay: ArrayLike,
    learning_rate: optax.ScalarOrSchedule,
    *,
    kind: Kind = "decoupled",
    peak_learning_rate: ArrayLike | None = None,
    mask: Any | Callable[[optax.Params], Any] | None = None,
) -> optax.GradientTransformation:
    r"""Add :math:`\alpha W` to the updates.

    Equals ``optax.add_decayed_weights`` with :math:`\alpha` = ``weight_decay`` times

    - ``"l2"``, ``"decoupled"``: 1. Placed before the preconditioner it is L2
      regularisation; after it, AdamW's decay: :math:`W` shrinks by :math:`\eta_t
      \lambda`.
    - ``"corrected"``: :math:`\eta_t / \eta_{peak}`, so :math:`W` shrinks by
      :math:`\eta_t^2 \lambda / \eta_{peak}`.
    - ``"independent"``: :math:`1 / \eta_{peak}`, so :math:`W` shrinks by
      :math:`\eta_t \lambda / \eta_{peak}`, whatever the learning rate's unit.

    Args:
      weight_decay: the coefficient.
      learning_rate: of the chain that this is part of; a number or a schedule.
      kind: see above.
      peak_learning_rate: the largest learning rate; needed by the last two kinds
        where ``learning_rate`` is a schedule.
      mask: which parameters decay, as in ``optax.adamw``.

    Returns:
      The transformation.

    Raises:
      ValueError, TypeError: the coefficient is negative or NaN, the kind unknown, or
        the peak is missing.

    Example:
      >>> tx = add_weight_decay(0.5, 0.1, kind="independent")
      >>> tx.update(jnp.zeros(1), tx.init(jnp.ones(1)), jnp.ones(1))[0]
      Array([5.], dtype=float32)

    Source: Loshchilov and Hutter, `Decoupled Weight Decay Regularization
    <https://arxiv.org/abs/1711.05101>`_, 2017; Defazio, `Why Gradients Rapidly
    Increase Near the End of Training <https://arxiv.org/abs/2506.02285>`_, 2025
    (corrected); Wortsman et al., `Small-scale proxies
    <https://arxiv.org/abs/2309.14322>`_, 2023 (independent).
    """
    call = "add_weight_decay"
    _checks.choice(call, "kind", kind, KINDS)
    _checks.numbers(
        call,
        weight_decay=weight_decay,
        learning_rate=learning_rate,
        peak_learning_rate=peak_learning_rate,
    )
    if kind in ("l2", "decoupled"):
        return optax.add_decayed_weights(weight_decay, mask)
    if peak_learning_rate is None:
        if callable(learning_rate):
            raise ValueError(
                f"{call}(kind={kind!r}) divides by the largest learning rate, which a "
                "schedule does not tell: pass peak_learning_rate=..."
            )
        peak_learning_rate = learning_rate
    if kind == "independent":
        return optax.add_decayed_weights(weight_decay / peak_learning_rate, mask)
    if not callable(learning_rate):
        rate = weight_decay * (learning_rate / peak_learning_rate)
        return optax.add_decayed_weights(rate, mask)

    def relative(count: jax.Array) -> jax.Array:
        return weight_decay * (learning_rate(count) / peak_learning_rate)

    return optax.add_decayed_weights(relative, mask)
