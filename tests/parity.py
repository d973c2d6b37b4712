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
Case = dict[str, Any]

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
FACTORED = {"root_inv", "eigendecomposed", "root_inv_kl", "eigendecomposed_kl"}
STATELESS = {"spectral_descent", "sign_descent"}


def build(case: Case) -> tuple[optax.GradientTransformation, EvalParams | None]:
    """One of our optimizers for a reference configuration.

    Args:
      case: ``{"optimizer": {...}, "peak_lr": float}``, as in the golden JSON files.

    Returns:
      The optimizer, and the function that gives the evaluation parameters of an
      iterate averaging from its state and the parameters (None without one).

    Raises:
      NotImplementedError: a key or value outside the vocabulary, named.
      ValueError: a configuration the reference system refuses too.
    """
    config = dict(case["optimizer"])
    _known("optimizer", config, OPTIMIZER_KEYS)
    kind = config.get("preconditioner", {}).get("type", "root_inv")
    if kind in STATELESS:  # the reference system forces these two
        config["precondition_frequency"] = 1
    if kind == "spectral_descent":
        config["target_parameter_dimensionality"] = 2
    rates = jnp.asarray(config["lr"])

    def learning_rate(count: Any) -> Any:
        return rates[count]

    decay = so.add_weight_decay(
        config.get("weight_decay", 0.0),
        learning_rate,
        kind=config.get("weight_decay_type", "decoupled"),
        peak_learning_rate=case.get("peak_lr", float(rates[0])),
    )
    before = config.get("weight_decay_type") == "l2"
    scaled = [_scaled(config, kind)]
    shrunk = [decay, *scaled] if before else [*scaled, decay]
    rate = optax.scale_by_learning_rate(learning_rate)
    averaging = dict(config.get("iterate_averaging") or {"type": None})
    name = averaging.pop("type")
    if name is None:
        return optax.chain(*shrunk, rate), None
    if name == "classic_momentum":
        return optax.chain(*shrunk, *_momentum(averaging), rate), None
    # The averages decay the sequence that takes the steps, before it takes one.
    inner = optax.chain(*(shrunk if before else scaled), rate)
    apart = None if before else optax.chain(decay, rate)
    return _averaged(name, averaging, inner, learning_rate, apart), so.eval_params


def _scaled(config: Case, kind: str) -> optax.GradientTransformation:
    """Everything from the gradient to the direction, without decay and rate."""
    b1, _ = config.get("betas", (0.9, 1.0))
    b3 = config.get("beta3")
    refresh = _refresh(config)
    direction = _direction(config, kind, refresh)
    grafting = _grafting(config.get("grafting"))
    if grafting is not None:
        direction = so.graft(direction, grafting, start=refresh.start)
    if b1 != 0:
        direction = so.filter_gradient(
            direction,
            b1,
            None if b3 in (None, -1, -1.0, b1) else b3,
            bias_correction=config.get("use_bias_correction", True),
        )
    layout = so.BlockLayout(
        max_preconditioner_dim=_size(config.get("max_preconditioner_dim", 1024)),
        target_parameter_dimensionality=_size(
            config.get("target_parameter_dimensionality", 1)
        ),
        precondition_vectors=True,
    )
    return so.blockwise(direction, layout)


def _direction(
    config: Case, kind: str, refresh: so.Refresh
) -> optax.GradientTransformation:
    given = dict(config.get("preconditioner", {}))
    given.pop("type", None)
    function = dict(given.pop("matrix_function", {"type": "eigh_root"}))
    override = _by_order(given.pop("inverse_exponent_override", None))
    ignored = _by_order(given.pop("ignored_basis_change_dims", None))
    # Its exponent says nothing while trace scaling is off.
    exponent = given.pop("trace_scaling_exponent", 0.5)
    trace_scaling = exponent if given.pop("use_trace_scaling", False) else None
    dropped = given.pop("drop_weighting_factor_on_gsquare", False)
    orthogonalization = given.pop("orthogonalization", None)
    _known("preconditioner", given, set())
    if kind == "sign_descent":
        return so.sign()
    if kind == "spectral_descent":
        return _spectral(dict(orthogonalization or {"type": "newton_schulz"}))
    common = {
        "refresh": refresh,
        "bias_correction": config.get("use_bias_correction", True),
        "weighted": not dropped,
    }
    _, b2 = config.get("betas", (0.9, 1.0))
    eps = config.get("epsilon", 1e-12)
    stability = function.pop("rank_deficient_stability", None)
    if kind == "eigenvalue_corrected":
        if _pseudo_inverse(stability) is not None:
            raise ValueError("eigenvalue_corrected does not go with a pseudo-inverse.")
        return so.eigenbasis(
            b2,
            eps,
            basis=_basis(function),
            exponents=override,
            ignored_dims=ignored,
            null_space="plain",
            ridge=eps,
            **common,
        )
    if kind not in FACTORED:
        raise NotImplementedError(f"preconditioner.type {kind!r} is not built yet.")
    pseudo = _pseudo_inverse(stability)
    if pseudo is not None and eps != 0.0:
        raise ValueError(f"epsilon={eps} with pseudo_inverse: wanted 0.0.")
    cached = function["type"] == "qr" or (
        function.get("tolerance", 0.0) and (function["type"] == "eigh")
    )
    return so.kronecker(
        b2,
        1e-30 if pseudo is not None else eps,
        0.0,
        root=_root({"type": "eigh_root"} if cached else function, pseudo),
        basis=_basis(function) if cached else None,
        exponents=override,
        trace_scaling=trace_scaling,
        correction="kl_reference" if kind.endswith("_kl") else None,
        **common,
    )


