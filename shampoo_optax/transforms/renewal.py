"""Roots computed anew outside of the schedule, when factors came from elsewhere."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from shampoo_optax.transforms.kronecker import KroneckerState

MOST_STEPS = 10_000  # of gradient accumulation, before we stop waiting for its end


def refresh_now(
    tx: optax.GradientTransformationExtraArgs, state: Any, params: optax.Params
) -> Any:
    """Compute all inverse roots of a state anew, and change nothing else.

    For factors that were changed by hand or cut anew (:func:`checkpoint.restore` with
    ``reblock``), and for a state whose roots have other exponents than the optimizer's.
    Roots whose ``refresh.start`` is not reached stay as they are, and so do bases of
    :func:`eigenbasis`, in which a second moment is written.

    Args:
      tx: the optimizer, whose root method and damping are used; wrappers in it have to
        pass extra arguments on, as Optax's do.
      state: its state; it is not consumed.
      params: what it is of; they do not move.

    Returns:
      The state with new roots, and counts of refusals that belong to them.

    Raises:
      ValueError: there are no roots in the state, or gradients are accumulated over
        more steps than we wait for.

    Example:
      >>> layout = BlockLayout(max_preconditioner_dim=4)
      >>> tx = blockwise(kronecker(refresh=Refresh(1), bias_correction=False), layout)
      >>> params = {"w": jnp.eye(2)}
      >>> _, state = tx.update(params, tx.init(params))
      >>> factors = jax.tree.map(lambda a: 16 * a, state.blocks.factors)
      >>> state = state._replace(blocks=state.blocks._replace(factors=factors))
      >>> new = refresh_now(tx, state, params).blocks.roots["2x2"]["0"]
      >>> (new / state.blocks.roots["2x2"]["0"])[0].diagonal().round(3)  # 16**(-1/4)
      Array([0.5, 0.5], dtype=float32)
    """
    if not any(map(_has_roots, jax.tree.leaves(state, is_leaf=_has_roots))):
        raise ValueError(
            "refresh_now(state=...): there are no inverse roots in it; wanted the "
            "state of shampoo, kl_shampoo or others with kronecker(...)."
        )

    @jax.jit
    def renewed(state: Any, params: Any) -> Any:
        nothing = jax.tree.map(jnp.zeros_like, params)
        return tx.update(nothing, state, params, refresh_only=True)[1]

    state = _with_exponents(state, jax.eval_shape(tx.init, params))
    before, new = _inner_steps(state), renewed(state, params)
    for _ in range(MOST_STEPS):
        if not before or _inner_steps(new) != before:
            return jax.tree.map(_with_roots, state, new, is_leaf=_has_roots)
        new = renewed(new, params)
    raise ValueError(
        "refresh_now(tx=...): optax.MultiSteps did not reach its optimizer within "
        f"{MOST_STEPS} steps; wanted fewer in a row."
    )


def _has_roots(node: Any) -> bool:
    return isinstance(node, KroneckerState)


def _with_exponents(state: Any, like: Any) -> Any:
    """A state that says the exponents of another, which its roots are to have."""
    nodes, treedef = jax.tree.flatten(state, is_leaf=_has_roots)
    wanted = filter(_has_roots, jax.tree.leaves(like, is_leaf=_has_roots))
    return jax.tree.unflatten(
        treedef,
        [
            node._replace(exponents=next(wanted, node).exponents)
            if _has_roots(node)
            else node
            for node in nodes
        ],
    )


def _with_roots(old: Any, new: Any) -> Any:
    if not _has_roots(old):
        return old
    return old._replace(roots=new.roots, failures=new.failures, bases=new.bases)


def _inner_steps(state: Any) -> list[int]:
    """How often wrappers that accumulate gradients have stepped."""

    def accumulates(node: Any) -> bool:
        return isinstance(node, optax.MultiStepsState)

    nodes = jax.tree.leaves(state, is_leaf=accumulates)
    return [int(node.gradient_step) for node in filter(accumulates, nodes)]
