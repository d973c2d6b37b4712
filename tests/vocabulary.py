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
AVERAGING = _options(
    momentum=st.sampled_from([0.5, 0.9]),
    dampening=st.sampled_from([0.0, 0.25]),
    use_nesterov=st.booleans(),
).map(lambda x: {"type": "classic_momentum"} | x)
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


@st.composite
def configurations(draw: st.DrawFn) -> dict:
    """One case: shapes and an optimizer's configuration."""
    frequency = draw(st.integers(1, 3))
    start = draw(st.sampled_from([-1, frequency, frequency + 2]))
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
    }
    config |= draw(
        _options(
            beta3=st.sampled_from([-1, 0.0, 0.7]),
            max_preconditioner_dim=st.sampled_from([3, 4, 10, "inf"]),
            target_parameter_dimensionality=st.sampled_from([1, 2, 3, "inf"]),
            use_bias_correction=st.booleans(),
            weight_decay=st.sampled_from([0.0, 0.1]),
            weight_decay_type=st.sampled_from(
                ["l2", "decoupled", "corrected", "independent"]
            ),
            iterate_averaging=AVERAGING,
        )
    )
    function = draw(FUNCTION)
    if "rank_deficient_stability" in function:
        config["epsilon"] = 0.0
    config["preconditioner"] = {
        "type": "root_inv",
        "matrix_function": function,
        "inverse_exponent_override": draw(OVERRIDE),
    }
    shapes = draw(
        st.lists(st.sampled_from(SHAPES), min_size=1, max_size=3, unique=True)
    )
    return {
        "params": {f"p{i}": shape for i, shape in enumerate(shapes)},
        "steps": STEPS,
        "optimizer": config,
        "peak_lr": 0.0625,
    }
