"""A state knows the exponents of its roots: carried, kept apart, saved, refused."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint import spec as specs
from tests import helpers
from tests.test_sharded import MODES

LAYOUT = so.BlockLayout(4)
THIRD = {2: 1 / 3}
REFRESH = so.Refresh(2)


def _params() -> dict[str, Any]:
    like = {"w": jnp.zeros((10, 6)), "bias": jnp.zeros(5), "k": jnp.zeros((3, 4))}
    return helpers.gradients(like, step=99)


def _tx(**options: Any) -> Any:
    return so.shampoo(1e-2, layout=LAYOUT, refresh=REFRESH, **options)


WRAPPED = {
    "chain": lambda o: optax.chain(optax.clip(1.0), _tx(**o)),
    "steps": lambda o: optax.MultiSteps(_tx(**o), 2).gradient_transformation(),
    "partition": lambda o: optax.partition(
        {"m": _tx(**o), "v": optax.adam(1e-3)}, {"w": "m", "bias": "v", "k": "v"}
    ),
    "inject": lambda o: optax.inject_hyperparams(
        so.shampoo, static_args=("layout", "refresh")
    )(learning_rate=1e-2, layout=LAYOUT, refresh=REFRESH, **o),
    "masked": lambda o: optax.masked(_tx(**o), {"w": True, "bias": True, "k": False}),
    "finite": lambda o: optax.apply_if_finite(_tx(**o), 3),
    "averaged": lambda o: so.primal_averaging(_tx(**o)),
}


def _kept(state: Any) -> list[Any]:
    def is_ours(node: Any) -> bool:
        return isinstance(node, so.KroneckerState)

    nodes = jax.tree.leaves(state, is_leaf=is_ours)
    return [node.exponents for node in nodes if is_ours(node)]


def _powers(marks: Any) -> Any:
    return {
        key: {dim: float(*by_power) for dim, by_power in by_dim.items()}
        for key, by_dim in marks.items()
    }


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (so.kronecker(), {"0": 1 / 4, "1": 1 / 4}),
        (so.kronecker(correction="kl"), {"0": 1 / 2, "1": 1 / 2}),
        (so.kronecker(exponents=THIRD), {"0": 1 / 3, "1": 1 / 3}),
        (so.kronecker(exponents={2: {1: 0}}), {"0": 1 / 4}),
        (so.kronecker(largest_factor=3), {"1": 1 / 2}),
    ],
)
def test_a_state_carries_them_without_arrays(make: Any, wanted: Any) -> None:
    stacks = {"4x3": jnp.zeros((2, 4, 3))}
    state = make.init(stacks)
    assert _powers(state.exponents) == {"4x3": wanted}
    assert not jax.tree.leaves(state.exponents)
    assert hash(jax.tree.structure(state)) == hash(jax.tree.structure(state))
    _, new = helpers.jit(make.update, donate_argnums=1)(stacks, state)
    assert new.exponents == state.exponents


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_keep_them(name: str) -> None:
    tx, params = WRAPPED[name]({"exponents": THIRD}), _params()
    state = tx.init(params)
    assert len(_kept(state)) == 1
    assert jax.tree.all(jax.tree.map(jnp.array_equal, state, state))
    update = helpers.jit(tx.update, donate_argnums=1)
    kept = _kept(state)
    for step in range(3):
        _, state = update(helpers.gradients(params, step), state, params)
    assert update._cache_size() == 1
    assert _kept(state) == kept
    # Optax's own walk over a state leaves them where they are.
    mapped = optax.tree.map_params(tx, lambda x: x * 2, state)
    assert jax.tree.structure(mapped) == jax.tree.structure(state)


@pytest.mark.parametrize("mode", ["fsdp8", "hsdp"])
def test_on_meshes(mode: str) -> None:
    mode = MODES[mode]
    layout = mode.layout()
    tx = so.scale_by_shampoo(layout=layout, refresh=REFRESH, exponents=THIRD)
    where = so.state_shardings(tx, mode.like(), layout)
    state = helpers.jit(tx.init, out_shardings=where)(mode.place(mode.like()))
    _, new = helpers.jit(tx.update)(mode.place(helpers.gradients(mode.like())), state)
    assert _kept(new) == _kept(state) == _kept(jax.eval_shape(tx.init, mode.like()))


def test_a_state_of_others_is_refused_and_one_that_says_none_is_not() -> None:
    params = _params()
    state = _tx().init(params)
    with pytest.raises(ValueError) as caught:
        _tx(exponents=THIRD).update(params, state, params)
    for words in ("kronecker.update", "0.25", "0.333", "refresh_now(tx, state"):
        assert words in str(caught.value)

    def silent(node: Any) -> Any:
        ours = isinstance(node, so.KroneckerState)
        return so.KroneckerState(*node[:5]) if ours else node

    def is_ours(node: Any) -> bool:
        return isinstance(node, so.KroneckerState)

    old = jax.tree.map(silent, state, is_leaf=is_ours)
    assert _kept(old) == [()]
    wanted, new = _tx().update(params, state, params)
    found, same = _tx().update(params, old, params)
    helpers.assert_equal(found, wanted)
    helpers.assert_equal(jax.tree.leaves(same), jax.tree.leaves(new))
    assert _kept(same) == [()]


@pytest.mark.parametrize("name", WRAPPED)
def test_refresh_now_goes_on_with_others(name: str) -> None:
    """The roots are those that the other optimizer makes of these factors."""
    params = _params()
    old, new = WRAPPED[name]({}), WRAPPED[name]({"exponents": THIRD})
    _, state = helpers.run(old, params, 8)
    found = so.refresh_now(new, state, params)
    assert _kept(found) == _kept(new.init(params))
    both = zip(_nodes(found), _nodes(state), strict=True)
    for its, before in both:
        helpers.assert_equal(its.factors, before.factors)
        for key, by_dim in its.roots.items():
            for dim, root in by_dim.items():
                # (A^(-1/3))^3 = (A^(-1/4))^4, up to damping and float32.
                was = np.asarray(before.roots[key][dim], np.float64)
                cubed = np.linalg.matrix_power(np.asarray(root, np.float64), 3)
                fourth = np.linalg.matrix_power(was, 4)
                scale = np.abs(fourth).max()
                np.testing.assert_allclose(cubed, fourth, atol=2e-2 * scale)
    helpers.jit(new.update)(params, found, params)


def _nodes(state: Any) -> list[so.KroneckerState]:
    def is_ours(node: Any) -> bool:
        return isinstance(node, so.KroneckerState)

    return [n for n in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(n)]


def _saved(folder: Path, tx: Any, layout: so.BlockLayout = LAYOUT) -> Any:
    params = _params()
    _, state = helpers.run(tx, params, 4)
    with checkpoint.manager(folder) as manager:
        checkpoint.save(manager, 4, params, state, layout)
    return state


def _open(folder: Path, tx: Any, **options: Any) -> Any:
    params, layout = _params(), options.pop("layout", LAYOUT)
    like = jax.eval_shape(tx.init, params)
    with checkpoint.manager(folder) as manager:
        return checkpoint.restore(manager, params, like, layout, **options)


def _spec(folder: Path) -> tuple[Path, dict[str, Any]]:
    (file,) = (folder / "4" / "spec").glob("metadata")
    return file, json.loads(file.read_text())


def test_the_spec_says_them(tmp_path: Path) -> None:
    _saved(tmp_path, _tx(exponents={2: {0: 1 / 3, 1: 0.5}}))
    said = _spec(tmp_path)[1]["exponents"]
    root = "blocks/inner/direction/roots"
    assert said["w"]["4x4"] == {f"{root}/0": 1 / 3, f"{root}/1": 0.5}
    assert said["k"]["3x4"] == {f"{root}/0": 1 / 3, f"{root}/1": 0.5}
    assert said.keys() == {"w", "k"}


OTHERS = {
    "exponents": partial(_tx, exponents=THIRD),
    "correction": lambda: so.kl_shampoo(1e-2, layout=LAYOUT, refresh=REFRESH),
}


@pytest.mark.parametrize("other", OTHERS)
def test_restore_refuses_others(other: str, tmp_path: Path) -> None:
    _saved(tmp_path, _tx())
    with pytest.raises(ValueError) as caught:
        _open(tmp_path, OTHERS[other]())
    assert not isinstance(caught.value, checkpoint.DamagedCheckpoint)
    power = "0.333" if other == "exponents" else "0.5"
    for words in ("checkpoint: ", "roots/0", "0.25", power, "reblock=tx"):
        assert words in str(caught.value)


def test_restore_makes_roots_anew_on_request(tmp_path: Path) -> None:
    state = _saved(tmp_path, _tx())
    tx = OTHERS["exponents"]()
    found = _open(tmp_path, tx, reblock=tx).state
    helpers.assert_equal(found, so.refresh_now(tx, state, _params()))
    # With the same exponents nothing is computed anew.
    helpers.assert_equal(_open(tmp_path, _tx(), reblock=_tx()).state, state)


def test_other_blocks_and_other_exponents(tmp_path: Path) -> None:
    _saved(tmp_path, _tx())
    layout = so.BlockLayout(2)
    tx = so.shampoo(1e-2, layout=layout, refresh=REFRESH, exponents=THIRD)
    found = _open(tmp_path, tx, layout=layout, reblock=tx).state
    assert _kept(found) == _kept(tx.init(_params()))


def test_fresh_parameters_bring_their_own(tmp_path: Path) -> None:
    _saved(tmp_path, _tx())
    tx, params = _tx(exponents=THIRD), _params()
    with checkpoint.manager(tmp_path) as manager:
        found = checkpoint.restore(
            manager, params, tx.init(params), LAYOUT, fresh="^w$|^k$"
        )
    assert found.step == 4


def test_specs_that_say_none_are_not_checked(tmp_path: Path) -> None:
    state = _saved(tmp_path, _tx())
    file, said = _spec(tmp_path)
    del said["exponents"]
    rest = {k: v for k, v in said.items() if k != "checksum"}
    file.write_text(json.dumps({**rest, "checksum": specs._checksum(rest)}))
    helpers.assert_equal(_open(tmp_path, _tx()).state, state)
    assert _open(tmp_path, OTHERS["exponents"]()).step == 4


BROKEN = [3, {"w": 0.25}, {"w": {"4x4": [0.25]}}, {"w": {"4x4": {"roots/0": "x"}}}]


@pytest.mark.parametrize("wrong", BROKEN)
def test_exponents_that_are_none_are_damage(wrong: Any, tmp_path: Path) -> None:
    _saved(tmp_path, _tx())
    file, said = _spec(tmp_path)
    rest = {k: v for k, v in said.items() if k != "checksum"} | {"exponents": wrong}
    file.write_text(json.dumps({**rest, "checksum": specs._checksum(rest)}))
    with pytest.raises(checkpoint.DamagedCheckpoint, match="lacks what save writes"):
        _open(tmp_path, _tx())


def test_plain_orbax_and_flax_take_the_raw_state(tmp_path: Path) -> None:
    tx, params = _tx(exponents=THIRD), _params()
    _, state = helpers.run(tx, params, 3)
    like = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
    with ocp.CheckpointManager(tmp_path / "raw") as manager:
        manager.save(1, args=ocp.args.StandardSave(state))
        manager.wait_until_finished()
        found = manager.restore(1, args=ocp.args.StandardRestore(like))
        # It compares names, and names tell other exponents apart.
        other = jax.eval_shape(_tx().init, params)
        with pytest.raises(ValueError, match="do not match"):
            manager.restore(1, args=ocp.args.StandardRestore(other))
    helpers.assert_equal(found, state)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    content = flax.serialization.to_bytes(state)
    back = flax.serialization.from_bytes(state, content)
    helpers.assert_equal(back, state)
    assert jax.tree.structure(back) == jax.tree.structure(state)
