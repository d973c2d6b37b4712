"""Another block size: what is exact, what is refused, and roots computed anew."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint.reblock import recut
from shampoo_optax.linalg import packing
from tests import helpers
from tests.test_sharded import MODES

STEPS = 4
LIKE = {"tall": jnp.zeros((16, 4)), "both": jnp.zeros((16, 10)), "b": jnp.zeros(3)}


def _shampoo(layout: so.BlockLayout, **options: Any) -> Any:
    options = {"b2": 0.9, "refresh": so.Refresh(2), **options}
    return so.scale_by_shampoo(layout=layout, **options)


def _run(make: Any, size: int, like: Any = LIKE, **options: Any) -> Any:
    """The state after some steps of one stream of gradients."""
    layout = so.BlockLayout(size)
    return helpers.run(make(layout, **options), like, STEPS)[1]


def _reopened(
    folder: Path, old: int, new: so.BlockLayout, make: Any, **how: Any
) -> Any:
    params, tx = how.pop("params", LIKE), make(new)
    with checkpoint.manager(folder / "run") as manager:
        if not manager.all_steps():
            layout = so.BlockLayout(old)
            state = _run(make, old)
            checkpoint.save(manager, STEPS, LIKE, state, layout)
            manager.wait_until_finished()
        like = jax.eval_shape(tx.init, params)
        return checkpoint.restore(manager, params, like, new, **{"reblock": tx, **how})


def _slots(state: Any, size: int) -> Any:
    return checkpoint.to_param_view(state, LIKE, so.BlockLayout(size))["parameters"]


FACTOR, ROOT = "blocks/inner/direction/factors", "blocks/inner/direction/roots"


@pytest.mark.parametrize(("old", "new"), [(8, 4), (4, 8), (8, 2), (4, 16), (5, 10)])
def test_moments_are_those_of_the_other_block_size(
    tmp_path: Path, old: int, new: int
) -> None:
    found = _reopened(tmp_path, old, so.BlockLayout(new), _shampoo).state
    there, here = _slots(_run(_shampoo, new), new), _slots(found, new)
    assert jax.tree.structure(there) == jax.tree.structure(here)
    for name, blocks in there.items():
        for block, slots in blocks.items():
            for slot in ("blocks/mu", "blocks/inner/magnitude/nu"):
                if block != "whole":
                    helpers.assert_equal(here[name][block][slot], slots[slot])
    helpers.assert_equal(here["b"], there["b"])


def test_factors_are_exact_where_the_other_side_is_whole(tmp_path: Path) -> None:
    """Halves of a block along one side, and back: literal figures of both runs."""
    wanted = _slots(_run(_shampoo, 4), 4)["tall"]["4x4"]
    split = _slots(_reopened(tmp_path / "a", 8, so.BlockLayout(4), _shampoo).state, 4)
    split = split["tall"]["4x4"]
    close = dict(rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(split[f"{FACTOR}/0"], wanted[f"{FACTOR}/0"], **close)
    traces = [np.trace(x[f"{FACTOR}/1"], axis1=1, axis2=2) for x in (split, wanted)]
    np.testing.assert_allclose(*traces, rtol=1e-5)

    wanted = _slots(_run(_shampoo, 8), 8)["tall"]["8x4"]
    joined = _slots(_reopened(tmp_path / "b", 4, so.BlockLayout(8), _shampoo).state, 8)
    joined = joined["tall"]["8x4"]
    np.testing.assert_allclose(joined[f"{FACTOR}/1"], wanted[f"{FACTOR}/1"], **close)
    known = np.kron(np.eye(2), np.ones((4, 4)))  # within the blocks that there were
    pinched = np.asarray(wanted[f"{FACTOR}/0"]) * known
    np.testing.assert_allclose(joined[f"{FACTOR}/0"], pinched, **close)


def test_traces_where_both_sides_are_cut(tmp_path: Path) -> None:
    found = _reopened(tmp_path, 8, so.BlockLayout(4), _shampoo).state
    old = _slots(_run(_shampoo, 8), 8)["both"]["8x8"]
    new = _slots(found, 4)["both"]["4x4"]
    for dim in (0, 1):
        total = [np.trace(x[f"{FACTOR}/{dim}"], axis1=1, axis2=2) for x in (old, new)]
        # The columns 0 to 7 of 8x8 blocks are two of 4x4, in each of four rows.
        np.testing.assert_allclose(total[0], total[1].reshape(2, 4).sum(1), rtol=1e-5)


def test_packed_factors_are_cut_as_others(tmp_path: Path) -> None:
    packed = partial(_shampoo, state_dtypes=so.StateDtypes(packed=True))
    plain = _slots(_reopened(tmp_path / "a", 8, so.BlockLayout(4), _shampoo).state, 4)
    found = _slots(_reopened(tmp_path / "b", 8, so.BlockLayout(4), packed).state, 4)
    for name in ("tall", "both"):
        for slot in (FACTOR, ROOT):
            one, two = (view[name]["4x4"][f"{slot}/0"] for view in (found, plain))
            assert one.shape[1:] == (5, 2)
            np.testing.assert_allclose(packing.unpack(one), two, rtol=1e-5)


def test_roots_are_those_of_the_factors(tmp_path: Path) -> None:
    found = _slots(_reopened(tmp_path, 8, so.BlockLayout(4), _shampoo).state, 4)
    for name in ("tall", "both"):
        for dim in (0, 1):
            slots = found[name]["4x4"]
            factors = np.asarray(slots[f"{FACTOR}/{dim}"], np.float64)
            values, vectors = np.linalg.eigh(factors / (1 - 0.9**STEPS))
            values = values + 1e-6 * values.max(1, keepdims=True)
            wanted = vectors * values[:, None] ** -0.25 @ vectors.swapaxes(1, 2)
            np.testing.assert_allclose(slots[f"{ROOT}/{dim}"], wanted, rtol=2e-3)


def test_it_goes_on_on_a_mesh(tmp_path: Path) -> None:
    mode = MODES["fsdp8"]
    like, params = mode.like(), mode.place(mode.like())
    layout, old = mode.layout(), so.BlockLayout(4)
    state = _run(_shampoo, 4, like)
    with checkpoint.manager(tmp_path / "run") as manager:
        checkpoint.save(manager, STEPS, like, state, old)
        manager.wait_until_finished()
        opened = []
        for where, placed in ((so.BlockLayout(8), like), (layout, params)):
            tx = _shampoo(where)
            abstract = jax.eval_shape(tx.init, placed)
            found = checkpoint.restore(manager, placed, abstract, where, reblock=tx)
            opened.append(checkpoint.to_param_view(found.state, placed, where))
    one, many = (jax.tree.map(np.asarray, view) for view in opened)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-6), one, many
    )
    where = so.state_shardings(tx, params, layout)
    for leaf, its in zip(
        jax.tree.leaves(found.state), jax.tree.leaves(where), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(its, leaf.ndim)


def test_the_same_blocks_are_as_they_were(tmp_path: Path) -> None:
    found = _reopened(tmp_path, 4, so.BlockLayout(4), _shampoo)
    helpers.assert_equal(found.state, _run(_shampoo, 4))


def test_what_cannot_be_cut_is_refused(tmp_path: Path) -> None:
    def refused(said: str, *args: Any, **how: Any) -> None:
        with pytest.raises(ValueError, match=said):
            _reopened(*args, **how)

    four = so.BlockLayout(4)
    refused("restore\\(..., reblock=tx\\)", tmp_path, 8, four, _shampoo, reblock=None)
    six = so.BlockLayout(6)
    refused("begin at .* so that blocks nest", tmp_path, 8, six, _shampoo)
    soap = lambda layout, **_: so.scale_by_soap(layout=layout)  # noqa: E731
    refused("cannot be cut into", tmp_path / "soap", 8, four, soap)
    skipped = so.BlockLayout(4, skip="tall")
    refused("'tall' is there in blocks of '8x4'", tmp_path, 8, skipped, _shampoo)
    vectors = so.BlockLayout(4, precondition_vectors=True)
    refused("'b' is there in blocks of 'whole'", tmp_path, 8, vectors, _shampoo)
    with pytest.raises(ValueError, match="blocked in one layout and not in the other"):
        recut({"b": {"3": {}}}, vectors, four, LIKE)


def _hyper(layout: so.BlockLayout) -> Any:
    static = ("layout", "refresh")
    make = optax.inject_hyperparams(so.shampoo, static_args=static)
    return make(1e-2, b2=0.9, layout=layout, refresh=so.Refresh(2))


WRAPPED = {
    "chain": lambda layout: optax.chain(optax.clip(1.0), _shampoo(layout)),
    "steps": lambda layout: optax.MultiSteps(_shampoo(layout), 3),
    "hyperparameters": _hyper,
    "staggered": lambda layout: _shampoo(layout, refresh=so.Refresh(2, staggered=True)),
    "deterministic": lambda layout: _shampoo(
        so.BlockLayout(layout.max_preconditioner_dim, deterministic=True)
    ),
    "sparse": lambda layout: _shampoo(
        layout, refresh=so.Refresh(2, statistics_frequency=2)
    ),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_only_roots_change(name: str) -> None:
    tx = WRAPPED[name](so.BlockLayout(4))
    state = helpers.run(tx, LIKE, 7)[1]
    spoilt = jax.tree_util.tree_map_with_path(
        lambda path, x: x * 2 if "roots" in jax.tree_util.keystr(path) else x, state
    )
    found = so.refresh_now(tx, spoilt, LIKE)
    assert not helpers.type_changes(state, found)
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(spoilt),
        strict=True,
    )
    for (path, new), old in pairs:
        root = "roots" in jax.tree_util.keystr(path)
        assert bool(jnp.array_equal(new, old)) != root, path


def test_roots_do_not_begin_early_and_need_factors() -> None:
    tx = _shampoo(so.BlockLayout(4), refresh=so.Refresh(2, 100))
    state = helpers.run(tx, LIKE, 3)[1]
    helpers.assert_equal(so.refresh_now(tx, state, LIKE), state)
    adam = optax.adam(1e-3)
    with pytest.raises(ValueError, match="there are no inverse roots in it"):
        so.refresh_now(adam, adam.init(LIKE), LIKE)