def _known(where: str, given: Case, known: set[str]) -> None:
    for key in given:
        if key not in known:
            raise NotImplementedError(f"{where} key {key!r} is not built yet.")


def _size(value: int | float | str) -> int | float:
    return math.inf if value in ("inf", math.inf) else value


def _refresh(config: Case) -> so.Refresh:
    start = config.get("start_preconditioning_step", -1)
    return so.Refresh(
        precondition_frequency=config.get("precondition_frequency", 1),
        start_preconditioning_step=None if start == -1 else _size(start),
    )


def _basis(function: Case) -> so.bases.BasisMethod:
    function = dict(function)
    kind = function.pop("type")
    methods = {
        "eigh": (so.bases.Eigh, {"tolerance"}),
        "eigh_root": (so.bases.Eigh, set()),
        "qr": (so.bases.QR, {"max_iterations", "tolerance"}),
    }
    if kind not in methods:
        raise NotImplementedError(f"matrix_function.type {kind!r} is not built yet.")
    method, known = methods[kind]
    _known("matrix_function", function, known)
    return method(**function)


def _root(function: Case, pseudo: so.roots.PseudoInverse | None) -> so.roots.RootMethod:
    function = dict(function)
    kind = function.pop("type")
    if kind in ("eigh_root", "eigh"):
        function.pop("tolerance", None)
        _known("matrix_function", function, set())
        return so.roots.Eigh(shift=True, pseudo_inverse=pseudo)
    if pseudo is not None:
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


def _pseudo_inverse(stability: Case | None) -> so.roots.PseudoInverse | None:
    if stability is None or stability.get("type") == "perturbation":
        return None
    stability = dict(stability)
    if stability.pop("type") != "pseudo_inverse":
        raise NotImplementedError("rank_deficient_stability.type is not built yet.")
    return so.roots.PseudoInverse(**stability)


def _spectral(given: Case) -> optax.GradientTransformation:
    kind = given.pop("type")
    rules = {
        "one": so.orthogonal.Unscaled(),
        "sqrt_max1_rows_over_cols": so.orthogonal.AspectRatio(output_dimension=0),
    }
    rule = rules[given.pop("scale_by_dims", "one")]
    if kind == "svd":
        _known("orthogonalization", given, {"scale_by_nuclear_norm"})
        return so.spectral(so.orthogonal.SVD(**given), rule)
    if kind != "newton_schulz":
        raise NotImplementedError(f"orthogonalization.type {kind!r} is not built yet.")
    _known("orthogonalization", given, {"coefficients", "num_iterations"})
    if "coefficients" in given:
        given["coefficients"] = tuple(given["coefficients"])
    return so.spectral(so.orthogonal.NewtonSchulz(**given), rule)


def _grafting(config: Case | None) -> optax.GradientTransformation | None:
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


def _by_order(given: dict | None) -> dict | None:
    """JSON keys are strings; ours are the numbers they stand for."""
    if not given:
        return None
    return {
        int(order): {int(dim): power for dim, power in value.items()}
        if isinstance(value, dict)
        else value
        for order, value in given.items()
    }


def _momentum(config: Case) -> list[optax.GradientTransformation]:
    _known("iterate_averaging", config, {"momentum", "dampening", "use_nesterov"})
    damped = optax.scale(1.0 - config.get("dampening", 0.0))
    nesterov = config.get("use_nesterov", False)
    return [damped, optax.trace(config.get("momentum", 0.9), nesterov)]


def _averaged(
    kind: str,
    config: Case,
    inner: optax.GradientTransformation,
    learning_rate: Callable[[Any], Any],
    decay: optax.GradientTransformation | None,
) -> optax.GradientTransformation:
    train = config.pop("train_interp_coeff", 0.8)
    if kind == "generalized_primal_averaging":
        evaluation = config.pop("eval_interp_coeff", 0.9)
        _known("iterate_averaging", config, set())
        return so.primal_averaging(inner, evaluation, train, decay=decay)
    if kind == "schedule_free":
        power = config.pop("eval_coeff_lr_power", 2.0)
        _known("iterate_averaging", config, set())
        return so.schedule_free(
            inner, learning_rate, train, weight_lr_power=power, decay=decay
        )
    raise NotImplementedError(f"iterate_averaging.type {kind!r} is not built yet.")
