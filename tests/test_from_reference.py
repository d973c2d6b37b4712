"""The reference system's state, exported as arrays, goes on as it would have there."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import optax
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from tests import reference
from tests.parity import build
from tests.test_parity import GOLDEN

BEFORE = 5  # steps there, of 12; the others here
CASES = [
    "o02_graft_sgd",
    "o03_graft_adagrad_freq3",
    "o05_graft_adam_blocks",
    "o08_classic_momentum",
    "o13_soap_eigh",
]


def _packed(matrix: np.ndarray) -> np.ndarray:
    return matrix[np.triu_indices(len(matrix))]


def _exported(block: reference.Block, *, packed: bool) -> dict[str, Any]:
    """A block as the reference's ``state_dict`` has it."""
    pack = _packed if packed else np.array
    shampoo: dict[str, Any] = {
        "factor_matrices": {k: pack(a) for k, a in block.factors.items()}
    }
    if block.kind == "eigenvalue_corrected":
        shampoo["factor_matrices_eigenvectors"] = dict(block.bases)
        shampoo["corrected_eigenvalues"] = block.second
    else:
        roots = {str(k): pack(r) for k, r in block.roots.items()}
        shampoo["inv_factor_matrices"] = roots
    return {
        "shampoo": shampoo,
        "filtered_grad": block.mu,
        "momentum_buffer": block.momentum,
        "adagrad": block.nu,
    }


def _there(case: Any, data: Any, *, packed: bool) -> tuple[Any, Any]:
    """Parameters and exported state after some steps."""
    config, params, arrays = case["optimizer"], {}, {}
    for name in case["params"]:
        param = np.array(data[f"init/{name}"], np.float64)
        dims = reference.merge_dims(param.shape, config)
        where = reference.block_slices(dims, config)
        blocks = [
            reference.Block(config, case["peak_lr"], param.reshape(dims)[w])
            for w in where
        ]
        for t in range(1, BEFORE + 1):
            grad = np.asarray(data[f"grad/{name}"][t - 1], np.float64).reshape(dims)
            new = param.reshape(dims).copy()
            for block, w in zip(blocks, where, strict=True):
                new[w] = block.step(t, new[w], grad[w])
            param = new.reshape(param.shape)
        params[name] = param
        arrays[name] = {"step": np.asarray(BEFORE)} | {
            f"rank_0-block_{i}": _exported(block, packed=packed)
            for i, block in enumerate(blocks)
        }
    return params, arrays


def _layout(config: Any) -> so.BlockLayout:
    size = config.get("max_preconditioner_dim", 1024)
    target = config.get("target_parameter_dimensionality", 1)
    return so.BlockLayout(
        np.inf if size == "inf" else size,
        target_parameter_dimensionality=np.inf if target == "inf" else target,
        precondition_vectors=True,
    )


def _case(name: str) -> tuple[Any, Any]:
    case = json.loads((GOLDEN / f"{name}.json").read_text())
    return case, np.load(GOLDEN / f"{name}.npz")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_goes_on_where_the_reference_was(name: str, packed: bool) -> None:
    case, data = _case(name)
    with jax.enable_x64(True):
        params, arrays = _there(case, data, packed=packed)
        params = jax.tree.map(jax.numpy.asarray, params)
        tx, _ = build(case)
        layout = _layout(case["optimizer"])
        shapes = jax.eval_shape(tx.init, params)
        state = checkpoint.from_reference(arrays, shapes, params, layout)
        update = jax.jit(tx.update)
        for t in range(BEFORE, case["steps"]):
            grads = {p: jax.numpy.asarray(data[f"grad/{p}"][t], float) for p in params}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
            for p, found in params.items():
                wanted = data[f"params/{p}"][t]
                assert np.abs(np.asarray(found) - wanted).max() <= case["tol"], t


def test_what_is_missing_is_said() -> None:
    case, data = _case("o05_graft_adam_blocks")
    with jax.enable_x64(True):
        params, arrays = _there(case, data, packed=False)
        tx, _ = build(case)
        layout = _layout(case["optimizer"])
        shapes = jax.eval_shape(tx.init, params)
        name = next(iter(arrays))

        def refused(changed: Any, like: Any = shapes, by: Any = layout) -> str:
            with pytest.raises(ValueError) as caught:
                checkpoint.from_reference(changed, like, params, by)
            return str(caught.value)

        assert "there is no state of parameter" in refused({"x": arrays[name]})
        later = {**arrays, name: {**arrays[name], "step": 9}}
        if len(arrays) > 1:
            assert "at the steps [5, 9]" in refused(later)
        fewer = {k: v for k, v in arrays[name].items() if k != "rank_0-block_0"}
        assert "has the blocks" in refused({**arrays, name: fewer})
        block = {**arrays[name]["rank_0-block_0"]}
        block.pop("filtered_grad")
        poor = {**arrays[name], "rank_0-block_0": block}
        assert "has no filtered_grad" in refused({**arrays, name: poor})
        soap = so.blockwise(so.eigenbasis(), layout)
        said = refused(arrays, jax.eval_shape(soap.init, params))
        assert "factor_matrices_eigenvectors" in said
