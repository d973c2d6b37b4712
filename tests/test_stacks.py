"""Stacks in a checkpoint: what the table says of their rows is the parameter view."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import shampoo_optax as so
from shampoo_optax import checkpoint
from shampoo_optax.checkpoint import moves, stacks
from shampoo_optax.checkpoint.entries import entries_of
from shampoo_optax.checkpoint.view import home_of
from shampoo_optax.checkpoint.ways import ON_HOST
from tests import helpers
from tests import test_view as views
from tests.test_sharded import BLOCK, MERGED, MODES


def _through_the_table(state: Any, params: Any, layout: so.BlockLayout) -> Any:
    """Parts of all stacks, on the host, by what a file would say of them."""
    entries = entries_of(state, params, layout)
    table = json.loads(json.dumps(stacks.table_of(entries)))
    arrays = stacks.by_leaf(entries, jax.tree.leaves(state))
    assert sum(map(len, arrays.values())) == sum(
        isinstance(entry, stacks.Cut) for entry in entries
    )
    said = stacks.entries_said(table, arrays)
    found: dict[str, Any] = {}
    for key, leaves in arrays.items():
        for leaf, stack in leaves.items():
            parts = ON_HOST.read(said[key][leaf], np.asarray(stack))
            stacks.put_parts(found, said[key][leaf], parts)
    for entry in entries:  # and what it says of the leaf itself
        if isinstance(entry, stacks.Cut):
            assert stacks.same_rows(entry, said[entry.key][stacks.leaf_name(entry)])
    return found


def _blocks(view: Any) -> Any:
    parameters = {
        name: {block: slots for block, slots in blocks.items() if block != "whole"}
        for name, blocks in view["parameters"].items()
    }
    return {name: blocks for name, blocks in parameters.items() if blocks}


@pytest.mark.parametrize("name", views.WRAPPED)
def test_the_table_is_the_view(name: str) -> None:
    tx, params, layout = views.WRAPPED[name](), views._params(), views._layout(name)
    state = helpers.gradients(tx.init(params))
    found = _through_the_table(state, params, layout)
    wanted = _blocks(checkpoint.to_param_view(state, params, layout))
    helpers.assert_equal(found, wanted)


@pytest.mark.parametrize("name", [*MODES, "merged"])
def test_on_meshes(name: str) -> None:
    mode = {**MODES, "merged": MERGED}[name]
    layout = mode.layout()
    tx = so.scale_by_soap(layout=layout, refresh=so.Refresh(2))
    params = mode.place(mode.like())
    # Drawn numbers in place of steps: of what fills a stack up none is looked at.
    drawn = helpers.gradients(jax.eval_shape(tx.init, params))
    state = jax.device_put(drawn, so.state_shardings(tx, params, layout))
    view = _blocks(checkpoint.to_param_view(state, params, layout))
    wanted = jax.tree.map(np.asarray, view)
    helpers.assert_equal(_through_the_table(state, params, layout), wanted)
    # And on the devices of another mesh, where its rows need not divide.
    for other in (MODES["fsdp3"], MODES["fsdp8"]):
        home = home_of(other.layout())
        found: dict[str, Any] = {}
        entries = entries_of(state, params, layout)
        for entry, leaf in zip(entries, jax.tree.leaves(state), strict=True):
            if isinstance(entry, stacks.Cut):
                aside = home.aside(leaf.shape)
                stack = jax.device_put(np.asarray(leaf), aside)
                parts = moves.taken(entry, stack, home, aside)
                stacks.put_parts(found, entry, parts)
        helpers.assert_equal(jax.tree.map(np.asarray, found), wanted)


def _saved(folder: Path, mode: Any, tx: Any, layout: so.BlockLayout) -> tuple[Any, Any]:
    params = mode.place(helpers.gradients(mode.like(), 1000))
    where = so.state_shardings(tx, params, layout)
    state = helpers.jit(tx.init, out_shardings=where)(params)
    for step in range(3):
        gradients = mode.place(helpers.gradients(mode.like(), step))
        _, state = helpers.jit(tx.update)(gradients, state, params)
    with checkpoint.manager(folder) as manager:
        checkpoint.save(manager, 1, params, state, layout)
    return params, state


@pytest.mark.parametrize("name", ["fsdp8", "hsdp", "merged"])
def test_where_it_lay_nothing_moves(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    """A file has an array a leaf, and the same mesh reads each to where it was."""
    mode = {**MODES, "merged": MERGED}[name]
    layout = mode.layout()
    tx = so.scale_by_shampoo(layout=layout, refresh=so.Refresh(2))
    params, state = _saved(tmp_path, mode, tx, layout)
    (file,) = (tmp_path / "1" / "spec").glob("metadata")
    arrays = json.loads(file.read_text())["arrays"]
    leaves = jax.tree.leaves(arrays, is_leaf=lambda node: "digest" in node)
    assert len(leaves) == 1 + len(jax.tree.leaves((params, state)))  # the version

    def moved(*_: Any) -> Any:
        raise AssertionError("blocks were taken apart")

    for module in ("host", "moves"):
        for move in ("taken", "given"):
            monkeypatch.setattr(f"shampoo_optax.checkpoint.{module}.{move}", moved)
    monkeypatch.setattr("shampoo_optax.checkpoint.opening.ON_HOST", None)
    like = jax.eval_shape(tx.init, params)
    with checkpoint.manager(tmp_path) as manager:
        found = checkpoint.restore(manager, params, like, layout)
    helpers.assert_equal(found.state, state)
    assert not helpers.type_changes(state, found.state)


@pytest.mark.parametrize("name", ["fsdp8", "fsdp3", "tensor", "conv", "merged"])
def test_elsewhere_it_is_the_same_view(name: str, tmp_path: Path) -> None:
    """From a mesh to one device, and from there to the mesh."""
    mode = {**MODES, "merged": MERGED}[name]
    alone = so.BlockLayout(BLOCK)

    def make(layout: so.BlockLayout) -> Any:
        return so.scale_by_shampoo(layout=layout, refresh=so.Refresh(2))

    layout = mode.layout()
    params, state = _saved(tmp_path, mode, make(layout), layout)
    wanted = checkpoint.to_param_view(state, params, layout)
    like = jax.tree.map(np.asarray, params)
    for step, (place, there) in enumerate([(dict, alone), (mode.place, layout)], 1):
        tx, placed = make(there), place(like)
        with checkpoint.manager(tmp_path) as manager:
            shapes = jax.eval_shape(tx.init, placed)
            found = checkpoint.restore(manager, placed, shapes, there, step=step)
            checkpoint.save(manager, step + 1, found.params, found.state, there)
        view = checkpoint.to_param_view(found.state, placed, there)
        helpers.assert_equal(*(jax.tree.map(np.asarray, v) for v in (view, wanted)))
