"""The parameter view: one state on every mesh, through every wrapper."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shampoo_optax as so
from shampoo_optax.checkpoint import (
    abstract_view,
    digest,
    from_param_view,
    to_param_view,
)
from shampoo_optax.checkpoint.digest import digests as digests_of
from shampoo_optax.checkpoint.view import state_by, view_by
from shampoo_optax.checkpoint.ways import way_of
from shampoo_optax.scale_by import UNCUT
from tests import helpers
from tests.test_sharded import BLOCK, EXPLICIT, MERGED, MODES

LAYOUT = so.BlockLayout(4, batch_axes=lambda name, _: int(name == "scan"))
LEAN = so.StateDtypes(factors=jnp.bfloat16, roots=jnp.bfloat16, packed=True)
ALIASES = {
    "shampoo": so.scale_by_shampoo,
    "soap": so.scale_by_soap,
    "lean": partial(so.scale_by_shampoo, state_dtypes=LEAN),
}


def _params() -> dict[str, Any]:
    like = {
        "w": jnp.zeros((10, 6)),
        "b": jnp.zeros(5),
        "scan": jnp.zeros((2, 6, 3)),
        "a.b": {"..": jnp.zeros((4, 4))},
        "none": jnp.zeros((0, 4)),
    }
    return helpers.gradients(like, step=99)


def _labels(params: Any) -> Any:
    return jax.tree.map(lambda p: "m" if p.ndim > 1 and p.size != 60 else "v", params)


WRAPPED = {
    "plain": lambda: so.shampoo(1e-2, layout=LAYOUT, refresh=so.Refresh(2)),
    "chain": lambda: optax.chain(
        optax.clip(1.0), so.soap(optax.constant_schedule(1e-2), layout=LAYOUT)
    ),
    "steps": lambda: optax.MultiSteps(so.shampoo(1e-2, layout=LAYOUT, momentum=0.9), 2),
    "partition": lambda: optax.partition(
        {"m": so.kl_shampoo(1e-2, layout=LAYOUT), "v": optax.adam(1e-3)}, _labels
    ),
    "inject": lambda: optax.inject_hyperparams(so.shampoo, static_args=("layout",))(
        learning_rate=optax.constant_schedule(0.1), layout=LAYOUT
    ),
    "masked": lambda: optax.masked(
        so.soap(1e-2, layout=LAYOUT),
        lambda tree: jax.tree.map(lambda p: p.size != 60, tree),
    ),
    "twice": lambda: optax.chain(
        so.blockwise(so.kronecker(), LAYOUT), so.blockwise(so.kronecker(), LAYOUT)
    ),
    "spectral": lambda: so.spectral_descent(1e-2),
    "averaged": lambda: so.primal_averaging(so.shampoo(1e-2, layout=LAYOUT)),
}


def _layout(name: str) -> so.BlockLayout:
    return UNCUT if name == "spectral" else LAYOUT


@pytest.mark.parametrize("name", WRAPPED)
def test_there_and_back(name: str) -> None:
    tx, params, layout = WRAPPED[name](), _params(), _layout(name)
    _, state = helpers.run(tx, params, 3, eager=True)
    view = to_param_view(state, params, layout)
    like = jax.eval_shape(tx.init, params)
    wanted = abstract_view(like, params, layout)
    assert jax.tree.structure(wanted) == jax.tree.structure(view)
    for leaf, its in zip(jax.tree.leaves(view), jax.tree.leaves(wanted), strict=True):
        assert leaf.shape == its.shape and leaf.dtype == its.dtype and leaf.size > 0
    for key in jax.tree_util.tree_leaves_with_path(view):
        assert not any("." in str(step.key) for step in key[0])
    helpers.assert_equal(from_param_view(view, like, params, layout), state)


def test_a_transformation_without_state_changes_no_name() -> None:
    params = _params()
    bare, clipped = WRAPPED["plain"](), optax.chain(optax.clip(1.0), WRAPPED["plain"]())
    views = [to_param_view(t.init(params), params, LAYOUT) for t in (bare, clipped)]
    assert jax.tree.structure(views[0]) == jax.tree.structure(views[1])


def _folded_blocks(array: np.ndarray, block: int) -> dict[str, list[np.ndarray]]:
    """Blocks of a matrix by shape, row by row: literal."""
    found: dict[str, list[np.ndarray]] = {}
    for i in range(0, array.shape[0], block):
        for j in range(0, array.shape[1], block):
            piece = array[i : i + block, j : j + block]
            found.setdefault("x".join(map(str, piece.shape)), []).append(piece)
    return found


FLAT = {name: mode for name, mode in MODES.items() if name != "conv"}


@pytest.mark.parametrize("mode", FLAT.values(), ids=FLAT)
def test_blocks_are_the_parameters_own(mode: Any) -> None:
    """AdaGrad's first moment is the gradient's square: where it lies is seen in it."""
    like = {name: leaf for name, leaf in mode.like().items() if leaf.ndim == 2}
    layout = mode.layout()
    tx = so.blockwise(so.grafting.adagrad(), layout)
    where = so.state_shardings(tx, like, layout)
    state = helpers.jit(tx.init, out_shardings=where)(like)
    gradients = helpers.gradients(like)
    _, state = helpers.jit(tx.update)(mode.place(gradients), state)
    view = to_param_view(state, like, layout)["parameters"]
    for name, gradient in gradients.items():
        wanted = _folded_blocks(np.asarray(gradient) ** 2, BLOCK)
        assert view[name].keys() == wanted.keys()
        for block, pieces in wanted.items():
            found = view[name][block]["blocks/nu"]
            np.testing.assert_allclose(found, np.stack(pieces), rtol=1e-6)


# Every way to lie, and with SOAP's other state one of each kind.
PLACES = [("shampoo", name) for name in MODES]
PLACES += [("lean", name) for name in ("fsdp3", "merged")]
PLACES += [("soap", name) for name in ("fsdp8", "zero13", "hsdp", "tensor", "conv")]


OPTIONS = {"refresh": so.Refresh(5, 5), "b2": 0.9}


@functools.cache
def _alone(alias: str, shapes: tuple[Any, ...]) -> tuple[Any, Any]:
    """One device's state after five steps, and its next updates."""
    like, layout = {n: jnp.zeros(shape) for n, shape in shapes}, so.BlockLayout(BLOCK)
    tx = ALIASES[alias](layout=layout, **OPTIONS)
    state, update = tx.init(like), helpers.jit(tx.update)
    for step in range(5):
        _, state = update(helpers.gradients(like, step), state, like)
    wanted, _ = update(helpers.gradients(like, 77), state, like)
    return to_param_view(state, like, layout), wanted


