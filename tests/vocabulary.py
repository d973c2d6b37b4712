"""Random configurations of the reference vocabulary, for Hypothesis."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

SHAPES = [(5, 4), (3, 1, 4), (6,), (), (2, 3, 2), (1, 7), (9, 2)]
STEPS = 7


def _options(**keys: Any) -> st.SearchStrategy[dict]:
    """A dictionary in which every key may be absent."""
    return st.fixed_dictionaries({}, optional=keys)


GRAFTING = st.one_of(
    st.none(),
    st.just({"type": "sgd"}),
    _options(epsilon=st.sampled_from([1e-10, 1e-3])).map(
        lambda x: {"type": "adagrad"} | x
    ),
    _options(
        beta2=st.sampled_from([0.9, 0.99, 1.0]),
        epsilon=st.sampled_from([1e-8, 1e-3]),
        drop_weighting_factor_on_gsquare=st.booleans(),
    ).flatmap(
        lambda x: st.sampled_from(["rmsprop", "adam"]).map(lambda t: {"type": t} | x)
    ),
)
AVERAGING = st.one_of(
    _options(
        momentum=st.sampled_from([0.5, 0.9]),
        dampening=st.sampled_from([0.0, 0.25]),
        use_nesterov=st.booleans(),
    ).map(lambda x: {"type": "classic_momentum"} | x),
    _options(
        eval_interp_coeff=st.sampled_from([0.0, 0.5, 0.9]),
        train_interp_coeff=st.sampled_from([0.3, 1.0]),
    ).map(lambda x: {"type": "generalized_primal_averaging"} | x),
    _options(
        train_interp_coeff=st.sampled_from([0.3, 1.0]),
        eval_coeff_lr_power=st.sampled_from([1.0, 2.0]),
    ).map(lambda x: {"type": "schedule_free"} | x),
)
# Exponents of whole roots, so that every matrix function can take them.
OVERRIDE = _options(
    **{
        "1": st.sampled_from([0.25, 0.5, {"0": 1.0}]),
        "2": st.sampled_from([0.5, {"0": 0.5, "1": 0.0}, {"1": 0.25}, 0.0]),
        "3": st.sampled_from([0.125, {"2": 0.0}]),
    }
)
FUNCTION = st.sampled_from(
    [
        {"type": "eigh_root"},
        {"type": "coupled_newton", "max_iterations": 200, "tolerance": 1e-10},
        {"type": "coupled_newton", "max_iterations": 3},
        {"type": "coupled_higher_order", "rel_epsilon": 1e-3, "abs_epsilon": 0.0},
        {
            "type": "coupled_higher_order",
            "rel_epsilon": 0.0,
            "abs_epsilon": 1e-2,
            "order": 4,
            "tolerance": 1e-12,
        },
        {
            "type": "eigh_root",
            "rank_deficient_stability": {
                "type": "pseudo_inverse",
                "rank_rtol": 1e-3,
                "rank_atol": 1e-4,
            },
        },
    ]
)


QR = _options(
    max_iterations=st.integers(1, 3), tolerance=st.sampled_from([0.0, 0.1])
).map(lambda x: {"type": "qr"} | x)
ORTHOGONALIZATION = st.one_of(
    _options(
        coefficients=st.just([2.0, -1.5, 0.5]),
        num_iterations=st.integers(1, 6),
        scale_by_dims=st.sampled_from(["one", "sqrt_max1_rows_over_cols"]),
    ).map(lambda x: {"type": "newton_schulz"} | x),
    _options(scale_by_nuclear_norm=st.booleans()).map(lambda x: {"type": "svd"} | x),
)


@st.composite
def _factored(draw: st.DrawFn) -> tuple[dict, dict, list[tuple[int, ...]]]:
    """Shampoo in all its forms: preconditioner, sizes and shapes."""
    form = draw(st.sampled_from(["root_inv", "eigendecomposed"]))
    function = draw(FUNCTION)
    if form == "eigendecomposed":
        function = {"type": "eigh"}
    preconditioner = {
        "type": form + draw(st.sampled_from(["", "", "_kl"])),
        "matrix_function": function,
        "inverse_exponent_override": draw(OVERRIDE),
    } | draw(
        _options(
            use_trace_scaling=st.booleans(),
            trace_scaling_exponent=st.sampled_from([0.25, 1.0]),
            drop_weighting_factor_on_gsquare=st.booleans(),
        )
    )
    sizes = _options(
        max_preconditioner_dim=st.sampled_from([3, 4, 10, "inf"]),
        target_parameter_dimensionality=st.sampled_from([1, 2, 3, "inf"]),
    )
    return preconditioner, draw(sizes), SHAPES


@st.composite
def _warm_started(draw: st.DrawFn) -> tuple[dict, dict, list[tuple[int, ...]]]:
    """SOAP, and roots of a basis that another one began.

    Where they are well posed: every factor has full rank at the first refresh. In a
    null space rounding chooses the basis, and the next one depends on it.
    """
    adaptive = st.just({"type": "eigh", "tolerance": 0.1})
    function = draw(st.one_of(st.just({"type": "eigh"}), adaptive, QR))
    kinds = ["eigenvalue_corrected", "eigendecomposed", "eigendecomposed_kl"]
    kind = draw(st.sampled_from(kinds))
    dropped = _options(drop_weighting_factor_on_gsquare=st.booleans())
    override, ignored = OVERRIDE, st.just({})
    if kind == "eigenvalue_corrected":
        powers = {"2": st.sampled_from([0.25, 1.0]), "3": st.just(0.75)}
        override = _options(**powers)
        ignored = _options(ignored_basis_change_dims=st.just({"2": [1]}))
    preconditioner = {
        "type": kind,
        "matrix_function": function,
        "inverse_exponent_override": draw(override),
    }
    sizes = {
        "max_preconditioner_dim": draw(st.sampled_from([3, "inf"])),
        "target_parameter_dimensionality": draw(st.sampled_from([2, "inf"])),
    }
    shapes = [(4, 3), (3, 5), (3,), (2, 3, 2)]
    return preconditioner | draw(dropped) | draw(ignored), sizes, shapes


@st.composite
def _stateless(draw: st.DrawFn) -> tuple[dict, dict, list[tuple[int, ...]]]:
    """Spectral descent on matrices, sign descent on anything."""
    if draw(st.booleans()):
        return {"type": "sign_descent"}, {"max_preconditioner_dim": 4}, SHAPES
    given = {"type": "spectral_descent"}
    given |= draw(_options(orthogonalization=ORTHOGONALIZATION))
    sizes = {"max_preconditioner_dim": "inf"}
    return given, sizes, [(5, 4), (2, 3, 2), (9, 2)]


@st.composite
def configurations(draw: st.DrawFn) -> dict:
    """One case: shapes and an optimizer's configuration."""
    kinds = st.sampled_from([_factored(), _factored(), _warm_started(), _stateless()])
    preconditioner, sizes, known = draw(draw(kinds))
    frequency = draw(st.integers(1, 3))
    late = known != SHAPES and "matrix_function" in preconditioner
    start = draw(st.sampled_from([4, 5] if late else [-1, frequency, frequency + 2]))
    config = {
        "lr": [0.0625, 0.125, 0.125, 0.0625, 0.0625, 0.03125, 0.03125][:STEPS],
        "precondition_frequency": frequency,
        "start_preconditioning_step": start,
        "betas": [
            draw(st.sampled_from([0.0, 0.5, 0.9])),
            draw(st.sampled_from([0.9, 0.99, 1.0])),
        ],
        "epsilon": draw(st.sampled_from([1e-2, 1e-4])),
        "grafting": draw(GRAFTING),
        "preconditioner": preconditioner,
    }
    config |= sizes | draw(
        _options(
            beta3=st.sampled_from([-1, 0.0, 0.7]),
            use_bias_correction=st.booleans(),
            weight_decay=st.sampled_from([0.0, 0.1]),
            weight_decay_type=st.sampled_from(
                ["l2", "decoupled", "corrected", "independent"]
            ),
            iterate_averaging=AVERAGING,
        )
    )
    function = preconditioner.get("matrix_function", {})
    if "rank_deficient_stability" in function:
        config["epsilon"] = 0.0
    shapes = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
    return {
        "params": {f"p{i}": shape for i, shape in enumerate(shapes)},
        "steps": STEPS,
        "optimizer": config,
        "peak_lr": 0.0625,
    }
