"""The reference system's configurations as our optimizers.

``build`` translates the vocabulary of the golden cases (`tests/golden/*.json`); it
knows keys and values, never names of cases. Used by the tests and as a guide for
people who come from Meta's Distributed Shampoo.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax

import shampoo_optax as so

EvalParams = Callable[[Any, Any], Any]

OPTIMIZER_KEYS = {
    "lr",
    "betas",
    "beta3",
    "epsilon",
    "max_preconditioner_dim",
    "target_parameter_dimensionality",
    "precondition_frequency",
    "start_preconditioning_step",
    "use_bias_correction",
    "grafting",
    "weight_decay",
    "weight_decay_type",
    "iterate_averaging",
    "preconditioner",
}
PRECONDITIONER_KEYS = {"type", "matrix_function", "inverse_exponent_override"}


def build(case: dict) -> tuple[optax.GradientTransformation, EvalParams | None]:
    """One of our optimizers for a reference configuration.

    Args:
      case: ``{"optimizer": {...}, "peak_lr": float}``, as in the golden JSON files.

    Returns:
      The optimizer, and the function that gives the evaluation parameters of an
      iterate averaging (None without one).

    Raises:
      NotImplementedError: a key or value that is not built yet, named.
      ValueError: a configuration the reference system refuses too.
    """
    config = dict(case["optimizer"])
    _known("optimizer", config, OPTIMIZER_KEYS)
    preconditioner = dict(config.get("preconditioner", {"type": "root_inv"}))
    _check_preconditioner(preconditioner)
    b1, b2 = config.get("betas", (0.9, 1.0))
    b3 = config.get("beta3")
    rates = jnp.asarray(config["lr"])
    peak = case.get("peak_lr", float(rates[0]))
    root = _root(preconditioner.get("matrix_function", {"type": "eigh_root"}))
    pseudo = getattr(root, "pseudo_inverse", None) is not None
    eps = config.get("epsilon", 1e-12)
    if pseudo and eps != 0.0:
        raise ValueError(f"epsilon={eps} with pseudo_inverse: wanted 0.0.")
    tx = so.shampoo(
        lambda count: rates[count],
        None if b1 == 0 else b1,
        b2,
        1e-30 if pseudo else eps,
        0.0,
        config.get("weight_decay") or None,
        b3=None if b3 in (None, -1, -1.0, b1) else b3,
        layout=so.BlockLayout(
            max_preconditioner_dim=_size(config.get("max_preconditioner_dim", 1024)),
            target_parameter_dimensionality=_size(
                config.get("target_parameter_dimensionality", 1)
            ),
            precondition_vectors=True,
        ),
        refresh=_refresh(config),
        root=root,
        grafting=_grafting(config.get("grafting")),
        exponents=_exponents(preconditioner.get("inverse_exponent_override")),
        bias_correction=config.get("use_bias_correction", True),
        weight_decay_type=config.get("weight_decay_type", "decoupled"),
        peak_learning_rate=peak,
        **_averaging(config.get("iterate_averaging")),
    )
    return tx, None


def _known(where: str, given: dict, known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise NotImplementedError(f"{where} key {key!r} is not built yet.")


def _size(value: int | float | str) -> int | float:
    return math.inf if value in ("inf", math.inf) else value


def _check_preconditioner(preconditioner: dict) -> None:
    kind = preconditioner.pop("type")
    if kind not in ("root_inv", "eigendecomposed"):
        raise NotImplementedError(f"preconditioner.type {kind!r} is not built yet.")
    for key, value in list(preconditioner.items()):
        if key not in PRECONDITIONER_KEYS and value in (False, None):
            del preconditioner[key]  # switched off
    # Its exponent says nothing while trace scaling is off.
    if "use_trace_scaling" not in preconditioner:
        preconditioner.pop("trace_scaling_exponent", None)
    _known("preconditioner", preconditioner, PRECONDITIONER_KEYS)


def _refresh(config: dict) -> so.Refresh:
    start = config.get("start_preconditioning_step", -1)
    return so.Refresh(
        precondition_frequency=config.get("precondition_frequency", 1),
        start_preconditioning_step=None if start == -1 else _size(start),
    )


def _root(function: dict) -> so.roots.RootMethod:
    function = dict(function)
    kind = function.pop("type")
    stability = function.pop("rank_deficient_stability", None)
    if kind in ("eigh_root", "eigh"):
        if function.pop("tolerance", 0.0):
            raise NotImplementedError("matrix_function.tolerance is not built yet.")
        _known("matrix_function", function, set())
        return so.roots.Eigh(shift=True, pseudo_inverse=_pseudo_inverse(stability))
    if stability is not None and stability.get("type") == "pseudo_inverse":
        raise ValueError(f"rank_deficient_stability does not go with {kind!r}.")
    if kind == "coupled_newton":
        # The reference uses what it has, converged or not.
        _known("matrix_function", function, {"max_iterations", "tolerance"})
        return so.roots.CoupledNewton(
            **function, max_growth=math.inf, max_residual=math.inf
        )
    if kind == "coupled_higher_order":
        known = {"rel_epsilon", "abs_epsilon", "order", "tolerance", "max_iterations"}
        _known("matrix_function", function, known)
        required = {"rel_epsilon": 0.0, "abs_epsilon": 0.0}
        return so.roots.CoupledHigherOrder(**(required | function))
    raise NotImplementedError(f"matrix_function.type {kind!r} is not built yet.")


def _pseudo_inverse(stability: dict | None) -> so.roots.PseudoInverse | None:
    if stability is None or stability.get("type") == "perturbation":
        return None
    stability = dict(stability)
    if stability.pop("type") != "pseudo_inverse":
        raise NotImplementedError("rank_deficient_stability.type is not built yet.")
    return so.roots.PseudoInverse(**stability)


def _grafting(config: dict | None) -> optax.GradientTransformation | None:
    if config is None:
        return None
    config = dict(config)
    kind = config.pop("type")
    options = {
        ours: config.pop(theirs)
        for theirs, ours in (("beta2", "b2"), ("epsilon", "eps"))
        if theirs in config
    }
    dropped = config.pop("drop_weighting_factor_on_gsquare", False)
    _known("grafting", config, set())
    if kind == "sgd":
        return so.grafting.sgd()
    if kind == "adagrad":
        options.pop("b2", None)
        return so.grafting.adagrad(**options)
    rules = {"rmsprop": so.grafting.rmsprop, "adam": so.grafting.adam}
    if kind not in rules:
        raise NotImplementedError(f"grafting.type {kind!r} is not built yet.")
    return rules[kind](**options, weighted=not dropped)


def _exponents(override: dict | None) -> dict | None:
    if not override:
        return None
    return {
        int(order): {int(dim): power for dim, power in value.items()}
        if isinstance(value, dict)
        else value
        for order, value in override.items()
    }


def _averaging(config: dict | None) -> dict[str, Any]:
    if config is None:
        return {}
    config = dict(config)
    kind = config.pop("type")
    if kind != "classic_momentum":
        raise NotImplementedError(f"iterate_averaging.type {kind!r} is not built yet.")
    _known("iterate_averaging", config, {"momentum", "dampening", "use_nesterov"})
    return {
        "momentum": config.get("momentum", 0.9),
        "dampening": config.get("dampening", 0.0),
        "nesterov": config.get("use_nesterov", False),
    }