@pytest.mark.parametrize(("alias", "mode"), PLACES)
def test_opens_on_any_mesh(alias: Any, mode: Any) -> None:
    """One device's state goes on on many as it would have on one, and comes back."""
    mode = {**MODES, "merged": MERGED}[mode]
    view, wanted = _alone(alias, tuple(mode.shapes.items()))
    like, layout = mode.like(), mode.layout()
    many = ALIASES[alias](layout=layout, **OPTIONS)
    placed = mode.place(like)
    abstract = jax.eval_shape(many.init, placed)
    opened = from_param_view(view, abstract, placed, layout)
    where = so.state_shardings(many, like, layout)
    for leaf, its in zip(jax.tree.leaves(opened), jax.tree.leaves(where), strict=True):
        assert leaf.sharding.is_equivalent_to(its, leaf.ndim)
    again = to_param_view(opened, placed, layout)
    helpers.assert_equal(
        jax.tree.map(np.asarray, again), jax.tree.map(np.asarray, view)
    )
    _same_through_the_host(opened, view, placed, layout)
    gradients = mode.place(helpers.gradients(like, 77))
    found, _ = helpers.jit(many.update)(gradients, opened, placed)
    worst = 0.0
    for name, update in wanted.items():
        scale = max(float(jnp.abs(update).max()), 1e-30)
        apart = float(np.abs(np.asarray(found[name]) - update).max())
        assert apart <= 5e-6 * scale
        worst = max(worst, apart / scale)
    helpers.record("mesh", f"{worst:.2g}")


NARROWED = {
    "exponents": partial(so.scale_by_shampoo, exponents={2: {0: 0.5, 1: 0.25}}, b2=0.9),
    "spectral": so.scale_by_spectral_descent,
}


@pytest.mark.parametrize("alias", NARROWED)
@pytest.mark.parametrize("mode", [MODES["fsdp8"], MERGED], ids=["fsdp8", "merged"])
def test_aliases_that_narrow_the_layout_are_found(alias: str, mode: Any) -> None:
    make, like, alone = NARROWED[alias], mode.like(), so.BlockLayout(BLOCK)
    _, state = helpers.run(make(layout=alone), like, 3)
    view = to_param_view(state, like, alone)
    layout = mode.layout()
    many, placed = make(layout=layout), mode.place(like)
    abstract = jax.eval_shape(many.init, placed)
    opened = from_param_view(view, abstract, placed, layout)
    again = to_param_view(opened, placed, layout)
    helpers.assert_equal(*(jax.tree.map(np.asarray, v) for v in (again, view)))
    _same_through_the_host(opened, view, placed, layout)


def _same_through_the_host(
    state: Any, view: Any, params: Any, layout: so.BlockLayout
) -> None:
    """What one process does without its devices is what they do."""
    way = way_of(layout)
    through = view_by(way.take, state, params, layout)
    helpers.assert_equal(*(jax.tree.map(np.asarray, v) for v in (through, view)))
    digests = jax.tree.map(lambda leaf: int(digest(leaf)), view)
    assert jax.tree.leaves(digests) == digests_of(through)
    back = state_by(way.give, through, state, params, layout)
    helpers.assert_equal(*(jax.tree.map(np.asarray, s) for s in (back, state)))
    assert not helpers.type_changes(back, state)


@pytest.mark.parametrize("name", ["fsdp8", "hsdp"])
def test_explicit_axes(name: str) -> None:
    mode = MODES[name]
    layout = so.BlockLayout(BLOCK, mesh=mode.mesh(EXPLICIT), block_axes=mode.block_axes)
    params = mode.place(mode.like(), EXPLICIT)
    tx = so.scale_by_shampoo(layout=layout, refresh=so.Refresh(2))
    where = so.state_shardings(tx, params, layout)
    state = helpers.jit(tx.init, out_shardings=where)(params)
    for step in range(2):
        gradients = mode.place(helpers.gradients(mode.like(), step), EXPLICIT)
        _, state = helpers.jit(tx.update)(gradients, state, params)
    view = to_param_view(state, params, layout)
    opened = from_param_view(view, jax.eval_shape(tx.init, params), params, layout)
    assert not helpers.type_changes(state, opened)
    # What fills a block up to its stack's shape is not saved, and moves nothing.
    views = view, to_param_view(opened, params, layout)
    helpers.assert_equal(*(jax.tree.map(np.asarray, v) for v in views))
    pairs = [helpers.jit(tx.update)(gradients, s, params)[0] for s in (state, opened)]
    helpers.assert_equal(*(jax.tree.map(np.asarray, p) for p in pairs))


def test_no_device_holds_more_than_its_share() -> None:
    mode = MODES["fsdp8"]
    layout = mode.layout()
    tx = so.scale_by_shampoo(layout=layout)
    where = so.state_shardings(tx, mode.like(), layout)
    state = helpers.jit(tx.init, out_shardings=where)(mode.place(mode.like()))
    view = to_param_view(state, mode.place(mode.like()), layout)
    slots = view["parameters"]["rows"]["8x8"]
    for slot in ("blocks/inner/direction/factors/0", "blocks/mu"):
        assert len(slots[slot].addressable_shards) == 8
        assert slots[slot].addressable_shards[0].data.size * 8 == slots[slot].size


class _Twins:
    """A container that names two children alike, as a bad node of a framework may."""

    def __init__(self, *children: Any) -> None:
        self.children = children


jax.tree_util.register_pytree_with_keys(
    _Twins,
    lambda t: ([(jax.tree_util.SequenceKey(0), c) for c in t.children], None),
    lambda _, children: _Twins(*children),
)


BROKEN = {
    "other optimizer": (
        lambda v: v,
        so.soap(1e-2, layout=LAYOUT),
        LAYOUT,
        "it holds Shampoo's inverse roots, and this optimizer wants SOAP's eigenbases",
    ),
    "other block size": (
        lambda v: v,
        so.shampoo(1e-2, layout=so.BlockLayout(8, batch_axes=LAYOUT.batch_axes)),
        so.BlockLayout(8, batch_axes=LAYOUT.batch_axes),
        "parameter 'w' is there in blocks of",
    ),
    "missing parameter": (
        lambda v: v["parameters"].pop("w") and v,
        so.shampoo(1e-2, layout=LAYOUT),
        LAYOUT,
        "parameter 'w' is wanted and not there",
    ),
    "more than asked": (
        lambda v: v["shared"].update(other=jnp.zeros(())) or v,
        so.shampoo(1e-2, layout=LAYOUT),
        LAYOUT,
        "shared state 'other' is there and nothing asks for it",
    ),
    "dtype": (
        lambda v: v["shared"].update({"blocks/count": jnp.zeros(())}) or v,
        so.shampoo(1e-2, layout=LAYOUT),
        LAYOUT,
        "'blocks/count' is float32 there; wanted int32",
    ),
    "shape": (
        lambda v: v["shared"].update({"blocks/count": jnp.zeros(1, int)}) or v,
        so.shampoo(1e-2, layout=LAYOUT),
        LAYOUT,
        "'blocks/count' has shape (1,) there; wanted ()",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_said(case: str) -> None:
    change, tx, layout, sentence = BROKEN[case]
    params = _params()
    state = so.shampoo(1e-2, layout=LAYOUT).init(params)
    view = change(to_param_view(state, params, LAYOUT))
    with pytest.raises(ValueError) as caught:
        from_param_view(view, jax.eval_shape(tx.init, params), params, layout)
    assert sentence in str(caught.value)


def test_wrong_layouts_and_parameters_are_said() -> None:
    params = _params()
    state = so.shampoo(1e-2, layout=LAYOUT).init(params)
    with pytest.raises(ValueError, match="the state has stacks"):
        to_param_view(state, params, so.BlockLayout(8))
    with pytest.raises(ValueError, match=r"blocks of 'a\.b/\.\.', and there"):
        to_param_view(state, {"b": params["b"]}, LAYOUT)
    twins = {"a": _Twins(params["w"], params["w"])}
    with pytest.raises(ValueError, match="two parameters have the path 'a/0'"):
        to_param_view((), twins, LAYOUT)
